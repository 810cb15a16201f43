"""Denoiser conversions, noise streams, conjugate gradients, kernels, samples: identities."""

import math

import numpy as np
import pytest
import torch

import fewstep
from fewstep.core.batch import like
from fewstep.core.counts import Counts
from fewstep.core.denoiser import PARAMETRISATIONS, Rescheduled
from fewstep.core.grid import GRIDS
from fewstep.core.kernel import ddim_std, one_step_noise, renoise
from fewstep.core.likelihood import FlatLikelihood
from fewstep.core.linalg import cg
from fewstep.core.noise import Noise, Streams
from fewstep.core.problem import Posterior
from fewstep.core.samples import Samples
from fewstep.core.schedule import Brownian
from fewstep.testing.problems import gaussian_problem, mixture_problem

DOUBLE = torch.float64


# --- parametrisations ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", PARAMETRISATIONS)
def test_parametrisations_round_trip(kind):
    x0, z = torch.randn(2, 3, 4, dtype=DOUBLE, generator=torch.Generator().manual_seed(0))
    alpha, sigma = torch.tensor(0.7).double(), torch.tensor(0.9).double()
    x_t = alpha * x0 + sigma * z
    to, back = PARAMETRISATIONS[kind]
    assert torch.allclose(to(back(x0, x_t, alpha, sigma), x_t, alpha, sigma), x0, atol=1e-12)


def test_parametrisations_mean_what_they_say():
    x0, z = torch.randn(2, 3, 4, dtype=DOUBLE, generator=torch.Generator().manual_seed(1))
    alpha, sigma = torch.tensor(0.6).double(), torch.tensor(0.8).double()
    x_t = alpha * x0 + sigma * z
    want = {"x0": x0, "epsilon": z, "score": -z / sigma, "v": alpha * z - sigma * x0, "velocity": z - x0}
    for kind, value in want.items():
        assert torch.allclose(PARAMETRISATIONS[kind].from_x0(x0, x_t, alpha, sigma), value, atol=1e-12), kind


def test_rescheduling_gives_the_same_prior():
    prior = mixture_problem().problem.prior
    exploding = Rescheduled(prior, fewstep.VarianceExploding())
    x = prior.sample(6)
    t = torch.linspace(0.2, 0.8, 6).double()
    ratio = exploding.schedule.ratio(t)
    inner = prior.schedule.time(ratio)
    z = x + like(ratio, x) * torch.randn(x.shape, dtype=DOUBLE, generator=torch.Generator().manual_seed(2))
    want = prior(like(prior.schedule(inner)[0], z) * z, inner)
    assert torch.allclose(exploding(z, t), want, atol=1e-10)


class Watched(fewstep.GaussianPrior):
    """Keeps the times that it was called at."""

    def forward(self, x_t, t, **cond):
        self.seen = [*getattr(self, "seen", []), float(t.max())]
        return super().forward(x_t, t, **cond)


@pytest.mark.parametrize("schedule", [fewstep.Flow(), fewstep.Flow(0.9), Brownian()])
def test_rescheduling_stays_in_the_times_of_the_prior(schedule):
    mean, cov = torch.tensor([0.5, -1.0], dtype=DOUBLE), torch.tensor([0.5, 1.0], dtype=DOUBLE)
    prior, exact = Watched(mean, cov, fewstep.Tabulated.linear()), fewstep.GaussianPrior(mean, cov, schedule)
    known = Rescheduled(prior, schedule)
    alpha, sigma = schedule(t := torch.tensor([1.0, 0.999, 0.5], dtype=DOUBLE))
    z = torch.randn(3, 2, dtype=DOUBLE, generator=torch.Generator().manual_seed(3))
    x_t = alpha[:, None] * mean + sigma[:, None] * z
    off = (known(x_t, t) - exact(x_t, t)).abs().amax(1)
    largest = float(prior.schedule.ratio(torch.ones((), dtype=DOUBLE)))
    assert float(off[0]) < 2 * float(z.abs().max()) / largest and float(off[-1]) < 1e-9
    problem = fewstep.Posterior(known, FlatLikelihood((2,), dtype=DOUBLE))
    assert bool(fewstep.get("ddim", "solvers")(steps=4)(problem, 3).x.isfinite().all())
    assert max(prior.seen) <= 1


