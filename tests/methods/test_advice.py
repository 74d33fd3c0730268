from __future__ import annotations

import pytest

from abmll.config.load import load_config
from abmll.methods import METHODS
from abmll.methods.advice import unlike_published, unread_settings

EVEN = {"a": 1000, "b": 1000, "c": 1000, "d": 1000}


def configured(tmp_path, name, *overrides, **method):
    path = tmp_path / "run.yaml"
    path.write_text("{model: {name: random:tiny}, tasks: {source: builtin, batch_size: 2}}")
    named = [f"method.{key}={value}" for key, value in method.items()]
    return load_config(path, [f"method.name={name}", "trainer.activation_checkpointing=false", *named, *overrides])


def advice(tmp_path, name, sizes=EVEN, tasks_per_step=1, **method):
    return unlike_published(configured(tmp_path, name, **method), sizes, tasks_per_step)


@pytest.mark.parametrize("name", [name for name in METHODS if name not in ("blob", "fomaml", "maml")])
def test_defaults_of_the_other_methods_are_as_published(name, tmp_path):
    assert advice(tmp_path, name) == []


def test_blobs_kl_has_the_weight_of_its_bound(tmp_path):
    """2 examples a step of 4,000: 5e-4 of a sum, and half of that of a mean."""
    (line,) = advice(tmp_path, "blob")
    assert line.startswith("method.beta: 1e-08: ") and line.endswith("set method.beta=0.0005")
    assert advice(tmp_path, "blob", beta=5e-4) == []
    (line,) = advice(tmp_path, "blob", beta=1e-8, nll_reduction="mean")
    assert line.endswith("set method.beta=0.00025")


def test_mamls_outer_batch_and_learning_rate(tmp_path):
    (line,) = advice(tmp_path, "fomaml")
    assert line.startswith("method.outer_batch: reuse: ") and advice(tmp_path, "fomaml", outer_batch="query") == []
    settings = {"inner_optimizer": "sgd", "outer_batch": "query", "inner_lr": 0.01}
    (line,) = advice(tmp_path, "maml", **settings)
    assert line.startswith("method.test_lr: 1e-05: ") and line.endswith("set method.test_lr=0.01")
    assert advice(tmp_path, "maml", **settings, test_lr=0.01) == []


def test_structured_lora_of_several_tasks_a_step(tmp_path):
    (line,) = advice(tmp_path, "structured_lora", tasks_per_step=8)
    assert line.startswith("trainer.tasks_per_step: 8: ") and "structured LoRA" in line


@pytest.mark.parametrize(
    ("name", "rate", "settings"),
    [
        ("abmll", "method.outer_lr", {}),
        ("abmll", "method.reptile_step", {"meta_gradient": "reptile"}),
        ("reptile", "method.reptile_step", {}),
        ("lora", "method.outer_lr", {}),
        ("blob", "method.outer_lr", {"beta": 5e-4}),
    ],
)
def test_fewer_outer_steps_at_the_same_rate_are_told(name, rate, settings, tmp_path):
    """Eight GPUs by themselves make an eighth of the steps."""
    (line,) = advice(tmp_path, name, tasks_per_step=8, **settings)
    assert line.startswith("trainer.tasks_per_step: 8: ") and f"raise {rate} or trainer.epochs" in line


def test_a_task_that_fills_the_pool_is_told(tmp_path):
    """97 of 100 examples are one of four tasks': 3.88 times the average's."""
    sizes = {"rare": 1, "large": 97, "few": 1, "small": 1}
    (line,) = advice(tmp_path, "lora", sizes)
    assert line == (
        "tasks.max_train_examples: null: pooled batches draw tasks by their size, large 3.9 times as often as the "
        "average task, where episodes draw all alike; set tasks.max_train_examples=1, the median"
    )
    assert advice(tmp_path, "reptile", sizes) == []


@pytest.mark.parametrize("name", METHODS)
def test_defaults_are_nothing_to_tell_of(name, tmp_path):
    sgd = {"inner_optimizer": "sgd"} if name == "maml" else {}
    assert unread_settings(configured(tmp_path, name, **sgd)) == []


def test_what_a_method_does_not_read_is_told(tmp_path):
    (line,) = unread_settings(configured(tmp_path, "lora", "adapters.log_variance_offset=-9", beta=0.1, outer_lr=1e-3))
    assert line == ("adapters.log_variance_offset: -9.0, method.beta: 0.1: lora does not read them; take them out")
    (line,) = unread_settings(configured(tmp_path, "reptile", outer_lr=1e-3))
    assert line == (
        "method.outer_lr: 0.001: reptile does not read it; take it out; how far theta goes in a step is "
        "method.reptile_step"
    )
    assert unread_settings(configured(tmp_path, "abmll", beta=0.1, outer_lr=1e-3)) == []
    (line,) = unread_settings(configured(tmp_path, "abmll", reptile_step=0.1))
    assert line.startswith("method.reptile_step: 0.1: abmll does not read it")
