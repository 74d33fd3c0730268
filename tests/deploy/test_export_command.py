"""The command, the folder that it leaves, and the hub (of which nothing is asked here)."""

import json
import re
import runpy
import sys
from pathlib import Path

import huggingface_hub
import pytest
import torch
from deployed import TEXTS
from huggingface_hub.errors import HfHubHTTPError
from safetensors.torch import load_file, save_file

from abmll import load_task_models
from abmll.config import Refused
from abmll.deploy.adapter import AdapterCard, load_adapter, save_adapter
from abmll.deploy.export import export_adapter, push
from abmll.files import damage

EXPORT = Path(__file__).parents[2] / "launch" / "export.py"


@pytest.fixture
def call(monkeypatch, capsys):
    """Exit status, standard output and standard error of the command, in this process."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["export", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(EXPORT), run_name="__main__")
        return ended.value.code, *capsys.readouterr()

    return call


@pytest.fixture
def adapter(adapted, tmp_path):
    return adapted.save(tmp_path / "adapter")


class Hub:
    """Stands for `HfApi`; `refusal` is raised by its upload."""

    calls, refusal = [], None

    def create_repo(self, name, **named):
        self.calls.append(("create", name, named))
        return f"https://hub/{name}"

    def upload_folder(self, **named):
        if self.refusal:
            raise self.refusal
        self.calls.append(("upload", named["repo_id"], sorted(path.name for path in named["folder_path"].iterdir())))


@pytest.fixture
def hub(monkeypatch):
    monkeypatch.setattr(Hub, "calls", [])
    monkeypatch.setattr(push, "HfApi", Hub)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "hf_x")
    return Hub


def test_plain_tensors_are_an_adapter(call, adapter, adapted, tmp_path):
    out = tmp_path / "out"
    status, told, err = call("--adapter", adapter, "--format", "safetensors", "--out", out, "--device", "cpu")
    assert status == 0, err
    assert "moods, as safetensors, on random:tiny in float32" in told and "6 layers, rank 8, scaled by 2" in told
    found = load_file(out / "adapter.safetensors")
    assert set(found) == set(adapted.phi) and damage(out) is None
    assert all(torch.equal(value, adapted.phi[name]) for name, value in found.items())
    assert "model.layers.0.self_attn.q_proj.log_variance.b" in found
    assert load_task_models([out], device="cpu")[0].predict(TEXTS) == adapted.predict(TEXTS)
    assert "variances of the posterior are beside the means" in (out / "README.md").read_text()


def test_tensors_that_are_not_written_right_are_found(adapted, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "abmll.deploy.adapter.write_tensors",
        lambda path, values: save_file({name: value + 1 for name, value in values.items()}, path),
    )
    with pytest.raises(Refused, match="is not what was written"):
        adapted.export(tmp_path / "out", "safetensors")
    assert not list(tmp_path.iterdir())


def test_a_runs_theta_in_another_dtype(call, run, meta, tmp_path):
    out = tmp_path / "out"
    status, told, err = call("--run", run, "--format", "merged", "--dtype", "bfloat16", "--out", out)
    assert status == 0, err
    assert "on random:tiny in bfloat16" in told and "in bfloat16 rounding takes" in told
    assert {value.dtype for value in load_file(out / "model.safetensors").values()} == {torch.bfloat16}
    assert json.loads((out / "export.json").read_text())["dtype"] == "bfloat16"


def test_an_adapter_of_other_weights_is_refused(call, adapter, tmp_path):
    card = json.loads((adapter / "card.json").read_text())
    phi, _ = load_adapter(adapter)
    card["base"]["fingerprint"] = "0" * 64
    save_adapter(adapter, phi, AdapterCard.model_validate(card))
    status, _, err = call("--adapter", adapter, "--format", "merged", "--out", tmp_path / "out")
    assert status == 2 and "an adapter serves no other weights; name its own model with --model" in err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--adapter", "missing"], r"--adapter: missing: holds no card\.json"),
        (["--run", "missing"], r"--run: missing: no such folder; name a run's output folder"),
        (["--adapter", "A", "--format", "peft"], r"which nobody else can load; use --format merged"),
        (["--adapter", "A", "--model", "random:qwen"], r"model\.name: 'random:qwen': no such architecture"),
    ],
)
def test_what_is_wrong_is_said(arguments, message, call, adapter, tmp_path):
    named = [adapter if value == "A" else value for value in arguments]
    status, out, err = call(*named, "--out", tmp_path / "out")
    assert (status, out) == (2, "") and re.match(f"error: .*{message}", err), err
    assert not (tmp_path / "out").exists()


def test_an_unknown_format(adapted, tmp_path):
    with pytest.raises(ValueError, match="format: 'onnx': no such format; take one of peft, merged, safetensors"):
        adapted.export(tmp_path / "out", "onnx")


def test_other_peoples_folders_are_left_alone(call, adapter, adapted, tmp_path):
    before = sorted(path.name for path in adapter.iterdir())
    status, _, err = call("--adapter", adapter, "--format", "safetensors", "--out", adapter)
    assert status == 2 and "holds other files than an export's; name a new folder" in err
    assert sorted(path.name for path in adapter.iterdir()) == before
    out = tmp_path / "out"
    out.mkdir()
    adapted.export(out, "safetensors")  # an empty folder, then an earlier export
    adapted.export(out, "merged")
    assert (out / "config.json").is_file() and not (out / "adapter.safetensors").exists()
    (out / "notes.txt").write_text("mine")
    with pytest.raises(Refused, match="holds other files"):
        adapted.export(out, "safetensors")
    assert (out / "notes.txt").read_text() == "mine" and (out / "config.json").is_file()
    (tmp_path / "file").write_text("")
    with pytest.raises(Refused, match="holds other files"):
        adapted.export(tmp_path / "file", "safetensors")


def test_a_failure_leaves_the_earlier_export(adapted, tmp_path, monkeypatch):
    out = tmp_path / "out"
    adapted.export(out, "safetensors")

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("abmll.deploy.export.write.model_card", interrupt)
    with pytest.raises(KeyboardInterrupt):
        export_adapter(adapted, out, "safetensors")
    assert damage(out) is None and [path.name for path in tmp_path.iterdir()] == ["out"]


def test_push(call, adapter, hub, tmp_path):
    out = tmp_path / "out"
    status, told, err = call("--adapter", adapter, "--format", "safetensors", "--out", out, "--push", "me/moods")
    assert status == 0, err
    assert told.splitlines()[-1].split() == ["pushed", "https://hub/me/moods"]
    assert hub.calls == [
        ("create", "me/moods", {"private": True, "exist_ok": True}),
        ("upload", "me/moods", ["README.md", "adapter.safetensors", "card.json", "export.json", "manifest.json"]),
    ]


def test_a_push_that_the_hub_refuses(call, adapter, hub, tmp_path, monkeypatch):
    refusal = HfHubHTTPError.__new__(HfHubHTTPError)  # its constructor wants an HTTP response
    Exception.__init__(refusal, "403 Forbidden\nat length")
    monkeypatch.setattr(hub, "refusal", refusal)
    out = tmp_path / "out"
    status, _, err = call("--adapter", adapter, "--format", "safetensors", "--out", out, "--push", "me/moods")
    assert status == 2 and "the hub did not take it (403 Forbidden)" in err
    assert damage(out) is None


@pytest.mark.parametrize("name", ["moods", "me/moods/x", "me/mo ods", ""])
def test_a_name_that_is_no_repositorys(name, call, adapter, hub, tmp_path):
    out = tmp_path / "out"
    status, _, err = call("--adapter", adapter, "--format", "safetensors", "--out", out, "--push", name)
    assert status == 2 and "--push: " in err
    assert hub.calls == [] and not out.exists()


def test_a_push_without_a_login(call, adapter, hub, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    out = tmp_path / "out"
    status, _, err = call("--adapter", adapter, "--format", "safetensors", "--out", out, "--push", "me/moods")
    assert status == 2 and "nobody is logged in to the Hugging Face hub here; run: hf auth login" in err
    assert hub.calls == [] and not out.exists(), "found before anything is written"


def test_from_python(adapted, tmp_path):
    assert adapted.export(str(tmp_path / "out"), "safetensors") == tmp_path / "out"
