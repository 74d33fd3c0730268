"""What `pip install .` takes along."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_every_package_is_installed():
    listed = re.search(r"SUBPACKAGES = \((.*)\)", (ROOT / "setup.py").read_text())[1]
    there = sorted(path.parent.name for path in (ROOT / "abmll").glob("*/__init__.py"))
    assert sorted(re.findall(r'"(\w+)"', listed)) == there
    assert {path.parent.name for path in (ROOT / "kernels").glob("*/__init__.py")} == {"fused"}
