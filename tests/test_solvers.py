"""Solvers: identities between them, agreement with other libraries, the law they draw from, and guided samplers under them."""

import dataclasses
import inspect
import itertools

import pytest
import torch

import fewstep
from fewstep.core.denoiser import Denoiser, MeanReverting
from fewstep.core.driven import Driven
from fewstep.core.grid import times_of
from fewstep.core.likelihood import FlatLikelihood
from fewstep.core.multistep import MultistepSolver, Point, prior_mean
from fewstep.core.noise import Noise
from fewstep.core.problem import Posterior
from fewstep.core.registry import available, get
from fewstep.core.replay import decode, encode
from fewstep.core.sampler import GuidedSampler, State
from fewstep.methods.mmps import MMPS
from fewstep.methods.pigdm import PiGDM
from fewstep.priors.exact import GaussianPrior, MixturePrior
from fewstep.solvers.dpm_v3 import Statistics, estimate
from fewstep.testing.law import distance
from fewstep.testing.oracle import ExactDraw, ExactMean
from fewstep.testing.problems import bimodal_problem, gaussian_problem, mixture_problem
from fewstep.testing.propagate import finite_step_law
from fewstep.testing.sampler import (
    check_convergence,
    check_cost,
    check_independence,
    check_law,
    check_randomness,
    check_side_effects,
)

NAMES = available("solvers")
TABLES = [name for name in NAMES if issubclass(get(name, "solvers"), MultistepSolver)]
DRIVABLE = [name for name in NAMES if not get(name, "solvers").undriven]


def flat(prior, batch=1, dtype=torch.float64):
    return Posterior(prior, FlatLikelihood(prior.event_shape, batch, dtype))


@pytest.fixture(scope="module")
def mixture():
    return flat(mixture_problem().problem.prior)


@pytest.mark.parametrize("name", NAMES)
def test_form(name):
    cls = get(name, "solvers")
    sampler = cls(steps=6)
    assert dataclasses.is_dataclass(cls) and cls.__dataclass_params__.frozen
    for field in dataclasses.fields(cls):
        assert f"{field.name}:" in (cls.__doc__ or ""), field.name
    assert eval(repr(sampler), {cls.__name__: cls}) == sampler
    assert all(isinstance(cls.preset(preset), cls) for preset in cls.presets)
    assert cls.exact == "posterior" and cls.limit and cls.needs == frozenset() and sampler.order >= 1
    code = [line for line in inspect.getsource(inspect.getmodule(cls)).splitlines() if line.strip()]
    assert len(code) <= 110


@pytest.mark.parametrize("name", DRIVABLE)
def test_contract(name):
    """What every sampler keeps, with a guided prediction so that the checks' measurement is seen."""
    sampler = Driven(MMPS(iterations=5), get(name, "solvers")(steps=6))
    for check in (check_randomness, check_independence, check_side_effects, check_cost):
        check(sampler)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_draws_the_prior(name, dtype):
    prior = gaussian_problem().problem.prior.to(dtype)
    sampler = get(name, "solvers")(steps=5)
    samples = sampler(flat(prior, 2, dtype), 3)
    assert samples.x.shape == (3, 2, 5) and samples.x.dtype == dtype
    assert samples.nfe <= sampler.nfe if sampler.nfe_varies else samples.nfe == sampler.nfe


@pytest.mark.parametrize("name", NAMES)
def test_a_measurement_is_not_ignored(name):
    with pytest.raises(ValueError, match="would not see the measurement"):
        get(name, "solvers")(steps=3)(gaussian_problem().problem)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("ddim", {"eta": 1.5}),
        ("dpmpp", {"terms": 4}),
        ("dpmpp", {"threshold": 0.0}),
        ("dpmpp_sde", {"terms": 3}),
        ("dpmpp_singlestep", {"order": 4}),
        ("deis", {"variable": "x"}),
        ("deis", {"order": 9}),
        ("dpm_v3", {"order": 0}),
        ("ipndm", {"order": 6}),
        ("rho_rk", {"order": 5}),
        ("hb", {"level": 0.0}),
        ("ghvb", {"level": 5.5}),
        ("lml", {"damping": 0.0}),
        ("lml", {"kappa": 1.0}),
        ("usf", {"decisions": (("x0", 2, "half", 0, False, 1),)}),
        ("srds", {"fine": 2.5}),
        ("srds", {"tolerance": -1.0}),
    ],
    ids=str,
)
def test_settings_out_of_range_are_refused(name, settings):
    with pytest.raises(ValueError, match="must"):
        get(name, "solvers")(**settings)


