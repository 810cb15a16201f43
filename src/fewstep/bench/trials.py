"""Problems with a known posterior on which a sampler is trained and measured: a mixture prior, an operator with a null space."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fewstep.bench.common import FAILURES, failure
from fewstep.bench.log import Log
from fewstep.core.likelihood import GaussianLikelihood
from fewstep.core.noise import Noise, mix
from fewstep.core.problem import Posterior
from fewstep.core.sampler import Sampler
from fewstep.densities.batches import in_blocks
from fewstep.metrics import sliced_wasserstein
from fewstep.operators.matrix import MatrixOperator
from fewstep.priors.exact import ExactPosterior, MixturePrior
from fewstep.testing.problems import mixture_problem
from fewstep.uncertainty import sbc_ranks, tarp_ranks, tarp_references, uniformity

SIGMA = 0.1
CHECKS, PER_CHECK = 400, 99  # problems for SBC and TARP, and samples of each


@dataclass(frozen=True)
class Setup:
    """A problem with its prior in single precision, and how networks are trained on it.

    Attributes:
        dim: size of x.
        width: of small networks.
        steps: of a training.
        batch: measurements per step in the last third of it; half as many in the second third, a quarter in the first.
        draws: of the network for each; at equal cost two leave the least noise in the gradient, a truth saying more than a draw.
    """

    dim: int = 16
    width: int = 256
    steps: int = 20_000
    batch: int = 384
    draws: int = 2

    @property
    def rank(self) -> int:
        """Rank of the operator."""
        return self.dim // 2

    @cached_property
    def problem(self) -> Posterior:
        """The problem of one measurement, float64."""
        return mixture_problem(self.dim, self.rank, SIGMA).problem

    @cached_property
    def prior(self) -> MixturePrior:
        """The prior, float32."""
        given: Any = self.problem.prior
        return MixturePrior(given.weights.float(), given.means.float(), given.covs.float(), given.schedule)

    @cached_property
    def matrix(self) -> Tensor:
        """The operator, (rank, dim), float32."""
        return self.problem.gaussian.physics.matrix.float()

    def simulate(self, noise: Noise) -> tuple[Tensor, GaussianLikelihood]:
        """Return one truth per stream and the likelihood of its measurement."""
        x0, matrix = self.prior.sample(len(noise), noise), self.matrix
        y = x0 @ matrix.T + SIGMA * noise.randn(len(matrix))
        return x0, GaussianLikelihood(y, MatrixOperator(matrix), SIGMA)


def streams(words: tuple[int, ...], items: Iterable[int]) -> Noise:
    """Return the streams of consecutive items of a training step on the CPU."""
    own = list(items)
    return in_blocks(words, range(own[0], own[-1] + 1), torch.device("cpu"))


@dataclass(frozen=True)
class Measurements:
    """Training batches of a `Setup`."""

    setup: Setup

    def count(self, step: int) -> int:
        """Return the batch size: many small steps at first, few noisy ones at the end."""
        return max(1, self.setup.batch * 2 ** min(2, 3 * step // self.setup.steps) // 4)

    def batch(self, step: int, items: Iterable[int]) -> dict[str, Any]:
        """Return truths and the likelihood of their measurements."""
        x0, likelihood = self.setup.simulate(streams((9, step), items))
        return {"x0": x0, "likelihood": likelihood}


class Trial(NamedTuple):
    """Measurements, their exact posteriors, and exact samples to compare with, (K, B, D) twice."""

    setup: Setup
    problem: Posterior
    posterior: ExactPosterior
    exact: tuple[Tensor, Tensor]
    seed: int

    @classmethod
    def of(cls, setup: Setup, measurements: int, num_samples: int, seed: int) -> Trial:
        """Return the trial of `measurements` simulated measurements."""
        prior = setup.prior
        _, likelihood = setup.simulate(Noise([mix(77, b) for b in range(measurements)]))
        posterior = prior.posterior(likelihood)
        exact = [posterior.sample(num_samples, seed=s).reshape(num_samples, measurements, -1) for s in (5, 6)]
        return cls(setup, Posterior(prior, likelihood), posterior, (exact[0], exact[1]), seed)

    def row(self, sampler: Sampler, checked: int = 0) -> dict[str, Any]:
        """Return the columns of one sampler, with SBC and TARP where it needs at most `checked` network calls."""
        try:
            samples = sampler(self.problem, len(self.exact[0]), seed=self.seed)
            checks = self.checks(sampler) if sampler.nfe <= checked else {}
        except FAILURES as error:
            return failure(error)
        counts = {"nfe": samples.counts.network, "vjps": samples.counts.vjp}
        return self.distances(samples.x) | checks | counts | {"seconds": samples.seconds}

    def distances(self, x: Tensor) -> dict[str, float]:
        """Return moments and transport of samples, (K, B, D), averaged over the measurements."""
        _, _, vectors = torch.linalg.svd(self.setup.matrix)
        rank = len(self.setup.matrix)
        rows = []
        for b in range(x.shape[1]):
            cov, exact_cov = torch.cov(x[:, b].T), self.posterior.cov[b]
            gap = (x[:, b].mean(0) - self.posterior.mean[b].flatten()) / exact_cov.diagonal().sqrt()
            ratios = [
                torch.trace(v @ cov @ v.T) / torch.trace(v @ exact_cov @ v.T) for v in (vectors[:rank], vectors[rank:])
            ]
            transport = sliced_wasserstein(x[:, b], self.exact[0][:, b])
            floor = sliced_wasserstein(self.exact[1][:, b], self.exact[0][:, b])
            rows.append([float(gap.square().mean().sqrt()), *map(float, ratios), transport / floor])
        means = torch.tensor(rows).mean(0).tolist()
        return dict(zip(("mean error", "observed", "null space", "SW/floor"), means, strict=True))

    def reference(self) -> dict[str, Any]:
        """Return the columns of exact samples, the floor of every column."""
        truth, likelihood = self.checked()
        x = self.problem.prior.posterior(likelihood).sample(PER_CHECK, seed=80).reshape(PER_CHECK, *truth.shape)  # type: ignore[operator]
        return self.distances(self.exact[1]) | p_values(x, truth, likelihood)

    def checks(self, sampler: Sampler) -> dict[str, float]:
        """Return p-values of SBC and TARP on fresh problems."""
        truth, likelihood = self.checked()
        seeds = [mix(79, b) for b in range(CHECKS)]
        return p_values(sampler(Posterior(self.problem.prior, likelihood), PER_CHECK, seed=seeds).x, truth, likelihood)

    def checked(self) -> tuple[Tensor, GaussianLikelihood]:
        """Return the truths and measurements of the checks."""
        return self.setup.simulate(Noise([mix(78, b) for b in range(CHECKS)]))


def kept(log: Log, key: str, row: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Return the row called `key`, which is made and written where the log does not have it."""
    if not log.has(key):
        log.add(key, row())
    return {name: value for name, value in log.row(key).items() if name not in ("key", "mark")}


def p_values(x: Tensor, truth: Tensor, likelihood: GaussianLikelihood) -> dict[str, float]:
    """Return the p-values of SBC and TARP for samples, (K, B, D), of B problems."""
    sbc = uniformity(sbc_ranks(x, truth), len(x))
    tarp = uniformity(tarp_ranks(x, truth, tarp_references(likelihood))[:, None], len(x))
    return {"SBC": min(1.0, float(sbc.min()) * sbc.numel()), "TARP": float(tarp.min())}
