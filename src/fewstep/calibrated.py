"""Calibrations that lie beside the weights of a trained sampler: fitted on photographs, one per family of operators or kind in it.

A promise holds for what it was fitted on: these weights, these outer steps, this many samples, this level, photographs of this
size, and operators as the family draws them. Whatever differs is said; a calibration of other weights is never used.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from fewstep import __version__
from fewstep.core.checks import check_pairs
from fewstep.core.denoiser import Denoiser
from fewstep.core.files import read_header, write_json
from fewstep.core.noise import mix
from fewstep.core.problem import Posterior
from fewstep.core.sampler import Sampler
from fewstep.core.samples import Samples
from fewstep.data import CropShape, RandomCrops, centre_batch
from fewstep.measurements import Family, SimulatedMeasurements, entry_text, holds
from fewstep.operators.base import Operator
from fewstep.uncertainty.calibration import Calibration, least_images
from fewstep.unfolded.sampler import UnfoldedSampler
from fewstep.unfolded.store import CALIBRATION as FILE

FORMAT = "fewstep.calibrations"
OUTER = ("steps", "eta", "kernel", "grid")  # what a trained sampler's law depends on beside its weights

Progress = Callable[[str, int, int], None]  # (word of the operator, photographs done, photographs in all)


@dataclass(frozen=True)
class Plan:
    """How to calibrate.

    Attributes:
        levels: probabilities of the intervals.
        samples: numbers of samples K, 2 at least; all share the runs of the largest.
        crop: side of the square in the middle of each photograph; a hole of fixed size weighs less in a larger one.
        worst: bound of an image's loss, see `Calibration`; three times what a level leaves out where None. At 1, n images leave up
            to 2 / (n + 1) of excess coverage: 32 images at 90 % aim at 93 %. At 0.3 they aim at 90.9 %, and what the promise gives
            up are images of which more than 30 % is missed, which count as missed by that much.
        seed: of measurements and samples.
        chunk: the most samples that go through the network at once.
        words: of the operators that are calibrated, all where there are none.
        apart: fields of operators whose choices get calibrations of their own, such as the factor of super-resolution, with the
            values at which ranges are cut into parts that do, such as the quality of JPEG: {"factor": (), "quality": (15, 30)}. A
            calibration promises a mean over what it was fitted on: the fewer different things that is, the nearer is each to its
            level.
        antithetic: whether samples come in pairs with opposite noise, see `Sampler`; their intervals are others.
    """

    levels: tuple[float, ...] = (0.9,)
    samples: tuple[int, ...] = (16,)
    crop: int = 128
    worst: float | None = None
    seed: int = 0
    chunk: int | None = None
    words: tuple[str, ...] = ()
    apart: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    antithetic: bool = False

    def __post_init__(self) -> None:
        if not self.levels or not self.samples or min(self.samples) < 2:
            raise ValueError(f"intervals need a level and at least 2 samples, got {self.levels} and {self.samples}")
        for num in self.samples:
            check_pairs(num, self.antithetic)
        for level in self.levels:
            least_images(level, self.bound(level))

    def bound(self, level: float) -> float:
        """Return the bound of an image's loss for intervals of a level."""
        return min(1.0, 3 * (1 - level)) if self.worst is None else self.worst

    def parts(self) -> list[tuple[slice, bool]]:
        """Return which of the samples are calibrated together, and whether they are antithetic.

        Of antithetic ones the first of each pair are independent, so half as many of these are calibrated too.
        """
        halves = [k for k in self.samples if self.antithetic and k >= 4]
        return [*((slice(k), self.antithetic) for k in self.samples), *((slice(0, k, 2), False) for k in halves)]

    def check(self, images: int) -> None:
        """Raise ValueError where there are too few images for a level."""
        for level in self.levels:
            if images < (least := least_images(level, self.bound(level))):
                raise ValueError(
                    f"{100 * level:.4g}% intervals need {least} images at least to calibrate on, got {images}"
                )


class Asked(NamedTuple):
    """A measurement and the intervals that are wanted of it; sigma is in [0, 1] units, None for no noise.

    They are of antithetic samples or of independent ones.
    """

    operator: Operator
    sigma: float | None
    num_samples: int
    level: float
    antithetic: bool = False


class Entry(NamedTuple):
    """A calibration and what it is for: operators of a word, with fields of the values or in the ranges that `kind` names."""

    word: str
    kind: Mapping[str, Any]
    calibration: Calibration

    def holds(self, operator: Operator) -> bool:
        """Return whether the operator is of this kind."""
        return operator.word == self.word and all(holds(entry, getattr(operator, k)) for k, entry in self.kind.items())

    @property
    def asked(self) -> tuple[str, float, int, bool]:
        """What it is looked up by, but for the kind: word of the operator, level, number of samples, whether antithetic."""
        found = self.calibration
        return self.word, found.level, found.num_samples, found.antithetic

    @property
    def name(self) -> str:
        """The word, with the kind in brackets."""
        return kind_name(self.word, self.kind)


