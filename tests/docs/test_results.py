"""The results that README and docs/findings.md tell are those of the committed rows."""

from __future__ import annotations

import csv
import re
from pathlib import Path

import numpy as np
import pytest

from abmll.compare.statistics import holm

ROOT = Path(__file__).resolve().parents[2]
COMPARED = ROOT / "benchmarks/results/compare"
METRICS = {
    "README.md": ("accuracy", "ece_excess", "nll_options"),
    "docs/findings.md": ("accuracy", "ece_excess", "nll_options", "brier"),
}
COMPARISONS = {
    "Qwen2.5-Coder-0.5B-Instruct": "cls23-qwen0.5b",
    "SmolLM2-135M-Instruct": "cls23-smollm2",
    "... on cls-45": "cls45-smollm2",
    "gemma-3-270m": "cls23-gemma270m",
}
RIVALS = {
    "lora (pooled tasks)": "lora",
    "reptile": "reptile",
    "fomaml (query batch)": "fomaml",
    "structured LoRA": "structured_lora",
    "pretrained": "pretrained",
    "no model (label counts)": "frequencies",
}


def shown(row: dict[str, str], metric: str, corrected: float) -> str:
    """A difference and its interval as the tables have them, bold where it differs from zero after the correction."""
    numbers = [float(row[name]) for name in ("difference", "difference_low", "difference_high")]
    if metric == "accuracy":
        value, low, high = (f"{100 * number:+.1f}" for number in numbers)
    else:
        value, low, high = (f"{number:+.3f}".replace("0.", ".", 1) for number in numbers)
    text = f"{value} [{low}, {high}]"
    return f"**{text}**" if corrected < 0.05 else text


def expected(page: str) -> list[list[str]]:
    """Holm's family: the differences of one model in the longer table, the same for both pages."""
    lines = []
    for name, folder in COMPARISONS.items():
        path = COMPARED / folder / "tables/against_each.csv"
        with path.open(newline="") as file:
            found = {(row["rival"], row["metric"]): row for row in csv.DictReader(file) if row["label"] == "abmll"}
        rivals = [rival for rival in RIVALS.values() if (rival, "accuracy") in found]
        family = [(rival, metric) for rival in rivals for metric in METRICS["docs/findings.md"]]
        corrected = dict(zip(family, holm(np.array([float(found[pair]["p"]) for pair in family])), strict=True))
        for title, rival in RIVALS.items():
            if rival in rivals:
                pairs = [(rival, metric) for metric in METRICS[page]]
                told = [shown(found[pair], pair[1], corrected[pair]) for pair in pairs]
                lines.append([name, title, found[rival, "accuracy"]["seeds"], *told])
                name = ""
    return lines


@pytest.mark.parametrize("page", METRICS)
def test_the_table_is_that_of_the_committed_rows(page):
    lines = (ROOT / page).read_text(encoding="utf-8").splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith("| model | minus | seeds |")) + 2
    end = next(number for number, line in enumerate(lines[start:], start) if not line.startswith("|"))
    written = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[start:end]]
    assert written == expected(page)


MEANS = {
    "ABMLL": "abmll",
    "its weight posterior": "abmll-weight",
    "LoRA": "lora",
    "Reptile": "reptile",
    "FOMAML": "fomaml",
    "BLoB": "blob",
    "structured LoRA": "structured_lora",
    "pretrained": "pretrained",
    "label counts": "frequencies",
}


def test_the_mean_accuracies_are_those_of_the_committed_rows():
    """Of three seeds, or with a star of two; an empty cell is a method that was not run."""
    lines = (ROOT / "docs/findings.md").read_text(encoding="utf-8").splitlines()
    start = lines.index(f"| | {' | '.join(MEANS)} |")
    folders = {"SmolLM2": "cls23-smollm2", "gemma": "cls23-gemma270m", "Qwen": "cls23-qwen0.5b"}
    for line, (model, folder) in zip(lines[start + 2 :][: len(folders)], folders.items(), strict=True):
        with (COMPARED / folder / "tables/summary.csv").open(newline="") as file:
            rows = {row["label"]: row for row in csv.DictReader(file) if row["steps"] == "5"}
        found = [rows.get(label) for label in MEANS.values()]
        told = [f"{100 * float(row['accuracy']):.1f}{'*' * (3 - int(row['seeds']))}" if row else "" for row in found]
        assert [cell.strip() for cell in line.strip("|").split("|")] == [model, *told]


NUMBER = r"[+-]?\d*\.\d+"
# where a page's results begin, and what ends them
SECTIONS = {
    "README.md": ("## Does it help?", "\n## "),
    "docs/findings.md": ("# What was found", "\n## Not answered yet"),
}


def differences() -> set[tuple[float, ...]]:
    """Every difference in the committed tables with its interval, as far as a text shows it."""
    found = set()
    for path in COMPARED.glob("*/tables/against_*.csv"):
        with path.open(newline="") as file:
            for row in csv.DictReader(file):
                numbers = [row[name] for name in ("difference", "difference_low", "difference_high")]
                factor, digits = (100, 1) if row["metric"] in ("accuracy", "macro_f1") else (1, 3)
                if all(numbers):
                    found.add(tuple(float(f"{factor * float(number):.{digits}f}") for number in numbers))
    return found


@pytest.mark.parametrize("page", SECTIONS)
def test_every_interval_of_the_text_is_one_of_the_tables(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    start, end = SECTIONS[page]
    text = text.split(start)[1].split(end)[0]
    told = re.findall(rf"({NUMBER})(?:\s%)?\s\[({NUMBER}),\s({NUMBER})\]", text)
    known = differences()
    strange = [numbers for numbers in told if tuple(map(float, numbers)) not in known]
    assert not strange and len(told) == len(re.findall(r"\[[+-]?\d*\.\d+,", text)) > 20
