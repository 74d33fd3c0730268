"""Episodes side by side are episodes one after another: in every method, to rounding, and whatever becomes of one."""

from __future__ import annotations

import json
import weakref

import pytest
import torch
from runs import Run
from test_trainer import METHODS, poison, record_gradients

from abmll.config import ConfigError
from abmll.trainer import COLUMNS, Trainer

# AdamW divides a gradient by its own size, which makes the last bit of one near zero a part of a whole step. An epsilon
# above all gradients makes its steps proportional to them, and rounding stays rounding.
SMOOTH = ("method.adam_eps=30", "method.inner_lr=3e-2", "method.outer_lr=10", "method.test_lr=3e-2")
# fp32 sums over 150 tokens and 128 columns, forward and back through two layers, in two inner steps and an outer one,
# all of whose roundings go one way: those of another number of rows are in another order
BOUND = (150 + 128) * 2 * 2 * 3 * 2.0**-24
EPISODES = (0, 1, 2)


def relative(found: torch.Tensor, right: torch.Tensor) -> float:
    found, right = found.detach(), right.detach()
    return float((found.double() - right.double()).norm() / right.double().norm().clamp_min(1e-30))


def update_of(session, episodes):
    trainer = session.trainer
    return trainer._update(trainer._visit([trainer.sampler.episode(index) for index in episodes], 0))


# plain LoRA pairs have one way
GAUSSIAN = [name for name in METHODS if name not in ("reptile", "structured_lora", "lora")]


@pytest.mark.parametrize(
    ("name", "backend"), [*((name, "torch") for name in METHODS), *((name, "triton") for name in GAUSSIAN)]
)
def test_an_update_of_three_is_three_updates(run, name, backend, large_blocks):
    """Gradients for theta, adapted phi and every step's terms; episodes of different tasks and lengths."""
    small = ("adapters.modules=[v_proj]", "tasks.batch_size=1") if backend == "triton" else ()
    with run.session(f"adapters.backend={backend}", *METHODS[name], *SMOOTH, *small) as session:
        adapters = session.parts.learner.adapters
        together = update_of(session, EPISODES)
        phi = {factor: value.detach().clone() for factor, value in adapters.phi.items()}
        lengths = {batch.groups.sizes for batch in together.batches}
        assert any(len(set(sizes)) > 1 for sizes in lengths)
        for slot, index in enumerate(EPISODES):
            alone = update_of(session, [index])
            for factor, value in alone.gradient.items():
                assert value.shape[1:] == together.gradient[factor].shape[1:]
                if value.abs().max() > 0:
                    assert relative(together.gradient[factor][slot], value[0]) < BOUND, factor
                moved = adapters.phi[factor][0] - adapters.theta[factor]
                if moved.abs().max() > 0:
                    assert relative(phi[factor][slot] - adapters.theta[factor], moved) < BOUND, factor
            for ours, theirs in zip((*together.inner, together.outer), (*alone.inner, alone.outer), strict=True):
                for one, other in zip(ours, theirs, strict=True):
                    torch.testing.assert_close(one[slot], other[0], rtol=BOUND, atol=0)


@pytest.mark.parametrize("parallel", [2, 3])
@pytest.mark.parametrize("overrides", [(), ("method.name=reptile",), ("adapters.posterior=weight",)], ids=str)
def test_a_run_does_not_depend_on_how_many_go_side_by_side(make_run, overrides, parallel):
    def trained(name: str, most: int) -> Run:
        numbers = ("trainer.tasks_per_step=3", "trainer.episodes=6", f"trainer.parallel_episodes={most}")
        return make_run(name).train(*overrides, *SMOOTH, *numbers, "eval.every=1", "eval.samples=2")

    alone, beside = trained("alone", 1), trained("beside", parallel)
    for one, other in zip(alone.metrics, beside.metrics, strict=True):
        assert one.keys() == other.keys()
    for one, other in zip(steps_of(alone), steps_of(beside), strict=True):
        assert other == pytest.approx(one, rel=BOUND)
    for name, value in alone.theta.items():
        if name.endswith(".b"):
            assert relative(beside.theta[name], value) < BOUND
    for one, other in zip(alone.scores, beside.scores, strict=True):
        for steps, tasks in one["tasks"].items():
            for task, scores in tasks.items():
                assert other["tasks"][steps][task]["nll"] == pytest.approx(scores["nll"], rel=1e-3)


def steps_of(run: Run) -> list[dict]:
    return [line for line in run.metrics if "episode" in line]


def test_padding_is_none(make_run):
    with make_run().session("trainer.parallel_episodes=3") as session:
        table = session.trainer._outer_step(0)
    real, padded = (table[:, COLUMNS.index(name)] for name in ("real_tokens", "padded_tokens"))
    assert len(table) == 3 and (real > 0).all() and torch.equal(real, padded)


