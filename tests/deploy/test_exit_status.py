"""How the commands behind training end."""

import errno

import pytest
import torch

from abmll.config import Refused
from abmll.deploy.exit_status import exit_status


def ending(error):
    def command():
        raise error

    return command


@pytest.mark.parametrize(
    ("error", "status", "told"),
    [
        (Refused("--x: y: z"), 2, "error: --x: y: z"),
        (OSError(errno.ENOSPC, "No space left on device", "out.jsonl"), 2, "No space left on device: 'out.jsonl'"),
        (torch.OutOfMemoryError("CUDA out of memory"), 1, "lower tasks.batch_size or tasks.max_tokens"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), 1, "error: out of memory"),
    ],
)
def test_what_a_user_can_mend_is_one_message(error, status, told, capsys):
    assert exit_status(ending(error)) == status
    out, err = capsys.readouterr()
    assert told in err and "Traceback" not in err and not out


def test_other_errors_keep_their_traceback():
    with pytest.raises(RuntimeError, match="shapes"):
        exit_status(ending(RuntimeError("shapes")))


def test_a_command_that_ends_well():
    assert exit_status(lambda: None) == 0
