"""After training: adapt to a task of one's own, predict with honest confidence, hand the adapter on.

`base` is a loaded model with adapters in it, which `meta_model` (theta) and `task_model` (one task's phi) share;
`adaptation` makes phi of examples, `cross_validation` says what to expect of it, `adapter` is how phi lies on disk.
Nothing here needs DeepSpeed.
"""

from abmll.deploy.meta_model import MetaModel
from abmll.deploy.task_model import Prediction, TaskModel, load_task_models

__all__ = ["MetaModel", "Prediction", "TaskModel", "load_task_models"]
