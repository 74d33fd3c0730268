"""Outer steps recorded, and held to what one rank computes, with bounds that follow from the arithmetic alone.

The order in which a sum is rounded is free: it depends on the ranks, on ZeRO's partitions, on the CPU's vector length.
No small bound holds for the theta that a run ends with: AdamW divides a gradient by its own size, which turns the last
bit of a gradient near zero into a part of a whole step, and the next episodes start from there. One step is different.
From the same theta every episode's own gradient is the same to the bit; the average over episodes, and AdamW's step
from it, are a few roundings each. So runs are compared step by step, each from where the recorded one stood; the
recorded steps follow from one another, so that nothing is left out.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import pytest
import torch
from deepspeed.utils import safe_get_full_grad
from runs import Run
from torch import Tensor

from abmll.run import Session
from abmll.trainer import COLUMNS, Trainer

UNIT = 2.0**-24  # a rounding to fp32 changes a number by at most this share of it
TINY = torch.finfo(torch.float32).tiny  # below it, by as much

Tensors = dict[str, Tensor]


class OuterStep(NamedTuple):
    """Theta before and after, the gradient that the optimizer took, and the step's table of all ranks."""

    before: Tensors
    gradient: Tensors
    after: Tensors
    table: Tensor


def _copy(tensors: Tensors) -> Tensors:
    return {name: value.detach().clone() for name, value in tensors.items()}


def _same(one: Tensors, other: Tensors) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@contextmanager
def recording() -> Iterator[list[OuterStep]]:
    """The outer steps that this process's trainers take meanwhile. On all ranks: the gradients are put together."""
    outer_step, steps = Trainer._outer_step, []

    def recorded(trainer: Trainer, number: int) -> Tensor:
        theta, engine, seen = trainer.engine.theta, trainer.engine.engine, {}
        before, engine_step = _copy(theta), engine.step

        def step() -> None:
            seen.update(_copy({name: safe_get_full_grad(parameter) for name, parameter in theta.items()}))
            engine_step()

        engine.step = step
        try:
            table = outer_step(trainer, number)
        finally:
            engine.step = engine_step
        steps.append(OuterStep(before, seen, _copy(theta), table))
        return table

    Trainer._outer_step = recorded
    try:
        yield steps
    finally:
        Trainer._outer_step = outer_step


def check_steps(steps: list[OuterStep], run: Run, *overrides: str) -> None:
    """All steps of a recorded run against `run`, the same configuration on one rank in this process."""
    with run.session(*overrides) as session, pytest.MonkeyPatch.context() as patch:
        assert len(steps) == session.trainer.num_steps > 1
        assert _same(steps[0].before, session.parts.learner.adapters.theta)
        check_optimizer(steps, session)
        episodes: list[Tensors] = []
        update = session.parts.method.update

        def kept(learner, visit):
            found = update(learner, visit)
            for slot in range(len(visit.episodes)):
                episodes.append(_copy({name: value[slot] for name, value in found.gradient.items()}))
            return found

        patch.setattr(session.parts.method, "update", kept)
        patch.setattr(session.trainer.engine, "step", lambda gradient: None)  # theta is given, not learned
        for number, step in enumerate(steps):
            episodes.clear()
            session.parts.learner.adapters.load_theta(step.before)
            table = session.trainer._outer_step(number)
            assert torch.equal(step.table, table)  # every episode's terms
            assert len(episodes) == table[:, COLUMNS.index("finite")].sum()
            _check_average(step.gradient, episodes)


def _check_average(gradient: Tensors, episodes: list[Tensors]) -> None:
    """The mean of n episodes: n - 1 sums in any order, a scale (rounded itself), and the division by the ranks."""
    n = len(episodes)
    assert all(gradient[name].any() for name in gradient if name.endswith(".b"))
    for name, value in gradient.items():
        terms = torch.stack([episode[name] for episode in episodes]).double()
        bound = 1.01 * (n + 2) * UNIT * terms.abs().mean(dim=0) + n * TINY
        assert ((value.double() - terms.mean(dim=0)).abs() <= bound).all(), name


def check_optimizer(steps: list[OuterStep], session: Session) -> None:
    """Every step against the method's AdamW in fp64 on the recorded gradients.

    After n steps the moments are averages of n gradients, each sum 5 roundings of at most the largest, G. The root of
    the second is at least G / sqrt(n), as its weights are nearly equal: so their quotient is off by at most
    (5 n + 1.5 n + 7) sqrt(n) roundings of 1, the 7 being the two corrections, root, epsilon, quotient and product.
    Theta's own addition rounds once more.
    """
    lr, method = session.config.method.outer_lr, session.parts.method
    exact = {name: value.double().requires_grad_() for name, value in steps[0].before.items()}
    optimizer = method.outer_optimizer(exact.values())
    for n, step in enumerate(steps, start=1):
        assert n == 1 or _same(step.before, steps[n - 2].after)
        assert not _same(step.before, step.after)
        with torch.no_grad():
            for name, value in exact.items():
                value.copy_(step.before[name])
                value.grad = step.gradient[name].double()
        optimizer.step()
        for name, value in exact.items():
            bound = UNIT * (1.01 * value.abs() + (6.5 * n + 7) * n**0.5 * lr) + TINY
            assert ((step.after[name].double() - value).abs() <= bound).all(), (n, name)
