"""Bayesian logistic regression on the UCI data set Sonar."""

from __future__ import annotations

from dataclasses import dataclass

from fewstep.core.density import Bounds
from fewstep.densities.targets._logistic import PublishedPosterior, Table


@dataclass(frozen=True)
class Sonar(PublishedPosterior):
    """The posterior of 61 weights given 208 rows of the UCI data set Sonar, a CSV file at `data`.

    Prior N(0, 1) on every weight, as in Blessing et al. 2024, arXiv:2406.07423.

    Args:
        data: see `LogisticPosterior`.

    Raises:
        ValueError: the file holds another table.
    """

    table = Table("Sonar", 208, 60, 97)
    log_z_bounds = Bounds(-108.46, -108.34, "annealed SMC from the Laplace fit, three runs of 2000 particles")
