"""The unfolded network: its untrained law, its gradients, its training against exact posteriors, and what it refuses."""

import dataclasses
import math

import pytest
import torch
from torch import nn

import fewstep
from fewstep.bench.designs import Design
from fewstep.bench.trials import Setup, Trial
from fewstep.core.likelihood import FlatLikelihood, GaussianLikelihood, JointLikelihood
from fewstep.core.noise import Noise
from fewstep.core.problem import Posterior
from fewstep.core.schedule import Tabulated
from fewstep.core.together import Together, noise_level
from fewstep.methods.ud2m import UD2M
from fewstep.operators.image import from_unit
from fewstep.operators.matrix import MatrixOperator
from fewstep.operators.words import get_operator
from fewstep.priors.exact import GaussianPrior
from fewstep.priors.unet import UNetConfig, UNetDenoiser
from fewstep.priors.windowed import Windowed
from fewstep.testing.propagate import finite_step_law
from fewstep.unfolded.decoders import AdaptedDecoder, ContextDecoder, CorrectedDecoder, Decoder, PriorDecoder
from fewstep.unfolded.levels import Level, LevelConfig, Levels
from fewstep.unfolded.network import Facts, UnfoldedConfig, UnfoldedNetwork
from fewstep.unfolded.ram import RAM_VARIABLE, Stack, ram_network
from fewstep.unfolded.sampler import Unfolded
from fewstep.unfolded.starts import STARTS, Given
from fewstep.unfolded.store import load_network, save_network

TINY = UNetConfig(widths=(8, 8), layers=1, groups=4)


def scalar(gain, sigma=0.02):
    """Return the problem of the spec's table: one mode N(0, .25) seen with a gain, on DDPM's own table."""
    prior = GaussianPrior(torch.zeros(1).double(), torch.tensor(0.25).double(), Tabulated.linear())
    y = torch.tensor([[gain * 0.6]]).double()
    likelihood = GaussianLikelihood(y, MatrixOperator(torch.tensor([[gain]]).double()), sigma)
    return Posterior(prior, likelihood), prior.posterior(likelihood)


@pytest.mark.parametrize(("gain", "ratio"), [(1.0, 1.2), (0.3, 0.276), (0.1, 0.044), (0.0, 0.006)])
def test_published_levels_reproduce_the_known_collapse(gain, ratio):
    """Variance of the untrained published sampler over the true one (K = N = 3); its levels were rounded to whole steps."""
    problem, posterior = scalar(gain)
    found = float(finite_step_law(UD2M.preset("paper"), problem).cov / posterior.cov[0])
    assert found == pytest.approx(ratio, rel=0.2)


def test_annealed_levels_move_in_the_null_space():
    problem, posterior = scalar(0.0)
    laws = {n: finite_step_law(UD2M.preset(n), problem).cov / posterior.cov[0] for n in ("paper", "consistent")}
    assert float(laws["consistent"]) > 50 * float(laws["paper"])


def test_the_joint_prox_with_a_weight_is_the_minimum():
    noise = Noise(range(3), torch.float64)
    matrix = torch.randn(2, 4, generator=torch.Generator().manual_seed(0)).double()
    likelihood = GaussianLikelihood(noise.randn(2), MatrixOperator(matrix), 0.3)
    x_t, x, weight, rho, alpha, sigma = noise.randn(4), noise.randn(4), 2.5, 0.7, 0.8, 0.6
    wide = weight**0.5
    one = torch.ones(3).double()
    u = JointLikelihood(likelihood, x_t, alpha * one, sigma * wide * one).prox(x, rho * wide * one).requires_grad_()
    loss = -weight * likelihood.log_prob(u) + ((x_t - alpha * u) ** 2).sum(1) / (2 * sigma**2)
    loss = loss + ((u - x) ** 2).sum(1) / (2 * rho**2)
    assert float(torch.autograd.grad(loss.sum(), u)[0].abs().max()) < 1e-9


def test_levels_are_positive_and_start_from_their_base():
    ratio, sigma = torch.tensor([100.0, 1.0, 0.01]), torch.tensor([0.02, 0.1, 0.02])
    levels = Levels(LevelConfig())(ratio, sigma)
    assert [level.tau[0].item() for level in levels] == pytest.approx([1.5, 1.5 * 0.35, 1.5 * 0.35**2])
    torch.testing.assert_close(levels[0].tau ** 2, 2 * levels[0].rho ** 2)
    pinned = Levels(LevelConfig(base="pinned"))(ratio, sigma)[0].tau
    torch.testing.assert_close(pinned**-2, sigma**-2 + ratio**-2)
    for wrong in ({"base": "no"}, {"iterations": 0}, {"decay": 0.0}):
        with pytest.raises(ValueError, match=r"one of|at least|positive"):
            LevelConfig(**wrong)


