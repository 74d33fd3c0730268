"""A task's adapted model: predictions with their confidence, scores, and which examples to label next."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from abmll.config import Config, Refused, override_texts
from abmll.config.settings import flat
from abmll.deploy.adapter import AdapterCard, load_adapter, save_adapter
from abmll.deploy.base import AdaptedBase, Phi
from abmll.deploy.export import export_adapter
from abmll.evaluation.active import choose
from abmll.evaluation.predictor import Predictor
from abmll.metrics import Predictions, Scores, score
from abmll.tasks.checks import check_options
from abmll.tasks.labelled import question, readable
from abmll.tasks.task import Example, PromptedExample

# what a base's layers and prompts are made with
SHARED = (
    *("adapters.", "method.name", "model.dtype"),
    *("tasks.max_tokens", "tasks.too_long", "tasks.demonstrations", "tasks.demonstrate"),
)


@dataclass(frozen=True)
class Prediction:
    """Of one text. `probabilities` of the options sum to 1; `entropy` is theirs, in nats.

    Over posterior samples, None without: `variance` of an option's probability, the mean over the options, and
    `mutual_information`, the entropy of the average less the average entropy, in nats. `truncated`: the text lost its
    middle to tasks.max_tokens.
    """

    label: str
    confidence: float
    probabilities: dict[str, float]
    entropy: float
    variance: float | None = None
    mutual_information: float | None = None
    truncated: bool = False


class TooLong(ValueError):
    """Texts that fit in no prompt; `places`: theirs among those that were given."""

    def __init__(self, message: str, places: Sequence[int]):
        super().__init__(message)
        self.places = tuple(places)


class TaskModel:
    """One task's phi over a base that may serve others too: `phi` None is theta, before any adaptation."""

    def __init__(self, base: AdaptedBase, phi: Phi | None, card: AdapterCard):
        self.base, self.phi, self.card = base, phi, card
        self._demonstrations = tuple(
            Example(shown.input, tuple(shown.options), shown.output) for shown in card.demonstrations
        )

    @property
    def name(self) -> str:
        return self.card.task

    @property
    def options(self) -> tuple[str, ...] | None:
        """The task's labels; None where each question has its own."""
        return None if self.card.options is None else tuple(self.card.options)

    def predict(self, texts: Sequence[str | Example], samples: int = 0, calibrated: bool = False) -> list[Prediction]:
        """A prediction a text, in order. An `Example` brings its own options; its output is not looked at.

        `samples`: of the posterior, whose predictions are averaged; 0: its mean. `calibrated`: at the temperature
        that cross-validation found for predictions by the mean; variance and mutual information stay as they are at
        T = 1. ValueError where a text has no options or there is no such thing, and where a prediction is not finite;
        TooLong, one too, where texts do not fit.
        """
        examples = self._all_asked(texts)
        if not examples:
            return []
        prompts = self._prompts(examples)
        found = self._predictions(prompts, samples, calibrated)
        return [self._told(examples[place], found, place, prompt.truncated) for place, prompt in enumerate(prompts)]

    def evaluate(self, examples: Sequence[Example], samples: int = 0, calibrated: bool = False) -> Scores:
        """Scores of labelled examples as one set. ValueError as `predict`, and where there are none."""
        return score(self.predictions(examples, samples, calibrated))

    def predictions(self, examples: Sequence[Example], samples: int = 0, calibrated: bool = False) -> Predictions:
        """What `evaluate` scores, for whatever else is asked of it (`abmll.uncertainty`)."""
        if not examples:
            raise ValueError(f"task {self.name}: no examples to score; give at least one")
        return self._predictions(self._prompts(self._all_asked(examples)), samples, calibrated)

    def truncated(self, texts: Sequence[str | Example]) -> list[bool]:
        """Whether each text loses its middle to tasks.max_tokens. ValueError as `predict`."""
        return [prompt.truncated for prompt in self._prompts(self._all_asked(texts))]

    def suggest(self, texts: Sequence[str | Example], count: int = 4, samples: int = 0) -> list[int]:
        """Places of the `count` texts that are most worth a label, the most uncertain first; a question's once.

        By the variance over posterior samples, or without samples by the entropy of the prediction. ValueError as
        `predict`.
        """
        if samples == 1:
            raise ValueError("samples: 1: one sample has no variance; take two or more, or 0 for the entropy")
        examples = self._all_asked(texts)
        if not examples:
            return []
        predictor, prompted = self._predictor(samples), self._prompts(examples)
        first = {question(examples[place]): place for place in reversed(range(len(examples)))}
        prompts = [prompted[place] for place in sorted(first.values())]
        self.base.show(self.phi)
        stream = ("candidate", self.name, self.card.adaptation.steps)
        chosen = choose(
            prompts,
            lambda candidates: self._sound(predictor.predict(self.base.method, stream, candidates)),
            count,
            "variance" if samples else "entropy",
        )
        places = {id(prompt): place for place, prompt in enumerate(prompted)}
        return [places[id(prompt)] for prompt in chosen]

    def save(self, folder: str | Path) -> Path:
        """As an adapter folder. Refused where the folder holds something else, or nothing was adapted."""
        if self.phi is None:
            raise Refused(f"{self.name}: is not adapted to anything; call adapt first")
        save_adapter(Path(folder), self.phi, self.card)
        return Path(folder)

    def export(self, folder: str | Path, format: str = "peft") -> Path:
        """The posterior's mean for others to use: peft, merged (a model of its own) or safetensors.

        Refused, and nothing written, where it would not give this model's predictions: see `abmll.deploy.export`.
        """
        export_adapter(self, folder, format)
        return Path(folder)

    def _predictions(self, prompts: Sequence[PromptedExample], samples: int, calibrated: bool) -> Predictions:
        self.base.show(self.phi)
        stream = ("prediction", self.name, self.card.adaptation.steps)
        found = self._sound(self._predictor(samples).predict(self.base.method, stream, prompts))
        return found.tempered(self._temperature()) if calibrated else found

    def _predictor(self, samples: int) -> Predictor:
        """By the seed and batches of the adapter's own run, whatever stands beside it."""
        return self.base.predictor(samples, self._run_config)

    @cached_property
    def _run_config(self) -> Config:
        return self.card.run_config(self.name)

    def _sound(self, found: Predictions) -> Predictions:
        """The predictions. ValueError where one is not finite."""
        finite = found.finite()
        if not finite.all():
            remedy = "adapt again with a lower method.test_lr" if self.phi is not None else "use another run"
            raise ValueError(
                f"task {self.name}: predictions: {int((~finite).sum()):,} of {len(finite):,} are not finite, as where "
                f"{'phi' if self.phi is not None else 'theta'} diverged; {remedy}"
            )
        return found

    def _all_asked(self, texts: Sequence[str | Example]) -> list[Example]:
        if isinstance(texts, str):
            raise ValueError(f"task {self.name}: texts: {texts[:60]!r}: is one text; give a list of them")
        return [self._asked(text) for text in texts]

    def _asked(self, text: str | Example) -> Example:
        if isinstance(text, Example):
            check_options(text.options, f"task {self.name}")
            return text
        readable(text, f"task {self.name}: {text[:60]!r}")
        if self.options is None:
            raise ValueError(f"task {self.name}: its questions have options of their own; give an Example with them")
        return Example(text, self.options, self.options[0])  # the answer is not asked for

    def _prompts(self, examples: Sequence[Example]) -> list[PromptedExample]:
        prompts = self.base.prompter.encode([example.behind(self._demonstrations) for example in examples])
        if long := [place for place, prompt in enumerate(prompts) if prompt is None]:
            tasks = self.base.config.tasks
            cut = " or with tasks.too_long=truncate" if tasks.too_long == "drop" else ""
            raise TooLong(
                f"task {self.name}: {examples[long[0]].input[:60]!r}: does not fit in tasks.max_tokens: "
                f"{tasks.max_tokens}; shorten it or its options, or adapt again with a larger tasks.max_tokens{cut}",
                long,
            )
        return prompts

    def _temperature(self) -> float:
        temperature = self.card.temperature
        if temperature is None:
            why = "cross-validation found no temperature, as where predictions are like guesses"
            remedy = "with more examples"
            if "cross_validation" not in self.card.scores:
                why, remedy = "its adapter was made without cross-validation", "with it (--folds)"
            raise ValueError(f"task {self.name}: calibrated: {why}; leave it out, or adapt again {remedy}")
        return temperature

    @staticmethod
    def _told(example: Example, found: Predictions, place: int, truncated: bool) -> Prediction:
        row = found.take(torch.tensor([place]))
        values = row.options[0, : len(example.options)].tolist()
        best = max(range(len(values)), key=values.__getitem__)
        sampled = not bool(row.variance.isnan())
        return Prediction(
            label=example.options[best],
            confidence=values[best],
            probabilities=dict(zip(example.options, values, strict=True)),
            entropy=float(row.entropy()),
            variance=float(row.variance) if sampled else None,
            mutual_information=float(row.mutual_information) if sampled else None,
            truncated=truncated,
        )


