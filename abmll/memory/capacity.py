"""How much memory a rank's device has for it."""

from __future__ import annotations

import os

import torch


def device_capacity(device: torch.device, local_ranks: int = 1) -> int:
    """Bytes: of a GPU, what is free and what this process holds already; of a CPU, an equal share of the machine's."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // local_ranks
