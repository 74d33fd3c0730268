"""All that is wrong with the files of a run is told at once, up to a bound."""

import errno
import json
import os
from pathlib import Path

import datasets
import pytest

from abmll.config.schema import HubTask
from abmll.tasks.checks import Faults
from abmll.tasks.hub import load_hub_tasks
from abmll.tasks.jsonl import load_jsonl_tasks

GOOD = {"task": "t", "input": "q", "output": "yes", "options": ["yes", "no"]}


def told(faults):
    with pytest.raises(ValueError) as caught:
        faults.check()
    return str(caught.value).split("\n  ")


def test_none_is_no_error_and_one_is_its_own_line():
    faults = Faults("tasks.folder: here", "files")
    faults.check()
    faults.add("a", "a:3: bad")
    assert told(faults) == ["a:3: bad"]
    assert "a" in faults and "b" not in faults


def test_few_are_all_told_file_by_file():
    faults = Faults("tasks.folder: here", "files")
    for place, line in (("b", 1), ("a", 7), ("b", 2)):
        faults.add(place, f"{place}:{line}: bad")
    assert told(faults) == ["tasks.folder: here: 3 faults in 2 files:", "b:1: bad", "b:2: bad", "a:7: bad"]


def test_a_file_full_of_faults_does_not_hide_another():
    faults = Faults("tasks.folder: here", "files")
    for number in range(1, 5001):
        faults.add("a", f"a:{number}: bad")
    faults.add("b", "b:2: worse")
    head, *lines = told(faults)
    assert head == "tasks.folder: here: 5,001 faults in 2 files:"
    assert lines == [*(f"a:{number}: bad" for number in range(1, 20)), "a: 4,981 more", "b:2: worse"]


def test_many_files_are_counted_past_the_bound():
    faults = Faults("tasks.folder: here", "files")
    for file in range(30):
        for number in (1, 2):
            faults.add(f"f{file}", f"f{file}:{number}: bad")
    head, *lines = told(faults)
    assert head == "tasks.folder: here: 60 faults in 30 files:"
    assert [line for line in lines if ":1: bad" in line] == [f"f{file}:1: bad" for file in range(20)]
    assert lines[1] == "f0: 1 more" and lines[-1] == "20 more in 10 other files"


def test_a_line_said_twice_is_one_fault():
    faults = Faults("tasks.hub", "entries")
    faults.add("t", "no column 'x'")
    faults.add("t", "no column 'x'")
    assert told(faults) == ["no column 'x'"]


@pytest.fixture
def folder(tmp_path, write_rows):
    for name in ("one", "two", "three"):
        for split in ("train", "test"):
            write_rows(tmp_path / name / f"{split}.jsonl", [GOOD] * 5)
    return tmp_path


def test_every_faulty_row_of_every_file(folder, write_rows):
    write_rows(folder / "one/train.jsonl", [GOOD, "{", GOOD, GOOD | {"output": "maybe"}])
    (folder / "two/test.jsonl").write_bytes(json.dumps(GOOD).encode() + b'\n{"input": "caf\xe9"}\n{"inp\n')
    write_rows(folder / "three/test.jsonl", [])
    with pytest.raises(ValueError) as caught:
        load_jsonl_tasks(folder, ["one", "gone", "two", "three"])
    head, *lines = str(caught.value).split("\n  ")
    assert head == f"tasks.folder: {folder}: 5 faults in 3 files:"
    starts = ["one/train.jsonl:2: malformed JSON", "one/train.jsonl:4: output 'maybe'", "two/test.jsonl:2: byte 0xe9"]
    starts += ["two/test.jsonl:3: malformed JSON", "three/test.jsonl: task three has no test rows"]
    assert [line.startswith(f"{folder}/{start}") for line, start in zip(lines, starts, strict=True)] == [True] * 5


def test_a_file_whose_rows_are_all_bad_is_not_also_empty(folder, write_rows):
    write_rows(folder / "one/train.jsonl", ["{"])
    with pytest.raises(ValueError, match=r"^\S*one/train\.jsonl:1: malformed JSON") as caught:
        load_jsonl_tasks(folder, ["one", "two"])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-be"])
def test_a_file_in_utf_16_is_one_fault(encoding, folder):
    text = "".join(json.dumps(GOOD) + "\n" for _ in range(9))
    mark = "\ufeff" if encoding == "utf-16-be" else ""
    (folder / "one/train.jsonl").write_bytes((mark + text).encode(encoding))
    with pytest.raises(
        ValueError, match=r"^\S*one/train\.jsonl:1: byte 0xf[ef] is not UTF-8 but UTF-16: save"
    ) as caught:
        load_jsonl_tasks(folder, ["one"])
    assert "\n" not in str(caught.value)


def test_a_byte_order_mark_does_not_hide_the_lines_of_a_file_in_two_encodings(folder):
    (folder / "one/train.jsonl").write_bytes(b"\xef\xbb\xbf" + json.dumps(GOOD).encode() + b"\n\xff\n")
    with pytest.raises(ValueError, match=r"^\S*one/train\.jsonl:2: byte 0xff is not UTF-8: save"):
        load_jsonl_tasks(folder, ["one"])


def test_a_file_that_cannot_be_read_is_a_fault(folder, monkeypatch):
    def refuse(path):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(Path, "read_bytes", refuse)  # a superuser reads every file
    with pytest.raises(ValueError, match=r"one/train\.jsonl: Permission denied: make it a file that can be read"):
        load_jsonl_tasks(folder, ["one"])


def test_hub_entries_are_told_together(tmp_path, write_rows, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    rows = [{"q": "?", "a": label} for label in (0, 7, 1, 8)]
    files = {split: str(write_rows(tmp_path / f"{split}.json", rows)) for split in ("train", "test")}
    entry = {"path": "json", "data_files": files, "input": "{q}", "label": "a", "options": ("no", "yes")}
    hub = {
        "rows": HubTask(**entry),
        "columns": HubTask(**entry | {"input": "{text}", "label": "gold"}),
        "split": HubTask(**entry | {"train_split": "learn", "test_split": "train[:1]"}),
        "good": HubTask(**entry | {"train_split": "train[:1]", "test_split": "test[:1]"}),
    }
    with pytest.raises(ValueError) as caught:
        load_hub_tasks(hub, hub, scored=["rows", "split", "good"])
    head, *lines = str(caught.value).split("\n  tasks.hub.")
    assert head == "tasks.hub: 7 faults in 3 entries:"
    starts = [
        f"rows: split {split}, row {row}" for split in ("train", "test") for row in ("1: a: 7: not", "3: a: 8: not")
    ]
    starts += ["columns.input: no column 'text'", "columns.label: no column 'gold'", "split: json, split learn: "]
    assert [line.startswith(start) for line, start in zip(lines, starts, strict=True)] == [True] * 7
