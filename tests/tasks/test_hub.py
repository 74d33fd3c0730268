"""Hub tasks, read offline through the json and csv builders of `datasets`."""

import re

import datasets
import pytest

from abmll.config.schema import HubTask
from abmll.tasks.hub import load_hub_tasks
from abmll.tasks.task import Example


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def hub_task(tmp_path, write_rows):
    """A HubTask over local rows; the same rows in both splits unless told otherwise."""

    def make(rows, test_rows=None, **fields):
        files = {
            "train": str(write_rows(tmp_path / "hub/train.json", rows)),
            "test": str(write_rows(tmp_path / "hub/test.json", rows if test_rows is None else test_rows)),
        }
        return HubTask(
            **{"path": "json", "data_files": files, "input": "{q}", "label": "a", "options": ("no", "yes"), **fields}
        )

    return make


def load(task, **arguments):
    return load_hub_tasks({"t": task}, ["t"], **arguments).tasks["t"]


def test_template_and_index_label(hub_task):
    rows = [{"premise": "p {x}", "hypothesis": "h", "a": 1}, {"premise": "p2", "hypothesis": "h2", "a": 0}]
    task = load(hub_task(rows, input="premise: {premise} hypothesis: {hypothesis}"))
    assert task.train == (
        Example("premise: p {x} hypothesis: h", ("no", "yes"), "yes"),
        Example("premise: p2 hypothesis: h2", ("no", "yes"), "no"),
    )
    assert task.test == task.train
    assert task.validation == ()


@pytest.mark.parametrize(("label", "output"), [("yes", "yes"), (0, "no"), ("1", "yes"), (True, "yes")])
def test_label_is_text_or_index(label, output, hub_task):
    assert load(hub_task([{"q": "?", "a": label}])).train[0].output == output


@pytest.mark.parametrize(
    ("options", "label", "output"),
    [
        (["red", "blue"], 1, "blue"),
        ({"text": ["red", "blue"], "label": ["A", "B"]}, "B", "blue"),
        ({"text": ["red", "blue"], "label": ["1", "2"]}, "1", "red"),
        ({"text": ["red", "blue"]}, "blue", "blue"),
    ],
)
def test_options_from_a_column(options, label, output, hub_task):
    example = load(hub_task([{"q": "?", "a": label, "o": options}], options="o")).train[0]
    assert (example.options, example.output) == (("red", "blue"), output)


