"""PEFT's adapter files, loaded back with PEFT on a base of its own before they are handed on.

What both PEFT (0.21) and vLLM accept was read in their sources: peft/tuners/tuners_utils.py
(`check_target_module_exists`), peft/utils/save_and_load.py, vllm/lora/peft_helper.py (`PEFTHelper`),
vllm/lora/lora_model.py (`from_local_checkpoint`), vllm/lora/utils.py (`parse_fine_tuned_lora_name`):
- names base_model.model.LAYER.lora_A.weight [r, inputs] and lora_B.weight [outputs, r], without an adapter's name in
  them. vLLM checks a layer's last name alone and ignores one whose whole name it does not have: it then serves the base
  without a word (vLLM issues 34186, 48019: text weights of a multimodal wrapper; 55193: --lora-target-modules without
  the adapter's). So LAYER is the whole name, and a base that others may load under another class is noted.
- one rank and one alpha: older vLLM reads neither rank_pattern nor alpha_pattern. alpha / r is our scaling.
- target_modules as a list: a regular expression is not understood everywhere. PEFT takes a name as the end of a layer's
  at a dot; where the configured endings would reach other layers than ours the list has whole names.
- bias "none", no modules_to_save, no DoRA, no rsLoRA: vLLM refuses them or older releases ignore them.
- no key that older PEFT does not know: it refuses them.
"""

from __future__ import annotations

import importlib.util
import json
import math
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from abmll.config import Refused
from abmll.deploy.export.report import Report
from abmll.deploy.export.subject import Subject, next_logits
from abmll.models.load import model_config
from abmll.tensor_files import write_tensors

CONFIG, WEIGHTS, PREFIX = "adapter_config.json", "adapter_model.safetensors", "base_model.model."
UNIT = 2.0**-24  # half of fp32's spacing at 1
SURE = 2.0  # standard deviations of a random walk, where rounding errors are taken for one
ROWS = 8  # of random input that each layer is tried on


def check_peft(subject: Subject) -> None:
    """Refused, with the remedy, where there is no PEFT, or nobody else can load the base."""
    if importlib.util.find_spec("peft") is None:
        raise Refused("--format peft: what is written is loaded back with peft; run: pip install -e '.[export]'")
    if subject.source.kind == "random":
        raise Refused(
            f"--format peft: the base {subject.base.config.model.name} is random weights, which nobody else can load; "
            "use --format merged"
        )


def write_peft(subject: Subject, folder: Path) -> Report:
    """The two files. Refused where they do not give the adapter's own numbers when they are loaded back."""
    check_peft(subject)
    tensors = {}
    for name, mean in subject.means.items():
        tensors[f"{PREFIX}{name}.lora_A.weight"] = mean.a
        tensors[f"{PREFIX}{name}.lora_B.weight"] = mean.b
    write_tensors(folder / WEIGHTS, tensors, {"format": "pt"})
    (folder / CONFIG).write_text(json.dumps(peft_config(subject), indent=2, ensure_ascii=False), encoding="utf-8")
    return _loaded_back(subject, folder)


def peft_config(subject: Subject) -> dict[str, object]:
    config = subject.base.config
    alpha = config.adapters.alpha
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": subject.base_name,
        "revision": config.model.revision,
        "inference_mode": True,
        "r": subject.rank,
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "lora_dropout": 0.0,
        "target_modules": target_modules(subject),
        "bias": "none",
        "fan_in_fan_out": False,
        "modules_to_save": None,
        "init_lora_weights": True,
    }


def target_modules(subject: Subject) -> list[str]:
    """The configured endings, or whole names where those would reach other modules than the adapted layers."""
    endings = sorted(subject.base.config.adapters.modules)
    names = [name for name, _ in subject.base.model.named_modules()]
    reached = {name for name in names if any(f".{name}".endswith(f".{ending}") for ending in endings)}
    return endings if reached == set(subject.means) else sorted(subject.means)


def _loaded_back(subject: Subject, folder: Path) -> Report:
    from peft import PeftModel  # an optional package

    config, fresh = subject.base.config, subject.fresh_base()
    base_logits = next_logits(fresh, subject.prompts)
    loaded = PeftModel.from_pretrained(fresh, str(folder)).eval()
    _check_layers(subject, fresh)
    logits = next_logits(loaded, subject.prompts)
    difference, tolerance = float((logits - subject.logits).abs().max()), tolerated(subject)
    if not difference < float((logits - base_logits).abs().max()):
        raise Refused(
            "--format peft: loaded back, the adapter's logits are no nearer to its own than to the base's: in "
            f"{config.model.dtype} it changes no more than rounding does; adapt with more steps, or use --dtype float32"
        )
    if not difference <= tolerance:  # NaN fails too
        raise Refused(
            f"--format peft: loaded back, logits differ from the adapter's by {difference:.3g}, and rounding explains "
            f"{tolerance:.3g} only; please report it with the versions of peft and transformers"
        )
    return subject.report("peft", logits, base_logits, tolerance=tolerance, notes=_notes(subject, fresh))


