"""The benchmark of the fused projection, as far as it goes without a GPU: parity, rows, report."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).parents[2] / "benchmarks"
SMALL = ("--shape", "16x20", "--rank", "4", "--tokens", "5")
FACTS = {"device": "NVIDIA H100 (driver 1)", "python": "3", "versions": {"torch": "2"}, "commit": "c0", "dirty": False}


@pytest.fixture
def run_small(kernels, tmp_path, monkeypatch):
    """Runs a small configuration, clocks replaced; returns the exit status, what was saved, and calls of the clock."""
    measuring, timing = sys.modules["kernel_measure"], sys.modules["kernel_timing"]

    def execute(*options: str) -> tuple[int, dict, list]:
        timed = []

        def once(call):
            timed.append(call)
            call.run(call.prepare())
            return 1.0 + len(timed) % 7

        def memory(call):
            call.run(call.prepare())
            return {"peak_allocated": 100, "peak_reserved": 0, "kept": 7}

        monkeypatch.setattr(timing, "MINIMUM_ROUNDS", 2)
        monkeypatch.setattr(measuring, "interleaved", lambda calls, _: timing.interleaved(calls, 0.0, once))
        monkeypatch.setattr(measuring, "captured", lambda call: call)
        monkeypatch.setattr(measuring, "memory", memory)
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
        gate, measuring = sys.modules["kernel_gate"], sys.modules["kernel_measure"]
        build = gate.build

        def stand_in(name, configuration, inputs):
            contender = build("plain" if name == "fused" else name, configuration, inputs)
            if name != "fused":
                return contender

            def forward():
                y, *sums = contender.forward()
                return (change(y), *sums)

            return contender._replace(forward=forward)

        for module in (gate, measuring):
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
        assert set(errors) == {"plain", "fused"}
        assert {"y", "KL", "-log prior", "dx", "phi mean a", "theta log-variance b"} <= set(errors["fused"])
    assert kernels.main(["--report", str(output)]) == 0
    assert "16x20, r = 4, 5 tokens, bf16 | holds" in capsys.readouterr().out


@pytest.mark.parametrize("posterior", ["activation", "weight"])
def test_true_kernels_pass_for_several_groups(posterior, kernels, tmp_path):
    output = tmp_path / "gates.json"
    options = ("--posterior", posterior, "--groups", "3", "--parity-only", "--output", str(output))
    assert kernels.main([*SMALL, *options]) == 0
    (entry,) = json.loads(output.read_text())["gates"]
    assert entry["configuration"] == "16x20, r = 4, 3 groups of 5 tokens, bf16" and entry["groups"] == 3


def test_broken_kernels_are_not_timed(run_small, monkeypatch, capsys):
    contenders = sys.modules["kernel_contenders"]
    project = contenders.posterior_projection

    def broken(*arguments):
        found = project(*arguments)
        return found._replace(y=1.01 * found.y) if arguments[-1] == "triton" else found

    monkeypatch.setattr(contenders, "posterior_projection", broken)
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


def test_factors_gradients_have_a_bound_of_their_own_beside_16_bits(kernels):
    gate = sys.modules["kernel_gate"]
    names = ("phi mean a", "theta log-variance b", "dx", "KL")
    errors = dict.fromkeys((*names, "phi mean b"), 1e-9)
    assert [gate.limit(name, errors, narrow=True) for name in names] == [2**-16, 2**-16, 2e-6, 2e-6]
    assert gate.limit("phi mean a", errors) == 2e-6
    assert math.isnan(gate.limit("phi mean a", errors | {"phi mean a": math.nan}, narrow=True))


def test_another_rounding_of_dy_is_a_yardstick_of_the_weight_posteriors_gradients_alone(kernels):
    """dy^T x is rounded to bf16 there, and nothing else of it."""
    gate, cases, contenders = (sys.modules[f"kernel_{name}"] for name in ("gate", "cases", "contenders"))
    found = {}
    for posterior, dtype in (("weight", "bf16"), ("weight", "fp16"), ("activation", "bf16")):
        configuration = cases.Configuration(posterior, cases.Shape("small", 16, 24), 4, 6, dtype)
        inputs = cases.make_inputs(configuration, cases.ORDER_ONE, torch.device("cpu"))
        truth = gate.outcome(contenders.posterior_contender(posterior, inputs.upcast(), "torch"))
        found[posterior, dtype] = gate.roundings_of_dy(configuration, inputs, truth)
    assert found["weight", "fp16"] == found["activation", "bf16"] == {}
    assert set(found["weight", "bf16"]) == {f"phi {name}" for name in gate.FACTORS}
    assert all(1e-5 < error < 2**-7 for error in found["weight", "bf16"].values())


def test_rows_carry_what_a_measurement_needs(run_small, plain_for_fused):
    plain_for_fused(lambda y: y)
    status, found, timed = run_small("--commit", "abc-dirty")
    assert status == 0 and timed
    rows = {(row["contender"], row["mode"]): row for row in found["rows"]}
    assert {("frozen", "both"), ("plain", "outer"), ("lora", "both"), ("fused", "backward")} <= set(rows)
    for note in ("compiled: only at r = 8", "grouped_mm: one group's products are plain ones"):
        assert any(found_note.startswith(note) for found_note in found["notes"])
    for row in rows.values():
        assert {"device", "versions", "shape", "N", "K", "tokens", "tokens_real", "rank", "dtype"} <= set(row)
        assert (row["commit"], row["dirty"], row["exception"]) == ("abc", True, None)
        assert {"median_ms", "p20_ms", "p80_ms"} <= set(row["launched"]) and row["launched"]["runs"] == 2
    frozen, fused = rows["frozen", "both"], rows["fused", "both"]
    for way in ("launched", "replayed"):
        ratio = fused[way]["median_ms"] / frozen[way]["median_ms"]
        assert fused[way]["ratio_to_frozen"] == pytest.approx(ratio, abs=1e-4) and frozen[way]["ratio_to_frozen"] == 1
    assert fused["memory"]["extra_peak_allocated"] == 0
    assert set(fused["errors"]) == {"y", "KL", "prior", "dx", "phi", "theta"} == set(fused["eager_errors"])
    assert frozen["errors"] is None


def breaks(contender):
    def forward():
        raise RuntimeError("unspecified\nlaunch failure")

    return contender._replace(forward=forward)


@pytest.fixture
def break_contender(plain_for_fused, monkeypatch):
    """One contender raises from now on, where its rows are made."""

    def put(broken: str, at_once: bool = False) -> None:
        plain_for_fused(lambda y: y)
        measuring = sys.modules["kernel_measure"]
        build = measuring.build

        def stand_in(name, configuration, inputs):
            if name == broken and at_once:
                raise ImportError("no such module")
            contender = build(name, configuration, inputs)
            return breaks(contender) if name == broken else contender

        monkeypatch.setattr(measuring, "build", stand_in)

    return put


@pytest.mark.parametrize("broken", ["frozen", "lora", "fused"])
def test_what_raises_is_in_its_row_and_the_run_goes_on(run_small, break_contender, broken, capsys):
    break_contender(broken)
    status, found, _ = run_small("--tokens", "5", "6")
    assert status == 1 and len(found["gates"]) == 2
    for tokens in (5, 6):
        rows = {(row["contender"], row["mode"]): row for row in found["rows"] if row["tokens"] == tokens}
        row = rows[broken, "both"]
        assert row["exception"] == "RuntimeError: unspecified\nlaunch failure"
        assert row["memory"] is row["launched"] is row["replayed"] is None
        other = rows["plain", "both"]
        assert other["exception"] is None and other["launched"]["runs"] == 2
        assert ("ratio_to_frozen" in other["replayed"]) == (broken != "frozen")
    printed = capsys.readouterr()
    line = f"raised: {broken}, 16x20, r = 4, 1 x 6 tokens, bf16, both: RuntimeError: unspecified launch failure"
    assert line in printed.out and "Traceback" in printed.err


def test_a_contender_that_cannot_be_built_has_rows_too(run_small, break_contender):
    break_contender("plain_randn", at_once=True)
    status, found, _ = run_small()
    rows = {row["mode"]: row["exception"] for row in found["rows"] if row["contender"] == "plain_randn"}
    assert status == 1 and rows == dict.fromkeys(sys.modules["kernel_report"].MODES, "ImportError: no such module")


def test_a_contender_that_raises_while_it_is_timed_keeps_its_memory(run_small, plain_for_fused, monkeypatch):
    plain_for_fused(lambda y: y)
    measuring = sys.modules["kernel_measure"]
    build, runs = measuring.build, []

    def stand_in(name, configuration, inputs):
        contender = build(name, configuration, inputs)
        if name != "lora":
            return contender

        def forward():
            runs.append(name)
            if len(runs) > 3:
                raise RuntimeError("late")
            return contender.forward()

        return contender._replace(forward=forward)

    monkeypatch.setattr(measuring, "build", stand_in)
    status, found, _ = run_small()
    first = next(row for row in found["rows"] if row["contender"] == "lora" and row["mode"] == "forward")
    assert status == 1 and first["exception"] == "RuntimeError: late"
    assert first["memory"]["peak_allocated"] == 100 and first["launched"] is None


def test_what_the_gate_raises_ends_its_configuration_alone(run_small, plain_for_fused, kernels, monkeypatch):
    plain_for_fused(lambda y: y)
    gate = kernels.gate

    def first_raises(configuration, device):
        if configuration.tokens == 5:
            raise RuntimeError("out of resource: shared memory")
        return gate(configuration, device)

    monkeypatch.setattr(kernels, "gate", first_raises)
    status, found, _ = run_small("--tokens", "5", "6")
    assert status == 1 and {row["tokens"] for row in found["rows"]} == {6}
    assert [entry["exception"] for entry in found["gates"]] == ["RuntimeError: out of resource: shared memory", None]
    assert found["gates"][0]["worst"][0] is None and not found["gates"][0]["failures"]


def test_a_lost_gpu_ends_the_run(run_small, plain_for_fused, kernels, monkeypatch, capsys):
    plain_for_fused(lambda y: y)
    monkeypatch.setattr(kernels, "gate", lambda *_: 1 / 0)
    monkeypatch.setattr(kernels, "device_works", lambda device: False)
    status, found, _ = run_small("--tokens", "5", "6", "7")
    assert status == 1 and len(found["gates"]) == 1
    assert "context is lost: 2 configurations were not run" in capsys.readouterr().out


def test_chosen_contenders_run_beside_the_frozen_linear(run_small, plain_for_fused):
    plain_for_fused(lambda y: y)
    _, found, _ = run_small("--contenders", "fused", "lora")
    assert {row["contender"] for row in found["rows"]} == {"frozen", "lora", "fused"}


def test_several_groups_have_rows_of_grouped_products(kernels, run_small, plain_for_fused):
    """16 bytes are eight numbers: with rank 4 PyTorch's grouped product is not run."""
    plain_for_fused(lambda y: y)
    _, found, _ = run_small("--groups", "2", "--shape", "16x24", "--rank", "4", "8")
    rows = [row for row in found["rows"] if row["contender"] == "grouped_mm"]
    assert {row["rank"] for row in rows} == {8} and all(row["groups"] == 2 for row in rows)
    assert all(row["launched"] and not row["replayed"] and row["exception"] is None for row in rows)
    assert "grouped_mm: torch.nn.functional.grouped_mm: rows of multiples of 16 bytes, not r = 4" in found["notes"]
    place = "grouped_mm, 16x24, r = 8, 2 groups of 5 tokens, bf16, both"
    assert any(note.startswith(f"{place}, graph replay: replays of grouped_mm") for note in found["notes"])


