"""What the kernel benchmark compares: the fused projection, plain code, plain LoRA, the frozen linear alone."""

from __future__ import annotations

import torch
from kernel_cases import Configuration, Inputs
from kernel_contender import Contender
from kernel_loras import frozen, grouped_lora, lora, peft

from abmll.kernels import FrozenLinear, NoiseKey, posterior_projection, standard_normal, theta_gradient
from abmll.kernels.reference import (
    activation_linear,
    activation_theta_gradient,
    weight_linear,
    weight_theta_gradient,
)

KEY, LAYER = NoiseKey(20260723, 5), 3

# In the order of the tables; the frozen linear comes first.
DESCRIPTIONS = {
    "frozen": "F.linear with frozen weights, and dx: the floor",
    "lora": "plain LoRA by hand: W0 x + s B A x, fp32 factors multiplied in the base's dtype as under autocast",
    "grouped_mm": "`lora` of several groups, its products by torch.nn.functional.grouped_mm",
    "peft_autocast": "PEFT's LoRA linear, as get_peft_model makes it, under torch.autocast in the base's dtype: the "
    "rival of the goals (`lora` where PEFT is absent)",
    "peft": "the same without autocast, its low-rank products in fp32 without TF32: not a fair rival, no goal names it",
    "plain": "plain PyTorch (backend: torch): what a run does without the kernels. Its noise is Philox in PyTorch's "
    "64-bit integers, and it keeps nothing for the backward pass: not a fair rival either",
    "plain_randn": "the posterior's formulas with torch.randn, everything kept for the backward pass: not repeatable "
    "under checkpointing, but the rival of the goals against plain PyTorch",
    "compiled": "torch.compile of the formulas with Philox",
    "compiled_randn": "torch.compile of plain_randn: the rival of the goals against torch.compile",
    "fused": "the Triton kernels (backend: triton)",
}
CONTENDERS = tuple(DESCRIPTIONS)


def build(name: str, configuration: Configuration, inputs: Inputs) -> Contender:
    """The contender called `name` on these inputs. Raises NotRun where it does not apply."""
    if name == "frozen":
        return frozen(inputs)
    if name == "lora":
        return lora(inputs)
    if name == "grouped_mm":
        return grouped_lora(inputs)
    if name.startswith("peft"):
        return peft(inputs, configuration.rank, autocast=name == "peft_autocast")
    if name.endswith("randn") or name == "compiled":
        formulas = _formulas(configuration.posterior, inputs, torch_noise=name.endswith("randn"))
        if name == "plain_randn":
            return formulas
        # the caller resets the compiler once a configuration: a reset here would make the other one compile again
        return formulas._replace(forward=torch.compile(formulas.forward, fullgraph=True, dynamic=False), outer=None)
    return posterior_contender(configuration.posterior, inputs, {"plain": "torch", "fused": "triton"}[name])


def posterior_contender(posterior: str, inputs: Inputs, backend: str) -> Contender:
    """The projection's own call, as an adapted layer makes it."""
    # A forward pass makes the names once for all its layers, and a graph cannot capture their copy to the device.
    key = KEY.rows(inputs.groups, inputs.x.device) if backend == "triton" else KEY

    def project(terms: str):
        return posterior_projection(
            posterior,
            inputs.x,
            FrozenLinear(inputs.weight, inputs.bias),
            inputs.phi,
            inputs.theta,
            inputs.settings,
            key,
            LAYER,
            inputs.mask,
            terms,
            backend,
        )

    def forward():
        found = project("divergence")
        return found.y, found.kl, found.negative_log_prior

    def outer():
        weights = (inputs.kl_weight, inputs.prior_weight)
        if posterior == "weight":  # reads no input
            factors = (inputs.phi, inputs.theta)
            return None, theta_gradient(posterior, None, *factors, inputs.settings, *weights, backend=backend)
        with torch.no_grad():
            found = project("theta")
            step = theta_gradient(
                posterior,
                inputs.x,
                inputs.phi,
                inputs.theta,
                inputs.settings,
                *weights,
                inputs.mask,
                found,
                backend,
            )
        return found.y, step

    return Contender(forward, inputs.sources, inputs.cotangents, outer)


def _formulas(posterior: str, inputs: Inputs, torch_noise: bool) -> Contender:
    """The posterior's reference without the dispatch around it."""
    outputs, columns = inputs.weight.shape
    rows, columns = (inputs.x.shape[-2], outputs) if posterior == "activation" else (outputs, columns)
    groups, device = inputs.groups, inputs.x.device
    lead = inputs.x.shape[:-2]

    def noise():
        if torch_noise:
            return torch.randn(*lead, rows, columns, device=device)
        drawn = [standard_normal(rows, columns, KEY, LAYER, group, device) for group in range(groups)]
        return torch.stack(drawn) if lead else drawn[0]

    def project(theta):
        arguments = (inputs.x, inputs.weight, inputs.bias, inputs.phi, theta, inputs.settings, noise())
        found = activation_linear(*arguments, inputs.mask) if posterior == "activation" else weight_linear(*arguments)
        return found.y, found.kl, found.negative_log_prior

    def outer():
        weights = (inputs.kl_weight, inputs.prior_weight)
        with torch.no_grad():
            if posterior == "weight":
                return None, weight_theta_gradient(inputs.phi, inputs.theta, inputs.settings, *weights)
            arguments = (inputs.x, inputs.phi, inputs.theta, inputs.settings, inputs.mask, *weights)
            return project(None)[0], activation_theta_gradient(*arguments)

    return Contender(lambda: project(inputs.theta), inputs.sources, inputs.cotangents, outer)
