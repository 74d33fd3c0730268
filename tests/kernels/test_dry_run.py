"""The operators' bodies on fake tensors, as a count of a GPU's memory runs them, and what counts as a GPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map

from abmll.kernels import assume_gpu, backends, on_gpu, resolve
from abmll.kernels.fused import launch
from abmll.kernels.fused.dry_run import BODIES, dry_launches

from .test_fused_operators import operator_calls

BF16, FP32 = torch.bfloat16, torch.float32
CPU = torch.device("cpu")


def test_every_operator_has_a_body():
    registered = {name for name in torch._C._dispatch_get_all_op_names() if name.startswith("abmll::")}
    assert set(BODIES) == registered and len(registered) >= 7
    assert torch.ops.abmll.weight_backward.default.name() in BODIES  # what a dispatch mode sees


@pytest.mark.parametrize("sizes", [None, (4, 2)], ids=["equal", "unequal"])
def test_bodies_allocate_what_the_operators_return(harness, sizes):
    """For all operators: shapes, dtypes and the GPU's product, on fake CPU tensors; no kernel runs."""
    for operator, arguments in operator_calls(harness, sizes):
        with FakeTensorMode() as mode:
            fake = tree_map(lambda leaf: mode.from_tensor(leaf) if isinstance(leaf, Tensor) else leaf, arguments)
            expected = operator(*fake)
            with assume_gpu(), dry_launches(), torch.no_grad():
                found = BODIES[operator.name()](*fake)
        both = [result if isinstance(result, tuple) else (result,) for result in (found, expected)]
        for value, right in zip(*both, strict=True):
            assert (value.shape, value.dtype, value.device) == (right.shape, right.dtype, right.device), operator


def test_dry_launches_run_nothing(harness, monkeypatch):
    """On real tensors: outputs of the right shape that no kernel wrote to, and kernels again afterwards."""
    for operator, arguments in operator_calls(harness):
        with monkeypatch.context() as patch:
            for name in [name for name in vars(launch) if name.endswith("_kernel")]:
                patch.setattr(launch, name, None)  # a launch would fail
            with dry_launches(), torch.no_grad():
                BODIES[operator.name()](*arguments)
            with pytest.raises(TypeError), torch.no_grad():
                BODIES[operator.name()](*arguments)
    assert not launch.dry


def test_the_wide_product_as_on_a_gpu():
    """On a GPU the library makes fp32 of 16-bit operands; elsewhere they are widened first, which takes memory."""
    a, b = torch.ones(3, 5, dtype=BF16), torch.ones(5, 2, dtype=BF16)
    assert torch.equal(launch.wide_product(a, b), torch.full((3, 2), 5.0))
    with assume_gpu(), dry_launches():
        assert launch.wide_product(a, b).dtype == FP32 and launch.wide_product(a, b).shape == (3, 2)
        assert torch.equal(launch.wide_product(a.float(), b.float()), torch.full((3, 2), 5.0))


def test_assume_gpu():
    assert on_gpu(torch.device("cuda", 0)) and not on_gpu(CPU) and not on_gpu(torch.ones(1))
    for backend in ("auto", "triton", "torch"):
        with assume_gpu():
            assert on_gpu(CPU) and on_gpu(torch.ones(1))
            assert backends.obstacle(CPU, BF16, 8) is None
            for posterior in ("activation", "weight"):
                expected = "torch" if backend == "torch" else "triton"
                assert resolve(backend, posterior, CPU, BF16, 8)[0] == expected
                assert backends.choose(backend, posterior, torch.ones(1, dtype=BF16), 8) == expected
            assert "dtype torch.float64" in backends.obstacle(CPU, torch.float64, 8)
    # what held inside is not remembered, nor the other way round
    assert backends.choose("auto", "activation", torch.ones(1, dtype=BF16), 8) == "torch"
    with assume_gpu():
        assert backends.choose("auto", "activation", torch.ones(1, dtype=BF16), 8) == "triton"
    with pytest.raises(RuntimeError, match="stop"), assume_gpu():
        raise RuntimeError("stop")
    assert not on_gpu(CPU)
