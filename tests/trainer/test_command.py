"""launch/train.py as a user meets it: what it prints, what it returns, what it leaves alone."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from runs import TRAIN, Run, call
from transformers import LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM

from abmll.models.architectures import byte_tokenizer


@pytest.fixture
def jsonl(run, tmp_path):
    """Overrides for two tasks in files, and one that is not there."""
    for task in ("red", "blue", "green"):
        for split, rows in (("train", 8), ("test", 4)):
            path = tmp_path / "tasks" / task / f"{split}.jsonl"
            path.parent.mkdir(parents=True, exist_ok=True)
            row = {"task": task, "input": "Which?", "output": "yes", "options": ["yes", "no"]}
            path.write_text("".join(json.dumps({**row, "input": f"Which {n}?"}) + "\n" for n in range(rows)))
    folder = f"tasks.folder={tmp_path / 'tasks'}"
    return ("tasks.source=jsonl", folder, "tasks.train=[red, blue, absent]", "tasks.test=[green]")


def test_validate_checks_a_good_configuration_and_writes_nothing(run):
    found = call(run.command("--validate"))
    assert found.returncode == 0, found.stderr
    for name in ("configuration", "deepspeed", "model", "tasks", "memory"):
        assert f"ok      {name}: " in found.stdout
    assert "FAILED" not in found.stdout and "step 1" not in found.stdout
    assert not run.folder.exists()


def test_validate_tells_what_does_not_fit(run, command, capsys):
    """It fails on a GPU alone: a machine without one may only be where the configuration is written."""
    assert command("--validate", "memory.budget_gb=1e-9") == 0
    out = capsys.readouterr().out
    assert "note    memory: DOES NOT FIT 1e-09 GB: " in out and f"python launch/plan.py --config {run.config}" in out


def test_validate_tells_of_keys_that_the_method_does_not_read(command, capsys):
    assert command("--validate", "method.name=reptile", "method.outer_lr=0.5") == 0
    told = "method.beta: 1e-12, method.outer_lr: 0.5: reptile does not read them; take them out; how far theta goes"
    assert f"note    method: {told} " in capsys.readouterr().out


def test_validate_reports_every_fault_at_once(run, tmp_path, command, capsys):
    (tmp_path / "broken.json").write_text('{"zero_optimization": ')
    status = command(
        *("--validate", "model.name=package:no_such_package/model.gguf", "tasks.source=jsonl"),
        *(f"tasks.folder={tmp_path / 'nowhere'}", "tasks.train=[a]", "tasks.test=[b]"),
        f"trainer.deepspeed={tmp_path / 'broken.json'}",
    )
    out, err = capsys.readouterr()
    assert status == 2
    assert "FAILED  deepspeed: " in out and "not valid JSON" in out
    assert "FAILED  model: " in out and "no_such_package" in out
    assert "FAILED  tasks: " in out and "nowhere" in out
    assert "Traceback" not in out + err
    assert not run.folder.exists()


def without_torch(*arguments: str) -> list[str]:
    """The command in a process that cannot import torch: what answers at once must not need it."""
    program = f"import runpy, sys; sys.modules['torch'] = None; sys.argv = {[str(TRAIN), *arguments]!r}\n"
    return [sys.executable, "-c", program + f"runpy.run_path({str(TRAIN)!r}, run_name='__main__')"]


def test_an_unknown_key_is_answered_with_the_likely_one_at_once(run):
    found = call(without_torch("--config", str(run.config), "method.inner_step=3", "trainer.episode=4"))
    assert found.returncode == 2
    assert found.stderr.startswith("error: ") and "Traceback" not in found.stderr
    assert "inner_steps?" in found.stderr and "episodes?" in found.stderr


def test_validate_of_a_resume_looks_at_the_checkpoint(run: Run, command, capsys):
    asked = ("--validate", "--resume", "auto", "trainer.episodes=3")
    assert command(*asked) == 0
    assert "ok      checkpoint: none, so the run starts from the beginning" in capsys.readouterr().out
    run.train("trainer.tasks_per_step=3", "trainer.episodes=3")
    assert command(*asked) == 0
    out = capsys.readouterr().out
    assert f"ok      checkpoint: {run.folder}/checkpoints/step-00000001, written by 1 ranks" in out
    assert "ok      ranks: 3 episodes an outer step on 1 ranks" in out
    assert command(*asked, "seed=1") == 2
    assert "FAILED  checkpoint: --resume auto: the configuration differs" in capsys.readouterr().out


def test_help_does_not_wait_for_torch():
    found = call(without_torch("--help"), timeout=20)
    assert found.returncode == 0, found.stderr
    for option in ("--config", "--validate", "--resume", "--overwrite", "section.key=value"):
        assert option in found.stdout
    assert "local_rank" not in found.stdout


def test_resume_and_overwrite_exclude_each_other(command, capsys):
    assert command("--resume", "auto", "--overwrite") == 2
    assert "not allowed with" in capsys.readouterr().err


def test_a_backend_that_cannot_run_is_told_before_anything_is_written(run: Run, command, capsys, monkeypatch):
    monkeypatch.setattr("abmll.kernels.backends._device_obstacle", lambda device: "no GPU here")
    remedy = "adapters.backend: 'triton': no GPU here; or set backend: auto"
    assert command("--validate", "adapters.backend=triton") == 2
    assert f"FAILED  projections: {remedy}" in capsys.readouterr().out
    assert command("adapters.backend=triton") == 2
    assert remedy in capsys.readouterr().err and not run.folder.exists()
    assert command("--validate") == 0
    assert "ok      projections: torch: no GPU here" in capsys.readouterr().out


def test_an_output_that_cannot_be_a_folder_is_one_line(run: Run, command, tmp_path, capsys):
    mine = tmp_path / "README.md"
    mine.write_text("mine")
    for output, problem in (
        (mine, f"{mine} is a file"),
        (mine / "run", f"{mine} is a file"),
        ("/proc/x", "nothing can be written there ("),
        (tmp_path / ("x" * 300), "nothing can be written there ("),
    ):
        for arguments in ((), ("--validate",), ("--overwrite",), ("--resume", "auto")):
            assert command(*arguments, f"output={output}") == 2
            lines = "".join(capsys.readouterr()).splitlines()
            (line,) = (line for line in lines if line.startswith(("FAILED", "error: ")))
            assert f"output: {output}: {problem}" in line and "; name a folder with output=FOLDER" in line
    assert mine.read_text() == "mine" and not list(tmp_path.glob("tmp*"))


def test_every_faulty_row_is_told_at_once(run: Run, command, jsonl, tmp_path, capsys):
    """A malformed line of one task and a wrong encoding of another, in --validate and at the start of a run."""
    with (tmp_path / "tasks/red/train.jsonl").open("a") as file:
        file.write('{"input": \n')
    (tmp_path / "tasks/green/test.jsonl").write_bytes(b'{"input": "caf\xe9"}\n')
    assert command("--validate", *jsonl) == 2
    out = capsys.readouterr().out
    assert command(*jsonl) == 2
    for text in (out, capsys.readouterr().err):
        assert "2 faults in 2 files:" in text
        assert "red/train.jsonl:9: malformed JSON" in text and "green/test.jsonl:1: byte 0xe9 is not UTF-8" in text
    assert not run.folder.exists()


def test_lengths_are_counted_by_validate_and_not_claimed_by_a_start(run: Run, command, jsonl, tmp_path, capsys):
    row = {"task": "red", "input": "Which? " * 100, "output": "yes", "options": ["yes", "no"]}
    with (tmp_path / "tasks/red/train.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n" + json.dumps({**row, "options": ["yes", "no" * 200]}) + "\n")
    jsonl += ("tasks.max_tokens=300",)
    assert command("--validate", *jsonl) == 0
    out = capsys.readouterr().out
    assert "1 unseen; prompts of at most 300 tokens" in out
    assert "note: red: of 14 prompts 1 truncated and 1 dropped at 300 tokens" in out and "note: blue: of" not in out
    assert command(*jsonl, "trainer.episodes=1") == 0
    out = capsys.readouterr().out
    assert "18 training and 4 test examples; prompts of at most 300 tokens, longer ones truncated" in out
    assert "note: red: of" not in out


@pytest.fixture
def short_models(tmp_path):
    """Folders of models made for 140 positions: OPT's have a table, Llama's go on."""
    size = {"vocab_size": 512, "hidden_size": 32, "num_hidden_layers": 1, "max_position_embeddings": 140}
    opt = OPTForCausalLM(OPTConfig(**size, ffn_dim=64, num_attention_heads=2, word_embed_proj_dim=32))
    llama = LlamaForCausalLM(LlamaConfig(**size, intermediate_size=64, num_attention_heads=2))
    folders = {"opt": tmp_path / "opt", "llama": tmp_path / "llama"}
    for model, folder in zip((opt, llama), folders.values(), strict=True):
        model.save_pretrained(folder)
        byte_tokenizer().save_pretrained(folder)
    return folders


def test_prompts_beyond_the_models_positions(run: Run, command, short_models, capsys):
    tokens = ("tasks.max_tokens=300", "trainer.episodes=1", "adapters.modules=[q_proj, v_proj]")
    opt, llama = (f"model.name={short_models[kind]}" for kind in ("opt", "llama"))
    remedy = "a model of type 'opt' has a table of 140 positions and takes no longer prompt; set it to 140 at most"
    for arguments in (("--validate",), ()):
        assert command(*arguments, *tokens, opt) == 2
        assert f"tasks.max_tokens: 300: {remedy}" in "".join(capsys.readouterr())
    assert not run.folder.exists()
    beyond = "tokens are longer than the model was made for, 140 (max_position_embeddings)"
    for arguments in (("--validate",), ()):
        assert command(*arguments, *tokens, llama) == 0
        (note,) = (line for line in capsys.readouterr().out.splitlines() if beyond in line)
        assert "note: " in note and ("prompts of 300 tokens" in note) == (not arguments)
        assert command(*arguments, *tokens, llama, "tasks.max_tokens=140", f"output={run.folder}-short") == 0
        assert beyond not in capsys.readouterr().out
    assert command(*tokens, opt, "tasks.max_tokens=140", "--overwrite") == 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU has the instructions")
def test_a_dtype_without_instructions_is_told(run: Run, command, monkeypatch, capsys):
    monkeypatch.setattr("abmll.config.native._cpu_multiplies_bfloat16", lambda: False)
    for dtype in ("bfloat16", "float32"):
        assert command(f"model.dtype={dtype}", "trainer.episodes=1", f"output={run.folder}-{dtype}") == 0
        told = "note: model.dtype: bfloat16: this CPU has no instructions" in capsys.readouterr().out
        assert told == (dtype == "bfloat16")


def test_missing_tasks_are_told(run: Run, command, jsonl, capsys):
    assert command("--validate", *jsonl) == 0
    out = capsys.readouterr().out
    assert "note: missing task absent: " in out and "2 to train on" in out
    assert command(*jsonl, "trainer.episodes=1") == 0
    assert "note: missing task absent: " in capsys.readouterr().out
    assert [sorted(found["tasks"]["0"]) for found in run.scores] == [["green"]]


def test_missing_tasks_are_an_error_on_request(run: Run, command, jsonl, capsys):
    assert command("--validate", *jsonl, "tasks.missing=error") == 2
    assert "absent" in capsys.readouterr().out
    assert command(*jsonl, "tasks.missing=error") == 2
    error = capsys.readouterr().err
    assert "tasks.missing: error: 1 listed tasks are not there" in error and "absent" in error
    assert not run.folder.exists()


def test_a_run_says_where_everything_is(run: Run, command, capsys):
    assert command("trainer.episodes=1") == 0
    out = capsys.readouterr().out
    for path in ("final", "scores.md", "metrics.jsonl", "checkpoints"):
        assert str(run.folder / path) in out and (run.folder / path).exists()
    assert (run.folder / "scores.md").read_text().strip() in out


def test_divergence_is_an_error_line(run: Run, command, capsys):
    """A step of this size gives NaN at once."""
    assert command("method.inner_lr=1e30", "trainer.episodes=9", "trainer.max_nonfinite=2") == 1
    captured = capsys.readouterr()
    assert "error: 2 episodes in a row gave NaN or Inf" in captured.err and "Traceback" not in captured.err
    assert [line["skipped_episodes"] for line in run.metrics] == [1, 2]
