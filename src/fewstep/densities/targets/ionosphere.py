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
        data: a CSV file whose last column is the label.

    Raises:
        ValueError: the file holds another table.
    """

    table = Table("Ionosphere", 351, 34, 225)
    # -111.6044, -111.6055 and -111.6051, standard errors 0.003; annealed SMC gave -111.65 to -111.58
    log_z_bounds = Bounds(
        -111.612, -111.598, "importance sampling from a normal and two t laws of the posterior's covariance"
    )
