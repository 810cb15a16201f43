"""What each choice of UD2M is worth, on an exact problem: one is varied at a time around the preset `consistent`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cache, partial
from typing import Any

from rich.progress import track
from torch import Tensor

from fewstep.bench.designs import Adapted, Design, learn_prior, timed
from fewstep.bench.log import Log
from fewstep.bench.trials import Trial, kept
from fewstep.core.grid import times_of
from fewstep.core.likelihood import Likelihood
from fewstep.core.schedule import VariancePreserving
from fewstep.methods.ud2m import UD2M
from fewstep.objectives.embeddings import marginals, measured
from fewstep.objectives.ud2m import Weights

SIZES = (1, 2, 3, 4, 8)  # of K, and of N
STEPS = (3, 1)  # N of every other ablation
RANKS = (0, 4, 5, 16, None)
# every outer time of every N, so that one network serves all of them
TIMES = tuple(sorted({float(t) for n in SIZES for t in times_of("quadratic", VariancePreserving(), n)[:-1]}))
ALL = Weights(energy=1.0, noise=0.1, adversarial=0.1, matching=0.1)
TERMS = ("energy", "noise", "adversarial", "matching")
NOTES = (
    "ablations: one choice at a time around `consistent`, K = 3, trained on the energy score alone, at N = 3 and N = 1.",
    "loss: the energy scores are that of the whole vector and that of every coordinate, in the likelihood's metric, unless said.",
    f"loss: all terms at weights {', '.join(f'{name} {getattr(ALL, name):g}' for name in TERMS)}; LPIPS needs images. "
    "The paper's are noise prediction, critic and LPIPS.",
    "rank: the decoder is a small network trained to be the prior's denoiser, adapted by LoRA of that rank on its linear layers, "
    "scale 1; at rank 0 only the levels are trained, 'full' trains all. It sees x_t and the noise through the noised point alone.",
    "start: that of RAM is for images.",
)


def choose(names: Sequence[str]) -> tuple[str, ...]:
    """Return the names of ablations, "all" standing for every one; ValueError for one that is not known."""
    chosen = tuple(ABLATIONS) if "all" in names else tuple(names)
    if unknown := [name for name in chosen if name not in ABLATIONS]:
        raise ValueError(f"unknown ablation {unknown[0]!r}; choose of {', '.join(ABLATIONS)}, or all")
    return chosen


def rows(names: Sequence[str], trial: Trial, log: Log) -> Iterator[dict[str, Any]]:
    """Yield the rows of these ablations; a network that several need is trained once, and one whose rows are logged never."""
    setup, entries = trial.setup, [(name, *entry) for name in names for entry in ABLATIONS[name]()]
    learned = cache(lambda: learn_prior(setup))
    trained = cache(lambda design: timed(lambda: design.train(setup, learned() if needs_network(design) else None)))

    def row(design: Design, steps: int) -> dict[str, Any]:
        network, seconds = trained(design.training)
        return trial.row(design.sampler(network, steps)) | {"seconds": seconds}

    yield {"ablation": "", "choice": "exact posterior", "steps": None} | kept(log, "exact", trial.reference)
    for name, label, design, steps in track(entries, f"{setup.dim} dimensions", transient=True):
        found = kept(log, f"{name} {label} {steps}", partial(row, design, steps))
        yield {"ablation": name, "choice": label, "steps": steps} | found


def needs_network(design: Design) -> bool:
    """Return whether a design needs the prior as a network: LoRA adapts one, as a decoder or as the fake score."""
    return isinstance(design.decoder, Adapted) or design.weights.matching > 0


Entries = Iterator[tuple[str, Design, int]]  # label, design, N


def consistent(**changes: Any) -> Design:
    """Return the design that all are compared with, with settings changed."""
    return Design(UD2M.preset("consistent", **changes), times=TIMES)


def size() -> Entries:
    """Yield K x N."""
    for k in SIZES:
        yield from ((f"K={k}", consistent(iterations=k), n) for n in SIZES)


def start() -> Entries:
    """Yield the initialisers."""
    yield from _at_steps({name: consistent(start=name) for name in ("gaussian", "pinv", "blend", "previous")})


def rank() -> Entries:
    """Yield ranks of LoRA."""
    yield from _at_steps(
        {"full" if r is None else f"rank {r}": replace(consistent(), decoder=Adapted(r)) for r in RANKS}
    )


def loss() -> Entries:
    """Yield all terms, each off, and some alone."""
    off = {f"without {name}": replace(ALL, **{name: 0.0}) for name in TERMS}
    paper = replace(ALL, energy=0.0, matching=0.0)
    chosen = {"all": ALL, **off, "noise and adversarial": paper, "energy alone": Weights()}
    yield from _at_steps({label: replace(consistent(), weights=weights) for label, weights in chosen.items()})
    spaces = {"whole vectors": (measured,), "marginals": (marginals,), "Euclidean": (euclidean,)}
    yield from _at_steps({f"energy alone, {name}": replace(consistent(), embeddings=e) for name, e in spaces.items()})


def preset() -> Entries:
    """Yield the presets, and one with single choices of the other."""
    paper = Design(UD2M.preset("paper"), times=TIMES)
    bridge = replace(paper, settings=replace(paper.settings, kernel="bridge", eta=1.0))
    mixed = {
        "consistent, pinned levels": consistent(base="pinned"),
        "consistent, pairing 1": consistent(pairing=1.0),
        "consistent, published kernel": consistent(kernel="one_step", eta=0.8),
    }
    yield from _at_steps({"paper": paper, "paper, bridge": bridge, "consistent": consistent(), **mixed})


ABLATIONS = {"size": size, "start": start, "rank": rank, "loss": loss, "preset": preset}


def euclidean(x: Tensor, likelihood: Likelihood) -> list[Tensor]:
    """Return x as one vector: the energy score without the likelihood's metric."""
    return [x.flatten(1)[..., None]]


def _at_steps(designs: dict[str, Design]) -> Entries:
    for label, design in designs.items():
        yield from ((label, design, n) for n in STEPS)
