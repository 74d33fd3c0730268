"""A base model with adapters in it, loaded once for as many tasks as wanted."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from abmll.build import adapt_model, prompter_of
from abmll.config import Config
from abmll.config.native import in_software
from abmll.config.schema import EvalConfig
from abmll.evaluation.predictor import Predictor
from abmll.models.checkpointing import checkpoint_layers
from abmll.models.fingerprint import fingerprint
from abmll.models.load import load_model
from abmll.models.packing import is_packed

BATCH_SIZE = 16  # examples predicted at a time, unless the configuration has a number
SIDE_BY_SIDE = 4  # adaptations in one forward pass

Phi = dict[str, Tensor]  # one task's, by theta's names, on the CPU


def _device(name: str | torch.device | None) -> torch.device:
    """ValueError where it is none of this machine's."""
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:
        raise ValueError(f"device: {name!r}: there is no such device; take cpu, cuda or cuda:N") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device: {name!r}: this machine has {torch.cuda.device_count()} GPUs that torch can use")
    return device


class AdaptedBase:
    """The frozen model, its tokenizer and prompts, and adapters whose phi may be any task's.

    `config` is a run's; its tasks are not read. ValueError where the model cannot be had.
    """

    def __init__(self, config: Config, device: str | torch.device | None = None):
        self.device = _device(device)
        alone = {
            "model": config.model.model_copy(update={"sharding": "none"}),
            "trainer": config.trainer.model_copy(update={"parallel_episodes": 1}),
        }
        self.config = config = config.model_copy(update=alone)
        if slow := in_software(config.model.dtype, self.device.type):
            warnings.warn(slow, stacklevel=2)
        self.model, self.tokenizer = load_model(config.model, self.device)
        self.prompter = prompter_of(config, self.tokenizer)
        self.fingerprint = fingerprint(self.model)  # before there are adapters in it
        self.prompts = self.prompter.digest()
        self.learner, self.method = adapt_model(self.model, config, None)
        self.side_by_side = SIDE_BY_SIDE if is_packed(self.model) else 1  # padding depends on what is beside it
        checkpointing = config.trainer.activation_checkpointing
        if checkpointing is True or (checkpointing == "auto" and self.device.type == "cuda"):
            checkpoint_layers(self.model, "all layers")
        self._shown: Phi | None = None

    @property
    def adapters(self):
        return self.learner.adapters

    def predictor(self, samples: int = 0, config: Config | None = None) -> Predictor:
        """`samples`: of the posterior, whose predictions are averaged; 0: its mean. ValueError without a posterior.

        `config`: whose seed and size of batches the samples' noise belongs to; None: the base's own.
        """
        if samples < 0:
            raise ValueError(f"samples: {samples}: must be 0 or more; 0 takes the posterior's mean")
        if samples and not self.method.sampled:
            raise ValueError(
                f"samples: {samples}: {self.method.name} has no posterior to draw from; leave it out, or use a run of "
                "abmll or blob"
            )
        config = config or self.config
        size = BATCH_SIZE if config.eval.batch_size == "auto" else config.eval.batch_size
        return Predictor(self.learner, self.prompter.letter_ids, EvalConfig(samples=samples), size, config.seed)

    @torch.no_grad()
    def show(self, phi: Phi | None) -> None:
        """The adapters' phi becomes this one; None: a copy of theta. One that is shown already is not copied again."""
        if phi is None or phi is not self._shown:
            self.adapters.reset_phi()
            for name, value in (phi or {}).items():
                self.adapters.phi[name].copy_(value[None])
        self._shown = phi

    def taken(self, slot: int) -> Phi:
        """A copy of phi as it stands in a slot."""
        return {name: value[slot].detach().to("cpu", copy=True) for name, value in self.adapters.phi.items()}

    def forget(self) -> None:
        """phi was written by other means than `show`."""
        self._shown = None
