"""Activation checkpointing: which decoder layers run their forward pass again instead of keeping what it made."""

from __future__ import annotations

from typing import Literal

from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

Checkpointing = Literal["none", "every second layer", "all layers"]
# from the fastest to the leanest
POLICIES: tuple[Checkpointing, ...] = ("none", "every second layer", "all layers")


def supports_checkpointing(architecture: PreTrainedConfig) -> bool:
    """Whether this architecture's layers can."""
    return MODEL_FOR_CAUSAL_LM_MAPPING.get(type(architecture), PreTrainedModel).supports_gradient_checkpointing


def checkpoint_layers(model: PreTrainedModel, policy: Checkpointing) -> None:
    """Turn it on for the layers that `policy` names; of every two, the first.

    Raises ValueError where the model's layers do not support it.
    """
    if policy == "none":
        return
    # nothing in a layer draws from a generator: noise is counted, dropout is off
    arguments = {"use_reentrant": False, "preserve_rng_state": False}
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable(arguments)
    else:  # its name before transformers 5.2x
        model.gradient_checkpointing_enable(arguments)
    if policy == "every second layer":
        layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
        for index, layer in enumerate(layers):
            layer.gradient_checkpointing = index % 2 == 0
