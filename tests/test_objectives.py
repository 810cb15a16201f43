"""The terms of the sampler's loss, each against a closed form or an analytic gradient, with planted variants that fail."""

import math

import pytest
import torch
from torch import nn

from fewstep.compat import prepare_torchvision
from fewstep.core.batch import item_dot
from fewstep.core.denoiser import Denoiser
from fewstep.core.likelihood import FlatLikelihood, GaussianLikelihood
from fewstep.core.noise import Noise
from fewstep.core.schedule import VariancePreserving
from fewstep.objectives.adversarial import Critic, CriticConfig, critic_loss, generator_loss
from fewstep.objectives.embeddings import Features, Patches, measured
from fewstep.objectives.energy import energy_score
from fewstep.objectives.perceptual import lpips_distance, lpips_features
from fewstep.objectives.ud2m import UD2M, Contest, Weights
from fewstep.operators.matrix import MatrixOperator


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# ---- the energy score -------------------------------------------------------------------------------------------------

MEAN, SD, ITEMS, DRAWS = 0.7, 1.3, 20_000, 3


def scores(mean, sd, spread=1.0):
    """Return the score of N(mean, sd^2) for each of many truths from N(MEAN, SD^2), with common random numbers."""
    truth = MEAN + SD * randn(ITEMS).double()
    draws = mean + sd * randn(DRAWS * ITEMS, seed=1).double()
    return energy_score([draws[:, None, None]], [truth[:, None, None]], DRAWS, spread)


def mean_and_error(values):
    return float(values.mean()), float(values.std() / len(values) ** 0.5)


def folded(mean, sd):
    """E|N(mean, sd^2)|."""
    return sd * math.sqrt(2 / math.pi) * math.exp(-0.5 * (mean / sd) ** 2) + mean * math.erf(mean / sd / math.sqrt(2))


@pytest.mark.parametrize(("mean", "sd"), [(MEAN, SD), (0.0, 0.5), (2.0, 3.0)])
def test_the_energy_score_is_its_closed_form(mean, sd):
    found, error = mean_and_error(scores(mean, sd))
    expected = folded(mean - MEAN, math.hypot(sd, SD)) - sd / math.sqrt(math.pi)
    assert found == pytest.approx(expected, abs=4 * error)


def slopes(mean, sd, spread=1.0):
    """Return the score's derivatives in (mean, sd) as (estimate, standard error) each, from the derivatives of every item."""
    each = [torch.full((ITEMS,), v, dtype=torch.float64, requires_grad=True) for v in (mean, sd)]
    values = scores(*(v.repeat(DRAWS) for v in each), spread)
    return [mean_and_error(g) for g in torch.autograd.grad(values.sum(), each)]


def test_the_energy_score_is_proper_and_less_spread_is_not():
    """At spread c the best sd is c SD / sqrt(2 - c^2): the true one at 1, and none at all at 0."""
    for spread in (1.0, 0.8, 0.5):
        best = spread * SD / math.sqrt(2 - spread**2)
        for slope, error in slopes(MEAN, best, spread):
            assert abs(slope) < 4 * error
    for wrong in ((MEAN + 0.3, SD), (MEAN - 0.3, SD)):
        assert abs(slopes(*wrong)[0][0]) > 4 * slopes(*wrong)[0][1]
    assert slopes(MEAN, 0.7 * SD)[1][0] < -4 * slopes(MEAN, 0.7 * SD)[1][1]
    assert slopes(MEAN, 1.3 * SD)[1][0] > 4 * slopes(MEAN, 1.3 * SD)[1][1]
    planted, error = slopes(MEAN, SD, 0.5)[1]  # the true sd is too large for it
    assert planted > 10 * error
    for sd in (SD, 0.1 * SD):
        planted, error = slopes(MEAN, sd, 0.0)[1]
        assert planted > 4 * error


def test_equal_draws_have_a_gradient_and_one_draw_is_refused():
    x = torch.zeros(4, 2, 3, requires_grad=True)
    energy_score([x], [torch.ones(2, 2, 3)], 2).sum().backward()
    assert bool(torch.isfinite(x.grad).all())
    with pytest.raises(ValueError, match="at least two draws"):
        energy_score([x], [x], 1)


# ---- embeddings -------------------------------------------------------------------------------------------------------


