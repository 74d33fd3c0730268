"""The runner with commands that take no time: what is skipped, what is continued, what a failure stops."""

from __future__ import annotations

import dataclasses
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from abmll.compare.grid import jobs
from abmll.compare.load import load_comparison
from abmll.compare.runner import Runner
from abmll.config import Refused, load_config, save_config, with_absolute_paths

CONFIG = Path(__file__).parents[2] / "configs/tiny.yaml"
# A stand-in for train.py: notes its call, fails where it is told to, and leaves what a run leaves.
TRAIN = """
import json, os, sys, time
from pathlib import Path
folder = Path(next(a for a in sys.argv if a.startswith("output=")).removeprefix("output="))
seed = next(a for a in sys.argv if a.startswith("seed="))
(folder / "pid").write_text(str(os.getpid()))
with open({calls!r}, "a") as calls:
    calls.write(f"train {{folder.parts[-3]}} {{seed}} {{os.environ['OMP_NUM_THREADS']}}\\n")
if Path({broken!r}).exists() and "lora" in str(folder):
    sys.exit("it is broken")
if Path({slow!r}).exists():
    time.sleep(60)
(folder / "final").mkdir(parents=True, exist_ok=True)
(folder / "final/summary.json").write_text(json.dumps({{"scores": []}}))
"""
EVALUATE = """
import sys
from pathlib import Path
with open({calls!r}, "a") as calls:
    calls.write("evaluate\\n")
folder = Path(sys.argv[sys.argv.index("--run") + 1]) / "scores/steps-1"
folder.mkdir(parents=True)
(folder / "settings.json").write_text('{{"method.test_steps": 1}}')
(folder / "scores.json").write_text("[]")
"""
TEXT = f"""
name: some
config: {CONFIG}
output: out
methods: {{lora: {{method.name: lora}}, abmll: {{}}}}
seeds: [0, 1]
scores: {{steps-1: {{methods: [abmll], method.test_steps: 1}}}}
"""


class Bench:
    def __init__(self, folder: Path):
        self.folder, self.calls_file = folder, folder / "calls"
        self.broken, self.slow, self.said = folder / "broken", folder / "slow", []
        places = {"calls": str(self.calls_file), "broken": str(self.broken), "slow": str(self.slow)}
        for name, text in (("train.py", TRAIN), ("evaluate.py", EVALUATE)):
            (folder / name).write_text(text.format(**places))
        (folder / "comparison.yaml").write_text(TEXT)
        self.jobs = jobs(load_comparison(folder / "comparison.yaml"), {}, ())

    def runner(self) -> Runner:
        return Runner(str(CONFIG), self.folder / "out", self.folder, workers=2, say=self.said.append)

    def calls(self) -> list[str]:
        """Since they were last asked for."""
        found = self.calls_file.read_text().splitlines() if self.calls_file.exists() else []
        self.calls_file.unlink(missing_ok=True)
        return sorted(found)


