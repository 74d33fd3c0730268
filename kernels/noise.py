"""Standard normals as a pure function of integers: Philox 4x32-7 and the Box-Muller transform.

The same (seed, layer, step, group, row, column) gives the same normal in the forward pass, in the recomputation of
activation checkpointing, on every device and for every block size. Nothing is stored and nothing is advanced.

Source of the generator: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011. With seven rounds it
passes TestU01's BigCrush (their table 2); ten, the usual number, are a margin, at three more instructions a normal that
the kernels make with sixteen.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from abmll.kernels.backends import on_gpu

WORD = 0xFFFFFFFF
MULTIPLIER_0, MULTIPLIER_1 = 0xD2511F53, 0xCD9E8D57
WEYL_0, WEYL_1 = 0x9E3779B9, 0xBB67AE85
ROUNDS = 7

# One Philox call yields four words, hence four normals: neighbours in one row, so that a tile of any width that is a
# multiple of four takes whole calls.
LANES = 4


@dataclass(frozen=True)
class NoiseKey:
    """Names the noise of one forward pass: `seed` in [0, 2**64), `step` in [0, 2**32)."""

    seed: int
    step: int

    def rows(self, groups: int, device: torch.device | str) -> torch.Tensor:
        """int64 [groups, 3] of seed, step and group, signed: the names that kernels read on the device.

        Numbers in memory and not arguments: a captured graph draws other noise when they are written over.
        """
        return _on_device([[signed(self.seed), self.step, group] for group in range(groups)], device)

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 2**64:
            raise ValueError(f"seed: {self.seed}: must be in [0, 2**64)")
        if not 0 <= self.step < 2**32:
            raise ValueError(f"step: {self.step}: must be in [0, 2**32); use another seed for a longer run")


def rows_of_keys(keys: Sequence[NoiseKey], device: torch.device | str) -> torch.Tensor:
    """int64 [G, 3] of G keys, one a group: each group draws what it would draw alone under its key."""
    return _on_device([[signed(key.seed), key.step, 0] for key in keys], device)


def _on_device(names: list[list[int]], device: torch.device | str) -> torch.Tensor:
    rows = torch.tensor(names, dtype=torch.int64, device="cpu")
    if torch.device(device).type != "cuda" or torch.compiler.is_compiling():  # which has no pinned tensors
        return rows.to(device)
    return rows.pin_memory().to(device, non_blocking=True)  # a copy from pageable memory waits for the GPU


def signed(seed: int) -> int:
    """A 64-bit seed's bits as a signed number, which int64 holds."""
    return seed - ((seed >> 63) << 64)


def fold_seed(seed: int, *stream: str | int) -> int:
    """A 64-bit seed for a named stream of a run, such as ("evaluation", task): streams do not overlap."""
    text = "/".join(str(part) for part in (seed, *stream))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def philox(counter: tuple, key: tuple[int, int]) -> tuple:
    """Philox 4x32-7. `counter`: four words (ints or int64 tensors holding 32-bit values); returns four words."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(ROUNDS):
        # int64 products wrap: their low 64 bits are exact. Words 1 and 3 may carry bits above the 32nd until the end,
        # because they meet words 0 and 2 in an xor that is masked.
        product_0, product_1 = c0 * MULTIPLIER_0, c2 * MULTIPLIER_1
        c0, c2 = (product_1 >> 32) ^ c1, (product_0 >> 32) ^ c3
        c0 ^= k0  # new tensors by now, so in place: half the memory that is walked through
        c2 ^= k1
        c0 &= WORD
        c2 &= WORD
        c1, c3 = product_1, product_0
        k0, k1 = (k0 + WEYL_0) & WORD, (k1 + WEYL_1) & WORD
    return c0, c1 & WORD, c2, c3 & WORD


def box_muller(word_0: torch.Tensor, word_1: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Two words to two fp32 normals. 24 bits of each word are used, so that the uniforms are exact in fp32."""
    radius = (word_0 >> 8).float().add_(1.0).mul_(2.0**-24).log_().mul_(-2.0).sqrt_()  # of a uniform in (0, 1]
    angle = (word_1 >> 8).float().mul_(2.0**-24 * 6.283185307179586)
    return angle.cos().mul_(radius), angle.sin_().mul_(radius)


def check_noise_size(rows: int, columns: int) -> None:
    """ValueError where a layer's and group's noise does not fit the counter's first word."""
    if rows * -(-columns // LANES) > WORD:
        raise ValueError(
            f"rows x columns: {rows} x {columns}: more noise than a layer's counter holds (2^32 calls of four); split "
            "the batch"
        )


def chunks(rows: int, quads: int, gpu: bool) -> Iterator[tuple[int, int]]:
    """Bounds of stretches of rows, [start, stop).

    They keep the integer temporaries, some ten of 8 bytes a Philox call, in the cache on a CPU and near 40 MB on a GPU.
    """
    size = max(1, (2**19 if gpu else 2**16) // max(quads, 1))
    for start in range(0, rows, size):
        yield start, min(start + size, rows)


def standard_normal(
    rows: int,
    columns: int,
    key: NoiseKey | torch.Tensor,
    layer: int,
    group: int = 0,
    device: torch.device | str = "cpu",
    first_row: int = 0,
) -> torch.Tensor:
    """fp32 normals [rows, columns] of one layer (index), forward pass (`key`) and group (episode side by side).

    Element (row, column) comes from the Philox counter (quad, group, step, layer) with
    quad = row * Q + column // 4, Q = ceil(columns / 4), lane column % 4. Rows are counted from `first_row` on: a band
    of a larger draw. `key` may be the rows that `NoiseKey.rows` makes: `group` then picks one, which names its own
    seed, step and group.

    Raises ValueError where the last row's quad does not fit 32 bits (some 17 billion elements a layer and group).
    """
    quads = -(-columns // LANES)
    check_noise_size(first_row + rows, columns)
    normals = torch.empty(rows, quads, LANES, dtype=torch.float32, device=device)
    seed, step, group = key[group].unbind() if isinstance(key, torch.Tensor) else (key.seed, key.step, group)
    key_words = (seed & WORD, seed >> 32 & WORD)
    for start, stop in chunks(rows, quads, on_gpu(normals)):
        quad = torch.arange((first_row + start) * quads, (first_row + stop) * quads, device=device)
        words = philox((quad, group, step, layer), key_words)
        lanes = (*box_muller(words[0], words[1]), *box_muller(words[2], words[3]))
        for lane, values in enumerate(lanes):
            normals[start:stop, :, lane] = values.view(stop - start, quads)
    return normals.view(rows, quads * LANES)[:, :columns]
