"""What drawing a sample has cost."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Counts:
    """What a sample has cost: network calls, vector-Jacobian products through the network, operator applications.

    Fractions arise where samples of one run needed different numbers: then it is their mean.
    """

    network: float = 0
    vjp: float = 0
    operator: float = 0

    def add(self, other: Counts, share: float = 1) -> None:
        """Add what a call on `share` times as many items has cost."""
        self.network += share * other.network
        self.vjp += share * other.vjp
        self.operator += share * other.operator
