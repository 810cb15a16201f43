"""The balance of a student's modes: the identity it rests on, planted errors of mode weights, files and programs."""

from dataclasses import replace

import pytest
import torch

import fewstep
import fewstep.densities.students._balance as balance
from fewstep.core.noise import Streams
from fewstep.densities.export import export
from fewstep.densities.students._balance import Cosines, balanced
from fewstep.densities.students._maps import EDMMap, FlowMap
from fewstep.densities.students._sampler import MapSampler
from fewstep.densities.students._warp import Warp
from fewstep.densities.students.cdds import CDDS
from fewstep.densities.whitened import Whitened
from fewstep.priors.exact import GaussianPrior, MixturePrior
from laws import GAUSSIAN, SCHEDULE, ExactMap, Law, wide

MODES = MixturePrior(torch.ones(2), torch.tensor([[-1.5, 0.0], [1.5, 0.0]]), torch.full((2,), 0.04), SCHEDULE)


class TwoModes(FlowMap):
    """The exact map to two modes of deviation 0.2, of which the left one gets the share Phi(edge): 0 is right."""

    jumps = True

    def __init__(self, edge):
        super().__init__(SCHEDULE, 2)
        share = torch.distributions.Normal(0.0, 1.0).cdf(torch.tensor(edge))
        parts = torch.distributions.Normal(torch.tensor([-1.5, 1.5]), 0.2)
        weights = torch.distributions.Categorical(torch.stack([share, 1 - share]))
        self.law = torch.distributions.MixtureSameFamily(weights, parts)

    def forward(self, y, t, s):
        share = torch.special.ndtr(y[:, 0])
        low, high = torch.full_like(share, -3.0), torch.full_like(share, 3.0)
        for _ in range(40):
            middle = (low + high) / 2
            below = self.law.cdf(middle) < share.detach()
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        x = ((low + high) / 2).detach()
        slope = self.law.log_prob(x).exp().clamp_min(1e-3).detach()
        x = x + (share - share.detach()) / slope  # where it is, with the derivative of the inverse
        end = torch.stack([x, 0.2 * y[:, 1]], 1)
        return y + (torch.as_tensor(t) - torch.as_tensor(s)) * (end - y)


def left(sampler, steps=1, n=65_536):
    """Return the share of draws in the left mode."""
    return float((sampler.sample(n, steps, seed=9, weights=False).x[:, 0] < 0).double().mean())


@pytest.fixture(scope="module")
def uneven():
    return MapSampler(Whitened(Law(MODES)), TwoModes(-0.25))


@pytest.fixture(scope="module")
def even(uneven):
    return balanced(uneven, (1,), 16_384)


def some_warp(dim=2, size=0.05):
    warp = Warp.drawn(dim, torch.Generator().manual_seed(0))
    warp.heights += size * torch.randn(len(warp.heights), generator=torch.Generator().manual_seed(1))
    return warp


def test_generator_of_the_cosines_is_laplace_less_z_grad_and_has_mean_zero():
    warp, z = some_warp(3), Streams(0, range(4)).randn(3)

    def cosines(y):
        return torch.cos(y @ warp.slopes.T + warp.phases)

    for k in range(4):
        hessian = torch.func.hessian(cosines)(z[k])
        gradient = torch.func.jacrev(cosines)(z[k])
        expected = hessian.diagonal(dim1=1, dim2=2).sum(1) - gradient @ z[k]
        torch.testing.assert_close(warp.generated(z[k : k + 1])[0], expected, atol=1e-5, rtol=1e-4)
    values = warp.generated(Streams(1, range(65_536)).randn(3)).double()
    assert float((values.mean(0) / values.std(0)).abs().max()) * 256 < 5


def test_warp_is_the_identity_plus_a_gradient():
    warp, z = some_warp(), Streams(0, range(16)).randn(2)

    def psi(y):
        return torch.cos(y @ warp.slopes.T + warp.phases) @ warp.heights

    torch.testing.assert_close(warp(z), z + torch.func.vmap(torch.func.grad(psi))(z))


def test_means_move_as_the_response_says():
    """E[h(f(g(z)))] - E[h(f(z))] = -E[h(f(z)) L psi(z)], a map and functions without small derivatives, to first order."""
    sampler, small = MapSampler(Whitened(Law(MODES)), TwoModes(-0.25)), some_warp(size=0.003)
    flat = replace(sampler, warps={1: some_warp(size=0.0)})
    tests = Cosines.drawn(2, torch.Generator().manual_seed(5))
    found = balance._means(flat, 1, tests, 65_536, 3)
    z = torch.cat([Streams(3, range(k, k + 8192)).randn(2) for k in range(0, 65_536, 8192)])
    with torch.no_grad():
        moved = (tests(sampler.function(1)(small(z))) - tests(sampler.function(1)(z))).double()
    error = (moved.mean(0) - found.response @ small.heights.double()).abs()
    spread = moved.std(0) / 256 + (found.response.std() * small.heights.norm() / 8)
    assert float(moved.mean(0).norm()) > 10 * float(error.norm())
    assert float((error / spread).max()) < 5


