"""The adapter as plain tensors: what `launch/adapt.py` writes, for programs that read safetensors.

Every tensor is named LAYER.PAIR.FACTOR, LAYER being the linear layer's name in the base model. Pairs:
`mean` with `a` [r, inputs] and `b` [outputs, r]: the change s b a to the layer's weight, s = alpha / r;
`log_variance` (abmll) with `a` and `b` alike: the log-variance s b a + log_variance_offset, of each weight, or with the
activation posterior (s b a x + log_variance_offset) of each output, with log_variance_alpha in alpha's place where that
is set; `deviations.root` (blob) [r, inputs]: its square is the standard deviation of the mean's `a`.
"""

from __future__ import annotations

from pathlib import Path

import torch

from abmll.config import Refused
from abmll.deploy.adapter import PHI, write_adapter
from abmll.deploy.export.report import Report
from abmll.deploy.export.subject import Subject
from abmll.tensor_files import read_tensors


def write_tensors(subject: Subject, folder: Path) -> Report:
    """An adapter's folder, which `load_task_models` takes. Refused where what was written is not what was meant."""
    write_adapter(folder, subject.tensors, subject.card)
    found, _ = read_tensors(folder / PHI)
    wrong = [name for name, value in subject.tensors.items() if not torch.equal(found[name], value)]
    if wrong:
        raise Refused(f"--format safetensors: {wrong[0]} is not what was written; check the disk, and export again")
    return subject.report("safetensors")
