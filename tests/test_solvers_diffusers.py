"""Agreement with diffusers' schedulers on equal grids in single precision."""

import pytest
import torch

from fewstep.compat import prepare_torchvision
from fewstep.core.likelihood import FlatLikelihood
from fewstep.core.problem import Posterior
from fewstep.core.registry import get
from fewstep.core.sampler import State
from fewstep.core.schedule import Tabulated
from fewstep.testing.law import ScriptedNoise
from fewstep.testing.problems import mixture_problem

prepare_torchvision()
diffusers = pytest.importorskip("diffusers")

SCHEDULE = Tabulated.linear()
STEPS, ITEMS = 10, 8


@pytest.fixture(scope="module")
def prior():
    network = mixture_problem().problem.prior.float()
    network.schedule = SCHEDULE
    return network


@pytest.fixture(scope="module")
def noise():
    return torch.randn(STEPS + 1, ITEMS, 8, generator=torch.Generator().manual_seed(2))


@torch.no_grad()
def theirs(scheduler, prior, noise, kind="epsilon", **options):
    """Run a scheduler; `kind` is what it wants to be told."""
    x = noise[0]
    for k, step in enumerate(scheduler.timesteps):
        t = times(scheduler)[k]
        extra = {"variance_noise": noise[k + 1]} if options.get("stochastic") else {}
        x = scheduler.step(prior.predict(kind, x, torch.tensor(t)), step, x, **extra).prev_sample
    return x


def times(scheduler):
    """Return our times of integer timesteps."""
    return [(int(step) + 1) / 1000 for step in scheduler.timesteps]


@torch.no_grad()
def ours(name, prior, noise, grid, **settings):
    solver = get(name, "solvers")(steps=STEPS, grid=tuple(grid), **settings)
    problem = Posterior(prior, FlatLikelihood((8,), ITEMS))
    state, script = State(noise[0]), ScriptedNoise(noise[1:].transpose(0, 1).flatten(1))
    for k in range(STEPS):
        state = solver.step(problem, state, k, script)
    return state.x


def close(left, right):
    return float((left - right).abs().max() / right.abs().max()) < 1e-5


def test_ddim(prior, noise):
    scheduler = diffusers.DDIMScheduler(clip_sample=False, timestep_spacing="trailing")
    scheduler.set_timesteps(STEPS)
    assert close(ours("ddim", prior, noise, (*times(scheduler), 0.0)), theirs(scheduler, prior, noise))


def in_double(scheduler):
    """Give a scheduler its noise ratios in float64: its own coefficients, in float32, cost 3e-5 at third order."""
    ends = torch.tensor(times(scheduler), dtype=torch.float64)
    last = scheduler.sigmas[-1:].double()
    last = last if float(last) == 0 else SCHEDULE.ratio(torch.tensor([1 / 1000], dtype=torch.float64))
    scheduler.sigmas = torch.cat([SCHEDULE.ratio(ends), last])


@pytest.mark.parametrize("order", [1, 2, 3])
def test_dpmpp(prior, noise, order):
    scheduler = diffusers.DPMSolverMultistepScheduler(
        solver_order=order, lower_order_final=False, prediction_type="sample"
    )
    scheduler.set_timesteps(STEPS)
    in_double(scheduler)
    found = ours("dpmpp", prior, noise, (*times(scheduler), 0.0), terms=order)
    assert close(found, theirs(scheduler, prior, noise, "x0"))
    other = ours("dpmpp", prior, noise, (*times(scheduler), 0.0), terms=order, released=False)
    assert close(other, found) == (order == 1)


@pytest.mark.parametrize("order", [1, 2])
def test_sde_dpmpp(prior, noise, order):
    scheduler = diffusers.DPMSolverMultistepScheduler(
        solver_order=order, lower_order_final=False, algorithm_type="sde-dpmsolver++"
    )
    scheduler.set_timesteps(STEPS)
    found = ours("dpmpp_sde", prior, noise, (*times(scheduler), 0.0), terms=order)
    assert close(found, theirs(scheduler, prior, noise, stochastic=True))


@pytest.mark.parametrize("order", [1, 2, 3])
def test_deis(prior, noise, order):
    scheduler = diffusers.DEISMultistepScheduler(solver_order=order, lower_order_final=False)
    scheduler.set_timesteps(STEPS)
    in_double(scheduler)
    grid = (*times(scheduler), 1 / 1000)
    found = ours("deis", prior, noise, grid, order=order, variable="log_rho")
    assert close(found, theirs(scheduler, prior, noise))
    assert close(ours("deis", prior, noise, grid, order=order, variable="rho"), found) == (order == 1)


def test_ipndm(prior, noise):
    grid = torch.linspace(0.5, 0.01, STEPS + 1, dtype=torch.float64)  # theirs: 1 - sigma^2 in float32
    scheduler = diffusers.IPNDMScheduler(trained_betas=SCHEDULE(grid)[1].float().numpy())
    scheduler.set_timesteps(STEPS)
    x = noise[0]
    with torch.no_grad():
        for t, step in zip(grid, scheduler.timesteps, strict=False):
            x = scheduler.step(prior.predict("v", x, t), step, x).prev_sample
    assert close(ours("ipndm", prior, noise, grid.tolist()), x)
