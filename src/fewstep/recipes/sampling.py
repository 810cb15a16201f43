"""The figures by which the training of a posterior sampler is watched."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.core.checks import check_counts
from fewstep.core.problem import Posterior
from fewstep.data import CropShape, RandomCrops, centre_batch
from fewstep.measurements import Family, SimulatedMeasurements
from fewstep.metrics import Missing, lpips_net
from fewstep.unfolded.sampler import Unfolded, outer_steps


@dataclass(frozen=True)
class SamplingFigures:
    """PSNR of the mean, LPIPS of one sample, and how far samples are spread, on held-out images at fixed measurements and seeds.

    Attributes:
        images: number of images, spread evenly over the held-out ones; image i is seen through family i, in turn.
        size: side of the square crop.
        steps: outer steps of the sampler.
        samples: K.
        outer: further fields of the sampler: eta, kernel, grid.
    """

    images: int = 8
    size: int = 96
    steps: int = 3
    samples: int = 2
    outer: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_counts(self, "images", "size", "steps", "samples")
        outer_steps(self.outer)

    def on(
        self, held_out: Sequence[Tensor], families: Sequence[Family], prior: Any, device: str = "cpu"
    ) -> Callable[[nn.Module], dict[str, float]]:
        """Return the figures as a function of a `Contest`; `held_out` are uint8 images, (3, H, W) each."""
        clean = centre_batch(held_out[:: max(1, len(held_out) // self.images)][: self.images], self.size).to(device)
        crops = RandomCrops(held_out, (CropShape(self.images, self.size),), seed=7)
        truths, likelihoods = [], []
        for number, x in enumerate(clean):
            data = SimulatedMeasurements(crops, (families[number % len(families)],), device)
            truths.append(x[None])
            likelihoods.append(data.measure(x[None], 0, number))
        return lambda contest: self._measure(contest, truths, likelihoods, prior)

    def _measure(self, contest: Any, truths: list[Tensor], likelihoods: list[Any], prior: Any) -> dict[str, float]:
        sampler, rows = Unfolded(contest.network, self.steps, **outer_steps(self.outer)), []
        for truth, likelihood in zip(truths, likelihoods, strict=True):
            x = sampler(Posterior(prior, likelihood), self.samples, seed=0).x
            error = ((x.mean(0).clamp(-1, 1) - truth) / 2).square().mean()
            spread = {"std": float(x.std(0).mean()) / 2} if len(x) > 1 else {}
            rows.append({"psnr": float(-10 * error.log10()), **_lpips(x[0], truth), **spread})
        return {name: sum(row[name] for row in rows) / len(rows) for name in rows[0]}


def _lpips(x: Tensor, truth: Tensor) -> dict[str, float]:
    """Return LPIPS with AlexNet where its weights can be found."""
    try:
        network = lpips_net("alex")
    except Missing:
        return {}
    with torch.no_grad():
        return {"lpips": float(network(x.clamp(-1, 1).cpu(), truth.cpu()))}
