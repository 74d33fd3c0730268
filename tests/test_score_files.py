"""What scores leave in a folder: what evaluation made, in the examples' own order, and back."""

from __future__ import annotations

import pandas as pd
import pytest
import torch

from abmll.evaluation import Evaluator
from abmll.score_files import as_predictions, load_scores, save_scores


class OneRank:
    rank, world_size, device = 0, 1, torch.device("cpu")

    def gather(self, item):
        return [item]


@pytest.mark.parametrize("samples", [0, 3])
def test_a_table_holds_every_scored_example(samples, build_tiny, tmp_path):
    tiny = build_tiny(adapters={"log_variance_offset": -4.0}).scatter()
    config = tiny.config.eval.model_copy(update={"samples": samples})
    evaluator = Evaluator(tiny.learner, tiny.parts.tasks.letter_ids, config, 3, tiny.config.seed, OneRank())
    tasks = tiny.parts.tasks.test
    found = evaluator.evaluate(tiny.method, tasks, "test")
    save_scores(tmp_path, [found])
    table = pd.read_parquet(tmp_path / "predictions.parquet")
    assert len(table) == 2 * sum(len(task.test) for task in tasks)
    assert table["variance"].isna().all() == (samples == 0)
    for task in tasks:
        for steps in found.steps:
            own = table[(table["task"] == task.name) & (table["steps"] == steps)]
            assert own["example"].tolist() == list(range(len(task.test)))
            assert own["label"].tolist() == [example.label for example in task.test]
            assert own["nll"].mean() == pytest.approx(found.tasks[steps][task.name]["nll"])
            assert own.filter(regex="^p").sum(axis=1).tolist() == pytest.approx([1.0] * len(own))
    (again,) = load_scores(tmp_path)
    assert again == found
    for steps, of_tasks in found.predictions.items():
        for task, predictions in of_tasks.items():
            for name, value in vars(predictions).items():
                assert torch.equal(getattr(again.predictions[steps][task], name).nan_to_num(), value.nan_to_num()), name


def test_options_that_an_example_lacks_are_zero_and_a_diverged_row_stays():
    nan = float("nan")
    numbers = {"label": 0, "nll": 1.0, "correct_vocabulary": True, "variance": nan, "mutual_information": nan}
    table = pd.DataFrame({"p0": [0.5, 0.6, nan], "p1": [0.3, 0.4, nan], "p2": [0.2, nan, nan]}).assign(**numbers)
    want = torch.tensor([[0.5, 0.3, 0.2], [0.6, 0.4, 0.0], [nan] * 3], dtype=torch.float64)
    torch.testing.assert_close(as_predictions(table).options, want, equal_nan=True)
    torch.testing.assert_close(as_predictions(table[1:2]).options, want[1:2, :2])  # nobody has a third option
    assert as_predictions(table[2:]).options.isnan().all()
