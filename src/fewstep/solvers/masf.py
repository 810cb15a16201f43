r"""MASF: the prediction of x_0 is replaced by a moving average over the steps, band by band of a Haar transform, under DDIM.

    W Dbar = gamma * W D + (1 - gamma) * W Dbar_before,    one gamma for each band, linear in t

W is the orthonormal Haar transform over the last two axes, of one level; events with a single axis are one band. Epsilon is
recomputed from x_t and the average. With all gamma = 1 it is DDIM. The average lags behind the prediction by a share of one step,
which costs no order, and on an exact denoiser it is nothing but that lag: what there may be to gain is with a noisy network.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fewstep.core.batch import like
from fewstep.core.multistep import Predict, Solver
from fewstep.core.noise import Noise
from fewstep.core.problem import Posterior
from fewstep.core.reference import Reference
from fewstep.core.sampler import State
from fewstep.solvers.ddim import DDIM


@dataclass(frozen=True)
class MASF(Solver):
    """Moving average in the frequency domain. The published weights are not known: the defaults are ours, and not tuned.

    Args:
        steps: network calls.
        low: gamma of the coarse band (LL) at t = 1 and at t = 0, in (0, 1].
        mixed: gamma of the bands with detail along one axis (LH, HL).
        high: gamma of the band with detail along both (HH).
        grid: spacing of the times.
    """

    steps: int = 20
    low: tuple[float, float] = (0.9, 1.0)
    mixed: tuple[float, float] = (1.0, 0.9)
    high: tuple[float, float] = (1.0, 0.9)
    grid: str | tuple[float, ...] = "uniform"

    order: ClassVar = 1
    limit: ClassVar = "the prior as steps grow"
    reference: ClassVar = Reference(
        "Boosting Diffusion Models with Moving Average Sampling in Frequency Domain",
        "Qian, Yurui and Cai, Qi and Pan, Yingwei and Li, Yehao and Yao, Ting and Sun, Qibin and Mei, Tao",
        2024,
        "IEEE/CVF Conference on Computer Vision and Pattern Recognition",
        "2403.17870",
    )

    def __post_init__(self) -> None:
        for name in ("low", "mixed", "high"):
            if len(getattr(self, name)) != 2:
                raise ValueError(f"{name} must be two weights, at t = 1 and at t = 0, got {getattr(self, name)}")
        if not all(0 < gamma <= 1 for gamma in (*self.low, *self.mixed, *self.high)):
            raise ValueError(f"all weights must lie in (0, 1], got {self!r}")

    def advance(self, problem: Posterior, state: State, k: int, noise: Noise, predict: Predict) -> State:
        """See `Solver`; the state's memory is the average of the predictions.

        Raises:
            ValueError: the last two axes of the event are not even.
        """
        t, _ = self.interval(problem, k)
        x0 = self.average(predict(problem, state.x, t, noise), state.memory, t)
        base = DDIM(self.steps, grid=self.grid)
        return State(base.advance(problem, State(state.x), k, noise, lambda *_: x0).x, x0)

    def average(self, x0: Tensor, before: Tensor | None, t: Tensor) -> Tensor:
        """Return the average of a prediction at time `t`, () or (N,), with the average before it, (N, *event) each."""
        if before is None:
            return x0
        lag = [like(t * (1 - at_1) + (1 - t) * (1 - at_0), x0) for at_1, at_0 in (self.low, self.mixed, self.high)]
        change = x0 - before
        if change.ndim < 3:
            return x0 - lag[0] * change
        coarse, *mixed, fine = haar(change)
        return x0 - unhaar([lag[0] * coarse, *(lag[1] * band for band in mixed), lag[2] * fine])


def haar(x: Tensor) -> list[Tensor]:
    """Return the bands LL, LH, HL, HH of an orthonormal Haar transform of one level, (..., H, W) -> (..., H / 2, W / 2) each.

    Raises:
        ValueError: H or W is odd.
    """
    if x.shape[-1] % 2 or x.shape[-2] % 2:
        raise ValueError(f"the Haar transform needs even sides, got {x.shape[-2]} x {x.shape[-1]}")
    rows = _pair(x[..., ::2, :], x[..., 1::2, :])
    return [band for half in rows for band in _pair(half[..., ::2], half[..., 1::2])]


def unhaar(bands: list[Tensor]) -> Tensor:
    """Return the inverse of `haar`, (..., H, W)."""
    rows = [torch.stack(_pair(*bands[i : i + 2]), -1).flatten(-2) for i in (0, 2)]
    return torch.stack(_pair(*rows), -2).flatten(-3, -2)


def _pair(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Return sum and difference over sqrt(2): its own inverse."""
    return (a + b) / math.sqrt(2), (a - b) / math.sqrt(2)
