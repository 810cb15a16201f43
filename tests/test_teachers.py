"""Samplers trained on a density: kernels, weights and losses against Gaussian targets, whose exact control is known."""

import math
from dataclasses import dataclass, replace

import pytest
import torch

import fewstep
from fewstep.core.density import TargetDensity
from fewstep.core.noise import Streams
from fewstep.core.schedule import Brownian, Cosine, VarianceExploding, VariancePreserving
from fewstep.densities.base import load_density_sampler
from fewstep.densities.estimators import weights
from fewstep.densities.networks import Control, ControlNet, Moments, NetConfig
from fewstep.densities.paths import (
    Walk,
    euler,
    even_variance,
    exponential,
    falling_cosine,
    log_backward,
    log_forward,
    simulate,
    walk,
)
from fewstep.densities.teachers._base import PathSampler, build_teacher, seeded
from fewstep.densities.whitened import Whitened
from fewstep.priors.exact import GaussianPrior, MixturePrior
from laws import Known

TEACHERS = [fewstep.get(name, "teachers") for name in ("dis", "dds", "pis")]
LOSSES = [fewstep.get(name, "losses") for name in ("kl", "log_variance", "trajectory_balance")]
LOG_Z, VARIANCES, MEAN = 1.7, (0.3, 0.05, 2.0), (0.5, -1.0, 0.2)


@dataclass(frozen=True, eq=False)
class Scaled(TargetDensity):
    """exp(log_z) times a mixture."""

    prior: MixturePrior
    log_z: float = LOG_Z

    @property
    def dim(self):
        return self.prior.event_shape[0]

    def log_prob(self, x):
        return self.prior.log_prob(x) + self.log_z


def gaussian(schedule, mean=MEAN, variances=VARIANCES):
    """Return a Gaussian target with log Z = 1.7 and its exact control."""
    prior = MixturePrior(torch.ones(1), torch.tensor([mean]), torch.tensor([variances]), schedule)
    return Scaled(prior), Known(prior, torch.tensor(variances))


def mixture(schedule):
    """Return three modes in the plane with log Z = 1.7."""
    means = torch.tensor([[-1.0, -0.8], [1.1, 0.2], [0.0, 1.0]])
    return Scaled(MixturePrior(torch.tensor([0.5, 0.3, 0.2]), means, torch.tensor([0.05, 0.2, 0.1]), schedule))


class Exact(Control):
    """An exact control with the parameters that a loss expects."""

    def __init__(self, known, log_z=0.0):
        super().__init__()
        self.known, self.schedule, self.event_shape = known, known.schedule, known.event_shape
        self.log_z, self.shift = torch.nn.Parameter(torch.tensor(log_z)), torch.nn.Parameter(torch.zeros(()))

    def guide(self, y):
        return None

    def moments(self, y, t, guide):
        drift, spread = self.known.moments(y, t, guide)
        return Moments(drift + self.shift, spread)


def pushes(kernels):
    """Return p / sqrt(r) b of the exact kernels, (N, d)."""
    _, p, b2, before, after = kernels.steps().T[..., None]
    excess = torch.tensor(VARIANCES) - 1
    return p / (b2 * (1 + after * excess) / (1 + before * excess)).sqrt()


# ---- kernels and weights --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("teacher", TEACHERS)
@pytest.mark.parametrize("steps", [2, 7, 64])
def test_weights_of_the_exact_control_are_constant_at_any_number_of_steps(teacher, steps):
    """Up to what is left of the mean at t = 1, at most alpha_1 |m| = 0.0075 standard deviations."""
    teacher = teacher()
    target, control = gaussian(teacher.schedule)
    log_w = simulate(control, teacher.kernels(steps), Streams(0, range(512))).log_weights(target)
    assert float((log_w - LOG_Z).abs().max()) < 0.06
    assert float(log_w.std()) < 0.0105
    assert weights.log_mean(log_w) == pytest.approx(LOG_Z, abs=5 * 0.0105 / math.sqrt(512))


def wrong_push(kernels):
    return replace(kernels, push=kernels.push * 0.9)


def wrong_decay(kernels):
    return replace(kernels, decay=kernels.decay**2)


def wrong_variance(kernels):
    return replace(kernels, variance=kernels.variance * 1.1)


