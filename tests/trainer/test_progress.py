"""What a run shows and writes while it goes."""

from __future__ import annotations

import dataclasses
import io
import json
import warnings

import pytest
from runs import Run

from abmll.config.schema import LoggingConfig, MethodConfig
from abmll.methods import METHODS
from abmll.progress import Progress, StepReport

TERMS = {
    "nll_first": 2.0,
    "nll_last": 1.5,
    "kl": 3e8,
    "nll_outer": 1.4,
    "kl_outer": 4e8,
    "prior": 5e9,
    "gradient_norm_phi": 0.5,
    "gradient_norm_theta": 0.25,
}
REPORT = StepReport(
    step=3,
    episode=3,
    num_episodes=24,
    epoch=1,
    terms=TERMS,
    weighted_kl=3.0,
    kl_by_layer=[123456.0, 0.25],
    real_tokens=1000,
    padded_tokens=1200,
    seconds=0.5,
    skipped=0,
)


class Monitor:
    """An engine as far as progress needs one."""

    def __init__(self):
        self.events = []

    def write_events(self, events, step):
        self.events.append((step, events))


@pytest.fixture
def progress(tmp_path):
    found = Progress(tmp_path, LoggingConfig(progress_bar=False), True, Monitor())
    found.start(0, 12)
    return found


def test_a_step_line_tells_the_place_the_terms_and_the_pace(progress, capsys):
    progress.report(REPORT)
    line = capsys.readouterr().out
    assert line.startswith("step 3/12 · episode 3/24 · epoch 1 · ") and " left · " in line
    for part in ("NLL 2.000 > 1.500 (outer 1.400)", "beta*KL 3 ", "2,000 tokens/s (2,400 padded)", "GiB peak"):
        assert part in line
    assert "skipped" not in line


def test_the_kl_by_layer_is_written_and_no_monitor_gets_a_list(progress):
    progress.report(REPORT)
    assert json.loads(progress.path.read_text())["kl_by_layer"] == [123456.0, 0.25]
    assert all(isinstance(value, int | float) for value in progress.engine.events[0][1].values())
    progress.report(dataclasses.replace(REPORT, kl_by_layer=[]))
    assert "kl_by_layer" not in json.loads(progress.path.read_text().splitlines()[1])


def test_point_estimates_have_no_kl_to_tell(progress, capsys):
    progress.report(dataclasses.replace(REPORT, terms={**TERMS, "kl": 0.0, "kl_outer": 0.0, "prior": 0.0}))
    assert "KL" not in capsys.readouterr().out


def test_only_a_kl_of_phis_steps_is_warned_of(tmp_path, capsys):
    """BLoB's, to a fixed prior, dwarfs the NLL at the published beta before anything has moved."""
    for pulled, told in ((True, 1), (False, 0)):
        progress = Progress(tmp_path, LoggingConfig(progress_bar=False), True, Monitor(), pulled)
        progress.start(0, 12)
        for _ in range(2):
            progress.report(dataclasses.replace(REPORT, weighted_kl=300.0))
        assert capsys.readouterr().out.count("warning: beta * KL = 300 dwarfs the NLL 1.4") == told
    pulled = {name: method(MethodConfig(name=name)).pulled_to_theta for name, method in METHODS.items()}
    assert [name for name, is_so in pulled.items() if is_so] == ["abmll"]


def test_a_step_without_a_finite_episode_is_valid_json(progress, capsys):
    progress.report(dataclasses.replace(REPORT, terms={}, weighted_kl=None, skipped=4))
    assert "skipped: NaN or Inf in every episode (4 skipped so far)" in capsys.readouterr().out

    def refuse(constant):
        raise AssertionError(constant)

    record = json.loads(progress.path.read_text(), parse_constant=refuse)
    assert record["skipped_episodes"] == 4 and "weighted_kl" not in record
    assert all(value is not None for value in progress.engine.events[0][1].values())


def test_lines_reach_a_log_at_once(progress, monkeypatch):
    """A pipe holds back what is not flushed."""
    stream = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=False)
    monkeypatch.setattr("sys.stdout", stream)
    progress.say("step")
    assert stream.buffer.getvalue() == b"step\n"


def test_no_bar_in_a_log(tmp_path, capsys):
    progress = Progress(tmp_path, LoggingConfig(progress_bar=True), True, Monitor())
    progress.start(0, 12)
    progress.report(REPORT)
    progress.close()
    captured = capsys.readouterr()
    assert captured.err == "" and "step 3/12" in captured.out


def test_other_ranks_are_silent(tmp_path, capsys):
    progress = Progress(tmp_path, LoggingConfig(), False, Monitor())
    progress.start(0, 12)
    progress.report(REPORT)
    progress.rewind(0)
    progress.close()
    assert capsys.readouterr() == ("", "") and not list(tmp_path.iterdir())


def test_rewind_keeps_what_a_checkpoint_has_seen(progress):
    for step in (1, 2, 3):
        progress.write({"step": step})
    with progress.path.open("a") as stream:
        stream.write('{"step": 1, "cut')
    progress.rewind(2)
    assert [json.loads(line)["step"] for line in progress.path.read_text().splitlines()] == [1, 2]


def test_monitors_write_when_asked(run: Run):
    pytest.importorskip("tensorboard")
    run.train("trainer.episodes=2", "eval.every=2", "logging.csv=true", "logging.tensorboard=true")
    monitor = run.folder / "monitor"
    assert (monitor / "train_nll_last.csv").read_text().count("\n") == 3  # a header and two steps
    assert (monitor / "validation_2_steps_accuracy.csv").exists()
    assert list(monitor.glob("events.out.tfevents.*"))


def test_csv_alone_needs_no_tensorboard(run: Run):
    run.train("trainer.episodes=1", "logging.csv=true")
    assert (run.folder / "monitor/train_nll_last.csv").exists()
    assert not list(run.folder.glob("monitor/events*"))


def test_a_run_with_checkpointing_warns_of_nothing(run: Run):
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        run.train("trainer.episodes=1", "trainer.activation_checkpointing=true", "method.meta_gradient=first_order")
    ours = [str(one.message) for one in found if one.category is not DeprecationWarning]
    assert ours == []


def test_a_validation_that_is_to_be_made_up_for_is_written_once(tmp_path):
    """A kill behind its line, before the checkpoint that says that it was made."""
    progress = Progress(tmp_path, LoggingConfig(), True, Monitor())
    for step in (1, 2):
        progress.write({"step": step, "episode": step})
        progress.write({"step": step, "validation_5_steps": {}})
    progress.write({"step": 3, "episode": 3})
    lines = [json.loads(line) for line in progress.path.read_text().splitlines()]
    progress.rewind(2)
    assert [json.loads(line) for line in progress.path.read_text().splitlines()] == lines[:4]
    progress.rewind(2, unvalidated=True)
    assert [json.loads(line) for line in progress.path.read_text().splitlines()] == lines[:3]
