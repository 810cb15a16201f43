"""Any deepinv denoiser as a prior; the one place where its [0, 1] images meet our [-1, 1]."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.core.batch import like
from fewstep.core.denoiser import Denoiser
from fewstep.core.schedule import Schedule, VariancePreserving


class DeepinvDenoiser(Denoiser):
    """E[x_0 | x_t] from a network `model(x, sigma)` on [0, 1] images with noise level sigma in the same units.

    x_t / alpha = x_0 + r z in [-1, 1] is (x_0 + 1)/2 + (r/2) z in [0, 1].

    Args:
        model: takes (N, C, H, W) and sigma, (N,); returns (N, C, H, W).
        schedule: schedule of x_t.
        channels: image channels.
        sigma_min: smallest noise level told to the network, in [0, 1] units.
        sigma_max: largest noise level told to the network, in [0, 1] units; the level it was trained up to.

    Raises:
        ValueError: levels that are none, or a model that cannot be called so; when called, a result of another shape.
    """

    def __init__(
        self,
        model: nn.Module,
        schedule: Schedule | None = None,
        channels: int = 3,
        sigma_min: float = 1e-4,
        sigma_max: float = float("inf"),
    ) -> None:
        super().__init__()
        if not 0 < sigma_min < sigma_max:
            raise ValueError(f"0 < sigma_min < sigma_max is needed, got {sigma_min} and {sigma_max}")
        _check_call(model)
        self.model, self.schedule = model, schedule or VariancePreserving()
        self.event_shape = (channels, None, None)
        self.sigma_min, self.sigma_max = sigma_min, sigma_max

    def forward(self, x_t: Tensor, t: Tensor, **cond: Any) -> Tensor:
        """See `Denoiser`; x_t is (N, C, H, W) in [-1, 1] units, t is () or (N,). At t = 0 the result is x_t."""
        t = torch.as_tensor(t, dtype=x_t.dtype, device=x_t.device).expand(len(x_t))
        alpha, _ = self.schedule(t)
        sigma = self.schedule.ratio(t) / 2
        x = x_t / like(alpha, x_t)
        level = sigma.clamp(self.sigma_min, self.sigma_max)
        dtype = next((p.dtype for p in self.model.parameters()), x.dtype)  # that of the weights, where there are any
        out = self.model(((x + 1) / 2).to(dtype), level.to(dtype), **cond)
        if out.shape != x.shape:
            raise ValueError(
                f"{type(self.model).__name__} made {tuple(out.shape)} of images {tuple(x.shape)}, a denoiser keeps the shape"
            )
        return torch.where(like(sigma, x) == 0, x, 2 * out.to(x.dtype) - 1)


def _check_call(model: nn.Module) -> None:
    """Raise ValueError where a model cannot be called as `model(x, sigma)`, as far as it tells."""
    try:
        signature = inspect.signature(model.forward)
    except (TypeError, ValueError):  # compiled code may have none
        return
    try:
        signature.bind_partial(None, None)
    except TypeError as error:
        raise ValueError(
            f"{type(model).__name__} must take images and their noise level, model(x, sigma): {error}"
        ) from None
