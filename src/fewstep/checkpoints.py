"""Training checkpoints: tensors as safetensors, everything else as JSON, no pickle; a folder appears whole or not at all."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from fewstep import __version__
from fewstep.core.files import packed, read_tensors, write_bytes

KEEP = 2  # checkpoints that stay
LATER = {"data", "prior_sha256"}  # facts that checkpoints of the first version do not have
_FORMAT = "fewstep-checkpoint"
_NAME = re.compile(r"step_\d+")  # users keep copies under other names


def write_checkpoint(
    out: Path, step: int, model: nn.Module, ema: nn.Module, optimizers: Mapping[str, Any], describe: Mapping[str, Any]
) -> Path:
    """Write `out`/checkpoints/step_XXXXXXXX and remove all but the last two; return the folder."""
    root = Path(out) / "checkpoints"
    final, partial = root / f"step_{step:08d}", root / f".step_{step:08d}.partial"
    if final.exists():
        return final
    for unfinished in root.glob(".step_*.partial"):
        shutil.rmtree(unfinished)
    partial.mkdir(parents=True)
    parts = {"model": model.state_dict(), "ema": ema.state_dict()}
    parts |= {f"optimizer.{name}": _tensors(state) for name, state in optimizers.items()}
    hashes = {name: _write(partial / f"{name}.safetensors", tensors) for name, tensors in parts.items()}
    groups = {name: state["param_groups"] for name, state in optimizers.items()}
    facts = {"format": _FORMAT, "step": step, "library_version": __version__, "describe": describe}
    text = json.dumps({**facts, "sha256": hashes, "param_groups": groups}, indent=2)
    (partial / "state.json").write_text(text, encoding="utf-8")
    os.replace(partial, final)
    for old in _folders(root)[:-KEEP]:
        shutil.rmtree(old)
    return final


def last_checkpoint(out: Path) -> Path | None:
    """Return the newest complete checkpoint of `out`, or None."""
    folders = _folders(Path(out) / "checkpoints")
    return folders[-1] if folders else None


def last_step(out: Path) -> int:
    """Return how many steps the newest complete checkpoint of `out` has done; 0 where there is none."""
    folder = last_checkpoint(out)
    return 0 if folder is None else int(folder.name.removeprefix("step_"))


def shorten_log(log: Path, step: int) -> None:
    """Keep of a log, JSON lines, what was written up to `step`; a line that names no step goes."""
    if log.is_file():
        whole = [s for s in log.read_text(encoding="utf-8").splitlines(keepends=True) if s.endswith("\n")]
        write_bytes(log, "".join(s for s in whole if _logged(s) <= step).encode())


def read_checkpoint(
    folder: Path, model: nn.Module, ema: nn.Module, describe: Mapping[str, Any]
) -> tuple[int, dict[str, Any]]:
    """Load `folder` into `model` and `ema`; return the step and the optimisers' states.

    Raises:
        ValueError: a file is missing or damaged, or the checkpoint is of a run that `describe` does not fit.
    """
    try:
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        step, recorded, hashes, groups = (state[k] for k in ("step", "describe", "sha256", "param_groups"))
        optimizers = {name: hashes[f"optimizer.{name}"] for name in groups}
        own, averaged = hashes["model"], hashes["ema"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder / 'state.json'} is missing or damaged ({error})") from None
    _compare(folder, recorded, json.loads(json.dumps(describe)))
    try:
        model.load_state_dict(read_tensors(folder / "model.safetensors", own), strict=True)
        ema.load_state_dict(read_tensors(folder / "ema.safetensors", averaged), strict=True)
    except RuntimeError as error:
        raise ValueError(f"{folder} does not fit the network: {' '.join(str(error).split())[:300]}") from None
    read = {name: read_tensors(folder / f"optimizer.{name}.safetensors", known) for name, known in optimizers.items()}
    return step, {name: {"state": _nested(read[name]), "param_groups": groups[name]} for name in groups}


def _folders(root: Path) -> list[Path]:
    return sorted(p for p in root.glob("step_*") if _NAME.fullmatch(p.name) and (p / "state.json").is_file())


def _compare(folder: Path, recorded: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Raise where the run of the checkpoint and the run that resumes differ."""
    names = {*recorded, *wanted} - (LATER - set(recorded))
    differ = [k for k in sorted(names) if recorded.get(k) != wanted.get(k)]
    if differ:
        raise ValueError(f"{folder} belongs to a run with another {', '.join(differ)}; choose another output folder")


def _logged(line: str) -> float:
    """Return the step of a line of the log; infinity where it names none."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf


def _tensors(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """Flatten an optimiser's per-parameter state to names that safetensors takes."""
    return {f"{index}.{name}": value for index, entry in state["state"].items() for name, value in entry.items()}


def _nested(tensors: Mapping[str, Tensor]) -> dict[int, dict[str, Tensor]]:
    """Invert `_tensors`."""
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        index, name = key.split(".", 1)
        state.setdefault(int(index), {})[name] = value
    return state


def _write(path: Path, tensors: Mapping[str, Tensor]) -> str:
    """Write tensors, not atomically, as the whole folder is; return the hash of the file."""
    data = packed(tensors)
    path.write_bytes(data)
    return hashlib.sha256(data).hexdigest()
