r"""GGDM's training: the sampler is differentiated, and its times follow the gradient of a distance between samples.

Every solver here is a table of coefficients that are smooth functions of the times, so the samples are smooth in them, and

    log r_k = log r_0 - sum_(j <= k) exp(g_j),    r = sigma / alpha,

makes falling ratios of any real g. Adam minimises the distance through the unrolled sampler; each network call is recomputed in
the backward pass, so memory does not grow with the steps (Watson et al. 2022, who also free the coefficients of every step and
measure by a kernel distance of Inception's features; only the times are free here, and the solver keeps its order).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fewstep.core.checks import one_of
from fewstep.core.multistep import MultistepSolver
from fewstep.core.noise import Noise, mix
from fewstep.core.problem import Posterior
from fewstep.core.reference import Reference
from fewstep.core.sampler import State as Point
from fewstep.tuning.base import FINE, State, Task, Tuner, reference, times_from
from fewstep.tuning.losses import LOSSES, best_times, error, named_grids
from fewstep.tuning.schedule_file import TunedSchedule

BETAS, EPSILON = (0.9, 0.99), 1e-8  # Adam's


@final
@dataclass(frozen=True)
class GGDM(Tuner):
    """Times by the gradient through the sampler.

    Args:
        rounds: steps of Adam.
        items: samples per step, of `steps` differentiated network calls each.
        loss: energy (distance between the laws of samples and of the prior) or paired (distance to where the
            probability flow takes the same noise, of much less variance, for solvers without fresh noise).
        bank: samples of the prior by `fine` steps, from which the batches are taken.
        fine: steps of the reference.
        lr: learning rate of Adam on the logarithms of the gaps; a cosine takes it to 0.
    """

    rounds: int = 100
    items: int = 64
    loss: str = "paired"
    bank: int = 256
    fine: int = FINE
    lr: float = 0.05

    reference: ClassVar = Reference(
        "Learning Fast Samplers for Diffusion Models by Differentiating Through Sample Quality",
        "Watson, Daniel and Chan, William and Ho, Jonathan and Norouzi, Mohammad",
        2022,
        "International Conference on Learning Representations",
        "2202.05830",
    )

    def __post_init__(self) -> None:
        one_of("loss", self.loss, LOSSES)
        if min(self.rounds, self.fine) < 1 or not 2 <= self.items <= self.bank or self.lr <= 0:
            raise ValueError("rounds and fine must be at least 1, 2 <= items <= bank, and lr positive")

    def init(self, task: Task) -> State:
        """See `Tuner`; the bank, and the gaps of the named grid that is best on it."""
        if task.steps < 2:
            raise ValueError("one step has no times to tune")
        starts, truth = reference(task, self.bank, self.fine)
        times, before = best_times(task, named_grids(task), starts, truth, self.loss)
        gaps = (-task.schedule.ratio(times[:-1]).log().diff()).log()
        zeros, best = torch.zeros_like(gaps), torch.tensor([before], dtype=torch.float64)
        return {"gaps": gaps, "m": zeros, "v": zeros, "start": starts, "truth": truth, "before": best}

    def step(self, task: Task, state: State, k: int) -> State:
        """See `Tuner`; one step of Adam."""
        gaps = state["gaps"].clone().requires_grad_()
        generator = torch.Generator().manual_seed(mix(task.seed, k))
        chosen = torch.randperm(self.bank, generator=generator)[: self.items]
        _, slope = self.slope(task, gaps, state["start"][chosen], state["truth"][chosen], k)
        m = BETAS[0] * state["m"] + (1 - BETAS[0]) * slope
        v = BETAS[1] * state["v"] + (1 - BETAS[1]) * slope.square()
        size = (v / (1 - BETAS[1] ** (k + 1))).sqrt() + EPSILON
        rate = self.lr * (1 + torch.cos(torch.tensor(torch.pi * k / self.rounds))) / 2
        return {**state, "gaps": state["gaps"] - rate * m / (1 - BETAS[0] ** (k + 1)) / size, "m": m, "v": v}

    def slope(self, task: Task, gaps: Tensor, start: Tensor, truth: Tensor, k: int = 0) -> tuple[Tensor, Tensor]:
        """Return the loss, (), and its gradient in the gaps, (steps - 1,)."""
        loss = LOSSES[self.loss](sampled(task, times_of_gaps(task, gaps), start, k), truth)
        return loss.detach(), torch.autograd.grad(loss, gaps)[0]

    def result(self, task: Task, state: State, prior: str) -> TunedSchedule:
        """See `Tuner`; the figures are the loss on the bank, of the best named grid and of what became of it."""
        times = times_of_gaps(task, state["gaps"])
        after = error(task, times, state["start"], state["truth"], self.loss)
        figures = {"loss_before": float(state["before"]), "loss_after": after}
        return TunedSchedule("ggdm", prior, task.solver, tuple(times.tolist()), {}, figures)


def times_of_gaps(task: Task, gaps: Tensor) -> Tensor:
    """Return the times of log-gaps g, (steps - 1,) -> (steps + 1,), differentiable."""
    first = task.schedule.ratio(torch.ones((), dtype=torch.float64))
    return times_from(task.schedule, torch.exp(first.log() - torch.cat([gaps.new_zeros(1), gaps.exp().cumsum(0)])))


def sampled(task: Task, times: Tensor, start: Tensor, k: int = 0) -> Tensor:
    """Return what the solver of the task makes of `start` on `times`, (N, *event), differentiable in the times.

    Fresh noise, where the solver takes any, depends on (seed, k).
    """
    items, noise = task.items(len(start)), task.noise(len(start), 2, k)
    solver: MultistepSolver = task.make(tuple(times.tolist()))
    # one time per item: only then are the coefficients of the table left as tensors, with their history
    plan, state = solver.plan(task.schedule, times[:, None].expand(-1, len(start))), Point(start)

    def predict(problem: Posterior, x_t: Tensor, t: Tensor, noise: Noise) -> Tensor:
        problem.counts.network += 1
        seen = checkpoint(lambda x, t: problem.prior(x, t, **problem.cond), x_t, t.to(x_t), use_reentrant=False)
        assert isinstance(seen, Tensor)
        return seen

    for step in range(solver.steps):
        state = plan.advance(items, state, step, noise, predict)
    return solver.output(state)