@pytest.mark.parametrize("name", NAMES)
def test_times_may_be_a_list(mixture, name):
    listed, times = (get(name, "solvers")(steps=3, grid=kind((1.0, 0.6, 0.2, 0.0))) for kind in (list, tuple))
    assert listed.nfe == times.nfe and torch.equal(listed(mixture, 2).x, times(mixture, 2).x)


@pytest.mark.parametrize("grid", ["spiral", (0.5, 0.7, 0.0), (1.0,), (1.0, 0.5, -0.1)])
def test_wrong_grids_are_refused(grid):
    with pytest.raises(ValueError, match=r"grid must be one of|fall strictly"):
        get("ddim", "solvers")(steps=2, grid=grid)(flat(gaussian_problem().problem.prior))
    with pytest.raises(ValueError, match="cannot be resampled to 4 steps"):
        get("ddim", "solvers")(steps=4, grid=(1.0, 0.0))(flat(gaussian_problem().problem.prior))


@pytest.mark.parametrize("grid", [(0.9, 0.5, 0.0), (1.0, 0.5, 0.1)])
@pytest.mark.parametrize("name", DRIVABLE)
def test_grids_that_do_not_lead_from_one_to_zero_are_refused(mixture, name, grid):
    """The start is drawn at t = 1, and what is returned is a prediction of x_0."""
    sampler = get(name, "solvers")(steps=2, grid=grid)
    with pytest.raises(ValueError, match="must lead from t = 1 to t = 0"):
        sampler(mixture)
    with pytest.raises(ValueError, match="must lead from t = 1 to t = 0"):
        Driven(MMPS(), sampler)(mixture_problem().problem)


@pytest.mark.parametrize("schedule", [fewstep.VarianceExploding(), fewstep.EDM(sigma_min=0.02)], ids=str)
def test_the_least_ratio_has_a_step_of_its_own(schedule):
    """Standard deviation over that of the prior, 0.1: 0.659 and less where the step to the least ratio is taken for the last."""
    problem = flat(GaussianPrior(torch.zeros(1).double(), torch.full((1, 1), 0.01).double(), schedule))
    for steps, low in ((6, 0.85), (12, 0.95)):
        spread = float(finite_step_law(solver("dpmpp", steps=steps), problem).cov.sqrt()) / 0.1
        assert low < spread < 1.05


def test_explicit_times_are_kept_or_resampled(mixture):
    """Other numbers of steps interpolate log(ratio); a grid even in it stays so, and the step to t = 0 stays one step."""
    schedule = mixture.schedule
    times = times_of("log_snr", schedule, 10)
    assert torch.equal(times_of(tuple(times.tolist()), schedule, 10), times)
    for steps in (1, 4, 19):
        assert torch.allclose(times_of(tuple(times.tolist()), schedule, steps), times_of("log_snr", schedule, steps))
    inner = tuple(times[2:5].tolist())
    ends = times_of(inner, schedule, 7)[[0, -1]]
    assert torch.allclose(ends, times[[2, 4]])


# --- identities --------------------------------------------------------------------------------------------------------------


def same(problem, left, right, tol=1e-12):
    assert float((left(problem, 16).x - right(problem, 16).x).abs().max()) < tol


def solver(name, **settings):
    return get(name, "solvers")(**{"steps": 12, "grid": "log_snr", **settings})


@pytest.fixture(scope="module")
def even(mixture):
    schedule = mixture.schedule
    ratios = torch.linspace(float(schedule.ratio(torch.tensor(1.0).double())), 0.05, 12, dtype=torch.float64)
    return (*schedule.time(ratios).clamp(0, 1).tolist(), 0.0)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        *[("deis", {"order": 1, "variable": v}) for v in ("t", "rho", "log_rho")],
        ("dpmpp", {"terms": 1}),
        ("dpmpp", {"terms": 1, "released": False}),
        ("dpmpp_singlestep", {"order": 1}),
        ("rho_rk", {"order": 1}),
        ("ipndm", {"order": 1}),
        ("ghvb", {"level": 1.0}),
        ("hb", {"level": 1.0}),
        ("dual_fast", {"c": 0.0}),
        ("lml", {"kappa": 0.0}),
    ],
    ids=str,
)
def test_first_order_is_ddim(mixture, name, settings):
    same(mixture, solver(name, **settings), solver("ddim"))


