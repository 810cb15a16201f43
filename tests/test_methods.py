"""Every method in the folder: the contract, the published table of its finite-step laws, and what it converges to."""

import copy
import dataclasses
import math

import pytest
import torch

import fewstep
from fewstep.core.driven import Driven
from fewstep.core.flow import flow_calls, probability_flow
from fewstep.core.grid import spaced
from fewstep.core.likelihood import FlatLikelihood, GaussianLikelihood, JointLikelihood
from fewstep.core.problem import Posterior
from fewstep.core.sampler import State
from fewstep.core.schedule import Tabulated
from fewstep.methods.latino import LATINO
from fewstep.methods.mmps import MMPS
from fewstep.operators.matrix import MatrixOperator
from fewstep.testing.law import ScriptedNoise, distance, run_scripted
from fewstep.testing.oracle import ExactDraw
from fewstep.testing.problems import bimodal_problem, gaussian_problem, scalar_problem
from fewstep.testing.propagate import finite_step_law
from fewstep.testing.sampler import (
    check_convergence,
    check_form,
    check_independence,
    check_law,
    check_posterior,
    check_sampler,
)

NAN = math.nan
# few steps, so that the checks are quick; everything else as published
QUICK = {name: {"steps": 6} for name in fewstep.available()}
QUICK["daps"] |= {"langevin_steps": 5, "lr": 1e-5}
QUICK["pnp_dm"] |= {"inner_steps": 3, "decay": 0.3}
QUICK["dps"] |= {"steps": 20}
NOT_AFFINE = {"dps", "red_diff"}  # a norm of the residual, and Adam; their own tests are below
# as published: weights without sigma (a start at A^+ y, a fixed tau, gamma or norm), or epsilon dropped wherever A is not zero
NOT_BLIND = {"cm4ir", "daps", "ddnm", "ddrm", "dds", "dps", "red_diff", "ud2m"}
FINE = {
    "latino": fewstep.get("latino").presets["consistent"],
    "pnp_dm": fewstep.get("pnp_dm").presets["consistent"],
    "daps": fewstep.get("daps").presets["exact"] | {"steps": 20},
}


@pytest.mark.parametrize("name", fewstep.available())
def test_contract(name):
    sampler = fewstep.get(name)(**QUICK[name])
    check_sampler(sampler, affine=name not in NOT_AFFINE, blind=name not in NOT_BLIND, fine=FINE.get(name))


def test_squared_dps_is_affine_and_keeps_the_contract():
    check_sampler(fewstep.get("dps").preset("squared", steps=20))


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        *((name, {"eta": 1.1}) for name in ("pigdm", "ddnm", "ddrm", "dds", "cm4ir", "dps")),
        ("ud2m", {"eta": -0.1}),
        ("ddrm", {"eta_b": 2.0}),
        ("diffpir", {"lam": -1.0}),
        ("diffpir", {"zeta": 5.0}),
        *(("dds", {"gamma": value}) for value in (0.0, -1.0, NAN)),
        *((name, {"iterations": value}) for name in ("dds", "mmps") for value in (0, 2.5)),
        *(("daps", {name: 0}) for name in ("langevin_steps", "ode_steps", "ratio_min", "lr")),
        *(("daps", {name: NAN}) for name in ("ratio_min", "ratio_max", "tau", "lr")),
        ("daps", {"ratio_min": 2.0, "ratio_max": 1.0}),
        ("daps", {"tau": -0.1}),
        *(("diffpir", {"lam": value}) for value in (0.0, math.inf, NAN)),
        *(("pnp_dm", {"decay": value}) for value in (0.0, 1.1, NAN)),
        *(("pnp_dm", {name: value}) for name in ("rho_min", "rho_max") for value in (0.0, NAN)),
        ("pnp_dm", {"inner_steps": 0}),
        *(("latino", {"steps": 4, "stay": value}) for value in (-1, 4)),
        *(("latino", {name: value}) for name in ("ratio_min", "pairing", "power") for value in (0.0, NAN)),
        *(("latino", {name: value}) for name, value in (("decoder_steps", 0), ("bound", -1.0))),
        *(("cm4ir", {"start": value}) for value in (0.0, 1.0, NAN)),
        *(("cm4ir", {name: NAN}) for name in ("gamma", "mu", "delta", "zeta")),
        *(("cm4ir", {name: value}) for name, value in (("gamma", -0.5), ("mu", 0.0), ("delta", -1.0), ("zeta", 0.0))),
        ("cm4ir", {"decoder_steps": 0}),
        *((name, {field: value}) for name, field in (("pigdm", "spread"), ("dps", "zeta")) for value in (0.0, NAN)),
        *(("red_diff", {name: value}) for name, value in (("lam", -1.0), ("lam", NAN), ("lr", 0.0), ("lr", NAN))),
    ],
)
def test_fields_out_of_range_are_refused(name, fields):
    with pytest.raises(ValueError, match="must"):
        fewstep.get(name)(**fields)


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("pnp_dm", {"rho_max": math.inf, "decay": 1.0}),
        ("daps", {"ratio_max": math.inf, "tau": 0.0}),
        ("latino", {"stay": 7}),
        ("red_diff", {"lam": 0.0}),
        ("cm4ir", {"gamma": 0.0, "delta": -0.1}),
        *((name, preset) for name in fewstep.available() for preset in fewstep.get(name).presets.values()),
    ],
)
def test_fields_at_the_ends_of_their_range_and_presets_are_taken(name, fields):
    assert fewstep.get(name)(**fields).steps >= 1


