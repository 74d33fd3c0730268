"""What an evaluation gives: scores by adaptation steps and task, and the predictions behind them."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal

from abmll.metrics import Predictions

Split = Literal["validation", "test"]


@dataclass(frozen=True)
class Evaluation:
    """Scores of one method on several tasks; `steps` counts adaptation steps.

    tasks[steps][task] holds the task's scores, and what was fitted to its support set: `temperature`, and `tfb_sigma`
    where weights were drawn so. overall[steps] the means over tasks and the pooled scores;
    predictions[steps][task] what they are made of, which is no part of the JSON.
    """

    method: str
    split: Split
    tasks: dict[int, dict[str, dict[str, float]]]
    overall: dict[int, dict[str, float]]
    predictions: dict[int, dict[str, Predictions]] = field(default_factory=dict, compare=False, repr=False)

    @property
    def steps(self) -> list[int]:
        return sorted(self.overall)

    @property
    def diverged(self) -> list[tuple[int, str]]:
        """(steps, task) where a prediction was not finite; such a task's scores are NaN, and so are the means."""
        return [(k, name) for k, tasks in self.tasks.items() for name, s in tasks.items() if math.isnan(s["nll"])]

    def to_json(self) -> dict[str, Any]:
        return {"method": self.method, "split": self.split, "tasks": self.tasks, "overall": self.overall}

    @classmethod
    def from_json(cls, saved: dict[str, Any]) -> Evaluation:
        """The inverse of `to_json`, through JSON's string keys."""
        tasks, overall = ({int(k): v for k, v in saved[key].items()} for key in ("tasks", "overall"))
        return cls(saved["method"], saved["split"], tasks, overall)