# --- noise ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("event", [(3,), (3, 40, 40)])
def test_a_stream_does_not_depend_on_the_batch(event):
    both, alone = Noise([1, 2]), Noise([2])
    for _ in range(3):
        assert torch.equal(both.randn(*event)[1], alone.randn(*event)[0])
    assert torch.equal(both.rand(2)[1], alone.rand(2)[0])


def test_noise_is_standard_normal_and_streams_are_independent():
    x = Noise(range(2000), DOUBLE).randn(50)
    n = x.numel()
    assert abs(float(x.mean())) < 5 / n**0.5 and abs(float(x.var()) - 1) < 5 * (2 / n) ** 0.5
    cross = (x[:-1] * x[1:]).mean()
    assert abs(float(cross)) < 5 / n**0.5


@pytest.mark.parametrize("kind", [Noise, Streams])
def test_uniforms_stay_below_one_in_any_precision(kind):
    noise = Noise([0], torch.bfloat16) if kind is Noise else Streams(0, range(1), torch.bfloat16)
    u = noise.rand(20_000)
    assert float(u.min()) >= 0 and 0.99 < float(u.max()) < 1


def test_noise_refuses_a_wrong_batch_and_leaves_the_global_generator_alone():
    before = torch.random.get_rng_state()
    with pytest.raises(ValueError, match="2 streams"):
        Noise([0, 1]).randn_like(torch.zeros(3, 1))
    assert torch.equal(before, torch.random.get_rng_state())


def test_spawned_streams_depend_on_seed_and_sample_alone():
    wide = Noise.spawn((5, 6), range(0, 3)).randn(4).reshape(3, 2, 4)
    narrow = Noise.spawn((6,), range(1, 3)).randn(4)
    assert torch.equal(wide[1:, 1], narrow)
    assert torch.equal(Noise((5, 6)).expand(3).randn(4).reshape(3, 2, 4), wide)


def test_streams_in_blocks_expand_to_new_ones_that_depend_on_item_and_sample_alone():
    items = Streams(5, range(2100))
    first, wide = items.randn(3), items.expand(3)
    assert len(wide) == 3 * len(items)
    each = wide.randn(3).reshape(3, 2100, 3)
    assert torch.equal(Streams(5, range(2100)).expand(2).randn(3).reshape(2, 2100, 3), each[:2])
    assert torch.equal(Streams(5, range(1024)).expand(1).randn(3), each[0, :1024])
    among = torch.corrcoef(torch.stack([first.flatten(), *each.flatten(1), items.randn(3).flatten()]))
    assert float((among - torch.eye(5)).abs().max()) < 5 / first.numel() ** 0.5
    assert len({float(part) for part in items.expand(2).expand(2).randn(1).flatten()}) > 0.99 * 4 * len(items)


def test_seeds_are_any_integers():
    prior = mixture_problem().problem.prior
    problem = Posterior(prior, FlatLikelihood(prior.event_shape, 2, DOUBLE))
    solver = fewstep.get("ddim", "solvers")(2)
    want = solver(problem, 2, seed=3)
    each = solver(problem, 2, seed=[3, 4])
    assert want.seeds == (3, 3) and not torch.equal(want.x, each.x)
    for seed in (np.int64(3), np.array(3), torch.tensor(3)):
        found = solver(problem, 2, seed=seed)
        assert torch.equal(found.x, want.x) and found.seeds == (3, 3) and type(found.seeds[0]) is int
    for seed in (np.arange(3, 5), (np.int32(3), 4), torch.tensor([3, 4]), range(3, 5)):
        assert torch.equal(solver(problem, 2, seed=seed).x, each.x)
    for wrong in (3.0, "34", None, [3, 4.0], np.array([3.0, 4.0])):
        with pytest.raises(TypeError, match="seed must be an integer"):
            solver(problem, seed=wrong)
    for wrong in ([3], np.arange(3), torch.tensor([3])):
        with pytest.raises(ValueError, match="seeds for 2 measurements"):
            solver(problem, seed=wrong)


