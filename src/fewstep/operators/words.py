"""The words of `--operator`: one frozen dataclass each, whose fields are the options of the word.

A word builds deepinv's own operator for an image size, the likelihood of a measurement in the prior's coordinates, a
simulated measurement, and the image that a restoration has to beat. Images are in [0, 1] here, (B, C, H, W).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from fewstep.core.checks import one_of
from fewstep.core.likelihood import GaussianLikelihood, Likelihood
from fewstep.core.names import suggestion
from fewstep.images import read_mask
from fewstep.operators import kernels
from fewstep.operators.base import AUTO, WORDS, Operator, Shape, Smaller, option, register, shape_of
from fewstep.operators.estimate import estimate_sigma
from fewstep.operators.image import check_kernel, deepinv_physics, image_likelihood
from fewstep.operators.jpeg import JpegLikelihood, JpegMeasurement, encode, encoded, gaussian_jpeg, settings_of

__all__ = ["Operator", "estimate_sigma", "get_operator", "operators"]


def operators() -> dict[str, str]:
    """Return every word with its line of help."""
    return {word: kind.summary for word, kind in sorted(WORDS.items())}


def get_operator(word: str) -> type[Operator]:
    """Return the class of a word; ValueError with the nearest words where there is none."""
    if word not in WORDS:
        raise ValueError(f"unknown operator {word!r}; {suggestion(word, WORDS)}")
    return WORDS[word]


@register
@dataclass(frozen=True)
class Denoise(Operator):
    """White Gaussian noise and nothing else."""

    word: ClassVar[str] = "denoise"
    summary: ClassVar[str] = "white noise; sigma is estimated where it is not given"
    noise: ClassVar[str] = "estimated"

    def build(self, image_shape: Shape, dtype: torch.dtype = torch.float32) -> Any:
        """See `Operator`."""
        return deepinv_physics().Denoising()

    def _sigma(self, y: Tensor, sigma: Tensor | float | None) -> Tensor | float:
        return estimate_sigma(y) if sigma is None else sigma


BOUNDARIES = (AUTO, "circular", "valid")


@dataclass(frozen=True, kw_only=True)
class _Blur(Operator):
    """Convolution with a kernel: circular, or of a scene that goes on beyond the frame, of which the photograph is the inner part.

    A photograph's scene does go on. Taken for circular, it rings at the border; simulations are circular, which has a closed form.
    """

    easier: ClassVar[str] = "a larger --sigma or --boundary circular"
    boundary: str = option(
        AUTO, "circular, or valid where the scene goes on beyond the frame: that of a photograph, slower"
    )

    def __post_init__(self) -> None:
        one_of("boundary", self.boundary, BOUNDARIES)

    @abstractmethod
    def filter(self) -> Tensor:
        """Return the kernel, (1, 1, h, w), float64, sum one."""

    def build(self, image_shape: Shape, dtype: torch.dtype = torch.float32) -> Any:
        """See `Operator`."""
        kernel, (high, wide) = self.filter(), self._margin()
        check_kernel(kernel, (image_shape[1] - high, image_shape[2] - wide))
        if self.boundary == "valid":
            return deepinv_physics().Blur(filter=kernel.to(dtype), padding="valid", use_fft=True)
        return deepinv_physics().BlurFFT(img_size=tuple(image_shape), filter=kernel.to(dtype))

    def likelihood(self, y: Any, sigma: Tensor | float | None = None, **options: Any) -> Likelihood:
        """See `Operator`; without a closed form the tolerance is one that single precision reaches."""
        return super().likelihood(y, sigma, **{"tol": max(1e-6, 1e3 * torch.finfo(y.dtype).eps), **options})

    def image_shape(self, y: Tensor) -> Shape:
        """See `Operator`; with the margin that blurs into the frame."""
        c, h, w = super().image_shape(y)
        high, wide = self._margin()
        return c, h + high, w + wide

    def framed(self, x: Tensor) -> Tensor:
        """See `Operator`; without the margin."""
        high, wide = self._margin()
        top, left = high // 2, wide // 2  # where deepinv puts the centre of a kernel
        return x[..., top : x.shape[-2] - high + top, left : x.shape[-1] - wide + left]

    def measured(self) -> Self:
        """See `Operator`; the scene of a photograph goes on beyond its frame."""
        return replace(self, boundary="valid") if self.boundary == AUTO else self

    def _margin(self) -> tuple[int, int]:
        """Return by how many rows and columns the scene is larger than what is measured of it."""
        h, w = self.filter().shape[-2:] if self.boundary == "valid" else (1, 1)
        return h - 1, w - 1


@register
@dataclass(frozen=True)
class DeblurGaussian(_Blur):
    """Gaussian blur."""

    word: ClassVar[str] = "deblur-gaussian"
    summary: ClassVar[str] = "Gaussian blur"
    width: float = option(2.0, "standard deviation of the blur in pixels")

    def filter(self) -> Tensor:
        """See `_Blur`."""
        return kernels.gaussian_kernel(self.width)


@register
@dataclass(frozen=True)
class DeblurUniform(_Blur):
    """Box blur."""

    word: ClassVar[str] = "deblur-uniform"
    summary: ClassVar[str] = "box blur"
    size: int = option(9, "edge of the box in pixels")

    def filter(self) -> Tensor:
        """See `_Blur`."""
        return kernels.uniform_kernel(self.size)


@register
@dataclass(frozen=True)
class DeblurMotion(_Blur):
    """Camera shake along a random smooth path."""

    word: ClassVar[str] = "deblur-motion"
    summary: ClassVar[str] = "motion blur along a random smooth path"
    size: int = option(31, "edge of the kernel in pixels")
    length: float = option(0.3, "length scale of the path as a share of the exposure: larger is straighter")
    spread: float = option(0.25, "size of the path in units of half the kernel")
    kernel_seed: int = option(0, "seed of the path")

    def filter(self) -> Tensor:
        """See `_Blur`."""
        return kernels.motion_kernel(self.size, self.kernel_seed, self.length, self.spread)


@register
@dataclass(frozen=True)
class Deblur(_Blur):
    """Blur with a kernel from a file."""

    word: ClassVar[str] = "deblur"
    summary: ClassVar[str] = "blur with a kernel from a file"
    kernel: str = option("", "kernel file: PNG, npy or mat")
    index: int = option(0, "which kernel, where the file holds several")

    def filter(self) -> Tensor:
        """See `_Blur`."""
        if not self.kernel:
            raise ValueError("deblur needs a kernel file (PNG, npy or mat); without one use deblur-gaussian or -motion")
        return kernels.load_kernel(self.kernel, self.index)


@register
@dataclass(frozen=True)
class SuperResolution(Smaller):
    """Anti-aliased (bicubic) down-sampling."""

    word: ClassVar[str] = "sr"
    summary: ClassVar[str] = "bicubic down-sampling: the image is `factor` times larger than the measurement"
    factor: int = option(4, "2 or more")

    def __post_init__(self) -> None:
        if self.factor < 2:
            raise ValueError(f"the factor of sr must be at least 2, got {self.factor}")

    def build(self, image_shape: Shape, dtype: torch.dtype = torch.float32) -> Any:
        """See `Operator`."""
        _, h, w = image_shape
        if h % self.factor or w % self.factor:
            raise ValueError(f"sr by {self.factor} needs an image whose sides it divides, got {h} x {w}")
        library = deepinv_physics()
        kernel = library.functional.bicubic_filter(self.factor).to(dtype)
        check_kernel(kernel, (h, w))
        return library.Downsampling(img_size=tuple(image_shape), filter=kernel, factor=self.factor, padding="circular")

    def baseline(self, y: Any) -> Tensor:
        """Return bicubic interpolation of y, moved to where deepinv's decimation keeps its samples."""
        _, h, w = self.image_shape(y)
        return _upsample(y, self.factor, (h, w)).clamp(0, 1)


