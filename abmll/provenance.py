"""Where a measurement comes from: device, versions, commit."""

from __future__ import annotations

import platform
import re
import subprocess
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

PROVENANCE = "provenance.json"  # beside what was made
PACKAGES = ("torch", "transformers", "deepspeed", "triton", "peft")
CPU_FACTS, DRIVER_FACTS = Path("/proc/cpuinfo"), Path("/proc/driver/nvidia/version")


def provenance() -> dict[str, object]:
    """Facts that every committed row carries."""
    return {"device": _device(), "python": platform.python_version(), "versions": versions(), **commit()}


def versions() -> dict[str, str | None]:
    """Of the packages that results depend on; None for one that is not installed."""
    found: dict[str, str | None] = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


@cache
def commit() -> dict[str, object]:
    """The checkout's commit, and whether it had uncommitted changes to tracked files; None where git cannot tell.

    Of the first call: a process that goes on for days has the code that it once imported.
    """
    root = Path(__file__).resolve().parent.parent

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", root, *arguments], capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain", "--untracked-files=no"))}
    except (OSError, subprocess.CalledProcessError):  # a copy of the files alone
        return {"commit": None, "dirty": None}


def _device() -> str:
    if torch.cuda.is_available():
        return f"{torch.cuda.get_device_name()} (driver {_driver() or 'unknown'})"
    try:
        lines = CPU_FACTS.read_text().splitlines()
    except OSError:  # not Linux
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if "model name" in line]
    named = f"{len(names)} x {names[0]}" if names else platform.processor() or platform.machine()
    # one name may stand for CPUs of several generations; times and the order of sums depend on this
    return f"{named}, {torch.backends.cpu.get_cpu_capability()}"


def _driver() -> str | None:
    """NVIDIA's driver, by its own tool or, where that is not on the path, by the kernel module; None: by neither."""
    try:
        found = subprocess.run(
            ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            check=True,
        )
        return found.stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        pass
    try:  # NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15  Tue Mar ...
        found = re.search(r"Kernel Module.*?\s(\d+(?:\.\d+)+)\s", DRIVER_FACTS.read_text())
    except OSError:
        return None
    return found[1] if found else None
