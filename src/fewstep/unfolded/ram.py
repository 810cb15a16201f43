r"""The start of deepinv's RAM, a network that reconstructs from any linear measurement (Terris et al. 2025, arXiv:2503.08915).

It is given y and x_t together, as UD2M's paper does (Kemajou Mbakam et al. 2025, arXiv:2507.02686): with u = (x + 1) / 2 in [0, 1]

    (y + A 1) / 2 = A u + sigma_y / 2 n,    (x_t + alpha) / 2 = alpha u + sigma_t / 2 z

are one measurement, its rows scaled to the smaller of the two noise levels. RAM is frozen here (the paper trains it along) and costs
one network call. Its weights are looked for and never downloaded.
"""

from __future__ import annotations

import os
import pickle
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fewstep.compat import prepare_torchvision
from fewstep.core.batch import like
from fewstep.core.likelihood import GaussianLikelihood
from fewstep.operators.image import deepinv_physics

RAM_VARIABLE = "FEWSTEP_RAM"
_CACHED = "ram.pth.tar"  # the name under which deepinv's download lies in torch's hub cache


def reconstruct(likelihood: GaussianLikelihood, x_t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """Return what RAM makes of y and x_t, (N, C, H, W) in [-1, 1]; alpha and sigma of x_t are (N,).

    Raises:
        ValueError: no images, or no weights.
        TypeError: the likelihood is not linear-Gaussian.
    """
    if not isinstance(likelihood, GaussianLikelihood) or likelihood.y.is_complex():
        raise TypeError(f"the start 'ram' takes real linear measurements, not a {type(likelihood).__name__}")
    if x_t.ndim != 4:
        raise ValueError(f"the start 'ram' takes images, (N, C, H, W), got {tuple(x_t.shape)}")
    network: Any = ram_network().to(x_t.device)
    stack = Stack(likelihood, x_t, alpha, sigma, tuple(network.get_pad(x_t.shape[1:])[1:]))
    u = network(stack.y.float(), stack.physics())
    return (2 * stack.crop(u) - 1).to(x_t)


class Stack:
    """(y, x_t) as one measurement of u, inside a frame of zeros at the top and on the left that brings it to a size RAM takes.

    Args:
        likelihood: of y.
        x_t: noisy items, (N, C, H, W).
        alpha, sigma: of x_t, (N,).
        frame: rows and columns of the frame.

    Attributes:
        y: the measurement, (N, P).
        level: its noise level, (N,).
    """

    def __init__(
        self, likelihood: GaussianLikelihood, x_t: Tensor, alpha: Tensor, sigma: Tensor, frame: tuple[int, int]
    ) -> None:
        self.likelihood, self.x_t, self.frame = likelihood, x_t, frame
        self.level = torch.minimum(likelihood.sigma, sigma) / 2
        self.first, self.second = 2 * self.level / likelihood.sigma, 2 * self.level / sigma * alpha
        noisy = (x_t / like(alpha, x_t) + 1) / 2
        self.y = self._join((likelihood.y + likelihood.A(torch.ones_like(x_t))) / 2, noisy)

    def A(self, u: Tensor, **_: Any) -> Tensor:
        """Return the two blocks of rows, (N, C, H', W') -> (N, P)."""
        u_ = self.crop(u).to(self.x_t)
        return self._join(self.likelihood.A(u_), u_).to(u)

    def A_adjoint(self, v: Tensor, **_: Any) -> Tensor:
        """Return the adjoint, (N, P) -> (N, C, H', W')."""
        back, beside = v.to(self.x_t).split([self.likelihood.y[0].numel(), self.x_t[0].numel()], 1)
        back = self.likelihood.A_adjoint(like(self.first, back).mul(back).reshape(self.likelihood.y.shape))
        return self._framed(back + like(self.second, self.x_t) * beside.reshape(self.x_t.shape)).to(v)

    def prox_l2(self, z: Tensor, y: Tensor, gamma: Tensor, **_: Any) -> Tensor:
        """Return argmin_u gamma / 2 |B u - y|^2 + |u - z|^2 / 2 in closed form; `gamma` has one value per item."""
        gamma = gamma.to(self.x_t)
        right = self.crop(z.to(self.x_t) + gamma * self.A_adjoint(y.to(self.x_t)))
        scale = gamma.flatten() * (2 * self.level).square()  # gamma first^2 = scale / sigma_y^2
        rho = (scale / (1 + gamma.flatten() * self.second.square())).sqrt()
        outside = z.to(self.x_t) - self._framed(self.crop(z).to(self.x_t))
        return (outside + self._framed(self.likelihood.solve(right, rho) / like(scale, right))).to(z)

    def physics(self) -> Any:
        """Return the operator with its noise as a deepinv `LinearPhysics`."""
        deepinv = deepinv_physics()
        size = self._framed(self.x_t).shape[1:]
        noise = deepinv.GaussianNoise(self.level.float())
        out = deepinv.LinearPhysics(
            self.A, self.A_adjoint, img_size=tuple(size), noise_model=noise, device=self.x_t.device
        )
        out.prox_l2 = self.prox_l2  # its own is iterative, and stops by the whole batch
        return out

    def crop(self, u: Tensor) -> Tensor:
        """Return u without the frame."""
        return u[..., self.frame[0] :, self.frame[1] :]

    def _framed(self, u: Tensor) -> Tensor:
        return F.pad(u, (self.frame[1], 0, self.frame[0], 0))

    def _join(self, first: Tensor, second: Tensor) -> Tensor:
        return torch.cat(
            [like(w, v) * v for w, v in ((self.first, first.flatten(1)), (self.second, second.flatten(1)))], 1
        )


def ram_network() -> nn.Module:
    """Return RAM with frozen weights: from the file that FEWSTEP_RAM names, or else where deepinv's download already lies.

    Raises:
        ValueError: there are none, or they cannot be used.
    """
    source = os.environ.get(RAM_VARIABLE)
    file = Path(source) if source else Path(torch.hub.get_dir()) / "checkpoints" / _CACHED
    if not file.is_file():
        raise ValueError(
            f"the start 'ram' needs the weights of deepinv's RAM, and {file} does not exist: set {RAM_VARIABLE} to their file, or "
            'let deepinv download them once: python -c "from fewstep.compat import prepare_torchvision as prepare; prepare(); '
            'import deepinv; deepinv.models.RAM()"'
        )
    return _load(file, own=not source)


@lru_cache(maxsize=2)
def _load(file: Path, own: bool) -> nn.Module:
    """Return the network; deepinv reads its `own` download with a rule of its own."""
    prepare_torchvision()
    try:
        from deepinv.models import RAM
    except ImportError as error:
        raise ValueError(f"the start 'ram' needs deepinv's RAM ({error}); pip install -U deepinv") from None
    with torch.random.fork_rng(devices=[]):
        try:
            network = RAM(pretrained=True if own else str(file))
        except (OSError, RuntimeError, KeyError, pickle.UnpicklingError) as error:
            raise ValueError(f"{file} holds no weights of RAM: {' '.join(str(error).split())[:200]}") from None
    return network.eval().requires_grad_(False)
