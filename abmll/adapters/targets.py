"""Which linear layers of a model are adapted."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn
from transformers import PreTrainedModel

from abmll.config.errors import did_you_mean


def find_targets(model: nn.Module, names: Iterable[str]) -> dict[str, nn.Linear]:
    """The linear layers whose dotted name ends with one of `names` (`q_proj`, `self_attn.q_proj`), in model order.

    Raises ValueError for a name that no linear layer has, and for the output layer's, which is multiplied at answer
    positions alone and may be tied to the embeddings.
    """
    head = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    linear = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    output = {name for name, module in linear.items() if module is head}
    linear = {name: module for name, module in linear.items() if module is not head}
    known = sorted({name.rpartition(".")[2] for name in linear})
    found: set[str] = set()
    for ending in names:
        matches = {name for name in linear if f".{name}".endswith(f".{ending}")}
        if not matches and any(f".{name}".endswith(f".{ending}") for name in output):
            raise ValueError(f"adapters.modules: {ending}: the output layer cannot be adapted; leave it out")
        if not matches:
            hint = did_you_mean(ending, known)
            raise ValueError(f"adapters.modules: {ending}: no linear layer of the model has this name; {hint}")
        found |= matches
    return {name: module for name, module in linear.items() if name in found}
