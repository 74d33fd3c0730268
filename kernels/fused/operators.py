"""How the fused operators are registered: with PyTorch as opaque ones, and here by name with their Python bodies."""

from __future__ import annotations

from collections.abc import Callable

import torch

# The functions under the operators, by the names that `OpOverload.name()` gives: "abmll::activation_forward". On fake
# tensors an operator allocates its outputs alone; its body, run under `dry_run.dry_launches`, all that it does.
BODIES: dict[str, Callable] = {}


def operator(name: str) -> Callable[[Callable], torch.library.CustomOpDef]:
    """Decorator: `torch.library.custom_op` of the body, which writes to none of its arguments."""

    def register(body: Callable) -> torch.library.CustomOpDef:
        BODIES[name] = body
        return torch.library.custom_op(name, body, mutates_args=())

    return register
