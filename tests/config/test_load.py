"""A file and overrides become a Config, or one error that lists everything wrong."""

import os
import re

import pytest

from abmll.config import Config, ConfigError, load_config, resolve_path, save_config, with_absolute_paths
from abmll.config.yaml_text import read_mapping

GOOD = """\
model: {name: "random:tiny"}
method:
  inner_lr: 1e-5
  inner_steps: 3
tasks:
  folder: data
  train: [a, b]
  test: [c]
"""


@pytest.fixture
def write(tmp_path):
    def write(text, name="run.yaml"):
        path = tmp_path / name
        path.write_text(text)
        return path

    return write


def problems(path, overrides=()):
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    assert isinstance(caught.value, ValueError)
    assert str(caught.value).splitlines() == list(caught.value.problems)
    return caught.value.problems


def test_reads_a_file_and_fills_in_defaults(write):
    config = load_config(write(GOOD))
    assert config.method.inner_lr == 1e-5
    assert config.method.inner_steps == 3
    assert config.tasks.train == ("a", "b")
    assert config.method.outer_lr == 5e-5


def test_overrides_win_in_order_and_reach_nested_keys(write):
    overrides = ["method.beta=1e-6", "tasks.train=[x, y, z]", "tasks.builtin.train_tasks=5", "seed=7", "method.beta=2"]
    config = load_config(write(GOOD), [*overrides, "trainer.checkpoint_every=null", "output=runs/a=b"])
    assert config.method.beta == 2.0
    assert config.tasks.train == ("x", "y", "z")
    assert config.tasks.builtin.train_tasks == 5
    assert config.seed == 7
    assert config.trainer.checkpoint_every is None
    assert config.output == "runs/a=b"


@pytest.mark.parametrize(
    "overrides",
    [
        ["eval.tfb.samples=8", "method.name=reptile"],
        ["eval.active.by=variance", "eval.samples=2", "eval.pretrained=false"],
        ["eval.active={labels: 6}", "eval.active.by=entropy"],
        ["eval.active={labels: 20}", "method.test_steps=10"],
        ["tasks.demonstrations=6"],
        ["eval.temperature=held_out", "eval.support_labels=shuffled"],
        ["eval.temperature=held_out", "method.inner_steps=1", "method.test_steps=2"],
        ["eval.temperature=held_out", "tasks.demonstrations=2"],
        ["eval.temperature=support", "method.test_steps=1", "eval.active={labels: 2}"],
    ],
)
def test_what_the_rules_of_scoring_allow(write, overrides):
    load_config(write(GOOD), overrides)


def test_a_section_as_one_override_is_put_together_with_what_is_there(write):
    """As files are: what it does not name stays."""
    config = load_config(
        write(GOOD), ["tasks.builtin.test_tasks=3", "tasks.builtin={train_tasks: 2}", "method={beta: 1}"]
    )
    assert (config.tasks.builtin.train_tasks, config.tasks.builtin.test_tasks) == (2, 3)
    assert (config.method.beta, config.method.inner_steps) == (1, 3)
    config = load_config(
        write(GOOD), ["eval.active={labels: 2}", "eval.active={by: random}", "eval.active.candidates=5"]
    )
    assert config.eval.active.model_dump() == {"by": "random", "candidates": 5, "labels": 2}


def test_an_empty_section_means_its_defaults(write):
    assert load_config(write(GOOD + "eval:\n  # every: 10\n")).eval == Config.model_fields["eval"].default


@pytest.mark.parametrize(
    ("text", "value"), [("1e-5", 1e-5), ("1E3", 1e3), ("3", 3.0), (".5", 0.5), ("2.5e+1", 25.0), ("+0.1", 0.1)]
)
def test_numbers_as_written(write, text, value):
    assert load_config(write(GOOD), [f"adapters.alpha={text}"]).adapters.alpha == value


