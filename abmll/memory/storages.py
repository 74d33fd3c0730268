"""Every storage's birth and death: what is alive, since when, for what, and who made it.

A `StorageCounter` sees each operator that PyTorch dispatches, on real tensors and on fake ones alike, and keeps a weak
reference to each storage that it finds among the results. Views and in-place results are storages that it knows. One
that is resized, as those of a sharded base are at each gathering, ends, and another of its kind begins. Not seen is
what an operator's own C++ code allocates and frees again inside one call.

(`torch.distributed._tools.MemTracker` works alike; it is private, knows no operators' scratch and no makers.)
"""

from __future__ import annotations

import re
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed.tensor import DTensor
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode

LOAD, FORWARD, RECOMPUTATION, BACKWARD = "load", "forward", "recomputation", "backward"
OPTIMIZER, OUTER, SCORING = "optimizer", "outer step", "scoring"
ADAPTATION = "adaptation"  # to an unseen task, where training has no inner loop that does the same
WARM_UP = "warm-up"  # what a run does once; not reported
TRAINING = (FORWARD, RECOMPUTATION, BACKWARD, OPTIMIZER, OUTER)
PHASES = (LOAD, *TRAINING, ADAPTATION, SCORING)

WEIGHTS, ADAPTERS, STATES, ENGINE, GRADIENTS = "weights", "adapters", "optimizer states", "engine buffers", "gradients"
GATHERED = "gathered layers"  # of a sharded base
KEPT, SCRATCH, TEMPORARY = "kept for the backward pass", "operators' scratch", "temporaries"
COMPONENTS = (WEIGHTS, GATHERED, ADAPTERS, STATES, ENGINE, GRADIENTS, KEPT, SCRATCH, TEMPORARY)


@dataclass(eq=False, slots=True)
class Storage:
    """One storage's life. Times count births and deaths; `passage` numbers the stretch of one phase it was born in."""

    size: int
    maker: str
    what: str  # shape and dtype of the tensor that it was made for
    phase: str
    passage: int
    born: int
    component: str | None = None  # where it is known from outside
    died: int | None = None
    death_passage: int | None = None

    def alive(self, time: int) -> bool:
        return self.born <= time and (self.died is None or time < self.died)

    def classified(self) -> str:
        """Its component, from its whole life: what outlived the forward pass that made it was kept for the backward."""
        if self.component is not None:
            return self.component
        outlived = self.death_passage is None or self.death_passage != self.passage
        return KEPT if outlived and self.phase in (FORWARD, RECOMPUTATION) else TEMPORARY


@dataclass(frozen=True)
class Peak:
    """Bytes at the fullest moment, of everything or of one phase."""

    size: int
    time: int


_DEVICE_OF = torch.ops.prim.device.default


