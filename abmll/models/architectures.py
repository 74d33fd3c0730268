"""Random weights of named architectures, and a byte-level tokenizer for them: no file, no network.

For tests, dry runs, memory estimates and speed measurements, where only the shapes matter.
"""

from __future__ import annotations

import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

SEED = 20250917  # of the random weights; fixed, so that runs with different seeds adapt the same base model
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def _tiny() -> PreTrainedConfig:
    return LlamaConfig(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        # 1 / sqrt(hidden size) keeps activations of order one; the usual 0.02 would leave all logits near 0
        initializer_range=0.125,
    )


def _llama3_8b() -> PreTrainedConfig:
    """As in the config.json of meta-llama/Meta-Llama-3-8B-Instruct."""
    return LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=8192,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
    )


def _llama3_70b() -> PreTrainedConfig:
    """As in the config.json of meta-llama/Meta-Llama-3-70B."""
    return LlamaConfig(
        vocab_size=128256,
        hidden_size=8192,
        intermediate_size=28672,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=8,
        max_position_embeddings=8192,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
    )


def _qwen2_7b() -> PreTrainedConfig:
    """As in the config.json of Qwen/Qwen2-7B-Instruct; the architecture itself has biases on q, k and v."""
    return Qwen2Config(
        vocab_size=152064,
        hidden_size=3584,
        intermediate_size=18944,
        num_hidden_layers=28,
        num_attention_heads=28,
        num_key_value_heads=4,
        max_position_embeddings=32768,
        rms_norm_eps=1e-6,
        rope_parameters={"rope_type": "default", "rope_theta": 1000000.0},
    )


ARCHITECTURES = {"tiny": _tiny, "llama3-8b": _llama3_8b, "llama3-70b": _llama3_70b, "qwen2-7b": _qwen2_7b}


def architecture_config(name: str) -> PreTrainedConfig:
    """The configuration of a named architecture, with the token ids of `byte_tokenizer`."""
    config = ARCHITECTURES[name]()
    config.pad_token_id, config.bos_token_id, config.eos_token_id = 256, 257, 258
    return config


def random_model(config: PreTrainedConfig, device: torch.device, dtype: torch.dtype, attention: str) -> PreTrainedModel:
    """A causal LM with random weights, made in `dtype` on `device`; the same weights at every call.

    The global generators are left as they were.
    """
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), torch.device(device):
        torch.default_generator.manual_seed(SEED)  # torch.manual_seed would touch the other devices' too
        for gpu in devices:
            with torch.cuda.device(gpu):
                torch.cuda.manual_seed(SEED)
        return AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte of UTF-8 (ids 0 to 255), then the special tokens; its chat template has ChatML's form."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(BPE(vocab={character: index for index, character in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    pad, start, end = SPECIAL_TOKENS
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=pad, bos_token=start, eos_token=end)
    fast.chat_template = CHAT_TEMPLATE
    return fast
