"""A meta-trained model: theta, and the models of tasks that are adapted from it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from abmll.config import ConfigError, Refused, config_from
from abmll.deploy.adaptation import Support, adapt_side_by_side, make_support
from abmll.deploy.adapter import AdaptationCard, AdapterCard, BaseCard, RunCard, ShownExample, kept_config
from abmll.deploy.base import BATCH_SIZE, AdaptedBase, Phi
from abmll.deploy.cross_validation import Fold, make_folds, summarise
from abmll.deploy.task_model import TaskModel
from abmll.files import file_digest
from abmll.methods import Frequencies
from abmll.metrics import Predictions, concatenate
from abmll.provenance import versions
from abmll.summary import FINAL, THETA, find_summary, load_summary
from abmll.tasks.checks import check_options, check_output
from abmll.tasks.labelled import by_question, check_spelling, readable
from abmll.tasks.task import Example
from abmll.trained_with import refuse_other_base, refuse_other_training, refuse_unread

FOLDS = 4


class MetaModel:
    """What a run learned, ready to be adapted. `MetaModel.load(run).adapt(examples).predict(texts)` is all of it."""

    def __init__(self, base: AdaptedBase, run: RunCard):
        """`base` holds theta."""
        self.base, self.run = base, run

    @classmethod
    def load(
        cls, run: str | Path, overrides: Sequence[str] = (), device: str | torch.device | None = None
    ) -> MetaModel:
        """From a run's folder, or its summary alone (RUN/final). `overrides`: `section.key=value`, such as a model's
        new place or another learning rate.

        Refused or ConfigError (ValueErrors both) where there is no whole summary, its model cannot be had or is another
        than theta was trained on, or an override makes theta another one's (`abmll.trained_with`).
        """
        try:
            summary = find_summary(Path(run))
            theta, facts = load_summary(summary)
            refuse_unread(overrides, adapting=True)
            config = config_from(facts["config"], summary, overrides, scoring=True)
            refuse_other_training(config, facts)
            if config.method.name == Frequencies.name:
                raise ValueError(f"method.name: {config.method.name}: has no model to adapt; name another method's run")
            base = AdaptedBase(config, device)
            refuse_other_base(config, base.fingerprint, facts)
            base.adapters.load_theta(theta)
        except ConfigError:
            raise
        except ValueError as error:
            raise Refused(str(error)) from error
        name = (summary.parent if summary.name == FINAL else summary).resolve().name
        return cls(base, RunCard(name=name, step=facts["step"], theta=file_digest(summary / THETA)))

    def adapt(
        self,
        examples: Sequence[Example | tuple[str, str]],
        task: str = "task",
        folds: int = FOLDS,
        steps: int | None = None,
    ) -> TaskModel:
        """One task's model: see `adapt_all`."""
        return self.adapt_all({task: examples}, folds, steps)[task]

    def adapt_all(
        self,
        tasks: Mapping[str, Sequence[Example | tuple[str, str]]],
        folds: int = FOLDS,
        steps: int | None = None,
        tell: Callable[[int, int], None] | None = None,
    ) -> dict[str, TaskModel]:
        """A model for each named task, from its examples: `Example`s, or (text, label) pairs.

        `folds`: parts of the examples that cross-validation leaves out in turn, each with an adaptation of its own; 0:
        none. `steps`: None takes the run's, or as many as show every example once. All adaptations, the folds' too,
        go side by side as far as they have as many steps. `tell`: called with the steps made, and how many there are.

        Examples that do not fit in a prompt are left out (`card.adaptation.examples` counts the others).

        ValueError for examples that are no task; Diverged, which holds the other tasks' models, where an adaptation's
        loss, phi or predictions are not finite.
        """
        if (steps is not None and steps < 1) or folds < 0 or folds == 1:
            raise ValueError(f"steps: {steps}, folds: {folds}: steps are at least 1, and folds 0 or at least 2")
        fitting = {name: self._fitting(as_examples(examples, name), name) for name, examples in tasks.items()}
        given = {name: examples for name, (examples, _) in fitting.items()}
        supports = {name: make_support(self.base, name, examples, steps) for name, examples in given.items()}
        parts = {name: make_folds(self.base, name, given[name], folds, supports[name].steps) for name in given}
        jobs: list[tuple[str, Fold | None]] = [(name, fold) for name in given for fold in (*parts[name], None)]
        wanted = [supports[name] if fold is None else fold.support for name, fold in jobs]
        done, total = 0, sum(support.steps for support in wanted)

        def count(made: int) -> None:
            nonlocal done
            done += made
            if tell:
                tell(done, total)

        found: dict[str, TaskModel] = {}
        before = {name: self._before(supports[name], given[name]) for name in given if parts[name]}
        held_out: dict[str, list[Predictions]] = {name: [] for name in given}
        diverged: dict[str, str] = {}
        for number, slot, loss in adapt_side_by_side(self.base, wanted, count):
            name, fold = jobs[number]
            # one batch of its own examples tells whether the phi of all examples predicts at all
            phi, asked = self.base.taken(slot), given[name][:BATCH_SIZE] if fold is None else fold.held_out
            if problem := _not_finite(loss, phi):
                diverged.setdefault(name, problem)
                continue
            own = self._predict(name, asked, wanted[number], slot, len(held_out[name]))
            if not own.finite().all():
                diverged.setdefault(name, "its predictions after the last step")
            elif fold is None:
                card = self._card(supports[name], _options_of(given[name]), len(given[name]), loss, fitting[name][1])
                found[name] = TaskModel(self.base, phi, card)
            else:
                held_out[name].append(own)
        for name, own in held_out.items():
            if own and name not in diverged:
                summary = summarise(concatenate(own), len(own), len(by_question(given[name])))
                scores, model = {"cross_validation": summary, "before_adaptation": before[name]}, found[name]
                found[name] = TaskModel(self.base, model.phi, model.card.model_copy(update={"scores": _json(scores)}))
        models = {name: found[name] for name in given if name not in diverged}
        if diverged:
            raise Diverged(diverged, models)
        return models

    def unadapted(self, options: Sequence[str] | None, task: str = "task") -> TaskModel:
        """theta itself, for a task of these options: what `TaskModel.suggest` asks before there are labels.

        None: each question brings its own.
        """
        checked = None if options is None else check_options(tuple(options), f"task {task}: options")
        check_spelling(checked or (), f"task {task}")
        return TaskModel(self.base, None, self._card(Support(task, 0, (), ()), checked, 0, []))

    def _before(self, support: Support, examples: Sequence[Example]) -> dict[str, float]:
        """Scores of the examples by theta."""
        card = self._card(support, _options_of(examples), len(examples), [])
        return asdict(TaskModel(self.base, None, card).evaluate(examples))

    def _predict(self, task: str, asked: Sequence[Example], support: Support, slot: int, number: int) -> Predictions:
        """By the phi that stands in a slot, which was adapted to `support`; `number`: of the task's adaptations."""
        prompts = self.base.prompter.encode([example.behind(support.shown) for example in asked])
        return self.base.predictor().predict(self.base.method, ("held out", task, number), prompts, slot)

    def _fitting(self, examples: Sequence[Example], task: str) -> tuple[list[Example], int]:
        """Those that fit in a prompt, and how many of them lose a part to it. ValueError where they have one label."""
        if _one_label(examples):
            raise ValueError(
                f"task {task}: every label is {examples[0].output!r}: an adaptation needs examples of another of the "
                "options too; add some"
            )
        prompts = self.base.prompter.encode(examples)
        found = [example for example, prompt in zip(examples, prompts, strict=True) if prompt is not None]
        if not found:
            raise ValueError(
                f"task {task}: none of its {len(examples)} examples fits in tasks.max_tokens: "
                f"{self.base.config.tasks.max_tokens}; raise it"
            )
        if _one_label(found):
            raise ValueError(
                f"task {task}: {len(found)} of {len(examples)} examples fit in tasks.max_tokens: "
                f"{self.base.config.tasks.max_tokens}, and they have one label; raise the key"
            )
        return found, sum(prompt.truncated for prompt in prompts if prompt is not None)

    def _card(
        self,
        support: Support,
        options: tuple[str, ...] | None,
        examples: int,
        loss: list[float],
        truncated: int = 0,
    ) -> AdapterCard:
        config = self.base.config
        return AdapterCard(
            task=support.task,
            options=None if options is None else list(options),
            base=BaseCard(
                name=config.model.name,
                revision=config.model.revision,
                fingerprint=self.base.fingerprint,
                prompts=self.base.prompts,
            ),
            run=self.run,
            adaptation=AdaptationCard(
                examples=examples,
                truncated=truncated,
                steps=support.steps,
                batch_size=self.base.learner.batch_size,
                loss=loss,
            ),
            demonstrations=[
                ShownExample(input=shown.input, options=list(shown.options), output=shown.output)
                for shown in support.shown
            ],
            scores={},
            config=kept_config(config),
            versions=versions(),
        )


