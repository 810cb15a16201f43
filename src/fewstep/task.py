"""What is to be restored, and how: settings, and a photograph made ready."""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from numbers import Real
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewstep.core.checks import check_count, check_pairs
from fewstep.core.driven import Driven
from fewstep.core.files import read_header
from fewstep.core.grid import times_of
from fewstep.core.likelihood import Likelihood
from fewstep.core.registry import get
from fewstep.core.sampler import DiffusionSampler, Sampler
from fewstep.core.schedule import VariancePreserving
from fewstep.images import Photo
from fewstep.operators.estimate import QUANTISATION, estimate_sigma
from fewstep.operators.words import Operator, get_operator, operators
from fewstep.options import typed_fields
from fewstep.tuning.schedule_file import solver_of
from fewstep.unfolded.sampler import UnfoldedSampler
from fewstep.unfolded.store import available_networks, find_network

TRAINED, UNTRAINED = "ud2m", "latino"  # default methods for a prior with and without a trained sampler
DEFAULT_PRIOR = "natural"
PHOTO, PAPER = "photo", "paper"  # a method's settings for photographs, where it has some, go before the paper's
OTHERWISE = ("method", "method_fields", "operator_fields")  # settings that no "--name" of their own gives
NOT = {"--antithetic": "--independent"}  # what switches a flag off
JPEG = "jpeg"  # the operator of a photograph that is itself a JPEG file


@dataclass(frozen=True)
class Settings:
    """How to restore; everything that a result depends on beside the file.

    Attributes:
        operator: word of the operator, see `fewstep operators`; None for a JPEG file means its own compression.
        operator_fields: fields of the operator, as values or as text.
        sigma: noise standard deviation in [0, 1] units; None lets the operator estimate it where it can.
        method: name of the sampler; "" takes the one that suits the operator, see `settled`.
        preset: named settings of the method; None takes its "photo" where it has one, else its "paper".
        method_fields: fields of the method, as values or as text; they go before the preset.
        samples: how many, K.
        antithetic: whether samples come in pairs with opposite noise: their mean is that of many more; None where K is even.
        seed: sample k depends on the measurement, the seed and k alone.
        solver: name of a solver that steps with the method's prediction, instead of the method itself; `steps` is then its.
        schedule: file of a tuned schedule, for that solver; its own where none is named.
        prior: name or folder of the prior.
        simulate: the photograph is clean: degrade it first, and score the result.
        level: probability of the intervals.
        lpips_weights: where LPIPS finds its weights.
        window: side of the windows in which the network runs, pixels; smaller needs less memory.
        device: "cpu", "cuda", ...; None takes a GPU where there is one.
    """

    operator: str | None = None
    operator_fields: Mapping[str, Any] = field(default_factory=dict)
    sigma: float | None = None
    method: str = ""
    preset: str | None = None
    method_fields: Mapping[str, Any] = field(default_factory=dict)
    samples: int = 8
    antithetic: bool | None = None
    seed: int = 0
    solver: str | None = None
    schedule: Path | None = None
    prior: str = DEFAULT_PRIOR
    simulate: bool = False
    level: float = 0.9
    lpips_weights: str | None = None
    window: int = 512
    device: str | None = None

    def __post_init__(self) -> None:
        check_count("samples", self.samples)
        check_count("window", self.window, least=65)
        _check_kind(self, int, "a whole number", "seed")  # it is written to JSON
        _check_kind(self, Real, "a number", "level", *(["sigma"] if self.sigma is not None else []))
        if self.sigma is not None and not (math.isfinite(self.sigma) and self.sigma >= 0):
            raise ValueError(f"sigma must be finite and not negative, got {self.sigma}")
        if self.sigma is not None and self.sigma > 1:
            raise ValueError(f"sigma is in units of [0, 1] images, got {self.sigma}; for 8-bit units divide by 255")
        check_pairs(self.samples, bool(self.antithetic))
        if not 0 < self.level < 1:
            raise ValueError(f"level must lie in (0, 1), got {self.level}")
        if self.seed < 0:
            raise ValueError(f"seed must be a number from 0, got {self.seed}")

    @property
    def paired(self) -> bool:
        """Whether samples come in pairs with opposite noise."""
        return self.samples % 2 == 0 if self.antithetic is None else self.antithetic


