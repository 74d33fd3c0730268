"""A run that is stopped and resumed is the run that was not, bit for bit."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import time
from collections.abc import Callable

import pytest
from forked import Command
from runs import METHODS, ROOT, Run, Stopped, stop_before

from abmll.config import Refused, load_config

LONG = ("trainer.episodes=16", "trainer.checkpoint_every=1", "eval.every=3", "eval.pretrained=true")


def killed(process: Command, when: Callable[[], bool]) -> int:
    """SIGKILL it once `when()`; its exit status."""
    deadline = time.monotonic() + 400
    while process.poll() is None and not when():
        assert time.monotonic() < deadline, "the moment to kill never came"
        time.sleep(0.001)
    process.kill()
    return process.wait(60)


def lines(run: Run) -> int:
    path = run.folder / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


def test_killed_runs_resumed_equal_the_uninterrupted_one(make_run, start):
    """Kills: after a step and a random moment, and while a checkpoint is being written."""
    seed = int.from_bytes(os.urandom(2), "little")
    print(f"seed {seed}")
    draw = random.Random(seed)
    whole, run = make_run("whole").train(*LONG), make_run("killed")
    first, pause = draw.randint(1, 5), draw.uniform(0, 0.1)

    def after_a_step() -> bool:
        return lines(run) >= first and not time.sleep(pause)

    assert killed(start(run.command(*LONG)), after_a_step) == -signal.SIGKILL
    assert first <= lines(run) < lines(whole)
    reached = lines(run)

    def while_saving() -> bool:
        return lines(run) > reached + 2 and any(run.folder.glob("checkpoints/.partial-step-*"))

    resumed = run.command(*LONG, "--resume", "auto")
    assert killed(start(resumed), while_saving) == -signal.SIGKILL
    assert reached < lines(run) < lines(whole)
    finished = start(resumed)
    assert finished.wait(400) == 0, finished.said
    assert "resumed from" in finished.said
    run.same_as(whole)


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("method.reset_inner_optimizer=false",),
        ("method.name=reptile", "trainer.tasks_per_step=2", "trainer.episodes=9"),
        ("method.kl_estimate=sample", "trainer.parallel_episodes=2", "trainer.tasks_per_step=2", "trainer.episodes=8"),
        *((f"method.name={name}", *others) for name, others in METHODS.items()),
        ("adapters.posterior=weight", "trainer.deepspeed=configs/deepspeed/zero0.json"),
    ],
    ids=lambda overrides: " ".join(overrides) or "abmll",
)
def test_stopped_and_resumed_equals_uninterrupted(make_run, monkeypatch, overrides):
    """Stopped a step after the checkpoint: the lines behind it are written again, the inner moments are restored."""
    overrides = ("eval.every=3", *overrides)
    whole, run = make_run("whole").train(*overrides), make_run("stopped")
    with monkeypatch.context() as patch:
        stop_before(patch, 3)
        with pytest.raises(Stopped):
            run.train(*overrides)
    assert [line["step"] for line in run.metrics if "episode" in line] == [1, 2, 3]
    run.train(*overrides, resume=True)
    run.same_as(whole)


def test_inner_moments_matter(make_run):
    """The test above would not see a loss of moments that change nothing."""
    kept = make_run("kept").train("method.reset_inner_optimizer=false")
    assert kept.theta_bytes != make_run("reset").train().theta_bytes


def test_resume_without_a_checkpoint_starts_from_the_beginning(make_run, monkeypatch, finished, capsys):
    run = make_run()
    with monkeypatch.context() as patch:
        stop_before(patch, 1)
        with pytest.raises(Stopped):
            run.train("eval.every=2")
    run.train("eval.every=2", resume=True)
    assert "no checkpoint" in capsys.readouterr().out
    run.same_as(finished)


def test_resume_of_a_finished_run_changes_nothing(make_run):
    run = make_run().train("eval.every=2", "eval.pretrained=true")
    metrics, scores, theta = run.metrics, run.scores, run.theta_bytes
    run.train("eval.every=2", "eval.pretrained=true", resume=True)
    assert (run.metrics, run.scores, run.theta_bytes) == (metrics, scores, theta)


def test_a_line_cut_off_by_a_kill_is_written_again(make_run, monkeypatch, finished):
    run = make_run()
    with monkeypatch.context() as patch:
        stop_before(patch, 3)
        with pytest.raises(Stopped):
            run.train("eval.every=2")
    with (run.folder / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 3, "epi')
    run.train("eval.every=2", resume=True)
    run.same_as(finished)


def test_resumed_to_be_scored_otherwise_the_pretrained_model_is_too(make_run, monkeypatch, capsys):
    """... and theta is what it would have been. Where no file says how the scores were made the checkpoint does."""
    asked = ("eval.pretrained=true",)
    other = (*asked, "eval.max_examples=2", "eval.prune.fraction=0.5", "eval.support_labels=shuffled")
    wanted, whole = make_run("wanted").train(*other), make_run("whole").train(*asked)
    assert wanted.scores[0] != whole.scores[0]
    for known in (True, False):
        run = make_run(f"stopped-{known}")
        with monkeypatch.context() as patch:
            stop_before(patch, 3)
            with pytest.raises(Stopped):
                run.train(*asked)
        if not known:
            (run.folder / "made_with.json").unlink()
        capsys.readouterr()
        run.train(*other, resume=True)
        told = capsys.readouterr().out
        assert "scored again: they were made otherwise, and are to be made with eval.prune: {'fraction': 0.5" in told
        assert run.scores == wanted.scores and run.theta_bytes == whole.theta_bytes
        run.train(*other, resume=True)
        assert "scored again" not in capsys.readouterr().out and run.scores == wanted.scores


@pytest.mark.parametrize("lost", ["never scored", "damaged"])
def test_resumed_without_the_pretrained_models_scores_they_are_made(make_run, monkeypatch, capsys, lost):
    asked = ("eval.pretrained=true",)
    whole, run = make_run("whole").train(*asked), make_run("stopped")
    with monkeypatch.context() as patch:
        stop_before(patch, 3)
        with pytest.raises(Stopped):
            run.train(*(asked if lost == "damaged" else ()))
    if lost == "damaged":
        (run.folder / "predictions.parquet").write_text("no table")
    run.train(*asked, resume=True)
    assert "the pretrained model is scored again: " in capsys.readouterr().out
    assert run.scores == whole.scores and run.theta_bytes == whole.theta_bytes


def test_the_best_step_is_not_tracked_by_two_ways_to_score(make_run, monkeypatch, capsys):
    run = make_run()
    with monkeypatch.context() as patch:
        stop_before(patch, 3)
        with pytest.raises(Stopped):
            run.train("eval.every=1")
    told = "note: validations are made with eval.support_labels: 'shuffled' now; the best step is tracked from here on"
    with run.session("eval.every=1", "eval.support_labels=shuffled", resume=True) as session:
        assert session.trainer.position.step == 2 and session.trainer.position.best is None
    assert told in capsys.readouterr().out
    with run.session("eval.every=1", "eval.max_examples=2", resume=True) as session:  # of test tasks alone
        assert session.trainer.position.best is not None
    assert "validations are made" not in capsys.readouterr().out


def test_a_mistake_found_late_costs_no_older_run(make_run, monkeypatch):
    run = make_run().train()
    theta = run.theta_bytes
    monkeypatch.setattr("abmll.engine.importlib.util.find_spec", lambda name: None)
    with pytest.raises(Refused, match=r"logging\.wandb_project: mine: the package is not installed"):
        run.train("logging.wandb_project=mine", overwrite=True)
    assert run.theta_bytes == theta and (run.folder / "checkpoints").is_dir()


def test_a_finished_run_of_another_configuration_is_not_replaced(make_run):
    """It has no checkpoint that would tell: of a method that trains nothing, or where somebody removed them."""
    run = make_run().train("method.name=pretrained")
    told = r"holds a finished run of another configuration.*\n.*method\.name: 'pretrained' in"
    with pytest.raises(Refused, match=told):
        run.train("method.name=fomaml", resume=True)
    assert load_config(run.folder / "config.yaml").method.name == "pretrained"
    run.train("method.name=pretrained", "logging.every=2", "method.outer_lr=1", resume=True)  # which it does not read


def test_an_annealed_step_is_annealed_over_one_length(make_run, monkeypatch):
    for schedule in ("annealed", "constant"):
        run, asked = make_run(schedule), ("method.name=reptile", f"method.reptile_schedule={schedule}")
        with monkeypatch.context() as patch:
            stop_before(patch, 3)
            with pytest.raises(Stopped):
                run.train(*asked)
        longer = (*asked, "trainer.episodes=8")
        if schedule == "annealed":
            with pytest.raises(Refused, match=r"trainer\.episodes: 6 in the checkpoint, 8 now"):
                run.train(*longer, resume=True)
        else:
            run.train(*longer, resume=True)


def test_a_longer_run_passes_over_no_episode(make_run):
    """The last step of three episodes has one of two: the fourth has no place in the steps behind it."""
    shorter, longer = (("trainer.tasks_per_step=2", f"trainer.episodes={number}") for number in (3, 6))
    run, whole = make_run("run").train(*shorter), make_run("whole").train(*longer)
    with pytest.raises(Refused, match=r"of the end of 3 episodes, .*: going on would pass over 1; remove it"):
        run.train(*longer, resume=True)
    run = make_run("even").train("trainer.tasks_per_step=2", "trainer.episodes=4")
    run.train(*longer, resume=True)
    assert run.theta_bytes == whole.theta_bytes


def test_a_mistake_in_the_engines_file_costs_no_finished_run(make_run, tmp_path):
    run, engine = make_run().train("trainer.episodes=1"), tmp_path / "engine.json"
    engine.write_text('{"zero_optimization": {"stage": 2, "overlap_com": false}, "gradient_clipping": 0.0}')
    with pytest.raises(Refused, match=r"overlap_com: False: unknown key; did you mean overlap_comm\?"):
        run.train(f"trainer.deepspeed={engine}", overwrite=True)
    assert run.scores and (run.folder / "checkpoints").is_dir()


def test_a_resume_has_the_tasks_that_it_was_started_with(make_run, monkeypatch, tmp_path):
    rows = [{"input": f"question {n}", "options": ["yes", "no"], "output": ("yes", "no")[n % 2]} for n in range(12)]

    def write(name: str, rows: list[dict]) -> None:
        (tmp_path / name).mkdir(exist_ok=True)
        for split in ("train", "test"):
            (tmp_path / name / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    for name in ("one", "two", "unseen"):
        write(name, rows)
    asked = ("tasks.source=jsonl", f"tasks.folder={tmp_path}", "tasks.missing=warn")
    asked = (*asked, "tasks.train=[one,two,three]", "tasks.test=[unseen]", "eval.pretrained=true")
    run = make_run()
    with monkeypatch.context() as patch:
        stop_before(patch, 3)
        with pytest.raises(Stopped):
            run.train(*asked)
    write("three", rows)
    write("two", rows[:-1])
    with pytest.raises(Refused, match=r"tasks: new: three \(training\); with other rows: two \(training\); episodes"):
        run.train(*asked, resume=True)
    shutil.rmtree(tmp_path / "three")
    write("two", rows)
    run.train(*asked, resume=True)


def test_a_resume_has_the_clipping_and_the_weights_that_it_was_started_with(make_run, monkeypatch, tmp_path):
    run, engine = make_run(), tmp_path / "engine.json"
    settings = json.loads((ROOT / "configs/deepspeed/zero2.json").read_text())
    engine.write_text(json.dumps(settings))
    asked = (f"trainer.deepspeed={engine}",)
    with monkeypatch.context() as patch:
        stop_before(patch, 3)
        with pytest.raises(Stopped):
            run.train(*asked)
    engine.write_text(json.dumps({**settings, "gradient_clipping": 0.5}))
    with pytest.raises(Refused, match=r"gradient_clipping: 0\.0 in the checkpoint, 0\.5 now"):
        run.train(*asked, resume=True)
    engine.write_text(json.dumps(settings))
    with monkeypatch.context() as patch:
        patch.setattr("abmll.build.fingerprint", lambda model: "another")
        with pytest.raises(Refused, match=r"fingerprint: .* in the checkpoint, 'another' now"):
            run.train(*asked, resume=True)
    run.train(*asked, resume=True)
