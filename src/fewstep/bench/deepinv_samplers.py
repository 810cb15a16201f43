"""deepinv's own DPS, DDRM and DiffPIR on our network, operator and number of steps: what we are compared with.

All of deepinv speaks of images in [0, 1]: its denoisers take (u + sigma z, sigma). In our coordinates that is x = 2 u - 1 at
noise ratio 2 sigma.

Our methods take their noise levels from the prior's schedule, so they run at deepinv's levels under a prior that is wrapped
in another schedule (`Levels`), which the uniform grid meets at exactly those levels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.compat import prepare_torchvision
from fewstep.core.batch import like
from fewstep.core.denoiser import Denoiser, Rescheduled
from fewstep.core.registry import get
from fewstep.core.sampler import Sampler
from fewstep.core.schedule import Schedule, VariancePreserving
from fewstep.operators.image import from_unit, to_unit

Restore = Callable[[Tensor, Any], Tensor]  # (y, physics) -> image in [0, 1]
LOWEST = 1e-4  # noise ratio that stands for deepinv's last level where that is 0


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
        ratio = (2 * level[0] if level.numel() == 1 else 2 * level).clamp_min(LOWEST)
        t = self.prior.schedule.time(ratio)
        alpha, _ = self.prior.schedule(t)
        return to_unit(self.prior(like(alpha, x) * from_unit(x), t))


@dataclass(frozen=True)
class Levels(Schedule):
    """The schedule whose values on the uniform grid of n steps are given; it is linear in between.

    Attributes:
        ratios: noise ratios at t = 1, 1 - 1/n, ..., 1/n, falling; at t = 0 the ratio is 0 and alpha 1.
        alphas: alpha at the same times; 1 everywhere where empty.
    """

    ratios: tuple[float, ...] = field(repr=False)
    alphas: tuple[float, ...] = field(default=(), repr=False)

    def __call__(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """See `Schedule`."""
        alpha = self._at(t, (*self.alphas, 1.0)) if self.alphas else torch.ones_like(t)
        return alpha, alpha * self.ratio(t)

    def ratio(self, t: Tensor) -> Tensor:
        """See `Schedule`."""
        return self._at(t, (*self.ratios, 0.0))

    def time(self, ratio: Tensor) -> Tensor:
        """See `Schedule`."""
        rising = torch.tensor((*self.ratios, 0.0), dtype=torch.float64).flip(0).to(ratio)
        i = (torch.searchsorted(rising, ratio.detach().contiguous(), right=True) - 1).clamp(0, len(rising) - 2)
        return (i + (ratio - rising[i]) / (rising[i + 1] - rising[i])) / (len(rising) - 1)

    def _at(self, t: Tensor, values: Sequence[float]) -> Tensor:
        rising = torch.tensor(values, dtype=torch.float64).flip(0).to(t)
        u = t * (len(values) - 1)
        i = u.detach().floor().clamp(0, len(values) - 2).long()
        return rising[i] + (u - i) * (rising[i + 1] - rising[i])


@dataclass(frozen=True)
class Rival:
    """One of deepinv's samplers beside ours.

    Attributes:
        method: our method of the same name.
        build: (denoiser, sigma, steps) -> deepinv's sampler at its own settings.
        fields: our fields at deepinv's settings, beside the uniform grid.
        schedule: (steps) -> the schedule at deepinv's noise levels.
        difference: what differs between the published settings, and what is left at deepinv's, in a line.
    """

    method: str
    build: Callable[[DeepinvDenoiser, float, int], Restore]
    fields: dict[str, Any]
    schedule: Callable[[int], Schedule]
    difference: str


def _dps(denoiser: DeepinvDenoiser, sigma: float, steps: int) -> Restore:
    from deepinv.sampling import DPS

    return DPS(denoiser, num_steps=steps + 1)  # the grid has one time more than there are steps


def _dps_levels(steps: int) -> Levels:
    """Return the linear VP levels of deepinv, in coordinates in which a constant step on |y - A D| is deepinv's.

    deepinv adds the gradient to the score, which gives it the weight w = alpha_t alpha_s (r_t^2 - r_s^2) / 2 in x_s; ours
    has the weight zeta. Where x is scaled by c_t the gradient is divided by it, and what is added to x_s by c_s: the two
    agree for c_t c_s = zeta / w, here with zeta = 1 and c = 1 at the end.
    """
    t = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    alpha, ratio = VariancePreserving()(t)[0], VariancePreserving().ratio(t)
    weight = alpha[:-1] * alpha[1:] * (ratio[:-1].square() - ratio[1:].square()) / 2
    scales = [1.0]
    for w in weight.flip(0).tolist():
        scales.append(1 / (w * scales[-1]))
    alphas = alpha * torch.tensor(scales, dtype=torch.float64).flip(0)
    return Levels(tuple(ratio[:-1].tolist()), tuple(alphas[:-1].tolist()))


def _ddrm(denoiser: DeepinvDenoiser, sigma: float, steps: int) -> Restore:
    import numpy as np
    from deepinv.sampling import DDRM

    return DDRM(denoiser, sigmas=np.linspace(1, 0, steps))


def _ddrm_levels(steps: int) -> Levels:
    return Levels(tuple(torch.linspace(2, 0, steps, dtype=torch.float64).clamp_min(LOWEST).tolist()))


def _diffpir(denoiser: DeepinvDenoiser, sigma: float, steps: int) -> Restore:
    from deepinv.optim.data_fidelity import L2
    from deepinv.sampling import DiffPIR

    return DiffPIR(denoiser, L2(), sigma=sigma, max_iter=steps)


def _diffpir_levels(steps: int) -> Levels:
    """Return the levels of deepinv's own object, which are ratios in our units."""
    from deepinv.sampling import DiffPIR

    rival = DiffPIR(None, None, max_iter=steps)
    return Levels(tuple(rival.sigmas[rival.seq.long()].double().tolist()))


