"""Solvers that are no table: parallel in time, averaged in frequency, with rejection; and what a denoiser's Jacobian says."""

import itertools
import math

import pytest
import torch

from fewstep.bench import rejection, srds
from fewstep.core.counts import Counts
from fewstep.core.denoiser import Denoiser
from fewstep.core.driven import Driven
from fewstep.core.grid import times_of
from fewstep.core.likelihood import FlatLikelihood
from fewstep.core.multistep import prior_mean
from fewstep.core.noise import Noise
from fewstep.core.problem import Posterior
from fewstep.core.registry import get
from fewstep.core.sampler import State
from fewstep.core.schedule import VariancePreserving
from fewstep.methods.mmps import MMPS
from fewstep.methods.pigdm import PiGDM
from fewstep.priors.diagnostics import asymmetry, jacobian, local_dimension, sampling_defect
from fewstep.priors.exact import GaussianPrior, integrate_flow
from fewstep.solvers._rejection import _noised
from fewstep.solvers.ddim import DDIM
from fewstep.solvers.diffrs import Bounds, DiffRS, bounds_of
from fewstep.solvers.dpmpp_adaptive import AdaptiveDPMSolverPP
from fewstep.solvers.masf import MASF, haar, unhaar
from fewstep.solvers.srds import SRDS
from fewstep.testing.law import ScriptedNoise
from fewstep.testing.problems import gaussian_problem, mixture_problem
from fewstep.testing.propagate import finite_step_law

F64 = torch.float64


def flat(prior, batch=1, dtype=F64):
    return Posterior(prior, FlatLikelihood(prior.event_shape, batch, dtype))


@pytest.fixture(scope="module")
def mixture():
    return flat(mixture_problem().problem.prior)


# --- SRDS ---------------------------------------------------------------------------------------------------------------------


def iterates(sampler, problem, count=16):
    """Return the state after each iteration."""
    states = []
    samples = sampler(problem, count, callback=lambda done, total, state: states.append(state))
    return samples, states


@pytest.mark.parametrize("grid", ["uniform", "log_snr"])
@pytest.mark.parametrize(("blocks", "fine"), [(8, 8), (5, 3), (1, 6)])
def test_srds_is_ddim_block_by_block(mixture, grid, blocks, fine):
    """After p iterations the first p blocks are DDIM's, and not before; after all of them the sample is."""
    path = []
    DDIM(blocks * fine, grid=grid)(mixture, 16, callback=lambda k, total, state: path.append(state.x))
    samples, states = iterates(SRDS(blocks, fine, 0.0, grid), mixture)
    for p, state in enumerate(states, 1):
        ends = zip(state.memory.points[1:], path[fine - 1 :: fine], strict=True)
        errors = [float((ours - theirs).abs().max()) for ours, theirs in ends]
        assert max(errors[:p]) < 1e-12
        assert p == blocks or p > 4 or max(errors[p:]) > 1e-9  # after five the rest has nearly arrived too
    assert samples.nfe == SRDS(blocks, fine).nfe


def test_srds_without_its_correction_is_not_ddim(mixture):
    """Planted: the sweep forgets what the coarse step said before."""

    class Forgetful(SRDS):
        def advance(self, problem, state, k, noise, predict):
            state = super().advance(problem, state, k, noise, predict)
            zeros = tuple(0 * guess for guess in state.memory.guesses)
            return State(state.x, state.memory._replace(guesses=zeros))

    out = Forgetful(4, 4, 0.0)(mixture, 8).x
    truth = DDIM(16)(mixture, 8).x
    assert float((SRDS(4, 4, 0.0)(mixture, 8).x - truth).abs().max()) < 1e-12
    # the last block is exact after the last iteration whatever the sweep did, if its start was: the one before shows it
    _, states = iterates(Forgetful(4, 4, 0.0), mixture, 8)
    assert float((states[1].x - truth).abs().max()) > 0.05 and out.shape == truth.shape


