"""Checkpoints: whole or absent, found again, pruned; what a resumed run must agree on."""

from __future__ import annotations

import io
import json
import random
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from runs import Run, Stopped, stop_before
from safetensors.torch import load_file

from abmll.checkpoint import Checkpoint, CheckpointStore, newest_whole
from abmll.config import load_config
from abmll.distributed import Ranks
from abmll.files import publish
from abmll.resuming import as_checkpointed
from abmll.run import Session
from abmll.tensor_files import read_tensors


class OneProcess(Ranks):
    """The main rank of any number, without a process group."""

    def gather(self, item):
        return [item]

    def barrier(self):
        pass


class FakeEngine:
    """Writes and reads one file, without a theta."""

    def save(self, folder: Path) -> None:
        (folder / "theta.safetensors").write_bytes(b"theta" * 100)

    def load(self, folder: Path) -> None:
        assert (folder / "theta.safetensors").read_bytes() == b"theta" * 100


@pytest.fixture
def store(tmp_path):
    return CheckpointStore(tmp_path / "checkpoints", 2, OneProcess(0, 1, torch.device("cpu")))


def save(store: CheckpointStore, *steps: int) -> list[Path]:
    state = {"position": {"best": None}, "config": {}}
    return [store.save(step, FakeEngine(), state, {"inner_optimizer": step}) for step in steps]


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGES = {
    "truncated": lambda folder: truncate(folder / "theta.safetensors"),
    "a flipped bit": lambda folder: flip(folder / "rank-00000.safetensors"),
    "a missing file": lambda folder: (folder / "trainer.json").unlink(),
    "no manifest": lambda folder: (folder / "manifest.json").unlink(),
    "an empty manifest": lambda folder: (folder / "manifest.json").write_text("{}"),
    "a manifest of something else": lambda folder: (folder / "manifest.json").write_text("[1]"),
    "a manifest with a wrong key": lambda folder: (folder / "manifest.json").write_text('{"trainer.json": {"b": 1}}'),
    "an empty folder": lambda folder: (shutil.rmtree(folder), folder.mkdir()),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_checkpoint_is_passed_over(store, damage):
    older, newer = save(store, 4, 6)
    assert store.newest_whole().folder == newer
    damage(newer)
    with pytest.warns(UserWarning, match=f"checkpoint {newer}: .*; trying the one before"):
        assert store.newest_whole().folder == older
    damage(older)
    with pytest.warns(UserWarning):
        assert store.newest_whole() is None


def test_any_flipped_bit_of_the_manifest_is_survived(store):
    _, newer = save(store, 4, 6)
    manifest = newer / "manifest.json"
    whole = manifest.read_bytes()
    for place in range(len(whole)):
        manifest.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert store.newest_whole() is not None


def test_a_kill_at_any_moment_leaves_a_whole_checkpoint(store, monkeypatch):
    """Every call that changes the disk is once the last one: what is found again is step 2 or step 4, whole."""
    found, calls = set(), 0
    for last in range(10_000):
        shutil.rmtree(store.folder, ignore_errors=True)
        save(store, 1, 2)
        with monkeypatch.context() as patch:
            calls = interrupt(patch, after=last)
            try:
                save(store, 4)
            except Stopped:
                pass
            else:
                break
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # nothing half written under a final name
            checkpoint = store.newest_whole()
        assert store.load(checkpoint, FakeEngine()) == {"inner_optimizer": checkpoint.state["step"]}
        found.add(checkpoint.state["step"])
        (survivor,) = save(store, 4)
        assert store.newest_whole().folder == survivor
        assert [path.name for path in sorted(store.folder.iterdir())] == ["step-00000002", "step-00000004"]
    assert found == {2, 4} and calls[0] > 10


def test_a_kill_while_a_step_is_saved_again_leaves_it(store, monkeypatch):
    """As happens behind a validation that is made up for: its old folder gives the new one its name."""
    for last in range(10_000):
        shutil.rmtree(store.folder, ignore_errors=True)
        save(store, 2)
        with monkeypatch.context() as patch:
            interrupt(patch, after=last)
            try:
                save(store, 2)
            except Stopped:
                pass
            else:
                break
        assert store.newest_whole().folder.name == "step-00000002"
        save(store, 4)
        assert [path.name for path in sorted(store.folder.iterdir())] == ["step-00000002", "step-00000004"]
    assert last > 10


def interrupt(patch, after: int) -> list[int]:
    """Raise Stopped instead of the disk call number `after`; returns the counter. A removal stops halfway."""
    calls = [0]

    def killing(function):
        def call(*arguments, **keywords):
            calls[0] += 1
            if calls[0] > after:
                raise Stopped
            return function(*arguments, **keywords)

        return call

    def remove(folder, ignore_errors=False):
        for path in sorted(Path(folder).rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()
        Path(folder).rmdir() if Path(folder).exists() else None

    for owner, name in (
        (Path, "mkdir"),
        (Path, "write_text"),
        (Path, "write_bytes"),
        (Path, "rename"),
        (Path, "replace"),
        (Path, "unlink"),
        (Path, "rmdir"),
        (torch, "save"),
    ):
        patch.setattr(owner, name, killing(getattr(owner, name)))
    patch.setattr("os.fsync", killing(lambda descriptor: None))
    patch.setattr("shutil.rmtree", remove)
    return calls


def test_leftovers_of_a_kill_are_ignored_and_removed(store):
    (older,) = save(store, 4)
    shutil.copytree(older, store.folder / ".partial-step-00000006")
    assert store.newest_whole().folder == older
    save(store, 8)
    assert [path.name for path in sorted(store.folder.iterdir())] == ["step-00000004", "step-00000008"]


def test_only_the_newest_are_kept(store):
    save(store, 2, 4, 6, 8)
    assert [path.name for path in sorted(store.folder.iterdir())] == ["step-00000006", "step-00000008"]


def test_a_run_that_went_back_keeps_what_it_writes_then(store):
    """The damaged checkpoints of later steps must not take the places of the new ones."""
    _, damaged = save(store, 4, 10)
    flip(damaged / "trainer.json")
    store.keep = 1
    (kept,) = save(store, 6)
    assert list(store.folder.iterdir()) == [kept] and store.newest_whole().folder == kept


def test_another_number_of_ranks_takes_what_belongs_to_no_rank(store):
    save(store, 4)
    two = CheckpointStore(store.folder, 2, OneProcess(0, 2, torch.device("cpu")))
    state = torch.get_rng_state()
    assert store.load(store.newest_whole(), FakeEngine()) == {"inner_optimizer": 4}
    torch.rand(1)
    assert two.load(store.newest_whole(), FakeEngine()) is None
    assert not torch.equal(torch.get_rng_state(), state)


class Touch:
    """Its pickle makes a file when it is read."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_a_rank_state_that_would_run_code_is_refused(store, tmp_path):
    """The manifest does not help: whoever writes the file can seal it as well."""
    (folder,) = save(store, 4)
    trace, file = tmp_path / "executed", folder / "rank-00000.safetensors"
    torch.save({"inner_optimizer": Touch(trace), "rng": {}}, file)
    torch.load(io.BytesIO(file.read_bytes()), weights_only=False)
    assert trace.exists()  # or the test is blind
    trace.unlink()

    checkpoint = seal(store, folder)
    with pytest.raises(ValueError, match=r"rank-00000\.safetensors: holds no state of a rank .*; remove its folder"):
        store.load(checkpoint, FakeEngine())
    assert not trace.exists()
    with pytest.raises(ValueError, match="safetensors"):
        read_tensors(file)
    assert not trace.exists()


def seal(store: CheckpointStore, folder: Path) -> Checkpoint:
    """A changed checkpoint with a manifest that fits it, found again."""
    (folder / "manifest.json").unlink()
    publish(folder, folder.with_name("step-00000099"))
    checkpoint = store.newest_whole()
    assert checkpoint.folder.name == "step-00000099"
    return checkpoint


def test_all_generators_go_on_where_they_were(store):
    def draws() -> list[float]:
        return [random.random(), random.gauss(0, 1), *np.random.normal(size=3), *torch.randn(3).tolist()]

    random.gauss(0, 1), np.random.normal()  # each keeps a second normal for the next call
    save(store, 4)
    expected = draws()
    assert draws() != expected
    store.load(store.newest_whole(), FakeEngine())
    assert draws() == expected


@pytest.fixture(scope="module")
def half_done(tmp_path_factory):
    """A run that was stopped in its fifth step, with a checkpoint after the fourth."""
    run = Run(tmp_path_factory.mktemp("half") / "run")
    with pytest.MonkeyPatch.context() as patch:
        stop_before(patch, 4)
        with pytest.raises(Stopped):
            run.train("eval.every=2")
    return run


def test_a_changed_run_is_refused_with_its_keys_and_without_a_trace(half_done):
    changes = {
        "seed": "1",
        "method.beta": "1e-9",
        "tasks.batch_size": "4",
        "model.dtype": "bfloat16",
        "adapters.rank": "4",
        "trainer.tasks_per_step": "3",
        "eval.every": "3",
        "eval.select_by": "nll",
    }
    before = (half_done.folder / "config.yaml").read_bytes()
    with (
        pytest.raises(ValueError) as error,
        half_done.session(*(f"{key}={value}" for key, value in changes.items()), resume=True),
    ):
        pass
    lines = str(error.value).splitlines()
    assert "the configuration differs from the checkpoint's" in lines[0]
    assert [line.split(":")[0].strip() for line in lines[1:-1]] == [
        *("seed", "model.dtype", "adapters.rank", "method.beta", "tasks.batch_size", "trainer.tasks_per_step"),
        *("eval.every", "eval.select_by"),
    ]
    assert "method.beta: 1e-12 in the checkpoint, 1e-09 now" in str(error.value)
    assert "output=FOLDER" in lines[-1]
    assert (half_done.folder / "config.yaml").read_bytes() == before


def test_what_nothing_reads_may_change(tmp_path):
    run = Run(tmp_path / "run").train("trainer.episodes=2", "eval.every=null", "eval.select_by=nll")
    checkpoint = newest_whole(run.folder / "checkpoints")
    as_checkpointed(load_config(run.config, ["eval.every=null", "eval.select_by=null"]), checkpoint, 1)
    with pytest.raises(ValueError, match=r"eval\.every: null in the checkpoint, 2 now"):
        as_checkpointed(load_config(run.config, ["eval.every=2", "eval.select_by=null"]), checkpoint, 1)


def test_a_key_that_an_older_version_did_not_have_is_at_its_default(half_done):
    checkpoint = newest_whole(half_done.folder / "checkpoints")
    del checkpoint.state["config"]["method"]["outer_optimizer"]
    as_checkpointed(load_config(half_done.config, ["eval.every=2"]), checkpoint, 1)
    with pytest.raises(ValueError, match=r"method\.outer_optimizer: 'adamw' in the checkpoint, 'sgd' now"):
        as_checkpointed(load_config(half_done.config, ["eval.every=2", "method.outer_optimizer=sgd"]), checkpoint, 1)


@pytest.fixture
def two_a_step(tmp_path):
    """The configuration of two tasks an outer step, and a checkpoint of that run."""
    run = Run(tmp_path / "run").train("trainer.tasks_per_step=2", "trainer.episodes=2")

    def config(*overrides: str):
        return load_config(run.config, ["trainer.tasks_per_step=null", *overrides])

    return config, newest_whole(run.folder / "checkpoints")


def test_an_outer_step_keeps_its_episodes(two_a_step):
    config, checkpoint = two_a_step
    for world_size in (1, 2):
        for asked in (None, 2):
            given = config(f"trainer.tasks_per_step={'null' if asked is None else asked}")
            assert as_checkpointed(given, checkpoint, world_size).trainer.tasks_per_step == 2
    assert as_checkpointed(config("trainer.parallel_episodes=4"), checkpoint, 1).trainer.tasks_per_step == 2
    with pytest.raises(ValueError, match=r"trainer\.tasks_per_step: 2 in the checkpoint, 3 now"):
        as_checkpointed(config("trainer.tasks_per_step=3"), checkpoint, 1)
    with pytest.raises(ValueError, match=r"has 2 episodes .* this run 3 ranks: .* start it with at most 2,"):
        as_checkpointed(config(), checkpoint, 3)


def test_kept_inner_moments_tie_a_run_to_its_ranks(two_a_step):
    config, checkpoint = two_a_step
    checkpoint.state["config"]["method"]["reset_inner_optimizer"] = False
    keeping = "method.reset_inner_optimizer=false"
    assert as_checkpointed(config(keeping), checkpoint, 1)
    with pytest.raises(ValueError) as error:
        as_checkpointed(config(keeping), checkpoint, 2)
    assert "\n  ranks: 1 in the checkpoint, 2 now\n" in str(error.value)
    assert "method.reset_inner_optimizer: false keeps moments on each rank" in str(error.value)
    checkpoint.state["config"]["method"]["name"] = "structured_lora"  # has no inner optimizer
    assert as_checkpointed(config(keeping, "method.name=structured_lora"), checkpoint, 2)


def test_a_checkpoint_of_an_older_version_is_refused(two_a_step):
    config, checkpoint = two_a_step
    del checkpoint.state["tasks_per_step"]
    with pytest.raises(ValueError, match=r"was written by an older version.*output=FOLDER"):
        as_checkpointed(config(), checkpoint, 1)


def test_nothing_in_a_run_draws_from_the_generators_of_a_rank(run):
    """So that a run does not depend on the states that another number of ranks has not got."""
    with run.session("eval.every=3", "eval.samples=2") as session:
        before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
        session.trainer.run()
        session.finish(None)
        assert (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == before


def test_length_logging_and_scoring_may_change(half_done, capsys):
    changes = ("eval.every=2", "trainer.episodes=5", "logging.csv=true", "eval.batch_size=3", "eval.samples=1")
    changes += ("adapters.backend=torch",)  # the same numbers, computed another way
    with half_done.session(*changes, resume=True) as session:
        assert (session.trainer.position.step, session.trainer.num_steps) == (4, 5)
    assert "after step 4 of 5" in capsys.readouterr().out
    assert load_config(half_done.folder / "config.yaml").trainer.episodes == 5


def test_a_checkpoint_holds_theta_and_two_moments_once_and_no_pickle_of_deepspeeds(half_done):
    with half_done.session("eval.every=2", resume=True) as session:
        theta = session.parts.learner.adapters.theta
    folder = half_done.folder / "checkpoints/step-00000004"
    own = {"theta.safetensors", "moments.safetensors", "counts.json", "trainer.json", "manifest.json"}
    assert {str(path.relative_to(folder)) for path in folder.rglob("*")} == {*own, "rank-00000.safetensors"}
    assert load_file(folder / "theta.safetensors").keys() == theta.keys()
    assert load_file(folder / "moments.safetensors").keys() == {
        f"{name}.{kind}" for name in theta for kind in ("exp_avg", "exp_avg_sq")
    }
    numbers = sum(value.numel() for value in theta.values())
    of_theta = (folder / "theta.safetensors", folder / "moments.safetensors")
    assert sum(path.stat().st_size for path in of_theta) < 3 * numbers * 4 + 20_000  # the names
    assert (folder / "rank-00000.safetensors").stat().st_size < 30_000  # generators


@pytest.fixture
def tracked(run, monkeypatch):
    """Runs whose validation scores are written here, one a validation; returns the summaries' steps afterwards."""

    def train(values: list[float], *overrides: str, **keywords) -> list[str]:
        scores, evaluator = iter(values), Session.validate

        def validate(session, position):
            evaluate = session.evaluator.evaluate
            value = next(scores)

            def scored(*arguments):
                found = evaluate(*arguments)
                for overall in found.overall.values():
                    overall["accuracy"] = value
                return found

            with monkeypatch.context() as patch:
                patch.setattr(session.evaluator, "evaluate", scored)
                evaluator(session, position)

        with monkeypatch.context() as patch:
            patch.setattr(Session, "validate", validate)
            run.train("eval.every=2", *overrides, **keywords)
        return sorted(path.name for path in (run.folder / "best").iterdir())

    return train


def test_without_a_score_to_select_by_the_last_theta_is_kept(run, capsys):
    """Validations are made and written all the same."""
    run.train("eval.every=2", "eval.select_by=null")
    final = json.loads((run.folder / "final/summary.json").read_text())
    assert final["best"] is None and final["step"] == final["trained_steps"] == 6
    assert not (run.folder / "best").exists()
    assert sum("validation_2_steps" in line for line in run.metrics) == 3
    told = capsys.readouterr().out
    assert "validation after step 6: accuracy" in told and "best" not in told


def test_the_best_step_is_kept_and_scored(run, tracked, capsys):
    assert tracked([0.25, 0.75, 0.5]) == ["step-00000004"]
    assert "theta is that of step 4, the best by labels of test tasks" in capsys.readouterr().out
    final = json.loads((run.folder / "final/summary.json").read_text())
    assert final["best"] == {"step": 4, "value": 0.75}
    best = (run.folder / "best/step-00000004/theta.safetensors").read_bytes()
    assert run.theta_bytes == best
    # theta of step 4 is not that of step 6, and the scores are those of step 4
    with run.session("eval.every=2", resume=True) as session:
        last = {name: value.clone() for name, value in session.parts.learner.adapters.theta.items()}
        assert any(not torch.equal(last[name], value) for name, value in run.theta.items())
        session.parts.learner.adapters.load_theta(run.theta)
        found = session.evaluator.evaluate(session.parts.method, session.parts.tasks.test, "test")
    assert json.loads(json.dumps(found.to_json())) == run.scores[0]


def test_a_summary_stays_while_a_checkpoint_names_it(run, tracked):
    """A run that goes back to the checkpoint before must find the best step of that time."""
    assert tracked([0.25, 0.5, 0.75]) == ["step-00000004", "step-00000006"]
    flip(run.folder / "checkpoints/step-00000006/trainer.json")
    with pytest.warns(UserWarning, match="trying the one before"):
        tracked([0.5], resume=True)
    assert run.theta_bytes == (run.folder / "best/step-00000004/theta.safetensors").read_bytes()


def test_a_lost_best_summary_is_not_fatal(run, tracked, capsys):
    tracked([0.25, 0.5, 0.75], "trainer.keep_checkpoints=1")
    shutil.rmtree(run.folder / "best")
    run.train("eval.every=2", resume=True)
    assert "the best step is tracked from here on" in capsys.readouterr().out
