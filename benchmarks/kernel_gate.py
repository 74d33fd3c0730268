"""Parity before speed: the fused projection's error against float64, beside eager code's on the same inputs."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import NamedTuple

import torch
from kernel_cases import ORDER_ONE, TRAINING, Configuration, Inputs, make_inputs
from kernel_contender import Contender
from kernel_contenders import build, posterior_contender
from torch import Tensor

# A split 16-bit product has three accumulations where eager code has one: three times its rounding is the same quality.
MULTIPLE = 3.0
# Two right fp32 codes differ by this where one is lucky: half a spacing of a log-variance near -20 is 1e-6, and
# exp(-log_variance) turns it into as much relative error; the normals of two math libraries differ by about as much.
FLOOR = 2e-6
# Beside a 16-bit x, products for the factors' gradients take 16 leading bits of either operand, as the kernels' tests
# say: errors of at most 2^-16 of an operand, and so less than 2^-17 of a sum whose terms do not cancel; twice that for
# those that do.
FACTOR_FLOOR = 2.0**-16

# Eager code may be lucky with a single number. The differences that the KL is made of are in these gradients as well,
# where they are many: their error counts for the KL too.
GRADIENTS_OF = {"KL": "phi mean b", "outer KL": "theta mean b"}

FACTORS = ("mean a", "mean b", "log-variance a", "log-variance b")


class Gate(NamedTuple):
    """Relative errors by regime, contender and quantity; the largest error over its limit, and where; what failed."""

    errors: dict[str, dict[str, dict[str, float]]]
    worst: tuple[float, str]
    failures: list[str]


def limit(quantity: str, eager_errors: dict[str, float], narrow: bool = False) -> float:
    """The largest error that passes, `narrow`: beside a 16-bit x; NaN, which nothing passes, where eager code's own
    error is NaN.
    """
    eager_error = max(eager_errors[quantity], eager_errors[GRADIENTS_OF.get(quantity, quantity)])
    return max(MULTIPLE * eager_error, FACTOR_FLOOR if narrow and quantity.endswith(FACTORS) else FLOOR)


def roundings_of_dy(configuration: Configuration, inputs: Inputs, truth: dict[str, Tensor]) -> dict[str, float]:
    """What another rounding of dy makes of phi's gradients: the weight posterior rounds dy^T x to bf16 as dy was."""
    if configuration.posterior != "weight" or inputs.x.dtype != torch.bfloat16:
        return {}
    wide = inputs.upcast()
    generator = torch.Generator(wide.dy.device).manual_seed(6)
    uniform = 2 * torch.rand(wide.dy.shape, generator=generator, dtype=torch.float64, device=wide.dy.device) - 1
    wide = replace(wide, dy=wide.dy * (1 + torch.finfo(torch.bfloat16).eps * uniform))
    found = relative_errors(outcome(posterior_contender(configuration.posterior, wide, "torch")), truth)
    return {quantity: error for quantity, error in found.items() if quantity.startswith("phi ")}


def gate(configuration: Configuration, device: torch.device) -> Gate:
    """Run eager code and the fused code as they are timed, in both regimes, against eager code in float64."""
    errors, ratios, failures = {}, {}, []
    for regime in (ORDER_ONE, TRAINING):
        inputs = make_inputs(configuration, regime, device)
        truth = outcome(posterior_contender(configuration.posterior, inputs.upcast(), "torch"))
        found = {"plain": relative_errors(outcome(build("plain", configuration, inputs)), truth)}
        with poisoned():
            found["fused"] = relative_errors(outcome(build("fused", configuration, inputs)), truth)
        roundings, narrow = roundings_of_dy(configuration, inputs, truth), inputs.x.element_size() == 2
        for quantity, error in found["fused"].items():
            allowed = max(limit(quantity, found["plain"], narrow), MULTIPLE * roundings.get(quantity, 0.0))
            place = f"fused, {regime.name}, {quantity}"
            ratios[place] = error / allowed
            if not error <= allowed:
                failures.append(f"{place}: error {error:.2g}, at most {allowed:.2g} passes")
        errors[regime.name] = found
    place = max(ratios, key=lambda place: math.inf if math.isnan(ratios[place]) else ratios[place])
    return Gate(errors, (ratios[place], place), failures)


def outcome(contender: Contender) -> dict[str, Tensor]:
    """Everything that an inner and an outer step compute."""
    y, kl, prior = contender.forward()
    dx, *phi = contender.gradients((y, kl))
    outer_y, outer = contender.outer()
    theta = [factor for pair in outer.gradient for factor in pair]
    values = {"y": y, "KL": kl, "-log prior": prior, "dx": dx}
    values |= {f"phi {name}": value for name, value in zip(FACTORS, phi, strict=True)}
    values |= {} if outer_y is None else {"outer y": outer_y}
    values |= {"outer KL": outer.kl, "outer -log prior": outer.negative_log_prior}
    values |= {f"theta {name}": value for name, value in zip(FACTORS, theta, strict=True)}
    return {name: value.detach() for name, value in values.items()}


def relative_errors(found: dict[str, Tensor], truth: dict[str, Tensor]) -> dict[str, float]:
    """||found - truth|| / ||truth||."""
    errors = {}
    for quantity, right in truth.items():
        if found[quantity].shape != right.shape:
            raise ValueError(f"{quantity}: shape {tuple(found[quantity].shape)}: must be {tuple(right.shape)}")
        errors[quantity] = ((found[quantity].double() - right).norm() / right.norm()).item()
    return errors


@contextmanager
def poisoned() -> Iterator[None]:
    """Memory that nobody wrote reads as NaN."""
    state = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    with warnings.catch_warnings():
        # operators without a deterministic version say so, which is of no interest here
        warnings.simplefilter("ignore")
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = True
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(state[0], warn_only=state[1])
            torch.utils.deterministic.fill_uninitialized_memory = fill
