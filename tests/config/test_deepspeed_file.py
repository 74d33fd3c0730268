"""The engine's file: what the trainer owns, and what would break it, is refused by name."""

import json

import pytest

from abmll.config import Config, ConfigError
from abmll.config.deepspeed import engine_settings, load_deepspeed

GOOD = {"zero_optimization": {"stage": 1}, "gradient_clipping": 0.0}


@pytest.fixture
def problems(tmp_path):
    def problems(settings):
        path = tmp_path / "engine.json"
        path.write_text(settings if isinstance(settings, str) else json.dumps(settings))
        try:
            load_deepspeed(path)
        except ConfigError as error:
            assert all(line.startswith(str(path)) for line in error.problems)
            return [line.removeprefix(str(path)).lstrip(": ") for line in error.problems]
        return []

    return problems


def test_good_settings(problems):
    assert problems(GOOD) == []
    assert problems({**GOOD, "gradient_accumulation_steps": 1, "bf16": {"enabled": False}}) == []


@pytest.mark.parametrize(
    ("change", "start"),
    [
        ({"optimizer": {"type": "Adam"}}, "optimizer: {'type': 'Adam'}: theta's is built"),
        ({"scheduler": {}}, "scheduler: {}: the learning rates are constant; remove it"),
        ({"checkpoint": {}}, "checkpoint: {}: the trainer writes its checkpoints itself; remove it"),
        ({"train_batch_size": 8}, "train_batch_size: 8: it follows"),
        ({"train_micro_batch_size_per_gpu": 8}, "train_micro_batch_size_per_gpu: 8: it follows"),
        ({"fp16": {"enabled": True}}, "fp16: {'enabled': True}: theta is trained in fp32; remove it"),
        ({"bf16": {"enabled": "auto"}}, "bf16: {'enabled': 'auto'}: theta is trained in fp32; remove it"),
        ({"gradient_accumulation_steps": 4}, "gradient_accumulation_steps: 4: "),
        ({"gradient_clipping": "auto"}, "gradient_clipping: 'auto': must be a number"),
        ({"gradient_cliping": 1.0}, "gradient_cliping: 1.0: unknown key; did you mean gradient_clipping?"),
        ({"zero_optimization": {"stage": 3}}, "zero_optimization.stage: 3: not supported; write 0, 1 or 2"),
        ({"zero_optimization": {"stage": True}}, "zero_optimization.stage: True: not supported"),
        ({"zero_optimization": 2}, "zero_optimization: 2: is no object"),
        (
            {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}},
            "zero_optimization.offload_optimizer: {'device': 'cpu'}: theta stays",
        ),
    ],
)
def test_refused(problems, change, start):
    (line,) = problems({**GOOD, **change})
    assert line.startswith(start)


def test_clipping_must_be_set(problems):
    (line,) = problems({"zero_optimization": {"stage": 2}})
    assert line == "gradient_clipping: not set: DeepSpeed's default is 1.0; write 0.0 for no clipping, or a norm"


def test_all_at_once(problems):
    settings = {"optimizer": {}, "scheduler": {}, "fp16": {"enabled": True}, "zero_optimization": {"stage": 3}}
    keys = [line.split(":")[0] for line in problems(settings)]
    assert keys == ["optimizer", "scheduler", "fp16", "gradient_clipping", "zero_optimization.stage"]


def test_not_json(problems):
    (line,) = problems('{\n  "gradient_clipping": 0.0,\n}')
    assert line.startswith("3: not valid JSON") or line.startswith("2: not valid JSON")
    assert problems("[1]") == ['[1]: is no object; write {"zero_optimization": {"stage": 2}, …}']
    assert problems('{"gradient_clipping": 0.0, "gradient_clipping": 1.0}') == [
        "gradient_clipping: is written twice; keep one of them"
    ]


def test_not_there(tmp_path):
    with pytest.raises(ConfigError, match=r"trainer\.deepspeed: .*none\.json: cannot be read"):
        load_deepspeed(tmp_path / "none.json")


@pytest.mark.parametrize("method", [{"name": "reptile"}, {"meta_gradient": "reptile"}])
def test_clipping_would_shorten_a_step_towards_phi(tmp_path, method):
    path = tmp_path / "engine.json"
    tasks = {"source": "builtin"}
    config = {"output": "run", "model": {"name": "random:tiny"}, "tasks": tasks, "trainer": {"deepspeed": str(path)}}

    def settings(clipping, method):
        path.write_text(json.dumps({**GOOD, "gradient_clipping": clipping}))
        return engine_settings(Config.model_validate({**config, "method": method}), tmp_path / "config.yaml")

    assert settings(0.0, method)["gradient_clipping"] == 0.0
    assert settings(0.5, {"name": "fomaml", "meta_gradient": "reptile"})["gradient_clipping"] == 0.5
    with pytest.raises(ConfigError, match=r"gradient_clipping: 0\.5: it would shorten .*; write 0\.0 and set"):
        settings(0.5, method)
