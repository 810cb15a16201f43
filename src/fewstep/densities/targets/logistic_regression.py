"""Bayesian logistic regression on data of one's own."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from fewstep.densities.targets._logistic import LogisticPosterior


@dataclass(frozen=True)
class LogisticRegression(LogisticPosterior):
    """The posterior of a logistic regression on `data`, a CSV file whose last column is the label.

    Args:
        data: a CSV file whose last column is the label.
        scale: standard deviation of the prior on every weight.
    """

    data: str | Path
    scale: float = 1.0