@dataclass(frozen=True)
class Task:
    """A photograph made ready: what was measured, how, and what is known about it.

    Attributes:
        photo: the file.
        word: the operator, with its fields.
        y: the measurement, in the operator's own shape.
        sigma: noise standard deviation in [0, 1] units, None for an operator without Gaussian noise.
        likelihood: p(y | x) for x in [-1, 1].
        baseline: what can be shown without a prior, (1, 3, H, W) in [0, 1].
        truth: the clean image, or None.
        notes: what was done to pixels and noise level without being asked, one line each.
    """

    photo: Photo
    word: Operator
    y: Any
    sigma: float | None
    likelihood: Likelihood
    baseline: Tensor
    truth: Tensor | None
    notes: tuple[str, ...] = ()

    @property
    def shown(self) -> Tensor:
        """The measurement where it is an image itself, the baseline otherwise."""
        image = (
            isinstance(self.y, Tensor) and not self.y.is_complex() and self.y.ndim == 4 and self.y.shape[1] in (1, 3)
        )
        return self.y if image else self.baseline


def build_sampler(chosen: Settings) -> Sampler:
    """Return the sampler that the settings name; ValueError with a suggestion where a word is unknown."""
    cls = get(chosen.method)
    driven = chosen.solver is not None or chosen.schedule is not None
    own = {name: value for name, value in chosen.method_fields.items() if not (driven and name == "steps")}
    values = typed_fields(cls, own, f"method {chosen.method}")
    sampler = cls.preset(chosen.preset or (PHOTO if PHOTO in cls.presets else PAPER), **values)
    if isinstance(sampler, UnfoldedSampler) and sampler.folder is not None:
        _check_prior(sampler.folder, chosen.prior)
    if driven:
        steps = {name: value for name, value in chosen.method_fields.items() if name not in own}
        sampler = Driven(sampler, solver_of(chosen.solver, chosen.schedule, steps))
    sampler.check_steps()
    if isinstance(sampler, DiffusionSampler):
        times_of(sampler.grid, VariancePreserving(), sampler.steps)  # no grid is refused whatever the prior
    return sampler


def settled(chosen: Settings, word: Operator) -> Settings:
    """Return the settings with a method: their own, else the operator's, else the prior's trained sampler, else LATINO."""
    if chosen.method:
        return chosen
    if word.suited is not None:
        method, preset = word.suited
        return replace(chosen, method=method, preset=chosen.preset or preset)
    return replace(chosen, method=default_method(chosen.prior))


def default_method(prior: str) -> str:
    """Return the method that is used where neither the user nor the operator names one."""
    trained = (read_header(find_network(name)).get("prior") for name in available_networks())
    return TRAINED if prior in trained else UNTRAINED


def _check_kind(chosen: Settings, kind: type, what: str, *names: str) -> None:
    """Raise ValueError unless the settings called `names` are of a kind, which a truth value is not."""
    for name in names:
        value = getattr(chosen, name)
        if not isinstance(value, kind) or isinstance(value, bool):
            raise ValueError(f"{name} must be {what}, got {value!r}")


def _check_prior(folder: Path, prior: str) -> None:
    """Raise ValueError where a trained sampler would silently stand in for another prior."""
    own = read_header(folder).get("prior")
    if own not in (None, prior):
        raise ValueError(
            f"the trained sampler {folder.name} belongs to the prior {own!r}, not to {prior!r}; take --prior {own}, another "
            f"method (--method {UNTRAINED}), or --preset consistent, which runs it untrained on any prior"
        )


def build_word(name: str, fields: Mapping[str, Any]) -> Operator:
    """Return the operator called `name` with these fields; ValueError with a suggestion where a word is unknown."""
    cls = get_operator(name)
    return cls(**typed_fields(cls, fields, f"operator {name}"))


