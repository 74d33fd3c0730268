"""A tiny run's summary, made without training: theta is off its start, so that adapters do something."""

import json
import runpy
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "evaluation"))

from deployed import EXAMPLES, TEXTS, save_run
from exported import adapted_from, save_base

LAUNCH = Path(__file__).parents[2] / "launch"


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


@pytest.fixture
def call(monkeypatch, capsys):
    """Exit status, standard output and standard error of a command, in this process."""

    def call(command, *arguments):
        monkeypatch.setattr(sys, "argv", [command, *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(LAUNCH / f"{command}.py"), run_name="__main__")
        return ended.value.code, *capsys.readouterr()

    return call


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "moods.jsonl"
    path.write_text("\n".join(json.dumps({"text": text, "label": label}) for text, label in EXAMPLES))
    return path


@pytest.fixture
def adapter(adapted, tmp_path):
    return adapted.save(tmp_path / "adapter")


@pytest.fixture
def texts(tmp_path):
    path = tmp_path / "texts.csv"
    path.write_text("id,text\n" + "".join(f'{number},"{text}"\n' for number, text in enumerate(TEXTS)))
    return path
