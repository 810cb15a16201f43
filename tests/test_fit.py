"""Training on a density alone: LRDS's reference, iDEM's estimate, and `fit` from a callable to a sampler on disk."""

import json
import math

import numpy as np
import pytest
import torch

import fewstep
from fewstep.checkpoints import last_checkpoint
from fewstep.core.noise import Streams
from fewstep.core.schedule import VariancePreserving
from fewstep.densities.base import load_density_sampler
from fewstep.densities.fit import FitOptions, options_for, train
from fewstep.densities.mixtures import fit_mixture
from fewstep.densities.networks import ControlNet, Moments, NetConfig, drift_of
from fewstep.densities.paths import simulate
from fewstep.densities.teachers._base import build_teacher
from fewstep.densities.teachers.dis import DIS
from fewstep.densities.teachers.idem import IDEM, EnergyMatching, Replayed, drift_estimate
from fewstep.densities.teachers.lrds import LRDS, Around
from fewstep.densities.teachers.matched import Matched
from fewstep.densities.whitened import Whitened
from fewstep.priors.exact import MixturePrior
from laws import Law

SMALL = NetConfig(width=32)


def two_modes(dim=2, share=2 / 3, variance=0.05):
    """Return the two modes of LRDS's paper: 2/3 at -1, 1/3 at +1."""
    means = torch.stack([-torch.ones(dim), torch.ones(dim)])
    return Law(MixturePrior(torch.tensor([share, 1 - share]), means, torch.full((2,), variance)), 0.0)


def share_of_first(draws):
    """Return the self-normalised weight of the mode at -1 and its standard error."""
    return (float(v) for v in draws.expectation(lambda x: (x.sum(1) < 0).float()))


# ---- mixtures fitted to samples -------------------------------------------------------------------------------------


def test_expectation_maximisation_finds_the_mixture():
    means = torch.tensor([[-3.0, 0.0], [2.0, 1.0], [0.0, 4.0]])
    shares, variances = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([[0.2, 0.5], [1.0, 0.1], [0.3, 0.3]])
    count = 5000
    x = MixturePrior(shares, means, variances).sample(count, seed=1)
    for start in (None, means + 0.5):
        fitted = fit_mixture(x, 3, start)
        order = torch.cdist(means, fitted.means).argmin(1)
        assert sorted(order.tolist()) == [0, 1, 2]
        number = count * shares[:, None]
        assert bool(((fitted.weights[order] - shares).abs() < 5 * (shares / count).sqrt()).all())
        assert bool(((fitted.means[order] - means).abs() < 5 * (variances / number).sqrt()).all())
        assert bool(((fitted.variances[order] / variances - 1).abs() < 5 * (2 / number).sqrt()).all())
    with pytest.raises(ValueError, match="cannot carry"):
        fit_mixture(x[:2], 3)


def test_chains_start_around_the_modes():
    modes = torch.tensor([[0.0, 1.0], [5.0, -2.0]])
    base = Around(modes)
    x = base.sample(Streams(0, range(4000)))
    assert bool(((x[::2].mean(0) - modes[0]).abs() < 0.01).all())
    assert bool(((x[1::2].mean(0) - modes[1]).abs() < 0.01).all())
    exact = MixturePrior(torch.ones(2), modes, torch.full((2,), base.width**2))
    torch.testing.assert_close(base.log_prob(x), exact.log_prob(x), atol=2e-3, rtol=1e-4)


# ---- LRDS -----------------------------------------------------------------------------------------------------------


def test_the_start_of_lrds_is_the_reversal_of_its_mixture():
    """Before training the control is exactly the mixture that was fitted to the samples; the network adds nothing."""
    target = two_modes(variance=0.2)
    whitened = Whitened(target)
    teacher = LRDS(steps=16, components=2, net=SMALL, samples=target.prior.sample(4000))
    control = teacher.model(whitened, seed=0)
    y, t = torch.randn(9, 2, generator=torch.Generator().manual_seed(0)), torch.tensor(0.4)
    mine, wanted = control.drift(y, t, 0 * y), drift_of(control.reference, y, t)
    torch.testing.assert_close(mine, wanted)
    torch.testing.assert_close(wanted, drift_of(target.prior, y, t), atol=0.35, rtol=0.1)
    assert float(control.guide(y).abs().max()) < 2  # the fit is nearly the target: little is left to learn
    assert float(ControlNet(teacher.schedule, whitened).guide(y).abs().max()) > 4
    draws = teacher.sampler(whitened, control).sample(4000)
    first, error = share_of_first(draws)
    assert first == pytest.approx(2 / 3, abs=4 * error)
    assert draws.ess > 0.5