class Verdict(NamedTuple):
    """What the intervals of a trained sampler are worth.

    Attributes:
        calibration: to be applied to them, or None.
        outside: in what the operator differs from everything that was calibrated for; empty where it does not.
        text: both in a sentence.
    """

    calibration: Calibration | None
    outside: tuple[str, ...]
    text: str


@dataclass(frozen=True)
class Calibrations:
    """The calibrations of one trained sampler.

    Attributes:
        sha256: of its weights.
        outer: `OUTER` of the sampler that was calibrated.
        crop: side of the photographs, pixels.
        families: the operators of calibration: those of training, and as photographs have them, see `with_measured`.
        entries: calibrations of operators, one per kind, level and number of samples.
    """

    sha256: str
    outer: dict[str, Any]
    crop: int
    families: tuple[Family, ...]
    entries: tuple[Entry, ...]

    def save(self, folder: str | Path) -> Path:
        """Write `calibration.json` into `folder`, atomically."""
        values = {
            "format": FORMAT,
            "library_version": __version__,
            "sha256": self.sha256,
            "outer": self.outer,
            "crop": self.crop,
            "families": [asdict(family) for family in self.families],
            "entries": [{"operator": e.word, "kind": dict(e.kind), **e.calibration.to_json()} for e in self.entries],
        }
        path = Path(folder) / FILE
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, values)
        return path

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """Read what `save` wrote beside the weights in `folder`.

        Raises:
            ValueError: the file is missing, damaged, or of other weights than those in the folder.
        """
        path = Path(folder) / FILE
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            if values["format"] != FORMAT:
                raise ValueError("it is of another format")
            families = tuple(Family(**family) for family in values["families"])
            entries = tuple(
                Entry(entry.pop("operator"), dict(entry.pop("kind", {})), Calibration.from_json(entry))
                for entry in values["entries"]
            )
            found = cls(values["sha256"], dict(values["outer"]), int(values["crop"]), families, entries)
        except FileNotFoundError:
            raise ValueError(f"there is no {FILE} beside the weights") from None
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} cannot be read as calibrations ({error})") from None
        if found.sha256 != read_header(folder).get("sha256"):
            raise ValueError(f"{path} belongs to other weights than those beside it; calibrate these")
        return found

    def joined(self, earlier: Calibrations) -> Self:
        """Return these with what `earlier` has of the same sampler for other operators, levels and numbers of samples.

        Raises:
            ValueError: the earlier ones are of other weights, outer steps, photographs of another size or other families.
        """
        differ = [
            f.name for f in fields(self) if f.name != "entries" and getattr(self, f.name) != getattr(earlier, f.name)
        ]
        if differ:
            raise ValueError(f"there are calibrations of another {' and '.join(differ)}")
        mine = {e.asked for e in self.entries}  # without kinds: they may be told apart in another way now
        return replace(self, entries=(*(e for e in earlier.entries if e.asked not in mine), *self.entries))

    def outside(self, operator: Operator, sigma: float | None) -> tuple[str, ...]:
        """Return in what an operator differs from the nearest family; empty where one holds it."""
        gaps = [family.outside(operator, sigma or 0.0) for family in self.families if family.word == operator.word]
        return min(gaps, key=len) if gaps else (f"no {operator.word} among the operators of training",)

    def find(self, asked: Asked) -> Entry | None:
        """Return the entry for the operator, the level and the number of samples.

        Where the operator is of no kind, such as a factor between those of training, it is the one of its word that stretches
        most.
        """
        for_word = [
            e
            for e in self.entries
            if e.word == asked.operator.word
            and (e.calibration.num_samples, e.calibration.antithetic) == (asked.num_samples, asked.antithetic)
            and abs(e.calibration.level - asked.level) < 1e-9
        ]
        of_kind = [e for e in for_word if e.holds(asked.operator)]
        return max(of_kind or for_word, key=lambda e: e.calibration.factor, default=None)

    def verdict(self, sampler: UnfoldedSampler, asked: Asked) -> Verdict:
        """Return what these calibrations say of the intervals that are asked for."""
        outside, found = self.outside(asked.operator, asked.sigma), self.find(asked)
        differ = [f"{k} {v}" for k, v in self.outer.items() if _listed(getattr(sampler, k)) != _listed(v)]
        if found is None or differ:
            why = f"calibrated with {', '.join(differ)}" if differ else self._offer(asked.operator.word)
            return Verdict(None, outside, f"not calibrated: {why}" + _flag(outside))
        text = f"calibrated on {found.calibration.images} photographs of {self.crop} pixels, family {found.name}"
        return Verdict(found.calibration, outside, text + _flag(outside))

    def _offer(self, word: str) -> str:
        fitted = [e.calibration for e in self.entries if e.word == word]
        offers = dict.fromkeys(
            f"{c.num_samples}{' antithetic' * c.antithetic} samples at level {c.level:g}" for c in fitted
        )
        return f"{word} is calibrated for {' or '.join(offers)}" if offers else f"there is no calibration for {word}"


