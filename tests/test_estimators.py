"""Weights and what is read off them, against closed forms; each check has a wrong twin that fails it."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.stats import genpareto
from scipy.stats import t as student

from fewstep.core.noise import Streams
from fewstep.core.schedule import VariancePreserving
from fewstep.densities.draws import Draws
from fewstep.densities.estimators import chains, inverse, jacobian, lanczos, psis, weights
from fewstep.densities.estimators.boundary import invalid_boundary_log_weights
from fewstep.densities.estimators.convergence import rhat
from fewstep.densities.estimators.gaussian import log_normal, map_log_weights
from fewstep.priors.exact import GaussianPrior


def normals(n, d, seed=0):
    return Streams(seed, range(n), torch.float64).randn(d)


def log_normal_draws(n, spread, seed):
    """Weights w = exp(spread e - spread^2 / 2), so Z = 1, of x = e, for which E[w x] = spread."""
    x = normals(n, 1, seed)
    return Draws(x, spread * x[:, 0] - spread**2 / 2, "unbiased", seed=seed)


# ---- maps


def pushed(function, z):
    """Return f(z), (N, d), and log|det Df(z)|, (N,)."""
    found = jacobian.determinant(function, z)
    return found.y, found.log_abs


def folds(found):
    """Return the share of the rarer sign of a determinant: more than 0 proves that a map is not injective."""
    share = float((found.sign > 0).double().mean())
    return min(share, 1 - share)


@pytest.mark.parametrize(("d", "s", "missing"), [(2, 3.0, -2.20), (10, 0.5, 6.93), (50, 0.5, 34.66)])
def test_log_z_of_a_linear_map_is_exact_and_the_boundary_formula_is_off(d, s, missing):
    z = normals(300, d)
    y, log_abs_det = pushed(lambda v: s * v, z)
    log_rho = -0.5 * (y / s).square().sum(1)
    log_z = d * math.log(s * math.sqrt(2 * math.pi))
    exact = Draws(y, map_log_weights(log_rho, log_abs_det, z), "unbiased")
    assert exact.log_z == pytest.approx(log_z, abs=1e-6) and exact.elbo == pytest.approx(log_z, abs=1e-6)
    assert exact.ess == pytest.approx(1) and exact.khat == -math.inf
    low, high = exact.log_z_interval()
    assert low - 1e-9 <= log_z <= high + 1e-9
    wrong = invalid_boundary_log_weights(log_rho, z)
    assert weights.ess(wrong) == pytest.approx(1)  # it looks perfect
    assert weights.log_mean(wrong) - log_z == pytest.approx(-d * math.log(s), abs=1e-6)
    assert weights.log_mean(wrong) - log_z == pytest.approx(missing, abs=0.01)
    with pytest.raises(ValueError, match="invalid"):
        _ = Draws(y, wrong, "invalid").log_z


def bend(z):
    """A triangular bijection of R^d with log|det| = sum_i (0.3 sin(2 z_i))."""
    i = torch.linspace(0, 2, z.shape[1], dtype=z.dtype)
    slope = (0.3 * torch.sin(2 * z[:, :1])).exp()
    rest = slope * z[:, 1:] + i[1:] * torch.tanh(z[:, :1])
    return torch.cat([z[:, :1] + 0.2 * torch.tanh(z[:, :1]), rest], 1)


def bend_log_det(z):
    return (1.2 - 0.2 * torch.tanh(z[:, 0]).square()).log() + 0.3 * (z.shape[1] - 1) * torch.sin(2 * z[:, 0])


@pytest.mark.parametrize("chunk", [None, 7])
def test_log_abs_det_of_a_nonlinear_map(chunk):
    z = normals(50, 6)
    found = jacobian.determinant(bend, z, chunk)
    torch.testing.assert_close(found.y, bend(z))
    torch.testing.assert_close(found.log_abs, bend_log_det(z))
    assert folds(found) == 0
    rotation = torch.linalg.qr(normals(6, 6, seed=3))[0]
    torch.testing.assert_close(pushed(lambda v: bend(v) @ rotation, z)[1], bend_log_det(z))


def test_a_map_that_folds_is_seen():
    z = normals(1000, 3)
    assert folds(jacobian.determinant(lambda v: torch.cat([v[:, :1].square(), v[:, 1:]], 1), z)) > 0.4


@pytest.mark.parametrize("hide", [lambda v: v.detach() * v, lambda v: torch.zeros_like(v) + v.detach()])
def test_what_is_hidden_from_differentiation_is_an_error(hide):
    with pytest.raises(ValueError, match="hidden from differentiation"):
        pushed(hide, normals(40, 3).float())


def test_a_steep_place_is_not_taken_for_something_hidden():
    """One draw in the middle of a step between modes, where a difference quotient is far off."""
    steep = jacobian.determinant(lambda v: v + torch.tanh(1000 * v), torch.full((1, 2), 1e-3))
    assert folds(steep) == 0 and float(steep.log_abs) > 10


def test_draws_without_weight_are_not_picked():
    empty = Draws(normals(10, 2), torch.full((10,), -torch.inf, dtype=torch.float64), "unbiased")
    with pytest.raises(ValueError, match="no draw has a positive weight"):
        empty.resample()


def test_inverse_and_the_upper_bound_it_gives():
    """rho = exp(2) N(0, 0.25 I) by f = bend: the EUBO from exact samples lies above log Z = 2 by the forward divergence."""
    z = normals(500, 3)
    back, found = inverse.invert(bend, bend(z), torch.zeros_like(z))
    assert bool(found.all())
    torch.testing.assert_close(back, z, atol=1e-4, rtol=0)
    x = 0.5 * normals(500, 3, seed=1)
    back, found = inverse.invert(bend, x, inverse.nearest(z, bend(z), x))
    assert bool(found.all())
    upper, error = weights.bound(map_log_weights(2 + log_normal(x, 0.0, 0.5), bend_log_det(back), back))
    lower, _ = weights.bound(map_log_weights(2 + log_normal(bend(z), 0.0, 0.5), bend_log_det(z), z))
    assert lower < 2 - 0.3 and upper > 2 + 4 * error
    folded, found = inverse.invert(lambda v: v.square() + 1, -normals(50, 2).square(), normals(50, 2, seed=1))
    assert not bool(found.any()) and folded.shape == (50, 2)


def test_a_map_must_keep_the_shape():
    with pytest.raises(ValueError, match="keep the shape"):
        pushed(lambda v: v[:, :2], normals(40, 3))


def layer(z):
    mixing = normals(50, 50, seed=4) / math.sqrt(50)
    return z + 0.6 * torch.tanh(z @ mixing)


def lanczos_pulls(steps, factor=1.0):
    z = normals(60, 50, seed=1)
    noise = Streams(2, range(60), torch.float64)
    found = lanczos.estimate_log_abs_det(lambda v: factor * layer(v), z, noise, 16, steps)
    return (found.log_abs - pushed(layer, z)[1]) / found.error, found.error


def test_lanczos_log_det_is_within_its_error():
    pulls, errors = lanczos_pulls(16)
    assert 0.5 < pulls.square().mean() < 2 and abs(pulls.mean()) < 4 * math.sqrt(1.2 / 60)
    assert 0 < errors.min() and errors.max() < 1.5
    assert abs(lanczos_pulls(16, factor=1.03)[0].mean()) > 1  # off by 50 log 1.03 = 1.48


def test_lanczos_is_exact_where_the_map_is_a_scaling_and_says_when_steps_are_too_few():
    z = normals(5, 30)
    found = lanczos.estimate_log_abs_det(lambda v: 3 * v, z, Streams(0, range(5), torch.float64))
    torch.testing.assert_close(found.log_abs, torch.full((5,), 30 * math.log(3), dtype=torch.float64))
    assert found.error.max() < 1e-9
    pulls, errors = lanczos_pulls(2)
    assert errors.mean() > 2 * lanczos_pulls(16)[1].mean() and pulls.abs().mean() < 2


# ---- chains of several steps


def gaussian_chain(n, t_1, seed=0):
    """A two-step consistency sampler of N(m, C) with a first map that is wrong and an exact second one, and log Z = 1.5."""
    mean = torch.tensor([1.0, -0.5], dtype=torch.float64)
    cov = torch.tensor([[0.8, 0.3], [0.3, 0.5]], dtype=torch.float64)
    prior = GaussianPrior(mean, cov, VariancePreserving(0.1, 10.0))
    t, noise = torch.tensor(t_1, dtype=torch.float64), Streams(seed, range(n), torch.float64)
    alpha, sigma = prior.schedule(t)
    z = noise.randn(2)
    means = alpha * (0.9 * bend(z) + 0.7)
    y_1 = means + sigma * noise.randn(2)
    y, log_abs_det = pushed(lambda v: prior.flow(v, t, torch.zeros_like(t)), y_1)
    return prior, z, means, y_1, y, prior.log_prob(y) + 1.5 + log_abs_det, t


@pytest.mark.parametrize("t_1", [0.3, 0.6])
def test_mixture_weights_of_a_two_step_chain_are_unbiased(t_1):
    prior, z, means, y_1, y, log_pi, t = gaussian_chain(4096, t_1)
    std = float(prior.schedule(t)[1])
    draws = Draws(y, chains.mixture_log_weights(log_pi, y_1, means, std, rows=1000), "unbiased")
    error = weights.log_z_error(draws.log_weights)
    assert abs(draws.log_z - 1.5) < 4 * error < 0.1
    value, spread = draws.expectation(lambda x: x)
    assert bool(((value - prior.mixture.means[0]).abs() < 4 * spread).all())
    own = Draws(y, log_pi - log_normal(z), "unbiased")  # the density of z instead of that of y_1
    assert abs(own.log_z - 1.5) > 4 * error


def test_path_weights_are_unbiased_at_high_noise_and_of_infinite_variance_at_low():
    """Given c the pair has variance s^2 and pi(y_1) up to a^2 + s^2: the weights' variance is infinite unless a < s."""
    for t_1, good in ((0.6, True), (0.2, False)):
        prior, z, means, y_1, y, log_pi, t = gaussian_chain(4096, t_1)
        path = Draws(y, chains.path_log_weights(log_pi, y_1, means, z, prior.schedule, t), "unbiased")
        mixture = chains.mixture_log_weights(log_pi, y_1, means, float(prior.schedule(t)[1]))
        assert (abs(path.log_z - 1.5) < 4 * weights.log_z_error(path.log_weights)) == good
        assert (path.khat < 0.5) == good and weights.ess(mixture) > 1.3 * path.ess


