"""The contract's functions in plain PyTorch as a model runs them: the same numbers, and little kept for the backward.

`reference` keeps some eight tensors of the output's (or the weight's) size for each projection. On a GPU the backward
pass makes them again from x and the factors, the noise included, which is a function of integers, and a projection
keeps x in its own dtype and numbers of the rank's size; the base product W0 x, which costs more than all the rest, is
made outside and never again. What is dense is made a band at a time: of tokens, or of the weight matrix's rows. On a
CPU, where the noise alone costs more than the base product, `closed_form` keeps one dense tensor and no graph.

Shapes as in `reference`, with a group dimension throughout: x [G, T, K], y0 [G, T, N], mask [G, T].
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from abmll.kernels import closed_form, reference
from abmll.kernels.backends import on_gpu
from abmll.kernels.bands import bands
from abmll.kernels.noise import NoiseKey, standard_normal
from abmll.kernels.reference import (
    GaussianFactors,
    LowRank,
    PosteriorSettings,
    Projection,
    Sample,
    ThetaGradient,
    add_change,
    compute_dtype,
    low_rank_product,
)

# Bytes an element of a band: four fp32 tensors' worth, which makes a band a quarter of the scratch memory. A dozen
# such tensors live at a time in a band's backward pass.
BAND_BYTES = 4 * torch.float32.itemsize


def _recomputed(function: Callable, x: Tensor, *arguments):
    """function(x, *arguments), made again in the backward pass, which keeps the tensors among the arguments alone.

    Not on a CPU, which is here where theta asks for a gradient, or under torch.compile. Nothing in it draws from a
    generator. Tensors must be arguments of their own, where an outer checkpoint finds them.
    """
    arguments = (x, *arguments)
    if not on_gpu(x):
        return function(*arguments)
    return checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=False)


def mean_projection(x: Tensor, y0: Tensor, mean: LowRank, scaling: float) -> Tensor:
    """y0 + s B A x in x's dtype: `reference.mean_linear`, bit for bit."""
    if x.dtype == compute_dtype(x):  # x is kept as it is
        return add_change(y0, low_rank_product(x, mean, scaling))
    return add_change(y0, _recomputed(_mean_change, x, *mean, scaling))


def _mean_change(x: Tensor, a: Tensor, b: Tensor, scaling: float) -> Tensor:
    return low_rank_product(x.to(compute_dtype(x)), LowRank(a, b), scaling)


def activation_projection(
    x: Tensor,
    y0: Tensor,
    phi: GaussianFactors,
    theta: GaussianFactors | None,
    settings: PosteriorSettings,
    key: NoiseKey | Tensor,
    layer: int,
    mask: Tensor | None,
) -> Projection:
    """`reference.activation_linear` with the noise named by (key, layer), bit for bit where one band holds all tokens.

    On a GPU a band of tokens at a time; the sums of KL and -log prior are then taken band by band. On a CPU with
    `closed_form`, which rounds elsewhere.
    """
    if _in_closed_form(x, theta):
        masks = [None] * len(x) if mask is None else mask.unbind()
        found = []
        for group, (own_x, own_y0, counted) in enumerate(zip(_unbound(x), _unbound(y0), masks, strict=True)):
            own = _own(phi, group)
            noise = standard_normal(len(own_x), own.mean.b.shape[0], key, layer, group, x.device)
            arguments = (own_x, own_y0, own, theta, settings, noise, counted)
            found.append(closed_form.activation_projection(*arguments))
        return _together([one._replace(y=one.y.unsqueeze(0)) for one in found], dim=0)
    sizes = _token_bands(x, phi.mean.b.shape[-2]) if on_gpu(x) else [x.shape[1]]
    masks = [None] * len(sizes) if mask is None else mask.split(sizes, dim=1)
    found, first_row = [], 0
    # split and not sliced: a slice's derivative would be a tensor of the whole size for each band
    for part, base, counted in zip(_split(x, sizes), _split(y0, sizes), masks, strict=True):
        names = (settings, key, layer, first_row)
        change, *terms = _recomputed(_activation_change, part, counted, names, *_flat(phi), *_flat(theta))
        found.append(Projection(add_change(base, change), *terms))
        first_row += part.shape[1]
    return _together(found, dim=1)


