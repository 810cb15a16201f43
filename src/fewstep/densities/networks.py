r"""Controls: denoisers in whitened coordinates y, split into what a standard normal target would need and the rest.

The schedule preserves variance, so that a target N(0, I) stays N(0, I) and D = alpha y. With the drift G of a control

    D(y, t) = alpha y + sigma^2 G(y, t),    grad log p_t(y) = -y + alpha G(y, t),

G is of order one at every noise level: at t = 1 it is E[x_0], at t = 0 the score of the target relative to N(0, I),
which is the *guide* of a point. Guides are computed once per point and without gradient, except where a loss needs it.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, NamedTuple, final

import torch
from torch import Tensor, nn

from fewstep.core.batch import like
from fewstep.core.denoiser import Denoiser
from fewstep.core.density import TargetDensity
from fewstep.core.schedule import Schedule

_LOG_SPREADS = (-14.0, 4.0)  # the neck of a funnel that is as wide as N(0, 1) has widths of e^-5
_GATE = 8.0


class Moments(NamedTuple):
    """What a kernel needs at a point: the drift G and the variances of the Gaussian that it takes the target for, (..., d)."""

    drift: Tensor
    spread: Tensor


class Control(Denoiser):
    """A denoiser of R^d that says its drift for whole paths at once, and how wide the target looks from each point."""

    event_shape: tuple[int, ...]

    @abstractmethod
    def guide(self, y: Tensor) -> Tensor | None:
        """Return what the drift needs to know of the target at y, (N, d) -> (N, d); None where it needs nothing."""

    @abstractmethod
    def moments(self, y: Tensor, t: Tensor, guide: Tensor | None) -> Moments:
        """Return drift and spread at y, (..., N, d); `t` broadcasts against (..., N)."""

    @final
    def drift(self, y: Tensor, t: Tensor, guide: Tensor | None) -> Tensor:
        """Return G alone, (..., N, d)."""
        return self.moments(y, t, guide).drift

    def forward(self, x_t: Tensor, t: Tensor, **cond: Any) -> Tensor:
        """See `Denoiser`; (N, d), whitened."""
        t = torch.as_tensor(t, dtype=x_t.dtype, device=x_t.device)
        alpha, sigma = (like(c, x_t) for c in self.schedule(t))
        return alpha * x_t + sigma**2 * self.drift(x_t, t, self.guide(x_t))


@dataclass(frozen=True)
class NetConfig:
    """The size and the start of a `ControlNet`.

    Attributes:
        width: channels of the hidden layers.
        depth: hidden layers.
        gain: initial weight of the guide at t = 0, falling as t grows; 0 leaves the target out of the network altogether.
        clip: largest component of a guide.
        spread: whether the widths of the kernels are learned too, which makes few steps worth more.
        gated: whether the place m of the Gaussian is the network's times e^g, g another output per coordinate, |g| < 8. The
            errors of m are alike everywhere otherwise, and wider than the neck of a funnel; with a gate they shrink with it.
    """

    width: int = 64
    depth: int = 2
    gain: float = 1.0
    clip: float = 100.0
    spread: bool = True
    gated: bool = False


class TimeEmbedding(nn.Module):
    """Fourier features of the angle arctan(sigma / alpha), followed by two layers; (...) -> (..., width).

    Args:
        schedule: of noise.
        width: channels.
        count: waves.
        finest: of them in the range of the angle, a quarter of a turn being one; what is trained at few times wants few.
    """

    frequencies: Tensor

    def __init__(self, schedule: Schedule, width: int, count: int = 32, finest: float = 10**1.5) -> None:
        super().__init__()
        self.schedule = schedule
        if (
            torch.get_default_dtype() != torch.float32
        ):  # in which modules and times would be made, beside noise in float32
            raise NotImplementedError(
                "samplers of densities compute in float32: leave torch.set_default_dtype at that; log_prob may be in float64"
            )
        self.register_buffer("frequencies", torch.logspace(-1, math.log10(finest), count) * math.pi / 2)
        self.layers = nn.Sequential(nn.Linear(2 * count + 1, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t: Tensor) -> Tensor:
        """Return the embedding of t."""
        alpha, sigma = self.schedule(t)
        angle = torch.atan2(sigma, alpha)[..., None] * (2 / math.pi)
        waves = angle * self.frequencies
        return self.layers(torch.cat([angle, waves.sin(), waves.cos()], -1))


class ControlNet(Control):
    """G = drift of N(m, v) + gain(t) alpha guide, m and log v by a perceptron of y, t and guide whose last layer starts at zero.

    Near a mode m is flat and v is the spread that the kernels use: the network has to say where modes are, not how steeply the
    drift falls between them. With m = 0 and v = 1 the Gaussian has no drift.

    `log_z` is the normaliser that trajectory balance learns, in its units.

    Args:
        schedule: a variance-preserving noise schedule.
        target: the density in whitened coordinates; its score is the guide.
        config: size and start.
    """

    def __init__(self, schedule: Schedule, target: TargetDensity, config: NetConfig = NetConfig()) -> None:
        super().__init__()
        check_preserving(schedule)
        self.schedule, self.target, self.event_shape, self.config = schedule, target, target.event_shape, config
        dim, width = target.dim, config.width
        self.time = TimeEmbedding(schedule, width)
        self.first = nn.Linear(2 * dim if config.gain else dim, width)
        self.hidden = nn.ModuleList(nn.Linear(width, width) for _ in range(config.depth))
        self.last, self.gain = nn.Linear(width, (1 + config.spread + config.gated) * dim), nn.Linear(width, dim)
        self.log_z = nn.Parameter(torch.zeros(()))
        for layer in (self.last, self.gain):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def guide(self, y: Tensor) -> Tensor | None:
        """See `Control`; differentiable in y where gradients are recorded."""
        if not self.config.gain:
            return None
        limit = self.config.clip
        return torch.nan_to_num(self.relative_score(y), 0.0, limit, -limit).clamp(-limit, limit)

    def relative_score(self, y: Tensor) -> Tensor:
        """Return the score of the target less that of the law whose drift is free, here N(0, I), (N, d)."""
        return self.target.score(y) + y

    def moments(self, y: Tensor, t: Tensor, guide: Tensor | None) -> Moments:
        """See `Control`."""
        embedding, dim = self.time(t), y.shape[-1]
        h = self.first(y if guide is None else torch.cat([y, torch.asinh(guide)], -1)) + embedding
        for layer in self.hidden:
            h = h + layer(nn.functional.silu(h))
        mean, *others = self.last(nn.functional.silu(h)).split(dim, -1)
        if self.config.gated:
            mean = mean * gate(others.pop())
        spread = others.pop().clamp(*_LOG_SPREADS).exp() if self.config.spread else torch.ones_like(y)
        alpha, sigma = (c[..., None] for c in self.schedule(t))
        drift = gaussian_drift(y, mean, spread, alpha, sigma)
        if guide is None:
            return Moments(drift, spread)
        # of a Gaussian of variance v the drift is v / (v + sigma^2) of its guide, to first order: v = 0.1 is a fair start
        gain = self.config.gain / (1 + 10 * sigma**2) + self.gain(nn.functional.silu(embedding))
        return Moments(drift + gain * alpha * guide, spread)


def gate(g: Tensor) -> Tensor:
    """Return e^g with |g| held below 8, of any shape: a factor that errors can shrink with."""
    return (_GATE * torch.tanh(g / _GATE)).exp()


def gaussian_drift(y: Tensor, mean: Tensor, variance: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """Return G of a Gaussian target, (m - (1 - v) alpha y) / (alpha^2 v + sigma^2); shapes that broadcast."""
    return (mean - (1 - variance) * alpha * y) / (alpha**2 * variance + sigma**2)


def drift_of(denoiser: Denoiser, y: Tensor, t: Tensor) -> Tensor:
    """Return G of a denoiser under a variance-preserving schedule; shapes as in `Control.drift`."""
    times = t.expand(y.shape[:-1])
    alpha, sigma = (c[..., None] for c in denoiser.schedule(times))
    x0 = denoiser(y.reshape(-1, y.shape[-1]), times.reshape(-1)).reshape(y.shape)
    return (x0 - alpha * y) / sigma**2


def check_preserving(schedule: Schedule) -> None:
    """Raise ValueError unless alpha^2 + sigma^2 = 1 at all times."""
    alpha, sigma = schedule(torch.linspace(0, 1, 9, dtype=torch.float64))
    if not torch.allclose(alpha**2 + sigma**2, torch.ones_like(alpha), atol=1e-6):
        raise ValueError(f"{schedule} does not preserve variance; whitened coordinates need alpha^2 + sigma^2 = 1")
