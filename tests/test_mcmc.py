"""Markov chains, annealing and corrections against exact answers; planted wrong versions fail the same check."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import pytest
import torch

from fewstep.core.density import TargetDensity
from fewstep.core.noise import Streams
from fewstep.densities import corrections
from fewstep.densities.draws import Draws
from fewstep.densities.estimators import weights
from fewstep.densities.estimators.gaussian import log_normal
from fewstep.densities.mcmc.bridge import Bridge, StandardNormal
from fewstep.densities.mcmc.chains import Chains
from fewstep.densities.mcmc.hamiltonian import Hamiltonian, mala
from fewstep.densities.mcmc.replica_exchange import ReplicaExchange
from fewstep.densities.mcmc.sequential import SequentialMonteCarlo

MEAN = torch.tensor([1.0, -1.0, 0.5], dtype=torch.float64)
STD = torch.tensor([0.3, 1.0, 2.0], dtype=torch.float64)


class Gaussian(TargetDensity):
    """exp(1.7) N(MEAN, diag(STD^2))."""

    dim, log_z = 3, 1.7

    def log_prob(self, x):
        return self.log_z - 0.5 * ((x - MEAN) / STD).square().sum(1) - float((STD * math.sqrt(2 * math.pi)).log().sum())


class Quartet(TargetDensity):
    """0.1, 0.2, 0.3, 0.4 of N(m_i, 0.2^2 I) with m_i = (+-1.5, +-1.5), times exp(-2)."""

    dim, log_z = 2, -2.0
    shares = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)
    means = 1.5 * torch.tensor([[-1, -1], [-1, 1], [1, -1], [1, 1]], dtype=torch.float64)

    def log_prob(self, x):
        parts = torch.stack([log_normal(x, m, 0.2) for m in self.means], 1)
        return (parts + self.shares.log()).logsumexp(1) + self.log_z

    def sample(self, noise):
        row = torch.searchsorted(self.shares.cumsum(0), noise.rand(1)[:, 0]).clamp_max(3)
        return self.means[row] + 0.2 * noise.randn(2)

    def modes(self, x):
        return (torch.cdist(x, self.means).argmin(1)[:, None] == torch.arange(4)).double()


@dataclass(frozen=True)
class Unadjusted(Hamiltonian):
    """The planted fault: every proposal is accepted."""

    def step(self, bridge, state, beta, size, noise):
        accept = super().step(bridge, state, beta, size, noise)[1]
        z = noise.randn(*state.x.shape[1:])
        free = bridge.at(state.x + size**2 / 2 * state.tempered_score(beta) + size * z)
        return free, accept


def moments(draws, target=None):
    """Return the largest pull of mean and variance against the Gaussian's."""
    first, e1 = draws.expectation(lambda x: x)
    second, e2 = draws.expectation(lambda x: (x - MEAN).square())
    pulls = torch.cat([(first - MEAN) / e1, (second - STD.square()) / e2])
    return float(pulls.abs().max())


METHODS = {
    "hmc": (Chains(Hamiltonian(4), warmup=120), 64 * 40),
    "mala": (Chains(mala(), warmup=300), 64 * 300),
    "replica_exchange": (ReplicaExchange(Hamiltonian(3), levels=5, chains=32, warmup=120), 32 * 80),
    "smc": (SequentialMonteCarlo(Hamiltonian(4), particles=256, moves=2), 256 * 10),
    "annealed": (SequentialMonteCarlo(Hamiltonian(4), 256, 1, keep=0.98, resample_below=0.0), 2048),
}


@pytest.fixture(scope="module")
def gaussian_runs():
    return {name: method.sample(Gaussian(), n, seed=3) for name, (method, n) in METHODS.items()}


@pytest.mark.parametrize("name", METHODS)
def test_gaussian_moments(name, gaussian_runs):
    draws = gaussian_runs[name]
    assert moments(draws) < 4.2 and draws.nonfinite == 0
    assert max(draws.expectation(lambda x: x)[1] / STD) < 0.1, "the errors are small enough to see a fault"
    shifted = replace(draws, x=draws.x + 0.5 * STD)
    assert moments(shifted) > 4.2


def test_without_the_metropolis_test_the_moments_are_wrong():
    run = Chains(Unadjusted(1, 0.57), warmup=200).sample(Gaussian(), 64 * 200, seed=3)
    assert moments(run) > 4.2


@pytest.mark.parametrize("name", ["smc", "annealed"])
def test_log_z_of_a_gaussian(name, gaussian_runs):
    draws = gaussian_runs[name]
    error = weights.log_z_error(draws.log_weights, draws.group)
    assert draws.kind == "unbiased" and abs(draws.log_z - 1.7) < 4 * error < 0.4
    low, high = draws.log_z_interval(0.999)
    assert low < 1.7 < high < math.inf
    assert draws.elbo < draws.log_z


