"""Image metrics on [0, 1] images: PSNR, SSIM (torchmetrics), LPIPS (lpips), interval coverage.

A metric that cannot be had (weights missing, image too small) is None together with the reason, never a stand-in.
"""

from __future__ import annotations

import math
import os
import re
import warnings
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.core.checks import one_of

LPIPS_VARIABLE = "FEWSTEP_LPIPS"
_FILES = {"alex": "alexnet.safetensors", "vgg": "vgg16.safetensors"}
_CACHED = {"alex": "alexnet-owt-*.pth", "vgg": "vgg16-*.pth"}
_SMALLEST = {"alex": 63, "vgg": 16}  # pixels per side that leave something after the last pooling
_SSIM_KERNEL = 11
_STRIP = 1 << 20  # pixels of a strip in which SSIM is computed


class Missing(ValueError):
    """A metric cannot be computed here; the message is the reason."""


class NoWeights(Missing):
    """The network of a metric has no weights here."""


def psnr(x: Tensor, truth: Tensor) -> float:
    """Return the peak signal-to-noise ratio in dB over all of (1, C, H, W) in [0, 1]; infinite where they are equal."""
    _check(x, truth)
    error = float((x.float() - truth.float()).square_().mean(dtype=torch.float64))
    return -10 * math.log10(error) if error > 0 else math.inf


