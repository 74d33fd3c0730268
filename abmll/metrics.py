"""Scores of predictions on multiple-choice tasks: accuracy, calibration, likelihood, and what a majority guess gets.

Every probability over options is over the example's own options only: the letters' probabilities, renormalised.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace

import torch
from torch.nn.functional import one_hot, pad

from abmll.tasks.task import Batch

CALIBRATION_BINS = 15
HIGHER_IS_BETTER = ("accuracy", "accuracy_vocabulary", "macro_f1")  # of all other scores less is better
# the smallest normal fp32 number: a probability that underflowed to 0 costs 87.3 nats instead of infinitely many
SMALLEST = torch.finfo(torch.float32).tiny


@dataclass(frozen=True)
class Predictions:
    """What the scores need of n scored examples, on the CPU.

    options [n, C] float64, probabilities that sum to 1 over the example's options, 0 beyond them;
    correct_vocabulary [n] bool, whether the likeliest token of the whole vocabulary is the right letter;
    nll [n] float64, -log probability of the right letter in the whole vocabulary, in nats; label [n] int64.
    Over posterior samples, and NaN where none were drawn: variance [n] float64, of an option's probability, the mean
    over the options; mutual_information [n] float64, entropy of the average less the average entropy, in nats.
    """

    options: torch.Tensor
    correct_vocabulary: torch.Tensor
    nll: torch.Tensor
    label: torch.Tensor
    variance: torch.Tensor
    mutual_information: torch.Tensor

    def take(self, places: torch.Tensor) -> Predictions:
        """The examples at these places (int64 [m]), in their order."""
        return Predictions(**{name: value[places] for name, value in vars(self).items()})

    def finite(self) -> torch.Tensor:
        """Whether each prediction is one, [n] bool: a phi or theta that diverged gives NaN."""
        return self.options.isfinite().all(dim=1) & self.nll.isfinite()

    def entropy(self) -> torch.Tensor:
        """Of each example's options, in nats: [n]."""
        return torch.special.entr(self.options).sum(dim=1)

    def tempered(self, temperature: float) -> Predictions:
        """At another temperature T: options ∝ p^(1/T), while all letters together stay as likely in the vocabulary.

        What else a prediction says (the likeliest token, the samples' spread) is left as it is at T = 1.
        """
        options = (self.options.log() / temperature).softmax(dim=1)
        options = options.clamp(min=SMALLEST).where(self.options != 0, 0.0)  # of an option it is never 0
        before, after = (of.gather(1, self.label[:, None])[:, 0].log() for of in (self.options, options))
        return replace(self, options=options, nll=self.nll + before - after)  # -log(mass) = nll + before


@dataclass(frozen=True)
class Scores:
    """Scores of one set of examples; all but nll, nll_options (nats) and n are fractions, brier goes up to 2."""

    accuracy: float  # the likeliest option is the right one
    accuracy_vocabulary: float  # the likeliest token of the whole vocabulary is the right letter: the paper's accuracy
    ece: float  # |accuracy - mean confidence| of 15 equal bins of the largest option probability, weighted by size
    ece_paper: float  # mean over examples of |largest option probability - 1 if right else 0|, without bins
    nll: float  # of the right letter, in the whole vocabulary
    nll_options: float  # of the right letter, among the options
    brier: float  # squared distance to the right answer, summed over the options
    macro_f1: float  # over the letters that occur as a label or as a prediction
    majority: float  # share of the commonest label: what always answering it would get
    n: int


def score(predictions: Predictions) -> Scores:
    """Scores of the examples as one set; all that need predictions are NaN where one is (the adaptation diverged).

    ValueError if there are no examples.

    `ece_paper` is near 1 - accuracy for a confident model and cannot be compared with the pooled `ece`.
    """
    # here, as it imports SciPy and matplotlib: a fifth of the start of a command that may score nothing, or only later
    from torchmetrics.functional.classification import binary_calibration_error, multiclass_f1_score

    options, label = predictions.options, predictions.label
    n, num_letters = options.shape
    if n == 0:
        raise ValueError("score: 0 examples: a task needs at least one test example; check the task's test split")
    right = one_hot(label, num_letters)
    majority = right.double().mean(dim=0).max()
    if options.isnan().any() or predictions.nll.isnan().any():
        undefined = {field.name: math.nan for field in fields(Scores)}
        return Scores(**undefined | {"majority": float(majority), "n": n})
    confidence, choice = options.max(dim=1)
    correct = choice == label
    # torchmetrics' bins are closed on the left and it gives a confidence of exactly 1 a bin of its own
    below_one = confidence.clamp(max=1 - torch.finfo(confidence.dtype).eps)
    values = {
        "accuracy": correct.double().mean(),
        "accuracy_vocabulary": predictions.correct_vocabulary.double().mean(),
        "ece": binary_calibration_error(below_one, correct.long(), n_bins=CALIBRATION_BINS),
        "ece_paper": (confidence - correct.double()).abs().mean(),
        "nll": predictions.nll.mean(),
        "nll_options": -(options * right).sum(dim=1).clamp(min=SMALLEST).log().mean(),
        "brier": ((options - right) ** 2).sum(dim=1).mean(),
        "macro_f1": multiclass_f1_score(choice, label, num_classes=num_letters, average="macro"),
        "majority": majority,
    }
    return Scores(**{name: float(value) for name, value in values.items()}, n=n)


