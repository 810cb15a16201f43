"""`check_sampler`: the contract that every posterior sampler passes, exported so that plug-ins can be held to it too.

Each check raises AssertionError with what was found. Thresholds are in standard errors of the Monte-Carlo estimates.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fewstep.core.likelihood import GaussianLikelihood
from fewstep.core.problem import Posterior
from fewstep.core.reference import Reference
from fewstep.core.sampler import Sampler
from fewstep.operators.matrix import MatrixOperator
from fewstep.testing.law import GaussianLaw, affine_error, distance
from fewstep.testing.problems import ExactProblem, gaussian_problem
from fewstep.testing.propagate import finite_step_law

STANDARD_ERRORS = 5.0  # with some 50 statistics per check, a right sampler exceeds this about once in 30 000 checks

NEAR = 0.05  # of a posterior standard deviation, and of a variance: what counts as converged
RESPONSE = 0.03  # the least share of a change of y that the mean of A x must follow


def check_sampler(
    sampler: Any, *, affine: bool = True, blind: bool = True, fine: Mapping[str, Any] | None = None
) -> None:
    """Hold a sampler to the whole contract.

    Args:
        sampler: a `Sampler` with few steps, so that the checks are quick.
        affine: whether it is affine in its noise on a Gaussian problem; if not, its finite-step law is not known, and what
            converges is held to the posterior by its samples.
        blind: whether a measurement of very large sigma leaves what no measurement leaves; False for rules that do not
            weigh y by sigma.
        fine: fields at which it should be near what it declares; needed for samplers that declare "posterior".

    Raises:
        AssertionError: a check failed.
    """
    check_form(sampler)
    check_randomness(sampler)
    check_independence(sampler)
    check_side_effects(sampler)
    check_cost(sampler)
    check_limits(sampler, blind)
    if affine:
        check_law(sampler)
    if type(sampler).exact == "posterior":
        assert fine is not None, "a sampler that declares 'posterior' needs the fields at which it is near it"
        near = dataclasses.replace(sampler, **fine)
        if affine:
            check_convergence(near)
        else:
            check_posterior(near, tolerance=NEAR)


def check_form(sampler: Sampler) -> None:
    """Frozen documented fields, reference, declarations, presets, a repr that round-trips, shape and dtype."""
    cls = type(sampler)
    assert dataclasses.is_dataclass(cls) and cls.__dataclass_params__.frozen, "must be a frozen dataclass"
    for field in dataclasses.fields(cls):
        assert f"{field.name}:" in (cls.__doc__ or ""), f"field {field.name} is not documented in the class docstring"
    assert isinstance(cls.reference, Reference)
    assert cls.exact in {"posterior", "biased", "mode"} and cls.limit
    assert cls.needs <= {"gradient", "prox", "draw", "svd", "gaussian"}
    names = {cls.__name__: cls, "inf": math.inf, "nan": math.nan}
    assert eval(repr(sampler), names) == sampler, "repr does not round-trip"
    assert all(isinstance(cls.preset(name), cls) for name in cls.presets)
    for dtype in (torch.float64, torch.float32):
        problem = _cast(gaussian_problem(batch=2).problem, dtype)
        x = sampler(problem, 3).x
        assert x.shape == (3, 2, 5) and x.dtype == dtype, f"got {tuple(x.shape)} {x.dtype}"
        assert bool(torch.isfinite(x).all())


def check_randomness(sampler: Sampler) -> None:
    """Same seed, same bits; another seed, another sample; the global generator untouched."""
    problem = gaussian_problem().problem
    before = torch.random.get_rng_state()
    first, again, other = (sampler(problem, 2, seed=s).x for s in (3, 3, 4))
    assert torch.equal(before, torch.random.get_rng_state()), "the global generator was used"
    assert torch.equal(first, again), "the same seed gives other samples"
    if type(sampler).exact != "mode":
        assert not torch.allclose(first, other), "another seed gives the same samples"
        assert not torch.allclose(first[0], first[1]), "two samples of one run are the same"


def check_independence(sampler: Sampler, tol: float = 1e-9) -> None:
    """An item alone, in a batch of other noise levels, in chunks and with another number of samples: the same sample."""
    made = gaussian_problem(batch=3).problem
    like, seeds = made.gaussian, [11, 12, 13]
    levels = like.sigma * torch.tensor([1.0, 3.0, 0.5]).to(like.sigma)
    problem = Posterior(made.prior, GaussianLikelihood(like.y, like.physics, levels))
    together = sampler(problem, 4, seed=seeds).x
    chunked = sampler(problem, 4, seed=seeds, chunk=3).x
    fewer = sampler(problem, 2, seed=seeds).x
    one = GaussianLikelihood(like.y[1:2], like.physics, levels[1:2])
    alone = sampler(Posterior(problem.prior, one), 4, seed=seeds[1]).x
    for name, left, right in (
        ("chunked", together, chunked),
        ("fewer samples", together[:2], fewer),
        ("alone", together[:, 1:2], alone),
    ):
        error = float((left - right).abs().max())
        assert error <= tol, f"{name}: the sample of an item changes by {error:.2g}"


def check_side_effects(sampler: Sampler) -> None:
    """Inputs, parameters, requires_grad and training mode are as they were."""
    problem = gaussian_problem(batch=2).problem
    like: Any = problem.likelihood
    before = [like.y.clone(), like.sigma.clone(), like.physics.matrix.clone(), *_values(problem)]
    flags = [(m.training, [p.requires_grad for p in m.parameters()]) for m in problem.prior.modules()]
    sampler(problem, 2)
    after = [like.y, like.sigma, like.physics.matrix, *_values(problem)]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True)), "an input was modified"
    assert flags == [(m.training, [p.requires_grad for p in m.parameters()]) for m in problem.prior.modules()]


def check_cost(sampler: Sampler) -> None:
    """Measured network calls equal the declared number; of a sampler that adapts to the sample they do not exceed it.

    The prior is watched too: what goes through it without being counted is a cost all the same.
    """
    problem, rows = gaussian_problem().problem, []
    with problem.prior.register_forward_hook(lambda module, inputs, x0: rows.append(len(x0))):
        measured = sampler(problem, 2).counts.network
    fits = 0 < measured <= sampler.nfe if sampler.nfe_varies else measured == sampler.nfe
    assert fits, f"declares {sampler.nfe} network calls, makes {measured}"
    assert sum(rows) <= 2 * sampler.nfe, f"declares {sampler.nfe} network calls, makes {sum(rows) / 2:g} of the prior"


def check_limits(sampler: Sampler, blind: bool = True, num_samples: int = 16) -> None:
    """The mean follows y in every observed direction and, if `blind`, does so no longer where sigma is very large.

    Samples of the same seeds are compared, so that their noise cancels.
    """
    made = gaussian_problem().problem
    like: Any = made.likelihood
    matrix = like.physics.matrix

    def draw(y: Tensor, operator: Tensor, sigma: Tensor | float) -> Tensor:
        likelihood = GaussianLikelihood(y, MatrixOperator(operator), sigma)
        return sampler(Posterior(made.prior, likelihood), num_samples, seed=[5] * len(y)).x

    moves = torch.eye(len(matrix)).to(matrix) / 2
    above, below = draw(like.y + torch.cat([moves, -moves]), matrix, like.sigma[0]).mean(0).chunk(2)
    response = (above - below) @ matrix.T  # row i: the change of A x for one of y_i
    least = float(torch.linalg.eigvalsh((response + response.T) / 2)[0])
    assert least > RESPONSE, f"the mean does not follow y: in one direction A x follows {least:.3f} of a change"
    if blind:
        error = float((draw(like.y, matrix, 1e6) - draw(like.y, 0 * matrix, 1.0)).abs().max())
        assert error < 0.01, f"a measurement of very large sigma changes a sample by {error:.2g}; see `blind`"


def check_law(sampler: Sampler, num_samples: int = 4000) -> None:
    """Mean and covariance of samples agree with the exact finite-step law, in standard errors."""
    exact = gaussian_problem()
    error = affine_error(sampler, exact.problem)
    assert error < 1e-6, f"not affine in its noise (relative defect {error:.2g}); pass affine=False"
    law = finite_step_law(sampler, exact.problem)
    x = sampler(exact.problem, num_samples, seed=5).x[:, 0]
    score = standard_errors(x, law)
    assert score < STANDARD_ERRORS, f"samples are {score:.1f} standard errors from the finite-step law"


def check_convergence(
    sampler: Sampler, exact: ExactProblem | None = None, mean: float = NEAR, ratio: float = NEAR
) -> None:
    """The finite-step law lies within `mean` posterior standard deviations and `ratio` of the variances of the truth."""
    exact = exact or gaussian_problem()
    found = distance(finite_step_law(sampler, exact.problem), exact.posterior)
    assert found.mean_error < mean, f"mean off by {found.mean_error:.3f} posterior standard deviations"
    assert 1 - ratio < found.low and found.high < 1 + ratio, f"variance ratios {found.low:.3f} to {found.high:.3f}"


def check_posterior(
    sampler: Sampler, num_samples: int = 4000, exact: ExactProblem | None = None, tolerance: float = 0.0
) -> None:
    """Samples themselves agree with the exact posterior in mean and covariance, in standard errors beyond `tolerance`."""
    exact = exact or gaussian_problem()
    x = sampler(exact.problem, num_samples, seed=5).x[:, 0]
    truth = GaussianLaw(exact.posterior.mean.flatten(), exact.posterior.cov[0])
    score = standard_errors(x, truth, tolerance)
    assert score < STANDARD_ERRORS, f"samples are {score:.1f} standard errors from the posterior"


def standard_errors(x: Tensor, law: GaussianLaw, tolerance: float = 0.0) -> float:
    """Return the largest deviation of sample mean and covariance, (K, D), from a Gaussian law in standard errors.

    Of each, `tolerance` is forgiven: of a standard deviation of the law, and of its covariance once whitened.
    Directions without variance in the law must have none in the samples: their standard error is that of rounding.
    """
    k = x.shape[0]
    values, vectors = torch.linalg.eigh(law.cov)
    floor = (1e-7 * (1 + law.mean.abs().max())) ** 2
    scaled = (x - law.mean) @ vectors / values.clamp_min(floor).sqrt()
    mean = (scaled.mean(0).abs().max() - tolerance) * math.sqrt(k)
    cov = scaled.T @ scaled / k
    eye = torch.eye(cov.shape[0], dtype=cov.dtype)
    # a direction of the floor may hold less variance than the floor: that is no fault
    excess = torch.where((values < floor)[:, None] | (values < floor), (cov - eye).clamp_min(0), cov - eye)
    return float(torch.maximum(mean, ((excess.abs() - tolerance) / (1 + eye).sqrt()).max() * math.sqrt(k)))


def _values(problem: Posterior) -> list[Tensor]:
    return [v.clone() for v in problem.prior.state_dict().values()]


def _cast(problem: Posterior, dtype: torch.dtype) -> Posterior:
    like: Any = problem.likelihood

    prior = copy.deepcopy(problem.prior).to(dtype)
    return Posterior(prior, type(like)(like.y.to(dtype), like.physics, like.sigma.to(dtype)))
