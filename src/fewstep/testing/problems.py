"""Small problems with a known posterior, float64, on which every sampler is held to the truth."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fewstep.core.likelihood import GaussianLikelihood
from fewstep.core.problem import Posterior
from fewstep.core.schedule import Schedule
from fewstep.operators.matrix import MatrixOperator
from fewstep.priors.exact import ExactPosterior, GaussianPrior, MixturePrior


class ExactProblem(NamedTuple):
    """A problem, its exact posterior and the truth that y was simulated from, (B, D)."""

    problem: Posterior
    posterior: ExactPosterior
    truth: Tensor


def gaussian_problem(
    dim: int = 5, rank: int = 3, sigma: float = 0.2, batch: int = 1, schedule: Schedule | None = None
) -> ExactProblem:
    """Return a correlated Gaussian prior seen through a `rank` x `dim` operator: dim - rank directions are unobserved."""
    g = torch.Generator().manual_seed(7)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    basis = torch.linalg.qr(randn(dim, dim))[0]
    cov = basis @ torch.diag(torch.linspace(0.2, 1.2, dim, dtype=torch.float64)) @ basis.T
    prior = GaussianPrior(0.5 * randn(dim), cov, schedule)
    left, right = torch.linalg.qr(randn(rank, rank))[0], torch.linalg.qr(randn(dim, dim))[0][:, :rank]
    matrix = left @ torch.diag(torch.linspace(1.0, 0.4, rank, dtype=torch.float64)) @ right.T
    truth = prior.sample(batch, seed=1)
    likelihood = GaussianLikelihood(truth @ matrix.T + sigma * randn(batch, rank), MatrixOperator(matrix), sigma)
    return ExactProblem(Posterior(prior, likelihood), prior.posterior(likelihood), truth)


def scalar_problem(variance: float = 1.0, gain: float = 1.0, sigma: float = 0.05) -> ExactProblem:
    """Return one Gaussian mode N(0.3, variance) with y = gain (mean + 1.2 sd): a direction of a larger problem."""
    prior = GaussianPrior(torch.tensor([0.3]).double(), torch.tensor(variance).double())
    truth = torch.tensor([[0.3 + 1.2 * variance**0.5]]).double()
    likelihood = GaussianLikelihood(gain * truth, MatrixOperator(torch.tensor([[gain]]).double()), sigma)
    return ExactProblem(Posterior(prior, likelihood), prior.posterior(likelihood), truth)


def bimodal_problem(sigma: float = 0.5, y: float = -0.2) -> ExactProblem:
    """Return .3 N(-1, .09) + .7 N(1, .09) in one dimension seen directly: P(x > 0) = .418 and sd .769 at the defaults."""
    weights, means = torch.tensor([0.3, 0.7]).double(), torch.tensor([[-1.0], [1.0]]).double()
    prior = MixturePrior(weights, means, torch.tensor([0.09, 0.09]).double())
    observed = torch.tensor([[y]]).double()
    likelihood = GaussianLikelihood(observed, MatrixOperator(torch.ones(1, 1).double()), sigma)
    return ExactProblem(Posterior(prior, likelihood), prior.posterior(likelihood), observed)


def mixture_problem(dim: int = 8, rank: int = 1, sigma: float = 1.0, batch: int = 1) -> ExactProblem:
    """Return a mixture of four Gaussians seen through a random operator, with a null space.

    At the defaults all four components keep weight: .19, .55, .06, .20.
    """
    g = torch.Generator().manual_seed(11)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    spread = 0.15 + 0.7 * torch.rand(4, dim, generator=g, dtype=torch.float64)
    basis = torch.linalg.qr(randn(4, dim, dim))[0]
    covs = basis @ torch.diag_embed(spread**2) @ basis.mT
    weights = torch.tensor([0.4, 0.3, 0.2, 0.1]).double()
    prior = MixturePrior(weights, 1.2 * randn(4, dim), covs)
    matrix = randn(rank, dim) / dim**0.5
    truth = prior.sample(batch, seed=1)
    likelihood = GaussianLikelihood(truth @ matrix.T + sigma * randn(batch, rank), MatrixOperator(matrix), sigma)
    return ExactProblem(Posterior(prior, likelihood), prior.posterior(likelihood), truth)
