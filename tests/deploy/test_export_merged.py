"""A merged model: its weights, what rounding took of the change, and that transformers alone loads it."""

import json

import pytest
import torch
from deployed import OPTIONS, TEXTS, prompts
from exported import adapted_from, save_base
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from abmll.config import Refused
from abmll.deploy.export import export_adapter, merged
from abmll.deploy.export.peft import tolerated
from abmll.deploy.export.subject import Subject, next_logits

NAMES = [f"model.layers.{n}.self_attn.{name}" for n in (0, 1) for name in ("q_proj", "v_proj", "o_proj")]


@pytest.fixture(scope="session")
def half(build_tiny, base, tmp_path_factory):
    return adapted_from(build_tiny, base, tmp_path_factory.mktemp("run"), dtype="bfloat16")


def changes(own):
    """s B A of every layer, fp64; s = 16 / 8."""
    return {name: 2 * own.phi[f"{name}.mean.b"].double() @ own.phi[f"{name}.mean.a"].double() for name in NAMES}


def test_in_fp32_it_is_the_adapted_model(moods, base, tmp_path):
    expected = [list(one.probabilities.values()) for one in moods.predict(TEXTS)]
    report = export_adapter(moods, tmp_path / "out", "merged")
    plain, found = (AutoModelForCausalLM.from_pretrained(folder) for folder in (base, tmp_path / "out"))
    weights, merged_weights = dict(plain.named_parameters()), dict(found.named_parameters())
    assert set(weights) == set(merged_weights) and {w.dtype for w in merged_weights.values()} == {torch.float32}
    by_hand = changes(moods)
    for name, weight in weights.items():
        layer = name.removesuffix(".weight")
        right = weight.double() + by_hand[layer] if layer in by_hand else weight.double()
        assert ((merged_weights[name].double() - right).abs() <= 2e-7 * right.abs().max()).all(), name
        assert torch.equal(merged_weights[name], weight) == (layer not in by_hand), name
    questions = prompts(moods.base, [(text, OPTIONS[0]) for text in TEXTS])
    letters = list(moods.base.prompter.letter_ids[:2])
    logits = next_logits(found, questions)[:, letters]
    torch.testing.assert_close(logits.softmax(1), torch.tensor(expected), rtol=0, atol=1e-5)
    assert report.difference <= tolerated(Subject(moods)) and report.option_difference < 1e-5
    assert report.merge.lost < 1e-5 and report.notes == ()
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == moods.base.tokenizer.chat_template
    assert GenerationConfig.from_pretrained(tmp_path / "out").eos_token_id == plain.generation_config.eos_token_id
    assert moods.predict(TEXTS)[0].probabilities == dict(zip(OPTIONS, expected[0], strict=True)), "as it was"
    assert "abmll" not in (tmp_path / "out" / "config.json").read_text()


def test_in_bf16_it_says_what_rounding_takes(half, base, tmp_path):
    report = export_adapter(half, tmp_path / "out", "merged")
    weights = load_file(f"{base}/model.safetensors")
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert {value.dtype for value in found.values()} == {torch.bfloat16}
    lost = whole = 0.0
    for name, change in changes(half).items():
        before = weights[f"{name}.weight"].bfloat16().double()
        after = (before + change).bfloat16().double()
        assert ((found[f"{name}.weight"].double() - after) == 0).double().mean() > 0.99, "ties aside"
        gone, error = change - (after - before), after - (before + change)
        told = report.merge.layers[name]
        assert told.lost == pytest.approx(float(gone.norm() / change.norm()), rel=0.01)
        assert told.relative_error == pytest.approx(float(error.norm() / (before + change).norm()), rel=0.01)
        assert told.relative_error < 2**-8
        lost, whole = lost + float(gone.square().sum()), whole + float(change.square().sum())
    assert report.merge.lost == pytest.approx((lost / whole) ** 0.5, rel=0.01)
    assert 0.001 < report.merge.lost < 0.25 and 0 < report.option_difference < 0.05
    told = json.loads((tmp_path / "out" / "export.json").read_text())
    assert told["merge"]["layers"][NAMES[3]]["lost"] == report.merge.layers[NAMES[3]].lost
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"rounding takes {100 * report.merge.lost:.3g} % of the adapter's change" in card
    assert f"by up to {report.option_difference:.2g}" in card


def scaled(own, size):
    phi = {name: value * size if ".mean.b" in name else value for name, value in own.phi.items()}
    return type(own)(own.base, phi, own.card)


def test_a_small_change_is_lost_and_that_is_said_or_refused(half, moods, tmp_path):
    report = export_adapter(scaled(half, 0.02), tmp_path / "small", "merged")
    assert report.merge.lost > 0.25
    (note,) = report.notes
    assert note.startswith(f"Rounding to bfloat16 takes {100 * report.merge.lost:.0f} %")
    with pytest.raises(
        Refused, match="in bfloat16 rounding takes the whole change: no weight moves; use --dtype float"
    ):
        export_adapter(scaled(half, 1e-20), tmp_path / "smaller", "merged")
    assert {path.name for path in tmp_path.iterdir()} == {"small"}
    assert export_adapter(scaled(moods, 0.02), tmp_path / "kept", "merged").merge.lost < 1e-3


def test_random_weights_can_be_merged(adapted, tmp_path):
    adapted.export(tmp_path / "out", "merged")
    questions = prompts(adapted.base, [(TEXTS[0], OPTIONS[0])])
    logits = next_logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out"), questions)
    found = logits[0, list(adapted.base.prompter.letter_ids[:2])].softmax(0).tolist()
    assert found == pytest.approx(list(adapted.predict(TEXTS[:1])[0].probabilities.values()), abs=1e-5)


def test_tied_embeddings_stay_tied(build_tiny, tmp_path):
    base = save_base(tmp_path / "base", tied=True)
    own = adapted_from(build_tiny, base, tmp_path / "run")
    own.export(tmp_path / "out", "merged")
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert found.config.tie_word_embeddings and found.lm_head.weight is found.model.embed_tokens.weight
    assert "lm_head.weight" not in load_file(tmp_path / "out" / "model.safetensors")
    before = load_file(f"{base}/model.safetensors")["model.embed_tokens.weight"]
    assert torch.equal(found.lm_head.weight, before)


def test_a_change_to_one_of_two_tied_weights_is_refused(moods):
    subject = Subject(moods)
    model = nn.Module()
    model.embed, model.head = nn.Embedding(5, 3), nn.Linear(3, 5, bias=False)
    model.head.weight = model.embed.weight
    subject.means = {"head": subject.means[NAMES[0]]}
    subject.base = type("Base", (), {"model": model, "config": moods.base.config})
    with pytest.raises(Refused, match="embed and head share one weight"):
        merged.check_merged(subject)


@pytest.mark.parametrize("name", ["model.embed_tokens.weight", f"{NAMES[4]}.weight"])
def test_a_tensor_that_is_not_written_right_is_found(name, moods, tmp_path, monkeypatch):
    load = AutoModelForCausalLM.from_pretrained

    def damaged(folder, **named):
        (file,) = [path for path in tmp_path.rglob("model.safetensors")]
        tensors = load_file(file)
        tensors[name][1, 1] += 1e-6
        save_file(tensors, file, {"format": "pt"})
        return load(folder, **named)

    monkeypatch.setattr(merged, "AutoModelForCausalLM", type("Damaged", (), {"from_pretrained": damaged}))
    with pytest.raises(Refused, match=f"loaded back, {name} and 0 more weights are not what was written"):
        moods.export(tmp_path / "out", "merged")
    assert not list(tmp_path.iterdir())
