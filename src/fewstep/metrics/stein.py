r"""How far samples are from a law of which no samples exist: the kernel Stein discrepancy, and the weights of modes."""

from __future__ import annotations

import torch
from torch import Tensor

from fewstep.metrics.distances import check_sets, u_statistic


def stein_discrepancy(x: Tensor, score: Tensor, bandwidth: float | None = None) -> tuple[float, float]:
    """Return the squared kernel Stein discrepancy of samples x, (N, D), and its standard error; unbiased, so zero in mean.

    With the inverse multiquadric k(x, y) = (1 + |x - y|^2 / h^2)^(-1/2), which sees samples that escape (Gorham and Mackey 2017,
    arXiv:1703.01717), and s = grad log rho the mean over pairs of s.s' k + s.grad' k + s'.grad k + tr grad grad' k. It sees
    shape within modes and is nearly blind to how much weight each mode has: read `mode_weights` beside it.

    Args:
        x: independent samples.
        score: grad log rho at them, (N, D).
        bandwidth: h; the median distance between rows where absent: give one to compare samplers.

    Raises:
        ValueError: shapes that do not fit, NaN, fewer than five rows, or a bandwidth that is not positive.
    """
    check_sets(x, score, rows=5)
    if x.shape != score.shape:
        raise ValueError(f"expected a score per sample, {tuple(x.shape)}, got {tuple(score.shape)}")
    x, score = x.detach().double(), score.detach().double()
    if bandwidth is None:
        bandwidth = float(torch.nn.functional.pdist(x).median())
    if not bandwidth > 0:
        raise ValueError(f"the bandwidth must be positive, got {bandwidth}")
    x, score = x / bandwidth, score * bandwidth  # then h = 1, and the discrepancy is in units of 1 / h^2
    r2 = torch.cdist(x, x).square()
    k1 = 1 / (1 + r2).sqrt()
    k3, k5 = k1**3, k1**5  # grad k = -(x - y) k3, and tr grad grad' k = D k3 - 3 r2 k5
    own = (score * x).sum(1)
    towards = own[:, None] - score @ x.T  # s_i . (x_i - x_j)
    h = score @ score.T * k1 + (towards + towards.T) * k3 + x.shape[1] * k3 - 3 * r2 * k5
    value, error = u_statistic(h)
    return value / bandwidth**2, error / bandwidth**2


def mode_weights(modes: Tensor, count: int, log_weights: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return the share of each mode and its standard error, (count,) each.

    Args:
        modes: the mode of each sample, (N,), from 0.
        count: how many modes there are.
        log_weights: importance weights of independent samples, (N,), where there are any.

    Raises:
        ValueError: a mode outside the range, shapes that do not fit, or no draw with a positive weight.
    """
    if modes.ndim != 1 or int(modes.min()) < 0 or int(modes.max()) >= count:
        raise ValueError(f"expected modes (N,) from 0 to {count - 1}, got {tuple(modes.shape)}")
    share = torch.zeros(len(modes), dtype=torch.float64) if log_weights is None else log_weights.double().cpu()
    if share.shape != modes.shape:
        raise ValueError(f"expected log-weights {tuple(modes.shape)}, got {tuple(share.shape)}")
    share = share.softmax(0)[:, None]
    if bool(share.isnan().any()):
        raise ValueError("log-weights must not be NaN or all -inf")
    hits = (modes.cpu()[:, None] == torch.arange(count)).double()
    mean = (share * hits).sum(0)
    return mean, (share * (hits - mean)).square().sum(0).sqrt()
