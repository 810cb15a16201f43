"""What of UD2M can be chosen, as one object, and its training on an exact problem: networks on vectors, losses, levels, kernel."""

from __future__ import annotations

import copy
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from fewstep.bench.trials import Measurements, Setup, streams
from fewstep.core.batch import like
from fewstep.core.denoiser import Denoiser
from fewstep.core.noise import seeded
from fewstep.core.objective import Objective
from fewstep.core.schedule import Schedule
from fewstep.densities.batches import in_blocks
from fewstep.methods.ud2m import UD2M as Method
from fewstep.methods.ud2m import UNTRAINED
from fewstep.objectives.denoising import DenoisingScoreMatching
from fewstep.objectives.embeddings import Embedding, marginals, measured
from fewstep.objectives.matching import DistributionMatching, fake_score
from fewstep.objectives.ud2m import UD2M, Contest, Weights
from fewstep.training import Batches, Trainer, TrainingOptions
from fewstep.unfolded.decoders import AdaptedDecoder, CorrectedDecoder, Decoder
from fewstep.unfolded.lora import LoRAConfig
from fewstep.unfolded.network import UnfoldedNetwork
from fewstep.unfolded.sampler import Unfolded

SPREAD = 1.3  # standard deviation of a coordinate of the prior, about
LEVELS = DenoisingScoreMatching(median=0.5, spread=1.2, ratio_min=0.01, sigma_data=SPREAD)
# where most of the training is spent, and how much of it; the first time twice: from there one outer step must do
TIMES, SHARE = (UD2M.times[0], *UD2M.times), 0.9
Result = TypeVar("Result")


def corrected(setup: Setup, learned: Denoiser | None) -> Decoder:
    """Return the exact denoiser with a small correction."""
    return CorrectedDecoder(setup.dim, setup.width)


@dataclass(frozen=True)
class Adapted:
    """A decoder that is a copy of the learned prior, trained through LoRA or, without a rank, as a whole.

    Attributes:
        rank: of the additions; 0 leaves only the levels to be trained.
    """

    rank: int | None

    def __call__(self, setup: Setup, learned: Denoiser | None) -> Decoder:
        """Return the decoder."""
        assert learned is not None
        lora = None if self.rank is None else LoRAConfig(self.rank, max(self.rank, 1))
        return AdaptedDecoder(copy.deepcopy(learned).requires_grad_(), lora)


@dataclass(frozen=True)
class Design:
    """One choice of everything.

    Attributes:
        settings: levels, start, and the outer kernel; untrained.
        weights: of the loss.
        embeddings: where the energy score is computed.
        decoder: what is trained beside the levels.
        times: outer times that most of the training is spent on.
    """

    settings: Method
    weights: Weights = field(default_factory=Weights)
    embeddings: tuple[Embedding, ...] = (measured, marginals)
    decoder: Callable[[Setup, Denoiser | None], Decoder] = corrected
    times: tuple[float, ...] = TIMES

    def __post_init__(self) -> None:
        if self.settings.network:
            raise ValueError(f"the network {self.settings.network!r} is trained already, on photographs")

    @property
    def training(self) -> Design:
        """The design with everything at its default that changes nothing in training: designs that share it share a network."""
        of_network = {name: getattr(self.settings, name) for name in UNTRAINED}
        return replace(self, settings=Method(**of_network))

    def network(self, setup: Setup, learned: Denoiser | None = None) -> UnfoldedNetwork:
        """Return the network before training."""
        config = self.settings.unfolded().config
        return seeded(lambda: UnfoldedNetwork(config, self.decoder(setup, learned)), 0)

    def sampler(self, network: UnfoldedNetwork, steps: int) -> Unfolded:
        """Return the sampler of a network with this design's outer kernel."""
        return Unfolded(network, steps, self.settings.eta, self.settings.kernel, self.settings.grid)

    def train(self, setup: Setup, learned: Denoiser | None = None) -> UnfoldedNetwork:
        """Return the network after training.

        Args:
            setup: the problem.
            learned: the prior as a network, where the decoder or the fake score adapts one.
        """
        objective = UD2M(
            setup.prior,
            self.weights,
            self.embeddings,
            draws=setup.draws,
            times=self.times,
            share=SHARE,
            matching=DistributionMatching(LEVELS),
        )
        critic, fake = seeded(lambda: self._opponents(setup, learned), 1)
        contest = Contest(self.network(setup, learned), critic, fake)
        trained: Any = optimise(contest, objective, Measurements(setup), setup.steps)
        return trained.network

    def _opponents(self, setup: Setup, learned: Denoiser | None) -> tuple[VectorCritic | None, Denoiser | None]:
        """Return the critic and the fake score, where the loss has them."""
        critic = VectorCritic(setup.dim, setup.width) if self.weights.adversarial else None
        fake = fake_score(learned, LoRAConfig()) if self.weights.matching and learned is not None else None
        return critic, fake


