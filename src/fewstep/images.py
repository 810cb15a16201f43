"""Photographs in and out: every kind of image file becomes one colour tensor in [0, 1], and back.

Grey files (modes 1, L, LA, I;16, F) are marked `grey` and held as three equal channels. They are restored as the luma of a
colour image (`fewstep.operators.grey`), and everything that is written of them is grey again.
"""

from __future__ import annotations

import io
import logging
import struct
import warnings
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from fewstep.core.files import write_bytes

logger = logging.getLogger(__name__)

SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".webp", ".npy", ".safetensors")
_GREY = ("1", "L", "LA", "La", "I", "I;16", "I;16B", "I;16L", "F")
_ALPHA = ("LA", "La", "RGBA", "RGBa", "PA")
DAMAGE = (  # what Pillow raises on files that are damaged, cut short or no images at all
    *(OSError, EOFError, SyntaxError, struct.error, zlib.error, LookupError, ArithmeticError),
    *(TypeError, ValueError, AttributeError, RuntimeError, AssertionError),
)
_GREY_NOTE = "grey: restored as the luma of a colour image; every output is grey"
_FURTHEST = (-8.0, 9.0)  # no noise of a standard deviation up to 1 carries a pixel of [0, 1] beyond these
_BITS_PER_SAMPLE = 258  # a tag of TIFF files
TOO_LARGE = (Image.DecompressionBombError, Image.DecompressionBombWarning)


@dataclass(frozen=True)
class Photo:
    """An image file as read.

    Attributes:
        x: pixels, (1, 3, H, W) float32; in [0, 1], except from .npy and .safetensors, which are kept as they are.
        path: the file.
        grey: the file has one channel; `x` holds it three times.
        jpeg: the file is a JPEG.
        notes: what was done to the pixels, one line each, for the report.
        profile: the ICC profile that says what the pixels mean as colours, None where there is none for them.
    """

    x: Tensor
    path: Path
    grey: bool = False
    jpeg: bool = False
    notes: tuple[str, ...] = ()
    profile: bytes | None = None


def load_image(path: str | Path) -> Tensor:
    """Return the pixels of an image file, (1, 3, H, W) float32 in [0, 1]; see `read_photo`."""
    return read_photo(path).x


def read_photo(path: str | Path) -> Photo:
    """Read an image, or an exact measurement from .npy or .safetensors.

    Grey files of 16 bits keep their depth, an EXIF orientation is applied, transparency is composited on white, CMYK and
    palettes are converted to colour. Arrays are (H, W) or (H, W, 3) for .npy, and ([1,] 3, H, W) for .safetensors: its
    tensor "y", or its only one. They are in [0, 1] units, and noise may carry them outside.

    Raises:
        ValueError: there is no such file, or it is no image that can be read; the message names path and cause.
    """
    path = Path(path)
    _check_file(path)
    if path.suffix.lower() in (".npy", ".safetensors"):
        return _read_array(path)
    return _from_pil(*_decoded(path), path)


def read_mask(path: str | Path) -> Tensor:
    """Return which pixels a black and white image marks as known, (H, W) bool: the white ones.

    Raises:
        ValueError: it cannot be read, or marks pixels by transparency or by colour.
    """
    try:
        with Image.open(path) as image:
            clear = image.mode in _ALPHA or "transparency" in image.info
            layers = torch.from_numpy(np.array(image.convert("L" if image.mode in _GREY and not clear else "RGBA")))
    except (*DAMAGE, *TOO_LARGE) as error:
        raise ValueError(f"{path} cannot be read as a mask ({error})") from None
    layers = layers if layers.ndim == 3 else layers[..., None].expand(-1, -1, 3)
    known = layers[..., :3] >= 128
    if bool((layers[..., 3:] < 255).any()) or not bool((known == known[..., :1]).all()):
        raise ValueError(
            f"the mask {path} is transparent or coloured: paint it opaque, white is known, black is missing"
        )
    return known[..., 0]


def save_image(x: Tensor, path: str | Path, *, grey: bool = False, profile: bytes | None = None) -> None:
    """Write an image as an 8-bit PNG, atomically; values are rounded and clipped to [0, 1].

    Args:
        x: ([1,] C, H, W) with C = 1 or 3, in [0, 1].
        path: where to.
        grey: write one channel, the mean over channels.
        profile: the ICC profile of the pixels.

    Raises:
        ValueError: another shape, or values that are not finite.
    """
    x = x.detach().cpu()
    x = x[0] if x.ndim == 4 and x.shape[0] == 1 else x
    if x.ndim != 3 or x.shape[0] not in (1, 3):
        raise ValueError(f"expected an image of shape ([1,] 1 or 3, H, W), got {tuple(x.shape)}")
    x = x.mean(0, keepdim=True) if grey else x
    if not bool(torch.isfinite(x).all()):
        raise ValueError(f"an image with NaN or infinite values cannot be written to {path}")
    pixels = (x.float().clamp(0, 1) * 255).round_().to(torch.uint8).permute(1, 2, 0).numpy()
    write_bytes(Path(path), png_bytes(pixels, profile))


