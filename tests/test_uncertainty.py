"""Calibrated intervals cover, and calibration checks pass exact posteriors and fail planted wrong samplers."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch
from torch import Tensor

from fewstep import GaussianPrior, Posterior, Samples, get
from fewstep.core.counts import Counts
from fewstep.core.likelihood import GaussianLikelihood
from fewstep.core.noise import Noise
from fewstep.core.sampler import Sampler, State
from fewstep.metrics import coverage
from fewstep.operators.matrix import MatrixOperator
from fewstep.testing.law import GaussianLaw
from fewstep.testing.problems import gaussian_problem, mixture_problem
from fewstep.testing.sampler import STANDARD_ERRORS, standard_errors
from fewstep.uncertainty import (
    Calibration,
    Transform,
    equivariant_bootstrap,
    expected_coverage,
    flip,
    patch_means,
    quarter_turn,
    sbc_ranks,
    shelf,
    shift,
    tarp_ranks,
    tarp_references,
    uniformity,
)


def samples_of(x: Tensor) -> Samples:
    return Samples(x, Counts(), 0.0, "test", (0,) * x.shape[1])


def pictures(seed: int, images: int, k: int = 5, side: int = 8) -> tuple[Samples, Tensor]:
    """Return samples that are too narrow, by a factor that differs much from image to image, and truths."""
    generator = torch.Generator().manual_seed(seed)
    scale = torch.randn(images, 1, 1, 1, generator=generator).exp()
    truth = scale * torch.randn(images, 1, side, side, generator=generator)
    return samples_of(0.5 * torch.randn(k, images, 1, side, side, generator=generator)), truth


def risks(calibration: Calibration, samples: Samples, truth: Tensor) -> Tensor:
    """Return the miscoverage of each image."""
    low, high = calibration.apply(samples)
    target = patch_means(truth, calibration.patch)
    return ((target < low) | (target > high)).double().mean((1, 2, 3))


FRESH = pictures(0, 500)


def mean_risk(level: float, images: int, worst: float = 1.0, correct: bool = True) -> tuple[float, float]:
    """Return the loss on new images, averaged over calibration sets, and its standard error."""
    values = []
    for seed in range(1, 301):
        calibration = Calibration.fit([pictures(seed, images)], level, floor=0.01, worst=worst)
        if not correct:  # all pixels in one pot, as if they were exchangeable
            scores = torch.cat([s.flatten() for s in replace(calibration, factor=1.0)._scores(*pictures(seed, images))])
            calibration = replace(calibration, factor=float(scores.quantile(level)))
        values.append(risks(calibration, *pictures(1000 + seed, 20)).clamp_max(worst).mean())
    found = torch.stack(values)
    return float(found.mean()), float(found.std()) / len(values) ** 0.5


@pytest.mark.parametrize(("level", "images", "worst"), [(0.9, 12, 1.0), (0.8, 9, 1.0), (0.9, 12, 0.5)])
def test_risk_is_controlled_for_few_images(level, images, worst):
    risk, error = mean_risk(level, images, worst)
    assert risk < 1 - level + 3 * error
    assert risk > 1 - level - 2 * worst / (images + 1) - 3 * error  # and is not far below


def test_pixels_taken_as_exchangeable_do_not_control_it():
    risk, error = mean_risk(0.9, 12, correct=False)
    assert risk > 0.1 + 3 * error


def test_the_factor_is_the_smallest_that_controls_the_risk():
    pairs = [pictures(seed, 1) for seed in range(30)]
    for worst in (1.0, 0.4):
        found = Calibration.fit(pairs, 0.9, worst=worst)

        def bound(factor, found=found, worst=worst):
            calibration = replace(found, factor=factor)
            return (sum(float(risks(calibration, *p).clamp_max(worst)) for p in pairs) + worst) / 31

        assert bound(found.factor) <= 0.1 < bound(found.factor * (1 - 1e-4))
    assert Calibration.fit(pairs, 0.9, worst=0.4).factor < Calibration.fit(pairs, 0.9).factor


def test_many_images_cover_at_the_level():
    for patch in (1, 2):
        calibration = Calibration.fit([pictures(1, 2000)], 0.9, patch=patch)
        held, error = risks(calibration, *FRESH), 0.3 / 500**0.5
        assert float(held.mean()) == pytest.approx(0.1, abs=4 * error)
        plain = coverage(FRESH[0].interval(0.9), FRESH[1])
        assert plain < 0.6  # what the samples say by themselves


def test_patch_intervals_are_not_pixel_intervals():
    samples, truth = FRESH
    calibration = Calibration.fit([pictures(1, 200)], 0.8, patch=4)
    low, high = calibration.apply(samples)
    assert low.shape == (500, 1, 2, 2) and bool((low < high).all())
    assert torch.allclose(patch_means(truth, 4)[0, 0, 1, 0], truth[0, 0, 4:, :4].mean())
    assert torch.equal(patch_means(samples.x, 4)[2], patch_means(samples.x[2], 4))
    # means of independent pixels: the stretch is that of the images, not that of pixels averaged
    assert float((high - low).mean()) < 0.6 * float((lambda a, b: b - a)(*pixel_ends(samples)).mean())
    with pytest.raises(ValueError, match="do not fit"):
        patch_means(truth, 9)


def pixel_ends(samples: Samples) -> tuple[Tensor, Tensor]:
    return Calibration.fit([pictures(1, 200)], 0.8).apply(samples)


def test_calibration_is_stored_and_read():
    calibration = Calibration.fit([pictures(1, 20)], 0.9, patch=2)
    assert Calibration.from_json(json.loads(json.dumps(calibration.to_json()))) == calibration
    for change in ({"format": "other"}, {"new": 1}, {"factor": None}, {"level": "a"}, {"factor": math.nan}):
        with pytest.raises(ValueError, match="not a calibration"):
            Calibration.from_json({**calibration.to_json(), **change})


def test_calibration_says_no():
    with pytest.raises(ValueError, match="need 9 images at least to calibrate on, got 8"):
        Calibration.fit([pictures(1, 8)], 0.9)
    assert Calibration.fit([pictures(1, 9)], 0.9).images == 9
    assert Calibration.fit([pictures(1, 4)], 0.9, worst=0.5).images == 4
    with pytest.raises(ValueError, match="same number"):
        Calibration.fit([pictures(1, 9), pictures(1, 9, k=6)])
    with pytest.raises(ValueError, match="calibrated for 5 samples"):
        Calibration.fit([pictures(1, 9)]).apply(pictures(1, 1, k=6)[0])
    with pytest.raises(ValueError, match="finite truths"):
        Calibration.fit([(FRESH[0], FRESH[1] * torch.nan)])
    with pytest.raises(ValueError, match="samples that are not finite"):
        Calibration.fit([(replace(FRESH[0], x=FRESH[0].x * torch.nan), FRESH[1])])
    for bad, said in (({"level": 1.0}, "worst"), ({"floor": 0.0}, "floor"), ({"worst": 0.05}, "worst")):
        with pytest.raises(ValueError, match=said):
            Calibration.fit([FRESH], **bad)


def test_samples_that_agree_can_still_be_stretched():
    truth = torch.linspace(-1, 1, 200).reshape(20, 1, 2, 5)
    calibration = Calibration.fit([(samples_of(torch.zeros(3, 20, 1, 2, 5)), truth)], 0.9)
    assert calibration.factor * calibration.floor == pytest.approx(0.95, abs=0.03)


def test_intervals_are_stretched_about_the_median():
    samples = samples_of(torch.randn(5, 2, 1, 3, 3, generator=torch.Generator().manual_seed(0)).exp())
    centre, (lower, upper) = samples.x.median(0).values, samples.interval(0.9)
    low, high = Calibration(0.9, 2.0, 5, 9, floor=0.01).apply(samples)
    torch.testing.assert_close(low, centre - 2 * (centre - lower + 0.01))
    torch.testing.assert_close(high, centre + 2 * (upper - centre + 0.01))


# --- checks against exact posteriors ---

K, B = 19, 400
PROBLEMS = {
    "gaussian": gaussian_problem(dim=3, rank=2, sigma=0.3, batch=B),
    "mixture": mixture_problem(dim=3, rank=2, sigma=0.5, batch=B),
}
SAMPLERS = {
    "narrow": lambda p, x: p.posterior.mean + 0.65 * (x - p.posterior.mean),
    "wide": lambda p, x: p.posterior.mean + 1.6 * (x - p.posterior.mean),
    "biased": lambda p, x: x + 0.4 * p.posterior.cov.diagonal(dim1=1, dim2=2).sqrt(),
    "prior": lambda p, x: p.problem.prior.sample(K * B, seed=77).reshape(x.shape),
}


@pytest.fixture(scope="module", params=sorted(PROBLEMS))
def exact(request):
    problem = PROBLEMS[request.param]
    return problem, problem.posterior.sample(K, seed=5)


def coordinates(problem, x):
    return float(uniformity(sbc_ranks(x, problem.truth), K).min()) * x.shape[-1]


def log_likelihood(problem, x):
    likelihood = problem.problem.likelihood
    values = torch.stack([likelihood.log_prob(item) for item in x])
    return float(uniformity(sbc_ranks(values, likelihood.log_prob(problem.truth)), K))


def references(problem):
    return tarp_references(problem.problem.likelihood)


def tarp(problem, x):
    return float(uniformity(tarp_ranks(x, problem.truth, references(problem)), K))


@pytest.mark.parametrize("check", [coordinates, log_likelihood, tarp])
def test_exact_samples_pass(exact, check):
    assert check(*exact) > 1e-2


@pytest.mark.parametrize("fault", sorted(SAMPLERS))
def test_wrong_samplers_fail(exact, fault):
    problem, x = exact
    wrong = SAMPLERS[fault](problem, x)
    assert tarp(problem, wrong) < 1e-7
    assert min(coordinates(problem, wrong), log_likelihood(problem, wrong)) < 1e-6


def test_what_cannot_see_a_sampler_that_ignores_the_measurement(exact):
    problem, x = exact
    prior = SAMPLERS["prior"](problem, x)
    assert coordinates(problem, prior) > 1e-2
    blind = torch.randn(x.shape[1:], generator=torch.Generator().manual_seed(2), dtype=x.dtype)
    assert float(uniformity(tarp_ranks(prior, problem.truth, blind), K)) > 1e-2


def test_expected_coverage_in_standard_errors(exact):
    problem, x = exact

    def worst(samples):
        found = expected_coverage(tarp_ranks(samples, problem.truth, references(problem)), K)
        return found, float(((found.coverage - found.level) / found.error).abs().max())

    found, deviation = worst(x)
    assert deviation < 3.5 and torch.allclose(found.level, torch.arange(1, K + 1).double() / (K + 1))
    assert all(worst(make(problem, x))[1] > 4 for make in SAMPLERS.values())


def test_the_standard_error_of_expected_coverage():
    """Ranks that are uniform by construction, many times over."""
    generator = torch.Generator().manual_seed(0)
    runs = [expected_coverage(torch.randint(0, 8, (50,), generator=generator), 7) for _ in range(2000)]
    values = torch.stack([run.coverage for run in runs])
    assert torch.allclose(values.std(0), runs[0].error, rtol=0.1)
    assert float(((values.mean(0) - runs[0].level) / runs[0].error).abs().max()) < 5 / 2000**0.5


def test_samples_equal_to_the_truth_are_not_below_it():
    assert sbc_ranks(torch.tensor([[1.0], [2.0], [2.0], [3.0]]), torch.tensor([2.0])).tolist() == [1]


def test_a_reference_is_drawn_to_the_measurement_by_its_precision_and_looks_from_the_side_of_its_seed():
    """With y = 0 a reference is z shrunk by sigma^2 / (sigma^2 + rho^2) where y was measured, and z itself elsewhere."""
    likelihood = GaussianLikelihood(torch.zeros(3, 1).double(), MatrixOperator(torch.eye(2).double()[:1]), 0.5)
    shrink = torch.tensor([0.25 / (0.25 + 4), 1]).double()
    for seed in (0, 1):
        z = 2 * Noise([seed], torch.float64).randn(2)
        torch.testing.assert_close(tarp_references(likelihood, seed, rho=2.0), (shrink * z).expand(3, 2))


@pytest.mark.parametrize("broken", ["samples", "truth"])
def test_what_is_not_finite_has_no_rank(broken):
    values = {"samples": torch.zeros(4, 3, 2), "truth": torch.ones(3, 2)}
    values[broken][..., 0] = torch.nan
    with pytest.raises(ValueError, match="NaN or infinite"):
        sbc_ranks(**values)
    with pytest.raises(ValueError, match="NaN or infinite"):
        tarp_ranks(**values, references=torch.zeros(3, 2))


def test_p_values_are_uniform_where_ranks_are():
    ranks = torch.randint(0, 20, (400, 3000), generator=torch.Generator().manual_seed(0))
    p = uniformity(ranks, 19, bins=7)  # bins of unequal width
    assert float((p < 0.05).double().mean()) == pytest.approx(0.05, abs=5 * (0.05 * 0.95 / 3000) ** 0.5)


def test_checks_say_no():
    with pytest.raises(ValueError, match="do not fit"):
        sbc_ranks(torch.zeros(3, 2, 4), torch.zeros(2, 5))
    with pytest.raises(ValueError, match="do not fit"):
        tarp_ranks(torch.zeros(3, 2, 4), torch.zeros(2, 4), torch.zeros(1, 4))
    with pytest.raises(ValueError, match="too few"):
        uniformity(torch.zeros(40, dtype=torch.long), 19)
    with pytest.raises(ValueError, match=r"0\.\.19"):
        uniformity(torch.full((400,), 20), 19)


# --- the equivariant bootstrap ---


@dataclass(frozen=True)
class Exact(Sampler):
    """Exact draws of a Gaussian posterior, or its mean."""

    draw: bool = True
    steps: int = 1
    needs: ClassVar = frozenset({"gaussian"})
    exact: ClassVar = "posterior"
    limit: ClassVar = "the posterior"
    nfe = 0

    def init(self, problem, noise):
        posterior = problem.prior.posterior(problem.likelihood)
        return State(posterior.draw(noise) if self.draw else posterior.mean)

    def step(self, problem, state, k, noise):
        return state


SIZE = 6


def circular_problem(batch: int = 1) -> Posterior:
    """Return a stationary prior on a ring of which every other pixel is seen."""
    lag = torch.arange(SIZE).double()
    column = 0.7 ** torch.minimum(lag, SIZE - lag)
    cov = torch.stack([column.roll(i) for i in range(SIZE)])
    prior = GaussianPrior(torch.full((SIZE,), 0.3).double(), cov)
    y = torch.tensor([[0.2, 1.0, -0.4]]).double() + torch.arange(batch)[:, None]
    return Posterior(prior, GaussianLikelihood(y, MatrixOperator(torch.eye(SIZE).double()[::2]), 0.4))


def ring(step: int) -> Transform:
    return Transform(lambda x: x.roll(step, -1), lambda x: x.roll(-step, -1))


def test_bootstrap_has_the_law_of_its_docstring():
    problem, step = circular_problem(), 1
    num, like = 600, problem.likelihood
    samples = equivariant_bootstrap(Exact(), problem, [ring(step)], num=num, seed=3)
    start, posterior = Exact()(problem, seed=3).x[0, 0], problem.prior.posterior(like)
    a, m, c = like.physics.matrix, problem.prior.mean, posterior.cov[0]
    gain = c @ a.T / 0.4**2
    turn = torch.eye(SIZE).double().roll(step, 0)  # turn @ x == x.roll(step)
    mean = turn.T @ (m + gain @ a @ (turn @ start - m))
    cov = turn.T @ (c + 0.4**2 * gain @ gain.T) @ turn
    assert samples.x.shape == (num, 1, SIZE)
    assert standard_errors(samples.x[:, 0], GaussianLaw(mean, cov)) < STANDARD_ERRORS
    assert standard_errors(samples.x[:, 0], GaussianLaw(mean, c)) > STANDARD_ERRORS  # no posterior samples
    untransformed = equivariant_bootstrap(Exact(), problem, [ring(0)], num=num, seed=3)
    assert standard_errors(untransformed.x[:, 0], GaussianLaw(mean, cov)) > STANDARD_ERRORS


def test_transforms_show_what_a_point_estimate_does_not_know():
    """With the posterior mean as estimator and white prior, unseen pixels never move unless they are brought to be seen."""
    seen = circular_problem()
    white = GaussianPrior(torch.zeros(SIZE).double(), torch.ones(()).double())
    problem = Posterior(white, seen.likelihood)
    alone = equivariant_bootstrap(Exact(draw=False), problem, [ring(0)], num=40)
    turned = equivariant_bootstrap(Exact(draw=False), problem, [ring(i) for i in range(SIZE)], num=40)
    assert float(alone.std[0, 1::2].max()) < 1e-12 and float(alone.std[0, ::2].min()) > 0.1
    assert float(turned.std[0, 1::2].min()) > 0.1


def test_bootstrap_is_reproducible_alone_and_in_a_batch():
    runs = [equivariant_bootstrap(Exact(), circular_problem(b), [ring(1), ring(2)], num=5).x for b in (1, 1, 2)]
    assert torch.equal(runs[0], runs[1]) and torch.allclose(runs[0], runs[2][:, :1], atol=1e-12)
    assert not torch.allclose(runs[0], equivariant_bootstrap(Exact(), circular_problem(), [ring(1)], num=5, seed=1).x)
    given = equivariant_bootstrap(
        Exact(), circular_problem(), [ring(0)], measure=lambda x, s: circular_problem().likelihood
    )
    assert given.num_samples == 50 and float(given.std.min()) > 0.1
    with pytest.raises(ValueError, match="at least one"):
        equivariant_bootstrap(Exact(), circular_problem(), [])


def test_bootstrap_draws_its_transforms_at_random_and_replicates_do_not_depend_on_their_number():
    drawn = []
    transforms = [Transform(lambda x, i=i: drawn.append(i) or x, lambda x: x) for i in range(2)]
    runs = [equivariant_bootstrap(Exact(), circular_problem(), transforms, num=num).x for num in (100, 7)]
    assert torch.equal(runs[0][:7], runs[1]) and drawn[:7] == drawn[100:]
    repeats = sum(a == b for a, b in itertools.pairwise(drawn[:100]))
    assert abs(drawn[:100].count(0) - 50) < 20 and abs(repeats - 49.5) < 20  # 4 standard errors of independent draws


def test_bootstrap_of_a_method_of_the_library():
    found = equivariant_bootstrap(get("dds")(steps=3), circular_problem(), [ring(1)], num=3)
    assert found.nfe == 3 and "equivariant_bootstrap" in found.method


@pytest.mark.parametrize(
    "transform", [shift(2, -3), flip(), flip(-2), quarter_turn(), shelf(2.5, 0.1), shelf(0.4, 0.2, high=True)]
)
def test_transforms_are_undone(transform):
    x = torch.randn(2, 3, 9, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert torch.allclose(transform.undo(transform.apply(x)), x, atol=1e-12)
    assert not torch.allclose(transform.apply(x), x, atol=0.1)


def test_a_shelf_multiplies_what_it_says():
    flat, alternating = torch.ones(1, 1, 8, 8), torch.ones(1, 1, 8, 8) * (-1.0) ** torch.arange(8)
    low, high = shelf(3.0, 0.05), shelf(3.0, 0.05, high=True)
    assert torch.allclose(low.apply(flat), 3 * flat) and torch.allclose(high.apply(flat), flat)
    assert torch.allclose(low.apply(alternating), alternating, atol=1e-3)
    assert torch.allclose(high.apply(alternating), 3 * alternating, atol=1e-3)
    with pytest.raises(ValueError, match="positive"):
        shelf(0.0, 0.1)


def test_tarp_ranks_what_diverged_in_single_precision():
    samples = torch.tensor([1e30, -1e25, 0.5])[:, None, None].expand(3, 1, 4)
    assert tarp_ranks(samples, torch.ones(1, 4), torch.zeros(1, 4)).tolist() == [1]
