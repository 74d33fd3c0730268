"""Plain PyTorch as a model runs it: the contract's numbers, and how little it keeps and takes."""

from __future__ import annotations

import weakref
from dataclasses import replace
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from abmll.kernels import NoiseKey, Projection, backends, bands, mean_linear, noise, plain, reference, standard_normal

from .conftest import FACTORS, KEY, LAYER, Harness, exact_normal, widened

BF16, FP32, FP64 = torch.bfloat16, torch.float32, torch.float64
CPU = torch.device("cpu")
FOUR_ELEMENTS = 4 * torch.float32.itemsize


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch):
    """Everything is made again in the backward pass, which a CPU does not do by itself."""
    monkeypatch.setattr(plain, "on_gpu", lambda _: True)


class Contract(Harness):
    """The same calls on `reference`: noise and dense matrices made whole, and kept for the backward pass."""

    def project(self, inputs, backend="torch", mask=None, terms="divergence", key=KEY, layer=LAYER):
        # all rows at once, whatever the groups: another number of rows is another order of sums
        base = torch.nn.functional.linear(inputs.x, *inputs.base)
        if not inputs.phi.grouped():
            return self.project_group(inputs.x, base, inputs.phi, inputs, mask, terms, key, layer, 0)
        found = [
            self.project_group(x, y0, phi, inputs, None if mask is None else mask[group], terms, key, layer, group)
            for group, (x, y0, phi) in enumerate(zip(inputs.x, base, inputs.phi.of_groups(), strict=True))
        ]
        parts = zip(*(one[:3] for one in found), strict=True)
        return Projection(*(None if part[0] is None else torch.stack(part) for part in parts))

    def project_group(self, x, base, phi, inputs, mask, terms, key, layer, group):
        theta, outputs = inputs.theta if terms == "divergence" else None, inputs.weight.shape[0]
        size = (x.shape[-2], outputs) if self.posterior == "activation" else inputs.weight.shape
        drawn = plain.standard_normal(*size, key, layer, group)
        arguments = (x, phi, theta, self.settings, drawn)
        if self.posterior == "activation":
            sample = reference.activation_sample(*arguments, mask)
        else:
            sample = reference.weight_sample(*arguments)
        return Projection(reference.add_change(base, sample.change), *sample[1:])

    def theta(self, inputs, backend="torch", mask=None, projection=None):
        if not inputs.phi.grouped():
            return self.theta_group(inputs.x, inputs.phi, inputs.theta, mask)
        found = [
            self.theta_group(x, phi, inputs.theta, None if mask is None else mask[group])
            for group, (x, phi) in enumerate(zip(inputs.x, inputs.phi.of_groups(), strict=True))
        ]
        return {name: torch.stack([each[name] for each in found]) for name in found[0]}

    def theta_group(self, x, phi, theta, mask):
        factors = (phi, theta, self.settings)
        if self.posterior == "activation":
            found = reference.activation_theta_gradient(x, *factors, mask, 0.75, 0.25)
        else:
            found = reference.weight_theta_gradient(*factors, 0.75, 0.25)
        gradient = [factor for pair in found.gradient for factor in pair]
        return {"kl": found.kl, "prior": found.negative_log_prior, **dict(zip(FACTORS[4:], gradient, strict=True))}


@pytest.fixture(params=["activation", "weight"])
def pair(request) -> tuple[Harness, Contract]:
    return Harness(request.param, CPU), Contract(request.param, CPU)


def same(found: dict, right: dict) -> None:
    assert found.keys() == right.keys()
    for name, value in found.items():
        assert value.dtype == right[name].dtype and torch.equal(value, right[name]), name


