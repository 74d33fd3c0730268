"""What benchmarks/throughput.py compares: ways to take the same gradient steps on the same batches of several tasks."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from transformers import PreTrainedModel

from abmll.adapters import inject_adapters
from abmll.config import Config
from abmll.kernels import NoiseKey
from abmll.learner import Learner
from abmll.methods import Visit, build_method
from abmll.models.answers import Rows, answer_logits
from abmll.models.checkpointing import Checkpointing, checkpoint_layers
from abmll.models.load import attention_implementation
from abmll.objective import answer_nll
from abmll.tasks.batch import side_by_side
from abmll.tasks.task import Batch, Episode

FROZEN, ACTIVATION, WEIGHT = "frozen", "activation", "weight"
PLAIN = {"activation, plain": ACTIVATION, "weight, plain": WEIGHT}
RESET, RESIDENT, LOADED = "PEFT, one adapter reset", "PEFT, set_adapter", "PEFT, loaded from CPU"
GROUPED = (FROZEN, ACTIVATION, WEIGHT)  # those that take several episodes side by side
CONTENDERS = (*GROUPED, *PLAIN, RESET, RESIDENT, LOADED)


class Clock:
    """Moments, on a GPU as events in its stream: taking one waits for nothing."""

    def __init__(self, device: torch.device):
        self.on_gpu = device.type == "cuda"

    def now(self) -> Any:
        if not self.on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def wait(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize()

    def seconds(self, began: Any, ended: Any) -> float:
        """Between two moments that are over (`wait`)."""
        return began.elapsed_time(ended) / 1e3 if self.on_gpu else ended - began


@dataclass
class Notes:
    """Of one round over all episodes: each episode's NLL before its first step, and when which part ran."""

    nll: list[Tensor] = field(default_factory=list)  # [G] each, on the device
    steps: list[tuple[Any, Any]] = field(default_factory=list)
    swaps: list[tuple[Any, Any]] = field(default_factory=list)
    rows: int = 0  # that the linear layers see in the gradient steps, padding included


# `learning`: theta moves behind each episode, where there is one; else every episode begins at the same
Round = Callable[..., Notes]


@dataclass(frozen=True)
class Work:
    """The same for all: the frozen model, the episodes, and how they are taken."""

    config: Config
    model: PreTrainedModel
    episodes: Sequence[Episode]
    checkpointing: Checkpointing
    clock: Clock

    @property
    def device(self) -> torch.device:
        return self.model.device

    def own_model(self) -> PreTrainedModel:
        """A model for one contender that shares the frozen weights."""
        shared = {id(tensor): tensor for tensor in (*self.model.parameters(), *self.model.buffers())}
        own = deepcopy(self.model, shared)
        checkpoint_layers(own, self.checkpointing)
        return own.train()

    def parts(self, groups: int) -> Iterator[Sequence[Episode]]:
        for start in range(0, len(self.episodes), groups):
            yield self.episodes[start : start + groups]


def make(name: str, groups: int, work: Work) -> Round:
    """A contender, built; calling it takes all of the work's episodes once."""
    if name == FROZEN:
        return _frozen(work, groups)
    if name in (RESET, RESIDENT, LOADED):
        return _peft(work, name)
    return _abmll(work, groups, PLAIN.get(name, name), "torch" if name in PLAIN else "auto")


def make_learner(work: Work, posterior: str, backend: str = "auto") -> Learner:
    config = work.config
    adapters = config.adapters.model_copy(update={"posterior": posterior, "backend": backend})
    model = work.own_model()
    adapter_set = inject_adapters(model, adapters, config.method, "gaussian", config.seed)
    return Learner(model, adapter_set, config.method, len(work.episodes), config.tasks.batch_size)


def _frozen(work: Work, groups: int) -> Round:
    """The floor: K forward and backward passes of the frozen model over the packed tokens of G episodes."""
    model = work.own_model()
    model.enable_input_require_grads()

    def run(learning: bool = True) -> Notes:
        notes = Notes()
        for episodes in work.parts(groups):
            for step, own in enumerate(zip(*(episode.support for episode in episodes), strict=True)):
                batch, began = side_by_side(own).to(work.device), work.clock.now()
                rows = Rows.of(model, batch)
                nll = _nll(model, rows, batch, work)
                nll.sum().backward()
                notes.steps.append((began, work.clock.now()))
                notes.rows += rows.inputs["input_ids"].numel()
                if step == 0:
                    notes.nll.append(nll.detach())
        return notes

    return run


def _nll(model: PreTrainedModel, rows: Rows, batch: Batch, work: Work) -> Tensor:
    return answer_nll(answer_logits(model, rows), batch.target, work.config.method.nll_reduction, batch.group_prompts)


