"""A 4-bit base: what is quantized, that it computes what its unpacked weights do, and that it can be trained on."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from abmll.adapters import GaussianLoRALinear, LoRALinear, base_dtype, inject_adapters, remove_adapters
from abmll.config.schema import AdapterConfig, MethodConfig, ModelConfig
from abmll.kernels import Groups, NoiseKey
from abmll.kernels.backends import interpreted
from abmll.models import quantization
from abmll.models.load import describe, load_model
from abmll.models.quantization import PackedLinear, check_quantization, num_parameters, pack_shapes, weight_bytes

bitsandbytes = pytest.importorskip("bitsandbytes", reason="pip install -e '.[quantization]'")
pytest.importorskip("accelerate")

CPU = torch.device("cpu")
DTYPES = pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
NF4 = ModelConfig(name="random:tiny", quantization="nf4")


def load(name: str = "random:tiny", dtype: str = "bfloat16", quantization: str = "nf4"):
    return load_model(ModelConfig(name=name, dtype=dtype, quantization=quantization), CPU)[0]


def unpacked(layer: nn.Linear) -> Tensor:
    return bitsandbytes.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)


def dense_twin(layer: nn.Linear) -> nn.Linear:
    """An ordinary layer of the numbers that the packed ones stand for."""
    twin = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, dtype=layer.compute_dtype)
    twin.weight = nn.Parameter(unpacked(layer), requires_grad=False)
    twin.bias = layer.bias
    return twin


@DTYPES
def test_the_layers_in_between_are_quantized_and_nothing_else(dtype):
    model, dense = load(dtype=dtype), load(dtype=dtype, quantization="none")
    wide = getattr(torch, dtype)
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear) or name == "lm_head":
            continue
        assert type(module) is bitsandbytes.nn.Linear4bit and base_dtype(module) == wide, name
        assert module.weight.quant_state.quant_type == "nf4" and module.weight.quant_state.nested
        numbers = dense.get_submodule(name).weight
        # the worst of 16 levels in a block: half of NF4's widest gap, 0.304, of the block's largest number; the
        # maxima's own 8 bits and the dtype's rounding add little
        largest = numbers.reshape(-1, quantization.BLOCK).abs().amax(dim=1).max()
        assert 0 < (unpacked(module) - numbers).abs().max() < 0.16 * largest
    assert type(model.lm_head) is nn.Linear and torch.equal(model.lm_head.weight, dense.lm_head.weight)
    assert torch.equal(model.model.embed_tokens.weight, dense.model.embed_tokens.weight)
    assert {p.dtype for p in model.parameters()} == {torch.uint8, wide}
    assert not any(parameter.requires_grad for parameter in model.parameters()) and not model.training


@DTYPES
def test_a_folder_through_transformers_is_the_same_model(dtype, tmp_path, no_network):
    dense, tokenizer = load_model(ModelConfig(name="random:tiny", dtype=dtype), CPU)
    dense.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    found, right = load(str(tmp_path), dtype).state_dict(), load(dtype=dtype).state_dict()
    assert no_network == [] and found.keys() == right.keys()
    assert all(torch.equal(value, right[name]) for name, value in found.items())


@DTYPES
def test_a_packed_layer_is_its_dense_twin(dtype):
    layer = load(dtype=dtype).model.layers[0].self_attn.q_proj
    x = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(0)).to(getattr(torch, dtype)).requires_grad_(True)
    y, expected = layer(x), dense_twin(layer)(x)
    assert torch.equal(y, expected)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y.dtype)
    assert torch.equal(*(torch.autograd.grad(of, x, dy)[0] for of in (y, expected)))


def adapted(model, posterior="activation", kind="gaussian", backend="torch"):
    adapters = AdapterConfig(posterior=posterior, log_variance_offset=-4.0, backend=backend)
    found = inject_adapters(model, adapters, MethodConfig(), kind, seed=0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for side in (found.theta, found.phi):
            for value in side.values():
                value += 0.05 * torch.randn(value.shape, generator=generator)
    return found


@DTYPES
@pytest.mark.parametrize("posterior", ["activation", "weight", None])
def test_adapters_on_packed_layers_are_those_on_their_dense_twins(posterior, dtype):
    """Logits and KL bit for bit, in a sampled pass of one and two groups and at the mean.

    Gradients up to rounding: x's parts meet in another order.
    """
    model = load(dtype=dtype)
    twin = copy.deepcopy(model)
    for name, module in list(model.named_modules()):
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            twin.set_submodule(name, dense_twin(module))
    ids = torch.randint(200, (2, 9), generator=torch.Generator().manual_seed(0))
    key = NoiseKey(3, 1) if posterior else None
    values, gradients = [], []
    for one in (model, twin):
        adapters = adapted(one, posterior or "activation", kind="mean" if posterior is None else "gaussian")
        for groups in (1, 2):
            rows = Groups.of([ids.numel() // groups] * groups, "cpu")
            with adapters.context.forward_pass(key, kl=True, groups=rows, slot=0) as terms:
                logits = one(input_ids=ids).logits
            loss = logits.float().square().mean() + (1e-3 * terms.total_kl().sum() if posterior else 0.0)
            values.append((logits.detach(), loss.detach()))
            loss.backward()
        gradients.append([parameter.grad for parameter in adapters.phi.values()])
    for found, right in zip(values[:2], values[2:], strict=True):
        assert all(torch.equal(one, other) for one, other in zip(found, right, strict=True))
    bound = 4 * torch.finfo(getattr(torch, dtype)).eps
    for found, right in zip(*gradients, strict=True):
        assert right.norm() > 0 and (found - right).norm() < bound * right.norm()


@pytest.mark.skipif(not interpreted(), reason="a base on the CPU, where the kernels run in Triton's interpreter alone")
def test_fused_kernels_on_packed_layers(build_tiny):
    """A step of phi through the kernels is the plain one's, to fp32's accuracy."""
    found = []
    for backend in ("triton", "torch"):
        adapters = {"backend": backend, "modules": ("v_proj",), "rank": 2}
        run = build_tiny(model={"quantization": "nf4"}, adapters=adapters, tasks={"batch_size": 1}).scatter()
        assert type(next(iter(run.adapters.layers.values())).base) is bitsandbytes.nn.Linear4bit
        logits, terms = run.learner.forward(run.batch, run.keys[0], "kl")
        (run.learner.nll(logits, run.batch) + 1e-4 * terms.total_kl()).backward()
        found.append({"logits": logits.detach()} | {name: p.grad for name, p in run.adapters.phi.items()})
    for name, value in found[0].items():
        right = found[1][name]
        torch.testing.assert_close(value, right, rtol=1e-4, atol=1e-5 * float(right.abs().max()), msg=name)


def test_removal_restores_the_packed_layers():
    model = load()
    before = dict(model.named_modules())
    adapters = adapted(model)
    assert all(type(layer) is GaussianLoRALinear for layer in adapters.layers.values())
    remove_adapters(model, adapters)
    assert dict(model.named_modules()) == before
    assert all(type(layer) is LoRALinear for layer in adapted(model, kind="mean").layers.values())


def test_calls_without_a_gradient_leave_the_weights_trainable():
    """bitsandbytes repacks the weights of an evaluated layer on some CPUs: they have no derivative then."""
    layer = load().eval().model.layers[0].self_attn.q_proj
    before = layer.weight.detach().clone()
    with torch.no_grad():
        layer(torch.ones(3, 64, dtype=torch.bfloat16))
    assert torch.equal(layer.weight, before) and not getattr(layer.weight.quant_state, "packing_format_for_cpu", False)
    x = torch.ones(3, 64, dtype=torch.bfloat16, requires_grad=True)
    assert layer(x).requires_grad


def test_what_is_refused(monkeypatch):
    check_quantization(ModelConfig(name="random:tiny"), CPU)
    state = torch.get_rng_state()
    check_quantization(NF4, CPU)
    assert torch.equal(state, torch.get_rng_state())
    monkeypatch.setattr(quantization, "_quantized", lambda *_: 1 / 0)
    check_quantization(ModelConfig(name="random:tiny"), CPU)
    with pytest.raises(ValueError, match=r"^model\.quantization: 'nf4': bitsandbytes does not run on cpu here \(div"):
        load()
    for package in ("bitsandbytes", "accelerate"):
        with monkeypatch.context() as patch:
            patch.setattr(quantization, f"is_{package}_available", lambda: False)
            with pytest.raises(ValueError, match=r"needs bitsandbytes and accelerate; run: pip install"):
                load()


def test_sizes():
    model, dense = load(), load(quantization="none")
    assert num_parameters(model) == num_parameters(dense) == sum(p.numel() for p in dense.parameters())
    line = describe(ModelConfig(name="random:llama3-8b", quantization="nf4"))
    assert "8,030.3 M parameters, 5.70 GB in nf4 and bfloat16" in line


# shapes alone


def test_packed_shapes_are_those_of_the_real_thing():
    real, shapes = load(), load(quantization="none")
    pack_shapes(shapes, torch.bfloat16)
    packed = {name: module for name, module in shapes.named_modules() if isinstance(module, PackedLinear)}
    assert list(packed) == [n for n, module in real.named_modules() if isinstance(module, bitsandbytes.nn.Linear4bit)]
    kept = 0
    for name, module in real.named_parameters():
        twin = shapes.get_parameter(name)
        assert (twin.shape, twin.dtype) == (module.shape, module.dtype), name
        kept += module.nbytes
        if name.removesuffix(".weight") in packed:
            state, own = module.quant_state, packed[name.removesuffix(".weight")]
            for one, other in ((state.absmax, own.absmax), (state.state2.absmax, own.nested_absmax)):
                assert (one.shape, one.dtype) == (other.shape, other.dtype)
            of_state = (state.absmax, state.state2.absmax, state.code, state.state2.code, state.offset)
            kept += sum(tensor.nbytes for tensor in of_state)
    assert weight_bytes(shapes) == kept and num_parameters(shapes) == num_parameters(real)


def test_packed_layers_run_on_fake_tensors_and_keep_nothing():
    model = load(quantization="none")
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = mode.from_tensor(torch.ones(2, 5, 64, dtype=torch.bfloat16)).requires_grad_(True)
        layer = PackedLinear(model.model.layers[0].mlp.gate_proj, torch.bfloat16)
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(saved.append, lambda kept: kept):
            y = layer(fake)
        assert y.shape == (2, 5, 128) and y.dtype == torch.bfloat16 and saved == []
        (dx,) = torch.autograd.grad(y.sum(), fake)
        assert dx.shape == fake.shape and dx.dtype == fake.dtype


def test_an_adapted_model_of_packed_shapes_takes_a_step():
    """As a count of memory builds it: no weight is read, and the adapters see what they would."""
    model = load(quantization="none")
    pack_shapes(model, torch.bfloat16)
    adapters = adapted(model)
    assert {base_dtype(layer.base) for layer in adapters.layers.values()} == {torch.bfloat16}
    ids = torch.zeros(2, 9, dtype=torch.long)
    with adapters.context.forward_pass(NoiseKey(3, 1), torch.ones_like(ids, dtype=torch.bool), kl=True) as terms:
        (model(input_ids=ids).logits.sum() + terms.total_kl()).backward()
    assert all(parameter.grad is not None for parameter in adapters.phi.values())
