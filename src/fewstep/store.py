"""Samples on disk as they finish, and statistics over them in strips: K images never lie in memory together."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
import torch
from torch import Tensor

from fewstep.core.counts import Counts
from fewstep.core.samples import Samples
from fewstep.uncertainty.calibration import Calibration

_HEADER = 4096  # bytes kept free for the header, known only at the end, beside the settings of the method
_STRIP = 1 << 20  # numbers per sample read at once
_NAMES = {torch.float32: "F32", torch.float16: "F16"}
_NUMPY: dict[torch.dtype, type] = {torch.float32: np.float32, torch.float16: np.float16}


@dataclass(frozen=True)
class Summary:
    """Statistics of K samples over each coordinate, (1, C, H, W); `std` and the interval are None for K = 1.

    Attributes:
        mean: the average.
        std: the standard deviation.
        lower, upper: ends of the central interval.
    """

    mean: Tensor
    std: Tensor | None = None
    lower: Tensor | None = None
    upper: Tensor | None = None


class SampleStore:
    """Writes `samples.safetensors` sample by sample, in the format of `Samples.save`.

    Used as a context: the file appears under its name when the context is left with at least one sample, after an
    interruption too; any other error leaves nothing behind.

    Args:
        folder: where to; it must exist.
        shape: of one sample, (1, C, H, W).
        dtype: float32, or float16 for large images, which rounds by at most 2.5e-4 in [-1, 1].
    """

    def __init__(self, folder: Path, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> None:
        self.path, self.shape, self.dtype, self.count = folder / "samples.safetensors", tuple(shape), dtype, 0
        self.counts, self.seconds, self.method, self.antithetic = Counts(), 0.0, "", False
        self.seeds: tuple[int, ...] = ()
        self._room, self._bytes = 0, math.prod(shape) * dtype.itemsize
        self._partial = self.path.with_suffix(f".partial-{os.getpid()}")

    def __enter__(self) -> Self:
        self._file = self._partial.open("w+b")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        keep = self.count > 0 and (kind is None or issubclass(kind, KeyboardInterrupt))
        try:
            if keep:
                self._finish()
        finally:
            self._file.close()
            self._partial.unlink(missing_ok=True)

    def append(self, part: Samples) -> None:
        """Write the samples of a chunk of one measurement."""
        if not self.count:
            self.method, self.seeds, self.antithetic = part.method, part.seeds, part.antithetic
            self._room = _HEADER + len(json.dumps([self.method, self.seeds])) // 8 * 8
        self.counts = Counts.mean([(self.counts, self.count), (part.counts, part.num_samples)])
        for x in part.x:
            data = x.to("cpu", self.dtype).contiguous().numpy()
            self._file.seek(self._room + self.count * self._bytes)
            self._file.write(memoryview(data).cast("B"))
            self.count += 1
        self.seconds += part.seconds

    def summary(
        self, to_output: Callable[[Tensor], Tensor], level: float = 0.9, calibration: Calibration | None = None
    ) -> Summary:
        """Return the statistics of `to_output` of the samples written so far.

        Args:
            to_output: increasing in each coordinate, (..., C, H, W) -> the same.
            level: of the interval.
            calibration: of the interval of the samples themselves, whose ends are then mapped.
        """
        mean, several = torch.empty(self.shape), self.count > 1
        std, lower, upper = (torch.empty(self.shape) if several else None for _ in range(3))
        self._file.flush()
        rows = max(1, _STRIP // (self.shape[-1] * self.shape[1]))
        for first in range(0, self.shape[-2], rows):
            strip = slice(first, min(first + rows, self.shape[-2]))
            drawn = self._samples(self._read(strip))
            samples = replace(drawn, x=to_output(drawn.x))
            mean[..., strip, :] = samples.mean
            if std is not None and lower is not None and upper is not None:
                std[..., strip, :] = samples.std
                ends = samples.interval(level) if calibration is None else map(to_output, calibration.apply(drawn))
                lower[..., strip, :], upper[..., strip, :] = ends
        return Summary(mean, std, lower, upper)

    def _samples(self, x: Tensor) -> Samples:
        """Return what was written so far, or a part of it, with what is known of it."""
        return Samples(x, self.counts, self.seconds, self.method, self.seeds, antithetic=self.antithetic)

    def _read(self, rows: slice) -> Tensor:
        """Return some rows of every sample, (K, 1, C, rows, W) float32."""
        channels, height, width = self.shape[1:]
        out = np.empty((self.count, 1, channels, rows.stop - rows.start, width), _NUMPY[self.dtype])
        for k in range(self.count):
            for c in range(channels):
                offset = (c * height + rows.start) * width * self.dtype.itemsize
                self._file.seek(self._room + k * self._bytes + offset)
                out[k, 0, c] = np.frombuffer(self._file.read(out[k, 0, c].nbytes), _NUMPY[self.dtype]).reshape(
                    -1, width
                )
        return torch.from_numpy(out).float()

    def _finish(self) -> None:
        size = self.count * self._bytes
        tensor = {"dtype": _NAMES[self.dtype], "shape": [self.count, *self.shape], "data_offsets": [0, size]}
        header = json.dumps({"__metadata__": self._samples(torch.empty(0)).header, "x": tensor}).encode()
        self._file.seek(0)
        self._file.write((self._room - 8).to_bytes(8, "little") + header.ljust(self._room - 8))
        self._file.truncate(self._room + size)
        self._file.flush()
        os.fsync(self._file.fileno())
        os.replace(self._partial, self.path)
