"""Draws against the density that they are meant for: every number of `fewstep density diagnose`.

Each is read against what exact draws would give: distances beside their value between two sets of exact draws, expectations in
standard errors.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fewstep.core.density import TargetDensity
from fewstep.core.noise import Streams, mix
from fewstep.densities.draws import Draws
from fewstep.densities.estimators.psis import limit
from fewstep.densities.estimators.weights import expectation
from fewstep.densities.whitened import Whitened
from fewstep.metrics import (
    Missing,
    energy_distance,
    mmd,
    noise_floor,
    sliced_wasserstein,
    stein_discrepancy,
    wasserstein,
)

DISTANCES: dict[str, Callable[[Tensor, Tensor], float]] = {
    "energy distance": lambda a, b: energy_distance(a, b)[0],
    "squared MMD": lambda a, b: mmd(a, b)[0],
    "sliced Wasserstein-2": sliced_wasserstein,
    "Wasserstein-1": lambda a, b: wasserstein(a, b, p=1),
}
ROWS = 1000  # draws that distances are computed from: their cost grows with the square and more
_MISSED = 0.2  # a mode with less than this share of its weight counts as missed


class Distance(NamedTuple):
    """A distance to exact draws: of the draws as they are, of those that weights pick, or None, and of exact ones."""

    drawn: float
    weighted: float | None
    floor: float
    spread: float


class Known(NamedTuple):
    """An expectation that is known, (k,), with its estimate and error from the draws as they are, and by weights."""

    exact: Tensor
    drawn: tuple[Tensor, Tensor]
    weighted: tuple[Tensor, Tensor] | None


@dataclass(frozen=True, eq=False)
class Diagnosis:
    """What was found.

    Attributes:
        target: the density.
        draws: the draws.
        summary: see `summary`.
        known: expectations that are known exactly, "mode_weights" among them where the target knows its modes.
        distances: to exact draws, where the target has a sampler.
        stein: squared kernel Stein discrepancy and its standard error, where it has none.
        exact: exact draws, (N, d), or None.
        missing: what could not be computed, and why.
    """

    target: TargetDensity
    draws: Draws
    summary: dict[str, Any]
    known: dict[str, Known]
    distances: dict[str, Distance]
    stein: tuple[float, float] | None
    exact: Tensor | None
    missing: dict[str, str] = field(default_factory=dict)

    def record(self) -> dict[str, Any]:
        """Return everything but the draws, as JSON takes it."""
        return {
            **self.summary,
            "log_z_true": self.target.log_z,
            "log_z_bounds": self.target.log_z_bounds and self.target.log_z_bounds._asdict(),
            "expectations": {name: _listed(value) for name, value in self.known.items()},
            "distances": {name: value._asdict() for name, value in self.distances.items()},
            "squared_stein_discrepancy": self.stein and {"value": self.stein[0], "error": self.stein[1]},
            "missing": self.missing,
            "warnings": self.warnings(),
        }

    def warnings(self) -> list[str]:
        """Return what a reader must not miss, a sentence each."""
        found, n = [], len(self.draws)
        if (khat := self.summary.get("khat")) is not None and khat > limit(n):
            found.append(
                f"k-hat is {khat:.2f}, above {limit(n):.2f}: the largest weights decide; "
                "do not trust what they say, nor ESS and log Z"
            )
        if self.draws.nonfinite:
            found.append(f"{self.draws.nonfinite} of {n} draws are not finite, or have a weight that is none")
        if self.draws.folds:
            found.append(
                f"the map folds at {self.draws.folds} of {n} draws: their weights are negative, which keeps log Z and expectations "
                "right, but they cannot be picked, so that what is picked by weight is not quite the target"
            )
        if self.draws.kind == "invalid":
            found.append("the weights are of the kind 'invalid': they say nothing about the density")
        if (ends := self.summary.get("log_z_interval")) and (truth := _known_log_z(self.target)):
            if ends[1] < truth[0] or truth[1] < ends[0]:
                found.append(
                    f"the interval of log Z, {ends[0]:.6g} to {ends[1]:.6g}, misses what is known, "
                    f"{truth[0]:.6g} to {truth[1]:.6g}"
                )
        if lost := missed_modes(self.known):
            found.append(f"modes that are (almost) missed: {', '.join(map(str, lost))}")
        if self.exact is None:
            found.append("no exact draws exist: the Stein discrepancy is nearly blind to how much weight each mode has")
        return found


def diagnose(draws: Draws, target: TargetDensity, *, rows: int = ROWS, level: float = 0.95) -> Diagnosis:
    """Compare draws with the density that they are meant for.

    Args:
        draws: at least ten of them finite; weighted or not.
        target: the density, in the same coordinates.
        rows: the most draws that distances are computed from.
        level: probability of the interval of log Z.

    Raises:
        ValueError: another number of dimensions, too few finite draws or rows, or a level outside (0, 1).
    """
    if rows < 2:
        raise ValueError(f"distances need at least 2 rows, got {rows}")
    x = draws.x[draws.x.isfinite().all(1)]
    if draws.x.shape[1] != target.dim:
        raise ValueError(f"the draws have {draws.x.shape[1]} dimensions, the density has {target.dim}")
    if len(x) < 10:
        raise ValueError(f"at least 10 finite draws are needed, got {len(x)} of {len(draws)}")
    rows = min(rows, len(x))
    some = spread(x, rows)
    exact = exact_draws(target, len(x), mix(draws.seed, 1))
    missing: dict[str, str] = {}
    return Diagnosis(
        target,
        draws,
        summary(draws, level),
        known_expectations(draws, target),
        {} if exact is None else _distances(draws, some, exact[:rows], target, missing),
        _stein(some, target) if exact is None else None,
        exact,
        missing,
    )


def spread(x: Tensor, rows: int) -> Tensor:
    """Return at most so many rows of x, (n, d), evenly from all of them: chains lie one after the other."""
    return x[torch.linspace(0, len(x) - 1, min(rows, len(x))).round().long()]


def summary(draws: Draws, level: float = 0.95) -> dict[str, Any]:
    """Return the costs and what the weights say, as JSON takes it; what their kind does not allow is left out.

    Raises:
        ValueError: `level` outside (0, 1).
    """
    if not 0 < level < 1:
        raise ValueError(f"level must lie in (0, 1), got {level}")
    found: dict[str, Any] = {
        "draws": len(draws),
        "kind": draws.kind,
        "nonfinite": draws.nonfinite,
        "folds": draws.folds,
        "nfe": draws.nfe,
        "target_calls": draws.target_calls,
        "gradient_calls": draws.gradient_calls,
        "seconds": draws.seconds,
        "seed": draws.seed,
        "level": level,
    }
    asked: dict[str, Callable[[], Any]] = {
        "ess": lambda: draws.ess,
        "khat": lambda: draws.khat,
        "log_z": lambda: draws.log_z,
        "log_z_interval": lambda: list(draws.log_z_interval(level)),
        "elbo": lambda: draws.elbo,
    }
    for name, ask in asked.items():
        with suppress(ValueError):
            found[name] = ask()
    return found


def exact_draws(target: TargetDensity, count: int, seed: int) -> Tensor | None:
    """Return exact draws, (count, d), or None where no sampler is known."""
    try:
        return target.sample(Streams(seed, range(count)))
    except NotImplementedError:
        return None


def known_expectations(draws: Draws, target: TargetDensity) -> dict[str, Known]:
    """Return mean, variance and mode weights beside their exact values, as far as the target knows them."""
    exact, modes = target.expectations(), getattr(target, "modes", None)
    mean = exact.get("mean")
    functions: dict[str, Callable[[Tensor], Tensor]] = {"mean": torch.Tensor.double}
    if mean is not None:
        functions["variance"] = lambda x: (x.double() - mean).square()
    if modes is not None and "mode_weights" in exact:
        functions["mode_weights"] = lambda x: (modes(x)[:, None] == torch.arange(len(exact["mode_weights"]))).double()
    return {name: _compared(draws, f, exact[name]) for name, f in functions.items() if name in exact}


def missed_modes(known: dict[str, Known]) -> list[int]:
    """Return the modes that have less than a fifth of their weight among the draws, from 0."""
    if "mode_weights" not in known:
        return []
    exact, (share, _), _ = known["mode_weights"]
    return [int(k) for k in (share < _MISSED * exact).nonzero()[:, 0]]


def _compared(draws: Draws, f: Callable[[Tensor], Tensor], exact: Tensor) -> Known:
    finite = draws.x[draws.x.isfinite().all(1)]
    weighted = None
    if draws.log_weights is not None:
        with suppress(ValueError):
            weighted = draws.expectation(lambda x: f(x.nan_to_num()))  # broken rows have weight zero
    group = draws.group if len(finite) == len(draws) else 1
    return Known(exact.double(), expectation(f(finite), None, group), weighted)


def _distances(
    draws: Draws, x: Tensor, exact: Tensor, target: TargetDensity, missing: dict[str, str]
) -> dict[str, Distance]:
    picked, found = _picked(draws, len(x)), {}

    def draw(seed: int) -> Tensor:
        return target.sample(Streams(mix(draws.seed, 2, seed), range(len(x)))).double()

    for name, distance in DISTANCES.items():
        try:
            drawn = distance(x.double(), exact.double())
            weighted = None if picked is None else distance(picked.double(), exact.double())
            found[name] = Distance(drawn, weighted, *noise_floor(distance, draw))
        except Missing as reason:
            missing[name] = str(reason)
    return found


def _picked(draws: Draws, count: int) -> Tensor | None:
    """Return `count` rows picked by weight, or None where the weights do not stand for twice as many independent ones."""
    try:
        enough = draws.ess * len(draws) >= 2 * count
        return draws.resample(count, draws.seed).x if enough else None
    except ValueError:
        return None


def _stein(x: Tensor, target: TargetDensity) -> tuple[float, float]:
    free = Whitened(target)  # bounded coordinates mapped to R: Stein's identity has no boundary term there
    y = free.to_y(x)
    return stein_discrepancy(y, free.score(y))


def _known_log_z(target: TargetDensity) -> tuple[float, float] | None:
    if target.log_z is not None:
        return target.log_z, target.log_z
    return target.log_z_bounds and (target.log_z_bounds.low, target.log_z_bounds.high)


def _listed(known: Known) -> dict[str, Any]:
    values = {"exact": known.exact, "drawn": known.drawn[0], "drawn_error": known.drawn[1]}
    if known.weighted is not None:
        values |= {"weighted": known.weighted[0], "weighted_error": known.weighted[1]}
    return {name: value.tolist() for name, value in values.items()}
