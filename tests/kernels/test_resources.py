"""Kernels compiled without a GPU: nothing spills, shared memory fits, and the committed tables say what is compiled."""

from __future__ import annotations

import importlib
import os
import pkgutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import triton
from triton.runtime import KernelInterface

import abmll.kernels.fused
from abmll.kernels import projection
from abmll.kernels.fused import goals, resources
from abmll.kernels.fused.chips import CHIPS
from abmll.kernels.fused.resource_page import markdown
from abmll.kernels.fused.resources import (
    CASES,
    STACK_LIMIT,
    TILES,
    TRAINED,
    TRAINING,
    describe,
    file_name,
    read_tables,
    recorded_launches,
    variants,
)

RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results"
WITHOUT_SPILLS = ("bfloat16:8", "bfloat16:16")


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
    return [row for row in rows for chip in CHIPS if row[f"sm_{chip}"]["shared"] > CHIPS[chip].shared_block]


@pytest.fixture(scope="module")
def committed() -> list[dict]:
    """One table a compiler, the newest last."""
    return read_tables(RESULTS)


def test_committed_tables_are_of_two_compilers(committed):
    assert [file_name(table["triton"]) for table in committed] == [
        f"kernel_resources_triton-{version}.json" for version in ("3.6", "3.9")
    ]


def test_committed_tables_list_exactly_what_is_launched(committed):
    listed = [describe(variant) for name in CASES for variant in variants(name)]
    for table in committed:
        assert [without_measurements(row) for row in table["rows"]] == listed, table["triton"]


def test_committed_tables_are_within_limits(committed):
    for table in committed:
        assert not spilling(table["rows"]), table["triton"]
        assert not too_large(table["rows"]), table["triton"]


def test_committed_page_is_made_from_the_tables(committed):
    assert (RESULTS / "kernel_resources.md").read_text() == markdown(committed, TRAINED)


def test_classes_add_up_to_the_instructions(committed):
    for made in (row[f"sm_{chip}"] for table in committed for row in table["rows"] for chip in CHIPS):
        by_class = made["instructions"].values()
        assert made["total"] > 0
        assert sum(by_class) == pytest.approx(made["total"], abs=0.0005 * (len(by_class) + 1))


def test_both_compilers_reach_the_goals(committed):
    for table in committed:
        assert not goals.missed(table["rows"]), table["triton"]


def rows_at_goals(instructions: float = 0.0, stack: int = 0) -> list[dict]:
    """Rows that need so many instructions more than the goals."""
    dtype, rank = goals.CASE
    return [
        {
            **{"dtype": dtype, "rank": rank, "kernel": goal.kernel, "use": goal.use},
            goals.CHIP: {"total": goal.instructions + instructions, "stack": stack},
        }
        for goal in goals.GOALS
    ]


def test_missed_goals_are_told():
    assert goals.missed(rows_at_goals()) == []
    assert len(goals.missed(rows_at_goals(instructions=0.1))) == len(goals.GOALS)
    assert len(goals.missed(rows_at_goals(stack=8))) == len(goals.GOALS)
    assert len(goals.missed([])) == len(goals.GOALS)
    (only,) = goals.missed(rows_at_goals()[1:])
    assert goals.GOALS[0].kernel in only and goals.GOALS[0].use in only
    # of two variants of one name the dearer counts
    assert len(goals.missed(rows_at_goals(instructions=1) + rows_at_goals())) == len(goals.GOALS)


def test_every_kernel_has_a_tile():
    launched = [variant.launched for name in CASES for variant in variants(name)]
    assert {launch.name for launch in launched} == set(TILES)
    assert all(resources.elements(launch) >= 1 for launch in launched)
    with pytest.raises(ValueError, match=r"TILES: other_kernel"):
        resources.elements(launched[0]._replace(kernel=SimpleNamespace(__name__="other_kernel")))


def test_each_compiler_replaces_its_own_table(tmp_path, committed):
    older, newer = committed
    resources.write(newer, tmp_path)
    resources.write(older, tmp_path)
    resources.write({**newer, "rows": newer["rows"][:3]}, tmp_path)
    assert read_tables(tmp_path) == [older, {**newer, "rows": newer["rows"][:3]}]
    assert (tmp_path / "kernel_resources.md").read_text() == markdown(read_tables(tmp_path), TRAINED)


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
    """What training launches with the ranks that must not spill; all other rows are made by the same command.

    Numbers are compared where the versions are those of a committed table.
    """
    command = [sys.executable, "-m", "abmll.kernels.fused.resources", "--write", tmp_path, "--training"]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [*command, "--only", *WITHOUT_SPILLS], env=environment, capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr
    (found,) = read_tables(tmp_path)
    assert not spilling(found["rows"]) and not too_large(found["rows"])
    same = [table for table in committed if (table["triton"], table["ptxas"]) == (found["triton"], found["ptxas"])]
    table = same[0] if same else committed[-1]
    expected = [row for row in table["rows"] if case(row) in WITHOUT_SPILLS and row["use"] in TRAINED]
    assert expected
    assert [without_measurements(row) for row in found["rows"]] == [without_measurements(row) for row in expected]
    if same:
        assert found["rows"] == expected


ONE_COLUMN = """
import torch, triton
from abmll.kernels.fused import resources as r
for run, sizes in ((r._activation_step, (5, 16, 1)), (r._weight_step, (5, 1, 16)), (r._activation_step, (1, 1, 1))):
    with r.recorded_launches() as launches:
        run(torch.bfloat16, 8, sizes=sizes)
    triton.runtime.driver.set_active(r._Absent(90))
    for launched in launches:
        launched.kernel.warmup(*launched.arguments, grid=(1,), **launched.constants, **launched.options)
        print(launched.name)
"""


def test_matrices_of_one_column_compile():
    """Triton makes a constant of an argument that is 1, which the interpreter does not."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", ONE_COLUMN], env=environment, capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stderr
    assert {"sample_kernel", "adjoint_kernel"} < set(done.stdout.split())


def test_interpreter_is_refused(monkeypatch):
    monkeypatch.setattr(triton.knobs.runtime, "interpret", True)
    with pytest.raises(ValueError, match="TRITON_INTERPRET"):
        resources.table()
