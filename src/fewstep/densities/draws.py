"""What a density sampler returns: draws, the weights that tie them to the target, what these are worth, and what it all cost."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from safetensors import SafetensorError
from torch import Tensor

from fewstep.densities import storage
from fewstep.densities.estimators import psis, weights

Kind = Literal["unbiased", "consistent", "bound", "invalid"]
# what each kind of weight may be asked for: a bound knows E[log w] <= log Z alone, an invalid weight knows nothing
_ALLOWED = {
    "unbiased": {"ess", "log_z", "elbo", "expectation"},
    "consistent": {"ess", "log_z", "expectation"},
    "bound": {"elbo"},
    "invalid": set(),
}


@dataclass(frozen=True)
class Draws:
    """N draws, and what is known of them.

    Attributes:
        x: (N, d), in the coordinates of the target.
        log_weights: (N,) float64, or None where the draws stand for the target as they are (or nothing is known).
        kind: what the weights are: "unbiased", E[w f] = Z E_target[f] exactly; "consistent", so in a limit of many steps or
            probes; "bound", E[log w] <= log Z and no more; "invalid", none of these, for the reproduction of published
            figures; None without weights.
        nfe: network calls per draw.
        target_calls: evaluations of log rho per draw.
        gradient_calls: evaluations of its gradient per draw.
        seconds: wall-clock time of all draws.
        seed: what they came from.
        group: so many consecutive rows hang together (a chain, the particles of one run): errors are those of independent
            groups.
        signs: of the weights, (N,) float64 of 1 and -1, or None where none is negative. A map that folds counts mass more than
            once, and with the sign of its determinant that is taken off again: what weights say stays right. Rows of negative
            weight cannot be picked, so `resample` and chains leave them out, and then stand for the target only nearly.

    Raises:
        ValueError: shapes that do not fit, or a kind without weights or the reverse.
    """

    x: Tensor
    log_weights: Tensor | None = None
    kind: Kind | None = None
    nfe: float = 0.0
    target_calls: float = 0.0
    gradient_calls: float = 0.0
    seconds: float = 0.0
    seed: int = 0
    group: int = 1
    signs: Tensor | None = None

    def __post_init__(self) -> None:
        if self.x.ndim != 2 or not len(self.x):
            raise ValueError(f"expected draws (N, d), got {tuple(self.x.shape)}")
        if self.group < 1 or len(self.x) % self.group:
            raise ValueError(f"{len(self.x)} rows do not fill groups of {self.group}")
        if (self.log_weights is None) != (self.kind is None):
            raise ValueError("weights need a kind, and a kind needs weights")
        if self.kind is not None and self.kind not in get_args(Kind):
            raise ValueError(f"kind must be one of {get_args(Kind)}, got {self.kind!r}")
        if self.log_weights is not None:
            if self.log_weights.shape != self.x.shape[:1] or self.log_weights.dtype != torch.float64:
                raise ValueError(f"expected log-weights ({len(self.x)},) float64, got {self.log_weights.shape}")
        if self.signs is not None:
            if self.log_weights is None or self.signs.shape != self.log_weights.shape:
                raise ValueError("signs belong to log-weights, one each")
            if not bool((self.signs.abs() == 1).all()):
                raise ValueError("signs are 1 or -1")

    def __repr__(self) -> str:
        n, d = self.x.shape
        return f"Draws(N={n}, d={d}, kind={self.kind!r}, nfe={self.nfe}, seed={self.seed})"

    def __len__(self) -> int:
        return len(self.x)

    @property
    def nonfinite(self) -> int:
        """Rows of NaN or infinite x, or of NaN or +inf weight: they count as weight zero, which can only lower log Z.

        A weight of zero outside the support of the target (-inf) is in order and not counted.
        """
        return int(self._broken().sum())

    @property
    def folds(self) -> int:
        """Rows of negative weight: there the map that drew them has turned over."""
        return 0 if self.signs is None else int((self.signs < 0).sum())

    @property
    def ess(self) -> float:
        """Effective sample size (sum w)^2 / (N sum w^2), a fraction of N; of the last weighting alone where `group` > 1."""
        return weights.ess(self.weights_for("ess"), self.signs)

    @property
    def khat(self) -> float:
        """Pareto shape of the tail of the weights; above `psis.limit(N)`, at most 0.7, do not trust what they say."""
        return psis.pareto_k(self.weights_for("ess"))

    @property
    def log_z(self) -> float:
        """The estimate of log Z in nats, log mean w."""
        return weights.log_mean(self.weights_for("log_z"), self.signs)

    @property
    def elbo(self) -> float:
        """Mean log w, below log Z in expectation; -inf where any draw has weight zero. ValueError where any is negative."""
        if self.folds:
            raise ValueError(f"{self.folds} of {len(self)} weights are negative: their logarithms bound nothing")
        return float(self.weights_for("elbo").mean())

    def weights_for(self, what: str) -> Tensor:
        """Return the logarithms of the weights' sizes, (N,), broken rows as zero, if their kind allows `what`; else ValueError."""
        log_w = self._given()
        if self.kind is not None and what not in _ALLOWED[self.kind]:
            raise ValueError(f"weights of kind {self.kind!r} give no {what}")
        return log_w.masked_fill(self._broken(), -math.inf)

    def chances(self) -> Tensor:
        """Return the log-weights by which rows can be picked, (N,): those that `expectation` uses, negative weights as zero.

        Warns where there are any: what is picked is then not quite the target.
        """
        log_w = self.weights_for("expectation")
        if self.signs is None:
            return log_w
        warnings.warn(
            f"{self.folds} of {len(self)} weights are negative, where the map folds: these cannot be picked, so what is picked "
            "by weight is not quite the target; log Z and expectations are right",
            stacklevel=3,
        )
        return log_w.masked_fill(self.signs < 0, -math.inf)

    def log_z_interval(self, level: float = 0.95) -> tuple[float, float]:
        """Return an interval of log Z; without an upper end where `khat` says that none can be had. See `weights`."""
        return weights.log_z_interval(self.weights_for("log_z"), level, self.group, self.signs)

    def expectation(self, f: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        """Return the expectation of f(x), (N, d) -> (N, ...), under the target, and its standard error.

        Self-normalised; without weights the plain mean.
        """
        log_w = None if self.log_weights is None else self.weights_for("expectation")
        return weights.expectation(f(self.x), log_w, self.group, self.signs)

    def resample(self, n: int | None = None, seed: int = 0) -> Draws:
        """Return n rows drawn with probability in proportion to their weights, by one uniform comb, in random order.

        For plots and distances. They hang together, so numbers with errors are better taken from `expectation`.

        Raises:
            ValueError: no draw has a positive weight.
        """
        chances = self.chances()
        if bool(chances.isneginf().all()):
            raise ValueError("no draw has a positive weight, so that none can be picked")
        n, generator = n or len(self), torch.Generator().manual_seed(seed)
        offset = torch.rand(1, generator=generator, dtype=torch.float64)
        rows = weights.comb(chances[None].cpu(), offset, n)[0]
        rows = rows[torch.randperm(n, generator=generator)].to(self.x.device)
        return self.picked(rows, group=n)

    def picked(self, rows: Tensor, group: int) -> Draws:
        """Return the draws at `rows`, (M,), without weights, at the cost of all of them."""
        share = len(self) / len(rows)
        return replace(
            self,
            x=self.x[rows],
            log_weights=None,
            signs=None,
            kind=None,
            nfe=share * self.nfe,
            target_calls=share * self.target_calls,
            gradient_calls=share * self.gradient_calls,
            group=group,
        )

    def save(self, path: str | Path, target: Mapping[str, Any] | None = None) -> None:
        """Write the draws to a .safetensors, .npz or .csv file, atomically.

        The first two keep arrays x, log_weights and signs, and all other fields; a .csv has columns x_1, ..., x_d, log_weight,
        sign. The signs are left out where all weights are positive.

        Args:
            path: the file; its folder is made.
            target: what is known of the density, as JSON takes it; a fact too, which `storage.read_target` reads.

        Raises:
            ValueError: a file of another kind.
        """
        arrays = {name: getattr(self, name) for name in storage.ARRAYS}
        known = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in arrays}
        storage.write(Path(path), arrays, known, target)

    @classmethod
    def load(cls, path: str | Path) -> Draws:
        """Return what `save` wrote as .safetensors or .npz, or the array x, (N, d), of any such file, without weights.

        Raises:
            ValueError: the file is missing or damaged, is none of these, or holds weights of an unknown kind.
        """
        try:
            arrays, facts = storage.read(Path(path))
            known = {f.name: facts[f.name] for f in fields(cls) if f.name in facts}
            return cls(arrays["x"], arrays.get("log_weights"), signs=arrays.get("signs"), **known)
        except KeyError:
            raise ValueError(f"{path} holds no array x") from None
        except (OSError, ValueError, TypeError, SafetensorError) as error:
            raise ValueError(f"{path} cannot be read as draws ({error})") from None

    @classmethod
    def concatenate(cls, parts: Sequence[Draws]) -> Draws:
        """Join draws of one run: costs per draw are averaged, seconds added.

        Raises:
            ValueError: different kinds or groups.
        """
        head, total = parts[0], sum(len(p) for p in parts)
        if any(p.kind != head.kind or p.group != head.group for p in parts):
            raise ValueError("draws of different kinds or groups cannot be joined")
        log_w = None if head.log_weights is None else torch.cat([p._given() for p in parts])
        turned = any(p.folds for p in parts)
        signs = [torch.ones_like(p._given()) if p.signs is None else p.signs for p in parts] if turned else []
        return replace(
            head,
            x=torch.cat([p.x for p in parts]),
            log_weights=log_w,
            signs=torch.cat(signs) if signs else None,
            nfe=sum(len(p) * p.nfe for p in parts) / total,
            target_calls=sum(len(p) * p.target_calls for p in parts) / total,
            gradient_calls=sum(len(p) * p.gradient_calls for p in parts) / total,
            seconds=sum(p.seconds for p in parts),
        )

    def _given(self) -> Tensor:
        if self.log_weights is None:
            raise ValueError("these draws have no weights: sample with weights=True, or from a sampler that knows them")
        return self.log_weights

    def _broken(self) -> Tensor:
        broken = ~self.x.isfinite().all(1)
        if self.log_weights is not None:
            broken = broken | self.log_weights.isnan() | (self.log_weights == math.inf)
        return broken