def test_the_way_back_of_a_path_keeps_the_law_of_the_noising():
    """N(z; b y_1, v) has v = sigma_1^2 - b^2 sigma_t^2 with b = alpha_1 / alpha_t; v is read off a weight's fall with z."""
    schedule, t, zero = VariancePreserving(0.1, 2.0), torch.tensor(0.6).double(), torch.zeros(2, 1)
    at = chains.path_log_weights(zero[:, 0], zero, zero, torch.tensor([[0.0], [1.0]]).double(), schedule, t)
    (alpha, sigma), (alpha_1, sigma_1) = schedule(t), schedule(torch.ones_like(t))
    torch.testing.assert_close(1 / (1 - 2 * (at[1] - at[0])), sigma_1**2 - (alpha_1 / alpha * sigma) ** 2)


def test_mixture_weights_are_unbiased_for_few_draws_too():
    """E[mean w] = Z holds for batches of 4: the mean over many batches is Z, that of the self-normalised log is not."""
    prior, _, means, y_1, _, log_pi, t = gaussian_chain(4096, 0.6, seed=5)
    std = float(prior.schedule(t)[1])
    batches = zip(log_pi.split(4), y_1.split(4), means.split(4), strict=True)
    totals = torch.stack([chains.mixture_log_weights(*b, std).exp().mean() for b in batches]) / math.exp(1.5)
    assert abs(totals.mean() - 1) < 4 * totals.std() / math.sqrt(len(totals)) < 0.5


