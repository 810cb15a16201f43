"""Any callable as a target: one item or a batch, float32 or float64, with or without a score of its own.

What cannot be right is refused with one line: a gradient that is not one, values that are NaN everywhere, a density without a
normaliser. What happens later, a NaN among many values, is counted in `tally` and told once.
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from fewstep.core.checks import check_counts, check_gradients
from fewstep.core.density import TargetDensity, gradient
from fewstep.core.noise import Streams
from fewstep.densities.properness import check_proper
from fewstep.densities.support import GIVE_SUPPORT, Support, to_box

Function = Callable[[Tensor], Tensor]
# each end a number or d of them, as a tensor, an array or a list; None where there is no bound
Ends = Sequence[Any]
# of finite differences, with the rounding of a value; the second, which takes float64, for what oscillates faster than the first
_STEPS = ((1e-3, 1e-6), (1e-5, 1e-12))
_COARSE = 0.01  # nats
_GIVE_SCORE = "give score= to as_target or fit (--score on the command line)"


class NonFinite(UserWarning):
    """A log-density or score was NaN or +inf where it was asked for."""


@dataclass
class Tally:
    """What a user's function was asked and what it gave that is no number.

    values, gradients: points at which it was evaluated.
    nonfinite_values: NaN or +inf among the values; taken as -inf, no mass.
    nonfinite_gradients: rows with NaN or inf among the gradients; taken as zero.
    outside: values that were -inf.
    """

    values: int = 0
    gradients: int = 0
    nonfinite_values: int = 0
    nonfinite_gradients: int = 0
    outside: int = 0

    def note(self, **counts: Tensor | int) -> None:
        """Add to the counts, and warn the first time that a number is not finite."""
        try:
            numbers = {name: int(count) for name, count in counts.items()}
        except RuntimeError:  # inside torch.func.vmap nothing can be counted
            return
        for name, count in numbers.items():
            if count and name.startswith("nonfinite") and not getattr(self, name):
                what = name.removeprefix("nonfinite_")
                text = f"{count} {what} of log_prob are NaN or +inf; they count as no mass and are tallied"
                warnings.warn(text, NonFinite, stacklevel=3)
            setattr(self, name, getattr(self, name) + count)


@dataclass(frozen=True, eq=False)
class UserDensity(TargetDensity):
    """A callable as a target; made by `as_target`, which finds out how it wants to be called.

    Args:
        function: (N, d) -> (N,) or (N, 1).
        dim: d.
        own_score: (N, d) -> (N, d), or None for autograd.
        dtype: the one dtype in which the function works, or that it needs; None for any.
        support: see `TargetDensity`.
        log_z: see `TargetDensity`.
        hidden: whether autograd cannot see into the function, as into numpy: `own_score` is then the gradient of its values.
        tally: what was asked so far.
    """

    function: Function
    dim: int
    own_score: Function | None = None
    dtype: torch.dtype | None = None
    support: Support | None = None
    log_z: float | None = None
    hidden: bool = False
    tally: Tally = field(default_factory=Tally, repr=False)

    def log_prob(self, x: Tensor) -> Tensor:
        """See `TargetDensity`: NaN and +inf become -inf and are tallied."""
        value = self._value(x)
        wrong = value.isnan() | value.isposinf()
        self.tally.note(values=len(x), nonfinite_values=wrong.sum(), outside=value.isneginf().sum())
        return torch.where(wrong, -torch.inf, value)

    def score(self, x: Tensor) -> Tensor:
        """See `TargetDensity`: rows that are not finite become zero and are tallied."""
        if self.own_score:
            value = torch.as_tensor(self.own_score(x.to(self.dtype or x.dtype))).to(x)
        else:
            value = gradient(self._value, x)
        wrong = ~value.isfinite().all(1, keepdim=True)
        self.tally.note(gradients=len(x), nonfinite_gradients=wrong.sum())
        return torch.where(wrong, 0.0, value)

    def _value(self, x: Tensor) -> Tensor:
        points = x.detach() if self.hidden else x
        value = torch.as_tensor(self.function(points.to(self.dtype or x.dtype))).to(x.device).reshape(len(x))
        # what is given in float64 stays so: of a log-density of -1e8 float32 keeps multiples of 8
        value = value.to(torch.promote_types(value.dtype, x.dtype))
        slope = self.score(points) if self.hidden and x.requires_grad and torch.is_grad_enabled() else 0.0
        return value + (slope * (x - points)).sum(1)  # a uniform law has gradient zero, not none


def as_target(
    log_prob: Function | TargetDensity,
    dim: int | None = None,
    *,
    score: Function | None = None,
    support: Ends | None = None,
    log_z: float | None = None,
    check: bool = True,
) -> TargetDensity:
    """Return a callable as a target; a `TargetDensity` is returned as it is.

    Args:
        log_prob: any torch callable, (N, d) -> (N,) or (d,) -> (); which of the two is found out by trying.
        dim: d; needed for a callable that has no integer `dim` of its own.
        score: its gradient, (N, d) -> (N, d) or (d,) -> (d,), where autograd should not be used; of numpy arrays too.
        support: (low, high), each a number or (d,), infinite or None where there is no bound. All lower ends come first: of two
            coordinates in [0, 1] and [5, 6] it is ((0, 5), (1, 6)), and a pair for each coordinate would be read as another box.
            Samplers compute in float32, which resolves what lies close to an end only where that end is zero: of a density that
            towers at 1, let x be the distance from there.
        log_z: the log of its integral, where it is known.
        check: whether to try the gradient and the tails, some 10^3 evaluations.

    Raises:
        TypeError: no callable, one that takes neither form, or dim is missing.
        ValueError: a score, support or log_z for a `TargetDensity`, which has its own, a dim that is no count, a support that is no
            (low, high) or without room, no finite value, a gradient that is not that of log_prob, or a density without a normaliser.
    """
    if isinstance(log_prob, TargetDensity):
        if dim not in (None, log_prob.dim):
            raise ValueError(f"the target has dim = {log_prob.dim}, not {dim}")
        if any(given is not None for given in (score, support, log_z)):
            raise ValueError("a TargetDensity has its own score, support and log_z: give none beside it")
        return log_prob
    _check_callable(log_prob)
    if (dim := own_dim(log_prob) if dim is None else dim) is None:
        raise TypeError("a log_prob that is a plain callable needs dim, the number of coordinates")
    check_counts(SimpleNamespace(dim=dim), "dim")
    box = None if support is None else _box(support, dim)
    x = probes(dim, box)
    batched, dtype = _batched(log_prob, x, (), "log_prob")
    if dtype is None and _coarse(batched, x):
        dtype = torch.float64
    tried = x if dtype is None else x.to(dtype)
    own = None if score is None else _own(score, tried)
    hidden = own is not None and not getattr(_traced(batched, tried), "requires_grad", False)
    target = UserDensity(batched, dim, own, dtype, box, log_z, hidden)
    if check:
        check_values(target, x)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", NonFinite)  # far out in the tails they mean nothing
            check_gradient(target, x)
            check_proper(target)
    return dataclasses.replace(target, tally=Tally())


def own_dim(log_prob: Function) -> int | None:
    """Return the number of coordinates that a callable has as its `dim`, or None where it says none."""
    dim = getattr(log_prob, "dim", None)  # a tensor's is a method
    return dim if isinstance(dim, int) and not isinstance(dim, bool) else None


def probes(dim: int, support: Support | None = None) -> Tensor:
    """Return points to try a density at, N(0, I) mapped into the support, (N, d) with N > 16 and not d."""
    u = Streams(0, range(17 + (dim == 17)), torch.float64).randn(dim)
    return u if support is None else to_box(u, support)


def check_values(target: UserDensity, x: Tensor) -> None:
    """Refuse a density without a single finite value at `x`, (N, d), and warn where some are not finite.

    Raises:
        ValueError: with what was found instead.
    """
    value = target._value(x)
    missing = int((~value.isfinite()).sum())
    found = "NaN" if bool(value.isnan().any()) else "+inf" if bool(value.isposinf().any()) else "-inf"
    where = f"log_prob is {found} at {missing} of {len(x)} points tried around 0"
    if missing == len(x):
        raise ValueError(f"{where}; shift it there, or {GIVE_SUPPORT}")
    if missing:
        warnings.warn(f"{where}; where it lives in a box, {GIVE_SUPPORT}", NonFinite, stacklevel=3)


def check_gradient(target: UserDensity, x: Tensor) -> None:
    """Compare the score with differences of log_prob at `x`, (N, d), in one direction each; kinks are allowed.

    Raises:
        RuntimeError: it takes autograd, and torch is in inference mode.
        ValueError: no gradient, one that is zero everywhere while the values differ, or one of another function.
    """
    if target.own_score is None:
        check_gradients()
    try:
        score = target.score(x)
    except (RuntimeError, TypeError) as error:
        said = str(error).splitlines()[0]
        raise ValueError(f"log_prob cannot be differentiated; write it in torch or {_GIVE_SCORE}: {said}") from error
    value, direction = target._value(x), torch.nn.functional.normalize(x.flip(0), dim=1)
    known = value[value.isfinite()]
    if not target.own_score and not bool(score.any()) and bool((known != known[:1]).any()):
        raise ValueError(
            f"log_prob has gradient zero at all points tried though it varies: it is not differentiable; {_GIVE_SCORE}"
        )
    given, wrong = (score * direction).sum(1), value.isfinite()
    for step, rounding in _STEPS if target.dtype != torch.float32 else _STEPS[:1]:
        ahead, behind = (target._value(x + s * step * direction) for s in (1, -1))
        slope = (ahead - behind) / (2 * step)
        allowed = 0.05 * (slope.abs() + given.abs()) + rounding * value.abs() / step + 1e-6
        wrong = wrong & slope.isfinite() & ((slope - given).abs() > allowed)
        if int(wrong.sum()) <= len(x) // 2:
            return
    k = int(wrong.nonzero()[0])
    raise ValueError(
        f"{'score' if target.own_score else 'autograd'} is not the gradient of log_prob: {float(given[k]):.3g} "
        f"against {float(slope[k]):.3g} by finite differences; detach() or rounding inside, or a wrong score? "
        "(as_target with check=False does not ask)"
    )


def _batched(function: Function, x: Tensor, event: tuple[int, ...], name: str) -> tuple[Function, torch.dtype | None]:
    """Return `function` as (N, d) -> (N, *event), and the one dtype in which it works, None where any does."""
    ways: dict[str, Function] = {"batch": function, "vmap": torch.func.vmap(function), "loop": partial(_loop, function)}
    said = []
    for way, called in ways.items():
        works = []
        for dtype in (torch.float32, torch.float64):
            try:
                out = torch.as_tensor(called(x.to(dtype)))
            except Exception as error:  # noqa: BLE001 - whatever a user's function may raise
                said.append(f"{way}: {type(error).__name__}: {(str(error) or 'no message').splitlines()[0]}")
                continue
            if tuple(out.shape) == (len(x), *event) or (not event and tuple(out.shape) == (len(x), 1)):
                works.append(dtype)
            else:
                said.append(f"{way}: shape {tuple(out.shape)}")
        if works:
            _check_rows(called, x.to(works[0]), name)
            return called, None if len(works) == 2 else works[0]
    raise TypeError(
        f"{name} must map {tuple(x.shape)} to {(len(x), *event)}, or one row of it; it gave {said[0]}; {said[-1]}"
    )


def _coarse(function: Function, x: Tensor) -> bool:
    """Return whether float32 rounds what `function` gives at x, (N, d), so much that weights suffer: by a constant of -1e7, say."""
    narrow, wide = (torch.as_tensor(function(x.float().to(dtype))).double() for dtype in (torch.float32, torch.float64))
    return float((narrow - wide).abs().nanmedian()) > _COARSE


def _own(score: Function, x: Tensor) -> Function:
    """Return a score as (N, d) -> (N, d), tried at `x`, (N, d), in the one dtype in which it works."""
    called, dtype = _batched(score, x, x.shape[1:], "score")
    x = x if dtype is None else x.to(dtype)
    called = called if _traced(called, x) is not None else partial(_plain, called)
    return called if dtype is None else lambda x: called(x.to(dtype))


def _plain(score: Function, x: Tensor) -> Tensor:
    """Return a score, (N, d) -> (N, d), that takes no points of which gradients are recorded.

    Raises:
        ValueError: they are asked for.
    """
    wrapped = torch._C._functorch.is_functorch_wrapped_tensor(x)
    if wrapped or (x.requires_grad and torch.is_grad_enabled()):
        raise ValueError(
            "the score cannot be differentiated, as numpy cannot: write it in torch, or choose a sampler and a loss that do not "
            "ask for it (not kl)"
        )
    return score(x.detach())


def _traced(function: Function, x: Tensor) -> Tensor | None:
    """Return what `function` gives at `x`, (N, d), where gradients are recorded; None where it refuses, as numpy does."""
    try:
        with torch.enable_grad(), warnings.catch_warnings(action="ignore"):
            return torch.as_tensor(function(x.detach().requires_grad_()))
    except Exception:  # noqa: BLE001 - whatever a user's function may raise
        return None


def _box(support: Ends, dim: int) -> Support:
    """Return a support with infinite ends where it has None.

    Raises:
        ValueError: it is not (low, high), or has no room.
    """
    wrong = (
        f"both ends of a support, (low, high), must be numbers or {dim} of them, all lower ends first; got {support!r}"
    )
    try:
        low, high = (_end(side, infinite) for side, infinite in zip(support, (-math.inf, math.inf), strict=True))
        shapes = {torch.as_tensor(end).shape for end in (low, high)}
    except (TypeError, ValueError):
        raise ValueError(wrong) from None
    if not shapes <= {(), (dim,)}:
        raise ValueError(wrong)
    if not bool((torch.as_tensor(low) < torch.as_tensor(high)).all()):
        raise ValueError(f"the lower end of a support must lie below the upper one, got {support}")
    return low, high


def _end(side: Any, infinite: float) -> Any:
    """Return one end of a support with None, alone or in a list, as `infinite`."""
    if isinstance(side, (list, tuple)):
        return torch.tensor([infinite if v is None else float(v) for v in side], dtype=torch.float64)
    return infinite if side is None else side


def _check_callable(log_prob: object) -> None:
    """Refuse what is no function of x.

    Raises:
        TypeError: with what to give instead.
    """
    if isinstance(log_prob, str):
        raise TypeError(f"log_prob is a name: for a density of the list give fewstep.target({log_prob!r})")
    if isinstance(log_prob, type):
        raise TypeError(f"log_prob is the class {log_prob.__name__}: give an object of it")
    if not callable(log_prob):
        raise TypeError(f"log_prob must be a TargetDensity or a callable, got {type(log_prob).__name__}")


def _loop(function: Function, x: Tensor) -> Tensor:
    rows = [function(row) for row in x]
    wide = any(isinstance(row, float) for row in rows)  # Python's numbers are float64
    return torch.stack([torch.as_tensor(row, dtype=torch.float64 if wide else None, device=x.device) for row in rows])


def _check_rows(function: Function, x: Tensor, name: str) -> None:
    together, part = torch.as_tensor(function(x)), torch.as_tensor(function(x[:3]))
    if not torch.allclose(together[:3], part, rtol=1e-3, atol=1e-4, equal_nan=True):
        raise ValueError(f"{name} of an item changes with the others in its batch")
