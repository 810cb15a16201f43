r"""A control matched to draws of Monte Carlo, by maximum likelihood of its paths.

Draws x_0 of replica exchange, or anyone's, are noised to y = alpha x_0 + sigma z. Both

    A = x_0 - alpha z / sigma    and    B = guide(x_0) = x_0 + grad log rho(x_0)

have the mean G(y, t) = E[. | y], the first by Tweedie's formula, the second by the target score identity E[grad log rho(x_0) | y] =
alpha grad log p_t(y) (De Bortoli et al. 2024, arXiv:2402.08667). A is noisy where t is small and B where it is large. In a mode
of variance v they err in opposite directions, and c A + (1 - c) B with c = sigma^2 (1 - v) / (alpha^2 v + sigma^2) has no noise at
all. In general the c of least variance is that of the least second moment, because the mean is the same for all c: one is found
per time and coordinate before training.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from fewstep.core.noise import Noise, Streams, mix
from fewstep.core.objective import Objective
from fewstep.core.reference import Reference
from fewstep.core.schedule import Schedule
from fewstep.densities.base import DensitySampler
from fewstep.densities.mcmc.hamiltonian import Hamiltonian
from fewstep.densities.mcmc.replica_exchange import ReplicaExchange
from fewstep.densities.networks import ControlNet, NetConfig
from fewstep.densities.paths import DISCRETISATIONS, Kernels
from fewstep.densities.targets._mixture import Concentric
from fewstep.densities.teachers._base import PathTeacher
from fewstep.densities.whitened import Whitened

_WIDTH = 96  # of the network, up to which the rate of training is that of the default
_BEFORE = 8  # times as few draws say how coordinates are bent, before the others are drawn there
_AGAIN = 4  # times as many draws, and steps of each, are weighted for a further training
_TAIL = 0.5  # k-hat up to which weights have a variance: rare parts of the target are then not lost to chance


class Informed(nn.Module):
    """A control with the draws that it is matched to: x_0 and their guides, (N, d), and c, (steps, d)."""

    samples: Tensor
    guides: Tensor
    shares: Tensor

    def __init__(self, control: ControlNet, samples: Tensor, guides: Tensor, shares: Tensor) -> None:
        super().__init__()
        self.control = control
        for name, value in (("samples", samples), ("guides", guides), ("shares", shares)):
            self.register_buffer(name, value)


@torch.no_grad()
def shares_of(samples: Tensor, guides: Tensor, schedule: Schedule, times: Tensor, seed: int = 0) -> Tensor:
    """Return the c of least variance at each of `times`, (K,), per coordinate, between 0 and 1: (K, d)."""
    z, found = Streams(seed, range(len(samples))).randn_like(samples), []
    for t in times.to(samples):
        alpha, sigma = schedule(t)
        first = samples - alpha / sigma * z
        gap = first - guides
        found.append(((gap * -guides).mean(0) / gap.square().mean(0)).clamp(0, 1))
    return torch.stack(found)


@dataclass(frozen=True)
class Matching(Objective):
    """-E log P_F along noised draws, one step of a path per item: drift by regression, spread by likelihood.

    Attributes:
        kernels: of one or more paths, whose steps are met alike.
    """

    kernels: Sequence[Kernels]

    @property
    def times(self) -> Tensor:
        """Where steps begin, (K,)."""
        return torch.cat([path.times[:-1] for path in self.kernels])

    def loss(self, player: str, model: nn.Module, batch: Any, noise: Noise) -> tuple[Tensor, dict[str, float]]:
        """See `Objective`."""
        informed = cast(Informed, model)
        control = informed.control
        u = noise.rand(2)
        times, steps = self.times.to(u), torch.cat([path.steps() for path in self.kernels]).to(u)
        row, k = (u[:, 0] * len(informed.samples)).long(), (u[:, 1] * len(steps)).long()
        x, t = informed.samples[row], times[k]
        alpha, sigma = (c[:, None] for c in control.schedule(t))
        z = noise.randn_like(x)
        y = alpha * x + sigma * z
        drift, spread = control.moments(y, t, control.guide(y))
        first = x - alpha / sigma * z
        share = informed.shares[k]
        wanted = share * first + (1 - share) * informed.guides[row]
        _, p, b2, before, after = steps[k].T[..., None]
        rate = (1 + after * (spread - 1)) / (1 + before * (spread - 1))  # of variances, forward to backward
        residual = p**2 / b2 * (first - drift.detach()).square() + (1 - after) / sigma**2
        error = p**2 / b2 * (wanted - drift).square() / rate.detach()
        loss = (error + residual / rate + rate.log()).sum(1) / 2
        return loss.mean(), {"error": float(error.detach().mean())}


@dataclass(frozen=True)
class Matched(PathTeacher):
    """A denoiser of draws of replica exchange: no paths are simulated in training. See `PathTeacher`.

    The preset "narrow" is for targets some parts of which are much narrower than the whole, such as a funnel: it is trained down to
    noise of 0.0015, without guides, which are enormous beside such a part, with a gate, and has more of the draws that are rare. It
    wants twice the training of others.

    The draws find the modes; the weights of paths say what is wrong with the rest. Training then takes no calls of the target but
    one guide per item. Coordinates are those of the draws' mean, or median where tails are heavy, and spread. Where chains change
    modes too seldom to know their weights, the preset "modes" puts these right: a further training goes by draws of the sampler
    that the first gave, picked by weight. The preset "many" does so too, with a network for tens of coordinates that each have
    modes of their own.

    Attributes:
        draws: how many, a multiple of `chains`.
        levels: inverse temperatures of replica exchange.
        chains: ladders side by side.
        warmup: their steps before draws are kept.
        thin: their steps per draw that is kept.
        widths: standard deviations of the normal laws around 0 that replica exchange starts from, in equal parts and in whitened
            coordinates: what lies far out, such as the wide end of a funnel, is found from a wide one.
        reach: how much smaller steps may be, see `Hamiltonian`; with 300 chains stay out of a funnel's wide end.
        bend: whether replica exchange runs in coordinates whose heavy tails are bent, see `Whitened`.
        phases: paths of `steps` steps that the control is trained on, which begin at different places of a finer grid: it then knows
            the times of long paths too, and still learns widths from long steps.
        rounds: trainings, of which each further one is on draws of the sampler before it, where their weights are worth as many.
        samples: draws of the target in its own coordinates, (N, d), to be used instead; not part of what is saved.
    """

    reference = Reference(
        "Target Score Matching",
        "De Bortoli, Valentin and Hutchinson, Michael and Wirnsberger, Peter and Doucet, Arnaud",
        2024,
        "arXiv",
        "2402.08667",
    )
    default_loss = "matching"
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "narrow": {
            "grid": "angle_squared",
            "phases": 4,
            "net": NetConfig(width=96, gain=0.0, gated=True),
            "draws": 131_072,
            "thin": 4,
            "bend": True,
        },
        "modes": {"rounds": 2},
        "many": {"net": NetConfig(width=192, gated=True), "phases": 4, "draws": 65_536, "rounds": 2},
    }
    net: NetConfig = field(default_factory=lambda: NetConfig(width=_WIDTH))
    draws: int = 16_384
    levels: int = 8
    chains: int = 64
    warmup: int = 1000
    thin: int = 16
    widths: tuple[float, ...] = (1.0, 10.0)
    reach: float = 3000.0
    bend: bool = False
    phases: int = 1
    rounds: int = 1
    samples: Tensor | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.phases < 1 or (self.phases > 1 and not isinstance(self.grid, str)):
            raise ValueError(f"phases must be 1, or more of a grid that has a name, got {self.phases}")
        super().__post_init__()

    @property
    def training(self) -> Mapping[str, Any]:
        """See `Teacher`: the wider the network, the smaller its steps."""
        return {"train_steps": 8000, "batch": 512, "lr": 4e-3 * min(1.0, _WIDTH / self.net.width), "ema": 0.999}

    def prepared(self, whitened: Whitened, seed: int) -> tuple[Matched, Whitened]:
        """See `Teacher`: the draws, and coordinates in which they have mean 0 and deviation 1."""
        found = self
        if self.samples is None:
            if self.bend:  # chains in bent coordinates reach what is narrow, and far out, more often
                few = self.chains * max(1, self.draws // (_BEFORE * self.chains))
                first = self._exchanged(whitened, few, mix(seed, 7))
                whitened = whitened.refitted(whitened.to_y(first), bend=True)
            found = replace(self, samples=self._exchanged(whitened, self.draws, seed))
        return found, whitened.refitted(found._whitened(whitened))

    def _exchanged(self, whitened: Whitened, n: int, seed: int) -> Tensor:
        """Return n draws of replica exchange in the target's own coordinates, (n, d)."""
        kernel = Hamiltonian(8, 0.5, self.reach)
        exchange = ReplicaExchange(kernel, self.levels, self.chains, self.warmup, self.thin)
        base = Concentric(whitened.dim, self.widths)
        return exchange.sample(whitened, n, seed=seed, base=base, dtype=torch.float32).x

    @property
    def further(self) -> tuple[str, ...]:
        """See `Teacher`."""
        return tuple(f"round_{k}" for k in range(2, self.rounds + 1))

    def renewed(self, sampler: DensitySampler, seed: int) -> tuple[Matched, Whitened] | None:
        """See `Teacher`: draws of long paths, picked by their weights."""
        steps = _AGAIN * self.steps if isinstance(self.grid, str) else self.steps  # given times are as many as they are
        drawn = sampler.sample(_AGAIN * self.draws, steps, seed=mix(seed, 6))
        if drawn.khat > _TAIL or drawn.ess * len(drawn) < self.draws:
            warnings.warn(
                f"no further training: {len(drawn)} draws of the sampler have an ESS of {drawn.ess:.2g} and a k-hat of "
                f"{drawn.khat:.2f}, where {self.draws / len(drawn):.2g} and at most {_TAIL} are needed to pick draws by weight",
                stacklevel=4,
            )
            return None
        found = replace(self, samples=drawn.resample(self.draws, seed).x)
        return found, sampler.whitened.refitted(found._whitened(sampler.whitened))

    def model(self, whitened: Whitened, seed: int) -> nn.Module:
        """See `Teacher`."""
        control, y = cast(ControlNet, super().model(whitened, seed)), self._whitened(whitened)
        guides = control.relative_score(y).detach().nan_to_num(0.0, 0.0, 0.0)
        shares = shares_of(y, guides, self.schedule, self._matching.times, seed)
        return Informed(control, y, guides, shares)

    def objective(self, whitened: Whitened, loss: str) -> Objective:
        """See `Teacher`; there is one loss, "matching"."""
        self.check_loss(loss)
        return self._matching

    def sampler(self, whitened: Whitened, model: nn.Module) -> DensitySampler:
        """See `Teacher`."""
        return super().sampler(whitened, cast(Informed, model).control)

    @property
    def _matching(self) -> Matching:
        """The loss on the steps of all phases."""
        if self.phases == 1:
            return Matching([self.kernels(self.steps)])
        fine = self.kernels(self.phases * self.steps).times
        paths = [torch.cat([fine[:1], fine[k : -1 : self.phases], fine[-1:]]) for k in range(1, self.phases + 1)]
        return Matching([DISCRETISATIONS[self.discretisation](self.schedule, times) for times in paths])

    def _whitened(self, whitened: Whitened) -> Tensor:
        if self.samples is None:
            raise ValueError("there are no draws yet: train by `fit`, or give samples")
        return whitened.to_y(self.samples.float())