def test_srds_stops_item_by_item(mixture):
    """The nearer samples stop earlier, within the tolerance of the truth, and the others do not change when they stop."""
    whole, truth = SRDS(8, 8, 1e-4), DDIM(64)(mixture, 12).x
    samples, states = iterates(whole, mixture, 12)
    moving = torch.stack([state.memory.moving for state in states])
    assert 0 < int(moving.any(1).sum()) < 8 and len(set(moving.sum(0).tolist())) > 1
    change = torch.stack([state.x for state in states]).diff(dim=0).abs().flatten(2).mean(2)
    assert torch.equal(moving[1:], moving[:-1] & (change >= 1e-4))
    assert float((samples.x - truth).abs().flatten(2).mean(-1).max()) < 1e-4
    assert samples.nfe < whole.nfe
    assert torch.allclose(whole(mixture, 12, chunk=1).x, samples.x, atol=1e-13)


def test_srds_counts_batched_blocks():
    calls = []

    class Counting(GaussianPrior):
        def forward(self, x_t, t):
            calls.append(len(x_t))
            return super().forward(x_t, t)

    problem = flat(Counting(torch.zeros(3, dtype=F64), torch.tensor(0.5, dtype=F64)))
    samples = SRDS(4, 3, 0.0)(problem, 5)
    assert len(calls) == SRDS(4, 3).depth(4) == 4 + 4 * 3 + 3 + 2 + 1
    assert samples.nfe == SRDS(4, 3).nfe == sum(calls) / 5


@pytest.mark.parametrize("guided", [MMPS(iterations=5), PiGDM()], ids=str)
def test_srds_drives_guided_samplers(guided):
    problem = gaussian_problem(batch=3).problem
    left = Driven(guided, SRDS(4, 4, 0.0))(problem, 2)
    right = Driven(guided, DDIM(16))(problem, 2)
    assert torch.allclose(left.x, right.x, atol=1e-10)
    assert left.nfe == Driven(guided, SRDS(4, 4)).nfe and left.counts.vjp > right.counts.vjp


def test_srds_refuses():
    for settings, said in (
        ({"fine": 0}, "fine must be"),
        ({"tolerance": -1.0}, "must not be negative"),
        ({"tolerance": math.nan}, "must not be negative"),
    ):
        with pytest.raises(ValueError, match=said):
            SRDS(**settings)


def test_pipelined_depth_is_that_of_a_simulation():
    """With all iterations nothing is gained over DDIM; with one, a block's fine steps and a sweep over the rest."""
    assert srds.Iterations(8, 8, 8).pipelined() == 64
    assert srds.Iterations(8, 8, 1).pipelined() == 7 + 8  # the last block starts at 7 and takes 8 steps
    assert srds.Iterations(4, 2, 0).pipelined() == 4
    assert srds.Iterations(4, 3, 2).seconds(lambda n: 1.0, 1) == SRDS(4, 3).depth(2)


# --- MASF ---------------------------------------------------------------------------------------------------------------------


def test_haar_is_orthonormal():
    x = Noise([1, 2], F64).randn(3, 8, 6)
    bands = haar(x)
    assert [band.shape for band in bands] == [(2, 3, 4, 3)] * 4
    assert torch.allclose(unhaar(bands), x, atol=1e-15)
    assert math.isclose(sum(float(band.square().sum()) for band in bands), float(x.square().sum()), rel_tol=1e-13)
    ones = haar(torch.ones(1, 2, 2, dtype=F64))
    assert [float(band) for band in ones] == pytest.approx([2, 0, 0, 0])
    stripes = haar(torch.tensor([[1.0, -1.0], [1.0, -1.0]], dtype=F64))
    assert [float(band) for band in stripes] == pytest.approx([0, 2, 0, 0])  # detail along the last axis
    with pytest.raises(ValueError, match="even sides"):
        haar(torch.ones(3, 5, 4))


ONES = {"low": (1.0, 1.0), "mixed": (1.0, 1.0), "high": (1.0, 1.0)}


