"""ABMLL: amortized Bayesian meta-learning of LoRA adapters.

`MetaModel.load(run).adapt(examples).predict(texts)`: what is named here is loaded when it is first asked for, so that
`abmll.kernels` needs no language model's packages.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_WHERE = {
    "Example": "abmll.tasks.task",
    "MetaModel": "abmll.deploy",
    "Prediction": "abmll.deploy",
    "TaskModel": "abmll.deploy",
    "load_task_models": "abmll.deploy",
}
__all__ = sorted(_WHERE)


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'abmll' has no attribute {name!r}")
    return getattr(import_module(_WHERE[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
