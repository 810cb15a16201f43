"""Tile the outputs of a restoration into the README's picture: `make demo && python docs/make_picture.py restored/demo`."""

from __future__ import annotations

import sys
from pathlib import Path

from PIL import Image

PANELS = ("measurement.png", "mean.png", "sample-00.png", "std.png")
GAP = 6  # pixels between panels


def tile(folder: Path) -> Image.Image:
    """Return the panels side by side, all at the size of the mean."""
    images = [Image.open(folder / name).convert("RGB") for name in PANELS]
    width, height = images[1].size
    sheet = Image.new("RGB", (len(images) * (width + GAP) - GAP, height), "white")
    for i, image in enumerate(images):
        sheet.paste(image.resize((width, height)), (i * (width + GAP), 0))
    return sheet


if __name__ == "__main__":
    target = Path(__file__).parent / "images" / "restored.png"
    target.parent.mkdir(exist_ok=True)
    tile(Path(sys.argv[1])).save(target, optimize=True)
