"""Samples in pairs with opposite noise: each is what it is without its partner, and two means are worth many."""

import pytest
import torch

import fewstep
from fewstep.core.noise import Antithetic, Noise
from fewstep.core.samples import Samples
from fewstep.testing.oracle import ExactDraw
from fewstep.testing.problems import gaussian_problem, mixture_problem
from fewstep.uncertainty import Calibration


def pairs(seeds=(3, 4), k=4):
    return Antithetic.spawn(seeds, range(k), torch.float64)


# ---- streams ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [3, 1000], ids=["blocks", "events"])
def test_a_pair_has_opposite_normals_and_mirrored_uniforms(size):
    mine, plain = pairs(), Noise.spawn((3, 4), range(2), torch.float64)
    for draw in (lambda n: n.randn(size), lambda n: n.randn_like(torch.zeros(len(n), size))):
        z, once = draw(mine).unflatten(0, (2, 2, 2)), draw(plain).unflatten(0, (2, 2))
        assert torch.equal(z[:, 0], once)  # (pair, of it, measurement)
        assert torch.equal(z[:, 1], -once)
    u, once = mine.rand(size).unflatten(0, (2, 2, 2)), plain.rand(size).unflatten(0, (2, 2))
    assert torch.equal(u[:, 0], once)
    assert torch.equal(u[:, 1], 1 - once)


def test_mirrored_uniforms_stay_below_one(monkeypatch):
    monkeypatch.setattr(Noise, "rand", lambda self, *shape: torch.zeros(len(self), *shape))
    u = Antithetic.spawn((0,), range(2)).rand(5)
    assert bool((u < 1).all())
    assert bool((u[1] > 0.999).all())


def test_complex_noise_is_opposite_too():
    z = Antithetic.spawn((0,), range(2)).randn_like(torch.zeros(2, 3, dtype=torch.complex64))
    assert torch.equal(z[0], -z[1])


def test_parts_and_copies_of_pairs_are_pairs():
    whole, part = pairs(), pairs().part([1, 3])  # both samples of the first pair of the second measurement
    z = part.randn(2000)
    assert torch.equal(z[0], -z[1])
    assert torch.equal(z[0], whole.randn(2000)[1])
    twice = pairs().expand(3).randn(4).unflatten(0, (3, 2, 2, 2))  # (copy, pair, of it, measurement)
    assert torch.equal(twice[:, :, 0], -twice[:, :, 1])
    assert len(twice[:, :, 0].flatten().unique()) == twice[:, :, 0].numel()


# ---- samplers ---------------------------------------------------------------------------------------------------------


def draws(problem, k, *, seed=0, **options):
    return ExactDraw(steps=3)(problem, k, seed=seed, antithetic=True, **options)


def test_the_mean_of_a_pair_is_the_posterior_mean_where_the_sampler_is_linear():
    exact = gaussian_problem()
    mean = exact.posterior.mean
    pair, alone = draws(exact.problem, 2), ExactDraw(steps=3)(exact.problem, 2)
    assert torch.allclose(pair.mean, mean, atol=1e-3)  # up to p(x_1) being called pure noise
    assert float((alone.mean - mean).abs().max()) > 0.05


@pytest.mark.parametrize("which", [0, 1])
def test_each_of_a_pair_has_the_law_of_a_sample(which):
    exact = mixture_problem(dim=3, batch=1)
    x = draws(exact.problem, 8000).x[which::2, 0].double()
    mean, variance = exact.posterior.mean[0], exact.posterior.cov[0].diagonal()
    assert bool(((x.mean(0) - mean).abs() < 4 * (variance / len(x)).sqrt()).all())
    spread = (x - mean).square()
    assert bool(((spread.mean(0) - variance).abs() < 4 * spread.std(0) / len(x) ** 0.5).all())


def test_chunks_do_not_matter():
    problem = gaussian_problem().problem
    whole = draws(problem, 6)
    for chunk in (1, 3, 4):
        assert torch.allclose(draws(problem, 6, chunk=chunk).x, whole.x, rtol=0, atol=1e-12)
    assert [part.first for part in ExactDraw(steps=3).stream(problem, 4, chunk=3, antithetic=True)] == [0, 3]


def test_an_odd_number_is_refused():
    with pytest.raises(ValueError, match="come in pairs: their number must be even, got 3"):
        draws(gaussian_problem().problem, 3)


@pytest.mark.parametrize("name", ["ddrm", "diffpir", "pigdm", "latino", "daps", "pnp_dm"])
def test_methods_take_pairs(name):
    problem = gaussian_problem().problem
    pair = fewstep.get(name)(steps=4)(problem, 2, antithetic=True)
    assert pair.antithetic
    assert torch.allclose(pair.x[0], fewstep.get(name)(steps=4)(problem, 1).x[0], rtol=0, atol=1e-9)
    assert not torch.allclose(pair.x[0], pair.x[1], atol=0.01)


