"""What a call refuses: arguments that do not fit each other, each told with its name, its value and a remedy.

A model makes the same few calls again and again, and on a GPU the checks of one take longer than a kernel. So they
are a function of shapes, dtypes and devices alone, and what was found good is remembered.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from abmll.kernels.backends import Posterior
from abmll.kernels.groups import Groups
from abmll.kernels.noise import check_noise_size
from abmll.kernels.reference import GaussianFactors

# What will be asked about theta: nothing; the sums of KL and -log prior, with their derivatives; or, after the
# projection, its local gradient.
Terms = Literal["none", "divergence", "theta"]

# Of different calls: every length of a batch times every kind of layer, and some room.
REMEMBERED = 8192


class Kind(NamedTuple):
    """All that a check asks of a tensor."""

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device


Kinds = tuple[Kind | None, ...]


def check_projection(
    posterior: Posterior,
    terms: Terms,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    product: Tensor | None,
    mask: Tensor | None,
    names: Tensor | None,
    factors: tuple[Tensor, ...],
    ragged: bool = False,
) -> None:
    """ValueError where the arguments of a projection do not fit. `names`: rows of noise keys, if they are given.

    `ragged`: the groups' rows are told apart by `Groups`, and not by x's first dimension.
    """
    _once(_check_projection, posterior, (terms, ragged), x, weight, bias, product, mask, names, *factors)


def check_groups(groups: Groups | None, x: Tensor, factors: tuple[Tensor, ...]) -> None:
    """ValueError where groups do not fit x [..., K] and the first of phi's factors. Not remembered: sizes vary."""
    if groups is None:
        return
    number = factors[0].shape[0] if factors[0].dim() == 3 else 1
    rows = x.shape[:-1].numel()
    if len(groups) != number or groups.total != rows:
        raise ValueError(
            f"groups: {len(groups)} of {groups.total} rows: x has {rows} rows and phi's factors {number} groups; make "
            "them by Groups.of"
        )


def check_theta_gradient(
    posterior: Posterior,
    x: Tensor | None,
    mask: Tensor | None,
    dtype: torch.dtype,
    factors: tuple[Tensor, ...],
    ragged: bool = False,
) -> None:
    """ValueError where the arguments of theta's gradient do not fit; the factors must be in `dtype`."""
    _once(_check_theta_gradient, posterior, (dtype, ragged), x, mask, *factors)


def factors_of(phi: GaussianFactors, theta: GaussianFactors) -> tuple[Tensor, ...]:
    """Mean a, b, log-variance a, b of phi, then of theta."""
    return (*phi.mean, *phi.log_variance, *theta.mean, *theta.log_variance)


def _once(check: Callable, first: object, second: object, *tensors: Tensor | None) -> None:
    # plain tuples: naming their parts takes as long as all the rest
    kinds = tuple([None if t is None else (t.shape, t.dtype, t.device) for t in tensors])
    if torch.compiler.is_compiling():  # once anyway, while the graph is made; its sizes may be symbols
        check(first, second, kinds)
    else:
        _remembered(check, first, second, kinds)


@lru_cache(REMEMBERED)
def _remembered(check: Callable, first: object, second: object, kinds: tuple) -> None:
    check(first, second, kinds)


def _named(kinds: tuple) -> list[Kind | None]:
    return [None if kind is None else Kind(*kind) for kind in kinds]


