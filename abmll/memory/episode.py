"""One episode of a configured run on fake tensors, every storage counted: the real model, adapters, method, scoring."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._guards import detect_fake_mode
from torch.distributed.device_mesh import DeviceMesh
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from abmll.adapters import inject_adapters
from abmll.config import Config
from abmll.evaluation.predictor import Predictor
from abmll.kernels import NoiseKey, rows_of_keys
from abmll.learner import Learner, StepTerms
from abmll.memory import attention
from abmll.memory.counted_engine import CountedEngine
from abmll.memory.fake import as_on_gpu, counted
from abmll.memory.sharding import imagined_ranks, shard_counted
from abmll.memory.storages import (
    ADAPTATION,
    ADAPTERS,
    COMPONENTS,
    GRADIENTS,
    LOAD,
    OUTER,
    PHASES,
    SCORING,
    STATES,
    TRAINING,
    WARM_UP,
    WEIGHTS,
    Storage,
    StorageCounter,
    Uncounted,
)
from abmll.methods import Method, Visit, build_method
from abmll.metrics import ScoreAccumulator
from abmll.models import packing
from abmll.models.checkpointing import Checkpointing, checkpoint_layers
from abmll.models.load import attention_implementation
from abmll.models.quantization import pack_shapes, quantize
from abmll.tasks.batch import collate, side_by_side
from abmll.tasks.task import Batch, PromptedExample

logger = logging.getLogger("abmll.memory")
Counting = StorageCounter | Uncounted

OPTIONS = 4  # of an example: too small to matter


@dataclass(frozen=True)
class Setup:
    """What is counted: a run, and where it runs.

    `scoring`: sizes of a scoring batch, in examples; the first that needs no more memory than training does is taken,
    or else the last. None: nothing is scored.
    """

    config: Config
    architecture: PreTrainedConfig
    deepspeed: dict[str, Any]
    world_size: int = 1
    gpu: bool = True
    checkpointing: Checkpointing = "all layers"
    scoring: tuple[int, ...] = ()


@dataclass(frozen=True)
class Largest:
    """Tensors alike at the peak: of one maker, shape and component."""

    size: int
    count: int
    maker: str
    what: str
    component: str


@dataclass(frozen=True)
class Ledger:
    """Bytes at each phase's fullest moment by component, the largest tensors at the fullest of all, and the scoring
    batch that was taken."""

    phases: dict[str, dict[str, int]]
    largest: list[Largest]
    scored: int | None

    def peak_of(self, phase: str) -> int:
        return sum(self.phases[phase].values())

    @property
    def fullest(self) -> str:
        return max(self.phases, key=self.peak_of)

    @property
    def peak(self) -> int:
        return self.peak_of(self.fullest)


class Uncountable(RuntimeError):
    """A model whose code does not run on fake tensors."""


class CountedLearner(Learner):
    """A learner whose phases the counter is told, where neither autograd nor an optimizer does."""

    counter: Counting

    def _phi_gradient(self, batch: Batch, key: NoiseKey | None, beta: float) -> StepTerms:
        terms = super()._phi_gradient(batch, key, beta)
        self.counter.label(GRADIENTS, (p.grad for p in self.adapters.phi.values()))
        return terms

    def theta_gradient_kl(self, *arguments: Any) -> tuple[dict[str, Tensor], StepTerms]:
        with self.counter.stage(OUTER):
            return super().theta_gradient_kl(*arguments)

    def theta_gradient_of_weights(self) -> tuple[dict[str, Tensor], StepTerms]:
        with self.counter.stage(OUTER):
            return super().theta_gradient_of_weights()

    def theta_gradient_first_order(self, *arguments: Any) -> tuple[dict[str, Tensor], StepTerms]:
        with self.counter.stage(OUTER):
            return super().theta_gradient_first_order(*arguments)

    def theta_gradient_towards_phi(self, share: float) -> dict[str, Tensor]:
        with self.counter.stage(OUTER):
            return super().theta_gradient_towards_phi(share)


def count_episode(setup: Setup) -> Ledger:
    """Bytes of an inner step, the outer step and one scoring batch, every prompt of max_tokens.

    Not the first ones: the moments of phi and theta are there, as they are from the second step on.

    Raises ValueError where no module matches adapters.modules, or adapters.backend cannot run on the device, and
    Uncountable where the model's code asks tensors for their numbers.
    """
    try:
        ranks = imagined_ranks(setup.config.model.sharding, setup.world_size)
        with ranks as mesh, counted(setup.gpu) as counter:
            scored = run_episode(setup, counter, mesh)
            return read_ledger(counter, scored)
    except Exception as error:
        if isinstance(error, ValueError) and str(error).startswith("adapters."):
            raise  # the user's to mend
        # whatever else a model's code may do that fake tensors cannot
        logger.debug("not counted", exc_info=True)
        reason = str(error).strip().partition("\n")[0]
        raise Uncountable(f"{type(error).__name__}: {reason}") from error


def run_episode(setup: Setup, counter: Counting, mesh: DeviceMesh | None = None) -> int | None:
    """The episode itself, on whatever tensors are made here: fake ones, or real ones to measure or to test the counter.

    Under `torch.device`, on that device. `mesh`: the ranks that a sharded base is spread over; all of them call this.
    Returns the size of the scoring batch that was taken.
    """
    config = setup.config
    with counter.stage(LOAD):
        model = make_model(setup, counter, mesh)
        learner, method = _adapted(model, setup, counter)
        build_optimizer = partial(_outer_optimizer, method, setup.gpu)
        engine = CountedEngine(learner.adapters.theta, build_optimizer, setup.deepspeed, setup.world_size, counter)
        inner = learner.optimizer(config.method.inner_lr)
        beside = episodes_beside(config, setup.world_size)
        batch, keys = _side_by_side(config, beside)
        learner.adapters.reset_phi(beside)
        counter.label(ADAPTERS, learner.adapters.phi.values())
    several = (config.trainer.tasks_per_step or 1) > setup.world_size * beside
    with counter.stage(WARM_UP):
        engine.step({name: torch.zeros_like(value) for name, value in learner.adapters.theta.items()})
        if method.inner_loop:
            warm_up(inner)
        # of the tasks that this rank has visited before in the same step
        sums = [torch.zeros_like(value) for value in learner.adapters.theta.values()] if several else []
        counter.label(GRADIENTS, sums)
    if method.updates_per_episode:
        counter.label(STATES, _states(inner))
        # one step more needs no more memory than one, unless all are kept for the derivative through them
        steps = config.method.inner_steps if method.second_order else 1
        update = method.update(learner, Visit(range(beside), (batch,) * steps, batch, 0, keys, inner, 0.0))
        if config.method.reset_inner_optimizer:
            inner.state.clear()
        counter.label(GRADIENTS, update.gradient.values())
        with counter.stage(OUTER):
            gradient = update.total([True] * beside)
            counter.label(GRADIENTS, gradient.values())
            del update
            engine.step(gradient)
        del gradient, sums
        learner.adapters.reset_phi(beside)
    adapts_as_it_trains = method.inner_loop and config.method.reset_inner_optimizer
    tasks = config.trainer.parallel_episodes  # an outer step may have fewer
    if setup.scoring and not (adapts_as_it_trains and tasks == beside):
        with counter.stage(ADAPTATION):
            learner.adapters.reset_phi(tasks)
            counter.label(ADAPTERS, learner.adapters.phi.values())
            if tasks != beside:
                batch, keys = _side_by_side(config, tasks)
            method.adapt(learner, [batch] * 2, keys)  # then its moments are there
            learner.adapters.reset_phi(tasks)
    bound = max((counter.peaks[phase].size for phase in (*TRAINING, ADAPTATION) if phase in counter.peaks), default=0)
    for examples in setup.scoring:
        counter.peaks.pop(SCORING, None)
        _score(learner, method, examples, setup, counter)
        if SCORING not in counter.peaks or counter.peaks[SCORING].size <= bound:
            break
    return examples if setup.scoring else None


def _side_by_side(config: Config, tasks: int) -> tuple[Batch, list[Tensor]]:
    """A batch of each of so many tasks, and the names of their noise in two steps."""
    batch = side_by_side([make_batch(config.tasks.batch_size, config.tasks.max_tokens)] * tasks)
    return batch, [rows_of_keys([NoiseKey(0, step)] * tasks, batch.input_ids.device) for step in range(2)]


def warm_up(optimizer: torch.optim.Optimizer) -> None:
    """Its states are there, as after a first step."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def _states(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [value for state in optimizer.state.values() for value in state.values()]


