"""Tables and a plot of the rows of memory.py. Predicted and measured rows never share a table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from abmll.memory.storages import COMPONENTS

PAPER = 7.6  # % over plain LoRA: 25.6 GB against 23.8 GB (Zhang, Snell and Griffiths, section 5.1.3)
BASELINES = ("LoRA", "PEFT LoRA")
GB = 1e9
Row = dict[str, Any]


def row_line(row: Row) -> str:
    """One row as it is made."""
    place = f"{row['model']}, {row['examples']} x {row['tokens']}, {_layers(row)}"
    text = f"{place}: {row['contender']}: {row['peak'] / GB:.3f} GB counted ({row['fullest']})"
    if "failed" in row:
        return f"{text}; MEASURED: {row['failed']}"
    if "allocated" in row:
        text += f"; {row['allocated'] / GB:.3f} GB allocated, {row['reserved'] / GB:.3f} reserved"
    return f"{text}, {row['seconds']} s"


def report(paths: list[Path], plot: Path | None = None) -> str:
    """Markdown of the files' rows, each kind by itself; `plot` draws the predicted ones' overhead."""
    parts = []
    for kind in ("predicted", "measured"):
        files = [found for found in (json.loads(path.read_text()) for path in paths) if found["kind"] == kind]
        rows = [row for found in files for row in found["rows"]]
        if rows:
            devices = ", ".join(dict.fromkeys(found["provenance"]["device"] for found in files))
            # a row that was made again later carries its own commit
            made = [found["provenance"]["commit"] for found in files] + [row.get("commit") for row in rows]
            commits = ", ".join(dict.fromkeys(str(commit)[:10] for commit in made if commit))
            title = f"{kind.capitalize()} peak of an episode, GB" + (f" ({devices})" if kind == "measured" else "")
            parts += [f"# {title}", f"Commits: {commits}.", *_tables(rows, kind)]
            if kind == "predicted" and plot is not None:
                draw(rows, plot)
    return "\n\n".join(parts) + "\n"


def _tables(rows: list[Row], kind: str) -> list[str]:
    parts = []
    for model in dict.fromkeys(row["model"] for row in rows):
        for policy in dict.fromkeys(row["checkpointing"] for row in rows):
            found = [row for row in rows if (row["model"], row["checkpointing"]) == (model, policy)]
            if found:
                heading = f"## {model}, {_layers(found[0])}"
                parts += [heading, _by_shape(found) if kind == "predicted" else _beside(found)]
    if kind == "predicted":
        parts += ["## Where the peak is, by component", _by_component(rows)]
    return parts


def _by_shape(rows: list[Row]) -> str:
    """A line a contender, a column a shape: GB, and % over each baseline."""
    shapes = list(dict.fromkeys((row["examples"], row["tokens"]) for row in rows))
    peaks = {(row["contender"], row["examples"], row["tokens"]): row["peak"] for row in rows}
    lines = ["| | " + " | ".join(f"{examples} x {tokens:,}" for examples, tokens in shapes) + " |"]
    lines.append("|" + "---|" * (len(shapes) + 1))
    for contender in dict.fromkeys(row["contender"] for row in rows):
        cells = []
        for shape in shapes:
            peak = peaks.get((contender, *shape))
            over = [
                _percent(peak, peaks[(baseline, *shape)])
                for baseline in BASELINES
                if peak and (baseline, *shape) in peaks and "," in contender
            ]
            cells.append("" if peak is None else f"{peak / GB:.3f}" + (f" ({', '.join(over)})" if over else ""))
        lines.append(f"| {contender} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", f"In brackets: over {', over '.join(BASELINES)}."])


def _beside(rows: list[Row]) -> str:
    lines = ["| | shape | predicted | allocated | reserved | prediction / allocated |", "|---|---|---|---|---|---|"]
    for row in rows:
        shape = f"{row['examples']} x {row['tokens']:,}"
        if "failed" in row:
            lines.append(f"| {row['contender']} | {shape} | {row['peak'] / GB:.3f} | {row['failed']} | | |")
            continue
        sizes = " | ".join(f"{row[key] / GB:.3f}" for key in ("peak", "allocated", "reserved"))
        lines.append(f"| {row['contender']} | {shape} | {sizes} | {row['peak'] / row['allocated']:.4f} |")
    return "\n".join(lines)


def _by_component(rows: list[Row]) -> str:
    """At the fullest moment, for the shapes of the goals."""
    chosen = [row for row in rows if (row["examples"], row["tokens"]) in ((2, 512), (5, 1024))]
    components = [name for name in COMPONENTS if any(name in _at_peak(row) for row in chosen)]
    lines = ["| | | | " + " | ".join(components) + " | in |", "|" + "---|" * (len(components) + 4)]
    for row in chosen:
        sizes = " | ".join(f"{_at_peak(row).get(name, 0) / GB:.3f}" for name in components)
        place = f"{row['model']}, {row['examples']} x {row['tokens']:,} | {_layers(row)} | {row['contender']}"
        lines.append(f"| {place} | {sizes} | {row['fullest']} |")
    return "\n".join(lines)


def _at_peak(row: Row) -> dict[str, int]:
    return row["phases"][row["fullest"]]


def _layers(row: Row) -> str:
    return {"none": "no checkpointing"}.get(row["checkpointing"], f"{row['checkpointing']} checkpointed")


def _percent(size: float, baseline: float) -> str:
    return f"{100 * (size / baseline - 1):+.2f} %"


def draw(rows: list[Row], path: Path) -> None:
    """Overhead over our plain LoRA against tokens a batch, a panel for each model with and without checkpointing."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    two = [row for row in rows if row["examples"] == 2]
    panels = list(dict.fromkeys((row["model"], row["checkpointing"]) for row in two))
    figure, axes = plt.subplots(1, len(panels), figsize=(4.2 * len(panels), 4), sharey=True, squeeze=False)
    styles = {"activation": "C0", "weight": "C1"}
    for axis, (model, policy) in zip(axes[0], panels, strict=True):
        found = [row for row in two if (row["model"], row["checkpointing"]) == (model, policy)]
        peaks = {(row["contender"], row["tokens"]): row["peak"] for row in found}
        tokens = sorted({row["tokens"] for row in found})
        for contender in dict.fromkeys(row["contender"] for row in found if "," in row["contender"]):
            posterior, how = contender.split(", ")
            over = [100 * (peaks[contender, t] / peaks["LoRA", t] - 1) for t in tokens]
            line = "-" if how == "fused" else "--"
            axis.plot([2 * t for t in tokens], over, line, color=styles[posterior], marker="o", label=contender)
        axis.axhline(PAPER, color="black", linewidth=1)
        axis.text(2 * tokens[0], PAPER - 0.15, "the paper, +7.6 %", va="top")
        axis.axhline(0, color="grey", linewidth=0.8)
        axis.set_xscale("log", base=2)
        axis.set_xticks([2 * t for t in tokens], [f"{2 * t:,}" for t in tokens])
        axis.set_xlabel("tokens a batch (2 prompts)")
        axis.set_title(f"{model}\n{_layers(found[0])}")
    axes[0][0].set_ylabel("predicted peak over plain LoRA, %")
    axes[0][0].legend(frameon=False, loc="center left")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
