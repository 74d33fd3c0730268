"""The page as HTML: its sections, that it loads nothing and runs nothing, that no text of a file becomes markup."""

from __future__ import annotations

import json
import math
import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest
from made_runs import TASKS, evaluation, step_lines, write_run

from abmll.config import Refused
from abmll.page.command import page, report
from abmll.page.facts import read_runs
from abmll.page.svg import inline_svg
from abmll.score_files import save_scores

SECTIONS = ["runs", "scores", "tasks", "learning", "confidence", "posterior", "cost", "configuration"]
VOID = {"meta", "link", "img", "br", "hr", "input", "use", "path"}
SCRIPT, QUOTE = "<script>alert(1)</script>", "\"><img src=x onerror='alert(2)'>"


class Elements(HTMLParser):
    """All elements with their attributes, the text outside of <style>, and whether every tag is closed."""

    def __init__(self, html: str):
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.text, self.style, self.open = "", "", []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] == "style":
            self.style += data
        else:
            self.text += f"{data} "

    def of(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.found if name == tag]


def check_self_contained(html: str) -> Elements:
    """Nothing is loaded, nothing runs, no id stands twice, what is referred to is there."""
    elements = Elements(html)
    assert elements.open == []
    tags = {tag for tag, _ in elements.found}
    assert not tags & {"script", "link", "iframe", "object", "embed", "base", "form", "img", "image", "foreignobject"}
    ids = [attributes["id"] for _, attributes in elements.found if "id" in attributes]
    assert len(set(ids)) == len(ids)
    for _tag, attributes in elements.found:
        for name, value in attributes.items():
            assert not name.startswith("on") and name not in ("src", "srcset", "action", "data", "poster")
            if name.endswith("href"):
                assert value.startswith("#") and value[1:] in ids
            for target in re.findall(r"url\(([^)]*)\)", value or ""):
                assert target.startswith("#") and target[1:] in ids
    assert not re.search(r"@import|url\(|expression", elements.style)
    return elements


def text_of(html: str) -> str:
    return " ".join(Elements(html).text.split())


def test_one_run(tmp_path):
    html = page(read_runs([write_run(tmp_path / "my run")]))
    elements = check_self_contained(html)
    assert [attributes["id"] for attributes in elements.of("section")] == SECTIONS
    labels = [attributes["aria-label"] for attributes in elements.of("svg")]
    assert len(labels) == 7 and all("Runs: my run." in text for text in labels)
    assert {attributes["role"] for attributes in elements.of("svg")} == {"img"}
    text = text_of(html)
    assert "abmll, 2 steps 2 62.5 62.5" in text  # the means' row: tasks, accuracies
    assert "first task 4 75.0 30.1 – 95.4" in text  # Wilson's interval of 3 of 4
    assert "Fewer than six have none." in text and "bootstrap" not in text
    for shown in ("q_proj", "random:tiny", "activation posterior, beta 0.0001", "0:00:02", "method.inner_steps"):
        assert shown in text
    assert not re.search(r">\s*(nan|None|inf)\b", html)


def test_the_same_run_gives_the_same_page(tmp_path):
    runs = read_runs([write_run(tmp_path / "run")])
    assert page(runs) == page(runs)


def test_several_runs_stand_beside_each_other(tmp_path):
    reptile = write_run(
        tmp_path / "reptile",
        step_lines(layers=0),
        [evaluation("pretrained"), evaluation("reptile")],
        tensors={},
        method={"name": "reptile"},
    )
    html = page(read_runs([write_run(tmp_path / "abmll"), reptile]))
    elements = check_self_contained(html)
    assert [attributes["id"] for attributes in elements.of("section")] == SECTIONS
    text = text_of(html)
    for shown in ("abmll, 2 steps", "reptile, 2 steps", "reptile: pretrained, 2 steps"):
        assert shown in text
    assert "reptile: its method has no posterior, and so no KL." in text
    assert "method.name abmll abmll reptile" in text  # key, default, both values
    (row,) = re.findall(r'<tr class="differ"><th scope="row">method.name</th>(.*?)</tr>', html, re.DOTALL)
    assert row.count("changed") == 1 and '<strong class="changed">reptile</strong>' in row


def test_a_run_that_only_has_a_configuration(tmp_path):
    (tmp_path / "config.yaml").write_text("model: {name: x}\n")
    html = page(read_runs([tmp_path]))
    elements = check_self_contained(html)
    text = text_of(html)
    assert elements.of("svg") == []
    for shown in ("It is not finished", "Nothing was scored.", "No training steps are recorded.", "No posterior"):
        assert shown in text


def test_the_pretrained_model_has_no_training(tmp_path):
    run = write_run(tmp_path / "run", [], [evaluation("pretrained")], {}, method={"name": "pretrained"})
    text = text_of(page(read_runs([run])))
    assert "No training steps are recorded: there is no metrics.jsonl" in text
    assert "run: no training steps are recorded, and so no KL." in text and "pretrained, 2 steps 2 62.5" in text


def test_an_older_run_says_that_its_kl_was_not_recorded(tmp_path):
    text = text_of(page(read_runs([write_run(tmp_path / "run", step_lines(layers=0))])))
    assert "run: its KL by layer was not recorded" in text


def test_scores_that_are_nan(tmp_path):
    """One task diverged, or all of them; every step was skipped."""
    lines = [{"step": 1, "episode": 1, "seconds": 1.0, "real_tokens_per_second": 5.0, "peak_memory_bytes": 9}]
    for name, tasks in {"one": {**TASKS, "bad": ((math.nan, 0),)}, "all": {"bad": ((math.nan, 0),)}}.items():
        html = page(read_runs([write_run(tmp_path / name, lines, [evaluation(tasks=tasks)])]))
        check_self_contained(html)
        text = text_of(html)
        assert f"not finite on 1 of {len(tasks)} tasks, so that its means are no numbers." in text
        assert "bad 1 – –" in text and "mean over tasks – –" in text
        assert not re.search(r">\s*nan\b", html)


