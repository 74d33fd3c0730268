"""benchmarks/scaling.py: the command on a tiny model and two ranks, what it counts, the projection's arithmetic."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
SCRIPT = str(ROOT / "benchmarks/scaling.py")


@pytest.fixture
def scaling(load):
    return load("scaling")


@pytest.mark.distributed
@pytest.mark.skipif(
    torch.cuda.is_available(), reason="NCCL takes one rank a GPU; for the CPU set CUDA_VISIBLE_DEVICES="
)
@pytest.mark.skipif(shutil.which("c++") is None, reason="DeepSpeed builds its CPU operation with a C++ compiler")
def test_two_ranks(tmp_path, scaling):
    path = tmp_path / "rows.json"
    shape = ["--model", "random:tiny", "--tokens", "8", "--inner-steps", "2", "--groups", "2", "--rounds", "1"]
    done = subprocess.run(
        [sys.executable, SCRIPT, *shape, "--output", str(path)], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    facts = json.loads(path.read_text())
    assert str(ROOT) not in path.read_text()
    rows = {(row["what"], row["ranks"]): row for row in facts["rows"]}
    assert {key: row["tasks"] for key, row in rows.items()} == {
        ("weak", 1): 2, ("weak", 2): 4, ("apart", 2): 4, ("strong", 1): 4, ("strong", 2): 4,
    }  # fmt: skip
    assert rows["weak", 1]["efficiency"] == 1 and all(
        row["efficiency"] > 0 and row["step_s"] > 0 for row in facts["rows"]
    )
    tokens = 3 * 2 * 8  # of an episode: two inner passes and an outer one of two prompts
    for (what, ranks), row in rows.items():
        # apart: each of the two processes takes half of the step's tasks
        assert row["tokens_per_s"] * row["step_s"] == pytest.approx(tokens * row["tasks"], rel=5e-3), (what, ranks)

    # theta's gradient once, theta back once, the table of the step's numbers, and nothing inside an episode
    theta = facts["theta_bytes"]
    assert {row["phase"] for row in facts["traffic"]} == {"engine step", "outer step"}
    found = {(row["phase"], row["collective"]): row["bytes"] for row in facts["traffic"]}
    assert theta <= found["engine step", "all-reduce"] < 1.01 * theta
    assert theta <= found["engine step", "all-gather"] < 1.01 * theta
    height, width = 4 + 1, 12 + 6  # a row an episode and one for stops; a column a term and one for each layer's KL
    assert found["outer step", "all-reduce"] == height * width * 8
    assert "Nothing in the inner loop: met. Theta's gradient once: met" in done.stdout
    again = subprocess.run([sys.executable, SCRIPT, "--report", str(path)], capture_output=True, text=True)
    # DeepSpeed writes a line with the time before ours
    assert again.stdout.partition("random:tiny")[1:] == done.stdout.partition("random:tiny")[1:]


def test_traffic_is_counted_by_phase(scaling, load, tmp_path):
    """Of all functions of torch.distributed, also inside an inner step."""
    import torch.distributed as dist

    traffic = load("scaling_rows.traffic")
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    try:
        with traffic.Traffic() as found:
            dist.all_reduce(torch.zeros(10))
            dist.barrier()
            step = found._in(traffic.INNER, lambda: dist.all_gather([torch.zeros(3)], torch.ones(3)))
            step()
            dist.broadcast(torch.zeros(5, dtype=torch.float64), 0)
    finally:
        dist.destroy_process_group()
    assert found.rows() == [
        {"phase": "inner loop", "collective": "all-gather", "calls": 1, "bytes": 12},
        {"phase": "outer step", "collective": "all-reduce", "calls": 1, "bytes": 40},
        {"phase": "outer step", "collective": "barrier", "calls": 1, "bytes": 0},
        {"phase": "outer step", "collective": "broadcast", "calls": 1, "bytes": 40},
    ]


def test_a_report_tells_what_missed(scaling, load):
    report = load("scaling_rows.report")
    inside = [{"phase": "inner loop", "collective": "all-reduce", "calls": 3, "bytes": 4}]
    assert report._inside(inside) == "missed (3 calls)"
    twice = {"theta_bytes": 100, "traffic": [{"phase": "engine step", "collective": "all-reduce", "bytes": 200}]}
    assert report._once(twice).startswith("missed")


def test_projection(scaling, load):
    """By hand: 8 GPUs, an all-reduce of 1 MB measured on a theta of 1 MB, projected to 44 MB at 1 GB/s."""
    projection = load("scaling_rows.projection")
    traffic = [
        {"phase": "engine step", "collective": "all-reduce", "calls": 1, "bytes": 10**6},
        {"phase": "outer step", "collective": "barrier", "calls": 1, "bytes": 0},
    ]
    row = projection.project(traffic, 10**6, 44 * 10**6, 8, 1.0, 1.25, 1.0, 100.0)
    assert row["sent_mb"] == pytest.approx(2 * 44 * 7 / 8)
    assert row["communication_ms"] == pytest.approx(77 + 2 * 7 * 0.1)
    assert row["efficiency"] == pytest.approx(1 / (1.25 + 0.0784), rel=1e-3)
    assert row["assumed"]["imbalance"] == 1.25


def test_theta_of_a_model(scaling, load, build_tiny):
    from abmll.config.schema import AdapterConfig

    theta = sum(value.nbytes for value in build_tiny().adapters.theta.values())
    assert load("scaling_rows.projection").theta_bytes("random:tiny", AdapterConfig()) == theta


def test_a_rank_that_ends_tells_why(scaling, load, tmp_path):
    processes = load("scaling_rows.processes")
    world = processes.World(1, "missing.yaml", [], None, tmp_path)
    with pytest.raises(RuntimeError, match=r"missing\.yaml: no such configuration file"):
        world.answer()
