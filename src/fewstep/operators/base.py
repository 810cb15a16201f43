"""What a word of `--operator` is: the abstract class behind all of them, and their register."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import field, fields
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from safetensors.torch import save
from torch import Tensor

from fewstep.core.likelihood import Likelihood
from fewstep.core.noise import Noise, mix
from fewstep.operators.image import image_likelihood

Shape = tuple[int, int, int]
AUTO = "auto"  # value of an option that is left to the library
WORDS: dict[str, type[Operator]] = {}


class Operator(ABC):
    """What happened to an image; subclasses are frozen dataclasses.

    Attributes:
        word: its name on the command line.
        summary: one line of help.
        noise: what is to be said of sigma: "required", "estimated" where it is not given, or "none".
        suited: the method and its preset for those who name none; None leaves the choice to the prior.
        easier: options under which the measurement is easier to keep to, where an iterative solver cannot.
    """

    word: ClassVar[str]
    summary: ClassVar[str]
    noise: ClassVar[str] = "required"
    suited: ClassVar[tuple[str, str] | None] = None
    easier: ClassVar[str] = "a larger --sigma"

    @abstractmethod
    def build(self, image_shape: Shape, dtype: torch.dtype = torch.float32) -> Any:
        """Return the deepinv operator for images of `image_shape`, (C, H, W), in [0, 1]."""

    def fit(self, image_shape: Shape) -> Shape:
        """Return the largest shape (C, H, W) within `image_shape` that the operator takes; a simulation crops to it."""
        return image_shape

    def image_shape(self, y: Any) -> Shape:
        """Return the shape (C, H, W) of the image behind a measurement."""
        return int(y.shape[1]), int(y.shape[2]), int(y.shape[3])

    def read(self, path: str | Path) -> Any:
        """Return the measurement in an image file, (1, C, h, w) in [0, 1]."""
        from fewstep.images import load_image

        return load_image(path)

    def likelihood(self, y: Any, sigma: Tensor | float | None = None, **options: Any) -> Likelihood:
        """Return the likelihood of y in the prior's coordinates [-1, 1].

        Args:
            y: what `simulate` or `read` gives.
            sigma: noise level of y on the scale [0, 1].
            options: `tol` and `max_iter` of the solver.
        """
        return image_likelihood(y, self._physics(y), self._sigma(y, sigma), **options)

    def simulate(self, x: Tensor, sigma: Tensor | float, seed: int = 0) -> Any:
        """Return a measurement of images x, (B, C, H, W) in [0, 1]; it is not clipped.

        Item b has its own stream, which no sampler with the same seed draws from.
        """
        physics = self._built(shape_of(x), x)
        y = physics.A(x)
        levels = torch.as_tensor(sigma, dtype=y.dtype).reshape(-1, *[1] * (y.ndim - 1))
        if not bool((levels >= 0).all()):
            raise ValueError(f"sigma must not be negative, got {sigma}")
        noise = Noise([mix(seed, b, 1) for b in range(y.shape[0])], y.dtype, y.device)
        return y + levels.to(y.device) * self._seen(noise.randn_like(y), physics)

    def stored(self, x: Tensor, y: Any) -> tuple[str, bytes]:
        """Return name and contents of a file that holds y, simulated from x, exactly, as `read` takes it."""
        return "measurement.safetensors", save({"y": y.contiguous()})

    def baseline(self, y: Any) -> Tensor:
        """Return the image to beat, (B, C, H, W) in [0, 1]: y itself."""
        return y.clamp(0, 1)

    def seen(self, y: Any) -> Self:
        """Return the operator with the options that a measurement itself shows, those of a JPEG file."""
        return self

    def measured(self) -> Self:
        """Return the operator of a measurement that comes from outside and was not simulated."""
        return self

    def framed(self, x: Tensor) -> Tensor:
        """Return the part of images, (..., H, W), that a measurement shows, where the scene is larger."""
        return x

    def describe(self) -> str:
        """Return one line: the word and its options, but for those that are left to the library."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}  # type: ignore[arg-type]
        options = ", ".join(f"{name} {value}" for name, value in values.items() if value != AUTO)
        return f"{self.word} ({options})" if options else self.word

    def _seen(self, noise: Tensor, physics: Any) -> Tensor:
        """Return the part of the noise that a measurement can hold."""
        return noise

    def _physics(self, y: Tensor) -> Any:
        return self._built(self.image_shape(y), y)

    def _built(self, image_shape: Shape, like: Tensor) -> Any:
        """Return the operator with its tensors where `like` is, and of its precision."""
        physics = self.build(image_shape, like.dtype)
        return physics.to(like.device) if isinstance(physics, torch.nn.Module) else physics

    def _sigma(self, y: Tensor, sigma: Tensor | float | None) -> Tensor | float:
        if sigma is None:
            raise ValueError(
                f"{self.word} needs the noise level sigma, on the scale [0, 1]; 0.01 is a clean photograph"
            )
        return sigma


class Smaller(Operator):
    """An operator whose measurement has the sides of the image over `factor`."""

    factor: int

    def fit(self, image_shape: Shape) -> Shape:
        """See `Operator`; sides become multiples of the factor."""
        channels, h, w = image_shape
        return channels, h - h % self.factor, w - w % self.factor

    def image_shape(self, y: Any) -> Shape:
        """See `Operator`."""
        return int(y.shape[1]), int(y.shape[2]) * self.factor, int(y.shape[3]) * self.factor


def register(kind: type[Operator]) -> type[Operator]:
    """Add a class to the words."""
    WORDS[kind.word] = kind
    return kind


def shape_of(x: Tensor) -> Shape:
    """Return (C, H, W) of images, (B, C, H, W); ValueError where x is not finite images."""
    if x.ndim != 4:
        raise ValueError(f"expected images (B, C, H, W), got shape {tuple(x.shape)}")
    if not bool(torch.isfinite(x).all()):
        raise ValueError("the image holds NaN or infinite values")
    return int(x.shape[1]), int(x.shape[2]), int(x.shape[3])


def option(default: Any, text: str) -> Any:
    """Return a dataclass field with a default and a line of help."""
    return field(default=default, metadata={"help": text})