def make_model(setup: Setup, counter: Counting, mesh: DeviceMesh | None = None) -> PreTrainedModel:
    """The frozen base model, its attention as it would be on the device."""
    config = setup.config
    implementation, quantized = _attention(setup), config.model.quantization != "none"
    # a 4-bit model is read layer by layer, and a sharded one tensor by tensor: neither is ever whole
    with counter.stage(WARM_UP if quantized or mesh is not None else LOAD):
        model = AutoModelForCausalLM.from_config(
            deepcopy(setup.architecture),  # transformers writes the attention's name into it
            dtype=getattr(torch, config.model.dtype),
            attn_implementation=implementation,
        )
        fake = detect_fake_mode([next(model.parameters())]) is not None
        if quantized:
            (pack_shapes if fake else quantize)(model, model.dtype)
        model.requires_grad_(False).eval()
        if mesh is not None:
            shard_counted(model, mesh, counter)
    if implementation != "eager":
        if fake and setup.gpu:
            model.set_attn_implementation(attention.register())
        elif fake or model.device.type == "cpu":
            model.set_attn_implementation(packing.register("prompt"))
        else:
            packing.pack_prompts(model)
    counter.label_model(WEIGHTS, model)
    return model


def _attention(setup: Setup) -> str:
    """Transformers' name: eager code's, or SDPA's, which stands for flash-attn too: they take the same memory."""
    model, text = setup.config.model, setup.architecture.get_text_config()
    heads = getattr(text, "num_attention_heads", None)
    grouped = getattr(text, "num_key_value_heads", heads) not in (None, heads)
    if setup.gpu and model.dtype == "float32" and grouped:
        return "eager"  # see `attention`: PyTorch's own plain code
    if not MODEL_FOR_CAUSAL_LM_MAPPING.get(type(setup.architecture), PreTrainedModel)._supports_sdpa:
        return "eager"
    if model.attention == "flash_attention_2":
        return "sdpa"
    device = torch.device("cuda" if setup.gpu else "cpu")
    return "eager" if attention_implementation(model, device, setup.architecture) == "eager" else "sdpa"


