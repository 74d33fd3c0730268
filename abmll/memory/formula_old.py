"""What a run will need of each device's memory, before it loads anything."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, fields

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig

from abmll.adapters import projection_backend
from abmll.adapters.targets import find_targets
from abmll.config import Config
from abmll.kernels.fused.configurations import SCRATCH_BYTES
from abmll.methods import METHODS

_BYTES = {"bfloat16": 2, "float32": 4}
_FP32 = 4
_KEPT_TENSORS = 8
_CPU = torch.device("cpu")
_ZERO2 = {"zero_optimization": {"stage": 2, "reduce_bucket_size": 2e7}}


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on each device. `activations` is the larger of a training step's and an evaluation batch's."""

    base_weights: int
    adapters: int
    gradients: int
    optimizer_states: int
    engine_buffers: int
    activations: int
    posterior: int

    @property
    def total(self) -> int:
        return sum(getattr(self, field.name) for field in fields(self))

    def format(self) -> str:
        """A small table in GB (10^9 bytes)."""
        parts = {field.name: getattr(self, field.name) for field in fields(self)} | {"total": self.total}
        return "\n".join(f"{name.replace('_', ' '):<18}{size / 1e9:>8.2f} GB" for name, size in parts.items())


def estimate(
    model_config: PreTrainedConfig,
    config: Config,
    world_size: int,
    deepspeed: dict | None = None,
    device: torch.device = _CPU,
) -> MemoryEstimate:
    """An estimate of each device's peak. `deepspeed` holds the engine's file; None means ZeRO-2 as shipped.

    Exact parts, from the model's own modules built without memory:
        base weights       parameters x bytes of model.dtype
        adapters           P theta + P phi in fp32, P = pairs x rank x (inputs + outputs) summed over adapted modules;
                           two pairs (mean and log-variance) for abmll, one for the others
        gradients          the same again, theta's divided by the ranks at ZeRO-2
        optimizer states   AdamW's two moments in fp32; theta's divided by the ranks at ZeRO-1 and 2
        engine buffers     at ZeRO-1 and 2: theta's fp32 partition and the reduction bucket; else none

    Estimated part, for T = tasks.batch_size x tasks.max_tokens tokens, hidden size h, attention widths q and kv, MLP
    width m, b bytes a number:
        a layer's          T (b (h + 2 q + 2 kv + 3 m) + 8 h): the inputs that its backward pass reads with frozen
                           weights and attention that keeps no T x T matrix, and the two norms' fp32 inputs
        activations        layers x layer's; with checkpointing layers x T h b (the boundaries) + one layer's
        an evaluation's    eval.batch_size x max(eval.samples, 1) x tasks.max_tokens tokens through one layer:
                           b (2 h + 2 m) each
        posterior          what the posterior keeps for its backward pass, of one layer with checkpointing, of all
                           layers without; none for plain LoRA. Fused kernels on `device`: the layer's input and
                           4 r fp32 numbers a token (activation posterior), or the input and two bands of weights that
                           all layers share (weight posterior). Plain PyTorch: about 8 fp32 tensors of the size of each
                           adapted layer's output (activation posterior) or weight (weight posterior)
    Every prompt counts as one of max_tokens. Not counted: the CUDA context, the allocator's fragments, and attention
    without a fused kernel (model.attention=eager).

    Raises ValueError where no module matches adapters.modules, the model is not Llama-like, or adapters.backend cannot
    run on `device`.
    """
    text_config = model_config.get_text_config()
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(model_config)
    number = _BYTES[config.model.dtype]
    gaussian = METHODS[config.method.name].gaussian
    targets = find_targets(model, config.adapters.modules).values()
    width = sum(module.in_features + module.out_features for module in targets)
    theta = phi = (2 if gaussian else 1) * config.adapters.rank * _FP32 * width

    engine = (_ZERO2 if deepspeed is None else deepspeed).get("zero_optimization", {})
    stage, bucket = engine.get("stage", 0), int(engine.get("reduce_bucket_size", 5e8))  # DeepSpeed's own defaults
    moments_shard = world_size if stage >= 1 else 1
    gradient_shard = world_size if stage == 2 else 1
    return MemoryEstimate(
        base_weights=number * sum(parameter.numel() for parameter in model.parameters()),
        adapters=theta + phi,
        gradients=phi + theta // gradient_shard,
        optimizer_states=2 * phi + 2 * theta // moments_shard,
        engine_buffers=theta // world_size + bucket * _FP32 if stage >= 1 else 0,
        activations=_activations(text_config, config, number),
        posterior=_posterior(targets, text_config, config, device) if gaussian else 0,
    )


def _posterior(targets: Collection[nn.Linear], model: PreTrainedConfig, config: Config, device: torch.device) -> int:
    tokens, scratch = config.tasks.batch_size * config.tasks.max_tokens, 0
    backend, _ = projection_backend(config.adapters, device, getattr(torch, config.model.dtype))
    if backend == "triton":
        by_weight = config.adapters.posterior == "weight"
        scratch, each = (2 * SCRATCH_BYTES, 0) if by_weight else (0, 4 * config.adapters.rank * _FP32)
        kept = sum(tokens * (module.in_features * _BYTES[config.model.dtype] + each) for module in targets)
    elif config.adapters.posterior == "activation":
        kept = _KEPT_TENSORS * _FP32 * sum(module.out_features * tokens for module in targets)
    else:
        kept = _KEPT_TENSORS * _FP32 * sum(module.out_features * module.in_features for module in targets)
    layers = _field(model, "num_hidden_layers") if config.trainer.activation_checkpointing else 1
    return kept // layers + scratch


def _activations(model: PreTrainedConfig, config: Config, number: int) -> int:
    hidden, layers, mlp, heads = (
        _field(model, name) for name in ("hidden_size", "num_hidden_layers", "intermediate_size", "num_attention_heads")
    )
    head = getattr(model, "head_dim", None) or hidden // heads
    query = head * heads
    key_value = head * (getattr(model, "num_key_value_heads", None) or heads)

    tokens = config.tasks.batch_size * config.tasks.max_tokens
    layer = tokens * (number * (hidden + 2 * query + 2 * key_value + 3 * mlp) + 2 * _FP32 * hidden)
    checkpointed = layers * tokens * hidden * number + layer
    training = checkpointed if config.trainer.activation_checkpointing else layers * layer
    sequences = config.eval.batch_size * max(config.eval.samples, 1)
    evaluation = sequences * config.tasks.max_tokens * number * (2 * hidden + 2 * mlp)
    return max(training, evaluation)


def _field(model: PreTrainedConfig, name: str) -> int:
    value = getattr(model, name, None)
    if not isinstance(value, int):
        remedy = "the memory estimate knows Llama-like models only; run without it"
        raise ValueError(f"model.name: {type(model).__name__} has no {name}: {remedy}")
    return value