@pytest.fixture
def bench(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    return Bench(tmp_path)


def test_finished_runs_and_scores_are_not_made_again(bench):
    assert [outcome.problem for outcome in bench.runner().run(bench.jobs)] == [None] * 4
    everything = [*(["evaluate"] * 2), *(f"train {m} seed={s} 7" for m in ("abmll", "lora") for s in (0, 1))]
    assert bench.calls() == sorted(everything)
    bench.runner().run(bench.jobs)
    assert bench.calls() == []
    shutil.rmtree(bench.folder / "out" / bench.jobs[1].folder / "scores")
    bench.runner().run(bench.jobs)
    assert bench.calls() == ["evaluate"]


def test_scores_under_other_overrides_are_refused(bench):
    bench.runner().run(bench.jobs)
    (bench.folder / "comparison.yaml").write_text(
        TEXT.replace("method.test_steps: 1", "method.test_steps: 1, eval.max_examples: 3")
    )
    changed = jobs(load_comparison(bench.folder / "comparison.yaml"), {}, ())
    with pytest.raises(Refused, match=r"scores/steps-1: holds scores under \{'method.test_steps': 1\}, not .*3\}"):
        bench.runner().run(changed)


def test_scores_with_overrides_of_a_command_are_refused(bench):
    """launch/evaluate.py may have made them, with settings that the comparison's file does not have."""
    bench.runner().run(bench.jobs)
    scores = bench.folder / "out" / bench.jobs[1].folder / "scores/steps-1"
    made_with = {"theta": "abc", "overrides": ["eval.max_examples=5"]}
    (scores / "made_with.json").write_text(json.dumps({**made_with, "overrides": []}))
    bench.runner().run(bench.jobs)
    (scores / "made_with.json").write_text(json.dumps(made_with))
    with pytest.raises(Refused, match=r"scores/steps-1: holds scores with .* eval\.max_examples=5 and not none"):
        bench.runner().run(bench.jobs)


def test_a_run_of_another_number_of_ranks_is_another_run(bench):
    """Its outer steps have another number of episodes."""
    job = bench.jobs[1]
    place = bench.folder / "out" / job.folder
    one = Runner(str(CONFIG), bench.folder / "out", bench.folder, workers=1)
    two = Runner(str(CONFIG), bench.folder / "out", bench.folder, workers=1, ranks=2)
    for made, other, told in ((one, two, "null there, 2 now"), (two, one, "2 there, null now")):
        found = load_config(CONFIG, made._overrides(job))
        save_config(with_absolute_paths(found, CONFIG), place / "config.yaml")
        made.check(job)
        with pytest.raises(Refused, match=rf"holds another run: trainer\.tasks_per_step: {told}"):
            other.check(job)


def test_a_folder_in_which_another_process_works_is_left_alone(bench):
    folder = bench.folder / "out" / bench.jobs[0].folder
    folder.mkdir(parents=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        first, *others = bench.runner().run(bench.jobs)
    assert "another process is at work" in first.problem and not any(other.problem for other in others)
    assert not any(outcome.problem for outcome in bench.runner().run(bench.jobs))


def test_a_run_says_where_it_was_made(bench):
    bench.runner().run(bench.jobs)
    for job in bench.jobs:
        made = json.loads((bench.folder / "out" / job.folder / "provenance.json").read_text())
        assert made["versions"]["torch"] and "commit" in made


def test_a_failure_is_told_with_its_logs_end_and_stops_no_other(bench):
    bench.broken.touch()
    outcomes = bench.runner().run(bench.jobs)
    assert [bool(outcome.problem) for outcome in outcomes] == [True, False, True, False]
    assert "it is broken" in outcomes[0].problem and "exit status 1" in outcomes[0].problem
    told = [line for line in bench.said if "failed after" in line]
    assert len(told) == 2 and all("it is broken" in line for line in told)
    bench.broken.unlink()
    bench.calls()
    assert not any(outcome.problem for outcome in bench.runner().run(bench.jobs))
    assert bench.calls() == ["train lora seed=0 7", "train lora seed=1 7"]


def test_commands_that_leave_no_scores_have_failed(bench):
    (bench.folder / "train.py").write_text("")
    assert all("not all of its scores are there" in outcome.problem for outcome in bench.runner().run(bench.jobs[:1]))


def test_what_a_folder_does_not_allow_stops_no_other_run(bench):
    lora, abmll = (bench.folder / "out" / job.folder for job in bench.jobs[:2])
    for place in (lora, abmll / "lock"):
        place.mkdir(parents=True)
    lora.rmdir()
    lora.touch()  # a file in the place of a folder; a folder in the place of the lock
    outcomes = bench.runner().run(bench.jobs)
    assert [bool(outcome.problem) for outcome in outcomes] == [True, True, False, False]
    for place, outcome in zip((lora, abmll), outcomes, strict=False):
        assert str(place) in outcome.problem and "set another output" in outcome.problem


def test_a_folder_of_another_run_is_refused(bench):
    job = bench.jobs[0]
    place = bench.folder / "out" / job.folder
    wanted = load_config(CONFIG, [*job.overrides, f"output={place}", "logging.progress_bar=false"])
    save_config(with_absolute_paths(wanted, CONFIG), place / "config.yaml")
    bench.runner().check(job)
    unread = wanted.eval.model_copy(update={"select_by": "nll"})  # eval.every is null: no theta is chosen
    save_config(with_absolute_paths(wanted.model_copy(update={"eval": unread}), CONFIG), place / "config.yaml")
    bench.runner().check(job)
    warns = wanted.tasks.model_copy(update={"missing": "warn"})  # of generated tasks none is missing
    save_config(with_absolute_paths(wanted.model_copy(update={"tasks": warns}), CONFIG), place / "config.yaml")
    bench.runner().check(job)
    other = wanted.model_copy(update={"seed": 9})
    save_config(with_absolute_paths(other, CONFIG), place / "config.yaml")
    with pytest.raises(Refused, match="holds another run: seed: 9 there, 0 now; remove it"):
        bench.runner().run(bench.jobs)
    assert bench.calls() == []


def test_a_run_that_may_lack_tasks_is_refused_with_the_way_back(bench):
    for name in "ab":
        (bench.folder / "tasks" / name).mkdir(parents=True)
    (bench.folder / "comparison.yaml").write_text(TEXT.replace("tiny.yaml", "cls23.yaml"))
    extra = (f"tasks.folder={bench.folder}/tasks", "tasks.train=[a]", "tasks.test=[b]")
    path, runner = bench.folder / "comparison.yaml", bench.runner()
    runner.config = str(CONFIG.with_name("cls23.yaml"))
    job = jobs(load_comparison(path, extra), {}, extra)[0]
    place = bench.folder / "out" / job.folder
    as_before = load_config(runner.config, [*job.overrides, "tasks.missing=warn", f"output={place}"])
    as_before = as_before.model_copy(update={"logging": as_before.logging.model_copy(update={"progress_bar": False})})
    save_config(with_absolute_paths(as_before, runner.config), place / "config.yaml")
    with pytest.raises(Refused, match=r"tasks\.missing: 'warn' there, 'error' now; set tasks\.missing back, remove it"):
        runner.check(job)
    runner.check(jobs(load_comparison(path, extra), {}, (*extra, "tasks.missing=warn"))[0])


def test_an_interrupt_stops_what_runs(bench):
    """The command as a user stops it: its children are gone, and a second call makes what is missing."""
    bench.slow.touch()
    code = (
        "import signal, sys; from pathlib import Path; from abmll.compare.grid import jobs;"
        "from abmll.compare.load import load_comparison;"
        "signal.signal(signal.SIGINT, signal.default_int_handler);"  # a shell's background jobs ignore it
        "from abmll.compare.runner import Runner; folder = Path(sys.argv[1]);"
        "Runner(sys.argv[2], folder / 'out', folder, 2).run(jobs(load_comparison(folder / 'comparison.yaml'), {}, ()))"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(bench.folder), str(CONFIG)])
    deadline = time.monotonic() + 240  # both its imports and those of what it forks from
    while not bench.calls_file.exists() or len(bench.calls_file.read_text().splitlines()) < 2:
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.1)
    began = time.monotonic()
    process.send_signal(signal.SIGINT)
    assert process.wait(30) != 0
    assert time.monotonic() - began < 30
    assert len(bench.calls()) == 2 and not list((bench.folder / "out").rglob("summary.json"))
    pids = list((bench.folder / "out").rglob("pid"))
    assert len(pids) == 2
    for written in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(int(written.read_text()), 0)
    bench.slow.unlink()
    assert not any(outcome.problem for outcome in bench.runner().run(bench.jobs))
    assert sum(call.startswith("train") for call in bench.calls()) == 4


