"""The dtype that a machine multiplies by instructions of its own: what `auto` becomes, and who is told otherwise."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from abmll.config import load_config, native
from abmll.config.native import in_software
from abmll.config.schema import ModelConfig
from abmll.preflight import preflight

TINY = Path(__file__).parents[2] / "configs/tiny.yaml"


@pytest.fixture
def machine(monkeypatch):
    def machine(instructions, gpu=False):
        monkeypatch.setattr(native, "_cpu_multiplies_bfloat16", lambda: instructions)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)

    return machine


@pytest.mark.parametrize(
    ("instructions", "gpu", "expected"),
    [(True, False, "bfloat16"), (False, True, "bfloat16"), (False, False, "float32")],
)
def test_auto_becomes_what_the_machine_multiplies(machine, instructions, gpu, expected):
    machine(instructions, gpu)
    model = ModelConfig(name="random:tiny", dtype="auto")
    assert model.dtype == expected and json.loads(model.model_dump_json())["dtype"] == expected
    assert load_config(TINY, ["model.dtype=auto"]).model.dtype == expected
    assert {ModelConfig(name="x", dtype=dtype).dtype for dtype in ("bfloat16", "float32")} == {"bfloat16", "float32"}


def test_only_a_cpu_without_the_instructions_is_told_of(machine):
    machine(False)
    assert "ten times faster in float32" in in_software("bfloat16", "cpu")
    assert in_software("float32", "cpu") is in_software("bfloat16", "cuda") is None
    machine(True)
    assert in_software("bfloat16", "cpu") is None


def test_the_check_before_a_run_says_so(machine, tmp_path):
    machine(False)
    overrides = ["model.dtype=bfloat16", f"output={tmp_path / 'run'}"]
    report, good = preflight(load_config(TINY, overrides), str(TINY))
    assert good and "in bfloat16\n        note: model.dtype: bfloat16: this CPU has no instructions" in report
    machine(True)
    assert "no instructions" not in preflight(load_config(TINY, overrides), str(TINY))[0]


def test_where_pytorch_does_not_tell_nothing_is_said(monkeypatch):
    """An older or another build without oneDNN."""

    def absent():
        raise AttributeError("'_OpNamespace' 'mkldnn' object has no attribute '_is_mkldnn_bf16_supported'")

    assert native._cpu_multiplies_bfloat16() in (True, False)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", absent)
    assert in_software("bfloat16", "cpu") is None
