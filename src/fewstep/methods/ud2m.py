r"""UD2M: a few outer steps around an unfolded LATINO-Langevin network, trained to draw from p(x_0 | y, x_t).

Each outer step runs K inner iterations (prox of the joint likelihood of y and x_t, noise, denoiser) and then moves to the next time.
With `network` the whole of it is a trained one; without, the prior serves as it is and the levels are those of the fields, which
shows what training adds: at the published levels, pinned to the noise floor, the inner chain cannot move in unobserved directions.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import ClassVar

from fewstep.unfolded.decoders import PriorDecoder
from fewstep.unfolded.levels import LevelConfig
from fewstep.unfolded.network import UnfoldedConfig, UnfoldedNetwork
from fewstep.unfolded.sampler import UnfoldedSampler
from fewstep.unfolded.store import find_network, open_network

UNTRAINED = ("iterations", "base", "pairing", "scale", "start")  # fields of the untrained network


@dataclass(frozen=True)
class UD2M(UnfoldedSampler):
    """Unfolded and distilled diffusion model.

    Args:
        steps: outer steps N; every one costs K network calls.
        network: name or folder of a trained network; "" runs the untrained one of the fields below, which it replaces.
        iterations: inner iterations K.
        base: noise levels of the inner iterations, "annealed" or "pinned" to the noise floor.
        pairing: noise variance over squared prox step; 2 is Langevin.
        scale: of the operator's noise in pinned levels (the paper: 13 for inpainting, else 1).
        start: where the inner iterations begin: "gaussian", "pinv", "blend", "previous" or "ram".
        eta: share of fresh noise in the outer step.
        kernel: outer step, "bridge" or "one_step" as in the paper's code.
        grid: spacing of the outer times.

    Raises:
        ValueError: a field of the untrained network beside a trained one, which would have no effect.
    """

    steps: int = 3
    network: str = ""
    iterations: int = 3
    base: str = "pinned"
    pairing: float = 1.0
    scale: float = 1.0
    start: str = "blend"
    eta: float = 0.8
    kernel: str = "one_step"
    grid: str | tuple[float, ...] = "quadratic"

    exact: ClassVar = "biased"
    limit: ClassVar = (
        "what its network was trained to; untrained, unobserved directions keep too little or too much variance"
    )
    presets: ClassVar = {
        "paper": {},
        "paper-inpaint": {"scale": 13.0},
        "consistent": {"base": "annealed", "pairing": 2.0, "start": "gaussian", "eta": 1.0, "kernel": "bridge"},
        "photo": {"network": "natural-general", "eta": 0.0, "kernel": "bridge", "grid": (1.0, 0.2, 0.08, 0.0)},
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        given = [f.name for f in fields(self) if f.name in self.idle and getattr(self, f.name) != f.default]
        if given:
            raise ValueError(
                f"the trained network {self.network!r} has its own {', '.join(given)}: give none beside it"
            )

    @property
    def idle(self) -> tuple[str, ...]:
        """See `Sampler`; a trained network replaces those of the untrained one."""
        return UNTRAINED if self.network else ()

    @property
    def folder(self) -> Path | None:
        """See `UnfoldedSampler`."""
        return find_network(self.network) if self.network else None

    def unfolded(self) -> UnfoldedNetwork:
        """See `UnfoldedSampler`."""
        if self.network:
            return open_network(self.network)
        levels = LevelConfig(self.iterations, self.base, scale=self.scale, pairing=self.pairing)
        return UnfoldedNetwork(UnfoldedConfig(levels, self.start), PriorDecoder()).requires_grad_(False)
