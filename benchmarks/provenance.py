"""Where a measurement comes from: device, versions, commit."""

from __future__ import annotations

import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

PACKAGES = ("torch", "transformers", "deepspeed", "triton", "peft")


def provenance() -> dict[str, object]:
    """Facts that every committed row carries."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    return {"device": _device(), "python": platform.python_version(), "versions": versions, **commit()}


def commit() -> dict[str, object]:
    """The checkout's commit, and whether it had uncommitted changes to tracked files; None where git cannot tell."""
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
        driver = subprocess.run(
            ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"], capture_output=True, text=True
        )
        return f"{torch.cuda.get_device_name()} (driver {driver.stdout.splitlines()[0].strip()})"
    names = [
        line.split(":", 1)[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
    ]
    return f"{len(names)} x {names[0]}" if names else platform.processor()
