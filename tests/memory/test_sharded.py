"""A sharded base's bytes: as PyTorch allocates them, and Llama3-70B's on eight GPUs. Real ranks: tests/invariance."""

from __future__ import annotations

import gc

import pytest
import torch
from setups import deepspeed, make_config, make_setup
from test_counter import allocated

from abmll.config import Config
from abmll.memory.episode import count_episode, read_ledger, run_episode
from abmll.memory.plan import plan_run, remedies
from abmll.memory.sharding import imagined_ranks
from abmll.memory.storages import GATHERED, StorageCounter
from abmll.models.architectures import architecture_config
from abmll.models.load import parameter_count

SHARDED = {"model": {"sharding": "full"}}


def test_a_resized_storage_ends_and_another_begins():
    with StorageCounter().counting() as counter:
        tensor = torch.empty(100)
        counter.label(GATHERED, [tensor])
        tensor.untyped_storage().resize_(0)
        assert counter.now == 0
        tensor.untyped_storage().resize_(200)
        assert counter.now == 200
        del tensor
    assert counter.now == 0
    lives = counter.storages
    assert [life.size for life in lives] == [400, 0, 200] and {life.classified() for life in lives} == {GATHERED}
    assert [life.born for life in lives[1:]] == [life.died + 1 for life in lives[:-1]]


@pytest.mark.parametrize("policy", ["none", "every second layer", "all layers"])
def test_the_peak_is_what_pytorch_allocates_to_the_byte(monkeypatch, policy):
    """Real tensors, but ranks that are not there: gloo's threads hold a gathered buffer for longer now and then."""
    monkeypatch.setattr("transformers.masking_utils.find_packed_sequence_indices", lambda _: None)
    setup, counters = make_setup(policy, ranks=2, scoring=(3,), **SHARDED), []

    def episode(mesh):
        counters.append(StorageCounter())
        with counters[-1].counting():
            run_episode(setup, counters[-1], mesh)

    gc.collect()
    gc.disable()
    try:
        with imagined_ranks("full", 2) as mesh:
            episode(mesh)  # whatever is made once is there
            gc.collect()
            sizes = allocated(lambda: episode(mesh))
    finally:
        gc.enable()
    counter = counters[-1]
    assert max(sizes) == max(peak.size for peak in counter.peaks.values())
    assert read_ledger(counter, 3) == count_episode(setup)


def test_a_rank_holds_its_share_and_two_to_three_layers():
    """Of the tiny model on 4 ranks, nothing checkpointed: a layer in use, the next one in transit."""
    whole = count_episode(make_setup("none", ranks=4))
    sharded = count_episode(make_setup("none", ranks=4, **SHARDED))
    share = {name: sizes["weights"] / whole.phases[name]["weights"] for name, sizes in sharded.phases.items()}
    frequencies = 8 * 4 * 2  # of the rotation: whole on every rank, too small to matter in a model of some size
    assert all(value == pytest.approx(0.25, abs=frequencies / 139_584 / 4) for value in share.values())
    layer = 4 * (64 * (64 + 32 + 32 + 64) + 3 * 64 * 128 + 2 * 64)
    vocabulary = 4 * 512 * 64
    assert layer < sharded.phases["forward"][GATHERED] <= max(3 * layer, 2 * vocabulary + layer)
    assert sharded.phases["optimizer"][GATHERED] == 0 and "load" in sharded.phases
    for phase in ("forward", "backward"):  # the rest is as it was
        for component in ("adapters", "optimizer states"):
            assert sharded.phases[phase][component] == whole.phases[phase][component]


def test_tied_embeddings_are_weights_that_every_rank_holds():
    setup = make_setup(ranks=4, **SHARDED)
    setup.architecture.tie_word_embeddings = True
    layers = 4 * (2 * (64 * (64 + 32 + 32 + 64) + 3 * 64 * 128 + 2 * 64) + 64)
    for sizes in count_episode(setup).phases.values():
        assert sizes["weights"] == layers / 4 + 4 * 512 * 64 + 8 * 4 * 2


def test_llama3_70b_on_eight_gpus():
    config = Config.model_validate(
        {
            "model": {"name": "random:llama3-70b", "sharding": "full"},
            "tasks": {"source": "builtin", "batch_size": 2, "max_tokens": 512},
            "trainer": {"activation_checkpointing": True},
        }
    )
    architecture = architecture_config("llama3-70b")
    found = plan_run(config, architecture, deepspeed(), world_size=8)
    assert found.fits and found.ledger.peak < 26e9
    layer = 2 * (8192 * (2 * 8192 + 2 * 1024) + 3 * 8192 * 28672 + 2 * 8192)
    for sizes in found.ledger.phases.values():
        assert sizes["weights"] == pytest.approx(2 * parameter_count(architecture) / 8, rel=1e-4)
    # while a layer runs, its own weights, the buffer they came in, and the one before's
    assert found.ledger.phases["forward"][GATHERED] == pytest.approx(3 * layer, rel=1e-3)


def test_a_sharded_base_is_not_told_to_be_packed():
    config = make_config(model={"sharding": "full"}, memory={"budget_gb": 1e-9})
    found = plan_run(config, architecture_config("tiny"), deepspeed(), world_size=2)
    assert not found.fits and found.ledger is not None
    assert not any("quantization" in override for remedy in remedies(found) for override in remedy.overrides)
