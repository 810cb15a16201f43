r"""The last steps of a student: the relative entropy of what its map draws to the target, with exact determinants.

    KL(G # N(0, I) || rho / Z) = log Z - E log w,    log w = log rho(y) + log|det DG(z)| - log N(z; 0, I),

for an injective map. A map that folds could lower it without end, so that a fold must cost more than it gains: with the columns
of DG scaled to length one, its determinant in [-1, 1] says how far the map is from folding. Draws at which it is negative say
nothing about weights and are fined. Few draws lie between modes with weights of almost nothing; far below the median log w counts
by its root only, so that they pull without drowning the others.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.func import jvp, vmap

from fewstep.core.density import TargetDensity
from fewstep.core.grid import times_of
from fewstep.core.noise import Noise
from fewstep.core.objective import Objective
from fewstep.densities.estimators.gaussian import log_normal
from fewstep.densities.students._maps import FlowMap, Followed
from fewstep.densities.students._sampler import MapSampler
from fewstep.training import Batches

_FLAT = 0.02  # det of scaled columns that is far from folding


@dataclass(frozen=True)
class Polish(Objective):
    """-E log w of jumps along a grid, one of `counts` steps for a whole batch by turns.

    Attributes:
        target: the density in whitened coordinates.
        grid: of the times, as the sampler has it.
        counts: numbers of steps.
        regression: a loss on the batch's pairs that holds the map where it is: relative entropy alone moves mass from mode to mode.
        anchor: its weight.
    """

    target: TargetDensity
    grid: str | tuple[float, ...] = MapSampler.grid
    counts: tuple[int, ...] = (1, 2, 1, 4)
    regression: Objective | None = None
    anchor: float = 30.0

    def players(self, model: nn.Module) -> dict[str, Iterable[nn.Parameter]]:
        """See `Objective`."""
        return {"model": list(cast(Followed, model).map.parameters())}

    def loss(self, player: str, model: nn.Module, batch: Any, noise: Noise) -> tuple[Tensor, dict[str, float]]:
        """See `Objective`; `batch` is one of `InTurn`."""
        value, figures = self._on_weights(cast(Followed, model).map, self.counts[batch["turn"]], noise)
        if self.regression is not None:
            held, more = self.regression.loss(player, model, batch, noise)
            value, figures = value + self.anchor * held, {**figures, **more}
        return value, figures

    def _on_weights(self, flow_map: FlowMap, count: int, noise: Noise) -> tuple[Tensor, dict[str, float]]:
        z = y = noise.randn(flow_map.dim)
        times = times_of(self.grid, flow_map.schedule, count).to(z)
        log_w, fine = -log_normal(z), torch.zeros(len(z)).to(z)
        for t, s in itertools.pairwise(times):
            y, log_det, flat = unfolding(partial(flow_map, t=t, s=s), y)
            log_w, fine = log_w + log_det, fine + flat
        log_w = log_w + self._log_rho(y)
        known = torch.where(fine > 0, torch.nan, log_w.detach())
        excess = (log_w - known.nanmedian()).nan_to_num(-1e6, 1e6, -1e6)
        figures = {"elbo": float(known.nanmean()), "folds": float((fine > 0).double().mean())}
        return torch.where(fine > 0, fine, -saturating(excess)).mean(), figures

    def _log_rho(self, y: Tensor) -> Tensor:
        """Return log rho(y), (N,), whose gradient is the target's own score, and zero where that is not finite."""
        with torch.no_grad():
            value, score = self.target.log_prob(y), self.target.score(y).nan_to_num(0.0, 0.0, 0.0)
        return value + ((y - y.detach()) * score).sum(1)


@dataclass(frozen=True)
class InTurn:
    """Batches of pairs, with one of the numbers 0, ..., `turns` - 1 for the whole batch."""

    data: Batches
    turns: int

    def count(self, step: int) -> int:
        """See `Batches`."""
        return self.data.count(step)

    def batch(self, step: int, items: Iterable[int]) -> dict[str, Any]:
        """See `Batches`."""
        return {**self.data.batch(step, items), "turn": step % self.turns}


def unfolding(function: Callable[[Tensor], Tensor], z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return f(z), (N, d), log det Df(z), (N,), and the fine where that is negative, (N,), zero elsewhere; differentiable."""
    basis = torch.eye(z.shape[1], dtype=z.dtype, device=z.device)
    y, columns = vmap(lambda direction: jvp(function, (z,), (direction.expand_as(z),))[:2])(basis)
    lengths = columns.norm(dim=2).clamp_min(1e-12)
    det = torch.linalg.det((columns / lengths[..., None]).permute(1, 2, 0))
    fine = torch.where(det > 0, 0.0, 1 - det / _FLAT)
    return y[0], det.clamp_min(1e-4).log() + lengths.log().sum(0), fine


def saturating(u: Tensor, knee: float = 5.0) -> Tensor:
    """Return u, and below -knee what continues it as the root of the distance."""
    return u.clamp_min(-knee) - 2 * (((-knee - u).clamp_min(0) + 1).sqrt() - 1)
