r"""Optimal transport between two sets of samples, (N, D) and (M, D), by POT; and what any distance is between equal laws.

Distances of samples do not vanish where the laws are equal, and in high dimension they hardly fall with N: read each against
`noise_floor`, its value between two sets of exact draws of the same sizes. A value below the floor is a fault too: samples that
are too narrow score better than exact ones.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fewstep.metrics.distances import check_sets
from fewstep.metrics.quality import Missing

_EXACT = "donot_use_mm_for_euclid_dist"  # differences of near points must not cancel


def sliced_wasserstein(a: Tensor, b: Tensor, projections: int = 64, seed: int = 0) -> float:
    """Return the sliced 2-Wasserstein distance of samples, (N, D) and (M, D), on directions fixed by `seed`; by POT.

    Rabin et al. 2011, SSVM: the root of the mean over directions of the squared distance in one dimension.

    Raises:
        ValueError: different D, or POT is not installed.
    """
    check_sets(a, b, rows=1)
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(a.shape[1], projections, generator=generator, dtype=a.dtype).to(a.device)
    return float(_pot().sliced_wasserstein_distance(a, b, p=2, projections=directions / directions.norm(dim=0)))


def wasserstein(a: Tensor, b: Tensor, p: int = 2) -> float:
    """Return W_p(a, b) = (min_P sum P_ij |a_i - b_j|^p)^(1/p) of equally weighted samples, exactly, by a linear programme.

    Seconds for a few thousand rows; time grows with the cube.

    Raises:
        ValueError: different D, NaN, p below 1, or no convergence.
        Missing: POT is not installed.
    """
    cost = _cost(a, b, p)
    value, log = _pot().emd2([], [], cost.numpy(), numItermax=10_000_000, log=True)
    if log["warning"]:
        raise ValueError(f"optimal transport did not converge: {log['warning']}")
    return float(value) ** (1 / p)


def sinkhorn_divergence(
    a: Tensor, b: Tensor, p: int = 2, *, epsilon: float | None = None, tolerance: float = 1e-3, iterations: int = 20_000
) -> float:
    """Return OT_e(a, b) - (OT_e(a, a) + OT_e(b, b)) / 2 with cost |x - y|^p, each converged; not a root is taken.

    Debiased, so zero for equal sets and, for p = 2, |v|^2 for a set and its translate by v (Feydy et al. 2019,
    arXiv:1810.08278). OT_e = min_P <P, C> + e KL(P | a x b), computed in the logarithm.

    Args:
        a, b: samples.
        p: 1 or 2.
        epsilon: e, in the unit of the cost; a twentieth of the mean cost within `b` where absent, so not of `a`'s making.
        tolerance: the largest relative error of the marginals that is accepted, as a root mean square.
        iterations: how many are tried.

    Raises:
        ValueError: different D, NaN, p below 1, or a transport that has not converged.
        Missing: POT is not installed.
    """
    if epsilon is None:
        epsilon = float(_cost(b, b, p).mean()) / 20
    if not epsilon > 0:
        raise ValueError(f"epsilon must be positive, got {epsilon}")
    ab, aa, bb = (_entropic(_cost(x, y, p), epsilon, tolerance, iterations) for x, y in ((a, b), (a, a), (b, b)))
    return ab - (aa + bb) / 2


def noise_floor(
    distance: Callable[[Tensor, Tensor], float], draw: Callable[[int], Tensor], repeats: int = 5
) -> tuple[float, float]:
    """Return mean and standard deviation of a distance between sets of exact draws.

    Args:
        distance: of two sets, such as `wasserstein`, or `lambda a, b: mmd(a, b)[0]`.
        draw: returns a set of exact draws for a seed, each of the size of the sets that are compared.
        repeats: pairs of sets, at least 2.

    Raises:
        ValueError: fewer than two repeats.
    """
    if repeats < 2:
        raise ValueError(f"a spread needs at least two repeats, got {repeats}")
    values = torch.tensor([distance(draw(2 * k), draw(2 * k + 1)) for k in range(repeats)], dtype=torch.float64)
    return float(values.mean()), float(values.std())


def _entropic(cost: Tensor, epsilon: float, tolerance: float, iterations: int) -> float:
    """Return <P, C> + e KL(P | uniform) at the optimum, for a cost matrix (N, M)."""
    n, m = cost.shape
    a, b = torch.full((n,), 1 / n, dtype=cost.dtype), torch.full((m,), 1 / m, dtype=cost.dtype)
    plan = _pot().bregman.sinkhorn_log(a, b, cost, epsilon, iterations, tolerance / m**0.5, warn=False)
    gap = max(float((plan.sum(k) * size - 1).square().mean().sqrt()) for k, size in ((0, m), (1, n)))
    if not gap <= 2 * tolerance:
        raise ValueError(
            f"Sinkhorn's iteration has not converged: marginals off by {gap:.1e}; raise epsilon or iterations"
        )
    relative = torch.special.xlogy(plan, plan * n * m).sum()
    return float((plan * cost).sum() + epsilon * relative)


def _cost(a: Tensor, b: Tensor, p: int) -> Tensor:
    """Return |a_i - b_j|^p in double precision on the CPU, (N, M)."""
    check_sets(a, b, rows=1)
    if p < 1:
        raise ValueError(f"p must be at least 1, got {p}")
    return torch.cdist(a.detach().double().cpu(), b.detach().double().cpu(), compute_mode=_EXACT).pow(p)


def _pot() -> Any:
    try:
        import ot
    except ImportError as error:
        raise Missing(f"POT is not installed ({error}); pip install fewstep[metrics]") from None
    return ot
