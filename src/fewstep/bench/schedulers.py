"""`fewstep bench schedulers`: our solvers beside the schedulers of diffusers, on equal grids: what they give and what they cost."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from torch import Tensor

from fewstep.bench.common import Report, alternate
from fewstep.bench.priors import resolve_prior
from fewstep.compat import prepare_torchvision
from fewstep.core.denoiser import Denoiser
from fewstep.core.likelihood import FlatLikelihood
from fewstep.core.multistep import Solver
from fewstep.core.problem import Posterior
from fewstep.core.registry import get
from fewstep.core.sampler import State
from fewstep.core.schedule import Tabulated
from fewstep.testing.law import ScriptedNoise
from fewstep.testing.problems import mixture_problem

SCHEDULE = Tabulated.linear()  # diffusers' default: 1000 levels
TICKS = 1000
ITEMS = 8  # on which results are compared
NOTES = (
    "difference: largest, over 8 samples of a mixture in 8 dimensions from the same noise in single precision, over the largest "
    "coordinate of diffusers' samples, on its own times. Its coefficients at second and third order are given the noise ratios in "
    "double precision: in single they alone cost 3e-5.",
    "seconds: of the processor, of all samples by a whole run, medians of alternating runs; diffusers: a loop of network call and "
    "`scheduler.step`, the network's own prediction passed on as it is; bare: as many network calls and nothing else. Ratios: "
    "medians of the ratios of neighbouring runs.",
)


@dataclass(frozen=True)
class Pair:
    """A solver and the scheduler that does the same.

    Attributes:
        solver: its name.
        settings: its fields.
        scheduler: name of the class in diffusers.
        options: of the scheduler.
        kind: the prediction that the scheduler wants.
        exact: whether it needs its noise ratios in double precision.
        last: the time at which the grid ends.
    """

    solver: str
    settings: Mapping[str, Any]
    scheduler: str
    options: Mapping[str, Any] = field(default_factory=dict)
    kind: str = "x0"
    exact: bool = False
    last: float = 0.0

    @property
    def title(self) -> str:
        """What to call it."""
        return " ".join([self.solver, *(f"{name}={value}" for name, value in self.settings.items())])

    def build(self, steps: int) -> Any:
        """Return the scheduler, set to `steps` steps."""
        prepare_torchvision()
        import diffusers

        given = {"prediction_type": "sample"} if self.kind == "x0" else {}
        scheduler = getattr(diffusers, self.scheduler)(**given, **self.options)
        self.reset(scheduler, steps)
        return scheduler

    def reset(self, scheduler: Any, steps: int) -> None:
        """Make a scheduler ready for another run."""
        scheduler.set_timesteps(steps)
        if self.exact:
            ends, last = torch.tensor(times(scheduler), dtype=torch.float64), scheduler.sigmas[-1:].double()
            floor = SCHEDULE.ratio(torch.tensor([1 / TICKS], dtype=torch.float64))
            scheduler.sigmas = torch.cat([SCHEDULE.ratio(ends), last if float(last) == 0 else floor])

    def ours(self, scheduler: Any) -> Solver:
        """Return our solver on the times of the scheduler."""
        grid = (*times(scheduler), self.last)
        return get(self.solver, "solvers")(steps=len(grid) - 1, grid=grid, **self.settings)


MULTISTEP: Mapping[str, Any] = {"lower_order_final": False}
PAIRS = (
    Pair("ddim", {}, "DDIMScheduler", {"clip_sample": False, "timestep_spacing": "trailing"}),
    *(
        Pair("dpmpp", {"terms": n}, "DPMSolverMultistepScheduler", {**MULTISTEP, "solver_order": n}, exact=True)
        for n in (1, 2, 3)
    ),
    *(
        Pair(
            "dpmpp_sde",
            {"terms": n},
            "DPMSolverMultistepScheduler",
            {**MULTISTEP, "solver_order": n, "algorithm_type": "sde-dpmsolver++"},
        )
        for n in (1, 2)
    ),
    *(
        Pair(
            "deis",
            {"order": n, "variable": "log_rho"},
            "DEISMultistepScheduler",
            {**MULTISTEP, "solver_order": n},
            kind="epsilon",
            exact=True,
            last=1 / TICKS,
        )
        for n in (1, 2, 3)
    ),
)


def main(
    out: str | Path | None = None,
    *,
    prior: str | Denoiser = "digits",
    steps: int = 10,
    items: int = 16,
    repeats: int = 5,
    size: int = 64,
) -> Report:
    """Compare and time all pairs, print the table, write the JSON report to `out` where given, and return it.

    Args:
        out: path of the JSON file.
        prior: whose loop is timed: a name or path for `load_prior`, "random", or a denoiser; its schedule is set to diffusers'.
        steps: of every run.
        items: samples of a timed run.
        repeats: pairs of runs.
        size: side of the images of a prior that takes any.
    """
    network = resolve_prior(prior).requires_grad_(False)
    network.schedule = SCHEDULE
    shape = tuple(size if n is None else n for n in network.event_shape)
    problem = Posterior(network, FlatLikelihood(shape))
    rows = [
        {"solver": pair.title, "scheduler": pair.scheduler, "difference": difference(pair, steps)}
        | cost(pair, problem, steps, items, repeats)
        for pair in track(PAIRS, "schedulers", transient=True)
    ]
    rows.append({"solver": "ipndm", "scheduler": "IPNDMScheduler", "difference": ipndm_difference(steps)})
    given = {"prior": str(prior)[:200], "steps": steps, "items": items, "repeats": repeats, "size": size}
    return Report("schedulers", given, {"Beside diffusers": rows}, NOTES).finish(out)


def times(scheduler: Any) -> list[float]:
    """Return our times of the steps of a scheduler."""
    return [(int(step) + 1) / TICKS for step in scheduler.timesteps]


def toy() -> Any:
    """Return a mixture in 8 dimensions in single precision, with the levels of diffusers."""
    prior = mixture_problem().problem.prior.float()
    prior.schedule = SCHEDULE
    return prior


@torch.no_grad()
def difference(pair: Pair, steps: int) -> float:
    """Return the largest difference of both results on the mixture, relative to the largest coordinate."""
    prior, scheduler = toy(), pair.build(steps)
    draws = torch.randn(steps + 1, ITEMS, *prior.event_shape, generator=torch.Generator().manual_seed(2))
    x = draws[0]
    for k, (t, step) in enumerate(zip(times(scheduler), scheduler.timesteps, strict=True)):
        fresh = {"variance_noise": draws[k + 1]} if "sde" in str(pair.options.get("algorithm_type")) else {}
        x = scheduler.step(prior.predict(pair.kind, x, torch.tensor(t)), step, x, **fresh).prev_sample
    return apart(followed(pair.ours(scheduler), prior, draws), x)


@torch.no_grad()
def ipndm_difference(steps: int) -> float:
    """Return the same for iPNDM, whose scheduler in diffusers takes another prediction and levels without alpha."""
    prepare_torchvision()
    import diffusers

    prior = toy()
    grid = torch.linspace(0.5, 0.01, steps + 1, dtype=torch.float64)  # theirs: 1 - sigma^2 in float32
    scheduler: Any = diffusers.IPNDMScheduler(trained_betas=SCHEDULE(grid)[1].float().numpy())
    scheduler.set_timesteps(steps)
    draws = torch.randn(steps + 1, ITEMS, *prior.event_shape, generator=torch.Generator().manual_seed(2))
    x = draws[0]
    for t, step in zip(grid, scheduler.timesteps, strict=False):
        x = scheduler.step(prior.predict("v", x, t), step, x).prev_sample
    return apart(followed(get("ipndm", "solvers")(steps=steps, grid=tuple(grid.tolist())), prior, draws), x)


def followed(solver: Solver, prior: Denoiser, draws: Tensor) -> Tensor:
    """Return what a solver makes of draws[0] with the fresh noise draws[1:], (steps + 1, N, *event) -> (N, *event)."""
    problem = Posterior(prior, FlatLikelihood(tuple(draws.shape[2:]), draws.shape[1]))
    return solver.run(problem, ScriptedNoise(draws[1:].transpose(0, 1).flatten(1)), State(draws[0]))


def apart(ours: Tensor, theirs: Tensor) -> float:
    """Return the largest difference over the largest coordinate of `theirs`."""
    return float((ours - theirs).abs().max() / theirs.abs().max())


def cost(pair: Pair, problem: Posterior, steps: int, items: int, repeats: int) -> dict[str, float]:
    """Return the seconds of our run, of diffusers' and of the bare calls, with the ratios of ours to both."""
    scheduler, network = replace(pair, kind="x0").build(steps), problem.prior
    solver = replace(pair, last=0.0).ours(scheduler)  # whole runs end at t = 0
    start = torch.randn(items, *problem.likelihood.event_shape, generator=torch.Generator().manual_seed(0))

    @torch.no_grad()
    def theirs() -> None:
        pair.reset(scheduler, steps)
        x = start
        for step in scheduler.timesteps:
            x = scheduler.step(network(x, (step + 1) / TICKS), step, x).prev_sample

    @torch.no_grad()
    def bare() -> None:
        for t in times(scheduler):
            network(start, torch.tensor(t))

    def ours() -> None:
        solver(problem, items)

    ours()  # the table of coefficients is made once
    found = {"diffusers": alternate([ours, theirs], repeats), "bare": alternate([ours, bare], repeats)}
    out: dict[str, float] = {"seconds": statistics.median(found["bare"][0])}
    for name, (mine, other) in found.items():
        out[f"{name} seconds"] = statistics.median(other)
        out[f"over {name}"] = statistics.median(a / b for a, b in zip(mine, other, strict=True))
    return out
