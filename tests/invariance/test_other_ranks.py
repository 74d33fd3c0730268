"""A run goes on with other ranks, other episodes side by side, another ZeRO stage: through the user's command."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest
import torch
from runs import TRAIN, Run, call

from abmll.ports import free_port

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.skipif(
        torch.cuda.is_available(), reason="NCCL takes one rank a GPU; for the CPU set CUDA_VISIBLE_DEVICES="
    ),
    pytest.mark.skipif(shutil.which("c++") is None, reason="DeepSpeed builds its CPU operation with a C++ compiler"),
]

# AdamW divides by the gradient's own size, which magnifies the last bit of a gradient near zero. With an eps above all
# gradients its steps are proportional to them, and rounding stays rounding.
SMOOTH = ("method.adam_eps=30", "method.inner_lr=3e-2", "method.outer_lr=10", "method.meta_gradient=first_order")
# Four steps of some twenty roundings: the average over two episodes, AdamW's moments and update.
BOUND = 4 * 20 * 2.0**-24
ZERO = ("trainer.deepspeed=configs/deepspeed/zero2.json", "trainer.deepspeed=configs/deepspeed/zero0.json")


def on_two_ranks(run: Run, *arguments: str) -> str:
    launcher = shutil.which("deepspeed") or str(Path(sys.executable).with_name("deepspeed"))
    launch = [sys.executable, launcher, "--num_accelerators", "2", "--master_port", str(free_port())]
    found = call([*launch, str(TRAIN), "--config", str(run.config), *SMOOTH, *arguments], timeout=400)
    assert found.returncode == 0, found.stdout + found.stderr
    return found.stdout


def test_two_ranks_one_and_two_again(make_run, start):
    whole, run = make_run("whole"), make_run("moved")
    whole.train(*SMOOTH, "trainer.episodes=8", "trainer.tasks_per_step=2")  # in this process, on one rank

    out = on_two_ranks(run, "trainer.episodes=4", ZERO[0])
    assert "2 of 2 episodes on 2 ranks" in out
    alone = start(
        run.command(*SMOOTH, "trainer.episodes=6", ZERO[1], "--resume", "auto", "trainer.parallel_episodes=2")
    )
    assert alone.wait(400) == 0, alone.said
    out = alone.said
    assert "3 of 2 episodes on 1 ranks" in out
    assert "2 ranks wrote it, 1 go on: an outer step has 2 episodes as before" in out
    out = on_two_ranks(run, "trainer.episodes=8", ZERO[0], "--resume", "auto")
    assert "4 of 2 episodes on 2 ranks" in out
    assert "1 ranks wrote it, 2 go on: an outer step has 2 episodes as before" in out

    assert len(run.metrics) == len(whole.metrics) == 4
    for found, expected in zip(run.metrics, whole.metrics, strict=True):  # NLL, KL, norms: of the same episodes
        assert found == pytest.approx(expected, rel=BOUND)
    theta = run.theta
    for name, value in whole.theta.items():
        if name.endswith(".b"):  # zero at the start: all of it was learned
            assert value.any() and (theta[name] - value).norm() <= BOUND * value.norm(), name