@pytest.mark.parametrize("wrong", [wrong_push, wrong_decay, wrong_variance])
def test_wrong_kernels_are_seen(wrong):
    teacher = TEACHERS[0]()
    target, control = gaussian(teacher.schedule)
    log_w = simulate(control, wrong(teacher.kernels(7)), Streams(0, range(512))).log_weights(target)
    assert float(log_w.std()) > 0.1  # ten times the limit above


def test_kernels_without_the_spread_or_with_another_are_seen():
    schedule = VariancePreserving()
    target, control = gaussian(schedule)
    for variances in (1.0, torch.tensor(VARIANCES).flip(0)):
        other = Known(control.denoiser, variances)
        log_w = simulate(other, exponential(schedule, even_variance(schedule, 7)), Streams(0, range(512))).log_weights(
            target
        )
        assert float(log_w.std()) > 0.1


def test_euler_weights_become_constant_with_order_one_half_and_better():
    schedule = VariancePreserving()
    target, control = gaussian(schedule)
    stds = []
    for steps in (128, 512):
        kernels = euler(schedule, torch.linspace(1, 0, steps + 1, dtype=torch.float64))
        stds.append(float(simulate(control, kernels, Streams(0, range(512))).log_weights(target).std()))
    assert stds[1] < 0.6 * stds[0]
    assert stds[1] < 0.1
    with pytest.raises(ValueError, match="exponential"):
        euler(Brownian(), torch.tensor([1.0, 0.5, 0.0], dtype=torch.float64))


@pytest.mark.parametrize("make", [exponential, euler])
@pytest.mark.parametrize("steps", [4, 16])
def test_log_z_is_unbiased_for_any_control_at_few_steps(make, steps):
    """A control that is off by 0.3 everywhere, three modes: the mean weight is Z within four standard errors."""
    schedule = VariancePreserving(0.1, 10.0)
    target, kernels = mixture(schedule), make(schedule, torch.linspace(1, 0, steps + 1, dtype=torch.float64) ** 1.5)
    control = Exact(Known(target.prior, 0.6))
    control.shift.data += 0.3
    with torch.no_grad():
        log_w = simulate(control, kernels, Streams(1, range(60_000))).log_weights(target)
    error = weights.log_z_error(log_w)
    assert error < 0.05
    assert weights.log_mean(log_w) == pytest.approx(LOG_Z, abs=4 * error)
    # the law of the samples is wrong, so weights that leave the path out are wrong
    assert abs(float(log_w.mean()) - LOG_Z) > 5 * float(log_w.std()) / math.sqrt(60_000)


def test_continuous_time_weights_are_biased_where_ours_are_not():
    """The Ito form of the papers, 1/2 |u|^2 dt + u dB with u = sqrt(beta) alpha G, as the planted wrong variant."""
    schedule, steps = VariancePreserving(0.1, 10.0), 8
    target, kernels = mixture(schedule), exponential(schedule, even_variance(schedule, steps))
    control, noise = Known(target.prior), Streams(1, range(60_000))
    y, log_w = noise.randn(2), torch.zeros(60_000, dtype=torch.float64)
    for k in range(steps):
        z, b = noise.randn(2), float(kernels.variance[k].sqrt())
        u = float(kernels.push[k]) / b * control.drift(y, kernels.times[k].float(), None)
        h = -2 * float(kernels.decay[k].log())
        y = float(kernels.decay[k]) * y + b * u + b * z
        log_w -= (h / b**2 * u.square() / 2 + math.sqrt(h) / b * u * z).sum(1)
    log_w += target.log_prob(y) + y.double().square().sum(1) / 2 + math.log(2 * math.pi)
    assert abs(weights.log_mean(log_w) - LOG_Z) > 5 * weights.log_z_error(log_w)


def test_the_batched_call_agrees_with_the_simulation():
    schedule = VariancePreserving()
    target = mixture(schedule)
    control = seeded(lambda: ControlNet(schedule, Whitened(target)), 0)
    with torch.no_grad():
        for p in control.parameters():
            p += 0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(3))
        kernels = exponential(schedule, even_variance(schedule, 9))
        kept = simulate(control, kernels, Streams(0, range(64)), keep=True)
        path = Walk(kept.points, torch.stack([control.guide(y) for y in kept.points[:-1]]))
        torch.testing.assert_close(log_forward(control, kernels, path).double(), kept.forward, atol=2e-3, rtol=1e-5)
        torch.testing.assert_close(log_backward(kernels, kept.points), kept.backward, atol=2e-3, rtol=1e-5)


