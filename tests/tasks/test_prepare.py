"""Preparing tasks, with Parquet files on disk in the place of the hub."""

import json
import os
import runpy
import signal
import subprocess
import sys
from pathlib import Path

import datasets
import pytest

from abmll.config import ConfigError
from abmll.files import MANIFEST, alone_in, publish
from abmll.tasks.catalogue import load_catalogue
from abmll.tasks.jsonl import load_jsonl_tasks
from abmll.tasks.made_from import MADE_FROM, MadeFrom, evaluation_only
from abmll.tasks.prepare import names_of, prepare, report

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Puts rows there, `put(path, name, split=rows, ...)`; `put.asked` lists each (path, name, split) that was read."""
    folder, original, asked = tmp_path / "hub", datasets.load_dataset, []

    def place(path, name):
        return folder / path.replace("/", "+") / (name or "default")

    def put(path, name=None, **splits):
        place(path, name).mkdir(parents=True, exist_ok=True)
        for split, rows in splits.items():
            datasets.Dataset.from_list(rows).to_parquet(place(path, name) / f"{split}.parquet")

    def load_dataset(path, name=None, *, revision=None, data_dir=None, data_files=None, split=None):
        name = data_dir if revision == "refs/convert/parquet" else name  # its folders are the configurations
        asked.append((path, name, split))
        if not place(path, name).is_dir():
            raise ConnectionError(f"Couldn't reach '{path}' on the Hub")
        files = {file.stem: str(file) for file in place(path, name).glob("*.parquet")}
        return original("parquet", data_files=files, split=split)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    put.asked = asked
    return put


def rte(count, start=0, label=1):
    return [{"sentence1": f"One {i}.", "sentence2": f"Two {i}.", "label": label, "idx": i} for i in range(start, count)]


CATALOGUE = load_catalogue()


def written(folder, name):
    lines = {path.stem: path.read_text(encoding="utf-8").splitlines() for path in (folder / name).glob("*.jsonl")}
    return {split: [json.loads(line) for line in found] for split, found in lines.items()}


def run(names, out, catalogue=CATALOGUE, **keys):
    return prepare(names, catalogue, out, progress=False, **keys)


def test_writes_what_the_jsonl_source_reads(hub, tmp_path):
    hub("nyu-mll/glue", "rte", train=rte(4), validation=rte(6, start=4, label=0), test=rte(1, label=-1))
    choices = {"text": ["α", "b"], "label": ["A", "B"]}
    quartz = {"id": "x", "question": "Q", "choices": choices, "answerKey": "A", "para": "P"}
    hub("allenai/quartz", train=[quartz] * 3, validation=[quartz] * 2, test=[quartz])
    outcomes = run(["glue-rte", "quartz-no_knowledge"], tmp_path / "out")
    assert [(done.rows, done.left_out, done.failure) for done in outcomes] == [
        ("4 / 0 / 2", 0, ""),
        ("3 / 2 / 1", 0, ""),
    ]
    assert written(tmp_path / "out", "glue-rte")["test"][0] == {
        "task": "glue-rte",
        "input": "sentence 1: One 4. [SEP] sentence 2: Two 4.",
        "output": "entailment",
        "options": ["entailment", "not_entailment"],
    }
    tasks = load_jsonl_tasks(tmp_path / "out", ["glue-rte", "quartz-no_knowledge"]).tasks
    assert [len(tasks["quartz-no_knowledge"].__dict__[split]) for split in ("train", "validation", "test")] == [3, 2, 1]
    assert tasks["quartz-no_knowledge"].test[0].output == "α"


def test_what_is_there_is_skipped_and_the_hub_is_not_asked(hub, tmp_path):
    hub("nyu-mll/glue", "rte", train=rte(4), validation=rte(2))
    run(["glue-rte"], tmp_path)
    hub.asked.clear()
    (again,) = run(["glue-rte"], tmp_path)
    assert (again.rows, again.failure, hub.asked) == ("is there", "", [])


def test_one_failure_does_not_stop_the_others(hub, tmp_path):
    hub("nyu-mll/glue", "rte", train=rte(4), validation=rte(2))
    hub("nyu-mll/glue", "wnli", train=[{"sentence1": "One.", "label": 1}])
    sick = [{"sentence_A": "a", "sentence_B": "b", "label": 7}]
    hub("RobZamp/sick", train=sick, validation=sick, test=sick)
    names = ["glue-cola", "glue-wnli", "sick", "glue-rtee", "glue-rte"]
    out = tmp_path / "out"
    outcomes = {done.task: done.failure for done in run(names, out)}
    assert outcomes["glue-cola"].count("Couldn't reach 'nyu-mll/glue'") == 1  # not once for each split
    assert "no way to the hub: run it where there is a network" in outcomes["glue-cola"]
    assert outcomes["glue-wnli"].startswith("glue-wnli.input: no column 'sentence2'; the columns are sentence1, label")
    assert "sick: split train, row 0: label: 7: not among labels [2, 0, 1]" in outcomes["sick"]
    assert "no entry in the catalogue; similar names there: glue-rte" in outcomes["glue-rtee"]
    assert outcomes["glue-rte"] == ""
    assert sorted(path.name for path in out.iterdir()) == [".lock", "glue-rte"]  # nothing partial


def test_report_tells_rows_and_why_not(hub, tmp_path):
    hub("nyu-mll/glue", "rte", train=rte(1200), validation=rte(2))
    text = report(run(["glue-rte", "glue-cola"], tmp_path))
    assert "glue-rte   1,200 / 0 / 2" in text
    assert "glue-cola  FAILED" in text
    assert "1 of 2 tasks are there" in text
    assert text.splitlines()[-1].startswith("glue-cola: nyu-mll/glue, split train: Couldn't reach")


def test_rows_left_out_are_counted(hub, tmp_path):
    rows = [{"verse_text": f"verse {i}", "label": i % 4} for i in range(12)]
    hub("google-research-datasets/poem_sentiment", train=rows, validation=rows[:4], test=rows[:3])
    (done,) = run(["poem_sentiment"], tmp_path)
    assert (done.rows, done.left_out) == ("9 / 3 / 3", 3 + 1)


def test_rows_that_cannot_be_used_are_told(hub, tmp_path):
    odd = {"sentence1": None, "sentence2": "Two.", "label": 1, "idx": 0}
    hub("nyu-mll/glue", "rte", train=[*rte(150), odd], validation=rte(2))
    (done,) = run(["glue-rte"], tmp_path)
    assert (done.rows, done.left_out, done.failure) == ("150 / 0 / 2", 1, "")
    told = (
        "note: 1 of 151 rows cannot be used and are left out, the first: glue-rte: split train, row 150: the template"
    )
    assert told in report([done])


def test_holdout_keeps_pairs_together_and_its_size(hub, tmp_path):
    rows = [{"question_1": f"q{i // 2}", "question_2": f"r{i}", "label": i % 2} for i in range(100)]
    hub("curaihealth/medical_questions_pairs", train=rows)
    run(["medical_questions_pairs"], tmp_path / "a")
    run(["medical_questions_pairs"], tmp_path / "b", seed=1)
    made = {out: written(tmp_path / out, "medical_questions_pairs") for out in ("a", "b")}
    questions = {split: {row["input"].split(" [SEP]")[0] for row in made["a"][split]} for split in ("train", "test")}
    assert (len(made["a"]["train"]), len(made["a"]["test"])) == (80, 20)
    assert not questions["train"] & questions["test"]
    assert len(questions["test"]) == 10
    assert made["a"]["test"] != made["b"]["test"]


def test_the_ethos_tasks_set_aside_the_same_comments_and_repeated_ones_stay_together(hub, tmp_path):
    keys = ("directed_vs_generalized", "disability", "gender", "national_origin", "race", "religion")
    rows = [{"text": f"c{i % 45}", **{key: (i + n) % 2 for n, key in enumerate(keys)}} for i in range(50)]
    hub("iamollas/ethos", "multilabel", train=rows)
    names = ["ethos-race", "ethos-gender"]
    run(names, tmp_path)
    sides = [
        {split: [row["input"] for row in rows] for split, rows in written(tmp_path, name).items()} for name in names
    ]
    assert sides[0] == sides[1]
    assert len(set(sides[0]["test"])) == 9
    assert not set(sides[0]["test"]) & set(sides[0]["train"])


def test_rows_that_show_shuffled_options_stay_together(hub, tmp_path):
    """Every pair of sentences twice: each row shows its options in an order of its own, and asks the same."""
    pairs = [{"sent_more": f"more {i % 30}", "sent_less": f"less {i % 30}"} for i in range(60)]
    rows = [{**pair, "stereo_antistereo": 0, "bias_type": 0, "id": i} for i, pair in enumerate(pairs)]
    hub("nyu-mll/crows_pairs", test=rows)
    run(["crows_pairs"], tmp_path)
    found = written(tmp_path, "crows_pairs")
    questions = {
        split: {tuple(sorted(number for number in row["input"].split() if number.isdigit())) for row in rows}
        for split, rows in found.items()
    }
    assert len({row["input"] for split in found.values() for row in split}) > 30, "in different orders"
    assert questions["test"] and not questions["train"] & questions["test"]


def test_a_question_that_all_rows_share_is_set_aside_by_its_options(hub, tmp_path):
    """As in ChemBench's preferences; the order of the options makes no other question."""
    scores = [{f"C{i}": 1, f"N{i}": 0} for i in range(20)] + [{f"N{i}": 0, f"C{i}": 1} for i in range(20)]
    rows = [{"examples": [{"input": "Which is better?", "target_scores": json.dumps(of_row)}]} for of_row in scores]
    hub("jablonkagroup/ChemBench", "chemical_preference", train=rows)
    (done,) = run(["chembench-chemical_preference"], tmp_path)
    assert (done.rows, done.failure) == ("8 / 0 / 32", "")
    made = written(tmp_path, "chembench-chemical_preference")
    train, test = ({frozenset(row["options"]) for row in made[split]} for split in ("train", "test"))
    assert (len(train), len(test)) == (4, 16) and not train & test
    assert evaluation_only(tmp_path / "chembench-chemical_preference")


