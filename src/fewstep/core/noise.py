"""Randomness with one stream per item, so that a sample never depends on its neighbours in the batch.

Numbers are drawn on the CPU and moved, so a seed gives the same sample on every device. A generator costs microseconds per
call: small events are served from a block of normals per item, drawn at once, which makes thousands of low-dimensional
items cheap. The block depends on what the item itself asked for, never on the batch.
"""

from __future__ import annotations

import copy
import math
import operator
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar, cast

import numpy as np
import torch
from torch import Tensor

from fewstep.core.batch import like

T = TypeVar("T")

_BLOCK = 2048  # normals per item that are drawn at once for small events


class Noise:
    """Independent standard normal and uniform streams, one per seed.

    Args:
        seeds: one integer per item.
        dtype: dtype of what is drawn.
        device: device of what is drawn.
    """

    def __init__(
        self, seeds: Sequence[int], dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
    ) -> None:
        self.seeds, self.dtype, self.device = tuple(int(s) for s in seeds), dtype, torch.device(device)
        if not self.seeds:
            raise ValueError("Noise needs at least one seed")
        self._generators = [torch.Generator().manual_seed(s & (2**63 - 1)) for s in self.seeds]
        self._block, self._ahead = torch.empty(len(self.seeds), 0, dtype=dtype), _BLOCK

    @classmethod
    def spawn(
        cls,
        seeds: Sequence[int],
        samples: range,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> Noise:
        """Return streams for sample k of measurement b at item (k, b), derived from (seeds[b], k) alone."""
        return cls([mix(seed, k) for k in samples for seed in seeds], dtype, device)

    def __len__(self) -> int:
        return len(self.seeds)

    def expand(self, k: int) -> Noise:
        """Return new streams for k samples of each item, sample j of item b at j B + b, from the seed of the item and j alone."""
        return self.spawn(self.seeds, range(k), self.dtype, self.device)

    def part(self, items: Sequence[int]) -> Noise:
        """Return the streams of some items: what they give is gone from here too."""
        twin = copy.copy(self)
        twin.seeds, twin._generators = tuple(self.seeds[i] for i in items), [self._generators[i] for i in items]
        twin._ahead = 0  # numbers drawn ahead stay with the whole, and a part draws none
        return twin

    def randn(self, *shape: int) -> Tensor:
        """Return standard normals, (N, *shape)."""
        size = math.prod(shape)
        if size * 4 > self._ahead:
            out = torch.stack(
                [torch.randn(shape, generator=g, dtype=self.dtype, device=g.device) for g in self._generators]
            )
            return out.to(self.device)
        if self._block.shape[1] < size:
            self._block = torch.stack(
                [torch.randn(_BLOCK, generator=g, dtype=self.dtype, device=g.device) for g in self._generators]
            )
        out, self._block = self._block[:, :size], self._block[:, size:]
        return out.reshape(-1, *shape).to(self.device)

    def randn_like(self, x: Tensor) -> Tensor:
        """Return standard normals of the shape of `x`, (N, *event)."""
        if x.shape[0] != len(self):
            raise ValueError(f"{len(self)} streams cannot serve a batch of {x.shape[0]}")
        if not x.is_complex():
            return self.randn(*x.shape[1:])
        return torch.complex(self.randn(*x.shape[1:]), self.randn(*x.shape[1:]))

    def rand(self, *shape: int) -> Tensor:
        """Return uniforms in [0, 1), (N, *shape)."""
        return torch.stack(
            [torch.rand(shape, generator=g, dtype=self.dtype, device=g.device) for g in self._generators]
        ).to(self.device)


class Antithetic(Noise):
    """`Noise` in pairs: the second of two streams gives the negatives of the first's normals, and its uniforms mirrored.

    Each stream by itself has the law that it has without; what falls to both cancels in their mean, as far as a sampler is
    linear in its noise (Hammersley and Morton 1956).

    Args:
        seeds: one integer per item, the same for both of a pair.
        mirrored: which items are the second of their pair.
        dtype: dtype of what is drawn.
        device: device of what is drawn.
    """

    def __init__(
        self,
        seeds: Sequence[int],
        mirrored: Sequence[bool],
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__(seeds, dtype, device)
        self._signs = torch.tensor([-1 if m else 1 for m in mirrored], device=self.device)

    @classmethod
    def spawn(
        cls,
        seeds: Sequence[int],
        samples: range,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> Noise:
        """See `Noise`; samples 2 j and 2 j + 1 are a pair, of which the first has the noise of sample j there."""
        items = [(k, seed) for k in samples for seed in seeds]
        return cls([mix(seed, k // 2) for k, seed in items], [k % 2 == 1 for k, _ in items], dtype, device)

    def expand(self, k: int) -> Noise:
        """See `Noise`; the pairs stay."""
        seeds = [mix(seed, j) for j in range(k) for seed in self.seeds]
        return type(self)(seeds, (self._signs < 0).tolist() * k, self.dtype, self.device)

    def part(self, items: Sequence[int]) -> Noise:
        """See `Noise`."""
        twin = cast(Antithetic, super().part(items))
        twin._signs = self._signs[list(items)]
        return twin

    def randn(self, *shape: int) -> Tensor:
        """See `Noise`."""
        drawn = super().randn(*shape)
        return like(self._signs, drawn) * drawn

    def rand(self, *shape: int) -> Tensor:
        """See `Noise`."""
        drawn = super().rand(*shape)
        below_one = 1 - torch.finfo(self.dtype).eps / 2
        return torch.where(like(self._signs, drawn) < 0, (1 - drawn).clamp_max(below_one), drawn)


def mix(*words: int) -> int:
    """Hash integers into a 63-bit seed with numpy's SeedSequence, so that near seeds give unrelated streams.

    To it zeros at the end are nothing: `mix(5, 0)` is `mix(5)`. What must differ takes another word than 0 there. And a word
    from 2^32 on is two, the lower half first: `mix(5 + 7 * 2**32)` is `mix(5, 7)`. Words below that never meet so.
    """
    state = np.random.SeedSequence([w & (2**64 - 1) for w in words]).generate_state(1, np.uint64)[0]
    return int(state) >> 1


def seeds_of(seed: int | Sequence[int] | np.ndarray | Tensor, batch: int) -> tuple[int, ...]:
    """Return one seed per measurement, (batch), from an integer for all or integers, one for each.

    Raises:
        TypeError: no integers.
        ValueError: another number of them.
    """
    given = seed.tolist() if isinstance(seed, np.ndarray | Tensor) else seed
    each = tuple(given) if isinstance(given, Iterable) else (given,) * batch
    try:
        seeds = tuple(operator.index(s) for s in each)
    except TypeError:
        raise TypeError(f"a seed must be an integer, or one for each measurement, got {seed!r}") from None
    if len(seeds) != batch:
        raise ValueError(f"{len(seeds)} seeds for {batch} measurements")
    return seeds


def seeded(build: Callable[[], T], seed: int) -> T:
    """Return what `build` returns with the CPU's global generator at `seed`, and leave that where it was."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed every device
        return build()


class Streams(Noise):
    """`Noise` for many small items: what item k gets depends on (seed, k) and on what was asked before, not on the others.

    Items are served in fixed blocks by numpy's generators, whose first rows do not depend on how many follow, so that a
    hundred thousand items cost no more than their numbers.

    Args:
        seed: one integer for all.
        items: which items, a range that starts at a multiple of `Streams.SIZE`.
        dtype: dtype of what is drawn.
        device: device of what is drawn.
    """

    SIZE = 1024

    def __init__(
        self, seed: int, items: range, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
    ) -> None:
        if not len(items) or items.start % self.SIZE or items.step != 1:
            raise ValueError(f"items must be a range that starts at a multiple of {self.SIZE}, got {items}")
        self.dtype, self.device, self._calls = dtype, torch.device(device), 0
        firsts, word = range(items.start, items.stop, self.SIZE), seed & (2**64 - 1)
        # what the generator of each block starts from, and how many items it serves
        self._blocks = [((word, first // self.SIZE), min(self.SIZE, items.stop - first)) for first in firsts]

    def __len__(self) -> int:
        return sum(rows for _, rows in self._blocks)

    def expand(self, k: int) -> Noise:
        """See `Noise`."""
        twin = copy.copy(self)
        twin._blocks = [((mix(word, j), block), rows) for j in range(k) for (word, block), rows in self._blocks]
        twin._calls = 0
        return twin

    def part(self, items: Sequence[int]) -> Noise:
        """Not offered: blocks cannot be taken apart."""
        raise NotImplementedError("Streams cannot be split; make one per chunk")

    def randn(self, *shape: int) -> Tensor:
        """See `Noise`."""
        return self._draw(lambda g, rows: g.standard_normal((rows, *shape)))

    def rand(self, *shape: int) -> Tensor:
        """See `Noise`."""
        drawn = self._draw(lambda g, rows: g.random((rows, *shape)))
        return drawn.clamp_max_(1 - torch.finfo(self.dtype).eps / 2)  # doubles just below 1 may be rounded up to it

    def _draw(self, numbers: Callable[[np.random.Generator, int], np.ndarray]) -> Tensor:
        """Return the next numbers of every item, each call from generators of its own."""
        drawn = [numbers(np.random.default_rng([*words, self._calls]), rows) for words, rows in self._blocks]
        self._calls += 1
        return torch.from_numpy(np.concatenate(drawn)).to(self.device, self.dtype)
