"""JPEG as a measurement: each quantised coefficient says in which interval the coefficient of the image lay."""

from __future__ import annotations

import copy
import io
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fewstep.core.batch import item_dot
from fewstep.core.counts import Counts
from fewstep.core.likelihood import GaussianLikelihood, Likelihood
from fewstep.core.linalg import Unconverged, cg
from fewstep.core.noise import Noise
from fewstep.core.spectral import Spectrum
from fewstep.images import orientation_of
from fewstep.operators.dct import LEVELS, JpegTables, JpegTransform
from fewstep.operators.image import from_unit, to_unit
from fewstep.operators.jpeg_file import read_jpeg
from fewstep.operators.jpeg_units import JpegSpectrum, box_duals, regions

__all__ = ["JpegLikelihood", "JpegMeasurement", "JpegTables", "encode", "gaussian_jpeg", "jpeg", "project"]

CHUNK = 4096  # coding units that are solved at once, which bounds the memory
UNIFORM = 12**-0.5  # standard deviation of an error that is uniform over one step


@dataclass(frozen=True)
class JpegMeasurement:
    """The quantised coefficients of B JPEG files of one geometry and one set of tables.

    Attributes:
        tables: quantisation tables, sampling factors, size.
        indices: all quantised coefficients, (B, D) int16, in the order of `JpegTransform`.
        decoded: the images as Pillow decodes them, (B, C, H, W) float32 in [0, 1], upright as EXIF says.
    """

    tables: JpegTables
    indices: Tensor
    decoded: Tensor

    @classmethod
    def from_file(cls, source: str | Path | bytes) -> JpegMeasurement:
        """Read a file or its bytes; ValueError where it is no JPEG that can be read, see `read_jpeg`."""
        file = read_jpeg(source)
        indices = np.concatenate([c.blocks().reshape(-1) for c in file.components])
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
            tables = JpegTables.of(file, orientation_of(image))
            pixels = np.array(image.convert("RGB" if len(tables.steps) == 3 else "L"))
        decoded = torch.from_numpy(pixels).reshape(1, *tables.size, -1).permute(0, 3, 1, 2) / 255
        return cls(tables, torch.from_numpy(indices)[None], tables.upright(decoded).contiguous())

    @classmethod
    def stack(cls, items: list[JpegMeasurement]) -> JpegMeasurement:
        """Return the batch of several; ValueError where tables or sizes differ."""
        if any(item.tables != items[0].tables for item in items):
            raise ValueError("JPEG files of one batch must have the same tables, sampling and size")
        indices, decoded = (torch.cat([getattr(i, name) for i in items]) for name in ("indices", "decoded"))
        return cls(items[0].tables, indices, decoded)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        return self.tables.image_shape


def settings_of(tables: JpegTables) -> tuple[int, str]:
    """Return the quality whose luminance table, as libjpeg makes it, is nearest in its sum, and the chroma sub-sampling."""
    total = int(tables.steps[0].sum())
    quality = min(range(1, 101), key=lambda q: abs(_luminance_sum(q) - total))
    h, v = tables.sampling[0]
    return quality, {(1, 1): "4:4:4", (2, 1): "4:2:2", (2, 2): "4:2:0"}.get((h, v), f"{h} x {v}")


@lru_cache(maxsize=100)
def _luminance_sum(quality: int) -> int:
    return int(encode(torch.zeros(1, 3, 8, 8), quality).tables.steps[0].sum())


def encode(x: Tensor, quality: int, subsampling: str = "4:2:0") -> JpegMeasurement:
    """Encode images, (B, 1 or 3, H, W) in [0, 1], with Pillow, and read the files."""
    return JpegMeasurement.stack([JpegMeasurement.from_file(data) for data in encoded(x, quality, subsampling)])