def test_trained_levels_are_told_a_third_of_the_logarithms():
    seen, levels = [], Levels(LevelConfig())
    levels.net.register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    levels(torch.tensor([8.0]), torch.tensor([0.125]))
    torch.testing.assert_close(seen[0], math.log(2) * torch.tensor([[1.0, -1.0]]))


def test_the_blend_has_the_weights_of_the_paper():
    likelihood = GaussianLikelihood(torch.ones(2, 3), MatrixOperator(torch.eye(3)), 0.4)
    x_t, alpha, sigma = torch.full((2, 3), 0.5), torch.tensor([0.8, 0.6]), torch.tensor([0.6, 0.8])
    want = (sigma + alpha * 0.4 * 0.5) / (0.16 + sigma**2).sqrt()  # A^+ y = 1
    found = STARTS["blend"].begin(Given(likelihood, x_t, alpha, sigma, None))
    torch.testing.assert_close(found, want[:, None].expand(2, 3))


def gaussian_batch(count=6, dim=4):
    prior = GaussianPrior(torch.zeros(dim), torch.eye(dim))
    noise = Noise(range(count))
    matrix = torch.randn(2, dim, generator=torch.Generator().manual_seed(0))
    likelihood = GaussianLikelihood(noise.randn(2), MatrixOperator(matrix), 0.1)
    return Posterior(prior, likelihood).expand(1), noise.randn(dim)


@pytest.mark.parametrize("end", [0.0, 1.0])
def test_every_parameter_gets_a_gradient_and_checkpointing_changes_nothing(end):
    problem, x_t = gaussian_batch()
    t = torch.linspace(0.1, 1, 6)
    network = UnfoldedNetwork(UnfoldedConfig(end=end), CorrectedDecoder(4, 8))
    for p in network.parameters():  # away from the zeros of the start, behind which nothing gets a gradient
        nn.init.normal_(p, std=0.1, generator=torch.Generator().manual_seed(p.numel()))
    found = []
    for checkpointing in (False, True):
        network.zero_grad()
        network.checkpointing = checkpointing
        network(problem, x_t, t, Noise(range(6))).square().sum().backward()
        found.append([p.grad.clone() for p in network.parameters()])
    assert all(float(g.abs().max()) > 0 for g in found[0])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


def test_an_item_is_its_own_also_with_times_of_its_own():
    problem, x_t = gaussian_batch()
    t = torch.linspace(0.1, 1, 6)
    network = UnfoldedNetwork(UnfoldedConfig(), CorrectedDecoder(4, 8))
    whole = network(problem, x_t, t, Noise(range(6)))
    like = problem.likelihood
    alone = GaussianLikelihood(like.y[2:3], like.physics, like.sigma[2:3])
    one = network(Posterior(problem.prior, alone), x_t[2:3], t[2], Noise([2]))
    torch.testing.assert_close(whole[2:3], one)


def image_problem(prior):
    x = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    parts = []
    for b, (word, fields) in enumerate([("deblur-gaussian", {"width": 1.0}), ("inpaint-random", {})]):
        operator = get_operator(word)(**fields)
        parts.append(operator.likelihood(operator.simulate(x[b : b + 1], 0.05), 0.05))
    return Posterior(prior, Together(parts)), from_unit(x)


def test_different_operators_share_a_batch():
    problem, _ = image_problem(UNetDenoiser(TINY).eval())
    both = problem.likelihood
    z = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    expanded = both.expand(2)
    assert expanded.batch == 4 and float(noise_level(expanded).min()) == pytest.approx(0.1)
    rho = torch.tensor([0.1, 0.2, 0.3, 0.4])
    for n, part in enumerate(both.parts * 2):
        torch.testing.assert_close(expanded.prox(z, rho)[n : n + 1], part.prox(z[n : n + 1], rho[n : n + 1]))
        torch.testing.assert_close(expanded.log_prob(z)[n : n + 1], part.log_prob(z[n : n + 1]))
        drawn = expanded.draw(z, rho, Noise(range(4)))[n : n + 1]
        torch.testing.assert_close(drawn, part.draw(z[n : n + 1], rho[n : n + 1], Noise([n])))
    with pytest.raises(ValueError, match="one shape"):
        Together([both, problem.likelihood.parts[0], gaussian_batch()[0].likelihood])


