"""Recipes: YAML files that say how a shipped model was trained, read strictly.

The key `kind` says what is trained: "prior" (the default), "ud2m", "labelled" (a prior that knows classes) or "classifier".
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from torch import nn

    from fewstep.priors.unet import UNetDenoiser
    from fewstep.training import Trainer

FOLDER = Path(__file__).parent


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
        """See `prior_trainer`."""
        return prior_trainer(self, data, out, steps)


def read_recipe(path: str | Path) -> Any:
    """Return the recipe at `path`, or the shipped one of that name ("natural"), as the dataclass of its kind.

    Raises:
        ValueError: the file is missing, is no YAML mapping, lacks a key or has one that is not known.
    """
    import yaml

    file = FOLDER / f"{path}.yaml" if (FOLDER / f"{path}.yaml").is_file() else Path(path)
    if not file.is_file():
        shipped = ", ".join(sorted(recipe.stem for recipe in FOLDER.glob("*.yaml")))
        raise ValueError(f"{file} cannot be read as a recipe: there is no such file, and those that ship are {shipped}")
    try:
        values = yaml.load(file.read_text(encoding="utf-8"), _loader())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"{file} cannot be read as a recipe ({error})") from None
    if not isinstance(values, Mapping):
        raise ValueError(f"{file} must be a mapping of names to values")
    given = dict(values)
    kind = str(given.pop("kind", "prior"))
    if kind not in KINDS:
        raise ValueError(f"{file}: unknown kind {kind!r}; choose one of {', '.join(KINDS)}")
    return build(KINDS[kind](), given, str(file))


def _loader() -> type:
    """Return yaml's safe loader, to which 1e-3 is a number, as to everyone else; YAML 1.1 wants 1.0e-3."""
    import yaml

    class Loader(yaml.SafeLoader):
        pass

    Loader.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
    )
    return Loader


def build(cls: type, values: Any, where: str) -> Any:
    """Return `cls(**values)` after checking every key against the fields of the dataclass `cls`.

    Raises:
        ValueError: `values` is no mapping, a key is unknown (the nearest known one is named) or missing, or a value is
            refused.
    """
    if not isinstance(values, Mapping):
        raise ValueError(f"{where} must be a mapping of names to values")
    known = [f.name for f in fields(cls)]
    for key in values:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, 1)
            hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(known)}"
            raise ValueError(f"{where}: unknown key {key!r}; {hint}")
    needed = {f.name for f in fields(cls) if f.default is MISSING and f.default_factory is MISSING}
    if missing := sorted(needed - set(values)):
        raise ValueError(f"{where} lacks {', '.join(missing)}")
    try:
        return cls(**values)
    except TypeError as error:
        raise ValueError(f"{where}: {error}") from None


def prior_trainer(recipe: PriorRecipe, data: str | Path, out: str | Path, steps: int | None = None) -> Trainer:
    """Return the trainer that `recipe` describes, on the images in `data`, writing to `out`.

    Every process starts from the same weights, drawn from the recipe's seed.
    """
    from fewstep.core.files import files_hash
    from fewstep.core.noise import seeded
    from fewstep.data import RandomCrops, crop_shapes, largest, list_images, load_pixels, split
    from fewstep.objectives.denoising import DenoisingScoreMatching
    from fewstep.priors.unet import UNetConfig, UNetDenoiser
    from fewstep.recipes.validation import DenoisingPSNR
    from fewstep.training import Trainer, TrainingOptions

    options = build(TrainingOptions, recipe.training, "training")
    options = options if steps is None else replace(options, steps=steps)
    config = build(UNetConfig, recipe.network, "network")
    objective = build(DenoisingScoreMatching, recipe.objective, "objective")
    validation = build(DenoisingPSNR, recipe.validation, "validation")
    photographs = list_images(data)
    training, held_out = split(photographs, recipe.holdout)
    shapes = crop_shapes(recipe.crops)
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
            "crops": recipe.crops,
            "holdout": recipe.holdout,
            "data": files_hash(photographs),
            "seed": options.seed,
        },
    )


def _prior() -> type:
    return PriorRecipe


def _ud2m() -> type:
    from fewstep.recipes.ud2m import UD2MRecipe

    return UD2MRecipe


def _labelled() -> type:
    from fewstep.recipes.labelled import LabelledPriorRecipe

    return LabelledPriorRecipe


def _classifier() -> type:
    from fewstep.recipes.labelled import ClassifierRecipe

    return ClassifierRecipe


KINDS: dict[str, Callable[[], type]] = {
    "prior": _prior,
    "ud2m": _ud2m,
    "labelled": _labelled,
    "classifier": _classifier,
}


# what trainings write to a folder of this name, and how it is used
USES = {"sampler": "--method ud2m --set network={}", "prior": "--prior {}", "classifier": "Classifier.load({!r})"}


def written(out: str | Path) -> list[str]:
    """Return one line for each model that a training wrote to `out`: where it lies and how it is used."""
    folders = {name: str(Path(out) / name) for name in USES if (Path(out) / name).is_dir()}
    return [f"written to {folder}; use it with {USES[name].format(folder)}" for name, folder in folders.items()]


def train(
    recipe: str | Path, data: str | Path, out: str | Path, steps: int | None = None, resume: bool = True
) -> nn.Module:
    """Train what `recipe` describes on `data`, a folder of images or what else it takes; return it with averaged weights.

    `out` receives checkpoints, `log.jsonl` and the model in a folder of its own, which `load_prior` or `load_sampler` reads.
    `steps` replaces the recipe's number of steps; `resume` continues from the last checkpoint in `out`.

    Raises:
        ValueError: the recipe, the images or the checkpoint cannot be used.
        KeyboardInterrupt: the training was told to stop; a checkpoint was written first.
    """
    return read_recipe(recipe).trainer(data, out, steps).run_whole(resume)


def train_prior(
    recipe: str | Path, data: str | Path, out: str | Path, steps: int | None = None, resume: bool = True
) -> UNetDenoiser:
    """Do what `train` does with the recipe of a prior; return the prior."""
    return cast("UNetDenoiser", train(recipe, data, out, steps, resume))
