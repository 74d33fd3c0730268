from __future__ import annotations

import importlib.util

import pytest
import torch
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError
from torch import nn
from transformers import (
    AutoConfig,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)
from transformers.utils import logging

from abmll.config.schema import ModelConfig
from abmll.models import load
from abmll.models.answers import Rows, answer_logits
from abmll.models.load import attention_implementation, describe, load_model, model_config
from abmll.models.packing import is_packed

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def hub_error(kind):
    error = kind.__new__(kind)  # their constructors want an HTTP response
    Exception.__init__(error, "refused")
    return error


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_random_model_is_frozen_in_its_dtype(dtype, no_network):
    model, tokenizer = load_model(ModelConfig(name="random:tiny", dtype=dtype), CPU)
    assert {parameter.dtype for parameter in model.parameters()} == {getattr(torch, dtype)}
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert not model.training and tokenizer.chat_template
    assert is_packed(model)
    assert no_network == []


def test_folder_holds_the_same_model_and_never_asks_the_hub(folder, no_network, monkeypatch, make_batch, capfd):
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    random, _ = load_model(ModelConfig(name="random:tiny", dtype="float32"), "cpu")
    model, tokenizer = load_model(ModelConfig(name=str(folder), dtype="float32", attention="eager"), "cpu")
    assert no_network == []
    assert model.config._attn_implementation == "eager"
    assert tokenizer("A", add_special_tokens=False).input_ids == [32] and tokenizer.chat_template
    batch = make_batch([5, 9])
    rounding = (9 + 128) * 2 * 2.0**-24  # another attention: sums over 9 keys and 128 columns in each of two layers
    found, right = (answer_logits(one, Rows.of(one, batch)) for one in (model, random))
    torch.testing.assert_close(found, right, rtol=rounding, atol=rounding)
    assert "it/s" not in capfd.readouterr().err and logging.is_progress_bar_enabled()


def test_a_folder_loads_without_accelerate(folder, monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: name != "accelerate" and find_spec(name, *rest)
    )
    monkeypatch.setattr("transformers.integrations.accelerate.is_accelerate_available", lambda: False)
    monkeypatch.setattr("transformers.modeling_utils.is_accelerate_available", lambda: False)
    load_model(ModelConfig(name=str(folder)), "cpu")


def test_dropout_is_off(tmp_path):
    config = GPT2Config(vocab_size=300, n_embd=32, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0)
    GPT2LMHeadModel(config).save_pretrained(tmp_path)
    load_model(ModelConfig(name="random:tiny"), "cpu")[1].save_pretrained(tmp_path)
    assert config.resid_pdrop == 0.1
    model, _ = load_model(ModelConfig(name=str(tmp_path)), "cpu")
    rates = [module.p for module in model.modules() if isinstance(module, nn.Dropout)]
    assert rates and set(rates) == {0.0}


def test_a_routers_jitter_is_off(tmp_path):
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = MixtralConfig(
        **sizes,
        num_key_value_heads=2,
        num_local_experts=2,
        vocab_size=300,
        router_jitter_noise=0.5,
        bos_token_id=0,
        eos_token_id=0,
    )
    MixtralForCausalLM(config).save_pretrained(tmp_path)
    load_model(ModelConfig(name="random:tiny"), "cpu")[1].save_pretrained(tmp_path)
    model, _ = load_model(ModelConfig(name=str(tmp_path)), "cpu")  # refuses what is random in training
    assert model.config.router_jitter_noise == 0


def test_broken_folders(folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"^model\.name: .* cannot be loaded \(.*model\.safetensors"):
        load_model(ModelConfig(name=str(folder)), "cpu")
    (folder / "config.json").write_text('{"model_type": "no-such-type"}')
    with pytest.raises(ValueError, match=r"^model\.name: .* cannot be loaded \(.*no-such-type"):
        model_config(ModelConfig(name=str(folder)))


