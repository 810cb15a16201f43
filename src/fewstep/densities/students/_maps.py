r"""Flow maps G(y, t, s): the student's guess of where the probability flow takes y_t by time s < t, in whitened coordinates.

One call with t = 1, s = 0 is a sample; K calls along any falling times are K steps of the same network. With theta =
arctan(sigma / alpha) of a variance-preserving schedule and a network F

    G(y, t, s) = y + sin(theta_t - theta_s) F(y, t, s)

is the identity for s = t whatever the network says, and for F = 0 the flow of N(0, I) itself. Where F is bounded G still reaches
every point, so that no tail of the target is out of reach: weights of a map with a bounded image would lose that mass unseen.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.core.batch import like
from fewstep.core.checks import one_of
from fewstep.core.density import TargetDensity
from fewstep.core.schedule import Schedule, VariancePreserving
from fewstep.densities.networks import TimeEmbedding, check_preserving, gate

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "tanh": torch.tanh,  # its two derivatives are fused: steps on exact weights take two thirds of the time
    "silu": nn.functional.silu,
    "gelu": nn.functional.gelu,
}

_FINEST = 4.0  # waves of a time embedding: between the few times that a map is trained at it must not swing


@dataclass(frozen=True)
class MapConfig:
    """The size of a `Perceptron`.

    Attributes:
        width: channels of the hidden layers.
        depth: hidden layers after the first.
        activation: one of `ACTIVATIONS`. Bounded ones make steeper steps between modes, the others better short jumps.
        spread: of the first layer's slopes and, doubled, of its biases: features are spread over the region of noise. At 0
            they start as linear layers do, around the origin.
        steep: whether each hidden unit has a positive factor of its own before its activation. A step between modes gets
            steeper by one number then, and fewer draws fall between them.
    """

    width: int = 96
    depth: int = 2
    activation: str = "tanh"
    spread: float = 2.0
    steep: bool = False

    def __post_init__(self) -> None:
        one_of("activation", self.activation, ACTIVATIONS)


class FlowMap(nn.Module, ABC):
    """A guess of the probability flow of a target in whitened coordinates.

    Args:
        schedule: a variance-preserving noise schedule.
        dim: number of coordinates, d.
        config: the size of its network.

    Attributes:
        jumps: whether s > 0 is possible; a map without it takes several steps by noising its samples again.
        guided: whether a call also takes one gradient of the target.
        name: among `MAPS`.
    """

    name: str
    jumps: bool
    guided: bool = False

    def __init__(self, schedule: VariancePreserving, dim: int, config: MapConfig = MapConfig()) -> None:
        super().__init__()
        check_preserving(schedule)
        self.schedule, self.dim, self.config = schedule, dim, config

    @abstractmethod
    def forward(self, y: Tensor, t: Tensor, s: Tensor) -> Tensor:
        """Return y_s, (N, d), from y_t, (N, d); `t` and `s` <= t are () or (N,)."""

    def sloped(self, y: Tensor, t: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        """Return y_s and its slopes within a mode, (N, d) each, as far as the map tells them: ones here."""
        y = self(y, t, s)
        return y, torch.ones_like(y)


class Perceptron(nn.Module):
    """A residual perceptron of y and of some times; its parameters have the names of `ControlNet`'s.

    Args:
        schedule: says how noisy a time is.
        sizes: numbers of inputs and of outputs.
        times: number of times it takes.
        config: its size.
    """

    def __init__(self, schedule: Schedule, sizes: tuple[int, int], times: int, config: MapConfig) -> None:
        super().__init__()
        width = config.width
        self.act = ACTIVATIONS[config.activation]
        self.time = TimeEmbedding(schedule, width, finest=_FINEST)
        self.others = nn.ModuleList(TimeEmbedding(schedule, width, finest=_FINEST) for _ in range(times - 1))
        self.first, self.last = nn.Linear(sizes[0], width), nn.Linear(width, sizes[1])
        self.hidden = nn.ModuleList(nn.Linear(width, width) for _ in range(config.depth))
        self.log_factors = nn.Parameter(torch.zeros(config.depth + 1, width)) if config.steep else None
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)
        if config.spread:
            nn.init.normal_(self.first.weight, 0.0, config.spread / sizes[0] ** 0.5)
            nn.init.uniform_(self.first.bias, -2 * config.spread, 2 * config.spread)

    def forward(self, y: Tensor, t: Tensor, *others: Tensor) -> Tensor:
        """Return F, (N, d), for y, (N, d), and times () or (N,)."""
        embedding = _embedded(self.time, t)
        for embed, time in zip(self.others, others, strict=True):
            embedding = embedding + _embedded(embed, time)
        h = self.first(y) + embedding
        for k, layer in enumerate(self.hidden):
            h = h + layer(self._units(h, k))
        return self.last(self._units(h, len(self.hidden)))

    def _units(self, h: Tensor, k: int) -> Tensor:
        return self.act(h if self.log_factors is None else self.log_factors[k].exp() * h)


def _embedded(embed: nn.Module, t: Tensor) -> Tensor:
    """Return the embedding of `t`, () or (N,); a batch has few different times, and each is embedded once."""
    if not t.ndim:
        return embed(t)
    values, place = t.unique(return_inverse=True)
    return embed(values)[place]


class ResidualMap(FlowMap):
    """y + sin(theta_t - theta_s) F(y, t, s).

    Args:
        schedule: a variance-preserving noise schedule.
        target: the density, in whitened coordinates, of which only the dimension matters.
        config: size of F.
    """

    jumps, name = True, "residual"

    def __init__(self, schedule: VariancePreserving, target: TargetDensity, config: MapConfig = MapConfig()) -> None:
        super().__init__(schedule, target.dim, config)
        self.net = Perceptron(schedule, (target.dim, target.dim), 2, config)

    def forward(self, y: Tensor, t: Tensor, s: Tensor) -> Tensor:
        """See `FlowMap`."""
        return y + like(passed(self.schedule, t, s), y) * self.net(y, t, s)


class ScaledMap(FlowMap):
    r"""y k + q F with q = sin(theta_t - theta_s) and k the slope of the flow of N(0, v) from t to s; F and log v by one network.

    In a mode of variance v the flow is affine and k^2 = (alpha_s^2 v + sigma_s^2) / (alpha_t^2 v + sigma_t^2): a network that has
    to say it through F alone errs by more than the slope, and the map folds. Here F is flat within modes, and v is the same for
    steps of all lengths: none is too short to reach into the neck of a funnel. |log v| < 16.

    Gated, F is that of the network times e^g, g its third output per coordinate, |g| < 8. The errors of a bounded F are alike
    everywhere, and wider than a neck is; with a gate they shrink with it.

    Args:
        schedule: a variance-preserving noise schedule.
        target: the density, in whitened coordinates, of which only the dimension matters.
        config: size of the network.
        gated: whether F has a gate.
    """

    jumps = True
    LIMIT = 16.0

    def __init__(
        self, schedule: VariancePreserving, target: TargetDensity, config: MapConfig = MapConfig(), gated: bool = False
    ) -> None:
        super().__init__(schedule, target.dim, config)
        self.gated, self.name = gated, "gated" if gated else "scaled"
        self.net = Perceptron(schedule, (target.dim, (2 + gated) * target.dim), 2, config)

    def forward(self, y: Tensor, t: Tensor, s: Tensor) -> Tensor:
        """See `FlowMap`."""
        return self.sloped(y, t, s)[0]

    def sloped(self, y: Tensor, t: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        """See `FlowMap`: k."""
        shift, width, *gates = self.net(y, t, s).chunk(2 + self.gated, -1)
        for g in gates:
            shift = shift * gate(g)
        v = (self.LIMIT * torch.tanh(2 * width / self.LIMIT)).exp()
        (alpha_t, sigma_t), (alpha_s, sigma_s) = ([like(c, v) for c in self.schedule(u)] for u in (t, s))
        k = ((alpha_s**2 * v + sigma_s**2) / (alpha_t**2 * v + sigma_t**2)).sqrt()
        return y * k + (sigma_t * alpha_s - alpha_t * sigma_s) * shift, k


class EDMMap(FlowMap):
    r"""The consistency function of CDDS: c_skip y + c_out F(y, t), with the time t itself in the place of a noise level.

    c_skip = 0.25 / (t^2 + 0.25), c_out = 0.5 t / sqrt(t^2 + 0.25) (2502.07579, and Song et al. 2023, arXiv:2303.01469, with
    sigma_data = 0.5 and sigma_min = 0).

    Args:
        schedule: a variance-preserving noise schedule.
        target: the density, in whitened coordinates, of which only the dimension matters.
        config: size of F.
    """

    jumps, name = False, "edm"

    def __init__(
        self, schedule: VariancePreserving, target: TargetDensity, config: MapConfig = MapConfig(64, 2, "gelu", 0.0)
    ) -> None:
        super().__init__(schedule, target.dim, config)
        self.net = Perceptron(schedule, (target.dim, target.dim), 1, config)

    def forward(self, y: Tensor, t: Tensor, s: Tensor) -> Tensor:
        """See `FlowMap`; `s` must be 0."""
        if not torch.compiler.is_compiling() and bool((torch.as_tensor(s) != 0).any()):
            raise ValueError("a consistency function goes to time 0 only")
        t = torch.as_tensor(t, dtype=y.dtype, device=y.device)
        skip, out = 0.25 / (t**2 + 0.25), 0.5 * t / (t**2 + 0.25).sqrt()
        return like(skip, y) * y + like(out, y) * self.net(y, t)


class GuidedMap(FlowMap):
    """y + (alpha_s - alpha_t) G, the exponential Euler step of the flow, with a drift G that sees the target's score and s.

    G = N(y, t, s, guide) + gain alpha_t guide as in `ControlNet`; `euler` has (t - s) beta_t / 2 alpha_t in front, as published.

    Args:
        schedule: a variance-preserving noise schedule.
        target: the density, in whitened coordinates; its score relative to N(0, I) is the guide.
        config: size of N.
        euler: whether steps are those of Euler's method in t.
    """

    jumps = True
    guided = True
    LIMIT = 20.0  # largest component of a guide

    def __init__(
        self,
        schedule: VariancePreserving,
        target: TargetDensity,
        config: MapConfig = MapConfig(64, 2, "gelu", 0.0),
        euler: bool = False,
    ) -> None:
        super().__init__(schedule, target.dim, config)
        self.euler, self.name = euler, "guided_euler" if euler else "guided"
        self.target = target
        self.net = Perceptron(schedule, (2 * target.dim, target.dim), 2, config)
        self.gain = nn.Parameter(torch.ones(target.dim))

    def guide(self, y: Tensor) -> Tensor:
        """Return the score of the target relative to N(0, I), (N, d), clipped."""
        return torch.nan_to_num(self.target.score(y) + y, 0.0, self.LIMIT, -self.LIMIT).clamp(-self.LIMIT, self.LIMIT)

    def drift(self, y: Tensor, t: Tensor, s: Tensor, guide: Tensor) -> Tensor:
        """Return G, (..., N, d); `t` and `s` broadcast against (..., N)."""
        alpha = self.schedule(t)[0]
        return self.net(torch.cat([y, torch.asinh(guide)], -1), t, s) + self.gain * alpha[..., None] * guide

    def pace(self, t: Tensor, s: Tensor) -> Tensor:
        """Return the factor of G in a step from t to s."""
        (alpha_t, _), (alpha_s, _) = self.schedule(t), self.schedule(s)
        if not self.euler:
            return alpha_s - alpha_t
        low, high = self.schedule.beta_min, self.schedule.beta_max
        return (t - s) * (low + (high - low) * t) / 2 * alpha_t

    def forward(self, y: Tensor, t: Tensor, s: Tensor) -> Tensor:
        """See `FlowMap`."""
        t, s = (torch.as_tensor(c, dtype=y.dtype, device=y.device) for c in (t, s))
        return y + like(self.pace(t, s), y) * self.drift(y, t, s, self.guide(y))


class Followed(nn.Module):
    """A flow map with the copy that its targets are taken from; calling it calls the map."""

    def __init__(self, flow_map: FlowMap) -> None:
        super().__init__()
        self.map, self.target = flow_map, copy.deepcopy(flow_map).requires_grad_(False)

    @torch.no_grad()
    def follow(self, decay: float) -> None:
        """Move the copy towards the map; at a decay of 0 it becomes the map."""
        torch._foreach_lerp_(list(self.target.parameters()), list(self.map.parameters()), 1 - decay)


def passed(schedule: Schedule, t: Tensor, s: Tensor) -> Tensor:
    """Return sin(theta_t - theta_s), in the shape of `t` and `s`."""
    (alpha_t, sigma_t), (alpha_s, sigma_s) = schedule(t), schedule(s)
    return sigma_t * alpha_s - alpha_t * sigma_s


def warm_start(net: Perceptron, trained: nn.Module) -> int:
    """Copy into `net` every tensor of `trained` that has the same name and shape: of a control what it says of y and its drift.

    Returns the number of tensors that were copied; 0 says that `trained` is of another kind.
    """
    source, copied = dict(trained.named_parameters()), 0
    with torch.no_grad():
        for name, value in net.named_parameters():
            given: Tensor | None = source.get(name)
            if given is not None and name == "first.weight":
                given = given[:, : value.shape[1]]  # a control may see its target's score behind y
            if given is not None and name.startswith("last."):
                given = given[: value.shape[0]]  # and give a spread behind its drift
            if given is not None and given.shape == value.shape:
                value.copy_(given)
                copied += 1
    return copied


MAPS: dict[str, Callable[..., FlowMap]] = {
    "residual": ResidualMap,
    "scaled": ScaledMap,
    "gated": partial(ScaledMap, gated=True),
    "edm": EDMMap,
    "guided": GuidedMap,
    "guided_euler": partial(GuidedMap, euler=True),
}


def described(flow_map: FlowMap) -> dict[str, Any]:
    """Return how to build a map of `MAPS` again, as JSON takes it."""
    return {"map": flow_map.name, "size": asdict(flow_map.config)}
