"""Devices by name, and their names."""

from __future__ import annotations

import torch


def pick_device(name: str | None) -> torch.device:
    """Return the device called `name`, a GPU where None and there is one; ValueError where it is not there."""
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        probe = torch.zeros((), device=name)
        probe.item()  # a device without data, "meta", has none
        return probe.device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {name!r} cannot be used: {str(error).splitlines()[0]}") from None


def device_name(device: torch.device) -> str:
    """Return the device in words."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
