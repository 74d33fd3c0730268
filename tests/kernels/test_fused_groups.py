"""Groups of unequal size in one call of the fused kernels: each is as if it were alone, whatever the others hold."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from abmll.kernels import Groups, NoiseKey
from abmll.kernels.fused import activation as activation_operators
from abmll.kernels.fused import configurations, gaussian, launch, plans, products
from abmll.kernels.fused.configurations import Counts
from abmll.kernels.fused.resources import UNEQUAL, _activation_step, recorded_launches

from .conftest import KEY, LEAVES
from .test_fused import BF16, FP16, FP32, PHI, THETA, small_blocks

# Smaller than a block of 16, multiples of it and neither; one group, and groups of very different sizes.
SIZES = [(5,), (17, 3), (1, 40, 16), (33, 2, 20, 1)]


def parts(outcome: dict, group: int, sizes: tuple[int, ...]) -> dict:
    """One group's part of everything but theta's gradient, which autograd sums."""
    found = {name: outcome[name].split(sizes)[group] for name in ("y", "x") if name in outcome}
    return found | {name: outcome[name][group] for name in ("kl", "prior", *PHI) if name in outcome}


@pytest.mark.parametrize("blocks", ["shipped", "small"])
@pytest.mark.parametrize(
    ("sizes", "dtype", "mask"),
    [(SIZES[0], BF16, None), (SIZES[1], FP32, "random"), (SIZES[2], FP16, None), (SIZES[3], BF16, "random")],
    ids=str,
)
def test_unequal_groups(harness, poison, monkeypatch, sizes, dtype, mask, blocks):
    if blocks == "small":
        small_blocks(monkeypatch)
    inputs = harness.inputs(sizes, 33, 18, rank=2, dtype=dtype)
    counted = harness.mask(inputs, mask)
    found = harness.check(inputs, counted)
    assert found["kl"].shape == found["prior"].shape == (len(sizes),)
    harness.check_theta(inputs, counted)


@pytest.mark.parametrize("sizes", SIZES[1::2], ids=str)
def test_each_group_is_as_if_it_were_alone(harness, sizes):
    """The same noise, by a group's own name and its rows' places in it; sums in another order at most."""
    inputs = harness.inputs(sizes, 24, 20, rank=3, dtype=BF16)
    upstream, names = harness.upstream(inputs), KEY.rows(len(sizes), harness.device)
    found, theta = harness.run(inputs, upstream=upstream, key=names), harness.theta(inputs)
    for group in range(len(sizes)):
        own = inputs.alone(group)
        alone = harness.run(own, upstream=parts(upstream, group, sizes), key=names[group : group + 1])
        for name, value in parts(found, group, sizes).items():
            torch.testing.assert_close(value, alone[name], rtol=1e-5, atol=1e-5)
        for name, value in harness.theta(own).items():
            torch.testing.assert_close(theta[name][group], value, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("terms", ["theta", "none"])
def test_outer_step_of_unequal_groups_after_a_projection(activation, terms):
    """With the projection's own low-rank products, and where it did not make them."""
    inputs = activation.inputs((20, 7, 1), 16, 16, dtype=BF16)
    mask = activation.mask(inputs, "random")
    activation.check_theta(inputs, mask, projection=activation.project(inputs, mask=mask, terms=terms))
    activation.check(inputs, mask, terms=terms, upstream=activation.upstream(inputs, ("y",)), wanted=("x", *PHI))


@pytest.mark.parametrize("wanted", [("x",), PHI, THETA], ids=lambda names: names[0])
def test_gradients_asked_for_of_unequal_groups(harness, monkeypatch, wanted):
    small_blocks(monkeypatch)
    inputs = harness.inputs((3, 21, 40), 10, 9, dtype=BF16)
    harness.check(inputs, upstream=harness.upstream(inputs, ("kl", "prior")), wanted=wanted)
    harness.check(inputs, wanted=wanted)


