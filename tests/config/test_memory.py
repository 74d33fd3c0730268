"""The memory estimate: exact where it counts parameters, near what autograd keeps where it estimates."""

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

from abmll.config import Config
from abmll.kernels import backends
from abmll.kernels.fused.configurations import SCRATCH_BYTES
from abmll.memory import estimate

LLAMA3_8B = LlamaConfig(
    hidden_size=4096,
    num_hidden_layers=32,
    intermediate_size=14336,
    num_attention_heads=32,
    num_key_value_heads=8,
    vocab_size=128256,
    tie_word_embeddings=False,
)
SMALL = LlamaConfig(
    hidden_size=256,
    num_hidden_layers=4,
    intermediate_size=896,
    num_attention_heads=8,
    num_key_value_heads=2,
    vocab_size=300,
    tie_word_embeddings=True,
)
TINY_BATCH = {"batch_size": 1}


def config(**sections):
    tasks = {"source": "builtin", **sections.pop("tasks", {})}
    return Config(model={"name": "random:x", **sections.pop("model", {})}, tasks=tasks, **sections)


def small_parts(memory):
    return memory.adapters + memory.gradients + memory.optimizer_states


def test_llama3_8b_exactly():
    memory = estimate(LLAMA3_8B, config(), world_size=1)
    assert memory.base_weights == 2 * 8_030_261_248
    # q and o are 4096 x 4096, v is 4096 x 1024: inputs + outputs of all three, in 32 layers
    pair = 8 * 32 * (8192 + 5120 + 8192) * 4
    assert memory.adapters == memory.gradients == 4 * pair
    assert memory.optimizer_states == 8 * pair
    assert small_parts(memory) / 1e9 == pytest.approx(0.35, abs=0.005)
    assert memory.engine_buffers == 2 * pair + 80_000_000
    # q, v and o of one layer, 2 x 1024 tokens, eight fp32 tensors of the output's size
    assert memory.posterior == 8 * 4 * 2048 * (4096 + 1024 + 4096)
    parts = (memory.base_weights, small_parts(memory), memory.engine_buffers, memory.activations, memory.posterior)
    assert memory.total == sum(parts)


def test_other_methods_train_half_the_pairs():
    abmll, lora = (estimate(LLAMA3_8B, config(method={"name": name}), 1) for name in ("abmll", "lora"))
    assert small_parts(abmll) == 2 * small_parts(lora)


def test_zero_stages_shard_theta_only():
    def parts(stage, ranks):
        engine = {"zero_optimization": {"stage": stage, "reduce_bucket_size": 1000}}
        return estimate(SMALL, config(), ranks, engine)

    theta = parts(0, 1).adapters // 2
    assert parts(0, 4) == parts(0, 1)
    assert parts(0, 4).engine_buffers == 0
    assert parts(1, 4).gradients == 2 * theta
    assert parts(2, 4).gradients == theta + theta // 4
    for stage in (1, 2):
        assert parts(stage, 4).optimizer_states == 2 * theta + theta // 2
        assert parts(stage, 4).engine_buffers == theta // 4 + 4000


def test_tied_embeddings_count_once():
    untied = LlamaConfig(**{**SMALL.to_dict(), "tie_word_embeddings": False})
    difference = estimate(untied, config(), 1).base_weights - estimate(SMALL, config(), 1).base_weights
    assert difference == 2 * 300 * 256
    fp32 = estimate(SMALL, config(model={"dtype": "float32"}), 1)
    assert fp32.base_weights == 2 * estimate(SMALL, config(), 1).base_weights


def test_activations_are_what_autograd_keeps():
    """All layers' saved tensors of a bf16 model with frozen weights and adapters on q, v and o."""
    model = AutoModelForCausalLM.from_config(SMALL, dtype=torch.bfloat16).model.requires_grad_(False)
    for layer in model.layers:
        for name in ("q_proj", "v_proj", "o_proj"):
            setattr(layer.self_attn, name, LowRank(getattr(layer.self_attn, name)))
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    saved = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = (storage.nbytes(), tensor)  # holding it keeps the address its own
        return tensor

    embeddings = torch.randn(2, 256, 256, dtype=torch.bfloat16, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(inputs_embeds=embeddings, use_cache=False)
    kept = sum(size for size, _ in saved.values())

    run = config(
        tasks={"batch_size": 2, "max_tokens": 256}, trainer={"activation_checkpointing": False}, eval=TINY_BATCH
    )
    assert estimate(SMALL, run, 1).activations == pytest.approx(kept, rel=0.1)


def test_activations_follow_checkpointing_and_tokens():
    def activations(tokens, checkpointing, eval_batch=1):
        trainer, evaluation = {"activation_checkpointing": checkpointing}, {"batch_size": eval_batch}
        run = config(tasks={"batch_size": 2, "max_tokens": tokens}, trainer=trainer, eval=evaluation)
        return estimate(LLAMA3_8B, run, 1).activations

    boundaries, one_layer = 32 * 1024 * 4096 * 2, activations(512, False) // 32
    assert activations(512, True) == boundaries + one_layer
    assert boundaries == pytest.approx(0.27e9, rel=0.01)
    assert activations(1024, True) == 2 * activations(512, True)
    assert activations(512, True, eval_batch=64) > activations(512, True)


def test_table_lists_every_part():
    lines = estimate(LLAMA3_8B, config(), 1).format().splitlines()
    assert lines[0].split() == ["base", "weights", "16.06", "GB"]
    assert lines[-1].startswith("total") and len(lines) == 8


def test_modules_that_the_model_does_not_have():
    with pytest.raises(ValueError, match=r"adapters\.modules: q_prj: .* did you mean q_proj\?"):
        estimate(SMALL, config(adapters={"modules": ("v_proj", "q_prj")}), 1)
    with pytest.raises(ValueError, match="GPT2Config has no intermediate_size"):
        small = GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=50, n_positions=16)
        estimate(small, config(adapters={"modules": ("lm_head",)}), 1)


class LowRank(nn.Module):
    def __init__(self, base):
        super().__init__()
        self.base = base
        self.down = nn.Linear(base.in_features, 8, bias=False, dtype=torch.bfloat16)
        self.up = nn.Linear(8, base.out_features, bias=False, dtype=torch.bfloat16)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


def test_fused_posteriors_keep_no_tensor_of_the_output_s_or_the_weight_s_size(monkeypatch):
    """As on a GPU that runs the kernels: the layer's input and 4 r numbers a token, or the input and two bands."""
    monkeypatch.setattr(backends, "_device_obstacle", lambda device: None)
    run = config(adapters={"backend": "triton"})
    inputs = 2048 * 2 * (4096 + 4096 + 4096)  # of q, v and o of one layer
    assert estimate(LLAMA3_8B, run, 1).posterior == inputs + 2048 * 3 * 4 * 8 * 4
    weight = config(adapters={"backend": "triton", "posterior": "weight"})
    assert estimate(LLAMA3_8B, weight, 1).posterior == inputs + 2 * SCRATCH_BYTES


def test_a_backend_that_cannot_run_is_refused(monkeypatch):
    monkeypatch.setattr(backends, "_device_obstacle", lambda device: f"device {device}: no")
    with pytest.raises(ValueError, match=r"adapters.backend: 'triton': device cpu: no; or set backend: auto"):
        estimate(SMALL, config(adapters={"backend": "triton"}), 1)


def test_samples_side_by_side_count():
    one, eight = (estimate(SMALL, config(eval={"samples": n, "batch_size": 400}), 1).activations for n in (1, 8))
    assert eight == 8 * one
