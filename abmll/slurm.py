"""Ranks that `srun` started: SLURM's variables in the terms of `torch.distributed`. Needs neither torch nor SLURM.

Of a job step alone (SLURM_STEP_*): in a batch script, outside of srun, SLURM_PROCID and SLURM_NTASKS are set as well.
"""

from __future__ import annotations

import os
import re


def adopt_slurm() -> None:
    """Set RANK, LOCAL_RANK, WORLD_SIZE, LOCAL_SIZE, MASTER_ADDR and MASTER_PORT, where srun started this process.

    A launcher's RANK has precedence, and MASTER_ADDR and MASTER_PORT if they are set. Otherwise rank 0 is taken to run
    on the step's first machine, as it does but for `--distribution=arbitrary`.
    """
    told = os.environ
    if "RANK" in told or int(told.get("SLURM_STEP_NUM_TASKS", 1)) == 1:
        return
    job, step = int(told["SLURM_JOB_ID"]), int(told["SLURM_STEP_ID"])
    found = {
        "RANK": told["SLURM_PROCID"],
        "LOCAL_RANK": told["SLURM_LOCALID"],
        "WORLD_SIZE": told["SLURM_STEP_NUM_TASKS"],
        "LOCAL_SIZE": str(_tasks_per_node(told["SLURM_STEP_TASKS_PER_NODE"])[int(told["SLURM_NODEID"])]),
        "MASTER_ADDR": told.get("MASTER_ADDR", _first_host(told["SLURM_STEP_NODELIST"])),
        "MASTER_PORT": told.get("MASTER_PORT", str(20_000 + (31 * job + step) % 10_000)),
    }
    os.environ.update(found)


def _tasks_per_node(text: str) -> list[int]:
    """`4(x2),1` is [4, 4, 1]."""
    counts = re.findall(r"(\d+)(?:\(x(\d+)\))?", text)
    return [int(tasks) for tasks, nodes in counts for _ in range(int(nodes or 1))]


def _first_host(nodelist: str) -> str:
    """`gpu[03-07,12],login1` begins with gpu03."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])+", nodelist)[0]
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", first)
