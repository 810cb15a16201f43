"""Trained unfolded networks on disk, half precision, beside a header and a card: whole, or what LoRA adds to a prior.

A whole network needs nothing else. An adapter holds the trained tensors only and belongs to one prior, which it knows by its hash;
at loading it is merged into a copy of that prior, so that both cost the same at inference.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, fields
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewstep.core import files
from fewstep.core.files import fingerprint, read_header, read_weights, write_bytes, write_weights
from fewstep.priors.loaders import WEIGHTS, fetch, is_hub_id, load_prior, shipped
from fewstep.priors.unet import UNetConfig, UNetDenoiser, build_schedule
from fewstep.unfolded.card import model_card
from fewstep.unfolded.decoders import AdaptedDecoder, ContextDecoder
from fewstep.unfolded.levels import LevelConfig
from fewstep.unfolded.lora import LoRAConfig
from fewstep.unfolded.network import UnfoldedConfig, UnfoldedNetwork

FORMAT, ADAPTER = "fewstep-unfolded", "fewstep-adapter"
DECODERS: dict[str, type[AdaptedDecoder]] = {kind.__name__: kind for kind in (AdaptedDecoder, ContextDecoder)}
FACTS = ("prior", "recipe", "data", "command", "steps", "licence", "what_was_run", "outer")  # what a header says
CALIBRATION = "calibration.json"  # beside the weights that it is of, see `fewstep.calibrated`
FILES = (files.WEIGHTS, files.HEADER, "README.md", CALIBRATION)  # of a folder, the last two not always
DENOISER = "decoder.denoiser."  # where the denoiser stands among the names of a network


def save_network(network: UnfoldedNetwork, folder: str | Path, facts: Mapping[str, Any] | None = None) -> None:
    """Write a trained network to `folder`, each file atomically; LoRA's additions are merged into the denoiser.

    `facts` go into the header, and from there into the card: `FACTS`.

    Raises:
        ValueError: its decoder holds no UNet of this library.
    """
    _, denoiser = _adapted(network)
    _write(
        folder, _tensors(network), {"format": FORMAT, **_header(network), "denoiser": asdict(denoiser.config)}, facts
    )


def save_adapter(
    network: UnfoldedNetwork, prior: UNetDenoiser, folder: str | Path, facts: Mapping[str, Any] | None = None
) -> None:
    """Write what training through LoRA added to `prior`, and the levels, to `folder`; `facts` as in `save_network`.

    Raises:
        ValueError: the network was not trained through LoRA.
    """
    decoder, _ = _adapted(network)
    if decoder.lora is None:
        raise ValueError("this network was trained as a whole: there is no adapter of it, save the network")
    tensors = {**_own(network), **{DENOISER + name: value for name, value in decoder.adapter().items()}}
    header = {"format": ADAPTER, **_header(network), "lora": asdict(decoder.lora), "prior_sha256": prior_hash(prior)}
    _write(folder, tensors, header, facts)


def copy_network(source: Path, folder: Path) -> None:
    """Copy a trained network with its header, card and calibrations, each file atomically."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in FILES:
        if (source / name).is_file():
            write_bytes(folder / name, (source / name).read_bytes())


def load_network(folder: str | Path, prior: UNetDenoiser | None = None) -> UnfoldedNetwork:
    """Return the network saved in `folder`, in single precision, evaluation mode and frozen.

    Args:
        folder: of `save_network` or of `save_adapter`.
        prior: what an adapter belongs to; the one that its header names when absent.

    Raises:
        ValueError: a file is missing or damaged, weights and header do not describe the same network, or the adapter belongs to
            another prior.
    """
    tensors, header = read_weights(folder, UnfoldedNetwork.__name__)
    weights = {k: v.float() for k, v in tensors.items()}
    base = _base(folder, header, prior) if header.get("format") == ADAPTER else None
    try:
        network = _whole(weights, header) if base is None else _merged(weights, header, base)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"the header of {folder} does not describe an unfolded network: {error}") from None
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"the weights in {folder} do not fit the network its header describes: {reason}") from None
    return network.eval().requires_grad_(False)


def _whole(weights: Mapping[str, Tensor], header: Mapping[str, Any]) -> UnfoldedNetwork:
    denoiser = UNetDenoiser(UNetConfig(**header["denoiser"]), build_schedule(header["schedule"]))
    network = UnfoldedNetwork(_config(header), DECODERS[header["decoder"]](denoiser))
    network.load_state_dict(dict(weights), strict=True)
    return network


def _base(folder: str | Path, header: Mapping[str, Any], given: UNetDenoiser | None) -> UNetDenoiser:
    """Return the prior that an adapter belongs to."""
    prior = given if given is not None else load_prior(header.get("prior", ""))
    if not isinstance(prior, UNetDenoiser) or prior_hash(prior) != header.get("prior_sha256"):
        raise ValueError(
            f"{folder} is an adapter of {header.get('prior')!r} with other weights than those given; pass the right `prior`"
        )
    return prior


