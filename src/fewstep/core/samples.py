"""What a sampler returns: the samples, what they cost, and how they were made."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save
from torch import Tensor

from fewstep.core.counts import Counts
from fewstep.core.files import write_bytes


@dataclass(frozen=True)
class Samples:
    """K samples for each of B measurements.

    Attributes:
        x: (K, B, *event), in the coordinates of the prior.
        counts: what one sample cost: network calls, vector-Jacobian products, operator calls.
        seconds: wall-clock time of all of them.
        method: repr of the sampler.
        seeds: one per measurement; sample k of measurement b depends on (seeds[b], k) and the measurement alone.
        first: index k of the first sample held here.
        antithetic: whether samples 2 j and 2 j + 1 are a pair with opposite noise.
    """

    x: Tensor
    counts: Counts
    seconds: float
    method: str
    seeds: tuple[int, ...]
    first: int = 0
    antithetic: bool = False

    def __repr__(self) -> str:
        k, batch, *event = self.x.shape
        method = self.method.partition("(")[0]
        return f"Samples(K={k}, B={batch}, event={tuple(event)}, method={method}, nfe={self.nfe})"

    @property
    def nfe(self) -> float:
        """Network calls per sample, their mean where they differ."""
        return self.counts.network

    @property
    def num_samples(self) -> int:
        """K."""
        return self.x.shape[0]

    @property
    def header(self) -> dict[str, str]:
        """What a file says of them beside the numbers."""
        return {
            "format": "fewstep.samples",
            "method": self.method,
            "seeds": json.dumps(self.seeds),
            "first": str(self.first),
            "antithetic": json.dumps(self.antithetic),
            "counts": json.dumps(vars(self.counts)),
            "seconds": str(self.seconds),
        }

    @property
    def mean(self) -> Tensor:
        """Sample mean, (B, *event); of one sample it is that sample."""
        return wide(self.x).mean(0)

    @property
    def std(self) -> Tensor:
        r"""Sample standard deviation, (B, *event); needs K >= 2.

        Of antithetic samples it is that of one of them, from their pairs: with correlation rho within a pair, half the
        difference has variance sigma^2 (1 - rho) / 2 and the mean sigma^2 (1 + rho) / 2. A single pair gives the first part only,
        which is between half of the variance and all of it where rho <= 0. A sample without its partner is left out.
        """
        if not self.antithetic:
            return wide(self._several("a standard deviation")).std(0)
        x = wide(self.x[self.first % 2 :])
        pairs = x[: len(x) // 2 * 2].unflatten(0, (-1, 2))
        if not len(pairs):
            raise ValueError("a standard deviation of antithetic samples needs a pair of them")
        within = (pairs[:, 0] - pairs[:, 1]).square().mean(0) / 4
        return (within + pairs.mean(1).var(0)).sqrt() if len(pairs) > 1 else within.sqrt()

    def quantile(self, q: float | Sequence[float]) -> Tensor:
        """Return empirical quantiles over the samples, (B, *event) or (len(q), B, *event); needs K >= 2.

        Computed in slices of the event, so that memory stays bounded for large images.
        """
        x = self._several("a quantile").flatten(1)
        level = torch.as_tensor(q, dtype=wide(x[:0]).dtype, device=x.device)
        parts = [torch.quantile(wide(part), level, dim=0) for part in x.split(1 << 20, dim=1)]
        return torch.cat(parts, -1).reshape(*level.shape, *self.x.shape[1:])

    def interval(self, level: float = 0.9) -> tuple[Tensor, Tensor]:
        """Return the ends of the central interval of probability `level` per coordinate, (B, *event) each.

        The ends are taken at the quantiles (K + 1)(1 -+ level) / 2 of the order statistics, so that a further draw of the
        same law lies inside with probability `level`; where K is too small for that, at the extremes. Of antithetic samples
        it lies inside a little more often: with pairs that are mirror images, with probability
        1 - (1 - level) (K + 1) / (K + 2), and between the extremes with K / (K + 2) instead of (K - 1) / (K + 1).
        """
        if not 0 < level < 1:
            raise ValueError(f"level must lie in (0, 1), got {level}")
        k = self.num_samples
        low = (k + 1) * (1 - level) / 2 - 1  # position among the order statistics, counted from 0
        q = min(max(low / max(k - 1, 1), 0.0), 0.5)
        lower, upper = self.quantile([q, 1 - q])
        return lower, upper

    def save(self, folder: str | Path) -> Path:
        """Write `samples.safetensors` (atomically) into `folder`, its header stating method, cost and seeds."""
        path = Path(folder) / "samples.safetensors"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(path, save({"x": self.x.contiguous().cpu()}, metadata=self.header))
        return path

    @classmethod
    def load(cls, folder: str | Path) -> Samples:
        """Read what `save` wrote.

        Args:
            folder: that of the file, or the file itself.

        Raises:
            ValueError: there is no file, or it is not one of ours.
        """
        from safetensors import SafetensorError, safe_open

        path = Path(folder) if Path(folder).is_file() else Path(folder) / "samples.safetensors"
        if not path.is_file():
            raise ValueError(f"no samples in {folder}: {path} is not there")
        try:
            with safe_open(path, "pt") as file:
                header = file.metadata() or {}
            x = load_file(path)["x"]
        except (SafetensorError, KeyError) as error:
            raise ValueError(f"{path} is not a file of samples: {error}") from error
        if header.get("format") != "fewstep.samples":
            raise ValueError(f"{path} is not a file of samples")
        counts, seeds = Counts(**json.loads(header["counts"])), tuple(json.loads(header["seeds"]))
        antithetic = bool(json.loads(header.get("antithetic", "false")))  # files of earlier versions do not say it
        return cls(x, counts, float(header["seconds"]), header["method"], seeds, int(header["first"]), antithetic)

    @classmethod
    def concatenate(cls, parts: Sequence[Samples]) -> Samples:
        """Join consecutive chunks of the same run."""
        head = parts[0]
        x = torch.cat([p.x for p in parts]) if len(parts) > 1 else head.x
        counts = Counts.mean([(p.counts, p.num_samples) for p in parts])
        return replace(head, x=x, counts=counts, seconds=sum(p.seconds for p in parts))

    def _several(self, what: str) -> Tensor:
        if self.num_samples < 2:
            raise ValueError(f"{what} needs at least 2 samples, got {self.num_samples}")
        return self.x


def wide(x: Tensor) -> Tensor:
    """Return half-precision numbers, which large images are stored in, in single precision; others as they are."""
    return x.float() if x.dtype.itemsize < 4 else x
