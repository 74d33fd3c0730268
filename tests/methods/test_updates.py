"""Every method's update on one episode against a plain loop that shares no code with it but the noise."""

from __future__ import annotations

import pytest
import torch
from torch.distributions import Gamma, Normal, kl_divergence
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils.rnn import pad_sequence

from abmll.kernels import standard_normal
from abmll.methods import build_method
from abmll.models.architectures import architecture_config, random_model
from abmll.tasks.episodes import EpisodeSampler, PooledSampler

MODULES = [f"model.layers.{layer}.self_attn.{name}" for layer in (0, 1) for name in ("q_proj", "v_proj", "o_proj")]


class ByHand:
    """The tiny model with forward hooks instead of adapters, and tensors instead of modules; all in float64.

    Its prompts are padded on the right and not packed.
    """

    def __init__(self, tiny):
        self.config = tiny.config
        self.num_tasks = len(tiny.parts.tasks.train)
        self.model = random_model(architecture_config("tiny"), torch.device("cpu"), torch.float32, "sdpa").double()
        self.model.requires_grad_(False).eval()
        self.theta, self.phi = (
            {name: value.detach().clone().requires_grad_(True) for name, value in side.items()}
            for side in (tiny.adapters.theta, of_episode(tiny.adapters.phi))
        )

    def statistics(self, side, module, x):
        adapters = self.config.adapters
        alphas = {"mean": adapters.alpha, "log_variance": adapters.log_variance_alpha or adapters.alpha}
        mean, log_variance = (
            alpha / adapters.rank * side[f"{module}.{kind}.b"] @ side[f"{module}.{kind}.a"]
            for kind, alpha in alphas.items()
        )
        if adapters.posterior == "activation":
            mean, log_variance = x @ mean.T, x @ log_variance.T
        return mean, (log_variance + adapters.log_variance_offset).exp()

    def terms(self, batch, key):
        """NLL at phi, KL(phi || theta) and -log prior(theta); without a key the NLL of phi's mean alone."""
        kl, prior = torch.zeros(()), torch.zeros(())
        input_ids = pad_sequence(batch.input_ids.split(batch.prompts.sizes), batch_first=True)
        lengths = torch.tensor(batch.prompts.sizes)
        real = torch.arange(input_ids.shape[1]) < lengths[:, None]
        per_token = self.config.adapters.posterior == "activation"
        method = self.config.method

        def hook(index, module):
            def run(linear, arguments, y):
                nonlocal kl, prior
                x = arguments[0]
                if key is None:
                    scaling = self.config.adapters.alpha / self.config.adapters.rank
                    return y + scaling * x @ (self.phi[f"{module}.mean.b"] @ self.phi[f"{module}.mean.a"]).T
                mean, variance = self.statistics(self.phi, module, x)
                mean_theta, variance_theta = self.statistics(self.theta, module, x.detach())
                # by phi, the divergence's gradient also passes through x; by theta, every layer's input is given
                mean_p, variance_p = self.statistics(self.theta, module, x)
                if per_token:  # the real tokens' noise, one prompt's after another's
                    noise = torch.zeros_like(mean)
                    noise[real] = standard_normal(int(lengths.sum()), y.shape[-1], key, index).double()
                else:
                    noise = standard_normal(*linear.weight.shape, key, index).double()
                draw = mean + variance.sqrt() * noise
                q, p = Normal(mean, variance.sqrt()), Normal(mean_p, variance_p.sqrt())
                if method.kl_estimate == "closed_form":
                    elements = kl_divergence(q, p)
                else:
                    elements = q.log_prob(draw) - p.log_prob(draw)
                gamma = Gamma(*torch.tensor([method.prior_shape, method.prior_rate], dtype=torch.float64))
                density = Normal(0.0, 1.0).log_prob(mean_theta) + gamma.log_prob(1 / variance_theta)
                if per_token:
                    elements, density = elements[real], density[real]
                kl, prior = kl + elements.sum(), prior - density.sum()
                return y + (draw if per_token else x @ draw.T)

            return run

        hooks = [
            self.model.get_submodule(module).register_forward_hook(hook(index, module))
            for index, module in enumerate(MODULES)
        ]
        with sdpa_kernel(SDPBackend.MATH):  # has a second derivative
            logits = self.model(input_ids=input_ids, use_cache=False).logits
        for handle in hooks:
            handle.remove()
        rows = torch.arange(len(batch.target))
        nll = -logits[rows, lengths - 1].log_softmax(dim=-1)[rows, batch.target].sum()
        return nll, kl, prior

    def gradient(self, loss, side):
        found = torch.autograd.grad(loss, list(side.values()), allow_unused=True)
        return {n: torch.zeros_like(p) if g is None else g for (n, p), g in zip(side.items(), found, strict=True)}

    def adamw(self, gradients, lr):
        """Steps of Adam with decoupled weight decay on phi, from zero moments; `gradients` yields one dict a step."""
        method, first, second = self.config.method, {}, {}
        beta_1, beta_2 = method.adam_betas
        for step, gradient in enumerate(gradients, start=1):
            with torch.no_grad():
                for name, g in gradient.items():
                    first[name] = beta_1 * first.get(name, 0.0) + (1 - beta_1) * g
                    second[name] = beta_2 * second.get(name, 0.0) + (1 - beta_2) * g * g
                    denominator = (second[name] / (1 - beta_2**step)).sqrt() + method.adam_eps
                    self.phi[name] -= lr * method.weight_decay * self.phi[name]
                    self.phi[name] -= lr * first[name] / (1 - beta_1**step) / denominator


