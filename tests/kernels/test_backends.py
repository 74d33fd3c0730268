"""Which backend runs, what the call refuses, and how it says so: argument, value and remedy."""

from __future__ import annotations

import logging
import sys
from dataclasses import replace

import pytest
import torch

from abmll.kernels import GaussianFactors, LowRank, NoiseKey, backends, resolve, standard_normal
from abmll.kernels.noise import check_noise_size

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
FP32 = torch.float32


@pytest.fixture
def fresh():
    """No decision from before, and none left behind."""
    caches = (backends._choose, backends._hardware_obstacle, backends._interpreter_obstacle, backends.interpreted)
    for function in caches:
        function.cache_clear()
    yield
    for function in caches:
        function.cache_clear()


@pytest.fixture
def compiled(fresh, monkeypatch):
    """As in a process whose kernels are compiled."""
    monkeypatch.setattr(backends, "interpreted", lambda: False)


@pytest.fixture
def supported(compiled, monkeypatch):
    """As on a GPU that the kernels support."""
    monkeypatch.setattr(backends, "_device_obstacle", lambda device: None)


@pytest.mark.parametrize("posterior", ["activation", "weight"])
def test_auto_takes_triton_on_a_supported_gpu(supported, posterior):
    for dtype in (FP32, torch.float16, torch.bfloat16):
        for rank in (1, 64):
            assert resolve("auto", posterior, GPU, dtype, rank)[0] == "triton"
    assert resolve("auto", posterior, GPU, torch.float64, 8) == (
        "torch",
        "x: dtype torch.float64: the kernels take torch.bfloat16, torch.float16, torch.float32",
    )
    assert resolve("auto", posterior, GPU, FP32, 65) == ("torch", "rank: 65: the kernels take 1 to 64")
    assert resolve("torch", posterior, GPU, FP32, 8)[0] == "torch"


def test_auto_never_takes_the_interpreter(fresh, monkeypatch):
    monkeypatch.setattr(backends, "interpreted", lambda: True)
    monkeypatch.setattr(backends, "_interpreter_obstacle", lambda: None)  # whatever this numpy is
    choice, reason = resolve("auto", "activation", CPU, FP32, 8)
    assert choice == "torch" and "interpreter is for tests only" in reason
    assert resolve("triton", "activation", CPU, FP32, 8)[0] == "triton"


def test_an_interpreter_that_its_numpy_breaks_is_refused(fresh, monkeypatch):
    monkeypatch.setattr(backends, "interpreted", lambda: True)
    for triton_version, numpy_version, works in (
        ("3.6.0", "2.3.5", True),
        ("3.7.0", "2.4.0", True),
        ("3.6.0", "2.4.0", False),
    ):
        monkeypatch.setattr("triton.__version__", triton_version)
        monkeypatch.setattr("numpy.__version__", numpy_version)
        backends._interpreter_obstacle.cache_clear()
        if works:
            assert resolve("triton", "activation", CPU, FP32, 8)[0] == "triton"
        else:
            with pytest.raises(ValueError, match=r"numpy 2.4.0: the interpreter of triton 3.6.0 needs .* 'numpy<2.4'"):
                resolve("triton", "activation", CPU, FP32, 8)


def test_auto_takes_torch_on_a_cpu(compiled):
    choice, reason = resolve("auto", "activation", CPU, FP32, 8)
    assert choice == "torch" and "device cpu: the kernels need an NVIDIA GPU" in reason


@pytest.mark.parametrize(("capability", "enough"), [((7, 5), False), ((8, 0), True), ((9, 0), True), ((10, 3), True)])
def test_compute_capability(compiled, monkeypatch, capability, enough):
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    choice, reason = resolve("auto", "activation", GPU, FP32, 8)
    assert choice == ("triton" if enough else "torch")
    assert enough or "compute capability 7.5: the kernels need 8.0" in reason


def test_a_gpu_without_cuda_is_none(compiled, monkeypatch):
    """AMD's GPUs call themselves cuda too."""
    monkeypatch.setattr(torch.version, "cuda", None)
    assert resolve("auto", "activation", GPU, FP32, 8)[0] == "torch"