@pytest.mark.parametrize("leaf", ["x", "phi mean a", "phi log-variance b"])
@pytest.mark.parametrize(("sizes", "blocks"), [((18, 18, 18), "shipped"), ((34, 9, 17), "small")], ids=str)
def test_a_nan_stays_in_its_group(harness, monkeypatch, sizes, blocks, leaf):
    """Bit for bit: outputs, sums, gradients and theta's own gradient of the others; in the group itself it is seen."""
    if blocks == "small":
        small_blocks(monkeypatch)
    inputs = harness.inputs(sizes, 17, 17, rank=1, dtype=BF16)
    poisoned = {name: tensor.clone() for name, tensor in zip(LEAVES, (inputs.x, *inputs.factors), strict=True)}
    (poisoned["x"].split(sizes)[1] if leaf == "x" else poisoned[leaf][1]).fill_(torch.nan)
    other = inputs.with_leaves(*poisoned.values())
    wanted = ("x", *PHI)
    (clean, of_clean), (found, of_found) = ((harness.run(i, wanted=wanted), harness.theta(i)) for i in (inputs, other))
    for group in (0, 2):
        of_group = parts(found, group, sizes)
        for name, value in parts(clean, group, sizes).items():
            assert value.isfinite().all() and torch.equal(of_group[name], value), name
        for name, value in of_clean.items():
            assert value[group].isfinite().all() and torch.equal(of_found[name][group], value[group]), name
    assert parts(found, 1, sizes)["y"].isnan().any()
    if harness.posterior == "activation" or leaf != "x":  # the weights' divergence does not depend on x
        assert found["kl"][1].isnan() and of_found["kl"][1].isnan()


def test_tickets_are_zero_after_every_kernel(activation, monkeypatch):
    """A backward pass may run again, also where a group holds NaNs and where programs lie beyond a group's end."""
    small_blocks(monkeypatch)
    sizes = (40, 9, 17)
    inputs = activation.inputs(sizes, 20, 17, rank=2, dtype=BF16)
    inputs.x.split(sizes)[1].fill_(torch.nan)
    groups, upstream = inputs.groups, activation.upstream(inputs)
    named = (list(activation.settings), KEY.rows(3, activation.device), 5)
    y, p, tickets, *_ = activation_operators.activation_forward(
        inputs.x, *inputs.base, None, None, inputs.factors, *named, True, sizes, groups.bounds
    )
    assert tickets.shape == (3 * (1 + launch.ADJOINT_SLOTS),) and not tickets.any() and y.shape == (66, 17)
    arguments = (*upstream.values(), inputs.x, p, tickets, inputs.weight, None, inputs.factors, *named)
    runs = []
    for _ in range(2):
        runs.append(activation_operators.activation_backward(*arguments, True, True, False, sizes, groups.bounds))
        assert not tickets.any()
    for first, again in zip(*runs, strict=True):
        assert torch.equal(first.nan_to_num(), again.nan_to_num())


@pytest.mark.parametrize("sizes", [(6, 6), (9, 2)], ids=["equal", "unequal"])
def test_expanded_gradients_of_the_sums(harness, sizes):
    """`kl.sum().backward()` sends one number back for all groups; the kernels read it where it is."""
    inputs = harness.inputs(sizes, 12, 10, dtype=BF16)
    one = torch.tensor(0.75, device=harness.device)
    whole = {name: torch.full((2,), 0.75, device=harness.device) for name in ("kl", "prior")}
    found = harness.run(inputs, upstream={name: one.expand(2) for name in whole})
    assert one.expand(2).stride() == (0,)
    for name, value in harness.run(inputs, upstream=whole).items():
        assert torch.equal(found[name], value), name
    mixed = harness.run(inputs, upstream=whole | {"kl": one.expand(2)})
    assert all(torch.equal(mixed[name], value) for name, value in found.items())


@pytest.mark.parametrize("groups", [1, 4])
def test_expanded_gradients_take_no_launch(groups):
    """Nor do more groups: the kernels of one projection are four, whatever their number."""
    with recorded_launches() as launches:
        _activation_step(BF16, 8, groups=tuple(range(20, 20 + groups)), sizes=(sum(range(20, 20 + groups)), 128, 96))
    names = [launched.name for launched in launches]
    assert names == ["project_kernel", "sample_kernel", "adjoint_kernel", "gradient_kernel"]


def kinds_by_argument(sizes: tuple[int, ...]) -> list[tuple[str, dict]]:
    """Of each launch of an inner and an outer step its kernel, and what Triton compiles for, by argument."""
    with recorded_launches() as launches:
        for terms in ("divergence", "theta"):
            _activation_step(BF16, 8, terms, mask=False, groups=sizes, sizes=(sum(sizes), 128, 96))
    found = []
    for launched in launches:
        named = zip(launched.kernel.arg_names, launched.key[-1], strict=False)
        found.append((launched.name, dict(named) | launched.constants | launched.options))
    return found


@pytest.mark.parametrize("sizes", [(1, 79), (64, 16), (33, 100), (16, 3, 1)], ids=str)
def test_other_sizes_compile_nothing_anew(sizes):
    varying = {"project_kernel": products, "gradient_kernel": products}
    for (name, kinds), (other, others) in zip(kinds_by_argument(UNEQUAL), kinds_by_argument(sizes), strict=True):
        differing = {argument for argument, kind in kinds.items() if others[argument] != kind}
        assert name == other and differing <= set(varying.get(name, gaussian).VARYING), (name, differing)


