"""What a CPU runs where theta asks for no gradient: the contract's values and derivatives, made once and in chunks."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from unittest.mock import patch

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from abmll.kernels import closed_form, plain

from .conftest import LEAVES, Harness, exact_normal, widened
from .test_plain import Contract, Living

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
CPU = torch.device("cpu")
INNER = LEAVES[:5]  # x and phi


@pytest.fixture(params=["activation", "weight"])
def pair(request) -> tuple[Harness, Contract]:
    return Harness(request.param, CPU), Contract(request.param, CPU)


@pytest.fixture(params=["one chunk", "chunks"])
def chunked(request, monkeypatch) -> None:
    """Chunks of three rows of twenty: the last one is shorter."""
    if request.param == "chunks":
        monkeypatch.setattr(closed_form, "SMALLEST_CHUNK", 64)
        monkeypatch.setattr(closed_form, "LARGEST_CHUNK", 64)


@pytest.fixture(autouse=True)
def only_closed_form(monkeypatch):
    """What these tests run is not the contract under autograd."""

    def refused(*_):
        raise AssertionError("left to autograd")

    monkeypatch.setattr(plain, "recomputed", refused)


def close(found: dict, right: dict) -> None:
    assert found.keys() == right.keys()
    for name, value in found.items():
        assert right[name].abs().max() > 1e-3, name
        torch.testing.assert_close(value, right[name], rtol=1e-11, atol=1e-11, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("mask", ["random", None])
@pytest.mark.parametrize("groups", [None, 2])
@pytest.mark.parametrize("outputs", [("y",), ("kl",), ("y", "kl"), ("y", "kl", "prior")], ids=str)
def test_values_and_gradients_are_the_contracts(pair, outputs, groups, mask, chunked):
    harness, _ = pair
    inputs = harness.inputs(tokens=10, inputs=20, outputs=20, dtype=FP64, groups=groups)
    given = {"mask": harness.mask(inputs, mask), "upstream": harness.upstream(inputs, outputs), "wanted": INNER}
    found, right = (one.run(inputs, "torch", **given) for one in pair)
    if harness.posterior == "weight" and outputs == ("kl",):
        assert not found.pop("x").any() and not right.pop("x").any()
    close(found, right)


def test_the_priors_gradient_alone(pair):
    harness, _ = pair
    inputs = harness.inputs(tokens=10, inputs=20, outputs=20, dtype=FP64)
    given = {"mask": harness.mask(inputs, "random"), "upstream": harness.upstream(inputs, ("prior",)), "wanted": ("x",)}
    found, right = (one.run(inputs, "torch", **given) for one in pair)
    torch.testing.assert_close(found, right, rtol=1e-11, atol=1e-11)
    assert found["x"].any() == (harness.posterior == "activation")


@pytest.mark.parametrize("wanted", [("x",), INNER[1:], INNER[1:2], INNER[3:]], ids=str)
@pytest.mark.parametrize("terms", ["divergence", "none"])
def test_a_part_of_the_gradients(pair, wanted, terms):
    harness, _ = pair
    inputs = harness.inputs(tokens=10, inputs=20, outputs=20, dtype=FP64)
    upstream = harness.upstream(inputs, ("y", "kl") if terms == "divergence" else ("y",))
    close(*(one.run(inputs, "torch", None, upstream, wanted, terms) for one in pair))


def test_gradcheck(pair, chunked):
    harness, _ = pair
    inputs = harness.inputs(tokens=7, inputs=20, outputs=20, rank=1, dtype=FP64)
    mask = harness.mask(inputs, "random")

    def function(*leaves: Tensor) -> tuple[Tensor, ...]:
        return harness.project(inputs.with_leaves(*leaves, *inputs.factors[4:]), "torch", mask)[:3]

    leaves = [leaf.clone().requires_grad_(True) for leaf in (inputs.x, *inputs.factors[:4])]
    assert torch.autograd.gradcheck(function, leaves, atol=1e-7, rtol=1e-5)


@pytest.mark.parametrize("groups", [None, 2])
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=str)
def test_errors_are_those_of_autograds_arithmetic(pair, dtype, groups, chunked):
    """Against float64, on the same low-precision inputs; bf16's products of the drawn weight are among them."""
    harness, contract = pair
    inputs = harness.inputs(tokens=10, inputs=48, outputs=20, dtype=dtype, groups=groups)
    mask, upstream = harness.mask(inputs, "random"), harness.upstream(inputs)
    wide = {name: value.double() for name, value in upstream.items()}
    with patch("abmll.kernels.plain.standard_normal", exact_normal):
        exact = [contract.run(made, "torch", mask, wide, INNER) for made in widened(inputs)]
    found, right = (one.run(inputs, "torch", mask, upstream, INNER) for one in pair)
    harness.compare(found, right, *exact)


