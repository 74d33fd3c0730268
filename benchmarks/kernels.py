"""How fast is the fused projection, and what memory does it take, beside frozen, plain and LoRA linears?

    pip install --no-deps -e .                           # torch and triton are enough; peft and matplotlib add to it
    python benchmarks/kernels.py --quick                 # a few minutes on an H100
    python benchmarks/kernels.py                         # all shapes, ranks and tokens
    python benchmarks/kernels.py --report FILE.json      # Markdown and plots from the rows alone

    TRITON_INTERPRET=1 python benchmarks/kernels.py --parity-only --shape 48x40 --tokens 20      # without a GPU

Before a configuration is timed, its results are held to float64: no speed is made for code whose parity fails, and the
exit status is then 1. Rows are saved after each configuration, to benchmarks/results/ where --output names no file.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
import time
from pathlib import Path

import torch
from kernel_cases import DTYPES, LLAMA_KV, LLAMA_Q, LLAMA_UP, SHAPES, TRAINING, Configuration, Shape, make_inputs
from kernel_contenders import CONTENDERS, DESCRIPTIONS, Contender, NotRun, build
from kernel_gate import Gate, gate
from kernel_report import MODES, goals_table, parity_table, report, times_table
from kernel_timing import Call, launched, memory, replayed
from provenance import provenance

from abmll.kernels.backends import interpreted, obstacle

HERE = Path(__file__).resolve().parent
# Transformers, which PEFT imports, would take this file for an optional package called `kernels`.
sys.path[:] = [folder for folder in sys.path if Path(folder or ".").resolve() != HERE]

# Compiling takes tens of seconds each: only here.
COMPILED_RANK, COMPILED_TOKENS, COMPILED_SHAPES = 8, 1024, (LLAMA_Q, LLAMA_KV, LLAMA_UP)
COMPILED_SHAPES_QUICK = (LLAMA_Q,)
QUICK_SHAPES, QUICK_TOKENS = (LLAMA_Q, LLAMA_KV, LLAMA_UP), (1024,)
RANKS, TOKENS = (8, 16), (128, 512, 1024, 4096)
SECONDS = 0.04  # of runs for one median
# Errors in a row: the largest of each group over both regimes. The file's gates hold all of them.
ERROR_GROUPS = {"y": ("y", "outer y"), "KL": ("KL", "outer KL"), "prior": ("-log prior", "outer -log prior")}


def main(argv: list[str] | None = None) -> int:
    """Exit status: 1 where a parity check failed."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    if arguments.report:
        print(report(arguments.report))
        return 0
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        configurations = plan(arguments)
        check_device(arguments, device)
    except ValueError as error:
        parser.error(str(error))
    output = arguments.output or _output(arguments, device)
    if device.type == "cpu":
        return run(configurations, arguments, device, output)
    with torch.cuda.stream(torch.cuda.Stream()):  # graphs cannot be captured on the default one
        return run(configurations, arguments, device, output)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="three shapes of Llama3-8B at 1,024 tokens")
    parser.add_argument("--posterior", choices=tuple(CONTENDERS), default="activation")
    parser.add_argument("--shape", nargs="+", help="parts of shapes' names, or N x K as in 4096x4096")
    parser.add_argument("--rank", type=int, nargs="+", default=RANKS)
    parser.add_argument("--tokens", type=int, nargs="+")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="bf16")
    parser.add_argument("--parity-only", action="store_true", help="no times; runs in Triton's CPU interpreter too")
    parser.add_argument("--commit", help="git describe --always --abbrev=40 --dirty, for a copy without its .git")
    parser.add_argument("--output", type=Path, help="JSON file of the rows")
    parser.add_argument("--report", type=Path, nargs="+", metavar="FILE", help="only report the rows of these files")
    return parser


def plan(arguments: argparse.Namespace) -> list[Configuration]:
    """What to run, in order. Raises ValueError for a shape that is not known."""
    shapes = QUICK_SHAPES if arguments.quick else SHAPES
    if arguments.shape:
        shapes = tuple(dict.fromkeys(shape for text in arguments.shape for shape in find_shapes(text)))
    tokens = arguments.tokens or (QUICK_TOKENS if arguments.quick else TOKENS)
    return [
        Configuration(arguments.posterior, shape, rank, count, arguments.dtype)
        for shape in shapes
        for rank in arguments.rank
        for count in tokens
    ]


