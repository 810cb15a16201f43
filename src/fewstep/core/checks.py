"""Checks of settings: each says what a value must be, so that NaN, which no comparison holds for, is refused too."""

from __future__ import annotations

import math
from numbers import Integral
from typing import Any


def check_shares(settings: Any, *names: str) -> None:
    """Raise ValueError unless the fields called `names` lie in [0, 1]."""
    for name in names:
        if not 0 <= getattr(settings, name) <= 1:
            raise ValueError(f"{name} must lie in [0, 1], got {getattr(settings, name)}")


def check_positive(settings: Any, *names: str) -> None:
    """Raise ValueError unless the fields called `names` are positive and finite."""
    for name in names:
        if not 0 < getattr(settings, name) < math.inf:
            raise ValueError(f"{name} must be positive and finite, got {getattr(settings, name)}")


def check_not_negative(settings: Any, *names: str) -> None:
    """Raise ValueError unless the fields called `names` are finite and not negative."""
    for name in names:
        if not 0 <= getattr(settings, name) < math.inf:
            raise ValueError(f"{name} must be finite and not negative, got {getattr(settings, name)}")


def check_rising(settings: Any, low: str, high: str) -> None:
    """Raise ValueError unless the field called `low` is positive and that called `high` is larger."""
    if not 0 < getattr(settings, low) < getattr(settings, high):
        got = f"got {getattr(settings, low)} and {getattr(settings, high)}"
        raise ValueError(f"{low} must be positive and {high} must be larger, {got}")


def check_counts(settings: Any, *names: str) -> None:
    """Raise ValueError unless the fields called `names` are whole numbers from 1."""
    for name in names:
        value = getattr(settings, name)
        if not isinstance(value, Integral) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name} must be a whole number and at least 1, got {value!r}")