def test_masf_with_whole_weights_is_ddim(mixture):
    images = flat(GaussianPrior(torch.zeros(1, 4, 4, dtype=F64), torch.tensor(0.5, dtype=F64)))
    for problem in (mixture, images):
        assert torch.equal(MASF(9, **ONES)(problem, 3).x, DDIM(9)(problem, 3).x)
        assert not torch.allclose(MASF(9)(problem, 3).x, DDIM(9)(problem, 3).x)


def test_masf_keeps_a_constant_and_weighs_the_bands():
    solver = MASF(low=(0.5, 0.9), mixed=(0.2, 0.2), high=(1.0, 1.0))
    x, before = Noise([1, 2], F64).randn(2, 1, 4, 4)
    t = torch.tensor(0.25, dtype=F64)
    assert torch.allclose(solver.average(x, x, t), x)
    found, new, old = (haar(value) for value in (solver.average(x, before, t), x, before))
    for gamma, ours, a, b in zip((0.8, 0.2, 0.2, 1.0), found, new, old, strict=True):
        assert torch.allclose(ours, gamma * a + (1 - gamma) * b, atol=1e-14)


def test_masf_variance_per_band_is_the_product_of_gains():
    """On N(0, diag in the Haar basis) every band is a scalar recursion: x and the average, step by step."""
    variances = torch.tensor([0.9, 0.5, 0.3, 0.1], dtype=F64)
    eye = torch.eye(4, dtype=F64).reshape(4, 1, 2, 2)
    basis = torch.stack([band.flatten() for band in haar(eye)])  # rows: bands
    cov = basis.T @ torch.diag(variances) @ basis
    problem = flat(GaussianPrior(torch.zeros(1, 2, 2, dtype=F64), cov))
    solver = MASF(6, low=(0.7, 0.9), mixed=(0.8, 0.6), high=(0.5, 1.0))
    law = finite_step_law(solver, problem)
    found = (basis @ law.cov @ basis.T).diagonal()
    gammas = [solver.low, solver.mixed, solver.mixed, solver.high]
    expected = [gain(problem.schedule, solver, v, g) ** 2 for v, g in zip(variances, gammas, strict=True)]
    assert torch.allclose(found, torch.stack(expected), rtol=1e-9)
    wrong = [gain(problem.schedule, solver, v, g[::-1]) ** 2 for v, g in zip(variances, gammas, strict=True)]
    assert not torch.allclose(found, torch.stack(wrong), rtol=1e-3)


def gain(schedule, solver, variance, gamma):
    """Return what one unit of noise in a band of N(0, variance) becomes."""
    times = times_of(solver.grid, schedule, solver.steps)
    x, average = schedule(times[0])[1], None
    for t, s in itertools.pairwise(times):
        (alpha, sigma), (alpha_s, sigma_s) = schedule(t), schedule(s)
        seen = alpha * variance / (alpha**2 * variance + sigma**2) * x
        share = gamma[0] * t + gamma[1] * (1 - t)
        average = seen if average is None else share * seen + (1 - share) * average
        x = average if s == 0 else alpha_s * average + sigma_s / sigma * (x - alpha * average)
    return x


def test_masf_converges_at_order_one(mixture):
    """The lag costs no order, and on an exact denoiser it gains nothing."""
    state = MASF(4, grid="log_snr").init(mixture.expand(40), Noise(range(40), F64))
    ends = [torch.tensor(t, dtype=F64) for t in (1.0, 0.0)]
    truth, errors = mixture.prior.flow(state.x, *ends), []
    for solver in (MASF(40, grid="log_snr"), MASF(160, grid="log_snr"), DDIM(160, grid="log_snr")):
        out, items = state, mixture.expand(40)
        for k in range(solver.steps):
            out = solver.step(items, out, k, Noise(range(40), F64))
        errors.append(float((out.x - truth).square().mean().sqrt()))
    assert errors[1] < 0.5 * errors[0] and errors[2] < errors[1]


def test_masf_refuses():
    with pytest.raises(ValueError, match="weights"):
        MASF(low=(0.0, 1.0))
    with pytest.raises(ValueError, match="low must be two weights"):
        MASF(low=(1.0,))
    with pytest.raises(ValueError, match="even sides"):
        MASF(2)(flat(GaussianPrior(torch.zeros(1, 3, 4), torch.tensor(0.5)), dtype=torch.float32))


