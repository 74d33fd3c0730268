"""ABMLL on a linear-Gaussian hierarchy, whose posteriors are known in closed form, finds them.

    w_i ~ N(m, diag(s^2)) for each task,  y = x w_i^T + noise of deviation SIGMA

With beta = 1 the inner objective is minus the evidence's lower bound, so that phi's best is the mean-field posterior:
the exact mean, and the reciprocals of the exact precision's diagonal as variances. Theta's best, given those, is
expectation maximisation's: both together have one fixed point, which a few lines of float64 below find.
"""

from __future__ import annotations

import torch
from torch import nn

from abmll.adapters import inject_adapters
from abmll.config.schema import AdapterConfig, MethodConfig
from abmll.kernels import Groups, NoiseKey, rows_of_keys
from abmll.kernels.reference import weight_statistics
from abmll.learner import Learner

TASKS, EXAMPLES, N, K, SIGMA, OFFSET = 6, 8, 2, 2, 0.7, -2.0


class Linear(nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj = nn.Linear(K, N, bias=False)
        nn.init.zeros_(self.q_proj.weight)


class Regression(Learner):
    """A learner whose answers are real numbers; a batch is (x [G, n, K], y [G, n, N])."""

    def forward(self, batch, key, terms="none", slot=None):
        x, _ = batch
        groups = Groups.of([x.shape[1]] * len(x), "cpu")
        with self.adapters.context.forward_pass(key, kl=terms == "kl", groups=groups) as recorded:
            y = self.model.q_proj(x.flatten(0, 1))
        return y.unflatten(0, x.shape[:2]), recorded

    def nll(self, y, batch):
        return ((y - batch[1]).square() / (2 * SIGMA**2)).flatten(1).sum(dim=1)


def tasks():
    generator = torch.Generator().manual_seed(0)
    weights = torch.tensor([[1.0, -1.0], [0.5, 0.0]]) + 0.9 * torch.randn(TASKS, N, K, generator=generator)
    x = torch.randn(TASKS, EXAMPLES, K, generator=generator)
    return x, x @ weights.mT + SIGMA * torch.randn(TASKS, EXAMPLES, N, generator=generator)


def posterior(x, y, mean, variance):
    """Mean-field posterior of one task's weights [N, K] under independent normals; x [n, K], y [n, N]."""
    x, y, found = x.double(), y.double(), []
    for row in range(N):
        precision = torch.diag(1 / variance[row]) + x.T @ x / SIGMA**2
        at = torch.linalg.solve(precision, mean[row] / variance[row] + x.T @ y[:, row] / SIGMA**2)
        found.append((at, 1 / precision.diagonal()))
    means, variances = zip(*found, strict=True)
    return torch.stack(means), torch.stack(variances)


def build():
    method = MethodConfig(beta=1.0, adam_betas=(0.9, 0.99))
    adapters = AdapterConfig(rank=2, alpha=2.0, modules=("q_proj",), posterior="weight", log_variance_offset=OFFSET)
    model = Linear()
    found = inject_adapters(model, adapters, method, "gaussian", seed=1)
    learner = Regression(model, found, method, num_train_tasks=10**9, batch_size=EXAMPLES)  # no prior on theta
    return learner


def statistics(learner, side="phi"):
    """Mean and variance of the weights: [G, N, K] of phi, [N, K] of theta."""
    (layer,) = learner.adapters.layers.values()
    mean, log_variance = weight_statistics(getattr(layer, side).factors(), layer.settings)
    return mean.detach().double(), log_variance.detach().double().exp()


def keys_of(step, seeds=range(TASKS)):
    return rows_of_keys([NoiseKey(seed, step) for seed in seeds], "cpu")


def test_adaptation_finds_the_posterior():
    """All tasks side by side. Averaged over the last steps, as each step has its own noise."""
    learner = build()
    batch = tasks()
    learner.adapters.reset_phi(TASKS)
    prior_mean, prior_variance = statistics(learner, "theta")
    assert not prior_mean.any() and torch.allclose(prior_variance.log(), torch.tensor(OFFSET).double())
    for steps, lr in ((400, 3e-2), (600, 1e-2), (1500, 2e-3)):
        optimizer, sums = learner.optimizer(lr), [0.0, 0.0]
        for step in range(steps):
            learner.phi_step(batch, keys_of(int(lr * 1e6) * 10000 + step), optimizer)
            mean, variance = statistics(learner)
            sums = [sums[0] + mean / steps, sums[1] + variance.log() / steps]
    for task in range(TASKS):
        mean, variance = posterior(batch[0][task], batch[1][task], prior_mean, prior_variance)
        deviation = variance.sqrt()
        assert float(((sums[0][task] - mean) / deviation).abs().max()) < 0.1
        assert float((sums[1][task] - variance.log()).abs().max()) < 0.2
        # which is far from the prior that phi began at
        assert float(((prior_mean - mean) / deviation).abs().max()) > 1
        assert float((prior_variance.log() - variance.log()).abs().max()) > 0.5


def test_theta_finds_the_hierarchy():
    """From phi at the posteriors of the moment, theta's gradient leads to expectation maximisation's fixed point."""
    x, y = tasks()
    mean, variance = torch.zeros(N, K).double(), torch.full((N, K), OFFSET).double().exp()
    for _ in range(500):
        of_tasks = [posterior(x[task], y[task], mean, variance) for task in range(TASKS)]
        means, variances = (torch.stack(part) for part in zip(*of_tasks, strict=True))
        mean, variance = means.mean(dim=0), (variances + (means - means.mean(dim=0)).square()).mean(dim=0)
    start = statistics(build(), "theta")
    assert float(((start[0] - mean) / variance.sqrt()).abs().max()) > 1
    assert float((start[1] / variance).log().abs().max()) > 1

    learner = build()
    theta, (layer,) = learner.adapters.theta, learner.adapters.layers.values()
    optimizer = torch.optim.Adam(theta.values(), lr=3e-2)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.996)
    learner.adapters.reset_phi(TASKS)
    for _ in range(1500):
        at = statistics(learner, "theta")
        with torch.no_grad():
            for task in range(TASKS):
                found, spread = posterior(x[task], y[task], *at)
                for pair, value in ((layer.phi.mean, found), (layer.phi.log_variance, spread.log() - OFFSET)):
                    pair.a[task], pair.b[task] = torch.eye(K), value
        gradient, _ = learner.theta_gradient_of_weights()
        for name, parameter in theta.items():
            parameter.grad = gradient[name].mean(dim=0)
        optimizer.step()
        schedule.step()
    at = statistics(learner, "theta")
    torch.testing.assert_close(at[0], mean, rtol=0, atol=1e-3)
    torch.testing.assert_close(at[1].log(), variance.log(), rtol=0, atol=1e-3)
