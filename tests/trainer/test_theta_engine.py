"""Theta and its optimizer, whole: what an engine saves is what any other engine goes on from."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch

from abmll.config import ConfigError
from abmll.config.schema import LoggingConfig
from abmll.distributed import start_ranks, stop_ranks
from abmll.engine import ThetaEngine, check_settings

SHAPES = {"layer.a": (3, 5), "layer.b": (7, 3), "other.a": (1, 1)}
OPTIMIZERS = {
    "adamw": partial(torch.optim.AdamW, lr=0.1),
    "fused": partial(torch.optim.AdamW, lr=0.1, fused=True),  # counts its steps beside the parameter
    "sgd": partial(torch.optim.SGD, lr=0.1),
}


@pytest.fixture(autouse=True)
def one_rank():
    yield start_ranks()
    stop_ranks()


@pytest.fixture
def make(tmp_path):
    def make(stage: int, optimizer: str = "adamw", shapes: dict = SHAPES) -> ThetaEngine:
        theta = {name: torch.nn.Parameter(torch.full(shape, 0.5)) for name, shape in shapes.items()}
        zero = {"stage": stage, "reduce_bucket_size": 1000, "overlap_comm": False}
        settings = {"zero_optimization": zero, "gradient_clipping": 0.0}
        return ThetaEngine(theta, OPTIMIZERS[optimizer](theta.values()), settings, LoggingConfig(), tmp_path)

    return make


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        (
            {"zero_optimization": {"overlap_com": False}},
            r"zero_optimization\.overlap_com: False: .* mean overlap_comm\?",
        ),
        (
            {"zero_optimization": {"reduce_bucket_size": "x"}},
            r"zero_optimization\.reduce_bucket_size: 'x': must be a val",
        ),
        ({"comms_logger": {"enabled": "what"}}, r"comms_logger\.enabled: 'what': must be a valid boolean.*; change it"),
        ({"tensorboard": {"outputpath": 1}}, r"tensorboard\.outputpath: 1: unknown key; did you mean output_path\?"),
        ({"communication_data_type": "fp99"}, "DeepSpeed refuses it: .*fp99; correct this value"),
        ({"data_types": {"grad_accum_dtype": "q"}}, "DeepSpeed refuses it: 'q' is not a valid"),
    ],
)
def test_what_deepspeed_would_refuse_at_its_start_is_found_before(settings, told):
    check_settings({"zero_optimization": {"stage": 2}, "gradient_clipping": 0.0}, "engine.json")
    with pytest.raises(ConfigError, match=rf"^engine\.json: {told}"):
        check_settings(settings, "engine.json")


def steps(engine: ThetaEngine, *numbers: int) -> dict[str, torch.Tensor]:
    """The outer steps of these numbers; theta afterwards."""
    for number in numbers:
        draw = torch.Generator().manual_seed(number)
        engine.step({name: torch.randn(shape, generator=draw) for name, shape in SHAPES.items()})
    return {name: value.detach().clone() for name, value in engine.theta.items()}


def saved(engine: ThetaEngine, folder: Path) -> dict[str, bytes]:
    folder.mkdir()
    engine.save(folder)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("before", [0, 1, 2])
@pytest.mark.parametrize("after", [0, 1, 2])
def test_an_engine_goes_on_at_any_stage(make, tmp_path, before, after, optimizer):
    whole, first, second = make(before, optimizer), make(before, optimizer), make(after, optimizer)
    steps(first, 1, 2)
    files = saved(first, tmp_path / "first")
    second.load(tmp_path / "first")
    assert saved(second, tmp_path / "second") == files
    expected, found = steps(whole, 1, 2, 3, 4), steps(second, 3, 4)
    for name, value in expected.items():
        # At another stage the same operations go over tensors of another length, and a vector's end may be rounded in
        # another way: in each of two steps theta (below 1) once, and lr = 0.1 times an update of some ten operations.
        torch.testing.assert_close(found[name], value, rtol=0, atol=0 if before == after else 2 * 2 * 2.0**-24)
    assert second.engine.global_steps == 4


def test_an_engine_that_has_stepped_goes_back(make, tmp_path):
    engine = make(2)
    steps(engine, 1)
    saved(engine, tmp_path / "one")
    expected = steps(engine, 2, 3)
    engine.load(tmp_path / "one")
    torch.testing.assert_close(steps(engine, 2, 3), expected, rtol=0, atol=0)


@pytest.mark.parametrize("stage", [0, 2])
def test_before_the_first_step_there_are_no_moments(make, tmp_path, stage):
    saved(make(stage), tmp_path / "new")
    engine = make(stage)
    engine.load(tmp_path / "new")
    torch.testing.assert_close(steps(engine, 1, 2), steps(make(stage), 1, 2), rtol=0, atol=0)


@pytest.mark.parametrize("other", [{"layer.a": (3, 5)}, {**SHAPES, "layer.a": (5, 3)}])
def test_another_theta_is_refused(make, tmp_path, other):
    saved(make(2), tmp_path / "one")
    with pytest.raises(ValueError, match=r"theta\.safetensors: holds other parameters .* output=FOLDER"):
        make(2, shapes=other).load(tmp_path / "one")
