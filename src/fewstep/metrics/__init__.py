"""Metrics: of one image against its truth (`quality`), and of a set of samples against another (`distances`, `features`)."""

from fewstep.metrics.distances import energy_distance, frechet_distance, mmd, sliced_wasserstein
from fewstep.metrics.features import FeatureNet, inception, mobilenet, patches
from fewstep.metrics.quality import LPIPS_VARIABLE, Missing, coverage, lpips, lpips_net, psnr, ssim

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
    "patches",
    "psnr",
    "sliced_wasserstein",
    "ssim",
]
