"""What a comparison's file stands for, and what is refused before anything runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from abmll.compare.grid import grid_of, jobs, tries
from abmll.compare.load import load_comparison, missing_tasks
from abmll.config import ConfigError, load_config, override_texts, resolve_path
from abmll.config.task_lists import resolve_task_lists

CONFIGS = Path(__file__).parents[2] / "configs"
TEXT = f"""
name: some
config: {CONFIGS}/tiny.yaml
output: out
overrides: {{method.inner_lr: 1e-2}}
models: {{small: {{adapters.rank: 3}}}}
methods:
  lora: {{method.name: lora}}
  abmll: {{method.beta: 1e-9}}
settings:
  default:
  beta-1e-6: {{methods: [abmll], method.beta: 1e-6}}
seeds: [4, 5]
scores:
  samples-2: {{methods: [abmll], eval.samples: 2}}
  steps-1: {{method.test_steps: 1}}
baselines: [lora]
"""


@pytest.fixture
def write(tmp_path):
    def write(text=TEXT, **changes):
        path = tmp_path / "comparison.yaml"
        for old, new in changes.values():
            assert old in text
            text = text.replace(old, new)
        path.write_text(text)
        return path

    return write


def test_the_runs_of_a_file(write):
    comparison = load_comparison(write())
    found = jobs(comparison, {}, ("trainer.episodes=2",))
    assert [(job.method, job.setting, job.seed) for job in found] == [
        ("lora", "default", 4),
        ("abmll", "default", 4),
        ("abmll", "beta-1e-6", 4),
        ("lora", "default", 5),
        ("abmll", "default", 5),
        ("abmll", "beta-1e-6", 5),
    ]
    assert len({job.folder for job in found}) == 6
    assert found[2].folder == "small/tasks/abmll/beta-1e-6/seed-4"
    config = load_config(comparison.config, found[2].overrides)
    assert (config.method.beta, config.method.inner_lr, config.adapters.rank) == (1e-6, 1e-2, 3)
    assert (config.seed, config.trainer.episodes) == (4, 2)
    assert load_config(comparison.config, found[1].overrides).method.beta == 1e-9
    assert found[0].scores == {"steps-1": {"method.test_steps": 1}}
    assert set(found[1].scores) == {"samples-2", "steps-1"} and found[1].scores["samples-2"] == {"eval.samples": 2}


def test_choices_stand_behind_the_methods_own_settings_and_before_the_named_ones(write):
    comparison = load_comparison(write())
    chosen = {("small", "tasks", "abmll"): {"method.beta": 1e-3, "method.outer_lr": 0.5}}
    _, plain, beta, *_ = jobs(comparison, chosen, ())
    configs = [load_config(comparison.config, job.overrides).method for job in (plain, beta)]
    assert [(config.beta, config.outer_lr) for config in configs] == [(1e-3, 0.5), (1e-6, 0.5)]


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("methods: [abmll], eval", "methods: [abml], eval", r"scores\.samples-2\.methods: \['abml'\]: no such methods"),
        (
            "baselines: [lora]",
            "baselines: [pretrained]",
            "baselines: pretrained: no such method here; known: abmll, lora",
        ),
        ("method.name: lora", "method.nam: lora", "lora: .*method.nam"),
        ("eval.samples: 2", "eval.sample: 2", "abmll: .*eval.sample"),
        ("seeds: [4, 5]", "seeds: [a]", r"seeds\[0\]: 'a': must be a whole number; change it"),
        ("seeds: [4, 5]", "seeds: [true]", r"seeds\[0\]: True: must be a whole number; change it"),
        ("seeds: [4, 5]", "seeds: 3", r"seeds: 3: must be a list, \[a, b\]; change it, or remove it for the default"),
        (
            "name: ",
            "nam: ",
            r"name: not set: it is required; write it in the file\n.*nam: .*: unknown key; did you mean n",
        ),
        ("seeds: [4, 5]", "seeds: [4, 4]", r"seeds: \[4\]: listed twice"),
        ("steps-1:", "plain:", r"scores\.plain: is the name of a run's own scores"),
        ("seeds: [4, 5]", "sedes: [4]", r"sedes: \[4\]: unknown key; did you mean seeds\?"),
        ("small:", "../small:", r"models: \.\./small: names a folder"),
        ("{method.name: lora}", "{method: {name: lora}}", r"methods: lora: method: .*whole section; write"),
        ("{method.inner_lr: 1e-2}", "{method: {inner_lr: 1e-2}}", r"overrides: .*; write method\.inner_lr: 0\.01"),
        ("{methods: [abmll], eval.samples: 2}", "{eval: {samples: 2}}", r"scores: samples-2: eval: .*whole section"),
        ("methods: [abmll], eval", "methods: 3, eval", r"yaml: scores: samples-2: methods: 3: list one method or more"),
        ("methods: [abmll], eval", "methods: [], eval", r"scores: .*samples-2: methods: \[\]: list one method or more"),
        ("methods: [abmll], method", "methods: , method", r"settings: .*beta-1e-6: methods: null: list one"),
        ("steps-1:", "beta-3:", r"scores\.beta-3: is a point of what the setting beta-1e-6 is one of"),
        ("beta-1e-6:", "steps-1:", r"scores\.steps-1: is a point of what the setting steps-1 is one of"),
        ("method.test_steps: 1", "adapters.rank: 2", r"scores\.steps-1: adapters\.rank: a score is of a trained run"),
        ("test_steps: 1", "test_steps: 1, seed: 9", r"scores\.steps-1: seed: a run may be trained on what"),
        ("method.beta: 1e-6}", "method.beta: 1e-5}", r"settings\.beta-1e-6: abmll has 1e-05 there \(method\.beta\)"),
        ("eval.samples: 2", "eval.max_examples: 2", r"scores\.samples-2: abmll has 0 there \(eval\.samples\)"),
        ("test_steps: 1", "test_steps: 2", r"scores\.steps-1: lora has 2 there \(method\.test_steps or method\.inner"),
        # rows that would be the same numbers again, and read as "this changes nothing"
        ("methods: [abmll], method.beta", "method.beta", r"settings\.beta-1e-6: the same as default for lora, which"),
        ("steps-1: {method.test_steps: 1}", "x: {method.test_kl: false}", r"x: the same as .* own scores for lora, wh"),
        ("beta-1e-6: {methods: [abmll], method.beta: 1e-6}", "x: {method.reptile_step: 1}", r"x: .* default for abmll"),
        ("beta-1e-6: {methods: [abmll], method.beta: 1e-6}", "x: {eval.select_by: nll}", r"x: .* default for abmll"),
    ],
)
def test_mistakes_are_told_with_their_place(old, new, told, write):
    with pytest.raises(ConfigError, match=told):
        load_comparison(write(change=(old, new)))


def test_a_tries_grid_is_all_combinations(write):
    grid = "{abmll: {method.beta: [1, 2], method.outer_lr: [3, 4]}, all: {method.inner_lr+method.test_lr: [5]}}"
    tune, text = f"tune: {{tasks: [t], grid: {grid}}}", TEXT.replace(f"{CONFIGS}/tiny.yaml", f"{CONFIGS}/cls23.yaml")
    tuning = load_comparison(write(f"{text}{tune}")).tune
    tries = [tuple(values.values()) for values in grid_of(tuning, "abmll")]
    assert tries == [(1, 3), (1, 4), (2, 3), (2, 4)]
    assert grid_of(tuning, "lora") == [{"method.inner_lr": 5, "method.test_lr": 5}]


@pytest.mark.parametrize(("task", "role"), [("ag_news", "test"), ("sciq", "train")])
def test_settings_are_chosen_on_neither_training_nor_test_tasks(task, role, write):
    text = TEXT.replace(f"{CONFIGS}/tiny.yaml", f"{CONFIGS}/cls23.yaml")
    with pytest.raises(ConfigError, match=rf"tune\.tasks: {task}: among the {role} tasks"):
        load_comparison(write(f"{text}tune: {{tasks: [glue-sst2, {task}], grid: {{all: {{method.beta: [1]}}}}}}"))
    hidden = text.replace("scores:", "scores:\n  others: {tasks.test: [art]}")  # the run's own test tasks count as well
    with pytest.raises(ConfigError, match=rf"tune\.tasks: {task}: among the {role} tasks"):
        load_comparison(write(f"{hidden}tune: {{tasks: [{task}], grid: {{all: {{method.beta: [1]}}}}}}"))
    with pytest.raises(ConfigError, match=r"tune\.tasks: art: among the test tasks"):
        load_comparison(write(f"{hidden}tune: {{tasks: [art], grid: {{all: {{method.beta: [1]}}}}}}"))
    with pytest.raises(ConfigError, match=r"tune\.tasks: none; name validation tasks"):
        load_comparison(write(f"{text}tune: {{grid: {{all: {{method.beta: [1]}}}}}}"))


def test_tries_leave_out_of_training_what_the_runs_do(write):
    text = TEXT.replace(f"{CONFIGS}/tiny.yaml", f"{CONFIGS}/nli.yaml")
    comparison = load_comparison(write(f"{text}tune: {{tasks: [other], grid: {{all: {{method.beta: [1, 2]}}}}}}"))
    trains = []
    for job in (jobs(comparison, {}, ())[0], next(iter(tries(comparison, ()).values()))[0].runs[0]):
        tasks = load_config(comparison.config, job.overrides).tasks
        trains.append(resolve_task_lists(tasks, lambda path: resolve_path(path, comparison.config)).train)
    assert trains[0] == trains[1] and "sick" not in trains[1]


def test_settings_for_generated_tasks_are_chosen_on_those_of_other_seeds(write):
    def tune(text):
        return write(f"{TEXT}tune: {{{text}, grid: {{all: {{method.beta: [1, 2]}}}}}}")

    with pytest.raises(ConfigError, match=r"tune\.tasks: the builtin source makes its own tasks"):
        load_comparison(tune("tasks: [glue-sst2], seeds: [100]"))
    with pytest.raises(ConfigError, match=r"tune\.seeds: \[4\]: among `seeds`, .* name others"):
        load_comparison(tune("seeds: [100, 4]"))
    comparison = load_comparison(tune("seeds: [100, 101]"))
    of_tries = [job for of_cell in tries(comparison, ()).values() for one in of_cell for job in one.runs]
    assert {job.seed for job in of_tries} == {100, 101} and not {100, 101} & set(comparison.seeds)
    for job in of_tries:
        assert load_config(comparison.config, job.overrides).tasks.source == "builtin" and job.needed == ()


@pytest.mark.parametrize(
    ("tune", "told"),
    [
        ("grid: {all: {method.bta: [1, 2]}}", r"tune: lora: .*method\.bta"),
        ("grid: {all: {method.beta: [1, 2]}}, overrides: {trainer.episode: 3}", r"tune: lora: .*trainer\.episode"),
        ("grid: {lora: {method.beta: [1, 2]}}", r"tune\.grid: nothing to try for abmll; add them, or `all`"),
        ("grid: {all: {method.beta: [1]}, maml: {method.beta: [1]}}", r"tune\.grid: maml: no such method here"),
        ("grid: {all: {method.beta: [1]}, lora: {method.outer_lr: []}}", r"lora: method\.outer_lr: no values to try"),
        ("grid: {all: {method: [{beta: 1}]}}", r"tune\.grid: .*method: .*whole section; write method\.beta: 1"),
        ("grid: {all: {method.bta: [1]}}", r"tune: lora: .*method\.bta"),
        (
            "grid: {all: {method.beta: [1, 2]}, lora: {method.outer_lr: [fast]}}",
            r"tune: lora: .*method\.outer_lr: 'fast'",
        ),
        (
            "grid: {all: {method.beta: [1]}, lora: {method.inner_lr: [1, 2]}}",
            r"tune\.grid\.lora: method\.inner_lr: lora does not read it; take it out",
        ),
        ("grid: {all: {method.beta: [1, 1]}}", r"tune\.grid\.all: method\.beta: 1: listed twice; list each once"),
        ("seeds: [5, 5], grid: {all: {method.beta: [1]}}", r"tune\.seeds: 5: listed twice; list each once"),
        ("grid: {all: {method.beta: [1, 2]}}, overrides: {method.beta: 3}", r"tune\.overrides: method\.beta: is"),
    ],
)
def test_tries_are_checked_too(tune, told, write):
    text = TEXT.replace(f"{CONFIGS}/tiny.yaml", f"{CONFIGS}/cls23.yaml")
    with pytest.raises(ConfigError, match=told):
        load_comparison(write(f"{text}tune: {{tasks: [glue-sst2], {tune}}}"))


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("{method.inner_lr: 1e-2}", "{seed: 1}", "overrides: seed: each run has its own; set the comparison's `seeds`"),
        ("method.beta: 1e-6}", "output: x}", r"settings\.beta-1e-6: output: each run has its own; .*`output`"),
        ("seeds: [0]", "seeds: [0], overrides: {seed: 3}", r"tune\.overrides: seed: each run"),
        ("method.beta: [1]", "method.beta+seed: [1, 2]", r"tune\.grid\.all: seed: each run"),
    ],
)
def test_a_runs_seed_and_folder_are_the_comparisons(old, new, told, write):
    text = TEXT.replace(f"{CONFIGS}/tiny.yaml", f"{CONFIGS}/cls23.yaml")
    text += "tune: {tasks: [glue-sst2], seeds: [0], grid: {all: {method.beta: [1]}}}\n"
    with pytest.raises(ConfigError, match=told):
        load_comparison(write(text, change=(old, new)))
    with pytest.raises(ConfigError, match="override: seed: each run has its own"):
        load_comparison(write(text), ("seed=3",))


@pytest.mark.parametrize("key", ["method.name", "method.beta"])
def test_overrides_for_all_do_not_undo_what_runs_differ_in(key, write):
    with pytest.raises(ConfigError, match=rf"override: {key}: is what methods differ in \(\w+\); change it there"):
        load_comparison(write(), (f"{key}=lora",))
    load_comparison(write(), ("adapters.rank=2", "method.inner_lr=1e-3"))  # of the only model, and of all


def test_the_command_lines_overrides_stand_behind_those_of_the_tries_but_not_before_their_tasks(write):
    text = TEXT.replace(f"{CONFIGS}/tiny.yaml", f"{CONFIGS}/cls23.yaml")
    text += "tune: {tasks: [glue-sst2], grid: {all: {method.beta: [1, 2]}}, overrides: {trainer.episodes: 9}}\n"
    extra = ("trainer.episodes=2", "tasks.test=[ag_news]")
    comparison = load_comparison(write(text), extra)
    for of_cell in tries(comparison, extra).values():
        for one in of_cell:
            (job,) = one.runs
            config = load_config(comparison.config, job.overrides)
            assert (config.trainer.episodes, config.tasks.test) == (2, ("glue-sst2",))
            assert config.method.beta == one.values["method.beta"]
    with pytest.raises(ConfigError, match=r"override: method\.beta: is to be chosen by tune\.grid for abmll"):
        load_comparison(write(text), ("method.beta=3",))


@pytest.mark.parametrize(("change", "shared"), [("eval.every: null", True), ("eval.every: 3", False)])
def test_tries_that_differ_in_the_adaptation_alone_share_a_training(change, shared, write):
    """... unless validations, which adapt, choose the theta that is kept."""
    text = TEXT.replace(f"{CONFIGS}/tiny.yaml", f"{CONFIGS}/cls23.yaml")
    grid = "{method.outer_lr: [1e-4, 1e-3], method.test_lr: [1e-5, 1e-4], method.test_steps: [3, 4]}"
    over = "{" + change + ", eval.select_by: accuracy}"
    text += f"tune: {{tasks: [glue-sst2], seeds: [0, 1], grid: {{all: {grid}}}, overrides: {over}}}\n"
    comparison = load_comparison(write(text))
    of_cell = next(iter(tries(comparison, ()).values()))
    assert len(of_cell) == 8 and [one.values["method.outer_lr"] for one in of_cell] == [1e-4] * 4 + [1e-3] * 4
    folders = {job.folder for one in of_cell for job in one.runs}
    assert len(folders) == 2 * (2 if shared else 8)
    for number, one in enumerate(of_cell):
        for job in one.runs:
            over = () if one.score == "plain" else override_texts(job.scores[one.score])
            config = load_config(comparison.config, [*job.overrides, *over])
            assert {key: getattr(config.method, key.partition(".")[2]) for key in one.values} == one.values
        assert one.score == ("plain" if number in (0, 4) or not shared else f"try-{number}")


def test_a_score_that_would_change_nothing_is_refused_before_the_runs(write):
    with pytest.raises(ConfigError, match=r"scores\.steps-1: override: method\.inner_lr: only training reads it"):
        load_comparison(write(change=("{method.test_steps: 1}", "{method.inner_lr: 1.0}")))


def test_what_is_chosen_by_must_be_there(write, tmp_path):
    """A run may warn of missing tasks; a setting chosen by fewer tasks than were named is another choice."""
    text = TEXT.replace(f"{CONFIGS}/tiny.yaml", f"{CONFIGS}/cls23.yaml")
    text += "tune: {tasks: [glue-sst2, glue-qnli], grid: {all: {method.beta: [1, 2]}}}\n"
    (tmp_path / "data/glue-sst2").mkdir(parents=True)
    comparison = load_comparison(write(text), ("tasks.missing=warn",))
    extra = ("tasks.missing=warn", f"tasks.folder={tmp_path}/data")
    ((_, of_cell), *_) = tries(comparison, extra).items()
    (job,) = of_cell[0].runs
    config = load_config(comparison.config, job.overrides)
    assert "glue-qnli; prepare them, or take them out" in missing_tasks(config, comparison.config, job.needed)
    assert missing_tasks(config, comparison.config) is None


def test_all_tasks_must_be_there_unless_told_otherwise(write, tmp_path):
    def missing(path, *extra):
        comparison = load_comparison(path, extra)
        return {load_config(comparison.config, job.overrides).tasks.missing for job in jobs(comparison, {}, extra)}

    assert missing(write()) == {"error"}
    assert missing(write(), "tasks.missing=warn") == {"warn"}
    assert missing(write(change=("{method.inner_lr: 1e-2}", "{tasks.missing: warn}"))) == {"warn"}
    (tmp_path / "warns.yaml").write_text(f"base: {CONFIGS}/tiny.yaml\ntasks: {{missing: warn}}\n")
    assert missing(write(change=(f"{CONFIGS}/tiny.yaml", f"{tmp_path}/warns.yaml"))) == {"warn"}


def test_a_file_may_be_based_on_another(write, tmp_path):
    write()
    (tmp_path / "empty.yaml").write_text("base: comparison.yaml\noverrides:\n")
    (tmp_path / "on_it.yaml").write_text("base: empty.yaml\noverrides: {trainer.episodes: 9}\n")
    with pytest.raises(ConfigError, match=r"empty\.yaml: overrides: "):
        load_comparison(tmp_path / "empty.yaml")
    assert load_comparison(tmp_path / "on_it.yaml").overrides == {"tasks.missing": "error", "trainer.episodes": 9}
    (tmp_path / "more").mkdir()
    above = tmp_path / "more/above.yaml"
    above.write_text(
        "base: ../comparison.yaml\nname: other\noverrides: {trainer.episodes: 9}\nmethods: {abmll: {}}\n"
        "settings: {default: }\nscores: {}\nbaselines: []\n"
    )
    found = load_comparison(above)
    assert (found.name, found.seeds, list(found.methods)) == ("other", [4, 5], ["abmll"])
    assert found.overrides == {"tasks.missing": "error", "method.inner_lr": 1e-2, "trainer.episodes": 9}
    assert found.config == str(CONFIGS / "tiny.yaml")


@pytest.mark.parametrize("path", sorted((CONFIGS / "compare").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_comparison_is_right(path):
    found = load_comparison(path)
    assert found.name == path.stem
    assert jobs(found, {}, ())
