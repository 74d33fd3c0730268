"""launch/plan.py as a user meets it, and what a run makes of its plan."""

from __future__ import annotations

import runpy
import sys

import pytest
import torch
from runs import ROOT, make_run, one_thread, run  # noqa: F401

from abmll.memory.capacity import device_capacity
from abmll.models.checkpointing import POLICIES

# without ZeRO's bucket, which is larger than all of the tiny model
ZERO0 = f"trainer.deepspeed={ROOT}/configs/deepspeed/zero0.json"
AUTO = ("trainer.activation_checkpointing=auto", "eval.batch_size=auto", "trainer.episodes=1", ZERO0)


@pytest.fixture
def plan(run, monkeypatch):  # noqa: F811
    """The command in this process; returns its exit status."""

    def execute(*arguments: str) -> int:
        monkeypatch.setattr(sys, "argv", ["plan.py", "--config", str(run.config), *arguments])
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(ROOT / "launch/plan.py"), run_name="__main__")
        return end.value.code

    return execute


def test_plan_shows_a_run_beside_lora_and_on_several_ranks(plan, capsys):
    assert plan("--ranks", "4", "model.dtype=bfloat16", "tasks.max_tokens=64") == 0
    out = capsys.readouterr().out
    assert "| GB | abmll, 1 rank | abmll, 4 ranks | plain LoRA (lora), 1 rank |" in out
    assert "| GB | load | forward | backward | optimizer | outer step | scoring |" in out
    assert "| 2 | [128, 64] bfloat16 | model.layers.*.mlp.up_proj.weight | weights |" in out
    assert "activations checkpointed in no layer; " in out and "fits 40 GB: " in out and "+ 1.5 GB kept free" in out


def test_plan_tries_what_would_make_a_run_fit(plan, capsys):
    assert plan("--ranks", "1", "--device", "cpu", "memory.budget_gb=1e-9", "tasks.batch_size=1") == 1
    out = capsys.readouterr().out
    assert "DOES NOT FIT 1e-09 GB" in out and "Tried:\n  trainer.activation_checkpointing=true\n" in out
    assert "Nothing of this is enough for 1e-09 GB" in out


def test_plan_is_made_for_the_ranks_that_share_the_base(plan, capsys):
    assert plan("--ranks", "4", "model.sharding=full", "tasks.max_tokens=64") == 0
    out = capsys.readouterr().out
    assert "GB in float32, sharded over the ranks" in out
    assert "| GB | abmll, 4 ranks | plain LoRA (lora), 4 ranks |" in out and "abmll, 4 ranks, by phase" in out
    assert "| gathered layers | " in out and "fits 40 GB: " in out


def test_plan_tries_to_share_the_base_where_nothing_else_helps(plan, capsys):
    small = ("--device", "cpu", "tasks.max_tokens=32", "tasks.batch_size=1", "model.dtype=bfloat16", ZERO0)
    assert plan("--ranks", "8", *small, "memory.budget_gb=1e-9") == 1
    assert "model.sharding=full on 8 ranks\n      DOES NOT FIT 1e-09 GB: " in capsys.readouterr().out
    assert plan("--ranks", "1", *small, "memory.budget_gb=1e-9") == 1
    assert "model.sharding" not in capsys.readouterr().out


def test_plan_tells_mistakes(plan, capsys):
    assert plan("adapters.modules=[q_prj]") == 2
    assert "error: adapters.modules: q_prj: " in capsys.readouterr().err
    assert plan("--ranks", "0") == 2


@pytest.mark.parametrize("policy", POLICIES)
def test_a_run_takes_what_its_plan_says(run, policy):  # noqa: F811
    """From the budget to the layers' flags and the evaluator's batches."""
    with run.session(*AUTO) as session:
        first = session.plan
        assert first.fits and session.evaluator.predictor.batch_size == first.eval_batch_size <= 16
    budgets = {"none": 40.0, "every second layer": first.ledger.peak / 1e9 - 1e-6, "all layers": 1e-9}
    with run.session(*AUTO, f"memory.budget_gb={budgets[policy]}", overwrite=True) as session:
        assert session.plan.checkpointing == policy
        flags = [layer.gradient_checkpointing for layer in session.parts.model.model.layers]
        expected = {"none": [False, False], "every second layer": [True, False], "all layers": [True, True]}
        assert flags == expected[policy]


def test_a_small_machine_bounds_the_budget(run, monkeypatch):  # noqa: F811
    monkeypatch.setattr("abmll.memory.on_ranks.device_capacity", lambda *_: 1000)
    with run.session(*AUTO) as session:
        assert session.plan.budget == 1000 and session.plan.checkpointing == "all layers"


def test_ranks_of_a_machine_share_its_memory():
    cpu = torch.device("cpu")
    assert device_capacity(cpu) > 2**28
    assert device_capacity(cpu, 4) == device_capacity(cpu) // 4
