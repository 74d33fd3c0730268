"""The weight posterior's scratch memory as a GPU would see it, on fake tensors of real layers' sizes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from abmll.kernels.bands import bands
from abmll.memory.fake import counted
from abmll.memory.storages import ADAPTERS, StorageCounter

weight = pytest.importorskip("abmll.kernels.fused.weight", reason="without triton nothing is fused")

TOKENS, RANK = 320, 8  # no other tensor here is as large as a band
LAYERS = {"one band": (1024, 4096), "bands of rows": (14336, 4096), "a wide layer": (4096, 14336)}
SETTINGS = (2.0, 2.0, -20.0, 1.0, 0.01)


@pytest.fixture(params=LAYERS)
def layer(request):
    return LAYERS[request.param]


@pytest.fixture(params=[torch.bfloat16, torch.float32])
def dtype(request):
    return request.param


def factors_of(outputs: int, inputs: int) -> list[Tensor]:
    return [torch.empty(shape) for _ in range(4) for shape in ((RANK, inputs), (outputs, RANK))]


def most_alive(counter: StorageCounter, sizes: set[int], inside: bool = True) -> int:
    """Most bytes at a time of the storages of these sizes, or of all others; the operator's arguments are neither."""
    those = [s for s in counter.storages if (s.size in sizes) == inside and s.component != ADAPTERS]
    return max(sum(other.size for other in those if other.alive(storage.born)) for storage in those)


def sizes_of_bands(outputs: int, inputs: int, dtype: torch.dtype) -> set[int]:
    return {(band.stop - band.start) * inputs * dtype.itemsize for band in bands(outputs, inputs, dtype.itemsize)}


def test_backward_holds_two_bands_at_a_time(layer, dtype):
    """dy^T x and the change: those of the band before are gone, though a layer has several."""
    outputs, inputs = layer
    with counted(gpu=True) as counter:
        x, dy = torch.empty(1, TOKENS, inputs, dtype=dtype), torch.empty(1, TOKENS, outputs, dtype=dtype)
        frozen, factors = torch.empty(outputs, inputs, dtype=dtype), factors_of(outputs, inputs)
        names, one = torch.zeros(1, 3, dtype=torch.int64), torch.ones(())
        tickets = torch.zeros(64, dtype=torch.int32)
        counter.label(ADAPTERS, (x, dy, frozen, *factors))
        torch.ops.abmll.weight_backward(
            dy, one, one, x, tickets, frozen, factors, SETTINGS, names, 0, True, True, False
        )
    most = most_alive(counter, sizes_of_bands(outputs, inputs, dtype))
    assert 0 < most <= weight.scratch_bytes(outputs, inputs, dtype)


def test_forward_joins_bands_without_a_second_output(layer, dtype):
    """Beside the bands: the output, and one band of it."""
    outputs, inputs = layer
    with counted(gpu=True) as counter:
        x, frozen = torch.empty(1, TOKENS, inputs, dtype=dtype), torch.empty(outputs, inputs, dtype=dtype)
        factors, names = factors_of(outputs, inputs), torch.zeros(1, 3, dtype=torch.int64)
        counter.label(ADAPTERS, (x, frozen, *factors))
        torch.ops.abmll.weight_forward(x, frozen, None, None, factors, SETTINGS, names, 0, True)
    sizes, every = sizes_of_bands(outputs, inputs, dtype), list(bands(outputs, inputs, dtype.itemsize))
    assert 0 < most_alive(counter, sizes) <= weight.scratch_bytes(outputs, inputs, dtype)
    columns = outputs if len(every) == 1 else outputs + every[0].stop
    small = 128 * 1024  # partial sums and numbers
    assert most_alive(counter, sizes, inside=False) <= TOKENS * columns * dtype.itemsize + small
