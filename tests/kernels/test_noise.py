"""The noise: bit for bit the documented function of its integers, and standard normal and independent in every one."""

from __future__ import annotations

import math

import pytest
import torch
from scipy.stats import kstest

from abmll.kernels import NoiseKey, fold_seed, standard_normal
from abmll.kernels.noise import philox

MASK = 0xFFFFFFFF
KEY = NoiseKey(seed=0x0123456789ABCDEF, step=7)


def philox_by_hand(counter: tuple[int, ...], key: tuple[int, int]) -> tuple[int, ...]:
    """Philox 4x32-7 as the paper's figure draws it, on Python's unbounded integers."""
    a, b, c, d = counter
    for i in range(7):
        k0, k1 = (key[0] + i * 0x9E3779B9) & MASK, (key[1] + i * 0xBB67AE85) & MASK
        low_a, high_a = (a * 0xD2511F53) & MASK, (a * 0xD2511F53) >> 32
        low_c, high_c = (c * 0xCD9E8D57) & MASK, (c * 0xCD9E8D57) >> 32
        a, b, c, d = high_c ^ b ^ k0, low_c, high_a ^ d ^ k1, low_a
    return a, b, c, d


def normal_by_hand(row: int, column: int, columns: int, key: NoiseKey, layer: int, group: int) -> float:
    quad = row * math.ceil(columns / 4) + column // 4
    words = philox_by_hand((quad, group, key.step, layer), (key.seed & MASK, key.seed >> 32))
    lane = column % 4
    radius_word, angle_word = words[:2] if lane < 2 else words[2:]
    radius = math.sqrt(-2 * math.log(((radius_word >> 8) + 1) / 2**24))
    angle = 2 * math.pi * (angle_word >> 8) / 2**24
    return radius * (math.cos(angle) if lane % 2 == 0 else math.sin(angle))


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        (0, (0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48)),
        (MASK, (0x5207DDC2, 0x45165E59, 0x4D8EE751, 0x8C52F662)),
    ],
)
def test_philox_gives_the_known_answers_of_random123(word, expected):
    assert philox((word,) * 4, (word,) * 2) == expected
    tensors = philox(tuple(torch.full((3,), word) for _ in range(4)), (word, word))
    assert [set(value.tolist()) for value in tensors] == [{value} for value in expected]
    assert philox_by_hand((word,) * 4, (word,) * 2) == expected


@pytest.mark.parametrize(
    ("rows", "columns", "key", "layer", "group"),
    [
        (1, 1, NoiseKey(0, 0), 0, 0),
        (3, 37, KEY, 5, 0),
        (2, 128, KEY, 0, 2),
        (5, 301, NoiseKey(2**64 - 1, 2**32 - 1), 95, 3),  # every word at its largest: products beyond 63 bits
    ],
)
def test_elements_equal_an_independent_implementation(rows, columns, key, layer, group):
    drawn = standard_normal(rows, columns, key, layer, group)
    assert drawn.shape == (rows, columns) and drawn.dtype == torch.float32
    for row in {0, rows - 1}:
        for column in {c for c in (0, 1, 2, 3, 4, 31, 32, 127, 128, 299, 300) if c < columns} | {columns - 1}:
            expected = normal_by_hand(row, column, columns, key, layer, group)
            assert float(drawn[row, column]) == pytest.approx(expected, rel=1e-5, abs=2e-6), (row, column)


def test_rows_on_a_device_name_the_same_noise():
    key = NoiseKey(2**64 - 5, 2**32 - 1)
    rows = key.rows(3, "cpu")
    assert rows.tolist() == [[-5, 2**32 - 1, group] for group in range(3)]
    for group in range(3):
        assert torch.equal(standard_normal(4, 9, rows, 2, group), standard_normal(4, 9, key, 2, group))
    # episodes side by side, each with a name of its own
    rows[1] = NoiseKey(7, 1).rows(1, "cpu")[0]
    assert torch.equal(standard_normal(4, 9, rows, 2, group=1), standard_normal(4, 9, NoiseKey(7, 1), 2))


def test_a_draw_is_deterministic_and_leaves_the_global_generator_alone():
    state = torch.get_rng_state()
    first = standard_normal(40, 70, KEY, 1)
    torch.manual_seed(5)
    assert torch.equal(first, standard_normal(40, 70, NoiseKey(KEY.seed, KEY.step), 1))
    torch.set_rng_state(state)
    standard_normal(3, 3, KEY, 0)
    assert torch.equal(state, torch.get_rng_state())