def test_first_order_sde_is_ancestral(mixture):
    same(mixture, solver("dpmpp_sde", terms=1), solver("ddim", eta=1.0))


@pytest.mark.parametrize("level", [2.0, 3.0, 4.0, 5.0])
def test_momentum_at_an_integer_is_adams_bashforth(mixture, even, level):
    adams = solver("ipndm", order=int(level), grid=even)
    same(mixture, solver("ghvb", level=level, grid=even), adams)
    same(mixture, solver("hb", level=level, grid=even), adams)


@pytest.mark.parametrize("order", [2, 3, 4])
def test_even_steps_make_rho_ab_of_adams_bashforth(mixture, even, order):
    """All but the first steps are the same, those too where the history is short: the coefficients are for even steps."""
    same(
        mixture, solver("deis", order=order, variable="rho", grid=even), solver("ipndm", order=order, grid=even), 1e-11
    )


def test_dual_fast_at_one_half_is_adams_bashforth_2(mixture, even):
    same(mixture, solver("dual_fast", grid=even), solver("ipndm", order=2, grid=even))
    with pytest.raises(AssertionError):
        same(mixture, solver("dual_fast", c=0.45, grid=even), solver("ipndm", order=2, grid=even))


def test_threshold_is_off_for_small_predictions_and_clips_large_ones():
    solve = solver("dpmpp", threshold=0.995)
    small = torch.linspace(-0.9, 0.9, 48).reshape(1, 3, 4, 4)
    assert torch.equal(solve.on_prediction(small, ()), small)
    out = solve.on_prediction(torch.cat([4 * small, small]), ())
    assert float(out[0].abs().max()) == 1 and torch.equal(out[1], small[0])


def test_lml_is_the_dense_formula_and_keeps_the_length():
    solve = solver("lml", kappa=0.4, damping=0.7)
    n, p = (Noise([3, 4], torch.float64).randn(6) for _ in range(2))
    p = p.flip(0)
    m = 0.4 * p + 0.6 * n
    dense = torch.linalg.solve(m[:, :, None] * m[:, None, :] + 0.7 * torch.eye(6).double(), n[..., None])[..., 0]
    dense = dense * (n.norm(dim=1) / dense.norm(dim=1))[:, None]
    assert torch.allclose(solve.direction([n, p]), dense, atol=1e-12)


def test_lml_tends_to_ddim_at_first_order():
    """With kappa > 0: turned by what the epsilon before was, not by what was made of it, which spirals away."""
    variance = torch.tensor([1.0, 0.2]).double()
    problem = flat(GaussianPrior(torch.tensor([0.3, -0.5]).double(), variance))
    gaps = []
    for steps in (40, 80, 160):
        turned, plain = (
            solver(name, steps=steps, grid="uniform", **settings)(problem, 100).x
            for name, settings in (("lml", {"kappa": 0.3, "damping": 1.0}), ("ddim", {}))
        )
        gaps.append(float((turned - plain).square().mean().sqrt()))
    assert gaps[0] < 0.02 and all(1.6 < a / b < 2.4 for a, b in itertools.pairwise(gaps))


@pytest.mark.parametrize(("name", "settings"), [("ghvb", {"level": 1.2}), ("lml", {"kappa": 0.3, "damping": 1.0})])
def test_the_last_step_returns_the_prediction(mixture, name, settings):
    """As the network made it: not the velocity, which lags behind, nor the turned direction."""
    sampler, points = solver(name, steps=5, **settings), []
    found = sampler(mixture, 16, callback=lambda k, total, state: points.append(state.x)).x[:, 0]
    with torch.no_grad():
        want = mixture.prior(points[-2], sampler.times(mixture)[-2])
    assert torch.allclose(found, want, atol=1e-10)


