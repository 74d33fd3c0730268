"""launch/report.py as a user calls it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from made_runs import write_run

from abmll.config import Refused
from abmll.page.command import report

REPORT = Path(__file__).parents[2] / "launch/report.py"


def call(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(REPORT), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_it_prints_the_page_it_wrote(tmp_path):
    folder = write_run(tmp_path / "run")
    found = call(str(folder))
    assert found.returncode == 0, found.stderr
    assert found.stdout.splitlines()[-1] == str(folder / "report.html") and (folder / "report.html").is_file()


def test_no_file_of_a_run_is_lost_to_the_page(tmp_path):
    folder = write_run(tmp_path / "run")
    before = (folder / "metrics.jsonl").read_text()
    with pytest.raises(Refused, match=r"--out: .*metrics\.jsonl: is what this command reads; name another file"):
        report([str(folder)], str(folder / "metrics.jsonl"))
    assert (folder / "metrics.jsonl").read_text() == before
    assert report([str(folder)], str(folder / "mine.html")) == report([str(folder)], str(folder / "mine.html"))


def test_a_mistake_is_a_line_and_not_a_traceback(tmp_path):
    found = call(str(tmp_path / "nothing"))
    assert found.returncode == 2
    assert found.stderr.splitlines()[-1].startswith(f"error: RUN: {tmp_path}/nothing: holds no config.yaml;")
    assert "Traceback" not in found.stderr
