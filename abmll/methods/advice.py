"""Where a run's settings make a method another one than what was published under its name, or do nothing to it."""

from __future__ import annotations

from collections.abc import Mapping

from abmll.config import Config
from abmll.config.messages import show
from abmll.config.method_keys import unread_keys
from abmll.config.schema import AdapterConfig, MethodConfig
from abmll.config.settings import flat
from abmll.methods import METHODS, build_method


def unlike_published(config: Config, sizes: Mapping[str, int], tasks_per_step: int) -> list[str]:
    """A line for each such setting, with key, value and remedy. These are choices, not mistakes: a run goes on.

    `sizes`: training examples by task. Keys are shared by all methods, so their defaults are those of ABMLL.
    """
    method, found, training_examples = config.method, [], sum(sizes.values())
    if method.name == "blob":
        bound = method.summed_examples(config.tasks.batch_size) / training_examples
        if not bound / 2 < method.beta < 2 * bound:
            found.append(
                f"method.beta: {method.beta:g}: weighs BLoB's KL; in the evidence lower bound it has batch size over "
                f"training examples; set method.beta={bound:.2g}"
            )
    if METHODS[method.name].pooled:
        largest = max(sizes, key=sizes.__getitem__)
        if (times := sizes[largest] * len(sizes) / training_examples) > 3:
            found.append(
                f"tasks.max_train_examples: {show(config.tasks.max_train_examples)}: pooled batches draw tasks by "
                f"their size, {largest} {times:.1f} times as often as the average task, where episodes draw all alike; "
                f"set tasks.max_train_examples={sorted(sizes.values())[len(sizes) // 2]}, the median"
            )
    if method.name in ("fomaml", "maml") and method.outer_batch == "reuse":
        found.append(
            "method.outer_batch: reuse: theta's gradient is taken on a batch that phi was trained on; MAML takes it on "
            "one of its own; set method.outer_batch=query"
        )
    if method.name == "maml" and method.test_lr != method.inner_lr:
        found.append(
            f"method.test_lr: {method.test_lr:g}: MAML's theta was trained for steps of method.inner_lr: "
            f"{method.inner_lr:g}; set method.test_lr={method.inner_lr:g}"
        )
    if (METHODS[method.name].inner_loop or METHODS[method.name].pooled) and tasks_per_step > 1:
        rate = build_method(method).rate_of_theta
        found.append(
            f"trainer.tasks_per_step: {tasks_per_step}: each outer step averages so many tasks, so that there are that "
            f"many times fewer of them, and theta moves less at the same rate; raise {rate} or trainer.epochs with it"
        )
    if method.name == "structured_lora" and tasks_per_step > 1:
        found.append(
            f"trainer.tasks_per_step: {tasks_per_step}: each of structured LoRA's steps then averages so many tasks, "
            "which is pooled LoRA with batches of one task each; set trainer.tasks_per_step=1, on one rank"
        )
    return found


def lower_after_nan(config: Config) -> str:
    """The keys whose lower values keep a run from NaN, of those that the method reads: `one, two or three`."""
    unread = unread_keys(flat(config.model_dump(mode="json")))
    rate = build_method(config.method).rate_of_theta
    *others, last = [
        key for key in ("method.inner_lr", rate, "method.beta", "adapters.log_variance_alpha") if key not in unread
    ]
    return f"{', '.join(others)} or {last}" if others else last


def unread_settings(config: Config) -> list[str]:
    """A line that names the keys which are set to other than their defaults and which the method does not read."""
    name, values = config.method.name, flat(config.model_dump(mode="json"))
    defaults = flat({"method": MethodConfig().model_dump(mode="json"), "adapters": AdapterConfig().model_dump()})
    told = [key for key in sorted(unread_keys(values)) if values[key] != defaults[key]]
    if not told:
        return []
    listed, them = ", ".join(f"{key}: {show(values[key])}" for key in told), "them" if len(told) > 1 else "it"
    steps = "method.outer_lr" in told and config.method.interpolates
    rate = "; how far theta goes in a step is method.reptile_step" if steps else ""
    return [f"{listed}: {name} does not read {them}; take {them} out{rate}"]