def test_all_twelve_are_there():
    want = {"cm4ir", "daps", "ddnm", "ddrm", "dds", "diffpir", "dps", "latino", "mmps", "pigdm", "pnp_dm", "red_diff"}
    assert want <= set(fewstep.available())


# --- negative controls: planted wrong samplers must fail ------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class PriorOnly(MMPS):
    """Ignores y. steps: s. eta: e. iterations: i. grid: g."""

    def predict_x0(self, problem, x_t, t, noise):
        return problem.denoise(x_t, t)


@dataclasses.dataclass(frozen=True)
class MeanOnly(MMPS):
    """Returns the posterior mean as if it were a sample. steps: s. eta: e. iterations: i. grid: g."""

    def output(self, state):
        return state.x.mean(0, keepdim=True).expand_as(state.x)


@dataclasses.dataclass(frozen=True)
class BatchCoupled(MMPS):
    """One norm over the whole batch, as two public DPS have it. steps: s. eta: e. iterations: i. grid: g."""

    def predict_x0(self, problem, x_t, t, noise):
        x0 = problem.denoise(x_t, t)
        residual = problem.likelihood.residual(x0)
        return x0 + 0.3 * problem.likelihood.A_adjoint(residual) / residual.norm()


@dataclasses.dataclass(frozen=True)
class WrongNoise(MMPS):
    """Draws a tenth too much noise where the law expects ours. steps: s. eta: e. iterations: i. grid: g."""

    def predict_x0(self, problem, x_t, t, noise):
        x0 = super().predict_x0(problem, x_t, t, noise)
        return x0 if len(noise) < 100 else 1.1 * x0


@dataclasses.dataclass(frozen=True)
class Mirrored(MMPS):
    """Follows -y. steps: s. eta: e. iterations: i. grid: g."""

    def predict_x0(self, problem, x_t, t, noise):
        likelihood = copy.copy(problem.likelihood)
        likelihood.y = -likelihood.y
        return super().predict_x0(dataclasses.replace(problem, likelihood=likelihood), x_t, t, noise)


@dataclasses.dataclass(frozen=True)
class Shrunk(MMPS):
    """Hardly moves. steps: s. eta: e. iterations: i. grid: g."""

    def output(self, state):
        return 0.01 * state.x


@dataclasses.dataclass(frozen=True)
class TooSure(MMPS):
    """Takes y for exact whatever sigma says. steps: s. eta: e. iterations: i. grid: g."""

    def predict_x0(self, problem, x_t, t, noise):
        likelihood = copy.copy(problem.likelihood)
        likelihood.sigma = 0 * likelihood.sigma + 0.01
        return super().predict_x0(dataclasses.replace(problem, likelihood=likelihood), x_t, t, noise)


@dataclasses.dataclass(frozen=True)
class FirstSigma(MMPS):
    """Gives all items the noise level of the first. steps: s. eta: e. iterations: i. grid: g."""

    def predict_x0(self, problem, x_t, t, noise):
        likelihood = copy.copy(problem.likelihood)
        likelihood.sigma = likelihood.sigma[:1].expand(likelihood.batch)
        return super().predict_x0(dataclasses.replace(problem, likelihood=likelihood), x_t, t, noise)


@dataclasses.dataclass(frozen=True)
class Uncounted(MMPS):
    """Calls the network once more, unseen by the counter. steps: s. eta: e. iterations: i. grid: g."""

    def predict_x0(self, problem, x_t, t, noise):
        problem.prior(x_t, t)
        return super().predict_x0(problem, x_t, t, noise)


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        (PriorOnly, "does not follow y"),
        (Mirrored, "does not follow y"),
        (Shrunk, "does not follow y"),
        (MeanOnly, "two samples of one run are the same"),
        (BatchCoupled, "sample of an item changes"),
        (FirstSigma, "alone: the sample of an item changes"),
        (TooSure, "very large sigma"),
        (WrongNoise, "finite-step law"),
        (Uncounted, "declares 6 network calls, makes 12 of the prior"),
    ],
)
def test_planted_faults_fail_the_contract_as_a_whole(wrong, match):
    with pytest.raises(AssertionError, match=match):
        check_sampler(wrong(steps=6))


@dataclasses.dataclass(frozen=True)
class Uniforms(ExactDraw):
    """Draws normal numbers from uniform ones, `spread` times as far. steps: s. eta: e. grid: g. spread: f."""

    spread: float = 1.0

    def step(self, problem, state, k, noise):
        u, v = noise.rand(2, 5).unbind(1)
        z = self.spread * (-2 * torch.log1p(-u)).sqrt() * torch.cos(2 * math.pi * v)
        posterior = problem.prior.posterior(problem.likelihood)
        problem.counts.network += 1
        return State(posterior.mean + (torch.linalg.cholesky(posterior.cov) @ z[:, :, None])[:, :, 0])


def test_what_is_not_affine_is_held_to_the_posterior_by_its_samples():
    check_sampler(Uniforms(steps=1), affine=False, fine={})
    check_sampler(Uniforms(steps=1, spread=3.0), affine=False, fine={"spread": 1.01})
    with pytest.raises(AssertionError, match="standard errors from the posterior"):
        check_sampler(Uniforms(steps=1), affine=False, fine={"spread": 1.2})


def test_prior_only_fails_the_truth():
    with pytest.raises(AssertionError, match="standard errors from the posterior"):
        check_posterior(PriorOnly(steps=100))
    with pytest.raises(AssertionError, match="mean off"):
        check_convergence(PriorOnly(steps=100))


def test_posterior_mean_posing_as_a_sample_fails():
    with pytest.raises(AssertionError, match="standard errors"):
        check_posterior(MeanOnly(steps=50), num_samples=500)


