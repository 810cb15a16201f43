"""The peak of memory of a stretch of code, in this process."""

from __future__ import annotations

import ctypes
import gc
from pathlib import Path
from types import TracebackType
from typing import Self

import torch

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class PeakMemory:
    """Measures how far memory rises above where it stood: of the GPU where there is one in use, else of the process.

    Attributes:
        mebibytes: the rise, after the block; None where the system cannot tell.
    """

    mebibytes: float | None = None
    _start: float | None = None

    def __enter__(self) -> Self:
        """Reset the peak."""
        gc.collect()
        if torch.cuda.is_initialized():
            torch.cuda.reset_peak_memory_stats()
            self._start = torch.cuda.memory_allocated() / 2**20
        else:
            self._start = _start_resident()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Read the peak."""
        if self._start is None:
            return
        if torch.cuda.is_initialized():
            self.mebibytes = torch.cuda.max_memory_allocated() / 2**20 - self._start
        elif (peak := _status("VmHWM")) is not None:
            self.mebibytes = max(peak - self._start, 0.0)

    @staticmethod
    def note() -> str:
        """Return what is measured, for a report."""
        if torch.cuda.is_initialized():
            return "memory: peak of what PyTorch allocated on the GPU above what the network and the measurement held."
        return (
            "memory: peak resident memory of the process (VmHWM, reset before each run after handing free memory back) above "
            "its resident memory before the run, so without the network's weights."
        )


def _start_resident() -> float | None:
    """Hand free memory back to the system, reset the process's peak, and return its resident memory in MiB."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
        _CLEAR.write_text("5")
    except (OSError, AttributeError):
        return None
    return _status("VmRSS")


def _status(name: str) -> float | None:
    """Return a line of /proc/self/status in MiB."""
    try:
        lines = _STATUS.read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith(f"{name}:")), None)
