r"""log|det Df| in high dimension, by products with Df alone, with an error bar.

log|det J| = tr log(J'J) / 2 = (d / 2) E_v[v' log(J'J) v] over random unit vectors v. Each v' log(J'J) v is a Gauss quadrature of
m nodes from m Lanczos steps (Golub and Meurant 2010; Ubaru, Chen and Saad 2017, SIAM J. Matrix Anal. Appl. 38), exact for
m = d and off by a term that falls geometrically in m / sqrt(cond J'J). Neither a contraction nor a small step is assumed.

exp of an unbiased log-weight is biased upwards, so weights made with it bound log Z through E[log w], and no more.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.func import jvp, vjp

from fewstep.core.noise import Noise
from fewstep.densities.estimators.jacobian import Map, check_tangent


class Estimate(NamedTuple):
    """y = f(z), (N, d); an estimate of log|det Df(z)| and its standard error, (N,) float64 each."""

    y: Tensor
    log_abs: Tensor
    error: Tensor


def estimate_log_abs_det(function: Map, z: Tensor, noise: Noise, probes: int = 8, steps: int = 20) -> Estimate:
    """Return f(z) with an estimate of log|det Df(z)|: `probes * steps` products with Df and as many with its transpose.

    The error joins the spread over the probes and the last change of the quadrature.

    Args:
        function: see `jacobian.determinant`; differentiable in both modes.
        z: (N, d).
        noise: one stream per row.
        probes: random vectors per row, at least 2.
        steps: Lanczos steps, at most d are used.

    Raises:
        ValueError: fewer than two probes or steps, or what `jacobian.determinant` raises.
    """
    if probes < 2 or steps < 2:
        raise ValueError(f"an error bar needs two probes and two steps, got {probes} and {steps}")
    check_tangent(function, z)
    y, pull = vjp(function, z)[:2]

    def gram(v: Tensor) -> Tensor:
        return pull(jvp(function, (z,), (v.to(z),))[1])[0].detach().double()

    size = z.shape[1]
    values = []
    for _ in range(probes):
        start = torch.where(noise.randn_like(z) > 0, 1.0, -1.0).double() / size**0.5
        values.append(size / 2 * _quadrature(gram, start, min(steps, size)))
    both = torch.stack(values)  # (P, 2, N): of all nodes, and of one less
    found, cruder = both.mean(0)
    spread = both[:, 0].var(0) / probes
    return Estimate(y.detach(), found, (spread + (found - cruder).square()).sqrt())


def _quadrature(product: Callable[[Tensor], Tensor], start: Tensor, steps: int) -> Tensor:
    """Return start' log(A) start, (2, N), by Lanczos with full reorthogonalisation: of all steps, and of one less."""
    basis, diagonal, beside = [start], [], []
    for k in range(steps):
        w = product(basis[-1])
        diagonal.append((w * basis[-1]).sum(1))
        known = torch.stack(basis, 1)  # (N, k + 1, d)
        for _ in range(2):  # once is not enough in finite precision
            w = w - torch.einsum("nk,nkd->nd", torch.einsum("nkd,nd->nk", known, w), known)
        norm = w.norm(dim=1)
        alive = norm > 1e-10 * diagonal[0]
        beside.append(torch.where(alive, norm, 0.0))
        if k + 1 < steps:
            basis.append(torch.where(alive[:, None], w / norm.clamp_min(1e-300)[:, None], 0.0))
    matrix = torch.diag_embed(torch.stack(diagonal, 1))
    off = torch.diag_embed(torch.stack(beside, 1)[:, :-1], 1)
    matrix = matrix + off + off.mT
    return torch.stack([_first_entry_of_log(matrix[:, :m, :m]) for m in (steps, max(steps - 1, 1))])


def _first_entry_of_log(matrix: Tensor) -> Tensor:
    """Return e_1' log(T) e_1 of symmetric matrices, (N, m, m) -> (N,)."""
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors[:, 0].square() * values.clamp_min(1e-300).log()).sum(1)
