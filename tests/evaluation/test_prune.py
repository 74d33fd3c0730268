"""Pruning: which elements, in which layers, when; and that nothing of it stays."""

import pytest
import torch
from evaluations import CLOSE, adapt_by_hand, evaluator, mean_nll, predictions, scattered

from abmll.config.schema import PruneConfig
from abmll.evaluation.prune import pruned, pruned_modules, zero_smallest
from abmll.tasks.episodes import support_examples


def test_the_smallest_magnitudes_are_zeroed():
    x = torch.tensor([[3.0, -0.1, 0.2, -5.0, 1.0], [0.5, 4.0, -0.25, 2.0, -0.75]])
    expected = torch.tensor([[3.0, 0.0, 0.0, -5.0, 1.0], [0.0, 4.0, 0.0, 2.0, -0.75]])
    assert torch.equal(zero_smallest(x, 0.4), expected)
    assert torch.equal(zero_smallest(x, 0.59), expected) and torch.equal(zero_smallest(x, 0.1), x)


@pytest.mark.parametrize("fraction", [0.01, 0.1, 0.29, 0.3])
def test_as_many_as_the_fraction_says_even_among_equals(fraction):
    """0.29 * 100 is below 29 in floating point."""
    zeros = (zero_smallest(torch.ones(2, 3, 100), fraction) == 0).sum(dim=-1)
    assert zeros.unique().tolist() == [round(100 * fraction)]


@pytest.mark.parametrize("where", ["hidden", "projections"])
def test_every_layer_s_output_is_pruned_and_nothing_stays(where, build_tiny):
    tiny = scattered(build_tiny())
    config = PruneConfig(fraction=0.3, where=where)
    modules = pruned_modules(tiny.model, tiny.adapters, config)
    text = tiny.model.config.get_text_config()
    assert len(modules) == text.num_hidden_layers * (1 if where == "hidden" else 3)
    before = tiny.learner.mean_probabilities(tiny.batch)
    inputs, outputs = {}, {}
    with pytest.raises(KeyError), pruned(tiny.model, tiny.adapters, config):
        hooks = [m.register_forward_hook(lambda m, i, y, n=n: outputs.update({n: y})) for n, m in enumerate(modules)]
        hooks += [
            m.register_forward_pre_hook(lambda m, i, k, n=n: inputs.update({n: (i, k)}), with_kwargs=True)
            for n, m in enumerate(modules)
        ]
        during = tiny.learner.mean_probabilities(tiny.batch)
        for hook in hooks:
            hook.remove()
        raise KeyError("whatever goes wrong within")
    for number, module in enumerate(modules):
        output = outputs[number]
        assert ((output == 0).sum(dim=-1) == int(0.3 * output.shape[-1])).all()
        positional, named = inputs[number]
        with torch.no_grad():
            whole = module(*positional, **named)  # of what it was given, pruned before
        kept = output != 0
        assert torch.equal(output[kept], whole[kept])
        assert (whole.abs().masked_fill(kept, 0).amax(-1) <= whole.abs().masked_fill(~kept, torch.inf).amin(-1)).all()
    assert not any(module._forward_hooks for module in tiny.model.modules())
    assert torch.equal(tiny.learner.mean_probabilities(tiny.batch), before) and (during - before).abs().max() > 1e-6


@pytest.mark.parametrize("where", ["hidden", "projections"])
def test_predictions_are_pruned_and_adaptation_is_not(where, build_tiny):
    tiny = scattered(build_tiny(method={"name": "reptile"}))
    task, config = tiny.parts.tasks.test[0], PruneConfig(fraction=0.3, where=where)
    plain, found = predictions(tiny), predictions(tiny, prune=config)
    adapt_by_hand(tiny, support_examples(task, 3 * tiny.config.tasks.batch_size, tiny.config.seed))
    with pruned(tiny.model, tiny.adapters, config):
        torch.testing.assert_close(found[3].nll, mean_nll(tiny, task.test), **CLOSE)
    for steps in (0, 3):
        assert (found[steps].nll - plain[steps].nll).abs().max() > 1e-3


def test_a_fraction_of_zero_hooks_nothing(build_tiny, monkeypatch):
    tiny, hooked, register = build_tiny(), [], torch.nn.Module.register_forward_hook

    def spy(module, *arguments, **named):
        hooked.append(module)
        return register(module, *arguments, **named)

    monkeypatch.setattr(torch.nn.Module, "register_forward_hook", spy)
    evaluator(tiny).evaluate(tiny.method, tiny.parts.tasks.test[:1], "test")
    assert {id(module) for module in hooked} <= {id(tiny.model.get_output_embeddings())}  # for the letters' logits


def test_a_model_without_layers_that_are_known_is_told(build_tiny, monkeypatch):
    monkeypatch.setattr("abmll.evaluation.prune.GradientCheckpointingLayer", torch.nn.Bilinear)
    with pytest.raises(ValueError, match=r"eval\.prune\.where: 'hidden': no decoder layers .* set eval\.prune\.where"):
        predictions(build_tiny(), prune=PruneConfig(fraction=0.1))
