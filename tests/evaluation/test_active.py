"""Active choice: which candidates, and that adaptation goes round them."""

import pytest
import torch
from evaluations import CLOSE, adapt_by_hand, evaluator, mean_nll, predictions, scattered

from abmll.config.schema import ActiveConfig
from abmll.evaluation.active import choose
from abmll.metrics import Predictions
from abmll.tasks.episodes import in_batches, support_examples
from abmll.tasks.task import PromptedExample

CANDIDATES = [PromptedExample((number,), 0, 2) for number in range(4)]


def predict(examples):
    first = torch.tensor([0.9, 0.45, 0.7, 0.01]).double()
    variance = torch.tensor([0.1, 0.0, 0.3, 0.2]).double()
    nothing = torch.zeros(4)
    return Predictions(torch.stack([first, 1 - first], dim=1), nothing, nothing, nothing, variance, nothing)


@pytest.mark.parametrize(("by", "expected"), [("random", [0, 1]), ("entropy", [1, 2]), ("variance", [2, 3])])
def test_the_most_uncertain_come_first(by, expected):
    chosen = choose(CANDIDATES, predict, 2, by)
    assert [example.token_ids[0] for example in chosen] == expected
    assert len(choose(CANDIDATES, predict, 9, by)) == 4


@pytest.mark.parametrize(("by", "expected"), [("random", [0, 1, 2]), ("entropy", [1, 2, 0]), ("variance", [2, 3, 0])])
def test_a_prompt_that_comes_again_is_one_candidate(by, expected):
    """Its copies are all as uncertain: they would take the places of others."""
    again = [*CANDIDATES, *(PromptedExample((number,), 0, 2) for number in (1, 2, 1))]
    chosen = choose(again, predict, 3, by)
    assert [example.token_ids[0] for example in chosen] == expected


@pytest.mark.parametrize("labels", [2, 3])
def test_adaptation_goes_round_the_chosen(labels, build_tiny):
    """Two examples a batch and three steps; of two labels each batch holds both."""
    tiny = scattered(build_tiny(method={"name": "reptile"}))
    task, letters = tiny.parts.tasks.test[0], tiny.parts.tasks.letter_ids
    plain, found = predictions(tiny), predictions(tiny, active=ActiveConfig(labels=labels, candidates=6))
    assert torch.equal(found[0].nll, plain[0].nll) and torch.equal(found[3].label, plain[3].label)
    candidates, entropies = support_examples(task, 6, tiny.config.seed), []
    for batch in in_batches(candidates, letters, 1):
        with torch.no_grad():
            logits = tiny.learner.forward(batch, None)[0][0, batch.letter_ids[0, batch.option_mask[0]]]
        entropies.append(torch.distributions.Categorical(logits=logits).entropy().item())
    ranked = sorted(range(6), key=lambda place: -entropies[place])
    support = [candidates[ranked[number % labels]] for number in range(6)]
    adapt_by_hand(tiny, support)
    torch.testing.assert_close(found[3].nll, mean_nll(tiny, task.test), **CLOSE)
    assert (found[3].nll - plain[3].nll).abs().max() > 1e-3


def test_at_random_they_are_the_first_of_the_support_shuffle(build_tiny):
    tiny = scattered(build_tiny(method={"name": "reptile"}))
    few = evaluator(tiny, active=ActiveConfig(labels=3, by="random"))._support(tiny.method, tiny.parts.tasks.test[0], 6)
    few = few.examples
    first = support_examples(tiny.parts.tasks.test[0], 3, tiny.config.seed)
    assert len(few) == 6 and all(a is b for a, b in zip(few, [*first, *first], strict=True))


def test_by_variance_over_samples(build_tiny):
    tiny = scattered(build_tiny(adapters={"log_variance_offset": -4.0}))
    task = tiny.parts.tasks.test[0]
    active = evaluator(tiny, samples=4, active=ActiveConfig(labels=2, candidates=6, by="variance"))
    chosen = active._support(tiny.method, task, 2).examples
    candidates = support_examples(task, 6, tiny.config.seed)
    variance = active.predictor.predict(tiny.method, ("candidate", task.name, 0), candidates).variance
    assert chosen == [candidates[place] for place in variance.topk(2).indices]
