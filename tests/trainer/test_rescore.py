"""Scoring a finished run again gives the scores that the run itself wrote."""

import json
import math
import shutil
import sys

import pytest
import torch
from runs import TRAIN, call

from abmll.config import ConfigError, Refused, config_from
from abmll.config.schema import AdapterConfig, MethodConfig, ModelConfig
from abmll.deploy.meta_model import MetaModel
from abmll.evaluation.predictor import Predictor
from abmll.models.load import load_model
from abmll.rescore import evaluate
from abmll.score_files import load_scores
from abmll.summary import load_summary, save_summary
from abmll.trained_with import refuse_other_base, trained_with


def test_the_same_settings_give_the_same_scores(finished, tmp_path, capsys):
    evaluate(str(finished.folder), [], str(tmp_path / "again.json"))
    assert json.loads((tmp_path / "again.json").read_text()) == finished.scores
    printed = capsys.readouterr().out
    facts = json.loads((finished.folder / "final/summary.json").read_text())
    assert f"after step {facts['step']}" in printed
    assert (finished.folder / "scores.md").read_text() in printed


@pytest.mark.parametrize(
    ("output", "problem"),
    [
        ("nodir/s.json", "nodir is no folder; make it, or name"),
        (".", "is a folder; name a file in it"),
        ("/proc/s", "no"),
    ],
)
def test_an_output_that_cannot_be_written_costs_no_scores(finished, tmp_path, output, problem, monkeypatch):
    monkeypatch.setattr("abmll.rescore.FinishedRun", lambda *_: pytest.fail("it was loaded"))
    with pytest.raises(Refused, match=rf"--output: {tmp_path / output}: .*{problem}"):
        evaluate(str(finished.folder), [], str(tmp_path / output))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["final/theta.safetensors", "config.yaml", "scores.json"])
def test_no_file_of_the_run_is_lost_to_an_output(finished, name, monkeypatch):
    monkeypatch.setattr("abmll.rescore.FinishedRun", lambda *_: pytest.fail("it was loaded"))
    before = (finished.folder / name).read_bytes()
    with pytest.raises(Refused, match=rf"--output: .*{name}: is .*this command reads; name another file"):
        evaluate(str(finished.folder), [], str(finished.folder / name))
    assert (finished.folder / name).read_bytes() == before


def test_scores_are_written_though_nobody_reads_the_table(finished, tmp_path, monkeypatch):
    def closed(*_: object) -> None:
        raise BrokenPipeError

    monkeypatch.setattr("abmll.rescore.print", closed, raising=False)
    with pytest.raises(BrokenPipeError):
        evaluate(str(finished.folder), ["eval.max_examples=1"], str(tmp_path / "s.json"))
    assert json.loads((tmp_path / "s.json").read_text())


def test_theta_serves_another_dtype_and_a_slow_one_is_told(finished, monkeypatch, capsys):
    monkeypatch.setattr("abmll.config.native._cpu_multiplies_bfloat16", lambda: False)
    for dtype in ("float32", "bfloat16"):
        evaluate(str(finished.folder), [f"model.dtype={dtype}", "eval.max_examples=1"], None)
        told = "note: model.dtype: bfloat16: this CPU has no instructions" in capsys.readouterr().out
        assert told == (dtype == "bfloat16" and not torch.cuda.is_available())


def test_scores_on_tasks_of_the_training_are_told(finished, tmp_path, capsys):
    """The shipped lists share tasks: scored by another list, a run may meet what it was trained on."""
    facts = json.loads((finished.folder / "final/summary.json").read_text())
    episodes = map(json.loads, (finished.folder / "episodes.jsonl").read_text().splitlines())
    assert {line["task"] for line in episodes} <= set(facts["trained_on"]) and len(facts["trained_on"]) == 3
    evaluate(str(finished.folder), ["eval.max_examples=1"], None)
    assert "trained on them" not in capsys.readouterr().out
    seen = next(iter(finished.scores[-1]["tasks"]["0"]))
    shutil.copytree(finished.folder, tmp_path / "run")
    theta, facts = load_summary(finished.folder / "final")
    save_summary(tmp_path / "run/final", theta, {**facts, "trained_on": [seen, "another"]})
    evaluate(str(tmp_path / "run"), ["eval.max_examples=1"], None)
    assert f"note: {seen}: this run was trained on them; their scores are not" in capsys.readouterr().out


