"""What rows say of the machine and the checkout, where tools that could tell are missing."""

from __future__ import annotations

import importlib
import subprocess

import pytest
import torch

MODULE = "NVRM version: NVIDIA UNIX {kind}  550.54.15  Tue Mar  5 22:23:56 UTC 2024\nGCC version:  gcc version 12.2.0\n"


@pytest.fixture
def provenance():
    return importlib.import_module("abmll.provenance")


@pytest.fixture
def on_gpu(provenance, tmp_path, monkeypatch):
    """A GPU, its kernel module's file as given, and nvidia-smi which prints something, or raises."""

    def device(answer: str | Exception, module: str | None) -> str:
        def run(*arguments, **options):
            if isinstance(answer, Exception):
                raise answer
            return subprocess.CompletedProcess(arguments, 0, stdout=answer)

        path = tmp_path / "version"
        if module is not None:
            path.write_text(module)
        monkeypatch.setattr(provenance, "DRIVER_FACTS", path)
        monkeypatch.setattr(provenance.subprocess, "run", run)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100")
        return provenance.provenance()["device"]

    return device


@pytest.mark.parametrize("kind", ["x86_64 Kernel Module", "Open Kernel Module for x86_64"])
@pytest.mark.parametrize(
    "answer", [FileNotFoundError("nvidia-smi"), subprocess.CalledProcessError(9, "nvidia-smi"), ""], ids=str
)
def test_the_driver_is_found_without_nvidia_smi(on_gpu, answer, kind):
    assert on_gpu(answer, MODULE.format(kind=kind)) == "NVIDIA H100 (driver 550.54.15)"


def test_the_driver_by_nvidia_smi_or_unknown(on_gpu):
    assert on_gpu("535.104.05\n535.104.05\n", None) == "NVIDIA H100 (driver 535.104.05)"
    assert on_gpu(FileNotFoundError("nvidia-smi"), None) == "NVIDIA H100 (driver unknown)"


def test_a_cpu_without_its_facts_has_a_name(provenance, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(provenance, "CPU_FACTS", tmp_path / "absent")
    assert provenance.provenance()["device"]


def test_a_cpu_is_named_with_its_instructions(provenance, tmp_path, monkeypatch):
    """Machines of one name differ in them, tenfold in bfloat16."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    facts = tmp_path / "cpuinfo"
    facts.write_text("processor : 0\nmodel name : Some CPU\nprocessor : 1\nmodel name : Some CPU\n")
    monkeypatch.setattr(provenance, "CPU_FACTS", facts)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    assert provenance.provenance()["device"] == "2 x Some CPU, AVX2"


def test_a_copy_without_its_history_has_no_commit(provenance, monkeypatch):
    def no_git(*arguments, **options):
        raise FileNotFoundError("git")

    monkeypatch.setattr(provenance.subprocess, "run", no_git)
    assert provenance.commit.__wrapped__() == {"commit": None, "dirty": None}