@pytest.mark.parametrize("level", [1.2, 1.8, 2.5])
def test_ghvb_ends_as_near_the_flow_as_adams_bashforth(level):
    """In eight steps to two modes; where the velocity ends the run, 2.7, 1.16 and 1.5 times as far."""
    components = ([0.4, 0.6], [[-1.0], [1.0]], [0.04, 0.04])
    problem = flat(MixturePrior(*(torch.tensor(values, dtype=torch.float64) for values in components)))
    start = solver("ddim").init(problem.expand(400), Noise.spawn([0], range(400), torch.float64)).x
    truth = problem.prior.flow(start, *torch.tensor([1.0, 0.0], dtype=torch.float64))
    found, adams = (solver("ghvb", steps=8, level=r, grid="uniform")(problem, 400).x[:, 0] for r in (level, 2.0))
    assert float((found - truth).norm()) < 1.13 * float((adams - truth).norm())


def test_thresholding_acts_on_what_is_returned(mixture):
    sampler = solver("dpmpp", steps=3, threshold=0.9)
    assert float(sampler(mixture, 16).x.abs().max()) <= 1
    assert float(solver("dpmpp", steps=3)(mixture, 16).x.abs().max()) > 1.5


def test_lml_does_not_round():
    """At the published damping the usual order of operations loses 10 % in single precision; kappa = 0 must change nothing."""
    n = Noise([1]).randn(3072)
    m, damping = n.clone(), 0.001
    usual = n - m * (m * n).sum() / (damping + (m * m).sum())
    usual = usual * n.norm() / usual.norm()
    error = [float((x - n).norm() / n.norm()) for x in (solver("lml").direction([n, n]), usual)]
    assert error[0] < 1e-6 and error[1] > 0.02


@pytest.mark.parametrize(
    "name", [n for n in TABLES if n != "dpm_v3"]
)  # its statistics are tables of one lambda for all
def test_per_item_times(mixture, name):
    """Items on grids of their own in one batch each get what they get alone."""
    grids = [torch.linspace(1, end, 7, dtype=torch.float64) for end in (0.2, 0.45)]
    x = Noise([1, 2], torch.float64).randn(8)

    def run(times, seeds):
        rows = [seed - 1 for seed in seeds]
        solve, state, noise = solver(name, steps=6), State(x[rows]), Noise(seeds, torch.float64)
        plan = solve.plan(mixture.schedule, times)
        with torch.no_grad():
            for k in range(6):
                state = plan.advance(mixture.expand(len(rows)), state, k, noise, prior_mean)
        return state.x

    together = run(torch.stack(grids, 1), [1, 2])
    alone = torch.cat([run(times, [seed]) for times, seed in zip(grids, (1, 2), strict=True)])
    assert torch.allclose(together, alone, atol=1e-10)
    with pytest.raises(ValueError, match="same step"):
        run(torch.stack([grids[0], torch.linspace(1, 0, 7).double()], 1), [1, 2])


# --- DPM-Solver-v3 -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", [1, 2, 3])
def test_v3_without_statistics_is_dpm_solver_pp(mixture, order):
    """One row at a time: the starts differ, v3 beginning with orders 1 and 2."""
    points = [Point.of(mixture.schedule, t) for t in torch.tensor([0.3, 0.4, 0.55, 0.7]).double()]
    for nodes in (points[1 : 1 + order], points[2 : 2 + min(order, 2)]):
        left = solver("dpm_v3", order=order).stages(mixture.schedule, nodes, points[0])[0]
        right = solver("dpmpp", terms=order, released=False).stages(mixture.schedule, nodes, points[0])[-1]
        assert torch.allclose(torch.stack(left.predictions), torch.stack(right.predictions), rtol=1e-11)
        assert torch.allclose(left.x[0], right.x[0]) and not any(left.x[1:]) and left.offset == 0


def gaussian_statistics(variance, mean, schedule, count):
    """Return l = sigma^2 / (alpha^2 v + sigma^2) and b = f' for N(m, diag v), s = 0: with them one step is exact."""
    low, high = -torch.tensor([8.0, 0.05]).double().log()  # ends of the step, which are entries of the table
    log_snr = low + (high - low) * torch.linspace(-1, 2, 3 * count + 1, dtype=torch.float64)
    alpha, sigma = (c[:, None] for c in schedule(schedule.time(torch.exp(-log_snr))))
    level = alpha**2 * variance + sigma**2
    slope = sigma**2 / level  # f = (1 - l) z - D = -l m, and dl/dlambda = -2 l (1 - l)
    return Statistics(log_snr, slope, 0 * slope, 2 * slope * (1 - slope) * mean)


