"""Memory or disk that ran out, told as what the user can change."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from abmll.config import Config

FULL = {errno.ENOSPC: "no space is left", errno.EDQUOT: "the quota is used up", errno.EFBIG: "a file may not grow"}
# torch raises plain RuntimeErrors for the host's memory and for what libraries could not allocate
_MEMORY = ("can't allocate memory", "out of memory", "ALLOC_FAILED")


class Exhausted(RuntimeError):
    """The run cannot go on as it is set up on this machine; the message says what to change."""


@contextmanager
def told_as_settings(config: Config, folder: Path) -> Iterator[None]:
    """Turns what allocators and disks raise into Exhausted. `folder`: the run's."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not _is_memory(error):
            raise
        raise Exhausted(_memory_message(config, error)) from error
    except OSError as error:
        if error.errno not in FULL:
            raise
        raise Exhausted(
            f"output: {error.filename or folder}: {FULL[error.errno]}; free some, or lower trainer.keep_checkpoints; "
            "what was whole before still is, and --resume auto goes on from the newest checkpoint"
        ) from error


@contextmanager
def memory_told() -> Iterator[None]:
    """The same of the commands behind training, which have no checkpoint and no plan."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not _is_memory(error):
            raise
        raise Exhausted(
            f"out of memory: {_reason(error)}\nadapting takes less with trainer.activation_checkpointing=true, or a "
            "lower tasks.batch_size or tasks.max_tokens, behind the command; --device cpu takes the host's"
        ) from error


def _is_memory(error: BaseException) -> bool:
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return any(text in str(error) for text in _MEMORY)


def _memory_message(config: Config, error: BaseException) -> str:
    tasks, trainer = config.tasks, config.trainer
    checkpointing = str(trainer.activation_checkpointing).lower()
    return (
        f"out of memory: {_reason(error)}\nlower trainer.parallel_episodes ({trainer.parallel_episodes}) or "
        f"eval.batch_size ({config.eval.batch_size}), or set trainer.activation_checkpointing: true ({checkpointing}) "
        f"or memory.budget_gb ({config.memory.budget_gb:g}) to what is free: with these --resume auto goes on; or "
        f"start another run with a lower tasks.batch_size ({tasks.batch_size}) or tasks.max_tokens ({tasks.max_tokens})"
        f", model.quantization: nf4 ({config.model.quantization}) or model.sharding: full ({config.model.sharding}); "
        "launch/plan.py counts what each takes"
    )


def _reason(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0][:200] or type(error).__name__
