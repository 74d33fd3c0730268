"""Fused kernels against the plain version: outputs, gradients and theta's gradient, all held to float64.

Low-precision inputs are made first and widened for the float64 run. See `Harness.compare` for what is allowed.
"""

from __future__ import annotations

from dataclasses import replace
from unittest.mock import patch

import pytest
import torch
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from abmll.kernels import GaussianFactors, LowRank, PosteriorSettings
from abmll.kernels.fused import configurations, launch

from .conftest import widened

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
PHI, THETA = (
    tuple(f"{side} {name}" for name in ("mean a", "mean b", "log-variance a", "log-variance b"))
    for side in ("phi", "theta")
)


@pytest.mark.parametrize(
    ("dtype", "mask", "bias"),
    [
        (FP32, None, True),
        (FP32, "random", False),
        (BF16, "random", True),
        (BF16, "empty", False),
        (FP16, "random", False),
        (FP16, None, True),
    ],
    ids=str,
)
def test_dtypes_masks_and_bias(harness, dtype, mask, bias):
    inputs = harness.inputs(tokens=11, inputs=48, outputs=16, dtype=dtype)
    if not bias:
        inputs = replace(inputs, bias=None)
    harness.check(inputs, harness.mask(inputs, mask))


@pytest.mark.parametrize(
    ("rank", "groups", "inputs", "outputs"),
    [(1, None, 33, 9), (8, 1, 9, 17), (17, 3, 16, 16), (64, None, 48, 16)],
)
def test_ranks_and_groups(harness, rank, groups, inputs, outputs):
    inputs = harness.inputs(5, inputs, outputs, rank, BF16, groups)
    mask = harness.mask(inputs, "random")
    harness.check(inputs, mask)
    harness.check_theta(inputs, mask)


@pytest.mark.parametrize(("dtype", "groups"), [(FP32, 2), (BF16, None)], ids=["fp32", "bf16"])
def test_no_tokens(harness, dtype, groups):
    inputs = harness.inputs(tokens=0, inputs=16, outputs=16, dtype=dtype, groups=groups)
    mask = harness.mask(inputs, "random")
    harness.check(inputs, mask)
    harness.check_theta(inputs, mask)


@hypothesis_settings(
    max_examples=4, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    tokens=st.integers(1, 20),
    inputs=st.integers(1, 20) | st.sampled_from([16, 32]),
    outputs=st.integers(1, 20) | st.sampled_from([16, 32]),
    rank=st.integers(1, 64),
    groups=st.sampled_from([None, 2]),
    dtype=st.sampled_from([FP32, BF16, FP16]),
    mask=st.sampled_from([None, "random", "empty"]),
    seed=st.integers(0, 99),
)
def test_any_shape(harness, tokens, inputs, outputs, rank, groups, dtype, mask, seed):
    made = harness.inputs(tokens, inputs, outputs, rank, dtype, groups, seed)
    counted = harness.mask(made, mask)
    harness.check(made, counted)
    harness.check_theta(made, counted)


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=["fp32", "bf16"])
def test_near_initialisation(harness, dtype):
    """The paper's c = -20, B near zero and phi next to theta, where a KL in the wrong arithmetic is all rounding."""
    harness = replace(harness, settings=PosteriorSettings(2.0, 2.0, -20.0, 1.0, 0.01))
    inputs = harness.inputs(tokens=19, inputs=40, outputs=20, rank=8, dtype=dtype)
    theta = GaussianFactors(*(LowRank(pair.a, 1e-3 * pair.b) for pair in inputs.theta))
    steps = zip(inputs.phi, theta, strict=True)
    near = GaussianFactors(*(LowRank(to.a + 1e-5 * step.a, to.b + 1e-5 * step.b) for step, to in steps))
    inputs = replace(inputs, phi=near, theta=theta)
    mask = harness.mask(inputs, "random")
    harness.check(inputs, mask)
    harness.check_theta(inputs, mask)


