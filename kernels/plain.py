"""The contract's functions in plain PyTorch as a model runs them: the same numbers, and little kept for the backward.

`reference` keeps some eight tensors of the output's (or the weight's) size for each projection. On a GPU the backward
pass makes them again from x and the factors, the noise included, which is a function of integers, and a projection
keeps x in its own dtype and numbers of the rank's size; the base product W0 x, which costs more than all the rest, is
made outside and never again. What is dense is made a band at a time: of tokens, or of the weight matrix's rows. On a
CPU, where the noise alone costs more than the base product, `closed_form` keeps one dense tensor and no graph.

Shapes as in `reference`, x [T, K], y0 [T, N], mask [T]: the rows of phi's groups one after another, `sizes` of each,
and each group calculated on its own. Phi without a group dimension is one group.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

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


def recomputed(function: Callable, x: Tensor, *arguments):
    """function(x, *arguments), made again in the backward pass, which keeps the tensors among the arguments alone.

    Not on a CPU, which is here where theta asks for a gradient, or under torch.compile. Nothing in it draws from a
    generator. Tensors must be arguments of their own, where an outer checkpoint finds them.
    """
    arguments = (x, *arguments)
    if not on_gpu(x):
        return function(*arguments)
    return checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=False)


def mean_projection(x: Tensor, y0: Tensor, mean: LowRank, scaling: float, sizes: Sequence[int]) -> Tensor:
    """y0 + s B A x in x's dtype: `reference.mean_linear`, bit for bit."""
    own = [mean] if mean.a.dim() == 2 else [LowRank(*pair) for pair in zip(*(_each(f) for f in mean), strict=True)]
    changes = [_mean_change(part, pair, scaling) for part, pair in zip(split(x, sizes), own, strict=True)]
    return add_change(y0, changes[0] if len(changes) == 1 else torch.cat(changes))


def _each(factor: Tensor) -> Sequence[Tensor]:
    """Each group's factor; of one group a view whose derivative is a view as well."""
    return [factor.squeeze(0)] if len(factor) == 1 else factor.unbind()


def _mean_change(x: Tensor, mean: LowRank, scaling: float) -> Tensor:
    if x.dtype == compute_dtype(x):  # x is kept as it is
        return low_rank_product(x, mean, scaling)
    return recomputed(_wide_mean_change, x, *mean, scaling)


def _wide_mean_change(x: Tensor, a: Tensor, b: Tensor, scaling: float) -> Tensor:
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
    sizes: Sequence[int],
) -> Projection:
    """`reference.activation_linear` with the noise named by (key, layer), bit for bit where one band holds a group's
    tokens.

    On a GPU a band of tokens at a time; the sums of KL and -log prior are then taken band by band. On a CPU with
    `closed_form`, which rounds elsewhere.
    """
    on_cpu, found = _in_closed_form(x, theta), []
    masks = [None] * len(sizes) if mask is None else mask.split(sizes)
    of_groups = zip(split(x, sizes), split(y0, sizes), phi.of_groups(), masks, strict=True)
    for group, (own_x, own_y0, own, counted) in enumerate(of_groups):
        if on_cpu:
            noise = standard_normal(len(own_x), own.mean.b.shape[0], key, layer, group, x.device)
            found.append(closed_form.activation_projection(own_x, own_y0, own, theta, settings, noise, counted))
        else:
            found.append(_in_bands(own_x, own_y0, own, theta, (settings, key, layer, group), counted))
    return _side_by_side(found, phi)


def _in_bands(
    x: Tensor,
    y0: Tensor,
    phi: GaussianFactors,
    theta: GaussianFactors | None,
    names: tuple[PosteriorSettings, NoiseKey | Tensor, int, int],
    mask: Tensor | None,
) -> Projection:
    """One group's projection, a band of tokens at a time."""
    sizes = _token_bands(x, phi.mean.b.shape[0]) if on_gpu(x) else [len(x)]
    masks = [None] * len(sizes) if mask is None else mask.split(sizes)
    found, first_row = [], 0
    for part, base, counted in zip(split(x, sizes), split(y0, sizes), masks, strict=True):
        change, *terms = recomputed(_activation_change, part, counted, (*names, first_row), *flat(phi), *flat(theta))
        found.append(Projection(add_change(base, change), *terms))
        first_row += len(part)
    return _together(found, dim=0)


