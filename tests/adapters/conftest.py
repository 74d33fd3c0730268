from __future__ import annotations

import pytest
import torch
from transformers import Qwen2Config

from abmll.adapters import inject_adapters
from abmll.config.schema import AdapterConfig, MethodConfig
from abmll.models.architectures import architecture_config, random_model


def _qwen2() -> Qwen2Config:
    return Qwen2Config(
        vocab_size=320,
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.125,
    )


@pytest.fixture
def make_model():
    """A tiny random llama or qwen2, frozen; qwen2's q, k and v have biases, drawn here because they start at zero."""

    def make(name: str = "llama", dtype: torch.dtype = torch.float32):
        config = architecture_config("tiny") if name == "llama" else _qwen2()
        model = random_model(config, torch.device("cpu"), dtype, "sdpa").requires_grad_(False).eval()
        generator = torch.Generator().manual_seed(0)
        for key, value in model.named_parameters():
            if key.endswith(".bias"):
                value.copy_(torch.randn(value.shape, generator=generator))
        return model

    return make


@pytest.fixture
def inject():
    def make(model, kind="gaussian", seed=0, **adapters):
        return inject_adapters(model, AdapterConfig(**adapters), MethodConfig(), kind, seed)

    return make


@pytest.fixture
def input_ids():
    return torch.randint(300, (2, 9), generator=torch.Generator().manual_seed(0))
