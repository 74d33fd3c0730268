"""`--validate`: everything that can be checked without training, all findings at once."""

from __future__ import annotations

import os
from collections.abc import Callable

from transformers import PretrainedConfig

from abmll.build import prompt_tasks, read_tasks
from abmll.config import Config, resolve_path
from abmll.config.deepspeed import load_deepspeed
from abmll.memory import estimate
from abmll.models.load import describe, load_tokenizer, model_config
from abmll.tasks.prompt import Prompter


def preflight(config: Config, config_path: str) -> tuple[str, bool]:
    """A report in lines, and whether the run can start. A failed check does not stop the ones after it."""
    lines: list[str] = []
    good = True

    def check(name: str, look: Callable[[], str]) -> bool:
        nonlocal good
        try:
            lines.append(f"ok      {name}: {look()}")
            return True
        except (ValueError, OSError) as error:
            good = False
            lines.append(f"FAILED  {name}: {error}")
            return False

    def model() -> str:
        return describe(config.model)

    def memory() -> str:
        architecture: PretrainedConfig = model_config(config.model)
        engine = load_deepspeed(resolve_path(config.trainer.deepspeed, config_path))
        world_size = int(os.environ.get("WORLD_SIZE", 1))
        table = estimate(architecture, config, world_size, engine).format()
        return "\n        ".join([f"estimated for each of {world_size} ranks", *table.splitlines()])

    def deepspeed() -> str:
        path = resolve_path(config.trainer.deepspeed, config_path)
        stage = load_deepspeed(path).get("zero_optimization", {}).get("stage", 0)
        return f"{path}, ZeRO stage {stage}"

    def tasks() -> str:
        loaded = read_tasks(config, config_path)  # first: a fault of the model's must not hide one of the tasks
        if not has_model:
            return f"{len(loaded.train)} to train on, {len(loaded.test)} unseen, {len(loaded.missing)} missing"
        prompter = Prompter(load_tokenizer(config.model), config.tasks.max_tokens, config.tasks.too_long)
        found = prompt_tasks(loaded, prompter, config)
        summary = f"{len(found.train)} to train on, {len(found.validation)} to validate on, {len(found.test)} unseen"
        return summary + "".join(f"\n        note: {note}" for note in found.notes)

    lines.append(f"ok      configuration: {config_path}")
    check("deepspeed", deepspeed)
    has_model = check("model", model)
    check("tasks", tasks)
    if has_model:
        check("memory", memory)
    return "\n".join(lines), good
