"""Trained samplers by name: `load_sampler`, the counterpart of `load_prior`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fewstep.core.files import read_header, write_bytes
from fewstep.priors.unet import UNetDenoiser
from fewstep.unfolded.sampler import Unfolded
from fewstep.unfolded.store import CALIBRATION, FACTS, find_network, load_network, save_network


def load_sampler(source: str | Path, steps: int = 3, *, prior: UNetDenoiser | None = None, **options: Any) -> Unfolded:
    """Return a trained sampler; `steps` times the network's K are the network calls of one sample.

    It has a denoiser of its own: of the prior of a problem only the schedule is used, the weights are not.

    Args:
        source: name of a shipped one, a folder that the training or `save_sampler` wrote (a whole network or an adapter), or the id
            of such a folder on the Hugging Face hub, "owner/name": the only source that uses the network.
        steps: outer steps N.
        prior: the prior of an adapter; the one that its header names when absent.
        **options: further fields of `Unfolded`: eta, kernel, grid.

    Raises:
        ValueError: nothing is found under `source`, it is damaged or belongs to another prior, or an option is unknown.
    """
    folder = find_network(str(source))
    network = load_network(folder, prior)
    try:
        return Unfolded(network, steps, **options, folder=folder)
    except TypeError as error:
        raise ValueError(f"{source}: {error}") from None


def save_sampler(sampler: Unfolded, folder: str | Path, **facts: Any) -> None:
    """Write the network of `sampler` to `folder` with a header and a model card, which `load_sampler` reads.

    Weights that were loaded and not changed keep what their header says of them, and their calibrations.

    Args:
        sampler: trained or not; its steps are not kept.
        folder: where to.
        **facts: for header and card, each optional: prior, recipe, data, command, licence.

    Raises:
        TypeError: the sampler has no network.
    """
    if not isinstance(sampler, Unfolded):
        raise TypeError(f"{type(sampler).__name__} has no network to save; its settings are all there is")
    save_network(sampler.network, folder, facts)
    source = {} if sampler.folder is None else read_header(sampler.folder)
    if sampler.folder is not None and source.get("sha256") == read_header(folder)["sha256"]:
        save_network(sampler.network, folder, {name: source[name] for name in FACTS if name in source} | facts)
        if (calibrations := sampler.folder / CALIBRATION).is_file():
            write_bytes(Path(folder) / CALIBRATION, calibrations.read_bytes())
