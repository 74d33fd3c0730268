"""The learner's gradients: against autograd, with and without checkpointing, and what they must not depend on."""

from __future__ import annotations

import pytest
import torch

from abmll.build import rebuild_for_scoring
from abmll.kernels import NoiseKey
from abmll.kernels.reference import (
    activation_statistics,
    negative_log_prior,
    weight_statistics,
)
from abmll.models.packing import is_packed

POSTERIORS = ("activation", "weight")
KEY = NoiseKey(31, 4)


def phi_gradient(tiny, batch=None, key=KEY, lr=1.0):
    """What one `phi_step` subtracts from phi under SGD: its gradient, through the public call alone."""
    before = {name: value.detach().clone() for name, value in tiny.adapters.phi.items()}
    terms = tiny.learner.phi_step(batch or tiny.batch, key, torch.optim.SGD(tiny.adapters.phi.values(), lr=lr))
    gradient = {name: (before[name] - value.detach()) / lr for name, value in tiny.adapters.phi.items()}
    with torch.no_grad():
        for name, value in tiny.adapters.phi.items():
            value.copy_(before[name])
    return gradient, terms


def assert_same(first, second, rtol=1e-12):
    assert first.keys() == second.keys()
    for name, value in first.items():
        torch.testing.assert_close(value, second[name], rtol=rtol, atol=rtol * float(value.abs().max()))


def objective(tiny, batch, key):
    """NLL + beta KL + (beta / M) (-log prior), with a graph that reaches theta; and the prior alone."""
    inputs = {}
    hooks = [
        layer.register_forward_pre_hook(lambda _, arguments, name=name: inputs.__setitem__(name, arguments[0].detach()))
        for name, layer in tiny.adapters.layers.items()
    ]
    logits, terms = tiny.learner.forward(batch, key, "kl")
    for hook in hooks:
        hook.remove()
    prior = 0.0
    for name, layer in tiny.adapters.layers.items():
        if layer.posterior == "activation":
            statistics = activation_statistics(inputs[name][0], layer.theta.factors(), layer.settings)
        else:
            statistics = weight_statistics(layer.theta.factors(), layer.settings)
        prior = prior + negative_log_prior(*statistics, layer.settings).sum()
    beta, num_tasks = tiny.config.method.beta, len(tiny.parts.tasks.train)
    return tiny.learner.nll(logits, batch).sum() + beta * terms.total_kl().sum() + beta / num_tasks * prior, prior


@pytest.mark.parametrize("posterior", POSTERIORS)
def test_theta_gradient_equals_autograd_on_the_full_objective(posterior, build_tiny):
    tiny = build_tiny(torch.float64, adapters={"posterior": posterior}, method={"prior_shape": 1.7}).scatter()
    gradient, terms = tiny.learner.theta_gradient_kl(tiny.batch, KEY)
    theta = tiny.adapters.theta
    for value in theta.values():
        value.requires_grad_(True)
    loss, prior = objective(tiny, tiny.batch, KEY)
    expected = dict(zip(theta, torch.autograd.grad(loss, list(theta.values())), strict=True))
    assert all(value.abs().max() > 0 for value in expected.values())
    assert_same({name: value.squeeze(0) for name, value in gradient.items()}, expected, rtol=1e-10)
    torch.testing.assert_close(terms.prior, prior.detach()[None])
    norm = torch.cat([value.flatten() for value in expected.values()]).norm()
    torch.testing.assert_close(terms.gradient_norm, norm[None])


@pytest.mark.parametrize("posterior", POSTERIORS)
def test_theta_gradient_takes_no_backward_pass_and_builds_no_graph(posterior, build_tiny, monkeypatch):
    tiny = build_tiny(adapters={"posterior": posterior}).scatter()
    batch, saved = tiny.batch, []

    def keep(tensor):
        saved.append(tensor.shape)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        tiny.learner.phi_step(batch, KEY, tiny.learner.optimizer(1e-3))
        assert saved  # an inner step does build one
        saved.clear()

        def refuse(*_, **__):
            raise AssertionError("a backward pass")

        for name in ("torch.autograd.backward", "torch.autograd.grad", "torch.Tensor.backward"):
            monkeypatch.setattr(name, refuse)
        gradient, terms = tiny.learner.theta_gradient_kl(batch, KEY)
    assert saved == []
    assert not any(value.requires_grad for value in (*gradient.values(), *terms))
    assert all(value.grad is None for value in tiny.model.parameters())


