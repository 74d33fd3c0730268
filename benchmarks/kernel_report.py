"""From the kernel benchmark's rows to a Markdown report and plots."""

from __future__ import annotations

import importlib.util
import json
import math
from collections.abc import Callable
from pathlib import Path

from kernel_contenders import CONTENDERS, DESCRIPTIONS
from kernel_goals import MEGABYTE, WAYS, extra_memory, goals_table

MODES = {
    "forward": "forward pass",
    "backward": "backward pass (to x and phi)",
    "both": "forward + backward: an inner step",
    "outer": "forward pass and theta's gradient: the outer step",
}
MISSING = "–"

# Colours that differ for the colour-blind as well (Okabe and Ito), with a marker each.
STYLES = {
    "frozen": ("#000000", "."),
    "lora": ("#F0E442", "<"),
    "grouped_mm": ("#56B4E9", ">"),
    "peft": ("#E69F00", "v"),
    "peft_autocast": ("#009E73", "^"),
    "plain": ("#D55E00", "s"),
    "plain_randn": ("#CC79A7", "D"),
    "compiled": ("#999999", "P"),
    "compiled_randn": ("#666666", "X"),
    "fused": ("#0072B2", "o"),
}


def load(files: list[Path]) -> dict[str, list]:
    """The files' rows, gates and notes together. Raises ValueError for files of several devices."""
    parts = [json.loads(file.read_text()) for file in files]
    devices = {part["provenance"]["device"] for part in parts}
    if len(devices) > 1:
        raise ValueError(f"--report: rows of several devices: {', '.join(sorted(devices))}; report each by itself")
    merged = {name: [entry for part in parts for entry in part[name]] for name in ("gates", "rows")}
    merged["notes"] = list(dict.fromkeys(note for part in parts for note in part["notes"]))
    return merged | {"provenance": [part["provenance"] for part in parts]}


def report(files: list[Path]) -> str:
    """The Markdown report, written beside the first file together with its plots."""
    found = load(files)
    rows, stem = found["rows"], files[0].with_suffix("")
    sections = ["# The fused projection, measured", *(_origin(facts) for facts in found["provenance"])]
    sections += ["## Goals", goals_table(rows), "## Parity with float64", parity_table(found["gates"])]
    if rows:
        present = [name for name in _contenders(rows) if name in DESCRIPTIONS]
        sections += ["## Contenders", "\n".join(f"- `{name}`: {DESCRIPTIONS[name]}" for name in present)]
        sections += ["## Figures", figures(rows, stem)]
        sections += ["## Time", TIME_CAPTION]
        sections += [f"### {title[0].upper()}{title[1:]}\n\n{times_table(rows, mode)}" for mode, title in MODES.items()]
        sections += ["## Memory", MEMORY_CAPTION, memory_table(rows)]
    raised = exceptions(found["gates"], rows)
    if raised:
        sections += ["## Raised", "\n".join(f"- {line}" for line in raised)]
    if found["notes"]:
        sections += ["## Not measured", "\n".join(f"- {note}" for note in found["notes"])]
    text = "\n\n".join(sections) + "\n"
    stem.with_suffix(".md").write_text(text)
    return text


TIME_CAPTION = (
    "`frozen`: median milliseconds. Others: median over frozen's. First from a graph replay (the kernels' own time), "
    "then launched one by one from Python, which has 0.1 ms before the GPU begins. All contenders of a line ran in "
    "turn, in rounds. Quantiles and numbers of runs stand in the JSON."
)
MEMORY_CAPTION = (
    "`frozen`: MB (10^6 bytes) allocated at the peak of forward + backward, beyond its inputs. Others: MB more than "
    "that. After the slash: what is still held after the forward pass."
)


def parity_table(gates: list[dict]) -> str:
    """For each configuration the largest error of the fused code over its limit."""
    lines = ["| configuration | parity | largest error / limit | at |", "|---|---|---|---|"]
    for entry in gates:
        ratio, where = entry["worst"]
        number = "NaN" if ratio is None else f"{ratio:.2f}"
        lines.append(f"| {entry['configuration']} | {verdict(entry)} | {number} | {where} |")
        lines += [f"| {failure} | FAILS | | |" for failure in entry["failures"]]
    return "\n".join(lines)


def verdict(entry: dict) -> str:
    """Of a gate; one that raised while it was held, or later what all contenders share, holds nothing."""
    if entry["exception"] is not None:
        return "NOT HELD: it raised"
    return "FAILS" if entry["failures"] else "holds"


def exceptions(gates: list[dict], rows: list[dict]) -> list[str]:
    """What raised, one line each: where, and the error's text on one line."""
    found = [(entry["configuration"], entry["exception"]) for entry in gates]
    for row in rows:
        shape, _, _, rank, groups, tokens, dtype = _place(row)
        where = f"{row['contender']}, {shape}, r = {rank}, {groups} x {tokens:,} tokens, {dtype}, {row['mode']}"
        found.append((where, row["exception"]))
    return [f"{where}: {' '.join(text.split())}" for where, text in found if text is not None]


def times_table(rows: list[dict], mode: str) -> str:
    """One line a configuration, one column a contender; see TIME_CAPTION."""
    return _table([row for row in rows if row["mode"] == mode], _time_cell)


def memory_table(rows: list[dict]) -> str:
    """As `times_table`; see MEMORY_CAPTION."""
    forward = {(_place(row), row["contender"]): row["memory"] for row in rows if row["mode"] == "forward"}

    def megabytes(own: dict | None, name: str) -> str:
        return MISSING if own is None or name not in own else f"{own[name] / MEGABYTE:.2f}"

    def cell(row: dict) -> str:
        part = "" if row["contender"] == "frozen" else "extra_"
        after = forward.get((_place(row), row["contender"]))
        return f"{megabytes(row['memory'], f'{part}peak_allocated')} / {megabytes(after, f'{part}kept')}"

    return _table([row for row in rows if row["mode"] == "both"], cell)