class VectorDenoiser(Denoiser):
    """A small network behind EDM's preconditioning (Karras et al. 2022, arXiv:2206.00364, table 1): a prior that LoRA can adapt.

    Args:
        dim: size of x.
        width: of the three hidden layers.
        schedule: of x_t.
    """

    def __init__(self, dim: int, width: int, schedule: Schedule) -> None:
        super().__init__()
        self.schedule, self.event_shape = schedule, (dim,)
        hidden = [part for size in (dim + 1, width, width) for part in (nn.Linear(size, width), nn.SiLU())]
        self.net = nn.Sequential(*hidden, nn.Linear(width, dim))

    def forward(self, x_t: Tensor, t: Tensor, **cond: Any) -> Tensor:
        """See `Denoiser`."""
        alpha, sigma = (like(c, x_t) for c in self.schedule(torch.as_tensor(t).to(x_t).expand(len(x_t))))
        x, ratio = x_t / alpha, (sigma / alpha).clamp_min(1e-4)
        total = (ratio.square() + SPREAD**2).sqrt()
        out = self.net(torch.cat([x / total, ratio.log() / 3], 1))
        return SPREAD**2 / total.square() * x + ratio * SPREAD / total * out


class VectorCritic(nn.Module):
    """(x_0, back-projection, ratio) -> one logit, (N, 1), as `objectives.adversarial.Critic` does for images."""

    def __init__(self, dim: int, width: int) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(2 * dim + 1, width),
            nn.LeakyReLU(0.2),
            nn.Linear(width, width),
            nn.LeakyReLU(0.2),
            nn.Linear(width, 1),
        )

    def forward(self, x0: Tensor, back: Tensor, ratio: Tensor) -> Tensor:
        """Return the logits."""
        return self.net(torch.cat([x0, back, ratio.log()[:, None] / 3], 1))


@dataclass(frozen=True)
class Draws:
    """Batches of the prior of a `Setup`.

    Attributes:
        setup: the problem.
        size: of a batch.
    """

    setup: Setup
    size: int = 256

    def count(self, step: int) -> int:
        """Return the batch size."""
        return self.size

    def batch(self, step: int, items: Iterable[int]) -> Tensor:
        """Return draws of the prior, (B, D)."""
        noise = streams((8, step), items)
        return self.setup.prior.sample(len(noise), noise)


def learn_prior(setup: Setup) -> Denoiser:
    """Return a network trained to be the prior's denoiser, frozen."""
    network = seeded(lambda: VectorDenoiser(setup.dim, setup.width, setup.prior.schedule), 2)
    trained: Any = optimise(network, LEVELS, Draws(setup), setup.steps)
    return trained.eval().requires_grad_(False)


def optimise(model: nn.Module, objective: Objective, data: Batches, steps: int) -> nn.Module:
    """Return the model with averaged weights after `steps` steps on the CPU, leaving no file.

    Raises:
        KeyboardInterrupt: training was stopped by a signal: half of it must not stand in a table.
    """
    options = TrainingOptions(
        steps=steps,
        lr=2e-3,
        warmup=min(100, steps),
        lr_final=0.0,
        weight_decay=0.0,
        ema=0.999,
        precision="no",
        log_every=steps,
        validate_every=steps,
        checkpoint_every=steps,
    )
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(model, objective, data, Path(folder), options, cpu=True, streams=in_blocks)
        return trainer.run_whole()


def timed(function: Callable[[], Result]) -> tuple[Result, float]:
    """Return what `function` returns and the processor seconds that it took: a core may be shared."""
    begin = time.process_time()
    return function(), time.process_time() - begin
