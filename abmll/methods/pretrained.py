"""The base model without any training: what meta-training is measured against, at 0 and at K steps."""

from __future__ import annotations

from abmll.methods.base import Method


class Pretrained(Method):
    name = "pretrained"
    inner_loop = False

    @property
    def updates_per_episode(self) -> int:
        return 0

    @property
    def passes_per_episode(self) -> int:
        return 0
