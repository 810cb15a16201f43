"""Trained samplers by name: `load_sampler`, the counterpart of `load_prior`."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

from fewstep.core.files import read_header, write_bytes
from fewstep.priors.unet import UNetDenoiser
from fewstep.unfolded.sampler import Unfolded, outer_steps
from fewstep.unfolded.store import CALIBRATION, FACTS, find_network, load_network, network_hash, save_network


def load_sampler(source: str | Path, steps: int = 3, *, prior: UNetDenoiser | None = None, **options: Any) -> Unfolded:
    """Return a trained sampler; `steps` times the network's K are the network calls of one sample.

    It has a denoiser of its own: of the prior of a problem only the schedule is used, the weights are not.

    Args:
        source: name of a shipped one, a folder that the training or `save_sampler` wrote (a whole network or an adapter), or the id
            of such a folder on the Hugging Face hub, "owner/name": the only source that uses the network.
        steps: outer steps N.
        prior: the prior of an adapter; the one that its header names when absent.
        **options: further fields of `Unfolded`: eta, kernel, grid; those that its header gives where absent.

    Raises:
        ValueError: nothing is found under `source`, it is damaged or belongs to another prior, or an option is unknown.
    """
    folder = find_network(str(source))
    network, header = load_network(folder, prior), read_header(folder)
    facts = {name: header[name] for name in FACTS if name in header} | {"sha256": network_hash(network)}
    try:
        return Unfolded(
            network, steps, **{**outer_steps(facts.get("outer", {})), **options}, folder=folder, facts=facts
        )
    except TypeError as error:
        raise ValueError(f"{source}: {error}") from None


def save_sampler(sampler: Unfolded, folder: str | Path, **facts: Any) -> None:
    """Write the network of `sampler` to `folder` with a header and a model card, which `load_sampler` reads.

    Weights that were loaded and not changed keep what their header says of them, and a whole network its calibrations.

    Args:
        sampler: trained or not; its eta, kernel and grid are kept, their number of steps is not.
        folder: where to.
        **facts: for header and card, each optional: prior, recipe, data, command, licence, and outer: what to load it with.

    Raises:
        TypeError: the sampler has no network.
    """
    if not isinstance(sampler, Unfolded):
        raise TypeError(f"{type(sampler).__name__} has no network to save; its settings are all there is")
    known = dict(sampler.facts)
    unchanged = known.pop("sha256", None) == (sha256 := network_hash(sampler.network))
    calibrations = _calibrations(sampler.folder, sha256)  # before `folder`, which may be the same, is written
    usual = {f.name: f.default for f in fields(Unfolded) if f.name in ("eta", "kernel", "grid")}
    outer = {name: getattr(sampler, name) for name, value in usual.items() if getattr(sampler, name) != value}
    kept = (known if unchanged else {}) | {"outer": outer}
    save_network(sampler.network, folder, {**{k: v for k, v in kept.items() if v}, **facts})
    if calibrations is not None:
        write_bytes(Path(folder) / CALIBRATION, calibrations)


def _calibrations(folder: Path | None, sha256: str) -> bytes | None:
    """Return the file of calibrations in `folder`, if it is of the network with this hash."""
    if folder is None or not (folder / CALIBRATION).is_file() or read_header(folder).get("sha256") != sha256:
        return None
    return (folder / CALIBRATION).read_bytes()
