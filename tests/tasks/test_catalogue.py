"""Every entry of the catalogue, on rows of its data set's documented schema; and the parts that entries are made of."""

import fnmatch
import json
import re
from pathlib import Path

import numpy as np
import pytest

from abmll.config import ConfigError
from abmll.config.schema import HubTask
from abmll.config.yaml_text import read_mapping
from abmll.tasks.catalogue import FOLDER, load_catalogue, read_entries
from abmll.tasks.rows import RowReader
from abmll.tasks.task import Example

CATALOGUE = load_catalogue()
ROWS = [
    (name, sample)
    for sample in read_mapping(Path(__file__).with_name("catalogue_rows.yaml"))["rows"]
    for pattern in sample["tasks"]
    for name in fnmatch.filter(CATALOGUE, pattern)
]


def example(task, row, number=0):
    reader = RowReader(task)
    assert list(reader.wrong_columns(list(row))) == []
    return reader.example(row, number, "here")


def stored(row):
    """The row's numbers as a column of 32 bits gives them back."""
    return {key: float(np.float32(value)) if isinstance(value, float) else value for key, value in row.items()}


@pytest.mark.parametrize(("name", "sample"), ROWS, ids=[name for name, _ in ROWS])
def test_entry_on_a_documented_row(name, sample):
    task, row = CATALOGUE[name], stored(sample["row"])
    found = {example(task, row, number) for number in range(40 if task.shuffle_options else 1)}
    wanted = [sample[key] for key in ("is", "swapped") if key in sample]
    if not wanted:
        assert {made.output for made in found} == {sample["output"]}
        assert all(sorted(made.options) == sample["options"] for made in found)
        assert len(found) > 10  # of 24 orders
        return
    assert len(found) == len(wanted)
    for text, output, options in wanted:
        start = text.removesuffix("*")
        (made,) = [made for made in found if made.input.startswith(start) and made.output == output]
        assert made.options == tuple(options)
        assert (made.input == text) if start == text else (made.input.endswith("?") or made.input.endswith("?)"))


@pytest.mark.parametrize(
    ("name", "row"),
    [(name, {**sample["row"], **other}) for name, sample in ROWS for other in sample.get("left_out", [])],
)
def test_rows_that_an_entry_leaves_out(name, row):
    assert example(CATALOGUE[name], stored(row)) is None


def test_every_entry_has_a_row():
    assert {name for name, _ in ROWS} == set(CATALOGUE)


@pytest.mark.parametrize("name", CATALOGUE)
def test_entries_are_well_formed(name):
    task = CATALOGUE[name]
    assert task.path.count("/") == 1  # the hub's names without an owner are old ones, which newer clients refuse
    assert task.revision in (None, "refs/convert/parquet")
    assert not re.search(r"[,\s/]", name)  # a folder's name, and one of a comma-separated list
    if isinstance(task.options, tuple):
        assert 2 <= len(task.options) <= 4


def test_the_questions_of_legalbench_differ_from_each_other():
    inputs = [
        task.input for name, task in CATALOGUE.items() if re.search("cuad|contract_nli|hands|opp115|supply", name)
    ]
    assert len(set(inputs)) == len(inputs) == 38 + 14 + 16 + 9 + 10


def test_form_of_the_real_tasks(crossfit):
    """The entries phrase a task as the folder of real tasks does: the same markers and, where fixed, options."""
    checked = 0
    for folder in sorted(path for path in crossfit.iterdir() if path.is_dir()):
        lines = (folder / "train.jsonl").read_text(encoding="utf-8").splitlines()[:40]
        real = [json.loads(line) for line in lines]
        sample = next(sample for name, sample in ROWS if name == folder.name)
        ours = example(CATALOGUE[folder.name], sample["row"])
        markers = {_markers(row["input"]) for row in real}
        assert _markers(ours.input) in markers, folder.name
        if len({tuple(row["options"]) for row in real}) == 1:
            assert list(ours.options) == real[0]["options"], folder.name
        checked += 1
    assert checked >= 59


def _markers(text):
    """Field names at the start and behind each [SEP], and the letters of options; [SEP] alone for a bare text."""
    parts = text.split(" [SEP] ")
    letters = [re.findall(r"\(([A-D])\) ", part) for part in parts]
    names = [match[1] if (match := re.match(r"([a-z][a-z_0-9]*(?: \d)?): ", part)) else "" for part in parts]
    return str(list(zip(names, letters, strict=True)))


# what entries are made of


def hub_task(**keys):
    return HubTask(**{"path": "p", "input": "{q}", "label": "a", "options": ("no", "yes"), **keys})


@pytest.mark.parametrize(
    ("keys", "row", "reason"),
    [
        (
            {"labels": (1, 2)},
            {"q": "?", "a": 3},
            r"a: 3: not among labels \[1, 2\]; add it there, or to drop_labels",
        ),
        ({"label": "a[b]"}, {"q": "?", "a": {}}, r"here: no a\[b\] in this row \('b'\)"),
        ({"label": "a[0][b]"}, {"q": "?", "a": []}, r"here: no a\[0\]\[b\] in this row"),
        ({"input": "{q[x]}"}, {"q": {}, "a": 0}, r"here: the template '\{q\[x\]\}' does not fit the row: 'x'"),
        (
            {},
            {"q": None, "a": 0},
            "the template '{q}' does not fit the row: a column is empty; name it in required",
        ),
        ({}, {"q": "?", "a": None}, "here: a: the row has no label: read another split"),
        ({"label_is": "votes"}, {"q": "?", "a": 1}, "here: a: 1: not a list of labels"),
        ({"label_cuts": (0.4, 0.6)}, {"q": "?", "a": "0.7"}, "here: a: '0.7': not a number"),
        (
            {"options": "o", "options_pattern": "(.+)/(.+)"},
            {"q": "?", "a": 0, "o": "x"},
            "options_pattern does not match",
        ),
        ({"options": "a", "label_is": "scores"}, {"q": "?", "a": "{x"}, r"here: a: '\{x': not JSON"),
        (
            {"options": "a", "label_is": "scores"},
            {"q": "?", "a": "[1]"},
            r"'\[1\]': not a mapping of options",
        ),
    ],
)
def test_rows_that_do_not_fit(keys, row, reason):
    with pytest.raises(ValueError, match=reason):
        RowReader(hub_task(**keys)).example(row, 0, "here")