def as_examples(examples: Sequence[Example | tuple[str, str]], task: str = "task") -> list[Example]:
    """(text, label) pairs as Examples whose options are all labels, in alphabetical order.

    ValueError where they are no task: no examples, one label, more than 26, one that is written in two ways, or a text
    or label that is none.
    """
    where = f"task {task}"
    if not examples:
        raise ValueError(f"{where}: no examples; give a few of each label")
    pairs = [example for example in examples if not isinstance(example, Example)]
    for pair in pairs:
        if len(pair) != 2 or not all(isinstance(part, str) for part in pair):
            raise ValueError(f"{where}: {pair!r}: is no (text, label), two strings")
    options: tuple[str, ...] = tuple(sorted({label for _, label in pairs}))
    if pairs and len(options) == 1:
        raise ValueError(f"{where}: every label is {options[0]!r}: a task needs examples of two labels or more")
    check_spelling(options, where)
    found = [one if isinstance(one, Example) else Example(one[0], options, one[1]) for one in examples]
    for example in found:
        check_options(example.options, where)
        check_output(example.output, example.options, where)
        readable(example.input + "".join(example.options), where)
    return found


def _one_label(examples: Sequence[Example]) -> bool:
    """Whether there is nothing to tell apart: one answer to the same options throughout, or none."""
    return len({example.output for example in examples}) < 2 and len({example.options for example in examples}) < 2


