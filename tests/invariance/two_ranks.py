"""Run by the deepspeed launcher on two ranks: the runs that test_two_ranks.py compares, in one start of the processes.

usage: two_ranks.py FOLDER   FOLDER/RUN.yaml holds the configuration of each run.
"""

from __future__ import annotations

import itertools
import os
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "trainer"))

from outer_steps import recording
from runs import METHODS, ONE_STEP, Run, Stopped, counted_once, meet

import abmll.memory.plan
from abmll.trainer import Trainer


def main() -> None:
    [folder] = [Path(argument) for argument in sys.argv[1:] if not argument.startswith("--local_rank")]
    starts = itertools.count()
    torch.set_num_threads(1)
    abmll.memory.plan.count_episode = counted_once(abmll.memory.plan.count_episode)

    taken: dict[str, list] = {}  # the steps of each run, over its resumptions

    def train(name: str, *overrides: str, **keywords: bool) -> None:
        meet(folder, next(starts))
        with recording() as steps:
            try:
                Run(folder / name).train(*overrides, **keywords)
            finally:
                taken.setdefault(name, []).extend(map(tuple, steps))
        if os.environ["RANK"] == "0":
            torch.save(taken[name], folder / f"{name}.steps")

    train("zero2")
    train("zero0", "trainer.deepspeed=configs/deepspeed/zero0.json")
    train("idle", "trainer.episodes=5")  # the second rank has no episode in the last step
    train("two each", "trainer.tasks_per_step=4")

    outer_step = Trainer._outer_step

    def train_until(step: int, *arguments: str, **keywords: bool) -> None:
        Trainer._outer_step = lambda trainer, at: stop() if at == step else outer_step(trainer, at)
        try:
            train(*arguments, "trainer.checkpoint_every=1", **keywords)
        except Stopped:
            Trainer._outer_step = outer_step

    def stop_and_resume(kind: str, *overrides: str) -> None:
        """A run stopped at its third step and resumed, and one that was left alone."""
        train_until(2, f"{kind}stopped", *overrides)
        train(f"{kind}stopped", *overrides, "trainer.checkpoint_every=1", resume=True)
        train(f"{kind}whole", *overrides, "trainer.checkpoint_every=1")

    stop_and_resume("", "method.reset_inner_optimizer=false")
    stop_and_resume("weight ", "adapters.posterior=weight", "trainer.activation_checkpointing=true")

    for name, overrides in METHODS.items():
        stop_and_resume(f"{name} ", f"method.name={name}", *overrides, *ONE_STEP.get(name, ()))

    # two ranks, one at another ZeRO stage, and two again; the second waits meanwhile
    train_until(1, "moved", "trainer.episodes=8")
    if os.environ["RANK"] == "0":
        os.environ["WORLD_SIZE"] = "1"
        train_until(3, "moved", "trainer.episodes=8", "trainer.deepspeed=configs/deepspeed/zero0.json", resume=True)
        os.environ["WORLD_SIZE"] = "2"
        (folder / "moved.ready").touch()
    else:
        next(starts)
        while not (folder / "moved.ready").exists():
            time.sleep(0.1)
    train("moved", "trainer.episodes=8", resume=True)

    (folder / f"done-{os.environ['RANK']}").touch()
    if os.environ["RANK"] == "1":
        Trainer._outer_step = lambda trainer, step: stop()  # the other rank is left waiting
    train("alone")


def stop():
    raise Stopped


if __name__ == "__main__":
    main()
