"""--profile: what it records, writes and prints, and that training goes on as without it."""

from __future__ import annotations

import gzip
import json
import re
import shutil
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from runs import Run, Stopped, call, stop_before
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

import abmll.run
from abmll.ports import free_port
from abmll.profiling import COSTS, SNAPSHOT, TRACE, Profiler, cost_tables, phase, steps_to_record
from abmll.run import train

# of one outer step of the tiny run: one episode, two inner steps
PHASES = {"outer step": 1, "episode": 1, "inner step": 2, "forward": 3, "backward": 2, "optimizer": 2}
PHASES |= {"theta gradient": 1, "engine step": 1}
MARKS = {*PHASES, "checkpoint"}


def profiled(run: Run, *overrides: str, resume: bool = False) -> Run:
    train(str(run.config), list(overrides), resume, overwrite=False, profile=True)
    return run


def files(run: Run, rank: int = 0) -> Path:
    return run.folder / f"profile/rank-{rank:05d}"


def trace(run: Run, rank: int = 0) -> list[dict]:
    return json.loads(gzip.decompress((files(run, rank) / TRACE).read_bytes()))["traceEvents"]


def marks(run: Run, rank: int = 0) -> Counter:
    """Calls of our phases in the trace."""
    return Counter(event["name"] for event in trace(run, rank) if event["name"] in MARKS)


def tables(text: str) -> list[list[tuple[str, int, float, float]]]:
    """The rows (name, calls, amount, share) of each table in a markdown text."""
    found = []
    for line in text.splitlines():
        if line.startswith("|---"):
            found.append([])
        elif found and (row := re.fullmatch(r"\| (.+) \| (\d*) \| (\S+) \| (\S*) \|", line)):
            name, calls, amount, share = row.groups()
            found[-1].append((name, int(calls or 0), float(amount.replace(",", "")), float(share or "nan")))
    return found


@pytest.fixture(scope="module")
def command(tmp_path_factory):
    """The real command, once: its run and what it printed."""
    run = Run(tmp_path_factory.mktemp("profiled") / "run")
    found = call(run.command("--profile", "eval.every=2"))
    assert found.returncode == 0, found.stderr
    return run, found.stdout


def test_training_is_the_same_to_the_bit(command, finished):
    command[0].same_as(finished)


def test_the_trace_holds_the_phases_of_the_recorded_step_and_no_other(command):
    run, out = command
    assert "profiling outer step 2\n" in out
    assert marks(run) == PHASES
    spans = {event["name"]: event for event in trace(run) if event["name"] in MARKS}
    (step, episode), inner = (spans[name] for name in ("outer step", "episode")), spans["inner step"]
    for outside, inside in ((step, episode), (episode, inner), (step, spans["engine step"])):
        assert outside["ts"] <= inside["ts"]
        assert inside["ts"] + inside["dur"] <= outside["ts"] + outside["dur"] + 0.002  # printed in nanoseconds
    assert any(event["name"] == "aten::mm" for event in trace(run))


def test_the_tables_add_up(command):
    run, _ = command
    phases, times, memory = tables((files(run) / COSTS).read_text())
    assert {name: calls for name, calls, *_ in phases if name in MARKS} == PHASES
    assert len(times) == len(memory) == 10
    milliseconds = {name: amount for name, _, amount, _ in phases}
    whole = milliseconds["outer step"]
    assert milliseconds["forward"] + milliseconds["backward"] < milliseconds["episode"] < whole
    names = [name for name, *_ in times]
    assert "(Python, between operators)" in names
    assert not {*names, *(name for name, *_ in memory)} & {*MARKS, "[memory]"}
    for rows in (times, memory):
        amounts = [amount for *_, amount, _ in rows]
        assert amounts == sorted(amounts, reverse=True) and min(amounts) >= 0 and amounts[0] > 0
    # own times on one thread do not overlap: together they are the step and at most all that the trace spans
    own, shares = (sum(values) for values in list(zip(*times, strict=True))[2:])
    total = 100 * own / shares
    rounding = 10 * 0.05 / shares + 10 * 0.005 / own  # of ten shares and ten amounts
    events = [event for event in trace(run) if event.get("cat") in ("cpu_op", "user_annotation")]
    window = max(event["ts"] + event["dur"] for event in events) - min(event["ts"] for event in events)
    assert whole * (1 - rounding) <= total <= window / 1e3 * (1 + rounding)
    assert shares < 100 + 10 * 0.05 and sum(share for *_, share in memory) < 100 + 10 * 0.05


def test_what_is_printed_says_what_opens_the_files(command):
    run, out = command
    report = (files(run) / COSTS).read_text()
    assert report in out
    assert f"{files(run) / TRACE}, to open at https://ui.perfetto.dev\n" in out
    assert f"{files(run) / COSTS}\n" in out
    assert "memory_viz" not in out and not (files(run) / SNAPSHOT).exists()  # without a GPU
    assert sorted(path.name for path in files(run).iterdir()) == ["costs.md", "manifest.json", "trace.json.gz"]


