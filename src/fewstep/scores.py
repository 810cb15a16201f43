"""Scores of a restoration against a known image."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from fewstep.metrics import coverage, lpips, psnr, ssim
from fewstep.store import Summary


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
        """Score one sample, (1, 3, H, W) in [0, 1]; the first is kept, for LPIPS and to be shown."""
        self.first = sample if self.first is None else self.first
        if self.x is not None:
            self.psnr_samples.append(psnr(sample, self.x))

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
