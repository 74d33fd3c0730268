"""What a sharded base refuses, and how it is loaded, on one rank. On two: tests/invariance/test_sharded.py."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.distributed.tensor import DTensor

from abmll.distributed import start_ranks, stop_ranks
from abmll.models.architectures import architecture_config, random_model
from abmll.models.sharding import forget_pass, gathered_bytes, load_sharded

CPU = torch.device("cpu")


def load(make=None):
    architecture = architecture_config("tiny")
    make = make or (lambda: random_model(architecture, CPU, torch.bfloat16, "sdpa"))
    return load_sharded(make, architecture, CPU, torch.bfloat16, "sdpa")


@pytest.fixture
def rank():
    yield start_ranks()
    stop_ranks()


def test_no_ranks_nothing_to_share():
    with pytest.raises(ValueError, match=r"^model\.sharding: 'full': no ranks to spread it over; start with deepspeed"):
        load()


def test_dtypes_are_the_loaded_models(rank):
    """As where transformers keeps a model's norms in fp32."""
    whole = random_model(architecture_config("tiny"), CPU, torch.bfloat16, "sdpa")
    whole.model.layers[1].input_layernorm.float()
    model = load(lambda: whole)
    expected = {name: tensor for name, tensor in (*whole.named_parameters(), *whole.named_buffers())}
    assert expected["model.layers.1.input_layernorm.weight"].dtype == torch.float32
    found = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        held = found[name].to_local() if name in dict(model.named_parameters()) else found[name]
        assert held.dtype == tensor.dtype and torch.equal(held, tensor), name
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert gathered_bytes(model) == (0, 0)  # from no other rank


def test_other_tensors_than_the_configurations_are_refused(rank):
    whole = random_model(architecture_config("tiny"), CPU, torch.bfloat16, "sdpa")
    whole.model.layers[0].self_attn.q_proj.bias = nn.Parameter(torch.zeros(64))
    with pytest.raises(ValueError, match=r"1 tensors of .* the first 'model\.layers\.0\.self_attn\.q_proj\.bias'"):
        load(lambda: whole)
    whole = random_model(architecture_config("tiny"), CPU, torch.bfloat16, "sdpa")
    whole.lm_head.weight = nn.Parameter(torch.zeros(511, 64))
    with pytest.raises(ValueError, match=r"the first 'lm_head\.weight'; set model\.sharding=none"):
        load(lambda: whole)


def test_layers_that_cannot_be_recomputed_cannot_be_gathered(rank, monkeypatch):
    monkeypatch.setattr("abmll.models.sharding.GradientCheckpointingLayer", nn.Bilinear)
    with pytest.raises(ValueError, match=r"a model of type 'llama' has no decoder of layers to gather one at a time"):
        load()


def test_a_failed_pass_is_forgotten(rank):
    """As where a way of packed attention does not run."""
    model, tokens = load(), torch.arange(5)[None]
    with torch.no_grad():
        expected = model(tokens).logits
        attention = model.model.layers[1].self_attn
        hook = attention.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(OSError("no kernel")))
        with pytest.raises(OSError, match="no kernel"):
            model(tokens)
        hook.remove()
        assert not isinstance(attention.q_proj.weight, DTensor)  # gathered, and in the middle of it
        forget_pass(model)
        assert isinstance(attention.q_proj.weight, DTensor)
        assert torch.equal(model(tokens).logits, expected)
