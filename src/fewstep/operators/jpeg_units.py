r"""The coding units of JPEG (MCUs): tiles of 8 or 16 pixels a side that share no pixel and no coefficient.

What the file says splits into one small problem per unit, and all whole units have the same matrix; those that the border of
the image cuts have another, one at the right, one at the bottom and one in the corner. So dense algebra on some hundred
numbers, batched over units, serves an image of any size.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from fewstep.core.spectral import Adjoint, Function, Spectrum
from fewstep.operators.dct import JpegTables, JpegTransform


@dataclass(frozen=True)
class Region:
    """A grid of equal units.

    Attributes:
        first: row and column of the first unit.
        count: rows and columns of units.
        transform: of one unit, float64, on the CPU.
    """

    first: tuple[int, int]
    count: tuple[int, int]
    transform: JpegTransform

    def gram(self) -> Tensor:
        """Return T T' of one unit, (m, m), float64."""
        c, h, w = self.transform.tables.image_shape
        matrix = self.transform.forward(torch.eye(c * h * w, dtype=torch.float64).reshape(-1, c, h, w))
        return matrix.T @ matrix

    def gather(self, whole: JpegTransform, coefficients: Tensor) -> Tensor:
        """Return the coefficients of the region's units out of those of the image, (N, D) -> (N, units, m)."""
        parts = [p.reshape(*p.shape[:5], 64).transpose(2, 3).flatten(3) for p in self._views(whole, coefficients)]
        return torch.cat(parts, 3).flatten(1, 2)

    def scatter(self, whole: JpegTransform, units: Tensor, coefficients: Tensor) -> None:
        """Write the coefficients of units, (N, units, m), to their places in those of the image, (N, D)."""
        sizes = [v.shape[2] * v.shape[4] * 64 for v in self._views(whole, coefficients)]
        # each view is made when its turn comes: one made before the first copy would have no part in its gradient
        parts = units.unflatten(1, self.count).split(sizes, 3)
        for view, part in zip(self._views(whole, coefficients), parts, strict=True):
            view.copy_(part.unflatten(3, (view.shape[2], view.shape[4], 64)).transpose(2, 3))

    def _views(self, whole: JpegTransform, coefficients: Tensor) -> Iterator[Tensor]:
        """Yield views (N, rows, v, columns, h, 64) of each component: units in rows and columns, blocks v x h in each."""
        start, (down, across) = 0, self.count
        for i, (h, v) in enumerate(whole.tables.sampling):
            (rows, columns), (tall, wide) = whole.blocks(i), self.transform.blocks(i)
            plane = coefficients[:, start : start + 64 * rows * columns].view(-1, rows, columns, 64)
            start += 64 * rows * columns
            top, left = self.first[0] * v, self.first[1] * h
            part = plane[:, top : top + down * tall, left : left + across * wide]
            yield part.unflatten(2, (across, wide)).unflatten(1, (down, tall))


def regions(tables: JpegTables) -> list[Region]:
    """Return the one to four regions of equal units that make up the image."""
    lines = []
    for side, factor in zip(tables.size, (1, 0), strict=True):
        unit = 8 * max(s[factor] for s in tables.sampling)
        whole, rest = divmod(side, unit)
        lines.append([(0, whole, unit)] * (whole > 0) + [(whole, 1, rest)] * (rest > 0))
    return [
        Region((top, left), (down, across), JpegTransform(replace(tables, size=(h, w)), torch.float64))
        for top, down, h in lines[0]
        for left, across, w in lines[1]
    ]


class Duals(NamedTuple):
    """Multipliers (R, m), largest error of a coefficient in each problem (R,), and iterations used (R,)."""

    multipliers: Tensor
    residual: Tensor
    iterations: Tensor