def test_lrds_starts_from_modes_with_wrong_weights_and_is_kept_on_disk(tmp_path):
    target = two_modes()
    teacher = LRDS(steps=12, modes=((-1.0, -1.0), (1.0, 1.0)), net=SMALL)
    assert build_teacher(teacher.describe()) == teacher
    whitened = Whitened(target)
    control = teacher.model(whitened, seed=0)
    order = control.reference.means[:, 0].argsort()
    means = control.reference.means[order]
    torch.testing.assert_close(means, torch.tensor([[-1.0, -1.0], [1.0, 1.0]]), atol=0.06, rtol=0)
    torch.testing.assert_close(control.reference.weights[order], torch.tensor([0.5, 0.5]), atol=0.02, rtol=0)
    sampler = teacher.sampler(whitened, control)
    assert share_of_first(sampler.sample(4000))
    sampler.save(tmp_path)
    assert torch.equal(load_density_sampler(tmp_path, target).sample(20).x, sampler.sample(20).x)
    options = FitOptions(train_steps=60, batch=128, lr=5e-3)
    draws = train(whitened, teacher, None, options).sample(8000)
    plain = float((draws.x.sum(1) < 0).float().mean())
    assert abs(plain - 2 / 3) < abs(plain - 1 / 2)  # the control corrects the weights of the reference
    first, error = share_of_first(draws)
    assert first == pytest.approx(2 / 3, abs=4 * error)


# ---- iDEM -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("t", [0.1, 0.3, 0.8])
def test_estimated_drift_tends_to_the_exact_one(t):
    schedule = VariancePreserving()
    target = Law(
        MixturePrior(torch.tensor([0.7, 0.3]), torch.tensor([[-0.8, 0.2], [1.0, 0.5]]), torch.tensor([0.3, 0.4]))
    )
    control = ControlNet(schedule, target, NetConfig(clip=1e3))
    y = torch.tensor([[0.3, -0.2], [-1.0, 1.0], [0.9, 0.4]])
    times = torch.full((3,), t)
    exact = drift_of(target.prior, y, torch.tensor(t))
    noise = Streams(0, range(3))
    repeats = torch.stack([drift_estimate(control, target, y, times, noise.randn(4000, 2)) for _ in range(20)])
    error = repeats.std(0) / math.sqrt(20)
    assert bool(
        ((repeats.mean(0) - exact).abs() < 4 * error + 5e-3).all()
    )  # 5e-3: what is left of the bias at K = 4000
    alpha, _ = schedule(torch.tensor(t))
    plain = target.score(alpha * y) + alpha * y  # the guide at the mean instead of the mean of the guides
    assert float((plain - exact).abs().max()) > 0.05


def test_the_ring_is_filled_refreshed_and_counted():
    target = two_modes(variance=0.3)
    teacher = IDEM(steps=6, net=SMALL, ring=48, refresh=2, draws=8)
    whitened = Whitened(target)
    model = teacher.model(whitened, seed=0)
    objective = teacher.objective(whitened, "energy_matching")
    rings = []
    for turn in range(5):
        objective.loss("model", model, None, Streams(turn, range(16)))
        rings.append(model.samples.clone())
    assert int(model.turn) == 5
    assert bool((rings[0].std(0) > 0.1).all())
    assert torch.equal(rings[0], rings[1])
    assert (rings[2] != rings[1]).any(1).nonzero()[:, 0].tolist() == list(range(16, 32))
    assert (rings[4] != rings[3]).any(1).nonzero()[:, 0].tolist() == list(range(32, 48))
    with pytest.raises(ValueError, match="one loss"):
        teacher.objective(whitened, "kl")


