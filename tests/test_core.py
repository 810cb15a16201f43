"""Denoiser conversions, noise streams, conjugate gradients, kernels, samples: identities."""

import math

import pytest
import torch

import fewstep
from fewstep.core.batch import like
from fewstep.core.denoiser import PARAMETRISATIONS, Rescheduled
from fewstep.core.grid import GRIDS
from fewstep.core.kernel import ddim_std, renoise
from fewstep.core.likelihood import Counts
from fewstep.core.linalg import cg
from fewstep.core.noise import Noise, Streams
from fewstep.core.samples import Samples
from fewstep.testing.problems import mixture_problem

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


@pytest.mark.parametrize("name", GRIDS)
def test_grids_fall_from_one_to_zero(name):
    for schedule in (fewstep.VariancePreserving(), fewstep.EDM(), fewstep.Tabulated.linear()):
        times = GRIDS[name](schedule, 7)
        assert len(times) == 8 and times.dtype == DOUBLE
        assert abs(float(times[0]) - 1) < 1e-9 and float(times[-1]) == 0 and bool((times.diff() < 0).all())


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
