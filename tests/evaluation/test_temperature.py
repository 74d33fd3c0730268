"""Temperature scaling: its arithmetic by hand, its fit where the answer is known, and its place in an evaluation."""

import math

import pytest
import torch
from evaluations import CLOSE, evaluate, evaluator, predictions, scattered

from abmll.config.schema import TFBConfig
from abmll.evaluation.temperature import PRIOR_STD, RANGE, fit_temperature
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


def test_many_examples_are_what_they_are():
    """Of ten thousand 70 % are right: T takes 90 % and 60 % there, hardly held back by the prior."""
    label = [0] * 7000 + [1] * 3000
    for confidence in (0.9, 0.6):
        found = fit_temperature(predicted([[confidence, 1 - confidence]] * 10_000, label, [0.8] * 10_000))
        expected = math.log(confidence / (1 - confidence)) / math.log(7 / 3)
        assert found == pytest.approx(expected, rel=1e-2)


def slope(found, options, label):
    """The derivative by log T of the negative log posterior, zero at its least: by hand for two options each.

    With z = log(p / (1 - p)) of the right option its NLL is log(1 + exp(-z / T)).
    """
    odds = [math.log(p[right] / p[1 - right]) / found for p, right in zip(options, label, strict=True)]
    return sum(z / (1 + math.exp(z)) for z in odds) + math.log(found) / PRIOR_STD**2


@pytest.mark.parametrize("right", range(11))
@pytest.mark.parametrize("confidence", [0.5001, 0.6, 0.9, 0.999])
def test_a_few_examples_move_it_where_the_posterior_is_densest(right, confidence):
    options, label = [[confidence, 1 - confidence]] * 10, [0] * right + [1] * (10 - right)
    found = fit_temperature(predicted(options, label, [0.8] * 10))
    assert RANGE[0] < found < RANGE[1]
    # the search ends within 1e-5 of log T, and the second derivative is below 10 * (5 + 25) + 4 there
    assert abs(slope(found, options, label)) < 5e-3


def test_a_few_right_answers_are_no_certainty_and_guesses_stay_guesses():
    assert 0.4 < fit_temperature(predicted([[0.9, 0.1]] * 10, [0] * 10, [1.0] * 10)) < 0.8
    assert fit_temperature(predicted([[0.5001, 0.4999]] * 10, [0] * 10, [1.0] * 10)) == pytest.approx(1.0, abs=1e-2)


def test_a_perfectly_calibrated_model_is_left_nearly_alone():
    """Ten examples each of 200 tasks: the median T is near 1."""
    random = torch.Generator().manual_seed(0)
    p = torch.rand(200, 10, generator=random, dtype=torch.float64) * 0.9 + 0.05
    label = (torch.rand(p.shape, generator=random, dtype=torch.float64) > p).long()
    tasks = zip(torch.stack([p, 1 - p], dim=2).tolist(), label.tolist(), strict=True)
    fits = [fit_temperature(predicted(options, own, [1.0] * 10)) for options, own in tasks]
    assert torch.tensor(fits).median() == pytest.approx(1.0, abs=0.1)


def test_each_example_has_its_own_options():
    """One right of three and one right of two: an option of probability zero has no part."""
    found = fit_temperature(predicted([[0.8, 0.2, 0.0], [0.8, 0.1, 0.1]], [0, 0], [1.0, 1.0]))
    two, three = (torch.tensor(p, dtype=torch.float64).log() for p in ([0.8, 0.2], [0.8, 0.1, 0.1]))

    def loss(temperature):
        nll = -sum(float((logits / temperature).log_softmax(0)[0]) for logits in (two, three))
        return nll + 0.5 * (math.log(temperature) / PRIOR_STD) ** 2

    assert loss(found) < min(loss(0.99 * found), loss(1.01 * found))


def test_the_fit_ends_where_so_many_are_wrong_that_no_prior_holds():
    wrong = fit_temperature(predicted([[0.9, 0.1]] * 1000, [1] * 1000, [1.0] * 1000))
    assert 19.9 < wrong < RANGE[1]
    hardly = fit_temperature(predicted([[0.51, 0.49]] * 10_000, [0] * 10_000, [1.0] * 10_000))
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