def test_batch_coupled_guidance_fails_independence():
    with pytest.raises(AssertionError, match="sample of an item changes"):
        check_independence(BatchCoupled(steps=6))


def test_samples_that_do_not_follow_the_law_fail():
    with pytest.raises(AssertionError, match="finite-step law"):
        check_law(WrongNoise(steps=6))


def test_the_form_of_infinite_fields_is_checked_too():
    check_form(fewstep.get("pnp_dm")(steps=4, inner_steps=2, rho_max=math.inf))


def test_undocumented_fields_fail():
    @dataclasses.dataclass(frozen=True)
    class Undocumented(MMPS):
        """Nothing said."""

    with pytest.raises(AssertionError, match="not documented"):
        check_form(Undocumented(steps=2))


# --- the reference table of finite-step laws: mean error in posterior sd / variance ratio ----------------------------------

MODES = [(1.0, 1.0, 0.05), (1.0, 0.1, 0.05), (1.0, 0.0, 0.05), (0.04, 1.0, 0.05), (0.04, 1.0, 0.2)]
REFERENCE = {
    "mmps": ({"steps": 1000, "iterations": 1}, [(0, 0.86), (0, 0.98), (0, 0.99), (0, 0.85), (0, 0.95)]),
    "mmps-ode": (
        {"steps": 1000, "eta": 0.0, "iterations": 1},
        [(-0.01, 0.92), (-0.01, 0.99), (0, 1.0), (0, 0.92), (0, 0.98)],
    ),
    "pigdm": ({"steps": 1000}, [(0, 0.86), (0, 0.98), (0, 0.99), (-0.31, 1.01), (-0.17, 1.02)]),
    "dps": ({"steps": 1000, "norm": False}, [(0.06, 0.37), (0.49, 0.61), (0, 0.99), (0.29, 0.39), (0.23, 0.81)]),
    "diffpir": (
        {"steps": 20, "lam": 1.0, "zeta": 1.0, "grid": "uniform"},
        [(0, 0.09), (0.09, 0.33), (0, 0.41), (0.13, 0.06), (0.33, 0.15)],
    ),
    "dds": ({"steps": 1000}, [(0.06, 0.01), (-0.82, 1.35), (0, 0.76), (0.28, 0.01), (0.84, 0)]),
    "ddrm": ({"steps": 1000}, [(0.01, 0.29), (0.37, 0.08), (0, 0.76), (0.03, 0.29), (0.39, 0.16)]),
    "daps": (
        {"steps": 200, "inner": "draw", "ode_order": 2},
        [(0.03, 1.0), (0.24, 1.11), (0, 2.12), (0.16, 1.02), (0.36, 1.35)],
    ),
}
MATCHED_LATINO = [(0, 0.06), (0, 0.73), (0, 1), (0, 0.13), (0, 0.7)]  # eight published times, probability-flow decoder


@pytest.mark.parametrize("key", REFERENCE)
def test_finite_step_laws_agree_with_independent_calculation(key):
    # the table was computed with scalar recursions on DDPM's discrete schedule; ours are continuous, hence .04
    fields, expected = REFERENCE[key]
    sampler = fewstep.get(key.split("-")[0])(**fields)
    for mode, (mean, ratio) in zip(MODES, expected, strict=True):
        exact = scalar_problem(*mode)
        law, sd = finite_step_law(sampler, exact.problem), exact.posterior.cov[0, 0].sqrt()
        assert float((law.mean - exact.posterior.mean[0]) / sd) == pytest.approx(mean, abs=0.04), mode
        assert float(law.cov[0, 0] / sd**2) == pytest.approx(ratio, abs=0.04), mode


# --- limits ---------------------------------------------------------------------------------------------------------------


def with_matrix(matrix, y, sigma):
    return Posterior(gaussian_problem().problem.prior, GaussianLikelihood(y, MatrixOperator(matrix), sigma))


@pytest.mark.parametrize("name", ["mmps", "pigdm", "latino", "pnp_dm", "daps", "diffpir"])
def test_a_useless_measurement_gives_what_no_measurement_gives(name):
    preset = {"daps": {"inner": "draw"}}.get(name, {})
    sampler = fewstep.get(name)(**{**QUICK[name], **preset})
    matrix, y = torch.eye(5).double()[:3], torch.ones(1, 3).double()
    blind = with_matrix(matrix, y, 1e6)
    nothing = with_matrix(torch.zeros(3, 5).double(), y, 1.0)
    left, right = finite_step_law(sampler, blind), finite_step_law(sampler, nothing)
    if name in {"latino", "pnp_dm"}:  # they start at the pseudo-inverse, which their first level hides up to 1e-2
        assert torch.allclose(left.mean, right.mean, atol=0.2)
    else:
        assert torch.allclose(left.mean, right.mean, atol=1e-4)
    assert torch.allclose(left.cov, right.cov, atol=1e-4)


@pytest.mark.parametrize("name", ["ddrm", "ddnm"])
def test_spectral_rules_lose_variance_under_a_useless_measurement(name):
    # as published: where a singular value is not zero epsilon is dropped, however little the measurement says
    sampler = fewstep.get(name)(steps=20)
    matrix, y = torch.eye(5).double()[:3], torch.ones(1, 3).double()
    blind = finite_step_law(sampler, with_matrix(matrix, y, 1e6))
    nothing = finite_step_law(sampler, with_matrix(torch.zeros(3, 5).double(), y, 1.0))
    assert torch.allclose(blind.mean, nothing.mean, atol=0.02)
    assert float(blind.cov.trace()) < 0.9 * float(nothing.cov.trace())