def test_csv_splits_and_slices(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("q,a\n" + "".join(f"q{i},{i % 2}\n" for i in range(10)))
    task = HubTask(
        path="csv", data_files=str(path), input="{q}", label="a", options=("no", "yes"),
        train_split="train[:6]", validation_split="train[6:8]", test_split="train[8:]",
    )  # fmt: skip
    loaded = load(task)
    assert [example.input for example in loaded.train] == [f"q{i}" for i in range(6)]
    assert [example.input for example in loaded.validation + loaded.test] == ["q6", "q7", "q8", "q9"]


@pytest.mark.parametrize(
    ("row", "fields", "reason"),
    [
        ({"q": "?", "a": 0}, {"input": "{text}"}, r"tasks\.hub\.t\.input: no column 'text'; the columns are q, a"),
        ({"q": "?", "a": 0}, {"label": "gold"}, r"tasks\.hub\.t\.label: no column 'gold'; the columns are q, a"),
        ({"q": "?", "a": 0}, {"options": "choices"}, r"tasks\.hub\.t\.options: no column 'choices'"),
        ({"q": "?", "a": 0}, {"input": "{q"}, r"tasks\.hub\.t\.input: '\{q'"),
        ({"q": "?", "a": 2}, {}, r"tasks\.hub\.t: split train, row 0: a: 2: not an index into the 2 options"),
        ({"q": "?", "a": -1}, {}, r"row 0: a: -1: .*split without labels"),
        ({"q": "?", "a": True}, {"options": ["True", "False"]}, r"row 0: a: True: is the text of option 'True', whose"),
        ({"q": "?", "a": 1}, {"options": ["1", "2"]}, r"row 0: a: 1: is the text of option '1', whose index is 0; say"),
        ({"q": "?", "a": 2}, {"options": ["1", "2"]}, r"row 0: a: 2: is the text of option '2', whose index is 1; say"),
        (
            {"q": "?", "a": "C", "o": ["x", "y"]},
            {"options": "o", "labels": ["A", "B", "C"]},
            "of option 3, and the row has 2",
        ),
        ({"q": "?", "a": "maybe"}, {}, r"row 0: a: output 'maybe' is not among the options"),
        ({"q": "?", "a": 0.5}, {}, r"row 0: a: 0\.5, a float"),
        ({"q": "?", "a": 0, "o": "red, blue"}, {"options": "o"}, "neither a list nor a dict"),
        ({"q": "?", "a": 0, "o": ["red", "red"]}, {"options": "o"}, "row 0: option 'red' is listed twice"),
        ({"q": "?", "a": 0}, {"test_split": "exam"}, r"tasks\.hub\.t: json, split exam: .*exam"),
        ({"q": "?", "a": 0}, {"train_split": "train[:0]"}, "split train.*no data"),
    ],
)
def test_errors_name_the_entry_and_the_reason(row, fields, reason, hub_task):
    with pytest.raises(ValueError, match=reason):
        load(hub_task([row], **fields))


def test_script_only_data_set_is_told_the_parquet_revision(monkeypatch):
    def refuse(*_, **__):
        raise RuntimeError("Dataset scripts are no longer supported, but found piqa.py")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(ValueError, match=r"tasks\.hub\.t: piqa.*revision: refs/convert/parquet"):
        load(HubTask(path="piqa", input="{goal}", label="label", options=("1", "2")))


def test_parquet_copy_is_read_by_the_folder_of_the_configuration(tmp_path):
    """Laid out as the hub does, CONFIGURATION/SPLIT/0000.parquet; the library refuses a configuration's name."""
    for name in ("cb", "wic"):
        for split in ("train", "validation"):
            folder = tmp_path / "copy" / name / split
            folder.mkdir(parents=True)
            rows = [{"q": f"{name} {split}", "a": 0}]
            datasets.Dataset.from_list(rows).to_parquet(folder / "0000.parquet")
    keys = {"path": str(tmp_path / "copy"), "input": "{q}", "label": "a", "options": ("no", "yes")}
    loaded = load(HubTask(**keys, name="cb", revision="refs/convert/parquet", test_split="validation"))
    assert [example.input for example in loaded.train + loaded.test] == ["cb train", "cb validation"]
    one = HubTask(
        **{**keys, "path": str(tmp_path / "copy/wic")}, revision="refs/convert/parquet", test_split=None, holdout=0.5
    )
    with pytest.raises(ValueError, match="no test rows"):  # one row cannot be split; but it was found without a name
        load(one)
    with pytest.raises(ValueError, match="BuilderConfig 'cb' not found"):
        load(HubTask(**keys, name="cb", test_split="validation"))


@pytest.mark.parametrize(
    ("odd", "reason"),
    [
        ({"o": ["red"]}, r"1 option\(s\)"),
        ({"o": [f"o{i}" for i in range(27)]}, "27 options"),
        ({"o": None}, "neither a list nor a dict"),
        ({"q": None}, "a column is empty; name it in required"),
        ({"a": None}, "the row has no label"),
    ],
)
def test_a_few_unusable_rows_are_left_out_and_told(odd, reason, hub_task):
    good = {"q": "?", "a": 0, "o": ["red", "blue"]}
    rows = [good] * 300
    rows[7] = rows[70] = rows[77] = good | odd
    found = load_hub_tasks({"t": hub_task(rows, test_rows=[good], options="o")}, ["t"])
    assert len(found.tasks["t"].train) == 297
    (note,) = found.notes
    start = "3 of 300 rows cannot be used and are left out, the first: tasks.hub.t: split train, row 7: "
    assert note.startswith(start) and re.search(reason, note)
    with pytest.raises(ValueError, match=rf"^tasks\.hub: 3 faults in 1 entries:\n  tasks\.hub\.t: .*{reason}"):
        load(hub_task(rows[:-1], test_rows=[good], options="o"))


def test_a_row_with_an_unknown_label_is_never_left_out(hub_task):
    with pytest.raises(ValueError, match="row 500: a: 7: not an index"):
        load(hub_task([*[{"q": "?", "a": 0}] * 500, {"q": "?", "a": 7}]))


NLI = ("entailment", "neutral", "contradiction")


@pytest.mark.parametrize(
    ("names", "keys", "wrong"),
    [
        (NLI, {"options": NLI}, False),
        (NLI, {"options": NLI[::-1]}, True),
        (NLI, {"options": NLI[::-1], "labels": (2, 1, 0)}, False),
        (NLI, {"options": NLI, "labels": (2, 1, 0)}, True),
        (("Not_Duplicate", "duplicate"), {"options": ("duplicate", "not duplicate")}, True),
        (("hate", "noHate", "skip"), {"options": ("nohate", "hate"), "drop_labels": (2,)}, True),
        (("contradiction", "entailment"), {"options": ("No", "Yes")}, False),  # other words
        (("entailment", "neutral"), {"options": ("neutral", "contradiction")}, False),
        (("1", "0"), {"options": ("0", "1")}, False),
    ],
)
def test_names_of_the_labels_that_are_the_options_in_another_order(names, keys, wrong, tmp_path):
    features = datasets.Features({"q": datasets.Value("string"), "a": datasets.ClassLabel(names=names)})
    rows = datasets.Dataset.from_list([{"q": "?", "a": 0}, {"q": "!", "a": 1}], features=features)
    rows.to_parquet(tmp_path / "rows.parquet")
    files = {split: str(tmp_path / "rows.parquet") for split in ("train", "test")}
    task = HubTask(path="parquet", data_files=files, input="{q}", label="a", **keys)
    if not wrong:
        assert len(load(task).train) == 2
        return
    listing = f"'{names[0]}' becomes '.*; list the labels in the order of options"
    with pytest.raises(ValueError, match=rf"^tasks\.hub\.t\.labels: .*in another order: .*{listing}"):
        load(task)


def test_names_without_an_entry_are_missing(hub_task):
    task = hub_task([{"q": "?", "a": 0}])
    found = load_hub_tasks({"mrpc": task}, ["mrpc", "rte"])
    assert (list(found.tasks), found.missing) == (["mrpc"], {"rte": "no entry tasks.hub.rte"})
    with pytest.raises(ValueError, match="similar names there: mrpc"):
        load_hub_tasks({"mrpc": task}, ["mprc"])


def test_split_that_nobody_scores_is_not_read(hub_task):
    assert load(hub_task([{"q": "?", "a": 0}], test_split="exam"), scored=[]).test == ()
