"""A frozen base that does not fit one device: its weights lie spread over the ranks, and one layer at a time is whole.

PyTorch's `fully_shard` (FSDP2) gathers a decoder layer's weights before its forward pass, frees them behind it, and
gathers them again for its backward pass; a recomputation inside the backward pass finds them there. Frozen weights have
no gradient to reduce. Adapters are put in afterwards, so that theta and phi, which differs from rank to rank, stay
whole and outside. What is gathered is bit for bit what was spread, and so are all results.

DeepSpeed's ZeRO-3 was tried and cannot do this: it gathers a weight when its own module is called, and an adapted layer
reads its frozen layer's weight without calling it (it found a tensor of size 0); its parameters are bound to an engine
of their own, and it wants one order of modules in all passes.

Every rank must make the same passes in the same order: see `abmll.lockstep`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

KEY = "model.sharding: 'full'"


def load_sharded(
    load: Callable[[], PreTrainedModel],
    architecture: PreTrainedConfig,
    device: torch.device,
    dtype: torch.dtype,
    attention: str,
) -> PreTrainedModel:
    """All ranks: the frozen model that `load` makes on the host of the main rank, its weights spread over all ranks.

    The main rank's host holds the whole model for as long as this takes, in `dtype`, and no other host any of it. A
    device holds its share and, for a moment, one whole tensor: the largest is the embeddings'. What `load` raises is
    raised on every rank, as a ValueError on the others.
    """
    if not dist.is_initialized():
        raise ValueError(f"{KEY}: no ranks to spread it over; start with deepspeed, or set model.sharding=none")
    whole, error = None, None
    if dist.get_rank() == 0:
        try:
            whole = load()
        except Exception as caught:  # the others wait for an answer
            error = caught
    told = _from_main(None if error is None else str(error))
    if error is not None:
        raise error
    if told is not None:
        raise ValueError(told)

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(architecture, dtype=dtype, attn_implementation=attention)
    model.requires_grad_(False).eval()
    _agree_on_dtypes(model, whole)
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    shard(model, mesh)
    model.to_empty(device=device)
    model.tie_weights()
    _send(dict(_tensors(whole)) if whole is not None else {}, model, mesh, device)
    return model


def shard(model: PreTrainedModel, mesh: DeviceMesh) -> list[FSDPModule]:
    """Spread the weights over the mesh, in place; returns the units, each of which is gathered in one piece.

    Units are the decoder's layers, the embeddings, the output layer, and what is left of the decoder (a norm).
    Embeddings that are tied to the output layer stay whole on every rank: both read them, at a pass's two ends.

    Raises ValueError where the model has no such layers.
    """
    kind = f"{KEY}: a model of type {model.config.model_type!r}"
    decoder, embeddings, head = model.get_decoder(), model.get_input_embeddings(), model.get_output_embeddings()
    # those that can be recomputed one at a time, the inner ones first
    layers = [module for module in decoder.modules() if isinstance(module, GradientCheckpointingLayer)][::-1]
    if decoder is model or head is None or not layers:
        raise ValueError(f"{kind} has no decoder of layers to gather one at a time; set model.sharding=none")
    tied = embeddings.weight is head.weight
    ends = [] if tied else [embeddings, head]
    units = [*layers, *ends, decoder]
    for unit in units:
        # after each pass all is as before it, whichever pass it was; the library would leave the decoder's rest whole
        fully_shard(unit, mesh=mesh, reshard_after_forward=True, ignored_params={head.weight} if tied else None)
    if not tied:
        embeddings.set_unshard_in_backward(False)  # the first layer's prefetch would gather them: 2 GB for nothing
    return units


def forget_pass(model: PreTrainedModel) -> None:
    """After an error in a forward pass, on all ranks at the same place: the next one begins as if it had not been.

    Nothing where the base is whole. ValueError where this PyTorch cannot.
    """
    decoder = model.get_decoder()
    if isinstance(decoder, FSDPModule):
        if not hasattr(decoder, "reset_iter_state"):
            raise ValueError(
                f"{KEY}: this torch {torch.__version__} cannot go on after an attention that the model does not take; "
                "set model.attention=eager, whose prompts are padded, or install torch 2.13"
            )
        decoder.reset_iter_state()


def gathered_bytes(model: nn.Module) -> tuple[int, int]:
    """Bytes that a rank receives from the others in a forward pass, and in a backward pass, which gathers all again but
    the embeddings. Nothing is sent here.

    Counted from the shapes: of R ranks, R - 1 send each a part, of rows that are filled up to equal numbers.
    """
    forward = backward = 0
    for unit in (module for module in model.modules() if isinstance(module, FSDPModule)):
        size = sum(_received(parameter) for parameter in _own(unit))
        forward += size
        backward += 0 if isinstance(unit, nn.Embedding) else size
    return forward, backward


def _own(unit: nn.Module) -> Iterable[DTensor]:
    """A unit's sharded parameters without those of the units inside it."""
    yield from (p for p in unit.parameters(recurse=False) if isinstance(p, DTensor))
    for child in unit.children():
        if not isinstance(child, FSDPModule):
            yield from _own(child)


def _received(parameter: DTensor) -> int:
    ranks = parameter.device_mesh.size()
    rows = -(-parameter.shape[0] // ranks)
    return (ranks - 1) * rows * parameter.shape[1:].numel() * parameter.element_size()


def _tensors(model: nn.Module) -> Iterable[tuple[str, Tensor]]:
    """Parameters and buffers by name, tied ones once; the buffers that no file holds too."""
    yield from model.named_parameters()
    yield from model.named_buffers()


def _agree_on_dtypes(model: PreTrainedModel, whole: PreTrainedModel | None) -> None:
    """The loaded model's: transformers keeps some parameters of some models in fp32."""
    facts = None if whole is None else {name: (tensor.shape, tensor.dtype) for name, tensor in _tensors(whole)}
    facts = _from_main(facts)
    mine = {name: tensor.shape for name, tensor in _tensors(model)}
    different = sorted(set(mine) ^ set(facts)) or sorted(n for n, shape in mine.items() if facts[n][0] != shape)
    if different:
        raise ValueError(
            f"{KEY}: {len(different)} tensors of the loaded model are not those of its configuration, the first "
            f"{different[0]!r}; set model.sharding=none"
        )
    for name, tensor in _tensors(model):
        tensor.data = tensor.data.to(facts[name][1])


@torch.no_grad()
def _send(whole: dict[str, Tensor], model: PreTrainedModel, mesh: DeviceMesh, device: torch.device) -> None:
    """Every tensor from the main rank to all; each keeps its part."""
    for name, tensor in _tensors(model):
        full = whole[name].to(device) if whole else torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
        full = full.contiguous()
        dist.broadcast(full, src=0)
        if isinstance(tensor, DTensor):
            part = distribute_tensor(full, mesh, tensor.placements, src_data_rank=None)  # sends nothing
            tensor.to_local().copy_(part.to_local())
        else:
            tensor.copy_(full)


def _from_main(item: Any) -> Any:
    items = [item]
    dist.broadcast_object_list(items, src=0)
    return items[0]