def test_the_interval_of_smc_covers():
    """In 90 % of 40 seeds within 4 standard errors; with particles of a run taken as independent it does not."""
    method, tolerance = SequentialMonteCarlo(Hamiltonian(2), 32, 1, keep=0.9), 4 * math.sqrt(0.09 / 40)
    runs = [method.sample(Gaussian(), 32 * 6, seed=seed) for seed in range(40)]
    for group, covers in ((32, True), (1, False)):
        intervals = [weights.log_z_interval(run.log_weights, 0.9, group) for run in runs]
        covered = sum(low <= 1.7 <= high for low, high in intervals) / 40
        assert (abs(covered - 0.9) < tolerance) == covers


@pytest.mark.parametrize("name", ["replica_exchange", "smc", "annealed"])
def test_mode_weights(name):
    method, n = METHODS[name]
    method = ReplicaExchange(Hamiltonian(3), levels=5, chains=64, warmup=120) if name == "replica_exchange" else method
    n = 64 * 80 if name == "replica_exchange" else 2 * n
    target = Quartet()
    draws = method.sample(target, n, seed=1)
    shares, errors = draws.expectation(target.modes)
    assert bool(((shares - target.shares).abs() < 4.2 * errors).all()) and float(errors.max()) < 0.05
    if draws.kind:
        low, high = draws.log_z_interval(0.999)
        assert low < -2 < high < -1.5


def test_plain_chains_miss_mode_weights():
    target = Quartet()
    shares, _ = Chains(mala(), warmup=100).sample(target, 64 * 20).expectation(target.modes)
    assert float((shares - target.shares).abs().max()) > 0.1


def test_calls_are_counted():
    counted = {"log_prob": 0, "score": 0}

    class Counting(Gaussian):
        def log_prob(self, x):
            counted["log_prob"] += len(x)
            return super().log_prob(x)

        def score(self, x):
            counted["score"] += len(x)
            return (MEAN - x) / STD.square()

    for method, _ in METHODS.values():
        counted.update(log_prob=0, score=0)
        draws = method.sample(Counting(), 2 * method.chains if hasattr(method, "chains") else 2 * method.particles)
        assert draws.target_calls * len(draws) == pytest.approx(counted["log_prob"])
        assert draws.gradient_calls * len(draws) == pytest.approx(counted["score"])


def test_a_run_repeats_and_n_must_fit():
    method, _ = METHODS["smc"]
    a, b, c = (method.sample(Gaussian(), 512, seed=s) for s in (0, 0, 1))
    assert torch.equal(a.x, b.x) and not torch.equal(a.x, c.x)
    for method, _ in METHODS.values():
        with pytest.raises(ValueError, match="multiple"):
            method.sample(Gaussian(), 777)


@pytest.mark.parametrize(
    "kind, name, value",
    [
        (ReplicaExchange, "levels", 1),
        (ReplicaExchange, "thin", 0),
        (ReplicaExchange, "chains", 2.5),
        (ReplicaExchange, "warmup", -1),
        (Chains, "thin", 0),
        (Chains, "chains", 0),
        (SequentialMonteCarlo, "particles", 0),
    ],
)
def test_settings_that_are_no_counts_are_told(kind, name, value):
    with pytest.raises(ValueError, match=f"{name} must be"):
        kind(**{name: value})


def test_a_target_that_is_nowhere_finite_is_an_error():
    class Broken(Gaussian):
        def log_prob(self, x):
            return x.sum(1) * math.nan

    with pytest.raises(ValueError, match="zero, NaN or infinite"):
        METHODS["smc"][0].sample(Broken(), 256)


# ---- corrections


def proposals(n, target, std=1.2, seed=0):
    """Independent draws of N(0, std^2) with exact weights."""
    x = std * Streams(seed, range(n), torch.float64).randn(target.dim)
    return Draws(x, target.log_prob(x) - log_normal(x, 0.0, std), "unbiased", nfe=1, target_calls=1)


def test_independence_metropolis_corrects_modes():
    target = Quartet()
    draws = proposals(64 * 400, target)
    fixed = corrections.independence_metropolis(draws, chains=64)
    shares, errors = fixed.expectation(target.modes)
    assert bool(((shares - target.shares).abs() < 4.2 * errors).all()) and float(errors.max()) < 0.03
    assert fixed.kind is None and fixed.group == 320 and fixed.nfe == pytest.approx(1.25)
    flat = replace(draws, log_weights=torch.zeros_like(draws.log_weights))  # accepts everything
    shares, errors = corrections.independence_metropolis(flat, chains=64).expectation(target.modes)
    assert not bool(((shares - target.shares).abs() < 4.2 * errors).all())
    for bad in (replace(draws, kind="bound"), replace(draws, group=2)):
        with pytest.raises(ValueError, match="independent draws with unbiased weights"):
            corrections.independence_metropolis(bad)


