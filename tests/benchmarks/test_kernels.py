"""The benchmark of the fused projection, as far as it goes without a GPU: parity, rows, report."""

from __future__ import annotations

import importlib.util
import json
import math
import sys
from pathlib import Path

import pytest
import torch

import abmll.kernels.fused.launch as launch

FOLDER = Path(__file__).parents[2] / "benchmarks"
SMALL = ("--shape", "16x20", "--rank", "4", "--tokens", "5")
FACTS = {"device": "NVIDIA H100 (driver 1)", "python": "3", "versions": {"torch": "2"}, "commit": "c0", "dirty": False}


@pytest.fixture
def kernels(monkeypatch):
    """The benchmark's module, by its path: `kernels` may be another. What it imports lies beside it."""
    monkeypatch.syspath_prepend(FOLDER)
    specification = importlib.util.spec_from_file_location("benchmark_kernels", FOLDER / "kernels.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def forgotten():
    """Nobody else shall meet modules by these names."""
    yield
    for name in [name for name, module in sys.modules.items() if str(FOLDER) in str(getattr(module, "__file__", ""))]:
        del sys.modules[name]


@pytest.fixture
def run_small(kernels, tmp_path, monkeypatch):
    """Runs a small configuration, clocks replaced; returns the exit status, what was saved, and calls of the clock."""

    def execute(*options: str) -> tuple[int, dict, list]:
        timed = []

        def clock(call, seconds):
            timed.append(call)
            call.run(call.prepare())
            return {"median_ms": 2.0 * len(timed), "p20_ms": 1.0, "p80_ms": 3.0, "runs": 10}

        monkeypatch.setattr(kernels, "launched", clock)
        monkeypatch.setattr(kernels, "replayed", clock)
        monkeypatch.setattr(kernels, "memory", lambda call: {"peak_allocated": 100, "peak_reserved": 0, "kept": 7})
        arguments = kernels._parser().parse_args([*SMALL, *options])
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        output = tmp_path / "rows.json"
        status = kernels.run(kernels.plan(arguments), arguments, device, output)
        return status, json.loads(output.read_text()), timed

    return execute


@pytest.fixture
def plain_for_fused(kernels, monkeypatch):
    """Plain code in the fused code's place, so that only the benchmark itself is tested; `change` alters its y."""

    def put(change):
        gate = sys.modules["kernel_gate"]
        build = kernels.build

        def stand_in(name, configuration, inputs):
            contender = build("plain" if name.startswith("fused") else name, configuration, inputs)
            if not name.startswith("fused"):
                return contender

            def forward():
                y, *sums = contender.forward()
                return (change(y), *sums)

            return contender._replace(forward=forward)

        for module in (kernels, gate):
            monkeypatch.setattr(module, "build", stand_in)

    return put


def test_transformers_cannot_take_the_script_for_a_package(kernels):
    assert FOLDER not in [Path(folder).resolve() for folder in sys.path]


@pytest.mark.parametrize("posterior", ["activation", "weight"])
def test_true_kernels_pass_and_the_gates_are_reported(posterior, kernels, tmp_path, capsys):
    output = tmp_path / "gates.json"
    assert kernels.main([*SMALL, "--posterior", posterior, "--parity-only", "--output", str(output)]) == 0
    found = json.loads(output.read_text())
    assert found["rows"] == []
    (entry,) = found["gates"]
    assert entry["failures"] == [] and 0 < entry["worst"][0] <= 1
    for errors in entry["errors"].values():
        others = {"fused_library"} if posterior == "activation" else set()  # W0's product is always the library's there
        assert set(errors) == {"plain", "fused", *others}
        assert {"y", "KL", "-log prior", "dx", "phi mean a", "theta log-variance b"} <= set(errors["fused"])
    assert kernels.main(["--report", str(output)]) == 0
    assert "16x20, r = 4, 5 tokens, bf16 | holds" in capsys.readouterr().out


def test_broken_kernels_are_not_timed(run_small, monkeypatch, capsys):
    sample = launch.sample

    def broken(matrix, y, *arguments):
        sums = sample(matrix, y, *arguments)
        y.mul_(1.01)
        return sums

    monkeypatch.setattr(launch, "sample", broken)
    status, found, timed = run_small()
    assert status == 1 and not timed and found["rows"] == []
    assert "fused, order one, y: error 0.01" in capsys.readouterr().out


def unwritten(y):
    hole = torch.empty_like(y)
    hole[:-1] = y[:-1]
    return hole


def one_element_nan(y):
    return y.masked_fill(torch.arange(y.numel()).view(y.shape).to(y.device) == 5, torch.nan)


@pytest.mark.parametrize("change", [unwritten, one_element_nan, lambda y: y + 0.02 * y.std()])
def test_wrong_outputs_are_not_timed(run_small, plain_for_fused, change):
    plain_for_fused(change)
    status, found, timed = run_small()
    assert status == 1 and not timed and found["rows"] == []
    assert any("order one, y" in failure for failure in found["gates"][0]["failures"])


def test_nothing_passes_beside_eager_code_that_fails(kernels):
    limit = sys.modules["kernel_gate"].limit
    assert limit("y", {"y": 1e-3}) == pytest.approx(3e-3)
    assert limit("y", {"y": 1e-9}) == pytest.approx(2e-6)
    assert limit("KL", {"KL": 1e-9, "phi mean b": 1e-4}) == pytest.approx(3e-4)
    assert math.isnan(limit("y", {"y": math.nan}))


def test_a_copy_without_its_history_has_no_commit(kernels, monkeypatch):
    provenance = sys.modules["provenance"]

    def no_git(*arguments, **options):
        raise FileNotFoundError("git")

    monkeypatch.setattr(provenance.subprocess, "run", no_git)
    assert provenance.commit() == {"commit": None, "dirty": None}


def test_rows_carry_what_a_measurement_needs(run_small, plain_for_fused):
    plain_for_fused(lambda y: y)
    status, found, timed = run_small("--commit", "abc-dirty")
    assert status == 0 and timed
    rows = {(row["contender"], row["mode"]): row for row in found["rows"]}
    assert {("frozen", "both"), ("plain", "outer"), ("fused_library", "backward")} <= set(rows)
    assert any(note.startswith("compiled: only at r = 8") for note in found["notes"])
    for row in rows.values():
        assert {"device", "versions", "shape", "N", "K", "tokens", "tokens_real", "rank", "dtype"} <= set(row)
        assert (row["commit"], row["dirty"]) == ("abc", True)
    frozen, fused = rows["frozen", "both"], rows["fused", "both"]
    for way in ("launched", "replayed"):
        ratio = fused[way]["median_ms"] / frozen[way]["median_ms"]
        assert fused[way]["ratio_to_frozen"] == pytest.approx(ratio, abs=1e-4) and frozen[way]["ratio_to_frozen"] == 1
    assert fused["memory"]["extra_peak_allocated"] == 0
    assert set(fused["errors"]) == {"y", "KL", "prior", "dx", "phi", "theta"} == set(fused["eager_errors"])
    assert frozen["errors"] is None


@pytest.fixture
def made_up(kernels, tmp_path):
    """A file of made-up rows: fused takes 1.2 frozen times, plain 6, compiled 1.5; returns its path."""

    def write(name: str = "rows.json", posterior: str = "activation", **facts) -> Path:
        facts = FACTS | facts
        times = {"frozen": 1.0, "peft": 1.4, "plain": 6.0, "compiled": 1.5, "fused": 1.2, "fused_library": 1.3}
        rows = []
        for shape in (kernels.LLAMA_Q, kernels.LLAMA_KV):
            for tokens in (128, 1024):
                columns = kernels.Configuration(posterior, shape, 8, tokens, "bf16").columns
                for contender, ratio in times.items():
                    for mode in ("forward", "both"):
                        time = {"median_ms": ratio * tokens / 1e4, "ratio_to_frozen": ratio, "runs": 20}
                        extra = round((ratio - 1) * tokens * 4e3)
                        memory = {"peak_allocated": 10**7 + extra, "extra_peak_allocated": extra}
                        memory |= {"kept": 10**6, "extra_kept": extra}
                        row = {"contender": contender, "mode": mode, "launched": None, "replayed": time}
                        rows.append({**facts, **columns, **row, "memory": memory})
        path = tmp_path / name
        path.write_text(json.dumps({"provenance": facts, "notes": ["a note"], "gates": [], "rows": rows}))
        return path

    return write


def test_report_says_which_goals_are_reached(kernels, made_up, capsys):
    pytest.importorskip("matplotlib")
    path = made_up()
    assert kernels.main(["--report", str(path)]) == 0
    text = path.with_suffix(".md").read_text()
    assert text.strip() == capsys.readouterr().out.strip()
    goals = {line.split("|")[1].strip(): line.split("|")[3:] for line in text.splitlines() if line.startswith("| ")}
    assert goals["time, over the frozen linear's"][0].strip() == "1.20 reached"
    assert goals["time, over the frozen linear's"][2].strip() == "1.30 NOT reached"
    assert goals["time, over PEFT's LoRA linear's"][0].strip() == "0.86 reached"
    assert goals["times faster than plain PyTorch"][0].strip() == "5.00 reached"
    assert goals["times faster than compiled"][0].strip() == "1.25 NOT reached"
    assert goals["times faster than compiled, torch.randn"][0].strip() == "not measured"
    assert goals["extra peak memory, MB"][0].strip() == "0.82 reached"
    assert "c0, clean checkout" in text and "- a note" in text
    figures = [path.with_name(f"rows_{kind}_bf16_r8.png") for kind in ("time", "memory")]
    for figure in figures:
        assert figure.stat().st_size > 10_000 and f"({figure.name})" in text


def test_report_leaves_the_shared_scratch_out_of_the_weight_posteriors_memory(kernels, made_up, monkeypatch):
    monkeypatch.setattr(sys.modules["kernel_report"], "figures", lambda rows, stem: "none")
    text = kernels.report([made_up(posterior="weight")])
    goals = {line.split("|")[1].strip(): line.split("|")[2:] for line in text.splitlines() if line.startswith("| ")}
    assert goals["time, over the frozen linear's"][0].strip() == "at most 2"
    assert goals["times faster than plain PyTorch"][0].strip() == "at least 5"
    (memory,) = [name for name in goals if name.startswith("extra peak memory")]
    # made-up rows hold 0.82 MB in all, less than the bands of 2,048 rows x 4,096 in fp32 and bf16
    assert memory == "extra peak memory, MB, apart from 50 MB that all layers share"
    assert float(goals[memory][1].split()[0]) == pytest.approx(0.82 - 2048 * 4096 * 6 / 1e6, abs=0.01)


def test_report_takes_files_of_one_device_together(kernels, made_up, monkeypatch):
    monkeypatch.setattr(sys.modules["kernel_report"], "figures", lambda rows, stem: "none")
    first, second = made_up("a.json"), made_up("b.json", device="NVIDIA A100 (driver 1)")
    with pytest.raises(ValueError, match="several devices: NVIDIA A100"):
        kernels.report([first, second])
    one, two = (kernels.report([first] * count).count("c0, clean checkout") for count in (1, 2))
    assert (one, two) == (1, 2)


def test_shapes_are_found_by_size_or_name(kernels):
    assert [(shape.outputs, shape.inputs) for shape in kernels.find_shapes("48x40")] == [(48, 40)]
    assert [shape.name for shape in kernels.find_shapes("qwen2-7b k/v")] == ["Qwen2-7B K/V"]
    with pytest.raises(ValueError, match=r"--shape: 'mistral': must be N x K .* 'Llama3-8B Q, O'"):
        kernels.find_shapes("mistral")


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there")
def test_without_a_gpu_it_says_what_it_needs(kernels, tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        kernels.main([*SMALL, "--output", str(tmp_path / "rows.json")])
    assert end.value.code == 2 and not list(tmp_path.iterdir())
    assert "run on a GPU, or with --parity-only" in capsys.readouterr().err
