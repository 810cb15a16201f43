"""What drawing a sample has cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields


@dataclass
class Counts:
    """What a sample has cost: network calls, vector-Jacobian products through the network, operator applications.

    Fractions arise where samples of one run needed different numbers: then it is their mean.
    """

    network: float = 0
    vjp: float = 0
    operator: float = 0

    @classmethod
    def mean(cls, parts: Sequence[tuple[Counts, int]]) -> Counts:
        """Return what a sample has cost on average over parts of so many samples each."""
        samples = sum(size for _, size in parts)
        totals = (sum(size * getattr(counts, f.name) for counts, size in parts) for f in fields(cls))
        return cls(*(total / samples if total % samples else total // samples for total in totals))

    def add(self, other: Counts, share: float = 1) -> None:
        """Add what a call on `share` times as many items has cost."""
        self.network += share * other.network
        self.vjp += share * other.vjp
        self.operator += share * other.operator
