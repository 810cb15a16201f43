"""A control matched to draws: both identities of the drift, their best mixture, the loss at its minimum, and what comes out."""

import math
import os
import signal
from dataclasses import replace

import pytest
import torch

import fewstep
from fewstep.core.noise import Streams
from fewstep.densities.base import load_density_sampler
from fewstep.densities.draws import Draws
from fewstep.densities.fit import options_for
from fewstep.densities.mcmc.hamiltonian import Hamiltonian
from fewstep.densities.mcmc.replica_exchange import ReplicaExchange
from fewstep.densities.networks import NetConfig, gaussian_drift
from fewstep.densities.targets._mixture import Concentric
from fewstep.densities.teachers.matched import Informed, Matched, shares_of
from fewstep.densities.whitened import Whitened, whiten
from fewstep.priors.exact import MixturePrior
from fewstep.testing.density import check_target
from fewstep.training import Trainer
from laws import SCHEDULE, Known, Law

MEANS, WIDTHS = torch.tensor([[-1.0, 0.4], [0.9, -0.2]]), torch.tensor([[0.05, 0.2], [0.1, 0.02]])


def mixture():
    return MixturePrior(torch.tensor([0.4, 0.6]), MEANS, WIDTHS, SCHEDULE)


class Off(Known):
    """A known control with something to train: its drift off by `shift`, its spread by the factor e^`widen`."""

    def __init__(self, denoiser, variances, shift=0.0, widen=0.0):
        super().__init__(denoiser, variances)
        self.shift = torch.nn.Parameter(torch.tensor(shift))
        self.widen = torch.nn.Parameter(torch.tensor(widen))

    def moments(self, y, t, guide):
        drift, spread = super().moments(y, t, guide)
        return type(super().moments(y, t, guide))(drift + self.shift, spread * self.widen.exp())


def matched(prior, variances, n=60_000, phases=1, **off):
    """Return the loss and its gradients, for draws of `prior`."""
    teacher, target = Matched(steps=16, phases=phases), Law(prior)
    x = target.sample(Streams(0, range(n)))
    guides = target.score(x) + x
    objective = teacher.objective(Whitened(target), "matching")
    informed = Informed(Off(prior, variances, **off), x, guides, shares_of(x, guides, SCHEDULE, objective.times))
    loss, figures = objective.loss("model", informed, None, Streams(1, range(n)))
    loss.backward()
    return loss.item(), figures["error"], informed.control


def test_both_targets_have_the_drift_as_their_mean():
    """E[B | y] = E[A | y] = G: the error of the target, times any function of y, has mean zero."""
    prior, n = mixture(), 200_000
    x, z = prior.sample(n, Streams(0, range(n))), Streams(1, range(n)).randn(2)
    guides = Law(prior).score(x) + x
    for t in (0.15, 0.4):
        alpha, sigma = SCHEDULE(torch.tensor(t))
        y = alpha * x + sigma * z
        drift = Known(prior).drift(y, torch.tensor(t), None)
        for wanted, right in (
            (x - alpha / sigma * z, True),
            (guides, True),
            (guides - x, False),
            (x - z / sigma, False),
        ):
            product = (wanted - drift) * torch.tanh(3 * y)
            score = product.mean(0) / (product.std(0) / n**0.5)
            assert (float(score.abs().max()) < 4) == right


def test_gaussian_modes_leave_no_noise_in_the_mixed_target():
    variances = torch.tensor([[0.05, 0.6]])
    prior = MixturePrior(torch.ones(1), torch.tensor([[0.0, 0.0]]), variances, SCHEDULE)
    x = prior.sample(20_000, Streams(0, range(20_000)))
    times = torch.tensor([0.8, 0.3, 0.1, 0.02])
    alpha, sigma = (c[:, None] for c in SCHEDULE(times))
    best = sigma**2 * (1 - variances) / (alpha**2 * variances + sigma**2)
    found = shares_of(x, Law(prior).score(x) + x, SCHEDULE, times)
    assert torch.allclose(found, best, atol=0.02)
    _, error, _ = matched(prior, variances[0])
    _, noisy, _ = matched(prior, variances[0], shift=0.3)
    assert error < 1e-4 and noisy > 1e-3


