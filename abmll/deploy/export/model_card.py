"""README.md of an export: what the adapter is, the exact prompt, and code that gives its probabilities."""

from __future__ import annotations

import json
import re

import yaml

from abmll.deploy.adapter import AdapterCard
from abmll.deploy.export.report import Report
from abmll.deploy.export.subject import Subject
from abmll.deploy.export.usage import how_to_ask, how_to_use
from abmll.tasks.checks import LETTERS

LIBRARIES = {"peft": "peft", "merged": "transformers", "safetensors": "abmll"}
SHOWN = ("n", "accuracy", "accuracy_low", "accuracy_high", "majority", "macro_f1", "nll_options", "brier", "ece")
LAYERS_SHOWN = 5  # of a merge, the worst


def model_card(subject: Subject, report: Report) -> str:
    """Markdown behind YAML. Text from data is escaped: a label cannot break the page or add to it."""
    card = subject.card
    parts = [
        _front_matter(subject, report),
        f"# {escape(card.task)}",
        _what(subject, report),
        _answers(subject),
        how_to_ask(subject),
    ]
    if report.format != "safetensors":
        parts.append(how_to_use(subject, report))
    parts += [_scores(card), _checks(report), _origin(card)]
    return "\n\n".join(part for part in parts if part) + "\n"


def escape(text: str) -> str:
    """On one line, with every sign that Markdown may read as its own within a line behind a backslash."""
    return re.sub(r"([\\`*_\[\]<>|~&#:@.$])", r"\\\1", " ".join(text.split()))


def _front_matter(subject: Subject, report: Report) -> str:
    facts: dict[str, object] = {}
    if subject.source.kind == "hub":  # the hub refuses a base_model that it does not have
        facts["base_model"] = subject.base.config.model.name
    facts |= {"library_name": LIBRARIES[report.format], "tags": ["abmll", "lora", "meta-learning", "classification"]}
    return f"---\n{yaml.safe_dump(facts, sort_keys=False, allow_unicode=True)}---"


def _what(subject: Subject, report: Report) -> str:
    base = escape(subject.base.config.model.name)
    form = {
        "peft": f"A LoRA adapter in PEFT's format for {base}",
        "merged": f"{base} with a LoRA adapter merged into its weights ({report.dtype})",
        "safetensors": f"The tensors of a LoRA adapter for {base}, with the card that abmll loads them by",
    }[report.format]
    made = (
        "It is what meta-training left, theta: a start for adapting to a task, not the model of one."
        if subject.is_theta
        else f"It was adapted to the task in {subject.card.adaptation.steps} steps on "
        f"{subject.card.adaptation.examples} examples, from a meta-trained start."
    )
    variance = ""
    if subject.base.method.sampled:
        variance = (
            " The variances of the posterior are beside the means."
            if report.format == "safetensors"
            else " Only the posterior's mean is here: its variance is dropped, so that there are no posterior samples, "
            "and predictions are those of `samples=0`."
        )
    notes = "".join(f"\n\n**Note.** {escape(note)}" for note in report.notes)
    return f"{form}. {made} Made with abmll.{variance}{notes}"


def _answers(subject: Subject) -> str:
    ids, decode = subject.base.prompter.letter_ids, subject.base.tokenizer.decode
    if subject.card.options is None:
        return (
            "## Answers\n\nEvery question brings its own options, lettered A, B, C ... in the prompt. The next token "
            f"is the letter: `{json.dumps(decode([ids[0]]))}` for A."
        )
    rows = [
        f"| {letter} | `{json.dumps(decode([token]))}` ({token}) | {escape(label)} |"
        for letter, token, label in zip(LETTERS, ids, subject.card.options, strict=False)
    ]
    return "\n".join(["## Answers", "", "| letter | next token (id) | label |", "|---|---|---|", *rows])


def _scores(card: AdapterCard) -> str:
    names = [name for name in ("cross_validation", "before_adaptation") if name in card.scores]
    if not names:
        return ""
    rows = [
        f"| {key} | " + " | ".join(_number(card.scores[name].get(key)) for name in names) + " |"
        for key in SHOWN
        if any(card.scores[name].get(key) is not None for name in names)
    ]
    head = f"| | {' | '.join(name.replace('_', ' ') for name in names)} |"
    table = "\n".join([head, "|---|" + "---|" * len(names), *rows])
    temperature = f"\n\nTemperature: {card.temperature:.3g}." if card.temperature is not None else ""
    return (
        "## Scores\n\nOf the examples that it was adapted to, each predicted by an adaptation that had not seen it, "
        f"and before any adaptation.\n\n{table}{temperature}"
    )


def _checks(report: Report) -> str:
    lines = [f"- {name}: {value}" for name, value in report.lines()]
    if report.merge is not None:
        worst = sorted(report.merge.layers.items(), key=lambda item: -item[1].lost)[:LAYERS_SHOWN]
        lines += [
            "",
            f"The layers that lose most of their change; all are in `export.json`. In {report.dtype}:",
            "",
            "| layer | change lost | weight's relative error |",
            "|---|---|---|",
            *(f"| `{name}` | {100 * layer.lost:.3g} % | {layer.relative_error:.1e} |" for name, layer in worst),
        ]
    return "## Checked when it was written\n\n" + "\n".join(lines)


def _origin(card: AdapterCard) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in card.versions.items() if version)
    return (
        f"## Origin\n\nRun {escape(card.run.name)}, step {card.run.step}, theta `{card.run.theta[:16]}`; base "
        f"{escape(card.base.name)}{f' at {escape(card.base.revision)}' if card.base.revision else ''}, fingerprint "
        f"`{card.base.fingerprint[:16]}`. Versions: {versions}."
    )


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"