RIVALS = {
    "dps": Rival(
        "dps",
        _dps,
        {"zeta": 1.0, "grid": "uniform"},
        _dps_levels,
        "deepinv adds the gradient of the norm to the score, so that a step weights it by sinh((B_t - B_s) / 2), B being the "
        "integral of beta; ours adds it to x_s with weight 1 as the paper's code does. At deepinv's settings ours runs in "
        "coordinates scaled so that the weights agree, and what is left is its clipping of the denoised image to [-1, 1] (of "
        "[0, 1] images), its float64 outside the network, and the random numbers.",
    ),
    "ddrm": Rival(
        "ddrm",
        _ddrm,
        {"grid": "uniform"},
        _ddrm_levels,
        "deepinv spaces sigma evenly from 1 (of [0, 1] images) to 0; ours takes the levels of the prior's schedule. At "
        "deepinv's settings what is left: it divides fresh noise by sqrt(2), which is right for the complex coefficients of a "
        "blur and halves the variance of real ones (inpainting); it starts unmeasured directions around black, ours around mid "
        "grey (inpainting gives the same PSNR without these two); and it takes singular values below sigma as unmeasured.",
    ),
    "diffpir": Rival(
        "diffpir",
        _diffpir,
        # the prox weight r^2 / (4 lam sigma^2) of ours is r^2 / (2 lam sigma^2) of deepinv's, which mixes [0, 1] and [-1, 1]
        {"lam": 3.5, "zeta": 0.1, "grid": "uniform"},
        _diffpir_levels,
        "deepinv's default zeta is 0.1 (paper and ours 0.3), its lambda of 7 acts as 3.5 since sigma is in [0, 1] and the ratio "
        "in [-1, 1] units, its times are 1 - sqrt(k / N) (ours (1 - k / N)^2). At deepinv's settings what is left: it clips x_0, "
        "starts from noised A'y, and returns x at the last noise level of 0.01 without using its last network call.",
    ),
}


def build_rival(name: str, prior: Denoiser, sigma: float, steps: int) -> tuple[Restore, DeepinvDenoiser]:
    """Return deepinv's sampler of our method `name` and the denoiser that counts its calls."""
    prepare_torchvision()
    denoiser = DeepinvDenoiser(prior)
    return RIVALS[name].build(denoiser, sigma, steps), denoiser


def at_rival_settings(name: str, prior: Denoiser, steps: int) -> tuple[Sampler, Denoiser]:
    """Return our method `name` with deepinv's fields, and the prior at deepinv's noise levels."""
    prepare_torchvision()
    rival = RIVALS[name]
    sampler = get(rival.method)(steps=steps, **rival.fields)
    return sampler, Rescheduled(prior, rival.schedule(steps))
