r"""Whether a density has a normaliser at all: tails that do not fall.

Two conditions that no proper density meets, each with positive measure, judged from how log rho changes over decades of r:

    tube: on a parallel bundle around a ray, log rho does not fall faster than -log r, so the integral along it diverges,
    cone: in one of twenty random directions or more, log rho does not fall faster than -d log r.

Bundles lie around the axes, around the flattest directions of the Hessian at the highest point found, and around the way in
which an ascent escapes. This finds flat directions and separable logistic regressions; it proves nothing where it finds none.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fewstep.core.density import TargetDensity
from fewstep.core.noise import Streams
from fewstep.densities.support import GIVE_SUPPORT
from fewstep.densities.whitened import Whitened

# in units of the start, N(0, I); a law that is wider still is not told from a flat one
_RADII = torch.logspace(2, 9, 9, dtype=torch.float64)
_TUBE = 8  # rays per bundle
_GONE = 1e12  # nats; exp(-r) itself has fallen by 1e9 at the last radius


class Improper(ValueError):
    """A density whose integral diverges: no log Z and no samples exist."""


def check_proper(target: TargetDensity, seed: int = 0) -> None:
    """Refuse a density whose tails show that it has no normaliser.

    Args:
        target: the density; bounded coordinates are mapped to R first.
        seed: of the points and directions that are tried.

    Raises:
        Improper: log rho does not fall in a tube or a cone.
    """
    free = Whitened(target)
    d = target.dim
    x = ascend(free, Streams(seed, range(32), torch.float64).randn(d))
    start = x[free.log_prob(x).argmax()]
    random = torch.nn.functional.normalize(Streams(seed + 1, range(64), torch.float64).randn(d), dim=1)
    if float((falls(free, start, random) > -d).double().mean()) > 0.05:
        raise Improper(
            f"log_prob falls no faster than -{d} log |x|: its integral diverges; add a prior or {GIVE_SUPPORT}"
        )
    ways = candidates(free, start)
    for way in ways:
        offsets = 0.1 * Streams(seed + 2, range(_TUBE), torch.float64).randn(d)
        if bool((falls(free, start + offsets, way.expand(_TUBE, d)) > -1).all()):
            axis = int(way.abs().argmax())
            raise Improper(
                f"log_prob does not fall along a direction (mostly coordinate {axis}, {float(way[axis]):+.2f}): "
                f"its integral diverges; add a prior or {GIVE_SUPPORT}"
            )


def falls(target: TargetDensity, start: Tensor, ways: Tensor) -> Tensor:
    """Return the largest slope of log rho(start + r way) in log r over the last decades, (N,) for ways (N, d)."""
    points = start + _RADII[:, None, None] * ways
    value = target.log_prob(points.flatten(0, 1)).reshape(len(_RADII), -1)
    value = value.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
    half = len(_RADII) // 2
    slope = (value[-1] - value[half]) / (_RADII[-1] / _RADII[half]).log()
    # where x can fall no further, exp(-1 / x) is so low that rounding swallows the slope
    gone = value[-1] < target.log_prob(start.reshape(-1, target.dim)) - _GONE
    return torch.where(gone | value[-1].isneginf(), -torch.inf, slope.nan_to_num(nan=-torch.inf))


def ascend(target: TargetDensity, x: Tensor) -> Tensor:
    """Return higher points from `x`, (N, d), by gradient steps of a length that each item adapts; far on a slope that never ends."""
    size = torch.ones(len(x), 1, dtype=x.dtype)
    value = target.log_prob(x)
    for _ in range(100):
        score = target.score(x)
        trial = x + size * score / (1 + score.norm(dim=1, keepdim=True))
        new = target.log_prob(trial)
        better = (new > value) | (value.isneginf() & new.isfinite())
        x, value = torch.where(better[:, None], trial, x), torch.where(better, new, value)
        size = torch.where(better[:, None], size * 1.5, size / 3)
    return x


def climb(target: TargetDensity, x: Tensor) -> Tensor:
    """Return a higher point from `x`, (d,), by Newton steps with absolute curvatures: out along a slope that levels off."""
    value = target.log_prob(x[None])[0]
    for _ in range(40):
        curvatures, ways = hessian(target, x)
        damped = curvatures.abs().clamp_min(1e-8 * curvatures.abs().max() + 1e-12)
        move = ways @ ((target.score(x[None])[0] @ ways) / damped)
        trials = x + 2.0 ** -torch.arange(20.0, dtype=x.dtype)[:, None] * move
        values = target.log_prob(trials).nan_to_num(nan=-torch.inf)
        best = int(values.argmax())
        if not bool(values[best] > value):
            break
        x, value = trials[best], values[best]
    return x


def hessian(target: TargetDensity, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the eigenvalues, (d,), rising, and eigenvectors of the Hessian of log rho at `x`, (d,), by differences of the score."""
    step = 1e-4 * (1 + x.abs().max())
    eye = torch.eye(len(x), dtype=x.dtype)
    matrix = (target.score(x + step * eye) - target.score(x - step * eye)) / (2 * step)
    values, vectors = torch.linalg.eigh((matrix + matrix.T).nan_to_num() / 2)
    return values, vectors


def candidates(target: TargetDensity, start: Tensor) -> Tensor:
    """Return directions in which a density may be flat, (M, d)."""
    d = len(start)
    axes = torch.eye(d, dtype=start.dtype)[torch.linspace(0, d - 1, min(d, 64)).long()]
    ways = [axes, -axes]
    if d <= 256:  # beyond, a Hessian costs too much
        flat = hessian(target, start)[1][:, -min(d, 8) :].T
        ways += [flat, -flat]
        start = climb(target, start)
    if bool(start.norm() > 0):
        ways.append(start[None] / start.norm())
    return torch.cat(ways)
