"""Plans: Llama3-8B's bytes, what `auto` decides, and what is tried where a run does not fit."""

from __future__ import annotations

import pytest
import transformers
from setups import deepspeed, make_config, make_setup
from transformers import LlamaConfig

from abmll.config import Config
from abmll.memory import plan_run, remedies
from abmll.memory.episode import count_episode, run_episode
from abmll.memory.fake import counted
from abmll.memory.storages import COMPONENTS, PHASES, SCORING, SCRATCH, TRAINING
from abmll.memory.table import decisions, largest_table, peak_table, phase_table, summary, verdict
from abmll.models.architectures import architecture_config
from abmll.models.checkpointing import POLICIES

GPU = {"model": {"name": "random:tiny", "dtype": "bfloat16"}, "adapters": {"rank": 4}}


def plan(budget_gb: float = 40.0, ranks: int = 1, capacity: float | None = None, **sections):
    """Of a tiny model in bf16 with the fused kernels, as on a GPU, no allowance."""
    sections = {**GPU, "memory": {"budget_gb": budget_gb, "allowance_gb": 0.0}, **sections}
    config = make_config(**{**sections, "adapters": {"backend": "auto", **sections["adapters"]}})
    return plan_run(config, architecture_config("tiny"), deepspeed(), ranks, True, capacity)


@pytest.fixture(scope="module")
def llama3_8b():
    config = Config.model_validate(
        {
            "model": {"name": "random:llama3-8b"},
            "tasks": {"source": "builtin", "batch_size": 2, "max_tokens": 512},
            "trainer": {"activation_checkpointing": True},
        }
    )
    return plan_run(config, architecture_config("llama3-8b"), deepspeed())


def test_llama3_8b_at_2_x_512_fused_and_checkpointed(llama3_8b):
    """The goal of 16.85 GB, and every part of it that can be worked out by hand."""
    ledger = llama3_8b.ledger
    pair = 8 * 32 * (8192 + 5120 + 8192) * 4  # inputs + outputs of q, v and o in 32 layers, rank 8, fp32
    peak = ledger.phases["backward"]
    assert ledger.fullest == "backward" and ledger.peak < 16.85e9
    assert peak["weights"] == pytest.approx(2 * 8_030_261_248, rel=1e-6)
    assert peak["adapters"] == pytest.approx(4 * pair, rel=1e-4)
    assert peak["optimizer states"] == pytest.approx(8 * pair, rel=3e-3)  # phi's two moments, theta's two
    boundary = 2 * 512 * 4096 * 2
    assert peak["kept for the backward pass"] > 31 * boundary
    assert ledger.phases["optimizer"]["gradients"] == pytest.approx(2 * pair, rel=1e-4)
    assert llama3_8b.fits and ledger.scored >= 8


def test_scoring_takes_no_more_than_training_unless_told_to(llama3_8b):
    ledger = llama3_8b.ledger
    assert ledger.peak_of(SCORING) <= max(ledger.peak_of(phase) for phase in TRAINING)
    told = plan(eval={"batch_size": 64})
    assert told.eval_batch_size == 64 and told.ledger.fullest == SCORING


def test_largest_tensors_are_named_by_their_makers(llama3_8b):
    makers = {item.maker: item for item in llama3_8b.ledger.largest}
    assert makers["model.layers.*.mlp.up_proj.weight"].count == 32
    gate = makers["model.layers.*.mlp.gate_proj: mm"]
    assert (gate.what, gate.component, gate.count) == ("[1024, 14336] bfloat16", "kept for the backward pass", 1)
    # the boundaries of the layers below the last
    assert makers["model.layers.*: add"].count == 31


def test_fused_operators_scratch_is_seen():
    def scratch(backend):
        setup = make_setup(gpu=True, **{**GPU, "adapters": {"posterior": "weight", "backend": backend}})
        with counted(gpu=True) as counter:
            run_episode(setup, counter)
        return [storage for storage in counter.storages if storage.classified() == SCRATCH]

    bands = [storage for storage in scratch("triton") if storage.what == "[1, 64, 64] bfloat16"]
    assert bands and all("weight_forward > " in one.maker or "weight_backward > " in one.maker for one in bands)
    assert scratch("torch") == []