def test_overrides_that_nothing_would_read_are_refused(finished, tmp_path):
    for key, remedy in (
        ("output=x", "with --output"),
        ("method.inner_lr=1", "set method.test_lr"),
        ("trainer.episodes=9", "remove"),
        ("trainer.deepspeed=x.json", "remove"),
        ("logging.every=3", "remove"),
        ("tasks.train=[a]", "remove"),
        ("method.prior_shape=3", "remove"),
        ("eval.select_by=nll", "remove"),
    ):
        with pytest.raises(
            ConfigError, match=rf"override: {key.partition('=')[0]}: only training reads it; .*{remedy}"
        ):
            evaluate(str(finished.folder), [key], None)
        with pytest.raises(ConfigError, match="only training reads it"):
            MetaModel.load(finished.folder, [key])
    (tmp_path / "settings.yaml").write_text("rate: {method.inner_lr: 1.0}\n")
    with pytest.raises(ConfigError, match=r"rate: override: method\.inner_lr: only training reads it"):
        evaluate(str(finished.folder), [], None, str(tmp_path / "settings.yaml"))


def test_what_theta_was_trained_with_is_not_changed(finished):
    """A theta of the same shape would load, and mean something else."""
    for override, trained in (("adapters.log_variance_alpha=1.6", "null"), ("adapters.alpha=4", "16.0")):
        key = override.partition("=")[0]
        with pytest.raises(ConfigError, match=rf"{key}: theta was trained with {trained}; leave it as it was"):
            evaluate(str(finished.folder), [override], None)
    evaluate(str(finished.folder), ["adapters.backend=torch", "eval.max_examples=1"], None)


def test_theta_serves_no_other_base(finished, tmp_path):
    """One of the same shapes: theta would fit."""
    model, tokenizer = load_model(ModelConfig(name="random:tiny", dtype="float32"), "cpu")
    for name in ("same", "other"):
        tokenizer.save_pretrained(tmp_path / name)
        model.save_pretrained(tmp_path / name)
        with torch.no_grad():
            model.get_input_embeddings().weight.mul_(1.5)
    refusal = r"model\.name: .*other': theta was trained on random:tiny with fingerprint .*model\.name=NAME"
    same, other = ([f"model.name={tmp_path / name}"] for name in ("same", "other"))
    for load in (lambda to: evaluate(str(finished.folder), to, None), lambda to: MetaModel.load(finished.folder, to)):
        load(same)
        with pytest.raises(Refused, match=refusal):
            load(other)
    facts = json.loads((finished.folder / "final/summary.json").read_text())
    packed = config_from(facts["config"], "here", ["model.quantization=nf4"], scoring=True)
    here = config_from(facts["config"], "here", scoring=True)
    refuse_other_base(packed, "0" * 64, facts)
    refuse_other_base(here, "0" * 64, {**facts, "fingerprint": None})
    del facts["fingerprint"]
    refuse_other_base(here, "0" * 64, facts)


def test_a_key_that_a_runs_version_did_not_have_was_at_its_default():
    adapters, method = AdapterConfig(rank=3).model_dump(mode="json"), MethodConfig().model_dump(mode="json")
    whole = trained_with({"adapters": adapters, "method": method})
    del adapters["log_variance_alpha"]
    assert trained_with({"adapters": adapters, "method": method}) == whole
    assert whole["adapters.rank"] == 3 and whole["adapters.log_variance_alpha"] is None


def test_other_settings_are_honoured(finished, tmp_path):
    evaluate(str(finished.folder), ["eval.samples=2", "eval.max_examples=1"], str(tmp_path / "other.json"))
    (again,) = json.loads((tmp_path / "other.json").read_text())
    assert {task["n"] for task in again["tasks"]["0"].values()} == {1}
    assert again["tasks"] != finished.scores[-1]["tasks"]