def test_without_triton(compiled, monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    choice, reason = resolve("auto", "activation", GPU, FP32, 8)
    assert choice == "torch" and reason == "triton is not installed; pip install triton"
    with pytest.raises(ValueError, match="backend: 'triton': triton is not installed; pip install triton"):
        resolve("triton", "activation", GPU, FP32, 8)


def test_the_choice_is_logged_once_for_each_kind_of_input(fresh, activation, caplog):
    caplog.set_level(logging.INFO, "abmll.kernels")
    inputs = activation.inputs(tokens=2, inputs=3, outputs=2).map(lambda t: t.to(CPU))
    for _ in range(3):
        activation.project(inputs, "auto")
    (record,) = caplog.records
    assert record.levelno == logging.INFO
    for part in ("backend auto: torch", "activation posterior", "torch.float32", "rank 3", "on cpu"):
        assert part in record.getMessage()
    activation.project(inputs.map(torch.Tensor.double), "auto")
    assert len(caplog.records) == 2


def test_auto_on_a_cpu_runs_the_plain_version(harness):
    inputs = harness.inputs(tokens=2, inputs=3, outputs=2).map(lambda t: t.to(CPU))
    found, plain = harness.project(inputs, "auto"), harness.project(inputs, "torch")
    assert all(torch.equal(value, right) for value, right in zip(found[:3], plain[:3], strict=True))


@pytest.mark.parametrize("posterior", ["activation", "weight"])
@pytest.mark.parametrize(
    ("device", "dtype", "rank", "message"),
    [
        (GPU, torch.float64, 8, "x: dtype torch.float64: the kernels take torch.bfloat16, torch.float16, torch.float"),
        (GPU, torch.int64, 8, "x: dtype torch.int64"),
        (GPU, FP32, 65, "rank: 65: the kernels take 1 to 64"),
        (GPU, FP32, 0, "rank: 0: the kernels take 1 to 64"),
        (CPU, FP32, 8, "device cpu: the kernels need an NVIDIA GPU"),
    ],
)
def test_triton_that_cannot_run_is_refused(compiled, monkeypatch, posterior, device, dtype, rank, message):
    with pytest.raises(ValueError, match=rf"^backend: 'triton': {message}.*; or set backend: auto$"):
        resolve("triton", posterior, device, dtype, rank)


def test_an_unknown_backend_is_refused(harness):
    inputs = harness.inputs(tokens=2, inputs=3, outputs=2)
    for name in ("cuda", "Triton", None):
        with pytest.raises(ValueError, match=f"backend: {name!r}: must be auto, triton or torch"):
            harness.project(inputs, name)


def wrong_pair(side: GaussianFactors, change) -> GaussianFactors:
    return GaussianFactors(side.mean, LowRank(*map(change, side.log_variance)))


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": lambda x: x[0]}, r"x: shape \(6,\): must be \[tokens, 6\]"),
        ({"x": lambda x: x[:, :5]}, r"x: shape \(4, 5\): .*6 columns"),
        ({"x": lambda x: x.bfloat16()}, r"x: dtype torch.bfloat16: the weight is torch.float32; convert one, or run"),
        ({"weight": lambda w: w.double()}, r"x: dtype torch.float32: the weight is torch.float64"),
        ({"bias": lambda b: b[:1]}, r"bias: torch.float32 \(1,\): must be torch.float32 \(5,\)"),
        ({"bias": lambda b: b.double()}, r"bias: torch.float64 \(5,\)"),
        ({"phi": lambda p: wrong_pair(p, lambda f: f[:2])}, r"phi log_variance: a \(2, 6\), b \(2, 3\): for a weight"),
        ({"phi": lambda p: wrong_pair(p, torch.Tensor.bfloat16)}, r"phi log_variance: a torch.bfloat16, b torch.bf"),
        ({"theta": lambda p: wrong_pair(p, torch.Tensor.double)}, r"theta log_variance: a torch.float64"),
        ({"theta": lambda p: p.expand(2)}, r"theta mean: a \(2, 3, 6\)"),
        ({"phi": lambda p: p.expand(2)}, r"x: shape \(4, 6\): must be \[2, tokens, 6\], as phi has groups"),
        ({"x": lambda x: x.expand(3, 4, 6), "phi": lambda p: p.expand(2)}, r"x: shape \(3, 4, 6\): must be \[2, tok"),
        ({"x": lambda x: x.expand(0, 4, 6), "phi": lambda p: p.expand(0)}, r"x: shape \(0, 4, 6\): at least one group"),
        ({"x": lambda x: x[:, :0], "weight": lambda w: w[:, :0]}, r"x: shape \(4, 0\): at least one"),
        ({"weight": lambda w: w[:0]}, r"weight: \(0, 6\) on .*: must have rows"),
        ({"weight": lambda w: w.to("meta")}, r"weight: \(5, 6\) on meta: must .* be on"),
        ({"phi": lambda p: wrong_pair(p, lambda f: f.to("meta"))}, r"phi log_variance: on meta, meta: must be on"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(harness, backend, change, message):
    inputs = harness.inputs(tokens=4, inputs=6, outputs=5)
    changed = replace(inputs, **{name: function(getattr(inputs, name)) for name, function in change.items()})
    with pytest.raises(ValueError, match=f"^{message}"):
        harness.project(changed, backend)


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_masks_that_do_not_fit_are_refused(activation, backend):
    inputs = activation.inputs(tokens=4, inputs=6, outputs=5)
    for shape in ((5,), (1, 4), (4, 1)):
        mask = torch.ones(shape, dtype=torch.bool, device=activation.device)
        for call in (activation.project, activation.theta):
            with pytest.raises(ValueError, match=r"^token_mask: shape .*: must be x's without the last"):
                call(inputs, backend, mask)


def test_masks_that_are_no_choice_are_refused(activation):
    inputs = activation.inputs(tokens=4, inputs=6, outputs=5)
    with pytest.raises(ValueError, match=r"^token_mask: dtype torch.float32: must be torch.bool"):
        activation.project(inputs, mask=torch.ones(4, device=activation.device))


def test_unknown_choices_are_refused(activation):
    inputs = activation.inputs(tokens=4, inputs=6, outputs=5)
    with pytest.raises(ValueError, match=r"^terms: 'kl': must be one of none, divergence, theta"):
        activation.project(inputs, terms="kl")
    unknown = replace(activation, posterior="activations")
    for call in (unknown.project, unknown.theta):
        with pytest.raises(ValueError, match=r"^posterior: 'activations': must be one of activation, weight"):
            call(inputs)


@pytest.mark.parametrize("name", ["weight", "bias"])
def test_a_base_layer_that_is_trained_is_refused(harness, name):
    """Its gradient would silently be missing."""
    inputs = harness.inputs(tokens=4, inputs=6, outputs=5)
    getattr(inputs, name).requires_grad_(True)
    with pytest.raises(ValueError, match=r"^weight, bias: require a gradient: the base layer is frozen"):
        harness.project(inputs)
    with torch.no_grad():
        harness.project(inputs)


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_theta_gradient_refuses_what_the_projection_does(activation, backend):
    inputs = activation.inputs(tokens=4, inputs=6, outputs=5)
    with pytest.raises(ValueError, match=r"^x: shape \(4, 5\)"):
        activation.theta(replace(inputs, x=inputs.x[:, :5]), backend)
    with pytest.raises(ValueError, match=r"^phi log_variance: a \(2, 6\)"):
        activation.theta(replace(inputs, phi=wrong_pair(inputs.phi, lambda factor: factor[:2])), backend)
    with pytest.raises(ValueError, match=r"^theta log_variance: a torch.float64"):
        activation.theta(replace(inputs, theta=wrong_pair(inputs.theta, torch.Tensor.double)), backend)


@pytest.mark.parametrize("dtype", [torch.float64, torch.int64])
def test_unsupported_dtypes_are_refused_by_the_call(harness, dtype):
    inputs = harness.inputs(tokens=2, inputs=3, outputs=2).map(torch.Tensor.double)
    if dtype == torch.int64:
        inputs = replace(inputs, x=inputs.x.long(), weight=inputs.weight.long(), bias=None)
        factors = inputs.map(torch.Tensor.float)
        inputs = replace(inputs, phi=factors.phi, theta=factors.theta)
    with pytest.raises(ValueError, match=f"^backend: 'triton': x: dtype {dtype}: .*; or set backend: auto"):
        harness.project(inputs, "triton")


def test_ranks_beyond_the_kernels_are_refused_by_the_call(harness):
    inputs = harness.inputs(tokens=2, inputs=3, outputs=2, rank=65)
    with pytest.raises(ValueError, match=r"^backend: 'triton': rank: 65: the kernels take 1 to 64"):
        harness.project(inputs, "triton")
    assert harness.project(inputs, "auto").y.shape == (2, 2)


@pytest.mark.parametrize(("rows", "columns"), [(2**32, 1), (2**30, 13), (2**16, 2**18 + 1), (1, 2**34 + 1)])
def test_more_noise_than_the_counter_holds_is_refused(rows, columns):
    message = rf"^rows x columns: {rows} x {columns}: more noise than .*; split the batch$"
    for call in (check_noise_size, lambda *size: standard_normal(*size, NoiseKey(0, 0), 0)):
        with pytest.raises(ValueError, match=message):
            call(rows, columns)


@pytest.mark.parametrize(("rows", "columns"), [(2**32 - 1, 4), (2**30 - 1, 13), (0, 2**40), (1, 2**34 - 4)])
def test_as_much_noise_as_the_counter_holds_is_not(rows, columns):
    check_noise_size(rows, columns)


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_the_call_refuses_more_noise_than_the_counter_holds(activation, backend):
    """Before anything is allocated: a batch of 2^28 tokens that is one token in memory."""
    inputs = activation.inputs(tokens=1, inputs=4, outputs=64)
    inputs.x = inputs.x.expand(2**28, 4)
    with pytest.raises(ValueError, match=r"^rows x columns: 268435456 x 64: more noise"):
        activation.project(inputs, backend)