# --- DiffRS -------------------------------------------------------------------------------------------------------------------


def test_without_a_ratio_it_is_ancestral(mixture):
    assert torch.equal(DiffRS(9)(mixture, 4).x, DDIM(9, eta=1.0, grid="edm")(mixture, 4).x)


STEPS, COUNT = 10, 2000


def mass(rule, bounds, predict=rejection.exact_draw, patience=200, count=COUNT):
    solver = rejection.rejecting(DiffRS(STEPS, patience=patience, grid="log_snr"), rule, bounds)
    return rejection.mode_mass(solver, predict, count), solver


def test_the_model_itself_has_the_wrong_weight():
    found = rejection.mode_mass(DiffRS(STEPS, grid="log_snr"), rejection.exact_draw, COUNT)
    assert abs(found["left"] - rejection.MODEL) < 4 * found["left ±"]


@pytest.mark.parametrize("rule", ["fresh", "restart"])
def test_unbiased_rejection_has_the_right_weight(rule):
    """The weight of the data, and the cost that theory says: the bound of the ratio, 7/4, per tested draw or run."""
    found, _ = mass(rule, rejection.true_bounds(STEPS))
    assert abs(found["left"] - rejection.DATA) < 4 * found["left ±"]
    expected = {"fresh": (STEPS - 1) * 1.75 + 1, "restart": (STEPS - 1) * 1.75 + 1}[rule]
    assert found["proposals"] == pytest.approx(expected, rel=0.05)
    assert found["nfe"] == pytest.approx(found["proposals"])


@pytest.mark.parametrize(("share", "low", "high"), [(0.5, 0.43, 0.52), (0.75, 0.37, 0.45), (0.9, 0.31, 0.40)])
def test_the_published_rule_is_biased(share, low, high):
    """The more is let through the more of the model's weight is left; at the paper's quantile more than a third of it."""
    plain = DiffRS(STEPS, grid="log_snr")
    warm = Noise(range(10**6, 10**6 + 1000), F64)
    bounds = bounds_of(plain, rejection.model_problem(1000), rejection.log_ratio, warm, share)
    found, solver = mass("backstep", bounds, patience=3)
    assert low < found["left"] < high and found["left"] - rejection.DATA > 3 * found["left ±"]
    assert found["nfe"] < 3 * STEPS == solver.nfe


def test_a_bound_that_does_not_hold_biases():
    found, _ = mass("fresh", Bounds((0.0,) * (STEPS + 1), (0.0,) * (STEPS + 1)))
    assert found["left"] > rejection.DATA + 4 * found["left ±"]


@pytest.mark.parametrize(("rule", "asked"), [("fresh", [1, 2, 3, 4, 5]), ("restart", [5])])
def test_a_step_is_tested_by_the_bound_of_where_it_leads(rule, asked):
    true = rejection.true_bounds(6)
    other = tuple(bound if k in asked else 50.0 for k, bound in enumerate(true.value))
    left, right = (
        rejection.rejecting(DiffRS(6, grid="log_snr"), rule, bounds)(rejection.model_problem(), 8).x
        for bounds in (true, Bounds(other, true.growth))
    )
    assert torch.equal(left, right)


def test_what_a_step_back_adds_keeps_the_marginal():
    schedule, (s, t) = VariancePreserving(), torch.tensor([0.3, 0.4], dtype=F64)
    (alpha_s, sigma_s), (alpha_t, sigma_t) = schedule(s), schedule(t)
    std = _noised(schedule, torch.zeros(1, 1, dtype=F64), s, t, ScriptedNoise(torch.ones(1, 1, dtype=F64)))[0, 0]
    torch.testing.assert_close((alpha_t / alpha_s * sigma_s) ** 2 + std**2, sigma_t**2)


