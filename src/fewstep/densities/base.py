"""Samplers of an unnormalised density: what `fit` and `distill` return, on disk and in use."""

from __future__ import annotations

import importlib
import math
import re
import time
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self, final

import torch
from torch import Tensor

from fewstep.core.density import TargetDensity
from fewstep.core.files import read_header, read_weights, write_weights
from fewstep.core.noise import Noise, Streams, mix
from fewstep.densities.draws import Draws, Kind
from fewstep.densities.estimators.weights import bound
from fewstep.densities.support import Support, rounded
from fewstep.densities.user import as_target
from fewstep.densities.whitened import Whitened

_METHOD = "density-sampler"
_LAYOUT = 2  # raised whenever the same tensors would come to mean something else
_MOST = float(torch.finfo(torch.float32).max)  # stands for infinity in JSON
_WHITENING = ("shift", "scale", "bend")


class Cost(NamedTuple):
    """Calls per sample."""

    nfe: int
    target_calls: int = 0
    gradient_calls: int = 0


class Drawn(NamedTuple):
    """What a sampler gives for one chunk: y, (N, d) whitened; log-weights, (N,) float64, or None; the calls per sample.

    Where weights may be negative their signs, (N,), come beside the logarithms of their sizes.
    """

    y: Tensor
    log_weights: Tensor | None
    cost: Cost
    signs: Tensor | None = None


class Walked(NamedTuple):
    """Where a map leads: y, (N, d) whitened, with log |w| and the sign of w, (N,) float64 each."""

    y: Tensor
    log_weights: Tensor
    signs: Tensor