def relative_error(found, expected):
    assert found.keys() == expected.keys()
    difference = sum(float((found[name].detach() - value).square().sum()) for name, value in expected.items())
    return (difference / sum(float(value.square().sum()) for value in expected.values())) ** 0.5


def of_episode(side, number=0):
    """One episode's part of phi or of an update's gradient."""
    return {name: value[number] for name, value in side.items()}


def moved(side, start):
    return {name: value.detach() - start[name].detach() for name, value in side.items()}


def run_update(tiny, index=0, progress=0.0):
    return tiny.method.update(tiny.learner, tiny.visit(index, progress=progress))


@pytest.mark.parametrize(
    ("posterior", "meta_gradient", "outer_batch", "kl_estimate", "log_variance_alpha"),
    [
        ("activation", "kl", "reuse", "closed_form", None),
        ("activation", "kl", "query", "closed_form", 5.0),
        ("weight", "kl", "reuse", "closed_form", None),
        ("activation", "first_order", "query", "closed_form", 5.0),
        ("weight", "first_order", "reuse", "closed_form", 5.0),
        ("activation", "kl", "query", "sample", 5.0),
        ("weight", "kl", "reuse", "sample", 5.0),
    ],
)
def test_abmll(posterior, meta_gradient, outer_batch, kl_estimate, log_variance_alpha, build_tiny):
    method = {
        "kl_estimate": kl_estimate,
        "meta_gradient": meta_gradient,
        "outer_batch": outer_batch,
        "weight_decay": 0.1,
        "adam_betas": (0.8, 0.95),
    }
    adapters = {"posterior": posterior, "log_variance_alpha": log_variance_alpha}
    tiny = build_tiny(torch.float64, adapters=adapters, method=method)
    tiny.scatter()
    tiny.adapters.reset_phi()
    hand, start = ByHand(tiny), {name: value.clone() for name, value in tiny.adapters.theta.items()}
    update, episode = run_update(tiny), tiny.episode()
    beta, values = tiny.config.method.beta, []

    def gradients():
        for batch, key in zip(episode.support, tiny.keys, strict=False):
            nll, kl, _ = hand.terms(batch, key)
            values.append((float(nll.detach()), float(kl.detach())))
            yield hand.gradient(nll + beta * kl, hand.phi)

    hand.adamw(gradients(), tiny.config.method.inner_lr)
    # the NLL is fp32 in both, which Adam's division shows
    phi = of_episode(tiny.adapters.phi)
    assert relative_error(moved(phi, start), moved(hand.phi, start)) < 1e-4
    for (nll, kl), terms in zip(values, update.inner, strict=True):
        assert float(terms.nll) == pytest.approx(nll, rel=1e-5)
        assert float(terms.kl) == pytest.approx(kl, rel=1e-5, abs=1e-6)

    hand.phi = {name: value.detach().clone().requires_grad_(True) for name, value in phi.items()}
    batch = episode.support[-1] if outer_batch == "reuse" else episode.query
    nll, kl, prior = hand.terms(batch, tiny.keys[-1])
    expected = hand.gradient(beta * kl + beta / hand.num_tasks * prior, hand.theta)
    if meta_gradient == "first_order":
        nll_gradient = hand.gradient(hand.terms(batch, tiny.keys[-1])[0], hand.phi)
        expected = {name: value + nll_gradient[name] for name, value in expected.items()}
    assert relative_error(of_episode(update.gradient), expected) < 1e-5
    assert float(update.outer.kl) == pytest.approx(float(kl.detach()), rel=1e-6)
    assert len(update.batches) == tiny.method.passes_per_episode
    if (posterior, meta_gradient, kl_estimate) == (
        "weight",
        "kl",
        "closed_form",
    ):  # no forward pass: the NLL is the last inner step's
        assert len(update.batches) == tiny.config.method.inner_steps
        assert torch.equal(update.outer.nll, update.inner[-1].nll)
    else:
        assert len(update.batches) == tiny.config.method.inner_steps + 1
        assert float(update.outer.nll) == pytest.approx(float(nll.detach()), rel=1e-5)
    assert torch.equal(update.batches[-1].input_ids, batch.input_ids)
    assert all(torch.equal(value, start[name]) for name, value in tiny.adapters.theta.items())


