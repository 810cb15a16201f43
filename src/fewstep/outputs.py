"""The files of a restored photograph; each appears whole or not at all."""

from __future__ import annotations

import json
import math
import os
import platform
import re
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fewstep import __version__
from fewstep.core.files import write_bytes
from fewstep.images import save_image
from fewstep.metrics import coverage, lpips, psnr, ssim
from fewstep.store import Summary

RESULT, REPORT, SIMULATED = "result.json", "report.html", "simulation.json"
_OURS = re.compile(
    r"(sample-\d{2,}|mean|std|measurement|truth|interval-(low|high|width))\.png|samples\.safetensors|report\.html|result\.json"
)
_PACKAGES = ("torch", "deepinv", "diffusers", "torchmetrics", "lpips")


class Kind(NamedTuple):
    """What a run leaves in its folder.

    Attributes:
        name: of the run, in words.
        record: the file that tells such a folder from others.
        files: the names of what it writes, the record among them.
    """

    name: str
    record: str
    files: re.Pattern[str]


RESTORATION = Kind("restoration", RESULT, _OURS)
SIMULATION = Kind(
    "simulation", SIMULATED, re.compile(r"measurement\.(png|jpg|safetensors)|truth\.png|simulation\.json")
)


@dataclass
class Truth:
    """Scores against a known image, gathered while samples come in.

    Attributes:
        x: the clean image, (1, 3, H, W) in [0, 1], or None where it is unknown: then there are no scores.
        lpips_weights: where LPIPS finds its weights, see `fewstep.metrics.lpips_net`.
    """

    x: Tensor | None
    lpips_weights: str | None = None
    psnr_samples: list[float] = field(default_factory=list)
    first: Tensor | None = None

    def see(self, sample: Tensor) -> None:
        """Score one sample, (1, 3, H, W) in [0, 1]; the first is kept for LPIPS."""
        if self.x is None:
            return
        self.psnr_samples.append(psnr(sample, self.x))
        self.first = sample if self.first is None else self.first

    def scores(self, baseline: Tensor, summary: Summary | None, level: float) -> dict[str, Any]:
        """Return the scores for `result.json`; what cannot be had is None, the reasons are under "missing"."""
        if self.x is None:
            return {}
        out: dict[str, Any] = {"psnr_measurement": psnr(baseline, self.x), "missing": {}}
        if summary is None or self.first is None:
            return out
        out["psnr_mean"] = psnr(summary.mean, self.x)
        out["psnr_sample"] = sum(self.psnr_samples) / len(self.psnr_samples)
        for name, (value, reason) in {
            "ssim_mean": ssim(summary.mean, self.x),
            "lpips": lpips(self.first, self.x, weights=self.lpips_weights),
        }.items():
            out[name] = value
            if reason:
                out["missing"][name] = reason
        name = f"coverage{100 * level:g}"
        out[name] = None
        if summary.lower is None or summary.upper is None:
            out["missing"][name] = "an interval needs at least 2 samples"
        else:
            out[name] = coverage((summary.lower, summary.upper), self.x)
        return out


def check_free(folder: Path, source: Path, kind: Kind = RESTORATION) -> None:
    """Raise ValueError where a run from `source` into `folder` would replace it, or a file that no run of its kind wrote."""
    if source.resolve().parent == folder.resolve() and kind.files.fullmatch(source.resolve().name):
        raise ValueError(f"{source} would be replaced by a file of the result: choose another folder than {folder}")
    known = (folder / kind.record).is_file()
    others = [] if known else [p.name for p in folder.iterdir() if kind.files.fullmatch(p.name)]
    if others:
        raise ValueError(f"{folder} holds {min(others)}, which no {kind.name} wrote: choose another folder")


def clear(folder: Path) -> None:
    """Remove what an earlier run left in `folder`, recognised by its result.json; other files are not touched."""
    for left in folder.glob("samples.partial-*"):
        if left.name != f"samples.partial-{os.getpid()}":
            left.unlink()
    if not (folder / RESULT).is_file():
        return
    for path in folder.iterdir():
        if _OURS.fullmatch(path.name):
            path.unlink()


def write_json(path: Path, record: dict[str, Any]) -> None:
    """Write a record as JSON, atomically; infinite and undefined numbers become null."""
    write_bytes(path, (json.dumps(_finite(record), indent=2) + "\n").encode())


def write_summary(folder: Path, summary: Summary, grey: bool, profile: bytes | None = None) -> dict[str, float]:
    """Write mean, standard deviation and interval as images; return, for the maps, the value that white stands for."""
    save_image(summary.mean, folder / "mean.png", grey=grey, profile=profile)
    if summary.std is None or summary.lower is None or summary.upper is None:
        return {}
    save_image(summary.lower, folder / "interval-low.png", grey=grey, profile=profile)
    save_image(summary.upper, folder / "interval-high.png", grey=grey, profile=profile)
    return {
        "std.png": write_map(folder / "std.png", std_map(summary)),
        "interval-width.png": write_map(folder / "interval-width.png", width_map(summary)),
    }


def std_map(summary: Summary) -> Tensor:
    """Return the standard deviation of a pixel, root mean square over channels, (H, W)."""
    assert summary.std is not None
    return summary.std[0].square().mean(0).sqrt()


def width_map(summary: Summary) -> Tensor:
    """Return the width of the interval of a pixel, mean over channels, (H, W)."""
    assert summary.lower is not None and summary.upper is not None
    return (summary.upper - summary.lower)[0].mean(0)


def write_map(path: Path, values: Tensor) -> float:
    """Write a non-negative field, (H, W), as grey values from black = 0 to white = its maximum, which is returned."""
    white = max(float(values.max()), 1e-6)
    save_image((values / white)[None], path)
    return white


def versions() -> dict[str, str]:
    """Return the versions that a result depends on."""
    found = {"fewstep": __version__, "python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def device_name(device: torch.device) -> str:
    """Return the device in words."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
