"""`fewstep bench srds`: how deep and how long SRDS runs against DDIM on the same grid, and what it would take on more devices."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import track
from torch import Tensor

from fewstep.bench.common import Report, alternate
from fewstep.bench.priors import resolve_prior
from fewstep.core.denoiser import Denoiser
from fewstep.core.likelihood import FlatLikelihood
from fewstep.core.problem import Posterior
from fewstep.core.sampler import State
from fewstep.solvers.ddim import DDIM
from fewstep.solvers.srds import SRDS
from fewstep.testing.problems import mixture_problem

MIXTURE, DIM = "mixture", 64  # the prior in closed form, and its size
NOTES = (
    "SRDS with as many blocks as the root of the steps, against DDIM on the same grid; tolerance: mean change of the sample per "
    "coordinate in one iteration below which it stops, 0 runs to DDIM's own result. distance: root mean square to that.",
    "depth: network calls one after another, a batch of blocks counting as one; calls: of every block. speed-up: seconds of DDIM "
    "over those of SRDS, medians of alternating runs of one sample on this machine.",
    "model: DDIM's calls at the measured time of one, over the same calls of SRDS when the blocks of an iteration are shared out to "
    "so many devices like this one, at the measured time of a batch, without communication; 'model, 1' is to be compared with what "
    "was measured. pipelined: a device for each block, which starts as soon as its own start is known.",
)


def main(  # noqa: PLR0913 - one parameter is one option
    out: str | Path | None = None,
    *,
    prior: str | Denoiser = MIXTURE,
    steps: Sequence[int] = (64, 128, 256, 512, 1024),
    tolerances: Sequence[float] = (0.0, 0.2 / 255),
    devices: Sequence[int] = (1, 2, 4, 8, 16),
    size: int = 64,
    repeats: int = 3,
    seed: int = 0,
) -> Report:
    """Measure and model SRDS, print the table, write the JSON report to `out` where given, and return it.

    Args:
        out: path of the JSON file.
        prior: "mixture" for one in closed form in 64 dimensions, a name or path for `load_prior`, "random", or a denoiser.
        steps: of DDIM.
        tolerances: of SRDS, in units of x.
        devices: of the model.
        size: edge of the image of a prior that takes any.
        repeats: timed runs.
        seed: of the sample.
    """
    problem = problem_of(mixture_problem(DIM).problem.prior if prior == MIXTURE else resolve_prior(prior), size)
    entries = [(n, tolerance) for n in steps for tolerance in tolerances]
    rows = [row(problem, *entry, devices, repeats, seed) for entry in track(entries, "srds", transient=True)]
    given = {"prior": str(prior)[:200], "steps": steps, "tolerances": tolerances, "devices": devices, "size": size}
    return Report("srds", given | {"repeats": repeats, "seed": seed}, {"SRDS": rows}, NOTES).finish(out)


def problem_of(prior: Denoiser, size: int) -> Posterior:
    """Return the problem of one sample of a prior."""
    dtype = next((v.dtype for v in prior.state_dict().values() if v.is_floating_point()), torch.float32)
    shape = tuple(size if n is None else n for n in prior.event_shape)
    return Posterior(prior, FlatLikelihood(shape, 1, dtype))


def row(
    problem: Posterior, steps: int, tolerance: float, devices: Sequence[int], repeats: int, seed: int
) -> dict[str, Any]:
    """Return what is measured and what is modelled for one number of steps and one tolerance."""
    blocks = math.isqrt(steps - 1) + 1
    solver = SRDS(blocks, -(-steps // blocks), tolerance)
    plain, moved = DDIM(blocks * solver.fine), []

    def note(done: int, total: int, state: State) -> None:
        moved.append(bool(state.memory.moving.any()))

    ours, theirs = solver(problem, seed=seed, callback=note), plain(problem, seed=seed)
    run = Iterations(solver.steps, solver.fine, 1 + sum(moved[:-1]))
    seconds = timed([lambda: solver(problem, seed=seed), lambda: plain(problem, seed=seed)], repeats)
    cost = call_cost(problem, blocks, repeats)
    model = {f"model, {d}": plain.steps * cost(1) / run.seconds(cost, d) for d in devices}
    return {
        "steps": plain.steps,
        "blocks": blocks,
        "tolerance": tolerance,
        "iterations": run.count,
        "depth": solver.depth(run.count),
        "calls": ours.nfe,
        "distance": float((ours.x - theirs.x).square().mean().sqrt()),
        "seconds": seconds[0],
        "DDIM seconds": seconds[1],
        "speed-up": seconds[1] / seconds[0],
        **model,
        "pipelined": plain.steps / run.pipelined(),
    }


@dataclass(frozen=True)
class Iterations:
    """A run of SRDS: its blocks, the fine steps in each, and how many iterations it made."""

    blocks: int
    fine: int
    count: int

    def seconds(self, cost: Callable[[float], float], devices: int) -> float:
        """Return the time with the blocks of an iteration shared out, `cost` being that of a call on so many items."""
        guess = self.blocks * cost(1)
        active = [self.blocks - k for k in range(self.count)]
        return guess + sum(self.fine * cost(-(-n // devices)) + (n - 1) * cost(1) for n in active)

    def pipelined(self) -> int:
        """Return the depth with a device for each block: F(X_j) and the sweep wait for what they need and nothing else."""
        known = list(range(self.blocks + 1))
        for k in range(self.count):
            later = known[: k + 1]
            for j in range(k, self.blocks):
                swept = later[j] + 1 if j > k else 0  # the first block of an iteration is exact and needs no sweep
                later.append(max(known[j] + self.fine, swept))
            known = later
        return known[-1]


def timed(runs: Sequence[Callable[[], object]], repeats: int) -> list[float]:
    """Return the median seconds of each of some runs, which alternate."""
    return [statistics.median(kept) for kept in alternate(runs, repeats, time.perf_counter)]


def call_cost(problem: Posterior, most: int, repeats: int) -> Callable[[float], float]:
    """Return the measured seconds of a network call as a function of the number of items, 1 to `most`, linear in between."""
    sizes = sorted({1, most, *(2**i for i in range(most.bit_length()))})
    calls = [_call(problem, n) for n in sizes]
    timed(calls, 1)
    seconds = timed(calls, 5 * repeats)
    return lambda n: float(np.interp(n, sizes, seconds))


def _call(problem: Posterior, items: int) -> Callable[[], Tensor]:
    like = problem.likelihood
    x = torch.zeros(items, *like.event_shape, dtype=like.dtype, device=like.device)
    t = torch.full((items,), 0.5, dtype=torch.float64)
    return lambda: problem.denoise(x, t)
