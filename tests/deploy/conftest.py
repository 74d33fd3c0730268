"""A tiny run's summary, made without training: theta is off its start, so that adapters do something."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "evaluation"))

from deployed import EXAMPLES, save_run
from exported import adapted_from, save_base


@pytest.fixture(scope="session")
def run(tmp_path_factory, build_tiny):
    return save_run(build_tiny(seed=3), tmp_path_factory.mktemp("tiny-run"))


@pytest.fixture(scope="session")
def meta(run):
    from abmll import MetaModel

    return MetaModel.load(run, device="cpu")


@pytest.fixture(scope="session")
def adapted(meta):
    return meta.adapt(EXAMPLES, "moods")


@pytest.fixture(autouse=True)
def whole(meta):
    """Whatever a test does, theta stays, bit for bit, and phi is a copy of it or of a task's."""
    before = {name: value.clone() for name, value in meta.base.adapters.theta.items()}
    yield
    for name, value in meta.base.adapters.theta.items():
        assert torch.equal(value, before[name]), name


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    return save_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="session")
def moods(build_tiny, base, tmp_path_factory):
    return adapted_from(build_tiny, base, tmp_path_factory.mktemp("run"))
