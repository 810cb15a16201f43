"""Recipes: YAML files that say how a shipped model was trained, read strictly.

The key `kind` says what is trained: "prior" (the default), "ud2m", "labelled" (a prior that knows classes) or "classifier".
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import MISSING, fields, replace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from fewstep.core.names import suggestion

if TYPE_CHECKING:
    from torch import nn

    from fewstep.priors.unet import UNetDenoiser
    from fewstep.training import TrainingOptions

FOLDER = Path(__file__).parent
KINDS = {  # kind of a recipe: file of this folder and dataclass there, imported when a recipe is read
    "prior": "prior:PriorRecipe",
    "ud2m": "ud2m:UD2MRecipe",
    "labelled": "labelled:LabelledPriorRecipe",
    "classifier": "labelled:ClassifierRecipe",
}


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
    module, _, name = KINDS[kind].partition(":")
    return build(getattr(import_module(f"{__name__}.{module}"), name), given, f"{file} (kind {kind})", ("kind",))


def _loader() -> type:
    """Return yaml's safe loader, to which 1e-3 is a number, as to everyone else; YAML 1.1 wants 1.0e-3."""
    import yaml

    class Loader(yaml.SafeLoader):
        pass

    Loader.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
    )
    return Loader


def build(cls: type, values: Any, where: str, beside: tuple[str, ...] = ()) -> Any:
    """Return `cls(**values)` after checking every key against the fields of the dataclass `cls`.

    Args:
        cls: a dataclass.
        values: what is given.
        where: what to call it in messages.
        beside: keys that are known there too and were read already.

    Raises:
        ValueError: `values` is no mapping, a key is unknown (the nearest known one is named) or missing, or a value is
            refused.
    """
    if not isinstance(values, Mapping):
        raise ValueError(f"{where} must be a mapping of names to values")
    known = [f.name for f in fields(cls)]
    for key in values:
        if key not in known:
            raise ValueError(f"{where}: unknown key {key!r}; {suggestion(str(key), [*beside, *known])}")
    needed = {f.name for f in fields(cls) if f.default is MISSING and f.default_factory is MISSING}
    if missing := sorted(needed - set(values)):
        raise ValueError(f"{where} lacks {', '.join(missing)}")
    try:
        return cls(**values)
    except TypeError as error:
        raise ValueError(f"{where}: {error}") from None


def training_options(values: Any, steps: int | None) -> TrainingOptions:
    """Return the options in a recipe, with `steps` in place of theirs unless it is None; ValueError as `build` says."""
    from fewstep.training import TrainingOptions

    options = build(TrainingOptions, values, "training")
    return options if steps is None else replace(options, steps=steps)


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
        ValueError: the recipe, the images, the checkpoint or the folder cannot be used.
        KeyboardInterrupt: the training was told to stop; a checkpoint was written first.
    """
    from fewstep.core.files import check_target

    check_target(Path(out) / "log.jsonl")
    return read_recipe(recipe).trainer(data, out, steps).run_whole(resume)


def train_prior(
    recipe: str | Path, data: str | Path, out: str | Path, steps: int | None = None, resume: bool = True
) -> UNetDenoiser:
    """Do what `train` does with the recipe of a prior; return the prior."""
    return cast("UNetDenoiser", train(recipe, data, out, steps, resume))
