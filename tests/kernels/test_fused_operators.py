"""What surrounds the fused kernels: memory that they must not read, layouts, autograd, checkpointing, compilation."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from abmll.kernels import FrozenLinear, GaussianFactors, LowRank, NoiseKey, PosteriorSettings, posterior_projection
from abmll.kernels.fused import activation as activation_operators
from abmll.kernels.fused import weight as weight_operators

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
DTYPES = pytest.mark.parametrize("dtype", [FP32, BF16], ids=["fp32", "bf16"])


def surrounded(tensor: Tensor) -> Tensor:
    """The same numbers in the middle of NaNs."""
    buffer = torch.full((tensor.numel() + 2048,), torch.nan, dtype=tensor.dtype, device=tensor.device)
    return buffer[1024 : 1024 + tensor.numel()].view(tensor.shape).copy_(tensor)


@pytest.mark.parametrize(
    ("tokens", "inputs", "outputs", "rank", "dtype", "groups"),
    [(1, 1, 1, 1, FP16, None), (5, 48, 16, 3, BF16, 2), (33, 7, 18, 17, FP32, None), ((40, 5), 20, 18, 3, BF16, None)],
)
def test_every_element_is_written_and_none_beyond_is_read(
    harness, poison, tokens, inputs, outputs, rank, dtype, groups
):
    made = harness.inputs(tokens, inputs, outputs, rank, dtype, groups).map(surrounded)
    mask = harness.mask(made, "random")
    found = harness.run(made, mask=mask)
    theta = harness.theta(made, mask=mask)
    for name, value in (*found.items(), *theta.items()):
        assert value.isfinite().all(), name


@DTYPES
def test_the_same_integers_give_the_same_bits(harness, dtype):
    inputs = harness.inputs(tokens=9, inputs=32, outputs=16, dtype=dtype)
    first, second = harness.run(inputs), harness.run(inputs)
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    other = harness.run(inputs, key=NoiseKey(1, 2))
    assert not torch.isclose(first["y"], other["y"]).any(dim=-1).all()
    assert torch.equal(first["kl"], other["kl"])


def transposed(tensor: Tensor) -> Tensor:
    """The same numbers with the last dimension the slowest in memory."""
    return tensor.mT.contiguous().mT


def every_other(tensor: Tensor) -> Tensor:
    """The same numbers in every second row of a matrix."""
    return torch.stack([tensor, torch.full_like(tensor, torch.nan)], dim=-2).flatten(-3, -2)[..., ::2, :]


def from_wider(tensor: Tensor) -> Tensor:
    """The same numbers in the middle of wider rows."""
    return nn.functional.pad(tensor, (3, 4), value=torch.nan)[..., 3:-4]


@pytest.mark.parametrize(
    ("layout", "dtype", "groups"), [(transposed, FP32, None), (every_other, BF16, 2), (from_wider, BF16, None)]
)
def test_layouts(harness, layout, dtype, groups):
    inputs = harness.inputs(tokens=9, inputs=16, outputs=16, dtype=dtype, groups=groups)
    bias = inputs.bias
    moved = replace(inputs, bias=None).map(layout)
    assert not moved.x.is_contiguous() and not moved.weight.is_contiguous() and not moved.phi.mean.a.is_contiguous()
    moved.bias = torch.stack([bias, bias], dim=1)[:, 0]
    mask = torch.stack([harness.mask(inputs, "random")] * 2, dim=-1)[..., 0]
    upstream = harness.upstream(inputs)
    upstream["y"] = layout(upstream["y"])
    harness.check(moved, mask, upstream=upstream)
    harness.check_theta(moved, mask)


def test_groups_in_the_middle(harness):
    """x and y as [tokens, groups, ...] in memory."""
    inputs = harness.inputs(tokens=9, inputs=16, outputs=16, dtype=BF16, groups=3)
    inputs.x = inputs.x.transpose(0, 1).contiguous().transpose(0, 1)
    upstream = harness.upstream(inputs)
    upstream["y"] = upstream["y"].transpose(0, 1).contiguous().transpose(0, 1)
    harness.check(inputs, upstream=upstream)


@pytest.mark.parametrize("shape", [(1, 1), (1, 16), (9, 1)], ids=["one number", "one row", "one column"])
def test_expanded_gradients(harness, shape):
    """What y.sum() and the like send back: one number or row for all."""
    inputs = harness.inputs(tokens=9, inputs=16, outputs=16, dtype=BF16)
    dy = harness.upstream(inputs)["y"][: shape[0], : shape[1]].expand(9, 16)
    harness.check(inputs, upstream={"y": dy})


def test_a_batch_of_rows_equals_its_tokens_in_a_row(harness):
    inputs = harness.inputs(tokens=12, inputs=11, outputs=10)
    mask = harness.mask(inputs, "random")
    flat = harness.run(inputs, mask=mask)
    upstream = harness.upstream(inputs)
    upstream["y"] = upstream["y"].view(3, 4, 10)
    inputs.x, mask = inputs.x.view(3, 4, 11), mask.view(3, 4)
    found = harness.run(inputs, mask=mask, upstream=upstream)
    assert found["y"].shape == (3, 4, 10) and found["x"].shape == (3, 4, 11)
    for name, value in found.items():
        assert torch.equal(value.view_as(flat[name]), flat[name]), name


def test_rows_further_apart_than_a_32_bit_offset(harness):
    """The last rows of x, W0 and dy begin beyond 2^31 elements, in one storage that is reserved and hardly touched."""
    size = 2**31 + 2**28
    if harness.device.type == "cuda" and torch.cuda.mem_get_info()[0] < 3 * size:
        pytest.skip("needs 7 GB of GPU memory")
    inputs = harness.inputs(tokens=3, inputs=32, outputs=16, dtype=BF16)
    upstream = harness.upstream(inputs)
    expected = harness.run(inputs, upstream=upstream)
    before = resident_bytes()
    storage = torch.empty(size, dtype=BF16, device=harness.device)

    def spread(tensor: Tensor, place: int) -> Tensor:
        stride = (2**31 // (len(tensor) - 1) // 16 + 1) * 16
        return storage.as_strided(tensor.shape, (stride, 1), place * 4096).copy_(tensor)

    far = replace(inputs, x=spread(inputs.x, 0), weight=spread(inputs.weight, 1))
    upstream["y"] = spread(upstream["y"], 2)
    found = harness.run(far, upstream=upstream)
    if harness.device.type == "cpu":  # on a GPU it is libraries that are loaded meanwhile
        assert resident_bytes() - before < 2**28
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], msg=name)


def resident_bytes() -> int:
    """What this process holds in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


