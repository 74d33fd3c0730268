"""Setups of small models for the tests of memory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from abmll.config import Config
from abmll.memory.episode import Setup
from abmll.models.architectures import architecture_config

ROOT = Path(__file__).parents[2]
BUCKET = 1000  # elements: the shipped one would be the largest tensor of a tiny model


def make_config(**sections: Any) -> Config:
    """A tiny model on four prompts of 64 tokens; `sections` override keys."""
    defaults = {
        "model": {"name": "random:tiny", "dtype": "float32"},
        "adapters": {"rank": 4, "backend": "torch"},
        "method": {},
        "tasks": {"source": "builtin", "batch_size": 4, "max_tokens": 64},
    }
    named = {name: {**defaults.get(name, {}), **sections.get(name, {})} for name in {**defaults, **sections}}
    return Config.model_validate(named)


def deepspeed(stage: int = 2, bucket: int = BUCKET) -> dict[str, Any]:
    settings = json.loads((ROOT / f"configs/deepspeed/zero{stage}.json").read_text())
    zero = settings["zero_optimization"] | {"reduce_bucket_size": bucket, "allgather_bucket_size": bucket}
    return settings | {"zero_optimization": zero}


def make_setup(checkpointing: str = "all layers", gpu: bool = False, scoring=(), ranks: int = 1, **sections) -> Setup:
    config = make_config(**sections)
    architecture = architecture_config(config.model.name.removeprefix("random:"))
    return Setup(config, architecture, deepspeed(), ranks, gpu, checkpointing, tuple(scoring))