@pytest.mark.parametrize(
    ("override", "wrong"),
    [
        ("method.inner_steps=yes", "'yes': must be a whole number"),
        ("method.inner_steps=true", "True: must be a whole number"),
        ("method.inner_steps=010", "'010': must be a whole number"),
        ("method.inner_steps=1:30", "'1:30': must be a whole number"),
        ("method.inner_steps=5.0", "5.0: must be a whole number; write 5"),
        ("method.inner_steps='5'", "'5': must be a whole number; write it without quotes"),
        ("method.inner_steps=0", "0: must be greater than or equal to 1"),
        ("method.inner_lr=true", "True: must be a number"),
        ("method.inner_lr=.inf", "inf: must be a finite number"),
        ("method.adam_betas=[0.9, 1.5]", "1.5: must be less than 1"),
        ("trainer.activation_checkpointing=1", "1: must be one of .auto. or true or false"),
        ("trainer.activation_checkpointing=no", "'no': must be one of .auto. or true or false"),
        ("adapters.modules=q_proj", "'q_proj': must be a list, [a, b]; write [q_proj]"),
        ("adapters.modules=[]", "[]: must hold at least 1"),
        ("model.revision=12", "12: must be text; write it in quotes"),
        ("model.dtype=bfloat", "'bfloat': must be one of .*; did you mean bfloat16"),
        ("seed=x", "'x': must be a whole number; .* default, 0$"),
        ("eval=3", "3: must be a mapping"),
        ("eval.temperature=true", "True: must be one of 'none', 'support' or 'held_out'"),
        ("eval.temperature=false", "False: must be one of 'none', 'support' or 'held_out'"),
    ],
)
def test_wrong_values_are_not_coerced(write, override, wrong):
    (line,) = problems(write(GOOD), [override])
    key = override.partition("=")[0]
    assert re.search(rf"^override: {key}(\[\d\])?: {wrong.replace('[', chr(92) + '[')}", line), line


def test_unknown_keys_say_what_was_meant(write):
    lines = problems(write(GOOD.replace("inner_steps", "inner_step") + "trainer: {beta: 1, batch_size: 2, qqq: 1}\n"))
    assert "run.yaml: method.inner_step: 3: unknown key; did you mean inner_steps?" in lines[0]
    assert "trainer.beta: 1: unknown key; it belongs elsewhere: write method.beta" in lines[1]
    assert "write tasks.batch_size or eval.batch_size" in lines[2]
    assert "trainer.qqq: 1: unknown key; known: epochs, episodes" in lines[3]
    assert len(lines) == 4


def test_misplaced_overrides_say_what_was_meant(write):
    lines = problems(write(GOOD), ["beta=1", "methd.beta=1", "method.beta", "method..beta=1", "method.inner_lr.x=1"])
    assert "no section or key beta; did you mean method.beta?" in lines[0]
    assert "no section or key methd; did you mean method?" in lines[1]
    assert "method.beta: is not section.key=value" in lines[2]
    assert "method..beta=1: is not section.key=value" in lines[3]
    assert "method.inner_lr is 1e-05, which has no keys" in lines[4]
    assert len(lines) == 5


def test_everything_wrong_is_reported_at_once(write):
    text = "seed: -1\nmethod: {inner_lr: fast, bta: 1}\ntasks: {source: hub, train: [a, a]}\n"
    lines = problems(write(text), ["nothing", "eval.every=0"])
    keys = [re.match(r"(\S*run\.yaml|override): ([\w.]+):", line) for line in lines]
    assert [match[2] for match in keys] == [
        "nothing",
        "seed",
        "model.name",
        "method.inner_lr",
        "method.bta",
        "eval.every",
        "tasks.lists",
        "tasks.hub",
        "tasks.train",
    ]
    assert keys[5][1] == "override"