def test_every_gpu_gets_its_share(bench, monkeypatch):
    def starts(runner):
        commands = [runner.launcher._interpreter() for _ in range(runner.workers)]
        environments = [runner.launcher._environment(place) for place in range(runner.workers)]
        return commands, [environment.get("CUDA_VISIBLE_DEVICES") for environment in environments]

    def runner(**options):
        return Runner(str(CONFIG), bench.folder / "out", bench.folder, **options)

    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 8)
    commands, visible = starts(runner(ranks=2))
    assert visible == ["0,1", "2,3", "4,5", "6,7"]
    # with a number of accelerators DeepSpeed's launcher forgets which are visible
    assert all("--num_accelerators" not in command for command in commands)
    assert len({command[-1] for command in commands}) == 4  # a port each
    assert starts(runner(workers=2)) == ([[sys.executable]] * 2, ["0", "1"])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,5")  # what this process was given
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert starts(runner())[1] == ["2", "5"]
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    monkeypatch.setattr("abmll.compare.runner.usable_cores", lambda: 3)
    assert runner().workers == 3 and starts(runner())[1] == ["2,5"] * 3  # as it was given
    assert "--num_accelerators" in starts(runner(ranks=2, workers=1))[0][0]


def test_a_run_that_names_its_model_from_here_is_the_same_run(bench, tmp_path, monkeypatch):
    """Older runs wrote a local model's path as it was given."""
    (tmp_path / "models/base1").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    job = dataclasses.replace(bench.jobs[0], overrides=[*bench.jobs[0].overrides, "model.name=models/base1"])
    place = bench.folder / "out" / job.folder
    wanted = load_config(CONFIG, [*job.overrides, f"output={place}", "logging.progress_bar=false"])
    here = with_absolute_paths(wanted, CONFIG)
    save_config(here.model_copy(update={"model": wanted.model}), place / "config.yaml")
    bench.runner().check(job)


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system binds no process to cores")
def test_cores_that_the_process_may_not_use_get_no_runs(bench):
    code = "from abmll.compare.runner import *; print(Runner('c', Path('f'), Path('l')).workers)"
    one = min(os.sched_getaffinity(0))
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        preexec_fn=lambda: os.sched_setaffinity(0, {one}),
    )  # fmt: skip
    assert found.stdout.strip() == "1", found.stderr


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"workers": 0}, "--workers: 0: must be at least 1"),
        ({"workers": -2}, "--workers: -2: must be at least 1"),
        ({"ranks": 0}, "--ranks: 0: must be at least 1"),
        ({"ranks": 3}, r"--ranks: 3: each needs a GPU of its own, of 2 visible GPUs \(0,1\); take at most 2"),
    ],
)
def test_numbers_that_cannot_run_are_refused(options, told, bench, monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    with pytest.raises(Refused, match=told):
        Runner(str(CONFIG), bench.folder / "out", bench.folder, **options)
