"""The kernel benchmark's rivals compute what they say."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

CPU = torch.device("cpu")


@pytest.fixture
def parts(load):
    """The modules, and inputs of a configuration."""
    cases, contenders, loras = (load(f"kernel_{name}") for name in ("cases", "contenders", "loras"))

    def inputs(rank=8, groups=1, dtype="bf16", posterior="activation", outputs=16, columns=24):
        shape = cases.Shape("small", outputs, columns, bias=True)
        configuration = cases.Configuration(posterior, shape, rank, 6, dtype, groups)
        return configuration, cases.make_inputs(configuration, cases.ORDER_ONE, CPU)

    return SimpleNamespace(contenders=contenders, loras=loras, inputs=inputs, NotRun=load("kernel_contender").NotRun)


def outcome(contender) -> list[torch.Tensor]:
    outputs = contender.forward()
    return [*outputs, *contender.gradients(outputs)]


def relative(found: torch.Tensor, right: torch.Tensor) -> float:
    found, right = found.detach().double(), right.detach().double()
    return float((found - right).norm() / right.norm())


def test_lora_by_hand_is_pefts_layer_under_autocast(parts):
    """The same factors, roundings and gradients."""
    pytest.importorskip("peft")
    configuration, inputs = parts.inputs()
    ours, theirs = (parts.contenders.build(name, configuration, inputs) for name in ("lora", "peft_autocast"))
    with torch.no_grad():
        for factor, theirs_factor in zip(ours.sources[1:], theirs.sources[1:], strict=True):
            theirs_factor.copy_(factor)
    for found, right in zip(outcome(ours), outcome(theirs), strict=True):
        assert found.dtype == right.dtype and relative(found, right) < 2 * torch.finfo(torch.bfloat16).eps


@pytest.mark.parametrize("groups", [2, 3])
def test_grouped_products_are_lora_of_each_group(parts, groups):
    configuration, inputs = parts.inputs(groups=groups)
    ours, theirs = (parts.contenders.build(name, configuration, inputs) for name in ("lora", "grouped_mm"))
    assert theirs.not_captured and not ours.not_captured
    assert ours.sources[1].shape == (groups, 8, 24) and ours.sources[2].shape == (groups, 16, 8)
    for found, right in zip(outcome(theirs), outcome(ours), strict=True):
        assert found.shape == right.shape and relative(found, right) < 2 * torch.finfo(torch.bfloat16).eps


@pytest.mark.parametrize(
    ("what", "reason"),
    [
        ({"groups": 1}, "one group's products are plain ones"),
        ({"groups": 2, "dtype": "fp16"}, "takes bf16, not torch.float16"),
        ({"groups": 2, "rank": 4}, "multiples of 16 bytes, not r = 4"),
        ({"groups": 2, "columns": 20}, "multiples of 16 bytes, not K = 20"),
        ({"groups": 2, "outputs": 18}, "multiples of 16 bytes, not N = 18"),
    ],
)
def test_what_grouped_products_refuse_is_a_reason(parts, what, reason):
    with pytest.raises(parts.NotRun, match=reason):
        parts.contenders.build("grouped_mm", *parts.inputs(**what))


def test_without_peft_there_is_a_reason(parts, monkeypatch):
    monkeypatch.setattr(parts.loras.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(parts.NotRun, match=r"pip install peft\); `lora` stands in"):
        parts.contenders.build("peft_autocast", *parts.inputs())
    with pytest.raises(parts.NotRun, match="PEFT is not installed"):
        parts.contenders.build("peft", *parts.inputs(groups=2))


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("posterior", ["activation", "weight"])
def test_formulas_with_philox_are_plain_code(parts, posterior, groups):
    """`compiled` differs from `plain` in how it is run alone, `compiled_randn` in the noise as well."""
    configuration, inputs = parts.inputs(groups=groups, posterior=posterior, dtype="fp32")
    plain = parts.contenders.build("plain", configuration, inputs)
    formulas = parts.contenders._formulas(posterior, inputs, torch_noise=False)
    for found, right in zip(outcome(formulas), outcome(plain), strict=True):
        assert found.shape == right.shape and relative(found, right) < 1e-5
    (y, step), (right_y, right_step) = formulas.outer(), plain.outer()
    assert (y is None) == (right_y is None) == (posterior == "weight")
    for pair, right_pair in zip(step.gradient, right_step.gradient, strict=True):
        for found, right in zip(pair, right_pair, strict=True):
            assert relative(found, right) < 1e-5
    random = parts.contenders.build("plain_randn", configuration, inputs)
    assert not torch.equal(random.forward()[0], random.forward()[0])


@pytest.mark.parametrize("posterior", ["activation", "weight"])
def test_compiled_contenders_take_turns_without_compiling_again(parts, posterior, monkeypatch):
    configuration, inputs = parts.inputs(posterior=posterior)
    counter, compile_ = CompileCounterWithBackend("eager"), torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **options: compile_(function, backend=counter, **options))
    torch.compiler.reset()
    both = [parts.contenders.build(name, configuration, inputs) for name in ("compiled", "compiled_randn")]
    for contender in both:
        outcome(contender)
    assert counter.frame_count == 2
    for contender in both * 2:
        outcome(contender)
    assert counter.frame_count == 2


def test_the_noises_names_are_made_before_the_call(parts, monkeypatch):
    """Their copy to the device cannot be captured in a graph, and is made once a forward pass of all layers."""
    fused = parts.contenders.build("fused", *parts.inputs())
    noise_key = parts.contenders.NoiseKey
    monkeypatch.setattr(noise_key, "rows", lambda *_: pytest.fail("made in the measured call"))
    fused.gradients(fused.forward())
    fused.outer()