@pytest.mark.parametrize(("slots", "programs"), [(16, 256), (1, 1)])
def test_several_blocks_in_the_backward_pass(harness, monkeypatch, slots, programs):
    """As shipped: several slots and chunks of one block. With fewer: programs that accumulate over blocks."""
    monkeypatch.setattr(configurations, "ADJOINT_SLOTS", slots)
    monkeypatch.setattr(configurations, "ADJOINT_PROGRAMS", programs)
    monkeypatch.setattr(configurations, "FEWEST_PROGRAMS", 1)  # large blocks
    tokens, inputs, outputs = (140, 20, 70) if harness.posterior == "activation" else (5, 70, 140)
    inputs = harness.inputs(tokens, inputs, outputs, rank=1, dtype=BF16)
    mask = harness.mask(inputs, "random")
    harness.check(inputs, mask)
    harness.check_theta(inputs, mask)


def small_blocks(monkeypatch):
    """Every loop and every grid axis has several steps at a size of some 30."""
    for name, blocks in {
        "project": {"ROWS": 16, "DEPTH": 16},
        "gradient": {"ROWS": 16, "COLUMNS": 16, "SUMMED": 16},
        "elementwise": {"ROWS": 16, "COLUMNS": 16},
    }.items():
        made = configurations.Launch(blocks, warps=1, stages=1)
        monkeypatch.setattr(configurations, name, lambda *_, made=made: made)
    for name, parts in {
        "ADJOINT_SLOTS": 2, "ADJOINT_PROGRAMS": 4, "SAMPLE_PROGRAMS": 4, "PROJECTION_PARTS": 2
    }.items():  # fmt: skip
        monkeypatch.setattr(configurations, name, parts)


def test_small_blocks(harness, monkeypatch):
    small_blocks(monkeypatch)
    tokens, inputs, outputs = (35, 48, 32) if harness.posterior == "activation" else (5, 32, 35)
    inputs = harness.inputs(tokens, inputs, outputs, rank=1, dtype=BF16)
    harness.check(inputs, harness.mask(inputs, "random"))


def test_small_blocks_of_several_groups(harness, monkeypatch):
    small_blocks(monkeypatch)
    inputs = harness.inputs(tokens=17, inputs=17, outputs=17, rank=1, groups=2)
    mask = harness.mask(inputs, "random")
    harness.check(inputs, mask)
    harness.check_theta(inputs, mask)


@pytest.mark.parametrize(
    ("wanted", "loss"),
    [
        *((wanted, (term,)) for wanted in (("x",), PHI, THETA) for term in ("y", "kl", "prior")),
        (("x", *PHI), ("y", "kl")),
        (THETA[3:], ("kl", "prior")),
        ((), ("y", "kl", "prior")),
    ],
    ids=lambda names: f"{len(names)} {names[0]}" if names else "none",
)
def test_gradients_asked_for(harness, wanted, loss):
    inputs = harness.inputs(tokens=6, inputs=10, outputs=9, dtype=BF16)
    mask = harness.mask(inputs, "random")
    harness.check(inputs, mask, upstream=harness.upstream(inputs, loss), wanted=wanted)


def test_only_what_is_asked_for_is_computed(activation, monkeypatch):
    called = []

    def gradients(*arguments):
        count, need_x = arguments[-2:]
        called.extend(["dx"] * need_x + ["factors"] * (count > 0))
        return original(*arguments)

    original = launch.gradients
    monkeypatch.setattr(launch, "gradients", gradients)
    inputs = activation.inputs(tokens=4, inputs=5, outputs=3)
    for wanted, expected in {
        ("x",): {"dx"},
        PHI: {"factors"},
        THETA[:1]: {"factors"},
        ("x", *PHI): {"dx", "factors"},
        (): set(),
    }.items():
        called.clear()
        activation.run(inputs, wanted=wanted)
        assert set(called) == expected, wanted
    called.clear()
    activation.run(inputs, wanted=THETA, upstream=activation.upstream(inputs, ("y",)))
    assert not called  # theta has no part in y


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_a_graph(harness, mode):
    inputs = harness.inputs(tokens=6, inputs=10, outputs=9, dtype=BF16)
    expected = harness.project(inputs)
    with mode():
        for leaf in (inputs.x, *inputs.factors):
            leaf.requires_grad_(True)
        found = harness.project(inputs)
    for value, right in zip(found[:3], expected[:3], strict=True):
        assert not value.requires_grad and torch.equal(value, right)


