"""Metrics: of one image against its truth (`quality`), of a set of samples against another (`distances`, `transport`,
`features`), and against a density (`stein`)."""

from fewstep.metrics.distances import energy_distance, frechet_distance, mmd
from fewstep.metrics.features import FeatureNet, inception, mobilenet, patches
from fewstep.metrics.quality import LPIPS_VARIABLE, Missing, coverage, lpips, lpips_net, psnr, ssim
from fewstep.metrics.stein import mode_weights, stein_discrepancy
from fewstep.metrics.transport import noise_floor, sinkhorn_divergence, sliced_wasserstein, wasserstein

__all__ = [
    "LPIPS_VARIABLE",
    "FeatureNet",
    "Missing",
    "coverage",
    "energy_distance",
    "frechet_distance",
    "inception",
    "lpips",
    "lpips_net",
    "mmd",
    "mobilenet",
    "mode_weights",
    "noise_floor",
    "patches",
    "psnr",
    "sinkhorn_divergence",
    "sliced_wasserstein",
    "ssim",
    "stein_discrepancy",
    "wasserstein",
]
