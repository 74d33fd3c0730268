"""How fast is the fused projection, and what memory does it take, beside frozen, plain and LoRA linears?

    pip install --no-deps -e .                           # torch and triton are enough; peft and matplotlib add to it
    python benchmarks/kernels.py --quick                 # some minutes on an H100
    python benchmarks/kernels.py                         # all shapes, ranks and tokens
    python benchmarks/kernels.py --groups 4 --tokens 256 # four episodes side by side
    python benchmarks/kernels.py --report FILE.json      # Markdown and plots from the rows alone

    python benchmarks/kernels.py --shape "Llama3-8B Q" --rank 8 --tokens 1024 --contenders lora fused   # while tuning
    TRITON_INTERPRET=1 python benchmarks/kernels.py --parity-only --shape 48x40 --tokens 20      # without a GPU

Before a configuration is timed, its results are held to float64: no speed is made for code whose parity fails.
Contenders are timed in rounds, one run of each in turn. Exit status 1: a parity check failed, or something raised; its
row says what, and the run goes on. Rows are saved after each configuration, to benchmarks/results/ where --output names
no file.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
import time
from pathlib import Path
from typing import get_args

import torch
from kernel_cases import DTYPES, LLAMA_KV, LLAMA_Q, LLAMA_UP, SHAPES, Configuration, Shape
from kernel_contenders import CONTENDERS, DESCRIPTIONS
from kernel_gate import Gate, gate
from kernel_goals import goals_table
from kernel_measure import measure, number, told
from kernel_report import exceptions, parity_table, report, times_table, verdict
from kernel_timing import device_works

from abmll.kernels import Posterior
from abmll.kernels.backends import interpreted, obstacle
from abmll.provenance import provenance

HERE = Path(__file__).resolve().parent
# Transformers, which PEFT imports, would take this file for an optional package called `kernels`.
sys.path[:] = [folder for folder in sys.path if Path(folder or ".").resolve() != HERE]

QUICK_SHAPES, QUICK_TOKENS = (LLAMA_Q, LLAMA_KV, LLAMA_UP), (1024,)
RANKS, TOKENS = (8, 16), (128, 512, 1024, 4096)


def main(argv: list[str] | None = None) -> int:
    """Exit status: 1 where a parity check failed or something raised."""
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
    parser.add_argument("--posterior", choices=get_args(Posterior), default="activation")
    parser.add_argument("--shape", nargs="+", help="parts of shapes' names, or N x K as in 4096x4096")
    parser.add_argument("--rank", type=int, nargs="+", default=RANKS)
    parser.add_argument("--tokens", type=int, nargs="+", help="of one group")
    parser.add_argument(
        "--groups", type=int, nargs="+", default=(1,), help="episodes side by side, each with its own phi"
    )
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="bf16")
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=CONTENDERS, help="beside frozen")
    parser.add_argument("--parity-only", action="store_true", help="no times; runs in Triton's CPU interpreter too")
    parser.add_argument("--commit", help="git describe --always --abbrev=40 --dirty, for a copy without its .git")
    parser.add_argument("--output", type=Path, help="JSON file of the rows")
    parser.add_argument("--report", type=Path, nargs="+", metavar="FILE", help="only report the rows of these files")
    return parser


def plan(arguments: argparse.Namespace) -> list[Configuration]:
    """What to run, in order. Raises ValueError for a shape that is not known, and for numbers below 1."""
    for name in ("rank", "tokens", "groups"):
        for value in getattr(arguments, name) or ():
            if value < 1:
                raise ValueError(f"--{name}: {value}: must be at least 1")
    shapes = QUICK_SHAPES if arguments.quick else SHAPES
    if arguments.shape:
        shapes = tuple(dict.fromkeys(shape for text in arguments.shape for shape in find_shapes(text)))
    tokens = arguments.tokens or (QUICK_TOKENS if arguments.quick else TOKENS)
    return [
        Configuration(arguments.posterior, shape, rank, count, arguments.dtype, groups)
        for shape in shapes
        for rank in arguments.rank
        for groups in arguments.groups
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
    chosen = ("frozen", *arguments.contenders)
    gates, rows, notes = [], [], {}
    for configuration in configurations:
        entry, new, missing = _results(configuration, chosen, arguments, device)
        gates.append(entry)
        rows += [{**facts, **row} for row in new]
        notes |= dict.fromkeys(missing)
        raised = sum(row["exception"] is not None for row in new)
        print(
            f"[{time.perf_counter() - began:4.0f} s] {configuration}: parity {verdict(entry)}"
            + f"; {raised} of {len(new)} measurements raised" * bool(raised)
        )
        for failure in entry["failures"]:
            print(f"         {failure}")
        found = {"provenance": facts, "contenders": DESCRIPTIONS, "notes": list(notes), "gates": gates, "rows": rows}
        _save(output, found)
        if not device_works(device):  # every further call would raise the same
            print(f"The GPU's context is lost: {len(configurations) - len(gates)} configurations were not run")
            break
    print(f"\n{parity_table(gates)}\n")
    if rows:
        print(f"{times_table(rows, 'both')}\n\n{goals_table(rows)}\n")
    for note in notes:
        print(f"not measured: {note}")
    failed = sum(bool(entry["failures"]) for entry in gates)
    raised = exceptions(gates, rows)
    for line in raised:
        print(f"raised: {line}")
    print(
        f"{len(rows)} rows in {output}; parity fails in {failed} of {len(gates)} configurations; {len(raised)} raised"
    )
    return 1 if failed or raised else 0


def _results(
    configuration: Configuration, chosen: tuple[str, ...], arguments: argparse.Namespace, device: torch.device
) -> tuple[dict, list[dict], list[str]]:
    """The gate's entry, rows and notes. What the gate raises is in its entry: the next configuration may do better."""
    try:
        held = gate(configuration, device)
    except Exception as error:
        return _gate_entry(configuration, Gate({}, (math.nan, ""), []), told(error, f"gate, {configuration}")), [], []
    entry = _gate_entry(configuration, held)
    if held.failures or arguments.parity_only:
        return entry, [], []
    try:
        return entry, *measure(configuration, held, device, arguments.quick, chosen)
    except Exception as error:  # of what all contenders share
        return entry | {"exception": told(error, str(configuration))}, [], []


def _gate_entry(configuration: Configuration, held: Gate, exception: str | None = None) -> dict:
    errors = {
        regime: {name: {q: number(error) for q, error in values.items()} for name, values in found.items()}
        for regime, found in held.errors.items()
    }
    ratio, place = held.worst
    entry = {"configuration": str(configuration), **configuration.columns, "worst": [number(ratio), place]}
    return entry | {"failures": held.failures, "exception": exception, "errors": errors}


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
