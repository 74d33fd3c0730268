"""The tables of benchmarks/throughput.py, and what was aimed at."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from throughput_rows.contenders import ACTIVATION, WEIGHT


def goals(facts: dict[str, Any]) -> list[tuple[str, float | None, bool | None]]:
    """What was aimed at on this kind of device, what was found (None: not measured), and whether it was met."""
    rows = {(row["contender"], row["groups"]): row for row in facts.get("rows", ())}
    scored = {row["groups"]: row for row in facts.get("evaluation", ())}

    def found(contender: str, groups: int, key: str) -> float | None:
        return rows.get((contender, groups), {}).get(key)

    wanted: list[tuple[str, float | None, Callable[[float], bool]]] = []
    if facts["device"] == "cpu":
        for name in (ACTIVATION, WEIGHT):
            text = f"{name}: an episode of G = 4 over one of G = 1, at most 1"
            wanted.append((text, found(name, 4, "episode_x_one"), lambda value: value <= 1))
        ratio = scored[4]["x_first"] if 4 in scored and 1 in scored else None
        wanted.append(("evaluation: G = 4 over G = 1, at most 1", ratio, lambda value: value <= 1))
    else:
        for name in (ACTIVATION, WEIGHT):
            plain, one = found(name, 1, "episode_x_plain"), found(name, 8, "episode_x_one")
            text = f"{name}: an inner step over PEFT's, at most 1.10"
            wanted.append((text, found(name, 1, "step_x_peft"), lambda value: value <= 1.10))
            text = f"{name}: an episode of plain PyTorch over one of these, at least 2"
            wanted.append((text, plain and 1 / plain, lambda value: value >= 2))
            text = f"{name}: episodes/s of G = 8 over G = 1, at least 4"
            wanted.append((text, one and 1 / one, lambda value: value >= 4))
            wanted.append((f"{name}: GB of G = 8, at most 40", found(name, 8, "peak_gb"), lambda value: value <= 40))
    return [(text, value, None if value is None else met(value)) for text, value, met in wanted]


def report(facts: dict[str, Any]) -> str:
    """A run's tables in Markdown."""
    head = [
        f"{facts['model'].rpartition('/')[2]}, {facts['dtype']}, {facts['provenance']['device']}, {facts['threads']} "
        f"threads; {facts['episodes']} episodes of {facts['inner_steps']} steps on {facts['examples']} prompts, "
        f"{facts['lengths']} lengths, {facts['real_tokens']:,} real tokens a round, checkpointing: "
        f"{facts['checkpointing']}; {facts['rounds']} rounds."
    ]
    if facts["device"] == "cpu":
        head.append("Plain PyTorch is what ABMLL runs on a CPU: it has no rows of its own.")
    lines = [" ".join(head), ""]
    if "rows" in facts:
        titles = {
            "episodes_per_s": "episodes/s",
            "real_tokens_per_s": "real tokens/s",
            "padded_tokens_per_s": "with padding",
            "step_ms": "step ms",
            "between_ms": "between ms",
            "share_of_floor": "of the floor",
            "episode_x_peft": "episode x PEFT's",
            "step_x_peft": "step x PEFT's",
            "episode_x_one": "x G = 1",
            "peak_gb": "peak GB",
        }
        lines += [f"| contender | G | {' | '.join(titles.values())} |", f"|---|{'---:|' * (len(titles) + 1)}"]
        for row in facts["rows"]:
            cells = ["" if row[key] is None else f"{row[key]:,.3g}" for key in titles]
            for place, key in enumerate(titles):
                if key.endswith("tokens_per_s"):
                    cells[place] = f"{row[key]:,.0f}"
            lines.append(f"| {row['contender']} | {row['groups']} | {' | '.join(cells)} |")
        lines.append("")
    if "evaluation" in facts:
        of = facts["evaluated"]
        lines += [
            f"Evaluation of {of['tasks']} unseen tasks, {of['examples']} examples scored before and after adaptation, "
            f"{of['posterior']} posterior:",
            "",
            f"| G | median s | x G = {facts['evaluation'][0]['groups']} | NLL |",
            "|---:|---:|---:|---:|",
        ]
        lines += [
            f"| {row['groups']} | {row['median_s']:.3g} | {row['x_first']:.3f} | {row['nll']:.4g} |"
            for row in facts["evaluation"]
        ]
        lines.append("")
    lines += ["| goal | found | |", "|---|---:|---|"]
    words = {True: "met", False: "missed", None: "not measured"}
    lines += [
        f"| {text} | {'' if value is None else f'{value:.3g}'} | {words[met]} |" for text, value, met in goals(facts)
    ]
    return "\n".join(lines)
