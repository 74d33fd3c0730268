"""How much memory does one episode take, of what, and how much more than plain LoRA?

    python benchmarks/memory.py --fake                       # predicted: on fake tensors, no GPU needed, half an hour
    python benchmarks/memory.py --fake --quick               # two shapes of Llama3-8B, some minutes
    python benchmarks/memory.py                              # measured: on a GPU, beside the prediction
    python benchmarks/memory.py --limit-gb 40 --quick        # measured, and nothing may take more than 40 GB
    python benchmarks/memory.py --report FILE.json ... --plot FILE.svg     # tables and plot from the rows alone

    pip install peft matplotlib                              # PEFT's rows, and the plot

Predicted rows count every storage of the project's own code, run on fake tensors as a GPU would run it; measured ones
ask the GPU's allocator about the same code. Rows are saved after each case, to benchmarks/results/ where --output names
no file, one a model; predicted and measured rows go to files of their own. Sizes in GB are 1e9 bytes.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import torch
from memory_rows.contenders import CONTENDERS, PEFT, Case
from memory_rows.report import report, row_line
from memory_rows.rows import make_row

from abmll.models.checkpointing import POLICIES
from abmll.provenance import provenance

RESULTS = Path(__file__).resolve().parent / "results"
MODELS = ("llama3-8b", "qwen2-7b")
EXAMPLES, TOKENS = 2, (128, 256, 512, 1024, 2048, 4096)  # 256 to 8,192 tokens a batch
LARGE = (5, 1024)
QUICK = ((2, 512), LARGE)


def main(argv: list[str] | None = None) -> int:
    """Exit status: 1 where a measured case did not fit."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    if arguments.report:
        print(report(arguments.report, arguments.plot))
        return 0
    if not arguments.fake and not torch.cuda.is_available():
        parser.error("no GPU here: add --fake to predict, or run it on a machine with one")
    if arguments.fake and arguments.limit_gb is not None:
        parser.error("--limit-gb is for measuring; a prediction says what it needs")
    contenders = arguments.contender or [
        name for name in CONTENDERS if name != PEFT or importlib.util.find_spec("peft") is not None
    ]
    kind = "predicted" if arguments.fake else "measured"
    facts = {"kind": kind, "limit_gb": arguments.limit_gb, "provenance": provenance()}
    if arguments.limit_gb is not None:
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(arguments.limit_gb * 1e9 / total, 1.0))
    outputs: dict[Path, list[dict[str, Any]]] = {}
    for case in cases(arguments):
        output = arguments.output or RESULTS / f"memory_{kind}_{case.model}.json"
        rows = outputs.setdefault(output, [])
        for name in contenders:
            rows.append(make_row(case, name, arguments.fake))
            print(row_line(rows[-1]), flush=True)
            write_rows(output, facts, rows)
    print(f"\n{report(list(outputs))}\nrows in {', '.join(map(str, outputs))}")
    return int(any("failed" in row for rows in outputs.values() for row in rows))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fake", action="store_true", help="predict on fake tensors")
    parser.add_argument("--quick", action="store_true", help="Llama3-8B at 2 x 512 and 5 x 1,024 tokens")
    parser.add_argument("--model", nargs="+", choices=MODELS)
    parser.add_argument("--tokens", type=int, nargs="+", help=f"of each of the batch's {EXAMPLES} prompts")
    parser.add_argument("--checkpointing", nargs="+", choices=POLICIES, default=["all layers", "none"])
    parser.add_argument("--contender", nargs="+", choices=tuple(CONTENDERS))
    parser.add_argument("--limit-gb", type=float, help="a hard limit on what the GPU's allocator may take")
    parser.add_argument("--output", type=Path, help="JSON file of the rows")
    parser.add_argument("--report", type=Path, nargs="+", metavar="FILE", help="only report the rows of these files")
    parser.add_argument("--plot", type=Path, help="with --report: file of the plot of overhead against tokens")
    return parser


def write_rows(path: Path, facts: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """One JSON object; a row a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = ",\n".join(json.dumps(row) for row in rows)
    path.write_text(f'{json.dumps(facts)[:-1]}, "rows": [\n{lines}\n]}}\n')


def cases(arguments: argparse.Namespace) -> list[Case]:
    shapes = QUICK if arguments.quick else (*((EXAMPLES, tokens) for tokens in TOKENS), LARGE)
    if arguments.tokens:
        shapes = tuple((EXAMPLES, tokens) for tokens in arguments.tokens)
    models = arguments.model or (MODELS[:1] if arguments.quick else MODELS)
    return [Case(model, *shape, policy) for model in models for policy in arguments.checkpointing for shape in shapes]


if __name__ == "__main__":
    sys.exit(main())
