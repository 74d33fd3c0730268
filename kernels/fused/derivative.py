"""What both posteriors' derivatives share: which gradients are asked for, and where autograd wants them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor


class Needs(NamedTuple):
    """What a backward pass is asked for, and its results in the places where autograd wants them."""

    x: bool
    phi: bool
    theta: bool
    dsums: Tensor | None

    @classmethod
    def of(cls, x: bool, factors: Sequence[Sequence[bool]], dy: Tensor | None, dsums: Tensor | None) -> Needs:
        """`factors`: of phi's and theta's factors, which need gradients. Theta has a part in the sums alone."""
        if dsums is not None and dsums.numel() == 0:
            dsums = None
        if dy is None and dsums is None:
            return cls(False, False, False, None)
        phi, theta = map(any, factors)
        return cls(x, phi, theta and dsums is not None, dsums)

    @property
    def flags(self) -> tuple[bool, bool, bool]:
        return self.x, self.phi, self.theta

    @property
    def anything(self) -> bool:
        return any(self.flags)

    def distribute(
        self, dx: Tensor, da: Tensor, db: Tensor, theta_factors: int
    ) -> tuple[Tensor | None, list[Tensor | None], list[Tensor | None]]:
        """dx, phi's four gradients and theta's (summed over the groups that share it); None where not needed."""
        phi: list[Tensor | None] = [da[0], db[0], da[1], db[1]] if self.phi else [None] * 4
        theta: list[Tensor | None] = [None] * theta_factors
        if self.theta:
            theta = [part.sum(dim=0) for part in (da[-2], db[-2], da[-1], db[-1])]
        return dx if self.x else None, phi, theta
