"""Small random inputs of a projection, and the harness that holds fused kernels to the plain version.

The tests of fused kernels run in Triton's interpreter where there is no GPU, and compiled where there is one. Those
marked `gpu` are for sizes that the interpreter is too slow for.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from abmll.kernels import (
    FrozenLinear,
    GaussianFactors,
    Groups,
    LowRank,
    NoiseKey,
    PosteriorSettings,
    Projection,
    posterior_projection,
    theta_gradient,
)
from abmll.kernels.backends import interpreted
from abmll.kernels.fused import plans
from abmll.kernels.noise import LANES, WORD, philox

SETTINGS = PosteriorSettings(
    scaling=2.0, log_variance_scaling=1.5, log_variance_offset=-1.0, prior_shape=1.5, prior_rate=0.3
)
KEY = NoiseKey(seed=2**63 + 11, step=2**31 + 5)  # neither fits a signed number
LAYER = 5

FACTORS = tuple(
    f"{side} {statistic} {factor}"
    for side in ("phi", "theta")
    for statistic in ("mean", "log-variance")
    for factor in "ab"
)
LEAVES = ("x", *FACTORS)
EPSILON = torch.finfo(torch.float32).eps


@dataclass
class Inputs:
    x: Tensor
    weight: Tensor
    bias: Tensor | None
    phi: GaussianFactors
    theta: GaussianFactors
    sizes: tuple[int, ...] | None = None  # of groups of unequal size

    @property
    def groups(self) -> Groups | None:
        return None if self.sizes is None else Groups.of(self.sizes, self.x.device)

    @property
    def base(self) -> FrozenLinear:
        return FrozenLinear(self.weight, self.bias)

    @property
    def factors(self) -> list[Tensor]:
        return [factor for side in (self.phi, self.theta) for pair in side for factor in pair]

    def alone(self, group: int) -> Inputs:
        """One of the groups of unequal size, as inputs without groups."""
        own = [factor[group] for factor in self.factors[:4]]
        return replace(self, sizes=None).with_leaves(self.x.split(self.sizes)[group], *own, *self.factors[4:])

    def with_leaves(self, x: Tensor, *factors: Tensor) -> Inputs:
        """The same with other x and factors, in the order of `LEAVES`."""
        pairs = [LowRank(*factors[at : at + 2]) for at in range(0, 8, 2)]
        return replace(self, x=x, phi=GaussianFactors(*pairs[:2]), theta=GaussianFactors(*pairs[2:]))

    def map(self, change: Callable[[Tensor], Tensor]) -> Inputs:
        """The same with every tensor changed."""
        bias = None if self.bias is None else change(self.bias)
        changed = replace(self, weight=change(self.weight), bias=bias)
        return changed.with_leaves(*(change(leaf) for leaf in (self.x, *self.factors)))


@pytest.fixture
def settings() -> PosteriorSettings:
    return SETTINGS


def draw_inputs(
    tokens: int | tuple[int, ...] = 3,
    inputs=4,
    outputs=5,
    rank=2,
    dtype=torch.float64,
    groups: int | None = None,
    size=0.3,
    seed=0,
) -> Inputs:
    """`tokens`: of each of the `groups`, if there are any; several numbers: of groups of unequal size."""
    generator = torch.Generator().manual_seed(seed)
    wide = torch.promote_types(dtype, torch.float32)  # factors are never 16-bit
    sizes = tokens if isinstance(tokens, tuple) else None
    lead = (len(sizes),) if sizes else () if groups is None else (groups,)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def factors(*lead: int) -> GaussianFactors:
        shapes = ((*lead, rank, inputs), (*lead, outputs, rank))
        return GaussianFactors(*(LowRank(*(size * draw(*shape).to(wide) for shape in shapes)) for _ in range(2)))

    x = draw(sum(sizes), inputs) if sizes else draw(*lead, tokens, inputs)
    weight, bias = draw(outputs, inputs), draw(outputs)
    return Inputs(x.to(dtype), weight.to(dtype), bias.to(dtype), factors(*lead), factors(), sizes)


@pytest.fixture
def make_inputs():
    """x [.., T, K], weight [N, K], bias [N] and factors of order one, all different; `groups` gives x and phi a G."""
    return draw_inputs


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where Triton's kernels run: a GPU, or the CPU for its interpreter."""
    return torch.device("cpu" if interpreted() else "cuda")


