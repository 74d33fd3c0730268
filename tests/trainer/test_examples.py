"""docs/examples, as far as one machine goes: DeepSpeed reads the hostfile, and the batch script trains on two ranks."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from deepspeed.launcher.runner import fetch_hostfile
from runs import ROOT, Run, environment

from abmll.ports import free_port

EXAMPLES = ROOT / "docs/examples"

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.skipif(
        torch.cuda.is_available(), reason="NCCL takes one rank a GPU; for the CPU set CUDA_VISIBLE_DEVICES="
    ),
    pytest.mark.skipif(shutil.which("c++") is None, reason="DeepSpeed builds its CPU operation with a C++ compiler"),
]

SRUN = """#!/bin/bash
# Stands for srun: two tasks on this machine. Fails if one of them does.
while [[ $1 == -* ]]; do shift; done
export SLURM_STEP_ID=0 SLURM_STEP_NUM_TASKS=2 SLURM_STEP_TASKS_PER_NODE=2 SLURM_STEP_NODELIST=localhost SLURM_NODEID=0
SLURM_PROCID=0 SLURM_LOCALID=0 "$@" & first=$!
SLURM_PROCID=1 SLURM_LOCALID=1 "$@" & second=$!
wait $first && wait $second
"""


def executable(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(0o755)


def test_deepspeed_reads_the_hostfile():
    assert fetch_hostfile(str(EXAMPLES / "hostfile")) == {"gpu-a": 8, "gpu-b": 8}


def test_the_batch_script_is_bash():
    assert subprocess.run(["bash", "-n", EXAMPLES / "train.slurm"]).returncode == 0


def test_the_batch_script_trains_and_goes_on(run: Run, tmp_path):
    """Its own line of srun, which adds nothing that a launcher would: queued twice, the second time for longer."""
    folder = tmp_path / "bin"
    folder.mkdir()
    executable(folder / "srun", SRUN)
    executable(folder / "python", f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    told = {"PATH": f"{folder}:{os.environ['PATH']}", "SLURM_JOB_ID": str(free_port()), "SLURM_PROCID": "0"}
    told["MASTER_PORT"] = str(free_port())
    for episodes, said in ((2, "no checkpoint in"), (4, "after step 1 of 2")):
        script = ["bash", EXAMPLES / "train.slurm", run.config, f"trainer.episodes={episodes}"]
        found = subprocess.run(
            script, env={**environment(), **told}, cwd=ROOT, capture_output=True, text=True, timeout=600
        )
        assert found.returncode == 0, found.stdout + found.stderr
        assert f"{episodes // 2} of 2 episodes on 2 ranks" in found.stdout and said in found.stdout
        assert found.stdout.count("scoring the unseen tasks") == 1
    assert [line["step"] for line in run.metrics] == [1, 2]


def test_two_machines_of_a_hostfile(run: Run):
    """What `deepspeed --hostfile` starts through ssh on each machine, both of them here."""
    world = base64.urlsafe_b64encode(json.dumps({"gpu-a": [0], "gpu-b": [0]}).encode()).decode()
    launch = [sys.executable, "-m", "deepspeed.launcher.launch", f"--world_info={world}", "--master_addr=localhost"]
    launch.append(f"--master_port={free_port()}")
    machines = [
        subprocess.Popen(
            [*launch, f"--node_rank={node}", *run.command("trainer.episodes=2")[1:]],
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for node in (0, 1)
    ]
    outputs = [machine.communicate(timeout=600)[0] for machine in machines]
    assert [machine.returncode for machine in machines] == [0, 0], outputs
    assert "1 of 2 episodes on 2 ranks" in outputs[0]
