"""The recipe of a prior of photographs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from fewstep.core.files import files_hash
from fewstep.core.noise import seeded
from fewstep.data import RandomCrops, crop_shapes, largest, list_images, load_pixels, split
from fewstep.objectives.denoising import DenoisingScoreMatching
from fewstep.priors.unet import UNetConfig, UNetDenoiser
from fewstep.recipes import build, training_options
from fewstep.recipes.validation import DenoisingPSNR
from fewstep.training import Trainer


@dataclass(frozen=True)
class PriorRecipe:
    """The recipe of an image prior.

    Attributes:
        holdout: images kept for validation, the last ones in sorted order.
        network: fields of `UNetConfig`.
        objective: fields of `DenoisingScoreMatching`.
        crops: batch shapes, in turn: [[count, size], ...].
        training: fields of `TrainingOptions`.
        validation: fields of `DenoisingPSNR`.
    """

    holdout: int
    network: Mapping[str, Any]
    objective: Mapping[str, Any]
    crops: Sequence[Sequence[int]]
    training: Mapping[str, Any]
    validation: Mapping[str, Any]

    def trainer(self, data: str | Path, out: str | Path, steps: int | None = None) -> Trainer:
        """Return the trainer on the images in `data`, writing to `out`; the prior goes to `out`/prior.

        Every process starts from the same weights, drawn from the recipe's seed.
        """
        options = training_options(self.training, steps)
        config = build(UNetConfig, self.network, "network")
        objective = build(DenoisingScoreMatching, self.objective, "objective")
        validation = build(DenoisingPSNR, self.validation, "validation")
        photographs = list_images(data)
        training, held_out = split(photographs, self.holdout)
        shapes = crop_shapes(self.crops)
        if config.size is not None and any(shape.size != config.size for shape in shapes):
            raise ValueError(f"a network for images of {config.size} pixels learns from crops of that size alone")
        return Trainer(
            model=seeded(lambda: UNetDenoiser(config), options.seed),
            objective=objective,
            data=RandomCrops([load_pixels(path, largest(shapes)) for path in training], shapes, options.seed),
            out=Path(out),
            options=options,
            validate=validation.on([load_pixels(path, validation.size) for path in held_out]),
            export=partial(UNetDenoiser.save, folder=Path(out) / "prior"),
            describe={
                "network": asdict(config),
                "objective": asdict(objective),
                "crops": self.crops,
                "holdout": self.holdout,
                "data": files_hash(photographs),
                "seed": options.seed,
            },
        )
