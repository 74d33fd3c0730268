"""A 4-bit base: NF4 with double quantization (Dettmers et al., "QLoRA", 2023), by bitsandbytes through transformers.

The frozen layers' products are bitsandbytes' own; adapters know no more of it than that such a layer is called.
Embeddings, norms and the output layer stay in model.dtype, as transformers leaves them by default.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.quantizers.base import get_keys_to_not_convert
from transformers.quantizers.quantizers_utils import should_convert_module
from transformers.utils import is_accelerate_available, is_bitsandbytes_available

from abmll.config.schema import ModelConfig

# Numbers that share an absolute maximum, and maxima that share one of theirs: bitsandbytes' defaults.
BLOCK, NESTED_BLOCK = 64, 256


def bitsandbytes_config(dtype: torch.dtype) -> BitsAndBytesConfig:
    """What `model.quantization: nf4` means for a model whose products run in `dtype`."""
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )


def check_quantization(config: ModelConfig, device: torch.device) -> None:
    """ValueError, with the remedy, where `config.quantization` cannot run on `device`: tried on a small layer."""
    if config.quantization == "none":
        return
    told = f"model.quantization: {config.quantization!r}"
    if not (is_bitsandbytes_available() and is_accelerate_available()):
        raise ValueError(
            f"{told}: it needs bitsandbytes and accelerate; run: pip install -e '.[quantization]', or set "
            "model.quantization=none"
        )
    dtype = getattr(torch, config.dtype)
    try:
        dense = nn.utils.skip_init(nn.Linear, 2 * BLOCK, BLOCK, device=device, dtype=dtype)  # draws no number
        nn.init.ones_(dense.weight)
        nn.init.zeros_(dense.bias)
        layer = _quantized(dense.requires_grad_(False), dtype)
        layer(torch.ones(1, 2 * BLOCK, device=device, dtype=dtype, requires_grad=True)).sum().backward()
    except Exception as error:  # a missing native library fails in many ways
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(
            f"{told}: bitsandbytes does not run on {device} here ({reason}); see python -m bitsandbytes, or set "
            "model.quantization=none"
        ) from error


def quantize(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Quantize a dense model in place, where it is, a layer at a time: the layers that `from_pretrained` would."""
    for name in _quantizable(model):
        model.set_submodule(name, _quantized(model.get_submodule(name), dtype))


def keep_trainable(model: nn.Module) -> None:
    """Turn off what bitsandbytes does to a layer that is called once without a gradient on a CPU with AVX-512 bf16.

    `Linear4bit.forward` repacks its weight there, for good: later products have no derivative, and sizes that are no
    multiples of the packing's fail. Evaluation would break the training after it.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def _quantizable(model: PreTrainedModel) -> list[str]:
    """Names of the dense layers that transformers quantizes: all but the output layer and tied weights."""
    kept, modules = get_keys_to_not_convert(model), model.named_modules()
    return [name for name, module in modules if type(module) is nn.Linear and should_convert_module(name, kept)]


def _quantized(layer: nn.Linear, dtype: torch.dtype) -> nn.Linear:
    from bitsandbytes.nn import Linear4bit, Params4bit

    how = {"compress_statistics": True, "quant_type": "nf4"}
    with torch.device("meta"):
        made = Linear4bit(layer.in_features, layer.out_features, layer.bias is not None, dtype, **how)
    weight = Params4bit(layer.weight.detach(), requires_grad=False, module=made, **how)
    made.weight = weight.to(layer.weight.device)  # the move is what quantizes
    if layer.bias is not None:
        made.bias = nn.Parameter(layer.bias.detach(), requires_grad=False)
    keep_trainable(made)
    return made


# shapes alone


def pack_shapes(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Give a model of fake (or meta) tensors the 4-bit layers' shapes in place; nothing is read and nothing quantized.

    For counting memory: see `PackedLinear`. Layers are those that `quantize` takes, so it goes before the adapters.
    """
    for name in _quantizable(model):
        model.set_submodule(name, PackedLinear(model.get_submodule(name), dtype))


class PackedLinear(nn.Linear):
    """Takes and frees memory as bitsandbytes' `Linear4bit` does with NF4 and double quantization; computes nothing.

    Read in bitsandbytes 0.50. The weight is uint8 [ceil(N K / 2), 1]. `functional.quantize_4bit` keeps a byte for each
    block of 64 numbers, an fp32 maximum for each 256 of these, and tables of 16 and 256 fp32 numbers. The product
    (`autograd/_functions.py`, MatMul4Bit) saves the packed weight alone, not x. Forward: on CUDA
    (`backends/cuda/ops.py`, gemm_4bit) a kernel of its own that unpacks in registers up to 1,536 rows where its
    heuristic says so, else the blocks' maxima in fp32, the whole weight [N, K] in x's dtype, and the library's product;
    the second is what is taken here, an upper bound of the first. Backward: always the whole weight, and dy W.
    """

    def __init__(self, layer: nn.Linear, dtype: torch.dtype):
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.compute_dtype = layer.in_features, layer.out_features, dtype
        new, numbers = layer.weight.new_empty, layer.in_features * layer.out_features
        blocks = -(-numbers // BLOCK)
        self.weight = nn.Parameter(new(-(-numbers // 2), 1, dtype=torch.uint8), requires_grad=False)
        self.bias = layer.bias
        self.absmax = nn.Buffer(new(blocks, dtype=torch.uint8))
        self.nested_absmax = nn.Buffer(new(-(-blocks // NESTED_BLOCK), dtype=torch.float32))
        self.tables = nn.Buffer(new(16 + 256 + 1, dtype=torch.float32))

    def forward(self, x: Tensor) -> Tensor:
        return _PackedProduct.apply(x.to(self.compute_dtype), self).to(x.dtype)

    def unpacked(self) -> Tensor:
        """What stands for the weight [N, K] while a product runs. The maxima live until it is made."""
        maxima = self.absmax.new_empty(self.absmax.shape, dtype=torch.float32)
        weight = maxima.new_empty(self.out_features, self.in_features, dtype=self.compute_dtype)
        del maxima
        return weight


class _PackedProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, layer: PackedLinear) -> Tensor:
        ctx.layer = layer
        return linear(x, layer.unpacked(), layer.bias)

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor, None]:
        return dy @ ctx.layer.unpacked(), None


# sizes


def num_parameters(model: nn.Module) -> int:
    """The model's numbers, tied ones once; those of 4-bit layers as they were before packing."""
    packed = {
        id(module.weight): module.in_features * module.out_features
        for module in model.modules()
        if isinstance(module, nn.Linear) and not module.weight.is_floating_point()
    }
    return sum(packed.get(id(parameter), parameter.numel()) for parameter in model.parameters())


def weight_bytes(model: nn.Module) -> int:
    """Bytes of the parameters, tied ones once, and of what `PackedLinear` keeps beside them."""
    state = [buffer for module in model.modules() if isinstance(module, PackedLinear) for buffer in module.buffers()]
    return sum(tensor.nbytes for tensor in (*model.parameters(), *state))
