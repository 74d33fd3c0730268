"""The generated tasks: deterministic, disjoint, balanced, and mapping rules that only examples can tell."""

import re
from collections import Counter

import pytest

from abmll.config.schema import BuiltinTasks
from abmll.tasks.builtin import builtin_tasks
from abmll.tasks.words import BAD, CATEGORIES, FRAMES, GOOD, NONSENSE

CATEGORY = {word: category for category, words in CATEGORIES.items() for word in words}


def word_of(text):
    """The word that a mapping task's input is about."""
    (word,) = (word for word in CATEGORY if any(frame.format(word=word) == text for frame in FRAMES))
    return word


def rule_of(task):
    """Category -> option, read off all examples of a mapping task; fails if they disagree."""
    rule = {}
    for example in task.train + task.test:
        assert rule.setdefault(CATEGORY[word_of(example.input)], example.output) == example.output
    return rule


def mapping(tasks):
    return [task for task in tasks if task.name.startswith("mapping/")]


def parts(task):
    return task.name.split("/")[1].split("-")


@pytest.fixture(scope="module")
def default():
    return builtin_tasks(BuiltinTasks(), 0)


def test_deterministic_and_seeds_differ(default):
    assert builtin_tasks(BuiltinTasks(), 0) == default
    assert builtin_tasks(BuiltinTasks(), 1) != default


def test_word_lists_are_disjoint():
    assert len(CATEGORY) == sum(map(len, CATEGORIES.values())) == 16 * 24
    assert len(set(NONSENSE)) == len(NONSENSE)
    assert not set(NONSENSE) & set(CATEGORY)


def test_numbers_and_names(default):
    train, test = default
    assert [len(train), len(test)] == [24, 8]
    assert len({task.name for task in train + test}) == 32
    assert [len(mapping(train)), len(mapping(test))] == [12, 4]
    assert all((len(task.train), len(task.validation), len(task.test)) == (64, 0, 64) for task in train + test)
    kinds = {parts(task)[0] for task in train if task not in mapping(train)}
    assert {"kind", "member", "sentiment"} < kinds <= {"kind", "member", "sentiment", "larger", "smaller"}


@pytest.mark.parametrize("seed", range(3))
def test_labels_and_answers_are_balanced(seed):
    train, test = builtin_tasks(BuiltinTasks(), seed)
    for task in train + test:
        for examples in (task.train, task.test):
            assert Counter(example.label for example in examples) == {0: 32, 1: 32}, task.name
            if not task.name.startswith(("semantic/larger", "semantic/smaller")):
                assert set(Counter(example.output for example in examples).values()) == {32}, task.name


@pytest.mark.parametrize("seed", range(3))
def test_training_and_test_tasks_share_no_material(seed):
    train, test = builtin_tasks(BuiltinTasks(train_tasks=60, test_tasks=30), seed)
    used = [{part for task in mapping(tasks) for part in parts(task)} for tasks in (train, test)]
    assert not used[0] & used[1], "neither categories nor nonsense words"
    semantic = [{tuple(parts(task)) for task in tasks if task not in mapping(tasks)} for tasks in (train, test)]
    assert not semantic[0] & semantic[1]
    for kind in ("kind", "member", "sentiment"):
        nouns = [{noun for name in names if name[0] == kind for noun in name[1:]} for names in semantic]
        assert nouns[0], kind
        assert not nouns[0] & nouns[1], kind


def test_examples_of_a_task_are_distinct_and_its_splits_share_no_word(default):
    for task in default[0] + default[1]:
        train, test = (
            {(example.input, frozenset(example.options)) for example in split} for split in (task.train, task.test)
        )
        assert not train & test, task.name
        assert len({(example.input, example.options) for example in task.train}) == 64, task.name
    for task in mapping(default[0] + default[1]):
        train, test = ({word_of(example.input) for example in split} for split in (task.train, task.test))
        assert train and test and not train & test


