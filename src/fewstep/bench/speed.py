"""`fewstep bench speed`: what the loop costs over the bare network, and our DPS, DDRM and DiffPIR beside deepinv's.

Times are compared as ratios of runs that alternate in one process, so that whatever else the machine does hits both. On a CPU
they are of the processor, which other work leaves alone.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from torch import Tensor

from fewstep.bench.common import FAILURES, Report, alternate, failed, within
from fewstep.bench.deepinv_samplers import RIVALS, at_rival_settings, build_rival
from fewstep.bench.priors import resolve_prior
from fewstep.core.counts import Counts
from fewstep.core.denoiser import Denoiser
from fewstep.core.problem import Posterior
from fewstep.core.registry import available, get
from fewstep.core.sampler import Sampler
from fewstep.data import centre_crop
from fewstep.images import list_photos, load_image
from fewstep.metrics import psnr
from fewstep.operators.image import deepinv_physics, image_likelihood, to_unit
from fewstep.operators.kernels import gaussian_kernel

NOTES = (
    "loop: time of a sampler over that of the same network calls (and vector-Jacobian products) bare, in alternating "
    "repeats; the median of the ratios, and their smallest and largest.",
    "deepinv: its own samplers at its defaults, with our network behind its denoiser interface, the same operator, "
    "measurement and number of steps; calls are network calls. PSNR is that of ours at the fields published, 'ours at deepinv's "
    "settings' that with its fields and noise levels; ratio is the time of ours there over deepinv's.",
    "seconds: of the processor, all threads together, on a CPU; of the clock on a GPU.",
    "PSNR of one sample against the photograph where a folder was given, the mean over repeats + 1 seeds, and the standard error "
    "of the difference between the last two; it means nothing with prior='random'.",
    *(f"{name}: {rival.difference}" for name, rival in RIVALS.items()),
)
SIGMA = 0.025
EQUAL, ERROR = "PSNR, ours at deepinv's settings", "error of the difference"


@dataclass(frozen=True)
class Scene:
    """A photograph, an operator of deepinv's and what it measured.

    Attributes:
        name: of the operator.
        truth: (1, 3, H, W) in [0, 1].
        physics: with Gaussian noise of `SIGMA`, decomposable, as deepinv's DDRM wants it.
        y: measurement in [0, 1] units.
        picture: what the photograph is called.
    """

    name: str
    truth: Tensor
    physics: Any
    y: Tensor
    picture: str = "synthetic"

    def problem(self, prior: Denoiser) -> Posterior:
        """Return the scene as a problem of ours."""
        return Posterior(prior, image_likelihood(self.y, self.physics, SIGMA))


def main(  # noqa: PLR0913 - one parameter is one option
    out: str | Path | None = None,
    *,
    folder: str | Path | None = None,
    prior: str | Denoiser = "natural",
    methods: Sequence[str] | None = None,
    steps: int = 20,
    repeats: int = 5,
    size: int = 256,
    limit: int = 1,
    rivals: Sequence[str] = tuple(RIVALS),
) -> Report:
    """Measure the loop and compare with deepinv, print the tables, write the JSON report to `out` where given, and return it.

    Args:
        out: path of the JSON file.
        folder: its first photographs are restored; a synthetic image where absent.
        prior: a name or path for `load_prior`, "random" for the network without training, or a denoiser.
        methods: whose loop is timed, all where absent, none where empty.
        steps: network calls of the runs that are timed.
        repeats: pairs of runs.
        size: edge of the image.
        limit: how many photographs are restored beside deepinv; the loop is timed on the first.
        rivals: which of deepinv's samplers to run, of "dps", "ddrm" and "diffpir"; none where empty.
    """
    denoiser = resolve_prior(prior)
    scenes = [scene for name, x in truth_images(folder, size, limit) for scene in make_scenes(x, name)]
    loops = [
        loop_row(name, denoiser, scenes[0], steps, repeats)
        for name in track(list(available() if methods is None else methods), "loop", transient=True)
    ]
    pairs = [(name, scene) for name in rivals for scene in scenes]
    versus = [rival_row(*pair, denoiser, steps, repeats) for pair in track(pairs, "deepinv", transient=True)]
    given = {
        "folder": folder,
        "prior": str(prior)[:200],
        "steps": steps,
        "repeats": repeats,
        "size": size,
        "limit": limit,
        "sigma": SIGMA,
    }
    tables = {"Loop over bare network": loops, "Beside deepinv": versus}
    return Report("speed", given, {title: rows for title, rows in tables.items() if rows}, NOTES).finish(out)


def truth_images(folder: str | Path | None, size: int, limit: int = 1) -> list[tuple[str, Tensor]]:
    """Return names and centres of the first photographs of `folder`, or smooth colours, (1, 3, size, size) in [0, 1]."""
    if folder is not None:
        return [(path.name, centre_crop(load_image(path), size)) for path in list_photos(folder)[:limit]]
    u = torch.linspace(0, 6, size)
    x = torch.stack([0.5 + 0.4 * torch.sin(u[:, None] * k + u[None]) for k in (1.0, 1.5, 2.0)])[None]
    return [("synthetic", x)]


def make_scenes(truth: Tensor, picture: str = "synthetic") -> list[Scene]:
    """Return random inpainting of 70 % and Gaussian deblurring of one image, seeded."""
    library, shape = deepinv_physics(), tuple(truth.shape[1:])
    g = torch.Generator().manual_seed(0)
    kept = (torch.rand(1, 1, *shape[1:], generator=g) >= 0.7).float().expand(1, *shape)
    kernel = gaussian_kernel(1.6).float()
    operators = {
        "inpainting 70 %": library.Inpainting(shape, mask=kept, noise_model=library.GaussianNoise(SIGMA)),
        "gaussian blur": library.BlurFFT(shape, filter=kernel, noise_model=library.GaussianNoise(SIGMA)),
    }
    scenes = []
    for name, physics in operators.items():
        clean = physics.A(truth)
        noise = SIGMA * torch.randn(clean.shape, generator=g)
        scenes.append(Scene(name, truth, physics, clean + (noise * (kept > 0) if "paint" in name else noise), picture))
    return scenes


def loop_row(name: str, prior: Denoiser, scene: Scene, steps: int, repeats: int) -> dict[str, Any]:
    """Return the time of one method over that of its bare network calls."""
    row: dict[str, Any] = {"method": name, "operator": scene.name}
    try:
        sampler, problem = _with_budget(name, steps), scene.problem(prior)
        counts = sampler(problem).counts  # to warm up, and to know what to compare with
        if not counts.network:
            return row | {"remark": "makes no network calls"}
        ours, bare = alternate(
            [lambda: sampler(problem, callback=_ignore), lambda: bare_calls(prior, scene, counts)], repeats
        )
    except FAILURES as error:
        return row | {"remark": failed(error)}
    ratios = [a / b for a, b in zip(ours, bare, strict=True)]
    return row | {
        "nfe": counts.network,
        "vjps": counts.vjp,
        "seconds": statistics.median(ours),
        "bare seconds": statistics.median(bare),
        "ratio": statistics.median(ratios),
        "ratio min": min(ratios),
        "ratio max": max(ratios),
    }


def bare_calls(prior: Denoiser, scene: Scene, counts: Counts) -> None:
    """Make as many network calls and vector-Jacobian products as a run has counted, and nothing else."""
    x = torch.zeros_like(scene.truth)
    calls, pulls = round(counts.network), round(-(-counts.vjp // counts.network))
    for k in range(calls):
        t = torch.tensor((k + 1) / calls)
        if not counts.vjp:
            with torch.no_grad():
                prior(x, t)
            continue
        leaf = x.clone().requires_grad_()
        with torch.enable_grad():
            x0 = prior(leaf, t)
        for _ in range(pulls):
            torch.autograd.grad(x0, leaf, x, retain_graph=True)


def rival_row(name: str, scene: Scene, prior: Denoiser, steps: int, repeats: int) -> dict[str, Any]:
    """Return seconds, network calls and PSNR of our method, at both settings, and of deepinv's on the same measurement.

    Every run has a seed of its own, and PSNR is the mean over the first, which is not timed, and the `repeats` that are.
    """
    row: dict[str, Any] = {"method": name, "operator": scene.name, "picture": scene.picture, "steps": steps}
    try:
        published = Runs(partial(_drawn, get(name)(steps=steps), scene.problem(prior)), scene.truth)
        sampler, rescheduled = at_rival_settings(name, prior, steps)
        problem = scene.problem(rescheduled)
        rival, denoiser = build_rival(name, prior, SIGMA, steps)
        mine = Runs(partial(_drawn, sampler, problem), scene.truth)
        theirs = Runs(partial(_seeded, rival, scene), scene.truth)
        mine()
        theirs()
        calls = denoiser.calls
        ours, other = alternate([mine, theirs], repeats)
        for _ in range(repeats + 1):
            published()
    except FAILURES as error:
        return row | {"remark": failed(error)}
    return row | {
        "calls": sampler.nfe,
        "deepinv calls": calls,
        "seconds": statistics.median(ours),
        "deepinv seconds": statistics.median(other),
        "ratio": statistics.median([a / b for a, b in zip(ours, other, strict=True)]),
        "PSNR": statistics.mean(published.psnrs),
        EQUAL: statistics.mean(mine.psnrs),
        "deepinv PSNR": statistics.mean(theirs.psnrs),
        ERROR: math.hypot(*(statistics.stdev(runs.psnrs) / len(runs.psnrs) ** 0.5 for runs in (mine, theirs))),
    }


@dataclass
class Runs:
    """Runs of one sampler, each with the next seed, and the PSNR of each."""

    run: Callable[[int], Tensor]
    truth: Tensor
    psnrs: list[float] = field(default_factory=list)

    def __call__(self) -> None:
        """Run once more."""
        self.psnrs.append(psnr(self.run(len(self.psnrs)).float().clamp(0, 1), self.truth))


def _drawn(sampler: Sampler, problem: Posterior, seed: int) -> Tensor:
    """Return one sample of ours, (1, 3, H, W) in [0, 1]."""
    return to_unit(sampler(problem, seed=seed).x[:, 0])


def _seeded(rival: Callable[[Tensor, Any], Tensor], scene: Scene, seed: int) -> Tensor:
    """Return one sample of deepinv's, (1, 3, H, W) in [0, 1], without touching the caller's generator."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return rival(scene.y.clone(), scene.physics).detach()


def _with_budget(name: str, steps: int) -> Sampler:
    """Return the method's first preset at about `steps` network calls; one step where that takes more."""
    method = get(name)
    first = next(iter(method.presets))
    return within(partial(method.preset, first), steps) or method.preset(first, steps=1)


def _ignore(done: int, total: int, state: Any) -> None:
    """A callback that does nothing, as a progress bar would be given one."""
