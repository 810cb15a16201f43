"""The linear part of JPEG: colour, chroma averaging, padding and the block DCT, with its adjoint.

The image is in the prior's coordinates [-1, 1]; coefficients are on that scale too (1 is 127.5 grey levels), those of an
orthonormal 8 x 8 DCT, which is what quantisation tables speak of.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fewstep.operators.jpeg_file import JpegFile

LEVELS = 127.5  # grey levels in a unit of the prior's coordinates
# of EXIF orientations: whether what is stored is transposed, and along which axes it is flipped then, to stand upright
_TURNS: dict[int, tuple[bool, tuple[int, ...]]] = {
    **{1: (False, ()), 2: (False, (-1,)), 3: (False, (-2, -1)), 4: (False, (-2,))},
    **{5: (True, ()), 6: (True, (-1,)), 7: (True, (-2, -1)), 8: (True, (-2,))},
}
_YCBCR = ((0.299, 0.587, 0.114), (-0.168735892, -0.331264108, 0.5), (0.5, -0.418687589, -0.081312411))


@dataclass(frozen=True)
class JpegTables:
    """Quantisation tables and geometry of a JPEG file.

    Attributes:
        steps: one table per component in natural order, (8, 8) each, in grey levels.
        sampling: (horizontal, vertical) sampling factor of each component.
        size: (height, width) of the image as it is stored.
        orientation: 1 to 8, how EXIF says that it is turned to stand upright.
    """

    steps: tuple[np.ndarray, ...]
    sampling: tuple[tuple[int, int], ...]
    size: tuple[int, int]
    orientation: int = 1

    @classmethod
    def of(cls, file: JpegFile, orientation: int = 1) -> JpegTables:
        """Return the tables of a parsed file."""
        steps = tuple(file.tables[c.table] for c in file.components)
        return cls(steps, tuple((c.h, c.v) for c in file.components), (file.height, file.width), orientation)

    def __eq__(self, other: object) -> bool:
        """Compare tables by value."""
        if not isinstance(other, JpegTables):
            return NotImplemented
        geometry = (self.sampling, self.size, self.orientation) == (other.sampling, other.size, other.orientation)
        same = geometry and len(self.steps) == len(other.steps)
        return same and all(np.array_equal(a, b) for a, b in zip(self.steps, other.steps, strict=True))

    def __hash__(self) -> int:
        """Hash the geometry."""
        return hash((self.sampling, self.size, self.orientation))

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of the upright image; grey files have one channel."""
        h, w = self.size
        return (len(self.steps), w, h) if _TURNS[self.orientation][0] else (len(self.steps), h, w)

    def upright(self, stored: Tensor) -> Tensor:
        """Return images as EXIF says that they stand, (..., H, W), from how they are stored, (..., *size)."""
        transposed, axes = _TURNS[self.orientation]
        return (stored.mT if transposed else stored).flip(axes)

    def stored(self, upright: Tensor) -> Tensor:
        """Return images as they are stored; undoes `upright`."""
        transposed, axes = _TURNS[self.orientation]
        flipped = upright.flip(axes)
        return flipped.mT if transposed else flipped