def test_named_settings_are_scored_into_the_runs_folder_once(finished, tmp_path, capsys):
    settings = tmp_path / "settings.yaml"
    settings.write_text("plain:\nfew: {eval.max_examples: 1, method.test_steps: 1}\n")
    evaluate(str(finished.folder), [], None, str(settings))
    plain, few = (load_scores(finished.folder / "scores" / name) for name in ("plain", "few"))
    assert [found.to_json() for found in plain] == [json_keys(item) for item in finished.scores]
    assert few[0].steps == [0, 1] and {task["n"] for task in few[0].tasks[1].values()} == {1}
    assert "few" in capsys.readouterr().out
    before = (finished.folder / "scores/few/scores.json").stat().st_mtime_ns
    evaluate(str(finished.folder), [], None, str(settings))
    assert (finished.folder / "scores/few/scores.json").stat().st_mtime_ns == before
    assert capsys.readouterr().out.endswith("plain: is there already\nfew: is there already\n")
    settings.write_text("good: {eval.max_examples: 1}\nother: {adapters.rank: 3}\nslip: {eval.sampels: 3}\n")
    with pytest.raises(ConfigError) as caught:
        evaluate(str(finished.folder), [], None, str(settings))
    other, slip = caught.value.problems
    assert "other: override: adapters.rank: what was loaded depends on it" in other
    assert slip.startswith("slip: override: eval.sampels: 3: unknown key; did you mean samples?")
    assert not (finished.folder / "scores/good").exists()
    settings.write_text("few: {eval.max_examples: 2}\n")
    with pytest.raises(Refused, match=r"scores/few: holds scores under \{'eval.max_examples': 1, .*remove it"):
        evaluate(str(finished.folder), [], None, str(settings))
    settings.write_text("../out: {eval.samples: 1}\nx: 3\n")
    with pytest.raises(ConfigError, match=r"\.\./out: names a folder; (?s:.)*x: 3: must be"):
        evaluate(str(finished.folder), [], None, str(settings))


def test_scores_of_another_theta_or_with_other_overrides_are_not_taken_for_these(make_run, tmp_path, capsys):
    run, settings = make_run("other").train("trainer.episodes=2"), tmp_path / "settings.yaml"
    settings.write_text("few: {eval.max_examples: 1}\n")
    few = run.folder / "scores/few"

    def scored(*overrides: str) -> tuple[bool, dict]:
        """Whether they were there already, and what they are."""
        capsys.readouterr()
        evaluate(str(run.folder), list(overrides), None, str(settings))
        there = capsys.readouterr().out.endswith("few: is there already\n")
        return there, json.loads((few / "scores.json").read_text())

    there, first = scored()
    assert not there
    with pytest.raises(Refused, match=r"scores/few: holds scores with the overrides none and not seed=7; remove it"):
        scored("seed=7")
    run.train("trainer.episodes=4", resume=True)
    there, second = scored()
    assert not there and second != first
    run.train("trainer.episodes=4", "eval.support_labels=shuffled", resume=True)  # the same theta, scored otherwise
    there, third = scored()
    assert not there and third != second
    (few / "made_with.json").unlink()  # scores of an older version
    assert scored() == (True, third)
    settings.write_text("")
    with pytest.raises(ConfigError, match=r"--settings: .*settings\.yaml: names no settings; write"):
        evaluate(str(run.folder), [], None, str(settings))


def test_scores_of_other_rows_are_not_taken_for_these(make_run, other_tasks, tmp_path, capsys):
    of_tasks = (*other_tasks[:2], "tasks.train=[blue]", "tasks.test=[red]", "eval.every=null")
    run, settings = make_run("other").train(*of_tasks, "trainer.episodes=1"), tmp_path / "settings.yaml"
    settings.write_text("all: {eval.max_examples: 50}\n")
    for there in (False, True):
        evaluate(str(run.folder), [], None, str(settings))
        assert capsys.readouterr().out.endswith("all: is there already\n") == there
    test = tmp_path / "tasks/red/test.jsonl"
    test.write_text("".join(test.read_text().splitlines(keepends=True)[1:]))
    evaluate(str(run.folder), [], None, str(settings))
    assert not capsys.readouterr().out.endswith("all: is there already\n")


def test_generated_tasks_of_another_seed_are_not_said_to_be_unseen(finished, capsys):
    told = "note: seed: 99: with its own, "
    for overrides in ([], ["seed=99"]):
        evaluate(str(finished.folder), [*overrides, "eval.max_examples=1"], None)
        assert (told in capsys.readouterr().out) == bool(overrides)


