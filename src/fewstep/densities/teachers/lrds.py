"""LRDS, learned reference-based diffusion sampling (Noble, Grenioux, Gabrié and Durmus 2025, arXiv:2410.19449)."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from fewstep.core.density import TargetDensity, gradient
from fewstep.core.noise import Noise, seeded
from fewstep.core.reference import Reference
from fewstep.densities.mcmc.chains import Chains
from fewstep.densities.mcmc.hamiltonian import mala
from fewstep.densities.mixtures import Fitted, fit_mixture
from fewstep.densities.networks import ControlNet, Moments, NetConfig, drift_of, gaussian_drift
from fewstep.densities.teachers._base import PathTeacher
from fewstep.densities.whitened import Whitened
from fewstep.priors.exact import MixturePrior


class Referred(ControlNet):
    """The drift of a Gaussian mixture, in closed form, plus what a network says beyond its spreads; that starts at zero.

    Args:
        reference: the mixture under the schedule of the control.
        target: the density in whitened coordinates; the guide is its score relative to that of the mixture.
        config: size and start.
    """

    def __init__(self, reference: MixturePrior, target: TargetDensity, config: NetConfig) -> None:
        super().__init__(reference.schedule, target, config)
        self.reference = reference

    def relative_score(self, y: Tensor) -> Tensor:
        """See `ControlNet`; relative to the mixture."""
        return self.target.score(y) - gradient(self.reference.log_prob, y)

    def moments(self, y: Tensor, t: Tensor, guide: Tensor | None) -> Moments:
        """See `Control`."""
        learned = super().moments(y, t, guide)
        alpha, sigma = (c[..., None] for c in self.schedule(t))
        centred = gaussian_drift(y, torch.zeros_like(y), learned.spread, alpha, sigma)  # the mixture says it already
        return Moments(learned.drift - centred + drift_of(self.reference, y, t), learned.spread)


@dataclass(frozen=True, eq=False)
class Around(TargetDensity):
    """Where chains start when modes are known: equal Gaussians of deviation `width` around them; item k at mode k modulo M."""

    modes: Tensor
    width: float = 0.05

    @property
    def dim(self) -> int:  # type: ignore[override]
        """See `TargetDensity`."""
        return self.modes.shape[1]

    def log_prob(self, x: Tensor) -> Tensor:
        """See `TargetDensity`."""
        log = -torch.cdist(x, self.modes.to(x)).square() / (2 * self.width**2)
        return log.logsumexp(1) - math.log(len(self.modes)) - self.dim * math.log(self.width * math.sqrt(2 * math.pi))

    def sample(self, noise: Noise) -> Tensor:
        """See `TargetDensity`."""
        z = noise.randn(self.dim)
        return self.modes.to(z)[torch.arange(len(z)) % len(self.modes)] + self.width * z


@dataclass(frozen=True)
class LRDS(PathTeacher):
    """A learned correction to the reversal of a Gaussian mixture that was fitted to local samples of the target.

    The samples need not have the right weights of modes, only the right places: the control corrects them. They come from MALA
    chains that start around `modes`, or from N(0, I) in whitened coordinates where none are named, or are given. See `PathTeacher`.

    Attributes:
        components: of the mixture; one for each mode where modes are named.
        modes: points near the modes, in the target's coordinates.
        samples: samples of the target in its own coordinates, (N, d), used instead of chains; not part of what is saved.
    """

    reference = Reference(
        "Learned Reference-based Diffusion Sampling for Multi-modal Distributions",
        "Noble, Maxence and Grenioux, Louis and Gabrié, Marylou and Oliviero Durmus, Alain",
        2025,
        "International Conference on Learning Representations",
        "2410.19449",
    )
    components: int = 16
    modes: tuple[tuple[float, ...], ...] = ()
    samples: Tensor | None = field(default=None, repr=False, compare=False)

    def control(self, whitened: Whitened) -> ControlNet:
        """See `PathTeacher`; the mixture is a placeholder for that of the weights."""
        count, dim = len(self.modes) or self.components, whitened.dim
        return self._control(whitened, Fitted(torch.ones(count), torch.zeros(count, dim), torch.ones(count, dim)))

    def model(self, whitened: Whitened, seed: int) -> nn.Module:
        """See `Teacher`."""
        modes = whitened.to_y(torch.tensor(self.modes)) if self.modes else None
        y = whitened.to_y(self.samples.float()) if self.samples is not None else local_samples(whitened, modes, seed)
        fitted = fit_mixture(y, len(self.modes) or self.components, modes, seed)
        return seeded(lambda: self._control(whitened, fitted), seed)

    def _control(self, whitened: Whitened, fitted: Fitted) -> ControlNet:
        return Referred(MixturePrior(*fitted, self.schedule), whitened, self.net)


def local_samples(whitened: Whitened, modes: Tensor | None, seed: int) -> Tensor:
    """Return samples of the target near where chains start, (4096, d), whitened."""
    base = None if modes is None else Around(modes)
    x = Chains(mala(), 256, warmup=200, thin=5).sample(whitened, 4096, seed=seed, base=base, dtype=torch.float32).x
    return whitened.to_y(x)
