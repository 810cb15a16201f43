"""`fewstep bench unfolded`: UD2M before and after training, on mixtures whose posterior is known, beside the other methods.

The network is trained here, with the objective, the trainer and the sampler that photographs use; only its decoder (the exact
denoiser plus a small correction) and the metric of the energy score (that of the likelihood) belong to the exact problem.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.progress import track
from torch import Tensor, nn

from fewstep.bench.common import FAILURES, Report, describe, failed, variants
from fewstep.core.likelihood import GaussianLikelihood
from fewstep.core.noise import Noise, mix
from fewstep.core.problem import Posterior
from fewstep.core.sampler import Sampler
from fewstep.metrics import sliced_wasserstein
from fewstep.objectives.embeddings import measured
from fewstep.objectives.ud2m import UD2M, Contest, Weights
from fewstep.operators.matrix import MatrixOperator
from fewstep.priors.exact import ExactPosterior, MixturePrior
from fewstep.testing.problems import mixture_problem
from fewstep.training import Trainer, TrainingOptions
from fewstep.uncertainty import sbc_ranks, tarp_ranks, tarp_references, uniformity
from fewstep.unfolded.decoders import CorrectedDecoder
from fewstep.unfolded.levels import LevelConfig
from fewstep.unfolded.network import UnfoldedConfig, UnfoldedNetwork
from fewstep.unfolded.sampler import Unfolded

SIGMA = 0.1
PEERS = ("dps", "ddrm", "diffpir", "daps", "cm4ir")
CHECKS, PER_CHECK = 400, 99  # problems for SBC and TARP, and samples of each
NOTES = (
    "prior: four Gaussians; operator: random, of half the dimension, sigma 0.1. All columns are means over the measurements.",
    "mean error: root mean square over coordinates, in posterior standard deviations. observed / null: trace of the sample "
    "covariance over the exact one, within the row space and the null space of the operator.",
    "SW/floor: sliced 2-Wasserstein distance to exact samples over that of another exact set of the same size.",
    "SBC: smallest p-value of uniform ranks over the coordinates, times their number (Bonferroni); TARP: p-value of expected "
    "coverage; both are small where the sampler is not calibrated. The exact row shows what right samples give.",
    "A trained row was trained in this run; 'seconds' of it is the training, of the others the sampling.",
)


@dataclass(frozen=True)
class Setup:
    """A problem with its prior in single precision, and how a network is trained on it.

    Attributes:
        dim: size of x.
        width: of the correction network.
        steps: of the training.
        batch: measurements per step.
        draws: of the network for each.
    """

    dim: int = 16
    width: int = 256
    steps: int = 10_000
    batch: int = 128
    draws: int = 6

    @property
    def problem(self) -> Posterior:
        """The problem of one measurement, float64."""
        return mixture_problem(self.dim, self.dim // 2, SIGMA).problem

    @property
    def prior(self) -> MixturePrior:
        """The prior, float32."""
        given: Any = self.problem.prior
        return MixturePrior(given.weights.float(), given.means.float(), given.covs.float(), given.schedule)

    @property
    def matrix(self) -> Tensor:
        """The operator, (dim / 2, dim), float32."""
        return self.problem.gaussian.physics.matrix.float()

    def simulate(self, noise: Noise) -> tuple[Tensor, GaussianLikelihood]:
        """Return one truth per stream and the likelihood of its measurement."""
        x0, matrix = self.prior.sample(len(noise), noise), self.matrix
        y = x0 @ matrix.T + SIGMA * noise.randn(len(matrix))
        return x0, GaussianLikelihood(y, MatrixOperator(matrix), SIGMA)

    def network(self, levels: LevelConfig) -> UnfoldedNetwork:
        """Return a network before training."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return UnfoldedNetwork(UnfoldedConfig(levels), CorrectedDecoder(self.dim, self.width))


@dataclass(frozen=True)
class Measurements:
    """Training batches of a `Setup`."""

    setup: Setup

    def count(self, step: int) -> int:
        """Return the batch size."""
        return self.setup.batch

    def batch(self, step: int, items: Iterable[int]) -> dict[str, Any]:
        """Return truths and the likelihood of their measurements."""
        x0, likelihood = self.setup.simulate(Noise([mix(9, step, item) for item in items]))
        return {"x0": x0, "likelihood": likelihood}


LEVELS = {"paper": LevelConfig(base="pinned", pairing=1.0), "consistent": LevelConfig()}