def _adapted(model: PreTrainedModel, setup: Setup, counter: Counting) -> tuple[Learner, Method]:
    config = setup.config
    method = build_method(config.method, config.adapters.posterior)
    adapters = inject_adapters(model, config.adapters, config.method, method.layers, config.seed)
    counter.label(ADAPTERS, (*adapters.theta.values(), *adapters.phi.values()))
    checkpoint_layers(model, setup.checkpointing)
    counter.name_modules(model)
    learner = CountedLearner(model, adapters, config.method, num_train_tasks=1, batch_size=config.tasks.batch_size)
    learner.counter = counter
    return learner, method


def _outer_optimizer(method: Method, gpu: bool, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    optimizer = method.outer_optimizer(parameters)
    return as_on_gpu(optimizer) if gpu else optimizer


def _score(learner: Learner, method: Method, examples: int, setup: Setup, counter: Counting) -> None:
    predictor = Predictor(learner, range(OPTIONS), setup.config.eval, examples, setup.config.seed)
    keys = iter([NoiseKey(0, 0)]) if method.sampled and setup.config.eval.samples else None
    draws, phi = setup.config.eval.tfb.samples, list(learner.adapters.phi.values())
    learner.model.eval()
    with counter.stage(SCORING):
        if draws:  # beside the tasks' own; a draw's B, which it shares, stands for what is added to its A
            before = [parameter.data for parameter in phi]
            for parameter in phi:
                parameter.data = parameter.data.new_zeros(draws, *parameter.shape[1:])
            counter.label(ADAPTERS, phi)
        with torch.inference_mode():
            batch = make_batch(examples, setup.config.tasks.max_tokens)
            ScoreAccumulator().update(predictor.probabilities(batch, keys, None if draws else 0), batch)
        if draws:
            for parameter, own in zip(phi, before, strict=True):
                parameter.data = own


def episodes_beside(config: Config, world_size: int) -> int:
    """Episodes that a rank adapts side by side."""
    an_outer_step = config.trainer.tasks_per_step
    most = config.trainer.parallel_episodes
    return most if an_outer_step is None else min(most, -(-an_outer_step // world_size))


def make_batch(examples: int, tokens: int) -> Batch:
    """Zeros in a batch's shapes, on the default device: every prompt as long as the longest allowed."""
    batch = collate([PromptedExample([0] * tokens, 0, OPTIONS)] * examples, range(OPTIONS))
    return batch.to(torch.get_default_device())


def read_ledger(counter: StorageCounter, scored: int | None = None) -> Ledger:
    """What the counter saw, by phase and component."""
    peaks = {phase: counter.peaks[phase] for phase in PHASES if phase in counter.peaks}
    phases = {phase: _by_component(counter.alive(peak.time)) for phase, peak in peaks.items()}
    fullest = max(peaks.values(), key=lambda peak: peak.size)
    alike, count = Counter(), Counter()
    for storage in counter.alive(fullest.time):
        kind = (storage.maker, storage.what, storage.classified())
        alike[kind] += storage.size
        count[kind] += 1
    largest = [Largest(size, count[kind], *kind) for kind, size in alike.most_common()]
    return Ledger(phases, largest, scored)


def _by_component(alive: Iterable[Storage]) -> dict[str, int]:
    sizes = dict.fromkeys(COMPONENTS, 0)
    for storage in alive:
        sizes[storage.classified()] += storage.size
    return sizes