@pytest.fixture
def made_up(kernels, tmp_path):
    """A file of made-up rows: fused takes 1.3 frozen times; returns its path. `times` are added, None takes away."""

    def write(name: str = "rows.json", posterior: str = "activation", times: dict | None = None, **facts) -> Path:
        facts = FACTS | facts
        all_times = {"frozen": 1.0, "peft": 9.0, "peft_autocast": 1.4, "lora": 1.25, "plain": 99.0, "plain_randn": 6.5}
        all_times |= {"compiled": 9.0, "compiled_randn": 1.69, "fused": 1.3} | (times or {})
        rows = []
        for shape in (kernels.LLAMA_Q, kernels.LLAMA_KV):
            for tokens in (128, 1024):
                columns = kernels.Configuration(posterior, shape, 8, tokens, "bf16").columns
                for contender, ratio in all_times.items():
                    if ratio is None:
                        continue
                    for mode in ("forward", "both"):
                        time = {"median_ms": ratio * tokens / 1e4, "ratio_to_frozen": ratio, "runs": 20}
                        extra = round((ratio - 1) * tokens * 4e3)
                        memory = {"peak_allocated": 10**7 + extra, "extra_peak_allocated": extra}
                        memory |= {"kept": 10**6, "extra_kept": extra}
                        row = {"contender": contender, "mode": mode, "launched": None, "replayed": time}
                        row["exception"] = None
                        rows.append({**facts, **columns, **row, "memory": memory})
        path = tmp_path / name
        path.write_text(json.dumps({"provenance": facts, "notes": ["a note"], "gates": [], "rows": rows}))
        return path

    return write


