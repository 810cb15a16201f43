"""`fewstep bench denoise`: how good a prior is as a denoiser, in one network call per image.

The measure of the literature: PSNR on [0, 1] over all pixels and channels, Gaussian noise of 5, 15, 25 or 50 / 255 that is not
clipped, an output that is, averaged over the images.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from torch import Tensor

from fewstep.bench.common import Report
from fewstep.bench.priors import resolve_prior
from fewstep.core.batch import like
from fewstep.core.denoiser import Denoiser
from fewstep.core.noise import Noise, mix
from fewstep.images import list_photos, load_image
from fewstep.metrics import psnr
from fewstep.operators.image import from_unit, to_unit

LEVELS = (5, 15, 25, 50)  # of 255
NOTES = (
    "PSNR in dB of E[x | x + noise], one network call on the whole image at full size, mean over the images; input not "
    "clipped, output clipped to [0, 1].",
    "seconds: median of repeated calls on one image of 256 x 256, threads as below.",
)


def main(
    folder: str | Path,
    out: str | Path | None = None,
    *,
    prior: str | Denoiser = "natural",
    levels: Sequence[float] = LEVELS,
    limit: int | None = None,
    repeats: int = 5,
    seed: int = 0,
) -> Report:
    """Measure a prior on the images of `folder`, print the tables, write the JSON report to `out` where given, and return it.

    Args:
        folder: of images.
        out: path of the JSON file.
        prior: a name or path for `load_prior`, or a denoiser of images in [-1, 1].
        levels: standard deviations of the noise, in units of 1 / 255.
        limit: the most images.
        repeats: timed calls.
        seed: of the noise.
    """
    denoiser = resolve_prior(prior)
    paths = list_photos(folder)[:limit]
    found: dict[float, list[float]] = {level: [] for level in levels}
    for number, path in enumerate(track(paths, "denoise", transient=True)):
        clean = load_image(path)
        for level in levels:
            noisy = clean + level / 255 * Noise([mix(seed, number, round(1000 * level))]).randn_like(clean)
            found[level].append(psnr(denoise(denoiser, noisy, level / 255).clamp(0, 1), clean))
    rows: list[dict[str, Any]] = [
        {"sigma x 255": level, "PSNR": statistics.fmean(v), "PSNR min": min(v), "images": len(v)}
        for level, v in found.items()
    ]
    speed = [{"size": "256 x 256", "seconds per call": seconds_per_call(denoiser, 256, repeats)}]
    given = {"folder": str(folder), "prior": str(prior)[:200], "limit": limit, "repeats": repeats, "seed": seed}
    return Report("denoise", given, {"Denoising": rows, "Speed": speed}, NOTES).finish(out)


@torch.no_grad()
def denoise(prior: Denoiser, noisy: Tensor, sigma: float) -> Tensor:
    """Return E[u | u + sigma z] for images in [0, 1], (N, C, H, W); `sigma` is in [0, 1] units, > 0."""
    t = prior.schedule.time(torch.tensor(2 * sigma, dtype=torch.float64, device=noisy.device))
    alpha, _ = prior.schedule(t)
    return to_unit(prior(like(alpha, noisy) * from_unit(noisy), t))


@torch.no_grad()
def seconds_per_call(prior: Denoiser, size: int, repeats: int) -> float:
    """Return the median time of one call on one `size` x `size` image, after one call to warm up."""
    x, t = torch.zeros(1, 3, size, size), torch.tensor(0.5)
    prior(x, t)
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        prior(x, t)
        times.append(time.perf_counter() - begin)
    return statistics.median(times)