def test_context_starts_as_the_prior_and_is_then_seen():
    prior = UNetDenoiser(TINY).eval()
    nn.init.normal_(prior.net.conv_out.weight, std=0.1, generator=torch.Generator().manual_seed(0))
    problem, _ = image_problem(prior)
    samplers = [
        Unfolded(UnfoldedNetwork(UnfoldedConfig(), decoder).eval(), steps=2)
        for decoder in (PriorDecoder(), AdaptedDecoder(prior), ContextDecoder(prior.with_context(3)))
    ]
    plain, adapted, context = (sampler(problem, 2, seed=0) for sampler in samplers)
    torch.testing.assert_close(plain.x, adapted.x)
    torch.testing.assert_close(plain.x, context.x)
    assert context.counts.network == samplers[2].nfe == 6
    wide = samplers[2].network.decoder.denoiser
    nn.init.normal_(wide.net.conv_in.weight, std=0.1, generator=torch.Generator().manual_seed(0))
    assert not torch.allclose(samplers[2](problem, 2, seed=0).x, plain.x)
    with pytest.raises(ValueError, match="9 channels beside"):
        wide(torch.zeros(1, 3, 16, 16), torch.tensor(0.5))


def test_context_goes_through_windows():
    wide = UNetDenoiser(TINY).eval().with_context(1)
    nn.init.normal_(wide.net.conv_in.weight, std=0.1, generator=torch.Generator().manual_seed(0))
    nn.init.normal_(wide.net.conv_out.weight, std=0.1, generator=torch.Generator().manual_seed(1))
    x, beside = (torch.randn(1, 3, 24, 40, generator=torch.Generator().manual_seed(k)) for k in (2, 3))
    t = torch.tensor(0.3)
    windowed = Windowed(UNetDenoiser(TINY), size=24, overlap=8).around(wide)
    out = windowed(x, t, context=beside)
    assert out.shape == x.shape
    left = wide(x[..., :24], t, context=beside[..., :24])
    torch.testing.assert_close(out[..., :16], left[..., :16])  # where no other window reaches
    assert not torch.allclose(out, windowed(x, t, context=torch.zeros_like(beside)))


def test_a_saved_network_is_the_same_and_a_damaged_one_is_refused(tmp_path):
    prior = UNetDenoiser(TINY).eval()
    network = UnfoldedNetwork(UnfoldedConfig(LevelConfig(2), end=0.5), ContextDecoder(prior.with_context(3)))
    for p in network.parameters():
        p.data = p.data.half().float()
    save_network(network, tmp_path / "net", {"prior": "tiny"})
    again = load_network(tmp_path / "net")
    problem, _ = image_problem(prior)
    expected = Unfolded(network.eval(), steps=2)(problem, 1, seed=0).x
    torch.testing.assert_close(Unfolded(again, steps=2)(problem, 1, seed=0).x, expected)
    named = UD2M(steps=2, network=str(tmp_path / "net"), eta=1.0, kernel="bridge")
    torch.testing.assert_close(named(problem, 1, seed=0).x, expected)
    assert named.nfe == 4
    data = bytearray((tmp_path / "net/model.safetensors").read_bytes())
    data[-1] ^= 1
    (tmp_path / "net/model.safetensors").write_bytes(data)
    with pytest.raises(ValueError, match="hash"):
        load_network(tmp_path / "net")
    with pytest.raises(ValueError, match="no trained sampler"):
        UD2M(network="nothing-of-the-kind").unfolded()
    with pytest.raises(ValueError, match="holds no denoiser"):
        save_network(UnfoldedNetwork(UnfoldedConfig(), PriorDecoder()), tmp_path / "none")


def test_a_network_of_another_schedule_is_refused():
    prior = UNetDenoiser(TINY, fewstep.VarianceExploding()).eval()
    problem, _ = image_problem(prior)
    network = UnfoldedNetwork(UnfoldedConfig(), AdaptedDecoder(UNetDenoiser(TINY)))
    with pytest.raises(ValueError, match="was trained with"):
        Unfolded(network)(problem, 1)


def test_starts():
    problem, _ = scalar(1.0)
    for start in ("gaussian", "pinv", "blend", "previous"):
        sampler = dataclasses.replace(UD2M.preset("consistent"), start=start, steps=2)
        assert bool(torch.isfinite(sampler(problem, 3).x).all())
    with pytest.raises(ValueError, match="start must be one of gaussian"):
        UnfoldedConfig(start="no")