def test_redraws_cost_no_network_calls():
    """With the mean for a prediction and many steps: the data's weight nearly, at the calls of the plain sampler."""
    solver = DiffRS(60, patience=200, grid="log_snr")
    found = rejection.mode_mass(rejection.rejecting(solver, "redraw", rejection.true_bounds(60)), prior_mean, 600)
    assert found["nfe"] == pytest.approx(60) and found["proposals"] == pytest.approx(59 * 1.75 + 1, rel=0.1)
    plain = rejection.mode_mass(solver, prior_mean, 600)
    assert abs(found["left"] - rejection.DATA) < 0.5 * abs(plain["left"] - rejection.DATA)


@pytest.mark.parametrize("rule", ["redraw", "fresh", "restart", "backstep"])
def test_rejected_items_do_not_depend_on_each_other(rule):
    bounds = rejection.true_bounds(6)
    solver = rejection.rejecting(DiffRS(6, patience=5, grid="log_snr"), rule, bounds)
    problem = rejection.model_problem()
    together = solver(problem, 12, seed=3)
    assert torch.equal(together.x, solver(problem, 12, seed=3).x)
    assert torch.allclose(together.x, solver(problem, 12, seed=3, chunk=1).x, atol=1e-12)
    assert torch.allclose(together.x[:5], solver(problem, 5, seed=3).x, atol=1e-12)
    assert not torch.allclose(together.x, solver(problem, 12, seed=4).x)
    assert together.nfe <= solver.nfe + 1e-9 and (solver.nfe_varies or together.nfe == pytest.approx(solver.nfe))


class Labelled(Denoiser):
    """The model of `rejection`, each item moved by a label of its own."""

    def __init__(self):
        super().__init__()
        self.prior = rejection.model_problem().prior
        self.schedule, self.event_shape = self.prior.schedule, self.prior.event_shape

    def forward(self, x_t, t, label, scale):
        assert len(x_t) == len(label)
        return self.prior(x_t, t) + scale * label[:, None]


@pytest.mark.parametrize("rule", ["redraw", "fresh", "restart", "backstep"])
def test_rejected_items_keep_their_own_conditions(rule):
    solver = rejection.rejecting(DiffRS(6, patience=5, grid="log_snr"), rule, rejection.true_bounds(6))
    labels, seeds = torch.tensor([0.0, 0.3, -0.5], dtype=F64), [4, 5, 6]

    def drawn(at, count=6):
        conditions = {"label": labels[at], "scale": 0.5}
        problem = Posterior(Labelled(), FlatLikelihood((1,), len(labels[at]), F64), conditions)
        return solver(problem, count, seed=seeds[at]).x

    together = drawn(slice(None))
    for b in range(3):
        assert torch.allclose(together[:, b : b + 1], drawn(slice(b, b + 1)), atol=1e-12)


def test_patience_bounds_the_calls():
    solver = rejection.rejecting(DiffRS(6, patience=1), "backstep", rejection.true_bounds(6))
    samples = solver(rejection.model_problem(), 20)
    assert samples.nfe == pytest.approx(6)


def test_diffrs_refuses():
    with pytest.raises(ValueError, match="must come with bounds"):
        DiffRS(6, ratio=rejection.log_ratio)
    with pytest.raises(ValueError, match="must come with bounds"):
        DiffRS(6, ratio=rejection.log_ratio, bounds=rejection.true_bounds(5))
    with pytest.raises(ValueError, match="rule must be one of"):
        DiffRS(rule="hope")
    with pytest.raises(ValueError, match="patience"):
        DiffRS(patience=0)
    with pytest.raises(ValueError, match="guided path"):
        Driven(MMPS(), DiffRS())


def test_a_call_on_some_counts_by_their_share():
    counts = Counts(2, 1, 0)
    counts.add(Counts(4, 2, 6), 0.25)
    assert counts == Counts(3, 1.5, 1.5)


def test_parts_of_the_noise_leave_the_others_alone():
    whole, other = Noise([1, 2, 3]), Noise([1, 2, 3])
    first = whole.part([2, 0]).randn(4)
    assert torch.equal(first[0], Noise([3]).part([0]).randn(4)[0])
    whole.part([0]).randn(50)
    assert torch.equal(whole.randn(2)[1], other.randn(2)[1])


