"""What the draws of a density are worth: distances to exact draws, each beside its value between two exact sets, and weights."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from fewstep.bench.common import failed
from fewstep.core.density import TargetDensity
from fewstep.core.noise import Streams, mix
from fewstep.densities.base import DensitySampler, Transport
from fewstep.densities.corrections import smc_through
from fewstep.densities.draws import Draws
from fewstep.densities.estimators.weights import bound
from fewstep.densities.laplace import laplace
from fewstep.densities.mcmc.crank_nicolson import CrankNicolson
from fewstep.densities.mcmc.hamiltonian import Hamiltonian
from fewstep.densities.mcmc.sequential import SequentialMonteCarlo
from fewstep.densities.whitened import whiten
from fewstep.metrics import mode_weights, sliced_wasserstein, stein_discrepancy
from fewstep.metrics.distances import check_sets
from fewstep.metrics.transport import sinkhorn_divergence, wasserstein

PUBLISHED = "papers' entropic W1, not converged"
VERDICTS = ("yes", "open", "no")
ABOVE, BELOW = "above log Z: no bound", "below log Z: no bound"
_DENSE = 100  # dimensions up to which short chains see a covariance


def energy(a: Tensor, b: Tensor) -> float:
    """Return 2 E|a - b| - E|a - a'| - E|b - b'| over all pairs, a row with itself too: positive, and so is its floor."""
    check_sets(a, b, rows=1)
    a, b = a.double(), b.double()
    centre = b.mean(0)  # distances by matrix products lose their digits far from the origin
    a, b = a - centre, b - centre
    return 2 * _mean_distance(a, b) - _mean_distance(a, a) - _mean_distance(b, b)


def _mean_distance(a: Tensor, b: Tensor) -> float:
    """Return E|a - b|; few rows at a time stay in the cache, which takes two fifths of the time."""
    return sum(float(torch.cdist(rows, b).sum()) for rows in a.split(64)) / (len(a) * len(b))


def unconverged_sinkhorn(a: Tensor, b: Tensor) -> float:
    """Return <P, C> of the published tables: Euclidean cost, regularisation 1e-3, a hundred iterations from zero.

    These leave the marginals off by tens of per cent: neither a distance nor near its limit, and it stands here only beside the
    figures that were published so (Jutras-Dube et al. 2025, arXiv:2502.07579, after the code of arXiv:2307.01198).
    """
    cost = torch.cdist(a.float(), b.float())
    scaled, rows, columns = cost / -1e-3, cost.new_zeros(len(a)), cost.new_zeros(len(b))
    for _ in range(100):
        rows = -math.log(len(a)) - _log_sum_exp(scaled + columns, 1)
        columns = -math.log(len(b)) - _log_sum_exp(scaled + rows[:, None], 0)
    return float(((scaled + rows[:, None] + columns).exp() * cost).sum())


def _log_sum_exp(x: Tensor, dim: int) -> Tensor:
    """Return x.logsumexp(dim), ten times faster where most terms underflow, which takes the slow path of exp."""
    top = x.amax(dim, keepdim=True)
    return ((x - top).clamp_min(-80.0).exp().sum(dim, keepdim=True).log() + top).squeeze(dim)


@dataclass(frozen=True)
class Sizes:
    """How many rows each distance is taken of.

    Attributes:
        transport: exact and debiased transport.
        published: the published figure.
        most: all others: of one set of draws.
        sets: of draws, each beside its own exact one: the mode weights of one pair alone decide its distance.
    """

    transport: int = 1024
    published: int = 2500
    most: int = 4096
    sets: int = 3

    @property
    def measured(self) -> int:
        """Draws of all sets together."""
        return self.sets * self.most

    def distances(self) -> dict[str, tuple[Callable[[Tensor, Tensor], float], int]]:
        """Return the distances by name, each with the number of rows it is taken of."""
        return {
            "W1": (lambda a, b: wasserstein(a, b, 1), self.transport),
            "W2": (lambda a, b: wasserstein(a, b, 2), self.transport),
            "Sinkhorn": (sinkhorn_divergence, self.transport),
            "SW": (sliced_wasserstein, self.most),
            "energy x 1000": (lambda a, b: 1000 * energy(a, b), self.most),
            PUBLISHED: (unconverged_sinkhorn, self.published),
        }


@dataclass(frozen=True)
class Truth:
    """Exact draws of a density, or those of sequential Monte Carlo where it has no exact sampler.

    Attributes:
        target: the density.
        sizes: of the distances.
        seed: of the draws.
    """

    target: TargetDensity
    sizes: Sizes
    seed: int = 0

    @cached_property
    def exact(self) -> bool:
        """Whether the target has an exact sampler."""
        try:
            self.target.sample(Streams(0, range(1)))
        except NotImplementedError:
            return False
        return True

    @cached_property
    def reference(self) -> Draws:
        """The draws, 2 x `sizes.sets` sets of them, those of sequential Monte Carlo with their weights."""
        n = 2 * self.sizes.measured
        if self.exact:
            return Draws(self.target.sample(Streams(mix(self.seed, 77), range(n))))
        if self.target.dim > _DENSE:
            method = SequentialMonteCarlo(CrankNicolson(), self.sizes.most, moves=5)
            return smc_through(laplace(self.target), n, method=method, seed=mix(self.seed, 77))
        whitened = whiten(self.target, dense=True, seed=self.seed)
        method = SequentialMonteCarlo(Hamiltonian(4), self.sizes.most, moves=1)
        return method.sample(whitened, n, seed=mix(self.seed, 77))

    @cached_property
    def sets(self) -> list[Tensor]:
        """Sets of `sizes.most` draws each."""
        some = self.reference if self.exact else self.reference.resample(seed=self.seed)
        return list(some.x.split(self.sizes.most))

    @cached_property
    def log_z(self) -> float | None:
        """The log Z that is known, or the middle of what is known of it."""
        bounds = self.target.log_z_bounds
        return self.target.log_z if bounds is None else (bounds.low + bounds.high) / 2

    @cached_property
    def known(self) -> tuple[float, float]:
        """Between what log Z lies for certain."""
        bounds = self.target.log_z_bounds
        if self.target.log_z is not None:
            return self.target.log_z, self.target.log_z
        return (bounds.low, bounds.high) if bounds is not None else (-math.inf, math.inf)

    def floors(self) -> dict[str, Any]:
        """Return the row of exact draws: the second half of the sets beside the first."""
        x = torch.cat(self.sets[self.sizes.sets :])
        return {"log Z": self.log_z} | self.apart(x) | self.modes(x)

    def figures(self, draws: Draws) -> dict[str, Any]:
        """Return what the weights of the draws say, and how far the draws as they are lie from the exact ones."""
        return self.weighted(draws) | self.distances(draws.x)

    def weighted(self, draws: Draws) -> dict[str, Any]:
        """Return kind, ESS, k-hat, log Z with its interval, and whether it holds the truth; nothing where there are no weights."""
        row: dict[str, Any] = {"weights": draws.kind or "none", "folds": draws.folds, "refused": draws.nonfinite}
        if draws.kind != "unbiased":
            return row
        low, high = draws.log_z_interval()
        row |= {"ESS": draws.ess, "k-hat": draws.khat, "ELBO": self.lower_bound(draws)}
        row |= {"log Z": draws.log_z, "low": low, "high": high}
        if self.log_z is not None:
            row |= {"log Z error": abs(draws.log_z - self.log_z), "covers": self._covered(low, high)}
        return row

    def coverage(self, draw: Callable[[int], Draws], repeats: int) -> dict[str, int | float]:
        """Return how often intervals of log Z hold it, over `repeats` sets of draws, and by how much their mean Z is off, in nats.

        Of a log Z that is known between bounds, that is from their middle. It must be known.

        Args:
            draw: gives the set of a seed, with unbiased weights.
            repeats: how many.
        """
        assert self.log_z is not None
        rows = [self.weighted(draw(mix(31, k))) for k in range(repeats)]
        verdicts = Counter(row["covers"] for row in rows)
        means = torch.tensor([row["log Z"] for row in rows], dtype=torch.float64)
        off = means.logsumexp(0) - math.log(repeats) - self.log_z
        return {"sets": repeats, **{word: verdicts[word] for word in VERDICTS}, "log Z off": float(off)}

    def lower_bound(self, draws: Draws) -> float | str | None:
        """Return the ELBO, or None where weights do not bound log Z: of a kind that does not, or of a map that was seen to fold.

        One that lies above log Z by more than its error allows says that something is wrong, and is not shown as a bound.
        """
        if draws.kind not in ("unbiased", "bound") or draws.nonfinite or draws.folds:
            return None
        value, error = bound(draws.weights_for("elbo"), draws.group)
        return value if not value - 4 * error > self.known[1] else ABOVE

    def upper_bound(self, sampler: DensitySampler, steps: int) -> dict[str, Any]:
        """Return the EUBO from exact draws, where they exist and the sampler runs backwards; the same word below log Z."""
        if not self.exact:
            return {}
        try:
            value, error = sampler.eubo(self.sets[1][: self.sizes.transport // 4], steps)
        except NotImplementedError:
            return {}
        return {"EUBO": value if not value + 4 * error < self.known[0] else BELOW}

    def distances(self, x: Tensor) -> dict[str, Any]:
        """Return the distances of x, (N, d), to exact draws; rows that are not finite are left out, as many of both.

        Raises:
            ValueError: no row is finite, or too few for a discrepancy.
        """
        x = x[x.isfinite().all(1)].to(self.sets[0])
        check_sets(x, self.sets[0], rows=1)
        return self.apart(x) | self.modes(x) | ({} if self.exact else self._stein(x))

    def apart(self, x: Tensor) -> dict[str, float | str]:
        """Return the mean of every distance over the sets that x holds, each to its own exact one."""
        row: dict[str, float | str] = {}
        held = min(max(round(len(x) / self.sizes.most), 1), self.sizes.sets)
        pairs = list(zip(x.tensor_split(held), self.sets, strict=False))
        for name, (distance, n) in self.sizes.distances().items():
            try:
                row[name] = statistics.mean(distance(a[:n], b[: len(a[:n])]) for a, b in pairs)
            except ValueError as error:
                row[name] = failed(error)
        return row

    def modes(self, x: Tensor) -> dict[str, Any]:
        """Return the largest error of a mode's weight and how many modes have a tenth of theirs, where modes are known."""
        wanted = self.target.expectations().get("mode_weights")
        if wanted is None:
            return {}
        share = mode_weights(self.target.modes(x), len(wanted))[0]  # type: ignore[attr-defined]
        return {
            "mode error": float((share - wanted).abs().max()),
            "modes": f"{int((share > wanted / 10).sum())}/{len(wanted)}",
        }

    def corrected(self, sampler: Transport, seed: int) -> Draws:
        """Return the draws of sequential Monte Carlo in the noise that a one-step map starts from."""
        method = SequentialMonteCarlo(CrankNicolson(), self.sizes.most // 8, moves=3)
        return smc_through(sampler, self.sizes.measured, method=method, seed=seed)

    def _covered(self, low: float, high: float) -> str:
        """Return whether an interval and what is known of log Z share a point; one without an end that does says little: "open"."""
        inside = low <= self.known[1] and self.known[0] <= high
        return ("open" if math.isinf(high) else "yes") if inside else "no"

    def _stein(self, x: Tensor) -> dict[str, Any]:
        """Return the kernel Stein discrepancy, its bandwidth taken from the reference."""
        n = self.sizes.transport
        some = x[:n].double()
        bandwidth = float(torch.nn.functional.pdist(self.sets[0][:n].double()).median())
        return {"KSD": stein_discrepancy(some, self.target.score(some), bandwidth)[0]}
