"""Draws on disk: safetensors or npz, which keep all that is known of them, or a plain table for other programs."""

from __future__ import annotations

import dataclasses
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from fewstep.core.files import write_bytes
from fewstep.densities.draws import Draws

SUFFIXES = (".safetensors", ".npz", ".csv")
_FACTS = "facts"  # under this name the numbers that are no arrays, as JSON
_TARGET = "target"
_ARRAYS = ("x", "log_weights", "signs")


def check_suffix(path: Path) -> None:
    """Raise ValueError where draws cannot be written to a file of this name."""
    if path.suffix not in SUFFIXES:
        raise ValueError(f"{path}: draws are written to files that end in {', '.join(SUFFIXES)}")


def write_draws(path: Path, draws: Draws, target: Mapping[str, Any] | None = None) -> None:
    """Write `draws`, atomically: arrays x, log_weights and signs and their facts; in a .csv x_1, ..., x_d, log_weight, sign.

    The signs are left out where all weights are positive. What is known of their density, `target`, is a fact too, which
    `read_target` reads.

    Raises:
        ValueError: a file of another kind.
    """
    check_suffix(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    given = {"x": draws.x, "log_weights": draws.log_weights, "signs": draws.signs}
    arrays = {name: value.detach().cpu().contiguous() for name, value in given.items() if value is not None}
    known = {f.name: getattr(draws, f.name) for f in dataclasses.fields(draws) if f.name not in _ARRAYS}
    facts = json.dumps(known if target is None else {**known, _TARGET: target})
    if path.suffix == ".safetensors":
        write_bytes(path, save(arrays, {_FACTS: facts}))
        return
    buffer = io.BytesIO()
    if path.suffix == ".npz":
        plain: dict[str, Any] = {_FACTS: np.array(facts), **{name: value.numpy() for name, value in arrays.items()}}
        np.savez(buffer, **plain)
    else:
        head = [f"x_{i + 1}" for i in range(draws.x.shape[1])] + ["log_weight", "sign"][: len(arrays) - 1]
        columns = [arrays["x"].double(), *(v[:, None] for v in list(arrays.values())[1:])]
        np.savetxt(buffer, torch.cat(columns, 1).numpy(), "%.9g", ",", header=",".join(head), comments="")
    write_bytes(path, buffer.getvalue())


def read_draws(path: Path) -> Draws:
    """Return what `write_draws` wrote as .safetensors or .npz, or the array x, (N, d), of any such file, without weights.

    Raises:
        ValueError: the file is missing or damaged, is none of these, or holds weights of an unknown kind.
    """
    try:
        arrays, facts = _read(path)
        known = {f.name for f in dataclasses.fields(Draws)} - set(_ARRAYS)
        given = {name: value for name, value in facts.items() if name in known}
        return Draws(arrays["x"], arrays.get("log_weights"), signs=arrays.get("signs"), **given)
    except KeyError:
        raise ValueError(f"{path} holds no array x") from None
    except (OSError, ValueError, TypeError, SafetensorError) as error:
        raise ValueError(f"{path} cannot be read as draws ({error})") from None


def read_target(path: Path) -> dict[str, Any] | None:
    """Return what the file says of the density of its draws, None where that is nothing; see `write_draws`."""
    found = _read(path)[1].get(_TARGET)
    return found if isinstance(found, dict) else None


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the arrays and the facts of a file."""
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
        return {name: torch.from_numpy(file[name]) for name in _ARRAYS if name in file}, facts


_READERS = {".safetensors": _safetensors, ".npz": _npz}
