"""The pages of the documentation, and the blocks and commands in them."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
PROGRAMS = ("bash", "deepspeed", "git", "hf", "pip", "pytest", "python", "ruff", "sbatch", "srun", "torchrun")
_ASSIGNMENT = re.compile(r"[A-Z_]+=\S+")


class Block(NamedTuple):
    """A block of code: its language (`` for an indented one), its text, and the line of the page that it begins in."""

    language: str
    text: str
    line: int


class Command(NamedTuple):
    """A command without its comment and the variables set before it, and where it stands."""

    place: str
    words: tuple[str, ...]


def blocks(text: str) -> Iterator[Block]:
    """Fenced and indented blocks of code, in order."""
    lines, at = text.splitlines(), 0
    while at < len(lines):
        start, line = at, lines[at]
        fence = re.match(r"\s*```(\w*)", line)
        if fence:
            end = next(n for n in range(at + 1, len(lines)) if lines[n].strip() == "```")
            yield Block(fence[1], "\n".join(lines[at + 1 : end]), start + 2)
            at = end + 1
        elif line.startswith("    ") and line.strip() and (at == 0 or not lines[at - 1].strip()):
            while at < len(lines) and (lines[at].startswith("    ") or not lines[at].strip()):
                at += 1
            yield Block("", "\n".join(lines[start:at]).rstrip(), start + 1)
        else:
            at += 1


def commands(path: Path) -> Iterator[Command]:
    """Every command of a page: of blocks, and of text in backquotes that begins as one (without `...` in it)."""
    text, name = path.read_text(encoding="utf-8"), path.relative_to(ROOT)
    for block in blocks(text):
        if block.language in ("", "bash", "sh"):
            joined = block.text.replace("\\\n", " ")
            for line in joined.splitlines():
                if block.language or _program(line.split()) in PROGRAMS:
                    yield from _parts(line, f"{name}:{block.line}")
    prose = _without_blocks(text)
    for span in re.finditer(r"`([^`]+)`", prose):
        words = span[1].split()
        if _program(words) in PROGRAMS and len(words) > 1 and "..." not in words:
            yield from _parts(" ".join(words), f"{name}:{prose[: span.start()].count(chr(10)) + 1}")


def _program(words: list[str]) -> str:
    return next((word for word in words if not _ASSIGNMENT.fullmatch(word)), "")


def _parts(line: str, place: str) -> Iterator[Command]:
    words = shlex.split(line, comments=True)
    while words:
        part = words[: words.index("&&")] if "&&" in words else words
        words = words[len(part) + 1 :]
        while _ASSIGNMENT.fullmatch(part[0]):
            part = part[1:]
        yield Command(place, tuple(part))


def _without_blocks(text: str) -> str:
    """The text with blank lines in the place of its blocks."""
    lines = text.splitlines()
    for block in blocks(text):
        for number in range(block.line - 1, block.line - 1 + len(block.text.splitlines())):
            lines[number] = ""
    return "\n".join("" if line.strip().startswith("```") else line for line in lines)
