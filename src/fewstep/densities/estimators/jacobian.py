r"""log|det Df| of a map z -> y = f(z) from R^d to R^d: exact by forward mode, or by Lanczos with an error bar in high dimension.

With z ~ p_0 and f injective the weight of y for an unnormalised density rho is w = rho(y) |det Df(z)| / p_0(z), and E[w] is
the mass of rho on the image of f: Z where f is onto. Where f folds, a sign of det Df that changes between draws proves it, and
E[w] counts the mass once per preimage; with the sign, rho(y) det Df(z) / p_0(z), as often as the degree of f says.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.func import jvp, vmap

from fewstep.core.noise import Streams

Map = Callable[[Tensor], Tensor]  # (N, d) -> (N, d), each row from its own row alone


class Determinant(NamedTuple):
    """What is known of f at N points: y = f(z), (N, d), the sign of det Df, (N,), and log|det Df|, (N,) float64."""

    y: Tensor
    sign: Tensor
    log_abs: Tensor


def determinant(function: Map, z: Tensor, chunk: int | None = None) -> Determinant:
    """Return f(z) with the sign and the logarithm of its Jacobian determinant, exact up to rounding.

    Args:
        function: f, differentiable by forward mode: no `detach`, `no_grad` or in-place writes between z and y.
        z: (N, d).
        chunk: rows at a time, of which each costs d tangents; so many that 2^16 tangents are alive where absent.

    Raises:
        ValueError: f hides part of how it depends on z from differentiation, or changes the shape.
    """
    check_tangent(function, z)
    rows = chunk or max(1, 2**16 // z.shape[1])
    parts = []
    for part in z.split(rows):
        y, jacobian = jacobians(function, part)
        sign, log_abs = torch.linalg.slogdet(jacobian.double())
        parts.append((y, sign, log_abs))
    return Determinant(*(torch.cat(column) for column in zip(*parts, strict=True)))


def jacobians(function: Map, z: Tensor) -> tuple[Tensor, Tensor]:
    """Return f(z), (N, d), and Df(z), (N, d, d), by d tangents pushed forward at once."""
    basis = torch.eye(z.shape[1], dtype=z.dtype, device=z.device)

    y, columns = vmap(lambda direction: jvp(function, (z,), (direction.expand_as(z),))[:2])(basis)
    return y[0].detach(), columns.permute(1, 2, 0).detach()


def check_tangent(function: Map, like: Tensor, rows: int = 16) -> None:
    """Compare directional derivatives with difference quotients: what `detach` hides would silently be left out.

    At points of its own, in the dimension, type and place of `like`, (N, d): a few given ones may all lie where the map is steep.
    """
    z = Streams(0, range(rows)).randn(like.shape[1]).to(like)
    direction = torch.sin(torch.arange(1, z.shape[1] + 1, dtype=z.dtype, device=z.device)).expand_as(z)
    step = torch.finfo(z.dtype).eps ** (1 / 3)
    with torch.no_grad():
        quotient = (function(z + step * direction) - function(z - step * direction)) / (2 * step)
    y, tangent = jvp(function, (z,), (direction,))[:2]
    if y.shape != z.shape:
        raise ValueError(f"a map of R^d must keep the shape: {tuple(z.shape)} became {tuple(y.shape)}")
    error = (tangent - quotient).norm(dim=1) / quotient.norm(dim=1).clamp_min(torch.finfo(z.dtype).tiny)
    if bool(error.nanmedian() > 0.1):
        raise ValueError(
            f"forward-mode derivatives of the map are off by {float(error.nanmedian()):.0%}: something between z and y is "
            "hidden from differentiation (detach, no_grad, a score by torch.autograd instead of torch.func)"
        )
