"""fewstep: posterior samples from a diffusion model and a measurement in a few network calls.

prior = fewstep.load_prior("natural")
problem = fewstep.Posterior(prior, fewstep.image_likelihood(y, physics, sigma))
samples = fewstep.get("diffpir")()(problem, num_samples=16, seed=0)
samples.mean, samples.std, samples.interval(0.9)
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_HOME = {
    "Cosine": "core.schedule",
    "Denoiser": "core.denoiser",
    "EDM": "core.schedule",
    "Flow": "core.schedule",
    "GaussianLikelihood": "core.likelihood",
    "GaussianPrior": "priors.exact",
    "JointLikelihood": "core.likelihood",
    "JpegLikelihood": "operators.jpeg",
    "JpegMeasurement": "operators.jpeg",
    "Likelihood": "core.likelihood",
    "MixturePrior": "priors.exact",
    "Noise": "core.noise",
    "PoissonLikelihood": "operators.poisson",
    "Posterior": "core.problem",
    "Sampler": "core.sampler",
    "Samples": "core.samples",
    "Schedule": "core.schedule",
    "Tabulated": "core.schedule",
    "TargetDensity": "core.density",
    "VarianceExploding": "core.schedule",
    "VariancePreserving": "core.schedule",
    "as_deepinv": "deepinv_model",
    "as_target": "densities.user",
    "available": "core.registry",
    "distill": "densities.distill",
    "fit": "densities.fit",
    "gaussian_jpeg": "operators.jpeg",
    "get": "core.registry",
    "get_operator": "operators.words",
    "image_likelihood": "operators.image",
    "load_density_sampler": "densities.base",
    "load_prior": "priors.loaders",
    "load_sampler": "unfolded.loaders",
    "save_sampler": "unfolded.loaders",
    "target": "densities.targets",
}
__all__ = sorted([*_HOME, "__version__"])


def __getattr__(name: str) -> Any:
    """Import a public name where it lives, on first use: `import fewstep` stays light."""
    if name not in _HOME:
        raise AttributeError(f"module 'fewstep' has no attribute {name!r}")
    return getattr(importlib.import_module(f"fewstep.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return __all__
