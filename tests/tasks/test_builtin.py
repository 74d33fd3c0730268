"""The generated tasks: deterministic, disjoint, balanced, and mapping rules that only examples can tell."""

from collections import Counter
from random import Random

import pytest

from abmll.config.schema import BuiltinTasks
from abmll.tasks.builtin import builtin_tasks
from abmll.tasks.kinds import KINDS, NONSENSE


@pytest.fixture(scope="module")
def default():
    return builtin_tasks(BuiltinTasks(), 0)


def both(tasks):
    train, test = tasks
    return [*train, *test]


def kinds_of(task):
    return tuple(task.name.split("/")[1].split("-"))


def mapping(tasks):
    return [task for task in tasks if task.name.startswith("mapping/")]


def test_deterministic_and_seeds_differ(default):
    assert builtin_tasks(BuiltinTasks(), 0) == default
    assert builtin_tasks(BuiltinTasks(), 1) != default


def test_sizes_and_names(default):
    train, test = default
    sizes = BuiltinTasks()
    assert (len(train), len(test)) == (sizes.train_tasks, sizes.test_tasks)
    assert len({task.name for task in train + test}) == len(train + test)
    assert len(mapping(train)) == sizes.train_tasks // 2
    for task in train + test:
        assert (len(task.train), len(task.validation), len(task.test)) == (sizes.train_examples, 0, sizes.test_examples)


@pytest.mark.parametrize("seed", range(3))
def test_every_label_is_right_half_of_the_time(seed):
    for task in both(builtin_tasks(BuiltinTasks(), seed)):
        for examples in (task.train, task.test):
            assert Counter(example.label for example in examples) == {0: len(examples) // 2, 1: len(examples) // 2}
            assert {example.options for example in examples} == {task.train[0].options}


@pytest.mark.parametrize("seed", range(3))
def test_training_and_test_tasks_share_no_kind_and_no_nonsense_word(seed):
    train, test = builtin_tasks(BuiltinTasks(train_tasks=60, test_tasks=24), seed)
    kinds = [{kind for task in tasks for kind in kinds_of(task)} for tasks in (train, test)]
    words = [{word for task in mapping(tasks) for word in task.train[0].options} for tasks in (train, test)]
    assert not kinds[0] & kinds[1]
    assert not words[0] & words[1]
    assert kinds[0] | kinds[1] <= set(KINDS) and words[0] | words[1] <= set(NONSENSE)


def test_no_text_is_in_training_and_in_test(default):
    for task in both(default):
        inputs = [example.input for example in (*task.train, *task.test)]
        assert len(set(inputs)) == len(inputs), task.name


def test_a_task_has_one_rule_from_kind_to_option(default):
    """Texts of one kind look alike: a draw of the kind with the same pattern of characters has the task's answer."""

    def pattern(text):
        return "".join("9" if c.isdigit() else "A" if c.isupper() else "a" if c.isalpha() else c for c in text)

    numbers = {pattern(KINDS["numbers"](Random(i))) for i in range(500)}
    checked = 0
    for task in both(default):
        if "numbers" in kinds_of(task):
            answers = {e.output for e in (*task.train, *task.test) if pattern(e.input) in numbers}
            assert len(answers) == 1
            checked += 1
    assert checked


def test_the_mapping_rule_cannot_be_known_without_examples():
    """Over many tasks each kind is answered by the first option about as often as by the second."""
    first = Counter()
    seen = Counter()
    for seed in range(40):
        for task in mapping(both(builtin_tasks(BuiltinTasks(), seed))):
            for place, kind in enumerate(kinds_of(task)):
                seen[kind] += 1
                first[kind] += place == 0
    total, leading = sum(seen.values()), sum(first.values())
    assert leading * 2 == total
    assert all(0.3 < first[kind] / seen[kind] < 0.7 for kind in seen if seen[kind] > 40)


def test_named_tasks_offer_the_kinds_own_names(default):
    for task in both(default):
        if task.name.startswith("named/"):
            assert task.train[0].options == kinds_of(task)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_has_many_texts(kind):
    rng = Random(0)
    assert len({KINDS[kind](rng) for _ in range(1000)}) > 500


def test_asking_for_too_much_is_an_error_with_the_number_there_is():
    with pytest.raises(ValueError, match=r"test_tasks: 31: the generator has 30; ask for fewer"):
        builtin_tasks(BuiltinTasks(test_tasks=31), 0)
    with pytest.raises(ValueError, match=r"too few of them differ; ask for fewer examples"):
        builtin_tasks(BuiltinTasks(train_examples=400_000), 0)
