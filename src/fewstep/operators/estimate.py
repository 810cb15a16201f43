"""The noise level of a photograph, from the photograph alone."""

from __future__ import annotations

import torch
from torch import Tensor

_DB2 = (-0.1294095225512604, -0.2241438680420134, 0.8365163037378079, -0.4829629131445341)  # orthonormal high-pass
QUANTISATION = 1 / 255 / 12**0.5  # standard deviation of the rounding to 8 bits


def estimate_sigma(y: Tensor) -> Tensor:
    """Return the standard deviation of white noise in images (B, C, H, W) on the scale [0, 1], (B,).

    It is the median of the diagonal wavelet coefficients (Daubechies 2) over its value for a unit normal (Donoho and
    Johnstone 1994), averaged over the channels, and never below that of rounding to 8 bit. Fine texture raises it; noise
    that is not white misleads it.
    """
    if y.ndim != 4 or min(y.shape[-2:]) < 8:
        raise ValueError(
            f"the noise level is estimated of images (B, C, H, W) of 8 pixels or more, got {tuple(y.shape)}"
        )
    if not bool(torch.isfinite(y).all()):
        raise ValueError("the image holds NaN or infinite values")
    h = torch.tensor(_DB2, dtype=y.dtype, device=y.device)
    flat = y.reshape(-1, 1, *y.shape[-2:])
    diagonal = torch.nn.functional.conv2d(flat, torch.outer(h, h)[None, None], stride=2)
    sizes = diagonal.abs().flatten(1).median(1).values / 0.6744897501960817
    return sizes.reshape(y.shape[:2]).mean(1).clamp_min(QUANTISATION)
