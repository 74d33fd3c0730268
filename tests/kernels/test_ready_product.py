"""A base layer that makes its own product: the pairs are added to it, and autograd goes both ways."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear
from torch.utils.checkpoint import checkpoint

from abmll.kernels import FrozenLinear, mean_linear, posterior_projection

from .conftest import KEY, LAYER, Harness, Inputs

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
BACKENDS = ("triton", "torch")


@dataclass(frozen=True)
class ReadyHarness(Harness):
    """The base product is made outside, by a layer that saves nothing for a gradient of its weight."""

    def project(self, inputs, backend="triton", mask=None, terms="divergence", key=KEY, layer=LAYER):
        product = linear(inputs.x, *inputs.base)
        arguments = (inputs.x, product, inputs.phi, inputs.theta, self.settings, key, layer)
        return posterior_projection(self.posterior, *arguments, mask, terms, backend)


@pytest.fixture(params=["activation", "weight"])
def ready(request, device) -> ReadyHarness:
    return ReadyHarness(request.param, device)


@pytest.mark.parametrize(("dtype", "groups"), [(FP32, None), (BF16, 2), (FP16, None)], ids=str)
def test_against_the_layer_in_float64(ready, dtype, groups):
    """Both ways of one call: outputs and gradients of x and all factors, as the layer itself gives them in float64."""
    inputs = ready.inputs(tokens=11, inputs=48, outputs=16, dtype=dtype, groups=groups)
    mask = ready.mask(inputs, "random")
    ready.check(inputs, mask)
    upstream, dense = ready.upstream(inputs), Harness(ready.posterior, ready.device)
    exact = dense.exact(inputs, mask, upstream)
    ready.compare(ready.run(inputs, "triton", mask, upstream), dense.run(inputs, "torch", mask, upstream), *exact)


@pytest.mark.parametrize("dtype", [BF16, FP32, FP64], ids=str)
def test_plain_is_the_layer_bit_for_bit(ready, dtype):
    inputs = ready.inputs(tokens=11, inputs=48, outputs=16, dtype=dtype)
    dense = Harness(ready.posterior, ready.device)
    mask, upstream = ready.mask(inputs, "random"), ready.upstream(inputs)
    found, right = (h.run(inputs, "torch", mask, upstream) for h in (ready, dense))
    assert all(torch.equal(value, right[name]) for name, value in found.items())
    product = linear(inputs.x, *inputs.base)
    expected = mean_linear(inputs.x, inputs.base, inputs.phi.mean, 2.0)
    assert torch.equal(mean_linear(inputs.x, product, inputs.phi.mean, 2.0), expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_gradient_passes_through_and_the_product_is_left_alone(ready, backend):
    inputs = ready.inputs(tokens=6, inputs=32, outputs=16, dtype=BF16)
    dy = ready.upstream(inputs)["y"]
    product = linear(inputs.x, *inputs.base).requires_grad_(True)
    before = product.detach().clone()
    x = inputs.x.detach().requires_grad_(True)
    arguments = (inputs.phi, inputs.theta, ready.settings, KEY, LAYER)
    found = posterior_projection(ready.posterior, x, product, *arguments, backend=backend)
    assert torch.equal(product, before)
    by_product, by_x = torch.autograd.grad((found.y * dy).float().sum() + found.kl, [product, x])
    assert torch.equal(by_product, dy)
    # what is left for x: the whole layer's gradient without W0's part
    whole = x.detach().requires_grad_(True)
    full = posterior_projection(ready.posterior, whole, inputs.base, *arguments, backend=backend)
    (expected,) = torch.autograd.grad((full.y * dy).float().sum() + full.kl, whole)
    rest = expected.double() - dy.double() @ inputs.weight.double()
    # two roundings to bf16 of numbers of the whole gradient's size
    bound = 2 * torch.finfo(BF16).eps * float(expected.double().norm())
    assert (by_x.double() - rest).norm() <= bound < 0.1 * rest.norm()


@pytest.mark.parametrize("backend", BACKENDS)
def test_only_the_product_asks_for_a_gradient(ready, backend):
    """As where the adapter is frozen and x comes from before the base layer."""
    inputs = ready.inputs(tokens=6, inputs=32, outputs=16)
    product = linear(inputs.x, *inputs.base).requires_grad_(True)
    arguments = (inputs.phi, inputs.theta, ready.settings, KEY, LAYER)
    y = posterior_projection(ready.posterior, inputs.x, product, *arguments, backend=backend).y
    assert torch.equal(*torch.autograd.grad(y.sum(), product), torch.ones_like(y))


@pytest.mark.parametrize("backend", BACKENDS)
def test_checkpointing_changes_no_bit(ready, backend):
    inputs = ready.inputs(tokens=6, inputs=32, outputs=16, dtype=BF16)
    for leaf in (inputs.x, *inputs.factors):
        leaf.requires_grad_(True)

    def block(x: Tensor) -> tuple[Tensor, Tensor]:
        y, kl, *_ = ready.project(replace(inputs, x=x.tanh()), backend)
        return y.sin(), kl

    outcomes = []
    for run in (block, partial(checkpoint, block, use_reentrant=False)):
        y, kl = run(inputs.x)
        outcomes.append([y, kl, *torch.autograd.grad(y.float().square().sum() + kl, [inputs.x, *inputs.factors])])
    assert all(torch.equal(off, on) for off, on in zip(*outcomes, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_a_graph(ready, backend, mode):
    inputs = ready.inputs(tokens=6, inputs=32, outputs=16, dtype=BF16)
    expected = ready.project(inputs, backend)
    with mode():
        found = ready.project(inputs, backend)
    for value, right in zip(found[:3], expected[:3], strict=True):
        assert torch.equal(value, right)


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast(ready, backend):
    """The product of a layer that gives x's dtype back is taken in the autocast dtype."""
    inputs = ready.inputs(tokens=6, inputs=32, outputs=16)
    product = linear(inputs.x, *inputs.base)
    arguments = (inputs.phi, inputs.theta, ready.settings, KEY, LAYER)
    call = partial(posterior_projection, ready.posterior, backend=backend)
    expected = call(inputs.x.to(BF16), product.to(BF16), *arguments)
    with torch.autocast(ready.device.type, dtype=BF16):
        found = call(inputs.x, product, *arguments)
    assert found.y.dtype == BF16
    assert all(torch.equal(value, right) for value, right in zip(found[:3], expected[:3], strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_products_that_do_not_fit_are_refused(ready, backend):
    inputs: Inputs = ready.inputs(tokens=6, inputs=32, outputs=16)
    product = linear(inputs.x, *inputs.base)
    arguments = (inputs.phi, inputs.theta, ready.settings, KEY, LAYER)
    for wrong in (product[:5], product[:, :8], product.bfloat16(), inputs.weight, product.to("meta")):
        with pytest.raises(ValueError, match=r"^base: torch\..*: the product of this x .*; pass FrozenLinear\(weight"):
            posterior_projection(ready.posterior, inputs.x, wrong, *arguments, backend=backend)
    with pytest.raises(ValueError, match=r"^x: shape \(6, 31\)"):
        posterior_projection(ready.posterior, inputs.x[:, 1:], product, *arguments, backend=backend)
    assert FrozenLinear(inputs.weight).bias is None
