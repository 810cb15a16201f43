"""The exact finite-step law of a sampler on a Gaussian problem, without a second implementation.

With a Gaussian prior and a linear-Gaussian likelihood each step of most samplers is an affine map of the state and of fresh
noise. Probing the very code that ships by unit vectors gives s' = F s + G n + c, hence mean' = F mean + c and
cov' = F cov F' + G G': the law of the output, free of Monte-Carlo error. The state is whatever tensors the sampler carries.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fewstep.core.problem import Posterior
from fewstep.core.sampler import Sampler, State
from fewstep.testing.law import GaussianLaw, ScriptedNoise

Stage = Callable[[Tensor, ScriptedNoise], State]  # states as rows and noise -> the next state


class _Flat:
    """States as matrices, (N, S): the tensors of a state side by side; None stays None."""

    def __init__(self, state: Any) -> None:
        leaves, self.spec = pytree.tree_flatten(state)
        numbers = (
            isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.ndim > 1
            for leaf in leaves
            if leaf is not None
        )
        if not all(numbers):
            raise TypeError("the sampler carries more than tensors of numbers from step to step")
        self.shapes = [None if leaf is None else leaf.shape[1:] for leaf in leaves]

    def pack(self, state: Any) -> Tensor:
        return torch.cat([leaf.flatten(1) for leaf in pytree.tree_leaves(state) if leaf is not None], 1)

    def unpack(self, rows: Tensor) -> Any:
        parts = iter(rows.split([shape.numel() for shape in self.shapes if shape is not None], 1))
        leaves = [None if shape is None else next(parts).reshape(-1, *shape) for shape in self.shapes]
        return pytree.tree_unflatten(leaves, self.spec)


class _Law(NamedTuple):
    """Law of the flattened state, and what the state looks like."""

    mean: Tensor
    cov: Tensor
    flat: _Flat


def finite_step_law(sampler: Sampler, problem: Posterior) -> GaussianLaw:
    """Return the law of the output for a problem with one measurement, exact if every step is affine in state and noise.

    Raises:
        TypeError: the sampler draws uniform numbers, or carries something other than tensors.
    """
    expanded: dict[int, Posterior] = {}

    def items(n: int) -> Posterior:
        if n not in expanded:
            expanded[n] = problem.expand(n)
        return expanded[n]

    def first(rows: Tensor, noise: ScriptedNoise) -> State:
        state = sampler.init(items(len(rows)), noise)
        # a start that does not depend on the noise may come as one row
        return pytree.tree_map(lambda leaf: None if leaf is None else leaf.expand(len(rows), *leaf.shape[1:]), state)

    dtype = problem.likelihood.dtype
    nothing = torch.zeros(1, 0, dtype=dtype)
    flat = _Flat(first(nothing, ScriptedNoise(nothing)))
    with torch.no_grad():
        law, width = _advance(first, _Law(nothing[0], nothing.T @ nothing, flat), 0)
        for k in range(sampler.steps):

            def step(rows: Tensor, noise: ScriptedNoise, k: int = k, flat: _Flat = law.flat) -> State:
                return sampler.step(items(len(rows)), flat.unpack(rows), k, noise)

            law, width = _advance(step, law, width)
        law, _ = _advance(lambda rows, _: State(sampler.output(law.flat.unpack(rows))), law, 0)
    return GaussianLaw(law.mean, law.cov)


def _advance(stage: Stage, law: _Law, width: int) -> tuple[_Law, int]:
    """Return the law after a stage that draws about `width` numbers per item, and how many it drew.

    Row 0 is the mean without noise; then come unit changes of the state and of the noise.
    """
    size, dtype = len(law.mean), law.mean.dtype
    changes = torch.cat([torch.zeros(1, size, dtype=dtype), torch.eye(size, dtype=dtype)])
    rows = torch.cat([law.mean + changes, law.mean.expand(width, -1)])
    script = torch.zeros(len(rows), width, dtype=dtype)
    script[1 + size :] = torch.eye(width, dtype=dtype)
    noise = ScriptedNoise(script)
    state = stage(rows, noise)
    if noise.used > width:
        return _advance(stage, law, noise.used)
    flat = _Flat(state)
    out = flat.pack(state)
    by_state, by_noise = (out[1:] - out[0]).split([size, width])
    return _Law(out[0], by_state.T @ law.cov @ by_state + by_noise.T @ by_noise, flat), noise.used
