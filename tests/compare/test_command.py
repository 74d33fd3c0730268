"""The command as it is typed: killed half-way it continues, and ends with the tables of one that was left alone."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from abmll.compare.command import compare
from abmll.compare.grid import jobs
from abmll.compare.load import load_comparison
from abmll.config import ConfigError, Refused, load_config, save_config, with_absolute_paths

ROOT = Path(__file__).parents[2]
TEXT = f"""
name: some
config: {ROOT}/configs/tiny.yaml
output: OUT
overrides: {{trainer.episodes: 6, trainer.checkpoint_every: 1, tasks.builtin.test_tasks: 3}}
methods: {{lora: {{method.name: lora}}, abmll: {{}}}}
scores: {{samples-2: {{methods: [abmll], eval.samples: 2}}}}
baselines: [lora]
"""


def command(folder: Path, *arguments: str) -> list[str]:
    file = folder.with_suffix(".yaml")
    file.write_text(TEXT.replace("OUT", str(folder)))
    return [sys.executable, str(ROOT / "launch/compare.py"), "--config", str(file), "--workers", "1", *arguments]


def call(*arguments: str, **options) -> subprocess.CompletedProcess:
    return subprocess.run(arguments, capture_output=True, text=True, timeout=800, **options)


@pytest.mark.timeout(2000)
def test_killed_half_way_it_ends_with_the_same_tables(tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    found = call(*command(whole))
    assert found.returncode == 0, found.stderr
    assert "default/seed-0: done after" in found.stdout

    process = subprocess.Popen(command(killed), start_new_session=True, stdout=subprocess.DEVNULL)
    half_way = killed / "model/tasks/abmll/default/seed-0/checkpoints"
    deadline = time.monotonic() + 600
    while not list(half_way.glob("step-*")):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGTERM)
    assert process.wait(180) == 128 + signal.SIGTERM
    lora = killed / "model/tasks/lora/default/seed-0/final/summary.json"
    before = lora.stat().st_mtime_ns
    assert not list(killed.rglob("report.md"))

    found = call(*command(killed))
    assert found.returncode == 0, found.stderr
    assert lora.stat().st_mtime_ns == before
    assert "resumed from" in (half_way.parent / "compare.log").read_text()
    one, other = (folder / "comparisons/some" for folder in (whole, killed))
    tables = sorted(path.name for path in (one / "tables").iterdir())
    assert {"summary.md", "against_baseline.csv", "costs.md", "sweep_samples.md"} <= set(tables)
    for name in tables:
        if not name.startswith("costs"):  # times differ
            assert (other / "tables" / name).read_text() == (one / "tables" / name).read_text(), name
    plots = sorted(path.name for path in (one / "plots").iterdir())
    assert plots and plots == sorted(path.name for path in (other / "plots").iterdir())
    assert "## Summary" in (other / "report.md").read_text()

    listed = call(*command(killed, "--list"))
    assert listed.stdout.count("finished") == 2


def test_mistakes_are_told_before_anything_runs(tmp_path):
    found = call(*command(tmp_path / "out", "method.nam=x"))
    assert found.returncode == 2 and "method.nam" in found.stderr and not (tmp_path / "out").exists()
    found = call(*command(tmp_path / "out", "--analysis"))
    assert found.returncode == 2 and "holds no comparison.json; run the comparison first" in found.stderr


FAILING = "import sys; sys.exit('it is broken')"


@pytest.fixture
def stand_in(tmp_path):
    """compare() with a train.py of its own, which by default fails."""

    def stand_in(*overrides: str, train: str = FAILING, only: str | None = None, text: str = TEXT) -> int:
        (tmp_path / "train.py").write_text(train)
        (tmp_path / "some.yaml").write_text(text.replace("OUT", str(tmp_path / "out")))
        return compare(str(tmp_path / "some.yaml"), list(overrides), tmp_path, 1, 1, only)

    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    yield stand_in
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.mark.parametrize(
    ("send", "number"), [(os.kill, signal.SIGTERM), (os.killpg, signal.SIGTERM), (os.killpg, signal.SIGHUP)]
)
def test_a_signal_stops_the_runs(send, number, tmp_path):
    """To the command, and to its group, as service managers and a closed terminal send it."""
    with started(tmp_path) as (process, run):
        send(process.pid, number)
        assert process.wait(180) == 128 + number
        with pytest.raises(ProcessLookupError):
            os.kill(run, 0)


def test_under_nohup_a_closed_terminal_stops_nothing(tmp_path):
    with started(tmp_path, lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN)) as (process, run):
        process.send_signal(signal.SIGHUP)
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(1)
        os.kill(run, 0)


@contextmanager
def started(folder: Path, before=None) -> Iterator[tuple[subprocess.Popen, int]]:
    """The command with a train.py that lasts, once that runs, and its process's number."""
    (folder / "train.py").write_text(
        f"import os, pathlib, time; path = pathlib.Path({str(folder)!r}) / 'number'\n"
        "path.with_suffix('.new').write_text(str(os.getpid())); path.with_suffix('.new').rename(path); time.sleep(999)"
    )
    (folder / "some.yaml").write_text(TEXT.replace("OUT", str(folder / "out")))
    code = "import sys; from pathlib import Path; from abmll.compare.command import compare; at = Path(sys.argv[1])\n"
    code += "compare(str(at / 'some.yaml'), [], at, 1, 1)"
    command = [sys.executable, "-c", code, str(folder)]
    process = subprocess.Popen(command, preexec_fn=before, start_new_session=True)
    try:
        deadline = time.monotonic() + 300
        while not (folder / "number").exists():
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.05)
        yield process, int((folder / "number").read_text())
    finally:
        process.terminate()
        process.wait(60)


