"""A whole run with demonstrations everywhere: what it says, that it resumes, and that it is scored again the same."""

import json
import re

import pytest
from runs import Stopped, stop_before

from abmll.config import Refused, load_config
from abmll.preflight import preflight
from abmll.rescore import evaluate

ALWAYS = ("tasks.demonstrations=2", "tasks.demonstrate=always", "tasks.max_tokens=1024")


@pytest.mark.parametrize(
    "method",
    [("method.outer_batch=query",), ("method.name=lora", "trainer.parallel_episodes=2")],
    ids=["abmll", "lora"],
)
def test_a_run_goes_on_where_it_stopped(method, make_run, monkeypatch, capsys):
    plain, whole = (make_run(name).train(*method, *more) for name, more in (("plain", ()), ("whole", ALWAYS)))
    assert "demonstrations  2 before scored, support and training examples" in capsys.readouterr().out
    tokens = [sum(line["real_tokens"] for line in lines(run)) for run in (plain, whole)]
    assert 2 * tokens[0] < tokens[1], "three prompts for one, without the demonstrations' frames"
    assert whole.scores != plain.scores
    stopped = make_run("stopped")
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        stop_before(patch, 2)
        stopped.train(*method, *ALWAYS)
    stopped.train(*method, *ALWAYS, resume=True).same_as(whole)


def lines(run):
    return [json.loads(line) for line in (run.folder / "episodes.jsonl").read_text().splitlines()]


def test_a_finished_run_is_scored_in_context(finished, tmp_path):
    """Any finished run, without training it again; then without demonstrations it has its own scores."""
    found = {}
    for count in (0, 2):
        path = tmp_path / f"{count}.json"
        evaluate(str(finished.folder), [f"tasks.demonstrations={count}", "tasks.max_tokens=1024"], str(path))
        found[count] = json.loads(path.read_text())
    assert found[0] == finished.scores != found[2]
    with pytest.raises(Refused, match=r"tasks\.demonstrations: 60: .*set fewer"):
        evaluate(str(finished.folder), ["tasks.demonstrations=60", "method.test_steps=30"], None)


def test_validate_tells_what_was_left_out(run):
    report, good = preflight(
        load_config(run.config, ["tasks.demonstrations=3", "tasks.max_tokens=512"]), str(run.config)
    )
    counted = re.findall(r"prompts 0 truncated and 0 dropped at 512 tokens; (\d+) demonstrations were left out", report)
    assert good and len(counted) == 2, report  # of the two unseen tasks; training tasks have none
    assert all(int(number) >= 4 for number in counted), "four prompts of some 145 tokens: one of three at least"
