"""The network inside an unfolded iteration: from the noised point back to x_0."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fewstep.core.batch import like
from fewstep.core.denoiser import Denoiser
from fewstep.core.problem import Posterior
from fewstep.unfolded.lora import LoRAConfig, add_lora, merge, trained


class Inputs(NamedTuple):
    """What a decoder may look at; tensors are (N, *event) in units of x_0, levels are (N,).

    Attributes:
        noisy: point + tau temperature noise.
        tau: noise level that the denoiser is told.
        point: result of the prox.
        noise: standard normal noise that was added, before scaling.
        back: E[x_0 | y] under a standard normal prior, what y alone says.
        outer: alpha_t x_t, of order one at every t.
        ratio: sigma_t / alpha_t.
    """

    noisy: Tensor
    tau: Tensor
    point: Tensor
    noise: Tensor
    back: Tensor
    outer: Tensor
    ratio: Tensor


class Decoder(nn.Module, ABC):
    """Maps the noised point to x_0; one network call."""

    @abstractmethod
    def forward(self, problem: Posterior, inputs: Inputs) -> Tensor:
        """Return x_0, (N, *event)."""


class PriorDecoder(Decoder):
    """The problem's own prior, as it is."""

    def forward(self, problem: Posterior, inputs: Inputs) -> Tensor:
        """See `Decoder`."""
        return denoise(problem, problem.prior, inputs)


class AdaptedDecoder(Decoder):
    """A denoiser of its own: a copy of the prior that is trained, as a whole or through LoRA.

    Args:
        denoiser: the copy, which is changed.
        lora: what is added to it, while it is frozen itself; None trains it as a whole.

    Attributes:
        whole: modules of the denoiser that are trained as they are beside additions.
        IMAGES: how many images of context the denoiser sees.
    """

    whole: ClassVar[tuple[str, ...]] = ()
    IMAGES: ClassVar[int] = 0

    def __init__(self, denoiser: Denoiser, lora: LoRAConfig | None = None) -> None:
        super().__init__()
        self.denoiser, self.lora = denoiser, lora
        if lora is not None:
            add_lora(denoiser, lora, self.whole)

    def forward(self, problem: Posterior, inputs: Inputs) -> Tensor:
        """See `Decoder`."""
        return denoise(problem, self.fitted(problem), inputs)

    def fitted(self, problem: Posterior) -> Denoiser:
        """Return the denoiser, called in the way the problem's prior is; ValueError where their schedules differ."""
        if problem.schedule != self.denoiser.schedule:
            raise ValueError(
                f"this network was trained with {self.denoiser.schedule!r}, the problem's prior has {problem.schedule!r}"
            )
        return problem.prior.around(self.denoiser)

    def plain(self) -> dict[str, Tensor]:
        """Return the weights of the denoiser without additions, those being merged into it."""
        state = self.denoiser.state_dict()
        return state if self.lora is None else merge(state, self.lora)

    def adapter(self) -> dict[str, Tensor]:
        """Return those weights of the denoiser that are not the prior's, if it is trained through LoRA."""
        return trained(self.denoiser.state_dict(), self.whole)

    def apply_adapter(self, tensors: Mapping[str, Tensor], lora: LoRAConfig) -> None:
        """Put what `adapter` returned into a denoiser without additions; RuntimeError where it does not fit."""
        self.denoiser.load_state_dict(merge({**self.denoiser.state_dict(), **tensors}, lora), strict=True)


class ContextDecoder(AdaptedDecoder):
    """A denoiser that also sees the point before the noise, the noise itself and what y alone says.

    It takes them as the keyword `context`, (N, 3 C, H, W), each of order one. With weights of zero behind them it is the prior.
    Its first convolution, which alone sees them, is trained as a whole.
    """

    whole: ClassVar = ("net.conv_in",)
    IMAGES: ClassVar = 3

    def forward(self, problem: Posterior, inputs: Inputs) -> Tensor:
        """See `Decoder`."""
        context = torch.cat([inputs.point, inputs.back, inputs.noise], 1)
        return denoise(problem, self.fitted(problem), inputs, context=context)


class CorrectedDecoder(Decoder):
    """The prior plus tau times a small network of everything in `Inputs`, for vectors of a fixed size.

    Levels of the iterations and times differ widely, and so does what is to be corrected: they scale and shift the hidden units
    (Perez et al. 2018, arXiv:1709.07871).

    Args:
        dim: size of x.
        width: of the two hidden layers.
    """

    def __init__(self, dim: int, width: int = 256) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(5 * dim, width), nn.Linear(width, width)
        self.levels = nn.Sequential(nn.Linear(2, 32), nn.SiLU(), nn.Linear(32, 4 * width))
        self.last = nn.Linear(width, dim)
        modulation: nn.Linear = self.levels[-1]  # type: ignore[assignment]
        for zero in (modulation.weight, self.last.weight, self.last.bias):
            nn.init.zeros_(zero)
        with torch.no_grad():  # factors of one, shifts of zero
            modulation.bias.copy_(torch.tensor([1.0, 0.0, 1.0, 0.0]).repeat_interleave(width))

    def forward(self, problem: Posterior, inputs: Inputs) -> Tensor:
        """See `Decoder`."""
        x0 = denoise(problem, problem.prior, inputs)
        logs = torch.stack([inputs.tau.log(), inputs.ratio.log()], 1) / 3  # of order one over the levels that occur
        scale_1, shift_1, scale_2, shift_2 = self.levels(logs).chunk(4, 1)
        features = torch.cat([inputs.point, inputs.noise, x0, inputs.back, inputs.outer], 1)
        hidden = F.silu(torch.addcmul(shift_1, self.first(features), scale_1))
        hidden = F.silu(torch.addcmul(shift_2, self.second(hidden), scale_2))
        return x0 + like(inputs.tau, x0) * self.last(hidden)


def denoise(problem: Posterior, denoiser: Denoiser, inputs: Inputs, **extra: Tensor) -> Tensor:
    """Return the denoiser's x_0 at the noised point, with gradients, counted as one network call."""
    problem.counts.network += 1
    t = problem.schedule.time(inputs.tau).clamp(0, 1)
    return denoiser(like(problem.schedule(t)[0], inputs.noisy) * inputs.noisy, t, **problem.cond, **extra)
