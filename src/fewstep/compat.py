"""Workarounds for the environment, each switched on only where it is needed."""

from __future__ import annotations

import importlib.util
import sys

import torch

_DECLARED: list[torch.library.Library] = []  # a declaration lives as long as its Library object
_SCHEMAS = ("nms", "qnms")


def prepare_torchvision() -> bool:
    """Make `import torchvision` possible beside a torch that its compiled operators were not built for.

    torchvision registers shape functions for its operators while it is imported and dies with "operator torchvision::nms
    does not exist" where its C extension cannot be loaded. Declaring the schemas is enough: nothing here calls them.
    Call it before importing diffusers, deepinv, lpips or torchmetrics, all of which import torchvision.

    Returns:
        True if a declaration was made, now or before; False where torchvision is absent or works by itself.
    """
    if _DECLARED:
        return True
    if "torchvision" in sys.modules or importlib.util.find_spec("torchvision") is None or _operators_load():
        return False
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in _SCHEMAS:
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _DECLARED.append(library)
    return True


def _operators_load() -> bool:
    """Return whether torchvision's C extension can be loaded; loading it is what torchvision itself does first."""
    if hasattr(torch.ops.torchvision, "nms"):
        return True
    spec = importlib.util.find_spec("torchvision")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        machinery = importlib.machinery.FileFinder(
            folder, (importlib.machinery.ExtensionFileLoader, importlib.machinery.EXTENSION_SUFFIXES)
        )
        extension = machinery.find_spec("_C")
        if extension is None or extension.origin is None:
            continue
        try:
            torch.ops.load_library(extension.origin)
        except OSError:
            return False
    return hasattr(torch.ops.torchvision, "nms")
