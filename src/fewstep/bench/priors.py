"""The prior of an image benchmark: named, given, or a network with random weights where only the time matters."""

from __future__ import annotations

from fewstep.core.denoiser import Denoiser
from fewstep.core.noise import seeded
from fewstep.priors.unet import UNetConfig, UNetDenoiser

RANDOM = "random"


def resolve_prior(prior: str | Denoiser) -> Denoiser:
    """Return a denoiser in evaluation mode: the object itself, "random", or what `load_prior` finds under the name."""
    if isinstance(prior, Denoiser):
        return prior.eval()
    if prior == RANDOM:
        return random_prior()
    from fewstep.priors.loaders import load_prior

    return load_prior(prior).eval()


def random_prior(config: UNetConfig | None = None) -> UNetDenoiser:
    """Return the network of the shipped prior with random weights: right for times, meaningless for quality."""
    return seeded(lambda: UNetDenoiser(config), 0).eval().requires_grad_(False)
