"""The log of a long benchmark: finished rows and their images on disk, so that an interrupted run goes on where it stopped."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewstep import __version__
from fewstep.bench.common import FAILED, REMARK
from fewstep.core.denoiser import Denoiser
from fewstep.images import load_image, save_image


def fingerprint(prior: Denoiser, *given: Any) -> str:
    """Return a hash of a prior's weights, of all settings that a row depends on, and of the version that made it."""
    digest = hashlib.sha256(repr((__version__, *given)).encode())
    digest.update(f"{type(prior).__name__} {prior.schedule!r}"[:1000].encode())
    for name, value in prior.state_dict().items():
        digest.update(name.encode() + value.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


class Log:
    """Finished rows, in memory and, where a path is given, one JSON line each on disk; an image per row where it has one.

    Images lie as 8-bit PNG in the folder NAME.images beside NAME.jsonl, and are written before their row.

    Args:
        path: of the JSONL file; lines of another fingerprint and a line cut off in the middle are passed over.
        mark: the fingerprint of this run.
    """

    def __init__(self, path: Path | None, mark: str) -> None:
        self.path, self.mark = path, mark
        cut_off = path is not None and path.exists() and not path.read_bytes().endswith(b"\n")
        self._gap = "\n" if cut_off else ""  # so that the next row does not join a line that was cut off
        self._rows = {row["key"]: row for row in self._read() if row.get("mark") == mark}
        self._images: dict[str, Tensor] = {}  # of a log without a path

    def row(self, key: str) -> dict[str, Any]:
        """Return a row; KeyError where it is not there."""
        return self._rows[key]

    def has(self, key: str) -> bool:
        """Return whether the row is there, and no failure: memory may have been short."""
        return key in self._rows and not str(self._rows[key].get(REMARK, "")).startswith(FAILED)

    def image(self, key: str) -> Tensor | None:
        """Return the image of a row, (1, 3, H, W) in [0, 1] in steps of 1/255, None where it has none."""
        if self.path is None:
            return self._images.get(key)
        path = self._image_path(self.path, key)
        return load_image(path) if path.is_file() else None

    def add(self, key: str, row: Mapping[str, Any], image: Tensor | None = None) -> None:
        """Add a row, and an image (1, 3, H, W) in [0, 1], and write both at once."""
        if image is not None:
            self._keep(key, image)
        self._rows[key] = {"key": key, "mark": self.mark, **row}
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(self._gap + json.dumps(self._rows[key]) + "\n")
            self._gap = ""

    def _keep(self, key: str, image: Tensor) -> None:
        if self.path is None:
            self._images[key] = (255 * image.cpu()).round() / 255
            return
        path = self._image_path(self.path, key)
        path.parent.mkdir(parents=True, exist_ok=True)
        save_image(image, path)

    def _image_path(self, path: Path, key: str) -> Path:
        name = hashlib.sha256(f"{self.mark}|{key}".encode()).hexdigest()[:24]
        return path.with_suffix(".images") / f"{name}.png"

    def _read(self) -> Iterator[dict[str, Any]]:
        if self.path is None or not self.path.exists():
            return
        for line in self.path.read_text(encoding="utf-8").splitlines():
            try:
                row = json.loads(line)
            except ValueError:
                continue
            if isinstance(row, dict) and "key" in row:
                yield row
