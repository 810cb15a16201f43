r"""The step from t to s < t given a prediction of x_0 and of the noise: two conventions of eta, both named.

    x_s = alpha_s x0 + sqrt(sigma_s^2 - std^2) epsilon + std z

* *ddim* (Song et al. 2021, arXiv:2010.02502, eq. 16): std = eta sqrt(Var[x_s | x_t, x_0]). At eta = 1 this is the exact bridge
  q(x_s | x_t, x_0), so a *draw* of p(x_0 | x_t) followed by it leaves every marginal exact, at any number of steps.
* *fraction* (DDRM, DDNM, DDS, CM4IR; DiffPIR with zeta = eta^2): std = eta sigma_s. It does not converge to the reverse SDE as
  steps shrink: an unmeasured Gaussian direction keeps about three quarters of its variance at eta = 0.85.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fewstep.core.batch import like
from fewstep.core.noise import Noise
from fewstep.core.schedule import Schedule


def ddim_std(schedule: Schedule, t: Tensor, s: Tensor, eta: float) -> Tensor:
    """Return eta times the standard deviation of the bridge q(x_s | x_t, x_0), shape of `t`."""
    (alpha_t, sigma_t), (alpha_s, sigma_s) = schedule(t), schedule(s)
    share = (alpha_t * sigma_s / (alpha_s * sigma_t)).square()  # ratio_s^2 / ratio_t^2
    return eta * sigma_s * (1 - share).clamp_min(0).sqrt()


def fraction_std(schedule: Schedule, s: Tensor, eta: float) -> Tensor:
    """Return eta sigma_s, shape of `s`."""
    return eta * schedule(s)[1]


def bridge(schedule: Schedule, t: Tensor, s: Tensor, eta: float) -> tuple[Tensor, Tensor]:
    """Return the weights of epsilon and of fresh noise in x_s by the *ddim* convention, shape of `t` each."""
    std = ddim_std(schedule, t, s, eta)
    return (schedule(s)[1].square() - std.square()).clamp_min(0).sqrt(), std


def one_step_noise(schedule: Schedule, t: Tensor, s: Tensor, eta: float, table: int = 1000) -> tuple[Tensor, Tensor]:
    """Return the weights of epsilon and of fresh noise as UD2M's public code has them, shape of `t` each.

    The noise of one step of a table of `table` steps stands where that from s to t belongs, and a second fresh term is added:
    std = eta sigma_s / sigma_t sqrt(1 - abar_t / abar_(t - 1 / table)), fresh variance std^2 (1 + sigma_s^2). Marginals are not
    kept; it is here to reproduce the published sampler (Kemajou Mbakam et al. 2025, arXiv:2507.02686).
    """
    before = (t - 1 / table).clamp_min(0)
    beta = 1 - (schedule(t)[0] / schedule(before)[0]).square()
    std = eta * schedule(s)[1] / schedule(t)[1] * beta.clamp_min(0).sqrt()
    sigma = schedule(s)[1]
    return (sigma.square() - std.square()).clamp_min(0).sqrt(), std * (1 + sigma.square()).sqrt()


KERNELS = {"bridge": bridge, "one_step": one_step_noise}


def renoise(schedule: Schedule, s: Tensor, x0: Tensor, epsilon: Tensor, std: Tensor, noise: Noise) -> Tensor:
    """Return x_s from predictions of x_0 and epsilon, (N, *event); the fresh noise has standard deviation `std`."""
    kept = (schedule(s)[1].square() - std.square()).clamp_min(0).sqrt()
    return combine(schedule, s, x0, epsilon, (kept, std), noise)


def combine(
    schedule: Schedule, s: Tensor, x0: Tensor, epsilon: Tensor, weights: tuple[Tensor, Tensor], noise: Noise
) -> Tensor:
    """Return alpha_s x0 + kept epsilon + fresh z, (N, *event), for `weights` (kept, fresh)."""
    kept, fresh = weights
    x_s = like(schedule(s)[0], x0) * x0 + like(kept, x0) * epsilon
    if not bool(torch.any(fresh > 0)):
        return x_s
    return x_s + like(fresh, x0) * noise.randn_like(x0)


def epsilon_of(schedule: Schedule, t: Tensor, x_t: Tensor, x0: Tensor) -> Tensor:
    """Return (x_t - alpha_t x0) / sigma_t, (N, *event)."""
    alpha, sigma = schedule(t)
    return (x_t - like(alpha, x_t) * x0) / like(sigma, x_t)
