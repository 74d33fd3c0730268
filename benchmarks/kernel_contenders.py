"""What the kernel benchmark compares: the fused projection, plain code, plain LoRA, the frozen linear alone."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import NamedTuple

import torch
from kernel_cases import ALPHA, Configuration, Inputs
from torch import Tensor
from torch.nn.functional import linear

from abmll.kernels import FrozenLinear, NoiseKey, posterior_projection, standard_normal, theta_gradient
from abmll.kernels.fused import configurations
from abmll.kernels.reference import activation_linear, activation_theta_gradient

KEY, LAYER = NoiseKey(20260723, 5), 3

CONTENDERS = {
    "activation": (
        "frozen",
        "peft",
        "peft_autocast",
        "plain",
        "plain_randn",
        "compiled",
        "compiled_randn",
        "fused",
        "fused_library",
    ),
    "weight": ("frozen", "peft", "plain", "fused"),
}
DESCRIPTIONS = {
    "frozen": "F.linear with frozen weights, and dx: the floor",
    "peft": "PEFT's LoRA linear as get_peft_model makes it: 16-bit base, fp32 adapters, no autocast",
    "peft_autocast": "the same under torch.autocast in the base's dtype",
    "plain": "plain PyTorch (backend: torch), noise from Philox in PyTorch operations",
    "plain_randn": "the same arithmetic with torch.randn: faster, but not repeatable under checkpointing",
    "compiled": "torch.compile of plain",
    "compiled_randn": "torch.compile of plain_randn",
    "fused": "the Triton kernels (backend: triton)",
    "fused_library": "the Triton kernels with W0's product left to the library",
}


class Contender(NamedTuple):
    """`forward` returns y, and for a posterior its KL and -log prior; the first outputs have `cotangents`, and their
    gradients by `sources` are the backward pass. `outer`: the outer step, or the like. `context` surrounds every call.
    """

    forward: Callable[[], tuple[Tensor, ...]]
    sources: tuple[Tensor, ...]
    cotangents: tuple[Tensor, ...]
    outer: Callable[[], object] | None = None
    context: Callable[[], AbstractContextManager] = nullcontext

    def gradients(self, outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return torch.autograd.grad(outputs[: len(self.cotangents)], self.sources, self.cotangents)


class NotRun(Exception):
    """Why a contender has no row."""


def build(name: str, configuration: Configuration, inputs: Inputs) -> Contender:
    """The contender called `name` on these inputs. Raises NotRun where it does not apply."""
    if name == "frozen":
        return _frozen(inputs)
    if name.startswith("peft"):
        return _peft(inputs, configuration.rank, autocast=name == "peft_autocast")
    if name == "plain":
        return posterior_contender(configuration.posterior, inputs, "torch")
    if name == "plain_randn":
        return _reference(inputs, torch_noise=True)
    if name.startswith("compiled"):
        torch._dynamo.reset()  # else the shapes seen before would count against the limit of recompilations
        plain = _reference(inputs, torch_noise=name == "compiled_randn")
        return plain._replace(forward=torch.compile(plain.forward, fullgraph=True, dynamic=False), outer=None)
    fused = posterior_contender(configuration.posterior, inputs, "triton")
    return fused if name == "fused" else fused._replace(context=library_base)


def posterior_contender(posterior: str, inputs: Inputs, backend: str) -> Contender:
    """The projection's own call, as an adapted layer makes it."""

    def project(terms: str):
        return posterior_projection(
            posterior,
            inputs.x,
            FrozenLinear(inputs.weight, inputs.bias),
            inputs.phi,
            inputs.theta,
            inputs.settings,
            KEY,
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


@contextmanager
def library_base() -> Iterator[None]:
    """W0's product is left to the library in every dtype."""
    fused_base = configurations.fused_base
    configurations.fused_base = lambda *_: False
    try:
        yield
    finally:
        configurations.fused_base = fused_base


def _frozen(inputs: Inputs) -> Contender:
    def forward():
        return (linear(inputs.x, inputs.weight, inputs.bias),)

    return Contender(forward, (inputs.x,), (inputs.dy,), torch.no_grad()(forward))


def _reference(inputs: Inputs, torch_noise: bool) -> Contender:
    """The activation posterior's reference without the dispatch around it."""
    tokens, outputs, device = inputs.x.shape[0], inputs.weight.shape[0], inputs.x.device

    def project(theta):
        if torch_noise:
            noise = torch.randn(tokens, outputs, device=device)
        else:
            noise = standard_normal(tokens, outputs, KEY, LAYER, 0, device)
        arguments = (inputs.phi, theta, inputs.settings, noise, inputs.mask)
        found = activation_linear(inputs.x, inputs.weight, inputs.bias, *arguments)
        return found.y, found.kl, found.negative_log_prior

    def outer():
        with torch.no_grad():
            arguments = (inputs.settings, inputs.mask, inputs.kl_weight, inputs.prior_weight)
            return project(None)[0], activation_theta_gradient(inputs.x, inputs.phi, inputs.theta, *arguments)

    return Contender(lambda: project(inputs.theta), inputs.sources, inputs.cotangents, outer)


def _peft(inputs: Inputs, rank: int, autocast: bool) -> Contender:
    if importlib.util.find_spec("peft") is None:
        raise NotRun("PEFT is not installed: pip install peft")
    from peft import LoraConfig, get_peft_model

    if autocast and inputs.x.dtype == torch.float32:
        raise NotRun("autocast is for 16-bit base models")
    base = torch.nn.Linear(*inputs.weight.shape[::-1], bias=inputs.bias is not None, device="meta")
    base.weight = torch.nn.Parameter(inputs.weight, requires_grad=False)
    if inputs.bias is not None:
        base.bias = torch.nn.Parameter(inputs.bias, requires_grad=False)
    settings = LoraConfig(r=rank, lora_alpha=int(ALPHA), lora_dropout=0.0, target_modules=["projection"])
    model = get_peft_model(torch.nn.ModuleDict({"projection": base}), settings)
    layer = model.base_model.model["projection"]
    adapters = [parameter for parameter in layer.parameters() if parameter.requires_grad]
    for parameter in adapters:
        torch.nn.init.normal_(parameter, std=0.01)
    kind = inputs.x.device.type

    def forward():
        with torch.autocast(kind, inputs.x.dtype, enabled=autocast):
            return (layer(inputs.x),)

    return Contender(forward, (inputs.x, *adapters), (inputs.dy,))
