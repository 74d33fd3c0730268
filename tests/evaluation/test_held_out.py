"""Cross-fitting: what each fold holds out, and a temperature that equals a loop by hand over adaptations."""

import numpy as np
import pytest
import torch
from evaluations import adapt_by_hand, evaluate, evaluator, predictions, scattered
from scipy.optimize import minimize_scalar

from abmll.evaluation.held_out import leave_one_batch_out
from abmll.methods import METHODS
from abmll.tasks.episodes import in_batches, support_examples
from abmll.tasks.task import PromptedExample

A, B, C, D = (PromptedExample((number,), 0, 2) for number in range(4))
SEED = 7  # of a task whose T is inside its range, as it seldom is for random weights and six examples


def temperature(tiny, steps=3, beside=1, **changes):
    """Of the first task."""
    return evaluate(tiny, beside=beside, **changes).tasks[steps][tiny.parts.tasks.test[0].name]["temperature"]


def by_hand(tiny):
    """T of the first task: adapt on the other batches, predict the one left out, and fit to all that are predicted."""
    task, size, steps = tiny.parts.tasks.test[0], tiny.config.tasks.batch_size, tiny.config.method.adaptation_steps
    support = support_examples(task, steps * size, tiny.config.seed)
    logits, labels = [], []
    for step in range(steps):
        others = [example for place, example in enumerate(support) if place // size != step]
        adapt_by_hand(tiny, others)
        for example in support[step * size : (step + 1) * size]:
            if any(example is other for other in others):
                continue
            (batch,) = in_batches([example], tiny.parts.tasks.letter_ids, 1)
            with torch.no_grad():
                of_tokens = tiny.learner.forward(batch, None)[0][0].double()
            logits.append(of_tokens[batch.letter_ids[0, : example.num_options]].numpy())
            labels.append(example.label)

    def negative_log_posterior(t):
        """log T has a normal prior of standard deviation 1/2."""
        nll = sum(np.logaddexp.reduce(own / t) - own[right] / t for own, right in zip(logits, labels, strict=True))
        return nll + 2 * np.log(t) ** 2

    return minimize_scalar(negative_log_posterior, bounds=(1 / 20, 20), method="bounded").x, len(labels)


def test_each_batch_is_left_out_once():
    assert leave_one_batch_out([A, B, C, D], 2, "t") == [([C, D], [A, B]), ([A, B], [C, D])]


def test_what_is_in_two_batches_is_never_held_out():
    again = PromptedExample([1], 1, 2)  # B's question in another row
    assert leave_one_batch_out([A, B, C, C, again, A], 2, "t") == [([A, B, again, A], [C])]
    with pytest.raises(ValueError, match=r"'held_out': task t: each .* several .* batches; set eval.temperature=supp"):
        leave_one_batch_out([A, B, B, A], 2, "t")


@pytest.mark.parametrize("name", ["abmll", "blob", "reptile", "maml"])
def test_the_temperature_equals_a_loop_by_hand(name, build_tiny):
    method = {"name": name, "inner_optimizer": "sgd" if name == "maml" else "adamw"}
    tiny = scattered(build_tiny(seed=SEED, method=method))
    expected, count = by_hand(tiny)
    assert count == 6 and 0.1 < expected < 19
    assert temperature(tiny, temperature="held_out") == pytest.approx(expected, rel=1e-3)


def test_a_task_with_fewer_examples_than_adaptation_takes(build_tiny):
    """Eight of six: two come again, and four are left to fit to."""
    tiny = scattered(build_tiny(seed=SEED, method={"test_steps": 4}))
    expected, count = by_hand(tiny)
    assert count == 4 and 0.1 < expected < 19
    assert temperature(tiny, 4, temperature="held_out") == pytest.approx(expected, rel=1e-3)
    with pytest.raises(ValueError, match="each of its support examples is in several"):
        temperature(scattered(build_tiny(method={"test_steps": 8})), temperature="held_out")


@pytest.mark.parametrize("name", ["abmll", "reptile"])
@pytest.mark.parametrize("beside", [2, 3, 4])
def test_folds_side_by_side_are_folds_alone(name, beside, build_tiny):
    """With samples too: a fold's noise is its own wherever it stands."""
    tiny = scattered(build_tiny(seed=SEED, method={"name": name}))
    alone, found = (temperature(tiny, beside=number, temperature="held_out", samples=2) for number in (1, beside))
    assert found == pytest.approx(alone, rel=1e-3)


def test_no_more_folds_side_by_side_than_tasks(build_tiny, monkeypatch):
    """What the memory plan counts."""
    tiny, slots = scattered(build_tiny(seed=SEED)), []
    adapt = METHODS["abmll"].adapt

    def counted(self, learner, batches, keys):
        slots.append((learner.adapters.groups, len(batches)))
        return adapt(self, learner, batches, keys)

    monkeypatch.setattr(METHODS["abmll"], "adapt", counted)
    tasks = tiny.parts.tasks.test[:1]
    evaluator(tiny, beside=2, temperature="held_out")._evaluate_tasks(tiny.method, tasks, "test")
    assert slots == [(2, 2), (1, 2), (1, 3)]


def test_it_is_applied_to_the_model_adapted_on_all(build_tiny):
    tiny = scattered(build_tiny(seed=SEED))
    plain, warm = predictions(tiny), predictions(tiny, temperature="held_out")
    expected = plain[3].tempered(temperature(tiny, temperature="held_out"))
    assert torch.equal(warm[3].options, expected.options) and torch.equal(warm[3].nll, expected.nll)


def test_before_adaptation_the_support_set_is_held_out_already(build_tiny):
    tiny = scattered(build_tiny(seed=SEED))
    held_out, support = (evaluate(tiny, temperature=value) for value in ("held_out", "support"))
    assert held_out.tasks[0] == support.tasks[0]
    assert held_out.tasks[3] != support.tasks[3]


def test_what_adaptation_has_seen_looks_surer_than_what_is_held_out(build_tiny):
    """Random weights learn nothing that helps with new examples, and their own ones by heart."""
    tiny = build_tiny(method={"name": "lora"})
    seen, held_out = (evaluate(tiny, temperature=value).tasks[3] for value in ("support", "held_out"))
    for task in seen:
        assert seen[task]["temperature"] < held_out[task]["temperature"]