def encoded(x: Tensor, quality: int, subsampling: str = "4:2:0") -> list[bytes]:
    """Return the JPEG files of images, (B, 1 or 3, H, W) in [0, 1]; ValueError for an impossible quality or sampling."""
    if not 1 <= quality <= 100:
        raise ValueError(f"the quality of a JPEG file is from 1 to 100, got {quality}")
    if subsampling not in (known := ("4:4:4", "4:2:2", "4:2:0")):
        raise ValueError(f"chroma sub-sampling is one of {', '.join(known)}, got {subsampling!r}")
    if x.ndim != 4 or x.shape[1] not in (1, 3):
        raise ValueError(f"JPEG holds grey or RGB images (B, 1 or 3, H, W), got shape {tuple(x.shape)}")
    if not bool(torch.isfinite(x).all()):
        raise ValueError("the image holds NaN or infinite values")
    pixels = (x.clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    files = []
    for item in pixels:
        out = io.BytesIO()
        Image.fromarray(item if item.shape[-1] == 3 else item[..., 0]).save(
            out, "JPEG", quality=quality, subsampling=subsampling
        )
        files.append(out.getvalue())
    return files


class JpegLikelihood(Likelihood):
    r"""p(y | x) for JPEG files y: x is possible where every DCT coefficient rounds to what the file holds.

    The set {x : |T x - q k| <= q / 2 + slack} is convex (T: colour, chroma averaging, block DCT; q the step, k the integer
    of the file). The prox is the Euclidean projection on it, whatever rho. A hard set has no gradient, so `log_prob` and
    `score` are those of a smooth surrogate, -sum d^2 / (2 softness^2), d being the distance of each coefficient to its interval
    in units of its step; it tends to the set as softness -> 0.

    Approximated: the encoder rounds colours and averaged chroma to integers before the DCT and computes that in integers, which
    `slack` allows for (at quality 90 about one coefficient in 700 of the original still lies outside, by at most two grey
    levels; hardly any at 50); and see `JpegTransform` on the blocks at the border. An exact draw from a Gaussian cut off by
    the set is not known, so "draw" is not provided.

    Args:
        y: what the files hold.
        softness: of the surrogate, in quantisation steps.
        slack: grey levels by which every interval is widened to each side, more where the border cuts a block.
        tol: largest error of a coefficient in the projection, in grey levels (a display shows steps of one).
        max_iter: the most iterations of the projection in one coding unit.
        dtype, device: of x.
    """

    def __init__(
        self,
        y: JpegMeasurement,
        *,
        softness: float = 0.1,
        slack: float = 0.5,
        tol: float = 0.1,
        max_iter: int = 1000,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        if not (softness > 0 and slack >= 0 and tol > 0):
            raise ValueError(f"need softness > 0, slack >= 0, tol > 0, got {softness}, {slack}, {tol}")
        self.y, self.softness, self.slack, self.tol, self.max_iter = y, softness, slack, tol, max_iter
        self.transform = JpegTransform(y.tables, dtype, device)
        self.batch, self.counts = y.indices.shape[0], Counts()
        self.event_shape, self.dtype, self.device = torch.Size(y.image_shape), dtype, torch.device(device)
        self.provides = frozenset({"gradient", "prox"})
        self.low, self.high = intervals(self.transform, y.indices, slack)

    def log_prob(self, x: Tensor) -> Tensor:
        """Return the surrogate's logarithm, (N, *event) -> (N,); 0 inside the set."""
        self.counts.operator += 1
        coefficients = self.transform.forward(x)
        outside = (coefficients - coefficients.clamp(self.low, self.high)) / self.transform.steps
        return -0.5 * item_dot(outside, outside) / self.softness**2

    def prox(self, z: Tensor, rho: Tensor | float = 1.0) -> Tensor:
        """Return the projection of z on the set, (N, *event); `rho` does not matter for a hard constraint."""
        result = project(self.transform, z, (self.low, self.high), self.tol, self.max_iter)
        self.counts.operator += 2
        if bool((worst := result.residual.max()) > self.tol):
            warnings.warn(
                f"the projection on the JPEG set stopped after {self.max_iter} iterations at an error of {float(worst):.1e}"
                f" (asked: {self.tol:.1e}); raise max_iter or tol",
                Unconverged,
                stacklevel=2,
            )
        return result.x

    def draw(self, z: Tensor, rho: Tensor | float, noise: Noise) -> Tensor:
        """Not provided.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError("no exact draw is known for JPEG; use a method that needs prox or gradient only")

    def start(self) -> Tensor:
        """See `Likelihood`; the decoded image."""
        return from_unit(self.y.decoded).to(self.device, self.dtype)

    def expand(self, k: int) -> JpegLikelihood:
        """See `Likelihood`."""
        twin = copy.copy(self)
        twin.y = JpegMeasurement(self.y.tables, self.y.indices.repeat(k, 1), self.y.decoded.repeat(k, 1, 1, 1))
        twin.low, twin.high, twin.batch = self.low.repeat(k, 1), self.high.repeat(k, 1), self.batch * k
        return twin


def intervals(transform: JpegTransform, indices: Tensor, slack: float) -> tuple[Tensor, Tensor]:
    """Return lower and upper bounds of the coefficients, (B, D) each; `slack` is in grey levels."""
    centre = centres(transform, indices)
    # colours are rounded before the border is repeated, so the error of rounding is repeated too
    half = transform.steps / 2 + slack / LEVELS * transform.amplification()
    return centre - half, centre + half


def centres(transform: JpegTransform, indices: Tensor) -> Tensor:
    """Return the coefficients that the files hold, (B, D), on the scale of `transform`."""
    return indices.to(transform.steps) * transform.steps + _level_shift(transform)


def _level_shift(transform: JpegTransform) -> Tensor:
    """Return the coefficients, (D,), of luminance 128, which the encoder subtracts and which 0 in [-1, 1] misses by 0.5."""
    shift = torch.zeros_like(transform.steps)
    rows, columns = transform.blocks(0)
    shift[: 64 * rows * columns : 64] = 8 * 0.5 / LEVELS
    return shift


class Projection(NamedTuple):
    """The projection (N, *event), its largest error in grey levels (N,), and iterations averaged over units (N,)."""

    x: Tensor
    residual: Tensor
    iterations: Tensor


def project(
    transform: JpegTransform, z: Tensor, bounds: tuple[Tensor, Tensor], tol: float = 0.1, max_iter: int = 1000
) -> Projection:
    """Return the nearest x to z, (N, *event), with `transform.forward(x)` between the bounds, (N, D) each.

    Unit by unit, see `box_duals`; each stops by itself, where its coefficients agree to `tol` grey levels (times
    `JpegTransform.amplification`) with a point of the box at which the multipliers are normal to it. About ten iterations, but
    some hundred in the few units that the border of the image cuts, whose repeated samples make the problem ill-conditioned.
    The result is differentiable in z, see `Projected`.
    """
    count, point = z.shape[0], z.detach()
    seen, allowed = transform.forward(point), (tol / LEVELS * transform.amplification())[None]
    multipliers = torch.empty_like(seen)
    residual, work = z.new_zeros(count), z.new_zeros(count)
    for region in regions(transform.tables):
        v, low, high, wanted = (region.gather(transform, a) for a in (seen, *bounds, allowed))
        parts = zip(*(a.flatten(0, 1).split(CHUNK) for a in (v, low, high)), strict=True)
        found = [box_duals(region.gram(), a, (b, c), wanted[0, 0], max_iter) for a, b, c in parts]
        dual, errors, steps = (torch.cat(column) for column in zip(*found, strict=True))
        region.scatter(transform, dual.reshape(v.shape), multipliers)
        residual = residual.maximum(tol * errors.reshape(count, -1).amax(1))
        work = work + v.shape[2] * steps.reshape(count, -1).sum(1)
    x = Projected.apply(z, point - transform.adjoint(multipliers), transform, multipliers != 0)
    return Projection(x, residual, work / seen.shape[1])


class Projected(torch.autograd.Function):
    """The projection x of z with its derivative: v - T_a' (T_a T_a')^+ T_a v, which removes what active intervals hold fast.

    T_a are the rows of the transform whose coefficients lie at an end of their intervals, which stays so near z. The derivative is
    symmetric; its linear system is solved by conjugate gradients.
    """

    @staticmethod
    def forward(ctx: Any, z: Tensor, x: Tensor, transform: JpegTransform, active: Tensor) -> Tensor:
        """Return x; `active`, (N, D), says which coefficients lie at an end of their interval."""
        ctx.transform, ctx.active = transform, active.to(z.dtype)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        """Return the derivative applied to the gradient."""
        transform, active, (v,) = ctx.transform, ctx.active, grads

        def gram(c: Tensor) -> Tensor:
            return active * transform.forward(transform.adjoint(active * c)) + (1 - active) * c

        multipliers = cg(gram, active * transform.forward(v), tol=1e-4).x
        return v - transform.adjoint(active * multipliers), None, None, None


class JpegOperator(torch.nn.Module):
    """The coefficients of an image over their relative standard deviations, with the closed form of all functions of A'A."""

    def __init__(self, transform: JpegTransform, std: Tensor) -> None:
        super().__init__()
        self.transform, self.std = transform, std

    def A(self, x: Tensor) -> Tensor:
        """Return all coefficients over their relative standard deviations, (N, C, H, W) -> (N, D)."""
        return self.transform.forward(x) / self.std

    def A_adjoint(self, y: Tensor) -> Tensor:
        """Return the adjoint, (N, D) -> (N, C, H, W)."""
        return self.transform.adjoint(y / self.std)

    def spectrum(self, x: Tensor) -> Spectrum:
        """Return the closed form; `x` is not read."""
        return JpegSpectrum.of(self.transform, self.std)


def gaussian_jpeg(
    y: JpegMeasurement,
    step_std: float = UNIFORM,
    *,
    slack: float = 0.5,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> GaussianLikelihood:
    r"""Return the likelihood that takes the error of quantisation for Gaussian: q k = T x + n, n ~ N(0, (step_std q)^2 + slack^2).

    It offers all that linear-Gaussian likelihoods do (every method accepts it), and needs no iterations. Approximated: the error is
    uniform, of standard deviation q / sqrt(12), where many steps lie under the distribution of a coefficient; it is much
    smaller than that where nearly all coefficients round to 0, which a smaller `step_std` allows for.

    Args:
        y: what the files hold.
        step_std: standard deviation of the error in steps.
        slack: standard deviation of the encoder's other roundings in grey levels, more where the border cuts a block.
        dtype, device: of x.

    Raises:
        ValueError: `step_std` is not positive or `slack` is negative.
    """
    if not (step_std > 0 and slack >= 0):
        raise ValueError(f"need step_std > 0 and slack >= 0, got {step_std} and {slack}")
    transform = JpegTransform(y.tables, dtype, device)
    std = torch.hypot(step_std * transform.steps, slack / LEVELS * transform.amplification())
    # measured in units of the root mean square, so that sigma is on the scale of x, where learned samplers look for it
    sigma = float(std.square().mean().sqrt())
    operator = JpegOperator(transform, std / sigma)
    return GaussianLikelihood(centres(transform, y.indices) / operator.std, operator, sigma)


def straight_through(v: Tensor) -> Tensor:
    """Round, with the gradient of the identity."""
    return v + (v.round() - v).detach()


def soft_round(v: Tensor) -> Tensor:
    """Return a smooth stand-in for rounding, v - sin(2 pi v) / (2 pi): exact at the integers."""
    return v - torch.sin(2 * torch.pi * v) / (2 * torch.pi)


def jpeg(x: Tensor, tables: JpegTables, rounding: Callable[[Tensor], Tensor] = straight_through) -> Tensor:
    """Compress and decode images, (N, C, H, W) in [0, 1] -> the same: a JPEG that can be differentiated.

    Colours are not rounded on the way, chroma is repeated rather than interpolated, nothing is clipped.

    Args:
        x: images of the size and channels of the tables.
        tables: steps, sampling, size.
        rounding: of coefficients in units of their steps, `straight_through` or `soft_round`.
    """
    if tuple(x.shape[1:]) != tables.image_shape:
        raise ValueError(f"the tables are for images {tables.image_shape}, got {tuple(x.shape[1:])}")
    transform = JpegTransform(tables, x.dtype, x.device)
    shift = _level_shift(transform)
    scaled = (transform.forward(from_unit(x)) - shift) / transform.steps
    return to_unit(transform.decode(rounding(scaled) * transform.steps + shift))
