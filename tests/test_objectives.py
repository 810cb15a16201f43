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
from fewstep.core.together import Together
from fewstep.objectives.adversarial import Critic, CriticConfig, fake_loss, generator_loss, real_loss
from fewstep.objectives.denoising import DenoisingScoreMatching
from fewstep.objectives.embeddings import Features, MeasuredPatches, Patches, marginals, measured
from fewstep.objectives.energy import energy_score
from fewstep.objectives.matching import DistributionMatching, fake_score
from fewstep.objectives.perceptual import drawn_features, lpips_distance, lpips_features
from fewstep.objectives.ud2m import UD2M, Contest, Weights
from fewstep.operators.matrix import MatrixOperator
from fewstep.operators.words import get_operator
from fewstep.priors.exact import GaussianPrior, MixturePrior
from fewstep.priors.unet import UNetConfig, UNetDenoiser
from fewstep.training import Trainer, TrainingOptions
from fewstep.unfolded.lora import LoRAConfig


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


def test_marginals_are_the_coordinates_of_the_metric():
    likelihood = GaussianLikelihood(randn(3, 2), MatrixOperator(randn(2, 4)), 0.1)
    x = randn(6, 4, seed=1)
    (vector,), (places,) = measured(x, likelihood), marginals(x, likelihood)
    assert places.shape == (6, 1, 6)
    torch.testing.assert_close(places[:, 0], vector[..., 0] * 6**0.5)


def evidence(embed, dim=16, items=4000):
    """Return the score's slope in the sd of one of `dim` independent coordinates, at 0.8 of the true one, in standard errors."""
    likelihood = GaussianLikelihood(torch.zeros(items, 1), MatrixOperator(torch.zeros(1, dim)), 1.0)
    sd = torch.full((items,), 0.8, requires_grad=True)
    draws = randn(DRAWS * items, dim)
    narrow = torch.cat([draws[:, :1] * sd.repeat(DRAWS)[:, None], draws[:, 1:]], 1)
    values = energy_score(embed(narrow, likelihood), embed(randn(items, dim, seed=1), likelihood), DRAWS)
    slope, error = mean_and_error(torch.autograd.grad(values.sum(), sd)[0])
    return slope / error


def test_marginals_see_the_spread_that_a_whole_vector_hardly_sees():
    assert evidence(marginals) < 2 * evidence(measured) < -2


def test_patches():
    x = randn(2, 3, 32, 32)
    parts = Patches(8, 4, (1, 2))(x, FlatLikelihood((3, 32, 32), 2))
    assert [tuple(p.shape) for p in parts] == [(2, 192, 49), (2, 192, 9)]
    torch.testing.assert_close(parts[0][1, :, 8] * 192**0.5, x[1, :, 4:12, 4:12].flatten())  # second row, second column
    half = x[0, :, 8:24, :16].unflatten(1, (8, 2)).unflatten(3, (8, 2)).mean((2, 4))
    torch.testing.assert_close(parts[1][0, :, 3] * 192**0.5, half.flatten())


def test_patches_in_the_metric_of_the_likelihood():
    """One patch of the whole image: its length is |A x| / sigma, each item by its own operator, and large weights are cut."""
    x, parts = randn(2, 3, 16, 16), []
    for word, fields in (("deblur-gaussian", {"width": 1.0}), ("sr", {"factor": 2})):
        operator = get_operator(word)(**fields)
        parts.append(operator.likelihood(operator.simulate(torch.rand(1, 3, 16, 16), 0.1), 0.1))
    whole = Patches(16, 16, (1,))
    (found,) = MeasuredPatches(whole, limit=1e6)(torch.cat([x, 2 * x]), Together(parts))
    expected = torch.stack([part.A(x[b : b + 1]).norm() / 0.2 for b, part in enumerate(parts)])  # [-1, 1] units
    lengths = found[..., 0].norm(dim=1) * (3 * 256) ** 0.5
    torch.testing.assert_close(lengths, torch.cat([expected, 2 * expected]), rtol=1e-3, atol=1e-3)
    cut = MeasuredPatches({"size": 16, "stride": 16, "scales": (1,)}, limit=0.5)(x, Together(parts))[0]
    assert bool((cut[..., 0].norm(dim=1) < 0.5 * whole(x, Together(parts))[0][..., 0].norm(dim=1)).all())
    assert torch.equal(MeasuredPatches(whole)(x, FlatLikelihood((3, 16, 16), 2))[0], whole(x, Together(parts))[0])
    with pytest.raises(ValueError, match="limit must be positive"):
        MeasuredPatches(limit=0.0)


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


