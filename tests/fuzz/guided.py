"""The properties of files, with bytes chosen by what they reach in the readers' code (atheris, libFuzzer).

    pip install atheris
    python tests/fuzz/guided.py jsonl -max_total_time=600      # or configuration, other, manifest, overrides

What follows the name goes to libFuzzer: its options, and a folder of more inputs to start from, where it keeps what
reached new code. It ends at the first input that breaks the property, with a traceback, and keeps that input as
crash-... in the current folder. Hypothesis (the tests beside this file) knows the files' structure; atheris the code.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import atheris

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent / "trainer")]
with atheris.instrument_imports(include=["abmll", "yaml"], enable_loader_override=False):
    import test_config
    import test_jsonl
    import test_state

    import abmll.files


class Folders:
    """Pytest's tmp_path_factory for millions of calls: each gets an empty folder, and the one before is gone."""

    def __init__(self, root: Path):
        self.root = root

    def mktemp(self, name: str) -> Path:
        shutil.rmtree(self.root, ignore_errors=True)
        (self.root / name).mkdir(parents=True)
        return self.root / name


def body(property_of: Callable[..., None]) -> Callable[..., None]:
    """The test that Hypothesis calls with what it drew."""
    return property_of.hypothesis.inner_test


def targets(folder: Path) -> dict[str, tuple[Callable[[bytes], None], list[bytes]]]:
    """By name: what takes the bytes, and files to start from."""
    file, folders = folder / "run.yaml", Folders(folder / "each")
    lines = [test_jsonl.FILE]
    yamls = [test_config.TINY, test_config.COMPARISON, test_config.LISTS, test_config.SETTINGS, test_config.JSON]
    return {
        "jsonl": (lambda data: body(test_jsonl.test_whatever_a_file_holds_is_read_or_told)(folders, data), lines),
        "configuration": (
            lambda data: body(test_config.test_any_file_is_a_configuration_or_an_error)(file, data),
            yamls,
        ),
        "other": (lambda data: body(test_config.test_the_other_files_are_read_or_refused)(file, data), yamls),
        "manifest": (lambda data: body(test_state.test_any_manifest_is_judged)(folders, data), [b"{}"]),
        "overrides": (
            lambda data: body(test_config.test_any_overrides_are_a_configuration_or_an_error)(
                data.decode(errors="surrogateescape").split("\n")
            ),
            [b"method.inner_steps=2\ntrainer.episodes=6", b"tasks.train=[a, b]"],
        ),
    }


def main() -> None:
    with tempfile.TemporaryDirectory() as root:
        found = targets(Path(root))
        if len(sys.argv) < 2 or sys.argv[1] not in found:
            sys.exit(f"usage: guided.py {'|'.join(found)} [libFuzzer's options]")
        take, starts = found[sys.argv[1]]
        corpus = Path(root) / "corpus"
        corpus.mkdir()
        for number, start in enumerate(starts):
            (corpus / str(number)).write_bytes(start)
        abmll.files.sync = lambda path: None  # that files reach the disk is tested elsewhere
        atheris.Setup([sys.argv[0], *sys.argv[2:], str(corpus)], take)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
