"""What one step saves: processor time of a sample beside the teacher's, and of an iteration beside its bare calls."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, cast

import torch

from fewstep.bench.density_runs import BATCH, METHODS, Setup, Workshop
from fewstep.core.noise import Streams
from fewstep.densities.distill import distill
from fewstep.densities.fit import FitOptions, train
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
    one = fastest(lambda: student.sample(SAMPLES, 1, weights=False), 5) / SAMPLES
    weighted = fastest(lambda: student.sample(SAMPLES, 1), 2) / SAMPLES
    many = fastest(lambda: teacher.sample(SAMPLES, TEACHER_STEPS, weights=False), 2) / SAMPLES
    return {
        "1 step, us": 1e6 * one,
        "with weights, us": 1e6 * weighted,
        "teacher 128 steps, us": 1e6 * many,
        "faster by": many / one,
        "dis: iteration / calls": path_iteration(teacher.whitened, shop.setup)
        / path_calls(teacher.whitened, shop.setup),
        "cdds: iteration / calls": map_iteration(teacher, student) / map_calls(student),
    }


def fastest(run: Callable[[], object], repeats: int) -> float:
    """Return the least processor time of so many runs, seconds, after one that is not timed."""
    run()
    return min(_seconds(run) for _ in range(repeats))


def path_iteration(whitened: Whitened, setup: Setup, steps: int = 12) -> float:
    """Return processor seconds of one iteration of `fit` on DIS, from trainings of two lengths."""

    def run(count: int) -> None:
        train(whitened, DIS(steps=setup.path_steps), None, FitOptions(train_steps=count, batch=setup.batch))

    return (fastest(lambda: run(2 * steps), 2) - fastest(lambda: run(steps), 2)) / steps


def path_calls(whitened: Whitened, setup: Setup) -> float:
    """Return processor seconds of the calls of one iteration: a path without gradients, all its points with, log rho once."""
    control = DIS(steps=setup.path_steps).control(whitened)
    y = Streams(0, range(setup.batch)).randn(whitened.dim)
    times = torch.linspace(1, 0.01, setup.path_steps)
    points = y.expand(setup.path_steps, *y.shape).contiguous()

    def run() -> None:
        with torch.no_grad():
            guides = [control.guide(y) for _ in times]
            for time_, guide in zip(times, guides, strict=True):
                control.moments(y, time_, guide)
            whitened.log_prob(y)
        found = control.moments(points, times[:, None], torch.stack([g for g in guides if g is not None]))
        (found.drift.sum() + found.spread.sum()).backward()

    return fastest(run, 5)


def map_iteration(teacher: PathSampler, student: MapSampler, steps: int = 100) -> float:
    """Return processor seconds of one iteration of `distill`, its trajectories left aside."""
    method = CDDS(rows=1024, size=student.flow_map.config, polish=0)

    def run(count: int) -> None:
        distill(teacher, method, train_steps=count, batch=BATCH)

    return (fastest(lambda: run(2 * steps), 2) - fastest(lambda: run(steps), 2)) / steps


def map_calls(student: MapSampler) -> float:
    """Return processor seconds of the map's calls of an iteration with their gradient, on pairs of times as in training."""
    flow_map = MapSampler.restore(student.whitened, student.config(), student.tensors()).flow_map.requires_grad_()
    noise = Streams(0, range(2 * BATCH if CDDS().apart else BATCH))  # each point has a neighbour
    y, levels = noise.randn(flow_map.dim), (16 * noise.rand(2)).ceil() / 16
    later, earlier = levels.amax(1), levels.amin(1) - 1 / 16
    return fastest(lambda: flow_map(y, later, earlier).square().sum().backward(), 20)


def _seconds(run: Callable[[], object]) -> float:
    begin = time.process_time()
    run()
    return time.process_time() - begin