def test_most_examples_are_drawn_by_the_seed_in_their_order(hub, tmp_path):
    hub("nyu-mll/glue", "rte", train=rte(50), validation=rte(60, start=50))
    drawn = {}
    for seed in (0, 1):
        run(["glue-rte"], tmp_path / str(seed), seed=seed, max_examples=5)
        found = written(tmp_path / str(seed), "glue-rte")
        drawn[seed] = [int(row["input"].split()[3][:-1]) for row in found["train"]]
        assert (len(found["train"]), len(found["test"])) == (5, 5)
        assert drawn[seed] == sorted(drawn[seed])
    assert drawn[0] != drawn[1]


def test_other_settings_are_refused_and_a_damaged_folder_is_made_again(hub, tmp_path):
    hub("nyu-mll/glue", "rte", train=rte(4), validation=rte(2))
    run(["glue-rte"], tmp_path)
    (other,) = run(["glue-rte"], tmp_path, seed=3, max_examples=2)
    assert "was made with another seed, max_examples; remove it, or name another folder with --out" in other.failure
    changed = {"glue-rte": CATALOGUE["glue-rte"].model_copy(update={"input": "{sentence1}"})}
    assert "another entry" in run(["glue-rte"], tmp_path, catalogue=changed)[0].failure
    (tmp_path / "glue-rte/test.jsonl").write_text("")
    assert run(["glue-rte"], tmp_path)[0].rows == "4 / 0 / 2"
    assert len(written(tmp_path, "glue-rte")["test"]) == 2
    assert json.loads((tmp_path / "glue-rte" / MADE_FROM).read_text())["entry"]["path"] == "nyu-mll/glue"


