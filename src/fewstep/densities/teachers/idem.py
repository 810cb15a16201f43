"""iDEM, iterated denoising energy matching (Akhound-Sadegh et al. 2024, arXiv:2402.06121), in whitened coordinates.

Where the paper starts from a wide Gaussian, we start from N(0, I): with f = rho / N(0, I), an Ornstein-Uhlenbeck process has

    p_t(y) / N(y; 0, I) ∝ E_e f(alpha y + sigma e),    G(y, t) = sum_i w_i guide(x_i),  x_i = alpha y + sigma e_i,  w ∝ f(x_i),

the gradient of a log-mean-exp over K draws: biased, and consistent as K grows.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn

from fewstep.core.density import TargetDensity
from fewstep.core.noise import Noise
from fewstep.core.objective import Objective
from fewstep.core.reference import Reference
from fewstep.densities.base import DensitySampler
from fewstep.densities.networks import ControlNet, NetConfig
from fewstep.densities.paths import Kernels, simulate
from fewstep.densities.teachers._base import PathTeacher
from fewstep.densities.whitened import Whitened


class Replayed(nn.Module):
    """A control with the samples it has drawn: what iDEM trains.

    `samples` is a ring of (size, d); `turn` counts the steps that were done. Both are part of a checkpoint.
    """

    samples: Tensor
    turn: Tensor

    def __init__(self, control: ControlNet, size: int) -> None:
        super().__init__()
        self.control = control
        self.register_buffer("samples", torch.zeros(size, *control.event_shape))
        self.register_buffer("turn", torch.zeros((), dtype=torch.int64))


@dataclass(frozen=True)
class EnergyMatching(Objective):
    """E |G_theta(y_t, t) - G_K(y_t, t)|^2 / (1 + |G_K|^2 / d) at noised samples of the model itself, t uniform on the grid.

    Attributes:
        target: the density in whitened coordinates.
        kernels: how samples are drawn, and the times at which the network is trained.
        draws: K.
        refresh: steps between additions to the ring of samples.
    """

    target: TargetDensity
    kernels: Kernels
    draws: int = 128
    refresh: int = 50

    def loss(self, player: str, model: nn.Module, batch: Any, noise: Noise) -> tuple[Tensor, dict[str, float]]:
        """See `Objective`."""
        replayed = cast(Replayed, model)
        control = replayed.control
        self._refill(replayed, noise)
        row, step = noise.rand(2).T
        x = replayed.samples[(row * len(replayed.samples)).long()]
        t = self.kernels.times.to(x)[(step * len(self.kernels)).long()]
        alpha, sigma = (c[:, None] for c in control.schedule(t))
        y = alpha * x + sigma * noise.randn_like(x)
        wanted = drift_estimate(control, self.target, y, t, noise.randn(self.draws, *control.event_shape))
        error = (control.drift(y, t, control.guide(y)) - wanted).square().mean(1)
        return (error / (1 + wanted.square().mean(1))).mean(), {"error": float(error.detach().mean())}

    @torch.no_grad()
    def _refill(self, replayed: Replayed, noise: Noise) -> None:
        """Every `refresh` steps put one sample per stream into the ring; at the start fill all of it."""
        turn, size = int(replayed.turn), len(replayed.samples)
        replayed.turn += 1
        if turn % self.refresh:
            return
        fresh = simulate(replayed.control, self.kernels, noise).y
        count = len(fresh)
        places = torch.arange(size) if turn == 0 else (turn // self.refresh * count + torch.arange(count)) % size
        replayed.samples[places] = fresh[places % count].nan_to_num(0.0).clamp(-10, 10)


def drift_estimate(control: ControlNet, target: TargetDensity, y: Tensor, t: Tensor, e: Tensor) -> Tensor:
    """Return G_K at y, (N, d), at times t, (N,), from the normals e, (N, K, d)."""
    alpha, sigma = (c[:, None, None] for c in control.schedule(t))
    x = (alpha * y[:, None] + sigma * e).flatten(0, 1)
    with torch.no_grad():
        log_f = target.log_prob(x) + x.square().sum(1) / 2
        guides = control.guide(x)
    assert guides is not None
    weights = log_f.nan_to_num(-torch.inf, -torch.inf).reshape(e.shape[:2]).softmax(1).nan_to_num(0.0)
    return (weights[..., None] * guides.reshape(e.shape)).sum(1)


@dataclass(frozen=True)
class IDEM(PathTeacher):
    """Regression of the drift on K-sample estimates at the model's own noised samples; no simulation is differentiated.

    Cheap where the target is, and noisy where K draws do not find the modes; the weights of the paths say how good it is. See
    `PathTeacher`.

    Attributes:
        draws: K.
        refresh: steps between additions to the ring of samples.
        ring: how many samples are kept.
    """

    reference = Reference(
        "Iterated Denoising Energy Matching for Sampling from Boltzmann Densities",
        "Akhound-Sadegh, Tara and Rector-Brooks, Jarrid and Bose, Avishek Joey and others",
        2024,
        "International Conference on Machine Learning",
        "2402.06121",
    )
    default_loss = "energy_matching"
    net: NetConfig = field(default_factory=lambda: NetConfig(spread=False))
    draws: int = 128
    refresh: int = 50
    ring: int = 8192

    def model(self, whitened: Whitened, seed: int) -> nn.Module:
        """See `Teacher`."""
        return Replayed(cast(ControlNet, super().model(whitened, seed)), self.ring)

    def objective(self, whitened: Whitened, loss: str) -> Objective:
        """See `Teacher`; there is one loss, "energy_matching"."""
        self.check_loss(loss)
        return EnergyMatching(whitened, self.kernels(self.steps), self.draws, self.refresh)

    def sampler(self, whitened: Whitened, model: nn.Module) -> DensitySampler:
        """See `Teacher`."""
        return super().sampler(whitened, cast(Replayed, model).control)