def png_bytes(pixels: np.ndarray, profile: bytes | None = None) -> bytes:
    """Return 8-bit pixels, (H, W, 1 or 3), as a PNG file with the ICC profile `profile`."""
    buffer, image = io.BytesIO(), Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)
    image.save(buffer, "png", compress_level=4, icc_profile=profile)
    return buffer.getvalue()


def list_photos(folder: str | Path, suffixes: Sequence[str] = SUFFIXES) -> list[Path]:
    """Return the image files of a folder, under names of these endings, in sorted order; ValueError where there are none."""
    if not Path(folder).is_dir():
        raise ValueError(f"{folder} is not a folder")
    found = (p for p in Path(folder).iterdir() if p.suffix.lower() in suffixes and p.is_file())
    paths = sorted(p for p in found if not p.name.startswith("."))  # macOS writes "._x.png" beside x.png
    if not paths:
        raise ValueError(f"no images ({', '.join(suffixes)}) in {folder}")
    return paths


def _check_file(path: Path) -> None:
    if path.is_dir():
        raise ValueError(f"{path} is a folder, not an image")
    if not path.exists():
        raise ValueError(f"{path} does not exist")
    if path.stat().st_size == 0:
        raise ValueError(f"{path} is empty")


def _decoded(path: Path) -> tuple[Image.Image, Image.Image, int, bool]:
    """Return the first picture of a file, the same upright, how many there are, and whether it lay on its side.

    Raises:
        ValueError: Pillow cannot read it.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                count = getattr(image, "n_frames", 1)  # before the pixels: it may walk through the file
                lay = orientation_of(image) != 1  # before the pixels: Pillow turns those of TIFF files itself
                image.load()
                return image, ImageOps.exif_transpose(image), count, lay
    except UnidentifiedImageError:
        raise ValueError(f"{path} is not an image that can be read") from None
    except TOO_LARGE as error:
        raise ValueError(f"{path} is too large: {' '.join(str(error).split())}") from None
    except DAMAGE as error:
        raise ValueError(f"{path} is damaged or truncated ({' '.join(str(error).split())})") from None


def _from_pil(image: Image.Image, upright: Image.Image, count: int, lay: bool, path: Path) -> Photo:
    jpeg, grey, notes = image.format in {"JPEG", "MPO"}, image.mode in _GREY, []
    if image.format == "TIFF" and image.mode == "I":
        raise ValueError(
            f"{path} holds integers of 32 bits or with a sign, whose white is unknown; store 16 bits or floats"
        )
    clear = image.mode in _ALPHA or "transparency" in image.info
    if lay:
        notes.append("turned upright as its EXIF orientation says")
    if clear:
        notes.append("transparency was composited on white")
    if grey:
        notes.append(_GREY_NOTE)
    elif image.mode != "RGB" and not clear:
        notes.append(f"converted from {image.mode} to RGB")
    if not grey and _is_deep(image, path):
        notes.append("its 16 bits per channel were read as 8")
    if count > 1 and image.format != "MPO":
        notes.append(f"the first of its {count} pictures was taken")
    profile = _profile(image, grey)
    if image.info.get("icc_profile") and profile is None:
        notes.append(f"its colour profile was not kept: it is none of {'grey' if grey else 'RGB'} images")
    _log(path, notes)
    pixels = torch.from_numpy(_to_array(upright, path)).permute(2, 0, 1)[None]
    return Photo(pixels.expand(1, 3, -1, -1).contiguous(), path, grey, jpeg, tuple(notes), profile)


def _log(path: Path, notes: Iterable[str]) -> None:
    for note in notes:
        logger.info("%s: %s", path, note)


def _profile(image: Image.Image, grey: bool) -> bytes | None:
    """Return the ICC profile of an image where it is one of the pixels as they are written: grey, or RGB."""
    found = image.info.get("icc_profile")
    fits = isinstance(found, bytes) and found[36:40] == b"acsp" and found[16:20] == (b"GRAY" if grey else b"RGB ")
    return found if fits else None


def orientation_of(image: Image.Image) -> int:
    """Return the EXIF orientation of an image, 1 to 8; 1 where it says none that there is."""
    found: Any = image.getexif().get(0x0112)
    return int(found) if found in range(1, 9) else 1


def _is_deep(image: Image.Image, path: Path) -> bool:
    """Return whether a file is a PNG or TIFF of 16 bits per channel, of which Pillow keeps eight where it has colours."""
    if image.format == "TIFF":
        return max(getattr(image, "tag_v2", {}).get(_BITS_PER_SAMPLE, (8,))) > 8
    with path.open("rb") as file:
        head = file.read(25)
    return head.startswith(b"\x89PNG") and head[24:] == bytes([16])


def _to_array(image: Image.Image, path: Path) -> np.ndarray:
    """Return (H, W, 1 or 3) float32 in [0, 1]."""
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        return _deep(image, path)[..., None]
    if image.mode in _ALPHA or "transparency" in image.info:
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, (255, 255, 255, 255)), rgba).convert("RGB")
    mode = "L" if image.mode in ("1", "L") else "RGB"
    array = np.asarray(image.convert(mode), dtype=np.float32) / 255
    return array[..., None] if mode == "L" else array


def _deep(image: Image.Image, path: Path) -> np.ndarray:
    """Return (H, W): integers of 16 bits over 65535, the transparent one white; floats must already lie in [0, 1]."""
    array, mode = np.array(image, dtype=np.float32), image.mode
    scaled = array if mode == "F" else array / 65535
    if not np.isfinite(scaled).all():
        raise ValueError(f"{path} holds NaN or infinite values")
    if scaled.min() < 0 or scaled.max() > 1:
        kind = "floating-point values outside [0, 1]" if mode == "F" else "more than 16 bits per pixel"
        raise ValueError(f"{path} holds {kind}; rescale it")
    scaled[array == image.info.get("transparency")] = 1
    return scaled


def _read_array(path: Path) -> Photo:
    try:
        x = _load_npy(path) if path.suffix.lower() == ".npy" else _load_safetensors(path)
    except (OSError, EOFError) as error:
        raise ValueError(f"{path} is damaged or truncated ({error})") from None
    if x.ndim != 4 or x.shape[0] != 1 or x.shape[1] not in (1, 3) or x.numel() == 0:
        raise ValueError(f"{path} holds shape {tuple(x.shape)}, expected one image of 1 or 3 channels")
    if not bool(torch.isfinite(x).all()):
        raise ValueError(f"{path} holds NaN or infinite values")
    if not -1 < float(x.median()) < 2:  # noise may carry single values out, half of them are in other units
        raise ValueError(f"{path} holds values around {float(x.median()):.3g}, expected [0, 1]; rescale it")
    low, high = (float(end) for end in x.aminmax())
    if low < _FURTHEST[0] or high > _FURTHEST[1]:  # a picture in other units that is mostly dark
        raise ValueError(f"{path} holds values from {low:.3g} to {high:.3g}, expected [0, 1]; rescale it")
    grey = x.shape[1] == 1
    notes = (_GREY_NOTE,) if grey else ()
    _log(path, notes)
    return Photo(x.expand(1, 3, -1, -1).contiguous(), path, grey, notes=notes)


def _load_npy(path: Path) -> Tensor:
    try:
        array = np.load(path, allow_pickle=False)
    except ValueError as error:
        raise ValueError(f"{path} is no array that can be read ({error})") from None
    shaped = array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (1, 3))
    if (array.dtype.kind != "f" and array.dtype not in (np.uint8, np.uint16)) or not shaped:
        raise ValueError(
            f"{path} holds {array.dtype} of shape {array.shape}, expected floats in [0, 1], uint8 or uint16, (H, W) or (H, W, 3)"
        )
    scale = 1 if array.dtype.kind == "f" else np.iinfo(array.dtype).max
    x = torch.from_numpy(np.asarray(array, dtype=np.float32) / np.float32(scale))
    return (x[None] if x.ndim == 2 else x.permute(2, 0, 1))[None]


def _load_safetensors(path: Path) -> Tensor:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is no safetensors file that can be read ({error})") from None
    if "y" not in tensors and len(tensors) != 1:
        raise ValueError(f"{path} holds {sorted(tensors)}, expected one tensor or one called 'y'")
    x = tensors["y"] if "y" in tensors else next(iter(tensors.values()))
    if not x.is_floating_point() and x.dtype != torch.uint8:
        raise ValueError(f"{path} holds {x.dtype}, expected floats in [0, 1] or uint8")
    x = x.float() if x.is_floating_point() else x / 255
    return x[None] if x.ndim == 3 else x
