"""Students: consistency losses at the exact flow, weights of few-step maps, distillation, files."""

import itertools
import math
from dataclasses import replace

import pytest
import torch

import fewstep
import fewstep.densities.distill as distilling
from fewstep.bench.density_runs import Counted
from fewstep.checkpoints import last_checkpoint
from fewstep.core.noise import Streams
from fewstep.core.schedule import Brownian
from fewstep.densities.distill import better
from fewstep.densities.estimators.jacobian import determinant
from fewstep.densities.grids import times_of
from fewstep.densities.students._maps import (
    MAPS,
    EDMMap,
    MapConfig,
    ResidualMap,
    ScaledMap,
    passed,
    warm_start,
)
from fewstep.densities.students._polish import Polish, both_ways, saturating, unfolding
from fewstep.densities.students._sampler import MapSampler, jumped, renoised
from fewstep.densities.students._trajectories import Incomplete, Trajectories, euler_in_time, flow_points
from fewstep.densities.students.cdds import CDDS, FlowRegression, Followed, SelfConsistency, ready
from fewstep.densities.whitened import Whitened
from fewstep.priors.exact import GaussianPrior, MixturePrior
from laws import GAUSSIAN, SCHEDULE, Affine, ExactMap, Law, wide


def pairs(steps, every=1):
    data = Trajectories(GAUSSIAN, times_of("edm", SCHEDULE, steps), every, batch_size=2048, rows=2048, direct=0.2)
    return data.batch(0, range(2048))


