"""Cross-entropy of a classifier."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from fewstep.core.noise import Noise
from fewstep.core.objective import Objective


@dataclass(frozen=True)
class CrossEntropy(Objective):
    """-log p(label | x), the mean over items.

    Attributes:
        smoothing: share of the target that is spread evenly over all classes.
    """

    smoothing: float = 0.0

    def loss(
        self, player: str, model: nn.Module, batch: dict[str, Any], noise: Noise
    ) -> tuple[Tensor, dict[str, float]]:
        """See `Objective`; `batch` is {"x0": (N, *event), "cond": {"label": (N,)}}."""
        logits, label = model(batch["x0"]), batch["cond"]["label"]
        loss = F.cross_entropy(logits, label, label_smoothing=self.smoothing)
        return loss, {"accuracy": float((logits.detach().argmax(1) == label).float().mean())}
