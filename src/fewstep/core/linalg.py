"""Conjugate gradients whose every decision is per item: stopping one system never changes another."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fewstep.core.batch import item_dot, item_norm, like


class Unconverged(UserWarning):
    """An iterative solver stopped before its tolerance."""


class CGResult(NamedTuple):
    """Solution (N, *event), relative residual (N,) and iterations used (N,)."""

    x: Tensor
    residual: Tensor
    iterations: Tensor


def cg(
    operator: Callable[[Tensor], Tensor],
    b: Tensor,
    x: Tensor | None = None,
    *,
    preconditioner: Callable[[Tensor], Tensor] | None = None,
    tol: float = 1e-6,
    max_iter: int = 200,
) -> CGResult:
    """Solve `operator`(x) = b for a symmetric positive definite operator that acts on each item alone.

    An item stops when |residual| <= tol |b| and is then frozen, so its result does not depend on the others. The operator
    must be linear; the result is differentiable through the iterations. Each system is solved in a unit of its own, a power of
    two, so that the squares of very large or small numbers neither overflow nor vanish. An item whose residual is not finite
    all the same comes back as NaN.

    Args:
        operator: (N, *event) -> (N, *event).
        b: right-hand side, (N, *event).
        x: start, zero when absent.
        preconditioner: an approximate inverse of `operator`, symmetric and positive definite, (N, *event) -> (N, *event).
        tol: relative residual at which an item is done.
        max_iter: the most iterations; what is reached by then is returned with its residual.
    """
    unit = like(_unit(b), b)
    b = b / unit
    precondition = preconditioner or (lambda r: r)
    x, r = (torch.zeros_like(b), b) if x is None else (x / unit, b - operator(x / unit))
    p = precondition(r)
    rr, rz = item_dot(r, r), item_dot(r, p)
    tiny = torch.finfo(rr.dtype).tiny
    scale = item_norm(b).clamp_min(tiny)
    count = torch.zeros_like(rr, dtype=torch.long)
    for _ in range(max_iter):
        active = rr.detach().sqrt() > tol * scale.detach()
        if not bool(active.any()):
            break
        q = operator(p)
        curvature = item_dot(p, q)
        step = torch.where(active & (curvature > 0), rz / curvature.clamp_min(tiny), 0.0)
        x, r = x + like(step, x) * p, r - like(step, r) * q
        z = precondition(r)
        new = item_dot(r, z)
        beta = torch.where(active, new / rz.clamp_min(tiny), 0.0)
        p = torch.where(like(active.to(r.real.dtype), r.real).bool(), z + like(beta, p) * p, p)
        rr, rz = torch.where(active, item_dot(r, r), rr), torch.where(active, new, rz)
        count = count + active
    x = torch.where(torch.isfinite(like(rr, b)), x * unit, torch.nan)
    return CGResult(x, rr.sqrt() / scale, count)


def _unit(b: Tensor) -> Tensor:
    """Return the power of two that is nearest below the largest entry of each item, (N,): dividing by it is exact."""
    largest = b.detach().abs().flatten(1).amax(1)
    return torch.ldexp(torch.ones_like(largest), torch.frexp(largest).exponent - 1)