def pool(tasks: Sequence[Predictions]) -> dict[str, float]:
    """Scores of several tasks: each name of `Scores` is the mean over tasks, with `pooled_` before it that of all
    examples as one set. `n` counts examples and `tasks` the tasks."""
    per_task = [asdict(score(predictions)) for predictions in tasks]
    pooled = asdict(score(concatenate(tasks)))
    n = pooled.pop("n")
    macro = {name: sum(scores[name] for scores in per_task) / len(per_task) for name in pooled}
    return {**macro, **{f"pooled_{name}": value for name, value in pooled.items()}, "n": n, "tasks": len(per_task)}


def concatenate(parts: Sequence[Predictions]) -> Predictions:
    """One set of examples from several, whose numbers of letters may differ."""
    if not parts:
        raise ValueError("score: 0 sets of predictions: nothing was scored; check that the tasks have test examples")
    num_letters = max(part.options.shape[1] for part in parts)
    joined = {field.name: torch.cat([getattr(part, field.name) for part in parts]) for field in fields(Predictions)[1:]}
    options = [pad(part.options, (0, num_letters - part.options.shape[1])) for part in parts]
    return Predictions(options=torch.cat(options), **joined)


class ScoreAccumulator:
    """Collects one task's predictions batch by batch; keeps a few numbers an example."""

    def __init__(self) -> None:
        self._parts: list[Predictions] = []

    def update(self, probabilities: torch.Tensor, batch: Batch) -> None:
        """Adds a batch. `probabilities` [S, B, V] of S posterior samples (or one mean), whose average predicts, over
        the whole vocabulary, on the batch's device.
        """
        average = probabilities.mean(dim=0)
        target = average.gather(1, batch.target[:, None])[:, 0].double()
        part = Predictions(
            options=_options(average, batch).cpu(),
            correct_vocabulary=(average.argmax(dim=1) == batch.target).cpu(),
            nll=-target.clamp(min=SMALLEST).log().cpu(),
            label=batch.label.cpu(),
            **{name: value.cpu() for name, value in _spread(probabilities, batch).items()},
        )
        self._parts.append(part)

    def predictions(self) -> Predictions:
        """All examples so far, in the order they were added."""
        return concatenate(self._parts)

    def score(self) -> Scores:
        return score(self.predictions())


def _options(probabilities: torch.Tensor, batch: Batch) -> torch.Tensor:
    """[B, V] -> [B, C], renormalised over each example's options."""
    letters = probabilities.gather(1, batch.letter_ids).double()
    # above 0, so that where all letters underflowed the options come out equally likely and not as 0 / 0
    letters = letters.clamp(min=SMALLEST).where(batch.option_mask, 0.0)
    return letters / letters.sum(dim=1, keepdim=True)


def _spread(probabilities: torch.Tensor, batch: Batch) -> dict[str, torch.Tensor]:
    """How far the samples' predictions over the options differ: see `Predictions`."""
    if len(probabilities) == 1:
        unknown = torch.full((probabilities.shape[1],), math.nan, dtype=torch.float64)
        return {"variance": unknown, "mutual_information": unknown}
    options = torch.stack([_options(sample, batch) for sample in probabilities])
    entropies = torch.special.entr(options).sum(dim=2)
    of_average = torch.special.entr(options.mean(dim=0)).sum(dim=1)
    variance = options.var(dim=0).sum(dim=1) / batch.option_mask.sum(dim=1)
    return {"variance": variance, "mutual_information": of_average - entropies.mean(dim=0)}