def test_draws_get_the_weights_of_modes_that_their_log_weights_ask_for(uneven, even):
    error = 0.5 / 256
    assert abs(left(uneven) - 0.5) > 0.08, "or there is nothing to mend"
    assert abs(left(even) - 0.5) < 6 * error, "noise of the test and of the balance"
    draws = even.sample(20_480, 1, seed=4)
    assert draws.ess > 0.95 and abs(draws.log_z - 0.7) < 0.01


def test_weights_of_a_warped_map_are_exact(even):
    """log Z and the share of a mode by weights, which know nothing of how z was moved unless its determinant counts."""
    far = replace(even, warps={1: some_warp(size=0.02)})
    draws = far.sample(65_536, 1, seed=2)
    low, high = draws.log_z_interval(0.999)
    assert low < 0.7 < high and high - low < 0.05
    w = (draws.log_weights - draws.log_weights.max()).exp()
    assert abs(float((w * (draws.x[:, 0] < 0)).sum() / w.sum()) - 0.5) < 0.02
    z = Streams(2, range(1024)).randn(2)
    warped = Warp(2)
    warped.load_state_dict(far.warps[1].state_dict())
    jacobian = torch.func.vmap(torch.func.jacrev(lambda v: warped(v[None])[0]))(z)
    assert float(torch.linalg.slogdet(jacobian)[1].std()) > 0.02, "or the determinant would not be missed"


def test_other_numbers_of_steps_are_left_alone(uneven, even):
    assert set(even.warps) == {1}
    assert torch.equal(even.sample(64, 2).x, uneven.sample(64, 2).x)


def test_an_exact_map_stays_exact():
    sampler = MapSampler(Whitened(Law(GAUSSIAN)), ExactMap(GAUSSIAN))
    found = balanced(sampler, (1, 2), 8192).sample(8192, 1)
    assert found.ess > 0.999 and abs(found.log_z - 0.7) < 1e-3


def test_a_warp_that_loses_weights_or_a_part_of_the_target_is_not_kept(uneven, monkeypatch):
    monkeypatch.setattr(balance, "lost", lambda before, after: True)
    assert not balanced(uneven, (1,), 4096).warps
    monkeypatch.undo()
    monkeypatch.setattr(balance, "_ridge", lambda found: torch.full((found.response.shape[1],), 0.3))
    assert not balanced(uneven, (1,), 4096).warps


def test_lost_is_a_log_z_that_is_clearly_lower(uneven):
    whole = uneven.sample(8192, 1)
    half = replace(whole, log_weights=whole.log_weights - 0.5)
    assert balance.lost(whole, half) and not balance.lost(whole, whole) and not balance.lost(half, whole)


def test_upper_bounds_go_back_through_the_warp():
    sampler = MapSampler(Whitened(Law(GAUSSIAN)), wide(), warps={1: some_warp(size=0.02)})
    bound, error = sampler.eubo(sampler.target.sample(Streams(0, range(4096))), 1)
    assert 0.7 - 4 * error < bound < 1.5
    z = Streams(5, range(256)).randn(2)
    found = sampler.walked(z, 1, Streams(6, range(256)), True)
    back = sampler.backward_weights(found.y, 1, Streams(6, range(256)))
    plain = replace(sampler, warps={}).backward_weights(found.y, 1, Streams(6, range(256)))
    assert float((back - found.log_weights).abs().max()) < 1e-2 < float((plain - found.log_weights).abs().max())


def test_a_student_is_balanced_saved_and_exported_with_its_warps(tmp_path):
    method = CDDS(rows=512, solver_steps=16, levels=8, polish=0, balance=4096, counts=(1, 2))
    student = fewstep.distill(GAUSSIAN, method, target=Law(GAUSSIAN), train_steps=60, batch=256, ema=0.95)
    assert student.warps, "a rough student has something to mend"
    student.save(tmp_path / "student")
    again = fewstep.load_density_sampler(tmp_path / "student", Law(GAUSSIAN))
    count = next(iter(student.warps))
    assert torch.equal(again.sample(64, count).x, student.sample(64, count).x)
    program = torch.export.load(export(student, tmp_path / "map.pt2", steps=count)).module()
    z = Streams(0, range(64)).randn(2)
    with torch.no_grad():
        expected, plain = student.function(count)(z), replace(student, warps={}).function(count)(z)
    assert float((program(z) - expected).abs().max()) < 1e-5 < float((expected - plain).abs().max())
    bare = fewstep.distill(GAUSSIAN, replace(method, balance=0), target=Law(GAUSSIAN), train_steps=5, batch=64)
    assert not bare.warps


def test_bad_settings_are_refused():
    for few in (-1, 10):
        with pytest.raises(ValueError, match="number of draws"):
            CDDS(balance=few)
    with pytest.raises(ValueError, match="only jumps"):
        MapSampler(Whitened(Law(GAUSSIAN)), EDMMap(SCHEDULE, Law(GAUSSIAN)), renoise=True, warps={1: Warp(2)})


def test_published_recipes_are_not_balanced():
    assert CDDS.preset("paper").balance == 0 and CDDS.preset("averaged").balance == 0
    high = MapSampler(Whitened(Law(GaussianPrior(torch.zeros(65), torch.tensor(1.0)))), ExactMap(GAUSSIAN))
    assert CDDS().balanced(high, 0) is high, "a determinant of 65 dimensions for each draw is too much"