def test_a_drawn_pixel_far_out_is_clipped(lpips_network):
    drawn = randn(1, 3, 32, 32).clamp(-1, 1)
    drawn[0, 1, 3, 4] = 7.0
    wanted = lpips_features(lpips_network, drawn.clamp(-2, 2))
    for found in (drawn_features(lpips_network, drawn), Features(lpips_network)(drawn, FlatLikelihood((3, 32, 32), 1))):
        for part, right in zip(found, wanted, strict=True):
            assert torch.equal(part, right)
    with pytest.raises(ValueError, match=r"in \[-1, 1\], got"):
        Features(lpips_network)(255 * torch.rand(1, 3, 32, 32), FlatLikelihood((3, 32, 32), 1))


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
    plain, penalised = (real_loss(critic, real, condition, r1) for r1 in (0.0, 3.0))
    slope = 4 / 3 * critic.w
    torch.testing.assert_close(penalised - plain, (1.5 * slope.square().sum()).expand(2))
    soft = nn.functional.softplus
    torch.testing.assert_close(plain, soft(-critic(real, *condition)).mean(1))
    torch.testing.assert_close(fake_loss(critic, fake, condition), soft(critic(fake, *condition)).mean(1))
    torch.autograd.grad(penalised.sum(), critic.w)  # the penalty itself is trained


def test_the_generator_is_told_how_likely_its_draws_look():
    logits = randn(2, 3)
    torch.testing.assert_close(generator_loss(logits), -torch.sigmoid(logits).log().mean(1))


# ---- distribution matching --------------------------------------------------------------------------------------------

PRIOR_MEAN, PRIOR_VARIANCE, COUNT = 0.4, 0.5, 2_000
LEVELS = DenoisingScoreMatching(median=0.7, spread=0.8, ratio_min=0.05, ratio_max=20.0)


def gaussian(mean, variance):
    return GaussianPrior(torch.tensor([mean]).double(), torch.tensor(variance).double())


class Swapped(DistributionMatching):
    """The planted wrong sign: from real to fake."""

    def direction(self, prior, fake, draws, noise):
        return super().direction(fake, prior, draws, noise)


def divergence_slopes(mean, sd, ratio, weight):
    """Return d/d(mean, sd) of weight ratio^2 KL(N(mean, sd^2 + ratio^2) || N(PRIOR_MEAN, PRIOR_VARIANCE + ratio^2))."""
    m, s = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (mean, sd))
    q, p = s.square() + ratio**2, PRIOR_VARIANCE + ratio**2
    kl = 0.5 * (q / p + (m - PRIOR_MEAN).square() / p - 1 - (q / p).log())
    return torch.stack([g.mean() for g in torch.autograd.grad((weight * ratio**2 * kl).mean(), (m, s))])


def matching_slopes(matching, mean, sd):
    """Return the loss's derivatives in (mean, sd) of draws mean + sd z, with their standard errors and what they should be."""
    noise = Noise(range(COUNT), torch.float64)
    ratio = matching.levels.ratios(Noise(range(COUNT), torch.float64))  # the same that the loss draws first
    z = Noise(range(COUNT, 2 * COUNT), torch.float64).randn(1)
    params = [torch.full((COUNT, 1), v, dtype=torch.float64, requires_grad=True) for v in (mean, sd)]
    loss = matching.loss(gaussian(PRIOR_MEAN, PRIOR_VARIANCE), gaussian(mean, sd**2), params[0] + params[1] * z, noise)
    each = torch.cat(torch.autograd.grad(loss.sum(), params), 1)
    expected = divergence_slopes(mean, sd, ratio, matching.levels.weight(ratio).sqrt())
    return each.mean(0), each.std(0) / COUNT**0.5, expected


@pytest.mark.parametrize(("mean", "sd"), [(0.9, 0.3), (-0.5, 1.2)])
def test_the_gradient_of_distribution_matching_is_that_of_a_divergence(mean, sd):
    """With exact scores; towards the prior, whose mean and spread lie on either side, and the wrong sign fails."""
    found, error, expected = matching_slopes(DistributionMatching(LEVELS), mean, sd)
    assert bool(((found - expected).abs() < 4 * error).all())
    assert bool((expected.abs() > 6 * error).all())
    assert expected[0].sign() == math.copysign(1, mean - PRIOR_MEAN)
    assert expected[1].sign() == math.copysign(1, sd**2 - PRIOR_VARIANCE)
    planted, error, expected = matching_slopes(Swapped(LEVELS), mean, sd)
    assert not bool(((planted - expected).abs() < 4 * error).any())


def mixture(shift=0.0):
    means = torch.tensor([[-1.0, 0.5], [1.0, -0.3]]).double() + shift
    return MixturePrior(torch.tensor([0.3, 0.7]).double(), means, torch.tensor([0.1, 0.3]).double())


