"""Fused kernels and plain PyTorch learn the same from the same noise: fp32, through the trainer."""

from __future__ import annotations

import pytest
from runs import Run
from torch import Tensor
from torch.testing import assert_close

pytestmark = pytest.mark.usefixtures("large_blocks")

# AdamW divides by the gradient's own size, which magnifies rounding where that is near its eps. An eps above all
# gradients, with learning rates to match, makes its steps proportional to them.
SMOOTH = ("method.adam_eps=30", "method.inner_lr=3e-2", "method.outer_lr=10")
SMALL = ("trainer.episodes=2", "adapters.modules=[v_proj]", "tasks.batch_size=1", *SMOOTH)
# The longest row of fp32 roundings, all to one side: sums over 150 tokens and 128 columns, forward and back through two
# layers, in two inner steps and an outer one.
BOUND = (150 + 128) * 2 * 2 * 3 * 2.0**-24


def trained(
    run: Run, posterior: str, meta_gradient: str, backend: str, checkpointing: str = "false"
) -> tuple[list[dict], dict[str, Tensor]]:
    """Step lines of two episodes, without the scoring at the end, and the theta that they led to."""
    overrides = (
        f"adapters.posterior={posterior}",
        f"adapters.backend={backend}",
        f"method.meta_gradient={meta_gradient}",
        f"trainer.activation_checkpointing={checkpointing}",
    )
    with run.session(*SMALL, *overrides) as session:
        session.trainer.run()
        theta = session.parts.learner.adapters.theta
        return run.metrics, {name: value.detach().clone() for name, value in theta.items()}


@pytest.mark.parametrize("meta_gradient", ["kl", "first_order"])
@pytest.mark.parametrize("posterior", ["activation", "weight"])
def test_fused_kernels_learn_what_plain_pytorch_learns(make_run, posterior, meta_gradient):
    kind = (posterior, meta_gradient)
    fused_lines, fused = trained(make_run("triton"), *kind, backend="triton")
    lines, plain = trained(make_run("torch"), *kind, backend="torch")
    assert len(fused_lines) == len(lines) == 2
    for ours, theirs in zip(fused_lines, lines, strict=True):
        assert ours == pytest.approx(theirs, rel=BOUND)
    for name, value in plain.items():
        if name.endswith(".b"):  # zero at the start: all of it was learned
            assert value.any() and (fused[name] - value).norm() < BOUND * value.norm(), name

    if meta_gradient == "first_order":
        again_lines, again = trained(make_run("checkpointed"), *kind, backend="triton", checkpointing="true")
        assert again_lines == fused_lines
        assert_close(again, fused, rtol=0, atol=0)
