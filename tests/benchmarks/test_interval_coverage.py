"""The benchmark counts misses rightly, and says what the choice of interval rests on."""

from __future__ import annotations

import json

import numpy as np
import pytest


@pytest.fixture
def coverage(load):
    return load("interval_coverage")


def test_an_interval_that_is_too_narrow_is_found_out(coverage, monkeypatch):
    """[-9, 9] holds every mean; a point hardly any; of six normal values ours is the range, which misses 1 in 32."""
    chosen = {"wide": lambda values: (-9.0, 9.0), "point": lambda values: (values[0], values[0])}
    monkeypatch.setattr(coverage, "INTERVALS", {**chosen, "ours": coverage.of_subsets})
    rows = coverage.measure(6, 300, np.random.default_rng(0))
    normal = {row["interval"]: row for row in rows if row["population"] == "normal"}
    assert normal["wide"]["missed"] == 0 and normal["wide"]["width"] == 18
    assert normal["point"]["missed"] == 1 and normal["point"]["width"] == 0
    assert normal["ours"]["missed"] < 2 / 64 + 4 * (2 / 64 / 300) ** 0.5  # four standard errors of the count


def test_the_command(coverage, tmp_path, capsys):
    coverage.main(["--tasks", "6", "--sets", "2", "--output", str(tmp_path / "found.json")])
    found = json.loads((tmp_path / "found.json").read_text())
    assert len(found["rows"]) == len(coverage.POPULATIONS) * len(coverage.INTERVALS)
    assert "| 6 | normal |" in capsys.readouterr().out


def test_t_and_bootstrap_by_hand(coverage):
    values = np.array([1.0, 2.0, 3.0, 4.0])
    low, high = coverage.of_t(values)
    assert (low + high) / 2 == 2.5 and high - low == pytest.approx(2 * 3.182446 * 1.290994 / 2)
    assert coverage.of_bootstrap(np.full(4, 0.5), "BCa") == (0.5, 0.5)
    low, high = coverage.of_bootstrap(values, "percentile")
    assert 1 <= low < 2.5 < high <= 4
