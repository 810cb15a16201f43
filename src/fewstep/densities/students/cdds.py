r"""CDDS, consistency distillation of a diffusion sampler (Jutras-Dube et al. 2025, arXiv:2502.07579), and what it became here.

*Published* (`CDDS.preset("paper")`): one of 17 intervals per batch, the teacher's flow by Euler steps up to its end, and
|f(y_n, t_n) - f(y_{n+1}, t_{n+1})|^2 / d with the second f held fixed; EDM parametrisation, warm start from the teacher's network.

*Improved* (default): trajectories are solved once by Heun's method, and steps of all lengths along each serve as inputs and targets
of a flow map, which also learns how far neighbours end from each other, because weights are made of slopes. No value is handed
down through 17 intervals, so that the same budget gives maps whose exact weights are good; at the end these are trained themselves
(`_polish`). `SelfConsistency` with an averaged target (`CDDS.preset("averaged")`) is the published loss with its two known faults
mended.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from fewstep.core.batch import like
from fewstep.core.denoiser import Denoiser, Rescheduled
from fewstep.core.noise import Noise
from fewstep.core.objective import Objective
from fewstep.core.presets import Presets
from fewstep.core.reference import Reference
from fewstep.core.schedule import VariancePreserving
from fewstep.densities.grids import times_of
from fewstep.densities.students._balance import balanced
from fewstep.densities.students._maps import MAPS, Followed, MapConfig, Perceptron, passed, warm_start
from fewstep.densities.students._polish import Polish
from fewstep.densities.students._sampler import MapSampler
from fewstep.densities.students._trajectories import Incomplete, Trajectories
from fewstep.densities.whitened import Whitened
from fewstep.training import Batches

_NARROWEST = 0.003  # slope, which errors are taken relative to
_FAR = 0.3  # relative errors beyond it count by themselves, not by their squares
_FEWEST = 256  # draws of which means can be taken
_CHEAPEST = 8  # dimensions up to which their cost does not count
_WIDEST = 64  # dimensions up to which exact determinants are cheap enough to train on


def pseudo_huber(error: Tensor, c: float) -> Tensor:
    """Return the mean over items of sqrt(|e|^2 + c^2) - c, (N, d) -> (); of |e|^2 / d where c = 0."""
    if c == 0:
        return error.square().mean()
    return ((error.square().sum(1) + c**2).sqrt() - c).mean()


@dataclass(frozen=True)
class FlowRegression(Objective):
    """The distance of G(y_t, t, s) to the teacher's y_s, in units of the network's output, sin(theta_t - theta_s).

    Attributes:
        huber: of `pseudo_huber`.
        slope: weight of the relative error of differences between neighbours, where the batch has them.
        relative: weight of both errors per coordinate over the slope that the map has there by itself, `FlowMap.sloped`. What
            is narrow, as the neck of a funnel, is then learned as well as what is wide, and folds less.
    """

    huber: float = 0.01
    slope: float = 0.3
    relative: float = 0.0

    def loss(self, player: str, model: nn.Module, batch: Any, noise: Noise) -> tuple[Tensor, dict[str, float]]:
        """See `Objective`; `batch` is that of `Trajectories`."""
        flow_map, t, s, near = cast(Followed, model).map, batch["t"], batch["s"], "beside_t" in batch
        starts, ends = (torch.cat([batch[f"y_{k}"], batch[f"beside_{k}"]]) if near else batch[f"y_{k}"] for k in "ts")
        copies = len(starts) // len(t)
        found, slopes = flow_map.sloped(starts, t.repeat(copies), s.repeat(copies))
        error, *beside = (found - ends).split(len(t))
        slopes = slopes[: len(t)].detach().clamp_min(_NARROWEST)
        loss = pseudo_huber(error / like(passed(flow_map.schedule, t, s), error), self.huber)
        if self.relative:
            loss = loss + self.relative * pseudo_huber(error / slopes, _FAR)
        figures = {"error": float(error.detach().norm(dim=1).mean())}
        if beside:
            width = (batch["beside_s"] - batch["y_s"]).norm(dim=1, keepdim=True)
            relative = (beside[0] - error) / (width + 1e-5)
            loss = loss + self.slope * pseudo_huber(relative, 0.1)
            figures["slope"] = float(relative.detach().norm(dim=1).median())
        if beside and self.relative:
            apart = (batch["beside_t"] - batch["y_t"]).square().mean(1, keepdim=True).sqrt()
            loss = loss + self.relative * pseudo_huber((beside[0] - error) / (slopes * apart + 1e-6), _FAR)
        return loss, figures


@dataclass(frozen=True)
class SelfConsistency(Objective):
    """The distance of f(y_t, t) to f(y_s, s) of the copy that follows, f = G(., ., 0); zero for the flow itself.

    Attributes:
        huber: of `pseudo_huber`.
        decay: of the copy; 0 is the map itself, held fixed.
    """

    huber: float = 0.0
    decay: float = 0.0

    def loss(self, player: str, model: nn.Module, batch: Any, noise: Noise) -> tuple[Tensor, dict[str, float]]:
        """See `Objective`; `batch` is that of `Trajectories` or `Incomplete`."""
        followed = cast(Followed, model)
        followed.follow(self.decay)
        zero = torch.zeros_like(batch["t"])
        with torch.no_grad():
            wanted = followed.target(batch["y_s"], batch["s"], zero)
        error = followed.map(batch["y_t"], batch["t"], zero) - wanted
        return pseudo_huber(error, self.huber), {"error": float(error.detach().norm(dim=1).mean())}


@dataclass(frozen=True)
class CDDS(Presets):
    """How a student is distilled from a teacher.

    The preset "narrow" is for targets some parts of which are much narrower than the whole, such as a funnel; "many" is for tens of
    coordinates with modes of their own, where exact weights are too dear to train on.

    Attributes:
        map: a name of `MAPS`: "scaled", "gated" (for what is narrow in places), "residual", "guided" (which sees the target's
            score), or "edm", a consistency function.
        size: of its network.
        objective: `FlowRegression` or `SelfConsistency`.
        incomplete: fresh unfinished trajectories by Euler's method, one interval per batch; otherwise finished ones by Heun's
            method, of which steps of all lengths are used.
        solver_steps: of a trajectory.
        levels: times of a trajectory that are kept, less one.
        grid: of the finished trajectories and of the sampler's steps, see `densities.grids`.
        direct: share of the items that go all the way from noise to data, where every pair is used.
        rows: trajectories that are computed at once.
        refresh: steps that they serve.
        warm: whether the network starts from the teacher's where names and shapes agree.
        apart: of neighbouring trajectories, see `Trajectories`.
        polish: optimiser steps on the exact weights of few steps that follow, see `_polish`; of maps that jump, in up to 64
            dimensions.
        counts: these few, by turns.
        wide: standard deviation of the noise that half of their draws start from; beyond 1 they meet weights that tower.
        balance: draws of a round of the balance that comes last, see `_balance`, fewer where d > 8; none at 0.
    """

    map: str = "scaled"
    size: MapConfig = field(default_factory=lambda: MapConfig(steep=True))
    objective: FlowRegression | SelfConsistency = field(default_factory=FlowRegression)
    incomplete: bool = False
    solver_steps: int = 64
    levels: int = 16
    grid: str = "angle"
    direct: float = 0.5
    rows: int = 65_536
    refresh: int = 20_000
    warm: bool = False
    apart: float = 0.02
    polish: int = 3000
    counts: tuple[int, ...] = (1, 2, 1, 4)
    wide: float = 1.0
    balance: int = 32_768

    reference: ClassVar[Reference] = Reference(
        "Consistent Diffusion Samplers: One-Step Samples of Unnormalised Densities",
        "Jutras-Dube, Pascal and Pynadath, Patrick and Zhang, Ruqi",
        2025,
        "arXiv",
        "2502.07579",
    )
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "paper": {
            "map": "edm",
            "size": MapConfig(64, 2, "gelu", 0.0),
            "objective": SelfConsistency(),
            "incomplete": True,
            "solver_steps": 128,
            "levels": 17,
            "warm": True,
            "polish": 0,
            "balance": 0,
        },
        "narrow": {
            "map": "gated",
            "size": MapConfig(),
            "grid": "angle_squared",
            "objective": FlowRegression(relative=1.0),
            "counts": (1, 4, 2, 4),
            "wide": 1.3,
        },
        "many": {"size": MapConfig(256, steep=True), "rows": 32_768, "polish": 0, "balance": 0},
        "averaged": {
            "objective": SelfConsistency(huber=0.01, decay=0.95),
            "direct": 0.0,
            "apart": 0.0,
            "polish": 0,
            "balance": 0,
        },
    }

    def __post_init__(self) -> None:
        if not self.counts or min(self.counts) < 1 or not self.wide >= 1:
            raise ValueError(f"needs counts of 1 and more and a wide of 1 or more, got {self.counts} and {self.wide}")
        if self.balance and self.balance < _FEWEST:
            raise ValueError(f"balance must be a number of draws from {_FEWEST} on, or 0 for none, got {self.balance}")

    def model(self, denoiser: Denoiser, whitened: Whitened) -> Followed:
        """Return what is trained, for a teacher as `ready` gives it; takes its initial weights from the global generator."""
        flow_map = MAPS[self.map](_schedule(denoiser), whitened, self.size)
        if self.warm:
            warm_start(cast(Perceptron, flow_map.net), denoiser)
        return Followed(flow_map)

    def data(self, denoiser: Denoiser, batch: int, seed: int) -> Batches:
        """Return the training pairs of a teacher as `ready` gives it."""
        if self.incomplete:
            return Incomplete(denoiser, self.solver_steps, self.levels + 1, batch, seed)
        every = self.solver_steps // self.levels
        times = times_of(self.grid, denoiser.schedule, every * self.levels)
        return Trajectories(
            denoiser, times, every, batch, self.rows, self.refresh, self.direct, seed=seed, apart=self.apart
        )

    def polished(self, sampler: MapSampler) -> Polish | None:
        """Return the loss of the last steps, or None: without `polish`, of a map that does not jump, and in high dimension."""
        suits = self.polish and _weighable(sampler)
        return Polish(sampler.whitened, sampler.grid, self.counts, self.wide, self.objective) if suits else None

    def balanced(self, sampler: MapSampler, seed: int) -> MapSampler:
        """Return the sampler with its modes' weights put right, where that is wanted and exact determinants are cheap."""
        if not self.balance or not _weighable(sampler):
            return sampler
        rows = round(self.balance * min(1.0, _CHEAPEST / sampler.target.dim))
        return balanced(sampler, self.counts, rows, seed)

    def sampler(self, whitened: Whitened, model: nn.Module) -> MapSampler:
        """Return the sampler with the weights of a trained `model`."""
        trained = cast(Followed, model).map
        return MapSampler(whitened, trained.eval().requires_grad_(False), grid=self.grid, renoise=not trained.jumps)


def ready(teacher: Denoiser) -> Denoiser:
    """Return a teacher under a schedule with a finite noise ratio at t = 1, which trajectories start from."""
    return teacher if isinstance(teacher.schedule, VariancePreserving) else Rescheduled(teacher, VariancePreserving())


def _weighable(sampler: MapSampler) -> bool:
    """Return whether training can afford the weights of its draws."""
    return not sampler.renoise and sampler.target.dim <= _WIDEST


def _schedule(denoiser: Denoiser) -> VariancePreserving:
    return cast(VariancePreserving, denoiser.schedule)
