"""Tiny runs for the tests of the trainer: a configuration, runs in this process and as commands, what they leave."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor

import abmll.memory.plan
from abmll.checkpoint import Checkpoint
from abmll.config import load_config
from abmll.distributed import start_ranks, stop_ranks
from abmll.memory.episode import Ledger, Setup, count_episode
from abmll.ports import free_port
from abmll.run import Session, open_session, train
from abmll.summary import load_summary
from abmll.trainer import Trainer

ROOT = Path(__file__).parents[2]
TRAIN = ROOT / "launch/train.py"
TIMING = {"seconds", "real_tokens_per_second", "padded_tokens_per_second", "peak_memory_bytes"}

CONFIG = f"""
model: {{name: "random:tiny", dtype: float32}}
adapters: {{rank: 2}}
method: {{inner_steps: 2, inner_lr: 1e-3, outer_lr: 1e-3, test_lr: 1e-3, beta: 1e-12}}
tasks:
  source: builtin
  batch_size: 2
  builtin: {{train_tasks: 3, test_tasks: 2, train_examples: 8, test_examples: 4}}
trainer:
  episodes: 6
  checkpoint_every: 2
  activation_checkpointing: false
  deepspeed: {ROOT}/configs/deepspeed/zero2.json
eval: {{pretrained: false, validation_examples: 2}}
logging: {{progress_bar: false}}
"""


# What each method needs beside its name; all but abmll, which is the configuration's.
METHODS = {
    "lora": (),
    "structured_lora": (),
    "reptile": (),
    "fomaml": (),
    "maml": ("method.inner_optimizer=sgd", "method.inner_lr=0.1"),
    "blob": ("method.beta=1e-3",),
}
# with one step of theta for each outer step, which `check_steps` can follow
ONE_STEP = {name: ("method.inner_steps=1",) for name in ("lora", "structured_lora", "blob")}


_counted: dict[str, Ledger] = {}


def counted_once(count: Callable[[Setup], Ledger]) -> Callable[[Setup], Ledger]:
    """The counting of a run's memory, three quarters of the time of a tiny run's start: kept for all runs alike."""

    def counted(setup: Setup) -> Ledger:
        sections = setup.config.model_dump(mode="json", exclude={"output", "seed", "logging"})
        sections["tasks"].pop("builtin")
        for key in ("episodes", "checkpoint_every", "keep_checkpoints"):
            sections["trainer"].pop(key)
        rest = (setup.deepspeed, setup.world_size, setup.gpu, setup.checkpointing, setup.scoring)
        name = json.dumps([sections, setup.architecture.to_dict(), *rest], sort_keys=True, default=str)
        if name not in _counted:
            _counted[name] = count(setup)
        return _counted[name]

    return counted


class Stopped(Exception):
    """Stands for whatever ends a process early."""


class Run:
    """A run's folder, and its configuration file beside it."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.config = folder.with_suffix(".yaml")
        mine = folder.with_suffix(f".{os.getpid()}")
        mine.write_text(f"output: {folder}\n{CONFIG}")
        mine.replace(self.config)  # at once: another rank may be reading it

    def train(self, *overrides: str, resume: bool = False, overwrite: bool = False) -> Run:
        train(str(self.config), list(overrides), resume, overwrite)
        return self

    @contextmanager
    def session(self, *overrides: str, resume: bool = False, overwrite: bool = False) -> Iterator[Session]:
        """The run's parts, as `train` has them before the first step."""
        try:
            yield self.open(*overrides, resume=resume, overwrite=overwrite)[0]
        finally:
            stop_ranks()

    def open(self, *overrides: str, resume: bool = False, overwrite: bool = False) -> tuple[Session, Checkpoint | None]:
        config = load_config(self.config, overrides)
        return open_session(config, str(self.config), start_ranks(), resume, overwrite)

    def command(self, *arguments: str) -> list[str]:
        return [sys.executable, str(TRAIN), "--config", str(self.config), *arguments]

    @property
    def theta(self) -> dict[str, Tensor]:
        return load_summary(self.folder / "final")[0]

    @property
    def theta_bytes(self) -> bytes:
        return (self.folder / "final/theta.safetensors").read_bytes()

    @property
    def scores(self) -> list[dict]:
        return json.loads((self.folder / "scores.json").read_text())

    @property
    def metrics(self) -> list[dict]:
        """The lines of metrics.jsonl without what a clock or the machine decides; `kl_by_layer` a key a layer."""
        lines = [json.loads(line) for line in (self.folder / "metrics.jsonl").read_text().splitlines()]
        for line in lines:
            line |= {f"kl_by_layer.{layer}": kl for layer, kl in enumerate(line.pop("kl_by_layer", []))}
        return [{key: value for key, value in line.items() if key not in TIMING} for line in lines]

    @property
    def checkpoints(self) -> list[str]:
        return sorted(path.name for path in (self.folder / "checkpoints").iterdir())

    def same_as(self, other: Run) -> None:
        """Bit for bit: theta, the step lines, the scores."""
        assert self.metrics == other.metrics
        assert self.scores == other.scores
        assert self.theta_bytes == other.theta_bytes


def stop_before(monkeypatch, step: int) -> None:
    """Any trainer ends with Stopped instead of its outer step `step` (counted from 0)."""
    outer_step = Trainer._outer_step

    def stopping(trainer: Trainer, at: int) -> Tensor:
        if at == step:
            raise Stopped
        return outer_step(trainer, at)

    monkeypatch.setattr(Trainer, "_outer_step", stopping)


def environment() -> dict[str, str]:
    """For commands: one thread, as in this process, and none of this process's ranks."""
    ranks = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    return {**{k: v for k, v in os.environ.items() if k not in ranks}, "OMP_NUM_THREADS": "1"}


def meet(folder: Path, start: int) -> None:
    """Sets MASTER_PORT for the ranks' start of that number: a port that is free now, chosen by the first of them."""
    path = folder / f"port-{start}"
    if os.environ["RANK"] == "0":
        path.with_suffix(".new").write_text(str(free_port()))
        path.with_suffix(".new").replace(path)
    while not path.exists():
        time.sleep(0.01)
    os.environ["MASTER_PORT"] = path.read_text()


def call(command: list[str], timeout: float = 400) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=timeout)


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    """Sums are in one order in every process that a test compares."""
    before = torch.get_num_threads()
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True, scope="module")
def counts_kept():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(abmll.memory.plan, "count_episode", counted_once(count_episode))
        yield


@pytest.fixture
def make_run(tmp_path):
    return lambda name="run": Run(tmp_path / name)


@pytest.fixture
def run(make_run):
    return make_run()


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """A run of the configuration as it stands, with validations: for comparisons, and for tests that only read."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        found = Run(tmp_path_factory.mktemp("finished") / "run").train("eval.every=2")
    torch.set_num_threads(before)
    return found


@pytest.fixture
def command(run, monkeypatch):
    """launch/train.py in this process, which saves the imports; returns its exit status."""

    def execute(*arguments: str) -> int:
        monkeypatch.setattr(sys, "argv", run.command(*arguments)[1:])
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(TRAIN), run_name="__main__")
        return end.value.code

    return execute
