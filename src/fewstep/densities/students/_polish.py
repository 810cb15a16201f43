r"""The last steps of a student: relative entropy between what its map draws and the target, both ways, with exact determinants.

For an injective map q = G # N(0, I) has log w = log rho(y) + log|det DG(z)| - log N(z; 0, I), and with u = log w - log Z

    KL(q || p) + KL(p || q) = E_z[u (exp(u) - 1)].

The first term alone forgives a map that is thin at the edges of a mode, where weights then have no variance; the second sees it.
Together they and their gradient vanish draw by draw where weights are equal: no noise moves mass from mode to mode. log Z is
taken from the batch.

A map that folds could lower a relative entropy without end, so that a fold must cost more than it gains: with the columns of DG
scaled to length one, its determinant in [-1, 1] says how far the map is from folding. Draws at which it is negative say nothing
about weights and are fined. Few weights tower over all: far above log Z u counts by itself only. Far below it u counts by its
logarithm: draws between modes, and in a neck that the map has too wide still, have weights of almost nothing, and would be driven
out of the neck before it is narrowed; nothing then says that it was ever there.

Because the loss vanishes draw by draw, z may come from anywhere: half of the draws can be taken from further out (`wide`), where
weights that tower are met more often.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.func import jvp, vmap

from fewstep.core.density import TargetDensity, by_score
from fewstep.core.noise import Noise
from fewstep.core.objective import Objective
from fewstep.densities.estimators.gaussian import log_normal
from fewstep.densities.grids import times_of
from fewstep.densities.students._maps import FlowMap, Followed
from fewstep.densities.students._sampler import MapSampler
from fewstep.training import Batches

_FLAT = 0.02  # det of scaled columns that is far from folding


@dataclass(frozen=True)
class Polish(Objective):
    """Relative entropy of jumps along a grid, one of `counts` steps for a whole batch by turns.

    Attributes:
        target: the density in whitened coordinates.
        grid: of the times, as the sampler has it.
        counts: numbers of steps.
        wide: standard deviation of the noise that half of the draws start from; log Z is that of the others.
        regression: a loss on the batch's pairs that keeps the map near the flow where no draw looks.
        anchor: its weight.
    """

    target: TargetDensity
    grid: str | tuple[float, ...] = MapSampler.grid
    counts: tuple[int, ...] = (1, 2, 1, 4)
    wide: float = 1.0
    regression: Objective | None = None
    anchor: float = 5.0

    def loss(self, player: str, model: nn.Module, batch: Any, noise: Noise) -> tuple[Tensor, dict[str, float]]:
        """See `Objective`; `batch` is one of `InTurn`."""
        value, figures = self._on_weights(cast(Followed, model).map, self.counts[batch["turn"]], noise)
        if self.regression is not None:
            held, more = self.regression.loss(player, model, batch, noise)
            value, figures = value + self.anchor * held, {**figures, **more}
        return value, figures

    def _on_weights(self, flow_map: FlowMap, count: int, noise: Noise) -> tuple[Tensor, dict[str, float]]:
        z = noise.randn(flow_map.dim)
        near = len(z) if self.wide == 1.0 else len(z) // 2
        z = y = torch.cat([z[:near], self.wide * z[near:]])
        times = times_of(self.grid, flow_map.schedule, count).to(z)
        log_w, fine = -log_normal(z), torch.zeros(len(z)).to(z)
        for t, s in itertools.pairwise(times):
            y, log_det, flat = unfolding(partial(flow_map, t=t, s=s), y)
            log_w, fine = log_w + log_det, fine + flat
        log_w = log_w + by_score(self.target, y)
        known = torch.where(fine > 0, torch.nan, log_w.detach())
        top = known[:near].nanquantile(0.995)
        log_z = top + (known[:near] - top).clamp_max(0).exp().nanmean().log()
        u = (log_w - log_z).nan_to_num(-1e6, 1e6, -1e6)
        figures = {"elbo": float(known[:near].nanmean()), "folds": float((fine > 0).double().mean())}
        return torch.where(fine > 0, fine, both_ways(u)).mean(), figures


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


def both_ways(u: Tensor, knee: float = 3.0) -> Tensor:
    """Return u (exp(u) - 1), above `knee` its tangent, and below -1 what grows as a logarithm only."""
    c = u.clamp_max(knee)
    return saturating(c) * torch.expm1(c) + (math.expm1(knee) + knee * math.exp(knee)) * (u - c)


def saturating(u: Tensor, knee: float = 1.0) -> Tensor:
    """Return u, and below -knee what continues it as the logarithm of the distance."""
    return u.clamp_min(-knee) - (-knee - u).clamp_min(0).log1p()
