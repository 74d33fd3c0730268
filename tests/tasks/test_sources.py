"""Joining the sources: roles, missing tasks, and validation examples that nothing else sees."""

import json
from types import SimpleNamespace

import pytest

from abmll.config.schema import BuiltinTasks, TasksConfig
from abmll.tasks.sources import load_tasks


def lists(train, test, validation=None, overlap_removed=()):
    return SimpleNamespace(train=train, test=test, validation=validation or test, overlap_removed=overlap_removed)


def rows(name, split, count):
    return [
        {"task": name, "input": f"{name} {split} {i}", "output": "ab"[i % 2], "options": ["a", "b"]}
        for i in range(count)
    ]


@pytest.fixture
def folder(tmp_path, write_rows):
    for name in ("one", "two", "unseen", "own", "tiny"):
        write_rows(tmp_path / name / "train.jsonl", rows(name, "train", 1 if name == "tiny" else 20))
        write_rows(tmp_path / name / "test.jsonl", rows(name, "test", 10))
    write_rows(tmp_path / "own/validation.jsonl", rows("own", "validation", 4))
    return tmp_path


def load(folder, names, seed=0, validation_examples=5, scoring=False, **fields):
    config = TasksConfig(folder="tasks", **fields)
    return load_tasks(config, names, seed, validation_examples, {"tasks": folder}.__getitem__, scoring)


def inputs(examples):
    return [example.input for example in examples]


def test_roles_keep_their_order(folder):
    loaded = load(folder, lists(("two", "one"), ("unseen", "own")))
    assert [task.name for task in loaded.train] == ["two", "one"]
    assert [task.name for task in loaded.test] == [task.name for task in loaded.validation] == ["unseen", "own"]
    assert (loaded.missing, loaded.notes) == ({}, [])
    assert len(loaded.train[0].train) == 20


def test_carved_validation_leaves_support_and_test_alone(folder):
    (task,) = load(folder, lists(("one",), ("unseen",))).test
    assert (len(task.train), len(task.validation), len(task.test)) == (15, 5, 10)
    assert sorted(inputs(task.train + task.validation)) == sorted(f"unseen train {i}" for i in range(20))
    assert inputs(task.test) == [f"unseen test {i}" for i in range(10)]
    (again,) = load(folder, lists(("one",), ("unseen",))).test
    assert again == task
    (other,) = load(folder, lists(("one",), ("unseen",)), seed=1).test
    assert set(inputs(other.validation)) != set(inputs(task.validation))


def test_own_validation_split_is_taken_as_it_is(folder):
    (task,) = load(folder, lists(("one",), ("own",))).test
    assert inputs(task.validation) == [f"own validation {i}" for i in range(4)]
    assert len(task.train) == 20


def test_carving_takes_half_at_most_and_something(folder):
    (task,) = load(folder, lists(("one",), ("unseen",)), validation_examples=50).test
    assert (len(task.train), len(task.validation)) == (10, 10)
    with pytest.raises(ValueError, match=r"task tiny: 1 training row.*add validation\.jsonl"):
        load(folder, lists(("one",), ("tiny",)))


def test_validation_on_a_training_task_is_kept_out_of_its_training(folder):
    loaded = load(folder, lists(("one", "two"), ("unseen",), validation=("one",)))
    assert [task.name for task in loaded.validation] == ["one"]
    one = loaded.train[0]
    assert len(one.train) == 15
    assert not set(inputs(one.train)) & set(inputs(loaded.validation[0].validation))
    assert len(loaded.test[0].train) == 20, "a test task that is not used for validation keeps all its rows"


def test_scoring_keeps_the_test_tasks_as_a_run_has_them(folder):
    names = lists(("one",), ("unseen", "own"), validation=("unseen", "own"))
    full, scored = load(folder, names), load(folder, lists((), ("unseen", "own", "tiny")), scoring=True)
    assert (scored.train, scored.validation) == ([], [])
    assert [(task.train, task.test) for task in scored.test[:2]] == [(task.train, task.test) for task in full.test]
    assert len(scored.test[0].train) == 15 and not any(task.validation for task in scored.test)
    assert len(scored.test[2].train) == 1, "a task that cannot spare a row is scored all the same"
    whole = load(folder, lists((), ("unseen",)), validation_examples=None, scoring=True)
    assert len(whole.test[0].train) == 20
    config = TasksConfig(source="builtin", builtin=BuiltinTasks(train_tasks=4, test_tasks=2))
    made, run = load_tasks(config, None, 0, 50, scoring=True), load_tasks(config, None, 0, 50)
    assert (made.train, made.validation) == ([], [])
    assert [(task.train, task.test) for task in made.test] == [(task.train, task.test) for task in run.test]