@pytest.mark.parametrize("phases", [1, 4])
def test_the_loss_has_its_minimum_at_the_exact_control(phases):
    """At the exact drift and, for a Gaussian, the exact spread the gradients vanish; a wrong one is pushed back."""
    variances = torch.tensor([0.05, 0.6])
    prior = MixturePrior(torch.ones(1), torch.tensor([[0.2, -0.1]]), variances[None], SCHEDULE)
    _, _, at = matched(prior, variances, phases=phases)
    _, _, wide = matched(prior, variances, phases=phases, widen=0.5)
    _, _, narrow = matched(prior, variances, phases=phases, widen=-0.5)
    assert abs(float(at.shift.grad)) < 1e-3 and abs(float(at.widen.grad)) < 2e-4
    assert float(wide.widen.grad) > 1e-3 and float(narrow.widen.grad) < -1e-3
    _, _, off = matched(mixture(), 0.2, phases=phases, shift=0.1)
    _, _, other = matched(mixture(), 0.2, phases=phases, shift=-0.1)
    assert float(off.shift.grad) > 0.01 > -0.01 > float(other.shift.grad)


def test_paths_of_all_phases_meet_the_times_of_a_finer_grid():
    teacher, target = Matched(steps=8, phases=4), Whitened(fewstep.target("nine_modes"))
    objective = teacher.objective(target, "matching")
    assert [len(path) for path in objective.kernels] == [9, 9, 9, 8]
    assert all(path.times[0] == 1 and path.times[-1] == 0 for path in objective.kernels)
    assert torch.equal(objective.times.unique(), teacher.kernels(32).times[:-1].flip(0))
    assert torch.equal(objective.kernels[-1].times, Matched(steps=8).objective(target, "matching").kernels[0].times)
    for wrong in ({"phases": 0}, {"phases": 2, "steps": 2, "grid": (1.0, 0.5, 0.0)}):
        with pytest.raises(ValueError, match="phases must be 1, or more of a grid"):
            Matched(**wrong)


def test_chains_in_bent_coordinates_draw_the_neck_of_a_funnel():
    """x_1 is N(0, 9), of which 9.1 % lie below -4; as many steps in plain coordinates draw half of that."""
    target, shares = fewstep.target("funnel"), {}
    for bend in (False, True):
        teacher = Matched(draws=4096, thin=4, warmup=200, bend=bend)
        found, whitened = teacher.prepared(whiten(target), 0)
        shares[bend] = float((found.samples[:, 0] < -4).double().mean()) / 0.0912
        assert not whitened.bend.any(), "only the chains run there"
    assert shares[False] < 0.7 < shares[True] < 1.4
    few = Matched(draws=48, chains=16, levels=3, thin=1, warmup=6, bend=True).prepared(Whitened(target), 0)[0]
    assert few.samples.shape == (48, 10)


def test_drift_of_a_gaussian():
    mean, variance = torch.tensor([0.3, -0.5]), torch.tensor([0.2, 1.7])
    prior = MixturePrior(torch.ones(1), mean[None], variance[None], SCHEDULE)
    y, t = Streams(0, range(9)).randn(2), torch.tensor(0.35)
    assert torch.allclose(gaussian_drift(y, mean, variance, *SCHEDULE(t)), Known(prior).drift(y, t, None), atol=1e-5)


def test_matched_sampler_of_a_mixture(tmp_path):
    target = Law(mixture())
    teacher = Matched(steps=16, draws=2048, levels=4, chains=128, warmup=60, net=NetConfig(width=32))
    sampler = fewstep.fit(target, sampler=teacher, train_steps=250, batch=256, lr=4e-3, ema=0.95)
    draws = sampler.sample(8192, seed=1)
    low, high = draws.log_z_interval(0.999)
    assert draws.ess > 0.5 and low < 0.7 < high and high - low < 0.2
    right = float((draws.x[:, 0] > 0).double().mean())
    assert abs(right - 0.6) < 0.06
    sampler.save(tmp_path)
    assert torch.equal(load_density_sampler(tmp_path, target).sample(64).x, sampler.sample(64).x)