class StorageCounter(TorchDispatchMode):
    """A dispatch mode that counts. Sizes are rounded up to `granularity` bytes, as an allocator does (CUDA: 512).

    `bodies` gives operators' Python functions by qualified name: a call of one runs its function instead, so that what
    it allocates is seen. Enter it inside FakeTensorMode, if that is wanted.
    """

    def __init__(self, granularity: int = 1, bodies: Mapping[str, Callable] | None = None):
        super().__init__()
        self.granularity, self.bodies = granularity, bodies or {}
        self.storages: list[Storage] = []
        self.peaks: dict[str, Peak] = {}
        self.now = 0
        self._known: dict[int, tuple[weakref.ref, Storage]] = {}
        self._time = self._passage = 0
        self._stage: str | None = None
        self._phase = LOAD
        self._optimizing = 0
        self._modules: list[str] = []
        self._names: dict[nn.Module, str] = {}
        self._body: _Body | None = None

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is _DEVICE_OF:  # every second call: nothing is made, and a fake tensor knows the answer
            return args[0].device if isinstance(args[0], FakeTensor) else func(*args)
        body = self.bodies.get(func.name().partition(".")[0]) if func.namespace == "abmll" else None
        if body is not None:
            return self._run(body, func.__name__.partition(".")[0], args, kwargs or {})
        if torch.is_inference_mode_enabled() and func.namespace == "aten":  # operators made of others come whole there
            with self:
                found = func.decompose(*args, **(kwargs or {}))
            if found is not NotImplemented:
                return found
        found = func(*args, **(kwargs or {}))
        self._see(found, func.__name__)
        return found

    def _run(self, body: Callable, name: str, args: tuple, kwargs: dict) -> Any:
        outer, self._body = self._body, _Body(name)
        try:
            with self:
                found = body(*args, **kwargs)
            results = {tensor.untyped_storage()._cdata for tensor in _tensors(found)}
            for key in self._body.made:
                if key in self._known and key not in results:
                    self._known[key][1].component = SCRATCH
            for storage in self._body.freed:
                storage.component = SCRATCH
        finally:
            self._body = outer
        return found

    def _see(self, found: Any, name: str) -> None:
        for tensor in _tensors(found):
            if isinstance(tensor, DTensor):  # stands for its part on this rank, which is seen itself
                continue
            if tensor.device.type != "meta":  # shapes alone
                storage = tensor.untyped_storage()
                if storage._cdata not in self._known:
                    self._born(storage, tensor, name)

    def _born(self, storage: torch.UntypedStorage, tensor: Tensor, name: str) -> None:
        key, what = storage._cdata, f"{list(tensor.shape)} {str(tensor.dtype)[6:]}"
        reference = weakref.ref(storage, lambda _: self._died(key))
        self._known[key] = (reference, self._begin(storage, self._maker(name), what))
        if self._body is not None:
            self._body.made.append(key)

    def _begin(self, storage: torch.UntypedStorage, maker: str, what: str, component: str | None = None) -> Storage:
        size = -(-storage.nbytes() // self.granularity) * self.granularity
        phase = self._now_in()
        self._time += 1
        made = Storage(size, maker, what, phase, self._passage, self._time, component)
        self.storages.append(made)
        self.now += size
        self._note(phase)
        return made

    def _note(self, phase: str) -> None:
        if phase not in self.peaks or self.now > self.peaks[phase].size:
            self.peaks[phase] = Peak(self.now, self._time)

    def _died(self, key: int) -> None:
        _, storage = self._known.pop(key)
        self._end(storage)
        if self._body is not None and key in self._body.made:
            self._body.freed.append(storage)

    def _end(self, storage: Storage) -> None:
        self._now_in()
        self._time += 1
        storage.died, storage.death_passage = self._time, self._passage
        self.now -= storage.size

    def _resized(self, storage: torch.UntypedStorage) -> None:
        if storage._cdata in self._known:
            reference, before = self._known[storage._cdata]
            self._end(before)
            after = self._begin(storage, before.maker, before.what, before.component)
            self._known[storage._cdata] = (reference, after)

    def _now_in(self) -> str:
        """The phase of this moment, as autograd and the optimizers tell it; a new passage begins where it changes."""
        if self._stage is not None:
            phase = self._stage
        elif self._optimizing:
            phase = OPTIMIZER
        elif torch._C._current_graph_task_id() == -1:
            phase = FORWARD
        else:  # inside a backward pass gradients are on only where checkpointing runs the forward again
            phase = RECOMPUTATION if torch.is_grad_enabled() else BACKWARD
        if phase != self._phase:
            self._phase = phase
            self._passage += 1
        return phase

    def _maker(self, name: str) -> str:
        operator = name.partition(".")[0]
        if self._body is not None:
            operator = f"{self._body.name} > {operator}"
        node = torch._C._current_autograd_node()
        if node is not None and not torch.is_grad_enabled():
            return f"{node.name()}: {operator}"
        return f"{self._modules[-1]}: {operator}" if self._modules else operator

    @contextmanager
    def stage(self, phase: str) -> Iterator[None]:
        """Everything inside belongs to `phase`, whatever autograd does."""
        before, self._stage = self._stage, phase
        try:
            yield
        finally:
            self._stage = before

    def label(self, component: str, tensors: Iterable[Tensor | None]) -> None:
        """Say what living tensors are for: it holds for their whole life, the past included."""
        for tensor in tensors:
            if tensor is not None:
                tensor = tensor.to_local() if isinstance(tensor, DTensor) else tensor
                self._see(tensor, "given")
                self._known[tensor.untyped_storage()._cdata][1].component = component

    def label_model(self, component: str, model: nn.Module) -> None:
        """Label its parameters and buffers, each made by the module that holds it."""
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            tensor = tensor.to_local() if isinstance(tensor, DTensor) else tensor
            self.label(component, [tensor])
            self._known[tensor.untyped_storage()._cdata][1].maker = _pattern(name)

    def name_modules(self, model: nn.Module) -> None:
        """Makers are named after this model's modules."""
        self._names = {module: _pattern(name) for name, module in model.named_modules()}

    @contextmanager
    def counting(self) -> Iterator[StorageCounter]:
        """On, with the hooks that tell modules and optimizer steps."""

        def enter(module: nn.Module, _: Any) -> None:
            self._modules.append(self._names.get(module) or type(module).__name__)

        def leave(*_: Any) -> None:
            self._modules.pop()

        def start(*_: Any) -> None:
            self._optimizing += 1
            self._note(self._now_in())  # a fused optimizer allocates nothing

        def stop(*_: Any) -> None:
            self._optimizing -= 1

        resize = torch.UntypedStorage.resize_

        def resized(storage: torch.UntypedStorage, size: int) -> Any:
            found = resize(storage, size)
            self._resized(storage)
            return found

        hooks = [
            register_module_forward_pre_hook(enter),
            register_module_forward_hook(leave, always_call=True),  # a recomputation stops in the middle of a layer
            register_optimizer_step_pre_hook(start),
            register_optimizer_step_post_hook(stop),
        ]
        torch.UntypedStorage.resize_ = resized
        try:
            with self:
                yield self
        finally:
            torch.UntypedStorage.resize_ = resize
            for hook in hooks:
                hook.remove()

    def alive(self, time: int) -> list[Storage]:
        """The storages that were alive at a moment."""
        return [storage for storage in self.storages if storage.alive(time)]


class Uncounted:
    """Stands for a counter where the device's own allocator counts."""

    def __init__(self) -> None:
        self.peaks: dict[str, Peak] = {}

    def stage(self, _: str) -> nullcontext:
        return nullcontext()

    def label(self, *_: Any) -> None:
        pass

    label_model = name_modules = label


@dataclass
class _Body:
    """An operator's function while it runs: what it made, and what of that is gone already."""

    name: str
    made: list[int] = field(default_factory=list)
    freed: list[Storage] = field(default_factory=list)


def _pattern(name: str) -> str:
    """A module's name with `*` for the layer's number."""
    return re.sub(r"\.\d+(?=\.|$)", ".*", name)


def _tensors(found: Any) -> Iterator[Tensor]:
    if isinstance(found, Tensor):
        yield found
    elif isinstance(found, list | tuple):
        for item in found:
            yield from _tensors(item)
