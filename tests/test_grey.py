"""The luma of a colour image: adjoint, spectrum, prox and draw against dense algebra."""

from __future__ import annotations

import pytest
import torch

from fewstep.core.batch import item_dot
from fewstep.core.likelihood import GaussianLikelihood, Likelihood
from fewstep.core.noise import Noise
from fewstep.operators.grey import GreyLikelihood, LumaOperator, in_colour, luma, spread
from fewstep.operators.words import get_operator

WORDS = [("denoise", {}), ("deblur-gaussian", {"width": 1.0}), ("sr", {"factor": 2}), ("inpaint-random", {"rate": 0.5})]


def made(word, fields, seed=0):
    x = torch.rand(1, 1, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    operator = get_operator(word)(**fields)
    return operator.likelihood(operator.simulate(x, 0.1), sigma=0.1)


def test_luma_and_its_adjoint():
    x, g = torch.randn(2, 3, 4, 5, dtype=torch.float64), torch.randn(2, 1, 4, 5, dtype=torch.float64)
    assert torch.allclose(item_dot(luma(x), g), item_dot(x, spread(g)))
    assert torch.allclose(luma(torch.ones(1, 3, 2, 2)), torch.ones(1, 1, 2, 2))


@pytest.mark.parametrize(("word", "fields"), WORDS)
def test_closed_form_agrees_with_iteration(word, fields):
    grey = made(word, fields)
    colour = in_colour(grey)
    plain = GaussianLikelihood(grey.y, LumaOperator(grey.physics, None), grey.sigma, tol=1e-12, max_iter=2000)
    assert "svd" in colour.provides and "svd" not in plain.provides
    assert colour.event_shape == (3, 16, 16)
    z = torch.randn(1, 3, 16, 16, dtype=torch.float64)
    assert torch.allclose(colour.prox(z, 0.3), plain.prox(z, 0.3), atol=1e-8)
    wrapped = GreyLikelihood(grey)
    assert torch.allclose(wrapped.prox(z, 0.3), plain.prox(z, 0.3), atol=1e-8)
    assert torch.allclose(wrapped.log_prob(z), colour.log_prob(z))
    assert torch.allclose(wrapped.score(z), colour.score(z))


def test_what_is_near_to_a_grey_blur_is_near_to_that_of_its_luma():
    x = torch.rand(1, 1, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    operator = get_operator("deblur-gaussian")(width=1.0, boundary="valid")
    grey = operator.likelihood(operator.simulate(x, 0.02), sigma=0.02)
    colour = in_colour(grey)
    bare = GaussianLikelihood(grey.y, LumaOperator(grey.physics, None), grey.sigma, tol=grey.tol)
    z = torch.randn(1, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(colour.prox(z, 3.0), bare.prox(z, 3.0), rtol=0, atol=1e-3)
    assert bare.circulant is None and colour.counts.operator < bare.counts.operator


def test_draws_have_the_right_moments():
    colour, wrapped = in_colour(made("denoise", {})), GreyLikelihood(made("denoise", {}))
    k = 4000
    z = torch.zeros(k, 3, 16, 16, dtype=torch.float64)
    one, two = (c.expand(k).draw(z, 0.4, Noise(range(k), torch.float64)) for c in (colour, wrapped))
    assert torch.allclose(one.mean(0), two.mean(0), atol=6 * 0.4 * (2 / k) ** 0.5)
    for c in range(3):
        assert one[:, c].var(0).mean() == pytest.approx(float(two[:, c].var(0).mean()), rel=0.02)
    assert luma(one).var(0).mean() == pytest.approx(float(luma(two).var(0).mean()), rel=0.02)


def test_what_it_offers():
    def offers(likelihood: Likelihood):
        return likelihood.provides

    assert offers(in_colour(made("denoise", {}))) >= {"gaussian", "svd", "prox", "draw", "gradient"}
    operator = get_operator("jpeg")(step_std=0.0)
    jpeg = in_colour(operator.likelihood(operator.simulate(torch.rand(1, 1, 16, 16))))
    assert offers(jpeg) == {"gradient", "prox"} and jpeg.start().shape == (1, 3, 16, 16)
    with pytest.raises(ValueError, match="one channel"):
        GreyLikelihood(jpeg)
