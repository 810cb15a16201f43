"""Checks of settings and of torch's mode: each says what a value must be, so that NaN, which no comparison holds for, is refused."""

from __future__ import annotations

import math
from collections.abc import Iterable
from numbers import Integral
from typing import Any, SupportsFloat

import torch


def check_shares(settings: Any, *names: str) -> None:
    """Raise ValueError unless the fields called `names` lie in [0, 1]."""
    for name in names:
        if not 0 <= _number(settings, name) <= 1:
            raise ValueError(f"{name} must lie in [0, 1], got {getattr(settings, name)}")


def check_positive(settings: Any, *names: str) -> None:
    """Raise ValueError unless the fields called `names` are positive and finite."""
    for name in names:
        if not 0 < _number(settings, name) < math.inf:
            raise ValueError(f"{name} must be positive and finite, got {getattr(settings, name)}")


def check_not_negative(settings: Any, *names: str) -> None:
    """Raise ValueError unless the fields called `names` are finite and not negative."""
    for name in names:
        if not 0 <= _number(settings, name) < math.inf:
            raise ValueError(f"{name} must be finite and not negative, got {getattr(settings, name)}")


def check_rising(settings: Any, low: str, high: str) -> None:
    """Raise ValueError unless the field called `low` is positive and that called `high` is larger."""
    if not 0 < _number(settings, low) < _number(settings, high):
        got = f"got {getattr(settings, low)} and {getattr(settings, high)}"
        raise ValueError(f"{low} must be positive and {high} must be larger, {got}")


def check_counts(settings: Any, *names: str, least: int = 1) -> None:
    """Raise ValueError unless the fields called `names` are whole numbers from `least`."""
    for name in names:
        check_count(name, getattr(settings, name), least)


def check_pairs(num_samples: int, antithetic: bool) -> None:
    """Raise ValueError for an odd number of antithetic samples."""
    if antithetic and num_samples % 2:
        raise ValueError(f"antithetic samples come in pairs: their number must be even, got {num_samples}")


def check_count(name: str, value: Any, least: int = 1) -> None:
    """Raise ValueError unless `value`, which goes by `name`, is a whole number from `least`."""
    if not isinstance(value, Integral) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name} must be a whole number and at least {least}, got {value!r}")


def one_of(name: str, value: object, choices: Iterable[object]) -> None:
    """Raise ValueError where a setting is none of its choices."""
    if value not in (choices := list(choices)):
        raise ValueError(f"{name} must be one of {', '.join(map(str, choices))}, got {value!r}")


def check_gradients() -> None:
    """Raise RuntimeError where torch records no graph whatever it is asked."""
    if torch.is_inference_mode_enabled():
        raise RuntimeError("gradients are needed here, which torch.inference_mode() rules out: use torch.no_grad()")


def _number(settings: Any, name: str) -> Any:
    """Return a field's value, NaN in place of what is no number."""
    value = getattr(settings, name)
    return value if isinstance(value, SupportsFloat) else math.nan