def test_unreachable_hub(no_network, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # the hub's client tries again, for some 20 s
    with pytest.raises(ValueError, match=r"run: hf download no-such-owner/no-such-model; .* set HF_HUB_OFFLINE=1"):
        load_model(ModelConfig(name="no-such-owner/no-such-model"), "cpu")


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (GatedRepoError, r"accept the terms at https://huggingface\.co/a/b, then run: hf auth login"),
        (RepositoryNotFoundError, "no such model on the hub; check the spelling"),
        (RevisionNotFoundError, r"it has no revision 'v9'; correct or remove model\.revision"),
        (OSError, "run: hf download a/b"),
        (ValueError, "it cannot be loaded"),
    ],
)
def test_hub_errors(kind, message, monkeypatch):
    def refuse(**_):
        try:
            raise hub_error(kind)
        except kind as error:
            raise (ValueError if kind is ValueError else OSError)("refused\nat length") from error

    monkeypatch.setattr(AutoConfig, "from_pretrained", refuse)
    with pytest.raises(ValueError, match=rf"^model\.name: 'a/b': .*{message}.*\(refused\)$"):
        model_config(ModelConfig(name="a/b", revision="v9"))


LLAMA, GEMMA = LlamaConfig(), Gemma2Config()


def attention(device: torch.device, architecture=LLAMA, **rest) -> str:
    return attention_implementation(ModelConfig(name="x", **rest), device, architecture)


def test_attention_without_flash_attention(monkeypatch):
    monkeypatch.setattr(load, "is_flash_attn_2_available", lambda: False)
    assert attention(CUDA) == attention(CPU) == "sdpa"
    assert attention(CPU, attention="eager") == "eager"
    flash = {"attention": "flash_attention_2"}
    with pytest.raises(
        ValueError, match=r"^model\.attention: 'flash_attention_2': it needs a CUDA device .* on cpu; or "
    ):
        load_model(ModelConfig(name="random:tiny", **flash), "cpu")
    with pytest.raises(
        ValueError, match=r"not installed: run: pip install flash-attn .*; or set model\.attention=auto"
    ):
        attention(CUDA, **flash)


def test_attention_with_flash_attention(monkeypatch):
    monkeypatch.setattr(load, "is_flash_attn_2_available", lambda: True)
    assert attention(CUDA) == attention(CUDA, attention="flash_attention_2") == "flash_attention_2"
    assert attention(CPU) == attention(CUDA, dtype="float32") == "sdpa"
    with pytest.raises(ValueError, match=r"16-bit dtype: set model\.dtype=bfloat16"):
        attention(CUDA, attention="flash_attention_2", dtype="float32")
    monkeypatch.setattr(LlamaForCausalLM, "_supports_flash_attn", False)
    assert attention(CUDA) == "sdpa"
    with pytest.raises(ValueError, match="LlamaForCausalLM does not support it"):
        attention(CUDA, attention="flash_attention_2")


def test_attention_of_a_model_without_sdpa(monkeypatch):
    monkeypatch.setattr(Gemma2ForCausalLM, "_supports_sdpa", False)
    assert attention(CPU, GEMMA) == "eager"
    with pytest.raises(ValueError, match=r"^model\.attention: 'sdpa': Gemma2ForCausalLM does not support it; or set"):
        attention(CPU, GEMMA, attention="sdpa")


def test_gguf_without_its_packages(tmp_path, monkeypatch):
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None)
    with pytest.raises(ValueError, match="needs gguf and accelerate; run: pip install gguf accelerate"):
        model_config(ModelConfig(name=str(tmp_path / "m.gguf")))


def test_a_file_that_is_no_gguf(tmp_path):
    pytest.importorskip("gguf")
    pytest.importorskip("accelerate")
    (tmp_path / "m.gguf").write_bytes(b"no model" * 10)
    with pytest.raises(ValueError, match=r"^model\.name: .*m\.gguf cannot be loaded"):
        model_config(ModelConfig(name=str(tmp_path / "m.gguf")))


def test_describe():
    line = describe(ModelConfig(name="random:llama3-8b"))
    assert "llama, 32 layers, hidden size 4096, 8,030.3 M parameters, 16.06 GB in bfloat16" in line
