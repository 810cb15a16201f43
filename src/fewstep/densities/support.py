r"""Boxes: a smooth map from R^d onto a support, coordinate by coordinate.

Bounded on both sides: x = low + (high - low) Phi(u), so that a uniform law becomes exactly N(0, 1). Bounded on one side:
x = low + softplus(u), which keeps exponential and heavier tails as they are.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

Support = tuple[Tensor | float, Tensor | float]
_CROWDED = 1e-3  # share of draws
GIVE_SUPPORT = "give support= to as_target or fit (--low and --high on the command line)"


def to_box(u: Tensor, support: Support) -> Tensor:
    """Map R^d onto the box, (N, d) -> (N, d), strictly inside it in the arithmetic of `u`."""
    low, high, both, above, below = _sides(u, support)
    width = torch.where(both, high - low, 1.0)
    # torch.special.ndtr is 0 in float32 below -6, where Phi is still 1e-9
    share = 0.5 * torch.erfc(-u / math.sqrt(2))
    x = torch.where(both, torch.where(both, low, 0.0) + width * share, u)
    x = torch.where(above, torch.where(above, low, 0.0) + torch.nn.functional.softplus(u), x)
    x = torch.where(below, torch.where(below, high, 0.0) - torch.nn.functional.softplus(-u), x)
    floor, roof = _ends(low, high, width)
    return torch.minimum(torch.maximum(x, floor), roof)


def from_box(x: Tensor, support: Support) -> Tensor:
    """Return what `to_box` maps to `x`, (N, d) -> (N, d); a number on the border, where rounding leads, counts as the next one."""
    low, high, both, above, below = _sides(x, support)
    floor, roof = _ends(low, high, torch.where(both, high - low, 1.0))
    x = torch.where(x == low, floor, torch.where(x == high, roof, x))
    below_one = 1 - torch.finfo(x.dtype).eps / 2  # a wide box rounds its last number to its end
    share = torch.where(both, (x - low) / (high - low), 0.5)
    u = torch.where(both, torch.special.ndtri(torch.where((x < high) & (share == 1), below_one, share)), x)
    u = torch.where(above, _inverse_softplus(torch.where(above, x - low, 1.0)), u)
    return torch.where(below, -_inverse_softplus(torch.where(below, high - x, 1.0)), u)


def box_slopes(u: Tensor, support: Support) -> tuple[Tensor, Tensor]:
    """Return log dx/du of `to_box` and its derivative in u, (N, d) each."""
    low, high, both, above, below = _sides(u, support)
    zero = torch.zeros_like(u)
    log = torch.where(
        both, torch.where(both, high - low, 1.0).log() - u.square() / 2 - 0.5 * math.log(2 * math.pi), zero
    )
    log = torch.where(above, torch.nn.functional.logsigmoid(u), log)
    log = torch.where(below, torch.nn.functional.logsigmoid(-u), log)
    curvature = torch.where(both, -u, zero)
    curvature = torch.where(above, torch.sigmoid(-u), curvature)
    return log, torch.where(below, -torch.sigmoid(u), curvature)


def rounded(x: Tensor, support: Support | None) -> str | None:
    """Return in a line what the numbers of draws x, (N, d), do not resolve; None where they resolve everything."""
    eps, spread, middle = torch.finfo(x.dtype).eps, x.std(0, correction=0), x.mean(0)
    narrow = ((spread > 0) & (spread < 100 * eps * middle.abs())).nonzero().flatten().tolist()
    if narrow:
        k = narrow[0]
        return (
            f"coordinate {k} varies by {float(spread[k]):.0e} around {float(middle[k]):.1e}, finer than {x.dtype} resolves: "
            "shift the density to zero"
        )
    if support is None:
        return None
    low, high, both, *_ = _sides(x, support)
    floor, roof = _ends(low, high, torch.where(both, high - low, 1.0))
    share = float(((x <= floor) | (x >= roof)).any(1).double().mean())
    if share > _CROWDED:
        return (
            f"{share:.1%} of the draws lie on the last number of {x.dtype} before an end of the support, with all mass beyond it: "
            "let that end be zero, which numbers come closer to"
        )
    return None


def _sides(x: Tensor, support: Support) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return low and high, (d,), and which coordinates are bounded on both sides, from below only, from above only."""
    low, high = (torch.as_tensor(side, dtype=x.dtype, device=x.device).expand(x.shape[-1]) for side in support)
    floor, roof = torch.isfinite(low), torch.isfinite(high)
    return low, high, floor & roof, floor & ~roof, ~floor & roof


def _ends(low: Tensor, high: Tensor, width: Tensor) -> tuple[Tensor, Tensor]:
    """Return the first and the last number inside, (d,) each."""
    margin = 1e-30 * width  # at zero, the next number would have no finite inverse
    numbers = torch.finfo(low.dtype)
    # between half a step and one and a half of the numbers on either side, which rounds to one: torch.nextafter cannot be exported
    first, last = (end.clamp(numbers.min, numbers.max) for end in (low, high))
    floor, roof = (end + sign * 0.6 * numbers.eps * end.abs() for end, sign in ((first, 1), (last, -1)))
    return torch.maximum(floor, low + margin), torch.minimum(roof, high - margin)


def _inverse_softplus(x: Tensor) -> Tensor:
    return x + torch.log(-torch.expm1(-x))
