"""Priors by name: `load_prior` finds out what a source is and hands it to the loader of its kind.

Every loader returns a `Denoiser` of images in [-1, 1] in its own schedule; this package is the only place where the
ranges and noise levels of other libraries are converted. Nothing is downloaded unless the source names a repository of
the Hugging Face hub.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from fewstep.core.denoiser import Denoiser

WEIGHTS = Path(__file__).parents[1] / "weights"
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


def available_priors() -> list[str]:
    """Return the names of the shipped priors."""
    return shipped("fewstep-prior")


def shipped(kind: str) -> list[str]:
    """Return the names of the shipped folders of weights whose header says that their format is `kind`."""
    from fewstep.core.files import read_header

    folders = sorted(p.parent for p in WEIGHTS.glob("*/config.json"))
    return [folder.name for folder in folders if read_header(folder).get("format") == kind]


def load_prior(source: str | Path | nn.Module, **options: Any) -> Denoiser:
    """Return a prior, ready for sampling: in evaluation mode and with frozen weights.

    Args:
        source: one of

            - the name of a shipped prior ("natural"),
            - a folder that `UNetDenoiser.save` or the training wrote,
            - a folder of a diffusers pipeline with a `UNet2DModel`, or of such a model (option `scheduler`),
            - the id of one on the Hugging Face hub, "owner/name": the only source that uses the network,
            - a guided-diffusion checkpoint, .pt or .safetensors (options of `load_guided_diffusion`),
            - a `Denoiser`, a diffusers pipeline, or any deepinv denoiser (options of `DeepinvDenoiser`).
        **options: options of the loader.

    Raises:
        ValueError: nothing is found under `source`, it is of no known kind, it is damaged, or an option is unknown.
    """
    loader = _loader(source)
    try:
        prior = loader(source, **options)
    except TypeError as error:
        if "unexpected keyword argument" not in str(error):
            raise
        raise ValueError(f"{source if isinstance(source, str | Path) else 'this prior'}: {error}") from None
    return prior.eval().requires_grad_(False)


def _loader(source: str | Path | nn.Module) -> Callable[..., Denoiser]:
    """Return the function that loads what `source` is."""
    if not isinstance(source, str | Path):
        return _from_object
    if str(source) in available_priors():
        return _shipped
    path = Path(source)
    if path.is_dir():
        return _from_folder
    if path.is_file():
        return _guided_diffusion
    names = ", ".join(available_priors()) or "none in this installation"
    if isinstance(source, str) and is_hub_id(source):
        return _from_hub
    raise ValueError(
        f"no prior {str(source)!r}: neither a shipped one ({names}), nor a folder or file, nor a hub id 'owner/name'"
    )


def is_hub_id(source: str) -> bool:
    """Return whether `source` reads "owner/name" and is no mistyped path: one that begins in the working folder."""
    return bool(_HUB_ID.fullmatch(source)) and not Path(Path(source).parts[0]).exists()


def _shipped(name: str) -> Denoiser:
    from fewstep.priors.unet import UNetDenoiser

    return UNetDenoiser.load(WEIGHTS / name)


def _from_folder(folder: str | Path, **options: Any) -> Denoiser:
    from fewstep.core.files import HEADER, read_header
    from fewstep.priors.diffusers_unet import load_diffusers
    from fewstep.priors.unet import UNetDenoiser

    path = Path(folder)
    kind = read_header(path).get("format") if (path / HEADER).is_file() else None
    if kind == "fewstep-prior":
        return UNetDenoiser.load(path, **options)
    if kind is not None:
        raise ValueError(f"{path} holds a {kind}, no prior; load_sampler and --set network= take trained samplers")
    if any((path / name).is_file() for name in (HEADER, f"unet/{HEADER}", "model_index.json")):
        return load_diffusers(path, **options)
    if (path / "prior" / HEADER).is_file():
        raise ValueError(f"{path} is the folder of a training; the prior is in {path / 'prior'}")
    raise ValueError(f"{path} holds no prior: no {HEADER} of this library or of diffusers")


def _from_hub(name: str, **options: Any) -> Denoiser:
    """Fetch a diffusers repository that the user named, or find it in the local cache, and load it."""
    folders = ("", "unet/")
    small = ["model_index.json", *(f"{f}config.json" for f in folders), "scheduler_config.json", "scheduler/*.json"]
    weights = [f"{folder}diffusion_pytorch_model.safetensors" for folder in folders]
    pickled = [f"{folder}diffusion_pytorch_model.bin" for folder in folders]  # old repositories have nothing else
    folder = fetch(name, [*small, *weights])
    if not any((folder / file).is_file() for file in weights):
        folder = fetch(name, [*small, *pickled])
    return _from_folder(folder, **options)


def fetch(name: str, patterns: list[str]) -> Path:
    """Return the local copy of those files of a hub repository that match `patterns`; ValueError where it cannot be had."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"{name!r} is no local folder and cannot be fetched from the Hugging Face hub ({reason}); "
            "download it where there is a network and give the path of its folder"
        ) from None


def _guided_diffusion(path: str | Path, **options: Any) -> Denoiser:
    from fewstep.priors.adm import load_guided_diffusion

    return load_guided_diffusion(path, **options)


def _from_object(source: Any, **options: Any) -> Denoiser:
    """Return a prior made of an object: ours, a diffusers pipeline, a diffusers UNet or a deepinv denoiser."""
    from fewstep.priors.deepinv_denoiser import DeepinvDenoiser
    from fewstep.priors.diffusers_unet import DiffusersDenoiser

    if isinstance(source, Denoiser):
        if options:
            raise ValueError(f"a prior that is already one takes no options, got {sorted(options)}")
        return source
    if hasattr(source, "unet") and hasattr(source, "scheduler"):
        return DiffusersDenoiser(source.unet, source.scheduler.config, **options)
    if type(source).__name__ == "UNet2DModel":
        if "scheduler" not in options:
            raise ValueError("a bare UNet2DModel does not know its noise levels: pass scheduler=its scheduler's config")
        return DiffusersDenoiser(source, **options)
    if not isinstance(source, nn.Module):
        raise ValueError(f"a prior cannot be made of a {type(source).__name__}")
    return DeepinvDenoiser(source, **options)
