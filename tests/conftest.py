"""Tiny runs on built-in tasks: random weights, no file, no network, well under a second each.

What builds them is imported when the first one is built: `pytest tests/kernels` needs torch and triton alone.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest

# tiny models gain nothing from more, and threads that wait for a core which another process has take far longer
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read once, at the first import of triton

from abmll.kernels import NoiseKey

if TYPE_CHECKING:
    from abmll.build import Parts
    from abmll.config import Config
    from abmll.methods import Visit
    from abmll.tasks.task import Batch, Episode


def pytest_configure(config: pytest.Config) -> None:
    if hasattr(config.option, "loadscopereorder"):  # xdist's: files with the fewest tests would come last
        config.option.loadscopereorder = False


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that start ranks first: they have few tests and take minutes, and the last of them would have one of two
    workers wait for the other.
    """
    ranks = {item.path for item in items if item.get_closest_marker("distributed")}
    items.sort(key=lambda item: item.path not in ranks)


@dataclass(frozen=True)
class Tiny:
    """The parts of a run and the configuration that they were built from."""

    config: Config
    parts: Parts

    @property
    def learner(self):
        return self.parts.learner

    @property
    def adapters(self):
        return self.parts.learner.adapters

    @property
    def model(self):
        return self.parts.model

    @property
    def method(self):
        return self.parts.method

    def episode(self, index: int = 0) -> Episode:
        return self.parts.tasks.sampler(self.config, self.method).episode(index)

    @property
    def batch(self) -> Batch:
        return self.episode().support[0]

    @property
    def keys(self) -> list[NoiseKey]:
        """K + 1 noise names, as an update takes them."""
        return [NoiseKey(2024, step) for step in range(self.config.method.inner_steps + 1)]

    def visit(self, index: int = 0, optimizer=None, progress: float = 0.0, episodes: Sequence[int] = (0,)) -> Visit:
        """Of episodes side by side, and phi ready for it."""
        from abmll.methods import Visit

        optimizer = self.learner.optimizer(self.config.method.inner_lr) if optimizer is None else optimizer
        if self.adapters.groups != len(episodes):
            self.adapters.reset_phi(len(episodes))
        return Visit.of(
            [self.episode(number) for number in episodes], index, [self.keys] * len(episodes), optimizer, progress
        )

    def scatter(self, size: float = 0.02, seed: int = 1) -> Tiny:
        """Move theta, and phi away from it, off the initial point where many gradients are zero."""
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for side in (self.adapters.theta, self.adapters.phi):
                for parameter in side.values():
                    parameter += size * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        return self


def build_tiny(dtype: torch.dtype = torch.float32, **sections: dict) -> Tiny:
    """A tiny run; `sections` override keys, as in build_tiny(method={"beta": 0.0}).

    float64 converts the built model, adapters included. Checkpointing is off unless trainer asks for it. c = -8 and
    beta = 1e-4 give NLL and KL gradients of comparable size.
    """
    from abmll.build import build
    from abmll.config import Config
    from abmll.models.checkpointing import checkpoint_layers

    defaults = {
        "model": {"name": "random:tiny", "dtype": "bfloat16" if dtype == torch.bfloat16 else "float32"},
        "adapters": {"log_variance_offset": -8.0},
        "method": {"inner_steps": 3, "inner_lr": 1e-2, "outer_lr": 1e-2, "test_lr": 1e-2, "beta": 1e-4},
        "tasks": {
            "source": "builtin",
            "batch_size": 2,
            "max_tokens": 320,
            "builtin": {"train_tasks": 2, "test_tasks": 3, "train_examples": 8, "test_examples": 4},
        },
        "trainer": {"activation_checkpointing": False},
        "eval": {"every": 1, "validation_examples": 2, "batch_size": 4},
    }
    assert set(sections) <= {*defaults, "seed"}, sections
    values = {name: {**section, **sections.get(name, {})} for name, section in defaults.items()}
    config = Config.model_validate({**values, "seed": sections.get("seed", 0)})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        parts = build(config, "tiny.yaml", torch.device("cpu"))
        checkpoint_layers(parts.model, "all layers" if config.trainer.activation_checkpointing else "none")
    if dtype == torch.float64:
        parts.model.double()
    return Tiny(config, parts)


@pytest.fixture
def large_blocks():
    """For tests that run more than a kernel in Triton's interpreter."""
    from abmll.kernels.fused.interpreter import large_blocks

    with large_blocks():
        yield


@pytest.fixture(name="build_tiny", scope="session")
def build_tiny_fixture():
    return build_tiny
