"""Which keys of `method`, and of the posterior, the chosen method reads: all methods share one section."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# An unseen task's support set; all that the method without a model reads. Without test_steps inner_steps count.
_SUPPORT = {"inner_steps", "test_steps"}
_ADAPTATION = _SUPPORT | {"test_lr", "inner_optimizer", "nll_reduction", "weight_decay"}
_THETA = {"outer_lr", "outer_optimizer"}
_TOWARDS_PHI = {"reptile_step", "reptile_schedule"}
_KL = {"beta", "test_kl"}
_READ = {
    "frequencies": _SUPPORT,
    "pretrained": _ADAPTATION,
    "lora": _ADAPTATION | _THETA,
    "structured_lora": _ADAPTATION | _THETA,
    "blob": _ADAPTATION | _THETA | _KL | {"blob_prior_std", "blob_initial_std"},
    "reptile": _ADAPTATION | _TOWARDS_PHI | {"inner_lr", "reset_inner_optimizer"},
    "fomaml": _ADAPTATION | _THETA | {"inner_lr", "reset_inner_optimizer", "outer_batch"},
    "maml": _ADAPTATION | _THETA | {"inner_lr", "outer_batch"},
    "abmll": _ADAPTATION | _KL | {"inner_lr", "reset_inner_optimizer", "kl_estimate", "meta_gradient"},
}
_ADAMW = {"adam_betas", "adam_eps"}
_POSTERIOR = {"posterior", "log_variance_alpha", "log_variance_offset"}  # of the adapters


def unread_keys(values: Mapping[str, Any]) -> set[str]:
    """The keys of `method` and `adapters` that change nothing in a run of these values (by `section.key`)."""
    method = {key.partition(".")[2]: value for key, value in values.items() if key.startswith("method.")}
    name = method["name"]
    if name not in _READ:  # another version's
        return set()
    read = {"name", *_READ[name]}
    if name == "abmll":
        if method["meta_gradient"] == "reptile":
            read |= _TOWARDS_PHI
        else:
            read |= _THETA | {"prior_shape", "prior_rate"}
            in_weights = values["adapters.posterior"] == "weight" and method["kl_estimate"] == "closed_form"
            if not (in_weights and method["meta_gradient"] == "kl"):  # its divergence reads no batch
                read.add("outer_batch")
    if any(method[key] == "adamw" for key in {"inner_optimizer", "outer_optimizer"} & read):
        read |= _ADAMW
    unread = {f"method.{key}" for key in method.keys() - read}
    return unread if name == "abmll" else unread | {f"adapters.{key}" for key in _POSTERIOR}
