"""The posterior's width by layer against the matrices that it stands for."""

from __future__ import annotations

import math

import pytest
import torch
from made_runs import LAYERS, theta, write_run

from abmll.kernels import GaussianFactors, LowRank, PosteriorSettings
from abmll.kernels.reference import activation_statistics, weight_statistics
from abmll.page.facts import read_run
from abmll.page.posterior import by_module, deviations, ordered, posterior_kind

# 16 / rank 2
SETTINGS = PosteriorSettings(
    scaling=8.0, log_variance_scaling=8.0, log_variance_offset=-8.0, prior_shape=1.0, prior_rate=0.01
)


def factors(layer: str) -> GaussianFactors:
    tensors = {name: value.double() for name, value in theta(LAYERS).items()}
    pairs = (LowRank(tensors[f"{layer}.{kind}.a"], tensors[f"{layer}.{kind}.b"]) for kind in ("mean", "log_variance"))
    return GaussianFactors(*pairs)


def test_weights_are_those_of_the_reference(tmp_path):
    run = read_run(write_run(tmp_path / "run", adapters={"posterior": "weight"}), "run")
    found = deviations(run)
    assert posterior_kind(run) == "weight" and list(found) == LAYERS
    for layer, own in found.items():
        log = 0.5 * weight_statistics(factors(layer), SETTINGS)[1]
        assert own.mean == pytest.approx(float(log.mean()), rel=1e-5)
        assert own.spread == pytest.approx(float(log.std(correction=0)), rel=1e-5)


def test_activations_are_those_of_the_reference_on_standard_normal_inputs(tmp_path):
    """Over 200,000 tokens; the mean of all is within a few hundredths of what it is in the limit."""
    run = read_run(write_run(tmp_path / "run"), "run")
    x = torch.randn(200_000, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    assert posterior_kind(run) == "activation"
    for layer, own in deviations(run).items():
        log = 0.5 * activation_statistics(x, factors(layer), SETTINGS)[1]
        assert own.mean == -4.0 == pytest.approx(float(log.mean()), abs=0.1 * own.spread)
        assert own.spread == pytest.approx(float(log.std()), rel=0.01)


def test_the_log_variances_own_alpha_counts(tmp_path):
    own = write_run(tmp_path / "own", adapters={"posterior": "weight", "alpha": 3.0, "log_variance_alpha": 16.0})
    both = write_run(tmp_path / "both", adapters={"posterior": "weight"})
    assert deviations(read_run(own, "run")) == deviations(read_run(both, "run"))


def test_at_the_start_every_deviation_is_that_of_c(tmp_path):
    tensors = {name: value * (not name.endswith(".b")) for name, value in theta(LAYERS).items()}
    for posterior in ("activation", "weight"):
        folder = write_run(tmp_path / posterior, tensors=tensors, adapters={"posterior": posterior})
        assert {tuple(own) for own in deviations(read_run(folder, "run")).values()} == {(-4.0, 0.0)}


def test_blob_has_its_factors_own(tmp_path):
    name = "model.layers.0.self_attn.q_proj"
    tensors = {f"{name}.deviations.root": torch.tensor([[0.1, 0.2], [0.1, 0.2]]), f"{name}.mean.a": torch.ones(2, 2)}
    run = read_run(write_run(tmp_path / "run", tensors=tensors, layers=[name], method={"name": "blob"}), "run")
    (found,) = deviations(run).values()
    assert posterior_kind(run) == "blob"
    assert found.mean == pytest.approx(math.log(0.02), rel=1e-6)  # the geometric mean of 0.01 and 0.04
    assert found.spread == pytest.approx(math.log(2), rel=1e-6)


def test_a_point_estimate_has_none(tmp_path):
    tensors = {"model.layers.0.self_attn.q_proj.mean.a": torch.ones(2, 6)}
    run = read_run(write_run(tmp_path / "run", tensors=tensors, method={"name": "reptile"}), "run")
    assert posterior_kind(run) is None and deviations(run) == {}


def test_layers_become_curves_by_module():
    names = [f"model.layers.{block}.{path}" for block in (2, 10) for path in ("self_attn.q_proj", "mlp.up_proj")]
    assert by_module(dict(zip(names, (1, 2, 3, 4), strict=True))) == {
        "self_attn.q_proj": {2: 1, 10: 3},
        "mlp.up_proj": {2: 2, 10: 4},
    }
    assert by_module({"model.layers.0.self_attn.q_proj": 5}) == {"q_proj": {0: 5}}
    assert by_module({0: 5, 1: 6}) == {"all layers": {0: 5, 1: 6}}
    assert ordered(["h.10.q", "h.9.q", "h.9.k"]) == ["h.9.k", "h.9.q", "h.10.q"]
