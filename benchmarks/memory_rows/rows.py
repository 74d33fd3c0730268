"""A row: a contender's bytes in one case, predicted on fake tensors and measured on a GPU."""

from __future__ import annotations

import gc
import time
from typing import Any

import torch

from abmll.memory.episode import Ledger, read_ledger
from abmll.memory.fake import counted
from abmll.memory.storages import Uncounted
from memory_rows.contenders import CONTENDERS, Case

LARGEST = 8  # tensors named in a row


def make_row(case: Case, name: str, fake: bool) -> dict[str, Any]:
    """A contender's bytes in a case: counted, or asked of the allocator beside what is predicted."""
    started = time.perf_counter()
    ledger = predict(case, name)
    found = {
        **vars(case),
        "contender": name,
        "peak": ledger.peak,
        "fullest": ledger.fullest,
        "phases": {phase: {n: size for n, size in sizes.items() if size} for phase, sizes in ledger.phases.items()},
        "largest": [vars(item) for item in ledger.largest[:LARGEST]],
    }
    if not fake:
        found |= measure(case, name)
    return found | {"seconds": round(time.perf_counter() - started, 1)}


def predict(case: Case, name: str) -> Ledger:
    contender = CONTENDERS[name]
    with counted(gpu=True) as counter:
        contender.run(case.setup(contender), counter)
        return read_ledger(counter)


def measure(case: Case, name: str) -> dict[str, Any]:
    """Peak bytes that the GPU's allocator handed out and holds; `failed` where they were not to be had."""
    contender = CONTENDERS[name]
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    try:
        with torch.device("cuda"):
            contender.run(case.setup(contender), Uncounted())
        torch.cuda.synchronize()
    except torch.cuda.OutOfMemoryError as error:
        return {"failed": str(error).partition("\n")[0]}
    return {
        "allocated": torch.cuda.max_memory_allocated() - before,
        "reserved": torch.cuda.max_memory_reserved(),
    }
