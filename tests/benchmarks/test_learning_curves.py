"""benchmarks/learning_curves.py on one episode: rows of both backends, in Triton's interpreter or on a GPU."""

from __future__ import annotations

import json

import pytest


@pytest.mark.parametrize("posterior", ["activation", "weight"])
def test_rows_compare_both_backends_with_the_same_noise(load, tmp_path, capsys, posterior):
    learning_curves = load("learning_curves")
    path = tmp_path / "rows.json"
    learning_curves.main(["--episodes", "1", "--posterior", posterior, "--output", str(path)])
    facts = json.loads(path.read_text())
    assert {"device", "versions", "commit", "interpreter", "config"} <= set(facts)
    rows = {row["run"]: row for row in facts["rows"]}
    assert list(rows) == list(learning_curves.RUNS)
    assert all(row["posterior"] == posterior and len(row["losses"]) == 5 for row in rows.values())
    assert rows["plain"]["largest_difference"] == 0
    # the first loss is of the same weights and noise: bf16's rounding of one forward pass apart
    assert rows["fused"]["losses"][0] == pytest.approx(rows["plain"]["losses"][0], rel=2.0**-8)
    assert rows["other noise"]["losses"] != rows["plain"]["losses"]
    capsys.readouterr()
    learning_curves.main(["--report", str(path)])
    assert capsys.readouterr().out.count(f"| {posterior} |") == len(learning_curves.RUNS)
