"""The summary: readable without DeepSpeed, whole at any moment."""

from __future__ import annotations

import sys

import pytest
import torch
from runs import Stopped, call
from test_checkpoint import interrupt

from abmll.summary import load_summary, save_summary

WITHOUT_DEEPSPEED = """
import sys
sys.modules["deepspeed"] = None  # import deepspeed fails
from pathlib import Path
from abmll.summary import load_summary
theta, facts = load_summary(Path(sys.argv[1]))
print(facts["trained_steps"], len(theta), *sorted(name for name in sys.modules if name.startswith("deepspeed")))
"""


def test_a_summary_loads_without_deepspeed(finished):
    found = call([sys.executable, "-c", WITHOUT_DEEPSPEED, str(finished.folder / "final")])
    assert found.returncode == 0, found.stderr
    assert found.stdout.split() == ["6", str(len(finished.theta)), "deepspeed"]


def test_a_folder_that_is_no_summary_is_named(tmp_path):
    with pytest.raises(ValueError, match=f"summary {tmp_path}: its manifest cannot be read .* such as RUN/final"):
        load_summary(tmp_path)


def test_a_kill_at_any_moment_leaves_the_old_the_new_or_none(tmp_path, monkeypatch):
    """In the middle of writing, and in the middle of removing the one before."""
    seen = set()
    for last in range(1000):
        folder = tmp_path / str(last) / "final"
        save_summary(folder, {"a": torch.zeros(3)}, {"step": 1})
        with monkeypatch.context() as patch:
            interrupt(patch, after=last)
            try:
                save_summary(folder, {"a": torch.ones(3)}, {"step": 2})
            except Stopped:
                pass
            else:
                break
        if folder.exists():
            theta, facts = load_summary(folder)
            assert torch.equal(theta["a"], torch.full((3,), facts["step"] - 1.0))
            seen.add(facts["step"])
        save_summary(folder, {"a": torch.zeros(3)}, {"step": 3})
        assert list(folder.parent.iterdir()) == [folder]
    assert seen == {1, 2}
