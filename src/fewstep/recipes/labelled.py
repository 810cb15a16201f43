"""The recipes of the digits: a prior that knows classes, and the classifier that judges its samples.

Both are trained on one .npz file with `images`, (N, H, W) uint8, and `labels`, (N,); its last images are the test set.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch
from torch import Tensor, nn

from fewstep.core.checks import check_counts, check_shares
from fewstep.core.files import files_hash
from fewstep.core.noise import seeded
from fewstep.data import from_bytes
from fewstep.metrics.classes import Classifier, ClassifierConfig
from fewstep.objectives.classification import CrossEntropy
from fewstep.objectives.denoising import DenoisingScoreMatching
from fewstep.priors.unet import UNetConfig, UNetDenoiser
from fewstep.recipes import build, training_options
from fewstep.recipes.validation import DenoisingPSNR
from fewstep.training import Trainer


@dataclass(frozen=True)
class Labelled:
    """Images with classes.

    Attributes:
        images: uint8, (N, C, H, W).
        labels: (N,) int64.
    """

    images: Tensor = field(repr=False)
    labels: Tensor = field(repr=False)

    @classmethod
    def read(cls, path: str | Path) -> Labelled:
        """Return what an .npz file holds.

        Raises:
            ValueError: the file cannot be read or lacks an array, or the arrays do not belong together.
        """
        try:
            with np.load(path, allow_pickle=False) as file:
                images, labels = torch.from_numpy(file["images"]), torch.from_numpy(file["labels"]).long()
        except (OSError, ValueError, KeyError, AttributeError, EOFError, TypeError, BadZipFile, zlib.error) as error:
            reason = " ".join(str(error).split())
            raise ValueError(f"{path} is no .npz file with arrays `images` and `labels` ({reason})") from None
        if images.ndim != 3 or images.dtype != torch.uint8 or labels.shape != images.shape[:1]:
            raise ValueError(f"{path}: expected images (N, H, W) uint8 and labels (N,)")
        return cls(images[:, None], labels)

    def split(self, holdout: int) -> tuple[Labelled, Labelled]:
        """Return all but the last `holdout` images, and those; ValueError where one part would be empty."""
        if not 0 < holdout < len(self.labels):
            raise ValueError(f"holdout is {holdout}, but there are {len(self.labels)} images")
        cut = len(self.labels) - holdout
        return Labelled(self.images[:cut], self.labels[:cut]), Labelled(self.images[cut:], self.labels[cut:])


@dataclass(frozen=True)
class LabelledBatches:
    """Batches {"x0", "cond": {"label"}}: item i of step k depends on (seed, k, i) only.

    Attributes:
        data: the images.
        size: items per step, over all processes.
        hidden: share of items whose label is withheld, -1 in its place.
        seed: seed of the choice.
    """

    data: Labelled
    size: int
    hidden: float = 0.0
    seed: int = 0

    def count(self, step: int) -> int:
        """Return the number of items of this step, over all processes."""
        return self.size

    def batch(self, step: int, items: Iterable[int]) -> dict[str, Any]:
        """Return x0, (N, C, H, W) in [-1, 1], and labels, (N,)."""
        chosen, told = [], []
        for item in items:
            rng = np.random.default_rng((self.seed, step, item))
            chosen.append(int(rng.integers(len(self.data.labels))))
            told.append(bool(rng.uniform() >= self.hidden))
        label = torch.where(torch.tensor(told), self.data.labels[chosen], -1)
        return {"x0": from_bytes(self.data.images[chosen]), "cond": {"label": label}}


@dataclass(frozen=True)
class LabelledPriorRecipe:
    """The recipe of a prior that knows classes.

    Attributes:
        holdout: images kept for tests, the last ones.
        batch: images per step.
        hidden: share of images whose class is withheld, so that the prior also works without one.
        network: fields of `UNetConfig`.
        objective: fields of `DenoisingScoreMatching`.
        training: fields of `TrainingOptions`.
        validation: fields of `DenoisingPSNR`.
    """

    holdout: int
    batch: int
    hidden: float
    network: Mapping[str, Any]
    objective: Mapping[str, Any]
    training: Mapping[str, Any]
    validation: Mapping[str, Any]

    def __post_init__(self) -> None:
        check_counts(self, "holdout", "batch")
        check_shares(self, "hidden")

    def trainer(self, data: str | Path, out: str | Path, steps: int | None = None) -> Trainer:
        """Return the trainer on the .npz file `data`, writing to `out`; the prior goes to `out`/prior."""
        options = training_options(self.training, steps)
        config = build(UNetConfig, self.network, "network")
        training, test = _read(data, config).split(self.holdout)
        return Trainer(
            model=seeded(lambda: UNetDenoiser(config), options.seed),
            objective=build(DenoisingScoreMatching, self.objective, "objective"),
            data=LabelledBatches(training, self.batch, self.hidden, options.seed),
            out=Path(out),
            options=options,
            validate=build(DenoisingPSNR, self.validation, "validation").on(list(test.images)),
            export=partial(UNetDenoiser.save, folder=Path(out) / "prior"),
            describe={**_numbers(self), "seed": options.seed, "data": files_hash([Path(data)])},
        )


@dataclass(frozen=True)
class ClassifierRecipe:
    """The recipe of a classifier.

    Attributes:
        holdout: images kept for tests, the last ones.
        batch: images per step.
        network: fields of `ClassifierConfig`.
        objective: fields of `CrossEntropy`.
        training: fields of `TrainingOptions`.
    """

    holdout: int
    batch: int
    network: Mapping[str, Any]
    objective: Mapping[str, Any]
    training: Mapping[str, Any]

    def __post_init__(self) -> None:
        check_counts(self, "holdout", "batch")

    def trainer(self, data: str | Path, out: str | Path, steps: int | None = None) -> Trainer:
        """Return the trainer on the .npz file `data`, writing to `out`; the classifier goes to `out`/classifier."""
        options = training_options(self.training, steps)
        config = build(ClassifierConfig, self.network, "network")
        training, test = _read(data, config).split(self.holdout)
        return Trainer(
            model=seeded(lambda: Classifier(config), options.seed),
            objective=build(CrossEntropy, self.objective, "objective"),
            data=LabelledBatches(training, self.batch, 0.0, options.seed),
            out=Path(out),
            options=options,
            validate=partial(_accuracy, test=test),
            export=partial(Classifier.save, folder=Path(out) / "classifier"),
            describe={**_numbers(self), "seed": options.seed, "data": files_hash([Path(data)])},
        )


def _read(path: str | Path, config: UNetConfig | ClassifierConfig) -> Labelled:
    """Return what an .npz file holds; ValueError where it does not fit the network, see also `Labelled.read`."""
    found = Labelled.read(path)
    wanted = (config.channels, *(config.size or side for side in found.images.shape[2:]))
    if found.images.shape[1:] != wanted:
        raise ValueError(f"{path} has images of {tuple(found.images.shape[1:])}, the network takes {wanted}")
    if not 0 <= int(found.labels.min()) <= int(found.labels.max()) < config.classes:
        raise ValueError(f"{path} has other labels than 0 to {config.classes - 1}, the classes of the network")
    return found


def _numbers(recipe: LabelledPriorRecipe | ClassifierRecipe) -> dict[str, Any]:
    """Return what a run shares with the one that resumes it."""
    return {name: value for name, value in asdict(recipe).items() if name not in ("training", "validation")}


def _accuracy(model: nn.Module, test: Labelled) -> dict[str, float]:
    """Return the share of test images that are put into their class."""
    device = next(model.parameters()).device
    answers = model(from_bytes(test.images).to(device)).argmax(1).cpu()
    return {"accuracy": float((answers == test.labels).float().mean())}
