from __future__ import annotations

import math
from dataclasses import asdict, fields

import numpy as np
import pytest
import torch

from abmll.metrics import Predictions, ScoreAccumulator, Scores, concatenate, pool, score
from abmll.tasks.batch import collate
from abmll.tasks.task import Batch, PromptedExample

LETTERS = (3, 5, 7, 9)  # token ids of A to D in a vocabulary of 12


def batch_of(labels: list[int], option_counts: list[int]) -> Batch:
    examples = zip(labels, option_counts, strict=True)
    return collate([PromptedExample((0,), label, count) for label, count in examples], LETTERS)


def of_options(rows: list[list[float]], labels: list[int]) -> Predictions:
    """Predictions whose vocabulary is the options."""
    options, label = torch.tensor(rows, dtype=torch.float64), torch.tensor(labels)
    target = options.gather(1, label[:, None])[:, 0]
    unknown = torch.full_like(target, math.nan)
    return Predictions(options, options.argmax(dim=1) == label, -target.log(), label, unknown, unknown)


def reference(probabilities: np.ndarray, labels: list[int], option_counts: list[int]) -> dict[str, float]:
    """The same scores in plain Python, example by example."""
    rows, confident, right, vocabulary = [], [], [], []
    for p, label, count in zip(probabilities, labels, option_counts, strict=True):
        options = [p[LETTERS[c]] for c in range(count)]
        rows.append([value / sum(options) for value in options])
        confident.append(max(rows[-1]))
        right.append(rows[-1].index(max(rows[-1])) == label)
        vocabulary.append(p.argmax() == LETTERS[label])
    n = len(labels)
    ece = 0.0
    for b in range(15):
        inside = [i for i in range(n) if b / 15 <= confident[i] < (b + 1) / 15 or (b == 14 and confident[i] >= 1)]
        if inside:
            gap = np.mean([right[i] for i in inside]) - np.mean([confident[i] for i in inside])
            ece += len(inside) / n * abs(gap)
    choices, f1 = [row.index(max(row)) for row in rows], []
    for letter in sorted({*labels, *choices}):
        hits = sum(a == letter == b for a, b in zip(choices, labels, strict=True))
        f1.append(2 * hits / (choices.count(letter) + labels.count(letter)))
    return {
        "accuracy": np.mean(right),
        "accuracy_vocabulary": np.mean(vocabulary),
        "ece": ece,
        "ece_paper": np.mean([abs(c - r) for c, r in zip(confident, right, strict=True)]),
        "nll": np.mean([-math.log(p[LETTERS[label]]) for p, label in zip(probabilities, labels, strict=True)]),
        "nll_options": np.mean([-math.log(row[label]) for row, label in zip(rows, labels, strict=True)]),
        "brier": np.mean(
            [sum((p - (c == y)) ** 2 for c, p in enumerate(row)) for row, y in zip(rows, labels, strict=True)]
        ),
        "macro_f1": np.mean(f1),
        "majority": max(labels.count(letter) for letter in labels) / n,
        "n": n,
    }


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("sharpness", [0.5, 3.0])
def test_equals_the_independent_implementation(seed, sharpness):
    """Ragged option counts, batches of different width, fp32 probabilities in."""
    random = np.random.default_rng(seed)
    accumulator, everything, labels, counts = ScoreAccumulator(), [], [], []
    for most in (2, 4, 3):
        sizes = [int(count) for count in random.integers(2, most + 1, size=17)]
        sizes[0] = most
        answers = [int(random.integers(0, count)) for count in sizes]
        logits = torch.tensor(random.normal(size=(17, 12)) * sharpness, dtype=torch.float32)
        probabilities = logits.softmax(dim=1)
        accumulator.update(probabilities[None], batch_of(answers, sizes))
        everything, labels, counts = [*everything, probabilities.numpy()], labels + answers, counts + sizes
    got, want = asdict(accumulator.score()), reference(np.concatenate(everything).astype(np.float64), labels, counts)
    assert set(got) == set(want)
    for name in want:
        assert got[name] == pytest.approx(want[name], rel=1e-6, abs=1e-7), name


