"""Theta's DeepSpeed engine: its optimizer, the reduction and sharding of its gradients, its checkpoint.

The engine wraps theta and nothing else. The frozen base model stays outside, in its own dtype, on every rank: ZeRO-2
has nothing to shard there, and the engine would cast or broadcast it. Phi stays outside because it is reset from theta
each episode: a ZeRO optimizer would overwrite the reset with its flat master copy at the next step.
"""

from __future__ import annotations

import importlib.util
import json
import logging
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.comm.config import CommsLoggerConfig
from deepspeed.monitor.config import DeepSpeedMonitorConfig
from deepspeed.runtime.config import DeepSpeedConfig, DeepSpeedConfigError, DtypeEnum
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from deepspeed.utils import safe_get_full_optimizer_state, safe_set_full_optimizer_state
from pydantic import ValidationError
from torch import Tensor, nn

from abmll.config import ConfigError
from abmll.config.messages import describe
from abmll.config.schema import LoggingConfig
from abmll.files import read_json
from abmll.profiling import phase
from abmll.tensor_files import read_tensors, write_tensors

# Of a checkpoint: theta by name, its optimizer's moments as NAME.KIND, and what is counted.
THETA, MOMENTS, COUNTS = "theta.safetensors", "moments.safetensors", "counts.json"
_BATCHES = {"train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1}  # an outer step sums episodes itself
# of a file's sections that DeepSpeed checks: what stands before the places of its errors; the monitors' have it in them
_SECTIONS = {
    "DeepSpeedZeroConfig": ("zero_optimization.", DeepSpeedZeroConfig),
    "CommsLoggerConfig": ("comms_logger.", CommsLoggerConfig),
}


class _Theta(nn.Module):
    """Theta's parameters as a module: the very same objects that the adapted layers read."""

    def __init__(self, parameters: list[nn.Parameter]):
        super().__init__()
        self.parameters_in_order = nn.ParameterList(parameters)


class _HandOver(torch.autograd.Function):
    """A scalar zero whose backward gives each parameter a ready gradient.

    ZeRO-2 reduces and shards gradients in hooks that a backward pass fires; this fires them without computing anything.
    """

    @staticmethod
    def forward(ctx, gradients: list[Tensor], *parameters: Tensor) -> Tensor:
        ctx.gradients = gradients
        return parameters[0].new_zeros(())

    @staticmethod
    def backward(ctx, scale: Tensor) -> tuple[Tensor | None, ...]:
        return (None, *(scale * gradient for gradient in ctx.gradients))


class ThetaEngine:
    """One optimizer step of theta from gradients that the method made."""

    def __init__(
        self,
        theta: dict[str, nn.Parameter],
        optimizer: torch.optim.Optimizer,
        deepspeed_config: dict[str, Any],
        logging_config: LoggingConfig,
        output: Path,
    ):
        self.theta = theta
        config = {
            **deepspeed_config,
            **_BATCHES,
            # torch's own AdamW and SGD are what the methods define; ZeRO shards them as they are
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            **_monitors(logging_config, output),
        }
        logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
        self._set_trainable(True)  # the engine hooks only what requires a gradient when it starts
        self.engine, *_ = deepspeed.initialize(model=_Theta(list(theta.values())), optimizer=optimizer, config=config)
        self._set_trainable(False)
        self._share_master()

    def _share_master(self) -> None:
        """A rank's part of theta serves as its own master copy, which ZeRO keeps for parameters in 16 bits.

        Theta is fp32. DeepSpeed copies the updated master back into the part: now onto itself.
        """
        optimizer = self.engine.optimizer
        if self.zero_stage == 0:
            return
        groups = zip(
            optimizer.parallel_partitioned_bit16_groups,
            optimizer.single_partition_of_fp32_groups,
            optimizer.real_dp_process_group,
            strict=True,
        )
        for parts, master, process_group in groups:
            part = parts[deepspeed.comm.get_rank(group=process_group)]
            if part.shape != master.shape or part.dtype != master.dtype:
                raise RuntimeError("DeepSpeed's master copy of theta is not a copy of this rank's part of it")
            master.data = part
        optimizer._link_all_hp_params()  # its fragments were views of the copy

    @property
    def zero_stage(self) -> int:
        return int(self.engine.zero_optimization_stage())

    @phase("engine step")
    def step(self, gradient: dict[str, Tensor]) -> None:
        """Average the ranks' gradients (named as theta) and take one optimizer step. Communicates."""
        self._set_trainable(True)
        parameters = list(self.theta.values())
        ordered = [gradient[name].to(parameter.dtype) for name, parameter in self.theta.items()]
        self.engine.backward(_HandOver.apply(ordered, *parameters))
        self.engine.step()
        self._set_trainable(False)

    def write_events(self, events: dict[str, float], step: int) -> None:
        """Scalars to the configured monitors (rank 0 writes)."""
        if self.engine.monitor.enabled:
            self.engine.monitor.write_events([(name, value, step) for name, value in events.items()])

    def save(self, folder: Path) -> None:
        """All ranks: gather theta's optimizer from their shards; the main rank writes it and theta, whole and by name.

        Nothing in the files depends on the number of ranks or the ZeRO stage. Communicates.
        """
        main = deepspeed.comm.get_rank() == 0
        moments: dict[str, Tensor] = {}
        for kind in sorted(self._state.keys() - {"step"}):  # in one order on all ranks
            for name, parameter in self.theta.items():
                whole = self._moment(parameter, kind)
                if main:
                    moments[f"{name}.{kind}"] = whole.cpu()
        if main:
            write_tensors(folder / THETA, self.theta)
            write_tensors(folder / MOMENTS, moments)
            counts = {
                "optimizer_steps": float(self._state["step"]) if moments else None,
                "engine_steps": self.engine.global_steps,  # the monitors' abscissas
                "engine_samples": self.engine.global_samples,
            }
            (folder / COUNTS).write_text(json.dumps(counts, indent=1))

    def load(self, folder: Path) -> None:
        """All ranks: go on from what `save` wrote, with any number of ranks and at any ZeRO stage.

        ValueError where the files hold another theta than this run's, or none.
        """
        (theta, _), (moments, _) = read_tensors(folder / THETA), read_tensors(folder / MOMENTS)
        counts = _checked_counts(folder / COUNTS, bool(moments))
        kinds = {name.rpartition(".")[2] for name in moments}
        shapes = {name: value.shape for name, value in self.theta.items()}
        of_moments = {f"{name}.{kind}": shape for name, shape in shapes.items() for kind in kinds}
        for file, found, expected in ((THETA, theta, shapes), (MOMENTS, moments, of_moments)):
            if {name: value.shape for name, value in found.items()} != expected:
                raise ValueError(
                    f"checkpoint {folder}: {file}: holds other parameters than this run's theta; is model.name still "
                    "the same model? If it is to be another one, start another run with output=FOLDER"
                )
        with torch.no_grad():
            for name, parameter in self.theta.items():
                parameter.copy_(theta[name])
        if moments:
            self._make_state(kinds, counts["optimizer_steps"])
        for name, value in moments.items():
            name, _, kind = name.rpartition(".")
            self._set_moment(self.theta[name], kind, value)
        self.engine.global_steps, self.engine.global_samples = counts["engine_steps"], counts["engine_samples"]

    @property
    def _optimizer(self) -> torch.optim.Optimizer:
        """torch's own: over theta at stage 0, else over this rank's part of theta, laid flat."""
        return self.engine.optimizer.optimizer if self.zero_stage else self.engine.optimizer

    @property
    def _state(self) -> dict[str, Tensor]:
        """The optimizer's state of one parameter; empty before the first step, and of SGD."""
        return next(iter(self._optimizer.state.values()), {})

    def _make_state(self, kinds: set[str], steps: float) -> None:
        """The state that the optimizer would make in its first step, after `steps` steps, its moments zero."""
        parameters = [parameter for group in self._optimizer.param_groups for parameter in group["params"]]
        states = {
            index: {"step": torch.tensor(steps), **{kind: torch.zeros_like(parameter) for kind in kinds}}
            for index, parameter in enumerate(parameters)
        }
        groups = self._optimizer.state_dict()["param_groups"]
        self._optimizer.load_state_dict({"state": states, "param_groups": groups})
        if self.zero_stage:  # which parameter has which fragment of the flat moments
            self.engine.optimizer._hp_optimizer_states_linked = False
            self.engine.optimizer._lazy_init_hp_params_optimizer_state()

    def _moment(self, parameter: nn.Parameter, kind: str) -> Tensor:
        if self.zero_stage:
            return safe_get_full_optimizer_state(parameter, kind)
        return self._optimizer.state[parameter][kind]

    def _set_moment(self, parameter: nn.Parameter, kind: str, value: Tensor) -> None:
        if self.zero_stage:
            safe_set_full_optimizer_state(parameter, value, kind)
        else:
            self._optimizer.state[parameter][kind].copy_(value)

    def _set_trainable(self, trainable: bool) -> None:
        for parameter in self.theta.values():
            parameter.requires_grad_(trainable)


def _checked_counts(path: Path, with_moments: bool) -> dict[str, Any]:
    """The counts of a checkpoint. ValueError where one of them is not there, or is no number."""
    counts, wanted = read_json(path), {"engine_steps": int, "engine_samples": int}
    wanted |= {"optimizer_steps": float} if with_moments else {}
    if not isinstance(counts, dict) or not all(type(counts.get(name)) is kind for name, kind in wanted.items()):
        raise ValueError(f"{path}: holds no counts {', '.join(wanted)}; another program wrote it")
    return counts


def check_settings(settings: dict[str, Any], path: str | Path) -> None:
    """ConfigError for every value that DeepSpeed would refuse when the engine starts, which is behind all else.

    `settings` are the file's, checked for what is the trainer's own.
    """
    try:
        config = DeepSpeedConfig({**settings, **_BATCHES})
        if config.grad_accum_dtype is not None:
            DtypeEnum(config.grad_accum_dtype)
    except ValidationError as error:  # of one of its sections
        above, section = _SECTIONS.get(error.title, ("", DeepSpeedMonitorConfig))
        lines = (describe(one["loc"], [one], section) for one in error.errors(include_url=False))
        raise ConfigError(f"{path}: {above}{line}" for line in lines) from None
    except (ValueError, TypeError, AssertionError, DeepSpeedConfigError) as error:
        raise ConfigError([f"{path}: DeepSpeed refuses it: {error}; correct this value"]) from None


def check_monitors(config: LoggingConfig) -> list[str]:
    """Names of the monitors asked for. ValueError, with the command to type, where a package is missing."""
    asked = {"tensorboard": config.tensorboard, "csv": config.csv, "wandb": config.wandb_project}
    for name, key in (("tensorboard", "tensorboard"), ("wandb", "wandb_project")):
        if asked[name] and importlib.util.find_spec(name) is None:
            value = getattr(config, key)
            raise ValueError(f"logging.{key}: {value}: the package is not installed; pip install {name}")
    return [name for name, wanted in asked.items() if wanted]


def _monitors(config: LoggingConfig, output: Path) -> dict[str, Any]:
    check_monitors(config)
    folder = {"enabled": True, "output_path": str(output), "job_name": "monitor"}
    monitors: dict[str, Any] = {}
    if config.tensorboard:
        monitors["tensorboard"] = folder
    if config.csv:
        monitors["csv_monitor"] = folder
    if config.wandb_project:
        monitors["wandb"] = {"enabled": True, "project": config.wandb_project}
    return monitors
