"""One call from a log-density to a sampler of it."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.core.density import TargetDensity
from fewstep.core.noise import Streams
from fewstep.core.registry import get
from fewstep.densities.base import DensitySampler
from fewstep.densities.batches import Unlimited, in_blocks
from fewstep.densities.teachers._base import Teacher
from fewstep.densities.user import Ends, as_target
from fewstep.densities.whitened import Whitened, whiten
from fewstep.options import known_fields
from fewstep.training import Trainer, TrainingOptions


@dataclass(frozen=True)
class FitOptions:
    """How a sampler is trained.

    Attributes:
        train_steps: optimiser steps.
        batch: paths per step.
        lr: peak learning rate; it falls to a hundredth of it along a cosine.
        ema: decay of the averaged weights, which are those that are returned.
        seed: of the initial weights and of all paths.
        whiten: whether coordinates are found in which N(0, I) is a fair guess; otherwise the target's own are used.
        out: folder of checkpoints and of the log; a run that was stopped there is resumed. None keeps nothing.
        cpu: stay on the CPU even where an accelerator is present.
        checkpoint_every: steps between checkpoints.
    """

    train_steps: int = 2000
    batch: int = 256
    lr: float = 2e-3
    ema: float = 0.99
    seed: int = 0
    whiten: bool = True
    out: str | Path | None = None
    cpu: bool = True
    checkpoint_every: int = 500

    def training(self) -> TrainingOptions:
        """Return the options of the trainer."""
        return TrainingOptions(
            steps=self.train_steps,
            lr=self.lr,
            warmup=min(50, self.train_steps // 10),
            lr_final=0.01,
            weight_decay=0.0,
            ema=self.ema,
            precision="no",
            seed=self.seed,
            validate_every=self.train_steps,
            checkpoint_every=self.checkpoint_every if self.out is not None else self.train_steps,
        )


def options_for(teacher: Teacher, **overrides: Any) -> FitOptions:
    """Return the options that `teacher` is trained by, with those of `overrides` replaced that are not None."""
    return FitOptions(**{**teacher.training, **{name: value for name, value in overrides.items() if value is not None}})


def fit(  # noqa: PLR0913 - what `as_target` takes, and how it is trained
    log_prob: TargetDensity | Callable[[Tensor], Tensor],
    dim: int | None = None,
    *,
    score: Callable[[Tensor], Tensor] | None = None,
    support: Ends | None = None,
    log_z: float | None = None,
    sampler: str | Teacher = "dis",
    loss: str | None = None,
    options: FitOptions | None = None,
    **overrides: Any,
) -> DensitySampler:
    """Train a sampler of an unnormalised density.

    Args:
        log_prob: a target, or any torch callable, (N, d) -> (N,) or (d,) -> (), see `densities.user.as_target`.
        dim: d; needed for a callable.
        score: of a callable, see `as_target`.
        support: likewise, (low, high).
        log_z: likewise.
        sampler: a name of `fewstep.available("teachers")`, or a teacher with settings of its own.
        loss: a name of `fewstep.available("losses")`; the teacher's own where it is None.
        options: how it is trained; the teacher's own where it is None, see `options_for`.
        overrides: single fields of `options`, such as `train_steps=500`.

    Raises:
        ValueError: an unknown name, a checkpoint in `out` that belongs to another run, or what `as_target` refuses.
        TypeError: `overrides` names no field of the options, or `log_prob` is no density.
        FloatingPointError: the target is not finite where the paths lead.
        KeyboardInterrupt: the training was told to stop, and `out` names no folder to go on from.
    """
    target = as_target(log_prob, dim, score=score, support=support, log_z=log_z)
    teacher = get(sampler, "teachers")() if isinstance(sampler, str) else sampler
    options = replace(options or options_for(teacher), **known_fields(FitOptions, overrides))
    teacher.objective(Whitened(target), loss or teacher.default_loss)  # a wrong name fails before any work
    whitened = whiten(target, seed=options.seed) if options.whiten else Whitened(target)
    teacher, whitened = teacher.prepared(whitened, options.seed)
    return train(whitened, teacher, loss, options)


def train(whitened: Whitened, teacher: Teacher, loss: str | None, options: FitOptions) -> DensitySampler:
    """Train a prepared `teacher` on a density in whitened coordinates, as often as it asks for; see `fit`."""
    loss = loss or teacher.default_loss
    sampler, finished = _once(whitened, teacher, loss, options)
    for name in teacher.further:
        found = teacher.renewed(sampler, options.seed) if finished else None
        if found is None:
            break
        inner = replace(options, out=None if options.out is None else Path(options.out) / name)
        sampler, finished = _once(found[1], found[0], loss, inner)
    return sampler


def _once(whitened: Whitened, teacher: Teacher, loss: str, options: FitOptions) -> tuple[DensitySampler, bool]:
    """Return what one training gives, and whether it was not told to stop."""
    describe = {
        "teacher": teacher.describe(),
        "loss": loss,
        "batch": options.batch,
        "seed": options.seed,
        "lr": options.lr,
        **({} if options.out is None else origin(whitened)),  # else nothing is kept that could be mistaken
    }
    with tempfile.TemporaryDirectory() if options.out is None else nullcontext(str(options.out)) as folder:
        trainer = Trainer(
            teacher.model(whitened, options.seed),
            teacher.objective(whitened, loss),
            Unlimited(options.batch),
            Path(folder),
            options.training(),
            describe=describe,
            cpu=options.cpu,
            streams=in_blocks,
        )
        return teacher.sampler(whitened, averaged(trainer, options).to("cpu")), trainer.finished


@torch.no_grad()
def origin(whitened: Whitened) -> dict[str, Any]:
    """Return what tells a density and its coordinates from others, as JSON takes it; it costs four evaluations.

    The density is known by log rho at a fixed point and how much it differs at three more, rounded: the last digits change with
    the number of threads.
    """
    value = whitened.log_prob(Streams(0, range(4)).randn(whitened.dim)).double().tolist()
    target = [f"{v:.4g}" for v in (value[0], *(v - value[0] for v in value[1:]))]
    return {"target": target, **{name: getattr(whitened, name).tolist() for name in ("shift", "scale", "bend")}}


def averaged(trainer: Trainer, options: FitOptions) -> nn.Module:
    """Return what training gives; of one that was told to stop only where `out` keeps a checkpoint to go on from.

    Raises:
        KeyboardInterrupt: it was told to stop, and there is none.
    """
    return trainer.run_whole() if options.out is None else trainer.run()
