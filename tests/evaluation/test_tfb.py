"""Training-free Bayesianization: its noise, its search, and what an evaluation makes of them."""

import math

import numpy as np
import pytest
import torch
from evaluations import CLOSE, adapt_by_hand, evaluate, evaluator, predictions, scattered

from abmll.config.checks import SAMPLED
from abmll.config.schema import TFBConfig
from abmll.evaluation.tfb import RANGE, drawn_weights, inverse_root, largest_sigma
from abmll.kernels import NoiseKey, fold_seed, standard_normal
from abmll.methods import METHODS, Pretrained
from abmll.tasks.episodes import in_batches, support_examples


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_the_inverse_root_of_b_is_the_square_root_of_a_pseudoinverse():
    b = normal(12, 4)
    b[:, 3] = b[:, 0] - b[:, 1]  # of rank three
    root = inverse_root(b).numpy()
    np.testing.assert_allclose(root @ root, np.linalg.pinv(b.numpy().T @ b.numpy()), atol=1e-10)
    np.testing.assert_allclose(root, root.T, atol=1e-12)
    wide = normal(2, 4)  # fewer outputs than the rank
    np.testing.assert_allclose(
        inverse_root(wide) @ inverse_root(wide), np.linalg.pinv(wide.numpy().T @ wide.numpy()), atol=1e-10
    )


def test_without_a_direction_there_is_no_noise():
    assert torch.equal(inverse_root(torch.zeros(5, 3)), torch.zeros(3, 3))
    assert inverse_root(torch.full((5, 3), torch.nan)).isnan().all()


def test_draws_are_isotropic_in_the_columns_of_b(build_tiny):
    """B A' - B A = sigma U V^T E, with the E of (seed, layer, sample)."""
    tiny = scattered(build_tiny(torch.float64, method={"name": "reptile"}), 0.3)
    tiny.adapters.reset_phi(2)
    with torch.no_grad():
        for parameter in tiny.adapters.phi.values():
            parameter[1] += 0.1 * normal(*parameter.shape[1:])
    before = {name: (p.data, p.detach().clone()) for name, p in tiny.adapters.phi.items()}
    with drawn_weights(tiny.adapters, slot=1, samples=3, seed=5) as drawn:
        assert drawn.varies and tiny.adapters.groups == 3
        drawn.set_sigma(0.25)
        for index, (name, layer) in enumerate(tiny.adapters.layers.items()):
            a, b = (before[f"{name}.mean.{factor}"][1][1] for factor in "ab")
            u, _, vt = np.linalg.svd(b.numpy(), full_matrices=False)
            for sample in range(3):
                noise = standard_normal(*a.shape, NoiseKey(5, 0), index, sample).double().numpy()
                found = (layer.phi.mean.b[sample] @ layer.phi.mean.a[sample]).detach().numpy()
                np.testing.assert_allclose(found - (b @ a).numpy(), 0.25 * u @ vt @ noise, atol=1e-9)
    for name, (data, value) in before.items():
        phi = tiny.adapters.phi[name]
        assert phi.data_ptr() == data.data_ptr() and torch.equal(phi, value)


def test_as_in_the_paper_a_turned_by_v_deviates_by_sigma_over_d(build_tiny):
    tiny = scattered(build_tiny(torch.float64, method={"name": "reptile"}), 0.3)
    pair = next(iter(tiny.adapters.layers.values())).phi.mean
    a, (_, d, vt) = pair.a.detach()[0].clone(), np.linalg.svd(pair.b.detach()[0].numpy(), full_matrices=False)
    with drawn_weights(tiny.adapters, slot=0, samples=40, seed=5) as drawn:
        drawn.set_sigma(0.5)
        turned = vt @ (pair.a.detach() - a).numpy()  # [S, r, K]
    np.testing.assert_allclose(turned.std(axis=(0, 2)), 0.5 / d, rtol=0.1)
    correlation = np.corrcoef(turned.transpose(1, 0, 2).reshape(len(d), -1))
    assert np.abs(correlation - np.eye(len(d))).max() < 0.1