def main(  # noqa: PLR0913 - one parameter is one option
    out: str | Path | None = None,
    *,
    dims: Sequence[int] = (16,),
    steps: int = 10_000,
    presets: Sequence[str] = ("paper", "consistent"),
    budgets: Sequence[int] = (9, 20, 100, 1000),
    measurements: int = 24,
    num_samples: int = 1500,
    seed: int = 0,
) -> Report:
    """Train and measure, print the tables, write the JSON report to `out` where given, and return it.

    Args:
        out: path of the JSON file.
        dims: sizes of x, one table each.
        steps: of each training.
        presets: levels that are trained, of `LEVELS`.
        budgets: network calls of the other methods.
        measurements: B.
        num_samples: K per measurement.
        seed: of the samples.
    """
    tables = {}
    for dim in dims:
        setup = Setup(dim, width=256 if dim <= 16 else 384, steps=steps)
        trial = Trial.of(setup, measurements, num_samples, seed)
        rows = [trial.reference()]
        for preset in presets:
            rows += unfolded_rows(setup, preset, trial)
        entries = list(variants(PEERS, budgets, every_preset=False))
        for entry in track(entries, f"{dim} dimensions", transient=True):
            rows.append(describe(entry) | trial.row(entry.method, entry.preset, entry.sampler))
        tables[f"Mixture in {dim} dimensions, rank {dim // 2}, sigma {SIGMA}"] = rows
    given = {"dims": dims, "steps": steps, "presets": presets, "budgets": budgets, "measurements": measurements}
    return Report("unfolded", given | {"num_samples": num_samples, "seed": seed}, tables, NOTES).finish(out)


def unfolded_rows(setup: Setup, preset: str, trial: Trial) -> list[dict[str, Any]]:
    """Return the rows of one choice of levels, before and after training, at three steps and at one."""
    untrained = setup.network(LEVELS[preset]).eval()
    begin = time.perf_counter()
    trained = train(setup, LEVELS[preset])
    seconds = {"seconds": time.perf_counter() - begin}
    rows = [trial.row("ud2m", f"{preset}, untrained", Unfolded(untrained, steps=n)) for n in (3, 1)]
    return rows + [trial.row("ud2m", f"{preset}, trained", Unfolded(trained, steps=n)) | seconds for n in (3, 1)]


def train(setup: Setup, levels: LevelConfig) -> UnfoldedNetwork:
    """Return a network trained on the energy score in the likelihood's metric."""
    options = TrainingOptions(
        steps=setup.steps,
        lr=1e-3,
        warmup=min(100, setup.steps),
        lr_final=0.01,
        weight_decay=0.0,
        ema=0.995,
        precision="no",
        log_every=setup.steps,
        validate_every=setup.steps,
        checkpoint_every=setup.steps,
    )
    objective = UD2M(setup.prior, Weights(), (measured,), draws=setup.draws)
    model: nn.Module = Contest(setup.network(levels))
    with tempfile.TemporaryDirectory() as folder:
        trained: Any = Trainer(model, objective, Measurements(setup), Path(folder), options, cpu=True).run()
    return trained.network


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

    def row(self, method: str, preset: str, sampler: Sampler) -> dict[str, Any]:
        """Return the row of one sampler."""
        row: dict[str, Any] = {"method": method, "preset": preset, "steps": sampler.steps}
        try:
            samples = sampler(self.problem, len(self.exact[0]), seed=self.seed)
            checks = self.checks(sampler) if sampler.nfe <= 100 else {"SBC": None, "TARP": None}
        except FAILURES as error:
            return row | {"remark": failed(error)}
        counts = {"nfe": samples.counts.network, "vjps": samples.counts.vjp}
        return row | self.distances(samples.x) | checks | counts | {"seconds": samples.seconds}

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
        """Return the row of exact samples, which shows the floor of every column."""
        truth, likelihood = self.checked()
        x = self.problem.prior.posterior(likelihood).sample(PER_CHECK, seed=80).reshape(PER_CHECK, *truth.shape)  # type: ignore[operator]
        row = {"method": "exact posterior", "preset": "", "steps": None}
        return row | self.distances(self.exact[1]) | p_values(x, truth, likelihood)

    def checks(self, sampler: Sampler) -> dict[str, float]:
        """Return p-values of SBC and TARP on fresh problems."""
        truth, likelihood = self.checked()
        seeds = [mix(79, b) for b in range(CHECKS)]
        return p_values(sampler(Posterior(self.problem.prior, likelihood), PER_CHECK, seed=seeds).x, truth, likelihood)

    def checked(self) -> tuple[Tensor, GaussianLikelihood]:
        """Return the truths and measurements of the checks."""
        return self.setup.simulate(Noise([mix(78, b) for b in range(CHECKS)]))


def p_values(x: Tensor, truth: Tensor, likelihood: GaussianLikelihood) -> dict[str, float]:
    """Return the p-values of SBC and TARP for samples, (K, B, D), of B problems."""
    sbc = uniformity(sbc_ranks(x, truth), len(x))
    tarp = uniformity(tarp_ranks(x, truth, tarp_references(likelihood))[:, None], len(x))
    return {"SBC": min(1.0, float(sbc.min()) * sbc.numel()), "TARP": float(tarp.min())}