# --- conjugate gradients -------------------------------------------------------------------------------------------------


def spd(n, size, seed=0):
    a = torch.randn(n, size, size, dtype=DOUBLE, generator=torch.Generator().manual_seed(seed))
    return a @ a.mT + 0.1 * torch.eye(size, dtype=DOUBLE)


def test_cg_solves_and_ends_after_as_many_steps_as_distinct_eigenvalues():
    basis = torch.linalg.qr(spd(1, 12))[0]
    values = torch.tensor([1.0, 2.0, 5.0] * 4).double()
    matrix = basis @ torch.diag(values) @ basis.mT
    b = torch.randn(1, 12, dtype=DOUBLE, generator=torch.Generator().manual_seed(1))
    result = cg(lambda x: torch.einsum("nij,nj->ni", matrix, x), b, tol=1e-10)
    assert int(result.iterations[0]) == 3
    assert torch.allclose(result.x, torch.linalg.solve(matrix, b), atol=1e-9)


def test_a_preconditioner_saves_iterations_and_changes_no_solution():
    g = torch.Generator().manual_seed(0)
    scale = torch.logspace(0, 3, 40, dtype=DOUBLE)
    basis = torch.linalg.qr(torch.eye(40, dtype=DOUBLE) + 0.02 * torch.randn(40, 40, generator=g, dtype=DOUBLE))[0]
    matrix, b = basis.T @ torch.diag(scale) @ basis, torch.randn(2, 40, generator=g, dtype=DOUBLE)
    plain = cg(lambda x: x @ matrix, b, tol=1e-10)
    quick = cg(lambda x: x @ matrix, b, preconditioner=lambda r: r / scale, tol=1e-10)
    torch.testing.assert_close(quick.x @ matrix, b, rtol=0, atol=1e-8)
    torch.testing.assert_close(quick.x, plain.x, rtol=0, atol=1e-8)
    assert bool((2 * quick.iterations < plain.iterations).all()) and bool((quick.residual <= 1e-10).all())
    exact = cg(lambda x: x * scale, b, preconditioner=lambda r: r / scale, tol=1e-10)
    assert exact.iterations.tolist() == [1, 1]


def test_cg_of_an_item_does_not_depend_on_the_others():
    matrices = spd(3, 10)
    b = torch.randn(3, 10, dtype=DOUBLE, generator=torch.Generator().manual_seed(1))
    b[1] *= 1e-6  # an easy neighbour must not stop a hard one, nor the other way round
    together = cg(lambda x: torch.einsum("nij,nj->ni", matrices, x), b, tol=1e-4)
    for i in range(3):
        alone = cg(lambda x, i=i: torch.einsum("nij,nj->ni", matrices[i : i + 1], x), b[i : i + 1], tol=1e-4)
        assert torch.equal(alone.iterations[0], together.iterations[i])
        assert torch.allclose(alone.x[0], together.x[i], rtol=1e-12, atol=0)
        assert float(together.residual[i]) <= 1e-4


@pytest.mark.parametrize("power", [-120, -60, 60, 120])
def test_cg_does_not_depend_on_the_unit(power):
    """Bit by bit, though the squares of such numbers leave single precision, in b and in the operator, start or not."""
    matrix, unit = spd(2, 10).float(), 2.0**power
    b, x = torch.randn(2, 2, 10, generator=torch.Generator().manual_seed(1))

    def apply(x):
        return torch.einsum("nij,nj->ni", matrix, x)

    want, begun = cg(apply, b, tol=1e-5), cg(apply, b, x, tol=1e-5)
    assert torch.equal(cg(apply, unit * b, tol=1e-5).x, unit * want.x)
    assert torch.equal(cg(apply, unit * b, unit * x, tol=1e-5).x, unit * begun.x)
    if abs(power) == 60:
        assert torch.equal(cg(lambda x: unit * apply(x), unit * b, tol=1e-5).x, want.x)


