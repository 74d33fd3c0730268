"""Checkpoints and summaries: damage is found, and what was written by something else is refused and never executed.

Damage alone is a matter of the manifest. So that the readers behind it are tried too, a changed folder is sealed again:
whoever can change a file can do that.
"""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from damage import damaged, fuzz, values
from hypothesis import example, given
from hypothesis import strategies as st
from runs import Run

from abmll.checkpoint import newest_whole
from abmll.files import damage, publish
from abmll.summary import finished_facts, load_summary, save_summary
from abmll.tensor_files import load_state, read_tensors, save_state

FILES = ("theta.safetensors", "moments.safetensors", "counts.json", "trainer.json", "rank-00000.safetensors")


@pytest.fixture(scope="module")
def session(tmp_path_factory):
    """A run's parts after two steps, and its checkpoint."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    run = Run(tmp_path_factory.mktemp("fuzz") / "run")
    with run.session("trainer.episodes=2") as session:
        session.trainer.run()
        yield session
    torch.set_num_threads(before)


def seal(folder: Path) -> None:
    """A manifest that fits what the folder holds now."""
    changed = folder.with_name(f"changed-{folder.name}")
    folder.rename(changed)
    (changed / "manifest.json").unlink()
    publish(changed, folder)


@fuzz
@given(st.sampled_from(FILES), st.data())
def test_a_checkpoint_of_anything_is_loaded_or_refused(session, tmp_path_factory, file, data):
    store = session.trainer.store
    whole = newest_whole(store.folder)
    folder = tmp_path_factory.mktemp("changed") / "step-00000002"
    shutil.copytree(whole.folder, folder)
    path = folder / file
    contents = damaged(path.read_bytes()) | st.binary(max_size=100)
    if file.endswith(".json"):
        contents |= values.map(lambda value: json.dumps(value).encode())
        state = json.loads(path.read_text())
        keys = st.sampled_from(sorted(state))
        contents |= st.tuples(keys, values).map(lambda pair: json.dumps({**state, pair[0]: pair[1]}).encode())
    path.write_bytes(data.draw(contents))
    changed = path.read_bytes() != (whole.folder / file).read_bytes()
    assert (damage(folder) is not None) == changed
    seal(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = newest_whole(folder.parent)
    if found is not None:
        try:
            session.trainer.resume(found)
        except ValueError as error:
            assert str(error)
    session.trainer.resume(whole)


@fuzz
@given(damaged(b"{}") | values.map(lambda value: json.dumps(value).encode()) | st.binary(max_size=100))
@example(b"[" * 100_000)
@example(json.dumps({"x" * 5000: {"bytes": 1, "sha256": ""}}).encode())
@example(json.dumps({"../final/theta.safetensors": {"bytes": 1, "sha256": ""}}).encode())
@example(json.dumps({"\x00": {"bytes": 1, "sha256": ""}}).encode())
@example(json.dumps({"\ud800": {"bytes": 1, "sha256": ""}}).encode())
@example(json.dumps({"": {"bytes": 1, "sha256": ""}}).encode())
def test_any_manifest_is_judged(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("summary") / "final"
    save_summary(folder, {"a": torch.zeros(3)}, {"step": 1})
    assert damage(folder) is None
    (folder / "manifest.json").write_bytes(data)
    assert damage(folder)
    with pytest.raises(ValueError, match=r"summary .*; name a folder written by a run"):
        load_summary(folder)


@fuzz
@given(st.sampled_from(["theta.safetensors", "summary.json"]), st.data())
def test_a_summary_of_anything_is_loaded_or_refused(tmp_path_factory, file, data):
    folder = tmp_path_factory.mktemp("summary") / "final"
    save_summary(folder, {"a": torch.zeros(3), "b": torch.ones(2, 2)}, {"step": 1, "scores": []})
    path = folder / file
    changed = data.draw(damaged(path.read_bytes()) | values.map(lambda value: json.dumps(value).encode()))
    same = changed == path.read_bytes()
    path.write_bytes(changed)
    assert (damage(folder) is None) == same
    seal(folder)
    assert finished_facts(folder.parent) is None or isinstance(finished_facts(folder.parent), dict)
    try:
        theta, facts = load_summary(folder)
        assert isinstance(facts, dict) and all(isinstance(value, torch.Tensor) for value in theta.values())
    except ValueError as error:
        assert str(error)


NESTED = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5)
    | st.sampled_from([torch.arange(3), torch.zeros(2, 2, dtype=torch.bfloat16), torch.tensor(7.0)]),
    lambda inner: st.lists(inner, max_size=3) | st.lists(inner, max_size=3).map(tuple)
    | st.dictionaries(st.integers() | st.text(max_size=3) | st.tuples(st.integers()), inner, max_size=3),
    max_leaves=8,
)  # fmt: skip


def same(one: object, other: object) -> bool:
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, (list, tuple)):
        return type(one) is type(other) and len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, dict):
        return isinstance(other, dict) and list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    return type(one) is type(other) and one == other


@fuzz
@given(NESTED)
def test_a_ranks_state_comes_back_as_it_was(tmp_path_factory, state):
    """Keys and tuples included, which JSON alone would change."""
    path = tmp_path_factory.mktemp("state") / "state.safetensors"
    save_state(path, state)
    assert same(state, load_state(path))


@fuzz
@given(values, st.integers(0, 3))
@example({"tensor": []}, 1)
@example({"dict": [[{"dict": []}, 1]]}, 1)
def test_any_structure_in_a_states_header_is_read_or_refused(tmp_path_factory, structure, tensors):
    from abmll.tensor_files import write_tensors

    path = tmp_path_factory.mktemp("state") / "state.safetensors"
    write_tensors(path, {str(n): torch.zeros(1) for n in range(tensors)}, {"structure": json.dumps(structure)})
    assert len(read_tensors(path)[0]) == tensors
    try:
        load_state(path)
    except ValueError as error:
        assert "holds no state of a rank" in str(error)
