"""What the kernel benchmark runs on: projection shapes of two models, and random inputs of one projection."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from abmll.kernels import GaussianFactors, LowRank, PosteriorSettings
from abmll.kernels.reference import compute_dtype

ALPHA = 16.0
PADDED_PART = 8  # one token of so many is padding
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


class Shape(NamedTuple):
    """A frozen weight [outputs, inputs], and whether it has a bias."""

    name: str
    outputs: int
    inputs: int
    bias: bool = False


LLAMA_Q = Shape("Llama3-8B Q, O", 4096, 4096)
LLAMA_KV = Shape("Llama3-8B K/V", 1024, 4096)
LLAMA_UP = Shape("Llama3-8B gate/up", 14336, 4096)
SHAPES = (
    LLAMA_Q,
    LLAMA_KV,
    LLAMA_UP,
    Shape("Llama3-8B down", 4096, 14336),
    Shape("Qwen2-7B Q", 3584, 3584, bias=True),
    Shape("Qwen2-7B K/V", 512, 3584, bias=True),
    Shape("Qwen2-7B O", 3584, 3584),
    Shape("Qwen2-7B gate/up", 18944, 3584),
    Shape("Qwen2-7B down", 3584, 18944),
)


class Configuration(NamedTuple):
    """One point of the benchmark; tokens are those of one group, dtype by its name in DTYPES."""

    posterior: str
    shape: Shape
    rank: int
    tokens: int
    dtype: str
    groups: int = 1

    def __str__(self) -> str:
        groups = "" if self.groups == 1 else f"{self.groups} groups of "
        return f"{self.shape.name}, r = {self.rank}, {groups}{self.tokens:,} tokens, {self.dtype}"

    @property
    def columns(self) -> dict[str, object]:
        """What names the configuration in a row; tokens are a group's."""
        return {
            "posterior": self.posterior,
            "shape": self.shape.name,
            "N": self.shape.outputs,
            "K": self.shape.inputs,
            "bias": self.shape.bias,
            "rank": self.rank,
            "groups": self.groups,
            "tokens": self.tokens,
            "tokens_real": self.tokens - self.tokens // PADDED_PART,
            "dtype": self.dtype,
        }


class Regime(NamedTuple):
    """Sizes of the numbers. `b`: of theta's B; `step_a`, `step_b`: phi's distance from theta (step_a over A's size)."""

    name: str
    log_variance_offset: float
    prior_shape: float
    prior_rate: float
    b: float
    step_a: float
    step_b: float
    dy: float
    kl_weight: float
    prior_weight: float


# Every part of every result is of the same order: a fault in any of them shows, in 16-bit outputs too.
ORDER_ONE = Regime("order one", -1.0, 1.5, 0.3, b=0.1, step_a=0.5, step_b=0.1, dy=1.0, kl_weight=0.5, prior_weight=0.2)
# The published settings, five steps of 1e-5 away from theta: exp(20) stands before small differences.
TRAINING = Regime(
    "training", -20.0, 1.0, 0.01, b=0.01, step_a=5e-3, step_b=5e-5, dy=1e-3, kl_weight=1e-8, prior_weight=1e-8 / 45
)


@dataclass(frozen=True)
class Inputs:
    """One projection's inputs: x [T, K], dy [T, N] (the gradient of y), the rest as in `posterior_projection`. Several
    groups: x [G, T, K], dy [G, T, N], phi's factors and the mask with a G as well.
    """

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    phi: GaussianFactors
    theta: GaussianFactors
    settings: PosteriorSettings
    mask: Tensor
    dy: Tensor
    kl_weight: float
    prior_weight: float

    @property
    def groups(self) -> int:
        return self.x.shape[0] if self.x.dim() == 3 else 1

    @property
    def sources(self) -> tuple[Tensor, ...]:
        """What the inner loop needs gradients of: x and phi."""
        return (self.x, *(factor for pair in self.phi for factor in pair))

    @property
    def cotangents(self) -> tuple[Tensor, Tensor]:
        """Gradients of y and of the KL, each group's."""
        lead = self.x.shape[:-2]
        return self.dy, torch.full(lead, self.kl_weight, dtype=compute_dtype(self.x), device=self.x.device)

    def upcast(self) -> Inputs:
        """The same numbers in float64."""

        def factors(side: GaussianFactors) -> GaussianFactors:
            return GaussianFactors(*(LowRank(*(_leaf(f.double(), f.requires_grad) for f in pair)) for pair in side))

        return Inputs(
            _leaf(self.x.double(), self.x.requires_grad),
            self.weight.double(),
            None if self.bias is None else self.bias.double(),
            factors(self.phi),
            factors(self.theta),
            self.settings,
            self.mask,
            self.dy.double(),
            self.kl_weight,
            self.prior_weight,
        )


def _leaf(value: Tensor, requires_grad: bool = True) -> Tensor:
    return value.detach().requires_grad_(requires_grad)


def make_inputs(configuration: Configuration, regime: Regime, device: torch.device) -> Inputs:
    """Fresh numbers for every configuration and regime, the same in every run."""
    seed = zlib.crc32(repr((configuration, regime.name)).encode())
    generator = torch.Generator(device).manual_seed(seed)
    shape, rank, tokens = configuration.shape, configuration.rank, configuration.tokens
    lead = () if configuration.groups == 1 else (configuration.groups,)
    dtype = DTYPES[configuration.dtype]
    a_size = (3 * shape.inputs) ** -0.5  # a Kaiming-uniform A's standard deviation

    def draw(*sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=generator, device=device)

    def near(center: GaussianFactors | None, a: float, b: float) -> GaussianFactors:
        """Theta, or, around a center, phi."""
        pairs, own = [], () if center is None else lead
        for index in range(2):
            pair = LowRank(a * draw(*own, rank, shape.inputs), b * draw(*own, shape.outputs, rank))
            if center is not None:
                pair = LowRank(*(_leaf(old + new) for old, new in zip(center[index], pair, strict=True)))
            pairs.append(pair)
        return GaussianFactors(*pairs)

    theta = near(None, a_size, regime.b)
    scaling = ALPHA / rank
    settings = PosteriorSettings(scaling, scaling, regime.log_variance_offset, regime.prior_shape, regime.prior_rate)
    return Inputs(
        x=_leaf(draw(*lead, tokens, shape.inputs).to(dtype)),
        weight=(shape.inputs**-0.5 * draw(shape.outputs, shape.inputs)).to(dtype),
        bias=draw(shape.outputs).to(dtype) if shape.bias else None,
        phi=near(theta, regime.step_a * a_size, regime.step_b),
        theta=theta,
        settings=settings,
        mask=(torch.arange(tokens, device=device) < tokens - tokens // PADDED_PART).expand(*lead, tokens),
        dy=(regime.dy * draw(*lead, tokens, shape.outputs)).to(dtype),
        kl_weight=regime.kl_weight,
        prior_weight=regime.prior_weight,
    )