@pytest.mark.parametrize("name", ["mmps", "pigdm", "latino", "pnp_dm", "daps", "diffpir", "ddrm", "ddnm", "dds"])
def test_a_noiseless_measurement_is_met(name):
    preset = {"daps": {"inner": "draw"}, "dds": {"gamma": 1e8}, "mmps": {"iterations": 6}}.get(name, {})
    sampler = fewstep.get(name)(**{**QUICK[name], **preset})
    if name in {"ddrm", "pigdm"}:  # y is met up to the last noise level, .03 here
        sampler = dataclasses.replace(sampler, steps=200)
    if name == "pnp_dm":  # its last step is the prior's: A x = y up to the last coupling
        sampler = dataclasses.replace(sampler, steps=150, rho_min=1e-4)
    matrix = torch.eye(5).double()[:3]
    y = torch.tensor([[0.3, -0.2, 0.5]]).double()
    x = sampler(with_matrix(matrix, y, 1e-5), 4).x[:, 0]
    assert float((x @ matrix.T - y).abs().max()) < (0.1 if name == "ddrm" else 2e-3)


# --- what a Gaussian cannot see ---------------------------------------------------------------------------------------------

MIXING = {
    "daps": {"inner": "exact", "steps": 20},
    "pnp_dm": {"steps": 1000, "rho_max": 2.0, "rho_min": 0.12, "decay": 0.997, "inner_steps": 12},
    "latino": {
        "ladder": "ratios",
        "bound": 0.0,
        "pairing": 2.0,
        "steps": 3000,
        "decoder_steps": 3,
        "ratio_min": 0.07,
        "stay": 1000,
    },
}


@pytest.mark.slow
@pytest.mark.parametrize("name", MIXING)
def test_consistent_samplers_reach_the_mode_weights_of_a_mixture(name):
    exact, n = bimodal_problem(), 4000
    x = fewstep.get(name)(**MIXING[name])(exact.problem, n, seed=2).x
    mass = float(exact.posterior.weights[0, 1])
    assert abs(float((x > 0).double().mean()) - mass) < 0.02
    assert abs(float(x.std()) / 0.769 - 1) < 0.03


def test_mmps_is_exact_on_gaussians_and_biased_on_mixtures():
    found = distance(finite_step_law(MMPS(steps=1000), gaussian_problem().problem), gaussian_problem().posterior)
    assert found.mean_error < 0.01 and found.low > 0.95 and found.high < 1.0
    x = MMPS(steps=100)(bimodal_problem().problem, 4000).x
    assert float((x > 0).double().mean()) == pytest.approx(0.491, abs=5 * 0.5 / 4000**0.5)  # exact: .418


# --- what is particular to one method ---------------------------------------------------------------------------------------


