"""Pruning of activations: of every token the smallest are set to zero, by magnitude (the paper's section 5.2)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from abmll.adapters import AdapterSet
from abmll.config.schema import PruneConfig


def zero_smallest(x: Tensor, fraction: float) -> Tensor:
    """x [..., H] with the floor(fraction * H) elements of the smallest magnitude of each row set to zero."""
    count = int(round(fraction * x.shape[-1], 6))  # rounded: 0.29 * 100 is 28.999999999999996
    return x.scatter(-1, x.abs().topk(count, dim=-1, largest=False).indices, 0.0)


def pruned_modules(model: PreTrainedModel, adapters: AdapterSet, config: PruneConfig) -> Sequence[nn.Module]:
    """Those whose output is pruned. ValueError where the model's decoder layers cannot be told from its other parts."""
    if config.where == "projections":
        return list(adapters.layers.values())
    layers = [module for module in model.get_decoder().modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise ValueError(
            f"eval.prune.where: 'hidden': no decoder layers found in a model of type {model.config.model_type!r}; set "
            "eval.prune.where=projections"
        )
    return layers


@contextmanager
def pruned(model: PreTrainedModel, adapters: AdapterSet, config: PruneConfig) -> Iterator[None]:
    """Within it the model runs pruned. At fraction 0 it is the model itself."""

    def hook(module: nn.Module, inputs: Any, output: Any) -> Any:
        if isinstance(output, tuple):  # the hidden states first
            return (zero_smallest(output[0], config.fraction), *output[1:])
        return zero_smallest(output, config.fraction)

    with ExitStack() as hooked:
        for module in pruned_modules(model, adapters, config) if config.fraction else ():
            hooked.enter_context(module.register_forward_hook(hook))
        yield
