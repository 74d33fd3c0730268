"""What is compared: one episode, or training step, of each way to train adapters on the same frozen model."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

import torch

from abmll.config import Config
from abmll.memory.episode import Counting, Setup, make_batch, make_model, run_episode, warm_up
from abmll.memory.fake import as_on_gpu
from abmll.memory.storages import ADAPTERS, GRADIENTS, LOAD, SCORING, STATES, WARM_UP
from abmll.models.answers import Rows, answer_logits
from abmll.models.architectures import architecture_config
from abmll.models.checkpointing import Checkpointing, checkpoint_layers
from abmll.objective import answer_nll

ROOT = Path(__file__).resolve().parents[2]
FROZEN, LORA, PEFT = "frozen forward", "LoRA", "PEFT LoRA"
Run = Callable[[Setup, Counting], object]


@dataclass(frozen=True)
class Contender:
    """A name, keys of the configuration, and what runs: (setup, counter) -> anything."""

    method: str = "abmll"
    posterior: str = "activation"
    backend: str = "torch"
    run: Run = run_episode


@dataclass(frozen=True)
class Case:
    """`examples` prompts of `tokens` tokens each."""

    model: str
    examples: int
    tokens: int
    checkpointing: Checkpointing

    def setup(self, contender: Contender) -> Setup:
        config = Config.model_validate(
            {
                "model": {"name": f"random:{self.model}"},
                "adapters": {"posterior": contender.posterior, "backend": contender.backend},
                "method": {"name": contender.method},
                "tasks": {"source": "builtin", "batch_size": self.examples, "max_tokens": self.tokens},
            }
        )
        deepspeed = json.loads((ROOT / config.trainer.deepspeed).read_text())
        return Setup(config, architecture_config(self.model), deepspeed, checkpointing=self.checkpointing)


def run_frozen(setup: Setup, counter: Counting) -> None:
    """The base model's forward pass alone, in inference."""
    with counter.stage(LOAD):
        model = make_model(setup, counter)
    counter.name_modules(model)
    with counter.stage(SCORING), torch.inference_mode():
        batch = make_batch(setup.config.tasks.batch_size, setup.config.tasks.max_tokens)
        answer_logits(model, Rows.of(model, batch))


def run_peft(setup: Setup, counter: Counting) -> None:
    """A training step of PEFT's LoRA with AdamW: the same modules, rank, fp32 adapters, answer positions and NLL."""
    from peft import LoraConfig, get_peft_model
    from peft.tuners.tuners_utils import BaseTunerLayer

    adapters, method, tasks = setup.config.adapters, setup.config.method, setup.config.tasks
    with counter.stage(LOAD):
        base = make_model(setup, counter)
        lora = LoraConfig(r=adapters.rank, lora_alpha=adapters.alpha, target_modules=list(adapters.modules))
        # the pairs are made where the model is, in fp32, as PEFT leaves them: it would move them there and back to
        # fp32 through the model's dtype, which fake tensors refuse
        with patch.object(BaseTunerLayer, "_move_adapter_to_device_of_base_layer", lambda *_, **__: None):
            model = get_peft_model(base, lora)
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        counter.label(ADAPTERS, parameters)
        checkpoint_layers(base, setup.checkpointing)
        counter.name_modules(base)
        optimizer = as_on_gpu(torch.optim.AdamW(parameters, lr=method.inner_lr, weight_decay=0.0))
        batch = make_batch(tasks.batch_size, tasks.max_tokens)
    with counter.stage(WARM_UP):
        warm_up(optimizer)
    counter.label(STATES, (value for state in optimizer.state.values() for value in state.values()))
    model.train()
    logits = answer_logits(base, Rows.of(base, batch))
    answer_nll(logits, batch.target, method.nll_reduction, batch.group_prompts).sum().backward()
    counter.label(GRADIENTS, (parameter.grad for parameter in parameters))
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


CONTENDERS = {
    FROZEN: Contender(run=run_frozen),
    LORA: Contender("structured_lora"),
    PEFT: Contender(run=run_peft),
    "activation, plain": Contender(),
    "activation, fused": Contender(backend="triton"),
    "weight, plain": Contender(posterior="weight"),
    "weight, fused": Contender(posterior="weight", backend="triton"),
}