@pytest.mark.parametrize("terms", ["divergence", "none"])
@pytest.mark.parametrize("groups", [None, 3])
@pytest.mark.parametrize("dtype", [BF16, FP32, FP64], ids=str)
def test_activations_are_the_contract_bit_for_bit(dtype, groups, terms):
    harness, contract = Harness("activation", CPU), Contract("activation", CPU)
    inputs = harness.inputs(tokens=13, inputs=40, outputs=24, dtype=dtype, groups=groups)
    mask = harness.mask(inputs, "random")
    upstream = harness.upstream(inputs, ("y", "kl", "prior") if terms == "divergence" else ("y",))
    same(*(h.run(inputs, "torch", mask, upstream, terms=terms) for h in (harness, contract)))
    same(*(h.theta(inputs, "torch", mask) for h in (harness, contract)))


@pytest.mark.parametrize("posterior", ["activation", "weight"])
def test_a_cpu_keeps_what_it_made_and_finds_the_same(posterior, monkeypatch):
    harness = Harness(posterior, CPU)
    inputs = harness.inputs(tokens=13, inputs=40, outputs=24, dtype=BF16)
    upstream, drawn = harness.upstream(inputs), []
    monkeypatch.setattr(plain, "standard_normal", lambda *given: drawn.append(given) or standard_normal(*given))
    recomputed = harness.run(inputs, "torch", None, upstream)
    assert len(drawn) == 2
    monkeypatch.setattr(plain, "on_gpu", backends.on_gpu)
    same(harness.run(inputs, "torch", None, upstream), recomputed)
    assert len(drawn) == 3


@pytest.mark.parametrize("groups", [None, 2])
@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
def test_bands_hold_to_the_float64_contract(pair, dtype, groups, monkeypatch):
    """Three bands of at most 64 of 150 rows: of the weight matrix, or of tokens."""
    harness, contract = pair
    tokens, outputs = (150, 20) if harness.posterior == "activation" else (5, 150)
    inputs = harness.inputs(tokens, 36, outputs, dtype=dtype, groups=groups)
    mask, upstream = harness.mask(inputs, "random"), harness.upstream(inputs)
    wide = {name: value.double() for name, value in upstream.items()}
    right, right_theta = contract.run(inputs, mask=mask, upstream=upstream), contract.theta(inputs, mask=mask)
    with patch("abmll.kernels.plain.standard_normal", exact_normal):
        exact = [contract.run(made, mask=mask, upstream=wide) for made in widened(inputs)]
    exact_theta = [contract.theta(made, mask=mask) for made in widened(inputs)]
    drawn = []
    monkeypatch.setattr(plain, "standard_normal", lambda *given: drawn.append(given[0]) or standard_normal(*given))
    monkeypatch.setattr(bands, "SCRATCH_BYTES", 1)
    harness.compare(harness.run(inputs, "torch", mask, upstream), right, *exact)
    harness.compare(harness.theta(inputs, "torch", mask), right_theta, *exact_theta)
    assert sorted(drawn) == sorted(2 * (groups or 1) * [64, 64, 22])  # forward, and again backward


