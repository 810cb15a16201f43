"""A training loss: who is trained, and what each of them minimises."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from fewstep.core.noise import Noise


class Objective(ABC):
    """A training loss. Final subclasses are frozen dataclasses, one file each."""

    def players(self, model: nn.Module) -> dict[str, Iterable[nn.Parameter]]:
        """Return the parameters each player owns, such as {"model": ..., "critic": ...}; they take turns.

        There is one player unless a loss says otherwise, which owns all that is trained.
        """
        return {"model": [p for p in model.parameters() if p.requires_grad]}

    @abstractmethod
    def loss(self, player: str, model: nn.Module, batch: Any, noise: Noise) -> tuple[Tensor, dict[str, float]]:
        """Return what `player` minimises on one batch, () and the mean over its items, and figures for the log."""