def _merged(weights: Mapping[str, Tensor], header: Mapping[str, Any], prior: UNetDenoiser) -> UnfoldedNetwork:
    kind = DECODERS[header["decoder"]]
    decoder = kind(prior.with_context(kind.IMAGES))
    decoder.apply_adapter(
        {k.removeprefix(DENOISER): v for k, v in weights.items() if k.startswith(DENOISER)},
        LoRAConfig(**header["lora"]),
    )
    network = UnfoldedNetwork(_config(header), decoder)
    own = {k: v for k, v in weights.items() if not k.startswith(DENOISER)}
    inside = {k: v for k, v in network.state_dict().items() if k.startswith(DENOISER)}
    network.load_state_dict({**own, **inside}, strict=True)
    return network


def _config(header: Mapping[str, Any]) -> UnfoldedConfig:
    """Return the configuration of a header; every level must be there."""
    given = dict(header["fields"])
    levels = given.pop("levels")
    if missing := {f.name for f in fields(LevelConfig)} - set(levels):
        raise ValueError(f"missing levels {sorted(missing)}")
    return UnfoldedConfig(levels=LevelConfig(**levels), **given)


def _header(network: UnfoldedNetwork) -> dict[str, Any]:
    schedule = _adapted(network)[1].schedule
    return {
        "method": type(network).__name__,
        "fields": asdict(network.config),
        "decoder": type(network.decoder).__name__,
        "schedule": {"name": type(schedule).__name__, **asdict(schedule)},  # type: ignore[call-overload]
    }


def _adapted(network: UnfoldedNetwork) -> tuple[AdaptedDecoder, UNetDenoiser]:
    decoder = network.decoder
    if not isinstance(decoder, AdaptedDecoder) or not isinstance(decoder.denoiser, UNetDenoiser):
        raise ValueError(f"a {type(decoder).__name__} holds no denoiser that can be saved")
    return decoder, decoder.denoiser


def _tensors(network: UnfoldedNetwork) -> dict[str, Tensor]:
    """Return the weights of a network, LoRA's additions merged into the denoiser."""
    decoder, _ = _adapted(network)
    return {**_own(network), **{DENOISER + name: value for name, value in decoder.plain().items()}}


def _own(network: UnfoldedNetwork) -> dict[str, Tensor]:
    """Return the weights of a network outside its denoiser."""
    return {name: value for name, value in network.state_dict().items() if not name.startswith(DENOISER)}


def _write(
    folder: str | Path, tensors: Mapping[str, Tensor], header: Mapping[str, Any], facts: Mapping[str, Any] | None
) -> None:
    write_weights(folder, tensors, {**header, **(facts or {})}, torch.float16)
    write_bytes(Path(folder) / "README.md", model_card(Path(folder).name, read_header(folder)).encode())


def prior_hash(prior: UNetDenoiser) -> str:
    """Return the SHA-256 of a prior's weights in half precision, which stands in the header of a saved one."""
    return fingerprint(prior.net.state_dict(), torch.float16)


def network_hash(network: UnfoldedNetwork) -> str:
    """Return the SHA-256 that stands in the header of `save_network`."""
    return fingerprint(_tensors(network), torch.float16)


def available_networks() -> list[str]:
    """Return the names of the shipped trained samplers."""
    return sorted([*shipped(FORMAT), *shipped(ADAPTER)])


def find_network(name: str) -> Path:
    """Return the folder of a network: a shipped one, `name` itself as a path, or what the Hugging Face hub has as "owner/name".

    Raises:
        ValueError: there is none.
    """
    if name in available_networks():
        return WEIGHTS / name
    if Path(name).is_dir():
        if (inner := Path(name, "sampler") / files.HEADER).is_file() and not Path(name, files.HEADER).is_file():
            raise ValueError(f"{name} is the folder of a training; the trained sampler is in {inner.parent}")
        return Path(name)
    if is_hub_id(name):
        return _fetched(name)
    known = ", ".join(available_networks()) or "none in this installation"
    raise ValueError(
        f"no trained sampler {name!r}: neither a shipped one ({known}), nor a folder, nor a hub id 'owner/name'"
    )


def open_network(name: str) -> UnfoldedNetwork:
    """Return the network called `name`; the same frozen object each time, until other weights lie there."""
    folder = find_network(name).resolve()
    return _opened(folder, str(read_header(folder).get("sha256")))


@lru_cache(maxsize=4)
def _opened(folder: Path, sha256: str) -> UnfoldedNetwork:
    return load_network(folder)


@lru_cache(maxsize=4)
def _fetched(name: str) -> Path:
    """Return where the hub's files of `name` lie; asked once per process."""
    return fetch(name, list(FILES))