def test_v3_is_exact_on_a_gaussian_in_one_step():
    mean, variance = torch.tensor([0.5, -1.0]).double(), torch.tensor([0.3, 1.7]).double()
    prior = GaussianPrior(mean, variance)
    t, s = (prior.schedule.time(torch.tensor(r).double()) for r in (8.0, 0.05))
    x = Noise(range(5), torch.float64).randn(2) * prior.schedule(t)[1]
    errors = {}
    for count in (250, 4000):
        statistics = gaussian_statistics(variance, mean, prior.schedule, count)
        step = solver("dpm_v3", steps=1, statistics=statistics, grid=(float(t), float(s)))
        out = step.step(flat(prior, 5), State(x), 0, Noise(range(5), torch.float64)).x
        errors[count] = float((out - prior.flow(x, t, s)).abs().max())
    assert (
        errors[4000] < 1e-7 and errors[250] / errors[4000] > 50
    )  # of order 2, but for where the nodes fall in their cells
    plain = solver("dpm_v3", steps=1, grid=(float(t), float(s)))
    out = plain.step(flat(prior, 5), State(x), 0, Noise(range(5), torch.float64)).x
    assert float((out - prior.flow(x, t, s)).abs().max()) > 0.1


def ratios_from_one(schedule, count, low=0.02):
    high = schedule.ratio(torch.ones((), dtype=torch.float64))
    return torch.linspace(-float(high.log()), -float(torch.tensor(low).log()), count, dtype=torch.float64)


def error_after(name, problem, steps, reference=None, **settings):
    """Return the root-mean-square distance to a fine solution of the flow, on steps even in lambda."""
    grid = problem.schedule.time(torch.exp(-ratios_from_one(problem.schedule, steps + 1))).clamp(0, 1)
    solve, state = solver(name, steps=steps, grid=tuple(grid.tolist()), **settings), None
    items = problem.expand(100)
    state, noise = solve.init(items, Noise(range(100), torch.float64)), Noise(range(100), torch.float64)
    with torch.no_grad():
        for k in range(steps):
            state = solve.step(items, state, k, noise)
    return state.x if reference is None else float((state.x - reference).square().mean().sqrt())


def test_v3_statistics_of_a_gaussian_are_exact():
    """For a diagonal Gaussian l is known, f does not vary, and five steps are next to exact."""
    variance = torch.tensor([0.3, 1.7]).double()
    problem = flat(GaussianPrior(torch.tensor([0.5, -1.0]).double(), variance))
    log_snr = ratios_from_one(problem.schedule, 200)
    found = estimate(problem.expand(50), log_snr, Noise(range(50), torch.float64))
    alpha, sigma = (c[:, None] for c in problem.schedule(problem.schedule.time(torch.exp(-log_snr))))
    truth = sigma**2 / (alpha**2 * variance + sigma**2)
    assert torch.allclose(found.l, truth, atol=1e-12) and float(found.s.abs().max()) < 1e-6
    assert float((found.b - 2 * truth * (1 - truth) * torch.tensor([0.5, -1.0])).abs()[1:-1].max()) < 1e-2
    fine = error_after("rho_rk", problem, 200, order=4)
    assert error_after("dpm_v3", problem, 5, fine, statistics=found) < 1e-3
    assert error_after("dpmpp", problem, 5, fine) > 0.03


def test_v3_with_estimated_statistics_beats_dpm_solver_pp(mixture):
    log_snr = ratios_from_one(mixture.schedule, 150)
    found = estimate(mixture.expand(200), log_snr, Noise(range(500, 700), torch.float64))
    fine = error_after("rho_rk", mixture, 200, order=4)
    wrong = Statistics(log_snr, 1 - found.l, found.s, found.b)
    for steps in (5, 10):
        plain = error_after("dpmpp", mixture, steps, fine)
        assert error_after("dpm_v3", mixture, steps, fine, order=2, statistics=found) < 0.8 * plain
        assert error_after("dpm_v3", mixture, steps, fine, order=2, statistics=wrong) > plain


