r"""A target in coordinates where N(0, I) is a fair guess: x = b(shift + scale h(y)), with b the map onto the support.

h(y) = sinh(bend y) / bend per coordinate, y itself where bend = 0: it takes tails that are heavier than a normal law's to those of
one (the sinh of Jones and Pewsey 2009, Biometrika 96, 761), and with them widens the narrow parts of a target whose width varies by
orders of magnitude, as a funnel's does. rho_y(y) = rho(x) |dx/dy|, so log Z is unchanged. `whiten` finds shift and scale from short
Langevin chains.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from fewstep.core.density import Bounds, TargetDensity
from fewstep.core.noise import Noise, Streams
from fewstep.densities.bend import bend_of, bend_slopes, bent, straight
from fewstep.densities.support import GIVE_SUPPORT, box_slopes, from_box, to_box

_ROUNDS = 6  # of `whiten`, with a new scale after each


@dataclass(frozen=True, eq=False)
class Whitened(TargetDensity):
    """`target` in whitened coordinates y.

    Args:
        target: the density, in x.
        shift: (d,), where y = 0 lies, before the map onto the support; a number is repeated.
        scale: (d,) or a number, positive, or (d, d), lower triangular with a positive diagonal.
        bend: (d,) or a number, not negative.

    Raises:
        ValueError: a shift, scale or bend of another shape, or a scale that is not positive, or one of them is not finite.
    """

    target: TargetDensity
    shift: Tensor = field(default_factory=lambda: torch.zeros(()))
    scale: Tensor = field(default_factory=lambda: torch.ones(()))
    bend: Tensor = field(default_factory=lambda: torch.zeros(()))

    def __post_init__(self) -> None:
        d = self.target.dim
        for name in ("shift", "scale", "bend"):
            value = torch.as_tensor(getattr(self, name), dtype=torch.float64)
            object.__setattr__(self, name, value.expand(d) if value.ndim == 0 else value)
        if self.shift.shape != (d,) or self.scale.shape not in ((d,), (d, d)):
            raise ValueError(f"shift {tuple(self.shift.shape)} and scale {tuple(self.scale.shape)} do not fit d = {d}")
        if not bool(torch.isfinite(self.scale).all() and (self._widths > 0).all() and torch.isfinite(self.shift).all()):
            raise ValueError("scale must be finite with a positive diagonal, shift must be finite")
        if self.bend.shape != (d,) or not bool((torch.isfinite(self.bend) & (self.bend >= 0)).all()):
            raise ValueError(f"bend must be ({d},), finite and not negative")

    @property
    def dim(self) -> int:  # type: ignore[override]
        """See `TargetDensity`."""
        return self.target.dim

    @property
    def log_z(self) -> float | None:  # type: ignore[override]
        """See `TargetDensity`: that of the target."""
        return self.target.log_z

    @property
    def log_z_bounds(self) -> Bounds | None:  # type: ignore[override]
        """See `TargetDensity`: those of the target."""
        return self.target.log_z_bounds

    def to_x(self, y: Tensor) -> Tensor:
        """Return the target's coordinates, (N, d) -> (N, d)."""
        u = self._free(y)
        return u if self.target.support is None else to_box(u, self.target.support)

    def to_y(self, x: Tensor) -> Tensor:
        """Return the whitened coordinates, (N, d) -> (N, d); the inverse of `to_x`."""
        u = x if self.target.support is None else from_box(x, self.target.support)
        return straight(self._inverse(u), self.bend.to(u))

    def log_prob(self, x: Tensor) -> Tensor:
        """See `TargetDensity`; `x` are whitened coordinates, (N, d) -> (N,) float64: a constant of -1e7 leaves float32 no digits."""
        log = self.target.log_prob(self.to_x(x)).double() + float(self._widths.log().sum())
        if bool(self.bend.any()):
            log = log + bend_slopes(x, self.bend.to(x))[0].sum(1)
        return log if self.target.support is None else log + box_slopes(self._free(x), self.target.support)[0].sum(1)

    def score(self, x: Tensor) -> Tensor:
        """See `TargetDensity`; by the chain rule, so that the target's own score is used."""
        score = self.target.score(self.to_x(x))
        if self.target.support is not None:
            log_slope, curvature = box_slopes(self._free(x), self.target.support)
            score = score * log_slope.exp() + curvature
        scale = self.scale.to(x)
        score = score * scale if scale.ndim == 1 else score @ scale
        if bool(self.bend.any()):
            log_slope, curvature = bend_slopes(x, self.bend.to(x))
            score = score * log_slope.exp() + curvature
        return score

    def sample(self, noise: Noise) -> Tensor:
        """See `TargetDensity`: exact where the target's is."""
        return self.to_y(self.target.sample(noise))

    def refitted(self, y: Tensor, bend: bool = False) -> Whitened:
        """Return the target in coordinates in which draws y, (N, d), have mean 0, standard deviation 1 and, where that pays, no
        correlation; see `correlated`. With `bend` heavy tails are bent to those of N(0, 1), see `bend_of`, where there are any.

        Heavy tails have their median at 0: their mean is mostly chance, and far from 0 in units of what is narrow, such as the
        neck of a funnel, which a map would have to hit by a shift."""
        u = self._free(y).double()
        shift, scale, tails = bend_of(u)
        if bend and bool(tails.any()):
            return Whitened(self.target, shift, scale, tails)
        return Whitened(self.target, shift, _spread(u, correlated(u)))

    @property
    def _widths(self) -> Tensor:
        return self.scale if self.scale.ndim == 1 else self.scale.diagonal()

    def _free(self, y: Tensor) -> Tensor:
        """Return the target's coordinates before the map onto the support."""
        h, scale = bent(y, self.bend.to(y)), self.scale.to(y)
        return self.shift.to(y) + (h * scale if scale.ndim == 1 else h @ scale.T)

    def _inverse(self, u: Tensor) -> Tensor:
        centred, scale = u - self.shift.to(u), self.scale.to(u)
        return centred / scale if scale.ndim == 1 else torch.linalg.solve_triangular(scale, centred.T, upper=False).T