def test_where_all_runs_fail_the_reasons_are_told(stand_in, tmp_path, capsys):
    with pytest.raises(Refused, match="none of its runs is finished"):
        stand_in()
    told = capsys.readouterr()
    assert told.out.count("failed after") == told.out.count("\nit is broken") == 2
    assert told.err.count("failed: model/tasks/") == told.err.count("exit status 1: ") == 2
    with pytest.raises(Refused, match="none of its runs is finished"):
        stand_in(only="analysis")


def with_files(folder: Path, *present: str) -> str:
    """A comparison of runs that train on task a and are scored on b; only those named are there."""
    for name in present:
        (folder / "tasks" / name).mkdir(parents=True)
    tasks = f"tasks.folder: {folder}/tasks, tasks.train: [a], tasks.test: [b]"
    return TEXT.replace("tiny.yaml", "cls23.yaml").replace("tasks.builtin.test_tasks: 3", tasks)


@pytest.mark.parametrize(
    ("present", "more", "told"),
    [
        ("", "", r"tasks\.folder: .*/tasks: no such folder"),
        ("a", "", r"1 listed tasks are not there: b; prepare them, .*or set tasks.missing=warn"),
        ("ab", "tune: {tasks: [c], grid: {all: {method.outer_lr: [1e-4, 1e-3]}}}", "are not there: c;"),
        ("ab", "settings: {other: {tasks.test: [d]}}", "are not there: d;"),
    ],
)
def test_tasks_are_looked_for_before_the_first_run(present, more, told, stand_in, tmp_path):
    text = with_files(tmp_path, *present)
    with pytest.raises(Refused, match=told):
        stand_in(text=f"{text}{more}\n")
    scored = text.replace("samples-2", "elsewhere").replace("eval.samples: 2", "tasks.test: [e]")
    if present == "ab":
        with pytest.raises(Refused, match="are not there: e;"):
            stand_in(text=scored)
    assert not (tmp_path / "out").exists()
    assert stand_in(text=text, only="list") == 0


def test_failed_tries_start_no_runs(stand_in, tmp_path, capsys):
    text = with_files(tmp_path, "a", "b", "c")
    tune = "tune: {tasks: [c], grid: {lora: {method.outer_lr: [1e-4, 1e-3]}, abmll: {}}}\n"
    assert stand_in(text=text + tune) == 1
    told = capsys.readouterr()
    assert told.err.count("failed: tuning/model/tasks/lora/try-") == 2 and "nothing is chosen" in told.err
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"tuning", "comparisons"}
    assert list((tmp_path / "out/comparisons/some").iterdir()) == []


TRIED = """
import json, sys
from pathlib import Path
folder = Path(next(a for a in sys.argv if a.startswith("output=")).removeprefix("output="))
(folder / "final").mkdir(parents=True)
(folder / "scores.json").write_text(json.dumps([{"overall": {"5": {"nll_options": 1.0}}}]))
(folder / "final/summary.json").write_text('{"scores": []}')
"""


def test_comparisons_of_one_output_keep_their_choices_apart(stand_in, tmp_path):
    text = with_files(tmp_path, "a", "b", "c").replace("scores: {samples", "scores: {} #")
    for name, rates in (("some", "[1e-4, 1e-3]"), ("other", "[1e-4, 1e-3, 1e-2]")):
        tune = f"tune: {{tasks: [c], grid: {{lora: {{method.outer_lr: {rates}}}, abmll: {{}}}}}}\n"
        with pytest.raises(Refused, match="none of its runs is finished"):  # there are no predictions
            stand_in(text=text.replace("name: some", f"name: {name}") + tune, train=TRIED)
    tried = [json.loads((tmp_path / f"out/comparisons/{n}/tuning.json").read_text())[0] for n in ("some", "other")]
    assert [len(one["tried"]) for one in tried] == [2, 3]


