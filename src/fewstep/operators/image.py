"""The door for images: outside, operators and noise levels speak of [0, 1]; inside, x is in [-1, 1]."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

from fewstep.compat import prepare_torchvision
from fewstep.core.likelihood import GaussianLikelihood
from fewstep.core.physics import check_constant


def to_unit(x: Tensor) -> Tensor:
    """Return [-1, 1] as [0, 1]."""
    return (x + 1) / 2


def from_unit(x: Tensor) -> Tensor:
    """Return [0, 1] as [-1, 1]."""
    return 2 * x - 1


def deepinv_physics() -> Any:
    """Return `deepinv.physics`, imported on first use: it costs seconds."""
    prepare_torchvision()
    return importlib.import_module("deepinv.physics")


def image_likelihood(
    y: Tensor, physics: Any, sigma: Tensor | float, *, tol: float = 1e-6, max_iter: int = 300
) -> GaussianLikelihood:
    """Return the likelihood, in the prior's coordinates [-1, 1], of a measurement of an image in [0, 1].

    With u = (x + 1) / 2 the model y = A u + n reads 2 y - A(1) = A x + 2 n.

    Args:
        y: measurements of images in [0, 1], (B, *measurement); they need not be in [0, 1] themselves.
        physics: a deepinv `LinearPhysics`, or any object with `A` and `A_adjoint`, linear.
        sigma: standard deviation of the Gaussian noise in y, a number or one per measurement, (B,).
        tol, max_iter: of conjugate gradients, where the operator has no closed form.

    Raises:
        TypeError: y is no tensor, sigma no number, or physics no operator.
        ValueError: y is empty, not finite or does not fit the operator, sigma is not positive, a blur kernel is larger than the
            image, or the operator has a constant part.
    """
    out = GaussianLikelihood(y, physics, sigma, tol=tol, max_iter=max_iter)
    ones = torch.ones(len(y), *out.event_shape, dtype=out.dtype, device=out.device)
    check_filter(physics, ones)
    check_constant(physics, ones)
    out.y, out.sigma = 2 * y - physics.A(ones), 2 * out.sigma
    return out


def check_filter(physics: Any, x: Tensor) -> None:
    """Raise ValueError where the filter of an operator is larger than images like `x`, (N, C, H, W), or not finite."""
    kernel = getattr(physics, "filter", None)
    if not isinstance(kernel, Tensor) or x.ndim != 4:
        return
    check_kernel(kernel, (x.shape[-2], x.shape[-1]))


def check_kernel(kernel: Tensor, size: tuple[int, int]) -> None:
    """Raise ValueError where a kernel, (..., h, w), does not fit into an image of `size` (H, W) or is not finite."""
    h, w = kernel.shape[-2:]
    if h > size[0] or w > size[1]:
        raise ValueError(f"the kernel is {h} x {w}, larger than the image, {size[0]} x {size[1]}")
    if not bool(torch.isfinite(kernel).all()):
        raise ValueError("the kernel holds NaN or infinite values")
