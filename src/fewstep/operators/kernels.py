"""Blur kernels, (1, 1, h, w), that sum to one: made from parameters, or read from a file."""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fewstep.images import DAMAGE, TOO_LARGE
from fewstep.operators.image import deepinv_physics

_LARGEST = 4096  # pixels along the edge of a kernel: more would fill the memory


def gaussian_kernel(width: float) -> Tensor:
    """Return an isotropic Gaussian, (1, 1, size, size), in float64; its size is four standard deviations to each side.

    Args:
        width: its standard deviation in pixels; positive.
    """
    if not 0 < width <= _LARGEST / 8:
        raise ValueError(f"the width of a Gaussian kernel must be positive and at most {_LARGEST // 8}, got {width}")
    size = 2 * max(1, int(np.ceil(4 * width))) + 1
    offsets = torch.arange(size, dtype=torch.float64) - (size - 1) / 2
    profile = torch.exp(-0.5 * (offsets / width) ** 2)
    return normalise(torch.outer(profile, profile))


def uniform_kernel(size: int) -> Tensor:
    """Return a box, (1, 1, size, size), in float64."""
    if not 1 <= size <= _LARGEST:
        raise ValueError(f"the size of a kernel must be from 1 to {_LARGEST}, got {size}")
    return normalise(torch.ones(size, size, dtype=torch.float64))


def motion_kernel(size: int, seed: int = 0, length: float = 0.3, spread: float = 0.25) -> Tensor:
    """Return the blur of a random smooth trajectory, (1, 1, size, size), in float64; the seed decides it alone.

    The trajectory is a Gaussian process with a Matern covariance (Schuler et al. 2015, arXiv:1406.7444), drawn by deepinv.

    Args:
        size: edge length.
        seed: of its own generator.
        length: length scale of the process in units of its duration; larger is straighter.
        spread: standard deviation of the process in units of half the kernel; larger is longer.
    """
    if not 2 <= size <= _LARGEST:
        raise ValueError(f"the size of a motion kernel must be from 2 to {_LARGEST}, got {size}")
    if not (length > 0 and spread > 0):
        raise ValueError(f"length and spread must be positive, got {length} and {spread}")
    kind = deepinv_physics().generator.MotionBlurGenerator
    if not -(1 << 63) <= seed < 1 << 64:
        raise ValueError(f"kernel_seed must fit into 64 bits, got {seed}")
    draw = kind((size, size), rng=torch.Generator().manual_seed(seed), l=length, sigma=spread)
    return normalise(draw.step()["filter"][0, 0].double())


def load_kernel(path: str | Path, index: int = 0) -> Tensor:
    """Return a kernel from a file, (1, 1, h, w), in float64 and normalised to sum one.

    Args:
        path: PNG (grey value), npy (an array (h, w) or a stack (n, h, w)), or mat (any version; the numeric
            matrices and stacks (h, w, n) of all variables and cells, in their order).
        index: which, where the file holds several.

    Raises:
        ValueError: the file cannot be read, has no kernel of that index, or the kernel is not finite, negative in a
            pixel, or zero.
    """
    path = Path(path)
    readers = {".png": _from_png, ".npy": _from_npy, ".mat": _from_mat}
    if path.suffix.lower() not in readers:
        raise ValueError(f"{path}: a kernel is read from {', '.join(readers)}")
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    found = readers[path.suffix.lower()](path)
    if not 0 <= index < len(found):
        raise ValueError(f"{path} holds {len(found)} kernels, there is no index {index}")
    try:
        return normalise(torch.from_numpy(np.array(found[index], dtype=np.float64)))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def normalise(kernel: Tensor) -> Tensor:
    """Return a kernel (h, w) as (1, 1, h, w) with sum one; ValueError unless finite, nonnegative and not zero."""
    if not bool(torch.isfinite(kernel).all()):
        raise ValueError("the kernel holds NaN or infinite values")
    if bool((kernel < 0).any()):
        raise ValueError("the kernel has negative values")
    if not float(total := kernel.sum()) > 0:
        raise ValueError("the kernel is zero")
    return (kernel / total)[None, None]


def _from_png(path: Path) -> list[np.ndarray]:
    try:
        with Image.open(path) as image:
            pixels = np.asarray(image if image.mode.startswith("I") else image.convert("L"))
    except (*DAMAGE, *TOO_LARGE) as error:
        raise ValueError(f"{path} cannot be read as an image ({error})") from None
    return [pixels]


def _from_npy(path: Path) -> list[np.ndarray]:
    try:
        array = np.load(path, allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise ValueError(f"{path} cannot be read as an array ({error})") from None
    if array.ndim not in (2, 3) or array.dtype.kind not in "biuf":
        raise ValueError(f"{path} holds {array.dtype} of shape {array.shape}, a kernel is real, (h, w) or (n, h, w)")
    return [array] if array.ndim == 2 else list(array)


def _from_mat(path: Path) -> list[np.ndarray]:
    from scipy.io import loadmat  # slow to import, needed here only
    from scipy.io.matlab import MatReadError

    try:
        content = loadmat(path)
    except NotImplementedError:  # scipy says so of version 7.3, which is HDF5
        return _from_hdf5(path)
    except (ValueError, OSError, TypeError, IndexError, zlib.error, MatReadError) as error:
        raise ValueError(f"{path} cannot be read as a mat file ({error})") from None
    found: list[np.ndarray] = []
    for name, value in content.items():
        if not name.startswith("__"):
            _collect(value, found)
    return found


def _from_hdf5(path: Path) -> list[np.ndarray]:
    import h5py  # comes with deepinv

    found: list[np.ndarray] = []
    try:
        with h5py.File(path) as file:
            for name, node in file.items():
                if not name.startswith("#") and isinstance(node, h5py.Dataset):
                    # Matlab stores columns first, and cells as references
                    cells = node[()].flat if node.dtype == h5py.ref_dtype else [node]
                    for cell in cells:
                        _collect(np.asarray(file[cell] if isinstance(cell, h5py.Reference) else cell).T, found)
    except OSError as error:
        raise ValueError(f"{path} cannot be read as a mat file ({error})") from None
    return found


def _collect(value: Any, found: list[np.ndarray]) -> None:
    """Append the matrices in a variable of a mat file, looking into cells; a stack of them is (h, w, n) in Matlab."""
    if not isinstance(value, np.ndarray):
        return
    if value.dtype == object:
        for cell in value.flat:
            _collect(cell, found)
    elif value.ndim in (2, 3) and value.size > 1 and value.dtype.kind in "biuf":
        found.extend([value] if value.ndim == 2 else np.moveaxis(value, -1, 0))
