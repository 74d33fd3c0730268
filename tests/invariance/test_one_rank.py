"""Choices that must not change what is learned, on one rank: final theta, fp32."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path

import pytest
from outer_steps import check_steps, recording
from runs import Run, Stopped, stop_before
from torch.testing import assert_close

FULL = ("method.meta_gradient=first_order", "method.outer_batch=query", "trainer.episodes=4")


def settled(run: Run, *overrides: str, resume: bool = False) -> Run:
    return run.train(*FULL, *overrides, resume=resume)


def deepspeed_file(folder: Path, stage: int) -> str:
    """The override that names an engine's settings, written to the folder."""
    path = folder / f"zero{stage}.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": stage}, "gradient_clipping": 0.0}))
    return f"trainer.deepspeed={path}"


@pytest.mark.parametrize("posterior", ["activation", "weight"])
def test_activation_checkpointing(make_run, posterior):
    """Noise drawn anew in the recomputation would change every gradient; a KL counted twice, the step lines."""
    kind = f"adapters.posterior={posterior}"
    off = settled(make_run("off"), kind, "trainer.activation_checkpointing=false")
    on = settled(make_run("on"), kind, "trainer.activation_checkpointing=true")
    on.same_as(off)


@pytest.mark.parametrize("stage", [0, 2])
def test_zero_stages(make_run, stage):
    """Both average the episodes' gradients and take AdamW's steps, as far as fp32 goes."""
    with recording() as steps:
        settled(make_run(), f"trainer.deepspeed=configs/deepspeed/zero{stage}.json", "trainer.tasks_per_step=2")
    check_steps(steps, make_run("again"), *FULL, "trainer.tasks_per_step=2")


def test_zero_stages_in_turn(make_run, monkeypatch, tmp_path):
    """Resumed at another stage, a run takes the steps that it would have taken."""
    run, kind = make_run(), ("trainer.tasks_per_step=2", "trainer.episodes=12", "trainer.checkpoint_every=1")
    with recording() as steps:
        for stage, end in ((2, 2), (0, 3), (1, 4), (2, 6)):
            with monkeypatch.context() as patch:
                if end < 6:
                    stop_before(patch, end)
                with pytest.raises(Stopped) if end < 6 else nullcontext():
                    settled(run, *kind, deepspeed_file(tmp_path, stage), resume=end > 2)
    check_steps(steps, make_run("again"), *FULL, *kind)


def test_checkpoints_and_validations_change_nothing(make_run):
    often = settled(make_run("often"), "trainer.checkpoint_every=1", "trainer.keep_checkpoints=1")
    never = settled(make_run("never"), "trainer.checkpoint_every=null", "eval.samples=0")
    assert often.theta_bytes == never.theta_bytes
    validated = make_run("validated")
    with validated.session(*FULL, "eval.every=1", "eval.samples=2") as session:
        session.trainer.run()
        theta = session.parts.learner.adapters.theta
        assert_close({name: value.detach() for name, value in theta.items()}, never.theta, rtol=0, atol=0)


def test_another_seed_is_another_run(make_run):
    """Or the comparisons above compare nothing."""
    assert settled(make_run("0")).theta_bytes != settled(make_run("1"), "seed=1").theta_bytes
