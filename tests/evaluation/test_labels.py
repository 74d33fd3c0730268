"""Shuffled labels: which, and that adaptation sees them and scoring does not."""

from collections import Counter

import torch
from evaluations import CLOSE, adapt_by_hand, mean_nll, predictions, scattered

from abmll.evaluation.labels import shuffle_labels
from abmll.tasks.episodes import support_examples
from abmll.tasks.task import PromptedExample

EXAMPLES = [PromptedExample((number,), number % (2 + number % 3), 2 + number % 3) for number in range(60)]


def test_labels_move_among_examples_of_as_many_options():
    shuffled = shuffle_labels(EXAMPLES, 0, "task")
    assert [e.token_ids for e in shuffled] == [e.token_ids for e in EXAMPLES]
    assert [e.num_options for e in shuffled] == [e.num_options for e in EXAMPLES]
    for number in (2, 3, 4):
        before, after = (
            Counter(e.label for e in examples if e.num_options == number) for examples in (EXAMPLES, shuffled)
        )
        assert before == after and max(after) < number
    changed = sum(a.label != b.label for a, b in zip(shuffled, EXAMPLES, strict=True))
    assert 20 < changed < 55  # of 60 some 37: all but a half, a third and a quarter


def test_they_are_a_function_of_seed_and_task():
    def labels(*key):
        return [example.label for example in shuffle_labels(EXAMPLES, *key)]

    assert labels(0, "task") == labels(0, "task")
    assert labels(0, "task") != labels(1, "task") and labels(0, "task") != labels(0, "other")


def test_an_example_keeps_its_new_label_when_it_comes_again():
    shuffled = shuffle_labels(EXAMPLES * 2, 0, "task")
    assert [e.label for e in shuffled[:60]] == [e.label for e in shuffled[60:]]
    assert [e.label for e in shuffled[:60]] == [e.label for e in shuffle_labels(EXAMPLES, 0, "task")]


def test_adaptation_sees_them(build_tiny):
    tiny = scattered(build_tiny(method={"name": "reptile"}))
    task, seed = tiny.parts.tasks.test[0], tiny.config.seed
    plain, found = predictions(tiny), predictions(tiny, support_labels="shuffled")
    assert torch.equal(found[0].nll, plain[0].nll) and torch.equal(found[3].label, plain[3].label)
    support = shuffle_labels(support_examples(task, 3 * tiny.config.tasks.batch_size, seed), seed, task.name)
    adapt_by_hand(tiny, support)
    torch.testing.assert_close(found[3].nll, mean_nll(tiny, task.test), **CLOSE)
    assert (found[3].nll - plain[3].nll).abs().max() > 1e-3