def test_auto_takes_the_fastest_checkpointing_that_fits():
    sections = {"tasks": {"batch_size": 8, "max_tokens": 256}, "eval": {"batch_size": 1}}
    peaks = {}
    for policy, asked in (("none", False), ("all layers", True)):
        found = plan(**sections, trainer={"activation_checkpointing": asked})
        assert found.checkpointing == policy
        peaks[policy] = found.ledger.peak
    second = count_episode(
        make_setup("every second layer", gpu=True, **{**GPU, "adapters": {"rank": 4, "backend": "triton"}, **sections})
    )
    peaks["every second layer"] = second.peak
    assert peaks["none"] > peaks["every second layer"] > peaks["all layers"]
    for policy in POLICIES:
        found = plan(peaks[policy] / 1e9, **sections)
        assert (found.checkpointing, found.ledger.peak, found.fits) == (policy, peaks[policy], True)
    nothing_fits = plan(peaks["all layers"] / 1e9 - 1e-6, **sections)
    assert nothing_fits.checkpointing == "all layers" and not nothing_fits.fits
    on_a_small_gpu = plan(40.0, capacity=peaks["every second layer"], **sections)
    assert on_a_small_gpu.checkpointing == "every second layer"


def test_the_allowance_stays_free_on_a_gpu():
    peak = plan().ledger.peak / 1e9
    assert plan(peak + 0.1, memory={"budget_gb": peak + 0.1, "allowance_gb": 0.05}).fits
    assert not plan(memory={"budget_gb": peak + 0.1, "allowance_gb": 0.2}).fits


def test_remedies_are_counted_one_by_one_then_together():
    large = {"tasks": {"batch_size": 4, "max_tokens": 256}, "trainer": {"activation_checkpointing": False}}
    start = plan(1e-9, **large)
    found = list(remedies(start))
    assert [remedy.overrides for remedy in found] == [
        ("trainer.activation_checkpointing=true",),
        ("tasks.batch_size=2",),
        ("trainer.activation_checkpointing=true", "tasks.batch_size=2"),
        ("tasks.max_tokens=128",),
        ("trainer.activation_checkpointing=true", "tasks.batch_size=2", "tasks.max_tokens=128"),
        ("model.quantization=nf4",),
        (
            "trainer.activation_checkpointing=true",
            "tasks.batch_size=2",
            "tasks.max_tokens=128",
            "model.quantization=nf4",
        ),
    ]
    assert not any(remedy.plan.fits for remedy in found)
    peaks = [remedy.plan.ledger.peak for remedy in found]
    assert max(peaks) < start.ledger.peak and min(peaks) == peaks[-1]
    enough = plan(peaks[0] / 1e9, **large)
    assert [remedy.plan.fits for remedy in remedies(enough)] == [True]


def test_more_ranks_share_theta_s_moments():
    one, eight = plan(), plan(ranks=8)
    states = [found.ledger.phases["forward"]["optimizer states"] for found in (one, eight)]
    theta = one.ledger.phases["optimizer"]["gradients"]
    assert states[0] - states[1] == pytest.approx(2 * theta * 7 / 8, abs=2000)


def test_a_method_without_training_is_scored_alone():
    found = plan(method={"name": "pretrained"})
    assert set(found.ledger.phases) == {"load", "scoring"} and found.eval_batch_size == 16


@pytest.mark.parametrize("samples", [0, 4])
def test_samples_side_by_side_count(samples):
    one, some = (plan(eval={"batch_size": 4, "samples": n}).ledger.peak_of(SCORING) for n in (0, samples))
    assert (some > one) == bool(samples)


def test_flash_attention_keeps_no_square():
    """Twice the tokens, at most twice what is kept, where eager attention keeps four times its largest tensors."""

    def kept(tokens, attention):
        model = {**GPU["model"], "attention": attention}
        sections = {**GPU, "model": model, "tasks": {"max_tokens": tokens}}
        return count_episode(make_setup("none", gpu=True, **sections)).phases["backward"]["kept for the backward pass"]

    assert kept(512, "sdpa") < 2.1 * kept(256, "sdpa")
    assert kept(512, "eager") > 2.5 * kept(256, "eager")


