"""`--validate`: everything that can be checked without training, all findings at once."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import torch

from abmll.adapters import projection_backend
from abmll.build import measure_prompts, prompt_tasks, prompter_of, read_tasks
from abmll.checkpoint import newest_whole
from abmll.config import Config, resolve_path
from abmll.config.deepspeed import engine_settings
from abmll.config.native import in_software
from abmll.dealing import tasks_per_step
from abmll.distributed import local_ranks
from abmll.engine import check_monitors, check_settings
from abmll.memory import plan_run
from abmll.memory.capacity import device_capacity
from abmll.memory.table import summary
from abmll.methods import METHODS
from abmll.methods.advice import unread_settings
from abmll.models.load import attention_implementation, describe, load_tokenizer, model_config
from abmll.models.positions import beyond_positions, check_positions
from abmll.models.quantization import check_quantization
from abmll.resuming import as_checkpointed
from abmll.run_folder import check_folder
from abmll.tasks.doubts import doubts


class _Doubtful(Exception):
    """What a check found is not good, and does not keep the run from starting here."""


def preflight(config: Config, config_path: str, resume: bool = False, overwrite: bool = False) -> tuple[str, bool]:
    """A report in lines, and whether the run can start. A failed check does not stop the ones after it."""
    lines: list[str] = []
    good = True

    def check(name: str, look: Callable[[], str]) -> bool:
        nonlocal good
        try:
            lines.append(f"ok      {name}: {look()}")
            return True
        except _Doubtful as told:
            lines.append(f"note    {name}: {told}")
            return True
        except (ValueError, OSError) as error:
            good = False
            lines.append(f"FAILED  {name}: {error}")
            return False

    world_size = int(os.environ.get("WORLD_SIZE", 1))
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda" if on_gpu else "cpu")

    def model() -> str:
        slow = in_software(config.model.dtype, device.type)
        return describe(config.model) + (f"\n        note: {slow}" if slow else "")

    def quantization() -> str:
        check_quantization(config.model, device)
        return config.model.quantization

    def attention() -> str:
        return attention_implementation(config.model, device, model_config(config.model))

    def projections() -> str:
        return "{}: {}".format(*projection_backend(config.adapters, device, getattr(torch, config.model.dtype)))

    def output() -> str:
        check_folder(Path(config.output), resume, overwrite)
        return config.output

    def checkpoint() -> str:
        nonlocal config
        found = newest_whole(Path(config.output) / "checkpoints")
        if found is None:
            return "none, so the run starts from the beginning"
        config = as_checkpointed(config, found, world_size)
        return f"{found.folder}, written by {found.state['world_size']} ranks"

    def method() -> str:
        if told := unread_settings(config):
            raise _Doubtful("; ".join(told))
        return config.method.name

    def monitors() -> str:
        return ", ".join(check_monitors(config.logging)) or "none"

    def ranks() -> str:
        return f"{tasks_per_step(config.trainer, world_size)} episodes an outer step on {world_size} ranks"

    def memory() -> str:
        engine = engine_settings(config, config_path)
        capacity = device_capacity(device, local_ranks())
        plan = plan_run(config, model_config(config.model), engine, world_size, on_gpu, capacity)
        lines = summary(plan, f"each of {world_size} ranks, counted").strip().splitlines()
        if plan.ledger is not None and not plan.fits:
            plan_command = f"python launch/plan.py --config {config_path}"
            lines.append(f"raise memory.budget_gb where there is more, or see what would make it fit: {plan_command}")
            # a machine without a GPU may only be where the configuration is written
            raise (ValueError if on_gpu else _Doubtful)("\n        ".join(lines))
        return "\n        ".join(lines)

    def deepspeed() -> str:
        path = resolve_path(config.trainer.deepspeed, config_path)
        settings = engine_settings(config, config_path)
        check_settings(settings, path)
        stage = settings.get("zero_optimization", {}).get("stage", 0)
        return f"{path}, ZeRO stage {stage}"

    def tasks() -> str:
        loaded = read_tasks(config, config_path)  # first: a fault of the model's must not hide one of the tasks
        if not has_model:
            return f"{len(loaded.train)} to train on, {len(loaded.test)} unseen, {len(loaded.missing)} missing"
        architecture = model_config(config.model)
        check_positions(config.tasks.max_tokens, architecture)
        prompter = prompter_of(config, load_tokenizer(config.model))
        found = prompt_tasks(loaded, prompter, config)
        counts = measure_prompts(loaded, prompter, config)
        longest = max(count.longest for count in counts.values())
        summary = (
            f"{len(found.train)} to train on, {len(found.validation)} to validate on, {len(found.test)} unseen; "
            f"prompts of at most {longest} tokens"
        )
        losses = [count.loss(name, config.tasks.max_tokens) for name, count in counts.items()]
        beyond = beyond_positions(longest, architecture)
        named = {task.name: task for task in (*loaded.train, *loaded.validation, *loaded.test)}
        doubtful = [line for task in named.values() for line in doubts(task)]
        notes = (*found.notes, *losses, *doubtful, beyond)
        return summary + "".join(f"\n        note: {note}" for note in notes if note)

    lines.append(f"ok      configuration: {config_path}")
    check("output", output)
    if resume:
        check("checkpoint", checkpoint)
    check("ranks", ranks)
    check("deepspeed", deepspeed)
    check("monitors", monitors)
    check("method", method)
    if METHODS[config.method.name].layers == "gaussian":
        check("projections", projections)
    if config.model.quantization != "none":
        check("quantization", quantization)
    has_model = check("model", model)
    check("tasks", tasks)
    if has_model:
        check("attention", attention)
        check("memory", memory)
    return "\n".join(lines), good
