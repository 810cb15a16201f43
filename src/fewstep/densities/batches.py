"""Training without data: every item of a step is made from randomness alone."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from fewstep.core.noise import Noise, Streams, mix


@dataclass(frozen=True)
class Unlimited:
    """Batches of `size` items without data: the objective makes what it needs from its noise."""

    size: int

    def count(self, step: int) -> int:
        """See `Batches`."""
        return self.size

    def batch(self, step: int, items: Iterable[int]) -> None:
        """See `Batches`; there is nothing to give."""


def in_blocks(words: tuple[int, ...], items: range, device: torch.device) -> Noise:
    """Return streams that cost no more than their numbers, from `words`, the first item and the place after it."""
    return Streams(mix(*words, items.start), range(len(items)), device=device)
