"""A small classifier of small images: its features give a Frechet distance, its answers a histogram of classes.

It is trained on real images by a recipe of this library and shipped; a distance in its features is known by its name and no FID.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from fewstep.core.files import read_weights, write_weights

SHIPPED = Path(__file__).parents[1] / "weights" / "digits-classifier"


@dataclass(frozen=True)
class ClassifierConfig:
    """The shape of the network.

    Attributes:
        classes: number of classes.
        size: side of the images, pixels; a multiple of 4.
        channels: image channels.
        width: channels after the first convolution; the second has twice as many.
        features: length of the feature vector.
    """

    classes: int = 10
    size: int = 28
    channels: int = 1
    width: int = 16
    features: int = 64

    def __post_init__(self) -> None:
        if min(asdict(self).values()) < 1 or self.size % 4:
            raise ValueError(f"all numbers must be positive and size a multiple of 4, got {self}")


class Classifier(nn.Module):
    """Two strided convolutions, one hidden layer of features, logits; images (N, C, size, size) in [-1, 1]."""

    def __init__(self, config: ClassifierConfig | None = None) -> None:
        super().__init__()
        self.config = c = config or ClassifierConfig()
        self.trunk = nn.Sequential(
            nn.Conv2d(c.channels, c.width, 5, 2, 2),
            nn.ReLU(),
            nn.Conv2d(c.width, 2 * c.width, 5, 2, 2),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(2 * c.width * (c.size // 4) ** 2, c.features),
            nn.ReLU(),
        )
        self.head = nn.Linear(c.features, c.classes)

    def features(self, x: Tensor) -> Tensor:
        """Return what the last layer sees, (N, C, size, size) in [-1, 1] -> (N, features); ValueError for other shapes."""
        c = self.config
        if x.ndim != 4 or x.shape[1:] != (c.channels, c.size, c.size):
            raise ValueError(f"expected images (N, {c.channels}, {c.size}, {c.size}), got {tuple(x.shape)}")
        return self.trunk(x)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits, (N, C, size, size) in [-1, 1] -> (N, classes)."""
        return self.head(self.features(x))

    @torch.no_grad()
    def histogram(self, x: Tensor) -> Tensor:
        """Return the share of images that fall into each class, (N, C, size, size) -> (classes,)."""
        return torch.bincount(self(x).argmax(1), minlength=self.config.classes) / len(x)

    def save(self, folder: str | Path) -> None:
        """Write half-precision weights and their header to `folder`, each file atomically."""
        header = {"format": "fewstep-classifier", "method": type(self).__name__, "fields": asdict(self.config)}
        write_weights(folder, self.state_dict(), header, torch.float16)

    @classmethod
    def load(cls, folder: str | Path = SHIPPED) -> Classifier:
        """Return the classifier saved in `folder`, the shipped one of digits by default, frozen and in evaluation mode.

        Raises:
            ValueError: a file is missing or damaged, or weights and header do not describe the same network.
        """
        tensors, header = read_weights(folder, cls.__name__)
        try:
            model = cls(ClassifierConfig(**header["fields"]))
            model.load_state_dict({k: v.float() for k, v in tensors.items()}, strict=True)
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            reason = " ".join(str(error).split())[:300]
            raise ValueError(f"{folder} does not hold a {cls.__name__}: {reason}") from None
        return model.eval().requires_grad_(False)
