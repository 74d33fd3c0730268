"""What ends a run early leaves its last good state, and the run goes on from there as if nothing had happened.

Kills at random moments are `tests/benchmarks/test_soak.py`'s; here each fault has its own place.
"""

from __future__ import annotations

import json
import os
import resource
import signal
from contextlib import contextmanager

import pytest
import torch
from runs import Run
from test_checkpoint import flip, truncate

from abmll import run as commands
from abmll.checkpoint import CheckpointStore, newest_whole
from abmll.engine import ThetaEngine
from abmll.evaluation import Evaluator
from abmll.exhausted import Exhausted
from abmll.files import damage, whole_lines
from abmll.interrupt import Interrupted
from abmll.learner import Learner
from abmll.progress import Progress
from abmll.summary import load_summary
from abmll.tensor_files import read_tensors
from abmll.trainer import Trainer, TrainingDiverged

EVERY = "eval.every=2"


@pytest.fixture(autouse=True)
def sigterm_as_before():
    """A process that was asked to stop keeps ignoring the signal, as it is about to end; this one is not."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


def at(monkeypatch, owner, name: str, call: int, do) -> None:
    """Run `do(function)` instead of `function()` in call number `call` (from 0) of a method, once."""
    function, calls = getattr(owner, name), [0]

    def counted(*arguments, **keywords):
        calls[0] += 1
        if calls[0] == call + 1:
            return do(lambda: function(*arguments, **keywords))
        return function(*arguments, **keywords)

    monkeypatch.setattr(owner, name, counted)


def in_training(monkeypatch, owner, name: str, call: int, do) -> None:
    """The same of calls since training began: the memory plan makes an episode too."""
    begin = Trainer.run

    def beginning(trainer):
        at(monkeypatch, owner, name, call, do)
        begin(trainer)

    monkeypatch.setattr(Trainer, "run", beginning)


def ask_to_stop(function):
    os.kill(os.getpid(), signal.SIGTERM)
    return function()


# where SIGTERM comes: the call that it comes in, and the steps whose lines are there then
MOMENTS = {
    "inner step": (Learner, "phi_step", 9, 3),  # two a step, and four of the validation after step 2
    "outer step": (Trainer, "_outer_step", 2, 3),
    "step of theta": (ThetaEngine, "step", 2, 4),  # behind the exchange: the next step's carries it
    "validation": (Evaluator, "_evaluate_tasks", 0, 2),  # with one more task to go
    "checkpoint": (CheckpointStore, "save", 0, 3),
    "final scores": (Evaluator, "_evaluate_tasks", 6, 6),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_sigterm_stops_behind_the_step_and_the_run_goes_on(make_run, monkeypatch, finished, moment):
    owner, name, call, steps = MOMENTS[moment]
    run = make_run()
    with monkeypatch.context() as patch:
        in_training(patch, owner, name, call, ask_to_stop)
        with pytest.raises(Interrupted, match="stopped"):
            run.train(EVERY)
    assert len([line for line in run.metrics if "episode" in line]) == steps
    checkpoint = newest_whole(run.folder / "checkpoints")
    assert checkpoint.state["position"]["step"] == steps
    assert checkpoint.state["position"]["unvalidated"] == (moment in ("validation", "step of theta"))
    run.train(EVERY, resume=True)
    run.same_as(finished)


def test_sigterm_before_the_first_step_leaves_nothing_to_go_on_from(make_run, monkeypatch):
    run = make_run()
    with monkeypatch.context() as patch:
        at(patch, Evaluator, "_evaluate_tasks", 0, ask_to_stop)
        with pytest.raises(Interrupted, match="stopped while scoring pretrained"):
            run.train("eval.pretrained=true", "trainer.episodes=1")
    assert not (run.folder / "checkpoints").exists()
    run.train("eval.pretrained=true", "trainer.episodes=1", resume=True)
    assert [found["method"] for found in run.scores] == ["pretrained", "abmll"]


def test_sigterm_is_told_with_its_status(run, monkeypatch, command, capsys):
    with monkeypatch.context() as patch:
        in_training(patch, Learner, "phi_step", 0, ask_to_stop)
        assert command("trainer.episodes=3") == 143
    error = capsys.readouterr().err
    assert f"SIGTERM: stopped after outer step 1 of 3, with a checkpoint in {run.folder / 'checkpoints'}" in error
    assert "--resume auto goes on" in error and "Traceback" not in error


def no_memory(text: str):
    def fail(function):
        raise torch.OutOfMemoryError(text)

    return fail


SHORT = {
    "a GPU's": no_memory("CUDA out of memory. Tried to allocate 2.00 GiB."),
    "the host's": lambda function: torch.empty(2**50, dtype=torch.uint8),
    "Python's": lambda function: bytearray(2**62),
}


@pytest.mark.parametrize("do", SHORT.values(), ids=SHORT)
def test_memory_that_runs_out_names_the_settings(run, monkeypatch, command, capsys, finished, do):
    with monkeypatch.context() as patch:
        in_training(patch, Learner, "phi_step", 7, do)
        assert command(EVERY) == 1
    error = capsys.readouterr().err
    for key in (
        *("tasks.batch_size (2)", "tasks.max_tokens (1024)", "trainer.parallel_episodes (1)", "model.quantization"),
        *("trainer.activation_checkpointing: true (false)", "--resume auto", "memory.budget_gb"),
    ):
        assert key in error
    assert "error: out of memory: " in error and "Traceback" not in error
    run.train(EVERY, resume=True)
    run.same_as(finished)


def test_other_errors_keep_their_traceback(run, monkeypatch):
    def fail(function):
        raise RuntimeError("shape mismatch")

    in_training(monkeypatch, Learner, "phi_step", 0, fail)
    with pytest.raises(RuntimeError, match="shape mismatch"):
        run.train()


@contextmanager
def full(size: int):
    """No file may grow beyond so many bytes: the part of a write that fits is written, as on a disk that fills up."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def on_a_full_disk(size: int):
    def do(function):
        with full(size):
            return function()

    return do


