"""Photographs for training: a folder in memory, and crops that depend on nothing but a seed, a step and an index."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from fewstep.images import list_photos, read_photo

T = TypeVar("T")
SUFFIXES = (".jpg", ".jpeg", ".png")


def list_images(folder: str | Path) -> list[Path]:
    """Return the jpg and png files of `folder` in sorted order; ValueError where there are none."""
    return list_photos(folder, SUFFIXES)


def load_pixels(path: Path, least: int = 1) -> Tensor:
    """Return one image as uint8, (3, H, W), as `images.read_photo` reads it.

    Raises:
        ValueError: it cannot be read, or a side has fewer than `least` pixels.
    """
    x = read_photo(path).x[0]
    if min(x.shape[-2:]) < least:
        raise ValueError(f"{path} has {x.shape[-1]} x {x.shape[-2]} pixels: too small for crops of {least}")
    return (x * 255).round().to(torch.uint8)


def from_bytes(image: Tensor) -> Tensor:
    """Return uint8 pixels as float32 in [-1, 1]."""
    return image.float() / 127.5 - 1


@dataclass(frozen=True)
class CropShape:
    """`count` crops of `size` x `size` pixels, the batch of one step over all processes."""

    count: int
    size: int


@dataclass(frozen=True)
class RandomCrops:
    """Random square crops, flipped and turned in the eight ways of the square.

    Step k takes the shape `cycle[k % len(cycle)]`. Item i of step k depends on (seed, k, i) only, whatever the number of
    processes.

    Attributes:
        images: uint8 images, (3, H, W) each, of any sizes.
        cycle: the shapes of the batches, in turn.
        seed: seed of the choice of image, place and orientation.
    """

    images: Sequence[Tensor] = field(repr=False)
    cycle: tuple[CropShape, ...] = (CropShape(16, 64), CropShape(16, 64), CropShape(16, 64), CropShape(4, 128))
    seed: int = 0

    def __post_init__(self) -> None:
        size = largest(self.cycle)
        for number, image in enumerate(self.images):
            if min(image.shape[-2:]) < size:
                raise ValueError(f"image {number} is {tuple(image.shape[-2:])}: too small for crops of {size}")

    def count(self, step: int) -> int:
        """Return the number of items of this step, over all processes."""
        return self.cycle[step % len(self.cycle)].count

    def batch(self, step: int, items: Iterable[int]) -> Tensor:
        """Return the given items of this step, (N, 3, size, size) in [-1, 1]."""
        size = self.cycle[step % len(self.cycle)].size
        return from_bytes(torch.stack([self._crop(np.random.default_rng((self.seed, step, i)), size) for i in items]))

    def _crop(self, rng: np.random.Generator, size: int) -> Tensor:
        image = self.images[int(rng.integers(len(self.images)))]
        top, left = (int(rng.integers(side - size + 1)) for side in image.shape[-2:])
        crop = torch.rot90(image[:, top : top + size, left : left + size], int(rng.integers(4)), (1, 2))
        return crop.flip(2) if rng.integers(2) else crop


def crop_shapes(pairs: Any) -> tuple[CropShape, ...]:
    """Return the shapes that a recipe gives as [[count, size], ...]; ValueError where it does not."""
    try:
        shapes = tuple(CropShape(int(count), int(size)) for count, size in pairs)
    except (TypeError, ValueError):
        shapes = ()
    if not shapes or min(min(shape.count, shape.size) for shape in shapes) < 1:
        raise ValueError(f"crops must be pairs of positive numbers, [[count, size], ...], got {pairs!r}")
    return shapes


def largest(cycle: Iterable[CropShape]) -> int:
    """Return the side of the largest crops."""
    return max(shape.size for shape in cycle)


def split(images: Sequence[T], holdout: Any) -> tuple[Sequence[T], Sequence[T]]:
    """Return all but the last `holdout` images, and those; ValueError where one part would be empty."""
    if not isinstance(holdout, int) or not 0 < holdout < len(images):
        raise ValueError(f"holdout is {holdout!r}, but there are {len(images)} images, of which some must be left")
    return images[:-holdout], images[-holdout:]


def centre_crop(image: Tensor, size: int) -> Tensor:
    """Return the middle pixels of `image`, (..., H, W), as (..., size, size); ValueError where it is smaller."""
    top, left = ((side - size) // 2 for side in image.shape[-2:])
    if top < 0 or left < 0:
        raise ValueError(f"an image of {tuple(image.shape[-2:])} pixels is too small for crops of {size}")
    return image[..., top : top + size, left : left + size].contiguous()


def centre_batch(images: Sequence[Tensor], size: int) -> Tensor:
    """Return the middle `size` x `size` pixels of uint8 images, (3, H, W) each, as (N, 3, size, size) in [-1, 1]."""
    return from_bytes(torch.stack([centre_crop(image, size) for image in images]))
