"""The bounds on a CPU's resident memory, each with and without: in processes of their own, for they are settings."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from abmll import resident

pytestmark = pytest.mark.skipif(resident._trim is None, reason="the bounds are glibc's")

SHAPES = """
import torch
from torch.nn.functional import linear
from abmll.resident import bound_caches, release_freed, resident_memory
bound_caches()
torch.set_num_threads(1)
weight = torch.zeros(64, 64, dtype=torch.bfloat16)

def resident_after(shapes):
    for tokens in shapes:
        linear(torch.zeros(tokens, 64, dtype=torch.bfloat16), weight)
    release_freed(torch.device("cpu"))
    return resident_memory()

before = resident_after(range(1, 151))
print(resident_after(range(151, 301)) - before)
"""
HOLES = """
import torch
from abmll.resident import release_freed, resident_memory
blocks = [bytearray(2**16) for _ in range(2_000)]
kept = blocks[::10]  # among them the last: the heap cannot shrink from its end alone
kept.append(bytearray(2**16))
del blocks
before = resident_memory()
RELEASE
print(before - resident_memory())
"""


def printed(program: str, **environment: str) -> float:
    """The number of bytes that a program prints, in MiB."""
    own = {name: value for name, value in os.environ.items() if name not in resident.CACHES}
    found = subprocess.run(
        [sys.executable, "-c", program], env={**own, **environment}, capture_output=True, text=True, timeout=400
    )
    assert found.returncode == 0, found.stderr
    return int(found.stdout) / 2**20


def test_products_of_new_shapes_take_no_more_memory():
    """150 shapes fill the caches. Of 150 more each would keep a quarter of a MiB twice."""
    assert printed(SHAPES) < 10


@pytest.mark.skipif(not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="this CPU's products are not oneDNN's")
def test_it_is_the_caches_and_the_environment_decides():
    assert printed(SHAPES, **dict.fromkeys(resident.CACHES, "1024")) > 50


def test_freed_blocks_between_used_ones_go_back():
    """1,800 freed blocks of 64 KiB, each less its first and last page."""
    assert printed(HOLES.replace("RELEASE", "release_freed(torch.device('cpu'))")) > 90
    assert printed(HOLES.replace("RELEASE", "")) < 10
    # a run on a GPU does not wait for it
    assert printed(HOLES.replace("RELEASE", "release_freed(torch.device('cuda'))")) < 10


def test_training_sets_both(run, monkeypatch):
    released = []
    monkeypatch.setattr("abmll.trainer.release_freed", lambda _: released.append("step"))
    monkeypatch.setattr("abmll.evaluation.evaluator.release_freed", lambda _: released.append("task"))
    for name in resident.CACHES:
        monkeypatch.delenv(name, raising=False)
    run.train("trainer.episodes=3")
    assert released == ["step"] * 3 + ["task"] * 2
    if not torch.cuda.is_available():
        assert [os.environ[name] for name in resident.CACHES] == [str(resident.CAPACITY)] * 2
