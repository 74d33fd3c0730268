"""What a run will take of each device's memory, counted before anything is loaded; and what that decides.

`plan_run` answers what a configuration leaves open (`auto`): the fastest checkpointing that fits the budget, and the
largest scoring batch that needs no more than training does.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from pydantic import BaseModel
from transformers import PreTrainedConfig

from abmll.config import Config
from abmll.memory.episode import Ledger, Setup, Uncountable, count_episode
from abmll.methods import METHODS
from abmll.models.checkpointing import POLICIES, Checkpointing, supports_checkpointing

GB = 1e9
SCORING_BATCHES = (16, 8, 4, 2, 1)


@dataclass(frozen=True)
class Plan:
    """A run with nothing left open, and its bytes on each device. Of `budget`, `allowance` stays free.

    `ledger` is None for a model that cannot be counted, `problem` says why: it may well run.
    """

    setup: Setup
    ledger: Ledger | None
    budget: float
    allowance: float
    problem: str = ""

    @property
    def fits(self) -> bool:
        """Whether it was counted, and leaves the allowance free."""
        return self.ledger is not None and self.ledger.peak + self.allowance <= self.budget

    @property
    def checkpointing(self) -> Checkpointing:
        return self.setup.checkpointing

    @property
    def eval_batch_size(self) -> int:
        if self.ledger is not None:
            return self.ledger.scored
        asked = self.setup.config.eval.batch_size
        return _usual_batch(self.setup.config) if asked == "auto" else asked


def plan_run(
    config: Config,
    architecture: PreTrainedConfig,
    deepspeed: dict[str, Any],
    world_size: int = 1,
    gpu: bool = True,
    capacity: float | None = None,
    policies: Sequence[Checkpointing] | None = None,
) -> Plan:
    """The plan of a configured run.

    `capacity`: the device's bytes, which bound memory.budget_gb. `policies`: of checkpointing, tried in this order
    (None: what trainer.activation_checkpointing says); the last is taken if none fits.

    Raises ValueError where no module matches adapters.modules, or adapters.backend cannot run on the device.
    """
    budget = min(config.memory.budget_gb * GB, float("inf") if capacity is None else capacity)
    allowance = config.memory.allowance_gb * GB if gpu else 0.0
    setup = Setup(config, architecture, deepspeed, world_size, gpu, scoring=_scoring_batches(config))
    policies = policies or _policies(config, architecture)
    try:
        for policy in policies:
            setup = replace(setup, checkpointing=policy)
            plan = Plan(setup, count_episode(setup), budget, allowance)
            if plan.fits:
                break
    except Uncountable as error:
        return Plan(replace(setup, checkpointing=policies[-1]), None, budget, allowance, str(error))
    return plan


def _policies(config: Config, architecture: PreTrainedConfig) -> Sequence[Checkpointing]:
    asked = config.trainer.activation_checkpointing
    if asked == "auto" and not supports_checkpointing(architecture):
        return POLICIES[:1]
    return {True: POLICIES[-1:], False: POLICIES[:1], "auto": POLICIES}[asked]


def _scoring_batches(config: Config) -> tuple[int, ...]:
    if config.eval.batch_size != "auto":
        return (config.eval.batch_size,)
    # samples' noise belongs to places in a batch: its size must not depend on the device
    return (_usual_batch(config),) if config.eval.samples else SCORING_BATCHES


def _usual_batch(config: Config) -> int:
    """Scoring keeps nothing for a backward pass, so that it bears several times a training batch."""
    return max(1, 4 * config.tasks.batch_size // max(config.eval.samples, config.eval.tfb.samples, 1))


@dataclass(frozen=True)
class Remedy:
    """Overrides that make a run smaller, and its plan with them."""

    overrides: tuple[str, ...]
    plan: Plan


def remedies(plan: Plan) -> Iterator[Remedy]:
    """What would make a run fit, each one counted: single changes first, then all of those so far together, until one
    fits. Ends without one that fits where none of these is enough.
    """
    together: dict[str, Any] = {}
    for change in _changes(plan.setup.config):
        together |= change
        tried = [change] if len(together) == len(change) else [change, together]
        fitting = False
        for overrides in tried:
            found = _changed(plan, overrides)
            fitting |= found.fits
            yield Remedy(tuple(f"{key}={_text(value)}" for key, value in overrides.items()), found)
        if fitting:
            return


def _changes(config: Config) -> Iterator[dict[str, Any]]:
    """From the cheapest to what changes the run most."""
    if config.trainer.activation_checkpointing is False:
        yield {"trainer.activation_checkpointing": True}
    if config.eval.batch_size != "auto":
        yield {"eval.batch_size": "auto"}
    if config.adapters.backend == "torch" and METHODS[config.method.name].layers == "gaussian":
        yield {"adapters.backend": "auto"}
    if config.eval.samples > 1:
        yield {"eval.samples": 1}
    if config.eval.tfb.samples > 1:
        yield {"eval.tfb.samples": 1}
    if config.tasks.batch_size > 1:
        yield {"tasks.batch_size": config.tasks.batch_size // 2}
    if config.tasks.max_tokens >= 256:
        yield {"tasks.max_tokens": config.tasks.max_tokens // 2}
    if config.model.dtype == "float32":
        yield {"model.dtype": "bfloat16"}
    if config.model.quantization == config.model.sharding == "none":
        yield {"model.quantization": "nf4"}


def _changed(plan: Plan, overrides: dict[str, Any]) -> Plan:
    config = plan.setup.config
    for key, value in overrides.items():
        config = _with(config, key.split("."), value)
    setup = plan.setup
    leanest = _policies(config, setup.architecture)[-1:]
    return plan_run(config, setup.architecture, setup.deepspeed, setup.world_size, setup.gpu, plan.budget, leanest)


def _with(section: BaseModel, path: Sequence[str], value: Any) -> BaseModel:
    """The section with another value at a path of keys."""
    name, *deeper = path
    return section.model_copy(update={name: _with(getattr(section, name), deeper, value) if deeper else value})


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
