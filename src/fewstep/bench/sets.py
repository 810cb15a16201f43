"""How far one sample of every image is, as a set, from the set of the true images: distances between features of patches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fewstep.metrics import FeatureNet, frechet_distance, mmd, patches

PATCH = 64  # pixels per side
FRECHET, MMD, ERROR = "patch Frechet", "1000 patch MMD", "±"
COLUMNS = (FRECHET, MMD, ERROR)
HALVES = "truths, half against half"
LEAST = 5  # images for an unbiased distance with an error


@dataclass(frozen=True)
class SetDistances:
    """Distances between sets of images by the features of a named network.

    The Frechet distance is biased upwards, the more the fewer images; MMD is unbiased, pairs patches of different images only,
    and its standard error is that of independent images.

    Attributes:
        net: turns patches into features.
    """

    net: FeatureNet

    def features(self, images: Sequence[Tensor]) -> list[Tensor]:
        """Return the features of the patches of each image, (1, 3, H, W) in [0, 1] -> (P, F)."""
        return [self.net(patches(image, PATCH)) for image in images]

    def between(self, samples: Sequence[Tensor], truths: Sequence[Tensor]) -> dict[str, float]:
        """Return the columns for two sets of features, one (P, F) per image, truth i being that of sample i.

        Each is left out where there is too little for it: a Frechet distance takes two rows.
        """
        a, b = torch.cat(list(samples)), torch.cat(list(truths))
        out = {FRECHET: frechet_distance(a, b)} if min(len(a), len(b)) > 1 else {}
        if len(samples) >= LEAST and len({len(part) for part in truths}) == 1:
            value, error = mmd(a, b, group=len(truths[0]))
            out |= {MMD: 1000 * value, ERROR: 1000 * error}
        return out

    def halves(self, truths: Sequence[Tensor]) -> dict[str, float]:
        """Return the columns for every second truth against the others, different photographs; nothing for too few."""
        half = len(truths) // 2
        return self.between(truths[0 : 2 * half : 2], truths[1 : 2 * half : 2]) if half else {}

    def notes(self) -> tuple[str, ...]:
        """Return how to read the columns."""
        return (
            f"{FRECHET} and MMD (Gaussian kernel at the median distance) compare the first samples, in 8 bits, with the truths in "
            f"patches of {PATCH} pixels by {self.net.name}: no FID. {ERROR} is the standard error of the MMD over images.",
            f"The Frechet distance of so few images is mostly bias; '{HALVES}' is its value between different photographs, at "
            "half the size of the sets, hence with more bias: a scale, not a bound. MMD is unbiased, and 0 for equal laws.",
        )
