"""Per-item arithmetic: every reduction in the library runs over the event, never over the batch."""

from __future__ import annotations

import torch
from torch import Tensor


def like(a: Tensor | float, x: Tensor) -> Tensor:
    """View a scalar or per-item `a`, () or (N,), as something that broadcasts against `x`, (N, *event)."""
    a = torch.as_tensor(a, dtype=x.dtype, device=x.device)
    if a.ndim in (0, x.ndim):
        return a
    if a.ndim != 1 or a.shape[0] not in (1, x.shape[0]):
        raise ValueError(f"expected a scalar or one value per item ({x.shape[0]}), got shape {tuple(a.shape)}")
    return a.reshape(-1, *[1] * (x.ndim - 1))


def tile(a: Tensor, k: int) -> Tensor:
    """Return what belongs to B measurements once for each of k samples, (B, ...) -> (k B, ...).

    Sample i of measurement b is item n = i B + b, so that `x.reshape(k, B, ...)` has them apart again.
    """
    return a.repeat(k, *[1] * (a.ndim - 1))


def real_rows(a: Tensor) -> Tensor:
    """View each item as a row of real numbers, (N, *event) -> (N, M); of complex ones real and imaginary parts in turns."""
    return (torch.view_as_real(a) if a.is_complex() else a).flatten(1)


def item_dot(a: Tensor, b: Tensor) -> Tensor:
    """Real part of the inner product <a, b> of each item, (N, *event) x (N, *event) -> (N,)."""
    return (a * b.conj()).real.flatten(1).sum(1)


def item_norm(a: Tensor) -> Tensor:
    """Euclidean norm of each item, (N, *event) -> (N,)."""
    return torch.linalg.vector_norm(a.flatten(1), dim=1)