@pytest.mark.parametrize("wrong", [torch.nan, torch.inf])
def test_cg_marks_what_is_not_finite(wrong):
    matrix, b = torch.stack([torch.eye(3), wrong * torch.eye(3), torch.eye(3)]), torch.ones(3, 3)
    b[2, 1] = wrong
    result = cg(lambda x: torch.einsum("nij,nj->ni", matrix, x), b)
    assert torch.equal(result.x[0], b[0]) and bool(result.x[1:].isnan().all())
    assert torch.isfinite(result.residual).tolist() == [True, False, False]


def test_cg_of_zero_is_zero():
    assert not cg(lambda x: 2 * x, torch.zeros(2, 3)).x.any()


# --- kernel and grids ----------------------------------------------------------------------------------------------------


def test_ddim_variance_identity():
    # with x0 and epsilon exact, one step from t to s keeps the marginal: Var[x_s] = alpha_s^2 Var[x0] + sigma_s^2
    schedule = fewstep.VariancePreserving()
    t, s = torch.tensor(0.8).double(), torch.tensor(0.3).double()
    n = 200_000
    noise = Noise([0], DOUBLE)
    x0, z = noise.randn(n), noise.randn(n)
    alpha, sigma = schedule(s)
    for eta in (0.0, 0.5, 1.0):
        x_s = renoise(schedule, s, x0, z, ddim_std(schedule, t, s, eta), noise)
        assert abs(float(x_s.var() / (alpha**2 + sigma**2)) - 1) < 5 * (2 / n) ** 0.5


def test_eta_one_is_the_exact_bridge():
    # the bridge q(x_s | x_t, x0) from Bayes' rule on x_s = alpha_s x0 + ..., x_t = (alpha_t / alpha_s) x_s + ...
    schedule = fewstep.VariancePreserving()
    t, s = torch.tensor(0.6).double(), torch.tensor(0.4).double()
    (at, st), (a, sg) = schedule(t), schedule(s)
    step = at / a
    step_var = st**2 - step**2 * sg**2
    precision = 1 / sg**2 + step**2 / step_var
    assert torch.allclose(ddim_std(schedule, t, s, 1.0) ** 2, 1 / precision, rtol=1e-9)


