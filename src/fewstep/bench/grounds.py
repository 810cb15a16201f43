"""Priors whose samples are known, exactly or by many steps, and how far a sampler's are from them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewstep.bench import mixture
from fewstep.bench.common import FAILURES, failure
from fewstep.bench.priors import resolve_prior
from fewstep.core.denoiser import Denoiser
from fewstep.core.likelihood import FlatLikelihood
from fewstep.core.noise import Noise
from fewstep.core.problem import Posterior
from fewstep.core.registry import get
from fewstep.core.sampler import Sampler, State
from fewstep.data import from_bytes
from fewstep.metrics import frechet_distance, sliced_wasserstein
from fewstep.metrics.classes import Classifier
from fewstep.priors.exact import MixturePrior
from fewstep.recipes.labelled import Labelled
from fewstep.solvers.dpmpp import DPMSolverPP
from fewstep.testing.problems import mixture_problem

FLOW_STEPS = 150  # of Runge-Kutta's fourth order on a mixture
FINE = 100  # steps of third order on a network
SIZE = 64  # side of the images of a prior that takes any
CHUNK = 64  # items that go through a network at once
HOLDOUT = 1000  # images of the file of digits that are the test set
ELSEWHERE = 10**6  # a seed beside that of the samples
ERROR, TRANSPORT, FRECHET = "error", "SW/floor", "Frechet"


@dataclass(frozen=True)
class Ground:
    """A prior and K samples of it, from the same noise that samplers will be given and from other noise.

    Attributes:
        title: what to call it.
        problem: the prior without a measurement.
        truth: where the probability flow leads from the noise of samples 0, 1, ..., (K, *event).
        exact: samples of the prior from other noise, (K, *event).
        scale: standard deviation of the prior, in whose units errors are.
        floor: sliced Wasserstein distance between two sets of K samples of the prior.
        seed: of the samples.
        judge: distance to real data, (K, *event) -> float, where there are some.
        floors: rows on what the figures are without any error of a solver.
    """

    title: str
    problem: Posterior
    truth: Tensor = field(repr=False)
    exact: Tensor = field(repr=False)
    scale: float
    floor: float
    seed: int = 0
    judge: Callable[[Tensor], float] | None = None
    floors: tuple[dict[str, Any], ...] = ()

    def samples(self, sampler: Sampler) -> Tensor:
        """Return as many samples as there are of the truth, from the same noise, (K, *event)."""
        return sampler(self.problem, len(self.truth), seed=self.seed, chunk=CHUNK).x[:, 0]

    def figures(self, sampler: Sampler) -> dict[str, Any]:
        """Return the distances of a sampler's samples, and the error of each, or a remark where there are none."""
        try:
            x = self.samples(sampler)
        except FAILURES as error:
            return failure(error)
        found: dict[str, Any] = {}
        if deterministic(sampler, self.problem):
            items = (x - self.truth).flatten(1).square().mean(1) / self.scale**2
            found |= {ERROR: float(items.mean().sqrt()), "items": items.sqrt().tolist()}
        found[TRANSPORT] = sliced_wasserstein(x.flatten(1), self.exact.flatten(1)) / self.floor
        return found if self.judge is None else found | {FRECHET: self.judge(x)}


def mixture_ground(dim: int, count: int, seed: int) -> Ground:
    """Return four Gaussians in `dim` dimensions, with their exact flow and exact samples."""
    prior: Any = mixture_problem(dim).problem.prior
    problem = Posterior(prior, FlatLikelihood(prior.event_shape, 1, torch.float64))
    posterior = prior.posterior(problem.likelihood)
    truth, exact = exact_flow(prior, problem, count, seed), posterior.sample(count, seed=999)
    scale, floor = float(posterior.cov[0].diagonal().mean().sqrt()), mixture.transport_floor(posterior, count)
    ground = Ground(f"Mixture, {dim} dimensions", problem, truth, exact, scale, floor, seed)
    return replace(ground, floors=({"samples": "exact flow"} | _floor_row(ground, truth),))


def network_ground(prior: str | Denoiser, count: int, seed: int, data: str | Path | None = None) -> Ground:
    """Return a network, its truth made by `FINE` steps, and the floors of all figures.

    Args:
        prior: a name or path for `load_prior`, or a denoiser.
        count: K.
        seed: of the samples.
        data: the file of digits, whose test set is what the Frechet distance is to.
    """
    denoiser = resolve_prior(prior).requires_grad_(False)
    shape = tuple(SIZE if n is None else n for n in denoiser.event_shape)
    problem = Posterior(denoiser, FlatLikelihood(shape))

    def fine(at: int, steps: int = FINE) -> Tensor:
        sampler = DPMSolverPP(steps, terms=3, released=False)
        return sampler(problem, count, seed=at, chunk=CHUNK).x[:, 0]

    truth, exact, half = fine(seed), fine(seed + ELSEWHERE), fine(seed, FINE // 2)
    judge, real = (None, None) if data is None else _frechet_to(Path(data), count)
    scale, floor = float(truth.std(0).square().mean().sqrt()), sliced_wasserstein(truth.flatten(1), exact.flatten(1))
    ground = Ground(
        f"Prior {prior}" if isinstance(prior, str) else "Prior", problem, truth, exact, scale, floor, seed, judge
    )
    sets = {f"{FINE} steps": truth, f"{FINE // 2} steps": half, f"{FINE} steps, other noise": exact}
    sets |= {} if real is None else {"real images of the training set": real}
    rows = tuple({"samples": name} | _floor_row(ground, x) for name, x in sets.items())
    return replace(ground, floors=rows)


def exact_flow(prior: MixturePrior, problem: Posterior, count: int, seed: int) -> Tensor:
    """Return where the exact flow leads from the noise of samples 0, 1, ..., (K, *event)."""
    noise = Noise.spawn([seed], range(count), torch.float64)
    start = get("ddim", "solvers")().init(problem.expand(count), noise).x
    ends = torch.ones((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    return prior.flow(start, *ends, FLOW_STEPS)


@torch.no_grad()
def deterministic(sampler: Sampler, problem: Posterior) -> bool:
    """Return whether steps from one start under other noise lead to the same end."""
    item, dtype = problem.expand(1), problem.likelihood.dtype
    start = State(sampler.init(item, Noise([1], dtype)).x)
    return torch.equal(*(sampler.run(item, Noise([seed], dtype), start) for seed in (3, 5)))


def _floor_row(ground: Ground, x: Tensor) -> dict[str, Any]:
    """Return the figures of a set that no solver under test has made."""
    apart = (x - ground.truth).square().mean().sqrt() / ground.scale
    transport = sliced_wasserstein(x.flatten(1), ground.exact.flatten(1)) / ground.floor
    row = {ERROR: float(apart), TRANSPORT: transport}
    return row if ground.judge is None else row | {FRECHET: ground.judge(x)}


def _frechet_to(path: Path, count: int) -> tuple[Callable[[Tensor], float], Tensor]:
    """Return the Frechet distance to the test set in the features of the shipped classifier, and `count` training images."""
    training, test = Labelled.read(path).split(HOLDOUT)
    net = Classifier.load()
    with torch.no_grad():
        wanted = net.features(from_bytes(test.images))

    @torch.no_grad()
    def judge(x: Tensor) -> float:
        return frechet_distance(net.features(x.clamp(-1, 1)), wanted)

    return judge, from_bytes(training.images[:count])
