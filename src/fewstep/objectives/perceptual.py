"""LPIPS features, as a loss and as a space for the energy score."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fewstep.core.batch import item_dot

RANGE = 2.0  # images in [-1, 1] may leave it a little, never by this much


def drawn_features(network: nn.Module, x: Tensor) -> list[Tensor]:
    """Return `lpips_features` of what a network drew, (N, 3, H, W): while it learns single pixels are far out, and are clipped.

    Raises:
        ValueError: as there; also where more than half of the pixels are far out, as in images of [0, 255].
    """
    far = x.detach().abs() > RANGE
    return lpips_features(network, x if far.float().mean() > 0.5 else x.clamp(-RANGE, RANGE))


def lpips_features(network: nn.Module, x: Tensor) -> list[Tensor]:
    """Return the features behind LPIPS, (N, C_l, P_l) per layer, whose mean squared distance over places is the LPIPS.

    Unit-normalised in each place and scaled by the square root of the layer's weights (Zhang et al. 2018, arXiv:1801.03924).

    Args:
        network: of `metrics.lpips_net`; frozen.
        x: images, (N, 3, H, W) in [-1, 1].

    Raises:
        ValueError: x is not of that shape and range, [0, 255] images say.
    """
    if x.ndim != 4 or x.shape[1] != 3 or float(x.detach().abs().max()) > RANGE:
        raise ValueError(
            f"LPIPS takes (N, 3, H, W) in [-1, 1], got {tuple(x.shape)} up to {float(x.detach().abs().max()):.3g}"
        )
    lpips: Any = network
    layers = lpips.net(lpips.scaling_layer(x))
    return [_weighted(features, linear) for features, linear in zip(layers, lpips.lins, strict=True)]


def _weighted(features: Tensor, linear: Any) -> Tensor:
    unit = features / (torch.linalg.vector_norm(features, dim=1, keepdim=True) + 1e-10)
    weight = linear.model[-1].weight.clamp_min(0).sqrt()  # (1, C, 1, 1), not negative in every published version
    return (weight * unit).flatten(2)


def lpips_distance(a: list[Tensor], b: list[Tensor]) -> Tensor:
    """Return the LPIPS, (N,), of images with features `a` and `b`."""
    return torch.stack([item_dot(x - y, x - y) / x.shape[-1] for x, y in zip(a, b, strict=True)]).sum(0)
