"""Trained samplers by name: `load_sampler`, the counterpart of `load_prior`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fewstep.priors.unet import UNetDenoiser
from fewstep.unfolded.sampler import Unfolded
from fewstep.unfolded.store import find_network, load_network, save_network


def load_sampler(source: str | Path, steps: int = 3, *, prior: UNetDenoiser | None = None, **options: Any) -> Unfolded:
    """Return a trained sampler; `steps` times the network's K are the network calls of one sample.

    Args:
        source: name of a shipped one, a folder that the training or `save_sampler` wrote (a whole network or an adapter), or the id
            of such a folder on the Hugging Face hub, "owner/name": the only source that uses the network.
        steps: outer steps N.
        prior: the prior of an adapter; the one that its header names when absent.
        **options: further fields of `Unfolded`: eta, kernel, grid.

    Raises:
        ValueError: nothing is found under `source`, it is damaged or belongs to another prior, or an option is unknown.
    """
    network = load_network(find_network(str(source)), prior)
    try:
        return Unfolded(network, steps, **options)
    except TypeError as error:
        raise ValueError(f"{source}: {error}") from None


def save_sampler(sampler: Unfolded, folder: str | Path, **facts: Any) -> None:
    """Write the network of `sampler` to `folder` with a header and a model card, which `load_sampler` reads.

    Args:
        sampler: trained or not; its steps are not kept.
        folder: where to.
        **facts: for header and card, each optional: prior, recipe, data, command, licence.
    """
    save_network(sampler.network, folder, facts)
