"""Samplers that teach themselves, the implicit sampler, unrolled particles, export."""

import math

import pytest
import torch

import fewstep
from fewstep.core.noise import Streams
from fewstep.core.registry import get
from fewstep.densities.export import export
from fewstep.densities.laplace import Laplace
from fewstep.densities.particles import Proposal, StateSpace, filtered, kalman, train
from fewstep.densities.students._maps import MAPS, EDMMap, GuidedMap, MapConfig, ResidualMap, ScaledMap
from fewstep.densities.students._sampler import MapSampler, jumped
from fewstep.densities.students._self import Learner
from fewstep.densities.teachers.implicit import Entropy
from fewstep.densities.teachers.osds import stretched
from fewstep.densities.user import as_target
from fewstep.densities.whitened import Whitened
from fewstep.priors.exact import GaussianPrior
from laws import GAUSSIAN, SCHEDULE, Law

STANDARD = Law(GaussianPrior(torch.zeros(2), torch.tensor(1.0), SCHEDULE), 0.0)


@pytest.mark.parametrize("name", ["scds", "osds"])
def test_self_distillation_is_at_its_minimum_for_a_standard_normal(name):
    method = get(name, "teachers")(steps=2)
    learner = method.model(Whitened(STANDARD), 0)
    objective = method.objective(Whitened(STANDARD), method.default_loss)
    noise = Streams(0, range(256))
    first, figures = objective.loss("sampling", learner, None, noise)
    assert abs(float(first.detach())) < 1e-4, "the variance of constant weights, and minus the log Z of a normal law"
    assert abs(figures["elbo"]) < 1e-4
    assert abs(float(objective.loss("consistency", learner, None, noise)[0].detach())) < 1e-6
    torch.nn.init.normal_(learner.map.net.last.weight, std=0.3)
    assert float(objective.loss("sampling", learner, None, noise)[0].detach()) > 1e-3
    for _ in range(3):
        assert float(objective.loss("consistency", learner, None, noise)[0].detach()) > 1e-8
    assert objective.players(learner)["sampling"] == objective.players(learner)["consistency"]


@pytest.mark.parametrize("euler", [True, False])
def test_guided_steps_converge_to_the_flow(euler):
    class Exact(GuidedMap):
        def drift(self, y, t, s, guide):
            t = torch.as_tensor(t).expand(len(y))
            alpha, sigma = (c[:, None] for c in self.schedule(t))
            return (GAUSSIAN(y, t) - alpha * y) / sigma**2

    flow_map = Exact(SCHEDULE, Whitened(Law(GAUSSIAN)), euler=euler)
    z, zero = Streams(0, range(128)).randn(2), torch.zeros(())
    truth, errors = GAUSSIAN.flow(z, torch.ones(()), zero), []
    for steps in (32, 64):
        times = torch.linspace(1, 0, steps + 1)
        y = jumped(flow_map, z, times, False).y
        errors.append(float((y - truth).norm(dim=1).mean()))
    assert errors[1] < 0.65 * errors[0] and errors[1] < 0.1


def test_volume_of_a_short_step_is_its_log_determinant():
    flow_map = GuidedMap(SCHEDULE, Whitened(Law(GAUSSIAN)))
    torch.nn.init.normal_(flow_map.net.last.weight, std=1.0)
    y, t, s = Streams(0, range(16)).randn(2), torch.full((16,), 0.5), torch.full((16,), 0.499)
    signs = torch.tensor([[1.0, 1.0], [1.0, -1.0]])  # all probes up to sign: the trace is their mean
    traces = torch.stack([stretched(flow_map, y, t, s, v.expand(16, 2))[1] for v in signs]).mean(0)
    log_w = jumped(flow_map, y, torch.tensor([0.5, 0.499]), True).log_weights
    exact = log_w - (y.double().square().sum(1) + 2 * math.log(2 * math.pi)) / 2
    assert float((traces.double() - exact).abs().max()) < 0.05 * float(exact.abs().max())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["scds", "osds"])
