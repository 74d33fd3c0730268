"""How the kernel benchmark times: rounds, what an error does to them, and a flush that writes nothing."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode


class Machine:
    """A GPU whose calls take as long as they are told, and which slows down by and by."""

    def __init__(self, **milliseconds: float):
        self.milliseconds, self.now, self.order = milliseconds, 0.0, []

    @property
    def slowness(self) -> float:
        return 1 + self.now / 10

    def once(self, name: str) -> float:
        self.order.append(name)
        if name == "broken" and self.order.count(name) > 5:
            raise RuntimeError("launch failed")
        took = self.milliseconds[name] * self.slowness
        self.now += took / 1e3
        return took

    def interleaved(self, timing, seconds: float):
        # the machine's calls are their names
        return timing.interleaved({name: name for name in self.milliseconds}, seconds, self.once, lambda: self.now)


@pytest.fixture
def timing(load):
    return load("kernel_timing")


def test_contenders_run_in_turn(timing):
    machine = Machine(fast=1.0, slow=9.0)
    found, errors = machine.interleaved(timing, 0.3)
    assert not errors and machine.order == ["fast", "slow"] * (len(machine.order) // 2)
    assert found["fast"]["runs"] == found["slow"]["runs"] == len(machine.order) // 2 - timing.WARM_UP
    # 0.3 s a contender are over, and not much more than a round beyond
    assert 0.6 <= machine.now - 0.03 < 0.65
    assert found["fast"]["p20_ms"] < found["fast"]["median_ms"] < found["fast"]["p80_ms"]


def test_a_drifting_clock_cancels_in_ratios(timing):
    """One contender after the other would see 1.0 and 1.6 times the time here."""
    machine = Machine(first=1.0, second=2.0)
    found, _ = machine.interleaved(timing, 3.0)
    assert machine.slowness > 1.5
    assert found["second"]["median_ms"] / found["first"]["median_ms"] == pytest.approx(2.0, rel=0.001)


def test_a_call_that_raises_leaves_the_others_alone(timing):
    machine = Machine(good=1.0, broken=1.0, slow=5.0)
    found, errors = machine.interleaved(timing, 0.1)
    assert set(found) == {"good", "slow"} and str(errors["broken"]) == "launch failed"
    assert machine.order.count("broken") == 6 and found["good"]["runs"] > 20


def test_slow_calls_run_often_enough(timing):
    found, _ = Machine(slow=500.0).interleaved(timing, 0.3)
    assert found["slow"]["runs"] == timing.MINIMUM_ROUNDS


def test_nothing_but_errors_ends(timing):
    found, errors = timing.interleaved({"a": None}, 1.0, once=lambda call: 1 / 0)
    assert found == {} and isinstance(errors["a"], ZeroDivisionError)
    assert timing.interleaved({}, 1.0) == ({}, {})


class Writes(TorchDispatchMode):
    """Elements read and written."""

    def __init__(self):
        super().__init__()
        self.read = self.written = 0

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        found = function(*arguments, **(keywords or {}))
        self.read += sum(value.numel() for value in arguments if isinstance(value, torch.Tensor))
        self.written += found.numel()
        return found


def test_the_flush_reads_all_and_writes_nothing(timing):
    """A flush by writing leaves dirty lines, which go to memory while the measured call runs."""
    buffer = torch.arange(4096, dtype=torch.int32)
    with Writes() as counted:
        timing.flush(buffer)
    assert counted.read == 4096 and counted.written == 1
    assert buffer._version == 0 and torch.equal(buffer, torch.arange(4096, dtype=torch.int32))


def test_a_run_is_prepared_then_flushed_then_measured(timing, monkeypatch):
    """The GPU has nothing to do when the flush begins, and the events enclose the call alone."""
    done = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            done.append("record")

        def synchronize(self):
            done.append("wait")

        def elapsed_time(self, end):
            return 1.5

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: done.append("idle"))
    monkeypatch.setattr(timing, "_buffer", lambda: None)
    monkeypatch.setattr(timing, "flush", lambda buffer: done.append("flush"))
    call = timing.Call(lambda: done.append("prepare") or 7, lambda state: done.append(f"run {state}"))
    assert timing.timed(call) == 1.5
    assert done == ["prepare", "idle", "flush", "record", "run 7", "record", "wait"]
