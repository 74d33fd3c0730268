"""Which code runs a projection: the fused kernels or plain PyTorch."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Literal

import torch
from torch import Tensor

Backend = Literal["auto", "triton", "torch"]
Posterior = Literal["activation", "weight"]

SUPPORTED_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
MAXIMUM_RANK = 64
MINIMUM_CAPABILITY = (8, 0)

logger = logging.getLogger("abmll.kernels")

_assumed = False


@contextmanager
def assume_gpu() -> Iterator[None]:
    """Any device counts as a GPU that runs the kernels: to count on fake tensors what a run would take on one.

    Real tensors on a CPU are not meant for this: their launches would fail.
    """
    global _assumed
    before, _assumed = _assumed, True
    try:
        yield
    finally:
        _assumed = before


def on_gpu(where: Tensor | torch.device) -> bool:
    """Whether code takes the GPU's way for this tensor or device: CUDA devices, and all inside `assume_gpu`."""
    device = where.device if isinstance(where, Tensor) else where
    return _assumed or device.type == "cuda"


@cache
def interpreted() -> bool:
    """Whether Triton's kernels run in its CPU interpreter (TRITON_INTERPRET=1 before the first import)."""
    try:
        import triton
    except ImportError:
        return False
    return bool(triton.knobs.runtime.interpret)


def _device_obstacle(device: torch.device) -> str | None:
    try:
        import triton  # noqa: F401
    except ImportError:
        return "triton is not installed; pip install triton"
    if _assumed:
        return None
    return _interpreter_obstacle() if interpreted() else _hardware_obstacle(device)


@cache
def _interpreter_obstacle() -> str | None:
    """Triton 3.6 makes indices of one-element arrays, which numpy forbids from 2.4 on (triton-lang/triton#9171)."""
    import numpy
    import triton

    def version(package) -> tuple[int, ...]:
        return tuple(int(part) for part in package.__version__.split(".")[:2])

    if version(triton) < (3, 7) and version(numpy) >= (2, 4):
        return (
            f"numpy {numpy.__version__}: the interpreter of triton {triton.__version__} needs numpy below 2.4; pip "
            "install 'numpy<2.4', or triton 3.7 or newer"
        )
    return None


@cache
def _hardware_obstacle(device: torch.device) -> str | None:
    if device.type != "cuda" or torch.version.cuda is None:
        return f"device {device}: the kernels need an NVIDIA GPU (or TRITON_INTERPRET=1, to test them without one)"
    capability = torch.cuda.get_device_capability(device)
    if capability < MINIMUM_CAPABILITY:
        wanted = ".".join(map(str, MINIMUM_CAPABILITY))
        return f"device {device}: compute capability {'.'.join(map(str, capability))}: the kernels need {wanted}"
    return None


def obstacle(device: torch.device, dtype: torch.dtype, rank: int) -> str | None:
    """Why the fused kernels cannot run this projection: argument and value; None where they can."""
    if dtype not in SUPPORTED_DTYPES:
        return f"x: dtype {dtype}: the kernels take {', '.join(str(d) for d in SUPPORTED_DTYPES)}"
    if not 1 <= rank <= MAXIMUM_RANK:
        return f"rank: {rank}: the kernels take 1 to {MAXIMUM_RANK}"
    return _device_obstacle(device)


def resolve(
    backend: Backend, posterior: Posterior, device: torch.device, dtype: torch.dtype, rank: int
) -> tuple[Literal["triton", "torch"], str]:
    """The backend that runs and why: under `auto` Triton on a GPU that can, else plain PyTorch; never the interpreter.

    Raises ValueError where `triton` was asked for and cannot run.
    """
    if backend not in ("auto", "triton", "torch"):
        raise ValueError(f"backend: {backend!r}: must be auto, triton or torch")
    if backend == "torch":
        return "torch", "as configured"
    reason = obstacle(device, dtype, rank)
    if backend == "triton":
        if reason is not None:
            raise ValueError(f"backend: 'triton': {reason}; or set backend: auto")
        return "triton", "as configured"
    if reason is None and interpreted() and not _assumed:
        reason = "Triton's interpreter is for tests only"
    return ("triton", "fused kernels run here") if reason is None else ("torch", reason)


def choose(backend: Backend, posterior: Posterior, x: Tensor, rank: int) -> Literal["triton", "torch"]:
    """`resolve` for this input, which logs the choice and its reason once for each kind of input."""
    return _settled(backend, posterior, x.device, x.dtype, rank)


@torch.compiler.assume_constant_result  # torch.compile cannot look into the cache, nor at Triton's settings, nor log
def _settled(
    backend: Backend, posterior: Posterior, device: torch.device, dtype: torch.dtype, rank: int
) -> Literal["triton", "torch"]:
    if _assumed:  # holds for the moment, so it is not remembered
        return resolve(backend, posterior, device, dtype, rank)[0]
    return _choose(backend, posterior, device, dtype, rank)


@cache
def _choose(
    backend: Backend, posterior: Posterior, device: torch.device, dtype: torch.dtype, rank: int
) -> Literal["triton", "torch"]:
    choice, reason = resolve(backend, posterior, device, dtype, rank)
    what = f"{posterior} posterior, {dtype}, rank {rank}, on {device}"
    logger.info("backend %s: %s (%s): %s", backend, choice, what, reason)
    return choice
