"""The model card: its code gives the adapter's probabilities, and no text from data breaks it."""

import os

import pytest
import yaml
from deployed import EXAMPLES, OPTIONS, TEXTS
from exported import adapted_from, code_of, save_base

from abmll import Example, MetaModel
from abmll.deploy.export import export_adapter
from abmll.deploy.export.model_card import escape, model_card
from abmll.deploy.export.report import Report
from abmll.deploy.export.subject import Subject
from abmll.models.source import Source

pytest.importorskip("peft", reason="pip install -e '.[export]'")

OWN = [Example(f"Which? {n}", (f"a{n}", f"b{n}", "c"), f"a{n}") for n in range(4)]
SHOWN = {"tasks": {"demonstrations": 2, "demonstrate": "adaptation", "max_tokens": 700}}
CUT = {"tasks": {"demonstrations": 2, "demonstrate": "adaptation", "max_tokens": 500}}
LONG = [(f"{text} And so on{' and on' * 40}.", label) for text, label in EXAMPLES]


def run_code(card, folder, **known):
    """What the card's code leaves, with some of its first lines' variables replaced."""
    code, names, here = code_of(card), {}, os.getcwd()
    for name, value in known.items():
        head, _, rest = code.partition(f"\n{name} = ")
        code = f"{head}\n{name} = {value!r}\n{rest.partition(chr(10))[2]}"
    os.chdir(folder)
    try:
        exec(code, names)
    finally:
        os.chdir(here)
    return names


@pytest.mark.parametrize("format", ["peft", "merged"])
@pytest.mark.parametrize(
    ("examples", "template", "sections"),
    [(EXAMPLES, True, {}), (EXAMPLES, False, {}), (OWN, True, {}), (EXAMPLES, True, SHOWN), (LONG, True, CUT)],
    ids=["plain", "no chat template", "own options", "demonstrations", "shortened demonstrations"],
)
def test_its_code_predicts(examples, template, sections, format, build_tiny, tmp_path):
    base = save_base(tmp_path / "base", template=template)
    own = adapted_from(build_tiny, base, tmp_path / "run", examples, **sections)
    own.export(tmp_path / "out", format)
    card = (tmp_path / "out" / "README.md").read_text()
    known = {"text": TEXTS[1], **({"options": ["x", "y", "z"]} if examples is OWN else {})}
    assert f'"add_special_tokens": {"false" if template else "true"}}}' in card
    found = run_code(card, tmp_path / "out", **known)
    (expected,) = own.predict([Example(TEXTS[1], ("x", "y", "z"), "x") if examples is OWN else TEXTS[1]])
    assert found["probabilities"] == pytest.approx(expected.probabilities, abs=1e-5)
    (prompt,) = own._prompts([own._asked(TEXTS[1])]) if examples is not OWN else [None]
    assert prompt is None or found["ids"][0].tolist() == list(prompt.token_ids), "the prompt to the token"


def test_text_from_data_cannot_break_the_page(build_tiny, tmp_path):
    labels = ("a|b ``` <script>", "---\nlicense: mit\n---\n# x")
    base = save_base(tmp_path / "base")
    examples = [(text, labels[n % 2]) for n, (text, _) in enumerate(EXAMPLES)]
    own = adapted_from(build_tiny, base, tmp_path / "run", examples, task="t\n---\n[x](http://y)")
    own.export(tmp_path / "out", "merged")
    card = (tmp_path / "out" / "README.md").read_text()
    _, front, body = card.split("---\n", 2)
    assert set(yaml.safe_load(front)) == {"library_name", "tags"}, "no license is made up"
    assert body.lstrip().startswith(r"# t --- \[x\](http\://y)")
    rows = [line for line in body.splitlines() if line.startswith("| ")][1:3]
    assert rows[0].endswith(r"| --- license\: mit --- \# x |") and rows[1].endswith(r"| a\|b \`\`\` \<script\> |")
    assert not [line for line in body.splitlines() if line in ("---", "# x", "license: mit")]
    assert run_code(card, tmp_path / "out")["options"] == sorted(labels)


def test_escaping():
    assert escape("a *b* _c_ `d`\n\te\\f") == r"a \*b\* \_c\_ \`d\` e\\f"


def test_scores_and_temperature(build_tiny, tmp_path):
    own = adapted_from(build_tiny, save_base(tmp_path / "base"), tmp_path / "run", folds=3)
    own.export(tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    found, before = own.card.scores["cross_validation"], own.card.scores["before_adaptation"]
    assert f"| accuracy | {found['accuracy']:.4g} | {before['accuracy']:.4g} |" in card
    assert f"| ece | {found['ece']:.4g} | {before['ece']:.4g} |" in card
    assert f"Temperature: {own.card.temperature:.3g}." in card
    assert "3 steps on 6 examples" in card and "logits move by up to" in card
    assert own.card.run.theta[:16] in card and own.card.base.fingerprint[:16] in card


def test_only_the_hubs_own_names_are_a_base_model(adapted, monkeypatch):
    report = Report("peft", "a/b", "float32", 6, 8, 2.0)
    assert "base_model" not in yaml.safe_load(model_card(Subject(adapted), report).split("---")[1])
    monkeypatch.setattr(Subject, "source", property(lambda self: Source("hub", "a/b")))
    front = yaml.safe_load(model_card(Subject(adapted), report).split("---")[1])
    assert front["base_model"] == "random:tiny" and front["library_name"] == "peft"


def test_thetas_card(run, tmp_path):
    meta = MetaModel.load(run, device="cpu")
    theta = meta.unadapted(None, meta.run.name)
    assert theta.options is None and theta.phi is None
    export_adapter(theta, tmp_path / "out", "merged")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "Every question brings its own options" in card and "not the model of one" in card
    found = run_code(card, tmp_path / "out", text="It was slow.", options=list(OPTIONS))
    (expected,) = MetaModel.load(run, device="cpu").unadapted(OPTIONS).predict(["It was slow."])
    assert found["probabilities"] == pytest.approx(expected.probabilities, abs=1e-5)
