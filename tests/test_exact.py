"""The oracle itself: exact priors against autograd, quadrature, dense algebra and their own samples."""

import math

import pytest
import torch

import fewstep
from fewstep.core.likelihood import GaussianLikelihood, JointLikelihood
from fewstep.core.noise import Noise
from fewstep.operators.matrix import MatrixOperator
from fewstep.priors.exact import integrate_flow
from fewstep.testing.law import GaussianLaw
from fewstep.testing.problems import bimodal_problem, gaussian_problem, mixture_problem
from fewstep.testing.sampler import standard_errors

T = torch.tensor(0.35).double()


def points(prior, n=5):
    alpha, sigma = prior.schedule(T)
    x = prior.sample(n, seed=4)
    return alpha * x + sigma * Noise([9], torch.float64).randn(*x.shape)[0]


@pytest.mark.parametrize("make", [gaussian_problem, mixture_problem, bimodal_problem], ids=lambda f: f.__name__)
def test_score_and_covariance_against_autograd(make):
    prior = make().problem.prior
    x = points(prior)
    alpha, sigma = prior.schedule(T)
    leaf = x.clone().requires_grad_()
    score = torch.autograd.grad(prior.log_prob(leaf, T).sum(), leaf)[0]
    assert torch.allclose(prior.score(x, T), score, atol=1e-9)
    v = torch.randn(x.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    jvp = torch.autograd.functional.jvp(lambda z: prior(z, T), x, v)[1]
    assert torch.allclose(prior.covariance_action(x, T, v), sigma**2 / alpha * jvp, atol=1e-9)


def test_time_may_differ_per_item():
    prior = mixture_problem().problem.prior
    x, t = points(prior, 3), torch.tensor([0.1, 0.5, 0.9]).double()
    each = torch.cat([prior(x[i : i + 1], t[i]) for i in range(3)])
    assert torch.allclose(prior(x, t), each, atol=1e-12)


def test_mixture_density_integrates_to_one():
    prior = bimodal_problem().problem.prior
    x = torch.linspace(-8, 8, 20_001).double()[:, None]
    for t in (0.0, 0.3, 1.0):
        mass = torch.trapezoid(prior.log_prob(x, t).exp(), x[:, 0])
        assert abs(float(mass) - 1) < 1e-6


def test_samples_of_the_prior_have_its_moments():
    prior = gaussian_problem().problem.prior
    assert standard_errors(prior.sample(5000), GaussianLaw(prior.mean, prior.cov)) < 5


def test_flow_maps_agree_with_integration_and_carry_the_marginal():
    s = torch.tensor(0.05).double()
    gaussian = gaussian_problem().problem.prior
    x = points(gaussian)
    assert torch.allclose(gaussian.flow(x, T, s), integrate_flow(gaussian, x, T, s), atol=1e-8)
    bimodal = bimodal_problem().problem.prior
    x = points(bimodal)
    assert torch.allclose(bimodal.flow(x, T, s), integrate_flow(bimodal, x, T, s), atol=1e-7)
    # a monotone map between marginals keeps the distribution function
    alpha, sigma = bimodal.schedule(T)
    n = 20_000
    start = alpha * bimodal.sample(n) + sigma * Noise([1], torch.float64).randn(n, 1)[0]
    end = bimodal.flow(start, T, torch.tensor(0.0).double())
    assert abs(float((end > 0).double().mean()) - 0.7) < 5 * (0.21 / n) ** 0.5


def dense_posterior(prior, matrix, y, sigma):
    precision = matrix.T @ matrix / sigma**2 + torch.linalg.inv(prior.cov)
    right = matrix.T @ y / sigma**2 + torch.linalg.solve(prior.cov, prior.mean)
    return torch.linalg.solve(precision, right), torch.linalg.inv(precision)


def test_gaussian_posterior_and_evidence_against_dense_algebra():
    exact = gaussian_problem(batch=2)
    prior, likelihood = exact.problem.prior, exact.problem.likelihood
    matrix, sigma = likelihood.physics.matrix, 0.2
    marginal = matrix @ prior.cov @ matrix.T + sigma**2 * torch.eye(3).double()
    for b in range(2):
        mean, cov = dense_posterior(prior, matrix, likelihood.y[b], sigma)
        assert torch.allclose(exact.posterior.mean[b], mean, atol=1e-10)
        assert torch.allclose(exact.posterior.cov[b], cov, atol=1e-10)
        law = torch.distributions.MultivariateNormal(matrix @ prior.mean, marginal)
        assert torch.allclose(exact.posterior.log_evidence[b], law.log_prob(likelihood.y[b]), atol=1e-9)


def test_mixture_posterior_and_evidence_against_quadrature():
    exact = bimodal_problem()
    x = torch.linspace(-6, 6, 40_001).double()[:, None]
    joint = (exact.problem.prior.log_prob(x) + exact.problem.likelihood.expand(len(x)).log_prob(x)).exp()
    evidence = torch.trapezoid(joint, x[:, 0])
    mean = torch.trapezoid(joint * x[:, 0], x[:, 0]) / evidence
    second = torch.trapezoid(joint * x[:, 0] ** 2, x[:, 0]) / evidence
    mass = torch.trapezoid(joint * (x[:, 0] > 0), x[:, 0]) / evidence
    assert abs(float(exact.posterior.log_evidence - evidence.log())) < 1e-6
    assert abs(float(exact.posterior.mean - mean)) < 1e-6
    assert abs(float(exact.posterior.cov - (second - mean**2))) < 1e-6
    assert abs(float(mass) - 0.418) < 1e-3 and abs(math.sqrt(float(exact.posterior.cov)) - 0.769) < 1e-3
    draws = exact.posterior.sample(20_000)
    assert abs(float((draws > 0).double().mean()) - float(mass)) < 5 * (0.25 / 20_000) ** 0.5


def test_joint_posterior_is_that_of_both_measurements():
    exact = gaussian_problem(batch=2)
    prior, likelihood = exact.problem.prior, exact.problem.likelihood
    x_t = points(prior, 2)
    alpha, sigma = prior.schedule(T)
    joint = prior.posterior(JointLikelihood(likelihood, x_t, alpha, sigma))
    stacked = torch.cat([likelihood.physics.matrix / 0.2, alpha / sigma * torch.eye(5).double()])
    y = torch.cat([likelihood.y / 0.2, x_t / sigma], 1)
    want = prior.posterior(GaussianLikelihood(y, MatrixOperator(stacked), 1.0))
    assert torch.allclose(joint.mean, want.mean, atol=1e-9) and torch.allclose(joint.cov, want.cov, atol=1e-9)
    scale = -3 * math.log(0.2) - 5 * float(sigma.log())  # densities of y and x_t, not of their whitened forms
    assert torch.allclose(joint.log_evidence, want.log_evidence + scale, atol=1e-9)


def test_a_joint_likelihood_multiplies_densities_and_starts_between_its_measurements():
    likelihood = GaussianLikelihood(torch.ones(2, 3).double(), MatrixOperator(torch.eye(3).double()), 0.2)
    x_t, alpha, sigma = torch.full((2, 3), 0.3).double(), torch.tensor([0.6, 0.8]), torch.tensor([0.8, 0.6])
    weight = ((alpha / sigma) ** 2)[:, None]  # of x_t / alpha, against 1 of the other
    want = (likelihood.start() + weight * x_t / alpha[:, None]) / (1 + weight)
    joint, x = JointLikelihood(likelihood, x_t, alpha, sigma), torch.full((2, 3), -0.5).double()
    torch.testing.assert_close(joint.start(), want)
    law = torch.distributions.Normal(alpha[:, None] * x, sigma[:, None])
    torch.testing.assert_close(joint.log_prob(x), likelihood.log_prob(x) + law.log_prob(x_t).sum(1))


def test_posterior_without_a_measurement_is_the_prior():
    prior = mixture_problem().problem.prior
    from fewstep.core.likelihood import FlatLikelihood

    flat = prior.posterior(FlatLikelihood((8,), dtype=torch.float64))
    assert torch.allclose(flat.weights[0], prior.weights) and torch.allclose(flat.means[0], prior.means)


def test_singular_covariances_are_allowed():
    prior = fewstep.GaussianPrior(torch.zeros(2).double(), torch.tensor([[1.0, 1.0], [1.0, 1.0]]).double())
    likelihood = GaussianLikelihood(torch.ones(1, 1).double(), MatrixOperator(torch.tensor([[1.0, 0.0]]).double()), 0.1)
    post = prior.posterior(likelihood)
    assert torch.allclose(post.mean[0], torch.full((2,), 1 / 1.01).double(), atol=1e-9)


@pytest.mark.parametrize(
    ("weights", "means", "covs", "match"),
    [
        ([1.0, -1.0], [[0.0], [1.0]], [1.0, 1.0], "positive weights"),
        ([1.0], [[0.0, 0.0]], [[[1.0, 2.0], [2.0, 1.0]]], "semi-definite"),
        ([1.0], [[0.0, 0.0]], [[1.0, 1.0, 1.0]], "do not fit"),
    ],
)
def test_bad_mixtures_are_refused(weights, means, covs, match):
    with pytest.raises(ValueError, match=match):
        fewstep.MixturePrior(torch.tensor(weights), torch.tensor(means), torch.tensor(covs))
