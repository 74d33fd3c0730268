"""Every file in configs/ works, from wherever the command is given."""

import functools
from pathlib import Path

import pytest

from abmll.config import ConfigError, load_config, resolve_path, save_config
from abmll.config.deepspeed import load_deepspeed
from abmll.config.task_lists import resolve_task_lists
from abmll.config.yaml_text import read_mapping
from abmll.tasks.catalogue import load_catalogue

ROOT = Path(__file__).resolve().parents[2]
RUNS = sorted((ROOT / "configs").glob("*.yaml"))
LISTS = sorted((ROOT / "configs" / "tasks").glob("*.yaml"))
PAPER = {"cls23", "cls45", "nli", "para", "mcqa"}
SETS = PAPER | {"winogrande", "legalbench", "chembench"}
QWEN = sorted((ROOT / "configs" / "qwen2-7b").glob("*.yaml"))


def test_the_runs_of_the_paper_and_the_quickstart_are_there():
    assert {path.stem for path in RUNS} == SETS | {"quickstart", "tiny"}
    assert {path.stem for path in QWEN} == SETS
    assert {path.stem for path in LISTS} == SETS


@pytest.mark.parametrize("path", RUNS + QWEN, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_run(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = load_config(path)
    resolve = functools.partial(resolve_path, config_path=path)
    if config.tasks.source != "builtin":
        lists = resolve_task_lists(config.tasks, resolve)
        assert not set(lists.train) & set(lists.test)
    assert load_deepspeed(resolve(config.trainer.deepspeed))["zero_optimization"]["stage"] == 2
    assert config.output == f"runs/{'qwen2-7b-' if path in QWEN else ''}{path.stem}"
    save_config(config, tmp_path / "saved.yaml")
    assert load_config(tmp_path / "saved.yaml") == config


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.stem)
def test_header_gives_the_commands_of_this_file(path):
    text = path.read_text()
    header = text[: text.index("\n", text.rindex("#   "))]
    assert all(line.startswith("#") for line in header.splitlines())
    name = f"--config {path.relative_to(ROOT)}"
    commands = [line for line in header.splitlines() if "launch/" in line and "prepare.py" not in line]
    assert len(commands) >= 4
    assert all(name in command for command in commands)
    for flag in ("--validate", "--num_accelerators 2" if path.stem == "tiny" else "--num_gpus 8", "--resume auto"):
        assert any(flag in command for command in commands), flag
    if path.stem in SETS:
        assert f"python launch/prepare.py --tasks {path.stem} --out {load_config(path).tasks.folder}\n" in header


@pytest.mark.parametrize("path", QWEN, ids=lambda path: path.stem)
def test_qwen_differs_in_its_model_and_output_alone(path):
    llama = load_config(ROOT / "configs" / path.name)
    qwen = load_config(path)
    assert qwen.model.name == "Qwen/Qwen2-7B-Instruct"
    assert qwen.model_copy(update={"model": llama.model, "output": llama.output}) == llama


def resolved(name):
    path = ROOT / "configs" / f"{name}.yaml"
    return resolve_task_lists(load_config(path).tasks, functools.partial(resolve_path, config_path=path))


def test_winogrande_legalbench_and_chembench_train_on_cls45():
    cls45 = resolved("cls45")
    assert resolved("winogrande").train == resolved("legalbench").train == resolved("chembench").train == cls45.train
    assert resolved("winogrande").test == ("wino_grande",)
    assert resolved("legalbench").validation == resolved("chembench").validation == cls45.test
    assert all(name.startswith("legalbench-") for name in resolved("legalbench").test)


@pytest.mark.parametrize("path", [path for path in RUNS + QWEN if path.stem in SETS], ids=lambda path: path.stem)
def test_no_task_outweighs_the_others_by_its_rows(path):
    assert load_config(path).tasks.max_train_examples == 2000  # cls-45: 68K examples of 34 tasks


@pytest.mark.parametrize("path", [path for path in RUNS + QWEN if path.stem in SETS], ids=lambda path: path.stem)
def test_theta_is_chosen_where_no_test_task_has_a_part_in_it(path):
    config = load_config(path)
    lists = resolve_task_lists(config.tasks, functools.partial(resolve_path, config_path=path))
    assert config.eval.every
    assert (config.eval.select_by is None) == bool(set(lists.validation) & set(lists.test))


def test_chembench_serves_evaluation_only():
    """In no list is it trained on or validated on; and its own list holds nothing that could be trained on."""
    kept = {name for name, task in load_catalogue().items() if task.evaluation_only}
    assert kept == set(read_mapping(ROOT / "configs" / "tasks" / "chembench.yaml")["test"])
    for path in LISTS:
        lists = read_mapping(path)
        assert not any(name.startswith("chembench") for key in ("train", "validation") for name in lists.get(key, ()))
    own = ROOT / "configs" / "tasks" / "chembench.yaml"
    config = load_config(ROOT / "configs" / "cls45.yaml", [f"tasks.lists={own}"], scoring=True)
    assert resolve_task_lists(config.tasks, Path, scoring=True).test == resolved("chembench").test
    with pytest.raises(ConfigError, match="train: not set"):
        resolve_task_lists(config.tasks, Path)


@pytest.mark.parametrize("path", LISTS, ids=lambda path: path.stem)
def test_every_listed_task_is_in_the_catalogue(path):
    catalogue = load_catalogue()
    listed = [name for names in read_mapping(path).values() for name in names]
    assert listed and not [name for name in listed if name not in catalogue]


def test_every_entry_of_the_catalogue_is_listed():
    listed = {name for path in LISTS for names in read_mapping(path).values() for name in names}
    assert set(load_catalogue()) == listed


@pytest.mark.parametrize("name", sorted(PAPER))
def test_hyperparameters_of_the_paper(name):
    config = load_config(ROOT / "configs" / f"{name}.yaml")
    method, adapters = config.method, config.adapters
    assert (method.inner_lr, method.outer_lr, method.test_lr, method.beta) == (1e-5, 5e-5, 1e-5, 1e-8)
    assert (method.name, method.inner_steps, config.tasks.batch_size, config.trainer.epochs) == ("abmll", 5, 2, 500)
    assert (adapters.rank, adapters.alpha, adapters.modules) == (8, 16.0, ("q_proj", "v_proj", "o_proj"))
    assert (method.prior_shape, method.prior_rate, adapters.log_variance_offset) == (1.0, 0.01, -20.0)
    assert config.model.name == "meta-llama/Meta-Llama-3-8B-Instruct"
    assert config.trainer.activation_checkpointing == "auto"


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "deepspeed").glob("*.json")), ids=lambda path: path.stem)
def test_engine_file(path):
    settings = load_deepspeed(path)
    zero = settings["zero_optimization"]
    assert path.stem == f"zero{zero['stage']}"
    assert zero["reduce_bucket_size"] == zero["allgather_bucket_size"] == 2e7
    assert zero["overlap_comm"] is False and zero["contiguous_gradients"] is True
    assert settings["gradient_clipping"] == 0.0
