"""The outer loop: who owns theta and phi, what communicates, what a NaN does, which episodes a step visits."""

from __future__ import annotations

import dataclasses
import json
import re

import pytest
import torch
import torch.distributed as dist
from outer_steps import check_optimizer, recording
from runs import METHODS as OTHERS
from runs import Run
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from abmll.config.schema import ModelConfig
from abmll.deploy.meta_model import MetaModel
from abmll.distributed import Ranks
from abmll.files import write_whole
from abmll.learner import Learner
from abmll.models.load import load_model
from abmll.provenance import provenance
from abmll.rescore import evaluate
from abmll.run import Session
from abmll.trainer import COLUMNS, Trainer, TrainingDiverged

METHODS = {
    "activation posterior": ("method.name=abmll",),
    "weight posterior": ("adapters.posterior=weight",),
    "first order": ("method.meta_gradient=first_order",),
    "a step towards phi": ("method.meta_gradient=reptile",),
    "query batch": ("method.outer_batch=query",),
    "first order on a query batch, weights": (
        "method.meta_gradient=first_order",
        "method.outer_batch=query",
        "adapters.posterior=weight",
    ),
    "reptile": ("method.name=reptile",),
    "structured_lora": ("method.name=structured_lora",),
    "lora": ("method.name=lora",),
    "one sample's KL": ("method.kl_estimate=sample",),
    "one sample's KL, weights": ("method.kl_estimate=sample", "adapters.posterior=weight"),
    **{name: (f"method.name={name}", *others) for name, others in OTHERS.items() if name not in ("lora", "reptile")},
}


def copy(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in tensors.items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one)


def is_reset(adapters) -> bool:
    return all(torch.equal(phi, adapters.theta[name].expand_as(phi)) for name, phi in adapters.phi.items())


def record_gradients(trainer: Trainer, monkeypatch) -> list[dict[str, Tensor]]:
    """Whatever the engine is given from now on."""
    given, step = [], trainer.engine.step
    monkeypatch.setattr(trainer.engine, "step", lambda gradient: (given.append(copy(gradient)), step(gradient)))
    return given


def poison(session: Session, monkeypatch, bad: set[int], update: int = 0) -> dict[int, dict[str, Tensor]]:
    """The NLL of the `bad` episodes is NaN in their update `update`; returns every episode's gradient by its index."""
    learner, method = session.parts.learner, session.parts.method
    nll, original, gradients = learner.nll, method.update, {}

    def poisoned_update(learner, visit):
        factors = torch.tensor([float("nan") if index in bad else 1.0 for index in visit.episodes])
        with monkeypatch.context() as patch:
            if visit.index == update:
                patch.setattr(learner, "nll", lambda logits, batch: nll(logits, batch) * factors)
            found = original(learner, visit)
        for slot, index in enumerate(visit.episodes):
            gradients[index] = copy({name: value[slot] for name, value in found.gradient.items()})
        return found

    monkeypatch.setattr(method, "update", poisoned_update)
    return gradients


@pytest.mark.parametrize("overrides", METHODS.values(), ids=METHODS)
def test_every_method_moves_theta_and_scores(run, overrides):
    with run.session("trainer.episodes=2", *overrides) as session:
        before = copy(session.parts.learner.adapters.theta)
        session.trainer.run()
        session.finish(None)
    assert not same(before, run.theta)
    assert all(value.isfinite().all() for value in run.theta.values())
    (found,) = run.scores
    assert sorted(found["overall"]) == ["0", "2"] and found["overall"]["2"]["tasks"] == 2


def test_frequencies_need_no_model_and_are_no_base(run, monkeypatch):
    """Scored without a forward pass, and nothing that could be adapted."""
    monkeypatch.setattr(Learner, "mean_probabilities", None)
    run.train("method.name=frequencies")
    (found,) = run.scores
    assert found["method"] == "frequencies" and not run.folder.joinpath("metrics.jsonl").exists()
    assert found["overall"]["2"]["nll"] == found["overall"]["2"]["nll_options"]
    with pytest.raises(ValueError, match=r"method\.name: frequencies: has no model to adapt"):
        MetaModel.load(run.folder)


