r"""A last move of the noise that a map f starts from, so that its draws have the weights of modes that their own weights ask for.

Training leaves errors there: a map moves mass from mode to mode only through what it draws between them, which is next to
nothing. The weights w of its draws know better: means of functions h of the draws must be those of the weighted draws. With
g(z) = z + grad psi(z), and L psi = Laplace psi - z . grad psi, integration by parts gives

    E[h(f(g(z)))] - E[h(f(z))] = -E[h(f(z)) L psi(z)]    to first order, for z ~ N(0, I),

without a derivative of f or h. Here psi(z) = sum_k c_k cos(s_k . z + b_k) is smooth, and c is chosen by ridge regression so that
many cosines h, of all directions and of waves from the width of the target to that of its modes, get the means they should have.
Few rounds do. g moves no point further than a fixed length, and its determinant is exact: the weights are as valid as before.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fewstep.core.noise import Streams, mix
from fewstep.densities.draws import Draws
from fewstep.densities.students._sampler import MapSampler
from fewstep.densities.students._warp import Warp

_SHARES = (1.0, 1.0, 0.5)  # of the step, by rounds: the last ones average the noise of their draws
_TESTS = 512  # functions h
_WAVES = (0.5, 8.0)  # how fast the slowest and the fastest of them turn in whitened coordinates
_RIDGE = 0.01
_HEAVIEST = 10.0  # weights beyond it times their mean count as that: few draws should not decide
_KEPT = 0.9  # of the ESS: less is too much for it
_CHUNK = 8192


@dataclass(frozen=True)
class Cosines:
    """Cosines h of y, the slow ones larger, (N, d) -> (N, count); distances between laws weigh them so.

    Attributes:
        slopes: (count, d).
        phases: (count,).
    """

    slopes: Tensor
    phases: Tensor

    @classmethod
    def drawn(cls, dim: int, generator: torch.Generator) -> Cosines:
        """Return those of random directions."""
        directions = nn.functional.normalize(torch.randn(_TESTS, dim, generator=generator), dim=1)
        waves = torch.logspace(math.log10(_WAVES[0]), math.log10(_WAVES[1]), _TESTS)
        return cls(waves[:, None] * directions, 2 * math.pi * torch.rand(_TESTS, generator=generator))

    def __call__(self, y: Tensor) -> Tensor:
        """Return h(y)."""
        return torch.cos(y @ self.slopes.T + self.phases) / self.slopes.norm(dim=1)


class Means(NamedTuple):
    """What n draws say: the gap E[h w] - E[h], (count,), and the response to c, -E[h L cos_k], (count, features).

    With them come the ESS of w, of which none towers (a single weight of a set would decide), and the draws.
    """

    gap: Tensor
    response: Tensor
    ess: float
    draws: Draws


def balanced(sampler: MapSampler, counts: tuple[int, ...], rows: int, seed: int = 0) -> MapSampler:
    """Return `sampler` with a warp for each number of steps where that brings means of its draws nearer to the weighted ones.

    Args:
        sampler: of jumps, in few dimensions: weights cost a determinant.
        counts: numbers of steps.
        rows: draws in each of the rounds.
        seed: of draws, warps and test functions.
    """
    for count in sorted(set(counts)):
        warped = _warped(sampler, count, rows, seed)
        sampler = sampler if warped is None else replace(sampler, warps={**sampler.warps, count: warped})
    return sampler


def _warped(sampler: MapSampler, count: int, rows: int, seed: int) -> Warp | None:
    """Return the warp for `count` steps; None where fresh draws say that it is no better, or that it costs weights."""
    generator = torch.Generator().manual_seed(mix(seed, 1))
    warp, tests = Warp.drawn(sampler.target.dim, generator), Cosines.drawn(sampler.target.dim, generator)
    trial = replace(sampler, warps={**sampler.warps, count: warp})
    for turn, share in enumerate(_SHARES):
        found = _means(trial, count, tests, rows, mix(seed, 2, turn))
        if not turn:
            before = found
        warp.heights += share * _ridge(found)
    after = _means(trial, count, tests, rows, mix(seed, 3))
    nearer = float(after.gap.norm()) < float(before.gap.norm())
    kept = after.ess >= _KEPT * before.ess and not lost(before.draws, after.draws)
    return warp if nearer and kept else None


def lost(before: Draws, after: Draws) -> bool:
    """Return whether log Z of `after` lies clearly below that of `before`, as where a map no longer reaches a part of the target."""
    return after.log_z_interval(0.999)[1] < before.log_z_interval(0.999)[0]


@torch.no_grad()
def _means(sampler: MapSampler, count: int, tests: Cosines, rows: int, seed: int) -> Means:
    """Return what `rows` draws in `count` steps say, to which L belongs in the noise before the warp."""
    warp, dim, starts, ends, logs = sampler.warps[count], sampler.target.dim, [], [], []
    for first in range(0, rows, _CHUNK):
        noise = Streams(seed, range(first, min(first + _CHUNK, rows)))
        z = noise.randn(dim)
        found = sampler.walked(z, count, noise, True)
        starts.append(z)
        ends.append(found.y)
        logs.append(torch.stack([found.log_weights, found.signs]))
    log_w, signs = torch.cat(logs, 1)
    w = _relative(log_w, signs)
    gap = torch.zeros(_TESTS, dtype=torch.float64)
    response = torch.zeros(_TESTS, len(warp.heights), dtype=torch.float64)
    for z, y, part in zip(starts, ends, w.split(_CHUNK), strict=True):
        h = tests(y.nan_to_num(0.0, 0.0, 0.0))
        h = h - h.mean(0)
        gap += (part - 1) @ h.double()
        response -= (h.T @ warp.generated(z)).double()
    negative = signs if bool((signs < 0).any()) else None
    draws = Draws(torch.cat(ends), log_w, sampler.kind, signs=negative)
    return Means(gap / rows, response / rows, 1 / float(w.square().mean()), draws)


def _relative(log_weights: Tensor, signs: Tensor) -> Tensor:
    """Return weights of mean 1, (N,); zero where they are not finite, and no larger than `_HEAVIEST` before that."""
    size = (log_weights.nan_to_num(-math.inf, -math.inf, -math.inf) - log_weights.nan_to_num(-1e9).max()).exp()
    w = (signs * size / size.mean()).clamp(-_HEAVIEST, _HEAVIEST)
    return (w / w.mean()).nan_to_num(1.0)


def _ridge(found: Means) -> Tensor:
    """Return c with response @ c ~ gap, (features,) float32."""
    features = found.response.shape[1]
    matrix = torch.cat([found.response, math.sqrt(_RIDGE) * torch.eye(features, dtype=torch.float64)])
    gap = torch.cat([found.gap, found.gap.new_zeros(features)])
    return torch.linalg.lstsq(matrix, gap[:, None]).solution[:, 0].float()
