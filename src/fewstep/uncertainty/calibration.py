r"""Intervals from K samples, stretched by one factor until they cover as promised on images with a known truth.

The pixels of an image are not exchangeable with those of another: one image is one observation. Its loss is the share
L_i(lambda) in [0, 1] of pixels outside [c - lambda (c - l + floor), c + lambda (u - c + floor)], with the median c and the
central interval [l, u] of the samples; it falls as lambda grows. Conformal risk control (Angelopoulos et al. 2022,
arXiv:2208.02814, theorem 1) takes the smallest lambda with

    (sum_i min(L_i(lambda), worst) + worst) / (n + 1) <= 1 - level,

1 being the worst there is; with a smaller bound an image that is missed by more counts as missed by that much.

If the n images and the next one are exchangeable (same sampler, K, family of operators and noise levels, kind of images),
then E min(L(lambda), worst) <= 1 - level, the mean being over calibration sets and the next image together, for any sampler
and any n. It promises nothing about a single image, a single pixel, flat against textured places, or another family; and for few
images it is conservative, by up to 2 worst / (n + 1). The alternatives of Im2Im-UQ (Angelopoulos et al. 2022, arXiv:2202.05265)
hold with high probability over the calibration set instead of on average, and need more images.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Self

import torch
from torch import Tensor

from fewstep.core.samples import Samples

FORMAT = "fewstep.calibration"
HALF_GREY = 1 / 255  # half of one of 256 grey levels, in [-1, 1]


@dataclass(frozen=True)
class Calibration:
    """A factor for intervals and what it was fitted on.

    Attributes:
        level: the share of pixels of an image to be covered, on average over images.
        factor: lambda, by which both half widths are multiplied.
        num_samples: K; intervals from another K are others.
        images: n.
        patch: side of the square patches whose means are covered; 1 for pixels.
        floor: added to both half widths, in the coordinates of the samples, so that samples that agree can be stretched too.
        antithetic: whether the samples were, see `Samples`; intervals from others are others.
        worst: the loss of an image is min(L, worst); below 1 the promise is E min(L, worst) <= 1 - level, which is weaker on
            images that are missed altogether but is kept with fewer images and less excess width.
    """

    level: float
    factor: float
    num_samples: int
    images: int
    patch: int = 1
    floor: float = HALF_GREY
    worst: float = 1.0
    antithetic: bool = False

    @classmethod
    def fit(
        cls,
        pairs: Iterable[tuple[Samples, Tensor]],
        level: float = 0.9,
        *,
        patch: int = 1,
        floor: float = HALF_GREY,
        worst: float = 1.0,
    ) -> Self:
        """Calibrate on samples and truths, (K, B, *event) and (B, *event) in the same coordinates; every measurement counts.

        Measurements must be of different images: two of the same one are not exchangeable with those of a new image.

        Raises:
            ValueError: too few images for the level, see `least_images`, different K, shapes that differ, samples or truths
                that are not finite, or settings out of range.
        """
        if not floor > 0:
            raise ValueError(f"needs a positive floor, got {floor}")
        least = least_images(level, worst)
        scores: list[Tensor] = []
        kinds: set[tuple[int, bool]] = set()
        blank = cls(level, 1.0, 0, 0, patch, floor, worst)
        for samples, truth in pairs:
            kinds.add((samples.num_samples, samples.antithetic))
            scores += [image.flatten().sort().values for image in blank._scores(samples, truth)]
        if len(scores) < least:
            raise ValueError(
                f"{100 * level:.4g}% intervals need {least} images at least to calibrate on, got {len(scores)}"
            )
        if len(kinds) != 1:
            raise ValueError(f"all images need the same number of samples, got {_listed(kinds)}")
        num_samples, antithetic = kinds.pop()
        factor = _control(scores, 1 - level, worst) * (1 + 1e-6)  # rounding must not uncover what lies on the edge
        return replace(blank, factor=factor, num_samples=num_samples, images=len(scores), antithetic=antithetic)

    def apply(self, samples: Samples) -> tuple[Tensor, Tensor]:
        """Return the calibrated ends, (B, *event) each, or (B, C, H // patch, W // patch) for patches.

        Raises:
            ValueError: another K than that of the calibration, or antithetic samples where those were not, or the reverse.
        """
        mine, given = (self.num_samples, self.antithetic), (samples.num_samples, samples.antithetic)
        if given != mine:
            raise ValueError(f"calibrated for {_listed([mine])} samples per image, got {_listed([given])}")
        centre, below, above = self._interval(samples)
        return centre - self.factor * below, centre + self.factor * above

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values, to be stored with what they belong to: a sampler and a family of operators."""
        return {"format": FORMAT, **asdict(self)}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        """Return what `to_json` was made of; ValueError where it is something else."""
        names = {field.name for field in fields(cls)}
        values = {"antithetic": False, **values}  # files of earlier versions do not say it
        if values.get("format") != FORMAT or values.keys() != names | {"format"}:
            raise ValueError(f"not a calibration: {', '.join(sorted(values)) or 'empty'}")
        if bad := [name for name in names - {"antithetic"} if not is_finite(values[name])]:
            raise ValueError(f"not a calibration: {', '.join(sorted(bad))} must be finite numbers")
        if not isinstance(values["antithetic"], bool):
            raise ValueError(f"not a calibration: antithetic must be true or false, got {values['antithetic']!r}")
        return cls(**{name: values[name] for name in names})

    def _interval(self, samples: Samples) -> tuple[Tensor, Tensor, Tensor]:
        """Return the median and the two half widths with the floor, (B, *event) each."""
        samples = replace(samples, x=patch_means(samples.x, self.patch))
        (lower, upper), centre = samples.interval(self.level), samples.quantile(0.5)
        return centre, centre - lower + self.floor, upper - centre + self.floor

    def _scores(self, samples: Samples, truth: Tensor) -> Tensor:
        """Return the smallest factor that covers each coordinate of the truth, (B, *event)."""
        if truth.shape != samples.x.shape[1:] or not bool(torch.isfinite(truth).all()):
            raise ValueError(f"expected finite truths {tuple(samples.x.shape[1:])}, got {tuple(truth.shape)}")
        if not bool(torch.isfinite(samples.x).all()):
            raise ValueError("samples that are not finite cannot be calibrated")
        centre, below, above = self._interval(samples)
        gap = patch_means(truth, self.patch) - centre
        return torch.maximum(gap / above, -gap / below)


def least_images(level: float, worst: float = 1.0) -> int:
    """Return how many images intervals of a level need at least: n >= worst / (1 - level) - 1.

    Raises:
        ValueError: the level is not between 0 and 1, or not 1 - level < worst <= 1.
    """
    if not (0 < level < 1 and 1 - level < worst <= 1):
        raise ValueError(f"need 0 < level < 1 and 1 - level < worst <= 1, got {level=}, {worst=}")
    return math.ceil(worst / (1 - level) - 1 - 1e-6)


def is_finite(value: Any) -> bool:
    """Return whether a value is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def patch_means(x: Tensor, patch: int) -> Tensor:
    """Return means over squares of `patch` pixels, (..., H, W) -> (..., H // patch, W // patch); x itself for 1.

    Raises:
        ValueError: an image smaller than the patch, or a patch below 1.
    """
    if patch == 1:
        return x
    if patch < 1 or x.ndim < 3 or min(x.shape[-2:]) < patch:
        raise ValueError(f"patches of {patch} pixels do not fit {tuple(x.shape)}")
    small = torch.nn.functional.avg_pool2d(x.reshape(-1, *x.shape[-3:]), patch)
    return small.reshape(*x.shape[:-2], *small.shape[-2:])


def _listed(kinds: Iterable[tuple[int, bool]]) -> str:
    """Return numbers of samples, with "antithetic" behind those that are."""
    return ", ".join(f"{k} antithetic" if antithetic else str(k) for k, antithetic in sorted(kinds))


def _control(scores: list[Tensor], alpha: float, worst: float) -> float:
    """Return the smallest score lambda with (sum_i min(share of scores_i > lambda, worst) + worst) / (n + 1) <= alpha.

    Args:
        scores: ascending, one tensor per image.
        alpha: bound of the risk.
        worst: bound of the loss of an image.
    """

    def risk(factor: Tensor) -> float:
        losses = [1 - float(torch.searchsorted(s, factor, right=True)) / len(s) for s in scores]
        return (sum(min(loss, worst) for loss in losses) + worst) / (len(scores) + 1)

    candidates = torch.cat(scores).sort().values
    low, high = 0, len(candidates) - 1  # at the largest score every loss is 0
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if risk(candidates[middle]) <= alpha + 1e-12 else (middle + 1, high)
    return float(candidates[low])
