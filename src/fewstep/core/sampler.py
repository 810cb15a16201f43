"""Samplers: frozen settings, explicit state, one loop.

A method is a final frozen dataclass in a file of its own that says how to start, how to step and what comes out. Everything
else (randomness, chunks, counting, progress, checks) is here, once.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from numbers import Integral
from typing import Any, ClassVar, NamedTuple, final

import torch
from torch import Tensor

from fewstep.core.checks import check_count, check_pairs, check_shares
from fewstep.core.grid import times_of
from fewstep.core.kernel import bridge, combine, epsilon_of
from fewstep.core.noise import Antithetic, Noise, seeds_of
from fewstep.core.presets import Presets
from fewstep.core.problem import Posterior
from fewstep.core.reference import Reference
from fewstep.core.samples import Samples
from fewstep.core.schedule import Schedule


class State(NamedTuple):
    """What the next step needs: the current point, (N, *event), and whatever else the method carries."""

    x: Tensor
    memory: Any = None


Callback = Callable[[int, int, State], None]  # (steps done, steps in all, state)
Report = Callable[[int, State], None]  # the same of one chunk


class Sampler(Presets, ABC):
    """Draws x ~ p(x | y) or an approximation of it.

    Attributes:
        steps: length of the loop.
        needs: what the likelihood must provide, of {"gradient", "prox", "draw", "svd", "gaussian"}.
        reference: the publication.
        exact: "posterior" (converges to it), "biased" (to something else), "mode" (a point estimate).
        limit: one line on what it converges to, and when.
        nfe_varies: whether samples may need different numbers of network calls, so that `nfe` is the most of them.
        presets: named settings beside the defaults, which are the paper's.
    """

    steps: int
    needs: ClassVar[frozenset[str]]
    reference: ClassVar[Reference]
    exact: ClassVar[str]
    limit: ClassVar[str]
    nfe_varies: ClassVar[bool] = False
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {"paper": {}}

    @property
    def nfe(self) -> int:
        """Network calls per sample: one per step unless a method says otherwise; the most of them where `nfe_varies`."""
        return self.steps

    @abstractmethod
    def init(self, problem: Posterior, noise: Noise) -> State:
        """Return the state before the first step."""

    @abstractmethod
    def step(self, problem: Posterior, state: State, k: int, noise: Noise) -> State:
        """Return the state after step k = 0, ..., steps - 1."""

    def output(self, state: State) -> Tensor:
        """Return the samples, (N, *event), from the state after the last step."""
        return state.x

    @final
    def run(
        self, items: Posterior, noise: Noise, state: State | None = None, report: Report = lambda done, state: None
    ) -> Tensor:
        """Return the samples of N items, (N, *event); gradients are recorded where they are enabled.

        Args:
            items: the problem of the N items (expanded).
            noise: one stream per item.
            state: where to start; what `init` gives where None.
            report: called after every step with (steps done, state).
        """
        state = self.init(items, noise) if state is None else state
        for k in range(self.steps):
            state = self.step(items, state, k, noise)
            report(k + 1, state)
        return self.output(state)

    @final
    def __call__(
        self,
        problem: Posterior,
        num_samples: int = 1,
        *,
        seed: int | Sequence[int] = 0,
        chunk: int | None = None,
        antithetic: bool = False,
        callback: Callback | None = None,
    ) -> Samples:
        """Draw `num_samples` samples for each measurement.

        Args:
            problem: prior and likelihood of B measurements.
            num_samples: K.
            seed: one for all measurements, or one for each; sample k depends on its measurement, its seed and k alone.
            chunk: the most items (samples times measurements) that go through the network at once, but never less than one
                sample of every measurement.
            antithetic: whether samples come in pairs with opposite noise, 2 j beside 2 j + 1. Each has the same law as without;
                their mean is nearer to the posterior mean, the more so the more the sampler is linear in its noise, and their
                spread is taken with the pairs in mind, see `Samples`.
            callback: called after every step with (steps done, steps in all, state).

        Raises:
            ValueError: bad arguments, an odd number of antithetic samples, or a likelihood without what the method needs.
            TypeError: a seed that is no integer.
            FloatingPointError: the run diverged.
        """
        parts = self.stream(problem, num_samples, seed=seed, chunk=chunk, antithetic=antithetic, callback=callback)
        return Samples.concatenate(list(parts))

    @final
    def stream(
        self,
        problem: Posterior,
        num_samples: int = 1,
        *,
        seed: int | Sequence[int] = 0,
        chunk: int | None = None,
        antithetic: bool = False,
        callback: Callback | None = None,
    ) -> Iterator[Samples]:
        """Draw as `__call__` does, giving each chunk as soon as it is done."""
        self.check(problem, num_samples)
        if chunk is not None:
            check_count("chunk", chunk)
        check_pairs(num_samples, antithetic)
        batch = problem.likelihood.batch
        seeds = seeds_of(seed, batch)
        size = num_samples if chunk is None else max(1, min(num_samples, chunk // batch))
        starts, source = range(0, num_samples, size), Antithetic if antithetic else Noise
        for part, first in enumerate(starts):

            def report(k: int, state: State, done: int = part * self.steps) -> None:
                if callback is not None:
                    callback(done + k, len(starts) * self.steps, state)

            found = self._drawn(problem, range(first, min(first + size, num_samples)), seeds, source, report)
            yield replace(found, antithetic=antithetic)

    @torch.no_grad()
    def _drawn(
        self,
        problem: Posterior,
        samples: range,
        seeds: tuple[int, ...],
        source: type[Noise],
        report: Report,
    ) -> Samples:
        begin = time.perf_counter()
        likelihood = problem.likelihood
        items = problem.expand(len(samples))
        noise = source.spawn(seeds, samples, likelihood.dtype, likelihood.device)
        x = self.run(items, noise, report=report)
        if not bool(torch.isfinite(x).all()):
            raise FloatingPointError(f"{self!r} diverged; use more steps, weaker guidance or a larger sigma")
        seconds = time.perf_counter() - begin
        x = x.reshape(len(samples), len(seeds), *x.shape[1:])
        return Samples(x, items.counts, seconds, repr(self), seeds, samples.start)

    @property
    def idle(self) -> Collection[str]:
        """Names of fields that have no effect beside the others as they are."""
        return ()

    def refusal(self, problem: Posterior) -> str:
        """Return why it cannot run on a problem with these settings, empty where it can."""
        return ""

    @final
    def check_steps(self) -> None:
        """Raise ValueError unless the steps are a whole number, at least one."""
        if not isinstance(self.steps, Integral) or self.steps < 1:
            raise ValueError(f"{type(self).__name__} needs at least one step, and whole ones, got {self.steps!r}")

    @final
    def check(self, problem: Posterior, num_samples: int = 1) -> None:
        """Return where `stream` would start, before any network call.

        Raises:
            ValueError: bad arguments, or a likelihood without what the method needs; methods that fit are named.
        """
        check_count("num_samples", num_samples)
        self.check_steps()
        if reason := self.refusal(problem) or problem.misfit:
            raise ValueError(reason)
        missing = self.needs - problem.likelihood.provides
        if missing:
            from fewstep.core.registry import fitting

            raise ValueError(
                f"{type(self).__name__} needs {', '.join(sorted(missing))}, which this operator does not provide; "
                f"methods that fit: {', '.join(fitting(problem.likelihood.provides))}"
            )


class DiffusionSampler(Sampler):
    """A sampler that starts from x_1 ~ N(0, sigma_1^2 I) and walks down a grid of times to t = 0.

    Attributes:
        grid: the time grid, one of `fewstep.core.grid.GRIDS` by name or the times themselves, see `grid.times_of`.
    """

    grid: str | tuple[float, ...]

    def init(self, problem: Posterior, noise: Noise) -> State:
        """See `Sampler`; pure noise at t = 1."""
        _, sigma = problem.schedule(torch.ones((), dtype=torch.float64))
        return State(sigma.to(noise.dtype).to(noise.device) * noise.randn(*problem.likelihood.event_shape))

    def refusal(self, problem: Posterior) -> str:
        """See `Sampler`; on other grids the steps would take x_1 for another point, or end before x_0."""
        first, last = self.times(problem)[[0, -1]].tolist()
        if abs(first - 1) < 1e-6 and last == 0:  # named grids are at 1 to rounding
            return ""
        return f"the grid of {type(self).__name__} must lead from t = 1 to t = 0, got {first:g} to {last:g}"

    def times(self, problem: Posterior) -> Tensor:
        """Return the `steps` + 1 falling times of the grid, float64."""
        return times_of(self.grid, problem.schedule, self.steps)

    def interval(self, problem: Posterior, k: int) -> tuple[Tensor, Tensor]:
        """Return (t, s), the times before and after step k."""
        times = self.times(problem)
        return times[k], times[k + 1]


class GuidedSampler(DiffusionSampler):
    """A diffusion sampler that is one function: a prediction of x_0 from (y, x_t), followed by the DDIM kernel.

    Attributes:
        eta: share of the bridge's standard deviation that is drawn afresh; 1 is ancestral, 0 deterministic.
        prediction: "mean" if `predict_x0` estimates E[x_0 | x_t, y], "draw" if it draws from p(x_0 | x_t, y).
    """

    eta: float
    prediction: ClassVar[str]

    def __post_init__(self) -> None:
        check_shares(self, "eta")

    @abstractmethod
    def predict_x0(self, problem: Posterior, x_t: Tensor, t: Tensor, noise: Noise) -> Tensor:
        """Return a mean or a draw of p(x_0 | x_t, y), (N, *event); `t` is ()."""

    def estimate(self, problem: Posterior, state: State, t: Tensor, noise: Noise) -> Tensor:
        """Return `predict_x0`; a method that also uses the previous prediction, `state.memory`, overrides this."""
        return self.predict_x0(problem, state.x, t, noise)

    def shares(self, schedule: Schedule, t: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        """Return the weights of epsilon and of fresh noise in x_s; the bridge's unless a method says otherwise."""
        return bridge(schedule, t, s, self.eta)

    @final
    def step(self, problem: Posterior, state: State, k: int, noise: Noise) -> State:
        """See `Sampler`; the state's memory is the last prediction of x_0."""
        t, s = self.interval(problem, k)
        x0 = self.estimate(problem, state, t, noise)
        if k == self.steps - 1:
            return State(x0)
        epsilon = epsilon_of(problem.schedule, t, state.x, x0)
        shares = self.shares(problem.schedule, t, s)
        return State(combine(problem.schedule, s, x0, epsilon, shares, noise), x0)


def settings(sampler: Sampler) -> dict[str, Any]:
    """Return the fields of a sampler that have an effect and their values; of a sampler within it, its class and its fields."""
    assert is_dataclass(sampler)
    values = {field.name: getattr(sampler, field.name) for field in fields(sampler) if field.name not in sampler.idle}
    return {
        name: {"name": type(value).__name__, **settings(value)} if isinstance(value, Sampler) else value
        for name, value in values.items()
    }
