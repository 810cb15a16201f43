"""The network in windows: the same function where it fits, no seams, the exact gradient, bounded windows."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from fewstep.core.likelihood import FlatLikelihood
from fewstep.core.problem import Posterior
from fewstep.priors.windowed import Windowed, partition, starts
from pictures import ConvPrior, PixelPrior


@pytest.mark.parametrize("length", [5, 16, 17, 20, 33, 100, 101])
def test_weights_are_a_smooth_partition_of_unity(length):
    table = partition(length, 16, 6)
    first = starts(length, 16, 6)
    assert first[0] == 0 and first[-1] + min(16, length) == length
    assert all(0 < b - a <= 10 for a, b in pairwise(first))
    assert torch.allclose(table.sum(0), torch.ones(length, dtype=torch.float64))
    assert table.min() >= 0
    if len(first) > 1:
        assert table.diff(dim=1).abs().max() < 0.5


def test_passes_through_where_it_fits():
    prior, x, t = ConvPrior(), torch.randn(2, 3, 16, 12), torch.tensor(0.3)
    assert torch.equal(Windowed(prior, 16, 4)(x, t), prior(x, t))


def test_a_pointwise_prior_does_not_notice():
    prior, x, t = PixelPrior(), torch.randn(2, 3, 50, 41, dtype=torch.float64), torch.tensor([0.2, 0.8])
    assert torch.allclose(Windowed(prior, 16, 4, 3)(x, t), prior(x, t), atol=1e-14)


def test_interior_agrees_and_windows_are_bounded():
    prior, x, t = ConvPrior(1), torch.randn(1, 3, 40, 40), torch.tensor(0.3)
    whole = prior(x, t)
    prior.seen.clear()
    out = Windowed(prior, 16, 8, 2)(x, t)
    assert all(shape[0] <= 2 and shape[-2:] == (16, 16) for shape in prior.seen)
    assert (out - whole).abs().max() < 0.05 * whole.abs().max()  # a window's border pixel enters with weight 0.01
    assert torch.allclose(out[..., 2:6, 2:6], whole[..., 2:6, 2:6], atol=1e-6)


def test_an_item_does_not_depend_on_its_neighbours():
    prior, x, t = ConvPrior().double(), torch.randn(3, 3, 40, 24, dtype=torch.float64), torch.tensor([0.1, 0.5, 0.9])
    windowed = Windowed(prior, 16, 4, 4)
    together = windowed(x, t)
    for i in range(3):
        assert torch.allclose(windowed(x[i : i + 1], t[i : i + 1]), together[i : i + 1], atol=1e-12)


def test_gradient_is_that_of_the_sum():
    windowed = Windowed(ConvPrior(1).double(), 6, 2, 2)
    x = torch.randn(2, 3, 9, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda v: windowed(v, torch.tensor(0.4, dtype=torch.float64)), (x,))


def test_pullback_may_be_called_repeatedly():
    problem = Posterior(Windowed(ConvPrior(), 16, 4), FlatLikelihood((3, 40, 40)))
    _, pullback = problem.denoise_vjp(torch.randn(1, 3, 40, 40), torch.tensor(0.5))
    v = torch.randn(1, 3, 40, 40)
    assert torch.equal(pullback(v), pullback(v))


def test_refuses_what_it_cannot_do():
    with pytest.raises(ValueError, match="overlap"):
        Windowed(ConvPrior(), 16, 16)
    fixed = PixelPrior()
    fixed.event_shape = (3, 8, 8)
    with pytest.raises(ValueError, match="any image size"):
        Windowed(fixed)
