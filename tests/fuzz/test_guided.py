"""guided.py: every target takes its files and what libFuzzer makes of them, and what breaks a property is shown."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from runs import call

SCRIPT = Path(__file__).with_name("guided.py")
pytest.importorskip("atheris")


def guided(name: str, *options: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return call([sys.executable, str(SCRIPT), name, f"-artifact_prefix={folder}/", *options])


@pytest.mark.parametrize("name", ["jsonl", "configuration", "other", "manifest", "overrides"])
def test_a_target_holds_for_a_few_inputs(name, tmp_path):
    found = guided(name, "-runs=30", folder=tmp_path)
    assert found.returncode == 0 and "Done 3" in found.stderr, found.stdout + found.stderr
    assert "Instrumenting abmll.tasks.jsonl" in found.stderr


def test_what_breaks_a_property_is_kept(tmp_path):
    """This manifest is the right one, which the property says that none is."""
    whole = whole_manifest(tmp_path / "final")
    (tmp_path / "start").mkdir()
    (tmp_path / "start/whole").write_bytes(whole)
    found = guided("manifest", str(tmp_path / "start"), folder=tmp_path)
    assert found.returncode != 0 and "assert damage(folder)" in found.stdout + found.stderr
    assert [path.read_bytes() for path in tmp_path.glob("crash-*")] == [whole]


def whole_manifest(folder: Path) -> bytes:
    import torch

    from abmll.summary import save_summary

    save_summary(folder, {"a": torch.zeros(3)}, {"step": 1})
    return (folder / "manifest.json").read_bytes()
