"""Two ranks learn what one rank learns. All runs on two ranks share one start of the launcher."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest
import torch
from outer_steps import OuterStep, check_steps
from runs import METHODS, ONE_STEP, Run, call

from abmll.ports import free_port

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.skipif(
        torch.cuda.is_available(), reason="NCCL takes one rank a GPU; for the CPU set CUDA_VISIBLE_DEVICES="
    ),
    pytest.mark.skipif(shutil.which("c++") is None, reason="DeepSpeed builds its CPU operation with a C++ compiler"),
]

SCRIPT = Path(__file__).with_name("two_ranks.py")


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    launcher = shutil.which("deepspeed") or str(Path(sys.executable).with_name("deepspeed"))
    command = [sys.executable, launcher, "--num_accelerators", "2", "--master_port", str(free_port()), str(SCRIPT)]
    found = call([*command, str(folder)], timeout=1100)  # far below PATIENCE: a rank that waits in vain is no end
    assert all((folder / f"done-{rank}").exists() for rank in (0, 1)), found.stdout + found.stderr
    # 66 MB for each rank of each start
    ports = [path.read_text() for path in folder.glob("port-*")]
    assert ports and not [
        path for port in ports for path in Path("/dev/shm").glob(f"deepspeed_allreduce_buffer_*_{port}_*")
    ]
    return lambda name: Run(folder / name), found


SAME = {
    "one task each": ("zero2", "trainer.tasks_per_step=2"),
    "at ZeRO stage 0": ("zero0", "trainer.tasks_per_step=2"),
    "two tasks each": ("two each", "trainer.tasks_per_step=4"),
    "the second without a task in the last step": ("idle", "trainer.tasks_per_step=2", "trainer.episodes=5"),
    "two, one and two again": ("moved", "trainer.tasks_per_step=2", "trainer.episodes=8"),
    "the weight posterior, checkpointed": ("weight whole", "trainer.tasks_per_step=2", "adapters.posterior=weight"),
    **{
        name: (f"{name} whole", "trainer.tasks_per_step=2", f"method.name={name}", *overrides, *ONE_STEP.get(name, ()))
        for name, overrides in METHODS.items()
    },
}


@pytest.mark.parametrize("name, overrides", [(name, rest) for name, *rest in SAME.values()], ids=SAME)
def test_two_ranks_learn_what_one_learns(two_ranks, make_run, name, overrides):
    """One rank visits as many tasks a step, at ZeRO stage 2 and without activation checkpointing."""
    two = two_ranks[0](name)
    steps = [OuterStep(*step) for step in torch.load(two.folder.with_suffix(".steps"))]
    check_steps(steps, make_run(), *overrides)
    assert all(torch.equal(value, steps[-1].after[name]) for name, value in two.theta.items())


def test_scores_do_not_depend_on_the_ranks(two_ranks, make_run):
    """Those of the theta that the two ranks ended with, scored on one."""
    two, one = two_ranks[0]("zero2"), make_run()
    with one.session() as session:
        session.parts.learner.adapters.load_theta(two.theta)
        session.finish(None)
    assert one.scores == two.scores


def test_resumed_on_two_ranks_equals_uninterrupted(two_ranks):
    two_ranks[0]("stopped").same_as(two_ranks[0]("whole"))
    for kind in ("weight", *METHODS):
        two_ranks[0](f"{kind} stopped").same_as(two_ranks[0](f"{kind} whole"))


def test_inner_moments_of_two_ranks_are_refused_by_one(two_ranks):
    with (
        pytest.raises(ValueError, match="ranks: 2 in the checkpoint, 1 now"),
        two_ranks[0]("whole").session("method.reset_inner_optimizer=false", "trainer.checkpoint_every=1", resume=True),
    ):
        pass


def test_a_rank_that_raises_ends_the_run(two_ranks):
    """The other rank waits in a collective, and would have waited until the fixture's timeout."""
    _, found = two_ranks
    assert found.returncode != 0
    assert "Stopped" in found.stdout + found.stderr
