"""The recipe of a trained posterior sampler of photographs."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fewstep.core.checks import one_of
from fewstep.core.denoiser import Denoiser
from fewstep.core.files import files_hash
from fewstep.core.noise import seeded
from fewstep.data import RandomCrops, crop_shapes, largest, list_images, load_pixels, split
from fewstep.measurements import Family, SimulatedMeasurements
from fewstep.metrics import LPIPS_VARIABLE, Missing, lpips_net
from fewstep.objectives.adversarial import Critic, CriticConfig
from fewstep.objectives.denoising import DenoisingScoreMatching
from fewstep.objectives.embeddings import Embedding, Features, MeasuredPatches, Patches
from fewstep.objectives.matching import DistributionMatching, fake_score
from fewstep.objectives.ud2m import UD2M, Contest, Weights
from fewstep.priors.loaders import load_prior
from fewstep.priors.unet import UNetDenoiser
from fewstep.processes import process
from fewstep.recipes import build, training_options
from fewstep.recipes.sampling import SamplingFigures
from fewstep.training import Trainer
from fewstep.unfolded.decoders import AdaptedDecoder, ContextDecoder
from fewstep.unfolded.levels import LevelConfig
from fewstep.unfolded.lora import LoRAConfig
from fewstep.unfolded.network import UnfoldedConfig, UnfoldedNetwork
from fewstep.unfolded.store import find_network, load_network, prior_hash, save_adapter, save_network

# a copy of the prior as it is, or one that also sees the context; trained as a whole, or through LoRA
DECODERS: dict[str, type[AdaptedDecoder]] = {
    "full": AdaptedDecoder,
    "context": ContextDecoder,
    "lora": AdaptedDecoder,
    "lora-context": ContextDecoder,
}


@dataclass(frozen=True)
class UD2MRecipe:
    """How an unfolded network was trained.

    Attributes:
        prior: name or folder of the prior that it starts from.
        holdout: images kept for validation, the last ones in sorted order.
        decoder: "full" or "context" (a copy of the prior that also sees what the context is) train the whole copy, "lora" or
            "lora-context" train additions of low rank.
        network: fields of `UnfoldedConfig`, "levels" holding those of `LevelConfig`.
        weights: fields of `objectives.ud2m.Weights`.
        objective: draws, times, share, t_min and fake_turns of `objectives.ud2m.UD2M`.
        patches: fields of `objectives.embeddings.Patches`, where the energy score is computed.
        features: trunk whose LPIPS features are a further space of the energy score, "vgg" or "alex".
        measured: fields of `objectives.embeddings.MeasuredPatches`, a further space in the metric of the likelihood.
        lpips: trunk of the perceptual term, "vgg" or "alex"; its weights are found as `metrics.lpips_net` says.
        critic: fields of `CriticConfig`.
        matching: noise levels of distribution matching, fields of `DenoisingScoreMatching`.
        fake: fields of `LoRAConfig` for its fake score, a copy of the prior.
        crops: batch shapes, in turn: [[count, size], ...].
        families: the operators, fields of `measurements.Family` each.
        training: fields of `TrainingOptions`.
        validation: fields of `SamplingFigures`, without `outer`.
        outer: further fields of `Unfolded` (eta, kernel, grid) for validation and, in the header, for `load_sampler`.
        lora: fields of `LoRAConfig`, for a decoder that is trained through LoRA.
        checkpointing: recompute the iterations in the backward pass, so that memory does not grow with K.
        licence: of the trained weights, an SPDX name for the card.
        init: a trained sampler of the same decoder to start from, instead of the prior: a shipped one, a folder, or a hub id.
            Its levels are taken over too, unless it has another number of iterations.
    """

    prior: str
    holdout: int
    network: Mapping[str, Any]
    weights: Mapping[str, Any]
    crops: Sequence[Sequence[int]]
    families: Sequence[Mapping[str, Any]]
    training: Mapping[str, Any]
    validation: Mapping[str, Any]
    decoder: str = "context"
    objective: Mapping[str, Any] = field(default_factory=dict)
    patches: Mapping[str, Any] = field(default_factory=dict)
    lpips: str = "vgg"
    critic: Mapping[str, Any] = field(default_factory=dict)
    features: str | None = None
    measured: Mapping[str, Any] | None = None
    matching: Mapping[str, Any] | None = None
    fake: Mapping[str, Any] | None = None
    lora: Mapping[str, Any] | None = None
    checkpointing: bool = False
    outer: Mapping[str, Any] = field(default_factory=dict)
    licence: str = "unknown"
    init: str = ""

    def __post_init__(self) -> None:
        one_of("decoder", self.decoder, DECODERS)
        if self.lora is not None and "lora" not in self.decoder:
            raise ValueError(f"decoder {self.decoder!r} takes no lora; choose lora or lora-context")
        if not self.families:
            raise ValueError("families must name an operator, at least one")
        if self.init and "lora" in self.decoder:
            raise ValueError("init starts from a whole network, which a decoder trained through lora is not")

    def trainer(self, data: str | Path, out: str | Path, steps: int | None = None) -> Trainer:
        """Return the trainer on the images in `data`, writing to `out`.

        The sampler goes to `out`/sampler, and what LoRA adds to the prior to `out`/adapter.
        """
        options = training_options(self.training, steps)
        families = tuple(build(Family, entry, "families") for entry in self.families)
        device = process().device
        prior = load_prior(self.prior).to(device)
        if not isinstance(prior, UNetDenoiser):
            raise ValueError(f"a {type(prior).__name__} cannot be adapted by this recipe; it takes a UNetDenoiser")
        objective, network = self.losses(prior, device), self.unfolded(prior, options.seed)
        photographs = list_images(data)
        training, held_out = split(photographs, self.holdout)
        shapes = crop_shapes(self.crops)
        figures = build(SamplingFigures, {**self.validation, "outer": self.outer}, "validation")
        crops = RandomCrops([load_pixels(path, largest(shapes)) for path in training], shapes, options.seed)
        measurements = SimulatedMeasurements(crops, families, str(device))
        measurements.check()
        facts = {
            "prior": self.prior,
            "recipe": {"kind": "ud2m", **asdict(self)},
            "data": f"{len(photographs)} photographs, of which the last {self.holdout} in sorted order were held out",
            "command": f"fewstep train recipe.yaml {Path(data).name} --out {Path(out).name} --steps {options.steps}",
            "licence": self.licence,
            **({"outer": self.outer} if self.outer else {}),
        }
        sources = {"data": files_hash(photographs), "prior_sha256": prior_hash(prior)}
        trainer = Trainer(
            model=Contest(network, self._critic(objective, options.seed), self._fake(objective, prior, options.seed)),
            objective=objective,
            data=measurements,
            out=Path(out),
            options=options,
            validate=figures.on([load_pixels(path, figures.size) for path in held_out], families, prior, str(device)),
            describe={**_numbers(self), "training": {"seed": options.seed}, **sources},
        )
        trainer.export = partial(_export, trainer, prior=prior, facts=facts)
        return trainer

    def unfolded(self, prior: UNetDenoiser, seed: int) -> UnfoldedNetwork:
        """Return the network before training; every process draws the same weights."""
        given = dict(self.network)
        levels = build(LevelConfig, given.pop("levels", {}), "levels")
        config = build(UnfoldedConfig, {**given, "levels": levels}, "network")
        lora = build(LoRAConfig, self.lora or {}, "lora") if "lora" in self.decoder else None
        kind = DECODERS[self.decoder]
        network = seeded(lambda: UnfoldedNetwork(config, kind(prior.with_context(kind.IMAGES), lora)), seed)
        if self.init:
            _begin_from(network, load_network(find_network(str(self.init))))
        network.checkpointing = self.checkpointing
        return network

    def losses(self, prior: Any, device: torch.device | str = "cpu") -> UD2M:
        """Return the objective; ValueError where the weights of LPIPS are asked for and missing."""
        weights = build(Weights, self.weights, "weights")
        lpips = _lpips(self.lpips, "the perceptual term", device) if weights.perceptual else None
        matching = DistributionMatching(build(DenoisingScoreMatching, self.matching or {}, "matching"))
        embeddings = self._embeddings(device) if weights.energy else ()
        fixed = {"prior": prior, "weights": weights, "embeddings": embeddings, "lpips": lpips, "matching": matching}
        return build(UD2M, {**self.objective, **fixed}, "objective")

    def _embeddings(self, device: torch.device | str) -> tuple[Embedding, ...]:
        found: list[Embedding] = [build(Patches, self.patches, "patches")]
        if self.measured is not None:
            found.append(build(MeasuredPatches, self.measured, "measured"))
        if self.features is not None:
            found.append(Features(_lpips(self.features, "the energy score of features", device)))
        return tuple(found)

    def _critic(self, objective: UD2M, seed: int) -> Critic | None:
        if not objective.weights.adversarial:
            return None
        config = build(CriticConfig, self.critic, "critic")
        smallest = min(shape.size for shape in crop_shapes(self.crops))
        if not smallest >> config.stages:
            raise ValueError(f"critic: crops of {smallest} pixels cannot be halved {config.stages} times")
        return seeded(lambda: Critic(config), seed + 1)

    def _fake(self, objective: UD2M, prior: UNetDenoiser, seed: int) -> Denoiser | None:
        if not objective.weights.matching:
            return None
        return seeded(lambda: fake_score(prior, build(LoRAConfig, self.fake or {}, "fake")), seed + 2)


def _begin_from(network: UnfoldedNetwork, trained: UnfoldedNetwork) -> None:
    """Copy the weights of `trained`; levels of another number of iterations stay at their base."""
    weights, own, wanted = trained.state_dict(), trained.config.levels, network.config.levels
    if own.iterations == wanted.iterations and own != wanted:
        raise ValueError(f"init: the trained sampler has the levels {own}, this recipe has {wanted}")
    if trained.config.levels.iterations != network.config.levels.iterations:
        weights |= {name: value for name, value in network.state_dict().items() if name.startswith("levels.")}
    try:
        network.load_state_dict(weights)
    except RuntimeError as error:
        raise ValueError("init: the trained sampler has another decoder or other levels than this recipe") from error


def _lpips(net: str, what: str, device: torch.device | str) -> nn.Module:
    """Return the LPIPS network; ValueError where its weights are missing."""
    try:
        return copy.deepcopy(lpips_net(net)).to(device)
    except Missing as reason:
        raise ValueError(
            f"{what} needs the LPIPS weights of {net}: set {LPIPS_VARIABLE} to their file or folder, or leave it out of the recipe "
            f"({reason})"
        ) from None


def _numbers(recipe: UD2MRecipe) -> dict[str, Any]:
    """Return the fields that a run shares with the one that resumes it: all that change its numbers."""
    return {name: value for name, value in asdict(recipe).items() if name not in ("checkpointing", "licence")}


def _export(trainer: Trainer, contest: Any, prior: UNetDenoiser, facts: Mapping[str, Any]) -> None:
    network = contest.network
    known = {**facts, "steps": trainer.step}  # the command says how many were asked for
    save_network(network, trainer.out / "sampler", known)
    if network.decoder.lora is not None:
        save_adapter(network, prior, trainer.out / "adapter", known)
