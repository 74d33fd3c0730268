"""Which weights are these? A digest that tells one base model from another without reading all of it."""

from __future__ import annotations

import hashlib

import torch
from torch import nn

ELEMENTS = 64  # of each tensor, evenly spaced


@torch.no_grad()
def fingerprint(model: nn.Module) -> str:
    """SHA-256 (hexadecimal) of every parameter's name, size and some of its elements, as bfloat16 has them.

    So one checkpoint gives one fingerprint on every device, in bfloat16 and in float32, in well under a second for
    billions of weights. (A model that was changed in other elements alone is taken for the same.) Packed 4-bit weights
    have one of their own.
    """
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        flat = parameter.detach().reshape(-1)
        places = torch.linspace(0, len(flat) - 1, min(ELEMENTS, len(flat)), dtype=torch.float64).long()
        part = flat[places.to(flat.device)].cpu()
        part = part.to(torch.bfloat16).view(torch.int16) if part.is_floating_point() else part
        digest.update(f"{name} {len(flat)} ".encode() + part.numpy().tobytes())
    return digest.hexdigest()