def test_pretrained_trains_nothing_and_scores(run):
    run.train("method.name=pretrained")
    assert [found["method"] for found in run.scores] == ["pretrained"]
    assert not run.folder.joinpath("metrics.jsonl").exists()
    assert all(not value.any() for name, value in run.theta.items() if name.endswith(".b"))


@pytest.mark.parametrize("stage", [0, 2])
def test_phi_equals_theta_after_every_step_and_theta_is_the_optimizers(run, monkeypatch, stage):
    """A reset of phi, or of the gradient switch, must not cut theta off from the engine's master copy."""
    config = "configs/deepspeed/zero2.json"
    with run.session(f"trainer.deepspeed={config.replace('2', str(stage))}") as session:
        trainer, adapters = session.trainer, session.parts.learner.adapters
        given = record_gradients(trainer, monkeypatch)
        with recording() as steps:
            for step in range(5):
                trainer._outer_step(step)
                assert same(steps[step].gradient, given[step])
                assert is_reset(adapters)
                assert not any(value.requires_grad for value in adapters.theta.values())
        check_optimizer(steps, session)


def test_updates_start_at_theta_without_gradients_for_it(run, monkeypatch):
    with run.session() as session:
        adapters, update, seen = session.parts.learner.adapters, session.parts.method.update, []

        def looking(learner, visit):
            seen.append(is_reset(adapters))
            seen.append(not any(value.requires_grad for value in adapters.theta.values()))
            before = copy(adapters.theta)
            found = update(learner, visit)
            seen.append(same(before, adapters.theta))
            seen.append(not is_reset(adapters))
            return found

        monkeypatch.setattr(session.parts.method, "update", looking)
        session.trainer._outer_step(0)
        session.trainer._outer_step(1)
    assert len(seen) == 8 and all(seen)


STEMS = ("all_", "broadcast", "reduce", "gather", "scatter", "barrier", "send", "recv", "isend", "irecv", "monitored")
COLLECTIVES = [name for name in dir(dist) if name.startswith(STEMS) and type(getattr(dist, name)) is type(lambda: 0)]


def test_the_inner_loop_communicates_nothing(run, monkeypatch):
    calls: list[str] = []

    def counting(name, function):
        def counted(*arguments, **keywords):
            calls.append(name)
            return function(*arguments, **keywords)

        return counted

    with run.session("trainer.tasks_per_step=2") as session:
        trainer, within = session.trainer, []
        for name in COLLECTIVES:
            monkeypatch.setattr(dist, name, counting(name, getattr(dist, name)))
        update = trainer._update

        def counted_update(*arguments):
            before = len(calls)
            found = update(*arguments)
            within.append(len(calls) - before)
            return found

        monkeypatch.setattr(trainer, "_update", counted_update)
        trainer._outer_step(0)
    assert within == [0, 0]
    assert "all_reduce" in calls  # or the count is blind


