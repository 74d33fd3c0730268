"""Other model families than Llama's: fake tensors give their memory to the byte too."""

from __future__ import annotations

import gc
from dataclasses import replace

import pytest
import transformers
from setups import make_setup

from abmll.memory.episode import read_ledger, run_episode
from abmll.memory.fake import counted
from abmll.memory.storages import StorageCounter

SMALL = {"vocab_size": 300, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
FAMILIES = {
    "gemma2, eager attention alone": (transformers.Gemma2Config, {"sliding_window": 32}),
    "gemma3, sliding windows": (transformers.Gemma3TextConfig, {"sliding_window": 32}),
    "mistral": (transformers.MistralConfig, {"sliding_window": 32}),
    "qwen3, norms of q and k": (transformers.Qwen3Config, {}),
    "qwen2, biases": (transformers.Qwen2Config, {}),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_fake_tensors_take_what_real_ones_do(family, monkeypatch):
    monkeypatch.setattr("transformers.masking_utils.find_packed_sequence_indices", lambda _: None)
    kind, more = FAMILIES[family]
    heads = HEADS if hasattr(kind(), "head_dim") else {name: HEADS[name] for name in list(HEADS)[:2]}
    setup = replace(make_setup(scoring=(3,)), architecture=kind(**SMALL, **heads, **more))
    gc.collect()
    with StorageCounter().counting() as real:
        run_episode(setup, real)
    with counted(gpu=False) as fake:
        run_episode(setup, fake)
    assert read_ledger(fake).phases == read_ledger(real).phases
