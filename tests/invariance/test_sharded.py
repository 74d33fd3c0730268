"""A base that is spread over two ranks gives what the whole one gives, bit for bit. One start of the launcher."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from runs import Run, call
from transformers import AutoModelForCausalLM

from abmll.models.architectures import architecture_config, byte_tokenizer, random_model
from abmll.ports import free_port

sys.path.insert(0, str(Path(__file__).parents[1] / "memory"))
from setups import make_setup

from abmll.memory.episode import count_episode

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.skipif(
        torch.cuda.is_available(), reason="NCCL takes one rank a GPU; for the CPU set CUDA_VISIBLE_DEVICES="
    ),
    pytest.mark.skipif(shutil.which("c++") is None, reason="DeepSpeed builds its CPU operation with a C++ compiler"),
]

SCRIPT = Path(__file__).with_name("sharded_ranks.py")
FORWARD, BOTH = "a forward pass", "a forward and a backward pass"


def save_model(folder: Path, tied: bool) -> None:
    config = architecture_config("tiny")
    config.tie_word_embeddings = tied
    random_model(config, torch.device("cpu"), torch.float32, "sdpa").save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """The folder of all runs, and each rank's facts."""
    folder = tmp_path_factory.mktemp("sharded")
    for name in ("tied", "untied", "broken"):
        save_model(folder / f"model-{name}", tied=name == "tied")
    (folder / "model-broken/model.safetensors").unlink()
    launcher = shutil.which("deepspeed") or str(Path(sys.executable).with_name("deepspeed"))
    command = [sys.executable, launcher, "--num_accelerators", "2", "--master_port", str(free_port()), str(SCRIPT)]
    found = call([*command, str(folder)], timeout=900)
    assert found.returncode == 0, found.stdout + found.stderr
    return folder, [json.loads((folder / f"facts-{rank}.json").read_text()) for rank in (0, 1)]


@pytest.mark.parametrize("kind", ["activation", "weight", "first order", "side by side"])
@pytest.mark.parametrize("how", ["sharded", "recomputed"])
def test_a_sharded_base_learns_what_a_whole_one_does(ranks, kind, how):
    """Theta, step lines and scores; also where the second rank has no episode or task left, or other batches."""
    folder, _ = ranks
    whole = Run(folder / f"{kind} replicated")
    assert whole.metrics and whole.scores
    Run(folder / f"{kind} {how}").same_as(whole)


@pytest.mark.parametrize("posterior", ["activation", "weight"])
def test_one_rank_with_itself(make_run, posterior):
    kind = ("trainer.episodes=2", f"adapters.posterior={posterior}")
    shared = make_run("sharded").train(*kind, "model.sharding=full")
    shared.same_as(make_run("whole").train(*kind))


def test_a_run_goes_on_with_the_base_whole(ranks):
    folder, _ = ranks
    Run(folder / "resumed").same_as(Run(folder / "activation replicated"))


def test_a_finished_run_is_scored_again(ranks):
    folder, _ = ranks
    assert json.loads((folder / "scored.json").read_text()) == Run(folder / "activation sharded").scores


def test_ranks_make_the_same_passes(ranks):
    """As many as the rank with the most work has, and all of everyone's."""
    _, facts = ranks
    for kind in ("activation", "weight", "first order"):
        for how in ("sharded", "recomputed"):
            first, second = (fact[f"{kind} {how}"] for fact in facts)
            assert first["passes"] == second["passes"]
            assert first["idle"][BOTH] + second["idle"][BOTH] > 0
    # K + 1 an episode; then three tasks of 7 examples, scored in threes before and after K steps
    own = {FORWARD: 3 * 2 * 3, BOTH: 5 * 3 + 3 * 2}
    counts = [fact["first order sharded"] for fact in facts]
    assert {kind: sum(count["passes"][kind] - count["idle"][kind] for count in counts) for kind in own} == own
    # no more than the rank with the most work has: 3 episodes in as many steps, and 2 tasks
    assert counts[0]["passes"] == {FORWARD: 2 * 2 * 3, BOTH: 3 * 3 + 2 * 2}


@pytest.mark.parametrize("name", ["tied", "untied"])
def test_a_folder_is_read_by_one_rank_and_spread(ranks, name):
    folder, facts = ranks
    whole = AutoModelForCausalLM.from_pretrained(folder / f"model-{name}", dtype=torch.float32).eval()
    with torch.no_grad():
        logits = whole(torch.arange(6)[None], use_cache=False).logits
    vocabulary, size = 512 * 64 * 4, sum(parameter.nbytes for parameter in whole.parameters())
    frequencies = sum(buffer.nbytes for buffer in whole.buffers())
    for rank, fact in enumerate(facts):
        assert torch.equal(torch.load(folder / f"{name}-{rank}.logits"), logits)
        held = fact[name]
        # tied embeddings stay whole; all other numbers of rows are even
        shared = size - vocabulary if name == "tied" else size
        assert held["bytes"] == size - shared // 2 + frequencies


def test_bytes_that_passes_bring(ranks):
    """A rank receives the other's half: of all in a forward pass, of all but the embeddings in a backward pass."""
    for fact in ranks[1]:
        for name in ("tied", "untied"):
            forward, both = fact[name]["received"]
            expected = fact[name]["expected"]
            assert [forward, both] == [expected[0], sum(expected)]
        half = 512 * 64 * 4 // 2
        untied, tied = fact["untied"]["expected"], fact["tied"]["expected"]
        assert untied[0] - untied[1] == half and tied[0] == tied[1] == untied[0] - 2 * half > 0


def test_what_cannot_be_is_refused_on_every_rank(ranks):
    """None waits for another that has given up."""
    for fact in ranks[1]:
        assert "model-broken" in fact["no model"] and "cannot be loaded" in fact["no model"]


@pytest.mark.parametrize("policy", ["none", "all layers"])
def test_the_plan_counts_what_real_ranks_take(ranks, policy):
    counted = count_episode(make_setup(policy, ranks=2, model={"sharding": "full"}, scoring=(3,)))
    assert json.loads(json.dumps(asdict(counted))) == ranks[1][0]["memory"][policy]
    assert counted.phases["forward"]["gathered layers"] > 0
