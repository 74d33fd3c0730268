"""Plans as tables: by component at each phase's fullest moment, and what was largest."""

from __future__ import annotations

from collections.abc import Mapping

from abmll.memory.episode import Ledger
from abmll.memory.plan import GB, Plan
from abmll.memory.storages import COMPONENTS, PHASES


def peak_table(ledgers: Mapping[str, Ledger]) -> str:
    """Markdown: GB by component at the fullest moment of all, a column each; its phase, and what scoring takes."""
    lines = [_row("GB", ledgers), "|" + "---|" * (len(ledgers) + 1)]
    for component in COMPONENTS:
        sizes = [ledger.phases[ledger.fullest][component] for ledger in ledgers.values()]
        if any(sizes):
            lines.append(_row(component, [_gb(size) for size in sizes]))
    lines.append(_row("**peak**", [f"**{_gb(ledger.peak)}**" for ledger in ledgers.values()]))
    lines.append(_row("in", [ledger.fullest for ledger in ledgers.values()]))
    return "\n".join(lines)


def phase_table(ledger: Ledger) -> str:
    """Markdown: GB by component, a column for each phase's fullest moment."""
    phases = [phase for phase in PHASES if phase in ledger.phases]
    lines = [_row("GB", phases), "|" + "---|" * (len(phases) + 1)]
    for component in COMPONENTS:
        sizes = [ledger.phases[phase][component] for phase in phases]
        if any(sizes):
            lines.append(_row(component, [_gb(size) for size in sizes]))
    lines.append(_row("**together**", [f"**{_gb(ledger.peak_of(phase))}**" for phase in phases]))
    return "\n".join(lines)


def largest_table(ledger: Ledger, count: int = 10) -> str:
    """Markdown: the largest tensors at the peak, alike ones together."""
    lines = ["| GB | tensors | of | maker | component |", "|---|---|---|---|---|"]
    for item in ledger.largest[:count]:
        lines.append(f"| {_gb(item.size)} | {item.count} | {item.what} | {item.maker} | {item.component} |")
    return "\n".join(lines)


def verdict(plan: Plan) -> str:
    """One line: what it takes of what there is."""
    if plan.ledger is None:
        return f"not counted: this model's code does not run on fake tensors ({plan.problem})"
    needed, budget = plan.ledger.peak + plan.allowance, plan.budget / GB
    allowed = f" + {plan.allowance / GB:g} GB kept free" if plan.allowance else ""
    word = "fits" if plan.fits else "DOES NOT FIT"
    return f"{word} {budget:g} GB: {_gb(plan.ledger.peak)} GB at the peak ({plan.ledger.fullest}){allowed}, " + (
        f"{_gb(plan.budget - needed)} GB to spare" if plan.fits else f"{_gb(needed - plan.budget)} GB too much"
    )


def summary(plan: Plan, heading: str) -> str:
    """What a run tells of its plan: the verdict, what was decided, the peak by component."""
    table = [] if plan.ledger is None else ["", peak_table({heading: plan.ledger}), ""]
    return "\n".join([verdict(plan), decisions(plan), *table])


def decisions(plan: Plan) -> str:
    """One line: what the configuration left open, or says."""
    layers = {"none": "no layer"}.get(plan.checkpointing, plan.checkpointing)
    return f"activations checkpointed in {layers}; {plan.eval_batch_size} examples scored at a time"


def _row(head: str, cells: object) -> str:
    return f"| {head} | {' | '.join(cells)} |"


def _gb(size: float) -> str:
    return f"{size / GB:.3f}"