# y, kl, prior and the gradients to the leaves asked for, by the names in `LEAVES`
Outcome = dict[str, Tensor]


@dataclass(frozen=True)
class Harness:
    """One posterior's projection by either backend, and the comparison of the two."""

    posterior: str
    device: torch.device
    settings: PosteriorSettings = SETTINGS

    # The fused error may be this multiple of the plain one on the same inputs. The plain one may be tiny by chance,
    # above all for a few numbers; so the multiple is taken of the largest of it, of the error of the exact result in
    # the result's dtype, and of what fp32 roundings of the inputs make. The floor is a few roundings of the result.
    MULTIPLE = 2.5
    FLOOR = 4 * EPSILON
    # Products for the factors' gradients take 16 leading bits of either operand where x is 16-bit: an error of at most
    # 2^-16 of an operand, a quarter of that in the mean, and so less than 2^-17 of a sum whose terms do not cancel.
    # Twice that for those that do.
    GRADIENT_FLOOR = 2.0**-16

    def inputs(self, tokens, inputs, outputs, rank=3, dtype=torch.float32, groups=None, seed=0) -> Inputs:
        """Means and log-variances have a standard deviation near 1 whatever the shape."""
        size = (self.settings.scaling**2 * max(inputs, 1) * rank) ** -0.25
        return draw_inputs(tokens, inputs, outputs, rank, dtype, groups, size, seed).map(lambda t: t.to(self.device))

    def mask(self, inputs: Inputs, kind: str | None) -> Tensor | None:
        """`random`: some tokens count; `empty`: none does; None: no mask."""
        if kind is None:
            return None
        generator = torch.Generator().manual_seed(3)
        counted = torch.rand(inputs.x.shape[:-1], generator=generator) < (0.7 if kind == "random" else 0.0)
        return counted.to(self.device)

    def upstream(self, inputs: Inputs, names: Sequence[str] = ("y", "kl", "prior")) -> dict[str, Tensor]:
        """Gradients of a loss by the outputs that it is made of; exact in every dtype."""
        generator = torch.Generator().manual_seed(7)
        shape = (*inputs.x.shape[:-1], inputs.weight.shape[0])
        dy = torch.randn(shape, generator=generator).to(inputs.x.dtype).to(self.device)
        lead = inputs.phi.mean.a.shape[:-2]
        each = 1 + torch.arange(lead.numel(), dtype=torch.float32, device=self.device).view(lead) / 4
        sums = {"kl": 0.75 * each, "prior": 0.25 * each}
        return {name: dy if name == "y" else sums[name] for name in names}

    def project(
        self, inputs: Inputs, backend="triton", mask=None, terms="divergence", key=KEY, layer=LAYER, groups=None
    ) -> Projection:
        arguments = (inputs.x, inputs.base, inputs.phi, inputs.theta, self.settings, key, layer)
        return posterior_projection(self.posterior, *arguments, mask, terms, backend, groups or inputs.groups)

    def run(
        self,
        inputs: Inputs,
        backend="triton",
        mask: Tensor | None = None,
        upstream: dict[str, Tensor] | None = None,
        wanted: Sequence[str] = LEAVES,
        terms="divergence",
        key=KEY,
        context=nullcontext(),  # noqa: B008
    ) -> Outcome:
        """Outputs, and the gradients of the leaves `wanted`; a leaf without a path to the loss has zeros.

        The forward pass runs in `context`.
        """
        upstream = self.upstream(inputs) if upstream is None else upstream
        leaves = {
            name: leaf.detach().requires_grad_(name in wanted)
            for name, leaf in zip(LEAVES, (inputs.x, *inputs.factors), strict=True)
        }
        with context:
            projection = self.project(inputs.with_leaves(*leaves.values()), backend, mask, terms, key)
        outputs = {"y": projection.y, "kl": projection.kl, "prior": projection.negative_log_prior}
        outputs = {name: output for name, output in outputs.items() if output is not None}
        found = {name: output.detach() for name, output in outputs.items()}
        sources = [leaves[name] for name in wanted]
        reached = [name for name in upstream if outputs[name].requires_grad]
        gradients = [torch.zeros_like(source) for source in sources]
        if sources and reached:
            # of sums of several groups expanded, as the gradient of their total is
            weights = [upstream[name].to(outputs[name].dtype).expand(outputs[name].shape) for name in reached]
            gradients = torch.autograd.grad(
                [outputs[name] for name in reached], sources, weights, allow_unused=True, materialize_grads=True
            )
        found |= dict(zip(wanted, gradients, strict=True))
        return found

    def theta(self, inputs: Inputs, backend="triton", mask=None, projection=None) -> Outcome:
        """Theta's local gradient and the two sums."""
        arguments = (inputs.x, inputs.phi, inputs.theta, self.settings, 0.75, 0.25, mask, projection, backend)
        gradient, kl, prior = theta_gradient(self.posterior, *arguments, inputs.groups)
        factors = [factor for pair in gradient for factor in pair]
        return {"kl": kl, "prior": prior, **dict(zip(FACTORS[4:], factors, strict=True))}

    def check(self, inputs: Inputs, mask: Tensor | None = None, **how) -> Outcome:
        """Parity of a run on these inputs; returns the fused outcome."""
        upstream = how.pop("upstream", None) or self.upstream(inputs)
        fused, plain = (self.run(inputs, backend, mask, upstream, **how) for backend in ("triton", "torch"))
        self.compare(fused, plain, *self.exact(inputs, mask, upstream, **how))
        return fused

    def exact(self, inputs: Inputs, mask: Tensor | None, upstream: dict[str, Tensor], **how) -> list[Outcome]:
        """In float64: the outcome, and those that roundings of inputs and upstream gradients make of it."""
        wide = {name: value.double() for name, value in upstream.items()}
        with patch("abmll.kernels.plain.standard_normal", exact_normal):
            found = [self.run(made, "torch", mask, wide, **how) for made in widened(inputs)]
            if self.posterior == "weight" and inputs.x.dtype == torch.bfloat16 and "y" in wide:
                # dy^T x is rounded to bf16, as dy was: what another rounding of dy makes of phi's gradients
                again = wide | {"y": shaken(wide["y"], torch.finfo(torch.bfloat16).eps)}
                rounded = self.run(inputs.map(Tensor.double), "torch", mask, again, **how)
                found.append(found[0] | {name: rounded[name] for name in FACTORS[:4] if name in rounded})
        return found

    def check_theta(self, inputs: Inputs, mask: Tensor | None = None, projection=None) -> None:
        fused = self.theta(inputs, "triton", mask, projection)
        assert not any(value.requires_grad for value in fused.values())
        plain = self.theta(inputs, "torch", mask)
        self.compare(fused, plain, *(self.theta(made, "torch", mask) for made in widened(inputs)), dtype=inputs.x.dtype)

    def compare(self, fused: Outcome, plain: Outcome, exact: Outcome, *shaken: Outcome, dtype=None) -> None:
        """Shapes and dtypes as the plain version's, and errors against float64 as small; `dtype`: x's, without y."""
        assert fused.keys() == plain.keys() == exact.keys()
        dtype = plain["y"].dtype if "y" in plain else dtype
        narrow = dtype is not None and dtype.itemsize == 2
        for name, value in fused.items():
            assert value.dtype == plain[name].dtype and value.shape == plain[name].shape, name
            if not exact[name].any():
                assert not value.any(), f"{name}: not exactly zero"
                continue
            others = plain[name], exact[name].to(value.dtype), *(outcome[name] for outcome in shaken)
            floor = self.GRADIENT_FLOOR if narrow and name in FACTORS else self.FLOOR
            allowed = self.MULTIPLE * max(relative(other, exact[name]) for other in others) + floor
            found = relative(value, exact[name])
            assert found <= allowed, f"{name}: relative error {found:.2e}, allowed {allowed:.2e}"