# ---- Pareto smoothing


@pytest.mark.parametrize("k", [0.2, 0.5, 0.9])
def test_pareto_fit_recovers_the_shape(k):
    """The error of an efficient fit of M draws is (1 + k) / sqrt(M); the prior pulls by 10 / (M + 10)."""
    found = []
    for seed in range(20):
        x = torch.tensor(genpareto.rvs(k, scale=2.0, size=2000, random_state=seed)).sort()[0]
        found.append(psis.fit_pareto(x))
    shapes, scales = torch.tensor(found, dtype=torch.float64).T
    assert abs(shapes.mean() - k) < 4 * (1 + k) / math.sqrt(20 * 2000) + 10 * abs(k - 0.5) / 2010
    assert scales.mean() == pytest.approx(2, abs=0.05)


@pytest.mark.parametrize("scale", [0.5, 0.75, 0.9])
def test_pareto_k_of_gaussian_weights(scale):
    """N(0, 1) by draws of N(0, scale^2): E[w^r] is finite for r < 1 / (1 - scale^2), so k = 1 - scale^2 in the limit."""
    x = scale * normals(200_000, 1)[:, 0]
    found = psis.pareto_k(0.5 * x.square() * (1 / scale**2 - 1))
    assert found == pytest.approx(1 - scale**2, abs=0.2)
    assert (found > 0.55) == (scale == 0.5)