def test_missing_columns_and_malformed_templates_are_all_told():
    keys = {"input": "{options} {q} {w[0]}", "options": ("{x}", "{x"), "required": ("r",)}
    task = hub_task(**keys, test_split=None, holdout=0.5, holdout_by="{g}")
    malformed, *missing = RowReader(task).wrong_columns(["q", "a"])
    assert malformed.startswith("options: '{x': ")
    assert {line.split(";")[0] for line in missing} == {
        "options: no column 'x'",
        "input: no column 'w'",
        "holdout_by: no column 'g'",
        "required: no column 'r'",
    }
    assert all("; the columns are q, a" in line for line in missing)


def test_lists_line_breaks_and_lettered_options_in_a_template():
    task = hub_task(input="{d} | {options} | {options[1]}", line_break=" / ", options="o")
    made = example(task, {"d": ["a\r\nb", "c\td"], "o": ["x\ny", " z "], "a": "x\ny"})
    assert made == Example("a / b c / d | (A) x / y (B) z | z", ("x / y", "z"), "x / y")


def test_line_breaks_are_kept_unless_the_entry_says_otherwise():
    assert example(hub_task(), {"q": "a\n\tb\n", "a": 0}).input == "a\n\tb"


def test_orders_of_options_follow_the_seed_and_the_row():
    task = hub_task(options=("a", "b", "c", "d"), shuffle_options=True)
    orders = {seed: [RowReader(task, seed).example({"q": "?", "a": "c"}, n, "") for n in range(20)] for seed in (0, 1)}
    assert orders[0] == [RowReader(task).example({"q": "?", "a": "c"}, n, "") for n in range(20)]
    assert orders[0] != orders[1]
    assert {made.output for made in orders[0]} == {"c"}


def test_scores_are_a_mapping_or_its_json():
    task = hub_task(options="s", label="s", label_is="scores")
    for scores in ({"x": 0, "y": 1.0}, '{"x": 0, "y": 1.0}', {"x": 0, "y": 1, "z": None}):
        assert example(task, {"q": "?", "s": scores}) == Example("?", ("x", "y"), "y")


# files of entries


@pytest.fixture
def entries(tmp_path):
    def write(text):
        (tmp_path / "own.yaml").write_text(text)
        return tmp_path / "own.yaml"

    return write


def test_defaults_complete_entries_and_own_files_add_to_the_catalogue(entries):
    path = entries(
        "defaults: {path: me/mine, input: '{q}', label: a}\n"
        "tasks:\n  one: {options: [x, y]}\n  sick: {path: me/other, options: [u, v]}\n"
    )
    catalogue = load_catalogue(path)
    assert (catalogue["one"].path, catalogue["one"].options) == ("me/mine", ("x", "y"))
    assert catalogue["sick"].path == "me/other"
    assert set(catalogue) == set(CATALOGUE) | {"one"}


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("tasks: {a: {path: p, label: l, options: [x, y]}}", "tasks.a.input: not set: it is required"),
        ("tasks: {a: {path: p, input: i, label: l, options: o, tmplate: t}}", "tasks.a.tmplate: 't': unknown key"),
        ("tasks: {a: {path: 3, input: i, label: l, options: o}}", "tasks.a.path: 3: must be a valid string"),
        ("tasks: {a: 3}", "tasks.a: 3: must be a mapping"),
        ("tasks: [a]", "defaults and tasks must be mappings"),
        ("task: {}", "task: unknown key; did you mean tasks?"),
        ("tasks: {a: {path: p, input: i, label: l, options: o, test_split: null}}", "tasks.a.holdout: null: goes with"),
        ("tasks: {a: {path: p, input: i, label: l, options: [x, y], labels: [1]}}", "tasks.a.labels: [1]: 2 options"),
        ("tasks: {a: {path: p, input: i, label: l, options: o, options_pattern: '('}}", "tasks.a.options_pattern: '('"),
        ("tasks: {a: {path: p, input: i, label: l, options: o, option_names: [x]}}", "tasks.a.option_names: ['x']"),
        ("tasks: {a: {path: p, input: i, label: l, options: o, label_is: scores}}", "tasks.a.label_is: 'scores'"),
        ("tasks: {a: {path: p, input: i, label: l, options: [x, y], label_cuts: [1, 0]}}", "tasks.a.label_cuts"),
    ],
)
def test_entries_that_are_wrong(text, line, entries):
    path = entries(text)
    with pytest.raises(ConfigError) as caught:
        read_entries(path)
    assert any(problem.startswith(f"{path}: {line}") for problem in caught.value.problems), caught.value


def test_a_task_in_two_shipped_files_is_refused(tmp_path, monkeypatch):
    for name in ("a.yaml", "b.yaml"):
        (tmp_path / name).write_text((FOLDER / "ethos.yaml").read_text())
    monkeypatch.setattr("abmll.tasks.catalogue.FOLDER", tmp_path)
    with pytest.raises(ConfigError, match="ethos-race: is in two files"):
        load_catalogue()