def test_tables_hold_every_part(llama3_8b):
    table = peak_table({"ours": llama3_8b.ledger, "again": llama3_8b.ledger})
    assert "| weights | 16.061 | 16.061 |" in table and "| **peak** | **16.8" in table
    by_phase = phase_table(llama3_8b.ledger)
    assert by_phase.splitlines()[0] == f"| GB | {' | '.join(PHASES)} |"
    assert all(component in COMPONENTS for component in llama3_8b.ledger.phases["load"])
    assert "model.embed_tokens.weight" in largest_table(llama3_8b.ledger)
    assert verdict(llama3_8b).startswith("fits 40 GB: 16.8") and "+ 1.5 GB kept free" in verdict(llama3_8b)
    assert "all layers; " in decisions(llama3_8b)


def test_a_4_bit_base_of_llama3_8b_takes_less_than_8_gb():
    sections = {"tasks": {"source": "builtin", "batch_size": 2, "max_tokens": 512}}
    model = {"name": "random:llama3-8b", "quantization": "nf4"}
    config = Config.model_validate({"model": model, "trainer": {"activation_checkpointing": True}, **sections})
    ledger = plan_run(config, architecture_config("llama3-8b"), deepspeed()).ledger
    assert ledger.peak < 8e9
    # the layers' numbers in half a byte each, embeddings and output layer in bf16
    assert ledger.phases["load"]["weights"] == pytest.approx(5.70e9, rel=0.01)


def test_modules_that_the_model_does_not_have():
    with pytest.raises(ValueError, match=r"adapters\.modules: q_prj: .* did you mean q_proj\?"):
        plan(adapters={"modules": ("v_proj", "q_prj")})


def test_tied_embeddings_count_once():
    tied = LlamaConfig(**{**architecture_config("tiny").to_dict(), "tie_word_embeddings": True})
    config = make_config(**GPU)
    untied, once = (plan_run(config, a, deepspeed()).ledger for a in (architecture_config("tiny"), tied))
    assert untied.phases["load"]["weights"] - once.phases["load"]["weights"] == 512 * 64 * 2


def test_a_model_that_cannot_be_counted_runs_with_the_leanest_settings(monkeypatch):
    """Code that asks a tensor for its numbers, which a fake one has not."""

    def forward(self, x):
        return (x if x.sum() > 0 else -x) * self.weight

    monkeypatch.setattr("transformers.models.llama.modeling_llama.LlamaRMSNorm.forward", forward)
    found = plan()
    assert found.ledger is None and found.fits
    assert (found.checkpointing, found.eval_batch_size) == ("all layers", 1)
    assert verdict(found).startswith("not counted: this model's code does not run on fake tensors (")
    asked = plan(eval={"batch_size": 7}, trainer={"activation_checkpointing": False})
    assert (asked.checkpointing, asked.eval_batch_size) == ("none", 7)
    assert summary(found, "a rank").count("\n") == 1


@pytest.mark.parametrize("architecture", ["gemma3", "mistral", "mixtral", "qwen3", "gemma2"])
def test_other_families_can_be_counted(architecture):
    """Sliding windows, experts, norms of q and k; gemma2 has eager attention alone."""
    small = {"vocab_size": 300, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
    kinds = {
        "gemma3": (transformers.Gemma3TextConfig, {"sliding_window": 32}),
        "mistral": (transformers.MistralConfig, {"sliding_window": 32}),
        "mixtral": (transformers.MixtralConfig, {"num_local_experts": 4}),
        "qwen3": (transformers.Qwen3Config, {}),
        "gemma2": (transformers.Gemma2Config, {"sliding_window": 32}),
    }
    kind, more = kinds[architecture]
    config = make_config(**{**GPU, "adapters": {"rank": 4, "backend": "auto"}})
    found = plan_run(config, kind(**small, **heads, **more), deepspeed())
    assert found.ledger.phases["backward"]["kept for the backward pass"] > 0