def test_smoothing_tames_the_largest_weight_and_keeps_order_and_body():
    log_w = 1.5 * normals(1000, 1)[:, 0]
    smoothed, k = psis.smooth(log_w)
    assert 0 < k < 1.2
    torch.testing.assert_close(smoothed.argsort(), log_w.argsort())
    assert int((smoothed != log_w).sum()) <= 95 and smoothed.max() <= log_w.max()
    assert psis.pareto_k(log_w[:20]) != psis.pareto_k(log_w[:20])  # NaN: too few
    assert psis.pareto_k(torch.zeros(100)) == -math.inf
    repeated = (0.1 * normals(1000, 1)[:, 0]).repeat_interleave(10)
    assert psis.pareto_k(repeated) < 0.3
    bulk = torch.zeros(2000, dtype=torch.float64)
    for few, k in ((0.1, -math.inf), (20.0, math.inf)):  # three weights above equal ones: a little, or by far
        assert psis.pareto_k(bulk + few * (torch.arange(2000) < 3)) == k
    for spread in (30, 300, 3000):  # one weight is all there is
        assert psis.pareto_k(spread * normals(2000, 1)[:, 0]) > 1
    assert psis.pareto_k(bulk - math.inf) == math.inf
    with pytest.raises(ValueError, match="NaN"):
        psis.smooth(torch.tensor([math.nan] * 30))


def test_smoothing_puts_the_quantiles_of_the_fit_where_the_tail_was():
    log_w, size = 1.5 * normals(1000, 1)[:, 0], 95
    values, order = log_w.sort()
    edge = values[-size - 1]
    shape, scale = psis.fit_pareto((values[-size:] - values[-1]).exp() - (edge - values[-1]).exp())
    smoothed, k = psis.smooth(log_w)
    quantiles = torch.tensor(genpareto.ppf((np.arange(size) + 0.5) / size, shape, scale=scale))
    want = (quantiles + (edge - values[-1]).exp()).clamp_max(1).log() + values[-1]
    torch.testing.assert_close(smoothed[order[-size:]], want)
    assert k == shape


