"""The commands, as they are typed: adapt, predict, suggest, evaluate an adapter."""

import io
import json
import threading
import warnings

import pytest
from deployed import EXAMPLES, OPTIONS, TEXTS, adapted_without_folds

from abmll import TaskModel
from abmll.compare.statistics import wilson


def test_adapt_writes_what_the_library_makes(call, run, data, adapted, tmp_path):
    status, out, err = call("adapt", "--run", run, "--data", data, "--out", tmp_path / "new", "--device", "cpu")
    assert status == 0, err
    assert (
        "moods: 6 examples; options: bad, good" in out and "4 folds" in out and f"adapter         {tmp_path}/new" in out
    )
    card = json.loads((tmp_path / "new" / "card.json").read_text())
    assert card == json.loads(json.dumps(adapted.card.model_dump()))
    assert (tmp_path / "new" / "adapter.safetensors").stat().st_size > 1000


def test_adapt_tells_texts_of_several_labels(call, run, data, tmp_path):
    data.write_text(data.read_text() + "\n" + json.dumps({"text": EXAMPLES[0][0], "label": OPTIONS[1]}))
    status, out, err = call("adapt", "--run", run, "--data", data, "--out", tmp_path / "new", "--folds", 0)
    assert status == 0, err
    assert "note            1 text with more than one label: correct the wrong one" in out


def test_adapt_tells_repeated_rows_and_several_labels(call, run, data, tmp_path):
    rows = data.read_text().splitlines()
    data.write_text("\n".join([*rows, rows[0], json.dumps({"text": EXAMPLES[1][0], "label": OPTIONS[0]})]))
    status, out, err = call(
        "adapt", "--run", run, "--data", data, "--out", tmp_path / "new", "--folds", 0, "--steps", 1
    )
    assert status == 0, err
    assert "note            2 of 8 rows repeat another\nnote            1 text with more than one label" in out


def test_adapt_says_why_nothing_is_known(call, run, data, tmp_path):
    arguments = ("--run", run, "--data", data, "--out", tmp_path / "new")
    _, out, _ = call("adapt", *arguments, "--folds", 0)
    assert "expect          unknown: no cross-validation (--folds 0)" in out
    data.write_text("\n".join(json.dumps({"text": "a", "label": label}) for label in OPTIONS * 2))
    status, out, err = call("adapt", *arguments)
    assert status == 0, err
    assert "expect          unknown: no cross-validation (all examples ask one question, and none is left to" in out


def test_adapt_takes_a_folder_of_tasks(call, run, data, tmp_path):
    (tmp_path / "tasks").mkdir()
    for name in ("one", "two"):
        (tmp_path / "tasks" / f"{name}.jsonl").write_text(data.read_text())
    out = tmp_path / "adapters"
    arguments = ("--examples", 4, "--folds", 0, "--steps", 1, "method.test_lr=1e-3")
    status, _, err = call("adapt", "--run", run, "--tasks", tmp_path / "tasks", "--out", out, *arguments)
    assert status == 0, err
    for name in ("one", "two"):
        card = json.loads((out / name / "card.json").read_text())
        assert card["task"] == name and card["adaptation"]["steps"] == 1 and card["adaptation"]["examples"] == 4
        assert card["scores"] == {} and card["config"]["method"]["test_lr"] == 1e-3


def test_predict_writes_a_line_a_row(call, adapter, adapted, texts, tmp_path):
    status, out, err = call("predict", "--adapter", adapter, "--input", texts)
    assert status == 0, err
    found = [json.loads(line) for line in out.splitlines()]
    assert [line["text"] for line in found] == TEXTS and [line["row"] for line in found] == [0, 1, 2]
    for line, expected in zip(found, adapted.predict(TEXTS), strict=True):
        assert line["label"] == expected.label and line["probabilities"] == pytest.approx(expected.probabilities)
        assert "variance" not in line and "adapter" not in line
    assert err.strip().endswith("3 predictions")


def test_predict_abstains_samples_and_takes_several_adapters(call, adapter, texts, tmp_path, adapted, meta):
    other = meta.adapt(EXAMPLES[2:], "other", folds=0).save(tmp_path / "other")
    sure = sorted(prediction.confidence for prediction in adapted.predict(TEXTS, samples=3))[1]
    output = tmp_path / "out.jsonl"
    status, _, err = call(
        "predict", "--adapter", adapter, "--adapter", other, "--input", texts, "--output", output, "--samples", 3,
        "--abstain", sure,
    )  # fmt: skip
    assert status == 0, err
    found = [json.loads(line) for line in output.read_text().splitlines()]
    assert [(line["row"], line["adapter"]) for line in found] == [
        (n, name) for n in range(3) for name in ("moods", "other")
    ]
    assert all(line["variance"] > 0 for line in found)
    for line in found:
        assert (line["label"] is None) == line["abstained"] == (line["confidence"] < sure)
    assert sum(line["abstained"] for line in found if line["adapter"] == "moods") == 1