@pytest.mark.parametrize("terms", ["divergence", "theta", "none"])
@pytest.mark.parametrize(("dtype", "groups"), [(BF16, None), (FP32, 2)], ids=["bf16", "fp32"])
def test_bytes_saved_for_the_backward(activation, terms, dtype, groups, monkeypatch):
    """x and, fused, 4r fp32 numbers a token: nothing of the outputs' size. Plain code as on a GPU."""
    monkeypatch.setattr("abmll.kernels.plain.on_gpu", lambda _: True)
    inputs = activation.inputs(tokens=24, inputs=48, outputs=48, rank=4, dtype=dtype, groups=groups)
    mask = activation.mask(inputs, "random")
    count = {backend: saved_bytes(activation, inputs, mask, backend, terms) for backend in ("triton", "torch")}
    tokens = inputs.x.shape[:-1].numel()
    print(f"{dtype}, {tokens} tokens x {terms}: saved {count['triton']} bytes fused, {count['torch']} plain")
    x_bytes = inputs.x.numel() * inputs.x.element_size()
    integers = 4 * 17 * (groups or 1) + 64  # tickets, and the noise's names
    assert x_bytes <= count["triton"] <= x_bytes + tokens * 4 * 4 * 4 + integers
    assert x_bytes <= count["torch"] <= x_bytes + 64


def saved_bytes(harness, inputs, mask, backend, terms) -> int:
    """Of distinct storages that one projection saves, but for what the caller keeps anyway: factors, W0, bias, mask."""
    for leaf in (inputs.x, *inputs.factors):
        leaf.requires_grad_(True)
    kept = {tensor.untyped_storage().data_ptr() for tensor in (inputs.weight, inputs.bias, mask, *inputs.factors)}
    saved = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in kept:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        projection = harness.project(inputs, backend, mask, terms)
    del projection
    return sum(saved.values())