def test_rules_between_keys_do_not_judge_wrong_keys(write):
    lines = problems(write(GOOD.replace("folder: data", "folder: 3")))
    assert [line.partition("run.yaml: ")[2].split(":")[0] for line in lines] == ["tasks.folder"]
    lines = problems(write("model: {name: x}\ntasks: {source: hub, test: [a], train: [b, b], hub: {a: {path: p}}}"))
    assert {line.partition("run.yaml: ")[2].split(":")[0] for line in lines} == {
        "tasks.hub.a.input",
        "tasks.hub.a.label",
        "tasks.hub.a.options",
        "tasks.train",
    }


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        (["tasks.folder=null"], "tasks.folder"),
        (["tasks.test=null"], "tasks.lists"),
        (["tasks.source=hub"], "tasks.hub"),
        (["tasks.source=builtin", "tasks.folder=null", "tasks.test=null"], "tasks.train"),
        (["tasks.validation=[a, a]"], "tasks.validation"),
        (["tasks.source=builtin", "tasks.train=null", "tasks.test=null"], "tasks.folder"),
        (["tasks.source=builtin", "tasks={folder: null, lists: x, train: null, test: null}"], "tasks.lists"),
        (["tasks.hub={t: {path: p, input: '{a}', label: l, options: [x, y]}}"], "tasks.hub"),
        (["adapters.modules=[q_proj, q_proj]"], "adapters.modules"),
        (["model.revision=main"], "model.revision"),
        (["eval.active.by=entropy", "tasks.demonstrations=2"], "eval.active.by"),
        (["eval.support_labels=shuffled", "tasks.demonstrations=2"], "eval.support_labels"),
        (["eval.tfb.samples=8"], "eval.tfb.samples"),
        (["eval.tfb.samples=8", "method.name=blob"], "eval.tfb.samples"),
        (["eval.active={labels: 6, candidates: 5}"], "eval.active.labels"),
        (["eval.active.labels=7"], "eval.active.labels"),
        (["tasks.demonstrations=7"], "tasks.demonstrations"),
        (["tasks.demonstrations=3", "method.test_steps=1"], "tasks.demonstrations"),
        (["eval.active.by=variance", "eval.pretrained=false"], "eval.active.by"),
        (["eval.active.by=variance", "eval.pretrained=false", "eval.samples=1"], "eval.active.by"),
        (["eval.active.by=variance", "eval.samples=2"], "eval.active.by"),
        (["eval.temperature=held_out", "method.test_steps=1"], "eval.temperature"),
        (["eval.temperature=held_out", "method.inner_steps=1"], "eval.temperature"),
        (["eval.temperature=held_out", "eval.active.by=entropy"], "eval.temperature"),
        (["eval.temperature=held_out", "eval.tfb.samples=8", "method.name=lora"], "eval.temperature"),
        (["eval.temperature=held_out", "tasks.demonstrations=2", "tasks.demonstrate=always"], "eval.temperature"),
        (["method.outer_batch=query", "method.name=reptile"], "method.outer_batch"),
        (["method.outer_batch=query", "adapters.posterior=weight"], "method.outer_batch"),
        (["method.outer_batch=query", "method.meta_gradient=reptile"], "method.outer_batch"),
        (["method.outer_optimizer=sgd", "method.meta_gradient=reptile"], "method.outer_optimizer"),
        (["method.outer_optimizer=sgd", "method.name=reptile"], "method.outer_optimizer"),
    ],
)
def test_rules_between_keys(write, overrides, key):
    (line,) = problems(write(GOOD), overrides)
    assert f": {key}: " in line


def test_a_method_of_its_own_outer_batch_does_not_ask_for_the_posterior(write):
    """The rule about the weight posterior is of abmll's gradient."""
    overrides = ["method.outer_batch=query", "adapters.posterior=weight", "method.name=fomaml"]
    assert load_config(write(GOOD), overrides).method.outer_batch == "query"


def test_scoring_needs_no_training_tasks(write):
    path = write("model: {name: x}\ntasks: {folder: data, test: [a]}")
    assert load_config(path, scoring=True).tasks.test == ("a",)
    with pytest.raises(ConfigError, match=r"tasks\.lists: .*set both tasks\.train and tasks\.test"):
        load_config(path)
    with pytest.raises(ConfigError, match=r"tasks\.lists: .*, or set tasks\.test$"):
        load_config(path, ["tasks.test=null", "tasks.train=[b]"], scoring=True)


def test_rules_between_keys_hold_without_the_loader():
    with pytest.raises(ValueError, match=r"tasks\.folder: null: .*; tasks\.lists: null: "):
        Config(model={"name": "random:tiny"})


def test_what_was_read_is_each_readers_own(write):
    """The same text is parsed once."""
    path = write("tasks: {source: builtin, train: [a, b]}")
    first = read_mapping(path)
    first["tasks"]["train"].append("c")
    assert read_mapping(path) == {"tasks": {"source": "builtin", "train": ["a", "b"]}}


def test_keys_written_twice(write):
    lines = problems(write(GOOD + "method:\n  beta: 1\nlogging: {csv: true, csv: false}\n"))
    assert ":9: method: written twice, first in line 2" in lines[0]
    assert ":11: csv: written twice, first in line 11" in lines[1]
    assert len(lines) == 2