def test_polishing_repairs_draws_and_keeps_weights_valid():
    target = Gaussian()
    x = MEAN + 0.6 * STD * Streams(0, range(4000), torch.float64).randn(3)
    bad = Draws(x)
    assert moments(bad) > 20
    fixed = corrections.polish(bad, target, steps=30, kernel=Hamiltonian(8))
    assert moments(fixed) < 4.2 and fixed.gradient_calls > 30 * 8
    weighted = proposals(4000, target, std=2.5)
    moved = corrections.polish(weighted, target, steps=5)
    assert torch.equal(moved.log_weights, weighted.log_weights) and not torch.equal(moved.x, weighted.x)
    assert moments(moved) < 4.2
    assert moments(corrections.polish(bad, Bent(), steps=30)) > 4.2


class Bent(Gaussian):
    """Not the target: polishing with it must show."""

    def log_prob(self, x):
        return super().log_prob(0.7 * x)


def test_kernel_mixture_is_a_density_with_its_sampler():
    x = torch.cat(
        [-2 + 0.3 * Streams(0, range(300), torch.float64).randn(1), Streams(1, range(300), torch.float64).randn(1)]
    )
    mixture = corrections.KernelMixture.fitted(x, 600)
    grid = torch.linspace(-12, 12, 20001, dtype=torch.float64)[:, None]
    density = mixture.log_prob(grid).exp()
    assert float(torch.trapezoid(density, grid[:, 0])) == pytest.approx(1, abs=1e-6)
    assert float(torch.trapezoid(density * (grid[:, 0] - x.mean()) ** 2, grid[:, 0])) == pytest.approx(
        float(x.var()), rel=0.01
    )
    drawn = mixture.sample(Streams(2, range(20000), torch.float64))[:, 0]
    for q in (0.1, 0.5, 0.9):
        below = float(torch.trapezoid(torch.where(grid[:, 0] < drawn.quantile(q), density[:], 0.0), grid[:, 0]))
        assert below == pytest.approx(q, abs=4 * math.sqrt(q * (1 - q) / 20000) + 1e-3)


def test_smc_on_top_of_biased_draws():
    """Draws with modes in the wrong shares, too wide, and one no number: the weights on top are unbiased all the same."""
    target = Quartet()
    noise = Streams(4, range(2000), torch.float64)
    x = target.means[torch.arange(2000) % 4] + 0.4 * noise.randn(2)
    x[7] = torch.nan
    bad = Draws(x, nfe=4)
    found = corrections.smc_on_top(
        bad, target, 128 * 12, method=SequentialMonteCarlo(Hamiltonian(2), particles=128, keep=0.8), centres=64
    )
    shares, errors = found.expectation(target.modes)
    assert bool(((shares - target.shares).abs() < 4.2 * errors).all()) and float(errors.max()) < 0.03
    low, high = found.log_z_interval(0.999)
    assert low < -2 < high < -1.8 and found.nfe == pytest.approx(4 * 2000 / 1536)


def test_bridge_ends_are_base_and_target():
    bridge = Bridge(StandardNormal(3), Gaussian())
    state = bridge.at(Streams(0, range(5), torch.float64).randn(3))
    zero, one = torch.zeros((), dtype=torch.float64), torch.ones((), dtype=torch.float64)
    torch.testing.assert_close(state.log_prob(zero), log_normal(state.x))
    torch.testing.assert_close(state.log_prob(one), Gaussian().log_prob(state.x))
    torch.testing.assert_close(state.tempered_score(one), (MEAN - state.x) / STD.square())
    torch.testing.assert_close(state.tempered_score(zero), -state.x)


def test_the_score_of_a_mixture_of_kernels_is_its_gradient():
    mixture = corrections.KernelMixture.fitted(Streams(0, range(50)).randn(2).double(), 20)
    x = Streams(1, range(7)).randn(2).double().requires_grad_()
    torch.testing.assert_close(mixture.score(x.detach()), torch.autograd.grad(mixture.log_prob(x).sum(), x)[0])


def test_independence_metropolis_depends_on_its_seed():
    drawn = proposals(640, Quartet())
    assert not torch.equal(*(corrections.independence_metropolis(drawn, 16, seed=seed).x for seed in (0, 1)))


def test_thinned_chains_keep_every_second_draw():
    chains = Chains(Hamiltonian(2), chains=4, warmup=10)
    whole, thin = (replace(chains, thin=k).sample(Gaussian(), 24 // k, seed=1).x for k in (1, 2))
    torch.testing.assert_close(thin.reshape(4, 3, 3), whole.reshape(4, 6, 3)[:, 1::2])
