"""Contenders without a posterior: the frozen linear, and plain LoRA by hand, by grouped products and by PEFT."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import torch
from kernel_cases import ALPHA, Inputs
from kernel_contender import Contender, NotRun
from torch import Tensor
from torch.nn.functional import grouped_mm, linear

ALIGNMENT = 16  # bytes, of every row that a grouped product reads
B_SIZE = 0.01


def frozen(inputs: Inputs) -> Contender:
    def forward():
        return (linear(inputs.x, inputs.weight, inputs.bias),)

    return Contender(forward, (inputs.x,), (inputs.dy,), torch.no_grad()(forward))


def lora(inputs: Inputs, product: Callable[[Tensor, Tensor], Tensor] = torch.matmul) -> Contender:
    """W0 x + bias + s B A x with fp32 factors, multiplied in x's dtype: what PEFT's layer does under autocast.

    `product`: of a [.., M, K] and b [.., K, N].
    """
    lead, rank = inputs.x.shape[:-2], inputs.phi.mean.a.shape[-2]
    outputs, columns = inputs.weight.shape
    new = {"device": inputs.x.device, "dtype": torch.promote_types(inputs.x.dtype, torch.float32)}
    generator = torch.Generator(inputs.x.device).manual_seed(0)
    a = torch.randn(*lead, rank, columns, generator=generator, **new).mul_((3 * columns) ** -0.5).requires_grad_()
    b = torch.randn(*lead, outputs, rank, generator=generator, **new).mul_(B_SIZE).requires_grad_()
    scaling = ALPHA / rank

    def forward():
        x = inputs.x
        change = product(product(x, a.to(x.dtype).mT), b.to(x.dtype).mT)
        return (linear(x, inputs.weight, inputs.bias) + scaling * change,)

    return Contender(forward, (inputs.x, a, b), (inputs.dy,))


def grouped_lora(inputs: Inputs) -> Contender:
    """`lora` of several groups with PyTorch's grouped products. Raises NotRun for sizes and dtypes that they refuse."""
    if inputs.groups == 1:
        raise NotRun("one group's products are plain ones; --groups 4, for example")
    if inputs.x.dtype != torch.bfloat16:
        raise NotRun(f"torch.nn.functional.grouped_mm takes bf16, not {inputs.x.dtype}")
    sizes = {"N": inputs.weight.shape[0], "K": inputs.weight.shape[1], "r": inputs.phi.mean.a.shape[-2]}
    for name, size in sizes.items():
        if size * inputs.x.element_size() % ALIGNMENT:
            raise NotRun(f"torch.nn.functional.grouped_mm: rows of multiples of {ALIGNMENT} bytes, not {name} = {size}")
    # an illegal access would end the run for all others
    reason = "replays of grouped_mm were reported to read freed memory (pytorch/pytorch#169970)"
    return lora(inputs, grouped_mm)._replace(not_captured=reason)


def peft(inputs: Inputs, rank: int, autocast: bool) -> Contender:
    if importlib.util.find_spec("peft") is None:
        raise NotRun("PEFT is not installed (pip install peft); `lora` stands in")
    if inputs.groups > 1:
        raise NotRun("PEFT trains one adapter of a layer at a time; `lora` and `grouped_mm` take several groups")
    if autocast and inputs.x.dtype == torch.float32:
        raise NotRun("autocast is for 16-bit base models")
    from peft import LoraConfig, get_peft_model

    base = torch.nn.Linear(*inputs.weight.shape[::-1], bias=inputs.bias is not None, device="meta")
    base.weight = torch.nn.Parameter(inputs.weight, requires_grad=False)
    if inputs.bias is not None:
        base.bias = torch.nn.Parameter(inputs.bias, requires_grad=False)
    settings = LoraConfig(r=rank, lora_alpha=int(ALPHA), lora_dropout=0.0, target_modules=["projection"])
    model = get_peft_model(torch.nn.ModuleDict({"projection": base}), settings)
    layer = model.base_model.model["projection"]
    adapters = [parameter for parameter in layer.parameters() if parameter.requires_grad]
    for parameter in adapters:
        torch.nn.init.normal_(parameter, std=B_SIZE)
    kind = inputs.x.device.type

    def forward():
        with torch.autocast(kind, inputs.x.dtype, enabled=autocast):
            return (layer(inputs.x),)

    return Contender(forward, (inputs.x, *adapters), (inputs.dy,))