def test_text_that_is_not_yaml(write):
    lines = problems(write("model:\n  name: [a\nseed: 0\n"), ["tasks.train=[a", "method.bta=1"])
    assert re.search(r"run\.yaml:3: not valid YAML", lines[0])
    assert lines[1].startswith("override: tasks.train=[a:1: not valid YAML")
    assert lines[2] == "override: method.bta: 1: unknown key; did you mean beta?"
    assert len(lines) == 3
    assert "holds a list; write `key: value` lines" in problems(write("- a\n"))[0]


def test_a_file_that_is_not_there(write, tmp_path):
    write(GOOD, "cls23.yaml")
    assert "in " + str(tmp_path) + " there is cls23.yaml" in problems(tmp_path / "cls32.yaml")[0]
    assert "there is no folder" in problems(tmp_path / "nowhere" / "run.yaml")[0]
    assert "it is a folder; name a file in it: cls23.yaml" in problems(tmp_path)[0]


@pytest.mark.parametrize("name", ["1e5", "null", "true", "no", "0x10", "2024-01-01", "a: b", "1_000", "", "ä #b", "~"])
def test_saved_configuration_reads_back_equal(write, tmp_path, name):
    overrides = [
        "method.beta=1e-12",
        "tasks.source=hub",
        "tasks.hub={t: {path: p, input: '{a}', label: l, options: [x, y]}}",
    ]
    config = load_config(write(GOOD), overrides)
    output = os.path.expanduser(name) or "runs"
    config = config.model_copy(update={"output": output, "model": config.model.model_copy(update={"name": name})})
    save_config(config, tmp_path / "new" / "folder" / "config.yaml")
    assert load_config(tmp_path / "new" / "folder" / "config.yaml") == config


def test_an_output_without_a_name_is_refused(write):
    """It would be the working directory."""
    (found,) = problems(write(GOOD), ["output="])
    assert "output: null: must be text" in found
    (found,) = problems(write(GOOD), ["output=''"])
    assert found == "override: output: '': must not be empty; change it, or remove it for the default, runs/default"


def test_an_output_in_the_home_folder(write, monkeypatch):
    """A shell leaves `output=~/x` as it is."""
    monkeypatch.setenv("HOME", "/home/me")
    assert load_config(write(GOOD), ["output=~/x"]).output == "/home/me/x"


def test_a_local_model_means_the_same_from_any_directory(write, tmp_path, monkeypatch):
    (tmp_path / "models/base1").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    path = write(GOOD)
    for name, kept in (
        ("models/base1", str(tmp_path / "models/base1")),
        ("models/other", "models/other"),
        ("random:tiny", "random:tiny"),
    ):
        config = with_absolute_paths(load_config(path, [f"model.name={name}"]), path)
        assert config.model.name == kept
        assert with_absolute_paths(config, path) == config


def test_paths_are_looked_up_in_three_places(tmp_path, monkeypatch):
    root, elsewhere = tmp_path / "root", tmp_path / "elsewhere"
    (root / "configs" / "deep").mkdir(parents=True)
    elsewhere.mkdir()
    (root / "setup.py").touch()
    monkeypatch.chdir(elsewhere)
    config = root / "configs" / "deep" / "run.yaml"
    assert resolve_path("x.json", config) == elsewhere / "x.json"
    for place in (root, root / "configs" / "deep", elsewhere):  # from the last choice to the first
        (place / "x.json").touch()
        assert resolve_path("x.json", config) == place / "x.json"
    assert resolve_path(root / "x.json", config) == root / "x.json"


def test_a_packed_base_is_not_sharded(write):
    maml = ["method.name=maml", "method.inner_optimizer=sgd", "trainer.activation_checkpointing=false"]
    assert load_config(write(GOOD), maml) and load_config(write(GOOD), maml[:2], scoring=True)
    (found,) = problems(write(GOOD), [*maml, "model.sharding=full"])
    assert "model.sharding: 'full': maml takes derivatives through several forward passes" in found
    (found,) = problems(write(GOOD), ["model.sharding=full", "model.quantization=nf4"])
    assert "model.sharding: 'full': not with packed weights (model.quantization=nf4); set one of the two" in found