def goals_of(text: str) -> dict[str, tuple[str, ...]]:
    """Limit, replayed and launched of each goal in a report."""
    table = text.split("## Goals")[1].split("##")[0]
    lines = [[cell.strip() for cell in line.strip("| ").split("|")] for line in table.splitlines() if line[:1] == "|"]
    return {name: tuple(cells) for name, *cells in lines[2:]}


def test_report_says_which_goals_are_reached(kernels, made_up, capsys):
    pytest.importorskip("matplotlib")
    path = made_up()
    assert kernels.main(["--report", str(path)]) == 0
    text = path.with_suffix(".md").read_text()
    assert text.strip() == capsys.readouterr().out.strip()
    goals = goals_of(text)
    assert goals["time over `frozen`'s"] == ("at most 1.5", "1.30 reached", "not measured")
    assert goals["time over `frozen`'s (stretch)"] == ("at most 1.25", "1.30 NOT reached", "not measured")
    assert goals["time over `peft_autocast`'s"] == ("at most 1", "0.93 reached", "not measured")
    assert goals["times faster than `plain_randn`"] == ("at least 4", "5.00 reached", "not measured")
    assert goals["times faster than `compiled_randn`"] == ("at least 1.5", "1.30 NOT reached", "not measured")
    assert not {name for name in goals if "`peft`" in name or "`plain`" in name or "`compiled`" in name}
    assert goals["extra peak memory, MB"][1] == "1.23 NOT reached"
    assert "c0, clean checkout" in text and "- a note" in text
    figures = [path.with_name(f"rows_{kind}_bf16_r8.png") for kind in ("time", "memory")]
    for figure in figures:
        assert figure.stat().st_size > 10_000 and f"({figure.name})" in text


