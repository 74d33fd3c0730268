"""Which passes are made together, and that those made for others leave nothing behind. Real ranks: tests/invariance."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from abmll import lockstep
from abmll.distributed import Ranks
from abmll.lockstep import BOTH, FORWARD, Lockstep, in_step

NOTHING, WANTS_FORWARD, WANTS_BOTH = (0, 0), (1, 0), (0, 1)


@pytest.fixture
def others(monkeypatch):
    """What the other ranks want, an exchange after the other; nothing once the list is empty."""
    wanted: list[tuple[int, int]] = []

    def all_reduce(votes, group=None):
        if group is None:
            raise ValueError("no process group")
        assert group == "hosts" and not votes.is_cuda
        votes += torch.tensor(wanted.pop(0) if wanted else NOTHING)

    monkeypatch.setattr(lockstep.dist, "new_group", lambda **_: "hosts")
    monkeypatch.setattr(lockstep.dist, "all_reduce", all_reduce)
    return wanted


@pytest.fixture(params=["activation", "weight"])
def tiny(build_tiny, request):
    return build_tiny(adapters={"posterior": request.param}).scatter()


def step(tiny):
    """A pass with its backward pass: terms, phi's gradients, theta's, and the mean's logits after them."""
    learner, (key, other, *_) = tiny.learner, tiny.keys
    terms = learner._phi_gradient(tiny.batch, key, 1e-4)
    gradients = {name: phi.grad.clone() for name, phi in tiny.adapters.phi.items()}
    theta, _ = learner.theta_gradient_kl(tiny.batch, other)
    with torch.inference_mode():
        logits, _ = learner.forward(tiny.batch, None)
    for phi in tiny.adapters.phi.values():
        phi.grad = None
    return terms[:2], gradients, theta, logits.clone()


def test_passes_for_others_leave_nothing_behind(tiny, others):
    alone = step(tiny)
    lock = Lockstep(tiny.learner)
    # each of this rank's three passes finds others that still score; its own two kinds are made where all agree
    others += [WANTS_FORWARD, WANTS_FORWARD, WANTS_BOTH, WANTS_FORWARD, NOTHING]
    together = step(tiny)
    assert not others
    assert_close(together, alone, rtol=0, atol=0)
    assert lock.passes == {FORWARD: 4, BOTH: 1} and lock.idle == {FORWARD: 2, BOTH: 0}


def test_a_rank_without_work_makes_the_passes_of_others_until_there_are_none(tiny, others):
    lock = Lockstep(tiny.learner)
    ran = []
    tiny.model.get_output_embeddings().register_forward_hook(lambda *_: ran.append(torch.is_grad_enabled()))
    before = dict(vars(tiny.adapters.context))
    others += [WANTS_BOTH, (1, 1), WANTS_BOTH, NOTHING, WANTS_BOTH]
    lock.meet()
    assert others == [WANTS_BOTH]  # behind the meeting
    assert ran == [True, False, True] and lock.idle == {FORWARD: 1, BOTH: 2}
    assert vars(tiny.adapters.context) == before
    assert all(phi.grad is None for phi in tiny.adapters.phi.values())
    assert all(theta.grad is None for theta in tiny.adapters.theta.values())


def test_an_idle_backward_pass_goes_through_every_layer(tiny, others):
    """Or its layers would not gather what the other ranks wait for."""
    reached = []
    for index, layer in enumerate(tiny.model.get_decoder().layers):

        def follow(module, inputs, output, index=index):
            output.register_hook(lambda gradient: reached.append(index))

        layer.register_forward_hook(follow)
    others += [WANTS_BOTH]
    Lockstep(tiny.learner).meet()
    assert reached == [1, 0]


def test_an_exchange_of_ranks_waits_for_all_passes(tiny, others):
    sharded = tiny.config.model.model_copy(update={"sharding": "full"})
    alone = Ranks(0, 1, torch.device("cpu"))
    assert in_step(alone, sharded, tiny.learner) is alone
    two = Ranks(1, 2, torch.device("cpu"))
    assert in_step(two, tiny.config.model, tiny.learner) is two
    ranks = in_step(two, sharded, tiny.learner)
    for exchange, arguments in (("sum_table", [torch.zeros(1)]), ("gather", [0]), ("from_main", [0]), ("barrier", [])):
        others += [WANTS_BOTH]
        with pytest.raises(ValueError, match="process group"):  # there is none here: the meeting comes before
            getattr(ranks, exchange)(*arguments)
        assert not others
