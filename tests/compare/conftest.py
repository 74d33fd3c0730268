from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "trainer"))

from made_up import write_full_comparison
from runs import counts_kept, make_run, one_thread  # noqa: F401

from abmll.compare.results import load_results


@pytest.fixture(scope="session")
def full_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("comparison")
    write_full_comparison(folder, tasks=6, n=20, seeds=2, betas=(1e-14, 1e-12, 1e-10))
    return folder


@pytest.fixture(scope="session")
def full(full_folder):
    return load_results(full_folder)
