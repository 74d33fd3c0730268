"""The lists of tasks: the paper's as printed, and the user's with their mistakes."""

import functools
from pathlib import Path

import pytest

from abmll.config import ConfigError
from abmll.config.schema import TasksConfig
from abmll.config.task_lists import TaskLists, resolve_task_lists

LISTS = Path(__file__).resolve().parents[2] / "configs" / "tasks"


def resolve(lists, **tasks):
    return resolve_task_lists(TasksConfig(folder="data", lists=str(lists), **tasks), Path)


def problems(lists, **tasks):
    with pytest.raises(ConfigError) as caught:
        resolve(lists, **tasks)
    return caught.value.problems


@pytest.fixture
def write(tmp_path):
    def write(text):
        (tmp_path / "lists.yaml").write_text(text)
        return tmp_path / "lists.yaml"

    return write


@pytest.mark.parametrize(
    ("name", "train", "test", "ends"),
    [
        ("cls45", 34, 15, ("superglue-rte", "kilt_fever", "tweet_eval-stance_feminist", "yelp_polarity")),
        ("cls23", 28, 15, ("blimp-ellipsis_n_bar_2", "tweet_eval-stance_hillary", "tweet_eval-stance_feminist", None)),
        ("nli", 42, 8, ("ade_corpus_v2-classification", "yelp_polarity", "sick", "glue-qnli")),
        ("para", 46, 4, ("ade_corpus_v2-classification", "yelp_polarity", "glue-mrpc", "paws")),
        ("mcqa", 18, 12, ("hate_speech_offensive", "yelp_polarity", "codah", "wiqa")),
    ],
)
def test_the_lists_of_the_paper(name, train, test, ends):
    lists = resolve(LISTS / f"{name}.yaml", keep_overlap=True)
    assert (len(lists.train), len(lists.test)) == (train, test)
    assert lists.validation == lists.test
    assert (lists.train[0], lists.train[-1], lists.test[0]) == ends[:3]
    assert ends[3] in (None, lists.test[-1])


def test_names_of_the_paper():
    lists = functools.partial(resolve, keep_overlap=True)
    assert lists(LISTS / "cls23.yaml").test == lists(LISTS / "cls45.yaml").test
    assert {"quartz-no_knowledge", "crows_pairs", "superglue-wsc"} <= set(lists(LISTS / "cls23.yaml").train)
    assert {"art", "tab_fact"} <= set(lists(LISTS / "mcqa.yaml").train)
    assert "medical_questions_pairs" in lists(LISTS / "para.yaml").test
    assert "anli" in lists(LISTS / "para.yaml").train and "anli" not in lists(LISTS / "nli.yaml").train


def test_a_test_task_leaves_training_unless_kept():
    lists, kept = resolve(LISTS / "nli.yaml"), resolve(LISTS / "nli.yaml", keep_overlap=True)
    assert lists.overlap_removed == ("sick",) and kept.overlap_removed == ()
    assert "sick" not in lists.train and "sick" in lists.test and "sick" in kept.train
    assert len(lists.train) == 41
    for name in ("cls23", "cls45", "para", "mcqa"):
        assert resolve(LISTS / f"{name}.yaml").overlap_removed == ()


def test_own_lists_replace_the_file(write):
    path = write("train: [a, b]\ntest: [c]\nvalidation: [v]\n")
    assert resolve(path).validation == ("v",)
    lists = resolve(path, train=("x", "c"), validation=("w",))
    assert (lists.train, lists.test, lists.validation, lists.overlap_removed) == (("x",), ("c",), ("w",), ("c",))
    only = resolve_task_lists(TasksConfig(folder="data", train=("a",), test=("b",)), Path)
    assert (only.train, only.test, only.validation) == (("a",), ("b",), ("b",))


def test_scoring_needs_the_test_list_alone(write, tmp_path):
    def scored(**tasks):
        return resolve_task_lists(TasksConfig(folder="data", **tasks), Path, scoring=True)

    path = str(write("test: [a, b]\nvalidation: [b, v]\n"))
    assert scored(lists=path) == TaskLists((), ("a", "b"), ("b",), ())
    assert scored(lists=path, test=("b", "c"), train=("c",)) == TaskLists((), ("b", "c"), ("b",), ())
    assert (
        scored(lists=str(tmp_path / "gone.yaml"), test=("c",))
        == scored(test=("c",))
        == TaskLists((), ("c",), ("c",), ())
    )
    with pytest.raises(ConfigError, match=r"tasks\.lists: .*gone\.yaml: no such file"):
        scored(lists=str(tmp_path / "gone.yaml"))
    with pytest.raises(ConfigError, match="test: not set"):
        scored(train=("a",))


def test_all_mistakes_of_a_file_at_once(write):
    lines = problems(write("trian: [a]\ntest: [a, b, a, a]\nvalidation: []\n"))
    assert len(lines) == 4
    assert lines[0].endswith("lists.yaml: trian: unknown key; did you mean train?")
    assert "train: not set: write a list of task names, or set tasks.train=[a, b]" in lines[1]
    assert "test: a: is listed twice" in lines[2]
    assert "validation: []: is empty" in lines[3]


@pytest.mark.parametrize("text", ["train: a\ntest: [b]", "train: [1]\ntest: [b]", "train: {a: 1}\ntest: [b]"])
def test_what_is_no_list_of_names(write, text):
    (line,) = problems(write(text))
    assert "train: " in line and "is no list of names" in line


def test_training_must_not_become_empty(write):
    assert "each is a test task too" in problems(write("train: [a]\ntest: [a]\n"))[0]


def test_a_list_file_that_is_not_there(tmp_path):
    assert problems(tmp_path / "none.yaml")[0].startswith("tasks.lists: ")
