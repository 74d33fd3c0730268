"""The engine's JSON file: what DeepSpeed may be told, and what the trainer keeps to itself."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .errors import ConfigError, did_you_mean, duplicates, show
from .files import resolve_path
from .schema import Config

_OWNED = {
    "optimizer": "theta's is built from method.outer_optimizer, method.outer_lr and method.weight_decay; remove it",
    "scheduler": "the learning rates are constant; remove it and set method.outer_lr",
    "checkpoint": "the trainer writes its checkpoints itself; remove it and set trainer.checkpoint_every",
    "train_batch_size": "it follows from tasks.batch_size and the number of ranks; remove it",
    "train_micro_batch_size_per_gpu": "it follows from tasks.batch_size; remove it",
}
_PRECISION = ("fp16", "bf16", "bfloat16", "amp", "torch_autocast")
# DeepSpeed reads a file with a misspelt key as if the key were not there
_KNOWN = (
    *("zero_optimization", "gradient_clipping", "gradient_accumulation_steps", "communication_data_type"),
    *("prescale_gradients", "gradient_predivide_factor", "seq_parallel_communication_data_type", "data_types"),
    *("zero_allow_untested_optimizer", "steps_per_print", "wall_clock_breakdown", "dump_state", "memory_breakdown"),
    *("comms_logger", "flops_profiler", "tensorboard", "wandb", "csv_monitor", "seed"),
    *_OWNED,
    *_PRECISION,
)


def engine_settings(config: Config, config_path: str | Path) -> dict[str, Any]:
    """What the file that `config` names tells the engine; it must suit the method. ConfigError as load_deepspeed's."""
    path = resolve_path(config.trainer.deepspeed, config_path)
    settings = load_deepspeed(path)
    clipping = settings["gradient_clipping"]
    if clipping and config.method.interpolates:
        remedy = "it would shorten theta's step, a share of the way to phi; write 0.0 and set method.reptile_step"
        raise ConfigError([f"{path}: gradient_clipping: {show(clipping)}: {remedy}"])
    return settings


def load_deepspeed(path: str | Path) -> dict[str, Any]:
    """The settings of the engine that holds theta, to which the trainer adds the batch size and the optimizer.

    Raises ConfigError with a line for all that is not readable JSON, not known to DeepSpeed, or the trainer's own.
    """
    repeated: list[str] = []

    def without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        repeated.extend(duplicates(key for key, _ in pairs))
        return dict(pairs)

    try:
        text = Path(path).read_text(encoding="utf-8")
        settings = json.loads(text, object_pairs_hook=without_repeats)
    except json.JSONDecodeError as error:
        raise ConfigError([f"{path}:{error.lineno}: not valid JSON ({error.msg}); correct this line"]) from None
    except (RecursionError, ValueError, OSError) as error:  # of nesting, a number or its encoding
        raise ConfigError(
            [f"trainer.deepspeed: {path}: cannot be read ({error}); name a file such as configs/deepspeed/zero2.json"]
        ) from None
    if not isinstance(settings, dict):
        raise ConfigError([f'{path}: {show(settings)}: is no object; write {{"zero_optimization": {{"stage": 2}}, …}}'])

    problems = [f"{key}: is written twice; keep one of them" for key in repeated]
    problems += _problems(settings)
    if problems:
        raise ConfigError(f"{path}: {problem}" for problem in problems)
    return settings


def _problems(settings: dict[str, Any]) -> Iterator[str]:
    for key, value in settings.items():
        if key in _OWNED:
            yield f"{key}: {show(value)}: {_OWNED[key]}"
        elif key not in _KNOWN:
            yield f"{key}: {show(value)}: unknown key; {did_you_mean(key, _KNOWN)}"

    for key in _PRECISION:
        if key in settings and not (isinstance(settings[key], dict) and settings[key].get("enabled", False) is False):
            yield f"{key}: {show(settings[key])}: theta is trained in fp32; remove it (the base model's is model.dtype)"

    accumulation = settings.get("gradient_accumulation_steps", 1)
    if accumulation != 1:
        remedy = "remove it and set trainer.tasks_per_step"
        yield f"gradient_accumulation_steps: {show(accumulation)}: an outer step sums episodes itself; {remedy}"

    if "gradient_clipping" not in settings:
        yield "gradient_clipping: not set: DeepSpeed's default is 1.0; write 0.0 for no clipping, or a norm"
    else:
        clipping = settings["gradient_clipping"]
        if isinstance(clipping, bool) or not isinstance(clipping, int | float) or not clipping >= 0:
            yield f"gradient_clipping: {show(clipping)}: must be a number; write 0.0 for no clipping, or a norm"

    yield from _zero_problems(settings.get("zero_optimization", {}))


def _zero_problems(zero: Any) -> Iterator[str]:
    if not isinstance(zero, dict):
        yield f'zero_optimization: {show(zero)}: is no object; write {{"stage": 2}}'
        return
    stage = zero.get("stage", 0)
    if stage not in (0, 1, 2) or isinstance(stage, bool | float):
        remedy = "write 0, 1 or 2 (stage 3 would shard theta itself, which every episode copies in full)"
        yield f"zero_optimization.stage: {show(stage)}: not supported; {remedy}"
    for key in ("offload_optimizer", "offload_param", "cpu_offload"):
        if zero.get(key):
            yield f"zero_optimization.{key}: {show(zero[key])}: theta stays on its device, as it is small; remove it"