def test_texts_that_were_cut_are_told(call, run, adapter, data, tmp_path):
    """In the lines of those alone, and at the end of every command that reads them."""
    long = {"text": "long " * 400, "label": "good"}
    data.write_text(data.read_text() + "\n" + json.dumps(long))
    told = "1 of 7 texts were cut to tasks.max_tokens: 320"
    status, out, err = call("predict", "--adapter", adapter, "--adapter", adapter, "--input", data)
    assert status == 0 and err.splitlines()[-1] == told, err
    found = [json.loads(line).get("truncated") for line in out.splitlines()]
    assert found == [None] * 12 + [True] * 2
    status, _, err = call("evaluate", "--adapter", adapter, "--data", data)
    assert status == 0 and err.splitlines()[-1] == told, err
    status, out, err = call("adapt", "--run", run, "--data", data, "--out", tmp_path / "new", "--folds", 0)
    assert status == 0 and f"cut             {told}" in out, err
    assert json.loads((tmp_path / "new/card.json").read_text())["adaptation"]["truncated"] == 1


def test_texts_that_fit_are_not_told(call, run, adapter, data, tmp_path):
    for command, *arguments in (
        ("predict", "--adapter", adapter, "--input", data),
        ("evaluate", "--adapter", adapter, "--data", data),
        ("adapt", "--run", run, "--data", data, "--out", tmp_path / "new", "--folds", 0),
    ):
        status, out, err = call(command, *arguments)
        assert status == 0 and "cut" not in out + err and "truncated" not in out


def test_an_adapter_serves_its_base_in_another_dtype(call, run, adapter, data, texts, monkeypatch):
    """One made on a GPU is ten times as fast in float32 on a CPU without instructions for bfloat16, which says so."""
    monkeypatch.setattr("abmll.config.native._cpu_multiplies_bfloat16", lambda: False)
    of_adapter = ("--adapter", adapter, "--device", "cpu")
    for command, *arguments in (
        ("predict", *of_adapter, "--input", texts),
        ("suggest", *of_adapter, "--input", texts),
        ("suggest", "--run", run, "--options", *OPTIONS, "--device", "cpu", "--input", texts),
        ("evaluate", *of_adapter, "--data", data),
    ):
        with pytest.warns(UserWarning, match=r"this CPU has no instructions .* set model\.dtype=float32"):
            status, _, err = call(command, *arguments, "--dtype", "bfloat16")
        assert status == 0, err
    out = adapter.parent / "in-bfloat16"
    with pytest.warns(UserWarning, match="this CPU has no instructions"):
        status, _, err = call(
            "adapt", "--run", run, "--data", data, "--out", out, "--folds", 0, "--device", "cpu", "model.dtype=bfloat16"
        )
    assert status == 0 and json.loads((out / "card.json").read_text())["config"]["model"]["dtype"] == "bfloat16", err
    with warnings.catch_warnings(action="error", category=UserWarning):
        status, _, err = call("predict", *of_adapter, "--input", texts, "--dtype", "float32")
    assert status == 0, err


def test_predict_streams_standard_input(call, adapter, monkeypatch):

    monkeypatch.setattr("sys.stdin", io.StringIO('{"text": "It was slow."}\n'))
    status, out, _ = call("predict", "--adapter", adapter, "--input", "-")
    assert status == 0 and json.loads(out)["label"] in OPTIONS


def test_rows_are_taken_as_they_come():
    """One that waits alone is answered at once; an error comes behind the rows before it."""
    from abmll.deploy.predict import CHUNK, as_they_come
    from abmll.tasks.labelled import Row

    answered, rows = threading.Event(), [Row(str(number), {}) for number in range(2 * CHUNK)]

    def typed():
        yield rows[0]
        assert answered.wait(30), "the first row was not handed on while the second was awaited"
        yield from rows[1:]
        raise ValueError("no row")

    chunks = as_they_come(typed())
    found = list(next(chunks))
    assert found == rows[:1]
    answered.set()
    with pytest.raises(ValueError, match="no row"):
        for chunk in chunks:
            assert 1 <= len(chunk) <= CHUNK
            found += chunk
    assert found == rows


