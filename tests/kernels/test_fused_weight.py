"""What the weight posterior alone promises: bands of bounded size, one draw a group, exactness at tiny variances."""

from __future__ import annotations

import weakref

import pytest
import torch

from abmll.kernels import (
    FrozenLinear,
    NoiseKey,
    PosteriorSettings,
    bands,
    posterior_projection,
    standard_normal,
    theta_gradient,
)
from abmll.kernels.fused import launch
from abmll.kernels.reference import low_rank_matrix

from .conftest import Harness, draw_inputs

BACKENDS = ("triton", "torch")
PAPER = PosteriorSettings(
    scaling=2.0, log_variance_scaling=2.0, log_variance_offset=-20.0, prior_shape=1.0, prior_rate=0.01
)


@pytest.fixture(scope="module")
def weights(device) -> Harness:
    return Harness("weight", device)


@pytest.fixture
def scratch(monkeypatch) -> list[tuple[str, torch.Size, torch.dtype, weakref.ref]]:
    """Dense tensors that the launches are handed, as they come: what for, shape, dtype, and whether it still lives."""
    seen = []

    def note(name, tensor):
        if tensor is not None:
            seen.append((name, tensor.shape, tensor.dtype, weakref.ref(tensor)))

    sample, adjoint = launch.sample, launch.adjoint

    def noting_sample(rows, columns, y, *arguments):
        note("sample", y)
        return sample(rows, columns, y, *arguments)

    def noting_adjoint(rows, columns, stretches, width, dz, *arguments):
        note("adjoint", dz)
        note("sample", arguments[-2])
        return adjoint(rows, columns, stretches, width, dz, *arguments)

    monkeypatch.setattr(launch, "sample", noting_sample)
    monkeypatch.setattr(launch, "adjoint", noting_adjoint)
    return seen


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_bands_do_not_show(weights, monkeypatch, dtype):
    """Three bands of at most 64 rows of N = 150, for each of two groups."""
    inputs = weights.inputs(tokens=5, inputs=36, outputs=150, dtype=dtype, groups=2)
    whole = weights.run(inputs)
    monkeypatch.setattr(bands, "SCRATCH_BYTES", 1)
    banded = weights.check(inputs)
    for name in ("y", "kl", "prior", "phi mean a", "phi log-variance b", "theta mean b"):
        torch.testing.assert_close(banded[name], whole[name], rtol=1e-5, atol=1e-5)


def test_scratch_is_bounded_and_handed_on(weights, monkeypatch, scratch):
    """The dense tensors of three layers: none above the bound, none alive afterwards, each noise drawn twice a step."""
    bound = 64 * 128 * 4
    monkeypatch.setattr(bands, "SCRATCH_BYTES", bound)
    inputs = weights.inputs(tokens=4, inputs=128, outputs=150)
    for _ in range(3):
        weights.run(inputs, wanted=("x", "phi mean a", "phi mean b", "phi log-variance a", "phi log-variance b"))
    assert scratch and all(shape.numel() * dtype.itemsize <= bound for _, shape, dtype, _ in scratch)
    assert not any(reference() is not None for *_, reference in scratch)
    # forward and backward draw every element once each: 2 N K normals a step, whatever the tokens
    drawn = sum(shape.numel() for name, shape, *_ in scratch if name == "sample")
    assert drawn == 3 * 2 * 150 * 128


def test_saved_for_the_backward_is_x_alone(weights, capsys, monkeypatch):
    monkeypatch.setattr("abmll.kernels.plain.on_gpu", lambda _: True)  # a CPU keeps what plain code made
    inputs = weights.inputs(tokens=8, inputs=64, outputs=48, dtype=torch.bfloat16)
    for leaf in (inputs.x, *inputs.factors):
        leaf.requires_grad_(True)
    own = {t.untyped_storage().data_ptr() for t in (inputs.weight, inputs.bias, *inputs.factors)}
    counts = {}
    for backend in BACKENDS:
        kept: dict[int, int] = {}

        def keep(tensor, kept=kept):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            found = weights.project(inputs, backend)  # alive while counting, or its memory would be counted twice
        counts[backend] = sum(kept.values())
        del found
    with capsys.disabled():
        print(f"\nsaved bytes of a weight projection, T 8, K 64, N 48, bf16: {counts}")
    # integers beside: the tickets and the noise's names
    assert all(count <= inputs.x.numel() * 2 + 128 for count in counts.values())


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_tiny_change_survives_bf16(backend, device):
    """c = -20 in bf16: W0 x is zero here exactly, so that y is the change's part alone, which must be right to 1 %.

    A change added to the bf16 weights first would be lost for the most part.
    """
    tokens, half, outputs = 16, 32, 48
    inputs = draw_inputs(tokens, 2 * half, outputs, rank=4, dtype=torch.bfloat16, size=3e-3).map(lambda t: t.to(device))
    x = inputs.x.clone()
    x[:, half:] = x[:, :half]
    weight = (0.02 * inputs.weight.float()).bfloat16()
    weight[:, half:] = -weight[:, :half]
    key = NoiseKey(3, 1)
    arguments = (inputs.phi, inputs.theta, PAPER, key, 0)
    y = posterior_projection("weight", x, FrozenLinear(weight), *arguments, terms="none", backend=backend).y
    phi = inputs.phi
    noise = standard_normal(outputs, 2 * half, key, 0, device=device).double()
    mean, log_variance = (low_rank_matrix(pair, PAPER.scaling).double() for pair in phi)
    change = mean + ((log_variance - 20.0) / 2).exp() * noise
    assert change.abs().mean() < 1e-4
    expected = x.double() @ change.mT
    assert (y.double() - expected).norm() < 0.01 * expected.norm()
    added = x.double() @ (weight.double() + change).bfloat16().double().mT
    assert (added - expected).norm() > 0.1 * expected.norm()