def _listed(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value  # JSON knows lists alone


def judge(sampler: Sampler, asked: Asked) -> Verdict | None:
    """Return what is known of the intervals of a sampler, None where it is no trained network on disk."""
    if not isinstance(sampler, UnfoldedSampler) or sampler.folder is None:
        return None
    try:
        return Calibrations.load(sampler.folder).verdict(sampler, asked)
    except ValueError as reason:
        return Verdict(None, (), f"not calibrated: {reason}")


def calibrate(
    sampler: UnfoldedSampler,
    prior: Denoiser,
    photos: Sequence[Tensor],
    families: Sequence[Family],
    plan: Plan,
    progress: Progress | None = None,
) -> Calibrations:
    """Calibrate a trained sampler on photographs; every kind of operator sees each of them once, by an operator of its own.

    Args:
        sampler: of a network on disk.
        prior: with the schedule of the network.
        photos: uint8 images, (3, H, W) each, of different scenes and not those of training.
        families: the operators of training.
        plan: how.
        progress: called after every photograph.

    Raises:
        ValueError: the network is not on disk, there are too few photographs for the level, or what is to be calibrated or told
            apart is not there.
    """
    if sampler.folder is None:
        raise ValueError("calibrations belong to weights on disk: save the network first")
    plan.check(len(photos))
    entries: list[Entry] = []
    families, told_apart = with_measured(families)
    if unknown := set(plan.words) - {family.word for family in families}:
        raise ValueError(f"no {', '.join(sorted(unknown))} among the operators of training")
    for word, kind, members in kinds_of(families, {**dict.fromkeys(told_apart, ()), **plan.apart}):
        if plan.words and word not in plan.words:
            continue
        pairs = []
        for pair in simulated(sampler, prior, photos, members, plan):
            pairs.append(pair)
            if progress is not None:
                progress(kind_name(word, kind), len(pairs), len(photos))
        for level in plan.levels:
            for part, antithetic in plan.parts():
                few = ((replace(samples, x=samples.x[part], antithetic=antithetic), truth) for samples, truth in pairs)
                entries.append(Entry(word, kind, Calibration.fit(few, level, worst=plan.bound(level))))
    sha256 = str(read_header(sampler.folder)["sha256"])
    return Calibrations(sha256, outer(sampler), plan.crop, tuple(families), tuple(entries))


def with_measured(families: Sequence[Family]) -> tuple[list[Family], list[str]]:
    """Return families, each also with the operators of measurements from outside, and the fields in which these differ."""
    others = [replace(f, fields={**f.fields, **f.measured}) for f in families if f.measured]
    return [*families, *others], list(dict.fromkeys(name for f in families for name in f.measured))


def kinds_of(
    families: Sequence[Family], apart: Mapping[str, Sequence[float]]
) -> list[tuple[str, dict[str, Any], list[Family]]]:
    """Return what gets calibrations of its own: words, what tells them apart, see `Plan`, and the families that draw them.

    Raises:
        ValueError: no operator has choices of such a field, or a range of it that is cut.
    """
    groups: dict[tuple[str, str], tuple[str, dict[str, Any], list[Family]]] = {}
    for family in families:
        for kind, one in family.kinds(apart):
            groups.setdefault((one.word, repr(kind)), (one.word, kind, []))[2].append(one)
    for name, cuts in apart.items():
        if not any(name in kind for _, kind, _ in groups.values()):
            what = (
                f"a range of a field {name!r} to cut at {', '.join(map(str, cuts))}"
                if cuts
                else f"choices of a field {name!r} to tell apart"
            )
            raise ValueError(f"no operator of training has {what}")
    return list(groups.values())


def kind_name(word: str, kind: Mapping[str, Any]) -> str:
    """Return a word with a kind in brackets."""
    return word + f" ({', '.join(f'{k} {entry_text(v)}' for k, v in kind.items())})" * bool(kind)


def simulated(
    sampler: Sampler, prior: Denoiser, photos: Sequence[Tensor], families: Sequence[Family], plan: Plan
) -> Iterator[tuple[Samples, Tensor]]:
    """Yield the samples of a measurement of each photograph and its truth, (K, 1, 3, H, W) and (1, 3, H, W).

    They are of what the measurement shows, where the scene is larger.
    """
    data = SimulatedMeasurements(RandomCrops(photos, (CropShape(1, plan.crop),), plan.seed), tuple(families))
    device = next((p.device for p in prior.parameters()), torch.device("cpu"))
    for number, x in enumerate(centre_batch(photos, plan.crop)):
        operator, likelihood = data.measured(x[None].to(device), 0, number)
        problem = Posterior(prior, likelihood)
        samples = sampler(
            problem,
            max(plan.samples),
            seed=mix(plan.seed, number),
            chunk=plan.chunk,
            antithetic=plan.antithetic,
        )
        yield replace(samples, x=operator.framed(samples.x.float().cpu())), operator.framed(x[None])


def outer(sampler: UnfoldedSampler) -> dict[str, Any]:
    """Return the settings of the outer steps, as JSON has them."""
    return {name: _listed(getattr(sampler, name)) for name in OUTER}


def _flag(outside: Sequence[str]) -> str:
    return f"; the operator is outside the card of the sampler, so nothing is promised: {', '.join(outside)}" * bool(
        outside
    )
