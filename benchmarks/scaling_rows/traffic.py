"""What a rank hands to the collectives: by collective and by phase of a step."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from typing import Any
from unittest.mock import patch

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from abmll.engine import ThetaEngine
from abmll.learner import Learner
from abmll.trainer import Trainer

# Operators of a process group, by what they do. All of torch.distributed's functions end in one of these.
KINDS = {
    "allreduce": "all-reduce",
    "reduce_scatter": "reduce-scatter",
    "_reduce_scatter_base": "reduce-scatter",
    "reduce": "reduce",
    "allgather": "all-gather",
    "_allgather_base": "all-gather",
    "broadcast": "broadcast",
    "alltoall": "all-to-all",
    "barrier": "barrier",
}
OUTER, INNER, EPISODE, ENGINE = "outer step", "inner loop", "rest of the episode", "engine step"


class Traffic(TorchDispatchMode):
    """Counts collectives while it is entered. `bytes`: the largest of a call's tensors or lists of tensors.

    That is the whole vector that is reduced, scattered or gathered, whatever the algorithm sends of it: of an
    all-gather and of a reduce-scatter all ranks' parts together.
    """

    def __init__(self):
        super().__init__()
        self.phases = [OUTER]
        self.calls: Counter[tuple[str, str]] = Counter()
        self.bytes: Counter[tuple[str, str]] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if function.namespace == "c10d":
            name = function._schema.name.partition("::")[2].rstrip("_")
            key = self.phases[-1], KINDS.get(name, name)
            self.calls[key] += 1
            if key[1] != "barrier":
                self.bytes[key] += max(map(_bytes, args))
        return function(*args, **(kwargs or {}))

    @contextmanager
    def watching(self) -> Iterator[Traffic]:
        """Entered, and told of the phases as they begin and end."""
        parts = [(Learner, "phi_step", INNER), (Trainer, "_update", EPISODE), (ThetaEngine, "step", ENGINE)]
        with ExitStack() as stack:
            for owner, name, phase in parts:
                stack.enter_context(patch.object(owner, name, self._in(phase, getattr(owner, name))))
            yield stack.enter_context(self)

    def _in(self, phase: str, function: Callable) -> Callable:
        @wraps(function)
        def noted(*arguments, **named):
            self.phases.append(phase)
            try:
                return function(*arguments, **named)
            finally:
                self.phases.pop()

        return noted

    def rows(self) -> list[dict[str, Any]]:
        return [
            {"phase": phase, "collective": kind, "calls": calls, "bytes": self.bytes[phase, kind]}
            for (phase, kind), calls in sorted(self.calls.items())
        ]


def _bytes(value: Any) -> int:
    return sum(leaf.nbytes for leaf in tree_leaves(value) if isinstance(leaf, Tensor))


def traffic_of_step(trainer: Trainer, step: int) -> list[dict[str, Any]]:
    """Rows of one outer step."""
    with Traffic().watching() as found:
        trainer._outer_step(step)
    return found.rows()