def test_mean_and_variance_of_y_over_many_draws(device):
    """E y is the mean's output and var y_n = sum_k x_k^2 exp(l_nk), over 4,000 draws side by side."""
    draws = 4000
    inputs = draw_inputs(2, 6, 5, rank=2, dtype=torch.float32).map(lambda t: t.to(device))
    settings = PosteriorSettings(2.0, 2.0, -1.0, 1.0, 0.01)
    x = inputs.x.expand(draws, -1, -1)
    arguments = (inputs.phi.expand(draws), inputs.theta, settings, NoiseKey(8, 2), 3)
    arguments = (x, FrozenLinear(inputs.weight), *arguments)
    y = posterior_projection("weight", *arguments, terms="none", backend="torch").y.double()
    mean, log_variance = (low_rank_matrix(pair, 2.0).double() for pair in inputs.phi)
    x = inputs.x.double()
    expected, variance = x @ (inputs.weight.double() + mean).mT, x.square() @ (log_variance - 1.0).exp().mT
    assert ((y.mean(dim=0) - expected).abs() < 4.5 * (variance / draws).sqrt()).all()
    assert ((y.var(dim=0) / variance - 1).abs() < 4.5 * (2 / draws) ** 0.5).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_kl_is_the_mean_log_ratio_of_sampled_weights(backend, device):
    inputs = draw_inputs(2, 6, 5, rank=2, dtype=torch.float32, size=0.2).map(lambda t: t.to(device))
    settings = PosteriorSettings(2.0, 2.0, -1.0, 1.0, 0.01)
    arguments = (inputs.phi, inputs.theta, settings, NoiseKey(8, 2), 3)
    kl = posterior_projection("weight", inputs.x, FrozenLinear(inputs.weight), *arguments, backend=backend).kl
    normal = [
        torch.distributions.Normal(low_rank_matrix(side.mean, 2.0), ((low_rank_matrix(side[1], 2.0) - 1.0) / 2).exp())
        for side in (inputs.phi, inputs.theta)
    ]
    torch.manual_seed(0)
    drawn = normal[0].sample((20_000,))
    ratio = (normal[0].log_prob(drawn) - normal[1].log_prob(drawn)).sum(dim=(1, 2)).double()
    assert abs(float(kl) - float(ratio.mean())) < 4.5 * float(ratio.std()) / len(ratio) ** 0.5


def test_tokens_of_a_group_share_a_draw_and_groups_do_not(weights):
    inputs = weights.inputs(tokens=4, inputs=12, outputs=9, groups=2)
    inputs.x[:] = inputs.x[:1, :1]
    y = weights.project(inputs, terms="none").y
    torch.testing.assert_close(y, y[:, :1].expand_as(y))
    assert (y[0] - y[1]).abs().min() > 1e-4


def test_theta_gradient_reads_no_input(weights):
    """With and without x, and with a projection made before: the same bits, no graph."""
    inputs = weights.inputs(tokens=4, inputs=36, outputs=70, groups=2)
    arguments = (inputs.phi, inputs.theta, weights.settings, 0.75, 0.25)
    for backend in BACKENDS:
        found = theta_gradient("weight", None, *arguments, backend=backend)
        again = theta_gradient("weight", inputs.x, *arguments, backend=backend)
        for one, other in zip((*found.gradient.mean, found.kl), (*again.gradient.mean, again.kl), strict=True):
            assert torch.equal(one, other) and not one.requires_grad