def test_lora_by_hand_is_the_rival_where_peft_is_absent(kernels, made_up, monkeypatch):
    monkeypatch.setattr(sys.modules["kernel_report"], "figures", lambda rows, stem: "none")
    goals = goals_of(kernels.report([made_up(times={"peft": None, "peft_autocast": None, "compiled_randn": None})]))
    assert goals["time over `lora`'s"] == ("at most 1", "1.04 NOT reached", "not measured")
    assert goals["times faster than `compiled_randn`"] == ("at least 1.5", "not measured", "not measured")


def test_report_of_a_run_without_the_fused_code_says_so(kernels, made_up, monkeypatch):
    monkeypatch.setattr(sys.modules["kernel_report"], "figures", lambda rows, stem: "none")
    goals = goals_of(kernels.report([made_up(times={"fused": None})]))
    assert {value for value in goals.values()} == {
        (limit, "not measured", "not measured")
        for limit in ("at most 1.5", "at most 1.25", "at most 1", "at least 4", "at least 1.5", "under 1")
    }


def test_report_leaves_the_shared_scratch_out_of_the_weight_posteriors_memory(kernels, made_up, monkeypatch):
    monkeypatch.setattr(sys.modules["kernel_report"], "figures", lambda rows, stem: "none")
    path = made_up(posterior="weight")
    scratch = sys.modules["kernel_goals"].scratch_bytes(4096, 4096, torch.bfloat16) / 1e6
    assert scratch > 10
    goals = goals_of(kernels.report([path]))
    assert goals["time over `frozen`'s"][:2] == ("at most 3.5", "1.30 reached")
    assert goals["times faster than `plain_randn`"][0] == "at least 4"
    assert goals["times faster than `compiled_randn`"][0] == "at least 1.5"
    (memory,) = [name for name in goals if name.startswith("extra peak memory")]
    # made-up rows hold 1.23 MB in all, less than the bands
    assert memory == f"extra peak memory, MB, apart from {scratch:.0f} MB that all layers share"
    assert float(goals[memory][1].split()[0]) == pytest.approx(1.23 - scratch, abs=0.01)


