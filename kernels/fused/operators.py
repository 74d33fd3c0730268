"""How the fused operators are registered: with PyTorch's dispatcher as opaque ones, and by name with their bodies.

`torch.library.custom_op` does the same and more: it adds 100 us of the host's time to a forward and backward call of a
bare `autograd.Function`. Of that a schema, a body, shapes for tracing and a derivative are needed here, which
`torch.library.Library` registers at 15 us (both measured on one CPU core, torch 2.13).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch._ops import OpOverload

LIBRARY = torch.library.Library("abmll", "DEF")

# The functions under the operators, by the names that `OpOverload.name()` gives: "abmll::activation_forward". On fake
# tensors an operator allocates its outputs alone; its body, run under `dry_run.dry_launches`, all that it does.
BODIES: dict[str, Callable] = {}


def operator(body: Callable) -> OpOverload:
    """Decorator: an operator of the body's name, which writes to none of its arguments and returns new tensors."""
    name = body.__name__
    LIBRARY.define(name + torch.library.infer_schema(body, mutates_args=()))
    LIBRARY.impl(name, body, "CompositeExplicitAutograd")
    registered = getattr(torch.ops.abmll, name).default
    BODIES[registered.name()] = body
    return registered


def shapes_of(operator: OpOverload) -> Callable[[Callable], Callable]:
    """Decorator: results of the same shapes and dtypes as the operator's, from the same arguments, for tracing."""
    return torch.library.register_fake(operator, lib=LIBRARY)


def differentiate(operator: OpOverload, call: Callable) -> None:
    """What a call of the operator does where a graph is made: `autograd.Function.apply` of some order of arguments."""

    def dispatch(*arguments):
        return call(*arguments) if torch.is_grad_enabled() else below_autograd(operator, *arguments)

    LIBRARY.impl(operator, dispatch, "Autograd")


def below_autograd(operator: OpOverload, *arguments):
    """The operator itself, as its own `autograd.Function` calls it."""
    with torch._C._AutoDispatchBelowAutograd():
        return operator(*arguments)