def test_the_published_kernel_has_the_noise_of_one_step_of_the_table():
    schedule, eta = fewstep.Tabulated.linear(), 0.8
    a = torch.tensor(schedule.alphas_cumprod, dtype=DOUBLE)
    variance = eta**2 * (1 - a[299]) / (1 - a[499]) * (1 - a[499] / a[498])
    found = one_step_noise(schedule, *torch.tensor([0.5, 0.3], dtype=DOUBLE), eta)
    want = (1 - a[299] - variance).sqrt(), (variance * (2 - a[299])).sqrt()
    torch.testing.assert_close(found, want, rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", GRIDS)
def test_grids_fall_from_one_to_zero(name):
    for schedule in (fewstep.VariancePreserving(), fewstep.EDM(), fewstep.Tabulated.linear()):
        times = GRIDS[name](schedule, 7)
        assert len(times) == 8 and times.dtype == DOUBLE
        assert abs(float(times[0]) - 1) < 1e-9 and float(times[-1]) == 0 and bool((times.diff() < 0).all())


@pytest.mark.parametrize("name", GRIDS)
@pytest.mark.parametrize("steps", [1, 6, 200])
def test_grids_fall_strictly_where_no_ratio_is_small(name, steps):
    """The least ratio is above 0.01, or meets it: its time is above 0 all the same, which is a step of its own."""
    for schedule in (fewstep.VarianceExploding(), fewstep.EDM(sigma_min=0.02), fewstep.EDM(sigma_min=0.5)):
        times = GRIDS[name](schedule, steps)
        assert len(times) == steps + 1 and abs(float(times[0]) - 1) < 1e-9 and float(times[-1]) == 0
        assert bool((times.diff() < 0).all())


@pytest.mark.parametrize(
    ("name", "even"),
    [("log_snr", torch.log), ("edm", lambda r: r ** (1 / 7)), ("arctan", lambda r: torch.atan(2 * r))],
)
def test_grids_are_even_in_what_they_are_named_after(name, even):
    schedule = fewstep.EDM()
    ratios = schedule.ratio(GRIDS[name](schedule, 6)[:-1])
    torch.testing.assert_close(ratios[[0, -1]], torch.tensor([80, 0.01], dtype=DOUBLE))
    steps = even(ratios).diff()
    torch.testing.assert_close(steps, steps.mean().expand(5))


def test_the_square_roots_of_the_quadratic_grid_are_even():
    times = GRIDS["quadratic"](fewstep.EDM(), 4)
    torch.testing.assert_close(times, torch.tensor([16, 9, 4, 1, 0], dtype=DOUBLE) / 16)


# --- samples -------------------------------------------------------------------------------------------------------------


def make_samples(k=9):
    x = torch.arange(k, dtype=DOUBLE).reshape(k, 1, 1).expand(k, 2, 3).contiguous()
    return Samples(x, Counts(4, 1, 2), 0.5, "DPS()", (1, 2))


def test_samples_statistics():
    s = make_samples()
    assert torch.equal(s.mean, torch.full((2, 3), 4.0).double())
    assert torch.allclose(s.std, torch.full((2, 3), math.sqrt(7.5)).double())
    low, high = s.interval(0.8)
    assert torch.allclose(low, torch.zeros_like(low)) and torch.allclose(high, torch.full_like(high, 8.0))
    low, high = s.interval(0.4)
    assert torch.allclose(low, torch.full_like(low, 2.0)) and torch.allclose(high, torch.full_like(high, 6.0))


def test_intervals_cover_a_fresh_draw_as_often_as_they_say():
    g = torch.Generator().manual_seed(0)
    x, fresh = torch.randn(19, 40_000, generator=g), torch.randn(40_000, generator=g)
    low, high = Samples(x[:, None], Counts(), 0.0, "", (0,)).interval(0.8)
    covered = ((fresh >= low[0]) & (fresh <= high[0])).double().mean()
    assert abs(float(covered) - 0.8) < 5 * (0.16 / 40_000) ** 0.5


def test_one_sample_has_no_spread():
    with pytest.raises(ValueError, match="at least 2"):
        _ = make_samples(1).std
    with pytest.raises(ValueError, match="level"):
        make_samples().interval(1.5)


def test_samples_save_and_load(tmp_path):
    s = make_samples()
    s.save(tmp_path)
    back = Samples.load(tmp_path)
    assert torch.equal(back.x, s.x) and back.counts == s.counts and back.seeds == s.seeds and back.method == s.method
    (tmp_path / "samples.safetensors").write_bytes(b"not a file of ours")
    with pytest.raises(ValueError, match="not a file of samples"):
        Samples.load(tmp_path)


def test_samples_are_read_from_their_folder_or_file(tmp_path):
    path = make_samples().save(tmp_path / "o")
    assert torch.equal(Samples.load(path).x, Samples.load(str(tmp_path / "o")).x)
    for wrong in (tmp_path / "nope", tmp_path, tmp_path / "o" / "other.safetensors"):
        with pytest.raises(ValueError, match="no samples in"):
            Samples.load(wrong)


def test_samples_and_problems_are_shown_in_one_line():
    samples = Samples(torch.zeros(16, 1, 3, 8, 8), Counts(30), 0.5, "DiffPIR(steps=30, eta=0.0)", (0,))
    assert repr(samples) == "Samples(K=16, B=1, event=(3, 8, 8), method=DiffPIR, nfe=30)"
    prior = mixture_problem().problem.prior
    problem = Posterior(prior, FlatLikelihood((2,), 5), {"label": torch.tensor([7])})
    shown = "Posterior(prior=MixturePrior, likelihood=FlatLikelihood(batch=5, event=(2,)), cond=['label'])"
    assert repr(problem) == shown


# --- problems ------------------------------------------------------------------------------------------------------------


class Unscheduled(fewstep.Denoiser):
    """A denoiser that forgot its schedule."""

    def forward(self, x_t, t, **cond):
        return x_t


def test_what_is_no_problem_is_refused_in_words():
    prior, flat = mixture_problem().problem.prior, FlatLikelihood((2,))
    for wrong in ("natural", torch.nn.Identity(), flat, None):
        with pytest.raises(TypeError, match=rf"the prior must be a Denoiser, got {type(wrong).__name__} .*load_prior"):
            Posterior(wrong, flat)
    with pytest.raises(TypeError, match="got Unscheduled without `schedule`"):
        Posterior(Unscheduled(), flat)
    for wrong in (torch.zeros(1, 2), prior, None):
        with pytest.raises(
            TypeError, match=rf"got {type(wrong).__name__} without `provides`; fewstep.image_likelihood"
        ):
            Posterior(prior, wrong)
    with pytest.raises(TypeError, match=r'\{"label": torch.tensor\(\[7\]\)\} say, got 7'):
        Posterior(prior, flat, cond=7)


class Own(fewstep.Denoiser):
    """A denoiser of somebody's own network."""

    def __init__(self, network):
        super().__init__()
        self.network, self.schedule, self.event_shape = network, fewstep.VariancePreserving(), (2,)

    def forward(self, x_t, t, **cond):
        return self.network(x_t)


@pytest.mark.parametrize(
    "part",
    [
        torch.nn.Dropout(0.5),
        torch.nn.AlphaDropout(0.1),
        torch.nn.BatchNorm1d(2),
        torch.nn.InstanceNorm1d(2, track_running_stats=True),
    ],
)
def test_a_prior_whose_training_mode_matters_is_refused_in_it(part):
    prior = Own(torch.nn.Sequential(torch.nn.Linear(2, 2), part.train()))
    message = rf"^{type(part).__name__} of the prior is in training mode, .*prior\.eval\(\)"
    with pytest.raises(ValueError, match=message):
        Posterior(prior, FlatLikelihood((2,)))
    with pytest.raises(ValueError, match=message):
        Posterior(Rescheduled(prior, fewstep.Flow()), FlatLikelihood((2,)))
    Posterior(prior.eval(), FlatLikelihood((2,)))


def test_a_prior_whose_training_mode_does_not_matter_is_taken_in_it():
    parts = (torch.nn.Linear(2, 2), torch.nn.Dropout(0.0), torch.nn.BatchNorm1d(2, track_running_stats=False))
    prior = Own(torch.nn.Sequential(*parts)).train()
    assert prior.training and Posterior(prior, FlatLikelihood((2,))).prior is prior
    frozen = Own(torch.nn.Dropout(0.5).eval())  # itself in training mode, its part is not
    assert frozen.training and Posterior(frozen, FlatLikelihood((2,))).prior is frozen


@pytest.mark.parametrize("name", ["mmps", "dps", "pigdm"])
def test_methods_that_take_gradients_say_so_in_inference_mode(name):
    problem, sampler = gaussian_problem().problem, fewstep.get(name)(steps=2)
    with torch.inference_mode(), pytest.raises(RuntimeError, match=r"^gradients are .*use torch\.no_grad\(\)$"):
        sampler(problem)
    with torch.no_grad():
        assert bool(sampler(problem).x.isfinite().all())


def test_scores_of_likelihoods_say_so_in_inference_mode():
    with torch.inference_mode(), pytest.raises(RuntimeError, match=r"use torch\.no_grad\(\)$"):
        FlatLikelihood((2,)).score(torch.zeros(1, 2))


def test_noise_is_drawn_on_the_cpu_whatever_device_is_the_default():
    seeds, sizes = [0, 1], (3, 500)
    first, second = fewstep.Noise(seeds), fewstep.Noise(seeds)
    want = [first.randn(n) for n in sizes], first.rand(2)
    with torch.device("meta"):
        found = [second.randn(n) for n in sizes], second.rand(2)
    torch.testing.assert_close(found, want, rtol=0, atol=0)


def test_neighbouring_seeds_share_no_sample():
    rows = Noise.spawn((5, 6, 7), range(3)).randn(4)
    assert len({tuple(row) for row in rows.tolist()}) == 9