def test_a_folder_that_somebody_made_is_left_alone(hub, tmp_path):
    (tmp_path / "glue-rte").mkdir()
    (tmp_path / "glue-rte/train.jsonl").write_text("mine")
    assert run(["glue-rte"], tmp_path)[0].rows == "is there, made by hand"
    assert (tmp_path / "glue-rte/train.jsonl").read_text() == "mine"


def test_an_empty_folder_is_no_task_and_what_is_no_task_is_not_removed(hub, tmp_path):
    hub("nyu-mll/glue", "rte", train=rte(4), validation=rte(2))
    for name in ("a", "b", "c"):
        (tmp_path / name / "glue-rte").mkdir(parents=True)
    (tmp_path / "b/glue-rte/notes.txt").write_text("mine")
    (tmp_path / "c/glue-rte/glue-rte_16_100_train.jsonl").write_text("as MetaICL names it")
    assert run(["glue-rte"], tmp_path / "a")[0].rows == "4 / 0 / 2"
    assert (
        "holds no train.jsonl, but what this command did not write; move it"
        in run(["glue-rte"], tmp_path / "b")[0].failure
    )
    assert (tmp_path / "b/glue-rte/notes.txt").read_text() == "mine"
    assert run(["glue-rte"], tmp_path / "c")[0].rows == "is there, made by hand"


