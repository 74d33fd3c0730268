"""The kernels' tests need torch, triton and the tests' own packages (pytest, hypothesis, scipy), and nothing else."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).parent
# What setup.py requires beside torch and triton, and what the kernels could reach through `abmll`.
ABSENT = (
    "accelerate", "bitsandbytes", "datasets", "deepspeed", "gguf", "ninja", "peft", "pydantic", "safetensors",
    "tokenizers", "torchmetrics", "tqdm", "transformers", "yaml",
)  # fmt: skip
WITHOUT = f"""
import sys
from importlib.machinery import PathFinder

find_spec = PathFinder.find_spec

def find_spec_of_others(cls, name, *where):
    return None if name.partition(".")[0] in {ABSENT} else find_spec(name, *where)

PathFinder.find_spec = classmethod(find_spec_of_others)
import pytest
sys.exit(pytest.main(sys.argv[1:]))
"""


def pytest_without(*arguments: str) -> str:
    """What pytest prints where the packages of ABSENT are not installed; it must succeed."""
    command = [sys.executable, "-c", WITHOUT, "-p", "no:cacheprovider", *arguments]
    done = subprocess.run(command, cwd=FOLDER.parents[1], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_every_file_is_collected_without_the_trainers_packages():
    found = pytest_without("--collect-only", "-q", str(FOLDER))
    for file in FOLDER.glob("test_*.py"):
        assert file.name in found


def test_they_run_and_what_needs_a_model_is_skipped():
    """The learner's launches are the only test here that builds a model."""
    chosen = [str(FOLDER / "test_resources.py"), str(FOLDER / "test_fused_operators.py")]
    found = pytest_without("-q", *chosen, "-k", "learner_launches or checkpointing_changes_no_bit")
    assert "2 passed, 4 skipped" in found and "could not import 'transformers'" in found