def _time_cell(row: dict) -> str:
    part = "median_ms" if row["contender"] == "frozen" else "ratio_to_frozen"
    cells = [f"{row[way][part]:.3g}" if row[way] is not None and part in row[way] else MISSING for way in WAYS]
    return " / ".join(cells) + " raised" * (row["exception"] is not None)


def _table(rows: list[dict], cell: Callable[[dict], str]) -> str:
    contenders = _contenders(rows)
    lines = [
        "| shape | N × K | r | groups | tokens | dtype | " + " | ".join(contenders) + " |",
        "|" + "---|" * (len(contenders) + 6),
    ]
    for place in dict.fromkeys(_place(row) for row in rows):
        here = {row["contender"]: row for row in rows if _place(row) == place}
        shape, outputs, inputs, *others = place
        cells = [cell(here[name]) if name in here else "" for name in contenders]
        lines.append(f"| {shape} | {outputs} × {inputs} | {' | '.join(map(str, others))} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _place(row: dict) -> tuple:
    return tuple(row[name] for name in ("shape", "N", "K", "rank", "groups", "tokens", "dtype"))


def _contenders(rows: list[dict]) -> list[str]:
    there = {row["contender"] for row in rows}
    return [name for name in CONTENDERS if name in there]


def _origin(facts: dict) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items() if version)
    state = {None: "state of the checkout unknown", False: "clean checkout", True: "changed checkout"}[facts["dirty"]]
    return f"{facts['device']}; Python {facts['python']}; {versions}; commit {facts['commit']}, {state}."


def figures(rows: list[dict], stem: Path) -> str:
    """Draws the plots and links them."""
    if importlib.util.find_spec("matplotlib") is None:
        return "Not drawn: pip install matplotlib"
    return "\n".join(f"![{path.stem}]({path.name})" for path in plots(rows, stem))


def plots(rows: list[dict], stem: Path) -> list[Path]:
    """PNG files beside the JSON, one of time and one of memory a rank and dtype."""
    import matplotlib

    matplotlib.use("Agg")
    paths = []
    both = [row for row in rows if row["mode"] == "both"]
    for rank, dtype, groups in dict.fromkeys((row["rank"], row["dtype"], row["groups"]) for row in both):
        chosen = [row for row in both if (row["rank"], row["dtype"], row["groups"]) == (rank, dtype, groups)]
        beside = "" if groups == 1 else f", {groups} groups"
        title = f"Forward + backward of one projection, rank {rank}{beside}, {dtype} – {chosen[0]['device']}"
        for kind, label, value in (
            ("time", "time / frozen linear's time\n(graph replay)", _time_ratio),
            ("memory", "peak memory beyond\nthe frozen linear's (MB)", extra_memory),
        ):
            path = stem.with_name(f"{stem.name}_{kind}_{dtype}_r{rank}{f'_g{groups}' * (groups > 1)}.png")
            _panels(chosen, value, title, label, kind == "memory", path)
            paths.append(path)
    return paths


def _time_ratio(row: dict) -> float | None:
    return None if row["replayed"] is None else row["replayed"].get("ratio_to_frozen")


def _panels(rows: list[dict], value: Callable, title: str, label: str, linear_near_zero: bool, path: Path) -> None:
    """One panel a shape, one line a contender, against tokens."""
    import matplotlib.pyplot as plt
    from matplotlib.ticker import LogLocator

    shapes = list(dict.fromkeys((row["shape"], row["N"], row["K"]) for row in rows))
    tokens = sorted({row["tokens"] for row in rows})
    across = min(3, len(shapes))
    down = math.ceil(len(shapes) / across)
    figure, axes = plt.subplots(
        down, across, figsize=(4.2 * across, 3.0 * down + 1.1), sharex=True, sharey=True, squeeze=False,
        layout="constrained",
    )  # fmt: skip
    for panel in axes.flat[len(shapes) :]:
        panel.set_visible(False)
    lines = {}
    for panel, (shape, outputs, inputs) in zip(axes.flat, shapes, strict=False):
        for name in _contenders(rows):
            points = {r["tokens"]: value(r) for r in rows if r["shape"] == shape and r["contender"] == name}
            points = {at: points[at] for at in sorted(points) if points[at] is not None}
            if not points:
                continue
            colour, marker = STYLES[name]
            (lines[name],) = panel.plot(list(points), list(points.values()), color=colour, marker=marker)
        panel.set_title(f"{shape} ({outputs} × {inputs})", fontsize=10)
        panel.set_xscale("log", base=2)
        panel.set_xticks(tokens, [f"{at:,}" for at in tokens])
        panel.xaxis.set_tick_params(labelbottom=True)
        panel.set_xlabel("tokens")
        if linear_near_zero:
            panel.set_yscale("symlog", linthresh=1.0)
            panel.axhline(0.0, color="black", linewidth=0.6)
        else:
            panel.set_yscale("log")
            panel.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        panel.yaxis.set_major_formatter("{x:g}")
        panel.minorticks_off()
        panel.grid(alpha=0.3)
    for panel in axes[:, 0]:
        panel.set_ylabel(label)
    figure.legend(
        list(lines.values()), list(lines), loc="outside lower center", ncols=min(5, max(len(lines), 1)), fontsize=9
    )
    figure.suptitle(title, fontsize=11)
    figure.savefig(path, dpi=120)
    plt.close(figure)