def prepare(photo: Photo, chosen: Settings, device: torch.device) -> Task:
    """Return the task of a photograph: degraded first where the settings say so.

    Raises:
        ValueError: no operator for a file that is not a JPEG, or one that does not fit the image.
    """
    word = word_of(photo, chosen)
    word, photo = (word, _fitted(word, photo)) if chosen.simulate else (word.measured(), photo)
    truth = word.framed(photo.x) if chosen.simulate else None
    y = _simulated(word, photo, chosen) if chosen.simulate else _read(word, photo)
    sigma = _known_sigma(word, y, chosen)
    level = sigma if sigma is None or word.noise == "none" else max(sigma, QUANTISATION)
    if isinstance(y, Tensor):
        likelihood = word.likelihood(y.to(device), sigma=level)
    else:
        likelihood = word.likelihood(y, sigma=level, device=device)
    baseline = word.baseline(y).float().cpu().clamp(0, 1)
    notes = (*photo.notes, *_notes(sigma, chosen))
    return Task(photo, word, y, sigma, likelihood, baseline.expand(-1, 3, -1, -1), truth, notes)


def command_line(path: Path, out: Path, chosen: Settings) -> str:
    """Return the line that repeats this run."""
    words = ["fewstep", "restore", str(path), "--out", str(out), "--method", chosen.method]
    for option in fields(chosen):
        value = getattr(chosen, option.name)
        if option.name not in OTHERWISE and value is not None and value != option.default:
            flag = f"--{option.name.replace('_', '-')}"
            words += [flag] if value is True else [NOT[flag]] if value is False else [flag, str(value)]
    for name, value in chosen.operator_fields.items():
        words += [f"--{name.replace('_', '-')}", str(value)]
    for name, value in chosen.method_fields.items():
        words += ["--set", f"{name}={value}"]
    return shlex.join(words)


def word_of(photo: Photo, chosen: Settings) -> Operator:
    """Return the operator that the settings name, or that a JPEG file is; ValueError where there is neither."""
    if chosen.operator is not None:
        return build_word(chosen.operator, chosen.operator_fields)
    if photo.jpeg and not chosen.simulate:
        return build_word(JPEG, chosen.operator_fields)
    why = "is to be degraded" if chosen.simulate else "is no JPEG, whose compression would be recognised"
    raise ValueError(f"{photo.path} {why}: give --operator, one of {', '.join(operators())}")


def _simulated(word: Operator, photo: Photo, chosen: Settings) -> Any:
    """Return a measurement of a clean photograph, of one channel where that is grey."""
    if chosen.sigma is None and word.noise != "none":
        raise ValueError(f"give --sigma, the noise to be added under {word.word} in units of [0, 1]; 0 for none")
    return word.simulate(photo.x[:, :1] if photo.grey else photo.x, chosen.sigma or 0.0, chosen.seed)


def _fitted(word: Operator, photo: Photo) -> Photo:
    """Return a clean photograph, cropped at the bottom and on the right where the operator does not take its size."""
    _, channels, h, w = photo.x.shape
    _, high, wide = word.fit((channels, h, w))
    if (high, wide) == (h, w) or min(high, wide) < 1:  # nothing left: the operator says what it needs
        return photo
    note = f"cropped from {w} x {h} to {wide} x {high} pixels, a size that {word.word} takes"
    return replace(photo, x=photo.x[..., :high, :wide].contiguous(), notes=(*photo.notes, note))


def _read(word: Operator, photo: Photo) -> Any:
    """Return the measurement in a file, of one channel where that is grey."""
    y = word.read(photo.path)
    return y[:, :1] if photo.grey and isinstance(y, Tensor) else y


def _known_sigma(word: Operator, y: Any, chosen: Settings) -> float | None:
    """Return the noise level of a measurement: as given, or estimated where the operator allows that."""
    if chosen.sigma is not None or word.noise != "estimated":
        return chosen.sigma
    return float(estimate_sigma(y)[0])


def _notes(sigma: float | None, chosen: Settings) -> list[str]:
    if sigma is None:
        return []
    if chosen.sigma is None:
        return [f"sigma was estimated as {sigma:.4f}, that is {255 * sigma:.1f} of 255 grey levels"]
    return [f"sigma {sigma:g} counts as {QUANTISATION:.4f}, the rounding to 8 bits"] if sigma < QUANTISATION else []
