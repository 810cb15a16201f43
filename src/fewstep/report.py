"""One HTML file that shows what was restored and how far it can be trusted: it needs no network and no other file."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from fewstep.core.reference import Reference
from fewstep.images import png_bytes

SHOWN = 1024  # longest side of a picture in the report, pixels
CROP = 96  # side of the zoomed crop, pixels
LEVELS = 255.0

_STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --paper: #ffffff; --soft: #f2f4f6; --line: #d0d7de; --faint: #57606a; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6edf3; --paper: #0f1318; --soft: #1a2027; --line: #30363d; --faint: #9aa4af; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 76rem; padding: 2rem 1.25rem 4rem; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, sans-serif; }
h1 { font-size: 1.6rem; margin: 0 0 .25rem; } h2 { font-size: 1.15rem; margin: 2.25rem 0 .75rem; }
.lead { color: var(--faint); margin: 0; }
.pictures { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 21rem), 1fr)); }
figure { margin: 0; } figure img { width: 100%; height: auto; display: block; border-radius: 4px; }
figure.plot img { background: #ffffff; padding: .25rem; }
figcaption { color: var(--faint); font-size: .9rem; padding-top: .35rem; }
table { border-collapse: collapse; width: 100%; } .scroll { overflow-x: auto; }
th, td { text-align: left; padding: .4rem .75rem .4rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
th { font-weight: 600; white-space: nowrap; width: 14rem; } td { font-variant-numeric: tabular-nums; word-break: break-word; }
pre { background: var(--soft); padding: .8rem 1rem; border-radius: 4px; overflow-x: auto; font-size: .88rem; }
.warn { border-left: 4px solid #bf8700; background: var(--soft); padding: .6rem 1rem; }
"""


@dataclass(frozen=True)
class Picture:
    """An image with its caption; `x` is (1, 1 or 3, H, W) in [0, 1]."""

    caption: str
    x: Tensor


@dataclass(frozen=True)
class Map:
    """A non-negative field with its caption; `x` is (H, W) in units of [0, 1] images."""

    caption: str
    x: Tensor


@dataclass(frozen=True)
class Report:
    """What the report shows.

    Attributes:
        title: the heading.
        lead: one line below it.
        pictures: the images, in order; those of the size of the first map also appear in the zoomed crop.
        maps: standard deviation, width of the interval; empty with one sample.
        table: names and values of the results.
        command: the line that reproduces the run.
        limit: what the method converges to.
        reference: its publication.
        warnings: lines that the reader must not miss.
        profile: the ICC profile of the pictures.
    """

    title: str
    lead: str
    pictures: Sequence[Picture]
    maps: Sequence[Map]
    table: Mapping[str, Any]
    command: str
    limit: str
    reference: Reference
    warnings: Sequence[str] = field(default_factory=tuple)
    profile: bytes | None = None


def render(report: Report) -> str:
    """Return the report as one self-contained HTML page."""
    parts = [
        "<h2>Images</h2>" + html_gallery([_picture(p, report.profile) for p in report.pictures]),
        _uncertainty(report),
        "<h2>Results</h2>" + html_table(report.table),
        f"<h2>What these samples are</h2><p>{escape(report.limit)}</p>",
        f"<h2>Reproduce</h2><pre>{escape(report.command)}</pre>",
        f"<h2>Method</h2><p>{escape(str(report.reference))}</p><pre>{escape(report.reference.bibtex())}</pre>",
    ]
    return page(report.title, report.lead, report.warnings, parts)


def page(title: str, lead: str, warnings: Sequence[str], parts: Sequence[str]) -> str:
    """Return a self-contained HTML page: a heading, a line below it, lines that must not be missed, and `parts` as they are."""
    head = (
        "<!doctype html><html lang='en'><head><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>"
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head>"
    )
    top = f"<h1>{escape(title)}</h1><p class='lead'>{escape(lead)}</p>"
    warned = "".join(f"<p class='warn'>{escape(line)}</p>" for line in warnings)
    return f"{head}<body>{top}{warned}{''.join(parts)}</body></html>\n"


def shrink(x: Tensor) -> Tensor:
    """Return (1, C, H, W) averaged down so that no side exceeds `SHOWN`; smaller images are kept."""
    height, width = x.shape[-2:]
    scale = SHOWN / max(height, width)
    if scale >= 1:
        return x
    size = max(1, round(height * scale)), max(1, round(width * scale))
    return F.interpolate(x.float(), size=size, mode="area")


