r"""What SCDS and OSDS share: a map of step t to s that is trained on a density alone and agrees with itself over step sizes.

Two players with the same parameters take turns in every iteration. *sampling* fits the map's shortest steps as the control of a
diffusion, by a loss on path weights. *consistency* asks one step from t to s to equal two steps over the halves,

    E |G(y_t, t, s) - G'(G'(y_t, t, m), m, s)|^2 / d,

at points of the paths that sampling has just drawn, for steps of 2, 4, ..., N of the N shortest. G' is a copy held fixed.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, cast, final

import torch
from torch import Tensor, nn

from fewstep.core.density import TargetDensity
from fewstep.core.noise import Noise
from fewstep.core.objective import Objective
from fewstep.densities.losses._path import LOWEST
from fewstep.densities.networks import Control, Moments
from fewstep.densities.paths import Kernels
from fewstep.densities.students._maps import GuidedMap
from fewstep.densities.students.cdds import Followed


class Shortest(Control):
    """The shortest steps of a map as a control; `times` are those of the paths, falling, (N + 1,)."""

    def __init__(self, flow_map: GuidedMap, times: Tensor) -> None:
        super().__init__()
        self.map, self.schedule, self.event_shape, self.times = flow_map, flow_map.schedule, (flow_map.dim,), times

    def guide(self, y: Tensor) -> Tensor:
        """See `Control`."""
        return self.map.guide(y)

    def moments(self, y: Tensor, t: Tensor, guide: Tensor | None) -> Moments:
        """See `Control`."""
        assert guide is not None
        times = self.times.to(t)
        after = times[(torch.searchsorted(-times, -t.contiguous()) + 1).clamp_max(len(times) - 1)]
        return Moments(self.map.drift(y, t, after, guide), torch.ones_like(y))


class Learner(Followed):
    """What is trained: the map, the copy that follows it, the points of the last paths, and the number of steps done."""

    turn: Tensor

    def __init__(self, flow_map: GuidedMap) -> None:
        super().__init__(flow_map)
        self.points: Tensor | None = None
        self.register_buffer("turn", torch.zeros((), dtype=torch.int64))


@dataclass(frozen=True)
class SelfDistillation(Objective):
    """Sampling and consistency in turns.

    Attributes:
        target: the density in whitened coordinates.
        kernels: the shortest steps, a power of two of them, evenly spaced in t.
    """

    target: TargetDensity
    kernels: Kernels

    @abstractmethod
    def sampling(self, control: Shortest, noise: Noise) -> tuple[Tensor, Tensor]:
        """Return log-weights, (n,) float64, that carry the gradient, and all points of their paths, (N + 1, n, d)."""

    @abstractmethod
    def value(self, log_w: Tensor) -> Tensor:
        """Return the loss of finite log-weights, ()."""

    @abstractmethod
    def consistency(self, learner: Learner, y: Tensor, times: tuple[Tensor, Tensor, Tensor], noise: Noise) -> Tensor:
        """Return the loss, (), at y, (n, d), for steps over t, the half way and s, each (n,)."""

    @final
    def players(self, model: nn.Module) -> dict[str, Iterable[nn.Parameter]]:
        """See `Objective`; both own the map, and so share an optimiser."""
        params = list(cast(Learner, model).map.parameters())
        return {"sampling": params, "consistency": params}

    @final
    def loss(self, player: str, model: nn.Module, batch: Any, noise: Noise) -> tuple[Tensor, dict[str, float]]:
        """See `Objective`; a consistency turn uses the paths of the sampling turn before it."""
        learner = cast(Learner, model)
        return self._sampling(learner, noise) if player == "sampling" else self._consistency(learner, noise)

    def _sampling(self, learner: Learner, noise: Noise) -> tuple[Tensor, dict[str, float]]:
        control = Shortest(cast(GuidedMap, learner.map), self.kernels.times.float())
        log_w, points = self.sampling(control, noise)
        learner.points = points.detach()
        good = log_w.detach().isfinite() & (log_w.detach() > LOWEST)
        if int(good.sum()) < 2:
            raise FloatingPointError("the target is not finite on (almost) all paths; check it, or its scale")
        figures = {"elbo": float(log_w[good].detach().mean()), "usable": float(good.double().mean())}
        return self.value(log_w[good]) / control.event_shape[0], figures

    def _consistency(self, learner: Learner, noise: Noise) -> tuple[Tensor, dict[str, float]]:
        assert learner.points is not None
        learner.turn += 1
        count, (size, place) = len(self.kernels), noise.rand(2).T
        stride = 2 ** (1 + (size * math.log2(count)).long().clamp_max(int(math.log2(count)) - 1))
        start = (place * (count // stride)).long() * stride  # so that steps line up with those of sampling
        y = learner.points[start, torch.arange(len(start))]
        grid = self.kernels.times.float().to(y)
        usable = y.isfinite().all(1)
        times = (grid[start], grid[start + stride // 2], grid[start + stride])
        loss = self.consistency(learner, y[usable], (times[0][usable], times[1][usable], times[2][usable]), noise)
        return loss, {}
