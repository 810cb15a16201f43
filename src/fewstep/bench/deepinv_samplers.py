"""deepinv's own DPS, DDRM and DiffPIR on our network, operator and number of steps: what we are compared with.

All of deepinv speaks of images in [0, 1]: its denoisers take (u + sigma z, sigma). In our coordinates that is x = 2 u - 1 at
noise ratio 2 sigma.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.compat import prepare_torchvision
from fewstep.core.batch import like
from fewstep.core.denoiser import Denoiser
from fewstep.operators.image import from_unit, to_unit

Restore = Callable[[Tensor, Any], Tensor]  # (y, physics) -> image in [0, 1]


class DeepinvDenoiser(nn.Module):
    """A prior of ours as a deepinv denoiser, counting its calls."""

    def __init__(self, prior: Denoiser) -> None:
        super().__init__()
        self.prior, self.calls = prior, 0

    def forward(self, x: Tensor, sigma: Tensor | float, **ignored: Any) -> Tensor:
        """Return E[u | u + sigma z], (N, C, H, W) in [0, 1]; `sigma` is a number or has one entry per item."""
        self.calls += 1
        # float64, since deepinv's first level is the largest of the schedule
        level = torch.as_tensor(sigma, dtype=torch.float64, device=x.device).flatten()
        ratio = (2 * level[0] if level.numel() == 1 else 2 * level).clamp_min(1e-4)  # its last level may be 0
        t = self.prior.schedule.time(ratio)
        alpha, _ = self.prior.schedule(t)
        return to_unit(self.prior(like(alpha, x) * from_unit(x), t))


@dataclass(frozen=True)
class Rival:
    """One of deepinv's samplers beside ours.

    Attributes:
        method: our method of the same name.
        build: (denoiser, sigma, steps) -> deepinv's sampler at its own settings.
        equal: our fields under which the two are the same algorithm, as near as ours allows.
        difference: what still differs, in a line.
    """

    method: str
    build: Callable[[DeepinvDenoiser, float, int], Restore]
    equal: dict[str, Any]
    difference: str


def _dps(denoiser: DeepinvDenoiser, sigma: float, steps: int) -> Restore:
    from deepinv.sampling import DPS

    return DPS(denoiser, num_steps=steps + 1)  # the grid has one time more than there are steps


def _ddrm(denoiser: DeepinvDenoiser, sigma: float, steps: int) -> Restore:
    import numpy as np
    from deepinv.sampling import DDRM

    return DDRM(denoiser, sigmas=np.linspace(1, 0, steps))


def _diffpir(denoiser: DeepinvDenoiser, sigma: float, steps: int) -> Restore:
    from deepinv.optim.data_fidelity import L2
    from deepinv.sampling import DiffPIR

    return DiffPIR(denoiser, L2(), sigma=sigma, max_iter=steps)


RIVALS = {
    "dps": Rival(
        "dps",
        _dps,
        # it adds grad |y - A u| to the score, which moves x_s by d x_s / d score times that; the factor changes with t and
        # ours is constant as in the paper's code, so no value of zeta makes the two equal
        {},
        "deepinv adds the gradient of the norm to the score, so that the step weights it by d x_s / d score (about beta_t); "
        "ours adds it to x_s with weight 1 as the paper's code does. It clips the denoised image and works in float64.",
    ),
    "ddrm": Rival(
        "ddrm",
        _ddrm,
        {},
        "deepinv divides all fresh noise by sqrt(2), spaces sigma evenly from 1 (in [0, 1] units) and drops singular values "
        "below sigma; ours follows the paper on the grid of the prior's schedule.",
    ),
    "diffpir": Rival(
        "diffpir",
        _diffpir,
        # the prox weight r^2 / (4 lam sigma^2) of ours is r^2 / (2 lam sigma^2) of deepinv's, which mixes [0, 1] and [-1, 1]
        {"lam": 3.5, "zeta": 0.1},
        "deepinv's default zeta is 0.1 (paper and ours 0.3), its lambda of 7 acts as 3.5 since sigma is in [0, 1] and the ratio "
        "in [-1, 1] units, its times are 1 - sqrt(k / N) (ours (1 - k / N)^2), x_0 is clipped, it starts from noised A'y, and it "
        "leaves out the data step of the last iteration.",
    ),
}


def build_rival(name: str, prior: Denoiser, sigma: float, steps: int) -> tuple[Restore, DeepinvDenoiser]:
    """Return deepinv's sampler of our method `name` and the denoiser that counts its calls."""
    prepare_torchvision()
    denoiser = DeepinvDenoiser(prior)
    return RIVALS[name].build(denoiser, sigma, steps), denoiser
