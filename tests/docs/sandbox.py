"""A folder in which the documentation's commands work: the repository's files, made-up tasks, finished tiny runs."""

from __future__ import annotations

import json
import runpy
import shutil
import sys
from pathlib import Path
from unittest.mock import patch

import pytest
from pages import PAGES, ROOT, blocks

from abmll.config.yaml_text import read_mapping

# Put behind a run's own overrides: a model of random weights, one episode, two scored examples a task.
SHORT = (
    "model.name=random:tiny",
    "model.dtype=float32",
    "adapters.rank=2",
    "adapters.modules=[v_proj]",
    "tasks.max_tokens=2048",
    "tasks.builtin.train_tasks=2",
    "tasks.builtin.test_tasks=2",
    "method.inner_steps=2",
    "trainer.episodes=1",
    "trainer.activation_checkpointing=false",
    "eval.max_examples=2",
    "eval.batch_size=4",
    "eval.pretrained=false",
    "logging.progress_bar=false",
)


def execute(*words: str) -> int:
    """A Python script in this process, which saves the imports: its exit status, 0 where it ends by itself."""
    with patch.object(sys, "argv", list(words)):
        try:
            runpy.run_path(words[0], run_name="__main__")
        except SystemExit as end:
            return end.code or 0
    return 0


@pytest.fixture(scope="session")
def repository(tmp_path_factory) -> Path:
    """With the repository's files; the configurations are a copy, beside which a page's own may lie."""
    above = tmp_path_factory.mktemp("docs")
    folder = above / "repository"
    folder.mkdir()
    for name in ("launch", "benchmarks", "docs", "kernels", "tests", "abmll", "setup.py"):
        (folder / name).symlink_to(ROOT / name)
    shutil.copytree(ROOT / "configs", folder / "configs")
    _write_tasks(folder)
    (above / "shared/data").mkdir(parents=True)
    (above / "shared/data/crossfit").symlink_to(folder / "data/crossfit")
    for page in PAGES:
        for block in blocks(page.read_text(encoding="utf-8")):
            first = block.text.splitlines()[0]
            if block.language == "yaml" and first.startswith("# ") and first.endswith(".yaml"):
                (folder / first[2:]).write_text(block.text + "\n")
    (folder / "MY_LISTS.yaml").write_text("train: [sick]\ntest: [my-rte]\n")
    return folder


def _write_tasks(folder: Path) -> None:
    """Two training and two test tasks of each of the paper's lists, and the tasks of `docs/own-data.md`."""
    listed = {"data/mine": {"refunds", "spam", "urgency"}, "data/crossfit": set()}
    for path in (ROOT / "configs/tasks").glob("*.yaml"):
        for names in read_mapping(path).values():
            listed["data/crossfit"] |= set(names[:2])
    for place, names in listed.items():
        for name in names:
            (folder / place / name).mkdir(parents=True)
            for split, count in (("train", 24), ("test", 4)):
                _write_rows(folder / place / name / f"{split}.jsonl", name, count)
    for name, count in (("my_task", 12), ("test", 8)):
        _write_rows(folder / f"{name}.jsonl", name, count)
    for name in ("texts", "unlabelled"):
        rows = [json.dumps({"text": f"Text {n} of {name}."}) + "\n" for n in range(6)]
        (folder / f"{name}.jsonl").write_text("".join(rows))


def _write_rows(path: Path, task: str, count: int) -> None:
    rows = [
        {
            "task": task,
            "input": f"{path.stem} of {task}: {n}?",
            "output": "no" if n % 3 else "yes",
            "options": ["yes", "no"],
        }
        for n in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def _save_model(folder: str) -> None:
    from abmll.config.schema import ModelConfig
    from abmll.models.load import load_model

    for part in load_model(ModelConfig(name="random:tiny", dtype="float32"), "cpu"):
        part.save_pretrained(folder)


@pytest.fixture(scope="session")
def trained(repository) -> Path:
    """With the finished runs that pages name: one on generated tasks, one on files, one of LoRA."""
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(repository)
        patched.setenv("OMP_NUM_THREADS", "1")
        train = ("launch/train.py", "--config")
        _save_model("models/tiny")  # PEFT's files name a base that others can load
        named = "model.name=models/tiny"
        assert execute(*train, "configs/tiny.yaml", *SHORT, named, "output=runs/quickstart") == 0
        assert execute(*train, "configs/cls23.yaml", *SHORT, "eval.every=null", "output=runs/cls23") == 0
        assert execute(*train, "configs/tiny.yaml", *SHORT, "method.name=lora", "output=runs/lora") == 0
    for name in ("cls45", "legalbench", "chembench", "mine", "abmll", "reptile"):
        shutil.copytree(repository / "runs/cls23", repository / "runs" / name)
    return repository


@pytest.fixture
def sandbox(trained, monkeypatch) -> Path:
    """The folder, as the working directory."""
    monkeypatch.chdir(trained)
    return trained