@pytest.mark.parametrize("evaluations", [1, 12])
def test_the_search_ends_after_as_many_evaluations(evaluations):
    tried = []

    def nll(sigma):
        tried.append(sigma)
        return 1 + sigma

    found = largest_sigma(nll, 1.03, evaluations)
    assert len(tried) == evaluations and found <= 0.03
    assert evaluations == 1 or found == pytest.approx(0.03, rel=0.01)
    assert largest_sigma(lambda sigma: 2.0, 1.0, evaluations) == 0.0
    assert largest_sigma(lambda sigma: math.nan, 1.0, evaluations) == 0.0
    assert RANGE[0] < largest_sigma(lambda sigma: 0.0, 1.0, evaluations) < RANGE[1]


def test_an_untrained_adapter_has_nothing_to_vary(build_tiny):
    tiny = build_tiny(method={"name": "lora"})
    pretrained, tfb = Pretrained(tiny.config.method), TFBConfig(samples=2, evaluations=4)
    found = evaluate(tiny, method=pretrained, tfb=tfb)
    assert all(scores["tfb_sigma"] == 0 for scores in found.tasks[0].values())
    assert any(scores["tfb_sigma"] > 0 for scores in found.tasks[3].values())
    plain, drawn = predictions(tiny, pretrained), predictions(tiny, pretrained, tfb=tfb)
    torch.testing.assert_close(drawn[0].options, plain[0].options, **CLOSE)


def test_an_evaluation_averages_the_draws_that_the_support_set_bears(build_tiny):
    method = {"name": "reptile", "test_steps": 8, "test_lr": 0.05}  # until noise is worse than none
    tiny = scattered(build_tiny(method=method))
    task, letters, tolerance = tiny.parts.tasks.test[0], tiny.parts.tasks.letter_ids, 0.02
    own = evaluator(tiny, tfb=TFBConfig(samples=3, tolerance=tolerance, evaluations=8))
    scored = own._evaluate_tasks(tiny.method, [task], "test")[task.name][8]
    sigma, seed = scored.fitted["tfb_sigma"], fold_seed(tiny.config.seed, "tfb", task.name)
    assert RANGE[0] < sigma < RANGE[1]
    support = support_examples(task, 8 * tiny.config.tasks.batch_size, tiny.config.seed)
    adapt_by_hand(tiny, support)
    start = {name: value.detach().clone() for name, value in tiny.adapters.phi.items()}

    def average(examples, sigma):
        """Each example's NLL by the three draws' average, one draw after another."""
        draws = []
        for sample in range(3):
            for index, name in enumerate(tiny.adapters.layers):
                b = start[f"{name}.mean.b"][0].double()
                values, vectors = torch.linalg.eigh(b.T @ b)
                noise = standard_normal(*start[f"{name}.mean.a"].shape[1:], NoiseKey(seed, 0), index, sample)
                change = sigma * (vectors * values.rsqrt()) @ vectors.T @ noise.double()
                tiny.adapters.phi[f"{name}.mean.a"].data = start[f"{name}.mean.a"] + change.float()
            found = []
            for batch in in_batches(examples, letters, 2):
                with torch.no_grad():
                    probabilities = tiny.learner.forward(batch, None)[0].double().softmax(dim=-1)
                found.append(probabilities.gather(1, batch.target[:, None])[:, 0])
            draws.append(torch.cat(found))
        return -torch.stack(draws).mean(dim=0).log()

    torch.testing.assert_close(scored.predictions.nll, average(task.test, sigma), rtol=1e-3, atol=1e-4)
    support = support[:6]  # the others are the same again
    most = (1 + tolerance) * average(support, RANGE[0]).mean()
    assert average(support, sigma).mean() <= most * (1 + 1e-4)
    assert average(support, 1.2 * sigma).mean() > most
    assert (scored.predictions.variance > 0).all()


def test_draws_do_not_depend_on_the_batch_size(build_tiny):
    """A draw is one function for all examples."""
    tiny = scattered(build_tiny(method={"name": "reptile"}))
    one, three = (predictions(tiny, tfb=TFBConfig(samples=2), batch_size=size) for size in (1, 3))
    for steps in (0, 3):
        torch.testing.assert_close(one[steps].options, three[steps].options, rtol=1e-3, atol=1e-4)


def test_the_configuration_knows_which_methods_have_a_posterior(build_tiny):
    config = build_tiny().config.method
    assert sorted(SAMPLED) == sorted(name for name, method in METHODS.items() if method(config).sampled)