def _in_closed_form(x: Tensor, theta: GaussianFactors | None) -> bool:
    """On a CPU, unless theta is to get a gradient or torch.compile, which fuses the contract itself, is looking."""
    if on_gpu(x) or torch.compiler.is_compiling():
        return False
    return theta is None or not (torch.is_grad_enabled() and any(factor.requires_grad for factor in flat(theta)))


def _side_by_side(groups: list[Projection], phi: GaussianFactors) -> Projection:
    """The projection of all groups, y's one below the other, with a KL and a -log prior of each."""
    if not phi.grouped():
        return groups[0]
    sums = [None if groups[0].kl is None else torch.stack([own[term] for own in groups]) for term in (1, 2)]
    return Projection(groups[0].y if len(groups) == 1 else torch.cat([own.y for own in groups]), *sums)


def _together(parts: list[Projection], dim: int) -> Projection:
    """One group's projection of several parts, whose y stand side by side in `dim`."""
    if len(parts) == 1:
        return parts[0]
    sums = [None, None] if parts[0].kl is None else [torch.stack([one[term] for one in parts]).sum() for term in (1, 2)]
    return Projection(torch.cat([one.y for one in parts], dim), *sums)


def _token_bands(x: Tensor, outputs: int) -> list[int]:
    """Sizes of bands of x's tokens [T, K] whose change [band, N] fits the scratch memory."""
    return [band.stop - band.start for band in bands(len(x), outputs, BAND_BYTES)] or [0]


def split(tensor: Tensor, sizes: Sequence[int]) -> Sequence[Tensor]:
    """Stretches of rows. Split and not sliced: a slice's derivative would be a tensor of the whole size for each."""
    return (tensor,) if len(sizes) == 1 else tensor.split(list(sizes))


def _activation_change(
    x: Tensor, mask: Tensor | None, names: tuple[PosteriorSettings, NoiseKey | Tensor, int, int, int], *factors: Tensor
) -> Sample:
    (settings, key, layer, group, first_row), (phi, theta) = names, paired(factors)
    noise = standard_normal(len(x), phi.mean.b.shape[0], key, layer, group, x.device, first_row)
    return reference.activation_sample(x, phi, theta, settings, noise, mask)


def weight_projection(
    x: Tensor,
    y0: Tensor,
    phi: GaussianFactors,
    theta: GaussianFactors | None,
    settings: PosteriorSettings,
    key: NoiseKey | Tensor,
    layer: int,
    sizes: Sequence[int],
) -> Projection:
    """`reference.weight_linear` with the noise named by (key, layer), a band of rows of the change at a time.

    The sums of KL and -log prior are taken band by band: another order than the reference's. On a CPU with
    `closed_form`.
    """
    on_cpu, found = _in_closed_form(x, theta), []
    for group, (own_x, own_y0, own) in enumerate(zip(split(x, sizes), split(y0, sizes), phi.of_groups(), strict=True)):
        of_bands = []
        for band, rows, other in _row_bands(own, theta):
            size = len(rows.mean.b)
            if on_cpu:
                noise = standard_normal(size, x.shape[-1], key, layer, group, x.device, band.start)
                base = own_y0 if size == y0.shape[-1] else own_y0[:, band]
                of_bands.append(closed_form.weight_projection(own_x, base, rows, other, settings, noise))
            else:
                names = (settings, key, layer, group, band.start)
                of_bands.append(Projection(*recomputed(_weight_change, own_x, names, *flat(rows), *flat(other))))
        projection = _together(of_bands, dim=-1)
        found.append(projection if on_cpu else projection._replace(y=add_change(own_y0, projection.y)))
    return _side_by_side(found, phi)


