"""What a summary's configuration says of theta, by the keys of this version: what says otherwise is refused."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from abmll.config import ConfigError, Refused
from abmll.config.errors import show
from abmll.config.schema import AdapterConfig, Config, EvalConfig, MethodConfig
from abmll.config.settings import flat

# sections and keys that a loaded model, its adapters and theta were made with; of theta alone `trained_with` knows
# nothing of the model, which may have a new place
LOADED = ("model.", "adapters.", "method.name", "method.blob_")
# what whoever sets one of these behind a trained run may have meant
MEANT = {
    "output": "name the file of the scores with --output, the folder of an adapter with --out",
    "method.inner_lr": "set method.test_lr",
}
OF_TRAINING = {  # keys that training alone reads
    *MEANT,
    "method.outer_lr",
    "method.outer_optimizer",
    "method.outer_batch",
    "method.meta_gradient",
    "method.reset_inner_optimizer",
    "method.reptile_step",
    "method.reptile_schedule",
    "trainer.epochs",
    "trainer.episodes",
    "trainer.tasks_per_step",
    "trainer.max_nonfinite",
    "trainer.checkpoint_every",
    "trainer.keep_checkpoints",
    "trainer.deepspeed",
    "eval.select_by",
    "method.prior_shape",
    "method.prior_rate",
    "tasks.train",
    "tasks.keep_overlap",
}
# what an adaptation to a user's own examples does not read either: they are its task, alone on one device, and its
# command's options say how it is scored
NOT_OF_ADAPTING = (
    *("tasks.source", "tasks.folder", "tasks.lists", "tasks.validation", "tasks.test", "tasks.missing", "tasks.hub"),
    *("tasks.builtin", "tasks.max_train_examples", "eval", "memory", "model.sharding", "trainer.parallel_episodes"),
)


def refuse_unread(overrides: Iterable[str], adapting: bool = False) -> None:
    """ConfigError for every override that would do nothing to a trained run that is scored, or (`adapting`) that is
    adapted to a user's own examples.
    """
    problems = []
    for key in (text.partition("=")[0].strip() for text in overrides):
        if key in OF_TRAINING or key.startswith("logging."):
            problems.append(f"override: {key}: only training reads it; {MEANT.get(key, 'remove it')}")
        elif adapting and key != "eval.batch_size" and any(f"{key}.".startswith(f"{own}.") for own in NOT_OF_ADAPTING):
            remedy = "give --samples to predict.py or evaluate.py" if key == "eval.samples" else "remove it"
            problems.append(f"override: {key}: adapting to examples of your own does not read it; {remedy}")
    if problems:
        raise ConfigError(problems)


def refuse_other_training(config: Config, facts: Mapping[str, Any]) -> None:
    """ConfigError for every key that says of theta what the summary's `facts` do not. A theta of the same shape would
    load, and be another one's.
    """
    refuse_other(config, trained_with(facts["config"]), "theta was trained with {}; leave it as it was")


def refuse_other_base(config: Config, fingerprint: str | None, facts: Mapping[str, Any]) -> None:
    """Refused where the loaded model, which has this fingerprint, is known to be another than theta was trained on.

    Nothing is known of a summary without one, nor of packed weights, which have fingerprints of their own.
    """
    known, model = facts.get("fingerprint"), facts["config"]["model"]
    packed = {config.model.quantization, model.get("quantization", "none")} != {"none"}
    if known is None or fingerprint is None or packed or known == fingerprint:
        return
    raise Refused(
        f"model.name: {config.model.name!r}: theta was trained on {model['name']} with fingerprint {known[:12]}, and "
        f"this model as it is loaded has {fingerprint[:12]}: theta serves no other weights; name its own model with "
        "model.name=NAME"
    )


def refuse_other(config: Config, other: Mapping[str, Any], why: str) -> None:
    """ConfigError for every key of LOADED that the other has with another value, for which {} in `why` stands."""
    told = flat(config.model_dump(mode="json"))
    differing = [key for key in told if key.startswith(LOADED) and key in other and told[key] != other[key]]
    if differing:
        raise ConfigError([f"override: {key}: {why.format(show(other[key]))}" for key in differing])


def trained_with(config: Mapping[str, Any]) -> dict[str, Any]:
    """A summary's configuration by key, as far as it decides what theta means."""
    whole = completed(config)
    known = flat({section: whole[section] for section in ("adapters", "method")})
    del known["adapters.backend"]
    return known


def completed(config: Mapping[str, Any]) -> dict[str, Any]:
    """A summary's or a checkpoint's configuration; of adapters, method and eval the keys that the run's version did not
    have yet are at their defaults.
    """
    sections = {"adapters": AdapterConfig(), "method": MethodConfig(), "eval": EvalConfig()}
    known = {name: own.model_dump(mode="json") | config.get(name, {}) for name, own in sections.items()}
    return {**config, **known}
