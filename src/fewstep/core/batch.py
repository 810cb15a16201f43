"""Per-item arithmetic: every reduction in the library runs over the event, never over the batch."""

from __future__ import annotations

import torch
from torch import Tensor


def like(a: Tensor | float, x: Tensor) -> Tensor:
    """View a scalar or per-item `a`, () or (N,), as something that broadcasts against `x`, (N, *event)."""
    a = torch.as_tensor(a, dtype=x.dtype, device=x.device)
    if a.ndim == 0:
        return a
    if a.ndim == x.ndim:
        return a
    if a.ndim != 1 or a.shape[0] not in (1, x.shape[0]):
        raise ValueError(f"expected a scalar or one value per item ({x.shape[0]}), got shape {tuple(a.shape)}")
    return a.reshape(-1, *[1] * (x.ndim - 1))


def item_dot(a: Tensor, b: Tensor) -> Tensor:
    """Inner product of each item, (N, *event) x (N, *event) -> (N,)."""
    return (a * b).flatten(1).sum(1)


def item_norm(a: Tensor) -> Tensor:
    """Euclidean norm of each item, (N, *event) -> (N,)."""
    return torch.linalg.vector_norm(a.flatten(1), dim=1)
