"""A model of its own, W0 + s B A in the base's dtype, and how much of the adapter that rounding leaves."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from abmll.config import Refused
from abmll.deploy.export.report import LayerMerge, Merge, Report
from abmll.deploy.export.subject import Subject, next_logits
from abmll.kernels.reference import low_rank_matrix

MUCH = 0.25  # of the adapter's change lost to rounding: worth a note


def check_merged(subject: Subject) -> None:
    """Refused, with the remedy, where the weights cannot be merged."""
    quantization = subject.base.config.model.quantization
    if quantization != "none":
        raise Refused(
            f"--format merged: model.quantization: {quantization!r}: packed weights have no room for the change; use "
            "--format peft"
        )
    shared: dict[int, list[str]] = {}
    for name, parameter in subject.base.model.named_parameters(remove_duplicate=False):
        shared.setdefault(id(parameter), []).append(name.removesuffix(".base.weight").removesuffix(".weight"))
    tied = [names for names in shared.values() if len(names) > 1 and set(names) & set(subject.means)]
    if tied:
        raise Refused(
            f"--format merged: {' and '.join(tied[0])} share one weight, and the change is to one of them; use "
            "--format peft"
        )


def write_merged(subject: Subject, folder: Path) -> Report:
    """The model, its tokenizer and generation config. Refused where rounding leaves nothing of the change, or what is
    loaded back is not what was written.
    """
    check_merged(subject)
    model = subject.fresh_base()
    base_logits = next_logits(model, subject.prompts)
    merge = merge_into(model, subject)
    model.save_pretrained(folder)
    subject.base.tokenizer.save_pretrained(folder)
    written = _hashes(model)
    del model  # the next one takes its place

    loaded = AutoModelForCausalLM.from_pretrained(str(folder), local_files_only=True).to(subject.base.device)
    found = _hashes(loaded)
    odd = sorted(name for name in set(written) | set(found) if written.get(name) != found.get(name))
    if odd:
        raise Refused(
            f"--format merged: loaded back, {odd[0]} and {len(odd) - 1} more weights are not what was written; check "
            "the disk, and export again"
        )
    logits = next_logits(loaded, subject.prompts)
    if not logits.isfinite().all() or torch.equal(logits, base_logits):
        raise Refused(
            "--format merged: the merged model's logits are not finite, or the base's own; use --format peft, or "
            "--dtype float32"
        )
    return subject.report("merged", logits, base_logits, merge=merge, notes=_notes(subject, merge))


@torch.no_grad()
def merge_into(model: PreTrainedModel, subject: Subject) -> Merge:
    """Adds each layer's change to its weight, in place. Refused where not one weight comes out different."""
    layers, lost, whole, moved = {}, 0.0, 0.0, False
    for name, mean in subject.means.items():
        layer = model.get_submodule(name)
        change = low_rank_matrix(type(mean)(*(factor.to(layer.weight.device) for factor in mean)), subject.scaling)
        layers[name], squares = _merge(layer, change)
        lost, whole, moved = lost + squares[0], whole + squares[1], moved or squares[2]
    if not moved:
        raise Refused(
            f"--format merged: in {subject.base.config.model.dtype} rounding takes the whole change: no weight moves; "
            "use --dtype float32, or --format peft"
        )
    return Merge((lost / whole) ** 0.5, layers)


def _merge(layer: nn.Linear, change: Tensor) -> tuple[LayerMerge, tuple[float, float, bool]]:
    """Also the squared norms of what is lost and of the change, and whether a weight moved."""
    before = layer.weight.to(torch.float32, copy=True)  # in fp32 too: the weight is written over
    right = before + change
    layer.weight.copy_(right)
    after = layer.weight.float()
    # the sum's own rounding in fp32 is not what the dtype loses, but of it nothing finer is kept
    error, gone = (after - right).norm().double(), (change - (after - before)).norm().double()
    size = change.norm().double()
    found = LayerMerge(float(error / right.norm().double()), float(gone / size) if size > 0 else 0.0)
    return found, (float(gone**2), float(size**2), not torch.equal(before, after))


def _hashes(model: nn.Module) -> dict[str, int]:
    """A checksum of every parameter's bits, tied ones once, so that two models need not be in memory together."""
    return {name: torch.hash_tensor(value.detach()).item() for name, value in model.named_parameters()}


def _notes(subject: Subject, merge: Merge) -> tuple[str, ...]:
    notes = []
    if merge.lost > MUCH:
        notes.append(
            f"Rounding to {subject.base.config.model.dtype} takes {100 * merge.lost:.0f} % of the adapter's change. "
            "Export with --dtype float32, or in the format peft, to keep it."
        )
    if subject.source.kind == "gguf":
        notes.append("The base was a GGUF file: the weights are its dequantized ones.")
    return tuple(notes)
