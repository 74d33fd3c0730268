"""What keeps the resident memory of a run on a CPU from growing with its length.

Prompts are padded to their batch's longest, so nearly every batch has a shape of its own. That costs twice:

- oneDNN, which multiplies 16-bit matrices, generates code for every shape, and torch keeps a description of every
  product: a quarter of a MiB each, 15 products for a shape of a Llama-like model, 1,024 of both by default.
- glibc keeps freed blocks in its heap, and the next shape's do not fit the holes.

Neither bound changes a number. Both concern the CPU's memory; a GPU's is torch's own.
"""

from __future__ import annotations

import ctypes
import os

import torch

# Products that are kept. All layers share a shape's 15; so this holds an episode's batches, and 70 MiB.
CAPACITY = 128
CACHES = ("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY")  # torch's descriptions, oneDNN's code


def bound_caches() -> None:
    """Bound the caches of matrix products by shape, unless the environment does. Before this process's first one."""
    for name in CACHES:
        os.environ.setdefault(name, str(CAPACITY))


def release_freed(device: torch.device) -> None:
    """Give the heap's free pages back to the system, some milliseconds.

    Nothing in a run on a GPU, which should not wait for it, nor where the C library cannot.
    """
    if device.type == "cpu" and _trim is not None:
        _trim(0)


def resident_memory() -> int:
    """Bytes of this process that are in memory now (Linux)."""
    with open("/proc/self/statm") as stream:
        return int(stream.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _find_trim():
    try:
        return ctypes.CDLL(None).malloc_trim  # glibc's; musl and macOS have none
    except (OSError, TypeError, AttributeError):
        return None


_trim = _find_trim()