class Reads(TorchDispatchMode):
    """Counts the reads of a number on the device: each would wait for a GPU."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("overrides", METHODS.values(), ids=METHODS)
def test_an_update_reads_nothing_from_the_device(run, monkeypatch, overrides):
    """The one read of several episodes side by side is their rows of the table."""
    with run.session(*overrides) as session:
        trainer, reads = session.trainer, Reads()
        visit = trainer._visit([trainer.sampler.episode(index) for index in (0, 1)], 0)
        with reads:
            trainer._update(visit)
        assert reads.count == 0
        with reads:
            float(torch.ones(()))
        assert reads.count == 1  # or the count is blind


def test_a_nan_episode_leaves_the_mean_of_the_others(run, monkeypatch):
    with run.session("trainer.tasks_per_step=3", "trainer.episodes=3") as session:
        gradients = poison(session, monkeypatch, bad={1})
        given = record_gradients(session.trainer, monkeypatch)
        session.trainer.run()
        theta = session.parts.learner.adapters.theta
        assert all(value.isfinite().all() for value in theta.values())
    assert not all(value.isfinite().all() for value in gradients[1].values())
    for name, value in given[0].items():
        torch.testing.assert_close(value, (gradients[0][name] + gradients[2][name]) / 2, rtol=1e-6, atol=0)
    (line,) = run.metrics
    assert line["skipped_episodes"] == 1
    assert all(value == value for value in line.values())


def test_the_run_stops_after_nan_episodes_in_a_row(run, monkeypatch, capsys):
    with run.session("trainer.max_nonfinite=3", "trainer.episodes=9") as session:
        poison(session, monkeypatch, bad={2, 3, 4})
        with pytest.raises(TrainingDiverged, match="3 episodes in a row gave NaN or Inf; start another run"):
            session.trainer.run()
        assert session.trainer.position.step == 5
        assert all(value.isfinite().all() for value in session.parts.learner.adapters.theta.values())
    assert [line["skipped_episodes"] for line in run.metrics] == [0, 0, 1, 2, 3]  # the last one is reported as well
    assert "skipped: NaN or Inf in every episode (3 skipped so far)" in capsys.readouterr().out
    assert run.checkpoints[-1] == "step-00000004"


def test_a_good_episode_ends_the_streak(run, monkeypatch):
    with run.session("trainer.max_nonfinite=3", "trainer.episodes=6") as session:
        poison(session, monkeypatch, bad={0, 1, 3, 4})
        session.trainer.run()
    assert run.metrics[-1]["skipped_episodes"] == 4


@pytest.mark.parametrize("update", [0, 1])
def test_a_nan_in_one_of_an_episodes_updates_counts_and_the_others_train(run, make_run, monkeypatch, update):
    """Three episodes in a row lose one of two steps of theta: no streak, and the good step's terms are told."""
    settings = ("method.name=structured_lora", "method.inner_steps=2", "trainer.episodes=3", "trainer.max_nonfinite=2")
    good = make_run("good")
    good.train(*settings)
    with run.session(*settings) as session:
        poison(session, monkeypatch, bad={0, 1, 2}, update=update)
        steps = record_gradients(session.trainer, monkeypatch)
        session.trainer.run()
        assert len(steps) == 3 and session.trainer.position.nonfinite_in_a_row == 0
    assert [line["skipped_episodes"] for line in run.metrics] == [1, 2, 3]
    line, whole = run.metrics[0], good.metrics[0]
    assert line["nll_first"] == line["nll_last"], "one batch is left"
    assert update == 0 or line["nll_first"] == whole["nll_first"]  # theta is the same before the first step
    records, of_good = (
        [json.loads(text) for text in (one.folder / "episodes.jsonl").read_text().splitlines()] for one in (run, good)
    )
    assert [record["real_tokens"] for record in records] == [record["real_tokens"] for record in of_good]
    assert [record["finite"] for record in records] == [False] * 3 and "nll_last" in records[0]


@pytest.mark.parametrize(
    ("settings", "lower"),
    [
        ((), "method.inner_lr, method.outer_lr, method.beta or adapters.log_variance_alpha"),
        (("method.name=reptile",), "method.inner_lr or method.reptile_step"),
        (("method.name=structured_lora",), "method.outer_lr"),
        (("method.name=blob",), "method.outer_lr or method.beta"),
    ],
)
def test_what_to_lower_is_what_the_method_reads(run, monkeypatch, settings, lower):
    with run.session(*settings, "method.inner_steps=1", "trainer.max_nonfinite=1", "trainer.episodes=1") as session:
        poison(session, monkeypatch, bad={0})
        with pytest.raises(TrainingDiverged, match=f"with a lower {re.escape(lower)}, or raise"):
            session.trainer.run()


def test_kept_inner_moments_are_dropped_after_a_nan(run, monkeypatch):
    with run.session("method.reset_inner_optimizer=false", "trainer.episodes=3") as session:
        poison(session, monkeypatch, bad={1})
        session.trainer.run()
    assert [line["skipped_episodes"] for line in run.metrics] == [0, 1, 1]


