"""A sampler as a reconstruction network of deepinv: x_hat = model(y, physics), for `deepinv.test` and its trainer.

deepinv itself is not imported: it asks for no more than an `nn.Module` of that signature.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any, Self

import torch
from torch import Tensor, nn

from fewstep.core.checks import check_count, check_pairs
from fewstep.core.denoiser import Denoiser
from fewstep.core.noise import Antithetic, Noise
from fewstep.core.problem import Posterior, check_prior
from fewstep.core.sampler import Sampler
from fewstep.operators.image import image_likelihood, to_unit


class DeepinvModel(nn.Module):
    """The mean of samples of p(x | y), for any linear deepinv physics with Gaussian noise.

    In training mode, with gradients enabled, the samples are differentiable in the sampler's own network.

    Args:
        sampler: any sampler; networks among its fields move with this module and are its parameters.
        prior: the diffusion prior.
        num_samples: K, how many samples are averaged.
        seed: of the samples.
        chunk: the most items that go through the network at once; None for all of them.
        antithetic: whether they come in pairs with opposite noise, see `Sampler`: two are then worth many.
    """

    def __init__(
        self,
        sampler: Sampler,
        prior: Denoiser,
        num_samples: int = 1,
        seed: int = 0,
        chunk: int | None = None,
        antithetic: bool = False,
    ) -> None:
        super().__init__()
        if not isinstance(sampler, Sampler):
            raise TypeError(f"the sampler must be a Sampler, got {sampler!r}; fewstep.get(name)() makes one")
        check_prior(prior)
        check_count("num_samples", num_samples)
        check_pairs(num_samples, antithetic)
        self.sampler, self.prior = sampler, prior
        self.num_samples, self.seed, self.chunk, self.antithetic = num_samples, seed, chunk, antithetic
        values = (getattr(sampler, f.name) for f in fields(sampler))  # type: ignore[arg-type]
        self.networks = nn.ModuleList(value for value in values if isinstance(value, nn.Module))

    def train(self, mode: bool = True) -> Self:
        """Set the mode of the sampler's networks; the prior, which is not trained, is left in evaluation mode."""
        self.training = mode
        for part in self.children():
            part.train(mode and part is not self.prior)
        return self

    def forward(self, y: Tensor, physics: Any, **_: Any) -> Tensor:
        """Return the mean of K samples, (B, C, H, W), clipped to [0, 1] except in training with gradients.

        Args:
            y: measurements of images in [0, 1], (B, *measurement).
            physics: a deepinv `LinearPhysics` whose `noise_model` is a `GaussianNoise`; its `sigma` is the noise level of y,
                a number or (B,).

        Raises:
            ValueError: the noise is not Gaussian or its level 0, or y does not fit the operator.
        """
        problem = Posterior(self.prior, image_likelihood(y, physics, gaussian_level(physics)))
        if self.training and torch.is_grad_enabled():
            return to_unit(self._differentiable(problem))
        drawn = self.sampler(problem, self.num_samples, seed=self.seed, chunk=self.chunk, antithetic=self.antithetic)
        return to_unit(drawn.mean).clamp(0, 1)

    def _differentiable(self, problem: Posterior) -> Tensor:
        """Return the same mean with its graph, (B, *event)."""
        self.sampler.check(problem, self.num_samples)
        likelihood, items = problem.likelihood, problem.expand(self.num_samples)
        seeds = [self.seed] * likelihood.batch
        source = Antithetic if self.antithetic else Noise
        noise = source.spawn(seeds, range(self.num_samples), likelihood.dtype, likelihood.device)
        return self.sampler.run(items, noise).unflatten(0, (self.num_samples, -1)).mean(0)


def gaussian_level(physics: Any) -> Tensor | float:
    """Return the noise level of an operator with Gaussian noise, a number or (B,); ValueError for any other noise.

    Other noise models have a `sigma` too, which is but a part of what they do, so their class decides.
    """
    noise = getattr(physics, "noise_model", None)
    sigma = getattr(noise, "sigma", None)
    if sigma is None or "GaussianNoise" not in (kind.__name__ for kind in type(noise).__mro__):
        raise ValueError(
            f"{type(physics).__name__} has no Gaussian noise model: noise_model must be a GaussianNoise with a sigma, "
            f"got {type(noise).__name__}"
        )
    return sigma


def as_deepinv(
    sampler: Sampler,
    prior: Denoiser,
    num_samples: int = 1,
    *,
    seed: int = 0,
    chunk: int | None = None,
    antithetic: bool = False,
) -> DeepinvModel:
    """Return `sampler` as a deepinv reconstruction network, `model(y, physics)`, see `DeepinvModel`.

    The prior and the networks of the sampler are parts of it, not copies: like the model, they are left in evaluation mode.

    Args:
        sampler: of `load_sampler`, or any other.
        prior: the diffusion prior.
        num_samples: K, whose mean is returned.
        seed: of the samples.
        chunk: the most items that go through the network at once.
        antithetic: whether they come in pairs with opposite noise, see `Sampler`.
    """
    return DeepinvModel(sampler, prior, num_samples, seed, chunk, antithetic).eval()
