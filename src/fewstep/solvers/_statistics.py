"""What DPM-Solver-v3 knows of a prior: the coefficients of the fitted linear part, and their integrals."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from fewstep.core.batch import like
from fewstep.core.noise import Noise
from fewstep.core.problem import Posterior
from fewstep.core.sampler import State
from fewstep.solvers.dpmpp import DPMSolverPP

SLACK = 1e-6  # how far beyond its ends a table is read, for rounding
RIDGE = 1e-8  # added to Var f, against data of about unit scale, so that s = 0 where f does not vary


@dataclass(frozen=True, eq=False)
class Statistics:
    """l, s and b of one prior on a table of lambda, integrated by the trapezoidal rule.

    Args:
        log_snr: lambda, rising, (M,) float64.
        l, s, b: (M, *event) float64, or (M, 1, ...).

    Raises:
        ValueError: lambda does not rise.
    """

    log_snr: Tensor
    l: Tensor
    s: Tensor
    b: Tensor

    def __post_init__(self) -> None:
        if not bool((self.log_snr[1:] > self.log_snr[:-1]).all()):
            raise ValueError("log_snr of the statistics must rise")

    @classmethod
    def neutral(cls) -> Statistics:
        """Return (1, 0, 0)."""
        ends, one = torch.tensor([-50.0, 50.0], dtype=torch.float64), torch.ones(2, dtype=torch.float64)
        return cls(ends, one, 0 * one, 0 * one)

    def at(self, log_snr: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return l, L, S and B at `log_snr`, () or (Q,): (*shape, *event) each, by linear interpolation.

        Raises:
            ValueError: outside of the table.
        """
        low, high = float(self.log_snr[0]), float(self.log_snr[-1])
        if bool(((log_snr < low - SLACK) | (log_snr > high + SLACK)).any()):
            raise ValueError(f"the statistics are known for lambda from {low:.3g} to {high:.3g} only")
        log_snr = log_snr.clamp(low, high)
        i = (torch.searchsorted(self.log_snr, log_snr, right=True) - 1).clamp(0, len(self.log_snr) - 2)
        share = (log_snr - self.log_snr[i]) / (self.log_snr[i + 1] - self.log_snr[i])
        share = share[(..., *[None] * (self.l.ndim - 1))]
        at_l, at_big_l, at_big_s, at_big_b = (torch.lerp(table[i], table[i + 1], share) for table in self._tables)
        return at_l, at_big_l, at_big_s, at_big_b

    @cached_property
    def _tables(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        integral_s = self._integral(self.s)
        return self.l, self._integral(self.l), integral_s, self._integral(torch.exp(-integral_s) * self.b)

    def _integral(self, values: Tensor) -> Tensor:
        inner = torch.cumulative_trapezoid(values, self.log_snr.reshape(-1, *[1] * (values.ndim - 1)), dim=0)
        return torch.cat([torch.zeros_like(values[:1]), inner])


@torch.no_grad()
def estimate(problem: Posterior, log_snr: Tensor, noise: Noise) -> Statistics:
    r"""Estimate the statistics of a prior on its own probability flow, at one network call and one pullback per entry.

    l = E diag(sigma depsilon/dx) = 1 - alpha E diag(dD/dx) makes f insensitive to x; its diagonal is probed by one random sign
    pattern per item (Hutchinson). (s, b) is the least-squares fit of df/dlambda to f, per coordinate, the derivative taken by
    differences along each path (Zheng et al. 2023, arXiv:2310.13268; their code for it is not public).

    Args:
        problem: the prior with a `FlatLikelihood` of N items; the paper has N = 1024 and more.
        log_snr: (M,) float64, rising from its value at t = 1; the paper has M = 120 to 1200. M N events are held at once.
        noise: N streams.
    """
    schedule, shape = problem.schedule, problem.likelihood.event_shape
    times = schedule.time(torch.exp(-log_snr))
    walk = DPMSolverPP(steps=len(times) - 1, released=False).plan(schedule, times)
    start, probe = noise.randn(*shape), noise.randn(*shape).sign()
    state = State(like(schedule(times[0])[1], start) * start)
    seen: list[tuple[Tensor, Tensor]] = []

    def predict(problem: Posterior, x_t: Tensor, t: Tensor, noise: Noise) -> Tensor:
        alpha, _ = problem.coefficients(t, x_t)
        x0, pullback = problem.denoise_vjp(x_t, t)
        l = 1 - alpha * (probe * pullback(probe)).mean(0)
        seen.append((l.double().cpu(), ((1 - l) * x_t / alpha - x0).double().cpu()))
        return x0

    for k in range(len(times) - 1):
        state = walk.advance(problem, state, k, noise, predict)
    predict(problem, state.x, times[-1], noise)
    l, f = (torch.stack(side) for side in zip(*seen, strict=True))
    slope = torch.gradient(f, spacing=(log_snr,), dim=0)[0]
    centred = f - f.mean(1, keepdim=True)
    s = (centred * slope).mean(1) / (centred.square().mean(1) + RIDGE)
    return Statistics(log_snr, l, s, slope.mean(1) - s * f.mean(1))
