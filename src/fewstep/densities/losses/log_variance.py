"""Log-variance (VarGrad): the variance of log w over paths that are constants (Richter and Berner 2024, arXiv:2307.01198).

It is zero exactly where all weights are equal, whatever law the paths follow. On the control's own paths its gradient is
twice that of the relative entropy with the batch mean as control variate (Richter et al. 2020, arXiv:2010.10436).
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from fewstep.densities.losses._path import PathLoss
from fewstep.densities.networks import ControlNet


@dataclass(frozen=True)
class LogVariance(PathLoss):
    """Var[log w], the unbiased sample variance of the batch; see `PathLoss`."""

    def value(self, control: ControlNet, log_w: Tensor) -> Tensor:
        """See `PathLoss`."""
        return log_w.var()
