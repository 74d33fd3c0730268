"""A meta-trained model: theta, and the models of tasks that are adapted from it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from abmll.config import ConfigError, Refused, config_from
from abmll.deploy.adaptation import Support, adapt_side_by_side, make_support
from abmll.deploy.adapter import AdaptationCard, AdapterCard, BaseCard, RunCard, ShownExample, kept_config
from abmll.deploy.base import AdaptedBase
from abmll.deploy.cross_validation import Fold, make_folds, summarise
from abmll.deploy.task_model import TaskModel
from abmll.files import file_digest
from abmll.metrics import Predictions, concatenate
from abmll.provenance import versions
from abmll.summary import FINAL, THETA, load_summary
from abmll.tasks.task import Example

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

        Refused or ConfigError (ValueErrors both) where there is no whole summary, or its model cannot be had.
        """
        folder = Path(run)
        summary = folder / FINAL if (folder / FINAL).is_dir() else folder
        try:
            theta, facts = load_summary(summary)
            config = config_from(facts["config"], summary, overrides, scoring=True)
            base = AdaptedBase(config, device)
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

        ValueError for examples that are no task, Refused where an adaptation diverges.
        """
        given = {name: as_examples(examples, name) for name, examples in tasks.items()}
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
        before = {name: self._unadapted(name, supports[name], given[name]) for name in given if parts[name]}
        held_out: dict[str, list[Predictions]] = {name: [] for name in given}
        for number, slot, loss in adapt_side_by_side(self.base, wanted, count):
            name, fold = jobs[number]
            if not all(map(math.isfinite, loss)):
                raise Refused(
                    f"task {name}: adaptation: the loss is {loss} after the steps before: not finite; lower it with "
                    "method.test_lr=... behind the command"
                )
            if fold is None:
                found[name] = TaskModel(self.base, self.base.taken(slot), self._card(supports[name], given[name], loss))
            else:
                held_out[name].append(self._predict_fold(name, fold, slot, len(held_out[name])))
        self.base.forget()
        for name, own in held_out.items():
            if own:
                scores = {"cross_validation": summarise(concatenate(own), len(own)), "before_adaptation": before[name]}
                model = found[name]
                found[name] = TaskModel(self.base, model.phi, model.card.model_copy(update={"scores": _json(scores)}))
        return {name: found[name] for name in given}

    def unadapted(self, options: Sequence[str], task: str = "task") -> TaskModel:
        """theta itself, for a task of these options: what `TaskModel.suggest` asks before there are labels."""
        question = Example("", tuple(options), options[0])
        return TaskModel(self.base, None, self._card(Support(task, 0, (), ()), [question], []))

    def _unadapted(self, task: str, support: Support, examples: Sequence[Example]) -> dict[str, float]:
        """Scores of the examples by theta."""
        model = TaskModel(self.base, None, self._card(support, examples, []))
        return summarise(model.predictions(examples), 0)

    def _predict_fold(self, task: str, fold: Fold, slot: int, number: int) -> Predictions:
        examples = [example.behind(fold.support.shown) for example in fold.held_out]
        prompts = [prompt for prompt in self.base.prompter.encode(examples) if prompt is not None]
        predictor = self.base.predictor()
        return predictor.predict(self.base.method, ("held out", task, number), prompts, slot)

    def _card(self, support: Support, examples: Sequence[Example], loss: list[float]) -> AdapterCard:
        config, options = self.base.config, {example.options for example in examples}
        return AdapterCard(
            task=support.task,
            options=list(options.pop()) if len(options) == 1 else None,
            base=BaseCard(name=config.model.name, revision=config.model.revision, fingerprint=self.base.fingerprint),
            run=self.run,
            adaptation=AdaptationCard(
                examples=len(examples), steps=support.steps, batch_size=self.base.learner.batch_size, loss=loss
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
    """(text, label) pairs as Examples whose options are all labels, in alphabetical order. ValueError for one label."""
    pairs = [example for example in examples if not isinstance(example, Example)]
    options = tuple(sorted({label for _, label in pairs}))
    if pairs and len(options) == 1:
        raise ValueError(f"task {task}: every label is {options[0]!r}: a task needs examples of two labels or more")
    if not examples:
        raise ValueError(f"task {task}: no examples; give a few of each label")
    return [
        example if isinstance(example, Example) else Example(example[0], options, example[1]) for example in examples
    ]


def _json(scores: Mapping[str, Mapping[str, float]]) -> dict[str, dict[str, Any]]:
    """NaN is no JSON."""
    return {
        name: {key: None if math.isnan(value) else value for key, value in own.items()} for name, own in scores.items()
    }
