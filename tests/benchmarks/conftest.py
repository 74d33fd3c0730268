"""The benchmarks' modules lie in their own folder, and not in a package."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def load(monkeypatch):
    """Loads a module of the benchmarks by its path: `kernels` may be another. What it imports lies beside it."""
    monkeypatch.syspath_prepend(FOLDER)

    def execute(name: str) -> ModuleType:
        if name != "kernels":
            return importlib.import_module(name)
        specification = importlib.util.spec_from_file_location("benchmark_kernels", FOLDER / "kernels.py")
        module = importlib.util.module_from_spec(specification)
        specification.loader.exec_module(module)
        return module

    return execute


@pytest.fixture
def kernels(load):
    return load("kernels")


@pytest.fixture(autouse=True)
def forgotten():
    """Nobody else shall meet modules by these names."""
    yield
    for name in [name for name, module in sys.modules.items() if str(FOLDER) in str(getattr(module, "__file__", ""))]:
        del sys.modules[name]