def test_draws_of_anyone_are_taken_and_their_absence_is_said():
    target = Law(mixture())
    given = Matched(samples=target.sample(Streams(0, range(512))))
    teacher, whitened = given.prepared(Whitened(target), 0)
    y = whitened.to_y(given.samples)
    assert teacher is given and torch.allclose(y.mean(0), torch.zeros(2), atol=1e-5)
    assert torch.allclose(y.std(0), torch.ones(2), atol=1e-5)
    with pytest.raises(ValueError, match="no draws"):
        Matched().model(whitened, 0)
    with pytest.raises(ValueError, match="one loss"):
        given.objective(whitened, "kl")


def test_steps_of_many_sizes_reach_the_neck_of_a_funnel():
    """x_1 of a funnel is N(0, 9): without small steps its lower tail is not found."""
    shares = []
    for reach in (1.0, 100.0):
        exchange = ReplicaExchange(Hamiltonian(4, 0.8, reach), levels=6, chains=64, warmup=200, thin=2)
        draws = exchange.sample(fewstep.target("funnel"), 4096, seed=0, dtype=torch.float32)
        shares.append(float((draws.x[:, 0] < -3).double().mean()))
    assert shares[0] < 0.08 and 0.11 < shares[1] < 0.21  # exactly 0.159


def test_replica_exchange_starts_from_narrow_and_wide_normal_laws_in_equal_parts():
    base = Concentric(3, (1.0, 10.0))
    check_target(base)
    x = base.sample(Streams(0, range(4000)))
    radius = x.square().sum(1)
    expected = 3 * (1 + 100) / 2
    error = ((15 * (1 + 100**2) / 2 - expected**2) / 4000) ** 0.5
    assert abs(float(radius.mean()) - expected) < 4 * error < expected / 10


def test_a_tail_that_a_narrow_start_misses_is_found_from_a_wide_one():
    """Between N(0, 1) and a mode thirty deviations away no ladder of three temperatures has a point in common."""
    far = Law(MixturePrior(torch.ones(2) / 2, torch.tensor([[0.0], [30.0]]), torch.ones(2, 1), SCHEDULE))

    def share(*widths):
        teacher = Matched(draws=1024, levels=3, chains=64, warmup=100, thin=4, widths=widths)
        return float((teacher.prepared(Whitened(far), 0)[0].samples > 15).float().mean())

    assert share(1.0) == 0 and 0.2 < share(1.0, 20.0) < 0.8


def test_kernels_are_as_narrow_as_the_neck_of_a_funnel():
    teacher = Matched(net=NetConfig(width=8, depth=1))
    control = teacher.control(Whitened(fewstep.target("nine_modes")))
    with torch.no_grad():
        control.last.bias[2:] = -9.6  # x_1 = -6 in coordinates where the others have a deviation of 6
        spread = control.moments(torch.zeros(1, 2), torch.zeros(1), torch.zeros(1, 2)).spread
    assert float(spread.max()) < math.exp(-9.5)


def test_the_preset_for_narrow_parts_resolves_them():
    """Half of the mass in a mode of a 300th of the width: weights then need draws there that are not much wider."""
    where = torch.tensor([0.8, 0.8])
    prior = MixturePrior(
        torch.tensor([0.5, 0.5]), torch.stack([0 * where, where]), torch.tensor([[1.0] * 2, [0.003**2] * 2]), SCHEDULE
    )
    target = Law(prior)
    x = target.sample(Streams(0, range(8192)))
    net = NetConfig(gain=0.0)
    found = {}
    for name, teacher in {
        "narrow": Matched.preset("narrow", samples=x, net=net),
        "default": Matched(samples=x),
    }.items():
        sampler = fewstep.fit(target, sampler=teacher, train_steps=600, batch=512, whiten=False)
        draws = sampler.sample(2048, 64)
        apart = (draws.x - where).norm(dim=1)
        found[name] = draws.ess, float(apart[apart < 0.05].median()) / 0.003
    assert found["narrow"][0] > 2 * found["default"][0]
    assert found["narrow"][1] < 0.75 * found["default"][1], "exact: 1.18"
    with pytest.raises(ValueError, match="no preset 'narrower'; it has narrow, modes, many"):
        Matched.preset("narrower")