def test_equal_groups_need_no_bounds(activation):
    """Sizes that happen to be equal, one group's among them, launch what equal groups do."""
    for sizes in ((12,), (6, 6)):
        inputs = activation.inputs(sizes, 16, 16, dtype=BF16)
        split = activation.run(inputs)
        lead = (len(sizes), sizes[0])
        equal = replace(inputs, sizes=None, x=inputs.x.view(*lead, 16))
        upstream = activation.upstream(inputs)
        upstream["y"] = upstream["y"].view(*lead, 16)
        for name, value in activation.run(equal, upstream=upstream).items():
            assert torch.equal(value.view_as(split[name]), split[name]), name


def test_rows_of_groups_may_have_any_shape(harness):
    """x [..., K]: a batch of padded prompts, of which the first groups have more."""
    inputs = harness.inputs((8, 4), 11, 10)
    flat, upstream = harness.run(inputs), harness.upstream(inputs)
    upstream["y"] = upstream["y"].view(3, 4, 10)
    found = harness.run(replace(inputs, x=inputs.x.view(3, 4, 11)), upstream=upstream)
    assert found["y"].shape == (3, 4, 10)
    for name, value in found.items():
        assert torch.equal(value.view_as(flat[name]), flat[name]), name


def test_compiled_surroundings_of_unequal_groups(harness):
    """One graph without a break; other sizes of as many rows cost one more, in which they are any numbers."""
    torch.compiler.reset()
    sizes = [(4, 7), (9, 2), (3, 8), (5, 6)]
    given = [(harness.inputs(of, 16, 12, dtype=BF16), Groups.of(of, harness.device)) for of in sizes]
    key = NoiseKey(3, 4).rows(2, harness.device)

    def step(inputs, groups):
        made = replace(inputs, x=nn.functional.silu(inputs.x))
        y, kl, prior, *_ = harness.project(made, key=key, groups=groups)
        return y.tanh(), 2 * kl, prior

    def gradients(step):
        found = []
        for inputs, groups in given:
            leaves = [leaf.detach().requires_grad_(True) for leaf in (inputs.x, *inputs.factors)]
            y, kl, prior = step(inputs.with_leaves(*leaves), groups)
            found += torch.autograd.grad(y.float().square().sum() + kl.sum() + 0.1 * prior.sum(), leaves)
            found += [y.detach(), kl.detach(), prior.detach()]
        return found

    counter = CompileCounterWithBackend("aot_eager")
    compiled = gradients(torch.compile(step, backend=counter, fullgraph=True))
    for found, expected in zip(compiled, gradients(step), strict=True):
        assert torch.equal(found, expected)
    assert 1 <= counter.frame_count <= 2


@pytest.mark.parametrize("sizes", [(700, 200, 100, 24), (4096, *(32,) * 7), (128, 1)], ids=str)
def test_programs_with_something_to_do_fill_a_large_gpu(sizes):
    counts = Counts(len(sizes), max(sizes), sum(sizes))
    project = plans.project(8, 4, counts, 4096)
    sample = plans.sample(8, 4, counts, 4096, True, True, True, False)
    wanted = plans.Wanted(True, True, True, False)
    adjoint = plans.adjoint(8, counts, 4096, wanted, False, False, True, False, True, False, False)
    heights = project.options["ROWS"], sample.options["ROWS"], adjoint.slot_rows
    for plan, height in zip((project, sample, adjoint), heights, strict=True):
        filled = sum(configurations.blocks(size, height) for size in sizes) * plan.grid[1]
        assert configurations.FEWEST_PROGRAMS <= filled <= plan.grid[0] * plan.grid[1] * plan.grid[2]


@pytest.mark.parametrize("height", [16, 64])
def test_blocks_of_unequal_groups_are_bounded(height):
    """`Counts.blocks` is exact for equal groups, and for others no less than the blocks with something in them."""
    for sizes in (*SIZES, (64, 64, 64), (65, 65), (100, 1, 1, 1, 1)):
        counts = Counts(len(sizes), max(sizes), sum(sizes))
        filled = sum(configurations.blocks(size, height) for size in sizes)
        most = len(sizes) * configurations.blocks(max(sizes), height)
        assert counts.ragged == (len(set(sizes)) > 1)
        assert filled <= counts.blocks(height) <= most
        assert counts.ragged or counts.blocks(height) == filled