def test_nothing_is_left_where_the_laws_agree_and_a_step_brings_them_nearer():
    prior, matching = mixture(), DistributionMatching(LEVELS)
    draws = prior.sample(500, seed=1)
    assert float(matching.direction(prior, mixture(), draws, Noise(range(500), torch.float64)).abs().max()) == 0
    moved = draws + 0.4
    for kind, nearer in ((matching, True), (Swapped(LEVELS), False)):
        step = kind.direction(prior, mixture(0.4), moved, Noise(range(500), torch.float64))
        mean, error = step.mean(0), step.std(0) / 500**0.5
        assert bool((mean.abs() > 4 * error).all())
        assert bool((mean > 0).all()) is nearer  # minus it is the way


class Generator(nn.Module):
    """Draws mean + sd z that know nothing of y: their law is to become the prior's."""

    def __init__(self):
        super().__init__()
        self.mean, self.log_sd = nn.Parameter(torch.tensor(1.2)), nn.Parameter(torch.tensor(-1.5))

    def forward(self, problem, x_t, t, noise, previous=None):
        return self.mean + self.log_sd.exp() * noise.randn_like(x_t)


class Fitted(Denoiser):
    """The exact denoiser of N(mean, variance), both to be learned."""

    def __init__(self):
        super().__init__()
        self.schedule, self.event_shape = VariancePreserving(), (1,)
        self.mean, self.log_variance = nn.Parameter(torch.tensor(1.2)), nn.Parameter(torch.tensor(-3.0))

    def forward(self, x_t, t, **cond):
        alpha, sigma = (c.reshape(-1, 1) for c in self.schedule(t))
        variance = self.log_variance.exp()
        return self.mean + alpha * variance / (alpha**2 * variance + sigma**2) * (x_t - alpha * self.mean)


class Nothing:
    """Measurements that say nothing."""

    def count(self, step):
        return 64

    def batch(self, step, items):
        return {"x0": torch.zeros(len(items), 1), "likelihood": FlatLikelihood((1,), len(items))}


def test_a_learned_fake_score_leads_the_sampler_to_the_prior(tmp_path):
    """Two players through the trainer: from N(1.2, .05), with a fake score that follows, to the prior's mean and spread."""
    prior = GaussianPrior(torch.tensor([PRIOR_MEAN]), torch.tensor(PRIOR_VARIANCE))
    objective = UD2M(prior, Weights(energy=0, matching=1), matching=DistributionMatching(LEVELS), draws=1, fake_turns=2)
    contest = Contest(Generator(), fake=Fitted())
    assert list(objective.players(contest)) == ["model", "fake", "fake1"]
    options = TrainingOptions(steps=150, lr=0.06, warmup=1, ema=0.9, weight_decay=0.0, precision="no", log_every=150)
    trained = Trainer(contest, objective, Nothing(), tmp_path, options, cpu=True).run()
    assert float(trained.network.mean) == pytest.approx(PRIOR_MEAN, abs=0.1)
    assert float(trained.network.log_sd.exp() ** 2) == pytest.approx(PRIOR_VARIANCE, rel=0.2)
    assert float(trained.fake.mean) == pytest.approx(float(trained.network.mean), abs=0.1)


def test_a_fake_score_is_a_copy_of_the_prior_of_which_little_is_trained():
    pytest.importorskip("peft")
    prior = UNetDenoiser(UNetConfig(widths=(8, 8), layers=1, groups=4)).eval()
    nn.init.normal_(prior.net.conv_out.weight, std=0.1, generator=torch.Generator().manual_seed(0))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        fake = fake_score(prior, LoRAConfig(rank=2))
    x, t = randn(2, 3, 16, 16), torch.tensor([0.2, 0.7])
    torch.testing.assert_close(fake(x, t), prior(x, t))
    names = [name for name, p in fake.named_parameters() if p.requires_grad]
    assert names and all("lora_" in name for name in names)
    assert all(p.requires_grad for p in prior.parameters())
    draws = x.clone().requires_grad_()
    DistributionMatching().fake_loss(fake, draws, Noise(range(2))).backward()
    assert draws.grad is None and all(p.grad is not None for p in fake.parameters() if p.requires_grad)
    with pytest.raises(ValueError, match="no fake score"):
        fake_score(prior, LoRAConfig(rank=0))


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
EVERY = {"energy": 1.0, "perceptual": 2.0, "noise": 3.0, "adversarial": 4.0, "matching": 5.0}


class Fake(Prior):
    """Half of what the prior says, by a weight that is trained."""

    def __init__(self):
        super().__init__()
        self.share = nn.Parameter(torch.tensor(0.5))

    def forward(self, x_t, t, **cond):
        return self.share * x_t


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
        contest = Contest(Draws(), Critic(CriticConfig(width=4, stages=1)), Fake())
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
        assert ("fake" in objective.players(contest)) == (off != "matching")


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


