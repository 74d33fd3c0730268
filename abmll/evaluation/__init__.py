"""Scores on tasks that training never saw, and what can be done at scoring time to better or to try them.

`predictor` adapts and predicts, `evaluator` draws and scores with it. Each option is a file of its own: `active` and
`labels` choose what adaptation sees, `tfb` draws weights, `prune` takes activations away, `temperature` cools or warms
what is predicted, `held_out` leaves out of adaptation what temperature is fitted to. `adapted` keeps tasks' phi for
scorings that differ in what comes after adaptation.
"""

from abmll.evaluation.adapted import AdaptedTasks
from abmll.evaluation.evaluator import Evaluator
from abmll.evaluation.scores import Evaluation, Split

__all__ = ["AdaptedTasks", "Evaluation", "Evaluator", "Split"]
