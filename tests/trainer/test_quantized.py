"""A whole run on a 4-bit base, on a CPU: training, validation in between, the scores of what it left."""

from __future__ import annotations

import pytest

pytest.importorskip("bitsandbytes", reason="pip install -e '.[quantization]'")
pytest.importorskip("accelerate")

NF4 = ("model.quantization=nf4", "model.dtype=bfloat16", "trainer.episodes=2", "eval.every=1", "adapters.rank=2")


@pytest.mark.parametrize("posterior", ["activation", "weight"])
def test_a_run_with_checkpointing_on_is_the_run_with_it_off(make_run, posterior):
    """Evaluations come between the steps: the packed weights must stay what they were."""
    on, off = (
        make_run(f"{posterior}-{checkpointing}").train(
            *NF4, f"adapters.posterior={posterior}", f"trainer.activation_checkpointing={checkpointing}"
        )
        for checkpointing in ("true", "false")
    )
    on.same_as(off)
    assert any(value.any() for name, value in on.theta.items() if name.endswith(".b"))


def test_plain_lora_on_a_4_bit_base(make_run, capsys):
    run = make_run("lora").train(*NF4, "method.name=structured_lora", "eval.every=null")
    assert any(value.any() for name, value in run.theta.items() if name.endswith(".b"))
    assert "139,584 frozen parameters in nf4 on cpu" in capsys.readouterr().out
