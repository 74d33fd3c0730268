"""JSONL tasks: both layouts, and one clear error for each way a file can be wrong."""

import json

import pytest

from abmll.tasks.checks import Faults
from abmll.tasks.jsonl import load_jsonl_tasks, read_examples
from abmll.tasks.task import Example

GOOD = {"task": "t", "input": "q", "output": "yes", "options": ["yes", "no"]}


def read(path):
    faults = Faults("here", "files")
    examples = read_examples(path, faults)
    faults.check()
    return examples


def without(field):
    return {name: value for name, value in GOOD.items() if name != field}


BAD_ROWS = {
    "malformed": ('{"input": "q", ', "malformed JSON.*column"),
    "not an object": ("[1, 2]", "a list, not an object"),
    "a bare word": ('"yes"', "a str, not an object"),
    "no input": (without("input"), "field 'input' is missing"),
    "no output": (without("output"), "field 'output' is missing"),
    "no options": (without("options"), "field 'options' is missing"),
    "input of wrong type": (GOOD | {"input": 3}, "field 'input' is 3, a int: it must be a string"),
    "output of wrong type": (GOOD | {"output": None}, "field 'output' is None.*must be a string"),
    "options of wrong type": (GOOD | {"options": "yes"}, "field 'options' is 'yes'.*must be a list of strings"),
    "an option of wrong type": (GOOD | {"options": ["yes", 0]}, "options hold 0, a int"),
    "a nested option": (GOOD | {"options": ["yes", ["no"]]}, "options hold \\['no'\\], a list"),
    "output among no option": (GOOD | {"output": "maybe"}, "'maybe' is not among the options \\['yes', 'no'\\]"),
    "one option": (GOOD | {"options": ["yes"]}, "1 option"),
    "no option": (GOOD | {"options": []}, "0 option.*free answers"),
    "27 options": (GOOD | {"options": ["yes", *map(str, range(26))]}, "27 options: more than the 26 letters"),
    "a duplicate option": (GOOD | {"options": ["yes", "no", "no"]}, "option 'no' is listed twice"),
    "half a surrogate pair": (GOOD | {"input": "\ud83d"}, "surrogate"),
}


@pytest.mark.parametrize("kind", BAD_ROWS)
def test_bad_row_is_told_with_file_and_line(kind, tmp_path, write_rows):
    bad, reason = BAD_ROWS[kind]
    write_rows(tmp_path / "t/train.jsonl", [GOOD, "", bad, GOOD])
    write_rows(tmp_path / "t/test.jsonl", [GOOD])
    with pytest.raises(ValueError, match=rf"train\.jsonl:3: .*{reason}"):
        load_jsonl_tasks(tmp_path, ["t"])


def test_26_options_and_a_surrogate_pair_are_fine(tmp_path, write_rows):
    options = ["yes", *map(str, range(25))]
    path = write_rows(tmp_path / "rows.jsonl", [GOOD | {"options": options}, GOOD | {"input": "\U0001f600"}])
    first, second = read(path)
    assert (first.options, second.input) == (tuple(options), "\U0001f600")


def test_crlf_blank_lines_byte_order_mark_and_odd_separators(tmp_path):
    text = json.dumps(GOOD) + "\r\n\r\n   \r\n" + json.dumps(GOOD | {"input": "a\u2028b\x85c"}, ensure_ascii=False)
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert [example.input for example in read(path)] == ["q", "a\u2028b\x85c"]


