"""What a resumed run must agree on with what is there, and when scores that are there still serve."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from abmll.checkpoint import Checkpoint
from abmll.config import Config, ConfigError, load_config
from abmll.config.errors import show
from abmll.config.paths import absolute_model
from abmll.config.settings import flat, in_effect
from abmll.distributed import Ranks
from abmll.methods import METHODS
from abmll.run_folder import CONFIG
from abmll.summary import finished_facts
from abmll.trained_with import completed

# What a checkpoint's training and its best score depend on: a resumed run must agree. The rest (length, logging,
# scoring) may change.
FIXED_BY_CHECKPOINT = ("seed", "model", "adapters", "method", "tasks")
MAY_CHANGE = ("adapters.backend", "model.sharding")  # how the same numbers are computed
FIXED_KEYS = ("trainer.tasks_per_step", "eval.every", "eval.select_by", "eval.validation_examples")
# what a prediction depends on: a resumed run forgets a best that was found otherwise
OF_PREDICTIONS = tuple(
    f"eval.{name}" for name in ("samples", "tfb", "temperature", "prune", "support_labels", "active")
)
OF_SCORES = (*OF_PREDICTIONS, "eval.max_examples")


def as_checkpointed(config: Config, checkpoint: Checkpoint, world_size: int) -> Config:
    """The configuration with as many episodes an outer step as the checkpoint's run had: the sequence depends on it.

    ValueError where this is not the same run, or these ranks cannot go on with it.
    """
    if "tasks_per_step" not in checkpoint.state:
        raise ValueError(
            f"--resume auto: {checkpoint.folder} was written by an older version, which cannot be continued; start "
            "another run with output=FOLDER"
        )
    _check_same_run(config, checkpoint, world_size)
    number = checkpoint.state["tasks_per_step"]
    if number < world_size:
        raise ValueError(
            f"--resume auto: {checkpoint.folder} has {number} episodes an outer step, and this run {world_size} ranks: "
            f"some would idle; start it with at most {number}, or start another run with output=FOLDER"
        )
    return config.model_copy(update={"trainer": config.trainer.model_copy(update={"tasks_per_step": number})})


def check_made_with(now: dict[str, Any], checkpoint: Checkpoint) -> None:
    """ValueError where the DeepSpeed file clips otherwise now, or the model's weights or the tasks' rows are others
    under the same names. An older checkpoint, and a base that is spread over ranks, tell nothing.
    """
    saved = checkpoint.state.get("made_with", {})
    for key, value in now.items():
        known = saved.get(key)
        if None in (known, value) or known == value:
            continue
        if key == "tasks":
            raise ValueError(
                f"--resume auto: tasks: {_changed(known, value)}; episodes would be drawn otherwise: set the files "
                "back, or start another run with output=FOLDER"
            )
        raise ValueError(
            f"--resume auto: {key}: {show(known)} in the checkpoint, {show(value)} now; set it back, or start another "
            "run with output=FOLDER"
        )


def check_finished_run(config: Config, folder: Path, ranks: Ranks) -> None:
    """ValueError where the folder holds a finished run of another configuration: without a checkpoint that tells it, a
    resume would start from the beginning and replace it.
    """
    problem = None
    if ranks.is_main and finished_facts(folder) is not None and (folder / CONFIG).is_file():
        try:
            found = load_config(folder / CONFIG)
        except ConfigError as error:  # another version's
            problem = str(error)
        else:
            there, now = in_effect(*(flat(own.model_dump(mode="json")) for own in (found, config)))
            for values in (there, now):
                values["model.name"] = absolute_model(values["model.name"])
            problem = _different(there, now, FIXED_KEYS, "in the run that is there")
    if problem := ranks.from_main(problem):
        raise ValueError(
            f"--resume auto: {folder}: holds a finished run of another configuration, and no checkpoint:\n  {problem}\n"
            "set these back, start another run with output=FOLDER, or replace this one with --overwrite"
        )


def scored_otherwise(before: Mapping[str, Any], config: Config, keys: tuple[str, ...] = OF_SCORES) -> list[str]:
    """`key: value` for each of the keys that has another value in `config` than in `before`, a `scoring`."""
    now = scoring(config)
    return [f"{key}: {show(now[key])}" for key in keys if before.get(key) != now[key]]


def scoring(config: Config) -> dict[str, Any]:
    """What scores depend on beside theta and what a checkpoint fixes."""
    values = flat(config.model_dump(mode="json"))
    return {key: values[key] for key in OF_SCORES}


def checkpointed_scoring(checkpoint: Checkpoint) -> dict[str, Any]:
    """The same in the session that wrote the checkpoint."""
    values = flat(completed(checkpoint.state["config"]))
    return {key: values[key] for key in OF_SCORES}


def _changed(saved: dict[str, str], now: dict[str, str]) -> str:
    """Which splits are new, gone, or have other rows."""
    kinds = {
        "new": [name for name in now if name not in saved],
        "gone": [name for name in saved if name not in now],
        "with other rows": [name for name in now if name in saved and saved[name] != now[name]],
    }
    return "; ".join(f"{kind}: {', '.join(names)}" for kind, names in kinds.items() if names)


def _different(saved: dict[str, Any], now: dict[str, Any], fixed: tuple[str, ...], where: str) -> str:
    """A line for each key that a resumed run must agree on and does not."""
    return "\n  ".join(
        f"{key}: {show(saved.get(key))} {where}, {show(now.get(key))} now"
        for key in dict.fromkeys((*now, *saved))
        if (key.partition(".")[0] in FIXED_BY_CHECKPOINT or key in fixed)
        and key not in MAY_CHANGE
        and saved.get(key) != now.get(key)
    )


def _check_same_run(config: Config, checkpoint: Checkpoint, world_size: int) -> None:
    before = completed(checkpoint.state["config"])  # an older version's may lack keys
    saved, now = in_effect(flat(before), flat(config.model_dump(mode="json")))
    for values in (saved, now):  # a summary's is absolute, a command's may not be
        values["model.name"] = absolute_model(values["model.name"])
    saved["trainer.tasks_per_step"] = checkpoint.state["tasks_per_step"]
    if now["trainer.tasks_per_step"] is None:  # taken from the checkpoint
        del saved["trainer.tasks_per_step"], now["trainer.tasks_per_step"]
    fixed = FIXED_KEYS
    if config.method.interpolates and config.method.reptile_schedule == "annealed":  # over the whole length
        fixed += ("trainer.episodes", "trainer.epochs")
    if METHODS[config.method.name].inner_loop and not config.method.reset_inner_optimizer:  # each rank has its moments
        fixed += ("ranks",)
        saved["ranks"], now["ranks"] = checkpoint.state["world_size"], world_size
    if different := _different(saved, now, fixed, "in the checkpoint"):
        kept = " (method.reset_inner_optimizer: false keeps moments on each rank)" if "ranks" in now else ""
        raise ValueError(
            f"--resume auto: the configuration differs from the checkpoint's:\n  {different}"
            + f"\nset these back{kept}, or start another run with output=FOLDER"
        )