def test_dps_guidance_is_the_gradient_of_the_norm():
    problem = gaussian_problem(batch=2).problem
    sampler = fewstep.get("dps")(steps=10, zeta=0.7)
    x_t = torch.randn(2, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    t, s = sampler.interval(problem, 3)
    x0, pullback = problem.denoise_vjp(x_t, t)
    found = sampler.guidance(problem, x0, pullback, t, s)
    for i in range(2):
        for j in range(5):
            step = torch.zeros_like(x_t)
            step[i, j] = 1e-6

            def misfit(x, i=i):
                return (problem.likelihood.y - problem.likelihood.A(problem.prior(x, t)))[i].norm()

            slope = (misfit(x_t + step) - misfit(x_t - step)) / 2e-6
            assert float(found[i, j]) == pytest.approx(-0.7 * float(slope), abs=1e-6)


def test_the_last_step_of_dps_is_guided_too():
    problem, sampler = gaussian_problem().problem, fewstep.get("dps")(steps=3)
    x_t = torch.randn(1, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    t, s = sampler.interval(problem, 2)
    x0, pullback = problem.denoise_vjp(x_t, t)
    torch.testing.assert_close(
        sampler.step(problem, State(x_t), 2, None).x, x0 + sampler.guidance(problem, x0, pullback, t, s)
    )


def test_diffpir_takes_the_roots_of_its_weights():
    problem, sampler = scalar_problem(1.0, 1.0, 0.5).problem, fewstep.get("diffpir")(steps=3, lam=2.0, zeta=0.19)
    x_t, z = torch.tensor([[0.7]]).double(), torch.tensor([[-0.4]]).double()
    t, s = sampler.interval(problem, 1)
    (alpha_t, sigma_t), (alpha_s, sigma_s) = problem.schedule(t), problem.schedule(s)
    precision = 2 * (alpha_t / sigma_t) ** 2  # of the prediction, against 1 / .25 of y
    x0 = (precision * problem.denoise(x_t, t) + 4 * problem.likelihood.y) / (precision + 4)
    want = alpha_s * x0 + sigma_s * (0.9 * (x_t - alpha_t * x0) / sigma_t + 0.19**0.5 * z)
    torch.testing.assert_close(sampler.step(problem, State(x_t), 1, ScriptedNoise(z)).x, want)


def test_red_diff_gradient_and_fixed_point():
    # averaged over noise, the gradient is lambda s^2 / (a^2 v + s^2) (mu - m) / D - A'(y - A mu) / M  for cov = v I
    v, m = 0.49, 0.3
    prior = fewstep.GaussianPrior(torch.full((4,), m).double(), torch.tensor(v).double())
    matrix = torch.eye(4).double()[:2]
    y = torch.tensor([[1.0, -1.0]]).double()
    problem = Posterior(prior, GaussianLikelihood(y, MatrixOperator(matrix), 0.1)).expand(20_000)
    sampler = fewstep.get("red_diff")(steps=10)
    mu = torch.tensor([[0.5, -0.5, 0.2, 1.0]]).double()
    t = torch.tensor(0.4).double()
    alpha, sigma = prior.schedule(t)
    gradient = sampler.gradient(problem, mu.expand(20_000, 4), t, fewstep.Noise(range(20_000), torch.float64))
    pull = sampler.lam * sigma**2 / (alpha**2 * v + sigma**2) * (mu - m) / 4
    want = pull - (y - mu @ matrix.T) @ matrix / 2
    error = gradient.std(0) / 20_000**0.5
    assert bool(((gradient.mean(0) - want[0]).abs() < 5 * error + 1e-12).all())
    # the two terms balance where (y / M + lambda W m / D) / (1 / M + lambda W / D) in the measured directions
    weight = sampler.lam * sigma**2 / (alpha**2 * v + sigma**2) / 4
    fixed = (y / 2 + weight * m) / (0.5 + weight)
    at = torch.cat([fixed, torch.full((1, 2), m).double()], 1).expand(20_000, 4)
    gradient = sampler.gradient(problem, at, t, fewstep.Noise(range(20_000), torch.float64))
    assert bool((gradient.mean(0).abs() < 5 * gradient.std(0) / 20_000**0.5 + 1e-12).all())


def test_red_diff_fits_the_data_and_says_that_it_is_a_point_estimate():
    problem = gaussian_problem().problem
    x = fewstep.get("red_diff")(steps=400)(problem, 2).x[:, 0]
    fit = problem.likelihood.residual(x[:1]).norm() / problem.likelihood.y.norm()
    assert float(fit) < 0.15 and fewstep.get("red_diff").exact == "mode"


def test_latino_stationary_law_of_a_scalar_gaussian():
    # x' = prox(m + rho (x - m) + sqrt(1 - rho^2) s z) has variance k^2 (1 - rho^2) s^2 / (1 - k^2 rho^2)
    exact = scalar_problem(1.0, 1.0, 0.5)
    ratio = 0.4
    fields = {"ladder": "ratios", "bound": 0.0, "pairing": 2.0, "decoder_steps": 40, "ratio_min": ratio}
    sampler = fewstep.get("latino")(steps=200, stay=190, **fields)
    law = finite_step_law(sampler, exact.problem)
    rho = 1 / (1 + ratio**2) ** 0.5
    k = 1 / (1 + ratio**2 / 2 / 0.25)
    assert float(law.cov) == pytest.approx(k**2 * (1 - rho**2) / (1 - k**2 * rho**2), rel=2e-3)
    mean = (k * (1 - rho) * 0.3 + (1 - k) * 1.5) / (1 - k * rho)
    assert float(law.mean) == pytest.approx(mean, abs=2e-3)


def test_latino_walks_the_published_times_with_the_published_prox_step():
    table = Tabulated.linear()
    abar = torch.tensor(table.alphas_cumprod).double()[[999, 874, 749, 624, 499, 374, 249, 124]]
    prior = fewstep.GaussianPrior(torch.zeros(1).double(), torch.tensor(1.0).double(), table)
    sampler = fewstep.get("latino").preset("paper")
    ratios = sampler.ratios(Posterior(prior, FlatLikelihood((1,), dtype=torch.float64)))
    torch.testing.assert_close(ratios, ((1 - abar) / abar).sqrt())
    torch.testing.assert_close(sampler.prox_step(ratios).square(), 1 - abar)
    assert sampler.nfe == 8


@dataclasses.dataclass(frozen=True)
class MatchedLATINO(LATINO):
    """The prox step under which the mean is exact for a prior of variance v. variance: v."""

    variance: float = 1.0

    def prox_step(self, ratio):
        shrink = (1 + ratio**2 / self.variance) ** -0.5  # of the decoder
        return (self.variance * (1 - shrink)).sqrt()


def test_latino_on_the_published_times_agrees_with_independent_calculation():
    for mode, (mean, ratio) in zip(MODES, MATCHED_LATINO, strict=True):
        exact = scalar_problem(*mode)
        law = finite_step_law(MatchedLATINO(decoder_steps=20, variance=mode[0]), exact.problem)
        sd = exact.posterior.cov[0, 0].sqrt()
        assert float((law.mean - exact.posterior.mean[0]) / sd) == pytest.approx(mean, abs=0.01), mode
        assert float(law.cov[0, 0] / sd**2) == pytest.approx(ratio, abs=0.02), mode


@pytest.mark.parametrize("order", [1, 2])
def test_the_probability_flow_has_its_order_and_its_calls(order):
    # z -> m + (z - m) sqrt(v / (v + r^2)) for a Gaussian prior; the last step starts where its own error is negligible
    problem, start = scalar_problem(0.5).problem, torch.tensor(2.0).double()
    want = 0.3 + (1.7 - 0.3) * (0.5 / (0.5 + 4)) ** 0.5
    errors = []
    for steps in (32, 64):
        counted = problem.expand(1)
        z = probability_flow(counted, torch.tensor([[1.7]]).double(), spaced(start, start * 1e-5, steps), order)
        assert counted.counts.network == flow_calls(steps, order)
        errors.append(abs(float(z) - want))
    assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.15)


def test_daps_as_published_takes_five_euler_steps_and_shrinks_its_inner_step():
    sampler = fewstep.get("daps").preset("paper")
    assert sampler.nfe == 200 * 5
    quick = fewstep.get("daps")(steps=4, langevin_steps=1, ratio_max=1.0)
    problem, z = scalar_problem(1.0, 1.0, 0.5).problem.expand(2), torch.full((2, 1), 0.4).double()
    for k in range(3):
        x0 = quick.step(problem, State(z), k, ScriptedNoise(torch.tensor([[0.0, 0.0], [1.0, 0.0]]).double())).x
        assert float((x0[1] - x0[0]) ** 2) == pytest.approx(2 * 1e-4 * (1 - 0.99 * k / 4))


@pytest.mark.parametrize(("tau", "level"), [(0.2, 0.2), (0.0, 0.5)])
def test_the_inner_chain_of_daps_climbs_as_if_y_had_the_noise_tau(tau, level):
    problem, z = scalar_problem(1.0, 1.0, 0.5).problem, torch.full((1, 1), 0.4).double()
    sampler = fewstep.get("daps")(steps=4, langevin_steps=1, ratio_max=1.0, tau=tau)
    x0 = sampler.decode(problem, z, 0)
    found = sampler.step(problem, State(z), 0, ScriptedNoise(torch.zeros(1, 0).double())).x
    torch.testing.assert_close(found, x0 + 1e-4 * (problem.likelihood.y - x0) / level**2)


def test_daps_langevin_chain_reaches_the_exact_inner_draw():
    exact = scalar_problem(1.0, 1.0, 0.5)
    fields = {"steps": 8, "ratio_max": 1.0, "ratio_min": 0.2, "tau": 0.0}
    chain = fewstep.get("daps")(inner="langevin", langevin_steps=1000, lr=0.004, **fields)
    draw = fewstep.get("daps")(inner="draw", **fields)
    left, right = finite_step_law(chain, exact.problem), finite_step_law(draw, exact.problem)
    assert float(left.cov) == pytest.approx(float(right.cov), rel=0.02)
    assert float(left.mean) == pytest.approx(float(right.mean), abs=0.02)


def test_dds_with_enough_iterations_is_the_prox():
    problem = gaussian_problem().problem
    sampler = fewstep.get("dds")(iterations=10, gamma=2.0)
    x = torch.randn(1, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    matrix = problem.likelihood.physics.matrix
    want = torch.linalg.solve(
        torch.eye(5).double() + 2 * matrix.T @ matrix, x[0] + 2 * matrix.T @ problem.likelihood.y[0]
    )
    assert torch.allclose(sampler.pull(problem, x)[0], want, atol=1e-9)


def by_singular_values():
    """Return singular values, sigma_y, their problem, and x0, A^+ y - x0, epsilon and z, (1, 5) each."""
    q, sigma_y = torch.tensor([2.0, 1.0, 0.3, 0.05, 0.0]).double(), 0.3
    y, x0, epsilon, z = torch.randn(4, 1, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return q, sigma_y, with_matrix(torch.diag(q), y, sigma_y), x0, torch.where(q > 0, y / q - x0, 0), epsilon, z


def test_ddnm_acts_on_each_singular_value_as_its_docstring_says():
    q, sigma_y, problem, x0, gap, epsilon, z = by_singular_values()
    sampler, s = fewstep.get("ddnm")(steps=4, eta=0.6), problem.schedule.time(torch.tensor(0.35).double())
    alpha, sigma = problem.schedule(s)
    own = alpha * sigma_y / q
    cleaner = sigma >= own
    weight = torch.where(cleaner, 1, 0.8 * sigma / own)
    torch.testing.assert_close(sampler.correction(problem, x0, s), weight * gap)
    fresh = torch.where(cleaner, (sigma**2 - own**2).sqrt(), 0.6 * sigma)
    found = sampler.renoise(problem, epsilon, s, ScriptedNoise(z))
    torch.testing.assert_close(found, fresh * z + torch.where(q > 0, 0, 0.8 * sigma) * epsilon)
    for ratio, met in ((0.31, [1, 1, 0, 0, 0]), (0.29, [1, 0, 0, 0, 0])):  # the last step, where y is the cleaner
        t = problem.schedule.time(torch.tensor(ratio).double())
        torch.testing.assert_close(sampler.projection(problem, x0, t), torch.tensor([met]) * gap)


def test_ddrm_acts_on_each_singular_value_as_its_docstring_says():
    q, sigma_y, problem, x0, gap, epsilon, z = by_singular_values()
    sampler, ratio = fewstep.get("ddrm")(steps=4, eta=0.6, eta_b=0.5), torch.tensor(0.35).double()
    cleaner = ratio >= sigma_y / q
    weight = torch.where(cleaner, 0.5, 0.8 * ratio * q / sigma_y)
    fresh = torch.where(cleaner, (ratio**2 - (0.5 * sigma_y / q) ** 2).sqrt(), 0.6 * ratio)
    found = sampler.rules(problem, epsilon, q**2 * gap, ratio, z)
    torch.testing.assert_close(found, weight * gap + fresh * z + torch.where(q > 0, 0, 0.8 * ratio) * epsilon)
    alpha, sigma = problem.schedule(torch.ones(()).double())
    fresh = ((sigma / alpha) ** 2 - torch.where(q > 0, sigma_y / q, 0) ** 2).sqrt()
    start = sampler.init(problem, ScriptedNoise(z)).x / alpha
    torch.testing.assert_close(start, torch.where(q > 0, gap + x0, 0) + fresh * z, rtol=1e-9, atol=0)


def test_red_diff_follows_adam(monkeypatch):
    problem, sampler = gaussian_problem().problem, fewstep.get("red_diff")(steps=5, lr=0.03)
    gradients = torch.randn(5, 1, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    given = iter(gradients)
    monkeypatch.setattr(type(sampler), "gradient", lambda *args: next(given))
    state = sampler.init(problem, None)
    x = torch.nn.Parameter(state.x.clone())
    adam = torch.optim.Adam([x], lr=0.03, betas=(0.9, 0.99))
    for k, x.grad in enumerate(gradients):
        state = sampler.step(problem, state, k, None)
        adam.step()
    torch.testing.assert_close(state.x, x.data)


def test_pigdm_predicts_the_posterior_mean_where_the_prior_has_its_spread():
    made, t = gaussian_problem().problem, torch.tensor(0.3).double()
    prior = fewstep.GaussianPrior(made.prior.mean, 0.25 * torch.eye(5).double(), made.schedule)
    x_t = torch.randn(1, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = fewstep.get("pigdm")(spread=0.5).predict_x0(Posterior(prior, made.likelihood), x_t, t, None)
    want = prior.posterior(JointLikelihood(made.likelihood, x_t, *made.schedule(t))).mean
    torch.testing.assert_close(found, want)


def test_adaptive_guidance_of_pigdm_is_alpha_times_the_exact():
    problem, t = gaussian_problem().problem, torch.tensor(0.6).double()
    x_t = torch.randn(1, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    exact, adaptive = (
        fewstep.get("pigdm")(adaptive=choice).predict_x0(problem, x_t, t, None) - problem.denoise(x_t, t)
        for choice in (False, True)
    )
    torch.testing.assert_close(adaptive, problem.schedule(t)[0] * exact)


def test_pnp_dm_couples_ever_more_closely():
    seen = []

    class Recording(FlatLikelihood):
        def draw(self, z, rho, noise):
            seen.append(float(rho))
            return z

    problem = Posterior(scalar_problem().problem.prior, Recording((1,), dtype=torch.float64))
    sampler = fewstep.get("pnp_dm")(steps=4, rho_max=2.0, decay=0.5, rho_min=0.3, inner_steps=1)
    for k in range(4):
        sampler.step(problem, State(torch.zeros(1, 1).double()), k, fewstep.Noise([0], torch.float64))
    assert seen == pytest.approx([2.0, 1.0, 0.5, 0.3])


@pytest.mark.parametrize(
    ("name", "fields", "power"),
    [("latino", {"ladder": "ratios", "power": 3.0}, 3), *(("daps", {"ratio_max": r}, 7) for r in (5.0, math.inf))],
)
def test_ratios_fall_evenly_in_their_power(name, fields, power):
    problem = gaussian_problem().problem
    ratios = fewstep.get(name)(steps=6, ratio_min=0.2, **fields).ratios(problem)
    first = min(fields.get("ratio_max", math.inf), float(problem.schedule.ratio(torch.ones(()).double())))
    even = torch.linspace(first ** (1 / power), 0.2 ** (1 / power), 6, dtype=torch.float64)
    torch.testing.assert_close(ratios, even**power)


def test_cm4ir_takes_the_steps_of_its_docstring():
    exact = scalar_problem(0.5, 0.6, 0.4)
    like, z = exact.problem.likelihood, torch.tensor([[0.3, -1.0, 0.5]]).double()
    fields = {"start": 0.3, "gamma": 0.5, "eta": 0.6, "delta": 0.2, "mu": 0.7, "zeta": 2.0}
    found, used = run_scripted(fewstep.get("cm4ir")(steps=3, **fields), exact.problem, z)
    y, gain, mean = float(like.y), float(like.physics.matrix), float(exact.problem.prior.mean)
    ratios = [(1 / (0.3 * 1.5**k) - 1) ** 0.5 for k in range(3)]
    x = y / gain + ratios[0] * float(z[0, 0])
    for k, ratio in enumerate(ratios):
        decoded = mean + 0.5 / (0.5 + (1.2 * ratio) ** 2) * (x - mean)
        if k < 2:
            x0 = decoded - 0.7 * gain / (gain**2 + 2 * 0.4**2) * (gain * decoded - y)
            x = x0 + ratios[k + 1] * (0.8 * (x - decoded) / ratio + 0.6 * float(z[0, k + 1]))
    assert float(found) == pytest.approx(decoded, rel=1e-9) and used == 3


def test_cm4ir_back_projection_against_dense_algebra():
    problem = gaussian_problem().problem
    matrix, y = problem.likelihood.physics.matrix, problem.likelihood.y
    x = torch.randn(1, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    sampler = fewstep.get("cm4ir")(zeta=3.0)
    system = matrix @ matrix.T + 3.0 * 0.04 * torch.eye(3).double()
    want = matrix.T @ torch.linalg.solve(system, (y - x @ matrix.T)[0])
    assert torch.allclose(sampler.back_projection(problem, x)[0], want, atol=1e-9)


# --- the loop -----------------------------------------------------------------------------------------------------------------


def test_costs_are_counted_separately():
    problem = gaussian_problem().problem
    counts = MMPS(steps=4, iterations=2)(problem).counts
    assert counts.network == 4 and counts.vjp == 4 * (2 + 1) and counts.operator > 4
    assert problem.counts.network == 0, "the caller's problem was counted on"
    assert fewstep.get("diffpir")(steps=4)(problem).counts.vjp == 0


def test_callback_reports_every_step_of_every_chunk():
    seen = []
    MMPS(steps=3)(gaussian_problem().problem, 4, chunk=2, callback=lambda k, n, state: seen.append((k, n)))
    assert seen == [(k, 6) for k in range(1, 7)] and isinstance(State(torch.zeros(1)).memory, type(None))


def test_costs_of_chunks_are_averaged_and_nested_likelihoods_are_counted():
    problem = gaussian_problem().problem
    sampler = fewstep.get("dpmpp_adaptive", "solvers")()
    parts = list(
        sampler.stream(
            flat := dataclasses.replace(problem, likelihood=FlatLikelihood((5,), 1, torch.float64)), 3, chunk=1
        )
    )
    calls = [p.counts.network for p in parts]
    assert len(set(calls)) > 1 and sampler(flat, 3, chunk=1).counts.network == pytest.approx(sum(calls) / 3)
    joint = JointLikelihood(problem.likelihood, torch.zeros(1, 5).double(), torch.tensor(0.6), torch.tensor(0.8))
    diffpir = fewstep.get("diffpir")(steps=4)
    assert (
        diffpir(dataclasses.replace(problem, likelihood=joint)).counts.operator == diffpir(problem).counts.operator > 0
    )
    assert isinstance(diffpir(problem).counts.network, int)


def test_conditions_of_each_measurement_go_with_its_samples():
    class Labelled(fewstep.GaussianPrior):
        def forward(self, x_t, t, shift=None):
            return super().forward(x_t, t) + shift[:, None]

    made = gaussian_problem(batch=2).problem
    prior = Labelled(made.prior.mean, made.prior.cov, made.schedule)
    shift = torch.tensor([0.0, 3.0]).double()
    both = MMPS(steps=3)(Posterior(prior, made.likelihood, {"shift": shift}), 3, seed=1).x
    for label, same in ((0, True), (1, False)):
        one = MMPS(steps=3)(Posterior(prior, made.likelihood, {"shift": shift[[label, label]]}), 3, seed=1).x
        assert torch.equal(one[:, 0], both[:, 0]) is same and torch.equal(one[:, 1], both[:, 1]) is not same


def test_guidance_by_a_solver_with_times_of_its_own_for_each_item():
    check_independence(Driven(fewstep.get("pigdm")(), fewstep.get("dpmpp_adaptive", "solvers")()), tol=1e-7)


@pytest.mark.parametrize("gain", [3e-4, 0.0])
def test_ddnm_keeps_the_variance_where_singular_values_are_next_to_nothing(gain):
    matrix, sampler = torch.diag(torch.tensor([1.0, gain])), fewstep.get("ddnm")(steps=20, eta=0.0)
    prior = fewstep.GaussianPrior(torch.zeros(2), torch.eye(2))
    problem = Posterior(prior, GaussianLikelihood(torch.zeros(1, 2), MatrixOperator(matrix), 0.002))
    unseen = sampler(problem, 4000, seed=0).x[:, 0, 1]
    assert 0.8 < float(unseen.std()) < 1.05


def test_stream_gives_what_the_call_gives_chunk_by_chunk():
    problem = gaussian_problem(batch=2).problem
    parts = list(MMPS(steps=3).stream(problem, 5, seed=1, chunk=4))
    assert [p.num_samples for p in parts] == [2, 2, 1] and [p.first for p in parts] == [0, 2, 4]
    assert torch.allclose(torch.cat([p.x for p in parts]), MMPS(steps=3)(problem, 5, seed=1).x, atol=1e-12)


@pytest.mark.parametrize(
    ("sampler", "fields", "match"),
    [
        (MMPS(steps=0), {}, "at least one step"),
        (MMPS(steps=2, grid="nonsense"), {}, "grid must be one of"),
        (MMPS(steps=2.0), {}, "MMPS needs at least one step, and whole ones, got 2.0"),
        (MMPS(steps="2"), {}, "MMPS needs at least one step, and whole ones, got '2'"),
        (MMPS(steps=2), {"num_samples": 0}, "at least 1"),
        *((MMPS(steps=2), {"num_samples": k}, f"num_samples must be a whole number .*got {k!r}") for k in ("2", 2.5)),
        (MMPS(steps=2), {"chunk": "2"}, "chunk must be a whole number"),
        (MMPS(steps=2), {"chunk": 0}, "at least 1"),
        (MMPS(steps=2), {"seed": [1, 2]}, "2 seeds for 1"),
    ],
)
def test_bad_arguments_are_refused(sampler, fields, match):
    with pytest.raises(ValueError, match=match):
        sampler(gaussian_problem().problem, **fields)


def test_a_method_that_does_not_fit_names_those_that_do():
    flat = Posterior(gaussian_problem().problem.prior, FlatLikelihood((5,), dtype=torch.float64))
    with pytest.raises(ValueError, match=r"MMPS needs gaussian.*methods that fit:.*pnp_dm"):
        MMPS(steps=2)(flat)


def test_a_measurement_of_other_items_is_refused():
    prior = gaussian_problem().problem.prior
    for shape in ((6,), (1, 5)):
        with pytest.raises(ValueError, match=r"prior is of items of shape \(5,\), the measurement of items of shape"):
            fewstep.get("latino")(steps=2)(Posterior(prior, FlatLikelihood(shape, dtype=torch.float64)))


def test_divergence_is_an_error():
    with pytest.raises(FloatingPointError, match="diverged"):
        fewstep.get("dps")(steps=50, norm=False, zeta=1e30)(gaussian_problem().problem)


def test_registry_suggests_and_refuses():
    with pytest.raises(ValueError, match="did you mean diffpir"):
        fewstep.get("difpir")
    with pytest.raises(ValueError, match="unknown solver 'nope'"):
        fewstep.get("nope", "solvers")
    with pytest.raises(ValueError, match="unknown kind"):
        fewstep.available("nonsense")
    assert fewstep.get("pnp-dm") is fewstep.get("pnp_dm")
    with pytest.raises(ValueError, match="no preset"):
        MMPS.preset("nonsense")


@pytest.mark.parametrize("name", fewstep.available())
def test_references_make_bibtex(name):
    text = fewstep.get(name).reference.bibtex()
    assert text.startswith("@inproceedings{") and text.count("{") == text.count("}")