def test_fewer_tasks_a_step_than_ranks_is_refused(run):
    with (
        run.session("trainer.tasks_per_step=1") as session,
        pytest.raises(ValueError, match=r"trainer\.tasks_per_step: 1: fewer than the 2 ranks"),
    ):
        dataclasses.replace(session.trainer, ranks=Ranks(0, 2, torch.device("cpu")))


def test_the_last_step_visits_what_is_left(run, monkeypatch):
    with run.session("trainer.tasks_per_step=2", "trainer.episodes=3") as session:
        gradients = poison(session, monkeypatch, bad=set())
        given = record_gradients(session.trainer, monkeypatch)
        tables = [session.trainer._outer_step(step) for step in range(session.trainer.num_steps)]
    assert [table[:, COLUMNS.index("visited")].tolist() for table in tables] == [[1, 1], [1, 0]]
    assert sorted(gradients) == [0, 1, 2]
    assert same(given[1], gradients[2])  # not halved for the empty place


WITH_KL = ("activation posterior", "weight posterior", "one sample's KL", "blob")


@pytest.mark.parametrize("name", WITH_KL)
def test_a_step_line_has_the_kl_of_each_layer(run, name):
    """The last inner step's, the mean over the step's episodes: it adds up to the line's `kl`."""
    run.train("trainer.tasks_per_step=3", *METHODS[name], "method.inner_lr=1e-2")
    adapted = json.loads((run.folder / "final/summary.json").read_text())["layers"]
    assert len(adapted) == 6 and adapted[0].endswith("layers.0.self_attn.q_proj")
    lines = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 2
    for line in lines:
        assert len(line["kl_by_layer"]) == len(adapted)
        assert sum(line["kl_by_layer"]) == pytest.approx(line["kl"], rel=1e-4) and line["kl"] != 0
        if name != "one sample's KL":  # an estimate may be negative
            assert min(line["kl_by_layer"]) > 0


def test_without_a_kl_there_is_none_by_layer(run):
    run.train("method.name=reptile", "trainer.episodes=1")
    assert "kl_by_layer" not in json.loads((run.folder / "metrics.jsonl").read_text())


def test_ranks_tables_with_layers_add_up_to_that_of_one(run, make_run, monkeypatch):
    """Each rank fills its own episodes' rows; an episode with NaN stays out of the mean by layer."""
    with run.session("trainer.tasks_per_step=2", "trainer.parallel_episodes=2") as session:
        whole = session.trainer._outer_step(0)
        report = session.trainer._report(whole, 1.0)
        assert report.kl_by_layer == pytest.approx(whole[:, len(COLUMNS) :].mean(dim=0).tolist())
        half = whole.clone()
        half[1, COLUMNS.index("finite")] = 0
        assert session.trainer._report(half, 1.0).kl_by_layer == whole[0, len(COLUMNS) :].tolist()
        whole[1, COLUMNS.index("finite")] = 1
    parts = []
    for slot in (0, 1):
        with make_run(str(slot)).session("trainer.tasks_per_step=2") as session:
            own = {slot: session.trainer._own_episodes(0)[slot]}
            monkeypatch.setattr(session.trainer, "_own_episodes", lambda step, own=own: own)
            parts.append(session.trainer._outer_step(0))
    assert parts[0].shape == whole.shape == (2, len(COLUMNS) + 6)
    torch.testing.assert_close(parts[0] + parts[1], whole, rtol=2e-4, atol=0)


def test_a_dominant_kl_is_warned_of_once(run, capsys):
    run.train("method.beta=1e-3", "trainer.episodes=3")
    out = capsys.readouterr().out
    assert out.count("dwarfs the NLL") == 1 and "lower method.beta" in out


