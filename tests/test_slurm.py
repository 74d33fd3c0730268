"""SLURM's variables in the terms of torch.distributed."""

from __future__ import annotations

import os

import pytest

from abmll.slurm import _first_host, _tasks_per_node, adopt_slurm

# Task 9 of srun's `env`, on two machines with four tasks each and a third with two
STEP = {
    "SLURM_JOB_ID": "4711",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "9",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "2",
    "SLURM_STEP_NUM_TASKS": "10",
    "SLURM_STEP_TASKS_PER_NODE": "4(x2),2",
    "SLURM_STEP_NODELIST": "gpu[03-04,12]",
}
NAMES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture
def adopted(monkeypatch):
    """What an environment's variables become; those that torch.distributed reads."""

    def adopted(told: dict[str, str]) -> dict[str, str]:
        for name in [name for name in os.environ if name.startswith("SLURM_") or name in NAMES]:
            monkeypatch.delenv(name)
        for name in NAMES:  # to be removed afterwards
            monkeypatch.setenv(name, "")
            del os.environ[name]
        for name, value in told.items():
            monkeypatch.setenv(name, value)
        adopt_slurm()
        return {name: os.environ[name] for name in NAMES if name in os.environ}

    return adopted


def test_a_task_of_srun_is_a_rank(adopted):
    assert adopted(STEP) == dict(zip(NAMES, ("9", "1", "10", "2", "gpu03", "26041"), strict=True))


def test_all_tasks_of_a_step_agree_and_another_step_takes_another_port(adopted):
    first = adopted({**STEP, "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0"})
    assert (first["RANK"], first["LOCAL_SIZE"]) == ("0", "4")
    assert (first["MASTER_ADDR"], first["MASTER_PORT"]) == ("gpu03", "26041")
    assert adopted({**STEP, "SLURM_STEP_ID": "1"})["MASTER_PORT"] != "26041"


def test_what_is_set_has_precedence(adopted):
    assert adopted({**STEP, "RANK": "3"}) == {"RANK": "3"}  # of a launcher that srun started
    address = {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}
    assert adopted({**STEP, **address}).items() >= address.items()


@pytest.mark.parametrize("kind", ["a batch script", "one task", "no SLURM"])
def test_a_process_of_its_own_stays_alone(adopted, kind):
    outside = {name: value for name, value in STEP.items() if not name.startswith("SLURM_STEP_")}
    told = {
        "a batch script": {**outside, "SLURM_NTASKS": "10", "SLURM_PROCID": "0"},
        "one task": {**STEP, "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"},
        "no SLURM": {},
    }
    assert adopted(told[kind]) == {}


@pytest.mark.parametrize(
    ("nodelist", "first"),
    [
        ("gpu1", "gpu1"),
        ("gpu1,gpu2", "gpu1"),
        ("gpu[03-07,12],login1", "gpu03"),
        ("gpu[9,12]", "gpu9"),
        ("rack[1-2]node[3-4].site", "rack1node3.site"),
    ],
)
def test_first_host(nodelist, first):
    assert _first_host(nodelist) == first


def test_tasks_per_node():
    assert _tasks_per_node("8") == [8]
    assert _tasks_per_node("4(x2),2,1(x3)") == [4, 4, 2, 1, 1, 1]
