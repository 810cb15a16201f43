r"""An implicit sampler trained by entropy (Luo, Zhang and Zhang 2023, arXiv:2306.04952): x = g(z), z ~ N(0, I), in one call.

A score network S of the sampler's own law q and the sampler take turns. S learns by denoising at a small sigma,
E |S(x + sigma e) + e / sigma|^2. With u = s_q - s_p and both scores held fixed, the sampler follows one of

    KL:      grad E[u(g(z)) . g(z)]                                   of KL(q || p),
    Fisher:  grad E[|u|^2 / 2 - u . s_q - div u](g(z))                of E_q |u|^2 / 2,

the second because E_q[u . s_q] = -E_q[div u]: what changes with q through s_q itself is the gradient of the negative of that sum.
Both seek modes: there is no annealing, and separated modes are lost. Weights are exact where g is injective, as for any map.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn

from fewstep.core.batch import item_dot
from fewstep.core.density import TargetDensity
from fewstep.core.noise import Noise, seeded
from fewstep.core.objective import Objective
from fewstep.core.reference import Reference
from fewstep.core.schedule import VariancePreserving
from fewstep.densities.base import DensitySampler
from fewstep.densities.students._maps import MapConfig, Perceptron, ResidualMap
from fewstep.densities.students._sampler import MapSampler
from fewstep.densities.teachers._base import Teacher
from fewstep.densities.whitened import Whitened


class Pair(nn.Module):
    """The sampler and the score network of its law: S(x) = -x plus a perceptron that starts at zero."""

    def __init__(self, flow_map: ResidualMap, net: Perceptron) -> None:
        super().__init__()
        self.map, self.net = flow_map, net

    def draw(self, z: Tensor) -> Tensor:
        """Return g(z), (N, d)."""
        return self.map(z, *z.new_tensor([1.0, 0.0]))

    def score(self, x: Tensor) -> Tensor:
        """Return S(x), (N, d)."""
        return self.net(x, x.new_ones(())) - x


@dataclass(frozen=True)
class Entropy(Objective):
    """Denoising for the score network, then relative entropy or Fisher divergence for the sampler.

    Attributes:
        target: the density in whitened coordinates.
        fisher: which of the two.
        sigma: of the denoising; the law whose score is learned is that of x + sigma e.
        turns: of the score network for one of the sampler: a score that lags behind its law makes the sampler collapse.
    """

    target: TargetDensity
    fisher: bool = False
    sigma: float = 0.1
    turns: int = 5

    def players(self, model: nn.Module) -> dict[str, Iterable[nn.Parameter]]:
        """See `Objective`."""
        pair = cast(Pair, model)
        score = list(pair.net.parameters())
        return {**{f"score {k}": score for k in range(self.turns)}, "sampler": list(pair.map.parameters())}

    def loss(self, player: str, model: nn.Module, batch: Any, noise: Noise) -> tuple[Tensor, dict[str, float]]:
        """See `Objective`."""
        pair = cast(Pair, model)
        z = noise.randn(pair.map.dim)
        if player != "sampler":
            with torch.no_grad():
                x = pair.draw(z)
            e = noise.randn_like(x)
            return (self.sigma * pair.score(x + self.sigma * e) + e).square().mean(), {}
        x = pair.draw(z)
        return (self._fisher(pair.score, x, noise) if self.fisher else self._entropy(pair.score, x)), {}

    def _entropy(self, own: Any, x: Tensor) -> Tensor:
        with torch.no_grad():
            u = own(x) - self.target.score(x)
        return item_dot(u, x).mean()

    def _fisher(self, own: Any, x: Tensor, noise: Noise) -> Tensor:
        """Return E[|u|^2 / 2 - u . s_q - div u], the divergence by one probe of signs."""
        probe = (noise.rand(x.shape[1]) < 0.5).to(x) * 2 - 1

        def difference(x: Tensor) -> Tensor:
            return own(x) - self.target.score(x)

        u, pushed = torch.func.jvp(difference, (x,), (probe,))[:2]
        return (item_dot(u, u) / 2 - item_dot(u, own(x)) - item_dot(probe, pushed)).mean()


@dataclass(frozen=True)
class Implicit(Teacher):
    """A one-step sampler and the score of its law, in turns; `loss` is "kl" or "fisher".

    Attributes:
        net: size of both networks.
        sigma: of the denoising, in whitened coordinates.
        turns: of the score network for one of the sampler.
    """

    net: MapConfig = field(default_factory=lambda: MapConfig(64, 2, "tanh"))
    sigma: float = 0.1
    turns: int = 5

    reference = Reference(
        "Entropy-based Training Methods for Scalable Neural Implicit Sampler",
        "Luo, Weijian and Zhang, Boya and Zhang, Zhihua",
        2023,
        "Neural Information Processing Systems",
        "2306.04952",
    )
    default_loss = "kl"

    def model(self, whitened: Whitened, seed: int) -> nn.Module:
        """See `Teacher`."""
        return seeded(lambda: self._pair(whitened), seed)

    def objective(self, whitened: Whitened, loss: str) -> Objective:
        """See `Teacher`."""
        if loss not in ("kl", "fisher"):
            raise ValueError(f"the implicit sampler has losses 'kl' and 'fisher', not {loss!r}")
        return Entropy(whitened, loss == "fisher", self.sigma, self.turns)

    def sampler(self, whitened: Whitened, model: nn.Module) -> DensitySampler:
        """See `Teacher`; one step is what it is trained for."""
        pair = self._pair(whitened)
        pair.load_state_dict(model.state_dict(), strict=True)
        return MapSampler(whitened, pair.map.eval().requires_grad_(False))

    def _pair(self, whitened: Whitened) -> Pair:
        schedule, sizes = VariancePreserving(), (whitened.dim, whitened.dim)
        return Pair(ResidualMap(schedule, whitened, self.net), Perceptron(schedule, sizes, 1, self.net))