# --- diagnostics --------------------------------------------------------------------------------------------------------------


def degenerate(rank, dim=6):
    basis = torch.linalg.qr(Noise([5], F64).randn(dim, dim)[0])[0]
    spread = torch.cat([torch.linspace(0.5, 1.5, rank, dtype=F64), torch.zeros(dim - rank, dtype=F64)])
    return GaussianPrior(torch.zeros(dim, dtype=F64), basis @ torch.diag(spread) @ basis.T)


class Gauged(Denoiser):
    """A prior whose score is turned: s + W s with W antisymmetric, a gauge for every law; or scaled, which is none."""

    def __init__(self, prior, change):
        super().__init__()
        self.prior, self.change = prior, change
        self.schedule, self.event_shape = prior.schedule, prior.event_shape

    def forward(self, x_t, t, **cond):
        alpha = self.schedule(torch.as_tensor(t, dtype=x_t.dtype))[0].reshape(-1, 1)
        x0 = self.prior(x_t, t)
        return x0 + (alpha * x0 - x_t) @ self.change.T / alpha


def turn(dim, strength):
    a = Noise([8], F64).randn(dim, dim)[0]
    return strength * (a - a.T)


@pytest.mark.parametrize("rank", [1, 2, 5, 6])
def test_dimension_of_a_degenerate_gaussian_is_its_rank(rank):
    prior = degenerate(rank)
    t = prior.schedule.time(torch.tensor(1e-3, dtype=F64))
    x_t = prior.sample(4, seed=1) * prior.schedule(t)[0]
    found = local_dimension(prior, x_t, t)
    assert found.value.tolist() == [rank] * 4 and found.spectrum.shape == (4, 6)
    assert torch.allclose(found.spectrum[:, : 6 - rank], torch.ones(4, 6 - rank, dtype=F64), atol=1e-9)
    assert float(found.spectrum[:, 6 - rank :].max()) < 1e-5 if rank else True
    high = prior.schedule.time(torch.tensor(20.0, dtype=F64))
    assert local_dimension(prior, x_t, high).value.tolist() == [0] * 4  # far from the data all directions lead to it


def test_the_jacobian_is_the_posterior_covariance(mixture):
    prior, t = mixture.prior, torch.tensor(0.4, dtype=F64)
    x_t, v = Noise(range(6), F64).randn(2, 8).unbind(1)
    alpha, sigma = prior.schedule(t)
    found = torch.einsum("nij,nj->ni", jacobian(prior, x_t, t), v)
    assert torch.allclose(found, alpha / sigma**2 * prior.covariance_action(x_t, t, v), atol=1e-10)


def test_asymmetry_is_zero_for_a_gradient_and_measures_the_gauge(mixture):
    t, noise = torch.tensor(0.4, dtype=F64), Noise(range(5), F64)
    x_t = Noise(range(5), F64).randn(8)
    assert float(asymmetry(mixture.prior, x_t, t, noise).max()) < 1e-12
    gauged = Gauged(mixture.prior, turn(8, 0.1))
    dense = jacobian(gauged, x_t, t)
    exact = (dense - dense.mT).flatten(1).norm(dim=1) / dense.flatten(1).norm(dim=1)
    assert torch.allclose(asymmetry(gauged, x_t, t, noise, probes=3000), exact, rtol=0.05)
    assert float(exact.min()) > 0.1


def test_a_gauge_leaves_the_law_and_not_the_paths():
    """The flow with a turned score: the same covariance of what arrives, from other starting points."""
    prior = gaussian_problem().problem.prior
    x, ends = torch.eye(5, dtype=F64), [torch.tensor(t, dtype=F64) for t in (1.0, 0.3)]
    mean = prior.schedule(ends[0])[0] * prior.mean
    laws, maps = [], []
    for denoiser in (prior, Gauged(prior, turn(5, 0.3)), Gauged(prior, 0.3 * torch.eye(5, dtype=F64))):
        end = integrate_flow(denoiser, torch.cat([mean[None], mean + x]), *ends, steps=200)
        matrix = (end[1:] - end[0]).T
        start = prior.schedule(ends[0])[0] ** 2 * prior.cov + prior.schedule(ends[0])[1] ** 2 * torch.eye(5, dtype=F64)
        laws.append(matrix @ start @ matrix.T)
        maps.append(matrix)
    assert torch.allclose(laws[0], laws[1], atol=1e-6) and not torch.allclose(maps[0], maps[1], atol=1e-2)
    assert not torch.allclose(laws[0], laws[2], atol=1e-2)


