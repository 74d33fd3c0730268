"""What no single key can tell: rules between the keys of a configuration."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from .errors import duplicates, show

SAMPLED = ("abmll", "blob")  # methods that have a posterior
OUTER = ("abmll", "fomaml", "maml")  # methods whose step of theta reads a batch of its own


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
        config.method.outer_batch == "query" and config.method.name not in OUTER,
        "method.outer_batch",
        f"method.name={config.method.name} has no outer batch; set method.outer_batch=reuse",
        "method.name",
    )
    rule(
        config.method.name == "abmll"
        and config.method.outer_batch == "query"
        and config.method.meta_gradient == "kl"
        and config.method.kl_estimate == "closed_form"
        and config.adapters.posterior == "weight",
        "method.outer_batch",
        "theta's gradient reads no batch in the weight posterior; set method.outer_batch=reuse, or "
        "method.meta_gradient=first_order",
        "method.name",
        "method.meta_gradient",
        "method.kl_estimate",
        "adapters.posterior",
    )

    rule(
        config.method.name == "abmll" and config.method.interpolates and config.method.outer_batch == "query",
        "method.outer_batch",
        "a step towards phi reads no batch; set method.outer_batch=reuse, or another method.meta_gradient",
        "method.name",
        "method.meta_gradient",
    )
    rule(
        config.method.outer_optimizer != "adamw" and config.method.interpolates,
        "method.outer_optimizer",
        "a step towards phi has no optimizer; leave it out, or set another method.name or method.meta_gradient",
        "method.name",
        "method.meta_gradient",
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
        second_order and config.trainer.activation_checkpointing is not False and not scoring,
        "trainer.activation_checkpointing",
        "maml's inner steps cannot be made again in its backward pass; set it to false, or method.name=fomaml",
        "method.name",
    )

    rule(
        second_order and config.model.sharding != "none",
        "model.sharding",
        "maml takes derivatives through several forward passes, and a sharded base's weights are whole within one "
        "alone; set it to none, or method.name=fomaml",
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
    support_size = config.method.adaptation_steps * config.tasks.batch_size
    of_support = f"an unseen task's support set has {support_size} examples (method.test_steps x tasks.batch_size); set"
    rule(
        active and active.labels > support_size,
        "eval.active.labels",
        f"{of_support} fewer, or method.test_steps higher",
        "method.test_steps",
        "method.inner_steps",
        "tasks.batch_size",
    )
    rule(
        config.tasks.demonstrations > support_size,
        "tasks.demonstrations",
        f"{of_support} fewer, or method.test_steps higher",
        "method.test_steps",
        "method.inner_steps",
        "tasks.batch_size",
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

    rule(
        config.method.name == "frequencies"
        and (
            config.eval.temperature != "none"
            or config.eval.tfb.samples
            or config.eval.prune.fraction
            or (active and active.by != "random")
        ),
        "method.name",
        "counts labels and reads no model, which eval.temperature, eval.tfb, eval.prune and eval.active.by need; leave "
        "them at their defaults, or set another method",
        "eval.temperature",
        "eval.tfb.samples",
        "eval.prune.fraction",
        "eval.active.by",
    )

    held_out, support = config.eval.temperature == "held_out", "set eval.temperature=support"
    rule(
        held_out and config.method.adaptation_steps == 1,
        "eval.temperature",
        f"with the only step's batch held out none is left to adapt on; {support}, or method.test_steps=2 or more",
        "method.test_steps",
        "method.inner_steps",
    )
    rule(
        held_out and active,
        "eval.temperature",
        f"the chosen examples come again in batch after batch, so none is held out; {support}, or eval.active=null",
        "eval.active",
    )
    rule(
        held_out and config.eval.tfb.samples,
        "eval.temperature",
        f"the noise that the support set bears would have to be found anew without each batch; {support}, or "
        "eval.tfb.samples=0",
        "eval.tfb.samples",
    )
    rule(
        held_out and config.tasks.demonstrations and config.tasks.demonstrate != "test",
        "eval.temperature",
        f"what is held out is shown with its answer in the other batches' prompts; {support}, or "
        "tasks.demonstrate=test",
        "tasks.demonstrations",
        "tasks.demonstrate",
    )

    for key, changed in (("eval.active.by", active), ("eval.support_labels", config.eval.support_labels != "given")):
        rule(
            changed and config.tasks.demonstrations,
            key,
            f"the {config.tasks.demonstrations} demonstrations show the support set as it is; set "
            "tasks.demonstrations=0",
            "tasks.demonstrations",
        )

    tasks = config.tasks
    for key in ("folder", "lists"):
        rule(
            tasks.source == "builtin" and getattr(tasks, key) is not None and not scoring,
            f"tasks.{key}",
            "source builtin makes its own tasks and reads no files; set tasks.source=jsonl, or leave it out",
            "tasks.source",
        )
    rule(
        tasks.source != "hub" and tasks.hub and not scoring,
        "tasks.hub",
        f"source {tasks.source} reads no hub tasks; set tasks.source=hub, or leave it out",
        "tasks.source",
    )
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

    for name, task in tasks.hub.items():
        key = f"tasks.hub.{name}"
        found += [Problem(key, f"{key}.{text}", (key,)) for text in hub_task_disagrees(task)]

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


def hub_task_disagrees(task: Any) -> list[str]:
    """Every broken rule between the keys of a schema.HubTask, each `key: value: what is wrong; remedy`."""
    own = isinstance(task.options, tuple)
    rules = (
        ((task.test_split is None) != (task.holdout is not None), "holdout", "goes with test_split: null; set both"),
        (task.holdout_by and task.holdout is None, "holdout_by", "needs a holdout; set one, or remove it"),
        (task.options_pattern and own, "options_pattern", "needs options: FIELD, the field that holds their text"),
        (
            task.options_pattern and not _good_pattern(task.options_pattern),
            "options_pattern",
            "is no regular expression with two groups or more; write one group an option",
        ),
        (
            task.option_names and (not own or len(task.option_names) != len(task.options)),
            "option_names",
            "needs as many options as names; list the options",
        ),
        (
            task.labels and own and len(task.labels) != len(task.options),
            "labels",
            f"{len(task.options) if own else 0} options: write one label for each of them, in their order",
        ),
        (
            task.label_cuts and not (own and len(task.options) == 2 and task.label_cuts[0] <= task.label_cuts[1]),
            "label_cuts",
            "needs two options and two numbers, the smaller first",
        ),
        (
            task.label_is == "scores" and task.options != task.label,
            "label_is",
            "the options are those that have scores; set options and label to the same field",
        ),
    )
    return [f"{key}: {show(getattr(task, key))}: {text}" for broken, key, text in rules if broken]


def _good_pattern(pattern: str) -> bool:
    try:
        return re.compile(pattern).groups >= 2
    except re.error:
        return False
