"""`unread_keys` of each method: exactly those keys whose value a run's theta and scores do not depend on."""

from __future__ import annotations

import pytest
from runs import METHODS, Run

import abmll.memory.plan
from abmll.config import ConfigError, load_config
from abmll.config.method_keys import unread_keys
from abmll.config.schema import MethodConfig
from abmll.config.settings import flat
from abmll.memory.episode import Ledger, Setup, count_episode

# Another value of every key, such that it must show in a run that reads it.
OTHER = {
    "method.inner_steps": 3,
    "method.test_steps": 1,
    "method.inner_lr": 2e-3,
    "method.outer_lr": 3e-3,
    "method.outer_optimizer": "sgd",
    "method.test_lr": 5e-3,
    "method.inner_optimizer": "sgd",
    "method.beta": 1e-4,
    "method.kl_estimate": "sample",
    "method.test_kl": False,
    "method.prior_shape": 3.0,
    "method.prior_rate": 0.1,
    "method.nll_reduction": "mean",
    "method.meta_gradient": "first_order",
    "method.outer_batch": "query",
    "method.reset_inner_optimizer": False,
    "method.adam_betas": [0.5, 0.9],
    "method.adam_eps": 1.0,
    "method.weight_decay": 0.3,
    "method.reptile_step": 0.9,
    "method.reptile_schedule": "constant",
    "method.blob_prior_std": 0.6,
    "method.blob_initial_std": 0.3,
    "adapters.posterior": "weight",
    "adapters.log_variance_alpha": 3.0,
    "adapters.log_variance_offset": -4.0,
}
# beta large enough that the KL of a test task shows in scores
RUNS = {
    **{name: (f"method.name={name}", *own) for name, own in METHODS.items() if name != "abmll"},
    "pretrained": ("method.name=pretrained",),
    "frequencies": ("method.name=frequencies",),
    "abmll": ("method.beta=1e-3",),
    "abmll with Reptile's step": ("method.beta=1e-3", "method.meta_gradient=reptile"),
    "abmll in the weight posterior": ("method.beta=1e-3", "adapters.posterior=weight"),
}
EVERY_KEY_IS_OF_ONE = ("abmll", "abmll with Reptile's step", "blob", "maml")
SMALL = (
    "trainer.episodes=2",
    "trainer.checkpoint_every=99",
    "tasks.builtin.test_tasks=1",
    "adapters.modules=[v_proj]",
    "adapters.log_variance_offset=-8",
)


@pytest.fixture(autouse=True)
def counted_once_for_all(monkeypatch):
    """Of the memory that is counted before a run nothing is asked here, and most of a tiny run's time is its."""
    kept: list[Ledger] = []

    def counted(setup: Setup) -> Ledger:
        if not kept:
            kept.append(count_episode(setup))
        return kept[0]

    monkeypatch.setattr(abmll.memory.plan, "count_episode", counted)


def outcome(run: Run, *overrides: str) -> tuple:
    run.train(*SMALL, *overrides, overwrite=True)
    theta = run.theta_bytes if (run.folder / "final/theta.safetensors").exists() else None
    return theta, run.scores


def goes_with(run: Run, *overrides: str) -> bool:
    try:
        load_config(run.config, [*SMALL, *overrides])
    except ConfigError:
        return False
    return True


def tried(run: Run, name: str) -> tuple[list[str], list[str]]:
    """Keys whose other value may be set: those said to be read, and those said to be unread. What does not go with the
    method at all is refused, and some are what the run has.
    """
    values = flat(load_config(run.config, [*SMALL, *RUNS[name]]).model_dump(mode="json"))
    unread = unread_keys(values)
    keys = [key for key in OTHER if values[key] != OTHER[key] and goes_with(run, *RUNS[name], f"{key}={OTHER[key]}")]
    return [key for key in keys if key not in unread], [key for key in keys if key in unread]


def test_every_key_of_the_section_is_tried():
    assert set(MethodConfig.model_fields) - {"name"} == {key[7:] for key in OTHER if key.startswith("method.")}


@pytest.mark.parametrize("name", RUNS)
def test_keys_that_are_said_to_be_unread_change_nothing_and_the_others_something(make_run, name):
    run = make_run(name.replace(" ", "-"))
    read, unread = tried(run, name)
    usual = outcome(run, *RUNS[name])
    assert outcome(run, *RUNS[name], *(f"{key}={OTHER[key]}" for key in unread)) == usual
    alone = read if name in EVERY_KEY_IS_OF_ONE else []
    assert [key for key in alone if outcome(run, *RUNS[name], f"{key}={OTHER[key]}") == usual] == []


def test_every_key_is_read_by_one_whose_keys_are_tried_alone(run):
    assert {key for name in EVERY_KEY_IS_OF_ONE for key in tried(run, name)[0]} == OTHER.keys()