def _in_closed_form(x: Tensor, theta: GaussianFactors | None) -> bool:
    """On a CPU, unless theta is to get a gradient or torch.compile, which fuses the contract itself, is looking."""
    if on_gpu(x) or torch.compiler.is_compiling():
        return False
    return theta is None or not (torch.is_grad_enabled() and any(factor.requires_grad for factor in _flat(theta)))


def _unbound(tensor: Tensor) -> tuple[Tensor, ...]:
    """A tensor for each group; of one group a view whose derivative is a view as well."""
    return (tensor.squeeze(0),) if len(tensor) == 1 else tensor.unbind()


def _together(parts: list[Projection], dim: int) -> Projection:
    """One projection of several, whose y stand side by side in `dim`."""
    if len(parts) == 1:
        return parts[0]
    sums = [None, None] if parts[0].kl is None else [torch.stack([one[term] for one in parts]).sum() for term in (1, 2)]
    return Projection(torch.cat([one.y for one in parts], dim), *sums)


def _token_bands(x: Tensor, outputs: int) -> list[int]:
    """Sizes of bands of x's tokens [G, T, K] whose change [G, band, N] fits the scratch memory."""
    return [band.stop - band.start for band in bands(x.shape[1], x.shape[0] * outputs, BAND_BYTES)] or [0]


def _split(tensor: Tensor, sizes: list[int]) -> tuple[Tensor, ...]:
    return (tensor,) if len(sizes) == 1 else tensor.split(sizes, dim=1)


def _activation_change(
    x: Tensor, mask: Tensor | None, names: tuple[PosteriorSettings, NoiseKey | Tensor, int, int], *factors: Tensor
) -> Sample:
    (settings, key, layer, first_row), (phi, theta) = names, _paired(factors)
    size = (x.shape[1], phi.mean.b.shape[-2])
    noise = [standard_normal(*size, key, layer, group, x.device, first_row) for group in range(x.shape[0])]
    noise = noise[0].unsqueeze(0) if len(noise) == 1 else torch.stack(noise)
    return reference.activation_sample(x, phi, theta, settings, noise, mask)


def weight_projection(
    x: Tensor,
    y0: Tensor,
    phi: GaussianFactors,
    theta: GaussianFactors | None,
    settings: PosteriorSettings,
    key: NoiseKey | Tensor,
    layer: int,
) -> Projection:
    """`reference.weight_linear` with the noise named by (key, layer), a band of rows of the change at a time.

    One group after the other. The sums of KL and -log prior are taken band by band: another order than the reference's.
    On a CPU with `closed_form`.
    """
    if _in_closed_form(x, theta):
        found = []
        for group, (own_x, own_y0) in enumerate(zip(_unbound(x), _unbound(y0), strict=True)):
            of_bands = []
            for band, own, other in _row_bands(phi, theta, group):
                noise = standard_normal(len(own.mean.b), x.shape[-1], key, layer, group, x.device, band.start)
                base = own_y0 if len(own.mean.b) == own_y0.shape[-1] else own_y0[:, band]
                of_bands.append(closed_form.weight_projection(own_x, base, own, other, settings, noise))
            found.append(_together(of_bands, dim=-1))
        return _together([one._replace(y=one.y.unsqueeze(0)) for one in found], dim=0)
    changes, sums = [], []
    for group in range(x.shape[0]):
        found = []
        for band, own, other in _row_bands(phi, theta, group):
            names = (settings, key, layer, group, band.start)
            found.append(_recomputed(_weight_change, x[group], names, *_flat(own), *_flat(other)))
        changes.append(torch.cat([sample.change for sample in found], dim=-1))
        sums += [torch.stack(sample[1:]) for sample in found if sample.kl is not None]
    y = add_change(y0, torch.stack(changes))
    return Projection(y, *(torch.stack(sums).sum(dim=0).unbind() if sums else (None, None)))