def test_equal_factors_have_no_divergence_at_all(pair):
    """phi <- theta: the KL and its gradients are zero, not rounding errors times a precision of e^20."""
    harness = replace(pair[0], settings=pair[0].settings._replace(log_variance_offset=-20.0))
    inputs = harness.inputs(tokens=30, inputs=40, outputs=36)
    inputs = replace(inputs, phi=inputs.theta)
    found = harness.run(inputs, "torch", None, {"kl": torch.tensor(1.0)}, INNER)
    assert not any(found[name].any() for name in ("kl", *INNER))


def test_checkpointing_changes_no_bit(pair):
    harness, _ = pair
    inputs = harness.inputs(tokens=10, inputs=20, outputs=20, dtype=BF16)
    leaves = [leaf.requires_grad_(True) for leaf in (inputs.x, *inputs.factors[:4])]

    def block(x: Tensor) -> tuple[Tensor, Tensor]:
        y, kl, *_ = harness.project(replace(inputs, x=x.tanh()), "torch")
        return y.sin(), kl

    outcomes = []
    for run in (block, partial(checkpoint, block, use_reentrant=False)):
        y, kl = run(inputs.x)
        outcomes.append([y, kl, *torch.autograd.grad(y.float().square().sum() + kl, leaves)])
    assert all(torch.equal(off, on) for off, on in zip(*outcomes, strict=True))


def test_what_is_kept(pair):
    """Beside y half the noise's part in fp32, numbers of the rank's size, and the weight posterior's drawn change."""
    harness, _ = pair
    inputs = harness.inputs(tokens=64, inputs=96, outputs=80, rank=1, dtype=BF16)
    for leaf in (inputs.x, *inputs.factors[:4]):
        leaf.requires_grad_(True)
    with Living() as living:
        projection = harness.project(inputs, "torch")
        assert projection.y.requires_grad
        elements, bytes_each = (64 * 80, 4) if harness.posterior == "activation" else (80 * 96, 6)
        dense = projection.y.nbytes + elements * bytes_each
        assert dense < living.bytes < dense + 4 * 16 * (64 + 80 + 96)


def test_no_tokens(pair):
    harness, _ = pair
    inputs = harness.inputs(tokens=0, inputs=8, outputs=8)
    found, right = (one.run(inputs, "torch", None, harness.upstream(inputs), INNER) for one in pair)
    torch.testing.assert_close(found, right)


def test_no_second_derivative(pair):
    harness, _ = pair
    inputs = harness.inputs(tokens=5, inputs=8, outputs=8)
    inputs.x.requires_grad_(True)
    (by_x,) = torch.autograd.grad(harness.project(inputs, "torch").y.square().sum(), inputs.x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        by_x.sum().backward()


def test_the_setting_of_products_is_given_back():
    setting = torch.backends.mkldnn.matmul
    before = setting.fp32_precision
    with pytest.raises(ZeroDivisionError), closed_form._bf16_products():
        assert setting.fp32_precision == "bf16"
        raise ZeroDivisionError
    assert setting.fp32_precision == before


def test_theta_that_asks_is_left_to_autograd(pair, monkeypatch):
    harness, _ = pair
    inputs = harness.inputs(tokens=5, inputs=8, outputs=8)
    with pytest.raises(AssertionError, match="left to autograd"):
        harness.run(inputs, "torch")
    with torch.no_grad():
        harness.project(inputs, "torch")


@pytest.mark.parametrize(("rows", "columns"), [(520, 576), (4096, 4096), (5, 7), (0, 8), (3, 2**20)])
def test_chunks_cover_the_rows(rows, columns):
    found = list(closed_form.chunks(rows, columns))
    assert [row for chunk in found for row in range(chunk.start, chunk.stop)] == list(range(rows))
    assert all((chunk.stop - chunk.start) * columns <= max(closed_form.LARGEST_CHUNK, columns) for chunk in found)