class Network(nn.Module):
    """Two adapted projections with biases; the sum of their KLs is an output, as it is of a model's layer."""

    def __init__(self, posterior: str, backend: str, sizes=(12, 20, 7), rank=3):
        super().__init__()
        torch.manual_seed(0)
        self.posterior, self.backend = posterior, backend
        self.bases = nn.ModuleList(nn.Linear(*of).requires_grad_(False) for of in pairwise(sizes))
        # mean a, b, log-variance a, b of phi, then of theta
        shapes = [[(rank, inputs), (outputs, rank)] * 4 for inputs, outputs in pairwise(sizes)]
        self.factors = nn.ModuleList(nn.ParameterList(0.2 * torch.randn(shape) for shape in of) for of in shapes)

    def project(self, index: int, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        base, factors = self.bases[index], list(self.factors[index])
        pairs = [LowRank(*factors[at : at + 2]) for at in range(0, 8, 2)]
        found = posterior_projection(
            self.posterior, x, FrozenLinear(base.weight, base.bias), GaussianFactors(*pairs[:2]),
            GaussianFactors(*pairs[2:]), PosteriorSettings(2.0, 1.0, -2.0, 1.5, 0.3), NoiseKey(5, 6), index, mask,
            backend=self.backend,
        )  # fmt: skip
        return found.y, found.kl

    def block(self, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        hidden, first = self.project(0, x, mask)
        y, second = self.project(1, nn.functional.silu(hidden), mask)
        return y, first + second

    def gradients(self, x: Tensor, mask: Tensor, checkpointing: bool) -> dict[str, Tensor]:
        """Loss, and its gradients by x and all parameters, theta included."""
        x = x.clone().requires_grad_(True)
        y, kl = checkpoint(self.block, x, mask, use_reentrant=False) if checkpointing else self.block(x, mask)
        loss = y.square().sum() + 0.01 * kl
        self.zero_grad()
        loss.backward()
        found = {name: parameter.grad for name, parameter in self.named_parameters() if parameter.requires_grad}
        return {"loss": loss.detach(), "x": x.grad, **found}


def test_checkpointing_changes_no_bit(harness):
    """Noise drawn anew in the recomputation would change every gradient."""
    x = torch.randn(2, 5, 12, generator=torch.Generator().manual_seed(2)).to(harness.device)
    mask = torch.arange(10).view(2, 5).to(harness.device) % 4 > 0
    network = Network(harness.posterior, "triton").to(harness.device)
    off, on = (network.gradients(x, mask, checkpointing) for checkpointing in (False, True))
    assert len(off) == 2 + 2 * 8
    for name, value in off.items():
        assert value is not None and value.any() and torch.equal(value, on[name]), name
    plain = Network(harness.posterior, "torch").to(harness.device).gradients(x, mask, True)
    for name, value in off.items():
        torch.testing.assert_close(value, plain[name], rtol=1e-4, atol=1e-5 * float(value.abs().max()), msg=name)


class Seen(TorchDispatchMode):
    """The arguments of the calls of one operator."""

    def __init__(self, operator):
        super().__init__()
        self.operator, self.calls = operator, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is self.operator:
            self.calls.append(args)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("asked", [("y",), ("kl",), ("prior",), ("y", "kl"), ("y", "kl", "prior")], ids="+".join)
def test_no_gradient_is_made_of_what_the_loss_does_not_hold(harness, asked):
    """An inner step does not hold the prior: the derivative gets None for it, and makes no zeros."""
    inputs = harness.inputs(tokens=3, inputs=16, outputs=12, dtype=BF16)
    operators = activation_operators if harness.posterior == "activation" else weight_operators
    upstream = harness.upstream(inputs, asked)
    with Seen(getattr(operators, f"{harness.posterior}_backward")) as seen:
        found = harness.run(inputs, upstream=upstream)
    (arguments,) = seen.calls
    given = dict(zip(("y", "kl", "prior"), arguments[:3], strict=True))
    assert {name for name, gradient in given.items() if gradient is not None} == set(asked)
    whole = {name: upstream.get(name, torch.zeros_like(value)) for name, value in harness.upstream(inputs).items()}
    expected = harness.run(inputs, upstream=whole)
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-6, atol=1e-6 * float(expected[name].abs().max()))


def test_second_derivatives_are_refused(harness):
    """The operators have none, and zeros in their place would be wrong in silence."""
    inputs = harness.inputs(tokens=3, inputs=16, outputs=12)
    x = inputs.x.detach().requires_grad_(True)
    loss = harness.project(replace(inputs, x=x)).y.square().sum()
    with pytest.raises(ValueError, match=r"^create_graph: True: the fused kernels have no second derivatives"):
        torch.autograd.grad(loss, x, create_graph=True)


def looped(step, harness, inputs, mask, keys):
    """Outcomes and gradients of `step`, one for each key."""
    found = []
    for key in keys:
        leaves = [leaf.detach().requires_grad_(True) for leaf in (inputs.x, *inputs.factors)]
        y, kl, prior = step(inputs.with_leaves(*leaves), mask, key)
        gradients = torch.autograd.grad(y.float().square().sum() + kl + 0.1 * prior, leaves)
        found.append([y.detach(), kl.detach(), prior.detach(), *gradients])
    return found


@pytest.mark.parametrize(("in_memory", "graphs"), [(True, 1), (False, 3)], ids=["rows", "keys"])
def test_compiled_surroundings(harness, in_memory, graphs):
    """One graph without a break, and no other where names are numbers in memory. As Python's numbers they may cost two
    more, one for steps that change and one for seeds: no compilation a step.
    """
    named = [(2**63 + 11, 0), (2**63 + 11, 1), (17, 2**32 - 1), (2**64 - 1, 2**31)]
    keys = [NoiseKey(*name) for name in named]
    if in_memory:
        keys = [key.rows(1, harness.device) for key in keys]
    torch.compiler.reset()
    inputs = harness.inputs(tokens=3, inputs=16, outputs=16, dtype=BF16)
    mask = harness.mask(inputs, "random")

    def step(inputs, mask, key):
        made = replace(inputs, x=nn.functional.silu(inputs.x))
        y, kl, prior, *_ = harness.project(made, mask=mask, key=key)
        return y.tanh(), 2 * kl, prior

    counter = CompileCounterWithBackend("aot_eager")
    compiled = looped(torch.compile(step, backend=counter, fullgraph=True), harness, inputs, mask, keys)
    for found, expected in zip(compiled, looped(step, harness, inputs, mask, keys), strict=True):
        assert all(torch.equal(value, right) for value, right in zip(found, expected, strict=True))
    assert 1 <= counter.frame_count <= graphs


def operator_calls(harness, sizes=None):
    """(operator, arguments): the operator with a derivative first. `sizes`: of two groups, if they are unequal."""
    inputs = harness.inputs(tokens=sizes or 3, inputs=5, outputs=4, dtype=BF16, groups=2)
    mask, (dy, *dsums) = harness.mask(inputs, "random"), harness.upstream(inputs).values()
    split = () if sizes is None else (list(sizes), inputs.groups.bounds)
    settings, names = list(harness.settings), (NoiseKey(2**64 - 5, 7).rows(2, harness.device), 3)
    factors = inputs.factors
    x, *leaves = (leaf.detach().requires_grad_(True) for leaf in (inputs.x, *factors))
    tickets = torch.zeros(1 + 16 * 2, dtype=torch.int32, device=harness.device)
    if harness.posterior == "activation":
        p = activation_operators.activation_project(inputs.x, factors, *split)
        forward = (x, *inputs.base, None, mask, leaves, settings, *names, True, *split)
        backward = (dy, *dsums, inputs.x, p, tickets, inputs.weight, mask, factors, settings, *names, True, True, True)
        yield activation_operators.activation_forward, forward
        yield activation_operators.activation_backward, (*backward, *split)
        yield activation_operators.activation_project, (inputs.x, factors, *split)
        theta = (inputs.x, p, mask, factors, settings, 0.5, 0.25, *split)
        yield activation_operators.activation_theta_gradient, theta
    else:
        forward = (x, *inputs.base, None, leaves, settings, *names, True, *split[:1])
        backward = (dy, *dsums, inputs.x, tickets, inputs.weight, factors, settings, *names, True, True, True)
        backward += split[:1]
        yield weight_operators.weight_forward, forward
        yield weight_operators.weight_backward, backward
        yield weight_operators.weight_theta_gradient, (factors, settings, 0.5, 0.25)


@pytest.mark.parametrize("sizes", [None, (4, 2)], ids=["equal", "unequal"])
def test_operators_are_registered_rightly(harness, sizes):
    """PyTorch's own checks: schema, fake shapes; and of the first its derivative, traced with dynamic shapes."""
    forward, *others = operator_calls(harness, sizes)
    torch.library.opcheck(*forward)
    for operator, arguments in others:
        torch.library.opcheck(operator, arguments, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_autocast(harness, backend):
    """As the call on x, W0 and bias in the autocast dtype; factors and their gradients stay fp32."""
    inputs = harness.inputs(tokens=6, inputs=16, outputs=16)
    narrow = replace(inputs, x=inputs.x.to(BF16), weight=inputs.weight.to(BF16), bias=inputs.bias.to(BF16))
    mask = harness.mask(inputs, "random")
    upstream = harness.upstream(narrow)
    autocast = partial(torch.autocast, harness.device.type, dtype=BF16)
    expected = harness.run(narrow, backend, mask, upstream)
    found = harness.run(inputs, backend, mask, upstream, context=autocast())
    expected_theta = harness.theta(narrow, backend, mask)
    with autocast():
        found_theta = harness.theta(inputs, backend, mask)
        backward_inside = harness.run(inputs, backend, mask, upstream)
    assert found["y"].dtype == BF16 and found["x"].dtype == FP32
    outcomes = [(found, expected), (found_theta, expected_theta)]
    if backend == "triton":  # the plain version's derivatives are PyTorch's, which autocast would cast
        outcomes.append((backward_inside, expected))
    for outcome, right in outcomes:
        for name, value in outcome.items():
            assert value.dtype == FP32 or name == "y"
            assert torch.equal(value, right[name].to(value.dtype)), name