def ssim(x: Tensor, truth: Tensor) -> tuple[float | None, str | None]:
    """Return (SSIM, None) for (1, C, H, W) in [0, 1], or (None, reason).

    Gaussian window of 11 x 11 pixels and sigma 1.5, averaged over the places where it fits as in Wang et al. (2004);
    computed in strips of rows so that memory stays bounded.
    """
    _check(x, truth)
    if min(x.shape[-2:]) <= _SSIM_KERNEL:
        return None, f"SSIM needs more than {_SSIM_KERNEL} pixels per side, the image has {tuple(x.shape[-2:])}"
    try:
        from fewstep.compat import prepare_torchvision

        prepare_torchvision()
        from torchmetrics.functional.image import structural_similarity_index_measure as measure
    except ImportError as error:
        return None, f"torchmetrics is not installed ({error}); pip install fewstep[metrics]"
    total, margin = 0.0, _SSIM_KERNEL - 1
    interior = x.shape[-2] - margin
    for first, rows in _strips(interior, x.shape[-1]):
        a, b = (image[..., first : first + rows + margin, :].double() for image in (x, truth))
        _, field = measure(
            a, b, data_range=1.0, return_full_image=True
        )  # in single precision flat images differ from themselves
        inside = slice(margin // 2, -(margin // 2))
        total += rows * float(field[..., inside, inside].double().mean())
    return total / interior, None


def lpips(
    x: Tensor, truth: Tensor, *, net: str = "alex", weights: str | Path | None = None
) -> tuple[float | None, str | None]:
    """Return (LPIPS, None) for (1, 3, H, W) in [0, 1], or (None, reason) where there are no weights; see `lpips_net`.

    Raises:
        ValueError: weights that were asked for are missing or damaged, or the images do not lie in [0, 1].
    """
    _check(x, truth)
    one_of("the LPIPS network", net, _FILES)
    if min(x.shape[-2:]) < _SMALLEST[net]:
        return None, f"LPIPS needs at least {_SMALLEST[net]} pixels per side, the image has {tuple(x.shape[-2:])}"
    try:
        network = lpips_net(net, weights)
    except NoWeights as reason:
        return None, f"{reason}, or give --lpips-weights PATH"
    except Missing as reason:
        return None, str(reason)
    with torch.inference_mode():
        return _distance(network, 2 * x.float().cpu() - 1, 2 * truth.float().cpu() - 1), None


def lpips_net(net: str = "alex", weights: str | Path | None = None) -> nn.Module:
    """Return the LPIPS v0.1 network, (N, 3, H, W) twice in [-1, 1] -> (N, 1, 1, 1), frozen, on the CPU.

    Its weights come from `weights` or else from the environment variable FEWSTEP_LPIPS, each a .safetensors file or a
    folder with alexnet.safetensors and vgg16.safetensors (`features.N.weight` and `features.N.bias` with torchvision's
    layer numbers, `linI.weight`), or else from torchvision's download where it already lies in torch's hub cache.
    Nothing is downloaded.

    Raises:
        Missing: none of these is there, or lpips is not installed.
        ValueError: the file named is missing, damaged or of another network.
    """
    one_of("the LPIPS network", net, _FILES)
    return _build(net, lpips_file(net, weights))


def lpips_file(net: str, weights: str | Path | None = None) -> Path | None:
    """Return the file that `lpips_net` reads, None for the download of the lpips package; ValueError where it does not exist."""
    source = weights or os.environ.get(LPIPS_VARIABLE)
    return _weights_file(Path(source), net) if source else None


def coverage(interval: tuple[Tensor, Tensor], truth: Tensor) -> float:
    """Return the share of coordinates of `truth` inside [lower, upper], ends included; all shapes equal."""
    lower, upper = interval
    if lower.shape != truth.shape or upper.shape != truth.shape:
        raise ValueError(f"interval {tuple(lower.shape)}, {tuple(upper.shape)} and truth {tuple(truth.shape)} differ")
    return float(((lower <= truth) & (truth <= upper)).double().mean())


def _check(x: Tensor, truth: Tensor) -> None:
    if x.ndim != 4 or x.shape[0] != 1 or x.shape != truth.shape:
        raise ValueError(f"expected two images (1, C, H, W) alike, got {tuple(x.shape)} and {tuple(truth.shape)}")
    for name, image in (("image", x), ("truth", truth)):
        low, high = float(image.min()), float(image.max())
        if not (low >= -1e-6 and high <= 1 + 1e-6):
            raise ValueError(f"the {name} must lie in [0, 1], it spans [{low:.3g}, {high:.3g}]")


def _strips(interior: int, width: int) -> list[tuple[int, int]]:
    """Return (first row, rows) of strips that share out the interior rows; none so thin that a window does not fit."""
    count = max(1, min(interior * width // _STRIP, interior // _SSIM_KERNEL))
    ends = [round(i * interior / count) for i in range(count + 1)]
    return [(a, b - a) for a, b in pairwise(ends)]


def _weights_file(path: Path, net: str) -> Path:
    file = path / _FILES[net] if path.is_dir() else path
    if not file.is_file():
        raise ValueError(f"LPIPS weights {file} do not exist")
    return file


def _distance(network: Any, a: Tensor, b: Tensor) -> float:
    """Return what `network(a, b)` does, one layer after the other: a photograph's features need not all be kept."""
    total, pair = 0.0, [network.scaling_layer(a), network.scaling_layer(b)]
    for number, linear in enumerate(network.lins, 1):
        pair = [getattr(network.net, f"slice{number}")(features) for features in pair]
        one, two = (f / (torch.linalg.vector_norm(f, dim=1, keepdim=True) + 1e-10) for f in pair)
        total += float(linear(one.sub_(two).square_()).mean())
    return total


@lru_cache(maxsize=4)
def _build(net: str, file: Path | None) -> nn.Module:
    try:
        from fewstep.compat import prepare_torchvision

        prepare_torchvision()
        from lpips import LPIPS
    except ImportError as error:
        raise Missing(f"the lpips package is not installed ({error}); pip install fewstep[metrics]") from None
    if file is None:
        cache = Path(torch.hub.get_dir()) / "checkpoints"
        if not list(cache.glob(_CACHED[net])):
            raise NoWeights(
                f"no LPIPS weights: set {LPIPS_VARIABLE} to their file or folder, or let the lpips package "
                f"download them to {cache} once: python -c \"import lpips; lpips.LPIPS(net='{net}')\""
            )
        return LPIPS(net=net, verbose=False).requires_grad_(False)
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():  # the caller's random generator is not ours
        warnings.simplefilter("ignore")  # the lpips package speaks torchvision's old language
        network = LPIPS(net=net, pretrained=False, pnet_rand=True, verbose=False)
    _load(network, file)
    return network.requires_grad_(False)


def _load(network: nn.Module, file: Path) -> None:
    """Load `features.N.*` and `linI.weight` into the names of the lpips package; every tensor must find its place."""
    given = {name: value.float() for name, value in read_safetensors(file).items()}
    state = network.state_dict()
    wanted = {name: _foreign(name) for name in state}
    expected = {name for name in wanted.values() if name}
    if expected != set(given):
        differ = ", ".join(sorted(expected ^ set(given))[:4])
        raise ValueError(f"{file} does not hold the weights of this LPIPS network: {differ} missing or unexpected")
    try:
        network.load_state_dict({k: given[v] if v else state[k] for k, v in wanted.items()}, strict=True)
    except RuntimeError as error:
        raise ValueError(f"{file} does not fit this LPIPS network: {' '.join(str(error).split())[:200]}") from None


def read_safetensors(file: Path) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file; ValueError where there is none that can be read."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(file)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file} is no safetensors file that can be read ({error})") from None


def _foreign(name: str) -> str:
    """Return the name in the file of a parameter of the lpips package, "" for its constants."""
    if trunk := re.fullmatch(r"net\.slice\d+\.(\d+\.(weight|bias))", name):
        return f"features.{trunk[1]}"
    if linear := re.fullmatch(r"(?:lin(\d)|lins\.(\d))\.model\.\d+\.weight", name):
        return f"lin{linear[1] or linear[2]}.weight"
    if name.startswith("scaling_layer."):
        return ""
    raise ValueError(f"this version of the lpips package has an unknown parameter {name}")
