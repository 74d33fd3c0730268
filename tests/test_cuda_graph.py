"""A learner's steps with the noise's names in memory: the same as with a key, and captured whole in a CUDA graph."""

from __future__ import annotations

import pytest
import torch

from abmll.kernels import NoiseKey
from abmll.learner import Learner
from abmll.models.packing import pack_prompts

POSTERIORS = ("activation", "weight")
KEYS = (NoiseKey(2**64 - 3, 5), NoiseKey(31, 2**32 - 1))


def phi_of(learner) -> list[torch.Tensor]:
    return [value.detach().clone() for value in learner.adapters.phi.values()]


@pytest.mark.parametrize("posterior", POSTERIORS)
def test_steps_take_names_in_the_place_of_a_key(posterior, build_tiny):
    """One tensor that is written over before each call; the layers keep it, no copy."""
    tiny = build_tiny(adapters={"posterior": posterior}).scatter()
    learner, batch, names = tiny.learner, tiny.batch, KEYS[0].rows(1, "cpu")
    for key in KEYS:
        names.copy_(key.rows(1, "cpu"))
        outcomes = []
        for given in (key, names):
            learner.adapters.reset_phi()
            terms = learner.phi_step(batch, given, learner.optimizer(1e-2))
            logits, _ = learner.forward(batch, given)
            gradient, _ = learner.theta_gradient_kl(batch, given)
            outcomes.append([*phi_of(learner), terms.nll, terms.kl, logits.detach(), *gradient.values()])
        assert all(torch.equal(value, right) for value, right in zip(*outcomes, strict=True))
    assert learner.adapters.context.names is names


def test_samples_take_a_row_each(build_tiny):
    tiny = build_tiny().scatter()
    found, expected = (
        tiny.learner.sampled_probabilities(tiny.batch, key, 3) for key in (KEYS[0].rows(3, "cpu"), KEYS[0])
    )
    assert torch.equal(found, expected)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("posterior", POSTERIORS)
def test_a_captured_inner_step_replays_as_the_eager_one(posterior, build_tiny):
    """Forward pass, backward pass and AdamW of a tiny model as one CUDA graph, bit for bit.

    An AdamW that can be captured keeps its steps on the device.
    """
    tiny = build_tiny(torch.bfloat16, adapters={"posterior": posterior, "backend": "auto"}).scatter()
    device = torch.device("cuda")
    tiny.model.to(device)
    assert pack_prompts(tiny.model)
    learner = Learner(tiny.model, tiny.adapters, tiny.config.method, 2, 2)
    batch = tiny.batch.to(device)
    start = phi_of(learner)

    def optimizer() -> torch.optim.AdamW:
        return torch.optim.AdamW(learner.adapters.phi.values(), lr=1e-2, weight_decay=0.0, fused=True, capturable=True)

    def restart(optimizer: torch.optim.AdamW) -> None:
        with torch.no_grad():
            for value, first in zip(learner.adapters.phi.values(), start, strict=True):
                value.copy_(first)
            for state in optimizer.state.values():
                for value in state.values():
                    value.zero_()

    eager = []
    own = optimizer()
    for key in KEYS:
        terms = learner.phi_step(batch, key, own)
        eager.append([*phi_of(learner), terms.nll.clone(), terms.kl.clone(), terms.gradient_norm.clone()])

    names, captured = KEYS[0].rows(1, device), optimizer()
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        learner.phi_step(batch, names, captured)  # makes the moments
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        terms = learner.phi_step(batch, names, captured)
    restart(captured)
    for key, expected in zip(KEYS, eager, strict=True):
        names.copy_(key.rows(1, device))
        graph.replay()
        found = [*phi_of(learner), terms.nll, terms.kl, terms.gradient_norm]
        assert all(torch.equal(value, right) for value, right in zip(found, expected, strict=True))
    assert not torch.equal(eager[0][0], eager[1][0])