def find_shapes(text: str) -> list[Shape]:
    """By N x K, or all whose name holds the text."""
    sizes = re.fullmatch(r"(\d+)x(\d+)", text)
    if sizes:
        return [Shape(text, int(sizes[1]), int(sizes[2]))]
    found = [shape for shape in SHAPES if text.lower() in shape.name.lower()]
    if not found:
        names = ", ".join(repr(shape.name) for shape in SHAPES)
        raise ValueError(f"--shape: {text!r}: must be N x K as in 4096x4096, or a part of one of {names}")
    return found


def check_device(arguments: argparse.Namespace, device: torch.device) -> None:
    """Raises ValueError where the kernels cannot run, or cannot be timed."""
    for rank in arguments.rank:
        reason = obstacle(device, DTYPES[arguments.dtype], rank)
        if reason is not None:
            raise ValueError(reason)
    if interpreted() and not arguments.parity_only:
        raise ValueError("TRITON_INTERPRET=1: nothing to time in the interpreter; run on a GPU, or with --parity-only")
    if interpreted() and device.type != "cpu":
        raise ValueError("TRITON_INTERPRET=1: the kernels run on the GPU here; unset it")


def _output(arguments: argparse.Namespace, device: torch.device) -> Path:
    name = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    parts = ["kernels", arguments.posterior, re.sub(r"\W+", "_", name.lower())]
    parts += ["parity"] * arguments.parity_only + ["quick"] * arguments.quick
    return HERE / "results" / f"{'_'.join(parts)}.json"


def run(configurations: list[Configuration], arguments: argparse.Namespace, device: torch.device, output: Path) -> int:
    """Gate, then time, each configuration; save after each; print the tables. Exit status as in `main`."""
    began = time.perf_counter()
    facts = provenance()
    if arguments.commit:
        commit = arguments.commit.removesuffix("-dirty")
        facts |= {"commit": commit, "dirty": commit != arguments.commit}
    gates, rows, notes = [], [], {}
    for configuration in configurations:
        held = gate(configuration, device)
        gates.append(_gate_entry(configuration, held))
        print(f"[{time.perf_counter() - began:4.0f} s] {configuration}: parity {'FAILS' if held.failures else 'holds'}")
        for failure in held.failures:
            print(f"         {failure}")
        if not held.failures and not arguments.parity_only:
            new, missing = measure(configuration, held, arguments.quick, device)
            rows += [{**facts, **row} for row in new]
            notes |= dict.fromkeys(missing)
        _save(
            output,
            {"provenance": facts, "contenders": DESCRIPTIONS, "notes": list(notes), "gates": gates, "rows": rows},
        )
    print(f"\n{parity_table(gates)}\n")
    if rows:
        print(f"{times_table(rows, 'both')}\n\n{goals_table(rows)}\n")
    for note in notes:
        print(f"not measured: {note}")
    failed = sum(bool(entry["failures"]) for entry in gates)
    print(f"{len(rows)} rows in {output}; parity fails in {failed} of {len(gates)} configurations")
    return 1 if failed else 0


def measure(
    configuration: Configuration, held: Gate, quick: bool, device: torch.device
) -> tuple[list[dict], list[str]]:
    """Rows of every contender and mode, and why some are missing."""
    inputs = make_inputs(configuration, TRAINING, device)
    rows, notes, floors = [], [], {}
    for name in CONTENDERS[configuration.posterior]:
        try:
            if name.startswith("compiled"):
                _check_compiled(configuration, quick)
            contender = build(name, configuration, inputs)
            with contender.context():
                for mode, call in calls(contender).items():
                    row = _row(call, notes, f"{name}, {configuration}, {mode}")
                    floor = floors.setdefault(mode, row)  # the frozen linear comes first
                    columns = {"contender": name, "mode": mode, **_relative(row, floor), **_error_columns(name, held)}
                    rows.append(configuration.columns | columns)
        except NotRun as reason:
            notes.append(f"{name}: {reason}")
        except Exception as error:
            if name == "frozen" or (name.startswith("fused") and not isinstance(error, torch.OutOfMemoryError)):
                raise
            notes.append(f"{name}, {configuration}: {_first_line(error)}")
    return rows, notes


