"""Scripted noise, and how far a Gaussian law is from a Gaussian truth."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from fewstep.core.noise import Noise
from fewstep.core.problem import Posterior
from fewstep.core.sampler import Sampler
from fewstep.priors.exact import ExactPosterior


class GaussianLaw(NamedTuple):
    """Mean, (D,), and covariance, (D, D)."""

    mean: Tensor
    cov: Tensor


class Distance(NamedTuple):
    """How far a law is from a Gaussian truth.

    mean_error: largest mean error over the principal directions of the truth, in its standard deviations there.
    low, high: smallest and largest ratio of variance to the true one over directions.
    """

    mean_error: float
    low: float
    high: float


class ScriptedNoise(Noise):
    """Noise whose numbers are given: item n draws script[n, 0], script[n, 1], ... in turn, and zeros after the end."""

    def __init__(self, script: Tensor) -> None:
        super().__init__(range(script.shape[0]), script.dtype, script.device)
        self.script, self.used = script, 0

    def randn(self, *shape: int) -> Tensor:
        """Return the next numbers of the script, (N, *shape)."""
        size = math.prod(shape)
        out = self.script[:, self.used : self.used + size]
        self.used += size
        return torch.nn.functional.pad(out, (0, size - out.shape[1])).reshape(-1, *shape)

    def rand(self, *shape: int) -> Tensor:
        """Uniform numbers have no affine law."""
        raise TypeError("a sampler that draws uniform numbers is not affine in its noise")


def run_scripted(sampler: Sampler, problem: Posterior, script: Tensor) -> tuple[Tensor, int]:
    """Run a sampler on given noise, one row per item; return (N, *event) and how many numbers an item used."""
    noise = ScriptedNoise(script)
    with torch.no_grad():
        return sampler.run(problem.expand(script.shape[0]), noise), noise.used


def affine_error(sampler: Sampler, problem: Posterior) -> float:
    """Return how far the sampler is from affine in its noise: |f(u) + f(v) - f(u + v) - f(0)| relative to |f(u) - f(0)|."""
    dtype = problem.likelihood.dtype
    _, count = run_scripted(sampler, problem, torch.zeros(1, 0, dtype=dtype))
    u, v = torch.randn(2, count, dtype=dtype, generator=torch.Generator().manual_seed(3))
    out = run_scripted(sampler, problem, torch.stack([torch.zeros_like(u), u, v, u + v]))[0].flatten(1)
    defect = out[1] + out[2] - out[3] - out[0]
    return float(defect.norm() / (out[1] - out[0]).norm().clamp_min(1e-12))


def distance(law: GaussianLaw, posterior: ExactPosterior) -> Distance:
    """Compare a law with the exact posterior of one measurement, direction by direction of the true covariance."""
    truth_mean, truth_cov = posterior.mean.flatten(), posterior.cov[0]
    values, vectors = torch.linalg.eigh(truth_cov)
    whiten = vectors / values.sqrt()
    ratios = torch.linalg.eigvalsh(whiten.T @ law.cov @ whiten)
    error = (whiten.T @ (law.mean - truth_mean)).abs().max()
    return Distance(float(error), float(ratios.min()), float(ratios.max()))