def test_report_tells_what_raised(kernels, made_up, monkeypatch):
    monkeypatch.setattr(sys.modules["kernel_report"], "figures", lambda rows, stem: "none")
    path = made_up()
    found = json.loads(path.read_text())
    for row in found["rows"]:
        if row["contender"] == "lora":
            row |= {"memory": None, "replayed": None, "exception": "RuntimeError: a\nb"}
    columns = kernels.Configuration("activation", kernels.LLAMA_Q, 8, 128, "bf16").columns
    entry = {"configuration": "some", **columns, "worst": [None, ""], "failures": [], "exception": "ValueError: c"}
    found["gates"] = [entry]
    path.write_text(json.dumps(found))
    text = kernels.report([path])
    assert "- lora, Llama3-8B Q, O, r = 8, 1 x 128 tokens, bf16, both: RuntimeError: a b" in text
    assert "- some: ValueError: c" in text and "| some | NOT HELD: it raised | NaN |" in text
    assert text.count("– / – raised") == 2 * 4  # two modes of four configurations


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
    with pytest.raises(ValueError, match="--groups: 0: must be at least 1"):
        kernels.plan(kernels._parser().parse_args(["--groups", "0"]))


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there")
def test_without_a_gpu_it_says_what_it_needs(kernels, tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        kernels.main([*SMALL, "--output", str(tmp_path / "rows.json")])
    assert end.value.code == 2 and not list(tmp_path.iterdir())
    assert "run on a GPU, or with --parity-only" in capsys.readouterr().err


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("posterior", ["activation", "weight"])
def test_on_a_gpu_every_contender_is_timed(posterior, kernels, tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules["kernel_measure"], "SECONDS", 0.01)
    output = tmp_path / "rows.json"
    options = ("--posterior", posterior, "--shape", "256x128", "--rank", "8", "--tokens", "64", "--groups", "1", "2")
    assert kernels.main([*options, "--output", str(output)]) == 0
    found = json.loads(output.read_text())
    times = {(row["contender"], row["groups"]): row for row in found["rows"] if row["mode"] == "both"}
    assert {("frozen", 1), ("lora", 1), ("plain_randn", 1), ("fused", 1), ("grouped_mm", 2), ("fused", 2)} <= set(times)
    for (name, _), row in times.items():
        assert row["launched"]["median_ms"] > 0 and (name == "grouped_mm" or row["replayed"]["median_ms"] > 0)
