"""A model's own code is never run, and no pickle of a model's either."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
import torch

from abmll.config.schema import ModelConfig
from abmll.models.load import describe, load_model, load_tokenizer, model_config

LOADERS = {
    "the architecture": model_config,
    "the tokenizer": load_tokenizer,
    "its description": describe,
    "the model": lambda config: load_model(config, "cpu"),
}


def change(path: Path, **values: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def bring_code(folder: Path, model_type: str) -> Path:
    """Code beside the weights, which leaves a file where it is run."""
    trace = folder / "executed"
    code = f"open({str(trace)!r}, 'w').close()\nfrom transformers import LlamaConfig\n"
    code += "class Own(LlamaConfig):\n    model_type = 'own'\nOwnModel = OwnTokenizer = Own\n"
    (folder / "own.py").write_text(code)
    names = {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.OwnModel", "AutoModel": "own.OwnModel"}
    change(folder / "config.json", auto_map=names, model_type=model_type)
    own = {"AutoTokenizer": ["own.OwnTokenizer", "own.OwnTokenizer"]}
    change(folder / "tokenizer_config.json", auto_map=own, tokenizer_class="OwnTokenizer")
    return trace


@pytest.mark.parametrize("loader", LOADERS.values(), ids=LOADERS)
def test_code_that_a_model_brings_is_refused(folder, loader):
    trace = bring_code(folder, "own")
    with pytest.raises(ValueError, match=r"model\.name: .*brings code of its own, which is never run; name a model"):
        loader(ModelConfig(name=str(folder), dtype="float32"))
    assert not trace.exists()


def test_a_known_architecture_is_loaded_without_the_code(folder):
    trace = bring_code(folder, "llama")
    assert model_config(ModelConfig(name=str(folder))).model_type == "llama"
    assert not trace.exists()


def test_the_code_would_run_if_it_were_trusted(folder):
    """Or the tests above are blind."""
    from transformers import AutoConfig

    trace = bring_code(folder, "own")
    AutoConfig.from_pretrained(folder, trust_remote_code=True)
    assert trace.exists()


class Touch:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_pickled_weights_run_nothing(folder):
    trace = folder / "executed"
    (folder / "model.safetensors").unlink()
    torch.save({"model.norm.weight": Touch(trace)}, folder / "pytorch_model.bin")
    with pytest.raises((ValueError, pickle.UnpicklingError)):
        load_model(ModelConfig(name=str(folder), dtype="float32"), "cpu")
    assert not trace.exists()
