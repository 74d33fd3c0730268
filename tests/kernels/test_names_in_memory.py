"""The noise's names are numbers in memory: written over, the same call draws other noise, a captured graph too."""

from __future__ import annotations

import pytest
import torch

from abmll.kernels import NoiseKey, posterior_projection

from .conftest import LAYER

BF16 = torch.bfloat16
KEYS = (NoiseKey(2**63 + 11, 2**32 - 1), NoiseKey(17, 3))


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_the_same_call_draws_the_noise_of_the_names_that_it_finds(harness, backend):
    inputs = harness.inputs(tokens=5, inputs=16, outputs=12, dtype=BF16, groups=2)
    one, other = (harness.run(inputs, backend, key=key) for key in KEYS)
    names = KEYS[0].rows(2, harness.device)
    for key, expected in zip((*KEYS, KEYS[0]), (one, other, one), strict=True):
        names.copy_(key.rows(2, harness.device))
        found = harness.run(inputs, backend, key=names)
        assert all(torch.equal(value, expected[name]) for name, value in found.items())
    assert not torch.isclose(one["y"], other["y"]).any(dim=-1).all()


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_groups_have_seeds_and_steps_of_their_own(harness, backend):
    """Rows of different keys, the second group's under another number: each group is as in a call with its own key."""
    inputs = harness.inputs(tokens=5, inputs=16, outputs=12, dtype=BF16, groups=2)
    names = torch.stack([KEYS[0].rows(1, harness.device)[0], KEYS[1].rows(4, harness.device)[3]])
    found = harness.run(inputs, backend, key=names)
    for group, (key, number) in enumerate(((KEYS[0], 0), (KEYS[1], 3))):
        own = torch.stack([key.rows(number + 1, harness.device)[number]] * 2)
        alone = harness.run(inputs, backend, key=own)
        for name in ("y", "x", "phi mean a", "phi mean b", "phi log-variance a", "phi log-variance b"):
            assert torch.equal(found[name][group], alone[name][group]), name
        for name in ("y", "phi log-variance a", "phi log-variance b"):  # the mean's gradients know no noise
            assert not torch.equal(found[name][1 - group], alone[name][1 - group]), name


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda names: names[:1], r"torch.int64 \(1, 3\) on .*int64 \(2, 3\)"),
        (lambda names: names.int(), r"torch.int32 \(2, 3\)"),
        (lambda names: names.to("meta"), r"torch.int64 \(2, 3\) on meta"),
    ],
)
def test_names_that_do_not_fit_are_refused(harness, change, told):
    inputs = harness.inputs(tokens=2, inputs=3, outputs=4, groups=2)
    with pytest.raises(ValueError, match=f"^key: {told}.*NoiseKey.rows"):
        harness.project(inputs, key=change(KEYS[0].rows(2, harness.device)))


@pytest.mark.gpu
def test_a_captured_projection_replays_with_the_noise_of_new_names(harness):
    """Forward and backward pass as one CUDA graph: bit for bit what the eager call gives."""
    inputs = harness.inputs(tokens=300, inputs=256, outputs=512, rank=8, dtype=BF16)
    mask, dy = harness.mask(inputs, "random"), harness.upstream(inputs)["y"]
    names = KEYS[0].rows(1, harness.device)
    leaves = [leaf.detach().requires_grad_(True) for leaf in (inputs.x, *inputs.factors)]
    made = inputs.with_leaves(*leaves)

    def step(key) -> list[torch.Tensor]:
        arguments = (made.x, made.base, made.phi, made.theta, harness.settings, key, LAYER)
        y, kl, *_ = posterior_projection(harness.posterior, *arguments, mask, backend="triton")
        gradients = torch.autograd.grad([y, kl], leaves, [dy, torch.full_like(kl, 0.75)])
        return [y.detach(), kl.detach(), *gradients]

    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):  # compiles the kernels, which a capture forbids
        step(names)
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        static = step(names)
    replayed = []
    for key in (*KEYS, KEYS[0]):
        names.copy_(key.rows(1, harness.device))
        graph.replay()
        replayed.append([value.clone() for value in static])
        assert all(torch.equal(value, right) for value, right in zip(static, step(key), strict=True))
    assert not torch.equal(replayed[0][0], replayed[1][0])
    assert all(torch.equal(first, last) for first, last in zip(replayed[0], replayed[2], strict=True))
