"""The tables of benchmarks/scaling.py."""

from __future__ import annotations

from typing import Any

GOAL = 0.95  # weak scaling on two ranks


def report(facts: dict[str, Any]) -> str:
    """A run's tables in Markdown: measured, counted, projected."""
    lines = [
        f"{facts['model'].rpartition('/')[2]}, {facts['dtype']}, {facts['provenance']['device']}, one thread a rank, "
        f"{facts['posterior']} posterior, G = {facts['groups']}, {facts['examples']} prompts a step, "
        f"{facts['lengths']}; {facts['steps']} outer steps a round, {facts['rounds']} rounds in turn.",
        "",
        "Measured, medians. `efficiency`: real tokens/s of the ranks over as many times those of one.",
        "",
        "| what | ranks | tasks a step | s a step | real tokens/s | efficiency |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for row in facts["rows"]:
        cells = (row["what"], row["ranks"], row["tasks"], f"{row['step_s']:.4g}", f"{row['tokens_per_s']:,.0f}")
        efficiency = "" if row["efficiency"] is None else f"{row['efficiency']:.3f}"
        lines.append(f"| {' | '.join(map(str, cells))} | {efficiency} |")
    weak = [row["efficiency"] for row in facts["rows"] if row["what"] == "weak" and row["ranks"] == 2]
    if weak:
        own = next(row["of_no_communication"] for row in facts["rows"] if row["what"] == "weak" and row["ranks"] == 2)
        lines += [
            "",
            f"Goal, weak scaling on two ranks at least {GOAL}: {'met' if weak[0] >= GOAL else 'missed'} "
            f"({weak[0]:.3f}). Over two processes at once that do not communicate but share the machine as the ranks "
            f"do: {own:.3f}.",
        ]
    traffic, episodes = facts["traffic"], facts["traffic_episodes"]
    lines += [
        "",
        f"Counted in one outer step of {facts['traffic_ranks']} ranks and {episodes} episodes (ZeRO stage "
        f"{facts['zero_stage']}); theta has {facts['theta_bytes']:,} bytes:",
        "",
        "| phase | collective | calls | bytes a step | bytes an episode | of theta |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for row in traffic:
        cells = (row["phase"], row["collective"], row["calls"], f"{row['bytes']:,}", f"{row['bytes'] / episodes:,.0f}")
        lines.append(f"| {' | '.join(map(str, cells))} | {row['bytes'] / facts['theta_bytes']:.3f} |")
    lines += ["", f"Nothing in the inner loop: {_inside(traffic)}. Theta's gradient once: {_once(facts)}."]
    first = facts["projection"][0]
    lines += [
        "",
        f"Projected, not measured: {facts['projected'].rpartition(':')[2]}, theta of "
        f"{first['theta_bytes'] / 1e6:,.1f} MB, every GPU with the work of a step of "
        f"{first['assumed']['step_seconds']:g} s, which is assumed too; nothing overlaps.",
        "",
        "| GPUs | assumed GB/s | assumed latency us | assumed imbalance | MB sent a GPU | its ms | efficiency |",
        "|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in facts["projection"]:
        assumed = row["assumed"]
        cells = [assumed[key] for key in ("gigabytes_per_second", "latency_us", "imbalance")]
        cells += [row["sent_mb"], row["communication_ms"], row["efficiency"]]
        lines.append(f"| {row['gpus']} | {' | '.join(f'{value:.4g}' for value in cells)} |")
    return "\n".join(lines)


def _inside(traffic: list[dict[str, Any]]) -> str:
    """Nothing in an episode, its inner loop or the rest, may communicate."""
    found = [row for row in traffic if row["phase"] not in ("outer step", "engine step")]
    return "met" if not found else f"missed ({sum(row['calls'] for row in found)} calls)"


def _once(facts: dict[str, Any]) -> str:
    """The vectors that are reduced in the engine's step have theta's size together, and what is added to them: scalars
    that ZeRO looks at, and what fills its partitions up to equal ones.
    """
    reduced = sum(
        row["bytes"]
        for row in facts["traffic"]
        if row["phase"] == "engine step" and row["collective"] in ("all-reduce", "reduce", "reduce-scatter")
    )
    ratio = reduced / facts["theta_bytes"]
    return f"{'met' if 1 <= ratio < 1.01 else 'missed'} ({ratio:.4f} of it)"