def test_wider_networks_are_trained_by_smaller_steps():
    rates = {width: options_for(Matched(net=NetConfig(width=width))).lr for width in (32, 96, 192)}
    assert rates[32] == rates[96] == 2 * rates[192] == options_for(Matched()).lr
    assert options_for(Matched.preset("many")).lr < rates[96] == options_for(Matched.preset("narrow")).lr
    assert options_for(Matched.preset("many"), lr=0.01).lr == 0.01


def crooked(n=8192, **settings):
    """Return a mixture whose modes have weights 0.4 and 0.6, and a teacher that is given draws with 0.7 and 0.3."""
    target, wrong = Law(mixture()), MixturePrior(torch.tensor([0.7, 0.3]), MEANS, WIDTHS, SCHEDULE)
    samples = wrong.sample(n, Streams(0, range(n)))
    return target, Matched(samples=samples, draws=n, steps=16, net=NetConfig(width=32), **settings)


SHORT = {"train_steps": 250, "batch": 256, "lr": 4e-3, "ema": 0.95, "whiten": False}


def test_a_further_training_puts_the_weights_of_modes_right():
    found = {}
    for rounds in (1, 2):
        target, teacher = crooked(rounds=rounds)
        x = fewstep.fit(target, sampler=teacher, **SHORT).sample(16_384, seed=3).x
        found[rounds] = float((x[:, 0] > 0).double().mean())
    assert abs(found[1] - 0.3) < 0.05 and abs(found[2] - 0.6) < 0.05


def test_draws_of_poor_weights_are_not_gone_by():
    """A sampler that has learned nothing of two narrow modes far apart: what its weights pick is a handful of points."""
    prior = MixturePrior(torch.ones(2) / 2, torch.tensor([[-3.0, 0.0], [3.0, 0.0]]), torch.full((2, 2), 1e-4), SCHEDULE)
    teacher = Matched(samples=prior.sample(256, Streams(0, range(256))), draws=256, steps=4, net=NetConfig(width=8))
    assert teacher.further == () and replace(teacher, rounds=2).further == ("round_2",)
    sampler = fewstep.fit(Law(prior), sampler=teacher, train_steps=1, batch=8, whiten=False)
    with pytest.warns(UserWarning, match="no further training: 1024 draws"):
        assert teacher.renewed(sampler, 0) is None
    good, teacher = crooked(2048)
    assert teacher.renewed(fewstep.fit(good, sampler=teacher, **SHORT), 0) is not None


def test_a_further_training_that_was_stopped_goes_on(tmp_path, monkeypatch):
    target, teacher = crooked(1024, rounds=2)
    short = {**SHORT, "train_steps": 20, "checkpoint_every": 5}
    monkeypatch.setattr("fewstep.densities.teachers.matched._TAIL", math.inf)
    monkeypatch.setattr(Draws, "ess", 1.0)
    whole = fewstep.fit(target, sampler=teacher, **short).tensors()
    step, stopped = Trainer._train_step, []

    def interrupted(self):
        if self.out.name == "round_2" and self.step == 7 and not stopped:
            stopped.append(os.kill(os.getpid(), signal.SIGINT))
        return step(self)

    monkeypatch.setattr(Trainer, "_train_step", interrupted)
    half = fewstep.fit(target, sampler=teacher, out=tmp_path, **short).tensors()
    resumed = fewstep.fit(target, sampler=teacher, out=tmp_path, **short).tensors()
    assert stopped and all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert not all(torch.equal(whole[name], half[name]) for name in whole)