# what is written when the disk is full, the call, and the bytes that still fit: also of the files behind the first
WRITES = {
    "theta of a checkpoint": (CheckpointStore, "save", 1, 5_000),
    "moments of a checkpoint": (CheckpointStore, "save", 1, 20_000),
    "the last byte of a checkpoint's largest file": (CheckpointStore, "save", 1, None),
    "a step line": (Progress, "write", 3, 2_000),
    "episode lines": (Progress, "write_episodes", 2, 600),
    "the best summary": (commands, "save_summary", 0, 3_000),
    "the final summary": (commands.Session, "finish", 0, 3_000),
    "scores": (commands, "save_scores", 0, 1_000),
}


@pytest.mark.parametrize("what", WRITES)
def test_a_full_disk_costs_nothing_that_was_whole(make_run, monkeypatch, finished, what):
    owner, name, call, size = WRITES[what]
    run = make_run()
    size = size or max(path.stat().st_size for path in finished.folder.glob("checkpoints/*4/*")) - 1
    with monkeypatch.context() as patch:
        at(patch, owner, name, call, on_a_full_disk(size))
        with pytest.raises(Exhausted, match=r"output: .*a file may not grow; free some, .* --resume auto goes on"):
            run.train(EVERY)
    for folder in (run.folder / "checkpoints", run.folder / "best"):
        for kept in folder.glob("step-*"):
            assert damage(kept) is None
    run.train(EVERY, resume=True)
    run.same_as(finished)
    assert not list(run.folder.rglob(".partial-*"))


def fill_nan(tensors) -> None:
    with torch.no_grad():
        next(iter(tensors)).view(-1)[0] = float("nan")


def bad_loss(session, monkeypatch):
    # three a step, and four of a validation
    at(monkeypatch, session.parts.learner, "nll", 13, lambda function: function() * float("nan"))


def bad_gradient(session, monkeypatch):
    def do(function):
        terms = function()
        fill_nan(value.grad for value in session.parts.learner.adapters.phi.values())
        return terms

    at(monkeypatch, session.parts.learner, "_phi_gradient", 10, do)


def bad_phi(session, monkeypatch):
    def do(function):
        terms = function()
        fill_nan(session.parts.learner.adapters.phi.values())
        return terms

    at(monkeypatch, session.parts.learner, "phi_step", 11, do)  # the last one: the step of theta reads it


