"""From a configuration to the parts of a run: tasks as tokens, the adapted model, the method."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from abmll.adapters import inject_adapters
from abmll.config import Config, resolve_path
from abmll.config.task_lists import resolve_task_lists
from abmll.learner import Learner
from abmll.methods import Method, build_method
from abmll.models.fingerprint import fingerprint
from abmll.models.load import load_model
from abmll.models.packing import is_packed
from abmll.models.positions import beyond_positions, check_positions
from abmll.tasks.episodes import EpisodeSampler, PooledSampler
from abmll.tasks.examples import Demonstrations, PromptCounts, PromptedTask
from abmll.tasks.prompt import Limits, Prompter
from abmll.tasks.sources import LoadedTasks, load_tasks
from abmll.tasks.task import Task

ROLES = ("train", "validation", "test")


@dataclass(frozen=True)
class RunTasks:
    """A run's tasks, ready to be drawn from, and what is worth telling about them."""

    train: list[PromptedTask]
    validation: list[PromptedTask]
    test: list[PromptedTask]
    letter_ids: tuple[int, ...]
    notes: list[str]

    @property
    def digests(self) -> dict[str, str]:
        """Of all rows that training reads and that choose the best step, by the split's name."""
        training = {f"{task.name} (training)": task.train.digest for task in (*self.train, *self.validation)}
        return training | {f"{task.name} (validation)": task.validation.digest for task in self.validation}

    @property
    def test_digests(self) -> dict[str, str]:
        """Of all rows that scoring the test tasks reads."""
        splits = ("train", "test")
        return {f"{task.name} ({split})": getattr(task, split).digest for task in self.test for split in splits}

    def sampler(self, config: Config, method: Method) -> EpisodeSampler:
        kind = PooledSampler if method.pooled else EpisodeSampler
        query = config.method.outer_batch == "query"
        return kind(self.train, self.letter_ids, config.seed, config.method.inner_steps, config.tasks.batch_size, query)


@dataclass(frozen=True)
class Parts:
    model: PreTrainedModel
    tokenizer: Any
    learner: Learner
    method: Method
    tasks: RunTasks
    fingerprint: str | None  # of the base; None where it is spread over ranks, none of which has all of it


def read_tasks(config: Config, config_path: str | Path, scoring: bool = False) -> LoadedTasks:
    """The configured tasks as text; `scoring`: the test tasks alone.

    ValueError, naming what is missing, where a list comes out empty.
    """

    def resolve(path: str) -> Path:
        return resolve_path(path, config_path)

    lists = None if config.tasks.source == "builtin" else resolve_task_lists(config.tasks, resolve, scoring)
    validation_examples = config.eval.validation_examples if config.eval.every else None
    return load_tasks(config.tasks, lists, config.seed, validation_examples, resolve, scoring)


def prompt_tasks(loaded: LoadedTasks, prompter: Prompter, config: Config) -> RunTasks:
    """Tasks whose prompts are made when they are used; a task that serves in two roles is one object."""
    done = {task.name: prompter.prompt_task(task, _limits(config)) for task in _each(loaded)}
    roles = {role: [done[task.name] for task in getattr(loaded, role)] for role in ROLES}
    notes = [f"missing task {name}: {where}" for name, where in loaded.missing.items()]
    return RunTasks(**roles, letter_ids=prompter.letter_ids, notes=[*notes, *loaded.notes])


def _fitting_tasks(loaded: LoadedTasks, config: Config, model: PreTrainedModel, tokenizer: Any) -> RunTasks:
    """The same for prompts that the model can take. None is made yet: the longest that may come is judged."""
    check_positions(config.tasks.max_tokens, model.config)
    tasks = prompt_tasks(loaded, prompter_of(config, tokenizer), config)
    note = beyond_positions(config.tasks.max_tokens, model.config)
    return replace(tasks, notes=[*tasks.notes, f"tasks.max_tokens: {note}"]) if note else tasks


def measure_prompts(loaded: LoadedTasks, prompter: Prompter, config: Config) -> dict[str, PromptCounts]:
    """What `tasks.max_tokens` does to each task: tokenises every example that the run may use."""
    shown, unseen = prompter.demonstrations, {task.name for task in (*loaded.validation, *loaded.test)}
    counts = {True: (shown.before_adaptation, shown.count), False: (shown.before_training, 0)}  # is it unseen?
    return {task.name: prompter.measure(task, _limits(config), *counts[task.name in unseen]) for task in _each(loaded)}


def _each(loaded: LoadedTasks) -> list[Task]:
    """Every task once, in the order of the roles."""
    return list({task.name: task for role in ROLES for task in getattr(loaded, role)}.values())


def _limits(config: Config) -> Limits:
    return Limits(config.tasks.max_train_examples, config.eval.validation_examples, config.eval.max_examples)


def build(config: Config, config_path: str | Path, device: torch.device, scoring: bool = False) -> Parts:
    """Everything but the engine and activation checkpointing.

    `scoring`: without tasks to train and validate on, for scores alone. ValueError, with the remedy, for whatever the
    configuration names and is not there.
    """
    loaded = read_tasks(config, config_path, scoring)  # first: a wrong path should not cost the loading of a model
    model, tokenizer = load_model(config.model, device)
    tasks = _fitting_tasks(loaded, config, model, tokenizer)
    base = fingerprint(model) if config.model.sharding == "none" else None  # before there are adapters in it
    learner, method = adapt_model(model, config, None if scoring else len(tasks.train))
    return Parts(model, tokenizer, learner, method, tasks, base)


def adapt_model(model: PreTrainedModel, config: Config, num_train_tasks: int | None) -> tuple[Learner, Method]:
    """The loaded model with adapters in it, theta at its start. `num_train_tasks`: see `Learner`. ValueError as
    `build`.
    """
    _check_side_by_side(config, model)
    method = build_method(config.method, config.adapters.posterior)
    adapters = inject_adapters(model, config.adapters, config.method, method.layers, config.seed)
    return Learner(model, adapters, config.method, num_train_tasks, config.tasks.batch_size), method


def _check_side_by_side(config: Config, model: PreTrainedModel) -> None:
    if config.trainer.parallel_episodes > 1 and not is_packed(model):
        raise ValueError(
            f"trainer.parallel_episodes: {config.trainer.parallel_episodes}: prompts are padded for a model of type "
            f"{model.config.model_type!r} with {model.config.get_text_config()._attn_implementation} attention, and "
            "padding depends on what is beside it; set it to 1, or model.attention=auto"
        )


def rebuild_for_scoring(parts: Parts, config: Config, config_path: str | Path) -> Parts:
    """The same model and adapters with other tasks, prompts and settings of the method. ValueError as `build`."""
    _check_side_by_side(config, parts.model)
    tasks = _fitting_tasks(read_tasks(config, config_path, scoring=True), config, parts.model, parts.tokenizer)
    learner = Learner(parts.model, parts.learner.adapters, config.method, None, config.tasks.batch_size)
    return replace(parts, learner=learner, method=build_method(config.method, config.adapters.posterior), tasks=tasks)


def prompter_of(config: Config, tokenizer: Any) -> Prompter:
    """ValueError as `Prompter`."""
    tasks = config.tasks
    shown = Demonstrations(tasks.demonstrations, tasks.demonstrate)
    return Prompter(tokenizer, tasks.max_tokens, tasks.too_long, shown)
