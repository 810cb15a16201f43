r"""S^3: an evolutionary search over the decisions and times of every step, guided by a trained predictor.

A solver is a list of genes, the decisions of each step (see `solvers.usf`) and the logarithms of the noise ratios. The first
generation is every named solver on every named grid. In a round, a network is trained to rank solvers by their genes on all that
were tried; children of the best are drawn in large number by crossover and mutation, ranked by the network, and only the most
promising are run, together with a few that were taken blindly so that the network also learns where it is wrong (Liu et al.
2023, section 4). Nothing that was tried is forgotten: the result is at least as good, on its bank, as every named solver.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from typing import ClassVar, final

import numpy as np
import torch
from torch import Tensor

from fewstep.core.checks import one_of
from fewstep.core.noise import mix
from fewstep.solvers._decisions import FORMS, RELAXATIONS, TERMS, Decision
from fewstep.solvers._references import UNIFIED
from fewstep.tuning.base import FINE, GAP, State, Task, Tuner, reference, times_from
from fewstep.tuning.losses import LOSSES, named_grids, score
from fewstep.tuning.predictor import fit
from fewstep.tuning.schedule_file import TunedSchedule

CHOICES: tuple[tuple, ...] = (tuple(FORMS), TERMS, tuple(RELAXATIONS), (0, 1), (False, True))
NAMED = (
    Decision("x0", 1),  # DDIM
    Decision("x0", 2, "half"),  # DPM-Solver++ 2M
    Decision("x0", 3, "exact"),
    *(Decision("epsilon", terms, "exact") for terms in (2, 3, 4)),  # DEIS in log rho
    *(Decision("x0", terms, "half", 0, True) for terms in (1, 2, 3)),  # UniPC
)


@final
@dataclass(frozen=True)
class SolverSearch(Tuner):
    """S^3.

    Args:
        rounds: generations after the first.
        children: solvers that are proposed in a round.
        tried: how many of them are run, of `steps` network calls per sample of the bank.
        blind: how many of these are taken without asking the predictor.
        parents: the best so far, from which children come.
        crossover: probability that a child has two parents.
        mutation: probability that a decision of a child is drawn anew.
        jitter: standard deviation of what is added to its log ratios.
        loss: energy or paired, see `losses`.
        bank: samples on which solvers are compared.
        fine: steps of the reference.
    """

    rounds: int = 15
    children: int = 400
    tried: int = 12
    blind: int = 3
    parents: int = 12
    crossover: float = 0.3
    mutation: float = 0.1
    jitter: float = 0.15
    loss: str = "paired"
    bank: int = 128
    fine: int = FINE

    reference: ClassVar = UNIFIED

    def __post_init__(self) -> None:
        one_of("loss", self.loss, LOSSES)
        if not 0 <= self.blind <= self.tried <= self.children or min(self.rounds, self.tried, self.fine) < 1:
            raise ValueError("rounds, tried and fine must be at least 1, and 0 <= blind <= tried <= children")
        if min(self.parents, self.bank) < 2 or not 0 <= self.crossover <= 1 or not 0 <= self.mutation <= 1:
            raise ValueError("parents and bank must be at least 2, crossover and mutation shares in [0, 1]")

    def init(self, task: Task) -> State:
        """See `Tuner`; every named solver on every named grid."""
        start, truth = reference(task, self.bank, self.fine)
        own = [[options.index(value) for options, value in zip(CHOICES, named, strict=True)] for named in NAMED]
        logs = [task.schedule.ratio(times[1:-1]).log() for times in named_grids(task)]
        pairs = list(itertools.product(own, logs))
        genes = torch.tensor([[gene] * task.steps for gene, _ in pairs])
        state = {"start": start, "truth": truth, "genes": genes, "logs": torch.stack([log for _, log in pairs])}
        return {**state, "scores": self._scores(task, state, state["genes"], state["logs"])}

    def step(self, task: Task, state: State, k: int) -> State:
        """See `Tuner`; one generation."""
        rng = np.random.default_rng(mix(task.seed, k))
        genes, logs = self._children(state, rng)
        net = fit(features(state["genes"], state["logs"]), state["scores"], mix(task.seed, k, 1))
        order = net(features(genes, logs)).argsort()
        guided = order[: self.tried - self.blind]
        blind = order[self.tried - self.blind :][torch.from_numpy(rng.permutation(self.children - len(guided)))][
            : self.blind
        ]
        chosen = torch.cat([guided, blind])
        fresh = {"genes": genes[chosen], "logs": logs[chosen]}
        fresh["scores"] = self._scores(task, state, fresh["genes"], fresh["logs"])
        return {**state, **{name: torch.cat([state[name], value]) for name, value in fresh.items()}}

    def result(self, task: Task, state: State, prior: str) -> TunedSchedule:
        """See `Tuner`; the figures are the loss on the bank of the best named solver and of what was found."""
        best, named = int(state["scores"].argmin()), len(NAMED) * len(named_grids(task))
        times = tuple(times_of_logs(task, state["logs"][best]).tolist())
        settings = {"decisions": tuple(tuple(decision) for decision in decisions(state["genes"][best]))}
        figures = {"loss_before": float(state["scores"][:named].min()), "loss_after": float(state["scores"][best])}
        return TunedSchedule("s3", prior, "usf", times, settings, figures)

    def _scores(self, task: Task, state: State, genes: Tensor, logs: Tensor) -> Tensor:
        """Return the loss of each solver on the bank, (E,) float64; one that diverges is worse than all."""
        out, usf = [], replace(task, solver="usf")
        for own, log in zip(genes, logs, strict=True):
            solver = usf.make(tuple(times_of_logs(task, log).tolist()), decisions=tuple(decisions(own)))
            out.append(score(usf, solver, state["start"], state["truth"], self.loss))
        return torch.tensor(out, dtype=torch.float64).nan_to_num(1e6, 1e6).clamp_max(1e6)

    def _children(self, state: State, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        """Return genes, (children, steps, 5), and log ratios, (children, steps - 1)."""
        best = state["scores"].argsort()[: self.parents]
        genes, logs = state["genes"][best].numpy(), state["logs"][best].cpu().numpy()
        first, second = rng.integers(len(best), size=(2, self.children))
        second = np.where(rng.random(self.children) < self.crossover, second, first)
        own = rng.random((self.children, genes.shape[1])) < 0.5  # which steps come from the first parent
        born = np.where(own[..., None], genes[first], genes[second])
        drawn = rng.integers([len(options) for options in CHOICES], size=born.shape)
        born = np.where(rng.random(born.shape) < self.mutation, drawn, born)
        times = np.where(own[:, 1:], logs[first], logs[second])
        times = times + self.jitter * rng.standard_normal(times.shape) * (rng.random(times.shape) < 0.5)
        return torch.from_numpy(born), torch.from_numpy(-np.sort(-times, axis=1))


def decisions(genes: Tensor) -> list[Decision]:
    """Return the decisions of genes, (steps, 5)."""
    return [Decision(*(options[i] for options, i in zip(CHOICES, row, strict=True))) for row in genes.tolist()]


def times_of_logs(task: Task, logs: Tensor) -> Tensor:
    """Return the times of falling log ratios between the first and 0, (steps - 1,) -> (steps + 1,), kept `GAP` apart."""
    first = task.schedule.ratio(torch.ones(1, dtype=torch.float64)).log()
    steps = torch.arange(1, len(logs) + 1, dtype=torch.float64)
    apart = torch.cat([first, logs + GAP * steps]).cummin(0)[0]  # equal neighbours end GAP apart
    return times_from(task.schedule, torch.exp(apart - GAP * torch.cat([torch.zeros(1, dtype=torch.float64), steps])))


def features(genes: Tensor, logs: Tensor) -> Tensor:
    """Return what the predictor sees, (E, G) float32: every choice as 0 or 1, and the log ratios over their own spread."""
    hot = [torch.nn.functional.one_hot(genes[..., i], len(options)).flatten(1) for i, options in enumerate(CHOICES)]
    return torch.cat([*hot, logs / 3], 1).float()
