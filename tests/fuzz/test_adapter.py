"""Adapters: a folder of anything, sealed again after the damage, is used or refused, and never executed."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from damage import damaged, fuzz, values
from hypothesis import given
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parents[1] / "deploy"))

from deployed import EXAMPLES, save_run

from abmll import MetaModel
from abmll.deploy.adapter import load_adapter
from abmll.deploy.task_model import over
from abmll.files import new_partial, publish


@pytest.fixture(scope="module")
def adapter(build_tiny, tmp_path_factory):
    """A task's model, and its two files."""
    run = save_run(build_tiny(), tmp_path_factory.mktemp("run"))
    model = MetaModel.load(run, device="cpu").adapt(EXAMPLES, folds=0)
    folder = model.save(tmp_path_factory.mktemp("fuzz") / "adapter")
    return model, {name: (folder / name).read_bytes() for name in ("adapter.safetensors", "card.json")}


@fuzz
@given(st.sampled_from(["adapter.safetensors", "card.json"]), st.data())
def test_an_adapter_of_anything_is_used_or_refused(adapter, tmp_path_factory, file, data):
    model, files = adapter
    contents = damaged(files[file]) | st.binary(max_size=100)
    if file == "card.json":
        card = json.loads(files[file])
        parts = st.sampled_from([(key,) for key in card] + [("config", key) for key in card["config"]])
        contents |= values.map(lambda value: json.dumps(value).encode())
        contents |= st.tuples(parts, values).map(lambda change: json.dumps(changed(card, *change)).encode())
    folder = tmp_path_factory.mktemp("changed") / "adapter"
    partial = new_partial(folder)
    for name, own in {**files, file: data.draw(contents)}.items():
        (partial / name).write_bytes(own)
    publish(partial, folder)
    try:
        phi, card = load_adapter(folder)
        found = over(model.base, folder, phi, card)
    except ValueError as error:  # ConfigError and Refused are ValueErrors
        assert str(error)
        return
    if all(torch.isfinite(value).all() for value in phi.values()) and found.options:
        found.predict(["It was slow."])


def changed(card, path, value):
    """The card with another value at a place, one or two keys deep."""
    if len(path) == 1:
        return {**card, path[0]: value}
    return {**card, path[0]: {**card[path[0]], path[1]: value}}
