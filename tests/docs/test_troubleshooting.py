"""Every message quoted in docs/troubleshooting.md is one that the program says, or that stands so in its source."""

from __future__ import annotations

import ast
import re
import shlex
from functools import cache

import pytest
from pages import ROOT, blocks
from sandbox import SHORT, execute

PAGE = ROOT / "docs/troubleshooting.md"
MESSAGES = [block.text for block in blocks(PAGE.read_text(encoding="utf-8")) if block.language == "text"]
TRAIN = "launch/train.py --config configs/tiny.yaml"
# Commands that say it. The rest needs what is not here: a hub, a GPU, several machines, other models.
SAID = {
    "unknown key; did you mean": f"{TRAIN} method.inner_step=3",
    "must be a number": f"{TRAIN} method.inner_lr=fast",
    "no such configuration file": "launch/train.py --config configs/cls32.yaml",
    "already holds a run": "launch/train.py --config configs/tiny.yaml output=runs/quickstart",
    "is not installed; run: pip": f"{TRAIN} model.name=package:no_such/model.gguf",
    "no linear layer of the model": f"{TRAIN} adapters.modules=[query]",
    "source jsonl reads a folder": f"{TRAIN} tasks.source=jsonl tasks.train=[a] tasks.test=[b]",
    "no such folder; set": f"{TRAIN} tasks.source=jsonl tasks.folder=nowhere tasks.train=[a] tasks.test=[b]",
    "note: missing task": "launch/train.py --config configs/cls23.yaml --validate SHORT output=runs/none",
    "malformed JSON": f"{TRAIN} tasks.source=jsonl tasks.folder=data/broken tasks.train=[a] tasks.test=[b]",
    "none of its": "launch/train.py --config configs/cls23.yaml SHORT tasks.max_tokens=16 output=runs/none",
    "DOES NOT FIT": f"{TRAIN} --validate SHORT memory.budget_gb=1e-6 output=runs/none",
    "dwarfs the NLL": f"{TRAIN} SHORT method.beta=1.0 output=runs/dwarfed",
    "gave NaN or Inf": f"{TRAIN} SHORT method.inner_lr=1e30 trainer.max_nonfinite=2 trainer.episodes=9 output=runs/nan",
    "differs from the checkpoint's": f"{TRAIN} SHORT --resume auto output=runs/quickstart seed=1",
    "no such folder; name a run's": "launch/evaluate.py --run runs/none",
    "theta was trained with": "launch/evaluate.py --run runs/quickstart adapters.rank=3",
    "draws weights around a point estimate": "launch/evaluate.py --run runs/quickstart eval.tfb.samples=4",
}


def pattern(message: str) -> str:
    """`...` stands for anything."""
    return ".*".join(re.escape(part) for part in message.split("..."))


@cache
def templates() -> list[tuple[str, int]]:
    """The texts of the source, what is filled in as any text, and how many characters are fixed; of 25 or more."""
    made = []
    for folder in ("abmll", "kernels"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                parts = node.values if isinstance(node, ast.JoinedStr) else [node]
                fixed = [p.value if isinstance(p, ast.Constant) and isinstance(p.value, str) else None for p in parts]
                length = sum(len(part) for part in fixed if part)
                if length >= 25:
                    made.append(("".join(".+" if part is None else re.escape(part) for part in fixed), length))
    return made


@pytest.mark.parametrize("message", [one for one in MESSAGES if not any(part in one for part in SAID)])
def test_the_source_says_so(message):
    """What the quote fixes is, but for what stands around it, one of the source's texts."""
    quoted = message.replace("...", "x")
    longest = max((length for template, length in templates() if re.search(template, quoted)), default=0)
    assert longest >= 25 and longest >= 0.4 * len(quoted), longest


@pytest.mark.parametrize("part", SAID)
def test_the_command_says_so(part, sandbox, capfd):
    (message,) = [one for one in MESSAGES if part in one]
    for name, last in (("a", '{"input": \n'), ("b", "")):
        task = sandbox / "data/broken" / name
        task.mkdir(parents=True, exist_ok=True)
        rows = '{"input": "x?", "output": "a", "options": ["a", "b"]}\n' * 8
        (task / "train.jsonl").write_text(rows + last)
        (task / "test.jsonl").write_text(rows)
    words = [word for given in shlex.split(SAID[part]) for word in (SHORT if given == "SHORT" else [given])]
    execute(*words)
    captured = capfd.readouterr()
    assert re.search(pattern(message), captured.out + captured.err), captured.out + captured.err
