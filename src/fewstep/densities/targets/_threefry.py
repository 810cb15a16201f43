"""The uniform numbers that `jax.random.uniform(jax.random.PRNGKey(seed), ...)` gave before JAX 0.5, for published targets."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))


def uniform(seed: int, rows: int, columns: int, low: float, high: float) -> Tensor:
    """Return float32 numbers in [low, high), (rows, columns), rows x columns even.

    Threefry-2x32 with 20 rounds on the counters 0, 1, ..., the first half paired with the second (Salmon et al. 2011, SC).
    """
    count = np.arange(rows * columns, dtype=np.uint32)
    half = len(count) // 2
    bits = np.concatenate(_threefry(np.uint32(seed >> 32), np.uint32(seed & 0xFFFFFFFF), count[:half], count[half:]))
    unit = ((bits >> np.uint32(9)) | np.uint32(0x3F800000)).view(np.float32) - np.float32(1)
    return torch.from_numpy(unit * np.float32(high - low) + np.float32(low)).reshape(rows, columns)


def _threefry(k0: np.uint32, k1: np.uint32, a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    keys = (k0, k1, k0 ^ k1 ^ np.uint32(0x1BD11BDA))
    a, b = a + keys[0], b + keys[1]
    for i in range(5):
        for r in _ROTATIONS[i % 2]:
            a = a + b
            b = a ^ ((b << np.uint32(r)) | (b >> np.uint32(32 - r)))
        a, b = a + keys[(i + 1) % 3], b + keys[(i + 2) % 3] + np.uint32(i + 1)
    return a, b