def test_energy_matching_of_the_exact_drift_is_the_noise_of_the_estimate():
    """More draws, less loss; a drift that is off costs its square on top."""
    target = two_modes(variance=0.5)
    whitened, teacher = Whitened(target), IDEM(steps=16, net=SMALL)

    class Right(ControlNet):
        off = 0.0

        def moments(self, y, t, guide):
            return Moments(drift_of(target.prior, y, t) + self.off, torch.ones_like(y))

    control = Right(teacher.schedule, whitened, SMALL)
    with torch.no_grad():
        samples = simulate(control, teacher.kernels(16), Streams(9, range(1024))).y
        errors = {}
        for draws, off in ((16, 0.0), (512, 0.0), (512, 0.5)):
            model = Replayed(control, 1024)
            model.samples.copy_(samples)
            model.turn += 1
            control.off = off
            objective = EnergyMatching(whitened, teacher.kernels(16), draws)
            errors[draws, off] = objective.loss("model", model, None, Streams(1, range(1024)))[1]["error"]
    assert errors[512, 0.0] < 0.1 * errors[16, 0.0]
    assert errors[512, 0.5] == pytest.approx(0.25 + errors[512, 0.0], abs=0.05)


# ---- fit ------------------------------------------------------------------------------------------------------------


def bump(x):
    """log Z = 0.7 + log(2 pi 0.5): one item at a time."""
    return 0.7 - (x - 3).square().sum()


def test_fit_takes_a_callable_and_gives_a_sampler(tmp_path):
    sampler = fewstep.fit(bump, 2, sampler=DIS(steps=16, net=SMALL), train_steps=40, batch=64, out=tmp_path)
    draws = sampler.sample(4000, seed=1)
    assert draws.ess > 0.7
    truth = 0.7 + math.log(math.pi)
    low, high = draws.log_z_interval(0.9999)
    assert low < truth < high
    assert high - low < 0.1
    mean, error = draws.expectation(lambda x: x)
    assert bool(((mean - 3).abs() < 4 * error).all())
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert {"model/loss", "model/elbo", "model/ess", "model/usable"} <= set(lines[-1])
    assert last_checkpoint(tmp_path).name == "step_00000040"


def test_fit_takes_what_a_callable_does_not_say(tmp_path):
    """A score and a log Z of numpy, a box; the folder alone then gives the sampler back for the callable."""
    quick = {"sampler": DIS(steps=4, net=NetConfig(8)), "train_steps": 1, "batch": 32, "whiten": False}

    def on_arrays(x):
        return -0.5 * (np.asarray(x) ** 2).sum(-1)

    plain = fewstep.fit(on_arrays, dim=2, score=lambda x: -np.asarray(x), log_z=math.log(2 * math.pi), **quick)
    assert plain.target.log_z == math.log(2 * math.pi) and plain.sample(64).ess > 0.9
    with pytest.raises(ValueError, match="has its own score"):
        fewstep.fit(plain.target, score=lambda x: -x, **quick)

    def bounded(x):
        return x[..., 0].log() + torch.log1p(-x[..., 0]) - x[..., 1]

    boxed = fewstep.fit(bounded, dim=2, support=(0, [1, None]), **quick)
    boxed.save(tmp_path)
    again = load_density_sampler(tmp_path, bounded)
    ends = [[torch.as_tensor(end).expand(2).tolist() for end in s.target.support] for s in (boxed, again)]
    assert ends[0] == ends[1] == [[0.0, 0.0], [1.0, math.inf]]
    mine, theirs = boxed.sample(64), again.sample(64)
    assert torch.equal(mine.x, theirs.x) and torch.equal(mine.log_weights, theirs.log_weights)
    assert bool((mine.x > 0).all())


def test_a_folder_takes_a_callable_of_its_dimension(tmp_path):
    quick = {"sampler": DIS(steps=4, net=NetConfig(8)), "train_steps": 1, "batch": 32, "whiten": False}
    fewstep.fit(bump, 2, **quick).save(tmp_path)
    sampler = load_density_sampler(tmp_path, bump)
    assert sampler.target.dim == 2 and sampler.target.support is None
    with pytest.raises(TypeError, match="must map"):
        load_density_sampler(tmp_path, lambda x: x)


def test_a_run_that_was_stopped_is_resumed_to_the_same_sampler(tmp_path):
    target, teacher = two_modes(variance=0.3), DIS(steps=6, net=NetConfig(width=16))
    whole = fewstep.fit(
        target, sampler=teacher, train_steps=8, batch=32, out=tmp_path / "a", checkpoint_every=4, whiten=False
    )
    halves = tmp_path / "b"
    fewstep.fit(target, sampler=teacher, train_steps=8, batch=32, out=halves, checkpoint_every=4, whiten=False)
    for file in (halves / "checkpoints" / "step_00000008").iterdir():
        file.unlink()
    again = fewstep.fit(target, sampler=teacher, train_steps=8, batch=32, out=halves, checkpoint_every=4, whiten=False)
    assert torch.equal(whole.sample(50).x, again.sample(50).x)
    with pytest.raises(ValueError, match="another batch"):
        fewstep.fit(target, sampler=teacher, train_steps=8, batch=16, out=halves, whiten=False)


