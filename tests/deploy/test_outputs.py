"""What the commands write: nothing that is read is lost to it, and what cannot be written costs no work."""

import io
import json
import sys

import pytest
from deployed import adapted_without_folds


def test_a_diagram_without_matplotlib_costs_no_work(call, data, tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    status, _, err = call("evaluate", "--adapter", "none", "--data", data, "--diagram", tmp_path / "x.svg")
    assert status == 2 and err.startswith("error: --diagram: is drawn by matplotlib; run: pip install"), err


def test_no_rows_have_no_predictions(call, adapter, texts, tmp_path):
    """The output is opened all the same; and what there is may be no file."""
    texts.write_text("id,text\n")
    kept = tmp_path / "kept.jsonl"
    kept.write_text("kept")
    for output in (kept, "/dev/null"):
        assert call("predict", "--adapter", adapter, "--input", texts, "--output", output)[0] == 0
    assert kept.read_text() == ""


def test_no_file_is_lost_to_an_output(call, run, data, adapter, texts, tmp_path):
    kept = tmp_path / "kept.jsonl"
    kept.write_text("kept")
    before = texts.read_text()
    assert call("predict", "--adapter", adapter, "--input", texts, "--output", texts)[0] == 2
    assert call("predict", "--adapter", adapter, "--input", tmp_path / "none.jsonl", "--output", kept)[0] == 2
    assert call("predict", "--adapter", adapter, "--input", texts, "--output", tmp_path / "no/where")[0] == 2
    sure_of_nothing = adapted_without_folds(call, run, data, tmp_path / "no-folds")
    status, _, err = call(
        "predict", "--adapter", sure_of_nothing, "--input", texts, "--output", kept, "--calibrated", "--device", "cpu"
    )
    assert status == 2 and "calibrated: its adapter was made without cross-validation" in err
    assert texts.read_text() == before and kept.read_text() == "kept"

    labelled, card = data.read_bytes(), (adapter / "card.json").read_bytes()
    given = ("--adapter", adapter, "--data", data)
    for command, arguments in {
        "predict": ("--adapter", adapter, "--input", texts, "--output", adapter / "card.json"),
        "evaluate": (*given, "--output", data),
    }.items():
        status, _, err = call(command, *arguments)
        assert status == 2 and err.startswith(f"error: --output: {arguments[-1]}: is ") and "name another file" in err
    status, _, err = call("evaluate", *given, "--output", kept, "--diagram", tmp_path / "other/../kept.jsonl")
    assert status == 2 and "--diagram" in err
    status, _, err = call("evaluate", *given, "--output", tmp_path / "d.svg", "--diagram", tmp_path / "d.svg")
    assert status == 2 and "d.svg: is the --output, too; name another file" in err
    assert data.read_bytes() == labelled and (adapter / "card.json").read_bytes() == card


def test_scores_are_written_though_nobody_reads_the_table(call, adapter, data, tmp_path, monkeypatch):
    def closed(*_: object, **__: object) -> None:
        raise BrokenPipeError

    monkeypatch.setattr("abmll.deploy.predict.print", closed, raising=False)
    monkeypatch.setattr(sys, "stderr", io.StringIO())  # the command closes it
    given = ("--adapter", adapter, "--data", data, "--output", tmp_path / "s.json", "--diagram", tmp_path / "d.svg")
    assert call("evaluate", *given)[0] == 0
    assert json.loads((tmp_path / "s.json").read_text())["n"] and (tmp_path / "d.svg").is_file()


def test_predictions_that_cannot_be_written_cost_no_work(call, texts, tmp_path):
    status, _, err = call("predict", "--adapter", "none", "--input", texts, "--output", tmp_path / "no/p.jsonl")
    assert status == 2 and err.startswith(f"error: --output: {tmp_path}/no/p.jsonl: ") and "is no folder" in err


def test_a_diagram_that_cannot_be_drawn_costs_no_work(call, data):
    status, _, err = call("evaluate", "--adapter", "none", "--data", data, "--diagram", "d.foo")
    assert status == 2 and err.startswith("error: --diagram: d.foo: is no picture by its ending; name a .svg")


@pytest.mark.parametrize("option", ["--output", "--diagram"])
def test_scores_that_cannot_be_written_cost_no_work(call, data, tmp_path, option):
    for path, problem in (
        (tmp_path / "no/s.svg", "is no folder"),
        (tmp_path, "is a folder"),
        ("/proc/s.svg", "nothing"),
    ):
        status, _, err = call("evaluate", "--adapter", "none", "--data", data, option, path)
        assert status == 2 and err.startswith(f"error: {option}: {path}: ") and problem in err


def test_an_occupied_folder_is_told_before_the_work(call, data, tmp_path):
    (tmp_path / "own").mkdir()
    (tmp_path / "own/notes.txt").write_text("mine")
    status, _, err = call("adapt", "--run", "no-run", "--data", data, "--out", tmp_path / "own")
    assert status == 2 and "holds other files than an adapter's" in err
