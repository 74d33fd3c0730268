"""Plans: Llama3-8B's bytes, what `auto` decides, and what is tried where a run does not fit."""

from __future__ import annotations

import importlib.util
import sys

import pytest
from setups import deepspeed, make_config, make_setup
from transformers import LlamaConfig

from abmll.config import Config
from abmll.memory import plan_run, remedies
from abmll.memory.episode import count_episode, run_episode
from abmll.memory.fake import counted
from abmll.memory.storages import ADAPTATION, PHASES, SCORING, SCRATCH, TRAINING
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

    bands = [storage for storage in scratch("triton") if storage.what == "[64, 64] bfloat16"]
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
        found = plan((peaks[policy] + 0.5) / 1e9, **sections)  # the half: in GB some integers round downwards
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


def test_a_method_without_training_adapts_and_scores():
    """The adaptation to an unseen task is its backward pass, which checkpointing has to serve too."""
    sections = {"tasks": {"batch_size": 8, "max_tokens": 256}, "method": {"name": "pretrained"}}
    found = plan(**sections)
    assert set(found.ledger.phases) == {"load", ADAPTATION, SCORING} and found.checkpointing == "none"
    assert found.ledger.fullest == ADAPTATION
    lean = plan(found.ledger.peak / 1e9 - 1e-6, **sections)
    assert lean.checkpointing == "every second layer" and lean.fits
    trained = plan(**{**sections, "method": {"name": "reptile"}})
    assert ADAPTATION not in trained.ledger.phases  # its inner loop is the same
    kept = plan(**{**sections, "method": {"name": "reptile", "reset_inner_optimizer": False}})
    assert kept.ledger.peak_of(ADAPTATION) > trained.ledger.peak_of("backward")  # two optimizers' moments


def test_tasks_side_by_side_count_in_an_evaluation_whatever_an_outer_step_has():
    def count(episodes: int, tasks: int):
        trainer = {"tasks_per_step": episodes, "parallel_episodes": tasks}
        return count_episode(make_setup("none", scoring=(1,), trainer=trainer))

    alone, beside, one = count(1, 4), count(4, 4), count(1, 1)
    assert alone.peak_of("backward") == one.peak_of("backward") < beside.peak_of("backward")
    assert alone.peak_of(ADAPTATION) >= beside.peak_of("backward") and ADAPTATION not in one.phases


def test_samples_side_by_side_count():
    one, four = (plan(eval={"batch_size": 4, "samples": n}).ledger.peak_of(SCORING) for n in (1, 4))
    assert four > one


def test_draws_of_the_weights_have_factors_of_their_own():
    """Beside theta and the task's phi, which are all the adapters that training has."""
    plans = [plan(eval={"batch_size": 4, "tfb": {"samples": n}}, method={"name": "reptile"}) for n in (0, 1, 4)]
    none, one, four = (found.ledger.phases[SCORING] for found in plans)
    copy = none["adapters"] / 2
    assert (one["adapters"], four["adapters"]) == (3 * copy, 6 * copy)
    assert four["temporaries"] > 2 * one["temporaries"]
    assert plans[2].eval_batch_size == 4


def test_fewer_draws_are_a_remedy():
    sections = {"eval": {"batch_size": 4, "tfb": {"samples": 16}}, "method": {"name": "reptile"}}
    start = plan(1e-9, **sections)
    found = {remedy.overrides: remedy.plan.ledger.peak for remedy in remedies(start)}
    assert found[("eval.tfb.samples=1",)] < start.ledger.peak


def test_a_pruned_model_is_counted(monkeypatch):
    pruned = []
    monkeypatch.setattr("abmll.evaluation.prune.zero_smallest", lambda x, fraction: pruned.append(x.shape) or x)
    assert plan(eval={"batch_size": 4, "prune": {"fraction": 0.1}}).ledger is not None
    assert pruned == [(1, 4 * 64, 64)] * 2
    monkeypatch.undo()
    assert plan(eval={"batch_size": 4, "prune": {"fraction": 0.1}}).ledger is not None


def test_a_batch_of_samples_does_not_depend_on_the_device():
    """Their noise belongs to places in the batch, and so do the scores."""
    sizes = {plan(budget, tasks={"batch_size": 6}, eval={"samples": 3}).eval_batch_size for budget in (1e-9, 40.0)}
    assert sizes == {8}


def test_tasks_of_one_step_share_theta_s_gradient():
    one, two = plan(), plan(trainer={"tasks_per_step": 2})
    theta = one.ledger.phases["optimizer"]["gradients"]
    assert two.ledger.phases["forward"]["gradients"] == theta and one.ledger.phases["forward"]["gradients"] == 0


def test_fp32_with_shared_key_value_heads_is_counted_as_plain_attention():
    def peak(heads):
        shape = {**architecture_config("tiny").to_dict(), "num_key_value_heads": heads}
        config = make_config(model={"dtype": "float32"}, tasks={"max_tokens": 256})
        return plan_run(config, LlamaConfig(**shape), deepspeed(), policies=("none",)).ledger.peak

    square = 4 * 4 * 256 * 256 * 4  # of four prompts, four heads
    assert peak(2) - peak(4) > 2 * square


def test_what_was_not_counted_is_no_remedy(monkeypatch):
    start = plan(1e-9, tasks={"batch_size": 1, "max_tokens": 64})
    monkeypatch.setattr("abmll.memory.episode.pack_shapes", lambda *_: 1 / 0)
    found = [remedy for remedy in remedies(start) if "model.quantization=nf4" in remedy.overrides]
    assert found and all(remedy.plan.ledger is None and not remedy.plan.fits for remedy in found)


def test_without_triton_plain_code_is_counted(monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name, *rest: None if name == "triton" else found(name, *rest)
    )
    monkeypatch.setitem(sys.modules, "triton", None)
    without, plain = plan(), plan(adapters={"rank": 4, "backend": "torch"})
    assert without.ledger.peak == plain.ledger.peak


def test_the_caller_s_architecture_stays_as_it_is():
    architecture = architecture_config("tiny")
    before = architecture._attn_implementation
    plan_run(make_config(**GPU), architecture, deepspeed())
    assert architecture._attn_implementation == before


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
    trained = [phase for phase in PHASES if phase != ADAPTATION]
    assert by_phase.splitlines()[0] == f"| GB | {' | '.join(trained)} |"
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
    assert found.ledger is None and not found.fits
    assert (found.checkpointing, found.eval_batch_size) == ("all layers", 16)
    assert verdict(found).startswith("not counted: this model's code does not run on fake tensors (")
    asked = plan(eval={"batch_size": 7}, trainer={"activation_checkpointing": False})
    assert (asked.checkpointing, asked.eval_batch_size) == ("none", 7)
    assert summary(found, "a rank").count("\n") == 1
