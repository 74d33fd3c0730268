"""benchmarks/memory.py: rows, tables, plot; and that the committed rows are what the code gives."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks/results"
COMMAND = [sys.executable, str(ROOT / "benchmarks/memory.py")]
CONTENDERS = ("frozen forward", "LoRA", "PEFT LoRA", "activation, plain", "activation, fused", "weight, fused")


@pytest.fixture(scope="module")
def modules():
    """The benchmark's own modules, found as its command finds them."""
    before = list(sys.path)
    sys.path.insert(0, str(ROOT / "benchmarks"))
    from memory_rows import contenders, report, rows

    yield contenders, report, rows
    sys.path[:] = before


@pytest.fixture(scope="module")
def tiny(modules):
    """Rows of the tiny model with and without checkpointing, at two lengths."""
    contenders, _, rows = modules
    return [
        rows.make_row(contenders.Case("tiny", 2, tokens, policy), name, fake=True)
        for policy in ("all layers", "none")
        for tokens in (64, 512)
        for name in CONTENDERS
    ]


def by_contender(rows, tokens, policy):
    return {row["contender"]: row for row in rows if (row["tokens"], row["checkpointing"]) == (tokens, policy)}


def test_rows_tell_parts_that_add_up_to_the_peak(tiny):
    assert len(tiny) == 4 * len(CONTENDERS)
    for row in tiny:
        assert (
            sum(row["phases"][row["fullest"]].values())
            == row["peak"]
            == max(sum(sizes.values()) for sizes in row["phases"].values())
        )
        assert row["largest"][0]["size"] >= row["largest"][-1]["size"] > 0
    found = by_contender(tiny, 512, "none")
    assert found["frozen forward"]["peak"] < found["LoRA"]["peak"] < found["activation, fused"]["peak"]
    # PEFT keeps a copy of x in fp32 for each adapted layer of a 16-bit model
    kept = {
        name: row["phases"]["backward"]["kept for the backward pass"] for name, row in found.items() if "LoRA" in name
    }
    assert kept["PEFT LoRA"] - kept["LoRA"] == pytest.approx(2 * 3 * 1024 * 64 * 4, rel=0.1)
    adapters = {
        name: row["phases"][row["fullest"]]["adapters"] for name, row in found.items() if name != "frozen forward"
    }
    assert adapters["LoRA"] == pytest.approx(2 * adapters["PEFT LoRA"], rel=0.1)  # theta and phi


def test_tables_and_plot_from_rows_alone(modules, tiny, tmp_path):
    _, report, _ = modules
    facts = {"provenance": {"device": "some GPU", "commit": "0123456789abcdef"}}
    predicted, measured = tmp_path / "p.json", tmp_path / "m.json"
    predicted.write_text(json.dumps({**facts, "kind": "predicted", "rows": tiny}))
    more = [{**row, "allocated": row["peak"] * 1.01, "reserved": row["peak"] * 1.1} for row in tiny[:2]]
    more += [{**tiny[2], "failed": "CUDA out of memory"}]
    measured.write_text(json.dumps({**facts, "kind": "measured", "rows": more}))
    text = report.report([predicted, measured], tmp_path / "overhead.svg")
    first, second = text.split("# Measured peak")
    assert "allocated" not in first and "## tiny, no checkpointing" in first and "0123456789." in first
    assert "some GPU" not in first and "some GPU" in second
    assert "| 0.9901 |" in second and "CUDA out of memory" in second
    peaks = by_contender(tiny, 64, "all layers")
    over = 100 * (peaks["activation, fused"]["peak"] / peaks["LoRA"]["peak"] - 1)
    assert f"({over:+.2f} %, " in first
    drawn = (tmp_path / "overhead.svg").read_text()
    assert drawn.count("<svg") == 1 and len(drawn) > 10_000


def test_without_a_gpu_only_predictions(tmp_path):
    found = subprocess.run(COMMAND, capture_output=True, text=True)
    assert found.returncode == 2 and "no GPU here: add --fake" in found.stderr
    found = subprocess.run([*COMMAND, "--fake", "--limit-gb", "40"], capture_output=True, text=True)
    assert found.returncode == 2 and "--limit-gb is for measuring" in found.stderr


def committed(model):
    return json.loads((RESULTS / f"memory_predicted_{model}.json").read_text())["rows"]


@pytest.mark.parametrize("model", ["llama3-8b", "qwen2-7b"])
def test_committed_rows_are_complete(model):
    rows = committed(model)
    shapes = {(row["examples"], row["tokens"]) for row in rows}
    assert shapes == {(2, 128), (2, 256), (2, 512), (2, 1024), (2, 2048), (2, 4096), (5, 1024)}
    assert len(rows) == 7 * 2 * 7


@pytest.mark.parametrize("policy", ["all layers", "none"])
@pytest.mark.parametrize("shape", [(2, 512), (5, 1024)])
def test_committed_rows_reach_the_goals(shape, policy):
    """Of Llama3-8B. One is missed, by 0.06 %: fused against our own LoRA at 2 x 512 with checkpointing (README)."""
    peaks = {
        row["contender"]: row["peak"]
        for row in committed("llama3-8b")
        if (row["examples"], row["tokens"], row["checkpointing"]) == (*shape, policy)
    }
    missed = (shape, policy) == ((2, 512), "all layers")
    for posterior, plain in (("activation", 1.02), ("weight", 1.03)):
        fused = peaks[f"{posterior}, fused"]
        assert fused < 1.01 * peaks["PEFT LoRA"]
        assert fused < (1.0107 if missed else 1.01) * peaks["LoRA"]
        if policy == "all layers":
            assert peaks[f"{posterior}, plain"] < plain * peaks["LoRA"]
        if missed:
            assert fused < 16.85e9


def test_a_committed_row_is_what_the_code_gives(modules):
    contenders, _, rows = modules
    found = rows.make_row(contenders.Case("llama3-8b", 2, 512, "all layers"), "activation, fused", fake=True)
    (row,) = [
        row
        for row in committed("llama3-8b")
        if all(row[key] == found[key] for key in ("examples", "tokens", "checkpointing", "contender"))
    ]
    # versions of transformers and torch may move a temporary
    assert found["peak"] == pytest.approx(row["peak"], rel=1e-3)
    assert found["fullest"] == row["fullest"]
