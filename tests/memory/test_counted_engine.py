"""What stands for DeepSpeed's engine, against the engine itself: the same bytes at every moment of a step."""

from __future__ import annotations

import gc
from functools import partial

import pytest
import torch
from setups import deepspeed

from abmll.config.schema import LoggingConfig
from abmll.distributed import start_ranks, stop_ranks
from abmll.engine import ThetaEngine
from abmll.memory.counted_engine import CountedEngine
from abmll.memory.storages import OUTER, WARM_UP, StorageCounter

SIZES = ((40, 25), (25, 30), (8, 125))  # 2,750 numbers; the bucket holds 1,000
AdamW = partial(torch.optim.AdamW, lr=1e-3)


@pytest.fixture
def one_rank(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    yield start_ranks()
    stop_ranks()


def steps(make, counter: StorageCounter) -> tuple[int, int, int]:
    """Bytes after the engine is built, at the fullest moment of a second step, and after it."""
    theta = {f"{i}": torch.nn.Parameter(torch.ones(size)) for i, size in enumerate(SIZES)}
    engine = make(theta, counter)
    gc.collect()
    built = counter.now
    for stage in (WARM_UP, OUTER):
        with counter.stage(stage):
            engine.step({name: torch.ones_like(value) for name, value in theta.items()})
    gc.collect()
    return built, counter.peaks[OUTER].size, counter.now


@pytest.mark.parametrize(("stage", "bucket"), [(0, 1000), (2, 1000), (2, 20_000)])
def test_a_step_takes_what_deepspeeds_does(stage, bucket, one_rank, tmp_path):
    settings = deepspeed(stage, bucket)
    with StorageCounter().counting() as counter:
        real = steps(
            lambda theta, _: ThetaEngine(theta, AdamW(theta.values()), settings, LoggingConfig(), tmp_path), counter
        )
    with StorageCounter().counting() as counter:
        ours = steps(lambda theta, counter: CountedEngine(theta, AdamW, settings, 1, counter), counter)
    theta = 4 * sum(rows * columns for rows, columns in SIZES)
    # DeepSpeed keeps some counters and norms, and checks gradients in fp64 one after the other
    assert ours == pytest.approx(real, abs=100)
    assert ours[0] == pytest.approx(theta, abs=100)  # no master copy
    assert ours[2] == pytest.approx(3 * theta, abs=100)  # and two moments


def test_more_ranks_shard_the_moments_and_the_gradient():
    def built(ranks):
        with StorageCounter().counting() as counter:
            return steps(lambda theta, counter: CountedEngine(theta, AdamW, deepspeed(2), ranks, counter), counter)

    theta, few = 4 * sum(rows * columns for rows, columns in SIZES), 100
    one, four = built(1), built(4)
    assert four[0] == pytest.approx(one[0], abs=few)
    assert one[2] - four[2] == pytest.approx(2 * theta * 3 / 4, abs=few)


def test_theta_is_its_own_master_copy(one_rank, tmp_path):
    """Written theta is what the engine moves on from, and nothing keeps a second copy of it alive."""
    theta = {"only": torch.nn.Parameter(torch.zeros(1000))}
    engine = ThetaEngine(theta, torch.optim.SGD(theta.values(), lr=1.0), deepspeed(2), LoggingConfig(), tmp_path)
    (master,) = engine.engine.optimizer.single_partition_of_fp32_groups
    assert master.untyped_storage().data_ptr() == theta["only"].untyped_storage().data_ptr()
    with torch.no_grad():
        theta["only"].fill_(5.0)
    engine.step({"only": torch.ones(1000)})
    assert theta["only"].eq(4.0).all()
    (mapping,) = [parameter._hp_mapping for parameter in engine.engine.optimizer.bit16_groups[0]]
    assert mapping.get_hp_fragment().data_ptr() == theta["only"].data_ptr()