def test_a_folder_is_of_one_density(tmp_path):
    """Without whitening nothing but the density itself says whose checkpoints these are; a longer training goes on."""
    quick = {"sampler": DIS(steps=4, net=NetConfig(8)), "batch": 32, "whiten": False, "out": tmp_path}
    first = fewstep.fit(bump, 2, train_steps=2, **quick)
    for other in (lambda x: bump(x - 0.1), lambda x: bump(x) + 0.1):
        with pytest.raises(ValueError, match="a run with another target; choose"):
            fewstep.fit(other, 2, train_steps=2, **quick)
    again = fewstep.fit(bump, 2, train_steps=2, **quick)
    assert torch.equal(first.sample(8).x, again.sample(8).x)
    fewstep.fit(bump, 2, train_steps=3, **quick)
    assert last_checkpoint(tmp_path).name == "step_00000003"


@pytest.mark.parametrize("name", ["dis", "dds", "pis", "lrds", "idem"])
def test_every_teacher_fits_by_name(name):
    sampler = fewstep.fit(two_modes(variance=0.4), sampler=name, train_steps=3, batch=32, whiten=name == "dis")
    draws = sampler.sample(64, steps=5)
    assert draws.nfe == 5
    assert bool(draws.x.isfinite().all())
    assert draws.nonfinite == 0


def test_wrong_names_are_answered_with_the_nearest():
    with pytest.raises(ValueError, match="did you mean dis"):
        fewstep.fit(bump, 2, sampler="diss")
    with pytest.raises(ValueError, match="did you mean log_variance"):
        fewstep.fit(bump, 2, loss="logvariance")
    with pytest.raises(TypeError, match=r"unexpected keyword argument 'trainsteps' .*did you mean train_steps"):
        fewstep.fit(bump, 2, trainsteps=5)
    with pytest.raises(TypeError, match=r"'bach' .*did you mean batch"):
        fewstep.distill(two_modes().prior, target=two_modes(), bach=5)
    assert {"dds", "dis", "idem", "lrds", "pis"} <= set(fewstep.available("teachers"))
    assert {"kl", "log_variance", "trajectory_balance"} <= set(fewstep.available("losses"))


@pytest.mark.parametrize("loss", ["kl", "log_variance", "trajectory_balance"])
def test_training_on_every_loss_improves_the_weights(loss):
    """Two modes that the untrained sampler already covers: after 60 steps the ELBO has risen by most of what it lacked."""
    target, teacher = two_modes(variance=0.3), DIS(steps=12, net=SMALL)
    whitened = Whitened(target)
    before = teacher.sampler(whitened, teacher.model(whitened, 0)).sample(2000).elbo
    after = train(whitened, teacher, loss, FitOptions(train_steps=80, batch=128, lr=5e-3)).sample(2000).elbo
    assert before < -0.3
    assert after > 0.5 * before


def test_a_teacher_brings_its_own_options_where_none_are_given(monkeypatch):
    assert options_for(DIS()) == FitOptions()
    assert options_for(Matched(), batch=7) == FitOptions(8000, 7, 4e-3, 0.999)
    seen = []
    monkeypatch.setattr("fewstep.densities.fit.train", lambda *given: seen.append(given[-1]))
    target, teacher = fewstep.target("nine_modes"), Matched(samples=torch.randn(64, 2))
    for given in ({}, {"train_steps": 5}, {"options": FitOptions(lr=1e-3), "train_steps": 5}):
        fewstep.fit(target, sampler=teacher, whiten=False, **given)
    own = FitOptions(8000, 512, 4e-3, 0.999, whiten=False)
    assert seen[0] == own and seen[1].train_steps == 5 and seen[1].lr == own.lr
    assert seen[2] == FitOptions(5, lr=1e-3, whiten=False)


def test_another_default_dtype_is_refused_in_one_line():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with pytest.raises(NotImplementedError, match="compute in float32"):
            fewstep.fit(lambda x: -0.5 * x.square().sum(-1), 2, train_steps=1)
    finally:
        torch.set_default_dtype(before)
