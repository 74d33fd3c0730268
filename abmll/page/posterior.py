"""How wide a posterior is, layer by layer, from theta's factors alone: no model is loaded.

Both posteriors have a log-variance of s B A (times x) + c (`abmll.kernels.reference`). Its mean and its spread follow
from the factors' small products, so that no matrix of a layer's size is made.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from itertools import takewhile
from typing import Any, NamedTuple

from torch import Tensor

from abmll.page.facts import RunFacts

EXPLAINED = {
    "activation": "The activation posterior's standard deviation depends on the token: exp(l(x) / 2) with l(x) = "
    "s B A x + c. Shown is what it is for inputs x of independent standard normal numbers, over all output units: the "
    "centre is exp(c / 2) whatever was learned (what real inputs have in common may move it far), and the band reaches "
    "one standard deviation of its logarithm, s |BA| / (2 √N), to either side.",
    "weight": "The standard deviation of a layer's weights, exp((s B A + c) / 2): the geometric mean over the weights, "
    "and a band of one standard deviation of its logarithm to either side.",
    "blob": "BLoB's standard deviation of the factor A: the geometric mean over its elements, and a band of one "
    "standard deviation of its logarithm to either side.",
}


class LogDeviation(NamedTuple):
    """Mean and standard deviation of log(standard deviation), over a layer's weights or activations."""

    mean: float
    spread: float


def weight_deviation(a: Tensor, b: Tensor, scaling: float, offset: float) -> LogDeviation:
    """Of exp((s B A + c) / 2), over all N x K weights; a [r, K], b [N, r]."""
    a, b = a.double(), b.double()
    size = b.shape[0] * a.shape[1]
    mean = float(b.sum(dim=0) @ a.sum(dim=1)) / size
    variance = max(_square(a, b) / size - mean**2, 0.0)
    return LogDeviation(0.5 * (scaling * mean + offset), 0.5 * scaling * math.sqrt(variance))


def activation_deviation(a: Tensor, b: Tensor, scaling: float, offset: float) -> LogDeviation:
    """Of exp((s B A x + c) / 2), over all N output units and x ~ N(0, I): (B A x)_n has the variance |(B A)_n|^2."""
    variance = _square(a.double(), b.double()) / b.shape[0]
    return LogDeviation(0.5 * offset, 0.5 * scaling * math.sqrt(variance))


def blob_deviation(root: Tensor) -> LogDeviation:
    """Of the squared roots G^2 (`abmll.adapters.blob`)."""
    log = root.double().square().log()
    return LogDeviation(float(log.mean()), float(log.std(correction=0)))


def _square(a: Tensor, b: Tensor) -> float:
    """|B A|^2, the sum of the product's squares, from the factors' Gram matrices."""
    return float(((b.mT @ b) * (a @ a.mT)).sum())


def posterior_kind(run: RunFacts) -> str | None:
    """activation, weight or blob; None for a point estimate, or where there is no theta."""
    if any(name.endswith(".log_variance.a") for name in run.theta):
        return run.setting("adapters.posterior", "activation")
    return "blob" if any(name.endswith(".deviations.root") for name in run.theta) else None


def deviations(run: RunFacts) -> dict[str, LogDeviation]:
    """Of every adapted layer with a posterior, by its name, in the order of the layers."""
    kind, theta = posterior_kind(run), run.theta
    if kind is None:
        return {}
    mark = ".deviations.root" if kind == "blob" else ".log_variance.a"
    there = [name.removesuffix(mark) for name in theta if name.endswith(mark)]
    names = [name for name in run.summary.get("layers", ordered(there)) if name in there]
    if kind == "blob":
        return {name: blob_deviation(theta[name + mark]) for name in names}
    alpha = run.setting("adapters.log_variance_alpha", None) or run.setting("adapters.alpha", 16.0)
    scaling = float(alpha) / float(run.setting("adapters.rank", 8))
    offset = float(run.setting("adapters.log_variance_offset", -20.0))
    of = weight_deviation if kind == "weight" else activation_deviation
    factors = {name: (theta[f"{name}.log_variance.a"], theta[f"{name}.log_variance.b"]) for name in names}
    return {name: of(a, b, scaling, offset) for name, (a, b) in factors.items()}


def ordered(names: Iterable[str]) -> list[str]:
    """With numbers in them sorted as numbers: layer 2 comes before layer 10."""
    return sorted(names, key=lambda name: [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)])


def by_module(values: Mapping[str | int, Any]) -> dict[str, dict[int, Any]]:
    """Values by layer as a curve a module, {q_proj: {block: value}}, of model.layers.BLOCK.self_attn.q_proj.

    Layers that are only numbered, or lie in no numbered block, are numbered through.
    """
    curves: dict[str, dict[int, Any]] = {}
    for number, (layer, value) in enumerate(values.items()):
        found = re.match(r"(.*?\.)(\d+)(\..+)", str(layer))
        module, block = (f"{found[1]}*{found[3]}", int(found[2])) if found else ("all layers", number)
        curves.setdefault(module, {})[block] = value
    parents = [module.split(".")[:-1] for module in curves]
    common = len(list(takewhile(lambda parts: len(set(parts)) == 1, zip(*parents, strict=False))))
    return {".".join(module.split(".")[common:]): curve for module, curve in curves.items()}
