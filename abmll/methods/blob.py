"""BLoB (Wang et al., 2024): Bayesian LoRA on pooled tasks, without a task level."""

from __future__ import annotations

from abmll.methods.lora import LoRA


class Blob(LoRA):
    """Steps of theta on NLL + beta KL to a fixed prior, by one AdamW. With the NLL summed over a batch, the evidence
    lower bound has beta = batch size / number of examples.

    The authors' code differs: its KL is stepped by an SGD of its own, weighed differently from minibatch to minibatch.
    """

    name = "blob"
    layers = "blob"