def test_chunks_do_not_show():
    """At 40 columns a chunk holds 6,553 rows: the first rows of a draw of several chunks are those of a small draw."""
    large = standard_normal(9000, 40, KEY, 2)
    assert torch.equal(large[:7], standard_normal(7, 40, KEY, 2))
    assert torch.equal(large[:7500], standard_normal(7500, 40, KEY, 2))
    for row in (6552, 6553, 8999):
        assert float(large[row, 33]) == pytest.approx(normal_by_hand(row, 33, 40, KEY, 2, 0), rel=1e-5, abs=2e-6)


def test_columns_within_the_same_number_of_quads_are_the_same():
    wide = standard_normal(6, 256, KEY, 2)
    assert torch.equal(wide[:, :253], standard_normal(6, 253, KEY, 2))
    assert torch.equal(wide[:1, :128], standard_normal(1, 128, KEY, 2))  # row 0 starts at quad 0 for any width


def test_a_million_draws_are_standard_normal():
    draws = standard_normal(1000, 1000, KEY, 0).double().flatten()
    n = draws.numel()
    assert abs(draws.mean()) < 4 / n**0.5
    assert abs(draws.var() - 1) < 4 * (2 / n) ** 0.5
    assert abs((draws**3).mean()) < 4 * (15 / n) ** 0.5
    assert abs((draws**4).mean() - 3) < 4 * (96 / n) ** 0.5
    assert kstest(draws.numpy(), "norm").pvalue > 1e-3
    assert draws.isfinite().all() and draws.abs().max() < 5.8  # sqrt(-2 log 2^-24) = 5.77


def test_every_lane_is_standard_normal():
    lanes = standard_normal(2000, 128, KEY, 3).view(2000, 32, 4)
    for lane in range(4):
        assert kstest(lanes[..., lane].flatten().numpy(), "norm").pvalue > 1e-3


def correlation(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]).double())[0, 1])


@pytest.mark.parametrize(
    "other",
    [
        {"layer": 1},
        {"layer": 95},
        {"group": 1},
        {"step": 8},
        {"step": 7 + 2**16},
        {"seed": KEY.seed + 1},
        {"seed": KEY.seed ^ 2**63},  # the upper half of the seed counts too
    ],
    ids=str,
)
def test_draws_differ_and_are_uncorrelated(other):
    n = 400 * 256
    name = {"seed": KEY.seed, "step": KEY.step, "layer": 0, "group": 0} | other
    first = standard_normal(400, 256, KEY, 0)
    second = standard_normal(400, 256, NoiseKey(name["seed"], name["step"]), name["layer"], name["group"])
    assert not (first == second).any(dim=1).all()
    assert abs(correlation(first, second)) < 4.5 / n**0.5
    assert abs(correlation(first.square(), second.square())) < 4.5 / n**0.5


def test_rows_columns_and_lanes_are_uncorrelated():
    draws = standard_normal(2000, 256, KEY, 0)
    limit = 4.5 / (2000 * 128) ** 0.5
    assert abs(correlation(draws[:-1, :128], draws[1:, :128])) < limit
    for shift in (1, 2, 3, 4, 128):  # the other lanes of the same Philox call, the next call, a far one
        assert abs(correlation(draws[:, :128], draws.roll(shift, 1)[:, :128])) < limit, shift
        assert abs(correlation(draws[:, :128].square(), draws.roll(shift, 1)[:, :128].square())) < limit, shift


def test_layer_step_and_group_stand_in_different_words():
    draws = [
        standard_normal(1, 8, NoiseKey(1, 2), layer=3, group=4),
        standard_normal(1, 8, NoiseKey(1, 3), layer=2, group=4),
        standard_normal(1, 8, NoiseKey(1, 4), layer=3, group=2),
        standard_normal(1, 8, NoiseKey(2, 1), layer=3, group=4),
    ]
    for i, first in enumerate(draws):
        assert not any(torch.equal(first, second) for second in draws[i + 1 :])


@pytest.mark.parametrize(
    ("seed", "step", "named"), [(-1, 0, "seed: -1"), (2**64, 0, "seed: "), (0, -1, "step: -1"), (0, 2**32, "step: ")]
)
def test_key_bounds(seed, step, named):
    with pytest.raises(ValueError, match=named):
        NoiseKey(seed, step)


def test_more_noise_than_the_counter_holds_is_refused():
    with pytest.raises(ValueError, match="split the batch"):
        standard_normal(2**28, 64, KEY, 0)


def test_empty_draws():
    assert standard_normal(0, 5, KEY, 0).shape == (0, 5)


def test_streams_of_a_seed_differ():
    streams = [(), ("a",), ("b",), ("a", "b"), ("a", 1), ("a", 2), ("ab",), (1, "a")]
    folded = {fold_seed(seed, *stream) for seed in (0, 1, 11) for stream in streams}
    assert len(folded) == 3 * len(streams)
    assert all(NoiseKey(value, 0) for value in folded)
    assert fold_seed(3, "training") == fold_seed(3, "training")