def test_a_run_is_not_mixed_with_another(run, capsys):
    run.train("trainer.episodes=1")
    theta, notes = run.theta_bytes, run.folder / "notes.txt"
    notes.write_text("mine")
    with pytest.raises(ValueError, match=r"already holds a run; continue it with --resume auto, .* --overwrite"):
        run.train()
    with pytest.raises(ValueError, match=r"model\.name"):
        run.train("model.name=random:tiyn", overwrite=True)
    assert run.theta_bytes == theta  # a mistake costs no run
    run.train("trainer.episodes=1", "seed=1", overwrite=True)
    assert run.theta_bytes != theta and len(run.metrics) == 1
    assert notes.read_text() == "mine"


def test_checkpoints_alone_are_a_run(run: Run):
    (run.folder / "checkpoints/step-00000002").mkdir(parents=True)
    with pytest.raises(ValueError, match="already holds a run"):
        run.train()


def test_what_a_run_left_when_it_was_killed_at_its_start_is_a_runs(run: Run):
    """Its provenance comes first, and config.yaml behind the lines that progress may have; neither names a run yet."""
    run.folder.mkdir()
    write_whole(run.folder / "provenance.json", json.dumps(provenance()))
    (run.folder / "metrics.jsonl").touch()
    run.train("trainer.episodes=1")
    assert len(run.metrics) == 1


@pytest.mark.parametrize("name", ["checkpoints/my-model.pt", "config.yaml", "provenance.json", "final/my-model.pt"])
def test_what_is_no_runs_is_not_replaced(name, run: Run, command, capsys):
    """The names are anybody's."""
    mine = run.folder / name
    mine.parent.mkdir(parents=True)
    mine.write_text("my: project\nmodel: {name: mine}\n")
    for arguments in ((), ("--overwrite",), ("--resume", "auto"), ("--validate", "--overwrite")):
        assert command(*arguments) == 2
        told = "".join(capsys.readouterr())
        assert f"output: {run.folder}: holds other files than a run's, which a run would replace " in told
        assert f"({name.partition('/')[0]}); name a new folder with output=FOLDER" in told
    assert [path for path in run.folder.rglob("*") if path.is_file()] == [mine]


def test_a_local_model_is_the_runs_from_any_directory(run: Run, tmp_path, monkeypatch):
    """Its relative path would be a hub id there."""
    for part in load_model(ModelConfig(name="random:tiny", dtype="float32"), "cpu"):
        part.save_pretrained(tmp_path / "models/base1")
    monkeypatch.chdir(tmp_path)
    run.train("model.name=models/base1", "trainer.episodes=2", "trainer.checkpoint_every=1")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    evaluate(str(run.folder), [], str(tmp_path / "again.json"))
    assert json.loads((tmp_path / "again.json").read_text()) == run.scores
    facts = json.loads((run.folder / "final/summary.json").read_text())
    assert facts["config"]["model"]["name"] == str(tmp_path / "models/base1")
    run.train(f"model.name={tmp_path / 'models/base1'}", "trainer.episodes=3", resume=True)
    monkeypatch.chdir(tmp_path)
    run.train("model.name=models/base1", "trainer.episodes=4", resume=True)
    assert len(run.metrics) == 4


def test_step_lines_are_complete_finite_json(finished):
    def refuse(constant):
        raise AssertionError(constant)

    text = (finished.folder / "metrics.jsonl").read_text()
    lines = [json.loads(line, parse_constant=refuse) for line in text.splitlines()]
    steps = [line for line in lines if "episode" in line]
    assert [line["step"] for line in steps] == [1, 2, 3, 4, 5, 6]
    assert [line["epoch"] for line in steps] == [0, 0, 0, 1, 1, 1]
    wanted = {*COLUMNS[2:-2], "weighted_kl", "seconds", "real_tokens_per_second", "peak_memory_bytes"}
    for line in steps:
        assert wanted <= set(line)
        assert line["padded_tokens_per_second"] >= line["real_tokens_per_second"] > 0
    validations = [line for line in lines if "validation_0_steps" in line]
    assert [line["step"] for line in validations] == [2, 4, 6]
