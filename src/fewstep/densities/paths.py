r"""Paths from noise to a target by Gaussian kernels, and weights that are unbiased at any number of steps.

Along times 1 = t_0 > ... > t_N = 0, in whitened coordinates and with G the drift of a `Control`,

    P_F(y_{k+1} | y_k) = N(a_k y_k + p_k G(y_k, t_k), r_k b_k^2),    P_B(y_k | y_{k+1}) = N(a_k y_{k+1}, b_k^2 I),
    log w = log rho(y_N) - log N(y_0; 0, I) + sum_k [log P_B(y_k | y_{k+1}) - log P_F(y_{k+1} | y_k)].

w is a ratio of two densities of the same path, so E[w] = Z whatever G is; the integrals of the papers are its limit for
many steps and biased for few. With r_k = (alpha_s^2 v + sigma_s^2) / (alpha_t^2 v + sigma_t^2) and the exponential
coefficients the kernels are those of a Gaussian target of variances v, whose weights are then constant for the exact G. The control
learns v (y_k, t_k) where it may: a funnel is wide at one end and narrow at the other.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fewstep.core.density import TargetDensity, by_score
from fewstep.core.noise import Noise
from fewstep.core.schedule import Schedule
from fewstep.densities.networks import Control, Moments


@dataclass(frozen=True)
class Kernels:
    """The coefficients of N steps.

    Attributes:
        times: t_0, ..., t_N, (N + 1,) float64, falling.
        signals: alpha at these times, (N + 1,).
        decay: a, (N,).
        push: p, (N,).
        variance: b^2, (N,).
    """

    times: Tensor
    signals: Tensor
    decay: Tensor
    push: Tensor
    variance: Tensor

    def __len__(self) -> int:
        return len(self.decay)

    def steps(self) -> Tensor:
        """Return a, p, b^2 and alpha^2 before and after each step, (N, 5)."""
        squares = self.signals.square()
        return torch.stack([self.decay, self.push, self.variance, squares[:-1], squares[1:]], 1)


Discretisation = Callable[[Schedule, Tensor], Kernels]


def exponential(schedule: Schedule, times: Tensor) -> Kernels:
    """Return the kernels that are exact for the noising process and for a target N(0, I) at any step size.

    This is the exponential integrator of DDS (Vargas et al. 2023, arXiv:2302.13834) with x' = a x + b^2 u + b z, u = alpha_s G.
    """
    signals, squares = _signals(schedule, times)
    variance = -torch.expm1(squares)
    return Kernels(times, signals, (squares / 2).exp(), signals[1:] * variance, variance)


def euler(schedule: Schedule, times: Tensor) -> Kernels:
    """Return the kernels of Euler and Maruyama, with h the integral of beta over a step; exact for many steps only."""
    signals, squares = _signals(schedule, times)
    h = -squares
    if not bool(torch.isfinite(h).all()):
        raise ValueError(f"{schedule} starts without any signal: Euler steps of infinite length; use exponential ones")
    return Kernels(times, signals, 1 - h / 2, signals[:-1] * h, h)


def _signals(schedule: Schedule, times: Tensor) -> tuple[Tensor, Tensor]:
    """Return alpha, (N + 1,), and log (alpha_t / alpha_s)^2, (N,), from the ratios, which are exact near t = 0."""
    if float(times[0]) != 1 or float(times[-1]) != 0 or not bool((times[1:] < times[:-1]).all()):
        raise ValueError(f"times must fall from 1 to 0, got {times.tolist()}")
    logs = -torch.log1p(schedule.ratio(times.double()).square())
    return (logs / 2).exp(), logs[:-1] - logs[1:]


DISCRETISATIONS: dict[str, Discretisation] = {"exponential": exponential, "euler": euler}


def even_variance(schedule: Schedule, steps: int, finest: float = 0.01) -> Tensor:
    """Return times at which a target of variance `finest` loses equal shares of its variance, (steps + 1,) float64.

    A kernel that is wrong by the share e costs e^2 / 4 nats per coordinate: no step of this grid stands out.
    """
    shares = finest ** torch.linspace(0, 1, steps + 1, dtype=torch.float64)
    noise = ((shares - finest) / (1 - finest)).clamp(0, 1)
    times = schedule.time((noise[1:-1] / (1 - noise[1:-1])).sqrt())
    return torch.cat([times.new_ones(1), times.clamp(0, 1), times.new_zeros(1)])


def falling_cosine(schedule: Schedule, steps: int) -> Tensor:
    """Return times between which the integral of beta falls as cos^4, as in DDS: (steps + 1,) float64.

    Raises:
        ValueError: the schedule has no signal at t = 1.
    """
    total = torch.log1p(schedule.ratio(torch.ones((), dtype=torch.float64)).square())
    if not bool(torch.isfinite(total)):
        raise ValueError(f"{schedule} has no signal at t = 1; choose another grid")
    shares = torch.cos(torch.linspace(0, math.pi / 2, steps + 1, dtype=torch.float64)[:-1]) ** 4
    left = 1 - shares.cumsum(0) / shares.sum()
    times = schedule.time(torch.expm1(total * left[:-1]).sqrt())
    return torch.cat([times.new_ones(1), times.clamp(0, 1), times.new_zeros(1)])


@dataclass(frozen=True)
class Paths:
    """n simulated paths.

    Attributes:
        y: the last points, (n, d).
        forward: log of the product of forward kernels, (n,) float64, without the constants that cancel.
        backward: log of the product of backward kernels over log N(y_0; 0, I), likewise.
        points: all points, (N + 1, n, d), where they were kept.
    """

    y: Tensor
    forward: Tensor
    backward: Tensor
    points: Tensor | None = None

    def log_weights(self, target: TargetDensity) -> Tensor:
        """Return log w, (n,) float64; one target call per path, and one of its score where gradients are recorded."""
        log_rho = by_score(target, self.y) if self.y.requires_grad else target.log_prob(self.y)
        return log_rho.double() + self.backward - self.forward


def simulate(control: Control, kernels: Kernels, noise: Noise, keep: bool = False) -> Paths:
    """Return one path per stream of `noise`; differentiable in the control where gradients are recorded."""
    times, y = kernels.times.float().to(noise.device), noise.randn(*control.event_shape)
    forward = torch.zeros(len(noise), dtype=torch.float64, device=noise.device)
    backward = (y.double().square() + math.log(2 * math.pi)).sum(-1) / 2
    points = [y]
    for k, step in enumerate(kernels.steps().tolist()):
        z, (a, _, b2, *_) = noise.randn_like(y), step
        mean, variance = _forward_kernel(y, control.moments(y, times[k], control.guide(y)), step)
        moved = mean + variance.sqrt() * z
        forward = forward - (z.square() + variance.log()).sum(-1) / 2
        backward = backward - (y - a * moved).square().sum(-1) / (2 * b2) - y.shape[-1] / 2 * math.log(b2)
        y = moved
        if keep:
            points.append(y)
    return Paths(y, forward, backward, torch.stack(points) if keep else None)


class Walk(NamedTuple):
    """The points of n paths, (N + 1, n, d), and the control's guides at all but the last, (N, n, d), where it has any."""

    points: Tensor
    guides: Tensor | None