@pytest.mark.parametrize("schedule", ["annealed", "constant"])
@pytest.mark.parametrize("progress", [0.0, 0.75])
def test_reptile_moves_theta_towards_phi(progress, schedule, build_tiny):
    method = {"name": "reptile", "reptile_step": 0.4, "reptile_schedule": schedule}
    tiny = build_tiny(torch.float64, method=method)
    hand, start = ByHand(tiny), {name: value.clone() for name, value in tiny.adapters.theta.items()}
    update = run_update(tiny, progress=progress)
    hand.adamw(
        (hand.gradient(hand.terms(batch, None)[0], hand.phi) for batch in tiny.episode().support),
        tiny.config.method.inner_lr,
    )
    change = moved(hand.phi, start)
    assert relative_error(moved(of_episode(tiny.adapters.phi), start), change) < 1e-4
    step = 0.4 * (1 - progress) if schedule == "annealed" else 0.4
    gradient = of_episode(update.gradient)
    assert relative_error(gradient, {name: -step * value for name, value in change.items()}) < 1e-4

    optimizer = tiny.method.outer_optimizer(tiny.adapters.theta.values())
    for name, value in tiny.adapters.theta.items():
        value.grad = gradient[name]
    optimizer.step()
    expected = {name: value + step * (tiny.adapters.phi[name][0] - value) for name, value in start.items()}
    for name, value in tiny.adapters.theta.items():
        torch.testing.assert_close(value.detach(), expected[name].detach(), rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("posterior", ["activation", "weight"])
def test_abmll_may_take_reptiles_step(posterior, build_tiny):
    """All four pairs go the share of the way that phi went on NLL + beta KL, from where they were."""
    method = {"meta_gradient": "reptile", "reptile_step": 0.4, "outer_lr": 9.0, "weight_decay": 0.1}
    tiny = build_tiny(torch.float64, adapters={"posterior": posterior}, method=method).scatter()
    tiny.adapters.reset_phi()
    hand, start = ByHand(tiny), {name: value.detach().clone() for name, value in tiny.adapters.theta.items()}
    update = run_update(tiny, progress=0.75)
    beta, terms = tiny.config.method.beta, []

    def gradients():
        for batch, key in zip(tiny.episode().support, tiny.keys, strict=False):
            nll, kl, _ = hand.terms(batch, key)
            terms.append(float(kl.detach()))
            yield hand.gradient(nll + beta * kl, hand.phi)

    hand.adamw(gradients(), tiny.config.method.inner_lr)
    change = moved(hand.phi, start)
    assert relative_error(of_episode(update.gradient), {n: -0.4 * 0.25 * value for n, value in change.items()}) < 1e-4
    assert any("log_variance" in name and value.abs().max() > 0 for name, value in change.items())
    assert len(update.batches) == tiny.method.passes_per_episode == tiny.config.method.inner_steps
    assert float(update.outer.kl) == pytest.approx(terms[-1], rel=1e-5) and not float(update.outer.prior)

    optimizer = tiny.method.outer_optimizer(tiny.adapters.theta.values())
    for name, value in tiny.adapters.theta.items():
        value.grad = of_episode(update.gradient)[name]
    optimizer.step()
    phi = of_episode(tiny.adapters.phi)
    expected = {name: value + 0.1 * (phi[name].detach() - value) for name, value in start.items()}
    made = {name: value.detach() for name, value in tiny.adapters.theta.items()}
    torch.testing.assert_close(made, expected, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("outer_batch", ["reuse", "query"])
def test_fomaml_takes_the_outer_gradient_at_the_adapted_phi(outer_batch, build_tiny):
    tiny = build_tiny(torch.float64, method={"name": "fomaml", "outer_batch": outer_batch}).scatter()
    tiny.adapters.reset_phi()
    hand, episode = ByHand(tiny), tiny.episode()
    update = run_update(tiny)
    hand.phi = {name: value.detach().clone().requires_grad_() for name, value in of_episode(tiny.adapters.phi).items()}
    batch = episode.support[-1] if outer_batch == "reuse" else episode.query
    nll, _, _ = hand.terms(batch, None)
    assert relative_error(of_episode(update.gradient), hand.gradient(nll, hand.phi)) < 1e-5
    assert float(update.outer.nll) == pytest.approx(float(nll.detach()), rel=1e-5)
    assert len(update.batches) == tiny.method.passes_per_episode == tiny.config.method.inner_steps + 1


def test_mamls_gradient_passes_through_all_inner_steps(build_tiny):
    """Against autograd through the loop by hand; the first-order gradient is another one."""
    method = {"name": "maml", "inner_optimizer": "sgd", "inner_lr": 0.05, "outer_batch": "query", "weight_decay": 0.1}
    tiny = build_tiny(torch.float64, method=method).scatter()
    tiny.adapters.reset_phi()
    hand, episode = ByHand(tiny), tiny.episode()
    start = hand.phi
    for batch in episode.support:
        nll, _, _ = hand.terms(batch, None)
        gradients = torch.autograd.grad(nll, list(hand.phi.values()), create_graph=True)
        hand.phi = {
            name: value - 0.05 * (gradient + 0.1 * value)
            for (name, value), gradient in zip(hand.phi.items(), gradients, strict=True)
        }
    nll, _, _ = hand.terms(episode.query, None)
    first_order = dict(zip(start, torch.autograd.grad(nll, list(hand.phi.values()), retain_graph=True), strict=True))
    expected = dict(zip(start, torch.autograd.grad(nll, list(start.values())), strict=True))
    update = run_update(tiny)
    assert relative_error(of_episode(update.gradient), expected) < 1e-5
    assert relative_error(first_order, expected) > 1e-2
    assert float(update.outer.nll) == pytest.approx(float(nll.detach()), rel=1e-5)
    assert all(torch.equal(value[0], tiny.adapters.theta[key]) for key, value in tiny.adapters.phi.items())


def test_maml_of_episodes_side_by_side_is_each_ones_own(build_tiny):
    method = {"name": "maml", "inner_optimizer": "sgd", "inner_lr": 0.05}
    tiny = build_tiny(torch.float64, method=method).scatter()
    both = tiny.method.update(tiny.learner, tiny.visit(episodes=[0, 1]))
    for slot in (0, 1):
        alone = tiny.method.update(tiny.learner, tiny.visit(episodes=[slot]))
        assert relative_error(of_episode(both.gradient, slot), of_episode(alone.gradient)) < 1e-6


@pytest.mark.parametrize("name", ["structured_lora", "lora"])
def test_lora_takes_the_nll_gradient_at_theta(name, build_tiny):
    tiny = build_tiny(torch.float64, method={"name": name}).scatter()
    tiny.adapters.reset_phi()
    hand, episode = ByHand(tiny), tiny.episode()
    assert tiny.method.updates_per_episode == tiny.config.method.inner_steps
    for index in range(tiny.method.updates_per_episode):
        update = run_update(tiny, index)
        nll, _, _ = hand.terms(episode.support[index], None)
        assert relative_error(of_episode(update.gradient), hand.gradient(nll, hand.phi)) < 1e-5
        assert float(update.outer.nll) == pytest.approx(float(nll.detach()), rel=1e-5)
        assert update.inner == () and len(update.batches) == 1
    assert all(torch.equal(value[0], tiny.adapters.theta[key]) for key, value in tiny.adapters.phi.items())


def test_lora_is_pooled_and_structured_lora_is_not(build_tiny):
    pooled, structured = (build_tiny(method={"name": name}) for name in ("lora", "structured_lora"))
    samplers = [tiny.parts.tasks.sampler(tiny.config, tiny.method) for tiny in (pooled, structured)]
    assert [type(sampler) for sampler in samplers] == [PooledSampler, EpisodeSampler]


def test_the_outer_optimizer_is_adamw_as_configured(build_tiny):
    method = {"outer_lr": 3e-3, "adam_eps": 1e-6, "adam_betas": (0.7, 0.9), "weight_decay": 0.2}
    tiny = build_tiny(method=method)
    optimizer = tiny.method.outer_optimizer(tiny.adapters.theta.values())
    assert type(optimizer) is torch.optim.AdamW
    (group,) = optimizer.param_groups
    assert (group["lr"], group["eps"], group["betas"], group["weight_decay"]) == (3e-3, 1e-6, (0.7, 0.9), 0.2)
    assert {id(p) for p in group["params"]} == {id(p) for p in tiny.adapters.theta.values()}


@pytest.mark.parametrize("weight_decay", [0.0, 0.2])
def test_sgd_moves_theta_by_the_divergences_own_gradient(weight_decay, build_tiny):
    """theta - lr (gradient + decay theta), and the gradient goes with beta, whose size AdamW would take out."""
    moved_by = []
    for beta in (1e-3, 1e-1):
        method = {"outer_optimizer": "sgd", "outer_lr": 0.3, "beta": beta, "weight_decay": weight_decay}
        tiny = build_tiny(torch.float64, method=method).scatter()
        start = {name: value.detach().clone() for name, value in tiny.adapters.theta.items()}
        gradient = of_episode(tiny.learner.theta_gradient_kl(tiny.episode().support[0], tiny.keys[0])[0])
        optimizer = tiny.method.outer_optimizer(tiny.adapters.theta.values())
        for name, value in tiny.adapters.theta.items():
            value.grad = gradient[name].to(value.dtype)
        optimizer.step()
        expected = {name: value - 0.3 * (gradient[name] + weight_decay * value) for name, value in start.items()}
        made = {name: value.detach() for name, value in tiny.adapters.theta.items()}
        torch.testing.assert_close(made, expected, rtol=1e-12, atol=1e-15)
        decayed = {name: (1 - 0.3 * weight_decay) * value for name, value in start.items()}
        moved_by.append({name: value - decayed[name] for name, value in made.items()})
    small, large = moved_by
    assert relative_error(large, {name: 100 * value for name, value in small.items()}) < 1e-9


def test_pretrained_does_not_train(build_tiny):
    tiny = build_tiny(method={"name": "pretrained"})
    assert tiny.method.updates_per_episode == 0
    with pytest.raises(ValueError, match="does not train"):
        run_update(tiny)


@pytest.mark.parametrize("name", ["abmll", "reptile", "structured_lora", "lora", "pretrained"])
def test_adaptation_is_k_steps_at_the_test_rate_with_a_fresh_optimizer(name, build_tiny):
    tiny = build_tiny(torch.float64, method={"name": name, "test_lr": 3e-3, "inner_lr": 0.5})
    gaussian = name == "abmll"
    hand, start, episode = ByHand(tiny), dict(tiny.adapters.theta.items()), tiny.episode()
    found = tiny.method.adapt(tiny.learner, episode.support, tiny.keys[:-1])
    assert len(found) == tiny.config.method.inner_steps

    def gradients():
        for batch, key in zip(episode.support, tiny.keys, strict=False):
            nll, kl, _ = hand.terms(batch, key if gaussian else None)
            yield hand.gradient(nll + tiny.config.method.beta * kl, hand.phi)

    hand.adamw(gradients(), 3e-3)
    change = moved(hand.phi, start)
    assert max(float(value.abs().max()) for value in change.values()) > 5e-3
    assert relative_error(moved(of_episode(tiny.adapters.phi), start), change) < 1e-3


def test_pretrained_adapts_the_mean_of_gaussian_adapters_alone(build_tiny):
    """It is scored on the adapters of whatever method is trained beside it, and must not depend on which."""
    gaussian, point = build_tiny(), build_tiny(method={"name": "lora"})
    for tiny in (gaussian, point):
        method = build_method(tiny.config.method.model_copy(update={"name": "pretrained"}))
        method.adapt(tiny.learner, gaussian.episode().support, tiny.keys[:-1])
    for name, value in gaussian.adapters.phi.items():
        expected = point.adapters.phi[name] if ".mean." in name else gaussian.adapters.theta[name][None]
        assert torch.equal(value, expected), name
