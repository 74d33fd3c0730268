"""Adapters into a model and out again."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from abmll.adapters import BlobLinear, GaussianLoRALinear, LoRALinear, remove_adapters

LAYERS = {"gaussian": GaussianLoRALinear, "mean": LoRALinear, "blob": BlobLinear}


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_only_the_configured_modules_are_adapted(name, kind, make_model, inject):
    model = make_model(name)
    before = dict(model.named_modules())
    adapters = inject(model, kind, modules=("q_proj", "down_proj"))
    expected = [key for key in before if key.rsplit(".", 1)[-1] in ("q_proj", "down_proj")]
    assert len(expected) == 4 and list(adapters.layers) == expected
    for key, module in before.items():
        if key in expected:
            layer = model.get_submodule(key)
            assert type(layer) is LAYERS[kind] and layer.base is module and adapters.layers[key] is layer
        else:
            assert model.get_submodule(key) is module
    if kind != "mean":
        assert [layer.index for layer in adapters.layers.values()] == [0, 1, 2, 3]
        assert len({id(layer.context) for layer in adapters.layers.values()}) == 1


@pytest.mark.parametrize(("kind", "kinds"), [("gaussian", {"mean", "log_variance"}), ("mean", {"mean"})])
def test_parameters_have_the_documented_names_shapes_and_flags(kind, kinds, make_model, inject):
    model = make_model("qwen2")
    adapters = inject(model, kind, rank=3, modules=("v_proj",))
    names = {f"model.layers.{i}.self_attn.v_proj.{kind}.{factor}" for i in (0, 1) for kind in kinds for factor in "ab"}
    assert set(adapters.theta) == set(adapters.phi) == names
    shapes = {"a": (3, 48), "b": (24, 3)}
    assert all(parameter.shape == shapes[key[-1]] for key, parameter in adapters.theta.items())
    assert all(parameter.shape == (1, *shapes[key[-1]]) for key, parameter in adapters.phi.items())
    adapters.reset_phi(3)
    assert adapters.groups == 3
    for key, parameter in adapters.phi.items():
        assert parameter.shape == (3, *shapes[key[-1]])
        assert all(torch.equal(own, adapters.theta[key]) for own in parameter)
    adapters.reset_phi()
    ours = {id(parameter) for side in (adapters.theta, adapters.phi) for parameter in side.values()}
    assert {id(parameter) for parameter in model.parameters() if parameter.requires_grad} == ours
    assert adapters.num_parameters() == 2 * 2 * len(kinds) * 3 * (48 + 24)
    assert {id(p) for p in adapters.mean_phi} == {id(p) for key, p in adapters.phi.items() if ".mean." in key}


def test_an_unknown_kind_of_layers_is_refused(make_model, inject):
    with pytest.raises(ValueError, match="kind: True: no such layers"):
        inject(make_model(), True)


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ("q_porj", r"did you mean q_proj\?"),
        ("zzz", "no linear layer .*; known: .*down_proj"),
        ("lm_head", "the output layer cannot be adapted; leave it out"),
    ],
)
def test_an_unknown_module_is_refused_with_what_there_is(wrong, told, make_model, inject):
    model = make_model()
    with pytest.raises(ValueError, match=rf"adapters.modules: {wrong}: .*{told}"):
        inject(model, modules=("v_proj", wrong))
    assert not any(isinstance(module, GaussianLoRALinear) for module in model.modules())


def test_initialisation_is_a_function_of_the_seed_alone(make_model, inject):
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = inject(make_model(), seed=5)
    assert torch.equal(state, torch.get_rng_state())
    torch.manual_seed(2)
    same, other = inject(make_model(), seed=5), inject(make_model(), seed=6)
    for key, value in first.theta.items():
        assert torch.equal(value, same.theta[key])
        assert key.endswith(".b") or not torch.equal(value, other.theta[key])
    drawn = [value for key, value in first.theta.items() if key.endswith(".a")]
    assert not any(torch.equal(a, b) for i, a in enumerate(drawn) for b in drawn[i + 1 :] if a.shape == b.shape)


def test_b_is_zero_and_a_kaiming_uniform(make_model, inject):
    adapters = inject(make_model(), rank=16, modules=("q_proj", "down_proj"))
    for key, value in adapters.theta.items():
        if key.endswith(".b"):
            assert not value.any()
        else:
            reference = nn.init.kaiming_uniform_(torch.empty(2000, value.shape[1]), a=5**0.5)
            bound = value.shape[1] ** -0.5
            assert reference.abs().max() <= bound
            assert 0.98 * bound < value.abs().max() <= bound
            assert float(value.detach().std()) == pytest.approx(float(reference.std()), rel=0.1)


def test_phi_is_a_copy_of_theta_in_memory_of_its_own(make_model, inject):
    adapters = inject(make_model())
    for key, theta in adapters.theta.items():
        phi = adapters.phi[key]
        assert torch.equal(theta[None], phi) and theta.data_ptr() != phi.data_ptr()


def test_reset_writes_into_the_same_tensors_and_clears_gradients(make_model, inject):
    adapters = inject(make_model())
    before = {key: (value, value.data_ptr()) for key, value in adapters.phi.items()}
    for value in adapters.phi.values():
        value.data += 1.0
        value.grad = torch.ones_like(value)
    theta = {key: value.clone() for key, value in adapters.theta.items()}
    adapters.reset_phi()
    for key, (parameter, pointer) in before.items():
        assert adapters.phi[key] is parameter and parameter.data_ptr() == pointer
        assert parameter.grad is None
        assert torch.equal(parameter[0], theta[key]) and torch.equal(adapters.theta[key], theta[key])


@pytest.mark.parametrize("name", ["llama", "qwen2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_removal_restores_the_model_bit_for_bit(name, dtype, make_model, inject, input_ids):
    model = make_model(name, dtype)
    modules, weights = dict(model.named_modules()), {key: value.clone() for key, value in model.state_dict().items()}
    with torch.no_grad():
        plain = model(input_ids=input_ids).logits
        adapters = inject(model)
        assert torch.equal(model(input_ids=input_ids).logits, plain)  # B = 0: the mean is the base model
        for parameter in adapters.phi.values():
            parameter += 0.05
        assert not torch.equal(model(input_ids=input_ids).logits, plain)
        remove_adapters(model, adapters)
        assert torch.equal(model(input_ids=input_ids).logits, plain)
    assert dict(model.named_modules()) == modules
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())
    assert not any(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("kind", LAYERS)
def test_adapters_are_fp32_in_a_bf16_model(kind, make_model, inject, input_ids):
    model = make_model(dtype=torch.bfloat16)
    adapters = inject(model, kind)
    assert {p.dtype for side in (adapters.theta, adapters.phi) for p in side.values()} == {torch.float32}
    assert model.get_submodule("model.layers.0.self_attn.q_proj").base.weight.dtype == torch.bfloat16
    model(input_ids=input_ids).logits.sum().backward()
    assert {p.grad.dtype for p in adapters.mean_phi} == {torch.float32}


def test_load_theta_copies_and_resets_phi(make_model, inject):
    adapters, other = inject(make_model(), seed=0), inject(make_model(), seed=1)
    saved = {key: value + 0.5 for key, value in other.theta.items()}
    pointers = {key: value.data_ptr() for key, value in adapters.theta.items()}
    adapters.load_theta(saved)
    for key, value in saved.items():
        assert torch.equal(adapters.theta[key], value) and torch.equal(adapters.phi[key][0], value)
        assert adapters.theta[key].data_ptr() == pointers[key]


def test_load_theta_refuses_what_does_not_fit_and_changes_nothing(make_model, inject):
    adapters = inject(make_model(), rank=4)
    theta = {key: value.clone() for key, value in adapters.theta.items()}
    key = next(iter(theta))
    fewer = {k: v + 1 for k, v in theta.items() if k != key}
    reshaped = {k: v + 1 for k, v in theta.items()} | {key: torch.zeros(8, 64)}
    for wrong, count, named in (
        (fewer, 1, key),
        (fewer | {"other.a": theta[key]}, 2, key),
        (reshaped, 1, key),
        (inject(make_model(), rank=8).theta, len(theta), min(theta)),
    ):
        with pytest.raises(ValueError, match=f"adapters: {count} tensors do not fit this model, the first '{named}'"):
            adapters.load_theta(wrong)
        assert all(torch.equal(adapters.theta[k], v) for k, v in theta.items())