def test_by_hand():
    # confidences .8 right, .6 wrong; bins 12 and 9 hold one each
    got = score(of_options([[0.8, 0.2], [0.6, 0.4]], [0, 1]))
    assert got.accuracy == got.accuracy_vocabulary == 0.5
    assert got.ece == pytest.approx((0.2 + 0.6) / 2)
    assert got.ece_paper == pytest.approx((0.2 + 0.6) / 2)
    assert got.nll == got.nll_options == pytest.approx(-(math.log(0.8) + math.log(0.4)) / 2)
    assert got.brier == pytest.approx((2 * 0.2**2 + 2 * 0.6**2) / 2)
    assert got.macro_f1 == pytest.approx((2 / 3 + 0) / 2)
    assert got.majority == 0.5 and got.n == 2


def test_perfect_calibration_has_no_pooled_error_but_a_paper_one():
    """Confidence 0.7 and 7 of 10 right: calibrated, while the paper's ECE is 2 * 0.7 * 0.3."""
    got = score(of_options([[0.7, 0.3]] * 10, [0] * 7 + [1] * 3))
    assert got.ece == pytest.approx(0, abs=1e-12)
    assert got.ece_paper == pytest.approx(0.42)
    assert got.accuracy == got.majority == 0.7


def test_a_confidence_of_one_shares_the_last_bin():
    # bins of their own would give (1 + 0.05) / 2
    got = score(of_options([[1.0, 0.0], [0.95, 0.05]], [1, 0]))
    assert got.ece == pytest.approx(abs(0.5 - 0.975))


@pytest.mark.parametrize(("label", "right"), [(0, 1.0), (1, 0.0)])
def test_one_example(label, right):
    got = score(of_options([[0.75, 0.25]], [label]))
    assert got.accuracy == right and got.n == 1 and got.majority == 1.0
    assert got.ece == got.ece_paper == pytest.approx(abs(right - 0.75))
    assert got.macro_f1 == right


def test_certain_and_right_is_perfect():
    got = score(of_options([[1.0, 0.0, 0.0], [0.0, 0.0, 1.0]], [0, 2]))
    assert (got.accuracy, got.macro_f1) == (1.0, 1.0)
    assert (got.ece, got.ece_paper, got.nll, got.brier) == pytest.approx((0, 0, 0, 0), abs=1e-12)


def test_vocabulary_and_options_differ():
    """Another token is the likeliest; among the letters the right one is."""
    probabilities = torch.zeros(1, 12)
    probabilities[0, 0], probabilities[0, LETTERS[1]], probabilities[0, LETTERS[0]] = 0.9, 0.08, 0.02
    accumulator = ScoreAccumulator()
    accumulator.update(probabilities[None], batch_of([1], [2]))
    got = accumulator.score()
    assert (got.accuracy, got.accuracy_vocabulary) == (1.0, 0.0)
    assert got.nll == pytest.approx(-math.log(0.08), rel=1e-6) and got.nll_options == pytest.approx(
        -math.log(0.8), rel=1e-6
    )


def test_letters_beyond_the_options_do_not_count():
    probabilities = torch.zeros(2, 12)
    probabilities[:, LETTERS[3]], probabilities[:, LETTERS[0]], probabilities[:, LETTERS[1]] = 0.5, 0.3, 0.2
    accumulator = ScoreAccumulator()
    accumulator.update(probabilities[None], batch_of([0, 3], [2, 4]))
    got = accumulator.predictions().options
    torch.testing.assert_close(got, torch.tensor([[0.6, 0.4, 0, 0], [0.3, 0.2, 0, 0.5]]).double(), rtol=1e-6, atol=1e-7)


