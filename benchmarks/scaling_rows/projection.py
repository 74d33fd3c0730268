"""From one GPU's step and the bytes to many GPUs: arithmetic on stated assumptions, not a measurement."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from abmll.adapters.targets import find_targets
from abmll.config.schema import AdapterConfig, ModelConfig
from abmll.models.load import model_config

# Of the vector's bytes, what a rank sends in a ring of N, as a multiple of (N - 1) / N; and rounds, of N - 1. Patarasuk
# and Yuan, "Bandwidth optimal all-reduce algorithms for clusters of workstations", 2009.
RING = {"all-reduce": 2, "reduce-scatter": 1, "reduce": 1, "all-gather": 1, "broadcast": 1, "all-to-all": 1}


def theta_bytes(model: str, adapters: AdapterConfig) -> int:
    """Of theta in fp32: a pair for the mean and one for the log-variance of each adapted layer."""
    with torch.device("meta"):
        found = AutoModelForCausalLM.from_config(model_config(ModelConfig(name=model)))
    layers = find_targets(found, adapters.modules).values()
    return sum(2 * 4 * adapters.rank * (layer.in_features + layer.out_features) for layer in layers)


def project(
    traffic: Sequence[dict[str, Any]],
    measured_theta: int,
    theta: int,
    gpus: int,
    step_seconds: float,
    imbalance: float,
    gigabytes_per_second: float,
    latency_us: float,
) -> dict[str, Any]:
    """A row: an outer step on so many GPUs, each with the work that `step_seconds` is of.

    `traffic`: rows of a measured step. The vectors that go by theta's size are scaled to `theta`; all of it waits for
    the step's computation, as nothing overlaps here.
    """
    wire, seconds = 0.0, 0.0
    for row in traffic:
        if row["collective"] not in RING or not row["bytes"]:
            continue
        own = row["bytes"] * (theta / measured_theta if row["phase"] == "engine step" else 1)
        sent = RING[row["collective"]] * own * (gpus - 1) / gpus
        wire += sent
        seconds += sent / (gigabytes_per_second * 1e9)
        seconds += row["calls"] * RING[row["collective"]] * (gpus - 1) * latency_us * 1e-6
    whole = step_seconds * imbalance + seconds
    assumed = {
        "step_seconds": step_seconds,
        "imbalance": imbalance,
        "gigabytes_per_second": gigabytes_per_second,
        "latency_us": latency_us,
        "algorithm": "ring, nothing overlaps",
    }
    found = {"sent_mb": wire / 1e6, "communication_ms": 1e3 * seconds, "efficiency": step_seconds / whole}
    return {"gpus": gpus, **{k: float(f"{v:.4g}") for k, v in found.items()}, "theta_bytes": theta, "assumed": assumed}