def _weight_change(
    x: Tensor, names: tuple[PosteriorSettings, NoiseKey | Tensor, int, int, int], *factors: Tensor
) -> Sample:
    (settings, key, layer, group, first_row), (phi, theta) = names, _paired(factors)
    noise = standard_normal(phi.mean.b.shape[-2], x.shape[-1], key, layer, group, x.device, first_row)
    return reference.weight_sample(x, phi, theta, settings, noise)


def activation_theta_gradient(
    x: Tensor,
    phi: GaussianFactors,
    theta: GaussianFactors,
    settings: PosteriorSettings,
    mask: Tensor | None,
    kl_weight: float,
    prior_weight: float,
) -> ThetaGradient:
    """`reference.activation_theta_gradient`, a band of tokens at a time."""
    found = []
    sizes = _token_bands(x, theta.mean.b.shape[-2])
    masks = [None] * len(sizes) if mask is None else mask.split(sizes, dim=1)
    for part, counted in zip(_split(x, sizes), masks, strict=True):
        arguments = (part, phi, theta, settings, counted, kl_weight, prior_weight)
        found.append(reference.activation_theta_gradient(*arguments))
    return _joined(found)


def weight_theta_gradient(
    phi: GaussianFactors,
    theta: GaussianFactors,
    settings: PosteriorSettings,
    kl_weight: float,
    prior_weight: float,
) -> ThetaGradient:
    """`reference.weight_theta_gradient`, a group and a band of rows at a time."""
    of_groups = []
    for group in range(phi.mean.a.shape[0] if phi.mean.a.dim() == 3 else 1):
        found = [
            reference.weight_theta_gradient(own, other, settings, kl_weight, prior_weight)
            for _, own, other in _row_bands(phi, theta, group)
        ]
        of_groups.append(_joined(found, by_rows=True))
    return _joined(of_groups)


def _joined(parts: list[ThetaGradient], by_rows: bool = False) -> ThetaGradient:
    """The sum of all parts; `by_rows`: of parts that hold a band of b's rows each."""

    def total(tensors: list[Tensor]) -> Tensor:
        return torch.stack(tensors).sum(dim=0)

    pairs = []
    for of_parts in zip(*(part.gradient for part in parts), strict=True):
        b = [pair.b for pair in of_parts]
        pairs.append(LowRank(total([pair.a for pair in of_parts]), torch.cat(b) if by_rows else total(b)))
    return ThetaGradient(GaussianFactors(*pairs), *(total([part[term] for part in parts]) for term in (1, 2)))


def _row_bands(
    phi: GaussianFactors, theta: GaussianFactors | None, group: int
) -> Iterator[tuple[slice, GaussianFactors, GaussianFactors | None]]:
    """Bands of output units, with one group's factors of phi and theta's."""
    own = _own(phi, group)
    for band in bands(own.mean.b.shape[0], own.mean.a.shape[1], BAND_BYTES):
        yield band, own.of_rows(band), None if theta is None else theta.of_rows(band)


def _own(phi: GaussianFactors, group: int) -> GaussianFactors:
    return phi.of_group(group) if phi.mean.a.dim() == 3 else phi


def _flat(factors: GaussianFactors | None) -> list[Tensor]:
    return [] if factors is None else [factor for pair in factors for factor in pair]


def _paired(factors: tuple[Tensor, ...]) -> tuple[GaussianFactors, GaussianFactors | None]:
    """What `_flat` made of phi's factors, then theta's."""
    pairs = [LowRank(*factors[at : at + 2]) for at in range(0, len(factors), 2)]
    return GaussianFactors(*pairs[:2]), GaussianFactors(*pairs[2:]) if pairs[2:] else None