def test_a_bad_row_ends_it_with_its_place(call, adapter, tmp_path):
    (tmp_path / "t.jsonl").write_text('{"text": "a"}\n{"txt": "b"}\n')
    status, _, err = call("predict", "--adapter", adapter, "--input", tmp_path / "t.jsonl")
    assert status == 2 and "t.jsonl:2: no column text or input" in err


def test_suggest_refuses_a_file_without_rows_and_options_that_are_one(call, adapter, run, texts, tmp_path):
    (tmp_path / "none.jsonl").write_text("\n")
    status, _, err = call("suggest", "--adapter", adapter, "--input", tmp_path / "none.jsonl")
    assert status == 2 and "none.jsonl: holds no rows; write one example a line" in err
    status, _, err = call("suggest", "--run", run, "--options", "good", "Good", "--device", "cpu", "--input", texts)
    assert status == 2 and "labels 'good' and 'Good' differ in case or spaces alone" in err


def test_suggest_prints_the_rows(call, adapter, adapted, run, texts):
    status, out, _ = call("suggest", "--adapter", adapter, "--input", texts, "--count", 2)
    assert status == 0
    assert [json.loads(line)["row"] for line in out.splitlines()] == adapted.suggest(TEXTS, 2)
    assert json.loads(out.splitlines()[0])["id"] in ("0", "1", "2")
    status, out, _ = call("suggest", "--run", run, "--options", "bad", "good", "--input", texts, "--count", 1)
    assert status == 0 and len(out.splitlines()) == 1


def test_options_that_are_text_are_refused(call, adapter, tmp_path):
    path = tmp_path / "t.jsonl"
    path.write_text('{"text": "a", "options": "[\'a\', \'b\']"}\n')
    for command in ("predict", "suggest"):
        status, out, err = call(command, "--adapter", adapter, "--input", path)
        assert status == 2 and not out and "t.jsonl:1: `options` is text" in err


