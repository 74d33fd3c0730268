"""No model at all: how often each label came in the support set. What a method must beat to have learned a task."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from abmll.kernels import NoiseKey
from abmll.learner import Learner, StepTerms
from abmll.methods.pretrained import Pretrained
from abmll.metrics import Predictions
from abmll.tasks.task import Batch, PromptedExample


class Frequencies(Pretrained):
    """Each option by its letter's share of the support labels, one count added to each (Laplace's rule).

    Before the support set is seen all options are alike, and the first is the answer.
    """

    name = "frequencies"

    def adapt(
        self, learner: Learner, batches: Sequence[Batch], keys: Sequence[NoiseKey | torch.Tensor]
    ) -> list[StepTerms]:
        return []

    def predict(self, support: Sequence[PromptedExample], examples: Sequence[PromptedExample]) -> Predictions:
        """Of the examples, from the labels of the distinct support examples; letters alone are ever answered."""
        letters = max(example.num_options for example in (*support, *examples))
        seen = torch.tensor([example.label for example in support], dtype=torch.int64)
        counts = 1.0 + torch.bincount(seen, minlength=letters).double()
        own = torch.arange(letters) < torch.tensor([example.num_options for example in examples])[:, None]
        options = counts.where(own, 0.0)
        options = options / options.sum(dim=1, keepdim=True)
        label = torch.tensor([example.label for example in examples])
        unknown = torch.full((len(label),), torch.nan, dtype=torch.float64)
        nll = -options.gather(1, label[:, None])[:, 0].log()
        return Predictions(options, options.argmax(dim=1) == label, nll, label, unknown, unknown)