@pytest.mark.parametrize("dtype", [BF16, FP32, FP64], ids=str)
@pytest.mark.parametrize("groups", [None, 2])
def test_the_mean_is_the_contract_bit_for_bit(dtype, groups):
    inputs = Harness("activation", CPU).inputs(tokens=9, inputs=40, outputs=24, dtype=dtype, groups=groups)
    leaves = [leaf.requires_grad_(True) for leaf in (inputs.x, *inputs.phi.mean)]
    if groups is None:
        right = reference.mean_linear(inputs.x, *inputs.base, inputs.phi.mean, 2.0)
    else:
        wide = inputs.x.to(reference.compute_dtype(inputs.x))
        alone = zip(wide, inputs.phi.of_groups(), strict=True)
        change = torch.stack([reference.low_rank_product(x, phi.mean, 2.0) for x, phi in alone])
        right = reference.add_change(torch.nn.functional.linear(inputs.x, *inputs.base), change)
    found = mean_linear(inputs.x, inputs.base, inputs.phi.mean, 2.0)
    assert found.dtype == dtype and torch.equal(found, right)
    dy = torch.randn(found.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    for one, other in zip(*(torch.autograd.grad(y, leaves, dy) for y in (found, right)), strict=True):
        assert torch.equal(one, other)


def test_the_mean_under_autocast_keeps_its_factors_wide():
    inputs = Harness("activation", CPU).inputs(tokens=9, inputs=40, outputs=24)
    narrow = inputs.map(Tensor.bfloat16)
    expected = mean_linear(narrow.x, narrow.base, inputs.phi.mean, 2.0)
    with torch.autocast("cpu", dtype=BF16):
        found = mean_linear(inputs.x, inputs.base, inputs.phi.mean, 2.0)
    assert found.dtype == BF16 and torch.equal(found, expected)


# what is kept, and what lives at a time


class Living(TorchDispatchMode):
    """Bytes of the storages that were made under it and live, and the most that lived at a time."""

    def __init__(self):
        super().__init__()
        self.bytes, self.peak, self.seen = 0, 0, weakref.WeakSet()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        given = {leaf.untyped_storage().data_ptr() for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                storage = leaf.untyped_storage()
                if storage not in self.seen and storage.data_ptr() not in given:
                    self._born(storage)
        return result

    def _born(self, storage):
        self.seen.add(storage)
        self.bytes += storage.nbytes()
        self.peak = max(self.peak, self.bytes)
        weakref.finalize(storage, self._gone, storage.nbytes())

    def _gone(self, size: int) -> None:
        self.bytes -= size


def training(inputs) -> None:
    for leaf in (inputs.x, *inputs.factors):
        leaf.requires_grad_(True)


@pytest.mark.parametrize("terms", ["divergence", "none"])
@pytest.mark.parametrize("groups", [None, 2])
def test_what_lives_after_a_projection_is_y(pair, terms, groups):
    """Nothing else that was made in it: the backward pass has x, the factors and integers."""
    harness, contract = pair
    inputs = harness.inputs(tokens=24, inputs=48, outputs=40, dtype=BF16, groups=groups)
    training(inputs)
    mask = harness.mask(inputs, "random")
    with Living() as living:
        projection = harness.project(inputs, "torch", mask, terms)
        scalars = 64 if terms == "divergence" else 0
        assert projection.y.requires_grad
        assert projection.y.nbytes <= living.bytes <= projection.y.nbytes + scalars
    with Living() as living:
        projection = contract.project(inputs, "torch", mask, terms)
        assert living.bytes > 5 * projection.y.nbytes  # what this test is there to catch


def test_what_lives_after_a_mean_is_y():
    inputs = Harness("activation", CPU).inputs(tokens=24, inputs=48, outputs=40, dtype=BF16)
    training(inputs)
    with Living() as living:
        y = mean_linear(inputs.x, inputs.base, inputs.phi.mean, 2.0)
        assert y.requires_grad and living.bytes == y.nbytes


def test_no_dense_matrix_of_a_weight_lives_whole(monkeypatch):
    """Forward, backward and theta's gradient take some bands, however many rows there are."""
    harness = Harness("weight", CPU)
    monkeypatch.setattr(bands, "SCRATCH_BYTES", 64 * 32 * FOUR_ELEMENTS)  # 64 rows of 32 columns
    band = 64 * 32 * torch.float32.itemsize
    for outputs in (1024, 4096):
        inputs = harness.inputs(tokens=2, inputs=32, outputs=outputs, rank=1)
        training(inputs)
        with Living() as living:
            y, kl, prior, _ = harness.project(inputs, "torch")
            (y.sum() + kl + prior).backward()
            del y, kl, prior
        with Living() as alone:
            harness.theta(inputs, "torch")
        of_rows = outputs * torch.float32.itemsize  # a gradient of b, a row of y
        print(f"N {outputs}: peak {living.peak} and {alone.peak} bytes, a dense matrix {32 * of_rows}, a band {band}")
        assert 4 * band < living.peak < 20 * band + 16 * of_rows
        assert 4 * band < alone.peak < 20 * band + 16 * of_rows


def test_checkpointing_around_keeps_only_what_it_is_given(pair):
    """An outer checkpoint finds the inner one's tensors: x's ancestors alone stay, and no bit changes."""
    harness, _ = pair
    inputs = harness.inputs(tokens=6, inputs=32, outputs=32, dtype=BF16)
    training(inputs)
    mask, dy = harness.mask(inputs, "random"), harness.upstream(inputs)["y"]

    def block(x: Tensor) -> tuple[Tensor, Tensor]:
        hidden = nn.functional.silu(x)
        y, kl, *_ = harness.project(replace(inputs, x=hidden), "torch", mask)
        other, other_kl, *_ = harness.project(replace(inputs, x=y.tanh()), "torch", mask, layer=LAYER + 1)
        return other, kl + other_kl

    outcomes = []
    for around in (False, True):
        with Living() as living:
            y, kl = checkpoint(block, inputs.x, use_reentrant=False) if around else block(inputs.x)
            assert not around or living.bytes <= y.nbytes + 64
        gradients = torch.autograd.grad([y, kl], [inputs.x, *inputs.factors], [dy, torch.tensor(0.75)])
        outcomes.append([y, kl, *gradients])
    assert all(torch.equal(off, on) for off, on in zip(*outcomes, strict=True))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_a_graph(pair, mode):
    harness, contract = pair
    inputs = harness.inputs(tokens=6, inputs=10, outputs=9, dtype=BF16)
    training(inputs)
    with mode():
        found, right = harness.project(inputs, "torch"), contract.project(inputs)
    for value, expected in zip(found[:3], right[:3], strict=True):
        assert not value.requires_grad and torch.equal(value, expected)


def test_compiled(pair):
    """One graph, and one more for steps and seeds that change, as for the fused operators."""
    harness, _ = pair
    torch.compiler.reset()
    inputs = harness.inputs(tokens=3, inputs=16, outputs=12, dtype=BF16)
    training(inputs)

    def step(key):
        y, kl, prior, _ = harness.project(replace(inputs, x=nn.functional.silu(inputs.x)), "torch", key=key)
        return y.float().square().sum() + kl + 0.1 * prior

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(step, backend=counter, fullgraph=True)
    for name in ((2**63 + 11, 0), (17, 1), (2**64 - 1, 2**31)):
        leaves = [inputs.x, *inputs.factors]
        found, right = (torch.autograd.grad(run(NoiseKey(*name)), leaves) for run in (compiled, step))
        for value, expected in zip(found, right, strict=True):
            torch.testing.assert_close(value, expected)
    assert counter.frame_count <= 3


# noise


def test_a_band_of_noise_is_a_part_of_the_whole():
    whole = standard_normal(300, 37, KEY, 3, 2)
    for start, stop in ((0, 300), (1, 64), (130, 131), (299, 300), (64, 64)):
        band = standard_normal(stop - start, 37, KEY, 3, 2, first_row=start)
        assert torch.equal(band, whole[start:stop])
    with pytest.raises(ValueError, match="more noise than"):
        standard_normal(4, 64, KEY, 0, first_row=2**28 - 3)


def test_chunks_as_on_a_gpu_draw_the_same(monkeypatch):
    """Of several chunks either way: at 40,000 columns a CPU's holds 6 rows and a GPU's 52."""
    sizes, philox = [], noise.philox

    def noting(counter, key):
        sizes.append(counter[0].numel())
        return philox(counter, key)

    monkeypatch.setattr(noise, "philox", noting)
    on_cpu = standard_normal(60, 40_000, KEY, 2)
    assert len(sizes) == 10 and max(sizes) <= 2**16
    sizes.clear()
    with backends.assume_gpu():
        assert torch.equal(standard_normal(60, 40_000, KEY, 2), on_cpu)
    assert len(sizes) == 2 and 2**18 < max(sizes) <= 2**19
