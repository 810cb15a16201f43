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
        data: a CSV file whose last column is the label.

    Raises:
        ValueError: the file holds another table.
    """

    table = Table("Sonar", 208, 60, 97)
    # -108.3822, -108.3823 and -108.3854, standard errors 0.004; annealed SMC gave -108.46 to -108.34
    log_z_bounds = Bounds(
        -108.392, -108.374, "importance sampling from a normal and two t laws of the posterior's covariance"
    )