def test_few_draws_are_drawn_to_one_half_and_allow_less():
    """k = -1 of evenly spread draws is no more than one voice in two beside the ten draws of the prior."""
    shape, _ = psis.fit_pareto((torch.arange(10).double() + 0.5) / 10)
    assert -0.4 < shape < 0
    assert [psis.limit(count) for count in (100, 10**9)] == pytest.approx([0.5, 0.7])


# ---- log Z, its interval, expectations


@pytest.mark.parametrize("spread", [0.3, 1.0])
def test_log_z_interval_covers(spread):
    runs = [log_normal_draws(500, spread, seed) for seed in range(400)]
    covered = sum(low <= 0 <= high for low, high in (r.log_z_interval(0.9) for r in runs)) / 400
    assert abs(covered - 0.9) < 4 * math.sqrt(0.09 / 400)
    naive = [(r.log_z, weights.log_z_error(r.log_weights) / math.sqrt(3)) for r in runs]  # an error too small by sqrt 3
    assert sum(abs(centre) < 1.645 * e for centre, e in naive) / 400 < 0.84


@pytest.mark.parametrize("signed", [False, True])
def test_log_z_interval_has_room_for_what_lies_beyond_the_largest_weight(signed):
    """Pareto weights of k = 0.6 have no variance: an interval of normal errors misses too often, and always from below."""
    k, count, covered, naive = 0.6, 0, 0, 0
    for seed in range(300):
        u = torch.rand(2000, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        log_w = (torch.expm1(-k * u.log()) * (1 - k) / k).log()
        signs = torch.ones_like(u) if signed else None
        low, high = weights.log_z_interval(log_w, 0.95, signs=signs)
        if math.isinf(high):
            continue  # it holds log Z without saying anything
        count += 1
        covered += low <= 0 <= high
        naive += abs(math.expm1(-weights.log_mean(log_w))) < 1.96 * weights.log_z_error(log_w)
    least = 0.95 - 4 * math.sqrt(0.95 * 0.05 / count)
    assert count > 150 and naive / count < least < covered / count, (naive / count, covered / count)


def test_too_few_draws_to_know_their_tail_give_no_upper_end():
    low, high = log_normal_draws(24, 2.0, 0).log_z_interval(0.9)
    assert math.isinf(high) and math.isfinite(low)


def test_interval_of_groups_counts_groups():
    """Rows that repeat each other, ten at a time, hold no more than the groups do."""
    covered, wrong = 0, 0
    for seed in range(200):
        log_w = log_normal_draws(40, 0.5, seed).log_weights.repeat_interleave(10)
        low, high = weights.log_z_interval(log_w, 0.9, group=10)
        covered += low <= 0 <= high
        low, high = weights.log_z_interval(log_w, 0.9)
        wrong += low <= 0 <= high
    assert abs(covered / 200 - 0.9) < 4 * math.sqrt(0.09 / 200) and wrong / 200 < 0.6
    runs = log_normal_draws(8, 0.5, 0).log_weights.repeat_interleave(10)
    assert all(map(math.isfinite, weights.log_z_interval(runs, group=10))), (
        "eight runs have an interval, whatever their tail"
    )


def test_interval_of_three_groups_by_hand():
    """Means 1, 1 and 4 are .5, .5 and 2 of theirs: standard error 1/2, third moment 1/4, Student's law of 2."""
    log_w = torch.tensor([1.0, 1, 1, 1, 4, 4]).log()
    shift, reach = 0.25 / (6 * 3 * 0.25 * 3), student.ppf(0.75, 2) / 2
    want = [math.log(2 * (1 + shift - reach)), math.log(2 * (1 + shift + reach))]
    assert weights.log_z_interval(log_w, 0.5, group=2) == pytest.approx(want)


def test_no_upper_end_where_the_variance_may_be_infinite():
    draws = log_normal_draws(2000, 4.0, 0)
    assert draws.khat > 0.7
    low, high = draws.log_z_interval(0.95)
    assert high == math.inf and low == pytest.approx(draws.log_z + math.log(0.05))


def test_expectation_and_its_error():
    runs = [log_normal_draws(1000, 0.8, seed).expectation(lambda x: x) for seed in range(200)]
    values, errors = (torch.cat(column) for column in zip(*runs, strict=True))
    assert abs(values.mean() - 0.8) < 4 * values.std() / math.sqrt(200) + 2 / 1000  # a bias of order 1 / N
    assert errors.square().mean().sqrt() == pytest.approx(float(values.std()), rel=0.25)
    plain = log_normal_draws(1000, 0.8, 0).x.mean()
    assert abs(plain - 0.8) > 0.5  # without weights it is another law


def test_the_error_of_a_plain_mean_is_its_standard_error():
    values = normals(5, 1)
    mean, error = weights.expectation(values)
    torch.testing.assert_close((mean, error), (values.mean(0), values.std(0) / 5**0.5))


def test_combs_take_each_index_in_proportion_to_its_weight():
    offsets = (torch.arange(100) + 0.5) / 100
    picked = weights.comb(torch.tensor([0.25, 0.75]).log().expand(100, 2), offsets, 3)
    assert float(picked.double().mean()) == pytest.approx(0.75)


def test_elbo_and_eubo_enclose_log_z():
    """For w = exp(s e - s^2 / 2) the ELBO is -s^2 / 2, and under the target, e ~ N(s, 1), the EUBO is +s^2 / 2."""
    draws = log_normal_draws(20_000, 0.8, 0)
    value, error = weights.bound(draws.log_weights)
    assert value == pytest.approx(draws.elbo) and abs(value + 0.32) < 4 * error
    upper, error = weights.bound(0.8 * (draws.x[:, 0] + 0.8) - 0.32)
    assert abs(upper - 0.32) < 4 * error


def test_ess_has_its_closed_form():
    """E[w]^2 / E[w^2] = exp(-s^2)."""
    assert log_normal_draws(200_000, 0.7, 0).ess == pytest.approx(math.exp(-0.49), abs=0.01)
    assert weights.ess(torch.tensor([0.0, -math.inf, -math.inf, -math.inf])) == pytest.approx(0.25)


def test_rhat_sees_chains_that_disagree():
    x = normals(4000, 2)
    assert float((rhat(x, 100) - 1).abs().max()) < 0.01
    x[:2000, 1] += 1
    assert float(rhat(x, 100)[1]) > 1.05 and float(rhat(x, 100)[0]) < 1.01
    drifting = x + torch.linspace(0, 2, 100).repeat(40)[:, None]
    assert bool((rhat(drifting, 100) > 1.05).all())
    with pytest.raises(ValueError, match="at least 4"):
        rhat(x, 3)


# ---- Draws


def test_resampling_follows_the_weights():
    draws = log_normal_draws(20_000, 0.5, 0)
    again = draws.resample(10_000, seed=1)
    assert again.kind is None and len(again) == 10_000 and again.nfe == 2 * draws.nfe
    assert float(again.x.mean()) == pytest.approx(0.5, abs=4 * 1.2 / math.sqrt(10_000))
    assert bool(again.expectation(lambda x: x)[1].isnan().all())


def test_kinds_refuse_what_they_do_not_allow():
    x, log_w = torch.zeros(10, 2), torch.zeros(10, dtype=torch.float64)
    assert Draws(x, log_w, "bound").elbo == 0
    for kind, name in (("bound", "log_z"), ("bound", "ess"), ("consistent", "elbo"), ("invalid", "ess")):
        with pytest.raises(ValueError, match=f"{kind}.*no {name}"):
            getattr(Draws(x, log_w, kind), name)
    with pytest.raises(ValueError, match="no weights"):
        _ = Draws(x).log_z
    for bad in ({"log_weights": log_w}, {"kind": "unbiased"}, {"log_weights": log_w.float(), "kind": "unbiased"}):
        with pytest.raises(ValueError, match=r"kind|float64"):
            Draws(x, **bad)
    with pytest.raises(ValueError, match="groups"):
        Draws(x, group=3)


def test_broken_rows_are_counted_and_weigh_nothing():
    x = torch.zeros(8, 1)
    x[0] = math.nan
    log_w = torch.tensor([0, math.nan, math.inf, -math.inf, 0, 0, 0, 0], dtype=torch.float64)
    draws = Draws(x, log_w, "unbiased")
    assert draws.nonfinite == 3 and draws.log_z == pytest.approx(math.log(4 / 8)) and draws.elbo == -math.inf
    assert float(draws.expectation(lambda v: v)[0]) == 0


def test_negative_weights():
    """E[w] = E[|w|] (1 - 2 p): log Z, ESS and expectations by signs, which rows are picked, and the interval's ends."""
    n = 100_000
    e = normals(n, 2)
    negative = torch.arange(n) % 10 == 0
    log_w, signs = 0.3 * e[:, 0].double() - 0.045, torch.where(negative, -1.0, 1.0).double()
    x = torch.where(negative[:, None], 5.0, e[:, 1:]).float()
    draws = Draws(x, log_w, "unbiased", signs=signs)
    low, high = draws.log_z_interval(0.9999)
    assert draws.folds == n // 10 and low < math.log(0.8) < high < math.log(0.8) + 0.02
    assert draws.ess == pytest.approx(0.8**2 / math.exp(0.09), rel=0.02)
    mean, error = draws.expectation(lambda v: v)
    assert abs(float(mean) + 0.1 * 5 / 0.8) < 4 * float(error) < 0.1, "(0.9 E[x] - 0.1 * 5) / 0.8"
    with pytest.warns(UserWarning, match="10000 of 100000 weights are negative"):
        assert float(draws.resample(1000).x.max()) < 5, "no row of negative weight is picked"
    heavy = replace(draws, log_weights=5 * log_w.square() * 20)
    assert heavy.log_z_interval() == (-math.inf, math.inf), "Markov's bound needs positive weights"
    assert replace(draws, signs=-signs).log_z == -math.inf and replace(draws, signs=-signs).ess == 0
    plain = replace(draws, signs=None)
    both = Draws.concatenate([draws, plain])
    assert both.folds == draws.folds and both.log_z == pytest.approx(math.log(0.9), abs=0.01)
    assert Draws.concatenate([plain, plain]).signs is None and draws.picked(torch.arange(5), 1).signs is None
    for bad in (signs[:3], 0.5 * signs):
        with pytest.raises(ValueError, match="signs"):
            replace(draws, signs=bad)
    with pytest.raises(ValueError, match="signs"):
        Draws(x, signs=signs)


def test_concatenation_averages_costs():
    a = Draws(torch.zeros(2, 1), torch.zeros(2, dtype=torch.float64), "unbiased", nfe=1, seconds=1)
    b = Draws(torch.ones(6, 1), torch.zeros(6, dtype=torch.float64), "unbiased", nfe=5, seconds=2)
    both = Draws.concatenate([a, b])
    assert len(both) == 8 and both.nfe == 4 and both.seconds == 3
    with pytest.raises(ValueError, match="different kinds"):
        Draws.concatenate([a, Draws(torch.zeros(2, 1))])


def test_draws_are_shown_in_one_line():
    draws = Draws(torch.zeros(7, 2), torch.zeros(7, dtype=torch.float64), "unbiased", nfe=3, seed=5)
    assert repr(draws) == "Draws(N=7, d=2, kind='unbiased', nfe=3, seed=5)"
