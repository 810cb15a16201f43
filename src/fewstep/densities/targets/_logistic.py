"""Bayesian logistic regression with a normal prior on every weight."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fewstep.core.density import TargetDensity, floating


class LogisticPosterior(TargetDensity):
    """log rho(w) = sum_n log sigmoid(y_n x_n'w) + log N(w; 0, scale^2 I), x_n standardised, with an intercept as the last weight.

    Attributes:
        data: a CSV file without a header: features, and last a label in {-1, 1} or {0, 1}. Constant features are only centred.
        scale: the standard deviation of the prior. Without a prior many data sets, separable ones among them, have no posterior.
    """

    data: str | Path
    scale: float

    @cached_property
    def dim(self) -> int:  # type: ignore[override]
        """See `TargetDensity`: features and the intercept."""
        return self.design[0].shape[1]

    @cached_property
    def design(self) -> tuple[Tensor, Tensor]:
        """The features, (n, d) with the intercept, and labels in {-1, 1}, (n,), float64.

        Raises:
            ValueError: a file that is no such table.
        """
        try:
            table = np.loadtxt(self.data, delimiter=",", ndmin=2)
        except (OSError, ValueError) as error:
            raise ValueError(f"{self.data} cannot be read as a CSV of numbers ({error})") from None
        features, label = torch.from_numpy(table[:, :-1]), torch.from_numpy(table[:, -1])
        if not bool(((label == 1) | (label == -1) | (label == 0)).all()) or len(label.unique()) != 2:
            raise ValueError(f"{self.data}: the last column must hold two labels, -1 or 0 and 1")
        width = features.std(0, correction=0)
        features = (features - features.mean(0)) / torch.where(width > 0, width, 1.0)
        return torch.cat([features, torch.ones(len(features), 1, dtype=torch.float64)], 1), torch.where(
            label > 0, 1.0, -1.0
        ).double()

    def log_prob(self, x: Tensor) -> Tensor:
        """See `TargetDensity`."""
        x = floating(x)
        features, label = (part.to(x) for part in self.design)
        fit = torch.nn.functional.logsigmoid(x @ features.T * label).sum(1)
        constant = self.dim * (0.5 * math.log(2 * math.pi) + math.log(self.scale))
        return fit - x.square().sum(1) / (2 * self.scale**2) - constant

    def score(self, x: Tensor) -> Tensor:
        """See `TargetDensity`."""
        x = floating(x)
        features, label = (part.to(x) for part in self.design)
        return (torch.sigmoid(-(x @ features.T) * label) * label) @ features - x / self.scale**2


class Table(NamedTuple):
    """What a data set is known by."""

    name: str
    rows: int
    features: int
    positive: int


@dataclass(frozen=True)
class PublishedPosterior(LogisticPosterior):
    """Logistic regression on one known table, with prior N(0, 1).

    Args:
        data: a CSV file whose last column is the label.

    Raises:
        ValueError: the file holds another table than `table`.
    """

    table: ClassVar[Table]
    scale: ClassVar[float] = 1.0  # type: ignore[misc]

    data: str | Path

    def __post_init__(self) -> None:
        features, label = self.design
        found = Table(self.table.name, len(label), features.shape[1] - 1, int((label > 0).sum()))
        if found != self.table:
            raise ValueError(
                f"{self.data} is not {self.table.name}: expected {self.table.rows} rows, {self.table.features} features and "
                f"{self.table.positive} positive labels"
            )
