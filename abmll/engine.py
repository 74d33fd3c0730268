"""Theta's DeepSpeed engine: its optimizer, the reduction and sharding of its gradients, its checkpoint.

The engine wraps theta and nothing else. The frozen base model stays outside, in its own dtype, on every rank: ZeRO-2
has nothing to shard there, and the engine would cast or broadcast it. Phi stays outside because it is reset from theta
each episode: a ZeRO optimizer would overwrite the reset with its flat master copy at the next step.
"""

from __future__ import annotations

import importlib.util
import logging
from pathlib import Path
from typing import Any

import deepspeed
import torch
from torch import Tensor, nn

from abmll.config.schema import LoggingConfig
from abmll.profiling import phase


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
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": 1,
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
        """All ranks: write theta, its optimizer and its shards into folder/engine."""
        self.engine.save_checkpoint(str(folder), tag="engine", save_latest=False)

    def load(self, folder: Path) -> None:
        loaded, _ = self.engine.load_checkpoint(str(folder), tag="engine")
        if loaded is None:  # DeepSpeed only warns
            raise ValueError(f"checkpoint {folder}: DeepSpeed finds no state in it; remove the folder and resume again")
        self._set_trainable(False)

    def _set_trainable(self, trainable: bool) -> None:
        for parameter in self.theta.values():
            parameter.requires_grad_(trainable)


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
