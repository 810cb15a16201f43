r"""Sampling with a flow map, and weights that are exact for what is sampled.

*Jumping*: y = G_K o ... o G_1(z) along falling times is one deterministic map, so that

    log w = log rho(y) + sum_k log|det DG_k| - log N(z; 0, I).

*Renoising* (the consistency sampler of Song et al. 2023, arXiv:2303.01469): f(y, t) = G(y, t, 0), then noise to a smaller t,
then f again. The last f maps y_K to y; the levels before it are weighted with the noising process run the other way,

    log w = log rho(y) + log|det Df(y_K)| - log N(y_1; 0, I) + sum_k [log q(y_k | y_{k+1}) - log N(y_{k+1}; alpha f(y_k), sigma^2)],

a ratio of two normalised laws of (y_1, ..., y_K). Its spread grows with the number of steps; that of jumps falls.

Both are unbiased whether or not the (last) map folds, because weights have the sign of its determinant: summed over all z that
lead to y these signs give the degree of the map, which is 1 wherever the map is proper and can be deformed to the identity through
proper maps. Maps of `MAPS` whose networks are bounded can: let the network vanish. Without the signs, or without the draws at which
they are negative, mass under a fold would be counted two or three times.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any, Self

import torch
from torch import Tensor, nn

from fewstep.core.density import TargetDensity
from fewstep.core.noise import Noise
from fewstep.core.schedule import VariancePreserving
from fewstep.densities.base import Cost, Drawn, Transport, Walked
from fewstep.densities.estimators.inverse import invert, nearest
from fewstep.densities.estimators.jacobian import determinant
from fewstep.densities.grids import times_of
from fewstep.densities.students._maps import MAPS, FlowMap, MapConfig, described
from fewstep.densities.students._warp import Warp
from fewstep.densities.whitened import Whitened

_ROWS = 1024  # at once through a network, so that its activations stay in the cache of a core


@dataclass(frozen=True, eq=False)
class MapSampler(Transport):
    """Samples of a density by a flow map in any number of steps.

    Attributes:
        whitened: the density in the coordinates of the map.
        flow_map: the trained map.
        steps: where none are asked for.
        grid: the times of several steps, see `densities.grids.times_of`.
        renoise: whether several steps are jumps along the flow or samples that are noised again.
        warps: by number of jumps, where the noise is moved to before them, see `_balance`.
    """

    whitened: Whitened
    flow_map: FlowMap
    steps: int = 1
    grid: str | tuple[float, ...] = "angle"
    renoise: bool = False
    warps: Mapping[int, Warp] = field(default_factory=dict)
    kind = "unbiased"

    def __post_init__(self) -> None:
        if self.renoise and self.warps:
            raise ValueError("only jumps can start from noise that is moved")
        if not (self.renoise or self.flow_map.jumps):
            raise ValueError(f"{type(self.flow_map).__name__} cannot jump between times: set renoise=True")

    @property
    def target(self) -> TargetDensity:  # type: ignore[override]
        """See `DensitySampler`."""
        return self.whitened.target

    def times(self, steps: int) -> Tensor:
        """Return the `steps` + 1 falling times of a sample, float32."""
        return times_of(self.grid, self.flow_map.schedule, steps).float()

    def draw(self, noise: Noise, steps: int, weights: bool) -> Drawn:
        """See `DensitySampler`."""
        y, log_w, signs = self.walked(noise.randn(self.flow_map.dim), steps, noise, weights)
        return Drawn(y, log_w, self.cost(steps), signs) if weights else Drawn(y, None, self.cost(steps, False))

    def cost(self, steps: int, weights: bool = True) -> Cost:
        """See `Transport`."""
        return Cost(steps, int(weights), steps * self.flow_map.guided)

    def walked(self, z: Tensor, steps: int, noise: Noise, weights: bool) -> Walked:
        """See `Transport`; negative where the map has turned over."""
        times = self.times(steps).to(z)
        found = (
            renoised(self.flow_map, z, times, noise, weights)
            if self.renoise
            else jumped(self.flow_map, z, times, weights, self.warps.get(steps))
        )
        return found._replace(log_weights=found.log_weights + self._log_rho(found.y)) if weights else found

    def backward_weights(self, y: Tensor, steps: int, noise: Noise) -> Tensor:
        """See `DensitySampler`: of one preimage under the jumps. Of several, each alone gives a larger weight: still a bound."""
        if self.renoise and steps > 1:
            raise NotImplementedError("samples that are noised again have no preimage")
        function = self.function(steps)
        some = noise.randn(self.flow_map.dim)
        z, found = invert(function, y, nearest(some, function(some), y))
        log_w = determinant(function, z).log_abs - _standard(z) + self._log_rho(y)
        return log_w.masked_fill(~found, math.inf)

    def function(self, steps: int) -> Callable[[Tensor], Tensor]:
        """Return the map z -> y, (N, d) each and whitened, of `steps` jumps."""
        return partial(_walked, self.flow_map, self.times(steps), self.warps.get(steps, nn.Identity()))

    def config(self) -> dict[str, Any]:
        """See `DensitySampler`."""
        warps = {str(count): len(warp.heights) for count, warp in self.warps.items()}
        own = {"steps": self.steps, "grid": self.grid, "renoise": self.renoise, "warps": warps}
        return {**own, **described(self.flow_map), "schedule": asdict(self.flow_map.schedule)}

    def tensors(self) -> dict[str, Tensor]:
        """See `DensitySampler`."""
        warps = {f"warps.{k}.{name}": t for k, warp in self.warps.items() for name, t in warp.state_dict().items()}
        return {**self.flow_map.state_dict(), **warps}

    @classmethod
    def restore(cls, whitened: Whitened, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Self:
        """See `DensitySampler`."""
        schedule, size = VariancePreserving(**config["schedule"]), MapConfig(**config["size"])
        flow_map = MAPS[config["map"]](schedule, whitened, size)
        flow_map.load_state_dict({k: v for k, v in tensors.items() if not k.startswith("warps.")}, strict=True)
        warps = {int(k): Warp(whitened.dim, count) for k, count in config.get("warps", {}).items()}
        for k, warp in warps.items():
            warp.load_state_dict({name: tensors[f"warps.{k}.{name}"] for name in warp.state_dict()})
        grid = config["grid"] if isinstance(config["grid"], str) else tuple(config["grid"])
        return cls(whitened, flow_map.eval(), config["steps"], grid, config["renoise"], warps)

    def _log_rho(self, y: Tensor) -> Tensor:
        return self.whitened.log_prob(y).double()


def jumped(flow_map: FlowMap, z: Tensor, times: Tensor, weights: bool, warp: Warp | None = None) -> Walked:
    """Return y, (N, d), by jumps along `times` from where `warp` takes z, and the weights without rho(y) if `weights`, else ones."""
    walked = _started(z, weights)
    if warp is not None:
        walked = _pushed(warp, walked, weights)
    for t, s in itertools.pairwise(times):
        walked = _pushed(partial(flow_map, t=t, s=s), walked, weights)
    return walked


def renoised(flow_map: FlowMap, z: Tensor, times: Tensor, noise: Noise, weights: bool) -> Walked:
    """Return y, (N, d), by samples that are noised again to `times`, and the weights without rho(y) as `jumped` does."""
    schedule, zero = flow_map.schedule, times.new_zeros(())
    y, log_w, signs = _started(z, weights)
    for t, s in itertools.pairwise(times[:-1]):
        (alpha_t, _), (alpha, sigma) = schedule(t), schedule(s)
        e = noise.randn_like(y)
        lower = alpha * flow_map(y, t, zero) + sigma * e
        share = alpha_t / alpha  # the noising process from s to t multiplies by this
        variance = 1 - share**2
        back = _standard((y - share * lower) / variance.sqrt()) - y.shape[1] * variance.double().sqrt().log()
        log_w = log_w + back - (_standard(e) - y.shape[1] * sigma.double().log())
        y = lower
    return _pushed(partial(flow_map, t=times[-2], s=zero), Walked(y, log_w, signs), weights)


def _started(z: Tensor, weights: bool) -> Walked:
    """Return z with the weights 1 / N(z; 0, I) if `weights`, otherwise ones."""
    ones = z.new_ones(len(z)).double()
    return Walked(z, -_standard(z) if weights else torch.zeros_like(ones), ones)


def _pushed(function: Callable[[Tensor], Tensor], walked: Walked, weights: bool) -> Walked:
    """Return f(y), and the weights times its determinant, with the sign, if `weights`."""
    y, log_w, signs = walked
    if not weights:
        return walked._replace(y=torch.cat([function(part) for part in y.split(_ROWS)]))
    found = determinant(function, y)
    turned = torch.where(found.sign < 0, -signs, signs)  # where it is 0, so is the weight
    return Walked(found.y, log_w + found.log_abs, turned)


def _walked(flow_map: FlowMap, times: Tensor, warp: nn.Module, z: Tensor) -> Tensor:
    y = warp(z)
    for t, s in itertools.pairwise(times.to(z)):
        y = flow_map(y, t, s)
    return y


def _standard(z: Tensor) -> Tensor:
    """Return log N(z; 0, I), (N,) float64."""
    return -(z.double().square().sum(1) + z.shape[1] * math.log(2 * math.pi)) / 2
