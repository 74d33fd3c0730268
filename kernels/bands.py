"""Bands of rows: how much of a large matrix is worked on at a time. Fused and plain code share the bound."""

from __future__ import annotations

from collections.abc import Iterator

# The weight posterior's dense tiles, a band of rows of N x K, live in this much memory, whatever the layer's size.
SCRATCH_BYTES = 32 * 2**20


def bands(rows: int, columns: int, bytes_each: int) -> Iterator[slice]:
    """Equal bands of rows that each fit the scratch memory at `bytes_each` an element (at least 64 rows, whatever
    their width).
    """
    most = max(SCRATCH_BYTES // (columns * bytes_each) // 64 * 64, 64)
    count = -(-rows // most)
    size = -(-rows // max(count, 1) // 64) * 64
    for start in range(0, rows, max(size, 64)):
        yield slice(start, min(start + size, rows))