def test_self_taught_gaussian(name):
    short = {"scds": {}, "osds": {"ramp": 10, "decay": 0.9}}[name]
    method = get(name, "teachers")(steps=4, net=MapConfig(32, 1, "gelu", 0.0), **short)
    sampler = fewstep.fit(Law(GAUSSIAN), sampler=method, train_steps=60, batch=128, whiten=False)
    for steps in (1, 4):
        draws = sampler.sample(4096, steps)
        low, high = draws.log_z_interval(0.999)
        assert draws.ess > 0.25 and low < 0.7 < high and draws.gradient_calls == steps


def test_learner_counts_and_copies():
    learner = Learner(GuidedMap(SCHEDULE, Whitened(STANDARD)))
    assert "turn" in learner.state_dict() and not any(p.requires_grad for p in learner.target.parameters())


@pytest.mark.parametrize("fisher", [False, True], ids=["kl", "fisher"])
def test_implicit_gradients_are_those_of_the_divergence(fisher):
    """x = a z against N(0, 1) with the exact score of N(0, a^2): KL' = a - 1 / a, Fisher' = (a - 1 / a)(1 + 1 / a^2)."""
    a = torch.tensor(1.4, requires_grad=True)
    held = float(a.detach())
    target = Law(GaussianPrior(torch.zeros(1), torch.tensor(1.0), SCHEDULE), 0.0)
    objective, noise = Entropy(target, fisher), Streams(0, range(40_960))
    x = a * noise.randn(1)
    own = lambda x: -x / held**2  # noqa: E731
    loss = objective._fisher(own, x, noise) if fisher else objective._entropy(own, x)
    (slope,) = torch.autograd.grad(loss, a)
    exact = (held - 1 / held) * (1 + 1 / held**2 if fisher else 1)
    without = held * (1 - 1 / held**2) ** 2  # |u|^2 / 2 alone, its gradient through x only
    assert abs(float(slope) - exact) < 0.04
    assert not fisher or abs(without - exact) > 0.4


@pytest.mark.slow
def test_implicit_sampler_learns_a_gaussian():
    method = get("implicit", "teachers")(net=MapConfig(32, 1), sigma=0.2)
    sampler = fewstep.fit(Law(GAUSSIAN), sampler=method, train_steps=150, batch=256, whiten=False, lr=4e-3, ema=0.95)
    draws = sampler.sample(4096)
    assert draws.ess > 0.5 and abs(draws.log_z - 0.7) < 0.1
    with pytest.raises(ValueError, match="losses"):
        fewstep.fit(Law(GAUSSIAN), sampler="implicit", loss="log_variance", train_steps=1, whiten=False)


MATRIX = torch.tensor([[0.9, 0.2], [-0.1, 0.8]])
MODEL = StateSpace(
    lambda x: x @ MATRIX.T,
    torch.tensor([[1.0, 0.5]]),
    (torch.zeros(2), torch.eye(2)),
    0.2 * torch.eye(2),
    torch.tensor([[0.05]]),
)
SEEN = torch.tensor([[0.6], [1.1], [0.2], [-0.4]])


@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("threshold", [0.0, 0.5])
def test_particles_agree_with_the_kalman_filter(learned, threshold):
    means, log_p = kalman(MATRIX, MODEL, SEEN)
    proposal = None
    if learned:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            proposal = Proposal(4, (2, 1), 16)
        train(MODEL, proposal, SEEN, Streams(5, range(64)), steps=60, lr=1e-2)
    with torch.no_grad():
        runs = [filtered(MODEL, proposal, SEEN, Streams(seed, range(1024)), threshold) for seed in range(16)]
    ratios = torch.stack([run.log_evidence[-1] - log_p for run in runs]).exp()
    error = float(ratios.std()) / 4
    assert abs(float(ratios.mean()) - 1) < 4 * error and error < 0.2
    last = torch.stack([run.means for run in runs])
    assert float(((last.mean(0) - means).abs() / (last.std(0) / 4 + 1e-3)).max()) < 5


def test_training_proposals_raises_the_bound_and_trains_all_of_it():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        proposal = Proposal(4, (2, 1), 16)
    before = {name: value.clone() for name, value in proposal.state_dict().items()}
    losses = train(MODEL, proposal, SEEN, Streams(5, range(64)), steps=60, lr=1e-2)
    assert sum(losses[-5:]) < sum(losses[:5]) - 1
    assert -losses[-1] * 4 < float(kalman(MATRIX, MODEL, SEEN)[1]) + 0.5
    moved = {name for name, value in proposal.state_dict().items() if not torch.equal(value, before[name])}
    assert "mix" in moved and any(name.startswith("shape") for name in moved), "the published code leaves these out"