def test_a_nan_in_one_leaves_the_others_to_the_bit(make_run, monkeypatch):
    gradients = []
    for bad in ({}, {1}):
        with make_run(str(len(bad))).session("trainer.parallel_episodes=3", "trainer.episodes=3") as session:
            of_episodes = poison(session, monkeypatch, bad=set(bad))
            given = record_gradients(session.trainer, monkeypatch)
            session.trainer.run()
            gradients.append(of_episodes)
            assert session.trainer.position.skipped_episodes == len(bad)
    good, poisoned = gradients
    assert not all(value.isfinite().all() for value in poisoned[1].values())
    for index in (0, 2):
        assert all(torch.equal(value, poisoned[index][name]) for name, value in good[index].items())
    for name, value in given[0].items():
        mean = (poisoned[0][name] + poisoned[2][name]) / 2
        torch.testing.assert_close(value, mean, rtol=1e-6, atol=0)


def test_null_tasks_a_step_are_those_that_fit_side_by_side(run, capsys):
    with run.session("trainer.parallel_episodes=3") as session:
        assert session.trainer.tasks_per_step == 3
    header = capsys.readouterr().out
    assert "prompts         packed, their attention one prompt after another\n" in header
    assert "2 of 3 episodes on 1 ranks, 3 side by side (6 episodes" in header
    passes = session.parts.method.passes_per_episode
    assert f"in {passes} forward passes on each rank" in header


@pytest.mark.parametrize("beside", [1, 2])
def test_of_earlier_episodes_no_more_than_the_sum_is_held_while_others_adapt(run, monkeypatch, beside):
    made: list[list[weakref.ref]] = []
    alive: list[list[int]] = []  # before each visit: how many of each earlier one's gradients there are
    update = Trainer._update

    def watched(trainer, visit):
        alive.append([sum(one() is not None for one in earlier) for earlier in made])
        found = update(trainer, visit)
        made.append([weakref.ref(value) for value in found.gradient.values()])
        return found

    monkeypatch.setattr(Trainer, "_update", watched)
    with run.session(f"trainer.parallel_episodes={beside}", "trainer.tasks_per_step=6") as session:
        session.trainer.run()
    first = len(made[0]) if beside == 1 else 0  # one episode's gradients are themselves the sum
    assert len(alive) == 6 // beside and alive[-1] == [first] + [0] * (6 // beside - 2)


def test_a_run_goes_on_with_another_number_beside(make_run):
    numbers = (*SMOOTH, "trainer.tasks_per_step=4", "trainer.checkpoint_every=1")
    whole = make_run("whole").train(*numbers, "trainer.episodes=8")
    parts = make_run("parts")
    with parts.session(*numbers, "trainer.episodes=8") as session:
        session.trainer.num_steps = 1
        session.trainer.run()
    parts.train(*numbers, "trainer.episodes=8", "trainer.parallel_episodes=4", resume=True)
    assert [line["episode"] for line in steps_of(parts)] == [line["episode"] for line in steps_of(whole)] == [4, 8]
    for name, value in whole.theta.items():
        if name.endswith(".b"):
            assert relative(parts.theta[name], value) < BOUND


def test_moments_that_pass_on_need_one_after_another(run):
    with pytest.raises(ConfigError, match=r"trainer\.parallel_episodes: 2: moments that pass from one episode"):
        run.train("trainer.parallel_episodes=2", "method.reset_inner_optimizer=false")


def test_padded_prompts_need_one_after_another(run):
    with pytest.raises(ValueError, match=r"trainer\.parallel_episodes: 2: prompts are padded .* model\.attention=auto"):
        run.train("trainer.parallel_episodes=2", "model.attention=eager")


def test_every_episode_has_a_line_of_its_own(make_run, monkeypatch):
    lines = {}
    for parallel in (1, 2):
        numbers = (f"trainer.parallel_episodes={parallel}", "trainer.tasks_per_step=2", "trainer.episodes=3", *SMOOTH)
        run = make_run(str(parallel))
        with run.session(*numbers) as session:
            poison(session, monkeypatch, bad={1})
            session.trainer.run()
            tasks = [session.trainer.sampler.episode(index).task for index in range(3)]
        lines[parallel] = [json.loads(line) for line in (run.folder / "episodes.jsonl").read_text().splitlines()]
    for one, other, task in zip(lines[1], lines[2], tasks, strict=True):
        assert one.pop("task") == other.pop("task") == task
        assert other == pytest.approx(one, rel=BOUND)
    assert [(line["step"], line["episode"], line["finite"]) for line in lines[2]] == [
        (1, 0, True), (1, 1, False), (2, 2, True),
    ]  # fmt: skip
    assert "kl" not in lines[2][1] and lines[2][0]["kl"] > 0 < lines[2][0]["real_tokens"]
