"""Names that come from files name folders inside the output folder, and nothing else."""

from __future__ import annotations

import json

import pytest

from abmll.compare.load import load_comparison
from abmll.config import ConfigError, read_settings
from abmll.config.schema import HubTask
from abmll.config.settings import check_settings, is_folder_name
from abmll.files import MANIFEST, damage, inside
from abmll.tasks.prepare import prepare

BAD = [
    "../out",
    "..",
    ".",
    ".hidden",
    "/etc",
    "a/b",
    "a\\b",
    "a\nb",
    "a\x00b",
    "a\x1b[2J",
    "~",
    "a b",
    "",
    "-" * 3,
    "x" * 101,
]
GOOD = ["samples-8", "beta-1e-8", "pruning-0.1", "a_b", "a+b", "Ünïcode", "x" * 100]


@pytest.mark.parametrize("name", BAD)
def test_a_name_that_leads_elsewhere_is_refused(name, tmp_path):
    assert not is_folder_name(name)
    with pytest.raises(ConfigError, match="names a folder"):
        check_settings({name: {"eval.samples": 8}}, "settings")
    text = json.dumps({"name": name, "config": "x.yaml", "output": str(tmp_path), "methods": {"abmll": {}}})
    (tmp_path / "comparison.yaml").write_text(text)
    with pytest.raises(ConfigError, match=r"names a folder|no such|cannot|not valid"):
        load_comparison(tmp_path / "comparison.yaml")
    entry = HubTask(path="p", input="{i}", options=("a", "b"), label="l")
    (outcome,) = prepare([name], {name: entry}, tmp_path / "out", progress=False)
    assert "names a folder" in outcome.failure and [path.name for path in (tmp_path / "out").iterdir()] == [".lock"]


@pytest.mark.parametrize("name", GOOD)
def test_other_names_are_taken(name):
    assert is_folder_name(name) and check_settings({name: None}, "settings") == {name: {}}


def test_settings_of_a_file_name_folders(tmp_path):
    path = tmp_path / "settings.yaml"
    path.write_text('"../../elsewhere": {eval.samples: 8}\n')
    with pytest.raises(ConfigError, match=r"settings\.yaml: \.\./\.\./elsewhere: names a folder"):
        read_settings(path)


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "x/../../secret", "x" * 5000, "\x00", ""])
def test_a_manifest_reads_nothing_outside_its_folder(tmp_path, name):
    folder = tmp_path / "sealed"
    folder.mkdir()
    (tmp_path / "secret").write_text("x")
    (folder / MANIFEST).write_text(json.dumps({name: {"bytes": 1, "sha256": "0"}}))
    assert "is missing" in damage(folder) or "cannot be read" in damage(folder)


def test_what_an_index_names_lies_inside(tmp_path):
    assert inside(tmp_path, "model/tasks/abmll/default/seed-0") == tmp_path / "model/tasks/abmll/default/seed-0"
    assert inside(tmp_path, ".") == tmp_path
    for name in ("../x", "/x", "a/../../x", "a\nb", "\x00"):
        with pytest.raises(ValueError, match="leads out of this folder"):
            inside(tmp_path, name)
