r"""Align Your Steps: the times that minimise a bound on the divergence of the first-order stochastic sampler.

In z = x_t / alpha_t and r = sigma_t / alpha_t, Girsanov's theorem gives the divergence between the paths of the reverse SDE and
those of the sampler that keeps D fixed within a step,

    KLUB = sum_i int_{r_(i-1)}^{r_i} r^-3 E |D(z_r, r) - D(z_(r_i), r_i)|^2 dr,    z_(r') = z_r + sqrt(r'^2 - r^2) xi

(Sabour et al. 2024, section 3.2). It is a sum over steps, and every pair of levels can be had from the same forward paths: D is
evaluated once at each node of a table of ratios, its Gram matrix G over the nodes gives E |D - D'|^2 = G_rr - 2 G_rr' + G_r'r'
for all pairs, and dynamic programming finds the best nodes. That is the global minimum on the table, where the paper sweeps over
the times of a coarse schedule, one at a time, and subdivides it.

On N(0, c^2 I) a step from b to a costs d/2 (q - 1 - log q) with q = (1 + c^2/a^2) / (1 + c^2/b^2), so the best schedule has
1 + c^2 / r^2 in geometric progression. (The arctan grid, theorem 3.1, is best for DDIM on the same data, another criterion.)

The bound is loose, and at few steps its minimum spends most of them on the lowest levels; the paper stops its sweeps early. Here
the times on the way from the best named grid to the minimum, and minima for several lowest ratios, are tried on the solver itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from fewstep.core.batch import like
from fewstep.core.checks import one_of
from fewstep.core.grid import lowest_ratio
from fewstep.core.reference import Reference
from fewstep.tuning.base import FINE, State, Task, Tuner, reference, times_from
from fewstep.tuning.losses import LOSSES, best_times, named_grids
from fewstep.tuning.schedule_file import TunedSchedule


@final
@dataclass(frozen=True)
class AlignYourSteps(Tuner):
    """Align Your Steps.

    Args:
        rounds: batches of forward paths.
        items: paths per batch; each costs `nodes` network calls, and `fine` for its sample.
        nodes: levels of the table, evenly spaced in the logarithm of the ratio.
        lowest: candidates for the last ratio before 0, which the bound cannot choose: it grows without limit as that falls.
        stops: shares of the way, in log ratio, from the best named grid to the minimum of the bound that are tried.
        loss: energy or paired, by which they are judged, see `losses`.
        bank: samples on which.
        fine: steps by which a sample of the prior is drawn.
    """

    rounds: int = 8
    items: int = 32
    nodes: int = 120
    lowest: tuple[float, ...] = (0.01, 0.02, 0.05, 0.1, 0.2)
    stops: tuple[float, ...] = (0.25, 0.5, 0.75, 1.0)
    loss: str = "paired"
    bank: int = 256
    fine: int = FINE

    reference: ClassVar = Reference(
        "Align Your Steps: Optimizing Sampling Schedules in Diffusion Models",
        "Sabour, Amirmojtaba and Fidler, Sanja and Kreis, Karsten",
        2024,
        "International Conference on Machine Learning",
        "2404.14507",
    )

    def __post_init__(self) -> None:
        one_of("loss", self.loss, LOSSES)
        if min(self.rounds, self.items, self.fine) < 1 or min(self.nodes, self.bank) < 2:
            raise ValueError("rounds, items and fine must be at least 1, nodes and bank at least 2")
        if not self.lowest or min(self.lowest) <= 0 or not all(0 < share <= 1 for share in self.stops):
            raise ValueError("lowest must be positive and stops shares in (0, 1]")

    def init(self, task: Task) -> State:
        """See `Tuner`; the Gram matrix of nothing."""
        if not 1 <= task.steps <= self.nodes:
            raise ValueError(f"steps must lie between 1 and the number of nodes, {self.nodes}, got {task.steps}")
        return {"gram": torch.zeros(self.nodes, self.nodes, dtype=torch.float64)}

    def step(self, task: Task, state: State, k: int) -> State:
        """See `Tuner`; one more batch of paths, through samples of the prior."""
        _, x0 = reference(task, self.items, self.fine, k)
        gram = gram_matrix(task, x0, self.ratios(task), k)
        return {"gram": state["gram"] + gram.cpu() / self.rounds}

    def result(self, task: Task, state: State, prior: str) -> TunedSchedule:
        """See `Tuner`; the last step, from the lowest ratio to 0, is the prediction itself."""
        starts, truth = reference(task, self.bank, self.fine, self.rounds)
        start, before = best_times(task, named_grids(task), starts, truth, self.loss)
        minima = [self.minimum(task, state["gram"], low) for low in self.lowest]
        between = [between_times(task, start, times, share) for times in minima for share in self.stops]
        times, after = best_times(task, [start, *between], starts, truth, self.loss)
        figures = {"loss_before": before, "loss_after": after}
        return TunedSchedule("ays", prior, task.solver, tuple(times.tolist()), {}, figures)

    def minimum(self, task: Task, gram: Tensor, lowest: float) -> Tensor:
        """Return the times, (steps + 1,), that minimise the bound down to the node nearest to `lowest`, and then lead to 0."""
        ratios = self.ratios(task)
        last = max(task.steps, int((ratios - lowest).abs().argmin()) + 1)
        chosen = shortest_path(step_costs(ratios[:last], gram[:last, :last]), task.steps - 1)
        return times_from(task.schedule, ratios[chosen])

    def ratios(self, task: Task) -> Tensor:
        """Return the nodes of the table, falling, (nodes,) float64."""
        high = task.schedule.ratio(torch.ones((), dtype=torch.float64))
        low = lowest_ratio(task.schedule).clamp_min(min(self.lowest))
        if not max(self.lowest) < float(high):
            raise ValueError(f"lowest must be below the ratio at t = 1, {float(high):.3g}")
        return torch.exp(high.log() + torch.linspace(0, 1, self.nodes, dtype=torch.float64) * (low / high).log())


def between_times(task: Task, a: Tensor, b: Tensor, share: float) -> Tensor:
    """Return the times `share` of the way from a to b in the logarithm of the ratio, (steps + 1,) each."""
    logs = [task.schedule.ratio(times[:-1]).log() for times in (a, b)]
    return times_from(task.schedule, torch.exp(torch.lerp(logs[0], logs[1], share)))


@torch.no_grad()
def gram_matrix(task: Task, x0: Tensor, ratios: Tensor, k: int = 0) -> Tensor:
    """Return G_ij = mean over items of <D(z_i, r_i), D(z_j, r_j)> along forward paths from x0, (M, M) float64.

    Args:
        task: the prior and the seed.
        x0: samples of the prior, (N, *event).
        ratios: (M,), falling.
        k: the batch, for the noise.
    """
    items, noise, seen = task.items(len(x0)), task.noise(len(x0), 1, k), []
    z, below = x0, torch.zeros((), dtype=torch.float64)
    for ratio in ratios.flip(0):  # a path gains noise as the ratio grows
        z = z + (ratio**2 - below**2).sqrt().to(z) * noise.randn_like(z)
        below, t = ratio, task.schedule.time(ratio)
        seen.append(items.denoise(like(task.schedule(t)[0], z) * z, t.to(z)).flatten(1))
    stacked = torch.stack(seen[::-1]).flatten(1).double()
    return stacked @ stacked.T / len(x0)


def step_costs(ratios: Tensor, gram: Tensor) -> Tensor:
    """Return the cost of one step from node i down to node j, (M, M) float64; infinite for j <= i.

    Args:
        ratios: (M,), falling.
        gram: the Gram matrix of the predictions, (M, M).
    """
    norms = gram.diagonal()
    differences = norms[:, None] - 2 * gram + norms  # E |D_i - D_j|^2
    weighted = differences * ratios**-2  # dr / r^3 = dlog(r) / r^2
    inner = torch.cumulative_trapezoid(weighted, -ratios.log(), dim=1)
    totals = torch.cat([torch.zeros_like(inner[:, :1]), inner], 1)
    cost = totals - totals.diagonal()[:, None]
    return cost.masked_fill(torch.ones_like(cost).tril().bool(), torch.inf)


def shortest_path(cost: Tensor, steps: int) -> list[int]:
    """Return the `steps` + 1 nodes from the first to the last whose costs sum to the least, by dynamic programming."""
    if steps == 0:
        return [0]
    best, previous = cost[0], []
    for _ in range(steps - 1):
        through = best[:, None] + cost
        best, origin = through.min(0)
        previous.append(origin)
    nodes = [len(cost) - 1]
    for origin in reversed(previous):
        nodes.insert(0, int(origin[nodes[0]]))
    return [0, *nodes]