def test_paths_for_training_are_those_of_the_simulation():
    """From the same numbers, drawn at once or one after the other."""
    schedule = VariancePreserving()
    control = seeded(lambda: ControlNet(schedule, Whitened(mixture(schedule))), 0)
    kernels, noise = exponential(schedule, even_variance(schedule, 9)), Streams(0, range(64))
    with torch.no_grad():
        path = walk(control, kernels, noise)
        drawn = Streams(0, range(64)).randn(10, *control.event_shape)
        kept = simulate(control, kernels, Given(drawn), keep=True)
    torch.testing.assert_close(path.points, kept.points)
    torch.testing.assert_close(path.guides[3], control.guide(kept.points[3]))


class Given:
    """Noise of which every number is known, (n, times, d)."""

    device = torch.device("cpu")

    def __init__(self, drawn):
        self.left = list(drawn.unbind(1))
        self.count = len(drawn)

    def __len__(self):
        return self.count

    def randn(self, *shape):
        return self.left.pop(0)

    def randn_like(self, y):
        return self.left.pop(0)


# ---- losses ---------------------------------------------------------------------------------------------------------


def loss_value(loss, teacher, log_z):
    """Return the loss and its gradient at the exact control, 7 steps, 1024 paths."""
    target, known = gaussian(teacher.schedule)
    control = Exact(known, log_z)
    value, figures = loss(target, teacher.kernels(7)).loss("model", control, None, Streams(2, range(1024)))
    value.backward()
    return float(value.detach()), control, figures


@pytest.mark.parametrize("teacher", TEACHERS)
@pytest.mark.parametrize("loss", LOSSES)
def test_every_loss_has_its_closed_form_minimum_at_the_exact_control(teacher, loss):
    teacher = teacher()
    value, control, figures = loss_value(loss, teacher, LOG_Z / 100)
    kernels = teacher.kernels(7)
    noise = float(pushes(kernels).square().sum()) ** 0.5
    minimum, limit = (-LOG_Z, 4 * noise / math.sqrt(1024)) if loss.__name__ == "KL" else (0.0, 0.02)
    assert value == pytest.approx(minimum, abs=2e-3)
    assert abs(float(control.shift.grad)) < limit
    assert figures["ess"] == pytest.approx(1, abs=1e-3)
    assert figures["usable"] == 1


@pytest.mark.parametrize("teacher", TEACHERS)
@pytest.mark.parametrize("loss", LOSSES)
def test_every_loss_grows_as_it_must_away_from_the_minimum(teacher, loss):
    """A drift that is off by c moves every kernel by p c: KL = c^2 d sum p^2 / (2 r b^2), the others follow from it."""
    teacher, c = teacher(), 0.2
    target, known = gaussian(teacher.schedule)
    control, kernels = Exact(known, LOG_Z / 100), teacher.kernels(7)
    control.shift.data += c
    with torch.no_grad():
        value, _ = loss(target, kernels).loss("model", control, None, Streams(2, range(20_000)))
    kl = float((c * pushes(kernels)).square().sum() / 2)
    expected = {"KL": kl - LOG_Z, "LogVariance": 2 * kl, "TrajectoryBalance": kl + kl**2 / 2}[loss.__name__]
    assert kl > 0.01
    assert float(value) == pytest.approx(expected, abs=0.05 * kl + 0.01)


def test_trajectory_balance_finds_log_z_and_its_scale_is_only_a_rate():
    teacher = TEACHERS[0]()
    _, control, _ = loss_value(fewstep.get("trajectory_balance", "losses"), teacher, 0.0)
    assert float(control.log_z.grad) == pytest.approx(-100 * LOG_Z, rel=1e-3)
    target, _ = gaussian(teacher.schedule)
    make = fewstep.get("trajectory_balance", "losses")
    for rate in (1.0, 100.0):
        control.log_z.data.fill_(LOG_Z / rate)
        value = make(target, teacher.kernels(4), rate=rate).value(control, torch.full((5,), LOG_Z))
        assert float(value.detach()) == pytest.approx(0, abs=1e-10)


def test_log_variance_gradient_is_twice_that_of_the_relative_entropy():
    """Richter et al. 2020, proposition 1: in expectation, on the control's own paths; the simulation must be detached."""
    schedule = VariancePreserving(0.1, 10.0)
    kernels = exponential(schedule, even_variance(schedule, 4))
    target, known = gaussian(schedule)
    grads = {}
    for name in ("kl", "log_variance"):
        control = Exact(known)
        control.shift.data += 0.2
        value, _ = fewstep.get(name, "losses")(target, kernels).loss("model", control, None, Streams(5, range(40_000)))
        grads[name] = float(torch.autograd.grad(value, control.shift)[0])
    assert grads["log_variance"] == pytest.approx(2 * grads["kl"], rel=0.05)


