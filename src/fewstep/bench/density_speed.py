"""What one step saves: processor time of a sample beside the teacher's, and of an iteration beside its bare calls."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

import torch

from fewstep.bench.common import alternate
from fewstep.bench.density_runs import BATCH, METHODS, Setup, Workshop
from fewstep.core.noise import Streams
from fewstep.densities.distill import distill
from fewstep.densities.fit import train
from fewstep.densities.students._sampler import MapSampler
from fewstep.densities.students.cdds import CDDS
from fewstep.densities.teachers._base import PathSampler
from fewstep.densities.teachers.dis import DIS
from fewstep.densities.whitened import Whitened

SAMPLES, TEACHER_STEPS = 4096, 128


def speeds(shop: Workshop, name: str) -> dict[str, Any]:
    """Return microseconds per sample at one step, at 128 of the teacher, and their ratio, and what iterations cost."""
    teacher, student = (
        cast(PathSampler, shop.trained(METHODS[name].teacher).sampler),
        cast(MapSampler, shop.trained(name).sampler),
    )
    one, weighted, many = fastest(
        5,
        lambda: student.sample(SAMPLES, 1, weights=False),
        lambda: student.sample(SAMPLES, 1),
        lambda: teacher.sample(SAMPLES, TEACHER_STEPS, weights=False),
    )
    return {
        "1 step, us": 1e6 * one / SAMPLES,
        "with weights, us": 1e6 * weighted / SAMPLES,
        "teacher 128 steps, us": 1e6 * many / SAMPLES,
        "faster by": many / one,
        "dis: iteration / calls": path_overhead(teacher.whitened, shop.setup),
        "cdds: iteration / calls": map_overhead(teacher, student),
    }


def fastest(repeats: int, *runs: Callable[[], object]) -> list[float]:
    """Return the least processor time of each run, seconds, after one that is not timed; they take turns."""
    for run in runs:
        run()
    return [min(times) for times in alternate(runs, repeats, time.process_time)]


def path_overhead(whitened: Whitened, setup: Setup) -> float:
    """Return processor time of an iteration of `fit` on DIS over that of its bare calls."""
    teacher = DIS(**setup.paths)

    def run(count: int) -> None:
        train(whitened, teacher, None, replace(setup.options(teacher), train_steps=count))

    return overhead(run, path_calls(whitened, setup), steps=12)


def map_overhead(teacher: PathSampler, student: MapSampler) -> float:
    """Return processor time of an iteration of `distill`, its trajectories left aside, over that of its bare calls."""
    method = CDDS(map=student.flow_map.name, rows=1024, size=student.flow_map.config, polish=0, balance=0)

    def run(count: int) -> None:
        distill(teacher, method, train_steps=count, batch=BATCH)

    return overhead(run, map_calls(student), steps=100)


def overhead(run: Callable[[int], None], calls: Callable[[], object], steps: int) -> float:
    """Return the time of one of the iterations of `run`, from trainings of two lengths, over that of `calls`."""

    def bare() -> None:
        for _ in range(steps):
            calls()

    short, long, least = fastest(3, lambda: run(steps), lambda: run(2 * steps), bare)
    return (long - short) / least


def path_calls(whitened: Whitened, setup: Setup) -> Callable[[], None]:
    """Return the calls of one iteration: a path without gradients, all its points with, log rho once."""
    teacher = DIS(**setup.paths)
    control = teacher.control(whitened)
    y = Streams(0, range(setup.options(teacher).batch)).randn(whitened.dim)
    times = torch.linspace(1, 0.01, teacher.steps)
    points = y.expand(teacher.steps, *y.shape).contiguous()

    def run() -> None:
        with torch.no_grad():
            guides = [control.guide(y) for _ in times]
            for time_, guide in zip(times, guides, strict=True):
                control.moments(y, time_, guide)
            whitened.log_prob(y)
        found = control.moments(points, times[:, None], torch.stack([g for g in guides if g is not None]))
        (found.drift.sum() + found.spread.sum()).backward()

    return run


def map_calls(student: MapSampler) -> Callable[[], None]:
    """Return the map's calls of an iteration with their gradient, on pairs of times as in training."""
    flow_map = MapSampler.restore(student.whitened, student.config(), student.tensors()).flow_map.requires_grad_()
    noise = Streams(0, range(2 * BATCH if CDDS().apart else BATCH))  # each point has a neighbour
    y, levels = noise.randn(flow_map.dim), (16 * noise.rand(2)).ceil() / 16
    later, earlier = levels.amax(1), levels.amin(1) - 1 / 16

    def run() -> None:
        flow_map(y, later, earlier).square().sum().backward()

    return run
