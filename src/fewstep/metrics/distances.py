r"""Distances between two sets of samples or features, (N, D) each: Frechet, MMD, energy; `transport` has Wasserstein's.

`mmd` and `energy_distance` are U-statistics of iid pairs z_i = (a_i, b_i) with h_ij = k(a_i, a_j) + k(b_i, b_j) - k(a_i, b_j)
- k(b_i, a_j): unbiased, hence negative half of the time where the two laws are equal, and with a standard error that holds
there too (on the safe side, by up to a third). Their conditional variants compare the laws of (y, x): with `given`, row i of
both sets belongs to measurement i, and a sampler that ignores y, or answers that of another item, is found although its
marginal is right.
"""

from __future__ import annotations

import torch
from torch import Tensor


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """Return |m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^1/2) of features, (N, F) and (M, F): squared 2-Wasserstein of Gaussians.

    Called FID where the features are Inception's on 50 000 images (Heusel et al. 2017, arXiv:1706.08500) and not otherwise.
    Biased upwards, and mostly bias where rows are not many times the features: compare sets of one size only, and read it
    against its value between two halves of the truths.

    Raises:
        ValueError: fewer than two rows, or different F.
    """
    check_sets(a, b, rows=2)
    first, second = a.double(), b.double()
    shift = (first.mean(0) - second.mean(0)).square().sum()
    roots = [_root(first), _root(second)]
    # with C_a = A'A and C_b = B'B, the eigenvalues of (C_a C_b)^1/2 are the singular values of A B'
    overlap = torch.linalg.svdvals(roots[0] @ roots[1].T).sum()
    return float(shift + sum(root.square().sum() for root in roots) - 2 * overlap)


def mmd(
    a: Tensor, b: Tensor, *, given: Tensor | None = None, bandwidth: float | None = None, group: int = 1
) -> tuple[float, float]:
    """Return the squared maximum mean discrepancy of a, b, (N, D) each, and its standard error.

    Unbiased, with the Gaussian kernel exp(-|x - x'|^2 / (2 bandwidth^2)) (Gretton et al. 2012, JMLR 13); on the features of
    an image network it is the metric that CMMD proposes instead of Frechet's (Jayasumana et al. 2024, arXiv:2401.09603).

    Args:
        a, b: samples or features.
        given: (N, G), what row i of both belongs to; its scale against the features is the caller's choice.
        bandwidth: the median distance between rows of `b` where absent, so that it does not depend on `a`.
        group: so many consecutive rows hang together, like the patches of one image: pairs are taken between groups only, and
            the error is that of independent groups.

    Raises:
        ValueError: different shapes, fewer than five groups, rows that do not fill groups, or a bandwidth that is not positive.
    """
    a, b = _joined(a, b, given)
    if bandwidth is None:
        bandwidth = float(torch.nn.functional.pdist(b).median())
    if not bandwidth > 0:
        raise ValueError(f"the bandwidth must be positive, got {bandwidth}")
    if len(a) % group or len(a) < 5 * group:
        raise ValueError(f"needs at least five groups of {group} rows and nothing beside them, got {len(a)} rows")
    grams = ((torch.cdist(x, y) / bandwidth).square().mul(-0.5).exp() for x, y in ((a, a), (b, b), (a, b)))
    aa, bb, ab = (torch.nn.functional.avg_pool2d(gram[None], group)[0] for gram in grams)
    return u_statistic(aa + bb - ab - ab.T)


def energy_distance(a: Tensor, b: Tensor, *, given: Tensor | None = None) -> tuple[float, float]:
    """Return 2 E|a - b| - E|a - a'| - E|b - b'| of samples, (N, D) each, and its standard error; unbiased.

    Szekely and Rizzo 2013, J. Statist. Plann. Inference 143. `given` and errors as in `mmd`.
    """
    a, b = _joined(a, b, given)
    ab = torch.cdist(a, b)
    return u_statistic(ab + ab.T - torch.cdist(a, a) - torch.cdist(b, b))


def _root(x: Tensor) -> Tensor:
    """Return R, (min(N, F), F), with R'R the unbiased covariance of x, (N, F)."""
    return torch.linalg.qr((x - x.mean(0)) / (len(x) - 1) ** 0.5, mode="r")[1]


def _joined(a: Tensor, b: Tensor, given: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return both sets in double precision, moved to where the second lies, with `given` appended to their rows."""
    if a.shape != b.shape:
        raise ValueError(f"a standard error needs two sets of one size, got {tuple(a.shape)} and {tuple(b.shape)}")
    check_sets(a, b, rows=5)
    a, b = a.double(), b.double()
    centre = b.mean(0)  # distances by matrix products lose their digits far from the origin
    if given is None:
        return a - centre, b - centre
    if given.ndim != 2 or len(given) != len(a):
        raise ValueError(f"expected one row of `given` per row, {len(a)}, got {tuple(given.shape)}")
    given = given.to(b) - given.to(b).mean(0)
    return torch.cat([a - centre, given], 1), torch.cat([b - centre, given], 1)


def u_statistic(h: Tensor) -> tuple[float, float]:
    """Return the mean of symmetric h_ij over i != j and its standard error, (N, N).

    Hoeffding: Var = (4 (N - 2) v1 + 2 v2) / (N (N - 1)) with v1 = Var E[h | z] and v2 = Var h. The variance of the row means
    has expectation (N - 2) ((N - 4) v1 + v2) / (N - 1)^2, which is solved for v1.
    """
    h = h.clone().fill_diagonal_(0)
    n = len(h)
    pairs = n * (n - 1)
    value = h.sum() / pairs
    v2 = h.square().sum() / pairs - value.square()
    rows = (h.sum(1) / (n - 1)).var()
    v1 = ((rows * (n - 1) ** 2 / (n - 2) - v2) / (n - 4)).clamp_min(0)
    return float(value), float(((4 * (n - 2) * v1 + 2 * v2) / pairs).sqrt())


def check_sets(a: Tensor, b: Tensor, rows: int) -> None:
    """Raise ValueError unless a, b are finite sets (N, D) and (M, D) of at least so many rows."""
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1]:
        raise ValueError(f"expected sets (N, D) and (M, D), got {tuple(a.shape)} and {tuple(b.shape)}")
    if min(len(a), len(b)) < rows:
        raise ValueError(f"needs at least {rows} rows, got {len(a)} and {len(b)}")
    if not bool(torch.isfinite(a).all() and torch.isfinite(b).all()):
        raise ValueError("the samples hold NaN or infinite values")