def widened(inputs: Inputs) -> list[Inputs]:
    """In float64: the inputs as they are, and three times with roundings to fp32 as any fp32 arithmetic makes."""
    generator = torch.Generator().manual_seed(5)
    return [inputs.map(Tensor.double), *(inputs.map(lambda t: shaken(t, EPSILON, generator)) for _ in range(3))]


def shaken(tensor: Tensor, size: float, generator: torch.Generator | None = None) -> Tensor:
    """In float64, with relative errors of up to `size`."""
    generator = generator or torch.Generator().manual_seed(6)
    rounding = size * (2 * torch.rand(tensor.shape, generator=generator, dtype=torch.float64) - 1)
    return tensor.double() * (1 + rounding.to(tensor.device))


def exact_normal(rows, columns, key, layer, group=0, device="cpu", first_row=0) -> Tensor:
    """`standard_normal` in float64 (the plain version's noise has an error of its own), from a row on."""
    lanes = []
    for radius, angle in _polar(rows, columns, key, layer, group, device, first_row):
        lanes += [radius * angle.cos(), radius * angle.sin()]
    return torch.stack(lanes, dim=-1).view(rows, -(-columns // LANES) * LANES)[:, :columns]


def noise_bound(rows, columns, key, layer, group=0, device="cpu", first_row=0) -> Tensor:
    """Largest error of each of the kernels' normals. A GPU's own functions are rough by the PTX manual: sine and cosine
    2^-20.5, the logarithm 2^-22, near 1 beside results near zero, of which the root makes more.
    """
    if interpreted():
        return torch.full((rows, columns), 2e-6, dtype=torch.float64)
    bounds = []
    for radius, _ in _polar(rows, columns, key, layer, group, device, first_row):
        of_square = 2.0**-22 * (2 * math.log(2) + radius.square()) + 2.0**-23 * radius.square()
        of_radius = torch.minimum(of_square.sqrt(), of_square / radius.clamp_min(1e-30))
        bounds += [of_radius + radius * (2.0**-20.5 + 2.0**-21)] * 2  # the angle's own rounding: 2^-22 near pi
    return torch.stack(bounds, dim=-1).view(rows, -(-columns // LANES) * LANES)[:, :columns] + 1e-7


def _polar(rows, columns, key, layer, group, device, first_row) -> list[tuple[Tensor, Tensor]]:
    """Radius and angle of both pairs of lanes, [rows x quads] each."""
    quads = -(-columns // LANES)
    quad = torch.arange(first_row * quads, (first_row + rows) * quads, device=device)
    seed, step, group = key[group].tolist() if isinstance(key, Tensor) else (key.seed, key.step, group)
    words = philox((quad, group, step, layer), (seed & WORD, seed >> 32 & WORD))
    return [
        (
            (-2 * (((radius_word >> 8) + 1).double() / 2**24).log()).sqrt(),
            (angle_word >> 8).double() * (2 * math.pi / 2**24),
        )
        for radius_word, angle_word in (words[:2], words[2:])
    ]


@pytest.fixture(name="exact_normal", scope="session")
def exact_normal_fixture():
    return exact_normal


def relative(value: Tensor, exact: Tensor) -> float:
    return float((value.double() - exact).norm() / exact.norm())


@pytest.fixture(scope="session", params=["activation", "weight"])
def harness(request, device) -> Harness:
    """Of both posteriors."""
    return Harness(request.param, device)


@pytest.fixture(scope="session")
def activation(device) -> Harness:
    """Of the activation posterior, for what is its own."""
    return Harness("activation", device)


@pytest.fixture
def poison():
    """torch.empty is filled with NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory and torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def fresh_plans():
    """Of configurations that a test changes nothing is remembered."""
    plans.forget()
    yield
    plans.forget()


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a GPU")
