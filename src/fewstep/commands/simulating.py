"""`fewstep simulate`: a clean photograph becomes a measurement."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from fewstep.core.files import check_target, write_bytes
from fewstep.images import read_photo, save_image
from fewstep.outputs import SIMULATED, SIMULATION, check_free
from fewstep.records import write_record
from fewstep.task import Settings, prepare


def run(path: Path, out: Path, operator: str, fields: Mapping[str, Any], sigma: float | None, seed: int) -> None:
    """Write measurement.png, measurement.safetensors (tensor "y") or measurement.jpg, truth.png and simulation.json into `out`.

    Raises:
        ValueError: the photograph cannot be read or degraded so, or it or a file that no simulation wrote would be replaced.
    """
    chosen = Settings(operator=operator, operator_fields=fields, sigma=sigma, seed=seed, simulate=True)
    check_target(out / SIMULATED)
    photo = read_photo(path)
    task = prepare(photo, chosen, torch.device("cpu"))
    out.mkdir(parents=True, exist_ok=True)
    check_free(out, path, SIMULATION)
    save_image(task.shown, out / "measurement.png", grey=photo.grey, profile=photo.profile)
    save_image(task.photo.x, out / "truth.png", grey=photo.grey, profile=photo.profile)
    name, data = task.word.stored(photo.x[:, :1] if photo.grey else photo.x, task.y)
    write_bytes(out / name, data)
    word, notes = task.word.describe(), list(task.photo.notes)
    record = {"input": str(path), "operator": word, "sigma": task.sigma, "seed": seed, "notes": notes}
    write_record(out / SIMULATED, record)
