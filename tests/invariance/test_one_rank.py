"""Choices that must not change what is learned, on one rank: final theta, fp32."""

from __future__ import annotations

import pytest
from runs import Run
from torch.testing import assert_close

FULL = ("method.meta_gradient=first_order", "method.outer_batch=query", "trainer.episodes=4")


def settled(run: Run, *overrides: str) -> Run:
    return run.train(*FULL, *overrides)


@pytest.mark.parametrize("posterior", ["activation", "weight"])
def test_activation_checkpointing(make_run, posterior):
    """Noise drawn anew in the recomputation would change every gradient; a KL counted twice, the step lines."""
    kind = f"adapters.posterior={posterior}"
    off = settled(make_run("off"), kind, "trainer.activation_checkpointing=false")
    on = settled(make_run("on"), kind, "trainer.activation_checkpointing=true")
    on.same_as(off)


def test_zero_stages(make_run):
    zero0 = settled(make_run("zero0"), "trainer.deepspeed=configs/deepspeed/zero0.json", "trainer.tasks_per_step=2")
    zero2 = settled(make_run("zero2"), "trainer.deepspeed=configs/deepspeed/zero2.json", "trainer.tasks_per_step=2")
    assert_close(zero2.theta, zero0.theta, rtol=1e-6, atol=1e-9)


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
