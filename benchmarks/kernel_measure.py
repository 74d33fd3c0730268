"""Rows of one configuration: time and memory of every contender in every mode, side by side."""

from __future__ import annotations

import math
import sys
import traceback
from collections.abc import Collection

import torch
from kernel_cases import LLAMA_KV, LLAMA_Q, LLAMA_UP, TRAINING, Configuration, make_inputs
from kernel_contender import Contender, NotRun
from kernel_contenders import CONTENDERS, build
from kernel_gate import Gate
from kernel_report import MODES
from kernel_timing import Call, captured, interleaved, memory

# Compiling takes tens of seconds each: only here.
COMPILED_RANK, COMPILED_TOKENS, COMPILED_SHAPES = 8, 1024, (LLAMA_Q, LLAMA_KV, LLAMA_UP)
COMPILED_SHAPES_QUICK = (LLAMA_Q,)
SECONDS = 0.3  # a contender, of rounds in which each runs once
ERROR_LENGTH = 2000
# Errors in a row: the largest of each group over both regimes. The file's gates hold all of them.
ERROR_GROUPS = {"y": ("y", "outer y"), "KL": ("KL", "outer KL"), "prior": ("-log prior", "outer -log prior")}


def measure(
    configuration: Configuration,
    held: Gate,
    device: torch.device,
    quick: bool = False,
    chosen: Collection[str] = CONTENDERS,
) -> tuple[list[dict], list[str]]:
    """Rows of every chosen contender and mode, and why some are missing. What one raises is in its row: `exception`."""
    inputs = make_inputs(configuration, TRAINING, device)
    contenders, broken, notes = {}, {}, []
    torch.compiler.reset()  # else the shapes seen before would count against the limit of recompilations
    for name in CONTENDERS:
        if name not in chosen:
            continue
        try:
            if name.startswith("compiled"):
                _check_compiled(configuration, quick)
            contenders[name] = build(name, configuration, inputs)
        except NotRun as reason:
            notes.append(f"{name}: {reason}")
        except Exception as error:
            broken[name] = told(error, f"{name}, {configuration}")
    rows = []
    for mode in MODES:
        found, missing = _measure_mode(contenders, mode, f"{configuration}, {mode}")
        notes += missing
        found |= {name: _empty(error) for name, error in broken.items()}
        for name in [name for name in CONTENDERS if name in found]:
            columns = {"contender": name, "mode": mode, **_relative(found[name], found.get("frozen"))}
            rows.append(configuration.columns | columns | _error_columns(name, held))
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


def _measure_mode(contenders: dict[str, Contender], mode: str, where: str) -> tuple[dict[str, dict], list[str]]:
    """What was measured, by contender, and notes."""
    found, runs, notes = {}, {}, []
    for name, contender in contenders.items():
        call = calls(contender).get(mode)
        if call is None:
            continue
        try:
            found[name] = _empty() | {"memory": memory(call)}  # this compiles what is not compiled yet
            runs[name] = call
        except Exception as error:
            found[name] = _empty(told(error, f"{name}, {where}"))
    for way in ("launched", "replayed"):
        if way == "replayed":
            runs, missing = _captured(runs, contenders)
            notes += [f"{name}, {where}, graph replay: {reason}" for name, reason in missing.items()]
        times = interleaved(runs, SECONDS)
        for name, summary in times.found.items():
            found[name][way] = summary
        for name, error in times.errors.items():
            found[name]["exception"] = told(error, f"{name}, {where}, {way}")
            del runs[name]
    return found, notes


def _captured(runs: dict[str, Call], contenders: dict[str, Contender]) -> tuple[dict[str, Call], dict[str, str]]:
    """Graphs of the calls, and why some have none."""
    graphs, missing = {}, {}
    for name, call in runs.items():
        reason = contenders[name].not_captured
        if reason is None:
            try:
                graphs[name] = captured(call)
            except RuntimeError as error:
                reason = _text(error).splitlines()[0]
        if reason is not None:
            missing[name] = reason
    return graphs, missing


def _check_compiled(configuration: Configuration, quick: bool) -> None:
    shapes = COMPILED_SHAPES_QUICK if quick else COMPILED_SHAPES
    sizes = (configuration.rank, configuration.tokens)
    if sizes != (COMPILED_RANK, COMPILED_TOKENS) or configuration.shape not in shapes:
        names = "; ".join(shape.name for shape in shapes)
        raise NotRun(f"only at r = {COMPILED_RANK} and {COMPILED_TOKENS:,} tokens of {names}: it takes long to compile")


def told(error: Exception, where: str) -> str:
    """What a row says of an error; the whole of it, with its traceback, goes to the terminal."""
    print(f"\n{where}:", file=sys.stderr)
    traceback.print_exception(error, file=sys.stderr)
    return _text(error)


def _text(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"[:ERROR_LENGTH]


def _empty(exception: str | None = None) -> dict:
    return {"memory": None, "launched": None, "replayed": None, "exception": exception}


def _relative(row: dict, floor: dict | None) -> dict:
    """The row with ratios to the frozen linear's times, and bytes beyond its bytes."""
    found = dict(row)
    for way in ("launched", "replayed"):
        if row[way] is not None and floor is not None and floor[way] is not None:
            found[way] = {**row[way], "ratio_to_frozen": round(row[way]["median_ms"] / floor[way]["median_ms"], 4)}
    if row["memory"] is not None and floor is not None and floor["memory"] is not None:
        extra = {f"extra_{name}": value - floor["memory"][name] for name, value in row["memory"].items()}
        found["memory"] = row["memory"] | extra
    return found


def _error_columns(name: str, held: Gate) -> dict:
    """Largest errors of this contender and of eager code, against float64, by ERROR_GROUPS."""

    def largest(contender: str) -> dict | None:
        if any(contender not in found for found in held.errors.values()):
            return None
        errors = [(quantity, error) for found in held.errors.values() for quantity, error in found[contender].items()]
        groups: dict[str, float] = {}
        for quantity, error in errors:
            group = next((key for key, members in ERROR_GROUPS.items() if quantity in members), quantity.split()[0])
            groups[group] = max(groups.get(group, 0.0), number(error))
        return groups

    return {"errors": largest(name), "eager_errors": largest("plain")}


def number(value: float) -> float | None:
    """Three digits; None for what JSON has no number for."""
    return float(f"{value:.3g}") if math.isfinite(value) else None
