"""Photon noise: the law, the prox pixel by pixel and for general operators, the continuation below the floor."""

from __future__ import annotations

import pytest
import torch

from fewstep.core.problem import Posterior
from fewstep.core.together import noise_level
from fewstep.operators.image import deepinv_physics, from_unit
from fewstep.operators.matrix import MatrixOperator
from fewstep.operators.poisson import PoissonLikelihood, bracketed_newton
from fewstep.priors.unet import UNetConfig, UNetDenoiser
from fewstep.testing.likelihood import check_likelihood, check_prox
from fewstep.unfolded.decoders import PriorDecoder
from fewstep.unfolded.network import UnfoldedConfig, UnfoldedNetwork
from fewstep.unfolded.sampler import Unfolded

P = deepinv_physics()
F64 = torch.float64


def rand(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def counts(u, physics, gain, seed=1):
    return gain * torch.poisson(physics.A(u) / gain, generator=torch.Generator().manual_seed(seed))


def mask(n=1):
    return P.Inpainting(img_size=(1, 6, 7), mask=(rand(n, 1, 6, 7, seed=4) > 0.3).double())


def blur(padding="circular"):
    kernel = rand(1, 1, 3, 3)
    return P.Blur(filter=kernel / kernel.sum(), padding=padding)


OPERATORS = {
    "identity": P.Denoising,
    "mask": mask,
    "masks per item": lambda: mask(2),
    "blur": blur,
    "reflect": lambda: blur("reflect"),
}


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize(("gain", "sigma"), [(1 / 3, 0.0), (1 / 300, 0.0), (1 / 30, 0.05)])
def test_the_contract(name, gain, sigma):
    physics = OPERATORS[name]()
    y = counts(rand(2, 1, 6, 7), physics, gain)
    assert sigma or float(y.min()) == 0 or gain < 0.1  # no photons in some pixels at few photons
    likelihood = PoissonLikelihood(y, physics, gain, sigma=sigma)
    assert likelihood.provides == {"gradient", "prox"}
    assert (likelihood.diagonal is None) == (name in {"blur", "reflect"})

    def alone(b):
        own = P.Inpainting(img_size=(1, 6, 7), mask=physics.mask[b : b + 1]) if name == "masks per item" else physics
        return PoissonLikelihood(y[b : b + 1], own, gain, sigma=sigma)

    check_likelihood(likelihood, alone=alone, alone_tol=1e-8)
    with pytest.raises(NotImplementedError, match="no exact draw"):
        likelihood.draw(y, 1.0, None)


def test_log_prob_is_the_law():
    """The probabilities of all counts sum to one, and are those of torch."""
    x = torch.tensor([[[[0.3]]]], dtype=F64)
    gain = 0.25
    rate = (x + 1) / 2 / gain
    n = torch.arange(60, dtype=F64)
    logs = torch.stack([PoissonLikelihood(gain * k.reshape(1, 1, 1, 1), P.Denoising(), gain).log_prob(x)[0] for k in n])
    assert torch.allclose(logs, torch.distributions.Poisson(rate.flatten()).log_prob(n), atol=1e-10)
    assert float(logs.exp().sum()) == pytest.approx(1)


@pytest.mark.parametrize("rho", [0.01, 0.3, 5.0])
def test_prox_of_the_identity_against_the_quadratic_formula(rho):
    """c - n c / r + (x - z) / rho^2 = 0 with r = c x + d is a quadratic in r."""
    gain = 1 / 50
    y = counts(rand(3, 2, 8, 8), P.Denoising(), gain) + gain
    z = 3 * rand(3, 2, 8, 8, seed=2) - 1.5
    x = PoissonLikelihood(y, P.Denoising(), gain).prox(z, rho)
    c, n = 0.5 / gain, y / gain
    b = c**2 * rho**2 - c - c * z
    root = (b**2 + 4 * n * c**2 * rho**2).sqrt()
    r = torch.where(b > 0, 2 * n * c**2 * rho**2 / (b + root).clamp_min(1e-300), (root - b) / 2)
    above = r > 0.011  # the likelihood is continued below a hundredth of a photon
    assert float(above.double().mean()) > 0.9
    assert float((x - (r - c) / c)[above].abs().max()) < 1e-10


def test_general_operators_agree_with_pixels():
    """The Newton solver for any operator, on one that is diagonal but does not say so."""
    y = counts(rand(2, 12), MatrixOperator(torch.eye(12, dtype=F64)), 1 / 40)
    general = PoissonLikelihood(y, MatrixOperator(torch.eye(12, dtype=F64)), 1 / 40, background=0.1)
    assert general.diagonal is None
    shaped = PoissonLikelihood(y.reshape(2, 1, 3, 4), P.Denoising(), 1 / 40, background=0.1)
    z = 4 * rand(2, 12, seed=3) - 2
    for rho in (0.05, 1.0, torch.tensor([0.2, 3.0], dtype=F64)):
        assert torch.allclose(general.prox(z, rho), shaped.prox(z.reshape(2, 1, 3, 4), rho).flatten(1), atol=1e-8)


def test_mean_and_variance_of_the_shifted_model():
    """Poisson-Gaussian: the score vanishes in expectation at the truth, and its variance is the information."""
    gain, sigma, n = 0.02, 0.05, 40000
    g = torch.Generator().manual_seed(0)
    u = torch.full((n, 1, 1, 1), 0.4, dtype=F64)
    y = gain * torch.poisson(u / gain, generator=g) + sigma * torch.randn(u.shape, generator=g, dtype=F64)
    score = PoissonLikelihood(y, P.Denoising(), gain, sigma=sigma).score(from_unit(u)).flatten()
    information = 0.25 / (gain * 0.4 + sigma**2)
    assert float(score.mean().abs()) < 5 * (information / n) ** 0.5
    assert float(score.var()) == pytest.approx(information, rel=0.05)


def test_it_tends_to_the_gaussian_with_many_photons():
    gain = 1e-6
    u = 0.3 + 0.4 * rand(1, 1, 4, 4)
    y = counts(u, P.Denoising(), gain)
    likelihood = PoissonLikelihood(y, P.Denoising(), gain)
    x = likelihood.prox(from_unit(u) + 0.01, 0.005)
    variance = 4 * gain * y
    truth = (from_unit(y) / variance + (from_unit(u) + 0.01) / 0.005**2) / (1 / variance + 1 / 0.005**2)
    assert float((x - truth).abs().max()) < 1e-4


def test_it_is_finite_smooth_and_convex_everywhere():
    likelihood = PoissonLikelihood(torch.full((400, 1, 1, 1), 0.2, dtype=F64), P.Denoising(), 0.1)
    x = torch.linspace(-3, 1, 400, dtype=F64).reshape(-1, 1, 1, 1)
    log, score = likelihood.log_prob(x), likelihood.score(x).flatten()
    assert bool(torch.isfinite(log).all() and torch.isfinite(score).all())
    assert bool((score.diff() <= 1e-9).all())
    check_prox(likelihood)


@pytest.mark.parametrize("name", ["identity", "blur"])
def test_without_photons_the_image_is_black_and_not_below(name):
    """-log p = r alone would take the prox as far below black as rho lets it: by rho^2 / (2 gain), here 25."""
    y = torch.zeros(1, 1, 6, 7, dtype=F64)
    likelihood = PoissonLikelihood(y, OPERATORS[name](), 1 / 50)
    x = likelihood.prox(rand(1, 1, 6, 7) - 1, 1.0)
    assert float((likelihood.rate(x)).abs().max()) < 0.01
    black = torch.full_like(x, -1.0)
    assert float(likelihood.log_prob(black)) > float(likelihood.log_prob(black - 0.1))
    assert float(likelihood.score(black - 0.1).min()) > 0
    check_prox(likelihood)


def test_its_noise_level_is_what_it_does_to_the_image():
    """In units of x, whatever the read-out noise; an image without a photon is told to be noisy, not certain."""
    gain, read_out, u = 0.02, 0.03, torch.full((1, 1, 200, 200), 0.4, dtype=F64)
    y = counts(u, P.Denoising(), gain)
    for sigma in (0.0, read_out):
        noisy = y + sigma * torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=F64)
        level = float(noise_level(PoissonLikelihood(noisy.clamp_min(0), P.Denoising(), gain, sigma=sigma)))
        assert level == pytest.approx(2 * float((noisy - u).std()), rel=0.04)
    assert float(noise_level(PoissonLikelihood(0 * y, P.Denoising(), gain))) == pytest.approx(2 * gain)


