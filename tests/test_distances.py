"""Transport and Stein distances against closed forms, and what they are between equal laws."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.spatial.distance import pdist
from scipy.stats import wasserstein_distance

from fewstep import metrics
from fewstep.core.noise import Streams


def rows(seed, n=300, d=3):
    return Streams(seed, range(n), torch.float64).randn(d)


def test_wasserstein_is_exact():
    a, b = rows(0, 200, 1), 1.5 * rows(1, 300, 1) + 0.4
    expected = wasserstein_distance(a[:, 0].numpy(), b[:, 0].numpy())
    assert metrics.wasserstein(a, b, 1) == pytest.approx(expected, rel=1e-9)
    x, shift = rows(2), torch.tensor([1.0, -2.0, 2.0], dtype=torch.float64)
    for p in (1, 2):  # a translate is reached by no plan more cheaply than by the translation
        assert metrics.wasserstein(x, x.flip(0) + shift, p) == pytest.approx(3)
    sorted_cost = (a[:200, 0].sort()[0] - b[:200, 0].sort()[0]).square().mean().sqrt()
    assert metrics.wasserstein(a, b[:200], 2) == pytest.approx(float(sorted_cost))


def test_sinkhorn_divergence_of_a_translate_is_the_squared_shift():
    """OT_e(a, a + v) = OT_e(a, a) + |v|^2 for the squared cost and any e; without debiasing it is off by OT_e(a, a)."""
    x, shift = rows(0, 150), torch.tensor([0.3, -0.2, 0.1], dtype=torch.float64)
    for epsilon in (None, 2.0):
        found = metrics.sinkhorn_divergence(x, x.flip(0) + shift, epsilon=epsilon, tolerance=1e-4)
        assert found == pytest.approx(0.14, abs=2e-3)
    assert metrics.sinkhorn_divergence(x, x.flip(0), 1) == pytest.approx(0, abs=1e-6)


def test_sinkhorn_divergence_of_two_pairs_of_points():
    """Of {-r, r} and {-s, s} every row costs the same, so OT_e = -e log mean exp(-C / e)."""

    def entropic(r, s):
        return -0.7 * math.log((math.exp(-((r - s) ** 2) / 0.7) + math.exp(-((r + s) ** 2) / 0.7)) / 2)

    signs = torch.tensor([[-1.0], [1.0]]).double()
    found = metrics.sinkhorn_divergence(signs, 1.6 * signs, epsilon=0.7, tolerance=1e-6)
    assert found == pytest.approx(entropic(1, 1.6) - (entropic(1, 1) + entropic(1.6, 1.6)) / 2, rel=1e-5)


def test_sinkhorn_divergence_nears_the_exact_cost():
    a, b = rows(0, 150, 2), 1.7 * rows(1, 150, 2) + 1
    exact = metrics.wasserstein(a, b, 2) ** 2
    errors = [abs(metrics.sinkhorn_divergence(a, b, epsilon=e) - exact) for e in (2.0, 0.5, 0.2)]
    assert errors[2] < errors[1] < errors[0] and errors[2] < 0.05 * exact


def test_sinkhorn_that_has_not_converged_is_an_error():
    with pytest.raises(ValueError, match="not converged"):
        metrics.sinkhorn_divergence(rows(0), 3 * rows(1), epsilon=0.1, iterations=5)


def test_scales_left_out_are_those_of_the_reference():
    a, b = 2 * rows(0, 6), rows(1, 6)
    b[0] += 10  # far from the rest: the median distance is not the mean
    median = float(np.median(pdist(b)))
    assert metrics.mmd(a, b) == pytest.approx(metrics.mmd(a, b, bandwidth=median))
    assert stein(b) == pytest.approx(stein(b, bandwidth=median))
    cost = float(torch.cdist(b, b).square().mean())
    assert metrics.sinkhorn_divergence(a, b) == pytest.approx(metrics.sinkhorn_divergence(a, b, epsilon=cost / 20))


def test_noise_floor_takes_every_set_once():
    seen = []
    metrics.noise_floor(lambda a, b: seen.extend((a, b)) or 0.0, lambda seed: seed, repeats=3)
    assert len(set(seen)) == len(seen) == 6


def test_noise_floor_is_that_of_equal_laws():
    def draw(seed):
        return rows(seed, 200, 4)

    mean, spread = metrics.noise_floor(metrics.wasserstein, draw)
    assert 0.5 < mean < 2 and 0 < spread < 0.1 * mean
    larger, _ = metrics.noise_floor(metrics.wasserstein, lambda seed: rows(seed, 800, 4))
    assert larger < mean  # it falls with the number of draws
    assert metrics.wasserstein(draw(20) + 1, draw(21)) > mean + 10 * spread
    assert metrics.wasserstein(0.8 * draw(20), draw(21)) < mean  # shrunken samples look better than exact ones
    unbiased, spread = metrics.noise_floor(lambda a, b: metrics.mmd(a, b)[0], draw, repeats=30)
    assert abs(unbiased) < 4 * spread / math.sqrt(30)
    with pytest.raises(ValueError, match="two repeats"):
        metrics.noise_floor(metrics.wasserstein, draw, repeats=1)


def stein(x, target_std=1.0, **options):
    return metrics.stein_discrepancy(x, -x / target_std**2, **options)


def test_stein_discrepancy_of_a_shift():
    """N(m, 1) against N(0, 1): s_p - s_q = -m is constant, so it is m^2 E k(x, x'), x - x' ~ N(0, 2)."""
    grid = torch.linspace(-12, 12, 4001, dtype=torch.float64)
    density = (-grid.square() / 4).exp() / math.sqrt(4 * math.pi)
    for m, h in ((0.5, 1.0), (1.0, 2.0)):
        expected = m**2 * float(torch.trapezoid(density / (1 + (grid / h) ** 2).sqrt(), grid))
        value, error = stein(rows(0, 2000, 1) + m, bandwidth=h)
        assert abs(value - expected) < 4 * error < 0.4 * expected


def test_stein_discrepancy_is_unbiased_where_the_law_is_right():
    runs = [stein(rows(seed, 100, 3)) for seed in range(200)]
    values, errors = np.array(runs).T
    assert abs(values.mean()) < 4 * values.std() / math.sqrt(200)
    assert values.std() < 1.2 * np.sqrt((errors**2).mean())
    for wrong in (0.7, 1.4):
        value, error = stein(wrong * rows(0, 600, 3))
        assert value > 4 * error


def test_stein_discrepancy_does_not_see_mode_weights_but_mode_weights_does():
    n = 400
    places = torch.where(torch.arange(n) % 10 == 0, -8.0, 8.0).double()[:, None]
    x = places + rows(0, n, 1)
    share = torch.sigmoid(16 * x)  # of the mode at +8, in an equal mixture
    score = share * (8 - x) + (1 - share) * (-8 - x)
    value, error = metrics.stein_discrepancy(x, score, bandwidth=1.0)
    assert abs(value) < 4 * error
    shares, errors = metrics.mode_weights((x[:, 0] > 0).long(), 2)
    assert shares.tolist() == pytest.approx([0.1, 0.9]) and bool(((shares - 0.5).abs() > 10 * errors).all())


def test_mode_weights_and_their_errors():
    modes = torch.arange(1000) % 4
    shares, errors = metrics.mode_weights(modes, 5)
    assert shares.tolist() == pytest.approx([0.25, 0.25, 0.25, 0.25, 0])
    assert errors.tolist() == pytest.approx([math.sqrt(0.25 * 0.75 / 1000)] * 4 + [0])
    weighted, errors = metrics.mode_weights(modes, 4, torch.log(torch.arange(1.0, 5.0))[modes])
    assert weighted.tolist() == pytest.approx([0.1, 0.2, 0.3, 0.4])
    variances = (weighted[:, None] * (torch.eye(4) - weighted)).square().sum(0) / 250  # of a ratio
    assert errors.tolist() == pytest.approx(variances.sqrt().tolist())
    for bad in ((modes, 3), (modes[:, None], 4), (modes, 4, torch.zeros(3))):
        with pytest.raises(ValueError, match="expected"):
            metrics.mode_weights(*bad)
    for value in (-torch.inf, torch.nan):
        with pytest.raises(ValueError, match="must not be NaN or all -inf"):
            metrics.mode_weights(modes, 4, torch.full((1000,), value))
