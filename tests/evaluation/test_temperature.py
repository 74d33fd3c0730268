"""Temperature scaling: its arithmetic by hand, its fit where the answer is known, and its place in an evaluation."""

import math

import pytest
import torch
from evaluations import CLOSE, evaluate, evaluator, predictions, scattered

from abmll.config.schema import TFBConfig
from abmll.evaluation.temperature import RANGE, fit_temperature
from abmll.metrics import Predictions
from abmll.tasks.episodes import support_examples


def predicted(options, label, mass):
    """Predictions over the options whose letters together have these probabilities in the vocabulary."""
    options, mass = (torch.tensor(numbers, dtype=torch.float64) for numbers in (options, mass))
    label = torch.tensor(label)
    nll = -(mass * options[torch.arange(len(label)), label]).log()
    return Predictions(options, torch.ones(len(label), dtype=torch.bool), nll, label, *(2 * [nll * torch.nan]))


def test_options_are_powers_and_the_letters_keep_their_mass():
    tempered = predicted([[0.6, 0.3, 0.1], [0.2, 0.8, 0.0]], [1, 0], [0.5, 0.9]).tempered(2.0)
    first = [math.sqrt(p) for p in (0.6, 0.3, 0.1)]
    first = [p / sum(first) for p in first]
    second = [1 / 3, 2 / 3, 0.0]  # roots of 0.2 and 0.8
    torch.testing.assert_close(tempered.options, torch.tensor([first, second], dtype=torch.float64))
    expected = torch.tensor([-math.log(0.5 * first[1]), -math.log(0.9 / 3)], dtype=torch.float64)
    torch.testing.assert_close(tempered.nll, expected)
    assert tempered.options[1, 2] == 0


def test_a_temperature_of_one_changes_nothing_and_two_undo_each_other():
    plain = predicted([[0.6, 0.3, 0.1], [1 - 1e-12, 1e-12, 0.0]], [1, 1], [0.5, 1e-3])
    for again in (plain.tempered(1.0), plain.tempered(0.5).tempered(2.0)):
        torch.testing.assert_close(again.options, plain.options, rtol=1e-9, atol=0.0)
        torch.testing.assert_close(again.nll, plain.nll)


def test_an_option_never_reaches_zero():
    """Where 0 says that there is no such option."""
    tempered = predicted([[1.0, 1e-37, 0.0]], [1], [1.0]).tempered(RANGE[0])
    assert 0 < tempered.options[0, 1] < 1e-37 and tempered.options[0, 2] == 0
    assert tempered.nll.item() == pytest.approx(-math.log(torch.finfo(torch.float32).tiny))


def test_the_fit_finds_the_share_of_right_answers():
    """Ten examples at 90 %, seven of them right: T takes 90 % to (7 * 11 / 12 + 3 / 12) / 10 = 2 / 3."""
    label = [0] * 7 + [1] * 3
    surer = fit_temperature(predicted([[0.9, 0.1]] * 10, label, [0.8] * 10))
    assert surer == pytest.approx(math.log(9) / math.log(2), rel=1e-3)
    humbler = fit_temperature(predicted([[0.6, 0.4]] * 10, label, [0.8] * 10))
    assert humbler == pytest.approx(math.log(1.5) / math.log(2), rel=1e-3)


def test_many_examples_are_what_they_are():
    """Of a thousand 70 % are right, and the targets hardly differ from them."""
    label = [0] * 700 + [1] * 300
    found = fit_temperature(predicted([[0.9, 0.1]] * 1000, label, [0.8] * 1000))
    assert found == pytest.approx(math.log(9) / math.log(7 / 3), rel=5e-3)


@pytest.mark.parametrize("n", [1, 10])
def test_a_few_right_answers_are_no_certainty(n):
    """All of n are right, at 90 %: T takes that to (n + 1) / (n + 2), or n + 1 : 1."""
    found = fit_temperature(predicted([[0.9, 0.1]] * n, [0] * n, [1.0] * n))
    assert found == pytest.approx(math.log(9) / math.log(n + 1), rel=1e-3)


def test_each_example_has_its_own_options():
    """One right of three and one right of two: the targets are 3 : 1 and 3 : 1 : 1, of n = 2."""
    found = fit_temperature(predicted([[0.8, 0.2, 0.0], [0.8, 0.1, 0.1]], [0, 0], [1.0, 1.0]))
    two, three = (torch.tensor(p, dtype=torch.float64).log() for p in ([0.8, 0.2], [0.8, 0.1, 0.1]))
    targets = torch.tensor([3 / 4, 1 / 4]), torch.tensor([3 / 5, 1 / 5, 1 / 5])

    def loss(temperature):
        pairs = zip(targets, (two, three), strict=True)
        return -sum(float((target * (logits / temperature).log_softmax(0)).sum()) for target, logits in pairs)

    assert loss(found) < min(loss(0.99 * found), loss(1.01 * found))


def test_the_fit_ends_where_no_temperature_is_best():
    wrong = fit_temperature(predicted([[0.9, 0.1]], [1], [1.0]))
    assert 19.9 < wrong < RANGE[1]
    hardly = fit_temperature(predicted([[0.5001, 0.4999]] * 10, [0] * 10, [1.0] * 10))
    assert RANGE[0] < hardly < 0.051
    assert math.isnan(fit_temperature(predicted([[math.nan, math.nan]], [0], [1.0])))


@pytest.mark.parametrize(("name", "changes"), [("abmll", {"samples": 2}), ("lora", {"tfb": TFBConfig(samples=2)})])
def test_an_evaluation_fits_it_to_the_support_set(name, changes, build_tiny):
    tiny = scattered(build_tiny(method={"name": name}))
    task = tiny.parts.tasks.test[0]
    plain = predictions(tiny, **changes)
    warm = evaluator(tiny, temperature="support", **changes)._evaluate_tasks(tiny.method, [task], "test")[task.name]
    for steps, scored in warm.items():
        expected = plain[steps].tempered(scored.fitted["temperature"])
        assert torch.equal(scored.predictions.options, expected.options)
        assert torch.equal(scored.predictions.nll, expected.nll)
        assert scored.fitted["temperature"] != pytest.approx(1.0, rel=1e-3)
    # before adaptation, by hand
    if name == "lora":
        return
    tiny.adapters.reset_phi()
    support = support_examples(task, 3 * tiny.config.tasks.batch_size, tiny.config.seed)
    mean = evaluator(tiny)
    temperature = fit_temperature(mean.predictor.predict(tiny.method, ("support", task.name, 0), support))
    found = evaluate(tiny, temperature="support").tasks[0][task.name]["temperature"]
    assert found == pytest.approx(temperature, rel=CLOSE["rtol"])
