r"""What log-weights log w_n say, (N,): the effective sample size, log Z with an interval, and expectations under the target.

With x_n drawn from some law and E[w f(x)] = Z E_target[f]: Z-hat = mean w, and sum w f / sum w estimates E_target[f] with
a bias of order 1 / N. Weights may be negative: log w_n is then that of their size, and their signs come beside it. All in
float64. Rows may hang together in groups of equal size, as the particles of one run do; errors are those of independent groups.
"""

from __future__ import annotations

import math

import torch
from scipy.stats import t
from torch import Tensor

from fewstep.densities.estimators.psis import limit, pareto_k


def log_mean(log_weights: Tensor, signs: Tensor | None = None) -> float:
    """Return log mean w, the estimate of log Z; its expectation is below log Z (Jensen), that of its exponential is Z.

    -inf where the mean of weights with `signs` is not positive.
    """
    mean = float(_relative(log_weights, signs).mean())
    return float(log_weights.double().max()) + math.log(mean) if mean > 0 else -math.inf


def ess(log_weights: Tensor, signs: Tensor | None = None) -> float:
    """Return (sum w)^2 / (N sum w^2), the effective sample size as a fraction of N; 0 where the weights sum to no more than 0."""
    w = _relative(log_weights, signs)
    total = max(float(w.sum()), 0.0)
    return total**2 / float(w.square().sum()) / len(w) if total else 0.0


def log_z_error(log_weights: Tensor, group: int = 1) -> float:
    """Return the standard error of log mean w, that of mean w relative to itself; NaN for a single group."""
    totals = _group_means(log_weights, group)
    return float((totals / totals.mean()).std()) / math.sqrt(len(totals))


def log_z_interval(
    log_weights: Tensor, level: float = 0.95, group: int = 1, signs: Tensor | None = None
) -> tuple[float, float]:
    """Return an interval that holds log Z with probability `level`.

    With s the relative standard error of mean w and q the Student quantile of the number of groups, log Z-hat -+ q s plus the
    skewness term of Johnson (1978, J. Amer. Statist. Assoc. 73): mean w has a long tail to the right, so it is more often
    too small than too large. Of independent weights with a Pareto tail, 0 < k-hat, the upper end also has room for what is
    expected beyond the largest of N, E[w; w > w_max] = w_max / (N (1 - k)); without it they miss more than twice as often as
    they say at k = 0.6. Weights with `signs` have that room at both ends. Where k-hat says that too many draws would be needed,
    no upper end can be had, and the lower one is Markov's: P(Z-hat >= Z / a) <= a. That one needs positive weights; with `signs`
    there is no lower end either.

    Raises:
        ValueError: `level` outside (0, 1), or fewer than two groups.
    """
    if not 0 < level < 1:
        raise ValueError(f"level must lie in (0, 1), got {level}")
    centre, tail = log_mean(log_weights, signs), (1 - level) / 2
    totals = _group_means(log_weights, group, signs)
    count = len(totals)
    if count < 2:
        raise ValueError("an interval needs at least two independent groups of draws")
    least = math.log(2 * tail) if signs is None else -math.inf
    k = pareto_k(log_weights) if group == 1 else -math.inf
    if not math.isfinite(centre) or not k <= limit(count):  # NaN: too few draws to tell
        return centre + least, math.inf
    ratio = totals / totals.mean()
    error = float(ratio.std()) / math.sqrt(count)
    third = float((ratio - 1).pow(3).mean())
    shift = 0.0 if error == 0 else third / (6 * count * error**2 * count)
    reach = float(t.ppf(1 - tail, count - 1)) * error
    beyond = float(ratio.abs().max()) / count / (1 - k) if k > 0 else 0.0
    low, high = 1 + shift - reach - (0.0 if signs is None else beyond), 1 + shift + reach + beyond
    return centre + max(math.log(low) if low > 0 else -math.inf, least), centre + math.log(high)


def expectation(
    values: Tensor, log_weights: Tensor | None = None, group: int = 1, signs: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return sum w f / sum w and its standard error, each of the shape of one row of `values`, (N, ...).

    Without weights the plain mean. The error is that of a ratio (delta method), NaN for a single group.
    """
    values = values.double()
    share = torch.full((len(values),), 1 / len(values), dtype=torch.float64, device=values.device)
    if log_weights is not None:
        share = _relative(log_weights, signs)
        share = share / share.sum()
    share = share.reshape(-1, *[1] * (values.ndim - 1))
    # a weight of zero silences whatever f says there, NaN included
    mean = torch.where(share != 0, share * values, 0.0).sum(0)
    parts = torch.where(share != 0, share * (values - mean), 0.0)
    totals = parts.reshape(-1, group, *values.shape[1:]).sum(1)
    count = len(totals)
    factor = math.sqrt(count / (count - 1)) if count > 1 else math.nan
    return mean, factor * totals.square().sum(0).sqrt()


def comb(log_weights: Tensor, offsets: Tensor, n: int | None = None) -> Tensor:
    """Return n indices per row of log-weights, (R, N) -> (R, n), in proportion to the weights: systematic resampling.

    Args:
        log_weights: (R, N), not all -inf in a row.
        offsets: uniforms in [0, 1), (R,), one per comb.
        n: teeth, N where absent.
    """
    n = n or log_weights.shape[1]
    edges = log_weights.double().softmax(1).cumsum(1)
    teeth = torch.arange(n, dtype=torch.float64, device=edges.device) + offsets.double()[:, None]
    # the last edge is the total, up to rounding: no tooth may lie beyond it, on a weight of zero
    return torch.searchsorted(edges, teeth / n * edges[:, -1:], right=True).clamp_max(log_weights.shape[1] - 1)


def bound(log_weights: Tensor, group: int = 1) -> tuple[float, float]:
    """Return mean log w and its standard error.

    Under the sampler's own law it is the ELBO, below log Z in expectation; with weights of paths or latents drawn
    backwards from exact samples of the target it is the EUBO, above log Z.
    """
    value, error = expectation(log_weights, None, group)
    return float(value), float(error)


def _relative(log_weights: Tensor, signs: Tensor | None) -> Tensor:
    """Return the weights over the size of the largest, (N,); zeros where all are."""
    log_w = log_weights.double()
    top = log_w.max()
    w = (log_w - top).exp() if bool(top > -math.inf) else torch.zeros_like(log_w)
    return w if signs is None else signs * w


def _group_means(log_weights: Tensor, group: int, signs: Tensor | None = None) -> Tensor:
    """Return the mean weight of each group over an arbitrary common factor, (N / group,)."""
    if group < 1 or len(log_weights) % group:
        raise ValueError(f"{len(log_weights)} rows do not fill groups of {group}")
    return _relative(log_weights, signs).reshape(-1, group).mean(1)