def test_v3_keeps_its_order_with_any_statistics(mixture):
    """Statistics change the error, not the limit: with rough ones it still converges to the flow."""
    schedule = mixture.schedule
    log_snr = torch.linspace(-7, 7, 4000, dtype=torch.float64)
    rough = torch.sigmoid(-2 * log_snr)[:, None] * torch.linspace(0.5, 1.5, 8).double()
    statistics = Statistics(log_snr, rough, 0.2 * rough, 0.1 * (1 - rough))
    ends = [float(schedule.time(torch.tensor(r).double())) for r in (3.0, 0.1)]
    x = Noise(range(6), torch.float64).randn(8) * 2
    truth, errors = mixture.prior.flow(x, *torch.tensor(ends).double()), []
    for steps in (20, 40):
        grid = times_of((ends[0], ends[1]), schedule, steps)
        state, step = State(x), solver("dpm_v3", order=2, steps=steps, statistics=statistics, grid=tuple(grid.tolist()))
        for k in range(steps):
            state = step.step(mixture.expand(6), state, k, Noise(range(6), torch.float64))
        errors.append(float((state.x - truth).abs().max()))
    assert 3.2 < errors[0] / errors[1] < 5


# --- replay and change of variable ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "settings"), [*[("ddim", {"eta": e}) for e in (0.1, 0.5, 1.0)], ("dpmpp_sde", {})], ids=str
)
def test_replay_round_trip(mixture, name, settings):
    """The encoded path comes back to rounding, for any denoiser; under another prior it does not."""
    solve, prior = solver(name, steps=40, **settings), mixture.prior
    x0, problem = prior.sample(6, seed=3), mixture.expand(6)
    latent = encode(solve, problem, x0, Noise(range(6), torch.float64))
    *path, last = decode(solve, problem, latent)
    assert float((path[-1] - latent.end).abs().max()) < 1e-13
    assert float((last - x0).abs().max()) < 0.1
    other = flat(gaussian_problem(dim=8).problem.prior, 6)
    *path, _ = decode(solve, other, latent)
    assert float((path[-1] - latent.end).abs().max()) > 0.1


def test_replay_translates_between_gaussians():
    """N(0, .25) to N(2, 1) in many small steps: the law arrives, and the sample stays recognisable."""
    one, two = (
        flat(GaussianPrior(torch.tensor([m]).double(), torch.tensor(v).double()), 2000)
        for m, v in ((0.0, 0.25), (2.0, 1.0))
    )
    solve, x0 = solver("ddim", eta=1.0, steps=200), one.prior.sample(2000, seed=1)
    *_, out = decode(solve, two, encode(solve, one, x0, Noise(range(2000), torch.float64)))
    assert abs(float(out.mean()) - 2) < 0.1 and abs(float(out.std()) - 1) < 0.1
    assert float(torch.corrcoef(torch.cat([x0, out], 1).T)[0, 1]) > 0.8


def test_a_deterministic_solver_has_no_noise_to_record(mixture):
    with pytest.raises(ValueError, match="fresh noise"):
        encode(solver("ddim"), mixture.expand(2), torch.zeros(2, 8).double(), Noise([1, 2], torch.float64))


class Reverting(Denoiser):
    """E[x_0 | x_t] for x_t = alpha x_0 + (1 - alpha) mu + sigma z with x_0 of a known prior."""

    def __init__(self, prior, mean):
        super().__init__()
        self.prior, self.mean, self.schedule, self.event_shape = prior, mean, prior.schedule, prior.event_shape

    def forward(self, x_t, t):
        alpha, _ = self.schedule(t)
        return self.prior(x_t - (1 - alpha) * self.mean, t)


def test_mean_reverting_change_of_variable(mixture):
    """The published step of order 1 in x is DDIM's in z; mu = 0 changes nothing."""
    prior, mu = mixture.prior, torch.linspace(-1, 1, 8).double()
    network = Reverting(prior, mu)
    problem, schedule = flat(MeanReverting(network, mu), 3), prior.schedule
    assert torch.equal(solver("deis")(flat(MeanReverting(prior, 0 * mu)), 3).x, solver("deis")(mixture, 3).x)
    times = solver("ddim").times(problem)
    z = x = Noise(range(3), torch.float64).randn(8)
    x = z + (1 - schedule(times[0])[0]) * mu
    state = State(z)
    for k, (t, s) in enumerate(itertools.pairwise(times[:-1])):
        (at, st), (as_, ss) = schedule(t), schedule(s)
        state = solver("ddim").step(problem, state, k, Noise(range(3), torch.float64))
        h = schedule.log_snr(s) - schedule.log_snr(t)
        shift = mu * (1 - ss / st + ss / st * at - as_)
        x = ss / st * x - as_ * torch.expm1(-h) * network(x, t) + shift
        assert torch.allclose(x, state.x + (1 - as_) * mu, atol=1e-11)


