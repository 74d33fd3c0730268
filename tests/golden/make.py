"""Writes the golden files: python -m tests.golden.make

A short tiny run of each backend and posterior: two episodes of two inner steps and an outer one, each number of them a
hexadecimal float, beside what its last bits depend on. Regenerate only for a change that is meant to move numbers, and
say in the commit which and why.
"""

from __future__ import annotations

import json
import platform
import re
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from threadpoolctl import threadpool_info

from ..conftest import build_tiny  # first: it turns Triton's interpreter on

FOLDER = Path(__file__).parent
BACKENDS = ("reference", "plain", "closed_form", "triton")
POSTERIORS = ("activation", "weight")
EPISODES, STEPS = 2, 2
# AdamW divides by the gradient's own size, which magnifies rounding where that is near its eps. An eps above all
# gradients, with learning rates to match, makes its steps proportional to them.
METHOD = {"inner_steps": STEPS, "adam_eps": 30.0, "inner_lr": 3e-1, "outer_lr": 3e-2}

Numbers = dict[str, list[float]]


def run(backend: str, posterior: str, alpha: float = 16.0, dtype: torch.dtype = torch.float32) -> Numbers:
    """Every number of the run, by name: the steps' terms, and the letters' logits by a draw and by the mean."""
    adapters = {"rank": 2, "alpha": alpha, "modules": ["v_proj"], "posterior": posterior}
    adapters["backend"] = "triton" if backend == "triton" else "torch"
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with _code_of(backend):
            tiny = build_tiny(dtype, adapters=adapters, method=METHOD, tasks={"batch_size": 1})
            return _numbers(tiny.scatter())
    finally:
        torch.set_num_threads(before)


def _numbers(tiny: Any) -> Numbers:
    from abmll.kernels import NoiseKey

    learner, theta, numbers = tiny.learner, tiny.adapters.theta, {}
    letters = list(tiny.parts.tasks.letter_ids)
    outer = tiny.method.outer_optimizer(theta.values())
    for index in range(EPISODES):
        tiny.adapters.reset_phi()
        visit = tiny.visit(index, episodes=(index,))
        update = tiny.method.update(learner, visit)
        for k, step in enumerate((*update.inner, update.outer)):
            name = f"episode {index} {f'inner {k}' if k < STEPS else 'outer'}"
            terms = step._asdict()
            del terms["kl_by_layer"]  # `kl` is its sum
            numbers |= {f"{name} {term}": value.tolist() for term, value in terms.items()}
        for name, key in (("drawn", NoiseKey(7, index)), ("mean", None)):
            with torch.no_grad():
                logits, _ = learner.forward(visit.outer, key)
            numbers[f"episode {index} {name} logits"] = logits[:, letters].flatten().tolist()
        for name, gradient in update.total([True]).items():
            theta[name].grad = gradient
        outer.step()
    return numbers


@contextmanager
def _code_of(backend: str) -> Iterator[None]:
    """The way that a CPU takes is `closed_form`; of the others one is a GPU's, and one the contract itself."""
    from abmll.kernels import plain
    from abmll.kernels.fused.interpreter import large_blocks

    with ExitStack() as stack:
        if backend == "reference":
            stack.enter_context(patch.object(plain, "_in_closed_form", lambda *_: False))
        elif backend == "plain":
            stack.enter_context(patch.object(plain, "on_gpu", lambda _: True))
        elif backend == "triton":
            stack.enter_context(large_blocks())
        yield


def machine() -> dict[str, str]:
    """What the last bits depend on: the libraries' code, and which of it they take on this CPU."""
    return {
        **{name: version(name) for name in ("torch", "transformers", "triton", "numpy")},
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "numpy_blas": _numpy_blas(),
        "cpu": _cpu(),
    }


def _numpy_blas() -> str:
    """The kernels of NumPy's products, in which Triton's interpreter sums: OPENBLAS_CORETYPE may name other ones."""
    return " ".join(
        sorted({found.get("architecture", "?") for found in threadpool_info() if found["user_api"] == "blas"})
    )


def _cpu() -> str:
    """Its family and model, by which the libraries choose: a virtual machine's name may not tell them."""
    info = Path("/proc/cpuinfo")
    if not info.exists():
        return platform.processor()
    told = dict(re.findall(r"^([^\t:]+)\s*: (.*)$", info.read_text(), re.MULTILINE))
    return " ".join(told.get(key, "?") for key in ("vendor_id", "cpu family", "model", "model name"))


def path_of(backend: str, posterior: str) -> Path:
    return FOLDER / f"{backend}_{posterior}.json"


def main() -> None:
    for backend in BACKENDS:
        for posterior in POSTERIORS:
            found = {name: [value.hex() for value in values] for name, values in run(backend, posterior).items()}
            path_of(backend, posterior).write_text(
                json.dumps({"machine": machine(), "numbers": found}, indent=0) + "\n"
            )
            print(path_of(backend, posterior), file=sys.stderr)


if __name__ == "__main__":
    main()