def test_terms(harness):
    """What is not asked for is not made, and changes nothing in y."""
    inputs = harness.inputs(tokens=6, inputs=10, outputs=9)
    y = harness.project(inputs).y
    for terms in ("none", "theta"):
        found = harness.project(inputs, terms=terms)
        assert found.kl is None and found.negative_log_prior is None
        assert torch.equal(found.y, y)
    harness.check(inputs, terms="none", upstream=harness.upstream(inputs, ("y",)), wanted=("x", *PHI))


@pytest.mark.parametrize(("terms", "groups"), [("theta", None), ("theta", 3), ("divergence", None), ("none", 2)])
def test_outer_step_after_a_projection(activation, terms, groups):
    """With the projection's own low-rank products, and where it did not make them."""
    inputs = activation.inputs(tokens=7, inputs=16, outputs=16, dtype=BF16, groups=groups)
    mask = activation.mask(inputs, "random")
    activation.check_theta(inputs, mask, projection=activation.project(inputs, mask=mask, terms=terms))


def test_outer_step_builds_no_graph(harness):
    inputs, saved = harness.inputs(tokens=4, inputs=5, outputs=3), []
    for leaf in (inputs.x, *inputs.factors):
        leaf.requires_grad_(True)
    projection = harness.project(inputs, terms="theta")
    with torch.autograd.graph.saved_tensors_hooks(saved.append, lambda kept: kept):
        found = harness.theta(inputs, projection=projection)
    assert not saved
    assert not any(value.requires_grad for value in found.values())


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=["bf16", "fp16", "fp32"])
@pytest.mark.parametrize(
    ("tokens", "inputs", "outputs", "rank", "groups"),
    [
        (1024, 4096, 4096, 8, None),
        (1000, 3584, 512, 16, None),
        (300, 1024, 2816, 64, 4),
        (5000, 1030, 1030, 32, None),
        ((700, 64, 259, 1), 4096, 1024, 8, None),
    ],
    ids=str,
)
def test_large(harness, tokens, inputs, outputs, rank, groups, dtype):
    """Sizes of real projections; at 5,000 tokens a slot of the backward pass holds several blocks of rows."""
    made = harness.inputs(tokens, inputs, outputs, rank, dtype, groups)
    mask = harness.mask(made, "random")
    harness.check(made, mask)
    harness.check_theta(made, mask)


@pytest.mark.gpu
def test_more_than_2_31_outputs(activation, exact_normal):
    """The last rows of y, with the gradients that they alone cause."""
    tokens, outputs, last = 70_000, 2**15, 3
    if torch.cuda.mem_get_info()[0] < 20e9:
        pytest.skip("needs 20 GB of GPU memory")
    inputs = activation.inputs(tokens, 64, outputs, rank=8, dtype=BF16)
    end = replace(inputs, x=inputs.x[-last:])
    dy_end = activation.upstream(end)["y"]
    dy = torch.zeros(tokens, outputs, dtype=BF16, device=activation.device)
    dy[-last:] = dy_end
    how = {"wanted": ("x", *PHI), "terms": "none"}
    found = activation.run(inputs, upstream={"y": dy}, **how)
    assert found["y"].numel() > 2**31 and not found["x"][:-last].any()
    found |= {name: found[name][-last:] for name in ("y", "x")}

    def of_the_end(rows, columns, key, layer, group=0, device="cpu", first_row=0):
        return exact_normal(rows, columns, key, layer, group, device, first_row + tokens - last)

    with patch("abmll.kernels.plain.standard_normal", of_the_end):
        plain = activation.run(end, "torch", upstream={"y": dy_end}, **how)
        exact = [activation.run(made, "torch", upstream={"y": dy_end.double()}, **how) for made in widened(end)]
    activation.compare(found, plain, *exact)