# --- the law ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [n for n in TABLES if n != "lml"])
def test_converges_to_the_prior(name):
    """The exact finite-step law on a Gaussian, free of Monte-Carlo error, tends to the prior."""
    prior = gaussian_problem().problem.prior
    problem = flat(prior)
    truth = prior.posterior(problem.likelihood)
    error = []
    for steps in (8, 32, 128):
        found = distance(finite_step_law(get(name, "solvers")(steps=steps, grid="log_snr"), problem), truth)
        error.append(max(found.mean_error, 1 - found.low, found.high - 1))
    assert error[2] < 0.05 and error[2] < error[1] < error[0], error


# --- guided samplers under solvers --------------------------------------------------------------------------------------------


def test_mmps_under_ddim_is_mmps():
    problem = gaussian_problem().problem
    left = Driven(MMPS(), get("ddim", "solvers")(steps=7, eta=1.0))(problem, 4).x
    assert torch.allclose(left, MMPS(steps=7)(problem, 4).x, atol=1e-12)


@pytest.mark.parametrize("name", TABLES)
def test_a_driven_sampler_converges_to_the_posterior(name):
    if name == "lml":
        return
    steps = 400 if get(name, "solvers").order == 1 else 100
    check_convergence(Driven(MMPS(iterations=5), get(name, "solvers")(steps=steps, grid="log_snr")))


def test_samples_follow_the_law():
    check_law(Driven(PiGDM(), get("dpmpp", "solvers")(steps=6)))


def test_what_makes_no_sense_is_refused():
    with pytest.raises(ValueError, match="draws x_0 afresh"):
        Driven(ExactDraw(), get("ddim", "solvers")())

    class Remembers(MMPS):
        def estimate(self, problem, state, t, noise):
            return state.memory

    with pytest.raises(ValueError, match="previous prediction"):
        Driven(Remembers(), get("ddim", "solvers")())


def test_ten_calls_of_a_solver_are_worth_fifty_of_ddim():
    """The exact posterior mean under each: the error left is that of the steps alone."""
    exact = gaussian_problem()

    def error(sampler):
        found = distance(finite_step_law(sampler, exact.problem), exact.posterior)
        return max(found.mean_error, 1 - found.low, found.high - 1)

    plain = error(ExactMean(steps=50))
    assert error(Driven(ExactMean(), get("dpmpp", "solvers")(steps=10))) < plain
    assert error(Driven(MMPS(iterations=5), get("dpmpp", "solvers")(steps=10))) < plain


def test_on_a_mixture_too():
    """Against exact draws: what is left of MMPS at ten calls of DEIS is its own bias, not the steps'."""
    exact = bimodal_problem()
    truth = exact.posterior.sample(2000, seed=1).flatten().sort().values

    def error(sampler):
        return float((sampler(exact.problem, 2000, seed=3).x.flatten().sort().values - truth).abs().mean())

    assert error(Driven(MMPS(), get("deis", "solvers")(steps=10))) < error(MMPS(steps=50, eta=0.0))
    assert error(Driven(ExactMean(), get("deis", "solvers")(steps=10))) < 0.04  # exact draws differ by .02
    assert error(Driven(ExactMean(), get("ddim", "solvers")(steps=10))) > 0.08


def test_the_listing_names_every_solver():
    from rich.console import Console

    from fewstep.commands.listing import all_methods

    console = Console(width=400)
    with console.capture() as capture:
        console.print(all_methods("solvers"))
    text = capture.get()
    assert all(f"{name} " in text for name in NAMES) and "order" in text
    assert available("solver") == NAMES and get("ddim", "solver") is get("ddim", "solvers")


def test_core_stays_light():
    assert issubclass(MMPS, GuidedSampler) and set(NAMES) == set(fewstep.available("solvers"))
