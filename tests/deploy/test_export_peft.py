"""PEFT's files: what is in them, that PEFT makes the adapter's predictions of them, and what is refused."""

import importlib.util
import json
from types import SimpleNamespace

import pytest
import torch
from deployed import OPTIONS, TEXTS, prompts, save_run
from exported import adapted_from
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

from abmll import MetaModel
from abmll.config import Refused
from abmll.deploy.export import export_adapter, peft
from abmll.deploy.export.subject import Subject, next_logits
from abmll.summary import save_summary

PeftModel = pytest.importorskip("peft", reason="pip install -e '.[export]'").PeftModel

KINDS = {
    "activation": {},
    "weight": {"adapters": {"posterior": "weight"}},
    "lora": {"method": {"name": "lora"}},
    "reptile": {"method": {"name": "reptile"}},
    "blob": {"method": {"name": "blob"}},
}


def probabilities(model, own, texts):
    """Of the options, by a model that knows nothing of this package."""
    logits = next_logits(model, prompts(own.base, [(text, OPTIONS[0]) for text in texts]))
    return logits[:, list(own.base.prompter.letter_ids[:2])].double().softmax(dim=1)


def test_the_files(moods, base, tmp_path):
    assert moods.export(tmp_path / "out") == tmp_path / "out"
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "README.md", "adapter_config.json", "adapter_model.safetensors", "export.json", "manifest.json",
    }  # fmt: skip
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    layers = [f"model.layers.{n}.self_attn.{name}" for n in (0, 1) for name in ("q_proj", "v_proj", "o_proj")]
    sides = {"lora_A": "a", "lora_B": "b"}
    assert set(tensors) == {f"base_model.model.{layer}.{side}.weight" for layer in layers for side in sides}
    for layer in layers:
        for side, own in sides.items():
            assert torch.equal(tensors[f"base_model.model.{layer}.{side}.weight"], moods.phi[f"{layer}.mean.{own}"])
    assert tensors[f"base_model.model.{layers[1]}.lora_A.weight"].shape == (8, 64)
    assert tensors[f"base_model.model.{layers[1]}.lora_B.weight"].shape == (32, 8)  # v has two heads of 16
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text()) == {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "revision": None,
        "inference_mode": True,
        "r": 8,
        "lora_alpha": 16,
        "lora_dropout": 0.0,
        "target_modules": ["o_proj", "q_proj", "v_proj"],
        "bias": "none",
        "fan_in_fan_out": False,
        "modules_to_save": None,
        "init_lora_weights": True,
    }
    assert type(json.loads((tmp_path / "out" / "adapter_config.json").read_text())["lora_alpha"]) is int


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", KINDS)
def test_peft_predicts_what_the_adapter_does(kind, dtype, build_tiny, base, tmp_path):
    # a scale that is no power of two: the products come in another order than ours
    sections = {**KINDS[kind], "adapters": {"alpha": 13.0, "rank": 6, **KINDS[kind].get("adapters", {})}}
    own = adapted_from(build_tiny, base, tmp_path / "run", dtype=dtype, **sections)
    before = own.predict(TEXTS)
    report = export_adapter(own, tmp_path / "out")
    assert 0 <= report.difference <= report.tolerance < report.effect
    assert report.tolerance < (1e-4 if dtype == "float32" else 0.3)
    assert own.predict(TEXTS) == before, "the model in use is as it was"
    loaded = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base, dtype=getattr(torch, dtype)), tmp_path / "out"
    )
    found = probabilities(loaded, own, TEXTS)
    expected = torch.tensor([list(one.probabilities.values()) for one in before])
    assert (found - expected).abs().max() < (1e-5 if dtype == "float32" else 0.02)
    assert (probabilities(loaded.unload(), own, TEXTS) - expected).abs().max() > 0.05, "the base says otherwise"
    card = (tmp_path / "out" / "README.md").read_text()
    assert "--max-lora-rank 8 " in card, "vLLM's next above 6"
    assert ("its variance is dropped" in card) == (kind in ("activation", "weight", "blob"))


