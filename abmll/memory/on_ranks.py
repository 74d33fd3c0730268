"""One plan for all ranks."""

from __future__ import annotations

from typing import Any

from abmll.config import Config
from abmll.distributed import Ranks, local_ranks
from abmll.memory.capacity import device_capacity
from abmll.memory.plan import Plan, plan_run
from abmll.models.load import model_config


def plan_on(ranks: Ranks, config: Config, deepspeed_config: dict[str, Any]) -> Plan:
    """The run's plan on these ranks' devices: the main rank counts, and all take its answer. ValueError as plan_run."""
    answer: Plan | ValueError | None = None
    if ranks.is_main:
        gpu, capacity = ranks.device.type == "cuda", device_capacity(ranks.device, local_ranks())
        try:
            architecture = model_config(config.model)
            answer = plan_run(config, architecture, deepspeed_config, ranks.world_size, gpu, capacity)
        except ValueError as error:
            answer = error
    answer = ranks.from_main(answer)
    if isinstance(answer, ValueError):
        raise answer
    return answer
