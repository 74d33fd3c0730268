"""The numbers of a short run are those that were written down: to the bit where they were made, else up to rounding."""

from __future__ import annotations

import json

import pytest
import torch

from abmll.kernels.backends import interpreted

from .make import BACKENDS, EPISODES, POSTERIORS, STEPS, Numbers, machine, path_of, run

# The longest row of fp32 roundings, all to one side: sums over at most 200 tokens and 128 columns, forward and back
# through two layers, in the inner and outer steps of both episodes.
TOKENS, COLUMNS, LAYERS = 200, 128, 2
BOUND = (TOKENS + COLUMNS) * LAYERS * 2 * (STEPS + 1) * EPISODES * 2.0**-24

CASES = [
    pytest.param(
        backend,
        posterior,
        marks=pytest.mark.skipif(
            backend == "triton" and not interpreted(), reason="the file was made in Triton's interpreter"
        ),
    )
    for backend in BACKENDS
    for posterior in POSTERIORS
]


def golden(backend: str, posterior: str) -> tuple[dict[str, str], Numbers]:
    """The machine that made a file, and its numbers."""
    kept = json.loads(path_of(backend, posterior).read_text())
    return kept["machine"], {
        name: [float.fromhex(value) for value in values] for name, values in kept["numbers"].items()
    }


def apart(found: Numbers, kept: Numbers) -> float:
    """The largest difference in units of the largest number under the same name."""
    assert found.keys() == kept.keys()
    largest = 0.0
    for name, values in kept.items():
        scale = max(map(abs, values)) or 1.0
        largest = max([largest, *(abs(a - b) / scale for a, b in zip(found[name], values, strict=True))])
    return largest


@pytest.mark.parametrize(("backend", "posterior"), CASES)
def test_the_numbers_are_the_golden_ones(backend, posterior):
    made_on, kept = golden(backend, posterior)
    found = run(backend, posterior)
    if made_on == machine():
        assert found == kept
    else:
        assert apart(found, kept) < BOUND


@pytest.mark.parametrize("posterior", POSTERIORS)
def test_the_bound_holds_for_other_roundings_and_not_for_another_scale(posterior):
    """The same run in float64, with next to no rounding, is within it; alpha (1 + 1e-3) is not."""
    exact, shaken = run("reference", posterior, dtype=torch.float64), run("closed_form", posterior, alpha=16.016)
    for backend in BACKENDS:
        _, kept = golden(backend, posterior)
        assert apart(exact, kept) < BOUND / 10
        assert apart(shaken, kept) > 2 * BOUND


def test_every_episode_is_as_long_as_the_bound_says():
    from ..conftest import build_tiny

    tiny = build_tiny(method={"inner_steps": STEPS}, tasks={"batch_size": 1})
    for index in range(EPISODES):
        assert all(sum(batch.prompts.sizes) <= TOKENS for batch in tiny.episode(index).support)


@pytest.mark.parametrize("posterior", POSTERIORS)
def test_what_a_file_holds(posterior):
    """Every step's terms and the logits of 26 letters; the parts that must differ, differ."""
    _, kept = golden("reference", posterior)
    assert len(kept["episode 0 drawn logits"]) == len(kept["episode 1 mean logits"]) == 26
    assert kept["episode 0 inner 0 kl"] == [0.0] and kept["episode 0 inner 1 kl"][0] > 0
    assert kept["episode 0 drawn logits"] != kept["episode 0 mean logits"]
    assert kept["episode 0 inner 0 nll"] != kept["episode 1 inner 0 nll"]