def test_the_profiler_is_off_once_it_has_written(run, monkeypatch):
    """The outer step behind the recorded one, and whatever comes later, run without it."""
    enabled = []
    outer_step = abmll.run.Trainer._outer_step

    def watched(trainer, step):
        enabled.append(torch.autograd._profiler_enabled())
        return outer_step(trainer, step)

    monkeypatch.setattr(abmll.run.Trainer, "_outer_step", watched)
    profiled(run)
    assert enabled == [False, True, False, False, False, False]
    assert not torch.autograd._profiler_enabled()


def test_a_resumed_run_profiles_its_own_first_steps(run, monkeypatch, finished, capsys):
    with monkeypatch.context() as patch:
        stop_before(patch, 2)
        with pytest.raises(Stopped):
            profiled(run, "eval.every=2")
    assert marks(run) == PHASES
    monkeypatch.setattr(abmll.run, "EPISODES_ON_CPU", 2)
    profiled(run, "eval.every=2", resume=True)
    # step 3 warms up, and the validation behind step 4 ends the recording
    assert "profiling outer step 4\n" in capsys.readouterr().out
    assert marks(run) == PHASES
    run.same_as(finished)


def test_overwrite_removes_the_profile(run):
    profiled(run, "trainer.episodes=2")
    run.train("trainer.episodes=1", overwrite=True)
    assert not (run.folder / "profile").exists()


def test_two_steps_and_the_checkpoint_between_them(run, monkeypatch, capsys):
    monkeypatch.setattr(abmll.run, "EPISODES_ON_CPU", 2)
    profiled(run, "trainer.episodes=3", "trainer.checkpoint_every=2")
    assert "profiling outer steps 2 to 3\n" in capsys.readouterr().out
    assert marks(run) == {**{name: 2 * calls for name, calls in PHASES.items()}, "checkpoint": 1}


@pytest.mark.parametrize(
    "overrides, expected",
    [
        (("method.name=reptile",), {"inner step": 2, "forward": 2, "backward": 2, "optimizer": 2}),
        (("method.meta_gradient=reptile",), {"forward": 2}),
        (("method.name=lora",), {"inner step": 0, "forward": 2, "backward": 2, "optimizer": 0, "theta gradient": 2}),
        (("method.meta_gradient=first_order",), {"backward": 3}),
        (("adapters.posterior=weight",), {"forward": 2}),
        (("trainer.tasks_per_step=2",), {name: 2 * n for name, n in PHASES.items()} | {"outer step": 1}),
    ],
)
def test_every_method_has_its_phases(run, overrides, expected, capsys):
    profiled(run, "trainer.episodes=4", *overrides)
    once = {"episode": 2, "engine step": 2} if "method.name=lora" in overrides else {}
    once |= {"engine step": 1} if "trainer.tasks_per_step=2" in overrides else {}
    assert marks(run) == Counter({**PHASES, **expected, **once})
    assert ("has 2 episodes on each rank" in capsys.readouterr().out) == ("trainer.tasks_per_step=2" in overrides)


def test_a_run_of_one_step_is_profiled_cold(run, capsys):
    profiled(run, "trainer.episodes=1")
    assert "profiling outer step 1, without one before it to warm up\n" in capsys.readouterr().out
    assert marks(run) == PHASES


def test_nothing_left_to_profile_is_said(run, capsys):
    run.train("trainer.episodes=2")
    profiled(run, "trainer.episodes=2", resume=True)
    assert "--profile: no outer step is left to profile\n" in capsys.readouterr().out
    assert not (run.folder / "profile").exists()


@pytest.mark.parametrize("at", [0, 1])
def test_training_that_ends_early_leaves_no_profiler_behind(run, monkeypatch, at):
    with monkeypatch.context() as patch:
        stop_before(patch, at)
        with pytest.raises(Stopped):
            profiled(run)
    assert not torch.autograd._profiler_enabled() and not (run.folder / "profile").exists()
    with profile(activities=[ProfilerActivity.CPU]) as other:  # another one can start
        torch.ones(2).add(1)
    assert any(event.key == "aten::add" for event in other.key_averages())


@pytest.mark.parametrize(
    "step, num_steps, wanted, validate_every, expected",
    [
        (0, 9, 2, None, range(1, 3)),
        (0, 2, 2, None, range(1, 2)),
        (0, 1, 2, None, range(0, 1)),
        (0, 0, 2, None, range(0)),
        (5, 5, 2, None, range(0)),
        (4, 9, 2, None, range(5, 7)),
        (0, 9, 2, 1, range(1, 2)),
        (0, 9, 2, 2, range(1, 2)),
        (0, 9, 2, 3, range(1, 3)),
        (1, 9, 2, 2, range(2, 4)),
    ],
)
def test_which_steps_are_recorded(step, num_steps, wanted, validate_every, expected):
    found = steps_to_record(step, num_steps, wanted, validate_every)
    assert list(found) == list(expected) and (len(found) or found.start == step)


