"""BLoB (Wang et al., 2024): Bayesian LoRA on pooled tasks, without a task level."""

from __future__ import annotations

from abmll.methods.lora import LoRA


class Blob(LoRA):
    """Steps of theta on NLL + beta KL to a fixed prior; as published beta is batch size / number of examples."""

    name = "blob"
    layers = "blob"
