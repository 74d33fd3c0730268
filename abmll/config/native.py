"""Which dtype of the frozen weights this machine multiplies by instructions of its own.

PyTorch's bf16 products are plain loops on a CPU without them: most desktops and laptops have no AVX-512 or AMX (on
ARM: no BF16). `benchmarks/step.py --dtype` shows what that costs.
"""

from __future__ import annotations


def resolved_dtype(dtype: str) -> str:
    """What `auto` stands for here: bfloat16 with a GPU or a CPU that has instructions for it, else float32."""
    if dtype != "auto":
        return dtype
    import torch  # only where it is asked: reading a configuration should not wait for it

    return "bfloat16" if torch.cuda.is_available() or _cpu_multiplies_bfloat16() else "float32"


def in_software(dtype: str, device: str) -> str | None:
    """What to say of a model of this dtype on a device (`cpu`, `cuda`) that multiplies it in software; else None."""
    if dtype != "bfloat16" or device != "cpu" or _cpu_multiplies_bfloat16():
        return None
    return (
        "model.dtype: bfloat16: this CPU has no instructions for it and is some ten times faster in float32, which "
        "takes twice the memory; set model.dtype=float32 (theta and adapters serve both)"
    )


def _cpu_multiplies_bfloat16() -> bool:
    """oneDNN's own answer, on which PyTorch's products depend; True where this PyTorch does not tell."""
    import torch

    try:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    except (AttributeError, RuntimeError):
        return True