@pytest.mark.parametrize(
    "objective", [FlowRegression(0.0), SelfConsistency(0.0, 0.0)], ids=["regression", "consistency"]
)
def test_losses_vanish_at_the_exact_flow_and_only_there(objective):
    coarse, fine = (
        float(objective.loss("model", Followed(ExactMap(GAUSSIAN)), pairs(n, n // 16), None)[0]) for n in (32, 64)
    )
    wrong = float(objective.loss("model", Followed(ExactMap(GAUSSIAN, wrong=True)), pairs(64, 4), None)[0])
    assert fine < coarse / 8, "Heun's error falls fourfold when steps are halved, its square sixteenfold"
    assert fine < 1e-4 and wrong > 1e-2


@pytest.mark.parametrize(("order", "least"), [(1, 0.8), (2, 1.7)])
def test_solver_has_its_order(order, least):
    z = Streams(0, range(256)).randn(2).double()
    truth = GAUSSIAN.double().flow(z, torch.tensor(1.0), torch.tensor(0.0))
    errors = []
    for steps in (32, 64):
        y = flow_points(GAUSSIAN, z, times_of("edm", SCHEDULE, steps), order)[-1]
        errors.append(float((y - truth).norm(dim=1).mean()))
    GAUSSIAN.float()
    assert math.log2(errors[0] / errors[1]) > least


def test_euler_in_time_converges_to_the_flow():
    z = Streams(0, range(256)).randn(2)
    truth = GAUSSIAN.flow(z, torch.tensor(1.0), torch.tensor(0.0))
    errors = []
    for steps in (32, 64):
        times = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
        errors.append(float((euler_in_time(GAUSSIAN, z, times)[-1] - truth).norm(dim=1).mean()))
    assert errors[1] < 0.6 * errors[0] and errors[1] < 0.1


def test_published_pairs_are_neighbours_of_one_fresh_unfinished_trajectory():
    data, seen = Incomplete(GAUSSIAN, steps=32, batch_size=4), set()
    levels = 1 - torch.linspace(0, 32, 18).round() / 32
    for step in range(80):
        batch = data.batch(step, range(4))
        assert batch["t"].unique().numel() == 1 == batch["s"].unique().numel()
        n = int((levels - batch["t"][0]).abs().argmin())
        assert torch.allclose(levels[n + 1], batch["s"][0])
        seen.add(n)
    assert seen == set(range(17))
    assert float(batch["y_s"].std()) < 3 and not torch.equal(
        data.batch(0, range(4))["y_t"], data.batch(1, range(4))["y_t"]
    )


def test_batches_depend_on_step_and_item_only():
    data = Trajectories(GAUSSIAN, times_of("edm", SCHEDULE, 16), 2, batch_size=32, rows=64, refresh=3)
    again = replace(data, _shard=[])
    whole, part = data.batch(5, range(32)), again.batch(5, range(8, 16))
    assert all(torch.equal(whole[name][8:16], part[name]) for name in whole)
    assert bool((whole["t"] > whole["s"]).all())
    assert not torch.equal(data.batch(0, range(32))["y_t"], data.batch(3, range(32))["y_t"]), "a new shard"


def test_neighbours_end_where_the_flow_takes_them():
    data = Trajectories(GAUSSIAN, times_of("angle", SCHEDULE, 64), 4, batch_size=256, rows=256, apart=0.02)
    batch = data.batch(0, range(256))
    start, end = batch["beside_t"] - batch["y_t"], batch["beside_s"] - batch["y_s"]
    shift = lambda y: GAUSSIAN.flow(y, batch["t"], batch["s"])  # noqa: E731
    expected = shift(start) - shift(torch.zeros_like(start))  # the flow of a Gaussian is affine
    assert torch.allclose(end, expected, atol=2e-4) and float(end.norm(dim=1).min()) > 2e-3
    assert not torch.allclose(end, start, atol=2e-3)


def test_slopes_count_in_the_regression():
    """A map that is right along the trajectories and wrong beside them is seen."""
    data = Trajectories(GAUSSIAN, times_of("angle", SCHEDULE, 64), 4, batch_size=512, rows=512, apart=0.02)
    batch = data.batch(0, range(512))
    wrong = {**batch, "beside_s": batch["beside_s"] + 0.5 * (batch["beside_s"] - batch["y_s"])}
    objective, exact = FlowRegression(0.0), Followed(ExactMap(GAUSSIAN))
    right, off = (float(objective.loss("model", exact, b, None)[0]) for b in (batch, wrong))
    assert right < 0.003 and off > 0.03
    with pytest.raises(ValueError, match="power of two"):
        Trajectories(GAUSSIAN, times_of("angle", SCHEDULE, 12), 2)


def test_trajectories_reach_the_narrow_modes_on_the_grid_that_is_finer_at_the_end():
    """64 steps of Heun's method to a deviation of 0.01: the last one is Euler's, and takes off what lies below its noise."""
    narrow, spread = GaussianPrior(torch.zeros(1), torch.tensor([[1e-4]]), SCHEDULE), {}
    z = Streams(0, range(2048)).randn(1)
    for grid in ("angle", "angle_squared"):
        spread[grid] = float(flow_points(narrow, z, times_of(grid, SCHEDULE, 64))[-1].std() / z.std())
    assert spread["angle_squared"] == pytest.approx(0.01, rel=0.05) and spread["angle"] < 0.006


def test_relative_errors_see_what_is_narrow():
    """A map that is exact but in a coordinate of deviation 0.01, where its slope is half as large again."""
    log_v = torch.tensor([0.0, math.log(1e-4)])
    narrow = GaussianPrior(torch.zeros(2), log_v.exp().diag(), SCHEDULE)
    batch = Trajectories(
        narrow, times_of("angle_squared", SCHEDULE, 64), 4, batch_size=512, rows=512, apart=0.02
    ).batch(0, range(512))

    def loss(log_v, relative):
        flow_map = ScaledMap(SCHEDULE, Law(GAUSSIAN), MapConfig(8, 1))
        with torch.no_grad():
            flow_map.net.last.bias[2:] = flow_map.LIMIT / 2 * torch.atanh(log_v / flow_map.LIMIT)
        return float(FlowRegression(0.01, 0.0, relative).loss("model", Followed(flow_map), batch, None)[0].detach())

    wrong = log_v + torch.tensor([0.0, 2 * math.log(1.5)])
    assert loss(log_v, 1.0) < 0.02, "the exact flow, up to the solver's error"
    assert loss(wrong, 0.0) < 0.01 and loss(wrong, 1.0) > 0.1


@pytest.mark.parametrize("grid", ["angle", "angle_squared"])
def test_steps_of_the_grids_by_angle_are_nested(grid):
    fine, coarse = (times_of(grid, SCHEDULE, n) for n in (8, 4))
    assert torch.allclose(fine[::2], coarse) and float(coarse[0]) == 1 and float(coarse[-1]) == 0
    angles = torch.atan(SCHEDULE.ratio(fine)) ** (1 / {"angle": 1, "angle_squared": 2}[grid])
    assert torch.allclose(angles.diff(), angles.diff().mean().expand(8), atol=1e-6)


def test_polishing_loss_has_its_minimum_at_the_exact_map_and_fines_folds():
    loss, n = Polish(Whitened(Law(GAUSSIAN))), 4096
    root = torch.linalg.cholesky(GAUSSIAN.cov)

    def at(matrix, shift):
        flow_map = Affine(matrix, shift)
        del flow_map.matrix, flow_map.shift
        flow_map.matrix, flow_map.shift = (torch.nn.Parameter(v) for v in (matrix, shift))
        value, figures = loss._on_weights(flow_map, 1, Streams(0, range(n)))
        return value, figures, torch.autograd.grad(value, flow_map.matrix)[0]

    least, figures, slope = at(root, GAUSSIAN.mean)
    assert abs(figures["elbo"] - 0.7) < 1e-3 and figures["folds"] == 0, "all weights are Z"
    assert abs(float(least.detach())) < 1e-5 and float(slope.abs().max()) < 1e-4, "draw by draw, without noise"
    value, wide, pushed = at(1.2 * root, GAUSSIAN.mean)
    assert wide["elbo"] < 0.7 - 0.05 and float((pushed * root).sum()) > 0.1
    both = 1.2**2 + 1.2**-2 - 2  # of N(0, s^2) and N(0, 1) in two dimensions, in both directions together
    assert abs(float(value.detach()) / both - 1) < 0.1 and both > 1.5 * (1.2**2 - 1 - math.log(1.2**2)), (
        "not one way alone"
    )
    _, _, pulled = at(0.8 * root, GAUSSIAN.mean)
    assert float((pulled * root).sum()) < -0.1
    folded, figures, _ = at(root @ torch.diag(torch.tensor([1.0, -1.0])), GAUSSIAN.mean)
    assert figures["folds"] == 1 and float(folded.detach()) > 10, "more than any weight gains"
    tail = torch.tensor([-1.0, -1.001, -1e6])
    assert torch.allclose(saturating(tail)[:2], tail[:2], atol=1e-5)
    assert abs(float(saturating(tail)[2]) + 1 + math.log(1e6)) < 1e-3


def test_both_ways_is_the_sum_of_two_relative_entropies_with_tangents():
    u = torch.linspace(-1, 2.9, 50, dtype=torch.float64)
    assert torch.allclose(both_ways(u), u * (u.exp() - 1))
    far = torch.tensor([3.0, 3.001, 100.0], dtype=torch.float64)
    value = both_ways(far)
    slope = (value[1] - value[0]) / 0.001
    assert abs(float(slope) / (math.exp(3) * 4 - 1) - 1) < 1e-6 and torch.allclose((value[2] - value[0]) / 97, slope)


@pytest.mark.parametrize("width", [0.004, 0.3, 1.0, 5.0])
def test_scaled_map_is_the_flow_of_a_gaussian_at_one_output_of_its_network(width):
    """Whatever the times are: a narrow mode is in reach of short steps too, which a bounded factor per step would not allow."""
    prior = GaussianPrior(torch.zeros(2), torch.tensor(width**2), SCHEDULE)
    flow_map, y = ScaledMap(SCHEDULE, Law(prior), MapConfig(8, 1)), Streams(0, range(64)).randn(2)
    limit = ScaledMap.LIMIT
    with torch.no_grad():
        flow_map.net.last.bias[2:] = limit / 2 * math.atanh(2 * math.log(width) / limit)
    for count in (1, 4, 64):
        times = times_of("angle", SCHEDULE, count).float()
        x = y
        for t, s in itertools.pairwise(times):
            x = flow_map(x, t, s)
        assert torch.allclose(x, prior.flow(y, times[0], times[-1]), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["residual", "scaled", "gated"])
def test_factors_of_units_make_a_map_steeper_and_start_at_one(name):
    """A unit with the factor e^g is one whose weights and bias, those of the times included, are e^g times as large."""
    plain, steep = (MAPS[name](SCHEDULE, Law(GAUSSIAN), MapConfig(8, 0, steep=steep)) for steep in (False, True))
    y, times = Streams(0, range(64)).randn(2), (torch.tensor(1.0), torch.tensor(0.0))
    torch.nn.init.normal_(plain.net.last.weight)
    given = plain.state_dict()
    assert set(steep.load_state_dict(given, strict=False).missing_keys) == {"net.log_factors"}
    assert torch.equal(steep(y, *times), plain(y, *times))
    factors = torch.linspace(-1, 2, 8)
    with torch.no_grad():
        steep.net.log_factors.copy_(factors[None])
        for layer in (plain.net.first, plain.net.time.layers[2], plain.net.others[0].layers[2]):
            layer.weight.mul_(factors.exp()[:, None])
            layer.bias.mul_(factors.exp())
    assert torch.allclose(steep(y, *times), plain(y, *times), atol=1e-5)


@torch.no_grad()
def test_a_gate_scales_what_the_network_adds_and_nothing_else():
    y, times = Streams(0, range(64)).randn(2), (torch.tensor(1.0), torch.tensor(0.0))
    plain, gated = (kind(SCHEDULE, Law(GAUSSIAN), MapConfig(8, 1)) for kind in (ScaledMap, MAPS["gated"]))
    given = plain.net.state_dict()
    last = torch.randn(6, 8), torch.randn(6)
    plain.net.load_state_dict({**given, "last.weight": last[0][:4], "last.bias": last[1][:4]})
    first, slope = plain.sloped(y, *times)
    for gate, factor in ((0.0, 1.0), (-3.0, math.exp(-8 * math.tanh(3 / 8))), (-1e4, math.exp(-8))):
        weight, bias = torch.cat([last[0][:4], torch.zeros(2, 8)]), torch.cat([last[1][:4], torch.full((2,), gate)])
        gated.net.load_state_dict({**given, "last.weight": weight, "last.bias": bias})
        found, same = gated.sloped(y, *times)
        assert torch.equal(same, slope)
        assert torch.allclose(found - y * slope, factor * (first - y * slope), rtol=1e-4, atol=2e-5)


def test_draws_from_further_out_see_what_is_thin_there_and_nothing_where_weights_are_equal():
    near, far = (Polish(Whitened(Law(GAUSSIAN)), wide=wide) for wide in (1.0, 1.5))
    exact = Affine(torch.linalg.cholesky(GAUSSIAN.cov), GAUSSIAN.mean)

    class Thin(Affine):
        """Draws beyond 2.5 deviations of a coordinate are drawn to it by half: too few lie further out."""

        def forward(self, y, t, s):
            inside = y.clamp(-2.5, 2.5)
            return super().forward((y + inside) / 2, t, s)

    thin = Thin(exact.matrix, exact.shift)
    same, seen, more = (
        float(loss._on_weights(flow_map, 1, Streams(0, range(4096)))[0])
        for loss, flow_map in ((far, exact), (near, thin), (far, thin))
    )
    assert abs(same) < 1e-5 and more > 3 * seen > 0.01


def test_determinants_of_polishing_are_the_exact_ones():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        flow_map = ScaledMap(SCHEDULE, Law(GaussianPrior(torch.zeros(3), torch.tensor(1.0))), MapConfig(16, 1))
        torch.nn.init.normal_(flow_map.net.last.weight, std=0.02)
    z, ends = Streams(3, range(64)).randn(3), (torch.tensor(1.0), torch.tensor(0.0))
    y, log_det, fine = unfolding(lambda v: flow_map(v, *ends), z)
    found = determinant(lambda v: flow_map(v, *ends), z)
    assert torch.allclose(y, found.y, atol=1e-6) and float(fine.detach().max()) == 0 and bool((found.sign > 0).all())
    assert torch.allclose(log_det.double(), found.log_abs, atol=1e-4)
    assert float(log_det.detach().std()) > 0.01


def test_maps_are_the_identity_where_no_time_passes_and_follow_their_papers():
    y, t = torch.randn(5, 2), torch.tensor(0.4)
    for kind in (ResidualMap, ScaledMap, MAPS["gated"], EDMMap):
        flow_map = kind(SCHEDULE, Law(GAUSSIAN))
        torch.nn.init.normal_(flow_map.net.last.weight)
        zero = torch.zeros(())
        assert torch.allclose(flow_map(y, zero, zero), y, atol=1e-6)
    assert torch.allclose(ResidualMap(SCHEDULE, Law(GAUSSIAN))(y, t, t), y, atol=1e-6)
    assert torch.allclose(passed(SCHEDULE, t, torch.zeros(())), SCHEDULE(t)[1], atol=1e-6)
    edm = EDMMap(SCHEDULE, Law(GAUSSIAN))  # its network starts at zero
    assert torch.allclose(edm(y, t, torch.zeros(())), 0.25 / (0.16 + 0.25) * y)
    with pytest.raises(ValueError, match="time 0"):
        edm(y, t, torch.tensor(0.1))


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_weights_of_the_exact_flow_are_constant_and_give_log_z(steps):
    sampler = MapSampler(Whitened(Law(GAUSSIAN)), ExactMap(GAUSSIAN))
    draws = sampler.sample(2048, steps)
    assert draws.ess > 0.999 and abs(draws.log_z - 0.7) < 1e-3 and draws.nfe == steps


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_renoised_weights_are_unbiased_for_any_injective_map(steps):
    grid = (*(1.0, 0.6, 0.35)[:steps], 0.0)
    sampler = MapSampler(Whitened(Law(GAUSSIAN)), wide(), grid=grid, renoise=True)
    draws = sampler.sample(20_480, steps)
    ratio = (draws.log_weights - 0.7).exp()
    error = float(ratio.std()) / math.sqrt(len(ratio))
    assert error < 0.05 and abs(float(ratio.mean()) - 1) < 4 * error


def test_renoised_weights_without_the_noising_kernel_would_be_wrong():
    times, n = torch.tensor([1.0, 0.6, 0.0]), 20_480
    z = Streams(0, range(n)).randn(2)
    y, log_w, _ = renoised(wide(), z, times, Streams(1, range(n)), True)
    ratio = (log_w + GAUSSIAN.log_prob(y)).exp()
    y, shorter, _ = jumped(wide(), z, times[[0, 2]], True)  # forgets that y_2 was noised from f(y_1)
    wrong = (shorter + log_w.mean() - shorter.mean() + 0.5 + GAUSSIAN.log_prob(y)).exp()
    error = float(ratio.std()) / math.sqrt(n)
    assert abs(float(ratio.mean()) - 1) < 4 * error
    assert abs(float(wrong.mean()) - 1) > 4 * error


def test_jumped_weights_match_a_dense_jacobian():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        flow_map = ResidualMap(SCHEDULE, Law(GaussianPrior(torch.zeros(3), torch.tensor(1.0))), MapConfig(16, 1))
        torch.nn.init.normal_(flow_map.net.last.weight, std=0.05)
    z, times = Streams(3, range(8)).randn(3), torch.tensor([1.0, 0.5, 0.0])
    y, log_w, signs = jumped(flow_map, z, times, True)
    whole = lambda v: flow_map(flow_map(v[None], times[0], times[1]), times[1], times[2])[0]  # noqa: E731
    for k in range(8):
        dense = torch.linalg.slogdet(torch.autograd.functional.jacobian(whole, z[k]))
        base = (z[k].square().sum() + 3 * math.log(2 * math.pi)) / 2
        assert torch.allclose(log_w[k].float(), dense.logabsdet + base, atol=1e-4) and signs[k] == dense.sign
        assert torch.allclose(y[k], whole(z[k]), atol=1e-6)


def test_folds_are_counted():
    flipped = Affine(torch.diag(torch.tensor([1.0, -1.0])), torch.zeros(2))
    draws = MapSampler(Whitened(Law(GAUSSIAN)), flipped).sample(100)
    assert draws.folds == 100 and draws.nonfinite == 0
    assert draws.log_z == -math.inf and draws.ess == 0, (
        "its degree is -1: no map that is trained from the identity has that"
    )


def test_distilled_gaussian_is_right_and_survives_the_disk(tmp_path):
    method = CDDS(size=MapConfig(32, 1, steep=True), rows=4096, solver_steps=32, levels=8, polish=30, balance=4096)
    student = fewstep.distill(GAUSSIAN, method, target=Law(GAUSSIAN), train_steps=250, batch=256, ema=0.95)
    for steps in (1, 2, 4):
        draws = student.sample(4096, steps)
        low, high = draws.log_z_interval(0.999)
        assert draws.ess > 0.9 and low < 0.7 < high and draws.nfe == steps
    student.save(tmp_path)
    again = fewstep.load_density_sampler(tmp_path, Law(GAUSSIAN))
    assert torch.equal(again.sample(1500, 2).x, student.sample(1500, 2).x)
    assert (
        torch.equal(student.sample(100).x, student.sample(1500).x[:100]) and again.warps.keys() == student.warps.keys()
    )


def test_published_recipe_trains_and_renoises():
    method = CDDS.preset("paper", solver_steps=32)
    student = fewstep.distill(GAUSSIAN, method, target=Law(GAUSSIAN), train_steps=100, batch=64)
    assert isinstance(student.flow_map, EDMMap) and student.renoise
    draws = student.sample(2048, 3)
    assert draws.nfe == 3 and draws.nonfinite < 20
    assert float((draws.x.mean(0) - GAUSSIAN.mean).abs().max()) < 0.5, "a rough student, but one of this Gaussian"


@pytest.mark.parametrize(
    "method",
    [CDDS.preset("averaged"), CDDS(map="guided"), CDDS.preset("narrow")],
    ids=["averaged", "score-conditioned", "narrow"],
)
def test_other_students_train_too(method):
    small = replace(method, size=MapConfig(32, 1), rows=2048, solver_steps=16, levels=8, polish=0, balance=0)
    student = fewstep.distill(GAUSSIAN, small, target=Law(GAUSSIAN), train_steps=120, batch=256, ema=0.95, lr=5e-3)
    draws = student.sample(4096)
    assert draws.ess > 0.5 and abs(draws.log_z - 0.7) < 0.1 and draws.gradient_calls == (method.map == "guided")
    assert student.grid == method.grid and student.sample(64, 2).nfe == 2
    config = student.config()
    del config["size"]["steep"]  # files of earlier versions do not have it
    again = MapSampler.restore(student.whitened, config, student.tensors())
    assert config["map"] == method.map and torch.equal(again.sample(64, 2).x, student.sample(64, 2).x)


def test_preset_for_many_coordinates_is_wider_and_takes_no_exact_weights():
    method = CDDS.preset("many", solver_steps=16, levels=8)
    assert method.size.width > CDDS().size.width and not method.polish and not method.balance
    target = Counted(Law(GAUSSIAN))
    student = fewstep.distill(GAUSSIAN, method, target=target, train_steps=120, batch=256, ema=0.95, lr=5e-3)
    assert target.calls == 0, "no log rho is taken in training"
    assert student.sample(4096).ess > 0.5


def test_averaged_target_lags_and_a_decay_of_zero_is_the_map_itself():
    followed = Followed(ResidualMap(SCHEDULE, Law(GAUSSIAN), MapConfig(8, 1)))
    with torch.no_grad():
        followed.map.net.last.bias += 1.0
    followed.follow(0.9)
    assert torch.allclose(followed.target.net.last.bias, torch.full((2,), 0.1))
    followed.follow(0.0)
    assert torch.equal(followed.target.net.last.bias, followed.map.net.last.bias)


def test_warm_start_copies_what_fits():
    from fewstep.densities.networks import ControlNet, NetConfig

    trained = ControlNet(SCHEDULE, Law(GAUSSIAN), NetConfig(width=64))
    torch.nn.init.normal_(trained.last.weight)
    student = EDMMap(SCHEDULE, Law(GAUSSIAN))
    assert warm_start(student.net, trained) > 8
    assert torch.equal(student.net.last.weight, trained.last.weight[:2])
    assert torch.equal(student.net.first.weight, trained.first.weight[:, :2])
    assert warm_start(EDMMap(SCHEDULE, Law(GAUSSIAN), MapConfig(32, 1)).net, trained) == 1, (
        "the last bias alone has the same shape"
    )


def test_teachers_of_other_schedules_are_taken_along():
    brownian = GaussianPrior(GAUSSIAN.mean, GAUSSIAN.cov, Brownian())
    z = Streams(0, range(64)).randn(2)
    times = times_of("edm", SCHEDULE, 64)
    assert torch.allclose(flow_points(ready(brownian), z, times)[-1], flow_points(GAUSSIAN, z, times)[-1], atol=1e-4)


def test_a_map_that_has_lost_a_mode_is_no_better():
    """One map is exact on one mode of two, where its ESS is nearly 1; the others have both, badly and less so."""
    law = fewstep.target("two_modes", dim=2)
    means, roots = law.components.means.float(), law.components.roots.float()
    half, wide_one, finer = (
        MapSampler(Whitened(law), Affine(matrix, shift))
        for matrix, shift in (
            (torch.diag(roots[0]), means[0]),
            (2.0 * torch.eye(2), torch.zeros(2)),
            (1.3 * torch.eye(2), torch.zeros(2)),
        )
    )
    lost, kept = half.sample(16_384), finer.sample(16_384)
    assert lost.ess > 0.95 > 3 * kept.ess and abs(lost.log_z - math.log(2 / 3)) < 0.02
    with pytest.warns(UserWarning, match="lost a part of the target"):
        assert better(wide_one, half) is wide_one
    assert better(wide_one, finer) is finer and better(finer, wide_one) is finer


def test_what_cannot_be_distilled_is_refused():
    with pytest.raises(ValueError, match="unknown method"):
        fewstep.distill(GAUSSIAN, "cdd", target=Law(GAUSSIAN))
    with pytest.raises(ValueError, match="target"):
        fewstep.distill(GAUSSIAN)
    with pytest.raises(TypeError, match="no denoiser"):
        fewstep.distill(MapSampler(Whitened(Law(GAUSSIAN)), wide()))
    with pytest.raises(ValueError, match="preset"):
        CDDS.preset("papers")
    for wrong in ({"counts": ()}, {"counts": (1, 0)}, {"wide": 0.5}, {"wide": math.nan}):
        with pytest.raises(ValueError, match="counts of 1 and more"):
            CDDS(**wrong)
    with pytest.raises(ValueError, match="renoise"):
        MapSampler(Whitened(Law(GAUSSIAN)), EDMMap(SCHEDULE, Law(GAUSSIAN)))


def test_a_folder_is_of_one_teacher(tmp_path):
    method = CDDS(size=MapConfig(8, 1), rows=256, solver_steps=16, levels=8, polish=2, balance=0)
    given = {"target": Law(GAUSSIAN), "train_steps": 2, "batch": 64, "out": tmp_path, "seed": 3}
    first = fewstep.distill(GAUSSIAN, method, **given)
    other = MixturePrior(torch.ones(1), GAUSSIAN.mean[None] + 0.1, torch.eye(2)[None])
    for wrong, teacher in (("teacher", other), ("seed", GAUSSIAN), ("lr", GAUSSIAN), ("target", GAUSSIAN)):
        changed = {"teacher": {}, "seed": {"seed": 4}, "lr": {"lr": 1e-3}, "target": {"target": Law(other)}}[wrong]
        with pytest.raises(ValueError, match=f"a run with another {wrong}; choose"):
            fewstep.distill(teacher, method, **{**given, **changed})
    again = fewstep.distill(GAUSSIAN, method, **given)
    assert torch.equal(first.sample(8).x, again.sample(8).x)
    fewstep.distill(GAUSSIAN, method, **{**given, "train_steps": 3})
    assert last_checkpoint(tmp_path).name == "step_00000003"


def test_last_steps_that_diverge_are_taken_anew_and_slower(tmp_path, monkeypatch):
    """Only the gradient of the first attempt is broken, then that of both."""
    method = CDDS(size=MapConfig(8, 1), rows=256, solver_steps=16, levels=8, polish=4, balance=0)
    loss, broken = Polish.loss, [0.5]

    def failing(self, player, model, batch, noise):
        value, figures = loss(self, player, model, batch, noise)
        return value * (math.nan if tried[-1] in broken else 1.0), figures

    make, tried = distilling._trainer, []

    def noted(*given):
        tried.append(given[-1].lr / 0.004)
        return make(*given)

    monkeypatch.setattr(Polish, "loss", failing)
    monkeypatch.setattr(distilling, "_trainer", noted)
    given = {"target": Law(GAUSSIAN), "train_steps": 5, "batch": 64, "lr": 0.004}
    with pytest.warns(UserWarning, match=r"diverged at 0\.5 times .* not finite"):
        student = fewstep.distill(GAUSSIAN, method, out=tmp_path / "a", **given)
    assert tried == [1, 0.5, 0.125] and bool(torch.isfinite(student.sample(64).x).all())
    assert (tmp_path / "a" / "polish_slower" / "checkpoints").is_dir()
    broken.append(0.125)
    with pytest.raises(FloatingPointError, match="try polish=0"):
        fewstep.distill(GAUSSIAN, method, out=tmp_path / "b", **given)


@pytest.mark.slow
def test_nine_modes_in_one_step():
    target = fewstep.target("nine_modes")
    whitened = Whitened(target, torch.zeros(2), torch.full((2,), 4.0))
    grid = torch.tensor([-5.0, 0.0, 5.0]) / 4
    teacher = MixturePrior(torch.ones(9), torch.cartesian_prod(grid, grid), torch.full((9,), 0.3 / 16))
    student = fewstep.distill(teacher, CDDS(rows=16_384, polish=1000), target=whitened, train_steps=2500)
    draws = student.sample(20_480)
    low, high = draws.log_z_interval(0.999)
    assert draws.ess > 0.5 and low < 0 < high and high - low < 0.05
