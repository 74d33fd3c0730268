"""Groups of unequal size in one call: each is what a call of its own gives, and its NaN is its own."""

from __future__ import annotations

import pytest
import torch

from abmll.kernels import GaussianFactors, Groups, LowRank, NoiseKey, mean_linear, posterior_projection, theta_gradient

from .conftest import LAYER, SETTINGS, draw_inputs

SIZES = (5, 1, 9)
CPU = torch.device("cpu")
ROWS = torch.cat([NoiseKey(7 + group, 3 + group).rows(1, CPU) for group in range(len(SIZES))])


def grouped_inputs(dtype=torch.float32, sizes=SIZES):
    """x [sum of sizes, K], phi's factors [G, ...]."""
    inputs = draw_inputs(max(sizes), 40, 24, 3, dtype, groups=len(sizes))
    return inputs, torch.cat([x[:size] for x, size in zip(inputs.x, sizes, strict=True)]), Groups.of(sizes, CPU)


def run(posterior, inputs, x, phi, key, groups=None, mask=None):
    """Outputs, gradients by x and phi of the sum of y's squares and all KL, and theta's own gradient."""
    leaves = [leaf.detach().requires_grad_(True) for leaf in (x, *(f for pair in phi for f in pair))]
    phi = GaussianFactors(LowRank(*leaves[1:3]), LowRank(*leaves[3:5]))
    arguments = (leaves[0], inputs.base, phi, inputs.theta, SETTINGS, key, LAYER, mask)
    found = posterior_projection(posterior, *arguments, backend="torch", groups=groups)
    gradients = torch.autograd.grad(found.y.square().sum() + found.kl.sum(), leaves)
    theta = theta_gradient(posterior, x, phi, inputs.theta, SETTINGS, 0.7, 0.2, mask, backend="torch", groups=groups)
    of_theta = [factor for pair in theta.gradient for factor in pair]
    return [found.y, gradients[0]], [found.kl, found.negative_log_prior, *gradients[1:], *of_theta, *theta[1:]]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("posterior", ["activation", "weight"])
def test_each_group_is_a_call_of_its_own(posterior, dtype):
    inputs, x, groups = grouped_inputs(dtype)
    by_row, by_group = run(posterior, inputs, x, inputs.phi, ROWS, groups)
    # W0 x of other numbers of rows is summed in another order
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    for group, (part, phi) in enumerate(zip(x.split(SIZES), inputs.phi.of_groups(), strict=True)):
        own_by_row, own_by_group = run(posterior, inputs, part, phi, ROWS[group : group + 1])
        for found, right in zip([tensor.split(SIZES)[group] for tensor in by_row], own_by_row, strict=True):
            torch.testing.assert_close(found, right, rtol=tolerance, atol=tolerance * float(right.abs().max()))
        for found, right in zip([tensor[group] for tensor in by_group], own_by_group, strict=True):
            torch.testing.assert_close(found, right, rtol=tolerance, atol=tolerance * float(right.abs().max()))


@pytest.mark.parametrize("where", ["x", "phi"])
@pytest.mark.parametrize("posterior", ["activation", "weight"])
def test_a_nan_stays_in_its_group(posterior, where):
    inputs, x, groups = grouped_inputs()
    right_by_row, right_by_group = run(posterior, inputs, x, inputs.phi, ROWS, groups)
    if where == "x":
        x[SIZES[0]] = float("nan")
    else:
        inputs.phi.mean.a[1, 0, 0] = float("nan")
    by_row, by_group = run(posterior, inputs, x, inputs.phi, ROWS, groups)
    assert by_row[0].split(SIZES)[1].isnan().any()
    for group in (0, 2):
        for found, right in zip(by_row, right_by_row, strict=True):
            assert torch.equal(found.split(SIZES)[group], right.split(SIZES)[group])
        for found, right in zip(by_group, right_by_group, strict=True):
            assert torch.equal(found[group], right[group])


def test_the_mean_of_each_group():
    inputs, x, groups = grouped_inputs(torch.float64)
    found = mean_linear(x[None], inputs.base, inputs.phi.mean, 2.0, groups)
    assert found.shape == (1, sum(SIZES), 24)
    for part, y, phi in zip(x.split(SIZES), found[0].split(SIZES), inputs.phi.of_groups(), strict=True):
        torch.testing.assert_close(y, mean_linear(part, inputs.base, phi.mean, 2.0))


def test_equal_groups_need_not_be_told():
    inputs, x, groups = grouped_inputs(sizes=(4, 4, 4))
    told = posterior_projection("weight", x, *inputs_of(inputs), ROWS, LAYER, backend="torch", groups=groups)
    untold = posterior_projection("weight", x.view(3, 4, -1), *inputs_of(inputs), ROWS, LAYER, backend="torch")
    assert torch.equal(told.y, untold.y.flatten(0, 1)) and torch.equal(told.kl, untold.kl)


def inputs_of(inputs):
    return inputs.base, inputs.phi, inputs.theta, SETTINGS


@pytest.mark.parametrize("sizes", [(5, 1, 8), (15,), (5, 5, 5, 0)])
def test_groups_that_do_not_fit_are_refused(sizes):
    inputs, x, _ = grouped_inputs()
    with pytest.raises(ValueError, match=r"groups: .*make them by Groups\.of|sizes: .*at least one row"):
        posterior_projection("weight", x, *inputs_of(inputs), ROWS, LAYER, groups=Groups.of(sizes, CPU))


def test_phi_with_groups_says_whose_rows_are_whose():
    inputs, x, _ = grouped_inputs()
    with pytest.raises(ValueError, match="or say by `groups` which rows are whose"):
        posterior_projection("activation", x, *inputs_of(inputs), ROWS, LAYER)


def test_bounds_are_where_groups_begin_and_end():
    groups = Groups.of(SIZES, CPU)
    assert groups.bounds.tolist() == [0, 5, 6, 15] and groups.bounds.dtype == torch.int32
    assert (len(groups), groups.total) == (3, 15)
