"""One call from a sampler of many steps to one of few."""

from __future__ import annotations

import copy
import tempfile
import warnings
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, cast

from torch import nn

from fewstep.core.denoiser import Denoiser
from fewstep.core.density import TargetDensity
from fewstep.core.files import fingerprint
from fewstep.core.noise import seeded
from fewstep.core.objective import Objective
from fewstep.densities.base import DensitySampler
from fewstep.densities.batches import in_blocks
from fewstep.densities.fit import FitOptions, averaged, origin
from fewstep.densities.students._balance import lost
from fewstep.densities.students._polish import InTurn
from fewstep.densities.students._sampler import MapSampler
from fewstep.densities.students.cdds import CDDS, ready
from fewstep.densities.whitened import Whitened
from fewstep.options import known_fields
from fewstep.training import Batches, Trainer

METHODS = {"cdds": CDDS}
# folders of the last steps, and their learning rates over that of the first
POLISHES = {"polish": 0.5, "polish_slower": 0.125}
OPTIONS = FitOptions(train_steps=8000, batch=1024, lr=4e-3, ema=0.999)
COMPARED = 16_384  # draws of each of two maps, of which the better is kept


def distill(
    teacher: DensitySampler | Denoiser,
    method: str | CDDS = "cdds",
    *,
    target: TargetDensity | None = None,
    options: FitOptions = OPTIONS,
    **overrides: Any,
) -> MapSampler:
    """Train a map that does in one step, or a few, what the teacher does in many.

    Args:
        teacher: a trained sampler that has a `denoiser`, or any denoiser of (d,) events: an exact or a trained one, or a
            `MixturePrior` fitted to draws.
        method: a name of `METHODS`, or settings such as `CDDS.preset("paper")`.
        target: where the teacher is a denoiser, the density, in its coordinates or a `Whitened` one in which it lives.
        options: how the student is trained; `whiten` has no effect.
        overrides: single fields of `options`, such as `train_steps=500`.

    Raises:
        ValueError: an unknown method, or a denoiser without a target.
        KeyboardInterrupt: it was told to stop, and `options.out` names no folder to go on from.
        FloatingPointError: a gradient is not finite, in the last steps at every rate that is tried.
        TypeError: a teacher without a denoiser (fit a mixture to its draws), or `overrides` names no field of the options.
    """
    options = replace(options, **known_fields(FitOptions, overrides))
    if isinstance(method, str) and method not in METHODS:
        raise ValueError(f"unknown method {method!r}; choose one of {', '.join(METHODS)}")
    student = METHODS[method]() if isinstance(method, str) else method
    denoiser, whitened = _unpacked(teacher, target)
    known: dict[str, Any] = {"student": asdict(student)}
    if options.out is not None:
        weights = {name: tensor.clone() for name, tensor in denoiser.state_dict().items()}  # which may share memory
        known |= {"teacher": fingerprint(weights), **origin(whitened)}
    with tempfile.TemporaryDirectory() if options.out is None else nullcontext(str(options.out)) as folder:
        model = seeded(lambda: student.model(denoiser, whitened), options.seed)
        data = student.data(denoiser, options.batch, options.seed)
        first = _trainer(known, model, student.objective, data, Path(folder), options)
        sampler = student.sampler(whitened, averaged(first, options).to("cpu"))
        if not first.finished:
            return sampler
        loss = student.polished(sampler)
        if loss is not None:
            shorter = replace(options, train_steps=student.polish)
            last = _polished(known, first.ema, loss, InTurn(data, len(loss.counts)), Path(folder), shorter)
            sampler = better(sampler, student.sampler(whitened, last.ema.to("cpu")), options.seed)
            if not last.finished:
                return sampler
        return student.balanced(sampler, options.seed)


def better(first: MapSampler, last: MapSampler, seed: int = 0) -> MapSampler:
    """Return the one whose one-step draws have the larger ESS, but never a `last` whose log Z lies clearly below that of `first`.

    Such a map has lost a part of the target, which its own weights do not show; a warning says so.
    """
    before, after = (sampler.sample(COMPARED, 1, seed=seed) for sampler in (first, last))
    if gone := lost(before, after):
        warnings.warn(
            f"the last steps lost a part of the target (log Z {after.log_z:.3f}, before them {before.log_z:.3f}) and are not kept",
            stacklevel=3,
        )
    return last if after.ess > before.ess and not gone else first


def _polished(
    known: Mapping[str, Any], model: nn.Module, loss: Objective, data: Batches, out: Path, options: FitOptions
) -> Trainer:
    """Return what has trained a copy of `model` by its last steps, which are taken anew, slower, where they diverge.

    Raises:
        FloatingPointError: they diverge at every rate.
    """
    failed: FloatingPointError | None = None
    for name, rate in POLISHES.items():
        slower = replace(options, lr=options.lr * rate, ema=0.98)
        trainer = _trainer(known, copy.deepcopy(model).requires_grad_(True), loss, data, out / name, slower)
        try:
            averaged(trainer, options)
            return trainer
        except FloatingPointError as error:
            failed = error
            warnings.warn(f"the last steps diverged at {rate:g} times the learning rate ({error})", stacklevel=3)
    raise FloatingPointError("the last steps, on exact weights, diverge: try polish=0") from failed


def _trainer(
    known: Mapping[str, Any], model: nn.Module, objective: Objective, data: Batches, out: Path, options: FitOptions
) -> Trainer:
    describe = {**known, "objective": type(objective).__name__}
    describe |= {name: getattr(options, name) for name in ("batch", "seed", "lr")}
    training = options.training()
    return Trainer(model, objective, data, out, training, describe=describe, cpu=options.cpu, streams=in_blocks)


def _unpacked(teacher: DensitySampler | Denoiser, target: TargetDensity | None) -> tuple[Denoiser, Whitened]:
    """Return the denoiser of a teacher and the density in the denoiser's coordinates."""
    if isinstance(teacher, Denoiser):
        if target is None:
            raise ValueError("a denoiser alone does not say what it samples: give its target too")
        return ready(teacher), target if isinstance(target, Whitened) else Whitened(target)
    denoiser = getattr(teacher, "denoiser", None)
    if not isinstance(denoiser, Denoiser):
        raise TypeError(f"{type(teacher).__name__} has no denoiser; fit a MixturePrior to its draws and distil that")
    return ready(denoiser), cast(Whitened, teacher.whitened)
