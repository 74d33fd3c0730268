"""From a configuration to the parts of a run: tasks as tokens, the adapted model, the method."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel

from abmll.adapters import inject_adapters
from abmll.config import Config, resolve_path
from abmll.config.task_lists import resolve_task_lists
from abmll.learner import Learner
from abmll.methods import Method, build_method
from abmll.models.load import load_model
from abmll.tasks.episodes import EpisodeSampler, PooledSampler
from abmll.tasks.prompt import Prompter
from abmll.tasks.sources import LoadedTasks, load_tasks
from abmll.tasks.task import PromptedTask, Task


@dataclass(frozen=True)
class RunTasks:
    """A run's tasks as token ids, and what is worth telling about them."""

    train: list[PromptedTask]
    validation: list[PromptedTask]
    test: list[PromptedTask]
    letter_ids: tuple[int, ...]
    notes: list[str]
    longest: int  # tokens of the longest prompt

    def sampler(self, config: Config, method: Method) -> EpisodeSampler:
        kind = PooledSampler if method.pooled else EpisodeSampler
        query = config.method.outer_batch == "query"
        return kind(self.train, self.letter_ids, config.seed, config.method.inner_steps, config.tasks.batch_size, query)


@dataclass(frozen=True)
class Parts:
    model: PreTrainedModel
    learner: Learner
    method: Method
    tasks: RunTasks


def read_tasks(config: Config, config_path: str | Path) -> LoadedTasks:
    """The configured tasks as text. ValueError, naming what is missing, where a list comes out empty."""

    def resolve(path: str) -> Path:
        return resolve_path(path, config_path)

    lists = None if config.tasks.source == "builtin" else resolve_task_lists(config.tasks, resolve)
    validation_examples = config.eval.validation_examples if config.eval.every else None
    return load_tasks(config.tasks, lists, config.seed, validation_examples, resolve)


def prompt_tasks(loaded: LoadedTasks, prompter: Prompter, config: Config) -> RunTasks:
    """Tasks as token ids; a task that serves in two roles is prompted once."""
    limits = {
        "max_train": config.tasks.max_train_examples,
        "max_validation": config.eval.validation_examples,
        "max_test": config.eval.max_examples,
    }
    done: dict[str, PromptedTask] = {}

    def prompted(tasks: Sequence[Task]) -> list[PromptedTask]:
        for task in tasks:
            if task.name not in done:
                done[task.name] = prompter.prompt_task(task, **limits)
        return [done[task.name] for task in tasks]

    roles = {role: prompted(getattr(loaded, role)) for role in ("train", "validation", "test")}
    notes = [f"missing task {name}: {where}" for name, where in loaded.missing.items()]
    notes += [*loaded.notes, *prompter.report.lines()]
    longest = max(counts.longest for counts in prompter.report.tasks.values())
    return RunTasks(**roles, letter_ids=prompter.letter_ids, notes=notes, longest=longest)


def build(config: Config, config_path: str | Path, device: torch.device) -> Parts:
    """Everything but the engine and activation checkpointing.

    ValueError, with the remedy, for whatever the configuration names and is not there.
    """
    loaded = read_tasks(config, config_path)  # first: a wrong path should not cost the loading of a model
    model, tokenizer = load_model(config.model, device)
    tasks = prompt_tasks(loaded, Prompter(tokenizer, config.tasks.max_tokens, config.tasks.too_long), config)
    method = build_method(config.method, config.adapters.posterior)
    adapters = inject_adapters(model, config.adapters, config.method, method.gaussian, config.seed)
    learner = Learner(model, adapters, config.method, len(tasks.train), config.tasks.batch_size)
    return Parts(model, learner, method, tasks)
