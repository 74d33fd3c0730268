"""SIGTERM on two ranks, as the deepspeed launcher passes it on: to one rank, and to the other when that has ended."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import torch
from runs import TRAIN, Run, environment

from abmll.checkpoint import newest_whole
from abmll.ports import free_port

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.skipif(
        torch.cuda.is_available(), reason="NCCL takes one rank a GPU; for the CPU set CUDA_VISIBLE_DEVICES="
    ),
    pytest.mark.skipif(shutil.which("c++") is None, reason="DeepSpeed builds its CPU operation with a C++ compiler"),
]
LONG = ("trainer.episodes=100000", "trainer.checkpoint_every=null")
STARTED = 500  # seconds; the very first start compiles DeepSpeed's operation


@pytest.fixture
def launch(run: Run, tmp_path):
    """Start the launcher on two ranks, its output in a file."""
    started = []

    def start(*arguments: str) -> tuple[subprocess.Popen, Path]:
        log = tmp_path / f"log-{len(started)}"
        launcher = shutil.which("deepspeed") or str(Path(sys.executable).with_name("deepspeed"))
        command = [sys.executable, launcher, "--num_accelerators", "2", "--master_port", str(free_port())]
        with log.open("w") as stream:
            started.append(
                subprocess.Popen(
                    [*command, str(TRAIN), "--config", str(run.config), *arguments], env=environment(),
                    stdout=stream, stderr=subprocess.STDOUT, start_new_session=True,
                )
            )  # fmt: skip
        return started[-1], log

    yield start
    for process in started:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def test_both_ranks_stop_behind_the_same_step_and_go_on(run: Run, launch):
    process, log = launch(*LONG)
    lines, deadline = run.folder / "metrics.jsonl", time.monotonic() + STARTED
    while not lines.exists() or lines.read_text().count("\n") < 3:
        assert process.poll() is None and time.monotonic() < deadline, log.read_text()
        time.sleep(0.05)
    (launcher,) = psutil.Process(process.pid).children()
    launcher.send_signal(signal.SIGTERM)
    asked = time.monotonic()
    process.wait(60)
    print(f"{time.monotonic() - asked:.1f} s")
    said = log.read_text()
    step = run.metrics[-1]["step"]
    assert f"SIGTERM: stopped after outer step {step} of 50000, with a checkpoint in" in said
    assert "error (rank" not in said and "Traceback" not in said
    checkpoint = newest_whole(run.folder / "checkpoints")
    assert (checkpoint.state["step"], checkpoint.state["world_size"]) == (step, 2)

    process, log = launch(*LONG[1:], f"trainer.episodes={2 * step + 4}", "--resume", "auto")
    assert process.wait(STARTED) == 0, log.read_text()
    assert f"resumed from {checkpoint.folder}, after step {step} of {step + 2}" in log.read_text()
    assert [line["step"] for line in run.metrics] == list(range(1, step + 3))
