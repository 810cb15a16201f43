"""Processes that share the work of a training."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from accelerate import Accelerator


def process(cpu: bool = False) -> Accelerator:
    """Return what accelerate knows of this process and of those beside it; `cpu` stays on the CPU in any case.

    Processes that were started together without a GPU share the work on the CPU, whether or not `accelerate launch` says so.
    """
    from accelerate import Accelerator

    alone = "LOCAL_RANK" not in os.environ
    # autocast is ours: accelerate keeps one precision per process for ever, and it belongs to the options of a run
    return Accelerator(mixed_precision="no", cpu=cpu or not (alone or torch.cuda.is_available()))


@contextmanager
def until_the_end() -> Iterator[None]:
    """Leave the group of processes at the end, if one was joined: its threads may end a process that exits by a signal."""
    try:
        yield
    finally:
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def check_shared(accelerator: Accelerator, folder: Path, step: int) -> None:
    """Raise ValueError, on every process, unless all of them found the same last checkpoint in `folder`.

    Args:
        accelerator: what `process` returned.
        folder: of the training.
        step: that of the checkpoint that this process sees there, 0 for none.
    """
    found = accelerator.gather(torch.tensor([step], device=accelerator.device)).tolist()
    if len(set(found)) > 1:
        raise ValueError(f"{folder} is not one folder for all processes: their last checkpoints are of steps {found}")
