r"""The equivariant bootstrap: how far a reconstruction moves when it is itself measured and reconstructed again.

Tachella and Pereyra 2023, arXiv:2310.11838: with a reconstruction x of y and transforms T_g that leave images as likely as
they were,

    x_g = T_g^-1 S(y_g),    y_g ~ p(y | T_g x),

and the spread of x_g - x stands for the error x - truth. Without transforms it is the parametric bootstrap, which cannot see what
the operator does not: T_g brings unobserved content to where it is observed. It serves point estimators, whose samples have no
spread. With a sampler as S and one sample as x the x_g are no draws of p(x | y): in a Gaussian problem with prior covariance P,
gain K and posterior covariance C they have, given x, mean T^-1 (m + K A (T x - m)) and covariance T^-1 (C + sigma^2 K K') T^-t.
Calibrate their intervals like those of samples (`Calibration`).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from fewstep.core.batch import like
from fewstep.core.likelihood import Likelihood
from fewstep.core.noise import Noise, mix
from fewstep.core.problem import Posterior
from fewstep.core.sampler import Sampler
from fewstep.core.samples import Samples

Map = Callable[[Tensor], Tensor]
Measure = Callable[[Tensor, int], Likelihood]  # images (B, *event) and a seed -> the likelihood of a new measurement


class Transform(NamedTuple):
    """An invertible map of images, (B, C, H, W) -> the same, and its inverse."""

    apply: Map
    undo: Map


def equivariant_bootstrap(
    sampler: Sampler,
    problem: Posterior,
    transforms: Sequence[Transform],
    *,
    num: int = 50,
    seed: int = 0,
    measure: Measure | None = None,
) -> Samples:
    """Return `num` reconstructions of new measurements of one sample, each seen through a transform drawn at random.

    Args:
        sampler: S; it draws the starting sample too.
        problem: prior and likelihood of B measurements.
        transforms: T_g; one that does nothing gives the parametric bootstrap.
        num: replicates, one sampler run of B items each.
        seed: replicate j depends on it, on j and on its measurement alone.
        measure: simulates a measurement; from a Gaussian likelihood itself where absent. Give it where an operator's
            noise is not white, e.g. confined to the observed pixels of a mask.

    Raises:
        ValueError: no transforms or no replicates.
        TypeError: the likelihood is not Gaussian and there is no `measure`.
    """
    if not transforms or num < 1:
        raise ValueError(f"need at least one transform and one replicate, got {len(transforms)} and {num}")
    simulate = measure or _remeasure(problem)
    start = sampler(problem, seed=seed).x[0]
    runs = []
    for j in range(num):
        transform = transforms[mix(seed, j, 0) % len(transforms)]
        again = replace(problem, likelihood=simulate(transform.apply(start), mix(seed, j, 1)))
        run = sampler(again, seed=mix(seed, j, 2))
        runs.append(replace(run, x=transform.undo(run.x[0])[None], first=j))
    return replace(Samples.concatenate(runs), method=f"equivariant_bootstrap({sampler!r})", seeds=(seed,) * len(start))


def shift(rows: int, columns: int) -> Transform:
    """Return a circular shift."""
    return Transform(
        lambda x: x.roll((rows, columns), (-2, -1)),
        lambda x: x.roll((-rows, -columns), (-2, -1)),
    )


def flip(axis: int = -1) -> Transform:
    """Return a mirror image, left and right exchanged by default."""
    return Transform(lambda x: x.flip(axis), lambda x: x.flip(axis))


def quarter_turn(turns: int = 1) -> Transform:
    """Return a rotation by `turns` times 90 degrees, for square images."""
    return Transform(lambda x: x.rot90(turns, (-2, -1)), lambda x: x.rot90(-turns, (-2, -1)))


def shelf(gain: float, cutoff: float, *, high: bool = False) -> Transform:
    """Return a circular filter that multiplies the frequencies below `cutoff`, in cycles per pixel, or above, by `gain`.

    The edge is that of a Butterworth filter of order 2; ValueError unless both are positive.
    """
    if not (gain > 0 and cutoff > 0):
        raise ValueError(f"gain and cutoff must be positive, got {gain} and {cutoff}")

    def filtered(x: Tensor, power: int) -> Tensor:
        rows, columns = x.shape[-2:]
        kind = {"dtype": x.dtype, "device": x.device}
        square = torch.fft.fftfreq(rows, **kind)[:, None] ** 2 + torch.fft.rfftfreq(columns, **kind) ** 2
        share = 1 / (1 + (square / cutoff**2) ** 2)
        response = (1 + (gain - 1) * (1 - share if high else share)) ** power
        return torch.fft.irfft2(torch.fft.rfft2(x) * response, s=(rows, columns))

    return Transform(lambda x: filtered(x, 1), lambda x: filtered(x, -1))


def _remeasure(problem: Posterior) -> Measure:
    """Return y ~ N(A x, sigma^2) with the operator and the noise level of the problem."""
    gaussian = problem.gaussian

    def measure(x: Tensor, seed: int) -> Likelihood:
        noise = Noise([seed] * len(x), gaussian.dtype, gaussian.device)
        twin = copy.copy(gaussian)
        white = noise.randn_like(gaussian.y)
        twin.y = gaussian.physics.A(x) + like(gaussian.sigma, white.real) * white
        return twin

    return measure