def test_paths_that_end_where_the_target_is_nothing_are_left_out_and_counted():
    @dataclass(frozen=True, eq=False)
    class Half(TargetDensity):
        dim: int = 2

        def log_prob(self, x):
            return torch.where(x[:, 0] > 0, -x.square().sum(1) / 2, -math.inf)

    teacher = TEACHERS[0]()
    control = Exact(Known(GaussianPrior(torch.zeros(2), torch.ones(2), teacher.schedule)))
    make = fewstep.get("log_variance", "losses")
    value, figures = make(Half(), teacher.kernels(4)).loss("model", control, None, Streams(0, range(4000)))
    assert float(value.detach()) < 1e-6
    assert figures["usable"] == pytest.approx(0.5, abs=0.04)

    @dataclass(frozen=True, eq=False)
    class Nothing(Half):
        def log_prob(self, x):
            return x[:, 0] * math.nan

    with pytest.raises(FloatingPointError, match="not finite"):
        make(Nothing(), teacher.kernels(4)).loss("model", control, None, Streams(0, range(64)))


# ---- grids, schedules, networks -------------------------------------------------------------------------------------


@pytest.mark.parametrize("grid", [even_variance, falling_cosine])
@pytest.mark.parametrize("steps", [1, 2, 64])
def test_grids_fall_from_one_to_zero(grid, steps):
    times = grid(VariancePreserving(), steps)
    assert times.shape == (steps + 1,)
    assert float(times[0]) == 1
    assert float(times[-1]) == 0
    assert bool((times[1:] < times[:-1]).all())


def test_grid_by_variance_loses_equal_shares():
    finest = 0.01
    _, sigma = Cosine()(even_variance(Cosine(), 40, finest))
    shares = (finest + (1 - finest) * sigma**2).log().diff()
    torch.testing.assert_close(shares, torch.full_like(shares, math.log(finest) / 40), atol=1e-4, rtol=0)


def test_brownian_schedule_is_the_pinned_motion_over_its_deviation():
    t = torch.linspace(0.01, 0.99, 20, dtype=torch.float64)
    alpha, sigma = Brownian()(t)
    r = 1 - t
    torch.testing.assert_close(alpha * r.sqrt(), r)
    torch.testing.assert_close(sigma * r.sqrt(), (r * (1 - r)).sqrt())
    torch.testing.assert_close(Brownian().time(Brownian().ratio(t)), t)
    ends = torch.tensor([0.0, 1.0], dtype=torch.float64)
    assert torch.equal(Brownian().time(Brownian().ratio(ends)), ends)


def test_an_untrained_network_is_the_start_that_its_gain_says():
    schedule, target = VariancePreserving(), Whitened(mixture(VariancePreserving()))
    y, t = torch.randn(5, 2, generator=torch.Generator().manual_seed(0)), torch.tensor(0.3)
    alpha, sigma = schedule(t)
    for gain in (0.0, 1.0):
        net = ControlNet(schedule, target, NetConfig(gain=gain))
        score = net.score(y, t)
        torch.testing.assert_close(
            score, -y + gain / (1 + 10 * sigma**2) * alpha**2 * (target.score(y) + y), atol=2e-4, rtol=1e-4
        )
        assert torch.equal(net.moments(y, t, net.guide(y)).spread, torch.ones(5, 2))


@torch.no_grad()
def test_a_gate_scales_the_place_of_a_control_and_nothing_else():
    schedule, target = VariancePreserving(), mixture(VariancePreserving())
    y, t = torch.randn(64, 2, generator=torch.Generator().manual_seed(0)), torch.tensor(0.3)
    alpha, sigma = schedule(t)
    plain, gated = (ControlNet(schedule, target, NetConfig(width=8, gain=0.0, gated=gate)) for gate in (False, True))
    weight, bias = torch.randn(4, 8), torch.randn(4)
    plain.load_state_dict({**plain.state_dict(), "last.weight": weight, "last.bias": bias})

    def place(net):
        """Return m of the Gaussian whose drift it is, and v."""
        drift, v = net.moments(y, t, None)
        return drift * (alpha**2 * v + sigma**2) + (1 - v) * alpha * y, v

    first, spread = place(plain)
    for gate, factor in ((0.0, 1.0), (-3.0, math.exp(-8 * math.tanh(3 / 8))), (-1e4, math.exp(-8))):
        last = {
            "last.weight": torch.cat([weight, torch.zeros(2, 8)]),
            "last.bias": torch.cat([bias, torch.full((2,), gate)]),
        }
        gated.load_state_dict({**plain.state_dict(), **last})
        found, same = place(gated)
        assert torch.equal(same, spread)
        torch.testing.assert_close(found, factor * first, rtol=1e-4, atol=1e-5)