class DensitySampler(ABC):
    """Draws x ~ rho / Z approximately, with weights that say how well.

    Attributes:
        target: the density that was asked for, in x.
        whitened: the same density in y, where x = shift + scale y.
        steps: the number of steps where none is asked for.
        kind: what the weights are, see `Draws`.
    """

    target: TargetDensity
    whitened: Whitened
    steps: int
    kind: Kind | None

    @abstractmethod
    def draw(self, noise: Noise, steps: int, weights: bool) -> Drawn:
        """Return one sample per stream of `noise` in `steps` steps, weighted where `weights` asks for it."""

    @abstractmethod
    def config(self) -> dict[str, Any]:
        """Return what `restore` needs beside the tensors, as JSON takes it."""

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """Return the trained tensors by name."""

    @classmethod
    @abstractmethod
    def restore(cls, whitened: Whitened, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Self:
        """Return the sampler that `config` and `tensors` were taken from."""

    def backward_weights(self, y: Tensor, steps: int, noise: Noise) -> Tensor:
        """Return log w of what leads to y, (N, d) whitened, drawn backwards from it, (N,) float64; inf where nothing does.

        With y from the target their mean is the EUBO, above log Z in expectation.

        Raises:
            NotImplementedError: the sampler cannot be run backwards.
        """
        raise NotImplementedError(f"{type(self).__name__} cannot be run backwards")

    @final
    @torch.no_grad()
    def eubo(self, x: Tensor, steps: int | None = None, *, seed: int = 0) -> tuple[float, float]:
        """Return the mean log w over exact draws x of the target, (N, d), with its standard error: above log Z in expectation.

        The gap says what the sampler misses, as a mode; infinite where it cannot reach some x at all.

        Raises:
            NotImplementedError: the sampler cannot be run backwards.
        """
        noise = Streams(mix(seed, 5), range(len(x)), device=x.device)
        log_w = self.backward_weights(
            self.whitened.to_y(x.double()).float(), self.steps if steps is None else steps, noise
        )
        return bound(log_w) if bool(log_w.isfinite().all()) else (math.inf, math.nan)

    @final
    @torch.no_grad()
    def sample(
        self, n: int, steps: int | None = None, *, seed: int = 0, chunk: int = 4096, weights: bool = True
    ) -> Draws:
        """Draw n samples; sample k depends on (seed, k) and the number of steps, not on n or `chunk`.

        Args:
            n: how many.
            steps: the length of the loop; the sampler's own where it is None.
            seed: one integer.
            chunk: the most samples that are drawn at once, rounded up to a multiple of 1024.
            weights: whether importance weights are computed too; they cost target calls, and Jacobians for maps.

        Raises:
            ValueError: `n`, `steps` or `chunk` is below one.
        """
        steps = self.steps if steps is None else steps
        if min(n, steps, chunk) < 1:
            raise ValueError(f"n, steps and chunk must be at least 1, got {n}, {steps} and {chunk}")
        begin, size = time.perf_counter(), -(-chunk // Streams.SIZE) * Streams.SIZE
        parts = [self.draw(Streams(seed, range(k, min(k + size, n))), steps, weights) for k in range(0, n, size)]
        logs = [part.log_weights.double() for part in parts if part.log_weights is not None]
        signs = [part.signs.double() for part in parts if part.signs is not None]
        turned = bool(signs) and bool((torch.cat(signs) < 0).any())
        x = self.whitened.to_x(torch.cat([part.y for part in parts]))
        if lost := rounded(x, self.target.support):
            warnings.warn(lost, stacklevel=2)
        return Draws(
            x=x,
            log_weights=torch.cat(logs) if logs else None,
            kind=self.kind if logs else None,
            **parts[0].cost._asdict(),
            seconds=time.perf_counter() - begin,
            seed=seed,
            signs=torch.cat(signs) if turned else None,
        )

    @final
    def save(self, folder: str | Path) -> None:
        """Write the sampler, but not its target, to `folder`: safetensors beside a JSON header."""
        kind = type(self)
        name = f"{kind.__module__.removeprefix('fewstep.densities.')}.{kind.__qualname__}"
        whitening = {f"whitening.{name}": getattr(self.whitened, name) for name in _WHITENING}
        header = {
            "method": _METHOD,
            "layout": _LAYOUT,
            "sampler": name,
            "dim": self.target.dim,
            "support": _ends(self.target),
            "config": self.config(),
        }
        write_weights(folder, {**self.tensors(), **whitening}, header)


class Transport(DensitySampler):
    """A sampler that is a deterministic map of standard normals z, in one step or several.

    Attributes:
        renoise: whether several steps noise the sample again, and so are no such map.
    """

    renoise: bool = False

    @abstractmethod
    def walked(self, z: Tensor, steps: int, noise: Noise, weights: bool) -> Walked:
        """Return y, (N, d) whitened, from z, (N, d), and its weights if `weights`, otherwise ones."""

    @abstractmethod
    def cost(self, steps: int, weights: bool = True) -> Cost:
        """Return the calls per sample of `walked`."""


def load_density_sampler(folder: str | Path, target: TargetDensity | Callable[[Tensor], Tensor]) -> DensitySampler:
    """Return the sampler that was saved to `folder`, for the density it was trained on.

    Args:
        folder: what `save` wrote.
        target: the density, or a callable, whose dimension and support the folder knows; one with a score of its own goes
            through `as_target`.

    Raises:
        ValueError: the folder is damaged, holds something else or the weights of another version, or belongs to another number of
            dimensions or another support.
    """
    kind = _class(str(read_header(folder).get("sampler", "")), folder)
    tensors, header = read_weights(folder, _METHOD)
    if header.get("layout") != _LAYOUT:
        raise ValueError(
            f"{folder} was written by another version of fewstep, which reads its weights otherwise; fit anew"
        )
    if not isinstance(target, TargetDensity):
        target = as_target(target, header["dim"], support=_support(header.get("support")))
    if header["dim"] != target.dim:
        raise ValueError(f"{folder} belongs to a density of {header['dim']} dimensions, not of {target.dim}")
    if header.get("support", _ends(target)) != _ends(target):
        raise ValueError(f"{folder} belongs to a density that lives in {header['support']}, not in {_ends(target)}")
    whitening = {name: tensors.pop(key) for name in _WHITENING if (key := f"whitening.{name}") in tensors}
    return kind.restore(Whitened(target, **whitening), header["config"], tensors)


def _ends(target: TargetDensity) -> list[list[float]] | None:
    """Return the ends of the support of each coordinate as JSON takes them, infinite ones as 3e38 with its sign; None for all."""
    if target.support is None:
        return None
    sides = (torch.as_tensor(side, dtype=torch.float64).expand(target.dim) for side in target.support)
    return [side.clamp(-_MOST, _MOST).tolist() for side in sides]


def _support(ends: Sequence[Sequence[float]] | None) -> Support | None:
    """Return the support that `_ends` wrote."""
    if ends is None:
        return None
    low, high = torch.tensor(ends, dtype=torch.float64)
    return low.masked_fill(low <= -_MOST, -math.inf), high.masked_fill(high >= _MOST, math.inf)


def _class(name: str, folder: str | Path) -> type[DensitySampler]:
    """Return the sampler class that a header names, which lives in this package."""
    if not re.fullmatch(r"[a-z_]\w*(\.[a-z_]\w*)*\.[A-Z]\w*", name):
        raise ValueError(f"{folder} holds no density sampler")
    module, _, kind = name.rpartition(".")
    found = getattr(importlib.import_module(f"fewstep.densities.{module}"), kind, None)
    if not (isinstance(found, type) and issubclass(found, DensitySampler)):
        raise ValueError(f"{folder} names {name!r}, which is no density sampler")
    return found
