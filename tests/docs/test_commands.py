"""Every command of README, CONTRIBUTING and docs works, as far as it can be told here."""

from __future__ import annotations

import shlex
import subprocess
from pathlib import Path

import pytest
from commands import RULES, rules_for
from pages import PAGES, Block, blocks, commands
from runs import environment
from sandbox import SHORT

from abmll.ports import free_port

# the same command in several places is one
FOUND = [command for page in PAGES for command in commands(page)]
COMMANDS = {words: next(one.place for one in FOUND if one.words == words) for _, words in FOUND}
NAMES = {words: f"{place} {' '.join(words)}" for words, place in COMMANDS.items()}


@pytest.mark.parametrize("words", COMMANDS, ids=NAMES.get)
def test_every_command_fits_one_rule(words):
    found = rules_for(words)
    assert len(found) == 1, (
        f"{NAMES[words]}: fits {[rule.what for rule in found] or 'no rule'}; add one to tests/docs/commands.py: run it "
        "with short settings, or check what can be checked, and say why"
    )


def test_every_rule_serves():
    assert [rule.what for rule in RULES if not any(rule.fits(words) for words in COMMANDS)] == []


@pytest.mark.parametrize("words", [w for w in COMMANDS if any(r.kind == "run" for r in rules_for(w))], ids=NAMES.get)
def test_it_runs(words, sandbox):
    rules_for(words)[0].act(words, sandbox)


@pytest.mark.parametrize("words", [w for w in COMMANDS if any(r.kind == "check" for r in rules_for(w))], ids=NAMES.get)
def test_what_can_be_checked_of_it(words, sandbox):
    rules_for(words)[0].act(words, sandbox)


@pytest.mark.distributed
def test_the_first_command_through_the_launcher(sandbox):
    """The README's first line behind its installs, in a process of its own."""
    first = blocks(PAGES[0].read_text(encoding="utf-8")).__next__().text.splitlines()[0]
    program, *rest = shlex.split(first.split(" && ")[-1])
    command = [program, "--master_port", str(free_port()), *rest, *SHORT, "output=runs/first"]
    found = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=500)
    assert found.returncode == 0, found.stdout + found.stderr
    assert (sandbox / "runs/first/final/summary.json").is_file() and "| abmll | 5 |" not in found.stdout
    assert "| abmll | 2 |" in found.stdout


@pytest.mark.parametrize(
    "wrong",
    [
        "deepspeed launch/train.py --config configs/cls23.yaml method.inner_step=3",
        "deepspeed --num_cards 8 launch/train.py --config configs/cls23.yaml",
        "deepspeed --num_gpus 8 launch/train.py --config configs/cls32.yaml",
        "python launch/evaluate.py --run runs/cls23 eval.sample=8",
        "python launch/prepare.py --tasks cls32 --out data/crossfit",
        "pip install -e '.[tests]'",
        "pytest tests/kernel",
        "python benchmarks/kernels.py --quickly",
        "python tests/fuzz/guided.py yaml -max_total_time=90",
    ],
)
def test_a_wrong_command_is_found(wrong, sandbox):
    words = tuple(shlex.split(wrong))
    (rule,) = rules_for(words)
    with pytest.raises((AssertionError, ValueError, SystemExit)):
        rule.act(words, sandbox)


def test_what_a_page_holds(tmp_path, monkeypatch):
    path = Path(tmp_path / "page.md")
    path.write_text(
        "Text `python a.py --x` and `python b.py ...`.\n\n"
        "    X=1 python c.py 'd e' && pytest -q   # why\n    no command\n    deepspeed f.py \\\n        g=1\n\n"
        "- item\n  going on\n\n```text\npython not.py\n```\n```bash\nls x\n```\n"
    )
    monkeypatch.setattr("pages.ROOT", tmp_path)
    found = {(command.place, *command.words) for command in commands(path)}
    assert found == {
        ("page.md:1", "python", "a.py", "--x"),
        ("page.md:3", "python", "c.py", "d e"),
        ("page.md:3", "pytest", "-q"),
        ("page.md:3", "deepspeed", "f.py", "g=1"),
        ("page.md:15", "ls", "x"),
    }
    assert list(blocks(path.read_text()))[1:] == [Block("text", "python not.py", 12), Block("bash", "ls x", 15)]
