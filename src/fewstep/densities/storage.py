"""Draws on disk: safetensors or npz, which keep all that is known of them, or a plain table for other programs."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from fewstep.core.files import write_bytes

SUFFIXES = (".safetensors", ".npz", ".csv")
ARRAYS = ("x", "log_weights", "signs")
_FACTS = "facts"  # under this name the numbers that are no arrays, as JSON
_TARGET = "target"


def check_suffix(path: Path) -> None:
    """Raise ValueError where draws cannot be written to a file of this name."""
    if path.suffix not in SUFFIXES:
        raise ValueError(f"{path}: draws are written to files that end in {', '.join(SUFFIXES)}")


def write(
    path: Path, given: Mapping[str, Tensor | None], known: Mapping[str, Any], target: Mapping[str, Any] | None
) -> None:
    """Write what is `given` of `ARRAYS`, and the facts that are `known`, to a file; see `Draws.save`.

    Raises:
        ValueError: a file of another kind.
    """
    check_suffix(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    arrays = {name: value.detach().cpu().contiguous() for name, value in given.items() if value is not None}
    facts = json.dumps(known if target is None else {**known, _TARGET: target})
    if path.suffix == ".safetensors":
        write_bytes(path, save(arrays, {_FACTS: facts}))
        return
    buffer = io.BytesIO()
    if path.suffix == ".npz":
        plain: dict[str, Any] = {_FACTS: np.array(facts), **{name: value.numpy() for name, value in arrays.items()}}
        np.savez(buffer, **plain)
    else:
        head = [f"x_{i + 1}" for i in range(arrays["x"].shape[1])] + ["log_weight", "sign"][: len(arrays) - 1]
        columns = [arrays["x"].double(), *(v[:, None] for v in list(arrays.values())[1:])]
        np.savetxt(buffer, torch.cat(columns, 1).numpy(), "%.9g", ",", header=",".join(head), comments="")
    write_bytes(path, buffer.getvalue())


def read_target(path: Path) -> dict[str, Any] | None:
    """Return what the file says of the density of its draws, None where that is nothing; see `Draws.save`."""
    found = read(path)[1].get(_TARGET)
    return found if isinstance(found, dict) else None


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the arrays and the facts of a file.

    Raises:
        ValueError: a file of another kind, or facts that are no JSON.
        OSError, SafetensorError: it is missing or damaged.
    """
    if path.suffix not in _READERS:
        raise ValueError(f"draws are read from files that end in {' or '.join(_READERS)}")
    arrays, facts = _READERS[path.suffix](path)
    return arrays, json.loads(facts)


def _safetensors(path: Path) -> tuple[dict[str, Tensor], str]:
    with safe_open(path, framework="pt") as file:
        facts = (file.metadata() or {}).get(_FACTS, "{}")
        return {name: file.get_tensor(name) for name in file.keys()}, facts


def _npz(path: Path) -> tuple[dict[str, Tensor], str]:
    with np.load(path, allow_pickle=False) as file:
        facts = str(file[_FACTS]) if _FACTS in file else "{}"
        return {name: torch.from_numpy(file[name]) for name in ARRAYS if name in file}, facts


_READERS = {".safetensors": _safetensors, ".npz": _npz}