def _check_projection(posterior: Posterior, how: tuple[Terms, bool], kinds: tuple) -> None:
    terms, ragged = how
    x, weight, bias, product, mask, names, *factors = _named(kinds)
    _check_choice("posterior", posterior, Posterior)
    _check_choice("terms", terms, Terms)
    rows, columns = (factors[1].shape[-2], factors[0].shape[-1]) if weight is None else weight.shape
    if weight is None:
        _check_product(x, product, rows)
    _check_input(x, columns, factors, mask, ragged)
    if weight is not None:
        _check_layer(x, weight, bias)
    _check_factors(factors, rows, columns, torch.promote_types(x.dtype, torch.float32))
    groups = factors[0].shape[0] if len(factors[0].shape) == 3 else 1
    if names is not None:
        _check_names(names, groups, x)
    check_noise_size(*((x.shape[:-1].numel() // groups, rows) if posterior == "activation" else (rows, columns)))


def _check_theta_gradient(posterior: Posterior, how: tuple[torch.dtype, bool], kinds: tuple) -> None:
    dtype, ragged = how
    x, mask, *factors = _named(kinds)
    _check_choice("posterior", posterior, Posterior)
    rows, columns = factors[1].shape[-2], factors[0].shape[-1]
    if posterior == "activation":
        _check_input(x, columns, factors, mask, ragged)
    _check_factors(factors, rows, columns, dtype)


def _check_choice(name: str, value: str, choices: object) -> None:
    if value not in get_args(choices):
        raise ValueError(f"{name}: {value!r}: must be one of {', '.join(get_args(choices))}")


def _check_product(x: Kind, product: Kind, rows: int) -> None:
    shape = (*x.shape[:-1], rows)
    if product.shape != shape or product.dtype != x.dtype or product.device != x.device:
        raise ValueError(
            f"base: {product.dtype} {tuple(product.shape)} on {product.device}: the product of this x and a layer for "
            f"these factors is {x.dtype} {shape} on {x.device}; pass FrozenLinear(weight, bias) for a layer itself"
        )


def _check_layer(x: Kind, weight: Kind, bias: Kind | None) -> None:
    if x.dtype != weight.dtype:
        raise ValueError(f"x: dtype {x.dtype}: the weight is {weight.dtype}; convert one, or run under torch.autocast")
    if weight.shape[0] == 0 or weight.device != x.device:
        raise ValueError(f"weight: {tuple(weight.shape)} on {weight.device}: must have rows, and be on {x.device}")
    if bias is not None and (bias.shape != weight.shape[:1] or bias.dtype != weight.dtype):
        expected = f"{weight.dtype} ({weight.shape[0]},)"
        raise ValueError(f"bias: {bias.dtype} {tuple(bias.shape)}: must be {expected}, as the weight is")


def _check_input(x: Kind | None, columns: int, factors: list[Kind], mask: Kind | None, ragged: bool) -> None:
    if x is None:
        raise ValueError("x: None: the activation posterior's divergence depends on the layer's input")
    if len(x.shape) < 2 or x.shape[-1] != columns:
        raise ValueError(f"x: shape {tuple(x.shape)}: must be [tokens, {columns}]: the weight has {columns} columns")
    groups = factors[0].shape[:-2]
    whose = ragged or groups == (1,)  # of one group all rows are
    if groups and not whose and (len(groups) > 1 or len(x.shape) < 3 or x.shape[0] != groups[0]):
        raise ValueError(
            f"x: shape {tuple(x.shape)}: must be [{groups[0]}, tokens, {columns}], as phi has groups; or say "
            "by `groups` which rows are whose"
        )
    if 0 in groups or columns == 0:
        raise ValueError(f"x: shape {tuple(x.shape)}: at least one group and one column")
    if mask is not None and mask.shape != x.shape[:-1]:
        shape = tuple(x.shape[:-1])
        raise ValueError(f"token_mask: shape {tuple(mask.shape)}: must be x's without the last, {shape}")
    if mask is not None and mask.dtype != torch.bool:
        raise ValueError(f"token_mask: dtype {mask.dtype}: must be torch.bool; a token counts or does not")
    for name, tensor in {"token_mask": mask, "phi": factors[0]}.items():
        if tensor is not None and tensor.device != x.device:
            raise ValueError(f"{name}: on {tensor.device}: x is on {x.device}; move one to the other's device")


def _check_names(names: Kind, groups: int, x: Kind) -> None:
    if names.shape != (groups, 3) or names.dtype != torch.int64 or names.device != x.device:
        raise ValueError(
            f"key: {names.dtype} {tuple(names.shape)} on {names.device}: rows of noise keys must be int64 "
            f"({groups}, 3) on {x.device}; make them by NoiseKey.rows"
        )


def _check_factors(factors: list[Kind], rows: int, columns: int, dtype: torch.dtype) -> None:
    first = factors[0]
    rank, lead = first.shape[-2], first.shape[:-2]
    pairs = {"phi mean": lead, "phi log_variance": lead, "theta mean": (), "theta log_variance": ()}
    for (name, groups), a, b in zip(pairs.items(), factors[0::2], factors[1::2], strict=True):
        if a.shape != (*groups, rank, columns) or b.shape != (*groups, rows, rank):
            raise ValueError(
                f"{name}: a {tuple(a.shape)}, b {tuple(b.shape)}: for a weight {rows} x {columns} "
                f"and rank {rank} they must be {(*groups, rank, columns)} and {(*groups, rows, rank)}"
            )
        if a.device != first.device or b.device != first.device:
            raise ValueError(f"{name}: on {a.device}, {b.device}: must be on {first.device}")
        if a.dtype != dtype or b.dtype != dtype:
            raise ValueError(
                f"{name}: a {a.dtype}, b {b.dtype}: low-rank arithmetic is done in {dtype} here; "
                "keep the factors in it when the model is converted"
            )