class LinearRAM(nn.Module):
    """Stands for RAM: the mean of u given the measurement under N(mean, 1 / 4), through nothing but what it is given."""

    get_pad = staticmethod(lambda size: (0, 64 - size[-2], 64 - size[-1]))

    def __init__(self, variance=0.25):
        super().__init__()
        self.variance = variance

    def forward(self, y, physics):
        gamma = self.variance / physics.noise_model.sigma.square()
        half = torch.full_like(physics.A_adjoint(y), 0.5)
        return physics.prox_l2(half, y, gamma[:, None, None, None])


@pytest.fixture
def given():
    """y of three operators and x_t at a time of its own each, float64."""
    x = torch.rand(3, 3, 16, 20, generator=torch.Generator().manual_seed(0))
    parts = []
    for b, (word, fields) in enumerate(
        [("deblur-gaussian", {"width": 1.0}), ("inpaint-random", {}), ("sr", {"factor": 2})]
    ):
        operator = get_operator(word)(**fields)
        parts.append(operator.likelihood(operator.simulate(x[b : b + 1], 0.05), 0.05))
    alpha, sigma = fewstep.VariancePreserving()(torch.tensor([1.0, 0.5, 0.05]))
    x_t = alpha[:, None, None, None] * from_unit(x) + sigma[:, None, None, None] * Noise(range(3)).randn_like(x)
    return Given(Together(parts), x_t, alpha, sigma, None)


def test_what_ram_is_given_is_the_measurement(given, monkeypatch):
    """With a linear network in its place the start is E[x_0 | y, x_t] under a standard normal prior, exactly."""
    monkeypatch.setattr("fewstep.unfolded.ram.ram_network", LinearRAM)
    expected = STARTS["gaussian"].begin(given)
    torch.testing.assert_close(STARTS["ram"].begin(given), expected, rtol=1e-3, atol=1e-3)
    monkeypatch.setattr("fewstep.unfolded.ram.ram_network", lambda: LinearRAM(1.0))  # the units of [-1, 1]
    assert float((STARTS["ram"].begin(given) - expected).abs().max()) > 0.1
    with pytest.raises(TypeError, match="takes real linear measurements"):
        STARTS["ram"].begin(given._replace(likelihood=FlatLikelihood((3, 16, 20), 3)))


def test_the_operator_that_ram_is_given_has_its_adjoint_and_its_prox(given):
    for likelihood, *rest in zip(given.likelihood.parts, *(v.split(1) for v in given[1:4]), strict=True):
        stack = Stack(likelihood, *rest, (16, 4))
        noise, gamma = Noise([5]), torch.tensor([2.0])
        u, v, z = noise.randn(3, 32, 24), noise.randn_like(stack.y), noise.randn(3, 32, 24)
        back = stack.A_adjoint(v)
        assert float((stack.A(u) * v).sum()) == pytest.approx(float((u * back).sum()), rel=1e-4)
        least = stack.prox_l2(z, v, gamma[:, None, None, None]).double().requires_grad_()
        value = gamma / 2 * (stack.A(least) - v).square().sum() + (least - z).square().sum() / 2
        assert float(torch.autograd.grad(value, least)[0].abs().max()) < 1e-4


def test_ram_counts_as_a_call_and_its_weights_are_asked_for(given, monkeypatch, tmp_path):
    monkeypatch.setattr("fewstep.unfolded.ram.ram_network", LinearRAM)
    sampler = Unfolded(UnfoldedNetwork(UnfoldedConfig(LevelConfig(2), start="ram"), PriorDecoder()), steps=2)
    problem = Posterior(UNetDenoiser(TINY).eval(), given.likelihood)
    assert sampler(problem, 1).counts.network == sampler.nfe == 6
    monkeypatch.setenv(RAM_VARIABLE, str(tmp_path / "none.pth"))
    with pytest.raises(ValueError, match=r"none\.pth does not exist: set FEWSTEP_RAM to"):
        ram_network()
    monkeypatch.delenv(RAM_VARIABLE)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(ValueError, match=r"let deepinv download them once: python -c"):
        ram_network()
    (tmp_path / "wrong.pth").write_bytes(b"no weights")
    monkeypatch.setenv(RAM_VARIABLE, str(tmp_path / "wrong.pth"))
    with pytest.raises(ValueError, match="holds no weights of RAM"):
        ram_network()


