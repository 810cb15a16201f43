r"""The prior, seen through its denoiser D(x_t, t) = E[x_0 | x_t], and the parametrisations that networks speak.

With x_t = alpha x_0 + sigma z the five predictions are linear in each other, given x_t:

    epsilon  = (x_t - alpha x0) / sigma          score    = -epsilon / sigma
    v        = alpha epsilon - sigma x0          velocity = epsilon - x0   (the flow z - x_0)

v is that of Salimans and Ho (2022, arXiv:2202.00512), velocity that of Lipman et al. (2023, arXiv:2210.02747).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fewstep.core.batch import like
from fewstep.core.schedule import Schedule


class Parametrisation(NamedTuple):
    """How a prediction relates to x0; both functions take (value, x_t, alpha, sigma)."""

    to_x0: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
    from_x0: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


PARAMETRISATIONS: dict[str, Parametrisation] = {
    "x0": Parametrisation(lambda p, x, a, s: p, lambda p, x, a, s: p),
    "epsilon": Parametrisation(lambda p, x, a, s: (x - s * p) / a, lambda p, x, a, s: (x - a * p) / s),
    "score": Parametrisation(lambda p, x, a, s: (x + s * s * p) / a, lambda p, x, a, s: (a * p - x) / (s * s)),
    "v": Parametrisation(
        lambda p, x, a, s: (a * x - s * p) / (a * a + s * s),
        lambda p, x, a, s: (a * x - (a * a + s * s) * p) / s,
    ),
    "velocity": Parametrisation(lambda p, x, a, s: (x - s * p) / (a + s), lambda p, x, a, s: (x - (a + s) * p) / s),
}


class Denoiser(nn.Module, ABC):
    """A diffusion prior through E[x_0 | x_t].

    Attributes:
        schedule: the noise schedule in which x_t is given.
        event_shape: the shape of one item, (d,) or (C, H, W); None in H, W means that any size is taken.
    """

    schedule: Schedule
    event_shape: tuple[int | None, ...]

    @abstractmethod
    def forward(self, x_t: Tensor, t: Tensor, **cond: Any) -> Tensor:
        """Return E[x_0 | x_t], (N, *event) -> (N, *event), in the dtype of x_t; `t` is () or (N,), of that dtype or float64."""

    def around(self, other: Denoiser) -> Denoiser:
        """Return `other` called in the way this prior calls its own network, which is directly unless said otherwise."""
        return other

    def predict(self, kind: str, x_t: Tensor, t: Tensor, **cond: Any) -> Tensor:
        """Return the prediction named `kind`, one of `PARAMETRISATIONS`; same shapes as `forward`."""
        alpha, sigma = (like(c, x_t) for c in self.schedule(torch.as_tensor(t, dtype=x_t.dtype, device=x_t.device)))
        return PARAMETRISATIONS[kind].from_x0(self(x_t, t, **cond), x_t, alpha, sigma)

    def score(self, x_t: Tensor, t: Tensor, **cond: Any) -> Tensor:
        """Return grad log p_t(x_t) by Tweedie's formula; same shapes as `forward`."""
        return self.predict("score", x_t, t, **cond)


class Rescheduled(Denoiser):
    """The same prior under another schedule: the noisy point is rescaled to the place where the ratio is the same.

    Where that is beyond t = 1 of the prior, which its network does not know, the point is shrunk to the noise level there:
    there is as good as nothing in it but noise, and what there is shrinks too, so that E[x_0 | x_t] is off by O(1 / ratio).
    """

    def __init__(self, denoiser: Denoiser, schedule: Schedule) -> None:
        super().__init__()
        self.denoiser, self.schedule, self.event_shape = denoiser, schedule, denoiser.event_shape

    def forward(self, x_t: Tensor, t: Tensor, **cond: Any) -> Tensor:
        """See `Denoiser`."""
        t = torch.as_tensor(t, dtype=x_t.dtype, device=x_t.device)
        (alpha, sigma), own = self.schedule(t), self.denoiser.schedule
        inner = own.time(self.schedule.ratio(t)).clamp_max(1)
        inner_alpha, _ = own(inner)
        # sigma / alpha up to the largest ratio of the prior, that ratio beyond
        signal = torch.maximum(alpha, sigma / own.ratio(torch.ones_like(t)))
        return self.denoiser(x_t * like(inner_alpha / signal, x_t), inner, **cond)


class MeanReverting(Denoiser):
    r"""A prior of x_t = alpha x_0 + (1 - alpha) mu + sigma z as an ordinary one, which every solver then takes.

    z_t = x_t - (1 - alpha) mu is an ordinary diffusion of the same x_0 (Li et al. 2025, arXiv:2502.07856, whose solver is
    DPM-Solver++ in z). With alpha_0 = 1 nothing is left to undo at the end.

    Args:
        denoiser: E[x_0 | x_t] of the mean-reverting process, as a function of x_t.
        mean: mu, the degraded image say, (*event) or one per item, (N, *event).
    """

    mean: Tensor

    def __init__(self, denoiser: Denoiser, mean: Tensor) -> None:
        super().__init__()
        self.denoiser, self.schedule, self.event_shape = denoiser, denoiser.schedule, denoiser.event_shape
        self.register_buffer("mean", mean)

    def forward(self, x_t: Tensor, t: Tensor, **cond: Any) -> Tensor:
        """See `Denoiser`; `x_t` is z_t."""
        alpha, _ = self.schedule(torch.as_tensor(t, dtype=x_t.dtype, device=x_t.device))
        return self.denoiser(x_t + (1 - like(alpha, x_t)) * self.mean, t, **cond)
