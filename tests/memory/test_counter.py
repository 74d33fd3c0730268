"""The counter against PyTorch's own account of what it allocates, and fake tensors against real ones."""

from __future__ import annotations

import gc

import pytest
import torch
from setups import make_setup
from torch.profiler import ProfilerActivity, profile

from abmll.adapters.pairs import LowRankPair
from abmll.kernels import NoiseKey, rows_of_keys
from abmll.memory.episode import Setup, make_batch, read_ledger, run_episode
from abmll.memory.fake import counted
from abmll.memory.storages import (
    BACKWARD,
    FORWARD,
    KEPT,
    OPTIMIZER,
    OUTER,
    RECOMPUTATION,
    SCORING,
    STATES,
    StorageCounter,
    Uncounted,
)
from abmll.models.packing import tokens_of

SETUPS = {
    "plain LoRA": {"method": {"name": "lora"}},
    "Reptile": {"method": {"name": "reptile"}, "checkpointing": "every second layer"},
    "activation": {"checkpointing": "none"},
    "activation, checkpointing": {},
    "activation, first order, query": {"method": {"meta_gradient": "first_order", "outer_batch": "query"}},
    "activation, a step towards phi": {"method": {"meta_gradient": "reptile"}},
    "weight": {"adapters": {"posterior": "weight"}},
    "eager attention": {"model": {"attention": "eager"}},
    "bfloat16": {"model": {"dtype": "bfloat16"}},
}


def make(kind: str) -> Setup:
    return make_setup(scoring=(3,), **SETUPS[kind])


def on_real_tensors(setup: Setup) -> StorageCounter:
    counter = StorageCounter()
    with counter.counting():
        run_episode(setup, counter)
    return counter


@pytest.fixture(autouse=True)
def clean(monkeypatch):
    """No garbage of an earlier test is freed in the middle; no packed sequences are looked for, as on fake tensors."""
    monkeypatch.setattr("transformers.masking_utils.find_packed_sequence_indices", lambda _: None)
    gc.collect()
    gc.disable()
    yield
    gc.enable()


WRAPPED_NUMBER = 8  # bytes of the scalar that C++ makes of a Python number outside any operator; never on a GPU


def allocated(run) -> list[int]:
    """Bytes in use after each allocation and release while `run` runs, as PyTorch's CPU allocator reports them."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    found = []

    def walk(events, inside):
        for event in events:
            if event.tag == torch._C._profiler._EventType.Allocation:
                found.append((event.start_time_ns, event.extra_fields.alloc_size, event.extra_fields.ptr, inside))
            walk(event.children, inside or event.name.startswith("aten::"))

    walk(profiler.profiler.kineto_results.experimental_event_tree(), False)
    sizes, now, numbers = [], 0, set()
    for _, size, pointer, inside in sorted(found, key=lambda event: event[0]):  # events of one moment stay in order
        if size == WRAPPED_NUMBER and not inside:
            numbers.add(pointer)
        elif size < 0 and pointer in numbers:
            numbers.remove(pointer)
        else:
            now += size
            sizes.append(now)
    return sizes


@pytest.mark.parametrize("kind", ["plain LoRA", "activation", "activation, checkpointing", "weight"])
def test_the_peak_is_what_pytorch_allocates_to_the_byte(kind):
    setup, counters = make(kind), []
    on_real_tensors(setup)  # whatever is made once is there
    gc.collect()
    sizes = allocated(lambda: counters.append(on_real_tensors(setup)))
    (counter,) = counters
    assert max(sizes) == max(peak.size for peak in counter.peaks.values())
    assert len(sizes) > 500 and max(sizes) > 1e6


@pytest.mark.parametrize("kind", SETUPS)
def test_fake_tensors_live_and_die_as_real_ones_do(kind):
    setup = make(kind)
    real = on_real_tensors(setup)
    with counted(gpu=False) as fake:
        run_episode(setup, fake)

    def lives(counter):
        return [(s.size, s.phase, s.maker, s.what, s.classified(), s.born, s.died) for s in counter.storages]

    assert lives(fake) == lives(real)
    assert read_ledger(fake) == read_ledger(real)


def test_without_a_counter_the_same_episode_runs():
    """As a GPU's allocator measures it: nothing is counted, and the scoring batch is the first that is asked for."""
    uncounted = Uncounted()
    assert run_episode(make("activation, checkpointing"), uncounted) == 3
    assert uncounted.peaks == {}


def test_phases_and_components_of_a_checkpointed_step():
    ledger = read_ledger(on_real_tensors(make("activation, checkpointing")))
    phases = ledger.phases
    assert list(phases) == ["load", FORWARD, RECOMPUTATION, BACKWARD, OPTIMIZER, OUTER, SCORING]
    theta = sum(tensor.size for tensor in ledger.largest if tensor.component == "adapters") // 2
    for phase in (FORWARD, RECOMPUTATION, BACKWARD, OPTIMIZER):
        # two moments of phi and of theta, and AdamW's counters of 4 bytes
        assert phases[phase][STATES] == pytest.approx(4 * theta, rel=0.01)
    assert phases[BACKWARD]["gradients"] <= phases[OPTIMIZER]["gradients"] == theta
    assert phases[OPTIMIZER][KEPT] == phases[OUTER][KEPT] < 50  # the step's own terms
    assert phases[FORWARD][KEPT] < phases[RECOMPUTATION][KEPT]


def test_what_is_kept_for_the_backward_pass_is_what_outlives_the_forward():
    x = torch.randn(50, 20, requires_grad=True)
    with StorageCounter().counting() as counter:
        (x.exp() * x.sin()).tanh().sum().backward()
    kept = {storage.maker for storage in counter.storages if storage.classified() == KEPT}
    # the product's result dies once tanh has read it; sin's and exp's are what the product's derivative reads
    assert kept == {"exp", "sin", "tanh", "sum"} | {"ones_like"} & kept
    temporary = {storage.maker for storage in counter.storages if storage.classified() != KEPT}
    assert "mul" in temporary and any("Backward" in maker for maker in temporary)


def test_sizes_are_rounded_up_as_an_allocator_does():
    with StorageCounter(granularity=512).counting() as counter:
        small, large = torch.empty(1), torch.empty(1025, dtype=torch.uint8)
        assert counter.now == 512 + 1536
        view, other = small.view(1, 1), large[3:]
        assert counter.now == 512 + 1536
        del small, view, large
        assert counter.now == 1536
        del other
    assert counter.now == 0 and counter.peaks[FORWARD].size == 2048


def test_meta_tensors_take_nothing():
    with StorageCounter().counting() as counter:
        torch.empty(1000, device="meta")
    assert counter.storages == []


def test_under_a_default_device_only_what_is_meant_for_it_is_made_there():
    """What a GPU's run makes on the host first (by a CPU's generator, or to be pinned) is not redirected."""
    with torch.device("meta"):
        ids, positions, prompts = tokens_of((2, 3), torch.device("cpu"), 10)
        names = rows_of_keys([NoiseKey(1, 2)], "cpu")
        pair = LowRankPair(4, 3, 2, "cpu")
        pair.initialise(torch.Generator().manual_seed(0))
        batch = make_batch(2, 4)
    assert {tensor.device.type for tensor in (ids, positions, prompts.bounds, names, pair.a)} == {"cpu"}
    assert batch.groups.bounds.device.type == batch.input_ids.device.type == "meta"
