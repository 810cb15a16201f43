"""A one-step (or few-step) map as a program of its own: torch.export, or ONNX where `onnx` is installed."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from fewstep.densities.students._sampler import MapSampler


class Program(nn.Module):
    """z -> x in the target's own coordinates, (N, d) float32 standard normals to (N, d), without the library.

    Args:
        sampler: whose map, which must not need the target's score.
        steps: how often the map is applied.

    Raises:
        ValueError: the map calls the target, or has no jumps and more than one step is asked for, or fewer than one are.
    """

    times: Tensor

    def __init__(self, sampler: MapSampler, steps: int = 1) -> None:
        super().__init__()
        if sampler.flow_map.guided:
            raise ValueError(
                "this map calls the score of its target, which cannot be exported with it; distil it first"
            )
        if steps < 1:
            raise ValueError(f"steps must be at least 1, got {steps}")
        if sampler.renoise and steps > 1:
            raise ValueError("steps that noise their samples again are no deterministic map; export one step")
        self.map, self.whitened = sampler.flow_map, sampler.whitened
        self.warp = sampler.warps.get(steps, nn.Identity())
        self.register_buffer("times", sampler.times(steps))

    def forward(self, z: Tensor) -> Tensor:
        """Return x, (N, d)."""
        y = self.warp(z)
        for k in range(len(self.times) - 1):
            y = self.map(y, self.times[k], self.times[k + 1])
        return self.whitened.to_x(y)


def export(sampler: MapSampler, path: str | Path, steps: int = 1) -> Path:
    """Write the map z -> x to `path`: ONNX for a name that ends in .onnx, torch.export (.pt2) otherwise.

    The number of rows stays free. What comes out has neither weights nor determinant: those need the library.

    Args:
        sampler: what `distill` returned.
        path: the file.
        steps: how often the map is applied.

    Raises:
        TypeError: another sampler.
        ValueError: see `Program`.
        ImportError: ONNX is asked for and `onnx` or `onnxscript` is not installed.
    """
    if not isinstance(sampler, MapSampler):
        raise TypeError(f"{type(sampler).__name__} is no map of a few steps, which `distill` returns: distil it first")
    path, program = Path(path), Program(sampler, steps).eval()
    z, rows = torch.zeros(8, sampler.flow_map.dim), torch.export.Dim("rows", min=2)
    with torch.no_grad():
        exported = torch.export.export(program, (z,), dynamic_shapes={"z": {0: rows}})
    if path.suffix != ".onnx":
        torch.export.save(exported, path)
        return path
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ImportError("ONNX files need pip install 'fewstep[onnx]'") from error
    torch.onnx.export(exported, (z,), path, input_names=["z"], output_names=["x"], dynamo=True)
    return path