def test_the_metric_of_the_likelihood():
    matrix = randn(2, 4)
    likelihood = GaussianLikelihood(randn(3, 2), MatrixOperator(matrix), torch.tensor([0.1, 0.2, 0.3]))
    a, b = randn(6, 4, seed=1), randn(6, 4, seed=2)
    (one,), (two,) = measured(a, likelihood), measured(b, likelihood)
    assert one.shape == (6, 6, 1)
    v, sigma = a - b, torch.tensor([0.1, 0.2, 0.3]).repeat(2)
    image = v @ matrix.T
    torch.testing.assert_close(item_dot(one - two, one - two), item_dot(image, image) / sigma**2 + item_dot(v, v))
    with pytest.raises(TypeError, match="not linear-Gaussian"):
        measured(a, FlatLikelihood((4,), 3))


def test_patches():
    x = randn(2, 3, 32, 32)
    parts = Patches(8, 4, (1, 2))(x, FlatLikelihood((3, 32, 32), 2))
    assert [tuple(p.shape) for p in parts] == [(2, 192, 49), (2, 192, 9)]
    torch.testing.assert_close(parts[0][1, :, 8] * 192**0.5, x[1, :, 4:12, 4:12].flatten())  # second row, second column
    half = x[0, :, 8:24, :16].unflatten(1, (8, 2)).unflatten(3, (8, 2)).mean((2, 4))
    torch.testing.assert_close(parts[1][0, :, 3] * 192**0.5, half.flatten())


@pytest.fixture(scope="module")
def lpips_network():
    """A network of random weights: the formula is the same, and nothing needs to be there."""
    prepare_torchvision()
    lpips = pytest.importorskip("lpips")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = lpips.LPIPS(net="squeeze", pretrained=False, pnet_rand=True, verbose=False)
        for name, p in network.named_parameters():
            if "lin" in name:
                p.data = torch.rand(p.shape)  # published weights are not negative
    return network.eval().requires_grad_(False)


def test_the_features_reproduce_lpips(lpips_network):
    a, b = randn(2, 3, 48, 64).clamp(-1, 1), randn(2, 3, 48, 64, seed=1).clamp(-1, 1)
    one, two = (lpips_features(lpips_network, x) for x in (a, b))
    torch.testing.assert_close(lpips_distance(one, two), lpips_network(a, b).flatten(), rtol=1e-4, atol=1e-6)
    parts = Features(lpips_network)(a, FlatLikelihood((3, 48, 64), 2))
    assert all(torch.equal(p, q) for p, q in zip(parts, one, strict=True))
    for part, layer in zip(parts, lpips_network.net(a), strict=True):
        assert tuple(part.shape) == (2, layer.shape[1], layer.shape[2] * layer.shape[3])


def test_lpips_of_other_ranges_is_refused(lpips_network):
    for wrong in (255 * torch.rand(1, 3, 32, 32), torch.rand(1, 1, 32, 32), torch.rand(3, 32, 32)):
        with pytest.raises(ValueError, match=r"in \[-1, 1\], got"):
            lpips_features(lpips_network, wrong)


# ---- the critic -------------------------------------------------------------------------------------------------------