def walk(control: Control, kernels: Kernels, noise: Noise) -> Walk:
    """Return one path per stream of `noise`, all of which is drawn at once.

    Paths of the law of `simulate`, for those who take their densities afterwards, by `log_forward` and `log_backward`: there
    all steps are one call.
    """
    times = kernels.times[:-1].float().to(noise.device)
    y, *draws = noise.randn(len(kernels) + 1, *control.event_shape).transpose(0, 1).contiguous()
    points, guides = [y], []
    for t, z, step in zip(times, draws, kernels.steps().tolist(), strict=True):
        guide = control.guide(y)
        mean, variance = _forward_kernel(y, control.moments(y, t, guide), step)
        y = mean + variance.sqrt() * z
        points.append(y)
        guides.append(guide)
    known = [guide for guide in guides if guide is not None]
    return Walk(torch.stack(points), torch.stack(known) if known else None)


def noised(control: Control, kernels: Kernels, y: Tensor, noise: Noise) -> Paths:
    """Return the path of the noising process from each of y, (n, d): with y from the target, log w averages to the EUBO."""
    times, last = kernels.times.float().to(noise.device), y
    forward = torch.zeros(len(y), dtype=torch.float64, device=noise.device)
    backward = torch.zeros_like(forward)
    for k, step in reversed(list(enumerate(kernels.steps().tolist()))):
        z, (a, _, b2, *_) = noise.randn_like(y), step
        before = a * y + b2**0.5 * z
        mean, variance = _forward_kernel(before, control.moments(before, times[k], control.guide(before)), step)
        forward = forward - ((y - mean).square() / variance + variance.log()).sum(-1) / 2
        backward = backward - z.square().sum(-1) / 2 - y.shape[-1] / 2 * math.log(b2)
        y = before
    backward = backward + (y.double().square() + math.log(2 * math.pi)).sum(-1) / 2
    return Paths(last, forward, backward)


def log_forward(control: Control, kernels: Kernels, path: Walk) -> Tensor:
    """Return the log of the product of `control`'s forward kernels along `path`, (n,), as `Paths` has it, in one call."""
    before, after = path.points[:-1], path.points[1:]
    moments = control.moments(before, kernels.times[:-1, None].to(before), path.guides)
    mean, variance = _forward_kernel(before, moments, kernels.steps().to(before).T[..., None, None])
    return -((after - mean).square() / variance + variance.log()).sum((0, 2)) / 2


def log_backward(kernels: Kernels, points: Tensor) -> Tensor:
    """Return the log of the product of backward kernels over log N(y_0; 0, I) along `points`, (n,) float64, as `Paths` has it."""
    decay, variance = kernels.decay.to(points), kernels.variance.to(points)
    missed = (points[:-1] - decay[:, None, None] * points[1:]).square() / variance[:, None, None]
    start = points[0].double().square() + math.log(2 * math.pi) - kernels.variance.log().sum().to(points.device)
    return (start.sum(1) - missed.sum((0, 2), dtype=torch.float64)) / 2


def _forward_kernel(y: Tensor, moments: Moments, step: Sequence[float] | Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and variances of P_F at y; `step` is a row of `Kernels.steps`, or all of them."""
    a, p, b2, before, after = step
    excess = moments.spread - 1
    return a * y + p * moments.drift, b2 * (1 + after * excess) / (1 + before * excess)