def busiest(field: Tensor) -> tuple[slice, slice]:
    """Return the rows and columns of the square of (at most) `CROP` pixels where the mean of `field`, (H, W), is largest."""
    height, width = (min(CROP, n) for n in field.shape)
    stride = CROP // 8
    beyond = [(size - n) % stride for n, size in zip(field.shape, (height, width), strict=True)]
    padded = F.pad(field[None, None].float(), (0, beyond[1], 0, beyond[0]))  # or squares would miss the last few pixels
    means = F.avg_pool2d(padded, (height, width), stride)[0, 0]
    row, column = divmod(int(means.argmax()), means.shape[1])
    top, left = min(row * stride, field.shape[0] - height), min(column * stride, field.shape[1] - width)
    return slice(top, top + height), slice(left, left + width)


def map_figure(item: Map) -> bytes:
    """Return a PNG of a map with a colour bar in grey levels (of 255)."""
    from matplotlib.figure import Figure

    values = shrink(item.x[None, None])[0, 0].cpu().numpy() * LEVELS
    height, width = values.shape
    figure = Figure(figsize=(6.4, min(12.0, max(2.0, 5.4 * height / width))), layout="constrained")
    axes = figure.add_subplot()
    top = max(float(np.quantile(values, 0.999)), 1e-6)
    drawn = axes.imshow(values, cmap="viridis", vmin=0, vmax=top, interpolation="nearest")
    axes.set_axis_off()
    figure.colorbar(drawn, ax=axes, label="grey levels (of 255)", shrink=0.9)
    return figure_png(figure)


def crop_figure(pictures: Sequence[Picture], maps: Sequence[Map]) -> bytes:
    """Return a PNG that compares the pictures where the first map is largest, pixel by pixel."""
    from matplotlib.figure import Figure

    rows, columns = busiest(maps[0].x)
    alike = [p for p in pictures if p.x.shape[-2:] == maps[0].x.shape]
    per_row = min(5, len(alike) + 1)
    lines = -(-(len(alike) + 1) // per_row)
    figure = Figure(figsize=(2.6 * per_row, 2.8 * lines), layout="constrained")
    for number, picture in enumerate(alike):
        axes = figure.add_subplot(lines, per_row, number + 1)
        crop = picture.x[0, :, rows, columns].clamp(0, 1).expand(3, -1, -1).permute(1, 2, 0)
        axes.imshow(crop.cpu().numpy(), interpolation="nearest")
        axes.set_title(_short(picture.caption), fontsize=9)
        axes.set_axis_off()
    axes = figure.add_subplot(lines, per_row, len(alike) + 1)
    axes.imshow(maps[0].x[rows, columns].cpu().numpy(), cmap="viridis", vmin=0, interpolation="nearest")
    axes.set_title(_short(maps[0].caption), fontsize=9)
    axes.set_axis_off()
    return figure_png(figure)


def _uncertainty(report: Report) -> str:
    if not report.maps:
        return "<h2>Uncertainty</h2><p>One sample says nothing about uncertainty; draw at least two.</p>"
    maps = [html_figure(map_figure(m), m.caption, "plot") for m in report.maps]
    crop = html_figure(
        crop_figure(report.pictures, report.maps), "Where the samples differ most, pixel by pixel", "plot"
    )
    return f"<h2>Uncertainty</h2>{html_gallery(maps)}<h2>Detail</h2>{crop}"


def _picture(picture: Picture, profile: bytes | None) -> str:
    pixels = (shrink(picture.x)[0].clamp(0, 1) * LEVELS).round().to(torch.uint8).permute(1, 2, 0).cpu().numpy()
    return html_figure(png_bytes(pixels, profile), picture.caption)


def html_figure(png: bytes, caption: str, kind: str = "picture") -> str:
    """Return a PNG with its caption; `kind` is "picture", or "plot" for what needs a white ground."""
    data, text = base64.b64encode(png).decode(), escape(caption)
    return (
        f"<figure class='{kind}'><img alt='{escape(caption, quote=True)}' src='data:image/png;base64,{data}'>"
        f"<figcaption>{text}</figcaption></figure>"
    )


def html_gallery(figures: Sequence[str]) -> str:
    """Return figures side by side."""
    return f"<div class='pictures'>{''.join(figures)}</div>"


def html_table(rows: Mapping[str, Any]) -> str:
    """Return a table of names and values."""
    cells = "".join(f"<tr><th>{escape(str(k))}</th><td>{escape(_text(v))}</td></tr>" for k, v in rows.items())
    return f"<div class='scroll'><table>{cells}</table></div>"


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, Mapping):
        return ", ".join(f"{k} = {_text(v)}" for k, v in value.items())
    return str(value)


def _short(caption: str) -> str:
    return caption.split(":")[0].split(",")[0]


def figure_png(figure: Any) -> bytes:
    """Return a matplotlib figure as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)
    return buffer.getvalue()
