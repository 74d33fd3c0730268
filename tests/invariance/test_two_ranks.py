"""Two ranks learn what one rank learns. All runs on two ranks share one start of the launcher."""

from __future__ import annotations

import shutil
import sys
import time
from pathlib import Path

import pytest
import torch
from runs import Run, call, free_port
from torch.testing import assert_close

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.skipif(
        torch.cuda.is_available(), reason="NCCL takes one rank a GPU; for the CPU set CUDA_VISIBLE_DEVICES="
    ),
    pytest.mark.skipif(shutil.which("c++") is None, reason="DeepSpeed builds its CPU operation with a C++ compiler"),
]

SCRIPT = Path(__file__).with_name("two_ranks.py")
CLOSE = {"rtol": 1e-6, "atol": 2e-8}  # for the order of sums alone; most of it is equal to the bit


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    launcher = shutil.which("deepspeed") or str(Path(sys.executable).with_name("deepspeed"))
    ports = [str(free_port()) for _ in range(12)]
    command = [sys.executable, launcher, "--num_accelerators", "2", "--master_port", ports[0], str(SCRIPT)]
    started = time.monotonic()
    found = call([*command, str(folder), *ports[1:]], timeout=300)
    assert all((folder / f"done-{rank}").exists() for rank in (0, 1)), found.stdout + found.stderr
    return lambda name: Run(folder / name), found, time.monotonic() - started


def test_one_rank_with_two_tasks_is_two_ranks_with_one(two_ranks, make_run):
    one, two = make_run().train("trainer.tasks_per_step=2"), two_ranks[0]("zero2")
    assert_close(two.theta, one.theta, **CLOSE)
    for ours, theirs in zip(two.metrics, one.metrics, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)


def test_the_weight_posterior_on_two_ranks_with_checkpointing_is_one_without(two_ranks, make_run):
    one = make_run().train("adapters.posterior=weight", "trainer.tasks_per_step=2")
    assert_close(two_ranks[0]("weight whole").theta, one.theta, **CLOSE)


def test_one_rank_with_four_tasks_is_two_ranks_with_two(two_ranks, make_run):
    one = make_run().train("trainer.tasks_per_step=4")
    assert_close(two_ranks[0]("two each").theta, one.theta, **CLOSE)


def test_a_rank_without_an_episode_adds_nothing(two_ranks, make_run):
    one = make_run().train("trainer.tasks_per_step=2", "trainer.episodes=5")
    assert_close(two_ranks[0]("idle").theta, one.theta, **CLOSE)


def test_zero_stages(two_ranks):
    assert_close(two_ranks[0]("zero2").theta, two_ranks[0]("zero0").theta, **CLOSE)


def test_scores_do_not_depend_on_the_ranks(two_ranks, make_run):
    """Those of the theta that the two ranks ended with, scored on one."""
    two, one = two_ranks[0]("zero2"), make_run()
    with one.session() as session:
        session.parts.learner.adapters.load_theta(two.theta)
        session.finish(None)
    assert one.scores == two.scores


def test_resumed_on_two_ranks_equals_uninterrupted(two_ranks):
    two_ranks[0]("stopped").same_as(two_ranks[0]("whole"))
    two_ranks[0]("weight stopped").same_as(two_ranks[0]("weight whole"))


def test_a_checkpoint_of_two_ranks_is_refused_by_one(two_ranks):
    with (
        pytest.raises(ValueError, match="was written by 2 ranks and this run has 1; start it with 2, or"),
        two_ranks[0]("whole").session("method.reset_inner_optimizer=false", "trainer.checkpoint_every=1", resume=True),
    ):
        pass


def test_a_rank_that_raises_ends_the_run(two_ranks):
    """The other rank waits in a collective; it must not wait for ever."""
    _, found, seconds = two_ranks
    assert found.returncode != 0 and seconds < 240
    assert "Stopped" in found.stdout + found.stderr
