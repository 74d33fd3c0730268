"""Low-rank adapters: parameters, layers, and their injection into a model."""

from abmll.adapters.blob import BlobLinear
from abmll.adapters.context import AdapterContext, OuterWeights, RecordedTerms
from abmll.adapters.inject import AdapterSet, LayerKind, inject_adapters, projection_backend, remove_adapters
from abmll.adapters.layers import GaussianLoRALinear, LoRALinear, base_dtype

__all__ = [
    "AdapterContext",
    "AdapterSet",
    "BlobLinear",
    "GaussianLoRALinear",
    "LayerKind",
    "LoRALinear",
    "OuterWeights",
    "RecordedTerms",
    "base_dtype",
    "inject_adapters",
    "projection_backend",
    "remove_adapters",
]
