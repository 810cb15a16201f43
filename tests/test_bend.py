"""Heavy tails bent to those of a normal law: the change of variables, its fit to draws, and what chains find in it."""

import math

import pytest
import torch

import fewstep
from fewstep.core.noise import Streams
from fewstep.densities.bend import bend_of, bent, straight
from fewstep.densities.teachers.dis import DIS
from fewstep.densities.user import as_target
from fewstep.densities.whitened import Whitened


def jacobian(function, y):
    return torch.stack([torch.autograd.functional.jacobian(lambda v: function(v[None])[0], v) for v in y])


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize(
    "support", [None, (torch.tensor([0.0, -math.inf, -1.0]), torch.tensor([math.inf, math.inf, 1.0]))]
)
def test_density_and_score_follow_the_change_of_variables(dense, support):
    target = as_target(
        lambda x: -(1 + x.square()).log().sum(-1) - x[:, 0] * x[:, 1] / 10, 3, support=support, check=False
    )
    generator = torch.Generator().manual_seed(0)
    scale = torch.rand(3, generator=generator) + 0.5
    scale = torch.tril(torch.rand(3, 3, generator=generator)) + torch.diag(scale) if dense else scale
    whitened = Whitened(target, torch.randn(3, generator=generator) / 10, scale, torch.tensor([0.7, 0.0, 1.5]))
    y = torch.randn(5, 3, generator=generator, dtype=torch.float64)
    x = whitened.to_x(y)
    assert torch.allclose(whitened.to_y(x), y, atol=1e-9)
    log_slope = torch.linalg.slogdet(jacobian(whitened.to_x, y))[1]
    assert torch.allclose(whitened.log_prob(y), target.log_prob(x) + log_slope, atol=1e-9)
    score = torch.autograd.functional.jacobian(lambda v: whitened.log_prob(v).sum(), y)
    assert torch.allclose(whitened.score(y), score, atol=1e-7)
    flat = Whitened(target, whitened.shift, whitened.scale)
    assert not torch.allclose(flat.log_prob(y), whitened.log_prob(y), atol=0.1)


def test_bend_is_found_from_draws_and_only_where_tails_are_heavy():
    n = 100_000
    z = Streams(0, range(n), torch.float64).randn(4)
    sign = torch.where(torch.arange(n) % 2 == 0, 1.0, -1.0)
    x = torch.stack(
        [2 + 3 * torch.sinh(1.2 * z[:, 0]) / 1.2, 1 + 5 * z[:, 1], 4 * sign + 0.1 * z[:, 2], z[:, 3].sinh()], 1
    )
    shift, scale, bend = bend_of(x)
    assert bend[[0, 3]].tolist() == pytest.approx([1.2, 1.0], abs=0.03) and bend[[1, 2]].tolist() == [0.0, 0.0]
    assert shift.tolist() == pytest.approx([2, 1, 0, 0], abs=0.06)
    assert scale.tolist() == pytest.approx([3, 5, 4, 1], rel=0.03)
    y = straight((x - shift) / scale, bend)
    assert torch.allclose(bent(y, bend) * scale + shift, x)
    assert (y.std(0) - 1).abs().max() < 0.02


def test_coordinates_with_heavy_tails_are_centred_by_their_median_and_others_by_their_mean():
    n = 20_000
    z = Streams(1, range(n), torch.float64).randn(3)
    skewed = (z[:, 2] / 3).exp().clamp_max(1.3)  # light tails, its mean is not its median
    x = torch.stack([7 + (1.5 * z[:, 0]).exp() * z[:, 1], z[:, 0], skewed], 1)
    before = Whitened(fewstep.target("funnel", dim=3), scale=torch.tensor([2.0, 3.0, 0.5]))
    after = before.refitted(before.to_y(x))
    assert abs(float(after.shift[0]) - 7) < 0.015 < abs(float(x[:, 0].mean()) - 7)
    torch.testing.assert_close(after.shift[1:], x[:, 1:].mean(0))
    torch.testing.assert_close(after.scale, x.std(0))


def test_a_sampler_keeps_its_bend(tmp_path):
    target = fewstep.target("funnel", dim=3)
    bend = torch.tensor([0.0, 1.0, 2.0], dtype=torch.float64)
    whitened = Whitened(target, bend=bend)
    DIS().sampler(whitened, DIS().control(whitened)).save(tmp_path / "s")
    loaded = fewstep.load_density_sampler(tmp_path / "s", target)
    assert torch.equal(loaded.whitened.bend, bend)


@pytest.mark.parametrize("bend", [torch.ones(3), torch.tensor([0.0, -1.0]), torch.tensor([0.0, math.nan])])
def test_impossible_bends_are_refused(bend):
    with pytest.raises(ValueError, match="bend must be"):
        Whitened(fewstep.target("nine_modes"), bend=bend)