def test_a_users_nan_is_null_in_what_is_suggested(call, adapter, tmp_path):
    (tmp_path / "t.jsonl").write_text('{"text": "a", "score": NaN, "more": [Infinity, {"x": -Infinity, "y": 1.5}]}\n')
    status, out, err = call("suggest", "--adapter", adapter, "--input", tmp_path / "t.jsonl")
    assert status == 0, err
    found = json.loads(out, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert found == {"row": 0, "text": "a", "score": None, "more": [None, {"x": None, "y": 1.5}]}


def test_an_adapter_of_nan_labels_nothing(call, adapted, data, texts, tmp_path):
    phi = {name: value * float("nan") for name, value in adapted.phi.items()}
    broken = TaskModel(adapted.base, phi, adapted.card).save(tmp_path / "broken")
    for command, *arguments in (
        ("predict", "--input", texts, "--abstain", 0.9),
        ("evaluate", "--data", data),
        ("suggest", "--input", texts),
    ):
        status, out, err = call(command, "--adapter", broken, *arguments)
        assert status == 2 and not out and "lower method.test_lr" in err and err.count("error:") == 1


def test_evaluate_scores_an_adapter(call, adapter, adapted, data, tmp_path):
    from abmll import Example

    scores, diagram = tmp_path / "scores.json", tmp_path / "reliability.svg"
    status, out, err = call("evaluate", "--adapter", adapter, "--data", data, "--output", scores, "--diagram", diagram)
    assert status == 0, err
    expected = adapted.evaluate([Example(text, OPTIONS, label) for text, label in EXAMPLES])
    found = json.loads(scores.read_text())
    assert found["nll_options"] == pytest.approx(expected.nll_options) and found["n"] == 6 and "aurc" in found
    assert "accuracy " in out and "<svg" in diagram.read_text()


def test_calibrated_predictions_are_the_librarys(call, adapted, texts, tmp_path):
    """At a temperature that is told; where cross-validation found none that is told too."""
    card = adapted.card.model_copy(update={"scores": {"cross_validation": {"temperature": 2.5}}})
    told = TaskModel(adapted.base, adapted.phi, card)
    status, out, err = call("predict", "--adapter", told.save(tmp_path / "told"), "--input", texts, "--calibrated")
    assert status == 0, err
    expected = [one.confidence for one in told.predict(TEXTS, calibrated=True)]
    assert [json.loads(line)["confidence"] for line in out.splitlines()] == pytest.approx(expected)
    card = adapted.card.model_copy(update={"scores": {"cross_validation": {"temperature": None}}})
    none = TaskModel(adapted.base, adapted.phi, card)
    status, _, err = call("predict", "--adapter", none.save(tmp_path / "none"), "--input", texts, "--calibrated")
    assert status == 2 and "cross-validation found no temperature" in err


def test_rows_before_a_bad_one_are_written(call, adapter, tmp_path):
    (tmp_path / "t.jsonl").write_text('{"text": "a"}\n{"text": "b"}\n{"text": 3}\n')
    status, out, err = call("predict", "--adapter", adapter, "--input", tmp_path / "t.jsonl")
    assert status == 2 and "t.jsonl:3:" in err and [json.loads(line)["text"] for line in out.splitlines()] == ["a", "b"]


def test_texts_without_a_word_get_no_label(call, adapter, adapted, tmp_path):
    """... stop nothing, and are not suggested."""
    (tmp_path / "t.csv").write_text(f'id,text\n0,"{TEXTS[0]}"\n1,\n2,"{TEXTS[1]}"\n3,"  "\n')
    status, out, err = call("predict", "--adapter", adapter, "--input", tmp_path / "t.csv")
    lines = [json.loads(line) for line in out.splitlines()]
    assert status == 0 and "2 of 4 texts are empty, and were left out" in err
    assert lines[1] == {"row": 1, "text": "", "label": None, "empty": True}
    assert lines[3] == {"row": 3, "text": "  ", "label": None, "empty": True}
    assert [lines[place]["label"] for place in (0, 2)] == [found.label for found in adapted.predict(TEXTS[:2])]
    status, out, err = call("suggest", "--adapter", adapter, "--input", tmp_path / "t.csv", "--count", 4)
    assert status == 0 and {json.loads(line)["row"] for line in out.splitlines()} == {0, 2} and "2 of 4 texts" in err
    (tmp_path / "t.csv").write_text("id,text\n0,\n")
    for command in ("predict", "suggest"):
        status, out, _ = call(command, "--adapter", adapter, "--input", tmp_path / "t.csv")
        assert status == 0 and len(out.splitlines()) == (command == "predict")


def test_a_folder_that_is_no_finished_run_says_what_it_is(call, adapter, data, tmp_path):
    (tmp_path / "half").mkdir()
    (tmp_path / "half/config.yaml").touch()
    for folder, problem in {adapter: "holds what was made from a run", tmp_path / "half": "has not ended"}.items():
        status, _, err = call("adapt", "--run", folder, "--data", data, "--out", tmp_path / "out")
        assert status == 2 and err.startswith(f"error: --run: {folder}: ") and problem in err


def test_a_text_that_fits_in_no_prompt_stops_nothing(call, run, data, tmp_path):
    adapter = adapted_without_folds(call, run, data, tmp_path / "short", "tasks.too_long=drop", "tasks.max_tokens=320")
    texts = ["It was slow.", "long " * 400, "It was fine."]
    rows = [{"text": text, "label": OPTIONS[number % 2]} for number, text in enumerate(texts)]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    of_it = ("--adapter", adapter, "--device", "cpu")
    told = "1 of 3 texts do not fit in tasks.max_tokens: 320, and were left out"
    status, out, err = call("predict", *of_it, "--input", tmp_path / "t.jsonl")
    first, long, last = map(json.loads, out.splitlines())
    assert status == 0 and told in err
    assert long == {"row": 1, "text": texts[1], "label": None, "too_long": True}
    assert [line["row"] for line in (first, last)] == [0, 2] and first["label"] and last["label"]
    status, out, err = call("suggest", *of_it, "--input", tmp_path / "t.jsonl", "--count", 3)
    assert status == 0 and told in err and sorted(json.loads(line)["row"] for line in out.splitlines()) == [0, 2]
    status, out, err = call("evaluate", *of_it, "--data", tmp_path / "t.jsonl")
    assert status == 0 and told in err and "n                          2\n" in out
    (tmp_path / "t.jsonl").write_text(json.dumps(rows[1]) + "\n")
    status, _, err = call("evaluate", *of_it, "--data", tmp_path / "t.jsonl")
    assert status == 2 and "none of its 1 texts fits in tasks.max_tokens: 320; shorten them, or adapt again" in err


def test_rows_that_repeat_others_count_once(call, run, data, tmp_path):
    """Ten copies of a file tell no more than the file: the interval is as wide, and a question is suggested once."""
    many = tmp_path / "many.jsonl"
    many.write_text("\n".join([data.read_text()] * 10))
    widths = []
    for path in (data, many):
        status, out, err = call("adapt", "--run", run, "--data", path, "--out", tmp_path / path.stem, "--device", "cpu")
        assert status == 0, err
        assert ("54 of 60 rows repeat another: the interval counts a question once" in out) == (path is many)
        scores = json.loads((tmp_path / path.stem / "card.json").read_text())["scores"]["cross_validation"]
        _, low, high = wilson(scores["accuracy"], len(EXAMPLES))
        assert (scores["accuracy_low"], scores["accuracy_high"]) == pytest.approx((low, high))
        widths.append(high - low)
    assert min(widths) > 0.4
    asked = ("--adapter", tmp_path / "many", "--input", many, "--count", 6, "--device", "cpu")
    status, out, _ = call("suggest", *asked)
    lines = [json.loads(line) for line in out.splitlines()]
    assert status == 0 and sorted(line["row"] for line in lines) == list(range(6))


def test_a_diagram_of_a_task_whose_name_holds_dollar_signs(call, adapted, data, tmp_path):
    card = adapted.card.model_copy(update={"task": "cost_$5_and_$9"})
    told = TaskModel(adapted.base, adapted.phi, card).save(tmp_path / "told")
    status, _, err = call("evaluate", "--adapter", told, "--data", data, "--diagram", tmp_path / "d.svg")
    assert status == 0, err
    assert (tmp_path / "d.svg").stat().st_size > 1000


def test_a_row_without_a_text_is_refused(call, run, tmp_path):
    (tmp_path / "rows.csv").write_text("text,label\n,pos\nbad,neg\ngood,pos\nugly,neg\n")
    status, _, err = call("adapt", "--run", run, "--data", tmp_path / "rows.csv", "--out", tmp_path / "out")
    assert status == 2 and "rows.csv:2: the text is empty; remove the row" in err


def test_paths_may_lead_upwards(call, adapter, texts, tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert call("predict", "--adapter", "../adapter", "--input", texts)[0] == 0


def test_two_adapters_of_one_name_are_told_apart(call, adapter, adapted, texts, tmp_path):
    again = adapted.save(tmp_path / "again")
    _, out, _ = call("predict", "--adapter", adapter, "--adapter", again, "--input", texts)
    assert {json.loads(line)["adapter"] for line in out.splitlines()} == {str(adapter), str(again)}


def test_a_file_of_one_label_can_be_scored(call, adapter, tmp_path):
    (tmp_path / "one.jsonl").write_text('{"text": "It was good.", "label": "good"}')
    scores = tmp_path / "scores.json"
    status, _, err = call("evaluate", "--adapter", adapter, "--data", tmp_path / "one.jsonl", "--output", scores)
    assert status == 0, err
    found = json.loads(scores.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert found["n"] == 1 and found["auroc_variance"] is None
    (tmp_path / "other.jsonl").write_text('{"text": "It was odd.", "label": "odd"}')
    status, _, err = call("evaluate", "--adapter", adapter, "--data", tmp_path / "other.jsonl")
    assert status == 2 and "output 'odd' is not among the options ['bad', 'good']" in err


@pytest.mark.parametrize(
    ("command", "arguments", "message"),
    [
        ("adapt", ("--run", "r", "--out", "o"), "one of the arguments --data --tasks is required"),
        ("adapt", ("--run", "r", "--out", "o", "--data", "d", "--folds", "1"), "--folds: 1: must be 0, or at least 2"),
        ("adapt", ("--run", "r", "--out", "o", "--data", "d", "--steps", "0"), "--steps: 0: must be at least 1"),
        ("adapt", ("--run", "r", "--out", "o", "--tasks", "d", "--name", "x"), "--name: goes with --data"),
        ("adapt", ("--run", "r", "--out", "o", "--data", "none.csv"), "none.csv: No such file"),
        ("predict", ("--adapter", "none", "--input", "-"), "--adapter: none: holds no card.json"),
        ("predict", ("--adapter", "a", "--input", "-", "--abstain", "2"), "--abstain: 2.0: is a probability"),
        ("suggest", ("--run", "r", "--input", "-"), "--options: goes with --run"),
        ("suggest", ("--adapter", "a", "--input", "-", "--samples", "1"), "--samples: 0, or at least 2"),
        ("evaluate", ("--adapter", "a", "--data", "d", "--samples", "-3"), "error: --samples: -3: must be 0 or more"),
        ("evaluate", ("--adapter", "a"), "--data: name the labelled file"),
        ("evaluate", ("--adapter", "a", "--data", "d", "eval.samples=2"), "overrides: does not go with --adapter"),
        ("evaluate", ("--run", "r", "--samples", "2"), "samples: does not go with --run"),
    ],
)
def test_mistakes_are_told(call, command, arguments, message):
    status, _, err = call(command, *arguments)
    assert status == 2 and message in err