class Remembering(Draws):
    remembers = True

    def __init__(self):
        super().__init__()
        self.seen = []

    def forward(self, problem, x_t, t, noise, previous=None):
        self.seen.append((t, previous, super().forward(problem, x_t, t, noise)))
        return self.seen[-1][2]


def test_a_start_that_remembers_is_trained_as_it_is_used():
    """It gets a draw at the same x_t, and at t = 1, where sampling begins, the start that there is without one."""
    objective = UD2M(Prior(), Weights(energy=0, noise=1), times=(1.0, 0.3), share=1.0)
    network, count = Remembering(), 12
    likelihood = GaussianLikelihood(randn(count, 4), MatrixOperator(randn(4, 4)), 0.5)
    objective.loss("model", Contest(network), {"x0": randn(count, 4), "likelihood": likelihood}, Noise(range(count)))
    (t, before, draw), (again, previous, _) = network.seen
    assert before is None and torch.equal(t, again) and not previous.requires_grad
    first = t == 1
    assert 0 < int(first.sum()) < len(t)
    assert torch.equal(previous[~first], draw[~first])
    expected = likelihood.expand(2).prox(torch.zeros(2 * count, 4), 1.0)  # x_t says next to nothing
    torch.testing.assert_close(previous[first], expected[first], rtol=0.01, atol=0.05)


class Halved(Remembering):
    """A network whose weights autocast casts."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, problem, x_t, t, noise, previous=None):
        return self.layer(super().forward(problem, x_t, t, noise, previous).to(torch.float32)).to(x_t)


def test_weights_in_half_precision_of_the_draw_without_gradients_are_forgotten(monkeypatch):
    """Some versions of torch (2.4) would take them again, without a graph, for the draws that are trained."""
    cleared, clear = [], torch.clear_autocast_cache
    monkeypatch.setattr(torch, "clear_autocast_cache", lambda: cleared.append(len(network.seen)) or clear())
    network, objective = Halved(), UD2M(Prior(), Weights(energy=0, noise=1), share=0.0)
    likelihood = GaussianLikelihood(randn(6, 4), MatrixOperator(randn(4, 4)), 0.5)
    with torch.autocast("cpu", torch.bfloat16):
        batch = {"x0": randn(6, 4), "likelihood": likelihood}
        loss, _ = objective.loss("model", Contest(network), batch, Noise(range(6)))
    loss.backward()
    assert 1 in cleared and len(network.seen) == 2
    assert network.layer.weight.grad is not None and float(network.layer.weight.grad.abs().max()) > 0


@pytest.mark.parametrize("player", ["critic", "fake"])
def test_turns_leave_the_other_players_alone(lpips_network, player):
    _, contest, loss, _ = play(lpips_network, player, **EVERY)
    loss.backward()
    other = contest.fake if player == "critic" else contest.critic
    assert contest.network.a.grad is None and all(p.grad is None for p in other.parameters())
    mine = getattr(contest, player).parameters()
    assert all(p.grad is not None and float(p.grad.abs().max()) > 0 for p in mine)
    objective, contest, loss, _ = play(lpips_network, **EVERY)
    grads = torch.autograd.grad(loss, list(objective.players(contest)["model"]))
    assert all(float(g.abs().max()) > 0 for g in grads)


def test_what_is_refused(lpips_network):
    for wrong, match in (
        ({"weights": Weights(), "embeddings": ()}, "energy score needs"),
        ({"weights": Weights(), "embeddings": (measured,), "draws": 1}, "energy score needs"),
        ({"weights": Weights(energy=0, perceptual=1)}, "LPIPS network"),
        ({"weights": Weights(energy=0, noise=1), "share": 2.0}, "share lies"),
        ({"weights": Weights(energy=0, noise=1), "fake_turns": 0}, "fake_turns must be a whole number and at least 1"),
        ({"weights": Weights(energy=0, noise=1), "draws": 2.5}, "draws must be a whole number"),
        ({"weights": Weights(energy=0)}, "every term is switched off"),
    ):
        with pytest.raises(ValueError, match=match):
            UD2M(Prior(), **wrong)
    with pytest.raises(ValueError, match="noise must be finite and not negative"):
        Weights(noise=-1.0)
    with pytest.raises(TypeError, match="trains a Contest"):
        UD2M(Prior(), Weights(energy=0, noise=1)).players(Draws())
    with pytest.raises(ValueError, match="needs a critic"):
        UD2M(Prior(), Weights(energy=0, adversarial=1)).players(Contest(Draws()))
    with pytest.raises(ValueError, match="needs a fake score"):
        UD2M(Prior(), Weights(energy=0, matching=1)).players(Contest(Draws()))
