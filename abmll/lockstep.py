"""Ranks that share a sharded base make their passes together, whatever work each of them has.

A pass gathers every layer's weights from all ranks, so that all must make it at the same time: a forward pass alone, or
one with its backward pass. But ranks have tasks of different sizes, and some have none in a run's last step. So before
each pass the ranks tell each other what they want, in one exchange of two numbers between their hosts. A rank that
wants something else, or nothing any more, makes the agreed pass on a few tokens and throws its results away.

Where any rank wants a forward pass alone, that is made: it is the cheaper one, and ranks that are ready to adapt to
their next task wait for those that still score the one before.

Nothing else needs to know of this: a hook in the model announces a pass, and `Ranks` calls `meet` before each of its
exchanges, so that a rank whose work is done serves the others until theirs is done too.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist

from abmll.config.schema import ModelConfig
from abmll.distributed import PATIENCE, Ranks
from abmll.learner import Learner

FORWARD, BOTH = "a forward pass", "a forward and a backward pass"
KINDS = (FORWARD, BOTH)  # the first that any rank wants is made by all


class Lockstep:
    """Announces the passes of a learner's model. All ranks make one, in the same order of process groups.

    A pass with gradients on must be followed by one backward pass through all of it, before the next pass.
    """

    def __init__(self, learner: Learner):
        self.model, self.adapters = learner.model, learner.adapters
        self.passes = dict.fromkeys(KINDS, 0)  # made by all, this rank's own and others'
        self.idle = dict.fromkeys(KINDS, 0)  # of these, the ones that this rank made for the others
        # between hosts: an exchange on the devices would wait for all that they have to do
        self._hosts = dist.new_group(backend="gloo", timeout=PATIENCE)
        self._busy = False
        # before FSDP's own, which gathers
        self.model.get_decoder().register_forward_pre_hook(self._before_pass, prepend=True)

    def meet(self) -> None:
        """Make the other ranks' passes with them until no rank wants one."""
        while (made := self._agree(None)) is not None:
            self._idle_pass(made)

    def _before_pass(self, *_: Any) -> None:
        if self._busy:
            return
        wanted = BOTH if torch.is_grad_enabled() else FORWARD
        while (made := self._agree(wanted)) != wanted:
            self._idle_pass(made)

    def _agree(self, wanted: str | None) -> str | None:
        """What all ranks make now; None if no rank wants anything."""
        votes = torch.tensor([kind == wanted for kind in KINDS], dtype=torch.int64)
        with torch.no_grad():
            dist.all_reduce(votes, group=self._hosts)
        made = next((kind for kind, count in zip(KINDS, votes.tolist(), strict=True) if count), None)
        if made is not None:
            self.passes[made] += 1
        return made

    def _idle_pass(self, kind: str) -> None:
        """Through the same layers as any pass. Leaves no gradient, and the context as the interrupted pass set it."""
        context, self._busy = self.adapters.context, True
        before = dict(vars(context))
        phi = list(self.adapters.phi.values())
        tokens = torch.zeros(1, 2, dtype=torch.int64, device=phi[0].device)
        try:
            with torch.set_grad_enabled(kind == BOTH), context.forward_pass(None, slot=0):
                hidden = self.model.get_decoder()(input_ids=tokens, use_cache=False).last_hidden_state
                logits = self.model.get_output_embeddings()(hidden[:, -1])
                if kind == BOTH:
                    torch.autograd.grad(logits.float().sum(), phi, allow_unused=True)
        finally:
            vars(context).update(before)
            self._busy = False
        self.idle[kind] += 1


def in_step(ranks: Ranks, config: ModelConfig, learner: Learner) -> Ranks:
    """The ranks with their meetings, where the base is sharded over several; all ranks call this."""
    if config.sharding == "none" or ranks.world_size == 1:
        return ranks
    return replace(ranks, before_exchange=Lockstep(learner).meet)
