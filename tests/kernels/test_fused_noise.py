"""The kernels' own noise: the documented function of its integers whatever the tile, and standard normal."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
import triton
import triton.language as tl
from scipy.stats import kstest

from abmll.kernels import NoiseKey, standard_normal
from abmll.kernels.fused.tiles import normal_tile

from .conftest import noise_bound

KEY = NoiseKey(seed=0x0123456789ABCDEF, step=7)
LARGE = (64, 256)
TILES = [(16, 16), (64, 8), (32, 64), LARGE]


@triton.jit
def draw_kernel(
    out_ptr, first_row, rows, columns, names_ptr, layer,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    first = tl.program_id(1) * COLUMNS
    column = first + tl.arange(0, COLUMNS)
    noise = normal_tile(first_row + row, first, columns, names_ptr, layer, COLUMNS)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    tl.store(out_ptr + row[:, None] * columns + column[None, :], noise, mask=inside)


@pytest.fixture
def draw(device):
    def draw(rows, columns, key=KEY, layer=0, group=0, tile=LARGE, first_row=0):
        out = torch.empty(rows, columns, device=device)
        grid = (triton.cdiv(rows, tile[0]), triton.cdiv(columns, tile[1]), 1)
        name = key.rows(group + 1, device)[group]
        draw_kernel[grid](
            out, first_row, rows, columns, name, layer, ROWS=tile[0], COLUMNS=tile[1], enable_fp_fusion=True
        )
        return out.cpu()

    return draw


@pytest.mark.parametrize(
    ("rows", "columns", "key", "layer", "group"),
    [
        (1, 1, NoiseKey(0, 0), 0, 0),
        (3, 37, KEY, 5, 0),
        (50, 70, KEY, 1, 2),
        (5, 101, NoiseKey(2**64 - 1, 2**32 - 1), 95, 3),
        (33, 18, NoiseKey(2**63, 2**31), 1, 1),
    ],
)
def test_equals_the_plain_noise_whatever_the_tile(draw, exact_normal, rows, columns, key, layer, group):
    tiles = [draw(rows, columns, key, layer, group, tile) for tile in TILES]
    for one, other in pairwise(tiles):
        assert torch.equal(one, other)
    exact = exact_normal(rows, columns, key, layer, group)
    assert ((tiles[0].double() - exact).abs() <= noise_bound(rows, columns, key, layer, group)).all()
    plain = standard_normal(rows, columns, key, layer, group)
    torch.testing.assert_close(plain.double(), exact, rtol=0, atol=2e-6)


def test_counters_beyond_a_signed_number(draw, exact_normal):
    """The last rows that the counter holds: 2^20 rows of 2^12 calls."""
    columns, last = 2**14, 2**20 - 2
    found = draw(2, columns, layer=3, first_row=last, tile=(16, 1024))
    exact, bound = (of(2, columns, KEY, 3, first_row=last) for of in (exact_normal, noise_bound))
    assert ((found.double() - exact).abs() <= bound).all()


def test_draws_are_standard_normal(draw):
    draws = draw(512, 512).double().flatten()
    n = draws.numel()
    assert abs(draws.mean()) < 4 / n**0.5
    assert abs(draws.var() - 1) < 4 * (2 / n) ** 0.5
    assert abs((draws**3).mean()) < 4 * (15 / n) ** 0.5
    assert abs((draws**4).mean() - 3) < 4 * (96 / n) ** 0.5
    assert kstest(draws.numpy(), "norm").pvalue > 1e-3
    for lane in range(4):
        assert kstest(draws[lane::4].numpy(), "norm").pvalue > 1e-3


def correlation(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]).double())[0, 1])


@pytest.mark.parametrize(
    "other",
    [{"layer": 1}, {"group": 1}, {"step": 8}, {"step": 7 + 2**31}, {"seed": KEY.seed + 1}, {"seed": KEY.seed ^ 2**63}],
    ids=str,
)
def test_draws_differ_and_are_uncorrelated(draw, other):
    """By layer, group, step and seed; and squares too, so that a sign or a lane in common would show."""
    n = 256 * 256
    name = {"seed": KEY.seed, "step": KEY.step, "layer": 0, "group": 0} | other
    first = draw(256, 256)
    second = draw(256, 256, NoiseKey(name["seed"], name["step"]), name["layer"], name["group"])
    assert not (first == second).any(dim=1).all()
    assert abs(correlation(first, second)) < 4.5 / n**0.5
    assert abs(correlation(first.square(), second.square())) < 4.5 / n**0.5


def test_rows_columns_and_lanes_are_uncorrelated(draw):
    draws = draw(512, 256)
    limit = 4.5 / (512 * 128) ** 0.5
    assert abs(correlation(draws[:-1, :128], draws[1:, :128])) < limit
    for shift in (1, 2, 3, 4, 128):  # the other lanes of the same Philox call, the next call, a far one
        assert abs(correlation(draws[:, :128], draws.roll(shift, 1)[:, :128])) < limit, shift
        assert abs(correlation(draws[:, :128].square(), draws.roll(shift, 1)[:, :128].square())) < limit, shift


def test_the_projection_draws_it(harness, exact_normal):
    """Activations: rows are a group's tokens. Weights: rows are output units, read off here with x = 1."""
    inputs = harness.inputs(tokens=6, inputs=6, outputs=21, groups=2).map(torch.zeros_like)
    inputs.x[:] = torch.eye(6)
    key = NoiseKey(2**64 - 7, 2**32 - 3)
    y = harness.project(inputs, key=key, layer=11).y
    sigma = torch.tensor(harness.settings.log_variance_offset / 2, dtype=torch.float64).exp()
    for group in range(2):
        of_activations = harness.posterior == "activation"
        size = (6, 21) if of_activations else (21, 6)
        noise, bound = (of(*size, key, 11, group) for of in (exact_normal, noise_bound))
        error = (y[group].double().cpu() - sigma * (noise if of_activations else noise.mT)).abs()
        assert (error <= (bound if of_activations else bound.mT) + 2e-6).all()