def test_a_phase_runs_no_operator_without_a_profiler():
    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func)
            return func(*args, **(kwargs or {}))

    seen = []
    with Seen(), phase("a"):
        torch.ones(2)
    assert [str(func) for func in seen] == ["aten.ones.default"]


def row(name, device=DeviceType.CPU, annotation=False, **values):
    zeros = dict.fromkeys(
        ("self_cpu_time_total", "cpu_time_total", "self_device_time_total", "self_cpu_memory_usage"), 0
    )
    values = {**zeros, "self_device_memory_usage": 0, "count": 1, **values}
    return SimpleNamespace(key=name, device_type=device, is_user_annotation=annotation, **values)


def test_tables_of_a_gpu_take_kernels_times_and_device_bytes():
    """An operator's row repeats its kernels' time, and a phase's row on the GPU that of all kernels in it."""
    phases, times, memory = tables(
        cost_tables(
            [
                row("outer step", annotation=True, cpu_time_total=8_000),
                row("outer step", DeviceType.CUDA, annotation=True, self_device_time_total=4_000),
                row("aten::mm", self_cpu_time_total=9e6, self_device_time_total=3_000, self_device_memory_usage=6e6),
                row("aten::add", self_cpu_memory_usage=9e9, self_device_memory_usage=2e6),
                row("aten::free", self_device_memory_usage=-8e6),
                row("gemm<a|b>" + "x" * 90, DeviceType.CUDA, self_device_time_total=3_000, count=7),
                row("_sample", DeviceType.CUDA, self_device_time_total=1_000),
                row("[memory]", DeviceType.CUDA, self_device_memory_usage=-9e9),
            ],
            on_gpu=True,
        )
    )
    assert phases == [("outer step", 1, 8.0, 100.0)]
    assert times == [("gemm<a/b>" + "x" * 68 + "...", 7, 3.0, 75.0), ("_sample", 1, 1.0, 25.0)]
    assert memory == [("aten::mm", 1, 6.0, 75.0), ("aten::add", 1, 2.0, 25.0), ("aten::free", 1, -8.0, -100.0)]


def test_a_gpus_memory_snapshot_is_of_the_recorded_steps(tmp_path, monkeypatch):
    """Without a GPU: the order of the calls that make it."""
    calls, said = [], []
    history = lambda enabled="all", **_: calls.append(f"history {enabled}")  # noqa: E731
    monkeypatch.setattr(torch.cuda.memory, "_record_memory_history", history)
    monkeypatch.setattr(
        torch.cuda.memory, "_dump_snapshot", lambda path: calls.append("dump") or Path(path).write_text("snapshot")
    )
    folder = tmp_path / "profile/rank-00003"
    with Profiler(folder, torch.device("cuda", 0), 4, range(5, 6), said.append) as profiler:
        for step in range(4):
            calls.append(f"step {step}")
            with phase("outer step"):
                torch.ones(2).add(1)
            profiler.step()
    assert calls == ["step 0", "history all", "step 1", "dump", "history None", "step 2", "step 3"]
    assert (folder / SNAPSHOT).read_text() == "snapshot"
    assert f"{folder / SNAPSHOT}, to open at https://docs.pytorch.org/memory_viz\n" in said[-1]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_kernels_and_a_snapshot_are_recorded(run, capsys):
    profiled(run)
    _, times, memory = tables((files(run) / COSTS).read_text())
    assert len(times) == len(memory) == 10 and times[0][2] > 0 and memory[0][2] > 0
    assert not any(name.startswith("aten::") for name, *_ in times)
    assert (files(run) / SNAPSHOT).stat().st_size > 0
    assert "memory_viz" in capsys.readouterr().out


@pytest.mark.distributed
@pytest.mark.skipif(
    torch.cuda.is_available(), reason="NCCL takes one rank a GPU; for the CPU set CUDA_VISIBLE_DEVICES="
)
@pytest.mark.skipif(shutil.which("c++") is None, reason="DeepSpeed builds its CPU operation with a C++ compiler")
def test_every_rank_writes_its_own_and_the_first_one_prints(run):
    launcher = shutil.which("deepspeed") or str(Path(sys.executable).with_name("deepspeed"))
    ranks = [sys.executable, launcher, "--num_accelerators", "2", "--master_port", str(free_port())]
    found = call([*ranks, *run.command("--profile", "trainer.episodes=4")[1:]], timeout=600)
    assert found.returncode == 0, found.stdout + found.stderr
    assert found.stdout.count("https://ui.perfetto.dev") == 1
    for rank in (0, 1):
        assert marks(run, rank) == PHASES
        assert len(tables((files(run, rank) / COSTS).read_text())) == 3


def test_profile_and_validate_exclude_each_other(run):
    found = call(run.command("--profile", "--validate"))
    assert found.returncode == 2 and "not allowed with" in found.stderr
