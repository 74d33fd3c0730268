"""What the layers share: noise that a recomputation draws again, and terms that it does not record again."""

from __future__ import annotations

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from abmll.adapters import OuterWeights
from abmll.kernels import NoiseKey

KEY = NoiseKey(8, 3)


@pytest.fixture(params=["activation", "weight"])
def posterior(request):
    return request.param


@pytest.fixture
def adapted(make_model, inject, posterior):
    model = make_model("qwen2")
    adapters = inject(model, posterior=posterior, log_variance_offset=-4.0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for side in (adapters.theta, adapters.phi):
            for value in side.values():
                value += 0.05 * torch.randn(value.shape, generator=generator)
    return model, adapters


def mask_of(input_ids):
    return torch.ones_like(input_ids, dtype=torch.bool)


def test_without_a_key_the_mean_runs_and_nothing_is_recorded(adapted, input_ids):
    model, adapters = adapted
    with torch.no_grad(), adapters.context.forward_pass(None, mask_of(input_ids)) as terms:
        mean = model(input_ids=input_ids).logits
    assert terms.kl == {} and terms.theta == {}
    with torch.no_grad(), adapters.context.forward_pass(KEY, mask_of(input_ids)):
        assert not torch.allclose(model(input_ids=input_ids).logits, mean)


def test_a_pass_records_one_kl_a_layer_and_theta_gradients_when_asked(adapted, input_ids):
    model, adapters = adapted
    with torch.no_grad():
        with adapters.context.forward_pass(KEY, mask_of(input_ids), kl=True) as terms:
            model(input_ids=input_ids)
        with adapters.context.forward_pass(KEY, mask_of(input_ids), outer=OuterWeights(1.0, 0.5)) as outer:
            model(input_ids=input_ids)
    assert len(terms.kl) == len(adapters.layers) and terms.theta == {}
    assert sorted(outer.theta) == list(range(len(adapters.layers)))
    torch.testing.assert_close(outer.total_theta_kl(), terms.total_kl())
    assert terms.total_kl() > 0


def test_kl_by_layer_is_in_the_layers_order_whatever_that_of_their_calls(adapted):
    """Every layer of another input size or other factors; each one's KL is what it has alone."""
    _, adapters = adapted
    layers = list(adapters.layers.values())
    inputs = [torch.randn(2, 9, layer.base.in_features, generator=torch.Generator().manual_seed(1)) for layer in layers]
    alone = []
    for layer, x in zip(layers, inputs, strict=True):
        with torch.no_grad(), adapters.context.forward_pass(KEY, kl=True) as terms:
            layer(x)
        alone.append(terms.total_kl())
    with torch.no_grad(), adapters.context.forward_pass(KEY, kl=True) as terms:
        for layer, x in zip(reversed(layers), reversed(inputs), strict=True):
            layer(x)
    assert torch.equal(terms.kl_by_layer(), torch.stack(alone))
    assert len({float(kl) for kl in alone}) == len(layers)  # or any order would do


def test_terms_are_closed_behind_the_pass_even_after_an_error(adapted, input_ids):
    model, adapters = adapted
    with pytest.raises(RuntimeError, match="stop"), adapters.context.forward_pass(KEY, mask_of(input_ids)) as terms:
        raise RuntimeError("stop")
    model(input_ids=input_ids)
    assert terms.kl == {} and adapters.context.recorded is None and adapters.context.names == KEY


def test_recomputation_draws_the_same_noise_and_records_nothing(adapted, input_ids):
    _, adapters = adapted
    layer = next(iter(adapters.layers.values()))
    calls = []
    layer.register_forward_hook(lambda _, arguments, output: calls.append(output.detach().clone()))
    x = torch.randn(2, 9, 48, generator=torch.Generator().manual_seed(1)).requires_grad_(True)

    gradients = []
    for recompute in (False, True):
        with adapters.context.forward_pass(KEY, mask_of(input_ids), kl=True) as terms:
            y = checkpoint(layer, x, use_reentrant=False, early_stop=False) if recompute else layer(x)
        (y.square().sum() + 0.1 * terms.total_kl()).backward()
        assert len(terms.kl) == 1
        gradients.append([x.grad, *(p.grad for p in layer.phi.parameters())])
        x.grad = None
        layer.zero_grad(set_to_none=True)
    assert len(calls) == 3  # the third is the recomputation
    assert torch.equal(calls[0], calls[1]) and torch.equal(calls[1], calls[2])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