def whiten(
    target: TargetDensity, *, dense: bool = False, chains: int = 64, steps: int = 600, seed: int = 0
) -> Whitened:
    """Return `target` with the mean and spread that short Langevin chains see: no hand-tuned prior scale.

    Metropolis-adjusted Langevin chains (Roberts and Tweedie 1996) start at scales from 0.1 to 100, each adapts its step to an
    acceptance of 0.57, and after every sixth of the run the coordinates are rescaled by what was seen. Chains that end far below
    the others have not arrived and are left out. Of several modes, each chain sees one: the spread is that of the modes found,
    which is what a start has to cover, not their weights.

    Args:
        target: the density.
        dense: use the covariance, not only its diagonal.
        chains: how many; they cost 2 x `chains` x `steps` evaluations.
        steps: of each chain.
        seed: of starts and proposals; the same seed gives the same answer.

    Raises:
        ValueError: no chain found a finite log density.
    """
    noise, size = Streams(seed, range(chains)), torch.ones(chains, 1)
    found = Whitened(target)
    u = noise.randn(target.dim) * torch.logspace(-1, 2, chains)[:, None]  # before the map onto the support
    for _ in range(_ROUNDS):
        path, value, size = _langevin(found, found._inverse(u), size, steps // _ROUNDS, noise)
        finite = ~value.isneginf()
        if not bool(finite.any()):
            raise ValueError(
                f"log_prob is not finite anywhere where it was tried: shift it towards 0, or {GIVE_SUPPORT}"
            )
        # at least half, or a few chains in a narrow place would speak for all
        enough = torch.minimum(value.max() - 10 - 2 * target.dim, value[finite].median())
        arrived = (value >= enough) & finite
        seen = _trimmed(found._free(path[:, arrived]).flatten(0, 1))
        lost = torch.arange(chains) % int(arrived.sum())
        u = torch.where(finite[:, None], found._free(path[-1]), found._free(path[-1][arrived])[lost])
        found, old = Whitened(target, seen.mean(0), _spread(seen, dense)), found
        size = size * float((old._widths / found._widths).square().log().mean().exp())
    return found


def correlated(x: Tensor) -> bool:
    """Return whether a Gaussian that knows the correlations of draws x, (N, d), is nearer to them by more than a nat and noise.

    The gain is -log det R / 2 per draw. Without any correlation N independent draws show d (d - 1) / 4 N; draws that hang together
    or have heavy tails show more, so that ten times as much is asked for. Coordinates of laws without correlation stay as they
    are: a product of double wells is one no longer once it is turned.
    """
    n, d = x.shape
    if d < 2 or n < 10 * d:
        return False
    gain = -0.5 * float(torch.linalg.slogdet(torch.corrcoef(x.double().T))[1])
    return gain > 1 + 10 * d * (d - 1) / (4 * n)


def _spread(x: Tensor, dense: bool) -> Tensor:
    """Return the standard deviations of x, (N, d), or the Cholesky factor of its covariance, never singular."""
    width = x.double().std(0).clamp_min(1e-6)
    if not dense:
        return width
    return torch.linalg.cholesky(torch.cov(x.double().T).reshape(len(width), -1) + 1e-6 * torch.diag(width.square()))


def _langevin(
    target: TargetDensity, x: Tensor, size: Tensor, steps: int, noise: Noise
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the later half of the chains, (steps / 2, N, d), their mean log density there, (N,), and their step sizes."""
    (value, score), path, values = _evaluated(target, x), [], []
    for k in range(steps):
        z = noise.randn_like(x)
        trial = x + size / 2 * score + size.sqrt() * z
        new, slope = _evaluated(target, trial)
        back = z + size.sqrt() / 2 * (score + slope)  # minus the noise that leads back
        log = new - value + (z.square() - back.square()).sum(1) / 2
        accept = (noise.rand(1)[:, 0].log() < log) | (value.isneginf() & new.isfinite())
        x, score = torch.where(accept[:, None], trial, x), torch.where(accept[:, None], slope, score)
        value = torch.where(accept, new, value)
        rate = torch.where(accept[:, None], 1 - 0.57, -0.57)
        size = size * torch.exp((1.0 if k < steps // 2 else 0.2) * rate)
        if k >= steps // 2:
            path.append(x)
            values.append(value)
    return torch.stack(path), torch.stack(values).mean(0), size


def _evaluated(target: TargetDensity, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return log rho and its score; NaN and +inf count as density zero, such a score as zero."""
    value = target.log_prob(x)
    return value.masked_fill(~(value < torch.inf), -torch.inf), target.score(x).nan_to_num(0.0, 0.0, 0.0)


def _trimmed(x: Tensor) -> Tensor:
    """Clip every coordinate to its central 98 per cent, so that heavy tails have a spread."""
    ranks = x.sort(0)[0]
    return torch.minimum(torch.maximum(x, ranks[len(x) // 100]), ranks[-len(x) // 100])