@pytest.mark.parametrize("posterior", POSTERIORS)
def test_first_order_adds_the_nll_gradient_at_phi(posterior, build_tiny):
    tiny = build_tiny(torch.float64, adapters={"posterior": posterior}).scatter()
    found, terms = tiny.learner.theta_gradient_first_order(tiny.batch, KEY)
    local, local_terms = tiny.learner.theta_gradient_kl(tiny.batch, KEY)
    logits, _ = tiny.learner.forward(tiny.batch, KEY)
    phi = tiny.adapters.phi
    nll = torch.autograd.grad(tiny.learner.nll(logits, tiny.batch), list(phi.values()))
    assert all(value.abs().max() > 0 for value in nll)
    assert_same(found, {name: local[name] + value for name, value in zip(phi, nll, strict=True)})
    torch.testing.assert_close((terms.nll, terms.kl, terms.prior), (local_terms.nll, local_terms.kl, local_terms.prior))
    assert all(value.grad is None for value in phi.values())


@pytest.mark.parametrize("posterior", POSTERIORS)
def test_phi_gradient_equals_autograd(posterior, build_tiny):
    tiny = build_tiny(torch.float64, adapters={"posterior": posterior}).scatter()
    gradient, terms = phi_gradient(tiny)
    logits, recorded = tiny.learner.forward(tiny.batch, KEY, "kl")
    nll, kl = tiny.learner.nll(logits, tiny.batch), recorded.total_kl()
    parts = [torch.autograd.grad(term, list(tiny.adapters.phi.values()), retain_graph=True) for term in (nll, kl)]
    beta = tiny.config.method.beta
    # the model's norms and the NLL round to fp32: a sum of two passes is not the pass of a sum
    assert_same(gradient, {name: a + beta * b for name, a, b in zip(gradient, *parts, strict=True)}, rtol=1e-6)
    torch.testing.assert_close((terms.nll, terms.kl), (nll.detach(), kl.detach()))
    norms = [torch.cat([value.flatten() for value in part]).norm() for part in parts]
    assert 1e-3 < beta * norms[1] / norms[0] < 1e3  # neither term hides the other


@pytest.mark.parametrize("estimate", ["closed_form", "sample"])
@pytest.mark.parametrize("posterior", POSTERIORS)
def test_checkpointing_does_not_change_a_gradient(posterior, estimate, build_tiny):
    results, calls = [], []
    for checkpointing in (False, True):
        tiny = build_tiny(
            torch.float64,
            adapters={"posterior": posterior},
            method={"kl_estimate": estimate},
            trainer={"activation_checkpointing": checkpointing},
        ).scatter()
        layer, seen = next(iter(tiny.adapters.layers.values())), []
        layer.register_forward_pre_hook(lambda *_, seen=seen: seen.append(1))
        gradient, terms = phi_gradient(tiny)
        calls.append(len(seen))
        first_order, first_order_terms = tiny.learner.theta_gradient_first_order(tiny.batch, KEY)
        local, _ = tiny.learner.theta_gradient_kl(tiny.batch, KEY)
        other_noise, _ = phi_gradient(tiny, key=NoiseKey(KEY.seed, KEY.step + 1))
        results.append((gradient, first_order, local, dict(enumerate((*terms, *first_order_terms)))))
        difference = sum(float((gradient[name] - other_noise[name]).norm()) for name in gradient)
        assert difference > 0.01 * sum(float(value.norm()) for value in gradient.values())  # wrong noise would show
    assert calls == [1, 2]  # checkpointing did recompute
    for plain, recomputed in zip(*results, strict=True):
        assert_same(plain, recomputed)


@pytest.mark.parametrize("method", ["abmll", "lora"])
def test_gradients_reach_the_documented_parameters_alone(method, build_tiny):
    tiny = build_tiny(method={"name": method})
    gaussian = method == "abmll"
    base = {name: value.clone() for name, value in tiny.model.named_parameters() if ".base." in name or "." not in name}
    frozen = {name: value.clone() for name, value in tiny.model.named_parameters() if not value.requires_grad}
    assert base and base.keys() < frozen.keys()
    got = set()

    def look(*_):
        got.update(name for name, value in tiny.model.named_parameters() if value.grad is not None)

    optimizer = tiny.learner.optimizer(1e-2)
    optimizer.register_step_pre_hook(look)
    tiny.learner.phi_step(tiny.batch, KEY if gaussian else None, optimizer)
    modules = [f"model.layers.{i}.self_attn.{name}" for i in (0, 1) for name in ("q_proj", "v_proj", "o_proj")]
    kinds = ("mean", "log_variance") if gaussian else ("mean",)
    assert got == {f"{module}.phi.{kind}.{factor}" for module in modules for kind in kinds for factor in "ab"}
    assert {name for name, value in tiny.model.named_parameters() if value.requires_grad} == got

    tiny.method.update(tiny.learner, tiny.visit())
    assert all(value.grad is None for value in tiny.model.parameters())
    for name, value in tiny.model.named_parameters():
        assert name not in frozen or torch.equal(value, frozen[name]), name  # theta too: the engine alone moves it