class Linear(nn.Module):
    """<w, x> in three places, the third twice as large."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(randn(3, 4, 4))

    def forward(self, x0, back, ratio):
        value = item_dot(self.w[None], x0)
        return torch.stack([value, value, 2 * value], 1)


def test_logits_one_per_place():
    critic = Critic(CriticConfig(width=4, stages=2))
    x, ratio = randn(2, 3, 16, 24), torch.tensor([0.1, 100.0])
    assert critic(x, x, ratio).shape == (2, 4 * 6)
    assert not torch.allclose(critic(x, x, ratio), critic(x, x, ratio.flip(0)))
    assert not torch.allclose(critic(x, x, ratio), critic(x, -x, ratio))
    with pytest.raises(ValueError, match="at least 1"):
        CriticConfig(stages=0)


def test_r1_is_the_gradient_of_the_mean_logit():
    critic, condition = Linear(), (torch.zeros(2, 3, 4, 4), torch.ones(2))
    real, fake = randn(2, 3, 4, 4, seed=1), randn(2, 3, 4, 4, seed=2)
    plain, penalised = (critic_loss(critic, real, fake, condition, r1) for r1 in (0.0, 3.0))
    slope = 4 / 3 * critic.w
    torch.testing.assert_close(penalised - plain, (1.5 * slope.square().sum()).expand(2))
    soft = nn.functional.softplus
    expected = soft(-critic(real, *condition)).mean(1) + soft(critic(fake, *condition)).mean(1)
    torch.testing.assert_close(plain, expected)
    torch.autograd.grad(penalised.sum(), critic.w)  # the penalty itself is trained


def test_the_generator_is_told_how_likely_its_draws_look():
    logits = randn(2, 3)
    torch.testing.assert_close(generator_loss(logits), -torch.sigmoid(logits).log().mean(1))


# ---- all together -----------------------------------------------------------------------------------------------------


class Prior(Denoiser):
    def __init__(self):
        super().__init__()
        self.schedule, self.event_shape = VariancePreserving(), (3, None, None)

    def forward(self, x_t, t, **cond):
        return x_t


class Draws(nn.Module):
    """a plus some noise, wherever it is called."""

    def __init__(self):
        super().__init__()
        self.a = nn.Parameter(torch.tensor(0.1))

    def forward(self, problem, x_t, t, noise, previous=None):
        return self.a + 0.2 * noise.randn_like(x_t)


SIZE = (3, 32, 32)
EVERY = {"energy": 1.0, "perceptual": 2.0, "noise": 3.0, "adversarial": 4.0}


def play(lpips_network, player="model", **weights):
    objective = UD2M(
        Prior(),
        Weights(**{**dict.fromkeys(EVERY, 0.0), **weights}),
        (Patches(8, 8, (1,)),),
        lpips_network,
        times=(0.5,),
        share=1.0,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        contest = Contest(Draws(), Critic(CriticConfig(width=4, stages=1)))
    batch = {"x0": randn(2, *SIZE).clamp(-1, 1), "likelihood": FlatLikelihood(SIZE, 2)}
    loss, figures = objective.loss(player, contest, batch, Noise(range(2)))
    return objective, contest, loss, figures


def test_every_term_can_be_switched_off(lpips_network):
    _, _, total, every = play(lpips_network, **EVERY)
    assert set(every) == set(EVERY)
    assert float(total) == pytest.approx(sum(EVERY[name] * value for name, value in every.items()), rel=1e-5)
    for off in EVERY:
        kept = {name: weight for name, weight in EVERY.items() if name != off}
        objective, contest, loss, figures = play(lpips_network, **kept)
        assert figures == pytest.approx({name: every[name] for name in kept})
        assert float(loss) == pytest.approx(float(total) - EVERY[off] * every[off], rel=1e-4)
        assert ("critic" in objective.players(contest)) == (off != "adversarial")


@pytest.mark.parametrize("cap", [1e9, 0.05])
def test_the_noise_prediction_is_a_weighted_error_of_x0(lpips_network, cap):
    objective, contest, loss, _ = play(lpips_network, noise=1.0, noise_cap=cap)
    alpha, sigma = objective.prior.schedule(torch.tensor(0.5))
    x0, noise = randn(2, *SIZE).clamp(-1, 1), Noise(range(2))
    t = objective.sample_times(noise, x0)
    assert t.tolist() == [0.5, 0.5]
    z = noise.randn_like(x0)
    streams = Noise.spawn(noise.seeds, range(2))
    x = contest.network(None, x0.repeat(2, 1, 1, 1), t, streams)
    abar = float(alpha**2)  # alpha^2 + sigma^2 = 1
    error = (x - x0.repeat(2, 1, 1, 1)).square().mean()
    assert abar / (1 - abar) > 0.05
    assert float(loss) == pytest.approx(min(abar / (1 - abar), cap) * float(error), rel=1e-5)
    epsilon = (alpha * x0 + sigma * z).repeat(2, 1, 1, 1) - alpha * x
    if cap > 1:
        assert float(loss) == pytest.approx(float((epsilon / sigma - z.repeat(2, 1, 1, 1)).square().mean()), rel=1e-4)


def test_turns_leave_the_other_player_alone(lpips_network):
    _, contest, loss, _ = play(lpips_network, "critic", **EVERY)
    loss.backward()
    assert contest.network.a.grad is None
    assert all(p.grad is not None and float(p.grad.abs().max()) > 0 for p in contest.critic.parameters())
    objective, contest, loss, _ = play(lpips_network, **EVERY)
    grads = torch.autograd.grad(loss, list(objective.players(contest)["model"]))
    assert all(float(g.abs().max()) > 0 for g in grads)


def test_what_is_refused(lpips_network):
    for wrong, match in (
        ({"weights": Weights(), "embeddings": ()}, "energy score needs"),
        ({"weights": Weights(), "embeddings": (measured,), "draws": 1}, "energy score needs"),
        ({"weights": Weights(energy=0, perceptual=1)}, "LPIPS network"),
        ({"weights": Weights(energy=0), "share": 2.0}, "share lies"),
    ):
        with pytest.raises(ValueError, match=match):
            UD2M(Prior(), **wrong)
    with pytest.raises(ValueError, match="must not be negative"):
        Weights(noise=-1.0)
    with pytest.raises(TypeError, match="trains a Contest"):
        UD2M(Prior(), Weights(energy=0)).players(Draws())
    with pytest.raises(ValueError, match="needs a critic"):
        UD2M(Prior(), Weights(energy=0, adversarial=1)).players(Contest(Draws()))