@pytest.mark.slow
def test_ram_itself_with_random_weights(given, monkeypatch, tmp_path):
    """deepinv's own class, whose width is fixed: weights from a file, an image for each item, and each item on its own."""
    models = pytest.importorskip("deepinv.models")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        torch.save(models.RAM(pretrained=False).state_dict(), tmp_path / "ram.pth")
    monkeypatch.setenv(RAM_VARIABLE, str(tmp_path / "ram.pth"))
    assert not any(p.requires_grad for p in ram_network().parameters())
    x = STARTS["ram"].begin(given)
    assert x.shape == given.x_t.shape and bool(torch.isfinite(x).all())
    blur = given.likelihood.parts[0].expand(2)
    twice = Given(blur, given.x_t[:2], given.alpha[:2], given.sigma[:2], None)
    torch.testing.assert_close(STARTS["ram"].begin(twice)[:1], x[:1], rtol=1e-3, atol=1e-3)


@pytest.mark.slow
def test_training_moves_towards_the_posterior_and_a_planted_collapse_does_not():
    """The benchmark in small: the same trainer, objective, sampler and measures."""
    setup = Setup(dim=4, width=64, steps=800, batch=96, draws=3)
    trial = Trial.of(setup, 6, 400, 0)
    design = Design(UD2M.preset("consistent"))
    before, after = (
        trial.distances(design.sampler(network, 1)(trial.problem, 400, seed=0).x)
        for network in (design.network(setup).eval(), design.train(setup))
    )
    collapsed = trial.distances(trial.posterior.mean.reshape(1, 6, 4).expand(400, -1, -1))
    assert after["mean error"] < 0.9 * before["mean error"] and after["SW/floor"] < 0.9 * before["SW/floor"]
    assert 0.8 < after["observed"] < 1.25 < before["observed"]
    assert collapsed["null space"] < 1e-9 and collapsed["SW/floor"] > after["SW/floor"]


def test_fields_that_a_trained_network_would_ignore_are_refused():
    assert UD2M.preset("photo", steps=2, eta=0.5).nfe == 6
    with pytest.raises(ValueError, match="'natural-general' has its own base, pairing"):
        UD2M.preset("photo", base="annealed", pairing=2.0)


@pytest.mark.parametrize(("wrong", "match"), [({"eta": "x"}, "eta must lie in"), ({"iterations": 2.5}, "whole number")])
def test_settings_that_are_no_numbers_are_refused(wrong, match):
    with pytest.raises(ValueError, match=match):
        assert UD2M(**wrong).nfe


class Recording(Decoder):
    """A decoder that keeps its inputs and gives `gain` times the noised image back."""

    def __init__(self, gain):
        super().__init__()
        self.gain, self.seen = gain, []

    def forward(self, problem, inputs):
        self.seen.append(inputs)
        return self.gain * inputs.noisy


def test_an_iteration_is_a_weighted_prox_and_then_noise():
    problem, decoder = denoising(), Recording(1)
    network = UnfoldedNetwork(UnfoldedConfig(LevelConfig(1)), decoder).double()
    x, x_t, noise = (torch.tensor([v]).double() for v in ([0.3, 0.1], [0.4, -0.2], [1.0, -1.0]))
    alpha, sigma, tau, rho, weight, temperature = (torch.tensor([v]).double() for v in (0.8, 0.6, 0.25, 0.7, 2.0, 3.0))
    facts = Facts(problem, x_t, alpha, sigma, torch.zeros(1, 2).double(), False)
    found = network._iterate(facts, x, Level(tau, rho, weight, temperature), noise)
    precision = weight / 0.25 + (alpha / sigma) ** 2 + 1 / rho**2
    point = (weight / 0.25 * problem.likelihood.y + alpha / sigma**2 * x_t + x / rho**2) / precision
    torch.testing.assert_close(decoder.seen[0].point, point)
    torch.testing.assert_close(found, point + tau * temperature * noise)


def test_the_final_draw_is_of_the_likelihood_around_the_end():
    count, decoder = 20_000, Recording(0)
    network = UnfoldedNetwork(UnfoldedConfig(LevelConfig(1), end=0.6), decoder).double()
    problem, x_t = denoising().expand(count), torch.zeros(count, 2).double()
    x = network(problem, x_t, torch.tensor(0.5).double(), Noise(range(count), torch.float64))
    torch.testing.assert_close(decoder.seen[0].back[0], denoising().likelihood.y[0] / 1.25)
    variance = 1 / (1 / 0.25 + 1 / (0.6 * 0.5) ** 2)
    assert ((x.var(0) / variance - 1).abs() < 4 * (2 / count) ** 0.5).all()


def denoising():
    y, identity = torch.tensor([[2.0, -1.0]]).double(), torch.eye(2).double()
    return Posterior(GaussianPrior(0 * y[0], identity), GaussianLikelihood(y, MatrixOperator(identity), 0.5))