def test_a_file_of_scores_does_not_go_with_settings(finished):
    command = [sys.executable, str(TRAIN.with_name("evaluate.py")), "--run", str(finished.folder)]
    found = call([*command, "--settings", "s.yaml", "--output", "o.json"])
    assert found.returncode == 2
    assert "--output: does not go with --settings, whose scores go to RUN/scores/NAME" in found.stderr


def test_every_scoring_option_is_a_setting(finished, tmp_path):
    settings = tmp_path / "settings.yaml"
    settings.write_text(
        "warm: {eval.temperature: held_out}\npruned: {eval.prune.fraction: 0.3}\n"
        "shuffled: {eval.support_labels: shuffled}\nchosen: {eval.active.by: entropy, eval.active.labels: 2}\n"
    )
    evaluate(str(finished.folder), [], None, str(settings))
    for name in ("warm", "pruned", "shuffled", "chosen"):
        *_, found = load_scores(finished.folder / "scores" / name)
        own = json_keys(finished.scores[-1])
        assert found.tasks[found.steps[-1]] != own["tasks"][found.steps[-1]]
        assert ("temperature" in next(iter(found.tasks[0].values()))) == (name == "warm")
    settings.write_text("drawn: {eval.tfb.samples: 4}\n")
    with pytest.raises(ConfigError, match=r"eval\.tfb\.samples: 4: draws weights around a point estimate"):
        evaluate(str(finished.folder), [], None, str(settings))


def test_settings_that_adapt_alike_adapt_once(finished, tmp_path, monkeypatch, capsys):
    """... and give the scores that each of them has by itself."""
    settings = {
        "pruned": "eval.prune.fraction=0.3",
        "sampled": "eval.samples=2",
        "shuffled": "eval.support_labels=shuffled",
        "pruned-more": "eval.prune.fraction=0.5",
        "longer": "method.test_steps=3",
    }
    run = tmp_path / "run"
    shutil.copytree(finished.folder, run, ignore=shutil.ignore_patterns("scores"))
    named = tmp_path / "settings.yaml"
    named.write_text("".join(f"{name}: {{{text.replace('=', ': ')}}}\n" for name, text in settings.items()))
    adapt, adapted = Predictor.adapt, []

    def counted(predictor, method, tasks, examples):
        adapted.append((predictor.config.support_labels, method.config.adaptation_steps, *tasks))
        return adapt(predictor, method, tasks, examples)

    monkeypatch.setattr(Predictor, "adapt", counted)
    evaluate(str(run), [], None, str(named))
    ways = [one[:2] for one in adapted]
    own = finished.scores[-1]["tasks"]["0"]
    expected = {("given", 2): 2 * len(own), ("shuffled", 2): len(own), ("given", 3): len(own)}
    assert {way: ways.count(way) for way in expected} == expected
    for name, text in settings.items():
        evaluate(str(run), [text], str(tmp_path / "alone.json"))
        assert json.loads((tmp_path / "alone.json").read_text()) == json.loads(
            (run / "scores" / name / "scores.json").read_text()
        )


def test_the_pretrained_models_tasks_are_adapted_from_its_own_theta(finished, tmp_path):
    settings = tmp_path / "settings.yaml"
    settings.write_text("one: {eval.prune.fraction: 0.2}\ntwo: {eval.prune.fraction: 0.4}\n")
    run = tmp_path / "run"
    shutil.copytree(finished.folder, run, ignore=shutil.ignore_patterns("scores"))
    evaluate(str(run), ["eval.pretrained=true"], None, str(settings))
    evaluate(str(run), ["eval.pretrained=true", "eval.prune.fraction=0.4"], str(tmp_path / "alone.json"))
    both = json.loads((run / "scores/two/scores.json").read_text())
    assert both == json.loads((tmp_path / "alone.json").read_text()) and both[0]["tasks"] != both[1]["tasks"]


def test_samples_of_a_point_estimate_are_told_to_be_none(make_run, capsys):
    run = make_run("point").train("method.name=reptile", "trainer.episodes=1")
    evaluate(str(run.folder), ["eval.samples=3", "eval.max_examples=1"], None)
    assert "note: eval.samples: 3: reptile has no posterior: its scores are the mean's" in capsys.readouterr().out