def test_guides_are_clipped_and_never_nan():
    @dataclass(frozen=True, eq=False)
    class Steep(TargetDensity):
        dim: int = 2

        def log_prob(self, x):
            return -1e6 * x.square().sum(1)

        def score(self, x):
            return torch.where(x > 2, math.nan, -2e6 * x)

    net = ControlNet(VariancePreserving(), Steep(), NetConfig(clip=7.0))
    assert torch.equal(net.guide(torch.tensor([[1.0, 3.0], [-1.0, 0.0]])), torch.tensor([[-7.0, 0.0], [7.0, 0.0]]))


def test_schedules_that_explode_are_refused():
    with pytest.raises(ValueError, match="preserve"):
        ControlNet(VarianceExploding(), mixture(VariancePreserving()))


# ---- teachers and samplers ------------------------------------------------------------------------------------------


def exact_sampler(steps=8):
    teacher = TEACHERS[0](steps=steps)
    target, control = gaussian(teacher.schedule)
    return PathSampler(Whitened(target), control, teacher, steps)


def test_samples_follow_the_target_and_do_not_depend_on_chunks():
    sampler = exact_sampler()
    draws = sampler.sample(20_000, seed=3)
    assert draws.kind == "unbiased"
    assert (draws.nfe, draws.target_calls, draws.gradient_calls) == (8, 1, 0)
    assert draws.ess > 0.999
    assert draws.log_z == pytest.approx(LOG_Z, abs=1e-3)
    mean, std = torch.tensor(MEAN), torch.tensor(VARIANCES).sqrt()
    assert bool(((draws.x.mean(0) - mean).abs() < 4 * std / math.sqrt(20_000) + 0.01 * mean.abs()).all())
    assert bool((draws.x.std(0) / std - 1).abs().max() < 4 / math.sqrt(40_000))
    with pytest.raises(ValueError, match="chunk must be at least 1"):
        sampler.sample(8, chunk=0)
    small = sampler.sample(1500, seed=3, chunk=1024)
    assert torch.equal(small.x, draws.x[:1500])
    assert torch.equal(small.log_weights, draws.log_weights[:1500])
    assert not bool((sampler.sample(1500, seed=4).x == small.x).any())
    assert sampler.sample(10, weights=False).log_weights is None
    with pytest.raises(ValueError, match="at least 1"):
        sampler.sample(0)


@pytest.mark.parametrize("name", ["dis", "dds", "pis"])
def test_teachers_survive_their_description_and_samplers_the_disk(tmp_path, name):
    teacher = fewstep.get(name, "teachers")(steps=3, net=NetConfig(width=16, gain=0.5), grid=(1.0, 0.5, 0.1, 0.0))
    assert build_teacher(teacher.describe()) == teacher
    target = mixture(VariancePreserving())
    whitened = Whitened(target, torch.tensor([0.1, -0.2]), torch.tensor([1.5, 0.7]))
    sampler = teacher.sampler(whitened, teacher.model(whitened, seed=4))
    sampler.save(tmp_path)
    again = load_density_sampler(tmp_path, target)
    assert torch.equal(again.sample(50).x, sampler.sample(50).x)
    assert torch.equal(again.sample(50).log_weights, sampler.sample(50).log_weights)
    with pytest.raises(ValueError, match="dimensions"):
        load_density_sampler(tmp_path, gaussian(VariancePreserving())[0])


def test_wrong_settings_are_refused():
    for name, wrong, text in (
        ("grid", "even", "grid must"),
        ("grid", (0.9, 0.1, 0.0), "from 1 to 0"),
        ("discretisation", "rk4", "discretisation must"),
    ):
        with pytest.raises(ValueError, match=text):
            TEACHERS[0](**{name: wrong})
    with pytest.raises(ValueError, match="unknown loss"):
        TEACHERS[0]().objective(Whitened(mixture(VariancePreserving())), "log_varience")
