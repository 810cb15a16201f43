"""Bayesian logistic regression on the UCI data set Ionosphere."""

from __future__ import annotations

from dataclasses import dataclass

from fewstep.core.density import Bounds
from fewstep.densities.targets._logistic import PublishedPosterior, Table


@dataclass(frozen=True)
class Ionosphere(PublishedPosterior):
    """The posterior of 35 weights given 351 rows of the UCI data set Ionosphere, a CSV file at `data`.

    Prior N(0, 1) on every weight, as in Blessing et al. 2024, arXiv:2406.07423.

    Args:
        data: see `LogisticPosterior`.

    Raises:
        ValueError: the file holds another table.
    """

    table = Table("Ionosphere", 351, 34, 225)
    log_z_bounds = Bounds(-111.65, -111.58, "annealed SMC from the Laplace fit, three runs of 2000 particles")
