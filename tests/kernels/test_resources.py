"""Kernels compiled without a GPU: nothing spills, shared memory fits, and the committed table says what is compiled."""

from __future__ import annotations

import importlib
import json
import os
import pkgutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
import triton
from triton.runtime import KernelInterface

import abmll.kernels.fused
from abmll.kernels import projection
from abmll.kernels.fused import resources
from abmll.kernels.fused.resources import (
    CASES,
    CHIPS,
    SHARED_LIMIT,
    STACK_LIMIT,
    TRAINING,
    describe,
    recorded_launches,
    variants,
)

RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results"
WITHOUT_SPILLS = ("bfloat16:8", "bfloat16:16")


def read_table(folder: Path) -> dict:
    return json.loads((folder / "kernel_resources.json").read_text())


def case(row: dict) -> str:
    return f"{row['dtype']}:{row['rank']}"


def without_measurements(row: dict) -> dict:
    return {name: value for name, value in row.items() if not name.startswith("sm_")}


def spilling(rows: list[dict]) -> set[tuple[str, str]]:
    """Kernels and uses that spill where no kernel should."""
    return {
        (row["kernel"], row["use"])
        for row in rows
        for chip in CHIPS
        if case(row) in WITHOUT_SPILLS and row[f"sm_{chip}"]["stack"] >= STACK_LIMIT
    }


def too_large(rows: list[dict]) -> list[dict]:
    """Rows with more shared memory than a chip has."""
    return [row for row in rows for chip in CHIPS if row[f"sm_{chip}"]["shared"] > SHARED_LIMIT[chip]]


@pytest.fixture(scope="module")
def committed() -> dict:
    return read_table(RESULTS)


def test_committed_table_lists_exactly_what_is_launched(committed):
    listed = [describe(variant) for name in CASES for variant in variants(name)]
    assert [without_measurements(row) for row in committed["rows"]] == listed


def test_committed_table_is_within_limits(committed):
    assert not spilling(committed["rows"])
    assert not too_large(committed["rows"])


def test_committed_page_is_made_from_the_table(committed):
    assert (RESULTS / "kernel_resources.md").read_text() == resources.markdown(committed)


def test_every_kernel_is_listed():
    package = abmll.kernels.fused
    modules = [importlib.import_module(f"{package.__name__}.{m.name}") for m in pkgutil.iter_modules(package.__path__)]
    kernels = {
        name
        for module in modules
        for name, value in vars(module).items()
        if isinstance(value, KernelInterface) and name.endswith("_kernel")
    }
    for name in CASES:
        assert {variant.launched.name for variant in variants(name)} == kernels, name


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("posterior", TRAINING)
def test_learner_launches_what_is_listed(build_tiny, monkeypatch, posterior, dtype):
    for package in ("transformers", "deepspeed"):  # the learner's; the kernels need neither
        pytest.importorskip(package)
    monkeypatch.setattr(projection, "choose", lambda *_: "triton")
    training, others = [], []
    for checkpointing in (False, True):
        adapters = {"rank": 8, "posterior": posterior}
        run = build_tiny(dtype, adapters=adapters, trainer={"activation_checkpointing": checkpointing})
        learner, key = run.learner, run.keys[0]
        with recorded_launches() as launches:
            learner.phi_step(run.batch, key, learner.optimizer(1e-3))
            learner.theta_gradient_kl(run.batch, key)
        training += launches
        with recorded_launches() as launches:
            learner.theta_gradient_first_order(run.batch, key)
            learner.forward(run.batch, key)
        others += launches
    name = f"{str(dtype).removeprefix('torch.')}:8"
    assert described(training) == described(v.launched for v in variants(name) if v.use in TRAINING[posterior])
    assert described(others) <= described(v.launched for v in variants(name))


def described(launches: Iterable[resources.Launched]) -> set[tuple]:
    return {
        (launched.name, *sorted(launched.constants.items()), *sorted(launched.options.items())) for launched in launches
    }


def test_compiled_kernels_are_within_limits_and_as_committed(committed, tmp_path):
    """What training launches with the ranks that must not spill; all other rows are made by the same command."""
    command = [sys.executable, "-m", "abmll.kernels.fused.resources", "--write", tmp_path, "--training"]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [*command, "--only", *WITHOUT_SPILLS], env=environment, capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr
    found = read_table(tmp_path)
    assert not spilling(found["rows"]) and not too_large(found["rows"])
    uses = {use for of_posterior in TRAINING.values() for use in of_posterior}
    expected = [row for row in committed["rows"] if case(row) in WITHOUT_SPILLS and row["use"] in uses]
    assert expected
    assert [without_measurements(row) for row in found["rows"]] == [without_measurements(row) for row in expected]
    if found["triton"] == committed["triton"] and found["ptxas"] == committed["ptxas"]:
        assert found["rows"] == expected


def test_interpreter_is_refused(monkeypatch):
    monkeypatch.setattr(triton.knobs.runtime, "interpret", True)
    with pytest.raises(ValueError, match="TRITON_INTERPRET"):
        resources.table()