def test_choices_go_with_the_runs_that_were_made_with_them(stand_in, tmp_path):
    """Another choice than that of the folder's runs is refused and not written; a file that tunes no more has none."""
    text = with_files(tmp_path, "a", "b", "c").replace("scores: {samples", "scores: {} #")
    chosen = tmp_path / "out/comparisons/some/tuning.json"
    tune = "tune: {tasks: [c], grid: {lora: {method.outer_lr: [1e-4, 1e-3]}, abmll: {}}}\n"
    with pytest.raises(Refused, match="none of its runs is finished"):
        stand_in(text=text + tune, train=TRIED)
    before = chosen.read_text()
    (tmp_path / "some.yaml").write_text(text)
    comparison = load_comparison(tmp_path / "some.yaml")
    lora = jobs(comparison, {}, ())[0]
    another_runs(comparison.config, tmp_path / "out" / lora.folder, *lora.overrides, "method.outer_lr=1e-3")
    with pytest.raises(Refused, match=r"holds another run: method\.outer_lr: 0\.001 there, 0\.0001 now"):
        stand_in(text=text + tune, train=TRIED)
    assert chosen.read_text() == before
    another_runs(comparison.config, tmp_path / "out" / lora.folder, *lora.overrides)
    with pytest.raises(Refused, match="none of its runs is finished"):
        stand_in(text=text, train=TRIED)
    assert not chosen.exists()


def test_the_analysis_is_of_what_the_file_says_now(stand_in, tmp_path):
    text = with_files(tmp_path, "a", "b")
    for baseline, only in (("lora", None), ("abmll", "analysis")):
        with pytest.raises(Refused, match="none of its runs is finished"):
            stand_in(text=text.replace("baselines: [lora]", f"baselines: [{baseline}]"), only=only)
        index = json.loads((tmp_path / "out/comparisons/some/comparison.json").read_text())
        assert index["baselines"] == [baseline]


def another_runs(config: str, place: Path, *overrides: str) -> None:
    """What a run with these overrides leaves in its folder."""
    found = load_config(config, [*overrides, f"output={place}", "logging.progress_bar=false"])
    save_config(with_absolute_paths(found, config), place / "config.yaml")


def test_another_runs_folder_is_refused_before_the_tries_and_before_the_index(stand_in, tmp_path, capsys):
    text = with_files(tmp_path, "a", "b", "c")
    tune = "tune: {tasks: [c], grid: {lora: {method.outer_lr: [1e-4, 1e-3]}, abmll: {}}}\n"
    (tmp_path / "some.yaml").write_text(text)
    comparison = load_comparison(tmp_path / "some.yaml")
    lora = jobs(comparison, {}, ())[0]
    place = tmp_path / "out" / lora.folder
    another_runs(comparison.config, place, *lora.overrides, "method.outer_lr=1e-4", "trainer.episodes=7")
    for more in (tune, ""):
        with pytest.raises(Refused, match=r"holds another run: .*trainer\.episodes: 7 there, 6 now"):
            stand_in(text=text + more)
        capsys.readouterr()
        assert stand_in(text=text + more, only="list") == 0
        first, *others = capsys.readouterr().out.splitlines()
        assert "refused: " in first and "trainer.episodes: 7 there, 6 now" in first
        assert not any("refused" in line for line in others)
        assert not list((tmp_path / "out").rglob("compare.log"))
        assert not list((tmp_path / "out").rglob("comparison.json"))
    another_runs(comparison.config, place, *lora.overrides, "method.outer_lr=1e-4")
    assert stand_in(text=text + tune) == 1  # that its value is yet to be chosen is no other run: the tries start
    assert len(list((tmp_path / "out").rglob("compare.log"))) == 2


def test_the_command_names_another_output(stand_in, tmp_path):
    with pytest.raises(Refused, match=f"{tmp_path}/other/comparisons/some: none of its runs is finished"):
        stand_in(f"output={tmp_path}/other")
    assert not (tmp_path / "out").exists()
    assert "output=" not in (tmp_path / "other/comparisons/some/comparison.json").read_text()
    with pytest.raises(ConfigError, match=r"override: output=3: 3: must be text; name the comparison's folder"):
        stand_in("output=3")


def test_an_output_that_is_no_folder_is_refused(stand_in, tmp_path):
    (tmp_path / "out").touch()
    with pytest.raises(Refused, match=r"output: .*/out/comparisons/some: cannot be made .*; set another output"):
        stand_in()
