"""A picture as a density in the plane."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from PIL import Image as Pictures
from scipy.ndimage import gaussian_filter
from torch import Tensor

from fewstep.core.density import TargetDensity
from fewstep.core.noise import Noise


@dataclass(frozen=True)
class Image(TargetDensity):
    """The blurred darkness of an image file plus a floor, linear between pixels in each direction, on a box in the plane.

    Such a density has a closed integral, and exact samples: a cell, then a place in it. The picture of Richter and Berner 2024,
    arXiv:2307.01198, extends every pixel by its own slopes, which leaves jumps and no log Z; it is not this one.

    Args:
        data: an image file.
        size: pixels on the longer side after resizing.
        blur: standard deviation of the blur, in pixels.
        floor: added to the density, in units of its largest value.
        reach: the longer side runs from -reach to reach.
        bright: whether bright parts carry the mass instead of dark ones.

    Raises:
        ValueError: a file that is no image, or a density that is zero everywhere.
    """

    data: str | Path
    size: int = 128
    blur: float = 1.0
    floor: float = 0.01
    reach: float = 3.5
    bright: bool = False

    dim = 2

    @cached_property
    def nodes(self) -> Tensor:
        """The density at the nodes, (H, W), row 0 at the bottom, largest value 1 + floor, float64."""
        try:
            with Pictures.open(self.data) as picture:
                grey = picture.convert("L")
        except OSError as error:
            raise ValueError(f"{self.data} cannot be read as an image ({error})") from None
        share = self.size / max(grey.size)
        grey = grey.resize((max(2, round(grey.width * share)), max(2, round(grey.height * share))))
        light = np.asarray(grey, dtype=float)[::-1] / 255
        value = gaussian_filter(light if self.bright else 1 - light, self.blur)
        if not value.max() > 0:
            raise ValueError(f"{self.data} holds no mass: try bright={not self.bright}")
        return torch.from_numpy(np.ascontiguousarray(value / value.max() + self.floor))

    @cached_property
    def support(self) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """See `TargetDensity`: the box."""
        height, width = self.nodes.shape
        high = self.reach * torch.tensor([width - 1, height - 1], dtype=torch.float64) / (max(height, width) - 1)
        return -high, high

    @cached_property
    def log_z(self) -> float:  # type: ignore[override]
        """See `TargetDensity`: each cell's integral is its area times the mean of its corners."""
        return float((self._cells.sum() * self._spacing**2).log())

    def log_prob(self, x: Tensor) -> Tensor:
        """See `TargetDensity`."""
        corners, s, t, inside = self._place(x)
        (a, b), (c, d) = corners
        value = (1 - t) * ((1 - s) * a + s * b) + t * ((1 - s) * c + s * d)
        return torch.where(inside, value.log(), -torch.inf)

    def score(self, x: Tensor) -> Tensor:
        """See `TargetDensity`; constant corners, so the gradient inside a cell, zero outside the box."""
        corners, s, t, inside = self._place(x)
        (a, b), (c, d) = corners
        value = (1 - t) * ((1 - s) * a + s * b) + t * ((1 - s) * c + s * d)
        slope = torch.stack([(1 - t) * (b - a) + t * (d - c), (1 - s) * (c - a) + s * (d - b)], 1)
        return torch.where(inside[:, None], slope / value[:, None] / self._spacing, 0.0)

    def sample(self, noise: Noise) -> Tensor:
        """See `TargetDensity`: a cell by its integral, s by its marginal, t given s, both linear densities."""
        u = noise.rand(3).double().cpu()
        width = self._cells.shape[1]
        cell = torch.searchsorted(self._cells.flatten().cumsum(0) / self._cells.sum(), u[:, 0].contiguous())
        cell = cell.clamp_max(self._cells.numel() - 1)
        row, column = cell // width, cell % width
        (a, b), (c, d) = self._corners(row, column, torch.float64)
        s = _linear(a + c, b + d, u[:, 1])
        t = _linear((1 - s) * a + s * b, (1 - s) * c + s * d, u[:, 2])
        place = torch.stack([column + s, row + t], 1) * self._spacing + self.support[0]
        return place.to(noise.device, noise.dtype)

    @property
    def _spacing(self) -> float:
        return 2 * self.reach / (max(self.nodes.shape) - 1)

    @cached_property
    def _cells(self) -> Tensor:
        """The mean density of every cell, (H - 1, W - 1)."""
        p = self.nodes
        return (p[1:, 1:] + p[1:, :-1] + p[:-1, 1:] + p[:-1, :-1]) / 4

    def _corners(self, row: Tensor, column: Tensor, dtype: torch.dtype) -> tuple[tuple[Tensor, Tensor], ...]:
        p = self.nodes.to(row.device, dtype)
        return (p[row, column], p[row, column + 1]), (p[row + 1, column], p[row + 1, column + 1])

    def _place(self, x: Tensor) -> tuple[tuple[tuple[Tensor, Tensor], ...], Tensor, Tensor, Tensor]:
        """Return the corners of each item's cell, its place in it, and whether it lies in the box."""
        low, high = (side.to(x) for side in self.support)
        inside = ((x >= low) & (x <= high)).all(1)
        place = (x - low) / self._spacing
        last = torch.tensor(self._cells.shape[::-1], device=x.device) - 1
        cell = torch.minimum(place.detach().nan_to_num().clamp(0, max(self.nodes.shape)).long(), last)
        s, t = (place - cell).unbind(1)
        return self._corners(cell[:, 1], cell[:, 0], x.dtype), s, t, inside


def _linear(p: Tensor, q: Tensor, u: Tensor) -> Tensor:
    """Return the quantile u of the density on [0, 1] that runs linearly from p to q."""
    return u * (p + q) / (p + (p.square() + u * (q.square() - p.square())).sqrt())
