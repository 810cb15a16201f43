"""What a linear operator must do, and its copies for many samples of each measurement."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Tensor

from fewstep.core.batch import item_dot, tile


def check_measurement(y: Tensor) -> None:
    """Raise ValueError unless a measurement is of finite real or complex numbers, TypeError where it is no tensor."""
    if not isinstance(y, Tensor):
        raise TypeError(f"the measurement must be a tensor, (B, *measurement), got {type(y).__name__}")
    if not y.ndim or not len(y):
        raise ValueError(f"the measurement must be (B, *measurement) with B from 1, got shape {tuple(y.shape)}")
    if not (y.is_floating_point() or y.is_complex()):
        raise ValueError(
            f"the measurement must be of a floating or complex type, got {y.dtype}: convert it, y.float() say"
        )
    if not bool(torch.isfinite(y).all()):
        raise ValueError("the measurement holds NaN or infinite values")


def fitting_adjoint(physics: Any, y: Tensor) -> Tensor:
    """Return A' y, (B, *event).

    Raises:
        TypeError: the operator has no `A` or no `A_adjoint`.
        ValueError: y is no output of the operator, which has a constant part or an adjoint that is wrong on y.
    """
    name = type(physics).__name__
    if missing := [part for part in ("A", "A_adjoint") if not callable(getattr(physics, part, None))]:
        raise TypeError(f"the operator must have A and A_adjoint, got {name} without {' and '.join(missing)}")
    try:
        back = physics.A_adjoint(y)
        again = physics.A(back)
    except (RuntimeError, ValueError, IndexError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"y of shape {tuple(y.shape)} does not fit the operator {name} ({reason})") from error
    if again.shape != y.shape:
        raise ValueError(f"y has shape {tuple(y.shape)}, the operator {name} gives {tuple(again.shape)}")
    if not bool(torch.isfinite(again).all()):
        raise ValueError(f"the operator {name} gives NaN or infinite values")
    size, other = item_dot(back, back), item_dot(again, y)  # <A'y, A'y> = <A A'y, y>
    if bool(((size - other).abs() > torch.finfo(size.dtype).eps ** 0.5 * size).any()):
        check_constant(physics, back)  # a constant part upsets the identity too
        raise ValueError(f"A_adjoint of {name} is not the adjoint of its A: <A'y, A'y> and <AA'y, y> differ")
    return back


def check_constant(physics: Any, x: Tensor) -> None:
    """Raise ValueError where an operator on items like `x`, (B, *event), has a constant part."""
    offset = physics.A(torch.zeros_like(x))
    if bool(offset.abs().max() > 0):
        raise ValueError(f"{type(physics).__name__} is not linear: A(0) reaches {float(offset.abs().max()):.3g}")


def repeat_physics(physics: Any, y: Tensor, k: int) -> Any:
    """Return an operator for k copies of the measurements y, (B, *measurement): its per-item tensors are repeated.

    A tensor is per item if its first dimension is B > 1. A matrix or a vector may have that size by chance: the right
    reading is the one that maps copies to copies.

    Raises:
        ValueError: none does.
    """
    batch = y.shape[0]
    if batch == 1:
        return physics
    owners = {name: a for name, a in _tensors(physics).items() if a.ndim and a.shape[0] == batch}
    if not owners:
        return physics
    back = physics.A_adjoint(y)
    pairs = [("A_adjoint", tile(y, k), tile(back, k)), ("A", tile(back, k), tile(physics.A(back), k))]
    for least, most in ((1, math.inf), (2, math.inf), (3, math.inf), (1, 1), (math.inf, math.inf)):
        twin = copy.deepcopy(physics)
        for name, tensor in owners.items():
            if least <= tensor.ndim <= most:
                _replace(twin, name, tile(tensor.detach(), k))
        if _maps(twin, pairs):
            return twin
    raise ValueError(f"cannot tell which tensors of {type(physics).__name__} belong to single measurements")


def _tensors(physics: Any) -> dict[str, Tensor]:
    """Return buffers, parameters and plain attributes of an operator that are tensors, by their dotted names."""
    holders = dict(physics.named_modules()) if isinstance(physics, torch.nn.Module) else {"": physics}
    found: dict[str, Tensor] = {}
    for path, holder in holders.items():
        kept = {"_parameters": {}, "_buffers": {}, **getattr(holder, "__dict__", {})}
        held = {**kept, **kept["_parameters"], **kept["_buffers"]}
        found |= {f"{path}.{name}".lstrip("."): value for name, value in held.items() if isinstance(value, Tensor)}
    return found


def _replace(physics: Any, name: str, value: Tensor) -> None:
    """Put a tensor in the place of the buffer, parameter or attribute called `name`."""
    path, _, last = name.rpartition(".")
    owner = physics.get_submodule(path) if path else physics
    old = getattr(owner, last)
    if isinstance(old, torch.nn.Parameter):
        value = torch.nn.Parameter(value, requires_grad=old.requires_grad)
    setattr(owner, last, value)


def _maps(physics: Any, pairs: list[tuple[str, Tensor, Tensor]]) -> bool:
    """Return whether methods of an operator map inputs to outputs: (name, input, output)."""
    for name, given, wanted in pairs:
        try:
            out = getattr(physics, name)(given)
        except (RuntimeError, ValueError, IndexError, AssertionError):  # the wrong reading does not fit
            return False
        scale = wanted.abs().max()
        tol = 1e3 * torch.finfo(scale.dtype).eps
        if out.shape != wanted.shape or not bool((out - wanted).abs().max() <= tol * scale):
            return False
    return True