def test_sampling_defect_is_blind_to_gauges_and_sees_the_rest(mixture):
    prior, t, count = mixture.prior, torch.tensor(0.3, dtype=F64), 4000
    x0 = prior.sample(count, seed=2)
    for change, right in (
        (torch.zeros(8, 8, dtype=F64), True),
        (turn(8, 0.3), True),
        (0.15 * torch.eye(8, dtype=F64), False),
    ):
        found = sampling_defect(Gauged(prior, change), x0, t, Noise(range(count), F64))
        assert found.value.shape == found.error.shape == (32,)
        assert (float(found.standard_errors.abs().max()) < 4.5) == right


# --- adaptive steps ---------------------------------------------------------------------------------------------------------------


def adaptive_error(problem, count=40, **settings):
    """Return the error against the flow, and the steps that each sample has taken."""
    solver, noise, items = AdaptiveDPMSolverPP(**settings), Noise(range(count), F64), problem.expand(count)
    state = solver.init(items, noise)
    truth = problem.prior.flow(state.x, *(torch.tensor(t, dtype=F64) for t in (1.0, 0.0)))
    taken, where = torch.zeros(count), torch.full((count,), -torch.inf, dtype=F64)
    for k in range(solver.steps):
        state = solver.step(items, state, k, noise)
        if k < solver.steps - 1:
            taken += state.memory[0] > where + 1e-9
            where = state.memory[0]
    return float((state.x - truth).square().mean().sqrt()), taken, items.counts.network


def test_adaptive_steps_hold_their_tolerance(mixture):
    """At a tenth of the tolerance a third of the step: the error of order 2 falls with the tolerance, the calls rise."""
    errors, calls = [], []
    for tol in (0.1, 0.01, 0.001):
        error, taken, count = adaptive_error(mixture, rtol=tol, atol=tol, steps=2000)
        errors.append(error)
        calls.append(count)
        assert len(set(taken.tolist())) > 1  # each sample has its own steps
    assert errors[0] > 4 * errors[1] > 16 * errors[2] and errors[2] < 3e-3
    assert calls[0] < calls[1] < calls[2] < 1000


def test_adaptive_steps_end_in_time(mixture):
    """Too few attempts: the steps are those even in lambda, which is DPM-Solver++ 2S, at the most calls."""
    tight = AdaptiveDPMSolverPP(steps=6, rtol=0.0, atol=1e-12, first=1e-6)
    even = get("dpmpp_singlestep", "solvers")(steps=6, grid="log_snr")
    left, right = tight(mixture, 5), even(mixture, 5)
    assert torch.allclose(left.x, right.x, atol=1e-10) and left.nfe == tight.nfe == right.nfe
    loose = AdaptiveDPMSolverPP(steps=60, rtol=10.0, atol=10.0)(mixture, 5)
    assert loose.nfe < 20
    with pytest.raises(ValueError, match="positive"):
        AdaptiveDPMSolverPP(atol=0.0)


def test_adaptive_steps_are_not_shared(mixture):
    solver = AdaptiveDPMSolverPP(steps=40)
    together = solver(mixture, 9).x
    assert torch.allclose(together, solver(mixture, 9, chunk=1).x, atol=1e-12)
    state = torch.stack([torch.zeros(3, dtype=F64), torch.ones(3, dtype=F64)])
    found = solver.error(state, state + 0.039, torch.zeros(2, 3, dtype=F64))
    assert found.tolist() == pytest.approx([0.039 / 0.0078, 0.039 / 0.05])