def test_underflow_stays_finite():
    """fp32 probabilities of every letter are 0: equal options, and an NLL of 87.3 nats."""
    probabilities = torch.zeros(1, 12)
    probabilities[0, 0] = 1.0
    accumulator = ScoreAccumulator()
    accumulator.update(probabilities[None], batch_of([1], [2]))
    assert accumulator.predictions().options.tolist() == [[0.5, 0.5]]
    assert accumulator.score().nll == pytest.approx(87.34, abs=0.01)


def test_pool():
    first, second = of_options([[0.8, 0.2]] * 3, [0, 0, 0]), of_options([[0.1, 0.3, 0.6]], [0])
    got = pool([first, second])
    assert got["accuracy"] == 0.5 and got["pooled_accuracy"] == 0.75
    assert got["ece"] == pytest.approx((0.2 + 0.6) / 2) and got["pooled_ece"] == pytest.approx(0.75 * 0.2 + 0.25 * 0.6)
    assert got["majority"] == 1.0 and got["pooled_majority"] == 1.0
    assert (got["n"], got["tasks"]) == (4, 2)
    names = {field.name for field in fields(Scores)} - {"n"}
    assert set(got) == names | {f"pooled_{name}" for name in names} | {"n", "tasks"}


def test_order_and_partition_do_not_matter():
    whole = of_options([[0.8, 0.2], [0.6, 0.4], [0.3, 0.7], [0.55, 0.45]], [0, 1, 1, 0])
    halves = [
        Predictions(*(getattr(whole, field.name)[part] for field in fields(whole))) for part in (slice(2, 4), slice(2))
    ]
    assert asdict(score(concatenate(halves))) == pytest.approx(asdict(score(whole)))


def test_scores_are_plain_numbers():
    for value in asdict(score(of_options([[0.8, 0.2]], [0]))).values():
        assert type(value) in (float, int)


def test_nothing_to_score():
    with pytest.raises(ValueError, match=r"^score: 0 sets of predictions: .*check that the tasks have test examples"):
        ScoreAccumulator().score()
    with pytest.raises(ValueError, match=r"^score: 0 examples: .*test split"):
        score(of_options([[0.5, 0.5]], [0]).take(torch.zeros(0, dtype=torch.int64)))


def test_a_diverged_task_has_no_scores_and_no_mean_hides_it():
    diverged, sound = ScoreAccumulator(), ScoreAccumulator()
    diverged.update(torch.full((1, 1, 12), float("nan")), batch_of([0], [2]))
    sound.update(torch.full((1, 1, 12), 1 / 12), batch_of([0], [2]))
    scores = diverged.score()
    assert math.isnan(scores.accuracy) and math.isnan(scores.nll) and scores.n == 1
    assert scores.majority == 1.0  # of the labels alone
    together = pool([diverged.predictions(), sound.predictions()])
    assert math.isnan(together["accuracy"]) and math.isnan(together["pooled_ece"]) and together["n"] == 2


def test_the_spread_of_samples_by_hand():
    """Two samples over two options, (.9, .1) and (.5, .5): average (.7, .3)."""
    probabilities = torch.zeros(2, 1, 12)
    for sample, first in enumerate((0.9, 0.5)):
        probabilities[sample, 0, LETTERS[0]], probabilities[sample, 0, LETTERS[1]] = first, 1 - first
    accumulator = ScoreAccumulator()
    accumulator.update(probabilities, batch_of([0], [2]))
    got = accumulator.predictions()

    def entropy(p):
        return -p * math.log(p) - (1 - p) * math.log(1 - p)

    assert got.options[0].tolist() == pytest.approx([0.7, 0.3])
    assert float(got.variance) == pytest.approx(2 * 0.2**2)  # unbiased, the same for both options
    assert float(got.mutual_information) == pytest.approx(entropy(0.7) - (entropy(0.9) + entropy(0.5)) / 2, rel=1e-5)
    assert float(got.entropy()) == pytest.approx(entropy(0.7), rel=1e-5)
