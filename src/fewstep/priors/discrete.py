r"""Networks trained on a discrete DDPM table, made continuous in t and in the image size.

The network sees x_t = alpha x_0 + sigma z and the step number u = t T - 1 of a table of T steps (Ho et al. 2020,
arXiv:2006.11239); between two steps u is fractional, which the sinusoidal embedding of these networks takes.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor

from fewstep.core.batch import like
from fewstep.core.denoiser import PARAMETRISATIONS, Denoiser
from fewstep.core.schedule import Tabulated
from fewstep.priors.unet import pad_to_multiple


class DiscreteDenoiser(Denoiser):
    """E[x_0 | x_t] from a network that predicts epsilon, v or x_0 at the steps of a table; images in [-1, 1].

    Args:
        schedule: the table.
        prediction: what the network predicts, one of `PARAMETRISATIONS`.
        channels: image channels; what the network returns beyond them (a learned variance) is dropped.
        multiple: height and width are padded to multiples of it.
        classes: number of classes, one of which the network must be told as `class_labels`, (N,); 0 where it knows none.
    """

    schedule: Tabulated

    def __init__(self, schedule: Tabulated, prediction: str, channels: int, multiple: int, classes: int = 0) -> None:
        super().__init__()
        if prediction not in PARAMETRISATIONS:
            raise ValueError(f"unknown prediction {prediction!r}, one of {sorted(PARAMETRISATIONS)}")
        self.schedule, self.prediction, self.multiple, self.classes = schedule, prediction, multiple, classes
        self.event_shape = (channels, None, None)

    @abstractmethod
    def network(self, x: Tensor, step: Tensor, **cond: Any) -> Tensor:
        """Return the raw prediction, (N, C or 2 C, H, W), at the fractional step numbers `step`, (N,)."""

    def forward(self, x_t: Tensor, t: Tensor, *, label: Tensor | int | None = None, **cond: Any) -> Tensor:
        """See `Denoiser`; x_t is (N, C, H, W), t is () or (N,).

        `label` is () or (N,), the class, which a network of classes needs; `cond` goes to the network as it is.
        """
        channels = self.event_shape[0]
        if x_t.ndim != 4 or x_t.shape[1] != channels:
            raise ValueError(f"expected (N, {channels}, H, W), got {tuple(x_t.shape)}")
        if label is not None:
            cond["class_labels"] = self._labels(label, x_t)
        elif self.classes and "class_labels" not in cond:
            raise ValueError(f"this prior needs a label, a class from 0 to {self.classes - 1}")
        t = torch.as_tensor(t, dtype=x_t.dtype, device=x_t.device)
        alpha, sigma = (like(c, x_t) for c in self.schedule(t))
        step = (t * len(self.schedule.alphas_cumprod) - 1).clamp_min(0).expand(len(x_t))
        dtype = next(self.parameters()).dtype
        out = self.network(pad_to_multiple(x_t.to(dtype), self.multiple), step.to(dtype), **cond)
        out = out[:, :channels, : x_t.shape[-2], : x_t.shape[-1]].to(x_t.dtype)
        return PARAMETRISATIONS[self.prediction].to_x0(out, x_t, alpha, sigma)

    def _labels(self, label: Tensor | int, x: Tensor) -> Tensor:
        """Return the class of every item, (N,); an error where the network knows no such class."""
        if not self.classes:
            raise TypeError("this prior takes no condition, got label")
        given = torch.as_tensor(label, device=x.device).expand(len(x))
        if bool(((given < 0) | (given >= self.classes)).any()):
            raise ValueError(f"labels are classes from 0 to {self.classes - 1}")
        return given