def test_estimates_that_are_negative_are_drawn(tmp_path):
    lines = step_lines()
    for line in lines:
        if "kl_by_layer" in line:
            line["kl_by_layer"][0] *= -1
    assert "kl" in page(read_runs([write_run(tmp_path / "run", lines)]))


def test_other_scores_and_adapters(tmp_path):
    folder = write_run(tmp_path / "run")
    save_scores(folder / "scores/samples-8", [evaluation(tasks={"one": ((0.9, 0), (0.9, 0))})], {"eval.samples": 8})
    scores = {"before_adaptation": {"accuracy": 0.5}, "cross_validation": {"accuracy": 0.75, "accuracy_low": 0.3}}
    scores["cross_validation"]["accuracy_high"] = 0.95
    card = {"task": "mine", "options": ["yes", "no"], "adaptation": {"examples": 8, "steps": 4, "loss": [2.0, 1.0]}}
    (folder / "adapters/mine").mkdir(parents=True)
    (folder / "adapters/mine/card.json").write_text(json.dumps({**card, "scores": scores}))
    html = page(read_runs([folder]))
    check_self_contained(html)
    text = text_of(html)
    assert "run: samples-8 (eval.samples=8)" in text and "abmll, 2 steps 100.0 100.0" in text
    assert "mine yes, no 8 4 2.000 → 1.000 50.0 75.0 (30.0 – 95.0)" in text


@pytest.mark.parametrize("nasty", [SCRIPT, QUOTE, "$\\frac{", "{{ 7 * 7 }}", "_under", "\x1b[31m & <b>", "--><!--"])
def test_no_text_becomes_markup(tmp_path, nasty):
    """Of tasks, methods, settings, the configuration, layers, adapters' cards and the run's own folder."""
    tasks = {nasty: TASKS["first task"], f"{nasty} too": TASKS["second task"]}
    episodes = [{"step": 1, "task": nasty, "finite": True, "nll_first": 1.0, "nll_last": 1.0}]
    layers = [f"{nasty}.0.{nasty}", f"{nasty}.1.{nasty}"]
    name = nasty.replace("/", "∕")
    folder = write_run(
        tmp_path / name,
        step_lines(layers=2),
        [evaluation(nasty, tasks)],
        episodes=episodes,
        layers=layers,
        model={"name": nasty},
    )
    save_scores(folder / "scores/x", [evaluation(nasty, tasks)], {nasty: nasty})
    (folder / "provenance.json").write_text(json.dumps({"commit": nasty, "versions": {nasty: nasty}}))
    (folder / "a").mkdir()
    (folder / "a/card.json").write_text(json.dumps({"task": nasty, "options": [nasty]}))
    html = page(read_runs([folder, write_run(tmp_path / "b")]))
    elements = check_self_contained(html)
    assert not {"script", "img", "b"} & {tag for tag, _ in elements.found}
    (tasks_chart,) = [svg for svg in re.findall(r"<svg.*?</svg>", html, re.DOTALL) if "Wilson" in svg]
    visible = "".join(ElementTree.fromstring(tasks_chart).itertext())
    shown = nasty.replace("\x1b", "\ufffd")
    assert shown in visible  # as text, in the figure too
    assert f"{name}: {nasty}, 2 steps".replace("\x1b", "\ufffd") in visible  # in its legend
    assert nasty.replace("\x1b", "\ufffd") in elements.text.replace("\x1b", "\ufffd")
    labels = [attributes["aria-label"] for attributes in elements.of("svg")]
    assert labels and all(name.replace("\x1b", "\ufffd") in text for text in labels)


def test_figures_share_a_page_without_sharing_ids():
    from matplotlib.figure import Figure

    def draw():
        figure = Figure()
        figure.subplots().plot([1, 2], [3, 4], marker="o")
        return figure

    one, other = (inline_svg(draw, name, 'of "a" & <b>') for name in ("one", "other"))
    assert one == inline_svg(draw, "one", 'of "a" & <b>')
    ids = [set(re.findall(r'id="([^"]*)"', svg)) for svg in (one, other)]
    assert ids[0] and not ids[0] & ids[1] and all(name.startswith("one-") for name in ids[0])
    root = ElementTree.fromstring(one)
    assert root.attrib["aria-label"] == 'of "a" & <b>' and "currentColor" in one and "<?xml" not in one
    assert inline_svg(lambda: None, "none", "") is None


def test_the_command_writes_where_it_says(tmp_path):
    one, two = (write_run(tmp_path / name) for name in ("one", "two"))
    assert report([str(one)], None) == one / "report.html"
    before = (one / "report.html").read_text()
    assert before.startswith("<!DOCTYPE html>")
    out = tmp_path / "pages/both.html"
    assert report([str(one), str(two)], str(out)) == out and "one, two" in out.read_text()
    with pytest.raises(Refused, match=r"--out: not set, and the page is of 2 runs; name its file, such as --out "):
        report([str(one), str(two)], None)
    with pytest.raises(Refused, match=r"--out: .*pages: is a folder; name a file in it"):
        report([str(one)], str(tmp_path / "pages"))
    for path in (out / "below.html", "/proc/x.html", "/proc/no/x.html"):
        with pytest.raises(Refused, match=rf"--out: {path}: .* \(.*\); name another file"):
            report([str(one)], str(path))