def bad_theta(session, monkeypatch):
    def do(function):
        function()
        fill_nan(session.parts.learner.adapters.theta.values())

    at(monkeypatch, session.engine, "step", 3, do)


@pytest.mark.parametrize("inject", [bad_loss, bad_gradient, bad_phi, bad_theta])
def test_nan_reaches_no_checkpoint_and_the_run_goes_on(make_run, monkeypatch, finished, inject):
    """In the fourth step, where a checkpoint is due."""
    run = make_run()
    with monkeypatch.context() as patch, run.session(EVERY, "trainer.max_nonfinite=1") as session:
        inject(session, patch)
        with pytest.raises(TrainingDiverged, match="unharmed"):
            session.trainer.run()
    checkpoint = newest_whole(run.folder / "checkpoints")
    assert checkpoint.state["step"] == 2
    for name in ("theta.safetensors", "moments.safetensors"):
        assert all(value.isfinite().all() for value in read_tensors(checkpoint.folder / name)[0].values())
    run.train(EVERY, "trainer.max_nonfinite=1", resume=True)
    run.same_as(finished)


@pytest.fixture(scope="module")
def copies(finished, tmp_path_factory):
    """Fresh copies of the finished run's folder."""
    import shutil

    def make() -> Run:
        run = Run(tmp_path_factory.mktemp("copy") / "run")
        shutil.copytree(finished.folder, run.folder)
        return run

    return make


def empty(path) -> None:
    path.write_bytes(b"")


def append(path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")


@pytest.mark.parametrize("harm", [truncate, empty, flip, append, os.unlink])
def test_every_file_of_a_checkpoint_and_a_summary_counts(copies, harm):
    names = sorted(path.name for path in next(copies().folder.glob("checkpoints/step-*")).iterdir())
    assert len(names) == 6
    run = copies()
    older, newer = sorted((run.folder / "checkpoints").iterdir())
    for name in names:
        whole = (newer / name).read_bytes()
        harm(newer / name)
        if harm is append and name == "manifest.json":
            assert damage(newer) is not None  # no JSON any more
        with pytest.warns(UserWarning, match="trying the one before"):
            assert newest_whole(newer.parent).folder == older
        (newer / name).write_bytes(whole)
    assert newest_whole(newer.parent).folder == newer
    for name in ("theta.safetensors", "summary.json", "manifest.json"):
        path = run.folder / "final" / name
        whole = path.read_bytes()
        harm(path)
        with pytest.raises(ValueError, match=r"summary .*; name a folder written by a run"):
            load_summary(path.parent)
        path.write_bytes(whole)
    assert load_summary(run.folder / "final")


def test_a_run_goes_on_from_the_checkpoint_before_a_damaged_one(copies, finished):
    run = copies()
    newest = max((run.folder / "checkpoints").iterdir())
    truncate(newest / "moments.safetensors")
    with pytest.warns(UserWarning, match=r"moments\.safetensors is damaged; trying the one before"):
        run.train(EVERY, resume=True)
    run.same_as(finished)


def test_readers_leave_out_a_line_that_was_cut_off(tmp_path):
    path = tmp_path / "metrics.jsonl"
    good = [{"step": 1}, {"step": 2, "task": "é"}]
    text = "".join(json.dumps(line) + "\n" for line in good)
    for torn in ('{"step": 3, "epi', "\x00\x00\x00", "7", "[" * 100_000, "{"):
        path.write_text(text + torn)
        assert whole_lines(path) == good
    path.write_bytes(text.encode() + b'{"a": "\xff')
    assert whole_lines(path) == good


def test_lines_cut_off_by_a_power_cut_are_written_again(copies):
    """Zeros, half a character and another program's line: none of them is of a step that was reached."""
    run = copies()
    with run.session(EVERY, resume=True) as session:
        expected = session.progress.path.read_bytes()
        for torn in (b"\0\0\0\0", b'{"step": 1, "task": "\xc3', b"5\n", b'{"stop": 1}\n', b"[]\n", b'{"step": [1]}\n'):
            session.progress.path.write_bytes(expected + torn)
            session.progress.rewind(6)
            assert session.progress.path.read_bytes() == expected
