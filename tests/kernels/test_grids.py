"""How work is split into programs: enough for a large GPU, and by the sizes alone."""

from __future__ import annotations

import math

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from abmll.kernels import NoiseKey, assume_gpu
from abmll.kernels.fused import configurations, launch
from abmll.kernels.fused.dry_run import BODIES

LLAMA = {"Q": (4096, 4096), "KV": (1024, 4096), "up": (14336, 4096), "down": (4096, 14336)}
SETTINGS = (2.0, 2.0, -20.0, 1.0, 0.01)


@pytest.fixture
def grids(monkeypatch):
    """(kernel, programs) of an inner step's forward and backward pass; nothing runs."""

    def of(posterior: str, tokens: int, outputs: int, inputs: int, rank: int = 8) -> list[tuple[str, int]]:
        found = []
        monkeypatch.setattr(launch, "_run", lambda kernel, grid, *_, **__: found.append((kernel.__name__, grid)))
        monkeypatch.setattr(launch, "dry", True)  # products in another dtype than their operands' need a GPU
        with FakeTensorMode(), assume_gpu(), torch.no_grad():
            x = torch.empty(1, tokens, inputs, dtype=torch.bfloat16)
            weight = torch.empty(outputs, inputs, dtype=torch.bfloat16)
            factors = [torch.empty(shape) for shape in ((rank, inputs), (outputs, rank)) * 4]
            mask = [torch.ones(1, tokens, dtype=torch.bool)] if posterior == "activation" else []
            named = (factors, SETTINGS, NoiseKey(1, 2).rows(1, "cpu"), 3)
            y, *kept, kl, _ = BODIES[f"abmll::{posterior}_forward"](x, weight, None, None, *mask, *named, True)
            gradients = (torch.empty_like(y), kl, None)
            BODIES[f"abmll::{posterior}_backward"](*gradients, x, *kept, weight, *mask, *named, True, True, False)
        return [(name, math.prod(grid)) for name, grid in found]

    return of


@pytest.mark.parametrize("shape", LLAMA)
@pytest.mark.parametrize("posterior", ["activation", "weight"])
@pytest.mark.parametrize("tokens", [128, 1024])
def test_every_launch_fills_a_large_gpu(grids, posterior, tokens, shape):
    found = grids(posterior, tokens, *LLAMA[shape])
    assert found and all(programs >= configurations.FEWEST_PROGRAMS for _, programs in found), found


def test_launches_of_a_forward_and_backward_pass(grids):
    """Beside the library's two products of W0; the weight posterior's by bands of the change."""
    activation = ["project_kernel", "sample_kernel", "adjoint_kernel", "gradient_kernel"]
    assert [name for name, _ in grids("activation", 1024, *LLAMA["Q"])] == activation
    assert [name for name, _ in grids("weight", 1024, *LLAMA["Q"])] == ["sample_kernel", "adjoint_kernel"]
    assert len(grids("weight", 1024, *LLAMA["down"])) == 8


@pytest.mark.parametrize(
    ("size", "block", "parts"), [(1, 64, 5), (4096, 64, 17), (4095, 64, 64), (130, 64, 1), (64, 64, 0)]
)
def test_splits_cover_everything_once(size, block, parts):
    total = configurations.blocks(size, block)
    for split, right in (
        (configurations.split, lambda count: 1 <= count <= max(parts, 1)),
        (configurations.split_finely, lambda count: count >= min(max(parts, 1), total)),
    ):
        count, each = split(size, block, parts)
        assert right(count) and (count - 1) * each < total <= count * each
    assert configurations.split(0, block, parts) == (0, 0)