def _abmll(work: Work, groups: int, posterior: str, backend: str) -> Round:
    """As the trainer does with one rank: phi from theta, K inner steps, theta's gradient, one step of theta."""
    learner = make_learner(work, posterior, backend)
    config, adapters = work.config.method, learner.adapters
    method = build_method(config, posterior)
    adapters.reset_phi(groups)
    inner, outer = learner.optimizer(config.inner_lr), method.outer_optimizer(adapters.theta.values())
    passes = config.inner_steps + 1

    def run(learning: bool = True) -> Notes:
        notes = Notes()
        phi_step = learner.phi_step

        def timed_step(*arguments):
            began = work.clock.now()
            terms = phi_step(*arguments)
            notes.steps.append((began, work.clock.now()))
            return terms

        for episodes in work.parts(groups):
            began = work.clock.now()
            adapters.reset_phi(groups)
            notes.swaps.append((began, work.clock.now()))
            keys = [[NoiseKey(0, episode.index * passes + k) for k in range(passes)] for episode in episodes]
            visit = Visit.of(episodes, 0, keys, inner, 0.0, work.device)
            with patch.object(learner, "phi_step", timed_step):
                update = method.update(learner, visit)
            inner.state.clear()
            finite = torch.stack(update.outer[:-1]).isfinite().all(dim=0).tolist()  # the episode's only wait
            for name, gradient in update.total(finite).items():
                adapters.theta[name].grad = gradient / sum(finite)
            if learning:
                outer.step()
            outer.zero_grad(set_to_none=True)
            notes.nll.append(update.inner[0].nll)
            notes.rows += sum(Rows.of(learner.model, batch).inputs["input_ids"].numel() for batch in visit.support)
        return notes

    return run


def _peft(work: Work, name: str) -> Round:
    """One episode after another, K gradient steps each; what stands between two tasks is the variant.

    RESET: one adapter, set back in place. RESIDENT: an adapter a task, all on the device, made active by `set_adapter`.
    LOADED: one adapter, whose weights are loaded from the CPU before an episode and copied there behind it.
    """
    from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict

    adapters, config = work.config.adapters, work.config.method
    model = work.own_model()
    architecture = model.config.get_text_config()
    model.set_attn_implementation(attention_implementation(work.config.model, work.device, architecture))
    if work.checkpointing != "none":
        model.enable_input_require_grads()
    settings = LoraConfig(r=adapters.rank, lora_alpha=int(adapters.alpha), target_modules=list(adapters.modules))
    peft, names = get_peft_model(model, settings), ["default"]
    for number in range(1, len(work.episodes) if name == RESIDENT else 1):
        names.append(f"task{number}")
        peft.add_adapter(names[-1], settings)
    trained, optimizers = [], []
    for adapter in names:
        peft.set_adapter(adapter)
        trained.append([parameter for parameter in peft.parameters() if parameter.requires_grad])
        optimizers.append(torch.optim.AdamW(trained[-1], lr=config.inner_lr, weight_decay=0.0, fused=True))
    start = [parameter.detach().clone() for parameter in trained[0]] if name == RESET else []

    def state_on_cpu() -> dict[str, Tensor]:
        return {key: value.to("cpu", copy=True) for key, value in get_peft_model_state_dict(peft).items()}

    on_cpu = [state_on_cpu() for _ in work.episodes]

    @torch.no_grad()
    def swap(number: int) -> None:
        if name == RESIDENT:
            peft.set_adapter(names[number])
        elif name == LOADED:
            set_peft_model_state_dict(peft, on_cpu[number])
        else:
            torch._foreach_copy_(trained[0], start)

    def run(learning: bool = True) -> Notes:
        notes = Notes()
        for number, episode in enumerate(work.episodes):
            began = work.clock.now()
            swap(number)
            notes.swaps.append((began, work.clock.now()))
            optimizer = optimizers[number % len(optimizers)]
            for step, batch in enumerate(episode.support):
                batch, began = batch.to(work.device), work.clock.now()
                rows = _padded(model, batch)
                nll = _nll(model, rows, batch, work)
                nll.sum().backward()
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                notes.steps.append((began, work.clock.now()))
                notes.rows += rows.inputs["input_ids"].numel()
                if step == 0:
                    notes.nll.append(nll.detach())
            optimizer.state.clear()
            if name == LOADED:
                began = work.clock.now()
                state_on_cpu()
                notes.swaps.append((began, work.clock.now()))
        return notes

    return run


def _padded(model: PreTrainedModel, batch: Batch) -> Rows:
    """As a data collator makes it: prompts padded on the right to the batch's longest, and an attention mask.

    But logits are made at the answers alone, which is kinder to this contender than transformers' own loss.
    """
    rows = Rows.of(model, batch)
    return replace(rows, inputs={**rows.inputs, "attention_mask": rows.token_mask.long()})