# ---- statistics -------------------------------------------------------------------------------------------------------


def normal_pairs(rho, k, sets, seed=0):
    """Return samples of N(0, 4) for many measurements, with correlation rho within the pairs."""
    z = torch.randn(k // 2, 2, sets, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    second = rho * z[:, 0] + (1 - rho**2) ** 0.5 * z[:, 1]
    x = 2 * torch.stack([z[:, 0], second], 1).flatten(0, 1)
    return Samples(x, fewstep.core.counts.Counts(), 0.0, "test()", (0,) * sets, antithetic=True)


@pytest.mark.parametrize("rho", [-1.0, -0.8, 0.0])
@pytest.mark.parametrize("k", [4, 8])
def test_the_variance_of_pairs_is_that_of_a_sample(rho, k):
    samples = normal_pairs(rho, k, 20_000)
    found = samples.std.square()
    error = float(found.std()) / len(found) ** 0.5
    assert abs(float(found.mean()) - 4) < 4 * error
    if rho < 0:  # what would be said without the pairs in mind is refuted by the same check
        wrong = samples.x.var(0)
        assert abs(float(wrong.mean()) - 4) > 4 * float(wrong.std()) / len(wrong) ** 0.5


def test_one_pair_gives_the_part_of_the_variance_that_it_sees():
    for rho in (-1.0, -0.5, 0.0):
        found = normal_pairs(rho, 2, 20_000).std.square()
        assert abs(float(found.mean()) - 4 * (1 - rho) / 2) < 4 * float(found.std()) / len(found) ** 0.5


def test_a_sample_without_its_partner_is_left_out_of_the_standard_deviation():
    samples = normal_pairs(-0.9, 6, 5)
    part = Samples(samples.x[1:6], samples.counts, 0.0, "test()", samples.seeds, 1, antithetic=True)
    whole = Samples(samples.x[2:6], samples.counts, 0.0, "test()", samples.seeds, 2, antithetic=True)
    assert torch.equal(part.std, whole.std)
    with pytest.raises(ValueError, match="needs a pair"):
        _ = Samples(samples.x[1:3], samples.counts, 0.0, "test()", samples.seeds, 1, antithetic=True).std


@pytest.mark.parametrize(("k", "level"), [(2, 0.9), (4, 0.6), (16, 13 / 17), (16, 0.9)])
def test_intervals_of_mirror_images_cover_as_their_docstring_says(k, level):
    samples, truth = normal_pairs(-1.0, k, 40_000), 2 * torch.randn(40_000, generator=torch.Generator().manual_seed(9))
    low, high = samples.interval(level)
    covered = float(((truth >= low) & (truth <= high)).double().mean())
    fits = (k + 1) * (1 - level) / 2 > 0.99  # else the ends are the extremes
    promised = 1 - (1 - level) * (k + 1) / (k + 2) if fits else k / (k + 2)
    assert abs(covered - promised) < 4 * (promised * (1 - promised) / 40_000) ** 0.5
    assert promised > min(level, (k - 1) / (k + 1))


# ---- what is kept of them ---------------------------------------------------------------------------------------------


def test_files_say_that_samples_are_antithetic(tmp_path):
    samples = draws(gaussian_problem().problem, 2)
    samples.save(tmp_path)
    assert Samples.load(tmp_path).antithetic
    parts = ExactDraw(steps=3).stream(gaussian_problem().problem, 4, chunk=1, antithetic=True)
    assert Samples.concatenate(list(parts)).antithetic


def test_calibrations_are_of_antithetic_samples_or_of_others():
    sets = [normal_pairs(-1.0, 4, 1, seed) for seed in range(20)]
    truths = [2 * torch.randn(1, generator=torch.Generator().manual_seed(50 + seed)) for seed in range(20)]
    found = Calibration.fit(zip(sets, truths, strict=True), 0.8)
    assert found.antithetic
    assert Calibration.from_json(found.to_json()) == found
    found.apply(sets[0])
    plain = Samples(sets[0].x, sets[0].counts, 0.0, "test()", (0,))
    with pytest.raises(ValueError, match=r"calibrated for 4 antithetic samples per image, got 4$"):
        found.apply(plain)
    with pytest.raises(ValueError, match="the same number of samples, got 4, 4 antithetic"):
        Calibration.fit(zip([*sets, plain], [*truths, truths[0]], strict=True), 0.8)


def test_calibrations_of_before_are_of_independent_samples():
    values = Calibration(0.9, 1.2, 16, 32).to_json()
    del values["antithetic"]
    assert not Calibration.from_json(values).antithetic
    with pytest.raises(ValueError, match="antithetic must be true or false, got 1"):
        Calibration.from_json({**values, "antithetic": 1})