def test_other_encoding_is_an_error_with_its_line(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(json.dumps(GOOD).encode() + b'\n{"input": "caf\xe9"}\n')
    with pytest.raises(ValueError, match=r"rows\.jsonl:2: byte 0xe9 is not UTF-8"):
        read(path)


@pytest.mark.parametrize("dev", ["dev", "validation"])
def test_layout_of_plain_files(dev, tmp_path, write_rows):
    for split in ("train", "test", dev):
        write_rows(tmp_path / f"t/{split}.jsonl", [GOOD | {"input": split}])
    task = load_jsonl_tasks(tmp_path, ["t"]).tasks["t"]
    assert task.name == "t"
    assert task.train == (Example("train", ("yes", "no"), "yes"),)
    assert [rows[0].input for rows in (task.train, task.validation, task.test)] == ["train", dev, "test"]


def write_draws(folder, name, draws, write_rows, splits=("train", "dev", "test")):
    for k, seed in draws:
        for split in splits:
            write_rows(folder / f"{name}/{name}_{k}_{seed}_{split}.jsonl", [GOOD | {"input": f"{k} {seed} {split}"}])


@pytest.mark.parametrize(
    ("draws", "chosen"),
    [
        ([(16, 100), (32, 13), (32, 21)], "32 13"),
        ([(16, 13), (16, 100), (16, 21)], "16 100"),
        ([(16, 87), (16, 42)], "16 42"),
        ([(16, 100), (16384, 7)], "16384 7"),
    ],
)
def test_metaicl_layout_takes_the_largest_k_then_seed_100_then_the_smallest(draws, chosen, tmp_path, write_rows):
    write_draws(tmp_path, "glue-mrpc", draws, write_rows)
    found = load_jsonl_tasks(tmp_path, ["glue-mrpc"])
    task = found.tasks["glue-mrpc"]
    inputs = [rows[0].input for rows in (task.train, task.validation, task.test)]
    assert inputs == [f"{chosen} train", f"{chosen} dev", f"{chosen} test"]
    k, seed = chosen.split()
    assert f"glue-mrpc: k = {k}, seed {seed} chosen of {len(draws)} draws" in found.notes[0]


def test_metaicl_draw_without_test_rows_serves_training_only(tmp_path, write_rows):
    write_draws(tmp_path, "t", [(16384, 100)], write_rows, splits=("train",))
    assert load_jsonl_tasks(tmp_path, ["t"], scored=[]).tasks["t"].test == ()
    with pytest.raises(ValueError, match="task t has no test rows"):
        load_jsonl_tasks(tmp_path, ["t"])
    write_draws(tmp_path, "t", [(16, 13)], write_rows)
    assert load_jsonl_tasks(tmp_path, ["t"], scored=["t"]).tasks["t"].train[0].input == "16 13 train"
    assert load_jsonl_tasks(tmp_path, ["t"], scored=[]).tasks["t"].train[0].input == "16384 100 train"


@pytest.mark.parametrize(("empty", "other"), [("train", "test"), ("test", "train")])
@pytest.mark.parametrize("there", [True, False])
def test_empty_split_is_an_error(empty, other, there, tmp_path, write_rows):
    write_rows(tmp_path / f"t/{other}.jsonl", [GOOD])
    if there:
        write_rows(tmp_path / f"t/{empty}.jsonl", ["", " "])
    with pytest.raises(ValueError, match=f"task t has no {empty} rows") as error:
        load_jsonl_tasks(tmp_path, ["t"])
    assert str(tmp_path / "t") in str(error.value)


def test_task_named_twice_is_an_error(tmp_path, write_rows):
    with pytest.raises(ValueError, match="t: listed more than once"):
        load_jsonl_tasks(tmp_path, ["t", "u", "t"])


@pytest.mark.parametrize("name", ["sst/", "./sst", "../tasks/sst", "/sst", "a/../sst"])
def test_a_task_has_one_name(name, tmp_path):
    with pytest.raises(ValueError, match=rf"tasks: '{name}': is no name of a folder in tasks\.folder; write 'sst'"):
        load_jsonl_tasks(tmp_path, [name])


def test_missing_tasks_are_returned_with_where_it_looked(tmp_path, write_rows):
    write_rows(tmp_path / "t/train.jsonl", [GOOD])
    write_rows(tmp_path / "t/test.jsonl", [GOOD])
    (tmp_path / "hollow").mkdir()
    found = load_jsonl_tasks(tmp_path, ["gone", "t", "hollow"])
    assert list(found.tasks) == ["t"]
    assert list(found.missing) == ["gone", "hollow"]
    assert str(tmp_path / "gone/train.jsonl") in found.missing["gone"]


def test_only_tasks_asked_for_are_read(tmp_path, write_rows):
    for name in ("t", "broken"):
        write_rows(tmp_path / f"{name}/train.jsonl", [GOOD if name == "t" else "{"])
        write_rows(tmp_path / f"{name}/test.jsonl", [GOOD])
    assert list(load_jsonl_tasks(tmp_path, ["t"]).tasks) == ["t"]


def test_none_found_names_similar_folders(tmp_path):
    (tmp_path / "glue-mrpc").mkdir()
    (tmp_path / "unrelated").mkdir()
    with pytest.raises(ValueError, match="similar names there: glue-mrpc;") as error:
        load_jsonl_tasks(tmp_path, ["glue_mrpc", "xyzzy"])
    assert str(tmp_path) in str(error.value)
    assert "unrelated" not in str(error.value)
    with pytest.raises(ValueError, match="no such folder"):
        load_jsonl_tasks(tmp_path / "nowhere", ["t"])


@pytest.mark.crossfit
def test_all_real_tasks_load(crossfit):
    rows = [json.loads(line) for line in (crossfit / "MANIFEST.jsonl").read_text("utf-8").splitlines()]
    manifest = {row["task"]: row for row in rows}
    found = load_jsonl_tasks(crossfit, manifest)
    assert len(found.tasks) == 59
    assert not found.missing
    for name, task in found.tasks.items():
        assert (len(task.train), len(task.test)) == (manifest[name]["n_train"], manifest[name]["n_test"])
