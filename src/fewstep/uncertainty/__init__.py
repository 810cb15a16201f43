"""Uncertainty that holds: calibrated intervals, checks of a sampler where truths can be simulated, a parametric bootstrap."""

from fewstep.uncertainty.bootstrap import Transform, equivariant_bootstrap, flip, quarter_turn, shelf, shift
from fewstep.uncertainty.calibration import Calibration, patch_means
from fewstep.uncertainty.checks import expected_coverage, sbc_ranks, tarp_ranks, tarp_references, uniformity

__all__ = [
    "Calibration",
    "Transform",
    "equivariant_bootstrap",
    "expected_coverage",
    "flip",
    "patch_means",
    "quarter_turn",
    "sbc_ranks",
    "shelf",
    "shift",
    "tarp_ranks",
    "tarp_references",
    "uniformity",
]