def box_duals(gram: Tensor, v: Tensor, bounds: tuple[Tensor, Tensor], tol: Tensor, max_iter: int) -> Duals:
    """Return for each of R problems the multipliers l with v - K l, (R, m), between the bounds and l normal to them.

    The dual problem min over l of l'K l / 2 - <l, v> + max over the box of <l, b> is solved by proximal gradients with momentum
    (Beck and Teboulle 2009) that restarts where it points uphill (O'Donoghue and Candes 2015), after scaling K to unit diagonal.
    Each problem restarts and stops by itself, and one that has stopped costs nothing more.

    Args:
        gram: K, (m, m), common to all.
        v: (R, m).
        bounds: lower and upper, (R, m) each.
        tol: largest error of each coefficient, (m,).
        max_iter: the most iterations.
    """
    diagonal = gram.diagonal()
    scale = torch.where(diagonal > 1e-12 * diagonal.max(), diagonal.clamp_min(1e-300).rsqrt(), 0.0)
    gram = scale[:, None] * gram * scale
    bound = float(torch.linalg.eigvalsh(gram)[-1]) * (1 + 1e-6)
    gram, scale = gram.to(v), scale.to(v)
    v, low, high = v * scale, bounds[0] * scale, bounds[1] * scale
    allowed = (tol * scale).clamp_min(torch.finfo(v.dtype).tiny)
    out = Duals(torch.zeros_like(v), v.new_zeros(len(v)), torch.zeros(len(v), dtype=torch.long, device=v.device))
    rows, point, dual = torch.arange(len(v), device=v.device), out.multipliers, out.multipliers
    momentum = v.new_ones(len(v), 1)
    for k in range(max_iter + 1):
        raised = bound * point + v - point @ gram
        new = (raised - raised.clamp(low, high)) / bound
        residual = (bound * (new - point) / allowed).abs().amax(1)
        going = residual > (1 if k < max_iter else torch.inf)
        done = rows[~going]
        out.multipliers[done], out.residual[done], out.iterations[done] = scale * point[~going], residual[~going], k
        if len(done) == len(rows):
            break
        uphill = ((point - new) * (new - dual)).sum(1, keepdim=True) > 0
        after = (1 + (1 + 4 * momentum**2).sqrt()) / 2
        point, dual = new + torch.where(uphill, 0.0, (momentum - 1) / after) * (new - dual), new
        momentum = torch.where(uphill, 1.0, after)
        if len(done):
            rows, v, low, high, point, dual, momentum = (a[going] for a in (rows, v, low, high, point, dual, momentum))
    return out


class Unit(NamedTuple):
    """The eigenvectors (m, m) and square roots of eigenvalues (m,) of A A' of the units of a region."""

    region: Region
    vectors: Tensor
    values: Tensor


@dataclass(frozen=True)
class JpegSpectrum(Spectrum):
    """Functions of A'A for A = forward / std, through A A' = U s^2 U' of each unit.

    f(sqrt(A'A)) v = f(0) v + A' U (f(s) - f(0)) / s^2 U' A v, where s > 0.
    """

    transform: JpegTransform
    std: Tensor
    units: tuple[Unit, ...]

    @classmethod
    def of(cls, transform: JpegTransform, std: Tensor) -> JpegSpectrum:
        """Return the spectrum of forward / std; `std`, (D,), is the same in all units of a region."""
        units = []
        for region in regions(transform.tables):
            inner = region.gather(transform, std[None])[0, 0].double().cpu()
            squares, vectors = torch.linalg.eigh(region.gram() / torch.outer(inner, inner))
            squares = torch.where(squares > 1e-9 * squares[-1], squares, 0.0)
            units.append(Unit(region, vectors.to(std), squares.sqrt().to(std)))
        return cls(transform, std, tuple(units))

    def apply(self, f: Function, v: Tensor) -> Tensor:
        """See `Spectrum`."""
        null = f(v.new_zeros(1, 1, 1, 1))

        def gain(s: Tensor) -> Tensor:
            return torch.where(s > 0, (f(s) - null) / s.square().clamp_min(torch.finfo(s.dtype).tiny), 0.0)

        return null * v + self._pulled(gain, self.transform.forward(v) / self.std)

    def pull_back(self, f: Function, r: Tensor, adjoint: Adjoint) -> Tensor:
        """See `Spectrum`; functions of A A' act within the units."""
        return self._pulled(lambda s: torch.where(s > 0, f(s), 0.0), r)

    def _pulled(self, f: Function, r: Tensor) -> Tensor:
        """Return A' U f(s) U' r."""
        out = torch.empty_like(r)
        for region, vectors, values in self.units:
            part = region.gather(self.transform, r) @ vectors
            gain = f(values.reshape(1, 1, 1, -1)).flatten(1, 2)
            region.scatter(self.transform, (gain * part) @ vectors.T, out)
        return self.transform.adjoint(out / self.std)

    def repeat(self, k: int) -> Spectrum:
        """See `Spectrum`."""
        return self
