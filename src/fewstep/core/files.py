"""Weights on disk: safetensors beside a JSON header, written atomically and read strictly."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as parse_tensors
from safetensors.torch import save as dump_tensors
from torch import Tensor

from fewstep import __version__

WEIGHTS, HEADER = "model.safetensors", "config.json"


def check_target(path: Path) -> None:
    """Raise ValueError where a file cannot come to stand at `path`, before any work is done for it."""
    if path.is_dir():
        raise ValueError(f"{path} is a folder, not a file to write")
    blocked = next((parent for parent in path.parents if parent.exists() and not parent.is_dir()), None)
    if blocked is not None:
        raise ValueError(f"{path} cannot be written: {blocked} is a file")


def write_bytes(path: Path, data: bytes) -> None:
    """Write `data` to `path` so that a reader meets the old file or the new one, never a part."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise


def write_json(path: Path, values: Any) -> None:
    """Write `values` as JSON, atomically."""
    write_bytes(path, (json.dumps(values, indent=2) + "\n").encode())


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file; ValueError where the file cannot be read or holds something else."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as JSON ({error})") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold a JSON object")
    return values


def write_weights(
    folder: str | Path, tensors: Mapping[str, Tensor], header: Mapping[str, Any], dtype: torch.dtype | None = None
) -> None:
    """Write `tensors` and `header` to `folder`; floating tensors become `dtype` where it is given.

    The header gains the number of tensors and of parameters, the library version and the SHA-256 of the weights.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    data = packed(tensors, dtype)
    described = {
        **header,
        "tensors": len(tensors),
        "parameters": sum(v.numel() for v in tensors.values()),
        "library_version": __version__,
        "sha256": hashlib.sha256(data).hexdigest(),
    }
    write_bytes(folder / WEIGHTS, data)
    write_json(folder / HEADER, described)


def packed(tensors: Mapping[str, Tensor], dtype: torch.dtype | None = None) -> bytes:
    """Return `tensors` as the bytes of a safetensors file; floating ones become `dtype` where it is given."""
    ready = {k: v.to(dtype) if dtype and v.is_floating_point() else v for k, v in tensors.items()}
    return dump_tensors({k: v.detach().cpu().contiguous() for k, v in ready.items()})


def fingerprint(tensors: Mapping[str, Tensor], dtype: torch.dtype | None = None) -> str:
    """Return the SHA-256 that `write_weights` notes of these tensors."""
    return hashlib.sha256(packed(tensors, dtype)).hexdigest()


def files_hash(paths: Iterable[Path]) -> str:
    """Return one SHA-256 of what files hold, in their order; their names do not matter."""
    return hashlib.sha256(b"".join(hashlib.sha256(path.read_bytes()).digest() for path in paths)).hexdigest()


def read_header(folder: str | Path) -> dict[str, Any]:
    """Return the JSON header of `folder`; ValueError where it is missing or no JSON object."""
    path = Path(folder) / HEADER
    if not path.exists():
        raise ValueError(f"{path} is missing: this is no folder of weights")
    return read_json(path)


def read_tensors(path: Path, sha256: Any) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file; ValueError where it cannot be read or its hash is not `sha256`."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror})") from None
    if hashlib.sha256(data).hexdigest() != sha256:
        raise ValueError(f"{path} does not match its recorded hash: the file is damaged or was replaced")
    try:
        return parse_tensors(data)
    except SafetensorError as error:
        raise ValueError(f"{path} is no valid safetensors file ({error})") from None


def read_weights(folder: str | Path, method: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors and the header of `folder`.

    Raises:
        ValueError: a file is missing or damaged, the hash or the counts differ, or the weights are not those of `method`.
    """
    folder = Path(folder)
    header = read_header(folder)
    if header.get("method") != method:
        raise ValueError(f"{folder} holds weights of {header.get('method')!r}, not of {method!r}")
    tensors = read_tensors(folder / WEIGHTS, header.get("sha256"))
    counts = {"tensors": len(tensors), "parameters": sum(v.numel() for v in tensors.values())}
    for name, found in counts.items():
        if header.get(name) != found:
            raise ValueError(f"{folder / WEIGHTS} has {found} {name}, its header says {header.get(name)}")
    return tensors, header
