"""What a run tells a reader: every derived number before it starts, and tables of scores when it ends."""

from __future__ import annotations

from abmll.adapters import base_dtype, projection_backend
from abmll.build import Parts
from abmll.config import Config
from abmll.config.native import in_software
from abmll.distributed import Ranks
from abmll.evaluation import Evaluation
from abmll.memory import Plan
from abmll.memory.table import summary
from abmll.methods.advice import unlike_published, unread_settings
from abmll.models.packing import told_layout
from abmll.models.quantization import num_parameters
from abmll.models.sharding import gathered_bytes
from abmll.trainer import Trainer

# Scores in the tables: name, heading, factor. Accuracies and F1 in percent.
COLUMNS = (
    ("accuracy", "accuracy %", 100.0),
    ("accuracy_vocabulary", "acc. vocab %", 100.0),
    ("macro_f1", "macro-F1 %", 100.0),
    ("ece", "ECE", 1.0),
    ("ece_paper", "ECE paper", 1.0),
    ("nll", "NLL", 1.0),
    ("brier", "Brier", 1.0),
)
_TOO_LONG = {"drop": "dropped", "truncate": "truncated"}


def derived_numbers(config: Config, parts: Parts, trainer: Trainer, ranks: Ranks, plan: Plan) -> str:
    """Tasks, parameters, steps, tokens and memory, as the configuration works out on this machine."""
    tasks, method, adapters = parts.tasks, config.method, parts.learner.adapters
    gaussian = parts.method.layers == "gaussian"
    beside, each = config.trainer.parallel_episodes, -(-trainer.tasks_per_step // ranks.world_size)
    prompts = trainer.tasks_per_step * parts.method.passes_per_episode * config.tasks.batch_size
    passes = -(-each // beside) * parts.method.passes_per_episode
    base = num_parameters(parts.model) - adapters.num_parameters()
    form = config.model.dtype if config.model.quantization == "none" else config.model.quantization
    sizes = {task.name: len(task.train) for task in tasks.train}
    rows = {
        "model": f"{config.model.name}, {base:,} frozen parameters in {form} on {ranks.device}",
        **_sharding(parts, config, ranks),
        "adapters": f"{len(adapters.layers)} layers, rank {config.adapters.rank}, {adapters.num_parameters():,} "
        f"trained parameters (theta {sum(p.numel() for p in adapters.theta.values()):,}, phi the same)",
        "method": f"{method.name}, {method.inner_steps} inner steps of {config.tasks.batch_size} examples"
        + (f", {config.adapters.posterior} posterior" if gaussian else "")
        + (f", beta {method.beta:g}" if parts.method.sampled else ""),
        **({"projections": "{}: {}".format(*_backend(parts, config))} if gaussian else {}),
        "tasks": f"{len(tasks.train)} to train on, {len(tasks.validation)} to validate on, {len(tasks.test)} unseen; "
        f"{sum(sizes.values()):,} training and "
        f"{sum(task.test.num_rows for task in tasks.test):,} test examples; prompts of at most "
        f"{config.tasks.max_tokens} tokens, longer ones {_TOO_LONG[config.tasks.too_long]} (--validate counts them)",
        **_demonstrations(config),
        "prompts": told_layout(parts.model),
        "steps": f"{trainer.num_steps:,} of {trainer.tasks_per_step} episodes on {ranks.world_size} ranks"
        f"{f', {beside} side by side' if beside > 1 else ''} ({trainer.num_episodes:,} episodes, "
        f"{trainer.num_episodes / trainer.sampler.episodes_per_epoch:.1f} epochs)",
        "tokens a step": f"at most {prompts * config.tasks.max_tokens:,} in {passes} forward passes on each rank",
    }
    text = "\n".join(f"{name:<15} {value}" for name, value in rows.items())
    slow = in_software(config.model.dtype, ranks.device.type)
    advice = [*unread_settings(config), *unlike_published(config, sizes, trainer.tasks_per_step)]
    notes = "".join(f"\nnote: {note}" for note in (*tasks.notes, *([slow] if slow else []), *advice))
    return f"{text}{notes}\nmemory          {summary(plan, 'each rank, counted')}"


def _demonstrations(config: Config) -> dict[str, str]:
    if not config.tasks.demonstrations:
        return {}
    where = {"test": "scored", "adaptation": "scored and support", "always": "scored, support and training"}
    return {"demonstrations": f"{config.tasks.demonstrations} before {where[config.tasks.demonstrate]} examples"}


def _sharding(parts: Parts, config: Config, ranks: Ranks) -> dict[str, str]:
    if config.model.sharding == "none":
        return {}
    forward, backward = (size / 1e9 for size in gathered_bytes(parts.model))
    told = f"over {ranks.world_size} ranks; each receives {forward:.3g} GB in a forward pass, {backward:.3g} GB in a"
    return {"sharding": f"{told} backward pass"}


def _backend(parts: Parts, config: Config) -> tuple[str, str]:
    base = next(iter(parts.learner.adapters.layers.values())).base
    return projection_backend(config.adapters, base.weight.device, base_dtype(base))


def score_table(evaluations: list[Evaluation]) -> str:
    """Markdown: the means over tasks of every method at 0 and K steps, then accuracy and macro-F1 task by task."""
    head = "| method | steps | " + " | ".join(heading for _, heading, _ in COLUMNS) + " | pooled ECE |"
    lines = [head, "|" + "---|" * (len(COLUMNS) + 3)]
    for evaluation in evaluations:
        for steps in evaluation.steps:
            overall = evaluation.overall[steps]
            values = [_number(overall[name], factor) for name, _, factor in COLUMNS]
            lines.append(f"| {evaluation.method} | {steps} | {' | '.join(values)} | {overall['pooled_ece']:.3f} |")
    return "\n".join(lines) + "\n\n" + _by_task(evaluations)


def _by_task(evaluations: list[Evaluation]) -> str:
    runs = [(evaluation, steps) for evaluation in evaluations for steps in evaluation.steps]
    lines = [
        "| accuracy / macro-F1 % | n | majority % | "
        + " | ".join(f"{e.method}, {steps} steps" for e, steps in runs)
        + " |",
        "|" + "---|" * (len(runs) + 3),
    ]
    for task, first in evaluations[0].tasks[0].items():
        scores = [evaluation.tasks[steps][task] for evaluation, steps in runs]
        values = [f"{100 * score['accuracy']:.1f} / {100 * score['macro_f1']:.1f}" for score in scores]
        lines.append(f"| {task} | {first['n']} | {100 * first['majority']:.1f} | {' | '.join(values)} |")
    return "\n".join(lines) + "\n"


def _number(value: float, factor: float) -> str:
    return f"{value * factor:.1f}" if factor == 100.0 else f"{value:.3f}"