def test_nll_is_a_sum_or_a_mean_over_examples(build_tiny):
    by_sum, by_mean = (
        build_tiny(torch.float64, method={"nll_reduction": kind, "beta": 0.0}, tasks={"batch_size": 4}).scatter()
        for kind in ("sum", "mean")
    )
    (gradient, terms), (gradient_mean, terms_mean) = phi_gradient(by_sum), phi_gradient(by_mean)
    assert float(terms.nll) == pytest.approx(4 * float(terms_mean.nll), rel=1e-6)
    assert_same(gradient, {name: 4 * value for name, value in gradient_mean.items()}, rtol=1e-6)
    logits, _ = by_sum.learner.forward(by_sum.batch, KEY)
    by_hand = -logits.detach().log_softmax(dim=-1)[torch.arange(4), by_sum.batch.target].sum()
    assert float(terms.nll) == pytest.approx(float(by_hand), rel=1e-6)


@pytest.mark.parametrize("posterior", POSTERIORS)
def test_without_beta_the_kl_has_no_effect(posterior, build_tiny):
    tiny = build_tiny(torch.float64, adapters={"posterior": posterior}, method={"beta": 0.0}).scatter()
    gradient, terms = phi_gradient(tiny)
    outer, _ = tiny.learner.theta_gradient_kl(tiny.batch, KEY)
    assert not any(value.any() for value in outer.values())
    with torch.no_grad():
        for value in tiny.adapters.theta.values():
            value += 0.1
    moved, moved_terms = phi_gradient(tiny)
    assert moved_terms.kl != terms.kl
    assert all(torch.equal(value, moved[name]) for name, value in gradient.items())


@pytest.mark.parametrize("posterior", POSTERIORS)
def test_the_mean_ignores_noise_variance_and_theta(posterior, build_tiny):
    tiny = build_tiny(adapters={"posterior": posterior}).scatter()
    point = build_tiny(method={"name": "lora"})
    with torch.no_grad():
        for name, value in point.adapters.phi.items():
            value.copy_(tiny.adapters.phi[name])
        mean, terms = tiny.learner.forward(tiny.batch, None)
        sampled, _ = tiny.learner.forward(tiny.batch, KEY)
        assert torch.equal(tiny.learner.forward(tiny.batch, None)[0], mean) and not terms.kl
        assert not torch.equal(sampled, mean)
        for name, value in (*tiny.adapters.theta.items(), *tiny.adapters.phi.items()):
            if ".log_variance." in name or value is tiny.adapters.theta.get(name):
                value += 1.0
        assert torch.equal(tiny.learner.forward(tiny.batch, None)[0], mean)
        assert torch.equal(point.learner.forward(tiny.batch, None)[0], mean)


@pytest.mark.parametrize("posterior", POSTERIORS)
def test_padding_does_not_change_the_kl_and_the_theta_gradient(posterior, build_tiny):
    """Where prompts are padded the noise lies in other places: at c = -60 it moves nothing, and what is left is the
    mask."""
    tiny = build_tiny(
        torch.float64, adapters={"posterior": posterior, "log_variance_offset": -60.0}, method={"beta": 1e-25}
    )
    tiny.scatter(size=1e-3)
    padded = build_tiny(
        torch.float64,
        model={"attention": "eager"},
        adapters={"posterior": posterior, "log_variance_offset": -60.0},
        method={"beta": 1e-25},
    ).scatter(size=1e-3)
    assert is_packed(tiny.model) and not is_packed(padded.model)
    assert len(set(tiny.batch.prompts.sizes)) > 1  # so that there is some padding
    gradient, terms = tiny.learner.theta_gradient_kl(tiny.batch, KEY)
    gradient_padded, terms_padded = padded.learner.theta_gradient_kl(padded.batch, KEY)
    assert_same(gradient, gradient_padded, rtol=1e-5)
    torch.testing.assert_close(terms_padded, terms, rtol=1e-5, atol=0)


def test_padded_prompts_are_not_scored_side_by_side(build_tiny):
    """By settings of a finished run neither: its model is there, and is not built again."""
    tiny = build_tiny(model={"attention": "eager"})
    beside = tiny.config.model_copy(update={"trainer": tiny.config.trainer.model_copy(update={"parallel_episodes": 2})})
    with pytest.raises(ValueError, match=r"trainer\.parallel_episodes: 2: prompts are padded"):
        rebuild_for_scoring(tiny.parts, beside, "tiny.yaml")


@pytest.mark.parametrize("posterior", POSTERIORS)
def test_without_beta_a_kl_that_overflows_has_no_part_in_the_gradient(posterior, build_tiny):
    """0 times it would be NaN. (At c = -80 exp(-log_variance) is near fp32's end.)"""
    adapters = {"posterior": posterior, "log_variance_offset": -80.0}
    tiny = build_tiny(adapters=adapters, method={"beta": 0.0}).scatter(0.3)
    gradient, terms = phi_gradient(tiny)
    assert not terms.kl.isfinite().all() and terms.nll.isfinite().all()
    assert all(value.isfinite().all() for value in gradient.values())
    assert max(float(value.abs().max()) for value in gradient.values()) > 1e-3