def tolerated(subject: Subject) -> float:
    """By how much logits may differ between two orders of the same products.

    Each of n adapted layers adds an independent relative error to what the layers after it see: of a sum of K + r
    products sqrt(K + r) UNIT (Higham and Mary, "A new approach to probabilistic rounding error analysis", 2019), of a
    rounding to 16 bits half its spacing. n of them add up as sqrt(n), in units of the largest logit, and hardly ever to
    more than `SURE` times that. In 16 bits this is much: it is `_check_layers` that finds small faults.
    """
    wide = max(mean.a.shape[1] + subject.rank for mean in subject.means.values())
    unit = max(math.sqrt(wide) * UNIT, torch.finfo(subject.dtype).eps / 2)
    return SURE * math.sqrt(len(subject.means)) * unit * float(subject.logits.abs().max())


@torch.inference_mode()
def _check_layers(subject: Subject, loaded: PreTrainedModel) -> None:
    """Refused where PEFT adapts other layers than ours, holds other numbers, or computes anything else with them."""
    theirs = {name: module for name, module in loaded.named_modules() if hasattr(module, "lora_A")}
    odd = sorted(set(theirs) ^ set(subject.means))
    if odd:
        raise Refused(f"--format peft: loaded back, {odd[0]} and {len(odd) - 1} more are adapted on one side only")
    generator = torch.Generator().manual_seed(0)
    for name, layer in subject.base.adapters.layers.items():
        module, mean = theirs[name], subject.means[name]
        held = (module.lora_A["default"].weight, module.lora_B["default"].weight)
        same = all(torch.equal(own.float().cpu(), right) for own, right in zip(held, mean, strict=True))
        x = torch.randn(ROWS, layer.base.in_features, generator=generator).to(subject.base.device, subject.dtype)
        with subject.base.adapters.context.forward_pass(None):
            ours = layer(x)
        if not same or not ((module(x) - ours).abs() <= layer_bound(subject, layer.base, name, x, ours)).all():
            raise Refused(
                f"--format peft: loaded back, {name} does not hold or does not compute what the adapter does; check "
                "the disk, and export again"
            )


def layer_bound(subject: Subject, base: nn.Linear, name: str, x: Tensor, y: Tensor) -> Tensor:
    """The largest difference [T, N] of two ways to compute y = W0 x + s B A x with the same W0 x.

    fp32 sums of K, then r products in any order, and the scaling: 2 (K + r + 3) u s |B| |A| |x| (Higham, "Accuracy and
    stability of numerical algorithms", section 3.1). The sum with W0 x, and roundings of y and of the change to the
    base's dtype: its spacing at |y|, at the change |y - W0 x|, and at y again.
    """
    a, b = (factor.to(x.device).abs() for factor in subject.means[name])
    products = subject.scaling * (x.float().abs() @ a.mT) @ b.mT
    spacing = torch.finfo(x.dtype).eps * (2 * y.float().abs() + base(x).float().abs())
    return 2 * (a.shape[1] + a.shape[0] + 3) * UNIT * products + spacing


def _notes(subject: Subject, fresh: PreTrainedModel) -> tuple[str, ...]:
    """What may keep others from using the files."""
    config, notes = subject.base.config.model, []
    if subject.source.kind == "folder":
        notes.append(f"The base is named by a path, {config.name}: on another machine name its own to the loader.")
    if subject.source.kind == "gguf":
        notes.append(
            f"The base is a GGUF file, {config.name}, with its weights dequantized: on the original weights the "
            "adapter was never tried."
        )
    if config.quantization != "none":
        notes.append(f"The base is quantized ({config.quantization}); on dense weights the adapter was never tried.")
    expected = model_config(config).architectures or []
    own = type(fresh).__name__
    if expected and own not in expected:
        notes.append(
            f"The base's own class is {expected[0]}, and the adapter's names are those of {own}: vLLM may load the "
            "adapter and serve the base without a word. Compare a few answers, or use the format merged."
        )
    return tuple(notes)
