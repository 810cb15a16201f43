r"""Photographs of any size: the network runs in overlapping windows, everything else stays global.

With windows W_i and smooth weights w_i >= 0 that sum to one at every pixel, the denoiser of the whole image is

    D(x)|_p = sum_i w_i(p) D_i(x|_{W_i})(p),

so x_t, the likelihood and the noise never know of windows and there are no seams. The gradient is the exact gradient of
this sum; it recomputes one batch of windows at a time, so memory is that of a batch however large the image.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fewstep.core.denoiser import Denoiser


class Window(NamedTuple):
    """A rectangle of an image, the item it belongs to and its number downwards and to the right."""

    item: int
    down: int
    right: int
    rows: slice
    columns: slice


class Windowed(Denoiser):
    """A denoiser of images of any size, made of one that sees at most `size` x `size` pixels at once.

    Images of at most `size`^2 pixels pass through unchanged. Gradients flow to x_t, not to the parameters.

    Args:
        denoiser: the prior; must take any height and width.
        size: side of a window, pixels.
        overlap: the least number of pixels that neighbouring windows share.
        batch: windows that go through the network at once.
    """

    def __init__(self, denoiser: Denoiser, size: int = 512, overlap: int = 64, batch: int = 1) -> None:
        super().__init__()
        if size < 1 or not 0 <= overlap < size or batch < 1:
            raise ValueError(f"windows need 0 <= overlap < size and batch >= 1, got {overlap}, {size}, {batch}")
        if len(denoiser.event_shape) != 3 or any(n is not None for n in denoiser.event_shape[1:]):
            raise ValueError(f"windows need a prior of any image size, this one takes {denoiser.event_shape}")
        self.denoiser, self.size, self.overlap, self.batch = denoiser, size, overlap, batch
        self.schedule, self.event_shape = denoiser.schedule, denoiser.event_shape

    def forward(self, x_t: Tensor, t: Tensor, *, context: Tensor | None = None, **cond: Any) -> Tensor:
        """See `Denoiser`; x_t is (N, C, H, W) and `context`, for a network that takes one, (N, C', H, W)."""
        beside = {} if context is None else {"context": context}
        if x_t.shape[-2] * x_t.shape[-1] <= self.size**2:
            return self.denoiser(x_t, t, **beside, **cond)
        if cond:
            raise ValueError(f"a prior in windows takes no condition, got {sorted(cond)}")
        t = torch.as_tensor(t, dtype=x_t.dtype, device=x_t.device)
        return _InWindows.apply(x_t if context is None else torch.cat([x_t, context], 1), t, self)

    def call(self, seen: Tensor, t: Tensor) -> Tensor:
        """Return the denoiser's result on pieces of x_t and, in further channels, of the context, (N, C + C', h, w)."""
        channels = self.event_shape[0]
        x_t, context = seen[:, :channels], seen[:, channels:]
        return self.denoiser(x_t, t, **({"context": context} if context.shape[1] else {}))

    def around(self, other: Denoiser) -> Windowed:
        """See `Denoiser`; in windows of the same size."""
        return Windowed(other, self.size, self.overlap, self.batch)

    def batches(self, shape: torch.Size) -> Iterator[list[Window]]:
        """Return the windows of images of shape (N, C, H, W), in batches of equal window shapes."""
        height, width = (min(self.size, side) for side in shape[-2:])
        places = [
            Window(item, down, right, slice(top, top + height), slice(left, left + width))
            for item in range(shape[0])
            for down, top in enumerate(starts(shape[-2], self.size, self.overlap))
            for right, left in enumerate(starts(shape[-1], self.size, self.overlap))
        ]
        for first in range(0, len(places), self.batch):
            yield places[first : first + self.batch]

    def weights(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the weights of the windows along the height and along the width, (n, H) and (m, W)."""
        vertical, horizontal = (partition(side, self.size, self.overlap).to(x) for side in x.shape[-2:])
        return vertical, horizontal


class _InWindows(torch.autograd.Function):
    """The weighted sum over windows; backward recomputes each batch of windows."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, t: Tensor, windowed: Windowed) -> Tensor:
        ctx.save_for_backward(x, t)
        ctx.windowed = windowed
        out = torch.zeros_like(x[:, : windowed.event_shape[0]])
        tables = windowed.weights(x)
        for windows in windowed.batches(x.shape):
            pieces = windowed.call(_cut(x, windows), _times(t, windows))
            for piece, window in zip(pieces, windows, strict=True):
                out[window.item, :, window.rows, window.columns] += piece * _weight(tables, window)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        x, t = ctx.saved_tensors
        windowed: Windowed = ctx.windowed
        out = torch.zeros_like(x)
        tables = windowed.weights(x)
        for windows in windowed.batches(x.shape):
            seeds = [grad[w.item, :, w.rows, w.columns] * _weight(tables, w) for w in windows]
            with torch.enable_grad():
                leaf = _cut(x, windows).requires_grad_()
                pieces = windowed.call(leaf, _times(t, windows))
            pulled = torch.autograd.grad(pieces, leaf, torch.stack(seeds))[0]
            for piece, window in zip(pulled, windows, strict=True):
                out[window.item, :, window.rows, window.columns] += piece
        return out, None, None


def starts(length: int, size: int, overlap: int) -> list[int]:
    """Return the first pixels of evenly spread windows that cover `length` and share at least `overlap` pixels."""
    if length <= size:
        return [0]
    count = math.ceil((length - overlap) / (size - overlap))
    return [round(i * (length - size) / (count - 1)) for i in range(count)]


def partition(length: int, size: int, overlap: int) -> Tensor:
    """Return smooth weights of the windows along one axis that sum to one at every pixel, (n, length) float64."""
    first, size = starts(length, size, overlap), min(size, length)
    inside = torch.arange(size, dtype=torch.float64) + 0.5
    ramp = torch.minimum(inside, size - inside).clamp(max=max(overlap, 1)) / max(overlap, 1)
    bump = torch.sin(0.5 * math.pi * ramp).square()
    weights = torch.zeros(len(first), length, dtype=torch.float64)
    for row, start in zip(weights, first, strict=True):
        row[start : start + size] = bump
    return weights / weights.sum(0)


def _cut(x: Tensor, windows: list[Window]) -> Tensor:
    return torch.stack([x[w.item, :, w.rows, w.columns] for w in windows])


def _times(t: Tensor, windows: list[Window]) -> Tensor:
    return t if t.numel() == 1 else t[[w.item for w in windows]]


def _weight(tables: tuple[Tensor, Tensor], window: Window) -> Tensor:
    """Return the weight of one window at its pixels, (h, w)."""
    vertical, horizontal = tables
    return vertical[window.down, window.rows][:, None] * horizontal[window.right, window.columns]