def _options_of(examples: Sequence[Example]) -> tuple[str, ...] | None:
    """Those that all examples have; None where they differ."""
    found = {example.options for example in examples}
    return found.pop() if len(found) == 1 else None


class Diverged(Refused):
    """Adaptations that ended in NaN or Inf, and in what by task; `models`: those of the other tasks."""

    def __init__(self, problems: Mapping[str, str], models: dict[str, TaskModel]):
        lines = [f"task {task}: adaptation: {problem}" for task, problem in problems.items()]
        remedy = "lower method.test_lr, or method.beta if it was raised (method.test_lr=... behind the command)"
        super().__init__(f"{'; '.join(lines)}: not finite; {remedy}")
        self.models = models


def _not_finite(loss: Sequence[float], phi: Phi) -> str | None:
    """What of an adaptation is not finite. A loss is taken before its step, so that phi tells of the last one."""
    if not all(map(math.isfinite, loss)):
        return f"the loss by step is {list(loss)}"
    if not all(bool(value.isfinite().all()) for value in phi.values()):
        return f"phi after the last step, the loss before each being {list(loss)}"
    return None


def _json(scores: Mapping[str, Mapping[str, float]]) -> dict[str, dict[str, Any]]:
    """NaN is no JSON."""
    return {
        name: {key: None if math.isnan(value) else value for key, value in own.items()} for name, own in scores.items()
    }