def test_a_folder_made_before_an_entry_could_have_a_key_is_taken(hub, tmp_path):
    hub("nyu-mll/glue", "rte", train=rte(4), validation=rte(2))
    run(["glue-rte"], tmp_path)
    path = tmp_path / "glue-rte" / MADE_FROM

    def seal(**keys):
        record = json.loads(path.read_text())
        record["entry"] = {key: value for key, value in (record["entry"] | keys).items() if key != "evaluation_only"}
        path.write_text(json.dumps(record))
        path.with_name(MANIFEST).unlink()
        publish(tmp_path / "glue-rte", tmp_path / "sealed")
        (tmp_path / "sealed").rename(tmp_path / "glue-rte")

    seal()
    assert run(["glue-rte"], tmp_path)[0].rows == "is there"
    kept = {"glue-rte": CATALOGUE["glue-rte"].model_copy(update={"evaluation_only": True})}
    assert "was made with another entry" in run(["glue-rte"], tmp_path, catalogue=kept)[0].failure
    seal(a_key_that_is_gone=1)
    assert "was made with another entry" in run(["glue-rte"], tmp_path)[0].failure


@pytest.mark.parametrize("name", CATALOGUE)
def test_every_entry_is_itself_when_it_is_read_again(name, tmp_path):
    made_from = MadeFrom(CATALOGUE[name], 0, None)
    (tmp_path / MADE_FROM).write_text(json.dumps(made_from.to_json()))
    assert made_from.differs(tmp_path) == []


CHILD = """
import sys
from pathlib import Path
import datasets
from abmll.config.schema import HubTask
from abmll.tasks import prepare
out, rows = Path(sys.argv[1]), sys.argv[2]
task = HubTask(path="json", data_files=rows, test_split="train", input="{q}", label="a", options=("no", "yes"))
publish = prepare.publish
def slow(partial, final):
    if final.name == "two" and "--stop" in sys.argv:
        print("ready", flush=True)
        sys.stdin.read()  # files are written, the folder has not its name yet
    publish(partial, final)
prepare.publish = slow
print([done.rows for done in prepare.prepare(["one", "two"], {"one": task, "two": task}, out, progress=False)])
"""


def test_killed_between_writing_and_naming_it_goes_on(tmp_path, write_rows):
    rows = write_rows(tmp_path / "rows.json", [{"q": f"q{i}", "a": i % 2} for i in range(6)])
    out = tmp_path / "out"
    environment = {**os.environ, "HF_DATASETS_CACHE": str(tmp_path / "cache")}
    command = [sys.executable, "-c", CHILD, str(out), str(rows)]
    child = subprocess.Popen(
        [*command, "--stop"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    )
    assert child.stdout.readline() == "ready\n"
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert sorted(path.name for path in out.iterdir()) == [".lock", ".partial-two", "one"]
    before = (out / "one/train.jsonl").stat().st_mtime_ns
    again = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment, check=True)
    assert again.stdout == "['is there', '6 / 0 / 6']\n"
    assert sorted(path.name for path in out.iterdir()) == [".lock", "one", "two"]
    assert (out / "one/train.jsonl").stat().st_mtime_ns == before


