"""What no single key can tell: rules between the keys of a configuration."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .errors import duplicates, show

SAMPLED = ("abmll", "blob")  # methods that have a posterior


@dataclass(frozen=True)
class Problem:
    """One broken rule: the key that its line opens with, and every key that it was judged by."""

    key: str
    text: str
    judged_by: tuple[str, ...]


def sections_disagree(config: Any, scoring: bool = False) -> list[Problem]:
    """Every broken rule of a schema.Config, which calls this, in the order of its sections.

    `scoring`: the configuration serves to score tasks, and need not name any to train on.
    """
    found = []

    def rule(broken: object, key: str, remedy: str, *others: str) -> None:
        if broken:
            value = config
            for name in key.split("."):
                value = getattr(value, name)
            found.append(Problem(key, f"{key}: {show(value)}: {remedy}", (key, *others)))

    rule(
        config.model.revision is not None and config.model.name.startswith(("package:", "random:")),
        "model.revision",
        f"model.name={config.model.name} has no revisions; remove it, or name a hub model",
        "model.name",
    )
    rule(
        config.model.sharding == "full" and config.model.quantization != "none",
        "model.sharding",
        f"not with packed weights (model.quantization={config.model.quantization}); set one of the two to none",
        "model.quantization",
    )

    rule(
        config.method.outer_batch == "query"
        and config.method.meta_gradient == "kl"
        and config.adapters.posterior == "weight",
        "method.outer_batch",
        "theta's gradient reads no batch in the weight posterior; set method.outer_batch=reuse, or "
        "method.meta_gradient=first_order",
        "method.meta_gradient",
        "adapters.posterior",
    )

    second_order = config.method.name == "maml"
    rule(
        second_order and config.method.inner_optimizer != "sgd",
        "method.inner_optimizer",
        "maml takes derivatives through its inner steps, which AdamW's have not everywhere (at a gradient of 0); set "
        "method.inner_optimizer=sgd and a learning rate for it, or method.name=fomaml",
        "method.name",
    )
    rule(
        second_order and config.trainer.activation_checkpointing is not False,
        "trainer.activation_checkpointing",
        "maml's inner steps cannot be made again in its backward pass; set it to false, or method.name=fomaml",
        "method.name",
    )

    rule(
        config.trainer.parallel_episodes > 1 and not config.method.reset_inner_optimizer,
        "trainer.parallel_episodes",
        "moments that pass from one episode to the next need episodes one after another; set it to 1, or "
        "method.reset_inner_optimizer=true",
        "method.reset_inner_optimizer",
    )

    sampled, active = config.method.name in SAMPLED, config.eval.active
    rule(
        sampled and config.eval.tfb.samples,
        "eval.tfb.samples",
        f"draws weights around a point estimate, and {config.method.name} has a posterior; set eval.samples instead",
        "method.name",
    )
    rule(
        active and active.labels > active.candidates,
        "eval.active.labels",
        f"more than the {active and active.candidates} candidates; set eval.active.candidates higher",
        "eval.active.candidates",
    )
    rule(
        active and active.by == "variance" and not (sampled and config.eval.samples > 1),
        "eval.active.by",
        "needs samples of a posterior; set eval.samples=2 or more with method.name=abmll or blob, or "
        "eval.active.by=entropy",
        "eval.samples",
        "method.name",
    )
    rule(
        active and active.by == "variance" and config.eval.pretrained,
        "eval.active.by",
        "the pretrained model has no samples to vary; set eval.pretrained=false, or eval.active.by=entropy",
        "eval.pretrained",
    )

    tasks = config.tasks
    rule(
        tasks.source == "jsonl" and not tasks.folder,
        "tasks.folder",
        "source jsonl reads a folder of tasks; set tasks.folder=PATH",
        "tasks.source",
    )
    rule(
        tasks.source != "builtin" and not tasks.lists and not (tasks.test and (tasks.train or scoring)),
        "tasks.lists",
        f"name a list file (tasks.lists=PATH), or set {'' if scoring else 'both tasks.train and '}tasks.test",
        "tasks.source",
        "tasks.train",
        "tasks.test",
    )
    rule(
        tasks.source == "hub" and not tasks.hub,
        "tasks.hub",
        "source hub reads the tasks described here; describe them, or set tasks.source=jsonl",
        "tasks.source",
    )

    for key in ("train", "test", "validation"):
        rule(
            tasks.source == "builtin" and getattr(tasks, key) is not None,
            f"tasks.{key}",
            "source builtin makes its own tasks; remove it, or set tasks.source=jsonl",
            "tasks.source",
        )
    for key, names in {
        "adapters.modules": config.adapters.modules,
        "tasks.train": tasks.train,
        "tasks.test": tasks.test,
        "tasks.validation": tasks.validation,
    }.items():
        twice = duplicates(names or ())
        rule(twice, key, f"{', '.join(twice)} is listed twice; list each name once")
    return found