def calls(contender: Contender) -> dict[str, Call]:
    """What each mode of MODES times."""
    found = {
        "forward": Call(lambda: None, lambda _: contender.forward()),
        "backward": Call(contender.forward, contender.gradients),
        "both": Call(lambda: None, lambda _: contender.gradients(contender.forward())),
        "outer": Call(lambda: None, lambda _: contender.outer()),
    }
    return {mode: found[mode] for mode in MODES if mode != "outer" or contender.outer is not None}


def _check_compiled(configuration: Configuration, quick: bool) -> None:
    shapes = COMPILED_SHAPES_QUICK if quick else COMPILED_SHAPES
    sizes = (configuration.rank, configuration.tokens)
    if sizes != (COMPILED_RANK, COMPILED_TOKENS) or configuration.shape not in shapes:
        names = "; ".join(shape.name for shape in shapes)
        raise NotRun(f"only at r = {COMPILED_RANK} and {COMPILED_TOKENS:,} tokens of {names}: it takes long to compile")


def _row(call: Call, notes: list[str], where: str) -> dict[str, dict | None]:
    row = {"memory": memory(call), "launched": launched(call, SECONDS), "replayed": None}
    try:
        row["replayed"] = replayed(call, SECONDS)
    except RuntimeError as error:
        notes.append(f"{where}, graph replay: {_first_line(error)}")
    return row


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"


def _relative(row: dict, floor: dict) -> dict:
    """The row with ratios to the frozen linear's times, and bytes beyond its bytes."""
    found = dict(row)
    for way in ("launched", "replayed"):
        if row[way] is not None and floor[way] is not None:
            found[way] = {**row[way], "ratio_to_frozen": round(row[way]["median_ms"] / floor[way]["median_ms"], 4)}
    extra = {f"extra_{name}": value - floor["memory"][name] for name, value in row["memory"].items()}
    return found | {"memory": row["memory"] | extra}


def _error_columns(name: str, held: Gate) -> dict:
    """Largest errors of this contender and of eager code, against float64, by ERROR_GROUPS."""

    def largest(contender: str) -> dict | None:
        if any(contender not in found for found in held.errors.values()):
            return None
        errors = [(quantity, error) for found in held.errors.values() for quantity, error in found[contender].items()]
        groups: dict[str, float] = {}
        for quantity, error in errors:
            group = next((key for key, members in ERROR_GROUPS.items() if quantity in members), quantity.split()[0])
            groups[group] = max(groups.get(group, 0.0), _number(error))
        return groups

    return {"errors": largest(name), "eager_errors": largest("plain")}


def _gate_entry(configuration: Configuration, held: Gate) -> dict:
    errors = {
        regime: {name: {q: _number(error) for q, error in values.items()} for name, values in found.items()}
        for regime, found in held.errors.items()
    }
    ratio, place = held.worst
    entry = {"configuration": str(configuration), **configuration.columns, "worst": [_number(ratio), place]}
    return entry | {"failures": held.failures, "errors": errors}


def _number(value: float) -> float | None:
    """Three digits; None for what JSON has no number for."""
    return float(f"{value:.3g}") if math.isfinite(value) else None


def _save(path: Path, found: dict) -> None:
    """One row a line, so that changes can be read."""
    parts = []
    for name, value in found.items():
        text = json.dumps(value, ensure_ascii=False)
        if isinstance(value, list) and value:
            text = "[\n" + ",\n".join(json.dumps(entry, ensure_ascii=False) for entry in value) + "\n]"
        parts.append(f"{json.dumps(name)}: {text}")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text("{\n" + ",\n".join(parts) + "\n}\n")
    temporary.replace(path)


if __name__ == "__main__":
    sys.exit(main())
