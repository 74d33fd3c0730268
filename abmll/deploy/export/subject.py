"""What is handed on: the means of an adapter, and what they do to a few prompts of its task."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from abmll.config import Refused
from abmll.deploy.export.report import Report
from abmll.kernels import LowRank
from abmll.models.load import load_model
from abmll.models.source import resolve
from abmll.tasks.task import Example, PromptedExample

if TYPE_CHECKING:
    from abmll.deploy.task_model import TaskModel

# texts of several kinds, for prompts of the task's own form: an adapter holds none of the texts that it was made of
TEXTS = (
    "Thanks!",  # so short that no demonstration is left out for it that has room before any text
    "The meeting has moved to Thursday at ten.",
    "What a wonderful evening, thank you all!",
    "Shares fell sharply after the quarterly report.",
    "The parcel arrived broken, and nobody answers the phone.",
)
OPTIONS = ("yes", "no")  # of a question, where the task's questions have options of their own


class Subject:
    """phi of a task's model, or theta where it has none.

    `tensors`: by theta's names, fp32 on the CPU. `means`: a [r, K] and b [N, r] of each adapted layer, by its name in
    the model. `prompts`: of the task's form; `logits` [S, V] fp32: the adapted model's own for the token behind each.

    Refused where the adapter changes nothing, holds numbers that are not finite, or no prompt fits.
    """

    def __init__(self, model: TaskModel):
        self.base, self.card, self.is_theta = model.base, model.card, model.phi is None
        self.base.show(model.phi)
        self.tensors = {name: value.contiguous() for name, value in self.base.taken(0).items()}
        layers = list(self.base.adapters.layers)
        self.means = {name: LowRank(*(self.tensors[f"{name}.mean.{side}"] for side in "ab")) for name in layers}
        self._check(model.name)
        self.examples, self.prompts = self._ask(model)
        with self.base.adapters.context.forward_pass(None):
            self.logits = next_logits(self.base.model, self.prompts)

    @property
    def rank(self) -> int:
        return self.base.config.adapters.rank

    @property
    def base_name(self) -> str:
        """As others find the base from wherever they are: a folder's absolute path, else the configured name."""
        return self.source.location if self.source.kind == "folder" else self.base.config.model.name

    @property
    def scaling(self) -> float:
        """s = alpha / rank."""
        return self.base.config.adapters.alpha / self.rank

    @property
    def dtype(self) -> torch.dtype:
        """Of the base's products."""
        return getattr(torch, self.base.config.model.dtype)

    @property
    def source(self):
        """Where the base comes from: see `abmll.models.source`."""
        return resolve(self.base.config.model)

    @property
    def letter_ids(self) -> tuple[int, ...]:
        """Token ids of the letters of the prompts' options."""
        return self.base.prompter.letter_ids[: len(self.examples[0].options)]

    def fresh_base(self) -> PreTrainedModel:
        """The base once more, as it was before there were adapters in it. Takes its memory again."""
        return load_model(self.base.config.model, self.base.device)[0]

    def report(
        self, format: str, logits: Tensor | None = None, base_logits: Tensor | None = None, **found: Any
    ) -> Report:
        """What was found. `logits` [S, V]: of what was written, and `base_logits` of the base without it."""
        if logits is not None and base_logits is not None:
            found["effect"] = float((self.logits - base_logits).abs().max())
            found["difference"] = float((logits - self.logits).abs().max())
            found["option_difference"] = self.option_difference(logits)
        model = self.base.config.model
        return Report(format, model.name, model.dtype, len(self.means), self.rank, self.scaling, **found)

    def option_difference(self, logits: Tensor) -> float:
        """The largest difference of an option's probability between the adapted model and one with these logits."""
        ours, theirs = (of[:, list(self.letter_ids)].double().softmax(dim=1) for of in (self.logits, logits))
        return float((ours - theirs).abs().max())

    def _check(self, name: str) -> None:
        wrong = [key for key, value in self.tensors.items() if not value.isfinite().all()]
        if wrong:
            raise Refused(f"{name}: {wrong[0]} and {len(wrong) - 1} more tensors are not finite; adapt or train again")
        if not any(mean.b.any() for mean in self.means.values()):
            raise Refused(
                f"{name}: the adapter changes nothing, as B is zero in all of its {len(self.means)} layers; hand on "
                "one that was trained or adapted"
            )

    def _ask(self, model: TaskModel) -> tuple[list[Example], list[PromptedExample]]:
        options = model.options or OPTIONS
        shown = [Example(one.input, tuple(one.options), one.output) for one in self.card.demonstrations]
        asked = [Example(text, options, options[0]).behind(shown) for text in TEXTS]
        pairs = zip(asked, self.base.prompter.encode(asked), strict=True)
        fitting = [(example, prompt) for example, prompt in pairs if prompt and not prompt.truncated]
        if not fitting:
            raise Refused(
                f"{model.name}: not even a short text fits in tasks.max_tokens: {self.base.config.tasks.max_tokens}; "
                "adapt with a larger one"
            )
        least = min(prompt.left_out for _, prompt in fitting)
        alike = [(example, prompt) for example, prompt in fitting if prompt.left_out == least]  # one frame for all
        return [example for example, _ in alike], [prompt for _, prompt in alike]


@torch.inference_mode()
def next_logits(model: PreTrainedModel, prompts: Sequence[PromptedExample]) -> Tensor:
    """Logits of the token behind each prompt, [S, V] fp32 on the CPU: the model's own, called as anybody calls it."""
    model.eval()
    ids = [torch.tensor([list(prompt.token_ids)], device=model.device) for prompt in prompts]
    return torch.stack([model(input_ids=own, use_cache=False).logits[0, -1].float().cpu() for own in ids])