def test_a_point_estimate_is_scored_with_drawn_weights(make_run):
    run = make_run("lora").train("method.name=lora", "trainer.episodes=2")
    settings = run.folder.with_suffix(".settings")
    settings.write_text("drawn: {eval.tfb.samples: 3, eval.tfb.evaluations: 4}\n")
    evaluate(str(run.folder), ["eval.pretrained=true"], None, str(settings))
    pretrained, lora = load_scores(run.folder / "scores/drawn")
    assert {scores["tfb_sigma"] for scores in pretrained.tasks[0].values()} == {0.0}
    for steps, tasks in lora.tasks.items():
        for task, scores in tasks.items():
            spread = lora.predictions[steps][task].variance
            assert scores["tfb_sigma"] > 0 and (spread > 0).all()


def json_keys(item):
    """Steps as numbers, which JSON has as text."""
    return {
        k: {int(s): v for s, v in value.items()} if k in ("tasks", "overall") else value for k, value in item.items()
    }


@pytest.fixture
def other_tasks(tmp_path):
    """A folder of two tasks that no run has seen, one of them with a single training row; nothing else."""
    for task, rows in (("red", 8), ("blue", 1)):
        for split, count in (("train", rows), ("test", 4)):
            path = tmp_path / "tasks" / task / f"{split}.jsonl"
            path.parent.mkdir(parents=True, exist_ok=True)
            row = {"task": task, "output": "yes", "options": ["yes", "no"]}
            path.write_text("".join(json.dumps({**row, "input": f"{task} {n}?"}) + "\n" for n in range(count)))
    return ["tasks.source=jsonl", f"tasks.folder={tmp_path / 'tasks'}", "tasks.test=[red, blue]"]


def test_other_tasks_need_no_training_tasks(finished, other_tasks, tmp_path, capsys):
    """The run validates (eval.every), and its training tasks are not in the folder."""
    evaluate(str(finished.folder), other_tasks, str(tmp_path / "other.json"))
    (found,) = json.loads((tmp_path / "other.json").read_text())
    assert {name: task["n"] for name, task in found["tasks"]["2"].items()} == {"red": 4, "blue": 4}
    assert all(math.isfinite(task["nll"]) for task in found["tasks"]["2"].values())
    evaluate(str(finished.folder), [*other_tasks[:2], "tasks.test=[red, gone]"], None)
    assert "note: missing task gone: " in capsys.readouterr().out


def test_a_run_on_files_is_scored_again_without_them(run, other_tasks, tmp_path):
    """Its own list file and training tasks are gone; the scores on a task that it scored itself are the same."""
    lists = tmp_path / "lists.yaml"
    lists.write_text("train: [blue]\ntest: [red]\n")
    run.train(*other_tasks[:2], f"tasks.lists={lists}", "trainer.episodes=1", "eval.every=1")
    lists.unlink()
    shutil.rmtree(tmp_path / "tasks/blue")
    evaluate(str(run.folder), ["tasks.test=[red]"], str(tmp_path / "again.json"))
    assert json.loads((tmp_path / "again.json").read_text()) == run.scores
    with pytest.raises(Refused, match=r"tasks\.lists: .*lists\.yaml: no such file"):
        evaluate(str(run.folder), [], None)


def test_a_folder_without_a_finished_run_is_refused(finished, tmp_path):
    for folder, problem in (
        (tmp_path / "none", "no such folder; name a run's output folder"),
        (tmp_path, "holds no run; name a run's output folder"),
        (finished.folder / "final", "holds no config.yaml; name the output folder of a run"),
    ):
        with pytest.raises(Refused, match=f"^--run: {folder}: {problem}"):
            evaluate(str(folder), [], None)
    (tmp_path / "config.yaml").write_text((finished.folder / "config.yaml").read_text())
    with pytest.raises(Refused, match=r"its run has not ended: .* --resume auto"):
        evaluate(str(tmp_path), [], None)
    with pytest.raises(ConfigError, match=r"adapters\.rank: theta was trained with 2; leave it as it was"):
        evaluate(str(finished.folder), ["adapters.rank=3"], None)