def load_task_models(
    folders: Sequence[str | Path], overrides: Sequence[str] = (), device: str | torch.device | None = None
) -> list[TaskModel]:
    """Adapters over one base, which is loaded once. `overrides`: `section.key=value`, such as a model's new place.

    Refused where a folder holds no whole adapter, or the adapters are not of this base.
    """
    loaded = [load_adapter(folder) for folder in folders]
    if not loaded:
        raise Refused("--adapter: none is named; name at least one folder that launch/adapt.py wrote")
    try:
        base = AdaptedBase(loaded[0][1].run_config(folders[0], overrides), device)
        return [over(base, folder, *own, overrides) for folder, own in zip(folders, loaded, strict=True)]
    except ValueError as error:
        raise Refused(str(error)) from error


def of_base(model: str | None, dtype: str | None) -> list[str]:
    """The overrides that name a base model's new place, and another dtype than the run's; none for None."""
    chosen = {"model.name": model, "model.dtype": dtype}
    return list(override_texts({key: value for key, value in chosen.items() if value is not None}))


def over(
    base: AdaptedBase, folder: str | Path, phi: Phi, card: AdapterCard, overrides: Sequence[str] = ()
) -> TaskModel:
    """A loaded adapter over a base. ValueError where it is not of this base, or needs other layers or prompts."""
    if card.base.fingerprint != base.fingerprint:
        raise Refused(
            f"--adapter: {folder}: was made on {card.base.name} with fingerprint {card.base.fingerprint[:12]}, and "
            f"{base.config.model.name} as it is loaded has {base.fingerprint[:12]}: an adapter serves no other "
            "weights; name its own model with --model"
        )
    if card.base.prompts not in (None, base.prompts):
        warnings.warn(
            f"--adapter: {folder}: was made with other prompts than {base.config.model.name}'s tokenizer and chat "
            "template make: its answers and confidences will be others; name its own model with --model",
            stacklevel=2,
        )
    own, shared = (flat(config.model_dump()) for config in (card.run_config(folder, overrides), base.config))
    for key in own:
        if key.startswith(SHARED) and own[key] != shared[key]:
            raise Refused(
                f"--adapter: {folder}: {key} is {own[key]!r}, and {shared[key]!r} in the first adapter, so that they "
                "cannot share a base; use it in a call of its own"
            )
    shapes = {name: value.shape[1:] for name, value in base.adapters.phi.items()}
    if {name: value.shape for name, value in phi.items()} != shapes:
        raise Refused(
            f"--adapter: {folder}: its tensors do not fit the adapters that its card describes; make it again"
        )
    return TaskModel(base, phi, card)