SCALES = {"widths": torch.tensor([2.0, 0.5]), "dense": torch.tensor([[2.0, 0.0], [0.7, 0.5]])}


def some_map(kind, scale, target=None):
    """A map that bends, in coordinates that are not the target's."""
    whitened = Whitened(target or Law(GAUSSIAN), torch.tensor([1.0, 2.0]), scale)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        flow_map = kind(SCHEDULE, whitened, MapConfig(16, 1))
        torch.nn.init.normal_(flow_map.net.last.weight, std=0.3)
    return MapSampler(whitened, flow_map.eval(), renoise=not flow_map.jumps)


@torch.no_grad()
def off(program, sampler, rows, steps=2):
    """Return the largest error of an exported program."""
    z = Streams(0, range(rows)).randn(2)
    x = sampler.whitened.to_x(sampler.function(steps)(z))
    assert float((x - z).abs().max()) > 0.5, "the identity would show nothing"
    return float((program(z) - x).abs().max())


@pytest.mark.parametrize("scale", SCALES.values(), ids=SCALES)
@pytest.mark.parametrize("kind", [ResidualMap, ScaledMap, MAPS["gated"]])
def test_exported_program_is_the_map(kind, scale, tmp_path):
    sampler = some_map(kind, scale)
    program = torch.export.load(export(sampler, tmp_path / "map.pt2", steps=2)).module()
    other = torch.export.load(export(sampler, tmp_path / "one.pt2")).module()
    for rows in (2, 70):
        assert off(program, sampler, rows) < 1e-5 < off(other, sampler, rows)
    with pytest.raises(ValueError, match="at least 1"):
        export(sampler, tmp_path / "none.pt2", steps=0)
    with pytest.raises(TypeError, match=r"Laplace is no map .* distil it first"):
        export(Laplace(sampler.whitened), tmp_path / "other.pt2")
    with pytest.raises(ValueError, match="score of its target"):
        export(MapSampler(sampler.whitened, GuidedMap(SCHEDULE, sampler.whitened)), tmp_path / "guided.pt2")


BOXED = as_target(lambda x: -x.square().sum(-1), 2, support=((0.0, None), (1.0, 3.0)))


def test_exported_program_of_a_bounded_density_ends_with_its_box(tmp_path):
    sampler = some_map(ScaledMap, SCALES["dense"], BOXED)
    program = torch.export.load(export(sampler, tmp_path / "map.pt2", steps=2)).module()
    assert off(program, sampler, 70) < 1e-5
    x = program(Streams(1, range(70)).randn(2))
    assert bool(((x > torch.tensor([0.0, -math.inf])) & (x < torch.tensor([1.0, 3.0]))).all())


def test_a_consistency_function_can_be_exported(tmp_path):
    sampler = some_map(EDMMap, SCALES["widths"])
    program = torch.export.load(export(sampler, tmp_path / "map.pt2")).module()
    assert off(program, sampler, 5, steps=1) < 1e-5
    with pytest.raises(ValueError, match="goes to time 0 only"):
        sampler.flow_map(torch.zeros(1, 2), torch.tensor(1.0), torch.tensor(0.5))


@pytest.mark.parametrize("target", [None, BOXED], ids=["unbounded", "bounded"])
@pytest.mark.parametrize("kind", [ResidualMap, ScaledMap, MAPS["gated"]])
def test_onnx_gives_the_same_numbers(kind, target, tmp_path):
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    sampler = some_map(kind, SCALES["dense"], target)
    session = runtime.InferenceSession(str(export(sampler, tmp_path / "map.onnx", steps=2)))
    for rows in (2, 70):
        # another runtime rounds differently, and coordinates reach 15, of which float32 keeps 1e-6
        assert off(lambda z: torch.from_numpy(session.run(None, {"z": z.numpy()})[0]), sampler, rows) < 3e-5
