"""A fused projection's forward and backward pass: its arguments, and what the host calls in it, to be counted."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton.runtime import KernelInterface

from abmll.kernels import (
    FrozenLinear,
    GaussianFactors,
    Groups,
    LowRank,
    NoiseKey,
    PosteriorSettings,
    assume_gpu,
    posterior_projection,
)
from abmll.kernels.fused import launch
from abmll.kernels.fused.dry_run import BODIES

COUNTED = (1024, 4096, 4096)  # T, K, N: Llama3-8B's Q
RANK, LAYER = 8, 3
SETTINGS = PosteriorSettings(2.0, 2.0, -20.0, 1.0, 0.01)
# Names of operators that are no views and run no kernel of their own.
WITHOUT_A_KERNEL = (
    *("empty", "new_empty", "empty_like", "empty_strided"),
    *("_unsafe_view", "reshape", "contiguous", "mT", "promote_types"),
)


class Inputs:
    """A projection's arguments as an adapted layer has them: phi's factors are parameters, theta's need no gradient.

    `sizes`: tokens of each of several groups, each with factors of its own.
    """

    def __init__(self, tokens: int, inputs: int, outputs: int, sizes: Sequence[int] | None = None):
        lead = () if sizes is None else (len(sizes),)
        self.groups = None if sizes is None else Groups.of(sizes, "cpu")
        self.x = torch.randn(1, tokens, inputs, dtype=torch.bfloat16, requires_grad=True)
        self.weight = torch.randn(outputs, inputs, dtype=torch.bfloat16)
        shapes = ((RANK, inputs), (outputs, RANK)) * 2
        self.phi = [torch.nn.Parameter(torch.randn(*lead, *shape)) for shape in shapes]
        self.theta = [torch.nn.Parameter(torch.randn(shape), requires_grad=False) for shape in shapes]
        self.mask = torch.ones(1, tokens, dtype=torch.bool)
        self.names = NoiseKey(1, 2).rows(len(sizes or (tokens,)), "cpu")
        self.dy, self.dkl = torch.randn(1, tokens, outputs, dtype=torch.bfloat16), torch.ones(lead)

    def call(self, posterior: str) -> tuple[Tensor, Tensor]:
        phi, theta = (GaussianFactors(LowRank(*f[:2]), LowRank(*f[2:])) for f in (self.phi, self.theta))
        base = FrozenLinear(self.weight)
        arguments = (self.x, base, phi, theta, SETTINGS, self.names, LAYER, self.mask)
        return posterior_projection(posterior, *arguments, backend="triton", groups=self.groups)[:2]

    def step(self, posterior: str) -> None:
        torch.autograd.backward(self.call(posterior), (self.dy, self.dkl))
        self.x.grad = None
        for factor in self.phi:
            factor.grad = None

    def frozen(self) -> Tensor:
        return torch.nn.functional.linear(self.x, self.weight)

    def frozen_step(self) -> None:
        self.frozen().backward(self.dy)
        self.x.grad = None

    def forward_arguments(self, posterior: str) -> tuple:
        mask = (self.mask,) if posterior == "activation" else ()
        named = (SETTINGS, self.names, LAYER, True)
        return (self.x, self.weight, None, None, *mask, [*self.phi, *self.theta], *named)

    def backward_arguments(self, posterior: str) -> tuple:
        """As the inner step's derivative calls it: to x and phi, nobody asked about the prior."""
        tickets = launch.new_tickets(1, self.x.device)
        between = (tickets, self.weight)
        if posterior == "activation":
            p = torch.zeros(self.x.shape[1], 4 * RANK)
            between = (p, tickets, self.weight, self.mask)
        flags = (True, True, False)
        factors = [*self.phi, *self.theta]
        return (self.dy, self.dkl, None, self.x, *between, factors, SETTINGS, self.names, LAYER, *flags)


class CallCounter(TorchDispatchMode):
    """Counts the operators that PyTorch dispatches, the fused ones' bodies included, and what they allocate."""

    def __init__(self):
        super().__init__()
        self.called: list[OpOverload] = []
        self.allocations = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name()
        if name in BODIES:
            with self:
                return BODIES[name](*args, **(kwargs or {}))
        if func.namespace == "aten":
            self.called.append(func)
        found = func(*args, **(kwargs or {}))
        given = {tensor.untyped_storage()._cdata for tensor in _tensors((args, kwargs))}
        self.allocations += sum(
            tensor.numel() > 0 and tensor.untyped_storage()._cdata not in given for tensor in _tensors(found)
        )
        return found


def _tensors(nested: object) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(nested) if isinstance(leaf, Tensor)]


def count(posterior: str, sizes: Sequence[int] | None = None) -> dict[str, object]:
    """Operators, allocations and launches of a forward and backward pass at a real size; `sizes`: of its groups."""
    launches: list[str] = []

    class Recorder:
        def __init__(self, kernel: KernelInterface):
            self.name = kernel.__name__

        def __getitem__(self, grid: object) -> Callable[..., None]:
            return lambda *_, **__: launches.append(self.name)

    kernels = {name: kernel for name, kernel in vars(launch).items() if isinstance(kernel, KernelInterface)}
    for name, kernel in kernels.items():
        setattr(launch, name, Recorder(kernel))
    try:
        with FakeTensorMode(), assume_gpu():
            inputs = Inputs(*COUNTED, sizes)
            with CallCounter() as counter:
                inputs.step(posterior)
    finally:
        for name, kernel in kernels.items():
            setattr(launch, name, kernel)
    names = [(func.name().removeprefix("aten::"), func) for func in counter.called]
    return {
        "operators": len(names),
        "allocations": counter.allocations,
        "kernels": launches,
        "library": [n for n, func in names if not func.is_view and n.partition(".")[0] not in WITHOUT_A_KERNEL],
    }
