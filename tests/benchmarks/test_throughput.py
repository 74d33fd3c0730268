"""benchmarks/throughput.py on the tiny model: every contender, the rows, the goals."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
TINY = ["--model", "random:tiny", "--device", "cpu", "--inner-steps", "2", "--eval-examples", "1"]


@pytest.fixture
def throughput(load):
    return load("throughput")


@pytest.fixture
def threads():
    """What the command sets stays with it."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def work(throughput):
    """Four episodes of unequal lengths on a tiny model, built-in tasks."""
    arguments = throughput._parser().parse_args([*TINY, "--max-tokens", "400"])
    config = throughput.load_config(str(ROOT / "configs/cls23.yaml"), throughput._overrides(arguments))
    model, tokenizer = throughput.load_model(config.model, "cpu")
    prompter = throughput.Prompter(tokenizer, config.tasks.max_tokens, config.tasks.too_long)
    loaded = throughput.read_tasks(config, str(ROOT / "configs/cls23.yaml"))
    sampler = throughput.prompt_tasks(loaded, prompter, config).sampler(config, throughput.build_method(config.method))
    episodes = [sampler.episode(index) for index in range(4)]
    return throughput.Work(config, model, episodes, "none", throughput.Clock(torch.device("cpu")))


def test_rows_of_every_contender(throughput, threads, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(throughput, "EVALUATED", 4)
    pytest.importorskip("peft")
    path = tmp_path / "rows.json"
    throughput.main([*TINY, "--max-tokens", "400", "--groups", "1", "4", "--rounds", "2", "--threads", "1",
                     "--output", str(path)])  # fmt: skip
    printed, facts = capsys.readouterr().out, json.loads(path.read_text())
    assert str(ROOT) not in path.read_text()
    rows = {(row["contender"], row["groups"]): row for row in facts["rows"]}
    grouped = [(name, groups) for name in ("frozen", "activation", "weight") for groups in (1, 4)]
    peft = [(f"PEFT, {how}", 1) for how in ("one adapter reset", "set_adapter", "loaded from CPU")]
    assert list(rows) == [*grouped, *peft]  # on a CPU plain PyTorch has no rows of its own
    for contender, row in rows.items():
        assert 0 < row["p20_s"] <= row["median_s"] <= row["p80_s"]
        assert row["episodes_per_s"] == pytest.approx(4 / row["median_s"], rel=2e-3)
        assert row["real_tokens_per_s"] == pytest.approx(facts["real_tokens"] / row["median_s"], rel=2e-3)
        assert (row["padding"] > 0) == contender[0].startswith("PEFT")
        steps = row["step_ms"] * 4 * facts["inner_steps"] / 1e3
        assert 0 < steps / 2 < row["p80_s"] and row["between_ms"] >= 0
    assert rows["activation", 1]["episode_x_one"] == 1 and rows[peft[0]]["step_x_peft"] == 1
    evaluation = {row["groups"]: row for row in facts["evaluation"]}
    assert facts["evaluated"]["tasks"] == 4 and evaluation[4]["nll"] == pytest.approx(evaluation[1]["nll"], rel=1e-3)
    throughput.main(["--report", str(path)])
    assert capsys.readouterr().out == printed and printed.count("not measured") == 0


@pytest.mark.parametrize("name", ["PEFT, one adapter reset", "PEFT, set_adapter", "PEFT, loaded from CPU"])
def test_baselines_take_the_same_steps(load, work, name):
    """The first NLLs are the frozen model's, also in a second round where an adapter starts anew; K steps a task."""
    pytest.importorskip("peft")
    measuring, contenders = load("throughput_rows.measure"), load("throughput_rows.contenders")
    right = measuring._nll_of(contenders.make("frozen", 4, work), work)
    run = contenders.make(name, 1, work)
    for again in range(2):
        notes = run()
        if not (again and name == "PEFT, set_adapter"):  # resident adapters keep what they learned
            torch.testing.assert_close(torch.cat(notes.nll), right)
    assert len(notes.steps) == 4 * 2 and len(notes.swaps) == 4 * (2 if "CPU" in name else 1)


def test_every_episode_begins_at_the_same_theta_until_it_learns(load, work):
    measuring, contenders = load("throughput_rows.measure"), load("throughput_rows.contenders")
    right = measuring._nll_of(contenders.make("frozen", 4, work), work)
    run = contenders.make("activation", 1, work)
    for _ in range(2):
        torch.testing.assert_close(torch.cat(run(learning=False).nll), right, rtol=1e-3, atol=0)  # but for the noise
    first = torch.cat(run().nll)
    assert not torch.equal(first[1:], torch.cat(run(learning=False).nll)[1:])


def test_plain_pytorch_is_a_contender_on_a_gpu(throughput):
    arguments = throughput._parser().parse_args([*TINY, "--groups", "1", "8", "--posterior", "weight"])
    chosen = throughput._chosen(arguments, torch.device("cuda"))
    assert ("weight, plain", 1) in chosen and ("weight, plain", 8) not in chosen and ("weight", 8) in chosen
    assert not any("activation" in name for name, _ in chosen)


def test_a_wrong_contender_is_not_timed(load, work, monkeypatch):
    def wrong(name, groups, own):
        run = right(name, groups, own)
        if name == "frozen":
            return run

        def double(**how):
            notes = run(**how)
            notes.nll = [2 * nll for nll in notes.nll]
            return notes

        return double

    measuring = load("throughput_rows.measure")
    right = measuring.make
    monkeypatch.setattr(measuring, "make", wrong)
    with pytest.raises(RuntimeError, match="NLLs before the first step"):
        measuring.measure(work, [("activation", 1)], 1, 100)


def test_goals(load, throughput):
    goals = load("throughput_rows.report").goals

    def row(contender, groups, **found):
        return {"contender": contender, "groups": groups, **found}

    cpu = {"device": "cpu", "rows": [row("activation", 4, episode_x_one=1.2), row("weight", 4, episode_x_one=0.9)]}
    cpu["evaluation"] = [{"groups": 1, "x_first": 1.0}, {"groups": 4, "x_first": 1.0}]
    assert [met for *_, met in goals(cpu)] == [False, True, True]
    gpu = {"device": "cuda", "rows": [row("activation", 1, step_x_peft=1.2, episode_x_plain=0.4)]}
    gpu["rows"].append(row("activation", 8, episode_x_one=0.25, peak_gb=41.0))
    assert [met for *_, met in goals(gpu)] == [False, True, True, False, *[None] * 4]


def test_groups_that_do_not_divide_the_episodes_are_refused(throughput, capsys):
    with pytest.raises(SystemExit):
        throughput.main([*TINY, "--groups", "3", "4"])
    assert "--groups 3: 4 episodes are no multiple" in capsys.readouterr().err
