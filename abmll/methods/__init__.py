"""The methods by their configured names."""

from abmll.config.schema import MethodConfig
from abmll.kernels import Posterior
from abmll.methods.abmll import ABMLL
from abmll.methods.base import Method, Update, Visit
from abmll.methods.blob import Blob
from abmll.methods.frequencies import Frequencies
from abmll.methods.lora import LoRA, StructuredLoRA
from abmll.methods.maml import FOMAML, MAML
from abmll.methods.pretrained import Pretrained
from abmll.methods.reptile import Reptile

METHODS: dict[str, type[Method]] = {
    method.name: method
    for method in (ABMLL, Reptile, FOMAML, MAML, StructuredLoRA, LoRA, Blob, Pretrained, Frequencies)
}


def build_method(config: MethodConfig, posterior: Posterior = "activation") -> Method:
    return METHODS[config.name](config, posterior)


__all__ = ["METHODS", "Frequencies", "Method", "Pretrained", "Update", "Visit", "build_method"]