def test_a_mapping_task_follows_one_rule_over_two_fixed_options(default):
    for task in mapping(default[0] + default[1]):
        assert len({example.options for example in task.train + task.test}) == 1
        rule = rule_of(task)
        assert sorted(name.replace(" ", "_") for name in rule) == parts(task)[:2]
        assert sorted(rule.values()) == sorted(parts(task)[2:])
        assert set(rule.values()) <= set(NONSENSE)


def test_a_mapping_rule_cannot_be_told_from_the_text():
    """What a prompt shows before any example (the category, the options, their order) leaves both rules as likely."""
    first_letter, first_option = [], []
    for seed in range(12):
        train, test = builtin_tasks(BuiltinTasks(train_examples=8, test_examples=2), seed)
        for tasks in (train, test):
            assert len(mapping(tasks)) % 2 == 0
            for one, other in zip(mapping(tasks)[::2], mapping(tasks)[1::2], strict=True):
                labels = [{word_category(e): e.label for e in task.train} for task in (one, other)]
                assert labels[0].keys() == labels[1].keys(), "the same pair of categories twice"
                assert all(labels[0][category] != labels[1][category] for category in labels[0])
            for task in mapping(tasks):
                rule = rule_of(task)
                category = min(rule)
                first_letter.append(rule[category] == task.train[0].options[0])
                first_option.append(rule[category] == min(task.train[0].options))
    assert len(first_letter) == 12 * 16
    assert sum(first_letter) == 12 * 8
    assert 0.35 < sum(first_option) / len(first_option) < 0.65


def word_category(example):
    return CATEGORY[word_of(example.input)]


def test_semantic_answers_are_right(default):
    for task in default[0] + default[1]:
        kind, *rest = parts(task)
        for example in task.train + task.test:
            if kind in ("larger", "smaller"):
                pick = max if kind == "larger" else min
                assert int(example.output) == pick(map(int, example.options))
                assert max(map(int, example.options)) <= int(rest[0])
            elif kind == "kind":
                assert example.output == CATEGORY[example.input.rstrip("?:").split()[-1]], example
                assert example.output.replace(" ", "_") in rest
            elif kind == "member":
                word = re.search(r"(?:Does|Is) (\S+)", example.input)[1]
                assert rest[0].replace("_", " ") in example.input
                assert (example.output == "yes") == (CATEGORY[word].replace(" ", "_") == rest[0]), example
            elif kind == "sentiment":
                judged = {"positive": GOOD, "negative": BAD}[example.output]
                assert any(word in re.findall(r"\w+", example.input) for word in judged), example
                assert rest[0] in example.input


def test_too_many_are_refused_with_the_number_there_is():
    with pytest.raises(ValueError, match=r"tasks\.builtin\.test_tasks: 1000: the generator has \d+; ask for fewer"):
        builtin_tasks(BuiltinTasks(test_tasks=1000), 0)
    with pytest.raises(
        ValueError, match=r"tasks\.builtin\.train_examples: 5000: task mapping/.* has 144; ask for fewer"
    ):
        builtin_tasks(BuiltinTasks(train_examples=5000), 0)


@pytest.mark.parametrize("seed", range(3))
def test_the_number_told_can_be_had(seed):
    with pytest.raises(ValueError) as error:
        builtin_tasks(BuiltinTasks(test_tasks=1000), seed)
    most = int(str(error.value).split("has ")[1].split(";")[0])
    _, test = builtin_tasks(BuiltinTasks(test_tasks=most, train_examples=72, test_examples=72), seed)
    assert len({task.name for task in test}) == most
    assert (
        len(builtin_tasks(BuiltinTasks(train_tasks=1, test_tasks=1, train_examples=2, test_examples=1), seed)[0]) == 1
    )


@pytest.mark.demo
def test_prompts_are_short(default, smollm2_tokenizer):
    from abmll.tasks.prompt import Prompter

    prompter = Prompter(smollm2_tokenizer, 80, "drop")
    for task in default[0] + default[1]:
        prompter.prompt_task(task)
    assert all(counts.dropped == 0 for counts in prompter.report.tasks.values())