@pytest.mark.parametrize("format", ["peft", "merged", "safetensors"])
def test_an_adapter_that_changes_nothing_is_refused(format, build_tiny, base, tmp_path):
    tiny = build_tiny(model={"name": base})
    facts = {"config": tiny.config.model_dump(mode="json"), "step": 0}
    save_summary(tmp_path / "run" / "final", tiny.adapters.theta, facts)
    theta = MetaModel.load(tmp_path / "run", device="cpu").unadapted(OPTIONS)
    with pytest.raises(Refused, match="changes nothing, as B is zero in all of its 6 layers"):
        theta.export(tmp_path / "out", format)
    assert {path.name for path in tmp_path.iterdir()} == {"run"}


def test_numbers_that_are_not_finite_are_refused(moods, tmp_path):
    phi = {name: value.clone() for name, value in moods.phi.items()}
    phi["model.layers.1.self_attn.q_proj.mean.a"][3, 5] = float("nan")
    with pytest.raises(Refused, match=r"moods: model\.layers\.1\.self_attn\.q_proj\.mean\.a .* not finite"):
        type(moods)(moods.base, phi, moods.card).export(tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_tensor_that_is_not_written_right_is_found(moods, tmp_path, monkeypatch):
    name = "base_model.model.model.layers.1.self_attn.o_proj.lora_B.weight"

    def damage(path, tensors, metadata):
        wrong = tensors[name].clone()
        wrong[2, 1] = -wrong[2, 1]
        save_file({**tensors, name: wrong}, path, metadata)

    monkeypatch.setattr(peft, "write_tensors", damage)
    with pytest.raises(Refused, match=r"model\.layers\.1\.self_attn\.o_proj does not hold"):
        moods.export(tmp_path / "out")
    monkeypatch.setattr(peft, "write_tensors", lambda p, t, m: save_file({k: t[k] for k in t if k != name}, p, m))
    with pytest.raises(Refused, match=r"model\.layers\.1\.self_attn\.o_proj does not hold"):
        moods.export(tmp_path / "out")
    assert not list(tmp_path.iterdir()), "nothing is left"


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"lora_alpha": 17}, "does not compute what the adapter does"),
        ({"use_rslora": True}, "does not compute what the adapter does"),
        ({"target_modules": ["q_proj", "v_proj"]}, r"layers\.0\.self_attn\.o_proj and 1 more are adapted on one side"),
        ({"target_modules": ["q_proj", "v_proj", "o_proj", "k_proj"]}, r"k_proj and 1 more are adapted on one side"),
    ],
)
def test_a_configuration_that_means_something_else_is_found(wrong, message, moods, tmp_path, monkeypatch):
    right = peft.peft_config
    monkeypatch.setattr(peft, "peft_config", lambda subject: {**right(subject), **wrong})
    with pytest.raises(Refused, match=message):
        moods.export(tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_an_adapter_that_is_loaded_and_not_used_is_found(moods, tmp_path, monkeypatch):
    """What serves the base without a word: every layer computes the right thing when it is asked, and is not asked."""
    load = PeftModel.from_pretrained.__func__

    def unused(cls, model, folder):
        loaded = load(cls, model, folder)
        plain = AutoModelForCausalLM.from_pretrained(moods.base.config.model.name, dtype=torch.float32)
        plain.set_attn_implementation("sdpa")
        loaded.forward = plain.forward
        return loaded

    monkeypatch.setattr(PeftModel, "from_pretrained", classmethod(unused))
    with pytest.raises(Refused, match="no nearer to its own than to the base's"):
        moods.export(tmp_path / "out")


def test_a_change_that_rounding_swallows_is_refused(build_tiny, base, tmp_path):
    own = adapted_from(build_tiny, base, tmp_path / "run", dtype="bfloat16")
    phi = {name: value * 1e-20 if ".mean.b" in name else value for name, value in own.phi.items()}
    with pytest.raises(Refused, match=r"in bfloat16 it changes no more than rounding does; .* use --dtype float32"):
        type(own)(own.base, phi, own.card).export(tmp_path / "out")


def test_whole_names_where_endings_reach_other_modules(moods):
    subject = Subject(moods)
    assert peft.target_modules(subject) == ["o_proj", "q_proj", "v_proj"]
    model = nn.Module()
    model.tower = nn.Module()
    model.tower.q_proj = nn.Embedding(3, 2)
    model.self_attn = nn.Module()
    model.self_attn.q_proj = nn.Linear(2, 2)
    config = SimpleNamespace(adapters=SimpleNamespace(modules=("q_proj",)))
    stub = SimpleNamespace(base=SimpleNamespace(model=model, config=config), means={"self_attn.q_proj": None})
    assert peft.target_modules(stub) == ["self_attn.q_proj"]


def test_a_base_whose_own_class_is_another_is_noted(moods, base, tmp_path, monkeypatch):
    """vLLM may load that class, whose layers have other names."""
    architecture = SimpleNamespace(architectures=["TinyForConditionalGeneration"])
    monkeypatch.setattr(peft, "model_config", lambda config: architecture)
    (note,) = [note for note in export_adapter(moods, tmp_path / "out").notes if "without a word" in note]
    assert "TinyForConditionalGeneration" in note and "LlamaForCausalLM" in note
    assert "TinyForConditionalGeneration" in (tmp_path / "out" / "README.md").read_text()


def test_the_layers_bound_covers_rounding_and_little_more(moods):
    """Of the same product in fp64, and with its numbers changed by a hundredth."""
    subject, name = Subject(moods), "model.layers.0.self_attn.q_proj"
    layer, mean = moods.base.adapters.layers[name].base, subject.means[name]
    x = torch.randn(50, 64, generator=torch.Generator().manual_seed(1))
    exact = layer(x).double() + 2 * (x.double() @ mean.a.double().mT) @ mean.b.double().mT
    bound = peft.layer_bound(subject, layer, name, x, exact.float())
    found = layer(x) + 2 * ((x @ mean.a.mT) @ mean.b.mT)
    assert ((found - exact).abs() <= bound).all()
    changed = layer(x).double() + 2.02 * (x.double() @ mean.a.double().mT) @ mean.b.double().mT
    assert ((changed - exact).abs() > bound).double().mean() > 0.9


def test_without_peft_the_command_is_named(moods, tmp_path, monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "peft" else find_spec(name))
    with pytest.raises(Refused, match=r"run: pip install -e '\.\[export\]'"):
        moods.export(tmp_path / "out")


def test_random_weights_have_no_name_for_others(adapted, tmp_path):
    with pytest.raises(Refused, match="random:tiny is random weights, which nobody else can load; use --format merged"):
        adapted.export(tmp_path / "out")


def test_a_quantized_base(build_tiny, base, tmp_path):
    pytest.importorskip("bitsandbytes", reason="pip install -e '.[quantization]'")
    pytest.importorskip("accelerate")
    own = adapted_from(build_tiny, base, tmp_path / "run", dtype="bfloat16", model={"quantization": "nf4"})
    report = export_adapter(own, tmp_path / "out")
    assert report.difference < report.effect
    assert any("quantized (nf4)" in note for note in report.notes)
    with pytest.raises(Refused, match=r"model\.quantization: 'nf4': packed weights .* use --format peft"):
        own.export(tmp_path / "merged", "merged")


def test_theta_itself(build_tiny, base, tmp_path):
    run = save_run(build_tiny(seed=3, model={"name": base}), tmp_path / "run")
    theta = MetaModel.load(run, device="cpu")
    theta.unadapted(OPTIONS).export(tmp_path / "out")
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    for name, value in tensors.items():
        layer, side = name.removeprefix("base_model.model.").rsplit(".lora_", 1)
        assert torch.equal(value, theta.base.adapters.theta[f"{layer}.mean.{side[0].lower()}"].detach())
    assert "a start for adapting to a task" in (tmp_path / "out" / "README.md").read_text()
