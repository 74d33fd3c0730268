"""A configuration that says only in what it differs from another."""

import pytest

from abmll.config import ConfigError, load_config, save_config

BASE = """\
model: {name: "random:tiny"}
method: {inner_steps: 3, beta: 1e-6}
tasks: {folder: data, train: [a, b], test: [c]}
"""


@pytest.fixture
def write(tmp_path):
    def write(name, text):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
        return tmp_path / name

    return write


def problems(path, overrides=()):
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    return caught.value.problems


def test_own_keys_win_section_by_section_and_overrides_over_both(write):
    write("base.yaml", BASE)
    path = write("run.yaml", "base: base.yaml\nmethod: {beta: 1e-3, inner_lr: 2e-5}\ntasks: {train: [d]}\neval:\n")
    config = load_config(path, ["method.inner_lr=1"])
    assert (config.method.inner_steps, config.method.beta, config.method.inner_lr) == (3, 1e-3, 1.0)
    assert (config.tasks.train, config.tasks.test) == (("d",), ("c",))


def test_chain_of_bases_and_a_base_in_another_folder(write):
    write("base.yaml", BASE)
    write("middle/middle.yaml", "base: ../base.yaml\nmethod: {inner_steps: 4}\nseed: 5\n")
    config = load_config(write("run.yaml", "base: middle/middle.yaml\nseed: 6\n"))
    assert (config.method.inner_steps, config.method.beta, config.seed) == (4, 1e-6, 6)


def test_what_a_base_names_is_found_from_another_folder(write, tmp_path, monkeypatch):
    """The default of trainer.deepspeed too; what the file itself would find comes first."""
    monkeypatch.chdir(write("elsewhere/run.yaml", "base: ../repository/base.yaml\n").parent)
    write("repository/base.yaml", BASE)
    for name in ("setup.py", "configs/x", "configs/deepspeed/zero2.json", "data/x"):
        (tmp_path / "repository" / name).parent.mkdir(parents=True, exist_ok=True)
        write(f"repository/{name}", "")
    config = load_config("run.yaml")
    assert config.trainer.deepspeed == str(tmp_path / "repository/configs/deepspeed/zero2.json")
    assert config.tasks.folder == str(tmp_path / "repository/data")
    write("elsewhere/data", "")
    config = load_config("run.yaml", ["trainer.deepspeed=nowhere.json"])
    assert (config.trainer.deepspeed, config.tasks.folder) == ("nowhere.json", "data")


def test_what_is_saved_is_whole(write, tmp_path):
    write("base.yaml", BASE)
    config = load_config(write("run.yaml", "base: base.yaml\nseed: 9\n"))
    save_config(config, tmp_path / "elsewhere" / "saved.yaml")
    (tmp_path / "base.yaml").unlink()
    assert load_config(tmp_path / "elsewhere" / "saved.yaml") == config


def test_an_error_names_the_file_that_holds_the_key(write):
    base = write("base.yaml", BASE + "trainer: {epochs: none, keep_checkpoints: 0}\n")
    run = write("run.yaml", "base: base.yaml\nmethod: {inner_steps: x}\ntrainer: {keep_checkpoints: -1}\n")
    found = problems(run, ["method.beta=y"])
    assert len(found) == 4
    assert sum(line.startswith(f"{base}: trainer.epochs: 'none'") for line in found) == 1
    assert sum(line.startswith(f"{run}: trainer.keep_checkpoints: -1") for line in found) == 1
    assert sum(line.startswith(f"{run}: method.inner_steps: 'x'") for line in found) == 1
    assert sum(line.startswith("override: method.beta: 'y'") for line in found) == 1


def test_a_rule_between_two_files_names_the_one_with_the_key(write):
    base = write("base.yaml", BASE + "model2: 1\n")
    assert problems(write("run.yaml", "base: base.yaml\n"))[0].startswith(f"{base}: model2")
    base.write_text(BASE)
    run = write("run.yaml", "base: base.yaml\ntasks: {source: builtin}\n")
    assert [line.split(": ")[:2] for line in problems(run)] == [
        [str(base), f"tasks.{key}"] for key in ("folder", "train", "test")
    ]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("base: run.yaml\n", "run.yaml: base: .*run.yaml: a circle"),
        ("base: other.yaml\n", "run.yaml: base: .*other.yaml: no such configuration file; .* there is .*run.yaml"),
        ("base: [a, b]\n", r"run.yaml: base: \['a', 'b'\]: must be text"),
        ("base: broken.yaml\n", "broken.yaml:2: not valid YAML"),
    ],
)
def test_bases_that_cannot_be_read(text, reason, write, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    write("broken.yaml", "a: [\n").touch()
    path = write("run.yaml", text)
    with pytest.raises(ConfigError, match=reason):
        load_config(path)


def test_a_circle_of_two_is_told_with_its_files(write):
    write("a.yaml", "base: b.yaml\n")
    write("b.yaml", "base: a.yaml\n")
    with pytest.raises(ConfigError, match=r"b\.yaml: base: .*a\.yaml: a circle \(.*a\.yaml, .*b\.yaml\)"):
        load_config(write("run.yaml", "base: a.yaml\n"))


def test_base_is_no_key_of_a_command(write):
    with pytest.raises(ConfigError, match="there is no section or key base"):
        load_config(write("run.yaml", BASE), ["base=other.yaml"])