# the command


def test_names_of_a_list_a_file_and_a_command(tmp_path):
    (tmp_path / "mine.yaml").write_text("train: [a, b]\ntest: [c, a]\n")
    assert names_of("mine", tmp_path) == ("a", "b", "c")
    assert names_of(str(tmp_path / "mine.yaml"), Path("nowhere")) == ("a", "b", "c")
    assert names_of("x, y,x,", tmp_path) == ("x", "y")
    with pytest.raises(ConfigError, match=r"--tasks: ' ,': names no task"):
        names_of(" ,", tmp_path)
    with pytest.raises(ConfigError, match=r"--tasks: mine: is a list; name it alone"):
        names_of("x,mine", tmp_path)
    with pytest.raises(ConfigError, match=r"gone\.yaml: cannot be read"):
        names_of("gone.yaml", tmp_path)
    (tmp_path / "run.yaml").write_text("model: {}\n")
    with pytest.raises(ConfigError, match="holds no list of tasks"):
        names_of(str(tmp_path / "run.yaml"), tmp_path)


@pytest.fixture
def command(monkeypatch):
    def command(*arguments):
        monkeypatch.setattr(sys, "argv", ["prepare.py", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(ROOT / "launch/prepare.py"), run_name="__main__")
        return ended.value.code

    return command


def test_two_commands_do_not_sweep_away_what_the_other_has_begun(command, hub, tmp_path, capsys):
    hub("nyu-mll/glue", "rte", train=rte(9), validation=rte(2))
    (tmp_path / ".partial-sick").mkdir()
    with alone_in(tmp_path):
        assert command("--tasks", "glue-rte", "--out", tmp_path) == 2
        assert f"error: {tmp_path}: another process is at work in it; wait for it, or name" in capsys.readouterr().err
        assert (tmp_path / ".partial-sick").is_dir() and not hub.asked
    assert command("--tasks", "glue-rte", "--out", tmp_path) == 0
    assert not (tmp_path / ".partial-sick").exists()


@pytest.mark.parametrize("out", ["file", "file/in", "/proc", "/proc/x"])
def test_a_folder_that_cannot_be_written_in_is_one_line(command, hub, tmp_path, monkeypatch, capsys, out):
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("mine")
    assert command("--tasks", "glue-rte", "--out", out) == 2
    assert capsys.readouterr().err.startswith(f"error: --out: {out}: ") and not hub.asked
    assert Path("file").read_text() == "mine"


def test_status_of_the_command(command, hub, tmp_path, capsys):
    hub("nyu-mll/glue", "rte", train=rte(9), validation=rte(2))
    assert command("--tasks", "glue-rte,glue-cola", "--out", tmp_path / "out", "--max-examples", 3) == 1
    printed = capsys.readouterr().out
    assert "3 / 0 / 2" in printed
    assert "1 of 2 tasks are there\n\nglue-cola: nyu-mll/glue, split train: Couldn't reach" in printed
    own = tmp_path / "own.yaml"
    own.write_text(
        "tasks:\n  mine: {path: nyu-mll/glue, name: rte, input: '{sentence1}', label: label, options: [x, y]}\n"
    )
    hub("nyu-mll/glue", "rte", train=rte(9), test=rte(2))
    assert command("--tasks", "mine", "--out", tmp_path / "out", "--catalogue", own) == 0
    assert command("--tasks", "mine", "--out", tmp_path / "out", "--catalogue", tmp_path / "gone.yaml") == 2
    assert command("--tasks", "mine", "--max-examples", 1) == 2
    assert "gone.yaml: cannot be read" in capsys.readouterr().err