def test_tasks_that_would_only_be_validated_on_are_not_read_without_validation(folder, write_rows):
    write_rows(folder / "own/validation.jsonl", ["{"])
    names = lists(("one",), ("unseen",), validation=("own",))
    assert load(folder, names, validation_examples=None).validation == []
    with pytest.raises(ValueError, match=r"own/validation\.jsonl:1: malformed JSON"):
        load(folder, names)


def test_missing_tasks_are_reported_or_refused(folder):
    names = lists(("one", "gone"), ("unseen", "lost"))
    loaded = load(folder, names)
    assert list(loaded.missing) == ["gone", "lost"]
    assert [task.name for task in loaded.train + loaded.test] == ["one", "unseen"]
    with pytest.raises(ValueError, match=r"tasks\.missing: error: 2 listed tasks(.|\n)*gone: no .*gone/train\.jsonl"):
        load(folder, names, missing="error")
    with pytest.raises(ValueError, match=r"tasks\.train: \['gone'\]: none of them is there"):
        load(folder, lists(("gone",), ("unseen",)))


def test_name_listed_twice_is_an_error(folder):
    with pytest.raises(ValueError, match=r"tasks\.train: one: listed more than once"):
        load(folder, lists(("one", "two", "one"), ("unseen",)))


def test_removed_overlap_is_said(folder):
    loaded = load(folder, lists(("one",), ("unseen",), overlap_removed=("unseen",)))
    assert "unseen: both in the training and in the test list" in loaded.notes[0]


def test_training_tasks_need_no_test_rows(folder, write_rows):
    write_rows(folder / "only/train.jsonl", rows("only", "train", 4))
    assert load(folder, lists(("only",), ("unseen",))).train[0].test == ()
    with pytest.raises(ValueError, match="task only has no test rows"):
        load(folder, lists(("one",), ("only",)))


def test_builtin_tasks_get_validation_from_their_training_words():
    config = TasksConfig(source="builtin", builtin=BuiltinTasks(train_tasks=4, test_tasks=2))
    loaded = load_tasks(config, None, 0, 50)
    assert [len(loaded.train), len(loaded.validation), len(loaded.test)] == [4, 2, 2]
    assert [(len(task.train), len(task.validation), len(task.test)) for task in loaded.test] == [(32, 32, 64)] * 2
    assert all(len(task.train) == 64 for task in loaded.train)


@pytest.fixture
def kept(folder):
    """`unseen` serves evaluation only, as a folder that was prepared and as an entry."""
    entry = {"path": "json", "input": "{input}", "label": "output", "options": "options", "evaluation_only": True}
    (folder / "unseen/made_from.json").write_text(json.dumps({"entry": entry, "seed": 0}))
    (folder / "one/made_from.json").write_text(json.dumps({"entry": entry | {"evaluation_only": False}}))
    return {"unseen": entry, "one": entry | {"evaluation_only": False}}


@pytest.mark.parametrize("source", ["jsonl", "hub"])
def test_what_serves_evaluation_only_is_neither_trained_nor_validated_on(source, folder, kept):
    keys = {"source": source, "hub": kept if source == "hub" else {}}
    told = "unseen: for evaluation only, as the entry says; name"
    with pytest.raises(ValueError, match=rf"^tasks\.train: {told} them in tasks\.test alone"):
        load(folder, lists(("one", "unseen"), ("two",)), **keys)
    with pytest.raises(ValueError, match=rf"^tasks\.validation: {told} other tasks in tasks\.validation, or set eval"):
        load(folder, lists(("one",), ("unseen",)), **keys)


def test_what_serves_evaluation_only_is_scored(folder, kept):
    assert len(load(folder, lists(("one",), ("unseen",), validation=("two",))).test[0].test) == 10
    assert len(load(folder, lists(("one",), ("unseen",)), validation_examples=None).test[0].test) == 10
    assert len(load(folder, lists((), ("unseen",)), scoring=True).test[0].test) == 10
    (folder / "one/made_from.json").write_text("{")
    with pytest.raises(ValueError, match=r"one/made_from\.json: cannot be read as JSON"):
        load(folder, lists(("one",), ("two",)))


def test_hub_source_is_joined(folder, monkeypatch, tmp_path):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    entry = {"path": "json", "input": "{input}", "label": "output", "options": "options"}
    hub = {
        name: entry | {"data_files": {split: str(folder / f"{name}/{split}.jsonl") for split in ("train", "test")}}
        for name in ("one", "unseen")
    }
    loaded = load(folder, lists(("one", "gone"), ("unseen",)), source="hub", hub=hub)
    from_files = load(folder, lists(("one", "gone"), ("unseen",)))
    assert (loaded.train[0].train, loaded.test) == (from_files.train[0].train, from_files.test)
    assert loaded.missing == {"gone": "no entry tasks.hub.gone"}
