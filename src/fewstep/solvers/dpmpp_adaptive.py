r"""DPM-Solver++ with a step size of its own for every sample: order 1 against 2S, which share their first prediction.

With lo and hi the two results of a step h in lambda, E = RMS[(hi - lo) / max(atol, rtol max(|lo|, |x_t|))]; the step is taken
where E <= 1, and h becomes 0.9 h / sqrt(E). The number of attempts is bounded: a step of the size that reaches the end in the
attempts left is always taken.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fewstep.core.batch import like
from fewstep.core.multistep import X0, Point, Predict, Solver, Stage, midpoint, row
from fewstep.core.noise import Noise
from fewstep.core.problem import Posterior
from fewstep.core.reference import Reference
from fewstep.core.sampler import State
from fewstep.solvers.ddim import DDIM

ARRIVED = 1e-9  # what is left of the way in lambda at the end


@dataclass(frozen=True)
class AdaptiveDPMSolverPP(Solver):
    """DPM-Solver++ (12), adaptive.

    Args:
        steps: the most attempts, of two network calls each, and the last step to t = 0, of one.
        rtol: relative tolerance of a step.
        atol: absolute tolerance of a step, in units of x; the paper's is two levels of 255 on [-1, 1].
        first: size of the first step in lambda.
        grid: only its two ends play a part, t = 1 and the last noisy time.
    """

    steps: int = 60
    rtol: float = 0.05
    atol: float = 0.0078
    first: float = 0.05
    grid: str | tuple[float, ...] = "log_snr"

    order: ClassVar = 2
    nfe_varies: ClassVar = True
    limit: ClassVar = "the prior as the tolerances shrink, if the steps suffice"
    reference: ClassVar = Reference(
        "DPM-Solver: A Fast ODE Solver for Diffusion Probabilistic Model Sampling in Around 10 Steps",
        "Lu, Cheng and Zhou, Yuhao and Bao, Fan and Chen, Jianfei and Li, Chongxuan and Zhu, Jun",
        2022,
        "Advances in Neural Information Processing Systems",
        "2206.00927",
    )

    def __post_init__(self) -> None:
        if not (self.rtol >= 0 and self.atol > 0 and self.first > 0):
            raise ValueError(f"rtol must not be negative, atol and first must be positive, got {self!r}")

    @property
    def nfe(self) -> int:
        """See `Sampler`."""
        return 2 * self.steps - 1

    def advance(self, problem: Posterior, state: State, k: int, noise: Noise, predict: Predict) -> State:
        """See `Solver`; the state's memory is where each sample stands in lambda and its next step, (N,) each."""
        times, x = self.times(problem), state.x
        if k == self.steps - 1:
            return DDIM(self.steps, grid=self.grid).advance(problem, State(x), k, noise, predict)
        start, end = problem.schedule.log_snr(times[[0, -2]])
        log_snr, h = state.memory or (start.expand(len(x)), torch.full((len(x),), self.first).to(start))
        left = end - log_snr
        if float(left.max()) < ARRIVED:
            return state
        enough = left / (self.steps - 1 - k)
        h = torch.minimum(torch.maximum(h, enough), left)
        t, s = (Point.at_ratio(problem.schedule, torch.exp(-at)) for at in (log_snr, log_snr + h))
        inner, outer = midpoint(problem.schedule, t, s)
        x0 = predict(problem, x, t.t, noise)
        low = _combined(row(X0, t, s, (-torch.expm1(-h),)), x, x0)
        high = _combined(outer, x, predict(problem, _combined(inner, x, x0), inner.end.t, noise))
        error = self.error(low, high, x)
        taken = (error <= 1) | (h <= enough) | (left < ARRIVED)
        x = torch.where(like(taken, x) > 0, high, x)
        return State(x, (log_snr + h * taken, 0.9 * h * error.clamp_min(1e-6).rsqrt()))

    def error(self, low: Tensor, high: Tensor, before: Tensor) -> Tensor:
        """Return E of each item, (N, *event) -> (N,) float64."""
        scale = (self.rtol * torch.maximum(low.abs(), before.abs())).clamp_min(self.atol)
        return ((high - low) / scale).double().square().flatten(1).mean(1).sqrt().cpu()


def _combined(stage: Stage, x: Tensor, x0: Tensor) -> Tensor:
    """Return the result of a row that weighs the point before the step and one prediction, (N, *event)."""
    return like(stage.x[-1], x) * x + like(stage.predictions[0], x) * x0