def _weight_change(
    x: Tensor, names: tuple[PosteriorSettings, NoiseKey | Tensor, int, int, int], *factors: Tensor
) -> Sample:
    (settings, key, layer, group, first_row), (phi, theta) = names, paired(factors)
    noise = standard_normal(phi.mean.b.shape[0], x.shape[-1], key, layer, group, x.device, first_row)
    return reference.weight_sample(x, phi, theta, settings, noise)


def activation_theta_gradient(
    x: Tensor,
    phi: GaussianFactors,
    theta: GaussianFactors,
    settings: PosteriorSettings,
    mask: Tensor | None,
    kl_weight: float,
    prior_weight: float,
    sizes: Sequence[int],
) -> ThetaGradient:
    """`reference.activation_theta_gradient` of each group, a band of tokens at a time."""
    masks = [None] * len(sizes) if mask is None else mask.split(sizes)
    of_groups = []
    for own_x, own, own_mask in zip(split(x, sizes), phi.of_groups(), masks, strict=True):
        bands = _token_bands(own_x, theta.mean.b.shape[0])
        counted = [None] * len(bands) if own_mask is None else own_mask.split(bands)
        found = [
            reference.activation_theta_gradient(part, own, theta, settings, of_part, kl_weight, prior_weight)
            for part, of_part in zip(split(own_x, bands), counted, strict=True)
        ]
        of_groups.append(_joined(found))
    return _stacked(of_groups, phi)


def weight_theta_gradient(
    phi: GaussianFactors,
    theta: GaussianFactors,
    settings: PosteriorSettings,
    kl_weight: float,
    prior_weight: float,
) -> ThetaGradient:
    """`reference.weight_theta_gradient` of each group, a band of rows at a time."""
    of_groups = []
    for own in phi.of_groups():
        found = [
            reference.weight_theta_gradient(rows, other, settings, kl_weight, prior_weight)
            for _, rows, other in _row_bands(own, theta)
        ]
        of_groups.append(_joined(found, by_rows=True))
    return _stacked(of_groups, phi)


def _joined(parts: list[ThetaGradient], by_rows: bool = False) -> ThetaGradient:
    """The sum of all parts of one group; `by_rows`: of parts that hold a band of b's rows each."""
    if len(parts) == 1:
        return parts[0]

    def total(tensors: Sequence[Tensor]) -> Tensor:
        return torch.stack(tensors).sum(dim=0)

    pairs = []
    for of_parts in zip(*(part.gradient for part in parts), strict=True):
        b = [pair.b for pair in of_parts]
        pairs.append(LowRank(total([pair.a for pair in of_parts]), torch.cat(b) if by_rows else total(b)))
    return ThetaGradient(GaussianFactors(*pairs), *(total([part[term] for part in parts]) for term in (1, 2)))


def _stacked(groups: list[ThetaGradient], phi: GaussianFactors) -> ThetaGradient:
    """Each group's gradients and sums, [G, ...]."""
    if not phi.grouped():
        return groups[0]
    factors = [torch.stack(own) for own in zip(*(flat(group.gradient) for group in groups), strict=True)]
    sums = (torch.stack([group[term] for group in groups]) for term in (1, 2))
    return ThetaGradient(GaussianFactors.of_list(factors), *sums)


def _row_bands(
    phi: GaussianFactors, theta: GaussianFactors | None
) -> Iterator[tuple[slice, GaussianFactors, GaussianFactors | None]]:
    """Bands of output units, with one group's factors of phi and theta's."""
    outputs, inputs = phi.mean.b.shape[0], phi.mean.a.shape[1]
    for band in bands(outputs, inputs, BAND_BYTES):
        if band == slice(0, outputs):
            yield band, phi, theta
        else:
            yield band, phi.of_rows(band), None if theta is None else theta.of_rows(band)


def flat(factors: GaussianFactors | None) -> list[Tensor]:
    return [] if factors is None else [factor for pair in factors for factor in pair]


def paired(factors: tuple[Tensor, ...]) -> tuple[GaussianFactors, GaussianFactors | None]:
    """What `flat` made of phi's factors, then theta's."""
    return GaussianFactors.of_list(factors[:4]), GaussianFactors.of_list(factors[4:]) if factors[4:] else None