class JpegTransform:
    """x, (N, C, H, W) and upright, to all coefficients, (N, D): component by component, block by block.

    Padding follows libjpeg: columns repeat the last pixel before chroma is averaged, rows repeat the last averaged row. Other
    encoders may fill the last blocks of an image whose sides are no multiple of the unit (8 or 16 pixels) differently.

    Args:
        tables: geometry and steps.
        dtype, device: of what it works on.
    """

    def __init__(self, tables: JpegTables, dtype: torch.dtype, device: torch.device | str = "cpu") -> None:
        self.tables = tables
        self.colour = torch.tensor(_YCBCR if len(tables.steps) == 3 else ((1.0,),), dtype=dtype, device=device)
        self.basis = dct_matrix(8).to(device, dtype)
        self.rows, self.columns = [], []
        highest_h, highest_v = (max(s[i] for s in tables.sampling) for i in (0, 1))
        for h, v in tables.sampling:
            if highest_h % h or highest_v % v:
                raise ValueError(f"sampling factors {tables.sampling} are not multiples of each other")
            self.rows.append(_members(tables.size[0], highest_v // v, False).to(device))
            self.columns.append(_members(tables.size[1], highest_h // h, True).to(device))
        steps = [np.tile(q.reshape(-1), self.blocks(i)[0] * self.blocks(i)[1]) for i, q in enumerate(tables.steps)]
        self.steps = torch.tensor(np.concatenate(steps), dtype=dtype, device=device) / LEVELS

    def blocks(self, component: int) -> tuple[int, int]:
        """Return the rows and columns of blocks of a component."""
        return self.rows[component].shape[0] // 8, self.columns[component].shape[0] // 8

    def forward(self, x: Tensor) -> Tensor:
        """Return all coefficients, (N, C, H, W) -> (N, D)."""
        planes = torch.einsum("dc,nchw->ndhw", self.colour, self.tables.stored(x))
        out = []
        for i, (rows, columns) in enumerate(zip(self.rows, self.columns, strict=True)):
            plane = planes[:, i].index_select(1, rows.flatten()).unflatten(1, rows.shape).mean(2)
            plane = plane.index_select(2, columns.flatten()).unflatten(2, columns.shape).mean(3)
            out.append((self.basis @ _cut(plane) @ self.basis.T).flatten(1))
        return torch.cat(out, 1)

    def adjoint(self, coefficients: Tensor) -> Tensor:
        """Return the transpose of `forward`, (N, D) -> (N, C, H, W)."""
        planes = []
        height, width = self.tables.size
        for plane, rows, columns in zip(self.planes(coefficients), self.rows, self.columns, strict=True):
            n = plane.shape[0]
            spread = (plane / columns.shape[1]).repeat_interleave(columns.shape[1], 2)
            part = plane.new_zeros(n, plane.shape[1], width).index_add_(2, columns.flatten(), spread)
            spread = (part / rows.shape[1]).repeat_interleave(rows.shape[1], 1)
            planes.append(plane.new_zeros(n, height, width).index_add_(1, rows.flatten(), spread))
        return self.tables.upright(torch.einsum("dc,ndhw->nchw", self.colour, torch.stack(planes, 1)))

    def planes(self, coefficients: Tensor) -> list[Tensor]:
        """Return the padded colour planes that coefficients (N, D) stand for, (N, h, w) each."""
        shapes = [self.blocks(i) for i in range(len(self.rows))]
        parts = coefficients.split([64 * r * c for r, c in shapes], 1)
        blocks = (p.reshape(-1, r, c, 8, 8) for p, (r, c) in zip(parts, shapes, strict=True))
        return [_join(self.basis.T @ b @ self.basis) for b in blocks]

    def decode(self, coefficients: Tensor) -> Tensor:
        """Return the image of coefficients with chroma repeated, (N, D) -> (N, C, H, W): a right inverse of `forward`."""
        height, width = self.tables.size
        full = []
        for plane, rows, columns in zip(self.planes(coefficients), self.rows, self.columns, strict=True):
            wide = plane.repeat_interleave(rows.shape[1], 1).repeat_interleave(columns.shape[1], 2)
            full.append(wide[:, :height, :width])
        return self.tables.upright(torch.einsum("cd,ndhw->nchw", torch.linalg.inv(self.colour), torch.stack(full, 1)))

    def amplification(self) -> Tensor:
        """Return by how much padding amplifies a block, (D,): 1 but in blocks that the border of the image cuts."""
        factors = []
        for rows, columns in zip(self.rows, self.columns, strict=True):
            norms = torch.outer(_block_norms(rows), _block_norms(columns)) * rows.shape[1] * columns.shape[1]
            factors.append(norms.sqrt().flatten().repeat_interleave(64))
        return torch.cat(factors).to(self.steps)


def dct_matrix(size: int) -> Tensor:
    """Return the orthonormal DCT-II, (size, size), float64: row k is the k-th basis vector."""
    k = torch.arange(size, dtype=torch.float64)
    basis = torch.cos(math.pi / size * torch.outer(k, k + 0.5)) * math.sqrt(2 / size)
    basis[0] /= math.sqrt(2)
    return basis


def _members(length: int, ratio: int, fill_before: bool) -> Tensor:
    """Return which of `length` pixels are averaged into each sample of a padded line, (8 * blocks, ratio)."""
    samples = -(-length // ratio)
    padded = torch.arange(-(-samples // 8) * 8)
    if not fill_before:
        padded = padded.clamp_max(samples - 1)
    return (padded[:, None] * ratio + torch.arange(ratio)).clamp_max(length - 1)


def _block_norms(members: Tensor) -> Tensor:
    """Return the squared norm of padding and averaging, seen by each block of eight samples, (blocks,)."""
    blocks = members.reshape(-1, 8, members.shape[1])
    shared = (blocks[:, :, None, :, None] == blocks[:, None, :, None, :]).double().sum((-1, -2))
    return torch.linalg.eigvalsh(shared / members.shape[1] ** 2)[:, -1]


def _cut(plane: Tensor) -> Tensor:
    """Return a plane as blocks, (N, 8 r, 8 c) -> (N, r, c, 8, 8)."""
    n, h, w = plane.shape
    return plane.reshape(n, h // 8, 8, w // 8, 8).transpose(2, 3)


def _join(blocks: Tensor) -> Tensor:
    """Return blocks as a plane, (N, r, c, 8, 8) -> (N, 8 r, 8 c)."""
    n, r, c = blocks.shape[:3]
    return blocks.transpose(2, 3).reshape(n, 8 * r, 8 * c)
