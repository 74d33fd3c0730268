"""Adapters into a model and out again, and the set of all of them as the trainer sees it."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from abmll.adapters.blob import BlobLinear
from abmll.adapters.context import AdapterContext
from abmll.adapters.layers import GaussianLoRALinear, LoRALinear, base_dtype
from abmll.adapters.targets import find_targets
from abmll.config.schema import AdapterConfig, MethodConfig
from abmll.kernels import PosteriorSettings, fold_seed, resolve

LayerKind = Literal["mean", "gaussian", "blob"]
AdaptedLinear = LoRALinear | GaussianLoRALinear | BlobLinear


def projection_backend(adapters: AdapterConfig, device: torch.device, dtype: torch.dtype) -> tuple[str, str]:
    """triton or torch, and why, for a model on `device` in `dtype`. ValueError: see `kernels.resolve`."""
    try:
        return resolve(adapters.backend, adapters.posterior, device, dtype, adapters.rank)
    except ValueError as error:
        raise ValueError(f"adapters.{error}") from error


class AdapterSet:
    """All adapted layers of a model: theta and phi by name, the reset of phi, and the context that they share."""

    def __init__(self, layers: dict[str, AdaptedLinear], context: AdapterContext):
        self.layers = layers
        self.context = context
        self.theta = self._named("theta")
        self.phi = self._named("phi")

    def _named(self, which: str) -> dict[str, nn.Parameter]:
        return {
            f"{layer_name}.{name}": parameter
            for layer_name, layer in self.layers.items()
            for name, parameter in getattr(layer, which).named_parameters()
        }

    @property
    def phi_paths(self) -> dict[str, str]:
        """Phi's names as the model's own parameters are named."""
        return {
            f"{layer_name}.{name}": f"{layer_name}.phi.{name}"
            for layer_name, layer in self.layers.items()
            for name, _ in layer.phi.named_parameters()
        }

    @property
    def mean_phi(self) -> list[nn.Parameter]:
        """Phi's mean factors alone: what a point estimate trains."""
        return [parameter for name, parameter in self.phi.items() if ".mean." in name]

    def initialise(self, seed: int) -> None:
        """Theta from the seed alone (not from the global generator), phi its copy."""
        for name, layer in self.layers.items():
            generator = torch.Generator().manual_seed(fold_seed(seed, "initialise", name) % 2**63)
            for pair in layer.theta.children():
                pair.initialise(generator)
        self.reset_phi()

    @torch.no_grad()
    def reset_phi(self, groups: int = 1) -> None:
        """phi <- theta for each of G episodes side by side: [G, ...].

        The phi parameters stay the same objects, as their optimizer expects; of the same size also the same memory.
        """
        for parameter in self.phi.values():
            parameter.grad = None
            if len(parameter) != groups:
                parameter.data = parameter.new_empty(groups, *parameter.shape[1:])
        # group by group, as tensors of one layout: they are copied in one launch
        copies = [(own, theta) for name, theta in self.theta.items() for own in self.phi[name].unbind()]
        torch._foreach_copy_(*map(list, zip(*copies, strict=True)))

    @property
    def groups(self) -> int:
        """Episodes that phi has a copy of theta for."""
        return len(next(iter(self.phi.values())))

    @torch.no_grad()
    def load_theta(self, tensors: dict[str, Tensor]) -> None:
        """Theta from saved tensors, phi its copy. ValueError where names or shapes differ from this model's."""
        wrong = sorted(set(tensors) ^ set(self.theta)) or sorted(
            name for name, value in tensors.items() if value.shape != self.theta[name].shape
        )
        if wrong:
            raise ValueError(
                f"adapters: {len(wrong)} tensors do not fit this model, the first {wrong[0]!r}; use the model, rank, "
                "modules and method that the adapters were trained with"
            )
        for name, parameter in self.theta.items():
            parameter.copy_(tensors[name])
        self.reset_phi()

    def num_parameters(self) -> int:
        """Trained numbers, theta's and phi's together, of one episode."""
        return 2 * sum(theta.numel() for theta in self.theta.values())


def inject_adapters(
    model: nn.Module, adapters: AdapterConfig, method: MethodConfig, kind: LayerKind, seed: int
) -> AdapterSet:
    """Replace every linear layer named in `adapters.modules`; freeze all that is not an adapter.

    `kind`: which layers take their places. Raises ValueError where a module name matches no linear layer, naming those
    that there are, and where `adapters.backend` cannot run on the model's device.
    """
    model.requires_grad_(False)
    context = AdapterContext()
    settings = PosteriorSettings(
        scaling=adapters.alpha / adapters.rank,
        log_variance_scaling=(adapters.log_variance_alpha or adapters.alpha) / adapters.rank,
        log_variance_offset=adapters.log_variance_offset,
        prior_shape=method.prior_shape,
        prior_rate=method.prior_rate,
    )
    targets = find_targets(model, adapters.modules)
    if kind == "gaussian":
        first = next(iter(targets.values()))
        projection_backend(adapters, first.weight.device, base_dtype(first))
    layers: dict[str, AdaptedLinear] = {}
    for index, (name, base) in enumerate(targets.items()):
        if kind == "gaussian":
            layer = GaussianLoRALinear(
                base, adapters.rank, adapters.posterior, settings, context, index, adapters.backend
            )
        elif kind == "blob":
            stds = (method.blob_prior_std, method.blob_initial_std)
            layer = BlobLinear(base, adapters.rank, settings.scaling, *stds, context, index)
        elif kind == "mean":
            layer = LoRALinear(base, adapters.rank, settings.scaling, context)
        else:
            raise ValueError(f"kind: {kind!r}: no such layers; take mean, gaussian or blob")
        model.set_submodule(name, layer)
        layers[name] = layer
    adapter_set = AdapterSet(layers, context)
    adapter_set.initialise(seed)
    return adapter_set


def remove_adapters(model: nn.Module, adapters: AdapterSet) -> None:
    """Put the frozen layers back where they were."""
    for name, layer in adapters.layers.items():
        model.set_submodule(name, layer.base)
