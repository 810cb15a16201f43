"""From draws of an imperfect sampler to draws of the target: independence Metropolis, Langevin polishing, SMC on top."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fewstep.core.density import TargetDensity
from fewstep.core.noise import Noise, Streams, mix
from fewstep.densities.base import Transport, Walked
from fewstep.densities.draws import Draws
from fewstep.densities.estimators.gaussian import log_normal
from fewstep.densities.mcmc.base import MonteCarlo
from fewstep.densities.mcmc.bridge import Bridge, StandardNormal
from fewstep.densities.mcmc.crank_nicolson import CrankNicolson
from fewstep.densities.mcmc.hamiltonian import Hamiltonian, mala
from fewstep.densities.mcmc.sequential import SequentialMonteCarlo
from fewstep.densities.whitened import Whitened

_PILOT = 512  # rows on which the step size is adapted before it is fixed


def independence_metropolis(draws: Draws, chains: int = 32, burn_in: float = 0.2, seed: int = 0) -> Draws:
    """Return chains that propose the draws one after the other and accept with probability min(1, w' / w); no further calls.

    Tierney 1994, Ann. Statist. 22. The rows hang together within a chain; a weight that is never left shows as repeats.

    Args:
        draws: independent, with weights of kind "unbiased".
        chains: how many share the draws; rows that do not fill them are left out.
        burn_in: share of each chain that is thrown away.
        seed: of the acceptances.

    Raises:
        ValueError: weights of another kind, draws that hang together, or too few of them.
    """
    length = len(draws) // chains
    if draws.kind != "unbiased" or draws.group != 1:
        raise ValueError(f"needs independent draws with unbiased weights, got kind {draws.kind!r}, group {draws.group}")
    if length < 2 or not 0 <= burn_in < 1:
        raise ValueError(f"{len(draws)} draws do not fill {chains} chains of two, or burn_in lies outside [0, 1)")
    log_w = draws.chances()[: chains * length].reshape(chains, length)
    log_u = Streams(seed, range(chains), torch.float64, log_w.device).rand(length).log()
    at = torch.zeros(chains, dtype=torch.long, device=log_w.device)
    path, row = [], torch.arange(chains, device=log_w.device)
    for k in range(length):
        # from weight zero everything is accepted, -inf proposed never
        better = log_u[:, k] < log_w[:, k] - log_w[row, at].clamp_min(-torch.finfo(torch.float64).max)
        at = torch.where(better | (log_w[row, at] == -math.inf), torch.full_like(at, k), at)
        path.append(at)
    kept = torch.stack(path, 1)[:, int(burn_in * length) :]
    rows = (kept + row[:, None] * length).flatten()
    return draws.picked(rows, group=kept.shape[1])


def polish(
    draws: Draws, target: TargetDensity, steps: int = 10, kernel: Hamiltonian | None = None, seed: int = 0
) -> Draws:
    """Return the draws after Markov steps that leave the target invariant, MALA by default.

    Draws without weights come closer to the target with each step, within the modes they are in. Weights stay as they are and
    stay valid: E[w f(x)] = Z E[f] holds for x moved by an invariant kernel as for x (Neal 2001, section 2.3). The step
    size is adapted on copies of the first rows and then fixed.

    Args:
        draws: of any sampler.
        target: the density that they are for; of a `Whitened` one the steps are taken in its coordinates.
        steps: how many.
        kernel: the Markov step.
        seed: of its noise.
    """
    begin, kernel = time.perf_counter(), kernel or mala()
    whitened = target if isinstance(target, Whitened) else Whitened(target)
    bridge, one = Bridge(StandardNormal(target.dim), whitened), torch.ones((), dtype=torch.float64)
    with torch.no_grad():
        y = whitened.to_y(draws.x)
        size = _step_size(kernel, bridge, y[:_PILOT], mix(seed, 1))
        noise, state = Streams(mix(seed, 2), range(len(y)), y.dtype, y.device), bridge.at(y)
        for _ in range(steps):
            state, _ = kernel.step(bridge, state, one, size, noise)
    return replace(
        draws,
        x=whitened.to_x(state.x),
        target_calls=draws.target_calls + bridge.target_calls / len(y),
        gradient_calls=draws.gradient_calls + bridge.gradient_calls / len(y),
        seconds=draws.seconds + time.perf_counter() - begin,
    )


@dataclass(frozen=True, eq=False)
class KernelMixture(TargetDensity):
    """An equal mixture of Gaussians around draws, with the covariance of the draws: a normalised law that lies where they do.

    Centres are drawn towards the mean so that the kernels do not widen the whole (West 1993, J. R. Statist. Soc. B 55).

    Args:
        centres: (M, d).
        root: (d, d), lower triangular, the root of each kernel's covariance.
    """

    centres: Tensor
    root: Tensor

    log_z = 0.0

    @property
    def dim(self) -> int:  # type: ignore[override]
        """See `TargetDensity`."""
        return self.centres.shape[1]

    @classmethod
    def fitted(cls, x: Tensor, count: int) -> KernelMixture:
        """Return the mixture around the first `count` rows with the covariance of all, (N, d), of Silverman's width."""
        d = x.shape[1]
        centres, width = x[:count], min((4 / (d + 2) / min(count, len(x))) ** (1 / (d + 4)), 1.0)
        cov = torch.cov(x.T).reshape(d, d)
        root = torch.linalg.cholesky(cov + 1e-8 * cov.diagonal().mean() * torch.eye(d, dtype=x.dtype, device=x.device))
        return cls(x.mean(0) + math.sqrt(1 - width**2) * (centres - x.mean(0)), width * root)

    def log_prob(self, x: Tensor) -> Tensor:
        """See `TargetDensity`."""
        distances = torch.cdist(self._standard(x), self._standard(self.centres)).square()
        constant = self.root.diagonal().log().sum() + self.dim / 2 * math.log(2 * math.pi) + math.log(len(self.centres))
        return (-0.5 * distances).logsumexp(1) - constant

    def score(self, x: Tensor) -> Tensor:
        """See `TargetDensity`: towards the centres' mean, weighted by responsibilities."""
        share = (-0.5 * torch.cdist(self._standard(x), self._standard(self.centres)).square()).softmax(1)
        return torch.cholesky_solve((share @ self.centres - x).T, self.root).T

    def sample(self, noise: Noise) -> Tensor:
        """See `TargetDensity`."""
        row = (noise.rand(1)[:, 0] * len(self.centres)).long().clamp_max(len(self.centres) - 1)
        return self.centres[row] + noise.randn(self.dim) @ self.root.T

    def _standard(self, x: Tensor) -> Tensor:
        return torch.linalg.solve_triangular(self.root, x.T, upper=False).T


def smc_on_top(
    draws: Draws,
    target: TargetDensity,
    n: int = 8192,
    *,
    method: MonteCarlo | None = None,
    centres: int = 256,
    seed: int = 0,
) -> Draws:
    """Return new weighted draws by sequential Monte Carlo that starts from a mixture around the given ones.

    The start is a law with a density, so the weights are unbiased whatever the draws were, with or without weights of
    their own; good draws make the path short. Costs are those of the draws and of the path, per new draw.

    Args:
        draws: of any sampler; resampled by their weights where as many are effective as there are centres.
        target: the density that they are for; of a `Whitened` one the path runs in its coordinates.
        n: new draws, a multiple of the particles of a run.
        method: the sampler on top; eight runs are what its interval of log Z should have at least.
        centres: kernels of the mixture.
        seed: one integer.
    """
    whitened = target if isinstance(target, Whitened) else Whitened(target)
    useful = draws.kind == "unbiased" and len(draws) * draws.ess >= centres
    some = draws.resample(seed=seed) if useful else draws
    rows = torch.randperm(len(some), generator=torch.Generator().manual_seed(seed))
    y = whitened.to_y(some.x[rows]).double()
    base = KernelMixture.fitted(y[y.isfinite().all(1)], centres)
    found = (method or SequentialMonteCarlo()).sample(whitened, n, seed=seed, base=base)
    share = len(draws) / n
    return replace(
        found,
        nfe=share * draws.nfe,
        target_calls=found.target_calls + share * draws.target_calls,
        gradient_calls=found.gradient_calls + share * draws.gradient_calls,
        seconds=found.seconds + draws.seconds,
    )


@dataclass(frozen=True, eq=False)
class Latent(TargetDensity):
    """The target seen through a map f: rho(f(z)) |det Df(z)|, of the target's log Z, and N(0, I) itself where f is exact.

    Args:
        sampler: whose map, jumping where it takes several steps.
        steps: of the map.
    """

    sampler: Transport
    steps: int = 1

    def __post_init__(self) -> None:
        if self.sampler.renoise and self.steps > 1:
            raise ValueError("samples that are noised again are no map of their first noise: use one step")

    @property
    def dim(self) -> int:  # type: ignore[override]
        """See `TargetDensity`."""
        return self.sampler.target.dim

    @property
    def log_z(self) -> float | None:  # type: ignore[override]
        """See `TargetDensity`: that of the target, where the map is a bijection."""
        return self.sampler.target.log_z

    def log_prob(self, x: Tensor) -> Tensor:
        """See `TargetDensity`, (N, d) -> (N,) float64."""
        return self._walked(x).log_weights + log_normal(x.double())

    def score(self, x: Tensor) -> Tensor:
        """Refused: the determinant is taken without its own derivative."""
        raise NotImplementedError("this density has no gradient: use moves that need none, as `CrankNicolson`")

    def to_x(self, z: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return what the map makes of z, (N, d) -> (N, d), in the coordinates of the target; and its signs, (N,), if it folds."""
        y, _, signs = self._walked(z)
        return self.sampler.whitened.to_x(y), signs if bool((signs < 0).any()) else None

    def _walked(self, z: Tensor) -> Walked:
        unused = Streams(0, range(1), device=z.device)  # jumps take no noise but their start
        return self.sampler.walked(z.float(), self.steps, unused, True)


@torch.no_grad()
def smc_through(
    sampler: Transport, n: int = 8192, *, steps: int = 1, method: SequentialMonteCarlo | None = None, seed: int = 0
) -> Draws:
    """Return weighted draws by sequential Monte Carlo in the noise that a map starts from (Hoffman et al. 2019, arXiv:1903.03704).

    The path leads from N(0, I) to the target as the map shows it, rho(f(z)) |det Df(z)|: the better the map, the shorter. The
    moves need no gradient and have the shape of the target, because the map has it; each costs a determinant. Where the map folds
    the path leads to more than the target, and what is too much is taken off by the signs of determinants, see `Draws`.

    Args:
        sampler: what `distill` or `laplace` returned.
        n: draws, a multiple of the particles of a run.
        steps: of the map.
        method: the sampler; Crank-Nicolson moves where absent.
        seed: one integer.
    """
    begin, latent = time.perf_counter(), Latent(sampler, steps)
    found = (method or SequentialMonteCarlo(CrankNicolson(), 1024, moves=5)).sample(latent, n, seed=seed)
    x, signs = latent.to_x(found.x)
    cost, calls = sampler.cost(steps), 1 + found.target_calls
    return replace(
        found,
        x=x,
        signs=signs,
        target_calls=calls,
        nfe=cost.nfe * calls,
        gradient_calls=cost.gradient_calls * calls,
        seconds=time.perf_counter() - begin,
    )


def _step_size(kernel: Hamiltonian, bridge: Bridge, y: Tensor, seed: int) -> Tensor:
    """Return step sizes, (d,), at which the kernel accepts as it should on copies of `y`."""
    noise, one = Streams(seed, range(len(y)), y.dtype, y.device), torch.ones((), dtype=torch.float64)
    state, size = bridge.at(y), torch.full_like(y[0], 0.1)
    for k in range(60):
        state, accept = kernel.step(bridge, state, one, size, noise)
        size = kernel.adapted(size, accept.mean(), k)
    return size