def _upsample(y: Tensor, factor: int, size: tuple[int, int]) -> Tensor:
    """Interpolate bicubically; sample j of y lies at j factor + offset, the centre of mass of what made it."""
    offset = (factor - 1) / 2 - _sample_centre(factor)
    rows, columns = ((torch.arange(n, dtype=y.dtype, device=y.device) + 0.5 + offset) / n * 2 - 1 for n in size)
    grid = torch.stack(torch.meshgrid(columns, rows, indexing="xy"), -1)
    grid = grid.expand(y.shape[0], *grid.shape)
    return torch.nn.functional.grid_sample(y, grid, mode="bicubic", padding_mode="border", align_corners=False)


def _sample_centre(factor: int) -> float:
    """Return where in its cell of `factor` pixels a sample of the bicubic operator is centred, in pixels."""
    length = 4 * factor * 2
    physics = SuperResolution(factor).build((1, length, length), torch.float64)
    delta = torch.zeros(1, 1, length // factor, length // factor, dtype=torch.float64)
    delta[..., 4, 4] = 1
    row = physics.A_adjoint(delta).sum((0, 1, 2))
    return float((row * torch.arange(length)).sum() / row.sum()) - 4 * factor


class _Mask(Operator):
    """Some pixels are missing, in all channels at once; they are zero in y."""

    @abstractmethod
    def known(self, image_shape: Shape) -> Tensor:
        """Return 1 where a pixel is known, 0 where it is missing, (H, W)."""

    def build(self, image_shape: Shape, dtype: torch.dtype = torch.float32) -> Any:
        """See `Operator`."""
        mask = self.known(image_shape).to(dtype).expand(1, *image_shape).contiguous()
        return deepinv_physics().Inpainting(img_size=tuple(image_shape), mask=mask)

    def likelihood(self, y: Any, sigma: Tensor | float | None = None, **options: Any) -> GaussianLikelihood:
        """See `Operator`; what y holds in missing pixels is not read."""
        physics = self._physics(y)
        return image_likelihood(physics.A(y), physics, self._sigma(y, sigma), **options)

    def baseline(self, y: Any) -> Tensor:
        """Return y with the missing pixels black."""
        return self._physics(y).A(y).clamp(0, 1)

    def _seen(self, noise: Tensor, physics: Any) -> Tensor:
        return physics.A(noise)


@register
@dataclass(frozen=True)
class InpaintRandom(_Mask):
    """Pixels missing at random."""

    word: ClassVar[str] = "inpaint-random"
    summary: ClassVar[str] = "pixels missing at random"
    rate: float = option(0.7, "share of the pixels that are missing")
    mask_seed: int = option(0, "seed of the mask")

    def __post_init__(self) -> None:
        if not 0 <= self.rate < 1:
            raise ValueError(f"the rate of missing pixels must be in [0, 1), got {self.rate}")
        if not -(1 << 63) <= self.mask_seed < 1 << 64:
            raise ValueError(f"mask_seed must fit into 64 bits, got {self.mask_seed}")

    def known(self, image_shape: Shape) -> Tensor:
        """See `_Mask`."""
        generator = torch.Generator().manual_seed(self.mask_seed)
        draw = torch.rand(image_shape[1:], generator=generator, device="cpu")
        return (draw >= self.rate).float()


@register
@dataclass(frozen=True)
class InpaintBox(_Mask):
    """A missing square in the middle."""

    word: ClassVar[str] = "inpaint-box"
    summary: ClassVar[str] = "a missing square in the middle"
    size: int = option(64, "edge of the square in pixels")

    def known(self, image_shape: Shape) -> Tensor:
        """See `_Mask`."""
        _, h, w = image_shape
        if not 0 < self.size <= min(h, w) or self.size == h == w:
            raise ValueError(f"a missing square of {self.size} pixels does not fit into an image of {h} x {w}")
        mask = torch.ones(h, w)
        top, left = (h - self.size) // 2, (w - self.size) // 2
        mask[top : top + self.size, left : left + self.size] = 0
        return mask


@register
@dataclass(frozen=True)
class Inpaint(_Mask):
    """Missing pixels marked in an image file."""

    word: ClassVar[str] = "inpaint"
    summary: ClassVar[str] = "missing pixels marked in an image file"
    mask: str = option("", "mask file of the size of the image: white is known, black is missing")

    def known(self, image_shape: Shape) -> Tensor:
        """See `_Mask`."""
        if not self.mask:
            raise ValueError("inpaint needs a mask file (white is known, black is missing)")
        known = read_mask(self.mask)
        if tuple(known.shape) != tuple(image_shape[1:]):
            h, w = image_shape[1:]
            raise ValueError(f"the mask {self.mask} is {known.shape[0]} x {known.shape[1]}, the image is {h} x {w}")
        if not bool(known.any()):
            raise ValueError(f"the mask {self.mask} marks every pixel as missing")
        if bool(known.all()):
            raise ValueError(f"the mask {self.mask} marks no pixel as missing: black is missing")
        return known.float()


@register
@dataclass(frozen=True)
class Jpeg(Operator):
    """JPEG compression: y is a `JpegMeasurement`, the quantised coefficients and tables of the file."""

    word: ClassVar[str] = "jpeg"
    summary: ClassVar[str] = "JPEG compression; a file's own tables are read from it"
    noise: ClassVar[str] = "none"
    suited: ClassVar[tuple[str, str] | None] = ("diffpir", "jpeg")
    easier: ClassVar[str] = "a larger --step-std"
    quality: int = option(10, "quality at which images are encoded; not used for a file, which holds its tables")
    subsampling: str = option("4:2:0", "chroma sub-sampling: 4:4:4, 4:2:2 or 4:2:0; not used for a file")
    step_std: float = option(0.2, "standard deviation of the error in steps, taken for Gaussian; 0: exact intervals")

    def __post_init__(self) -> None:
        if not 0 <= self.step_std < float("inf"):
            raise ValueError(f"step_std must be finite and not negative, got {self.step_std}")

    def build(self, image_shape: Shape, dtype: torch.dtype = torch.float32) -> Callable[[Tensor], JpegMeasurement]:
        """Return the encoder of images, (B, C, H, W) in [0, 1]."""
        return lambda x: encode(x, self.quality, self.subsampling)

    def image_shape(self, y: Any) -> Shape:
        """See `Operator`."""
        return y.image_shape

    def read(self, path: str | Path) -> JpegMeasurement:
        """Return what a JPEG file says of its image."""
        return JpegMeasurement.from_file(path)

    def likelihood(self, y: Any, sigma: Tensor | float | None = None, **options: Any) -> Likelihood:
        """See `Operator`; quantisation is the only noise, so sigma must be absent or 0.

        The options are those of `gaussian_jpeg`, with `step_std` 0 those of `JpegLikelihood`.
        """
        if sigma is not None and bool((torch.as_tensor(sigma) != 0).any()):
            raise ValueError("jpeg takes no sigma: quantisation is its only noise")
        if not isinstance(y, JpegMeasurement):
            raise ValueError("jpeg needs the file, not its pixels: JpegMeasurement.from_file(path)")
        if self.step_std:
            return gaussian_jpeg(y, self.step_std, **options)
        return JpegLikelihood(y, **options)

    def simulate(self, x: Tensor, sigma: Tensor | float = 0.0, seed: int = 0) -> JpegMeasurement:
        """See `Operator`; encoding has no randomness and takes no sigma."""
        if bool((torch.as_tensor(sigma) != 0).any()):
            raise ValueError("jpeg takes no sigma: quantisation is its only noise")
        return self.build(shape_of(x))(x)

    def stored(self, x: Tensor, y: Any) -> tuple[str, bytes]:
        """See `Operator`; encoding again gives the same file."""
        return "measurement.jpg", encoded(x, self.quality, self.subsampling)[0]

    def seen(self, y: Any) -> Jpeg:
        """See `Operator`; the quality is that of the nearest of libjpeg's tables."""
        quality, subsampling = settings_of(y.tables)
        return replace(self, quality=quality, subsampling=subsampling)

    def baseline(self, y: Any) -> Tensor:
        """Return the image as a viewer decodes it."""
        return y.decoded
