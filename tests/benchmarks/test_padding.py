"""benchmarks/padding.py on the tiny model: its counts against what a linear layer is given, and the committed rows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
COMMITTED = ROOT / "benchmarks/results/padding_cls23_smollm2.json"


@pytest.fixture
def padding(load):
    return load("padding")


@pytest.mark.parametrize("sections", [{}, {"adapters": {"posterior": "weight"}}, {"method": {"outer_batch": "query"}}])
def test_rows_are_those_that_a_linear_layer_sees(padding, build_tiny, sections):
    tiny = build_tiny(**sections, tasks={"batch_size": 3})
    layer = next(m for name, m in tiny.model.named_modules() if name.endswith("gate_proj"))
    seen = []
    hook = layer.register_forward_hook(lambda _, inputs, output: seen.append(inputs[0].flatten(0, -2).shape[0]))
    tiny.method.update(tiny.learner, tiny.visit(episodes=(0, 1)))
    hook.remove()
    episodes = [tiny.episode(0), tiny.episode(1)]
    (row,) = padding.padding(tiny.model, tiny.method, episodes, [2])
    assert row["abmll"] == sum(seen) and len(seen) == tiny.method.passes_per_episode
    lengths = [[batch.prompts.sizes for batch in padding.passes(tiny.method, [episode])] for episode in episodes]
    assert row["real_tokens"] == sum(sum(sizes) for own in lengths for sizes in own)
    assert row["own rectangle"] == sum(3 * max(sizes) for own in lengths for sizes in own)
    assert row["rectangle"] == sum(6 * max(map(max, both)) for both in zip(*lengths, strict=True))
    assert row["rectangle padding"] == pytest.approx(1 - row["real_tokens"] / row["rectangle"], rel=1e-3)


def test_balance_is_of_the_most_loaded_rank(padding):
    class Worth:
        def __init__(self, tokens):
            self.num_tokens = tokens

    episodes = [Worth(tokens) for tokens in (4, 1, 3, 2, 5, 5, 5, 5, 9)]  # two steps of 4; the ninth makes none
    (row,) = padding.imbalance(episodes, [2], [2])
    assert row["steps"] == 2 and row["dealt worst"] == 1  # 4 + 1 and 3 + 2
    assert row["in turn worst"] == pytest.approx(7 / 5) and row["in turn total"] == pytest.approx(17 / 15, rel=1e-3)


def test_the_command_writes_rows_and_their_tables(padding, tmp_path, capsys):
    path = tmp_path / "rows.json"
    command = ["--config", str(ROOT / "configs/quickstart.yaml"), "--model", "random:tiny", "--max-tokens", "400"]
    padding.main([*command, "--groups", "1", "8", "--ranks", "2", "--episodes", "16", "--output", str(path)])
    facts = json.loads(path.read_text())
    assert [row["groups"] for row in facts["rows"]] == [1, 8] and len(facts["balance"]) == 2
    assert facts["episodes"] == 16 and facts["provenance"]["commit"]
    assert str(ROOT) not in path.read_text()
    printed = capsys.readouterr().out
    padding.main(["--report", str(path)])
    assert capsys.readouterr().out == printed and "at G = 8: met" in printed


def test_committed_rows_meet_the_goal(padding):
    facts = json.loads(COMMITTED.read_text())
    assert facts["provenance"]["dirty"] is False
    shares = {(row["max_tokens"], row["groups"]): row["abmll padding"] for row in facts["rows"]}
    assert set(shares) == {(tokens, groups) for tokens in (160, 1024) for groups in (1, 2, 4, 8)}
    assert max(shares.values()) < padding.GOAL
    assert COMMITTED.with_suffix(".md").read_text() == padding.report(facts) + "\n"
