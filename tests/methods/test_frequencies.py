from __future__ import annotations

import pytest
import torch

from abmll.config.load import load_config
from abmll.config.schema import MethodConfig
from abmll.methods import build_method
from abmll.tasks.task import PromptedExample

METHOD = build_method(MethodConfig(name="frequencies"))


def examples(labels, options=2):
    return [PromptedExample((1, 2), label, options) for label in labels]


def test_counts_of_the_support_set_by_hand():
    """Labels 1, 1, 0 of two options: (1 + 1) / 5 and (2 + 1) / 5. Of three options the third has only the added one."""
    found = METHOD.predict(examples([1, 1, 0]), [*examples([0, 1]), *examples([2], options=3)])
    wanted = torch.tensor([[2 / 5, 3 / 5, 0], [2 / 5, 3 / 5, 0], [2 / 6, 3 / 6, 1 / 6]], dtype=torch.float64)
    torch.testing.assert_close(found.options, wanted)
    torch.testing.assert_close(found.nll, -wanted.gather(1, torch.tensor([[0], [1], [2]]))[:, 0].log())
    assert found.correct_vocabulary.tolist() == [False, True, False] and found.label.tolist() == [0, 1, 2]


def test_without_a_support_set_all_options_are_alike():
    found = METHOD.predict((), examples([1, 0], options=4))
    assert (found.options == 0.25).all()


@pytest.mark.parametrize("override", ["eval.temperature=support", "eval.tfb.samples=4", "eval.prune.fraction=0.1"])
def test_what_needs_a_model_is_refused(override, tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("{model: {name: random:tiny}, tasks: {source: builtin}, method: {name: frequencies}}")
    with pytest.raises(ValueError, match=r"method\.name: 'frequencies': counts labels and reads no model"):
        load_config(path, [override])