def test_trained_samplers_take_dark_photographs():
    """Many pixels have no photon, and there is no read-out noise whose logarithm a network could be told."""
    prior = UNetDenoiser(UNetConfig(widths=(8, 8), layers=1, groups=4)).eval()
    u = 0.02 * rand(1, 3, 16, 16).float()
    y = counts(u, P.Denoising(), 0.02)
    assert float((y == 0).double().mean()) > 0.3
    sampler = Unfolded(UnfoldedNetwork(UnfoldedConfig(), PriorDecoder()).eval(), steps=2)
    x = sampler(Posterior(prior, PoissonLikelihood(y, P.Denoising(), 0.02)), num_samples=2, seed=0).x
    assert float(x.abs().max()) < 3


def test_background_scale_and_single_precision():
    y = torch.full((2, 1, 4, 4), 0.5)
    plain = PoissonLikelihood(y, P.Denoising(), 0.01, background=0.2)
    assert torch.allclose(plain.rate(torch.zeros(2, 1, 4, 4)), torch.tensor(70.0))
    direct = PoissonLikelihood(y, P.Denoising(), 0.01, unit=False)
    assert torch.allclose(direct.rate(torch.full((2, 1, 4, 4), 0.3)), torch.tensor(30.0))
    assert torch.allclose(plain.start(), torch.full((2, 1, 4, 4), -0.4), atol=1e-5)
    for likelihood in (
        plain,
        PoissonLikelihood(y, P.Blur(filter=torch.ones(1, 1, 3, 3) / 9, padding="circular"), 1e-3),
    ):
        check_likelihood(likelihood, tol=2e-3, alone_tol=1e-5)
    assert PoissonLikelihood(y, P.Denoising(), torch.tensor([0.1, 0.2])).expand(3).gain.tolist() == pytest.approx(
        [0.1, 0.2] * 3
    )


def test_bracketed_newton():
    target = torch.tensor([1e-6, 0.5, 40.0, 3e4], dtype=F64)
    root = bracketed_newton(
        lambda x: (1 - target / x, target / x**2), torch.full((4,), 1e-9, dtype=F64), 1e5 + 0 * target
    )
    assert torch.allclose(root, target, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gain": 0.0}, "gain must be positive"),
        ({"gain": torch.ones(3)}, "one per measurement"),
        ({"sigma": -0.1}, "must not be negative"),
        ({"background": -0.1}, "must not be negative"),
        ({"y": -torch.ones(2, 1, 6, 7)}, "cannot be negative"),
        ({"y": torch.full((2, 1, 6, 7), float("inf"))}, "NaN or infinite"),
        ({"y": torch.ones(2, 1, 6, 8)}, "does not fit"),
    ],
)
def test_bad_input_is_named_in_one_line(change, message):
    given = {"y": torch.ones(2, 1, 6, 7), "gain": 0.1} | change
    y, gain = given.pop("y"), given.pop("gain")
    with pytest.raises(ValueError, match=message) as error:
        PoissonLikelihood(y, mask().float(), gain, **given)
    assert "\n" not in str(error.value)
