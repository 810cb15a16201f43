"""`check_likelihood`: what every likelihood must satisfy, exported so that those of others can be held to it too.

Each check raises AssertionError with what was found. Use float64 and events of at most a few hundred numbers: the truths are
dense matrices.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fewstep.core.batch import item_dot, like, real_rows, tile
from fewstep.core.likelihood import GaussianLikelihood, JointLikelihood, Likelihood
from fewstep.core.noise import Noise, mix
from fewstep.priors.exact import dense_matrix

STANDARD_ERRORS = 5.0
_RHOS = (0.05, 1.0, 7.0)


def check_likelihood(
    likelihood: Likelihood,
    *,
    tol: float = 1e-8,
    smooth: bool = True,
    alone: Callable[[int], Likelihood] | None = None,
    alone_tol: float = 1e-6,
    num_samples: int = 4000,
    seed: int = 0,
) -> None:
    """Hold a likelihood to the whole contract, as far as it says that it provides it.

    Args:
        likelihood: of B measurements, float64.
        tol: largest relative error of what has a closed form.
        smooth: whether -log p is the function that the prox minimises; False for hard constraints, whose prox is a projection.
        alone: b -> the likelihood of measurement b alone, to compare with the batch.
        alone_tol: largest absolute difference between an item alone and in the batch.
        num_samples: draws for the check of the exact draw.
        seed: of the random points.

    Raises:
        AssertionError: a check failed.
    """
    check_form(likelihood, seed)
    if isinstance(likelihood, GaussianLikelihood):
        check_adjoint(likelihood, tol, seed)
        check_log_prob(likelihood, tol, seed)
    if "gradient" in likelihood.provides:
        check_score(likelihood, tol, seed)
    if "prox" in likelihood.provides:
        (check_prox if smooth else check_projection)(likelihood, tol, seed)
        check_neighbours(likelihood, alone_tol, seed)
    if "draw" in likelihood.provides:
        check_draw_form(likelihood, alone_tol, seed)
    if isinstance(likelihood, GaussianLikelihood):
        check_joint(likelihood, tol, seed)
        check_draw(likelihood, num_samples=num_samples, seed=seed)
    if alone is not None:
        check_alone(likelihood, alone, alone_tol, seed)


def check_form(likelihood: Likelihood, seed: int = 0) -> None:
    """Shapes, dtype, expansion, untouched inputs and global generator, and a clear refusal of what is not provided."""
    before, generator = _values(likelihood), torch.get_rng_state()
    x = points(likelihood, seed)
    kept = x.clone()
    assert likelihood.log_prob(x).shape == (likelihood.batch,), "log_prob must give one number per item"
    assert likelihood.score(x).shape == x.shape and likelihood.start().shape == x.shape
    assert bool(torch.isfinite(likelihood.start()).all()), "start is not finite"
    if "prox" in likelihood.provides:
        out = likelihood.prox(x, 1.0)
        assert out.shape == x.shape and out.dtype == x.dtype and bool(torch.isfinite(out).all())
    twice = likelihood.expand(2)
    assert twice.batch == 2 * likelihood.batch
    close(twice.log_prob(torch.cat([x, x])), likelihood.log_prob(x).repeat(2), 1e-10, "expand(2)")
    assert torch.equal(x, kept), "an input was modified"
    assert all(torch.equal(a, b) for a, b in zip(before, _values(likelihood), strict=True)), (
        "the likelihood was modified"
    )
    assert torch.equal(torch.get_rng_state(), generator), "the global generator was used"


def check_adjoint(likelihood: GaussianLikelihood, tol: float = 1e-8, seed: int = 0) -> None:
    """<A x, v> = <x, A' v> for random x and v of each item."""
    x = points(likelihood, seed)
    v = noise_of(likelihood, seed + 1).randn_like(likelihood.y)
    left, right = item_dot(likelihood.A(x), v), item_dot(x, likelihood.A_adjoint(v))
    size = likelihood.A(x).abs().flatten(1).norm(dim=1) * v.abs().flatten(1).norm(dim=1)
    error = float(((left - right).abs() / size.clamp_min(1e-300)).max())
    assert error <= tol, f"A_adjoint is not the adjoint of A: relative error {error:.1e}"


def check_log_prob(likelihood: GaussianLikelihood, tol: float = 1e-8, seed: int = 0) -> None:
    """`log_prob` is -|y - A x|^2 / (2 sigma^2) by dense algebra, up to a constant for each item."""
    matrix = _real_matrix(likelihood)

    def dense(x: Tensor) -> Tensor:
        r = real_rows(likelihood.y) - torch.einsum("bmd,bd->bm", matrix, x.flatten(1))
        return -0.5 * item_dot(r, r) / likelihood.sigma**2

    a, b = points(likelihood, seed), points(likelihood, seed + 1)
    # relative to both terms: their difference may be small
    size = 1 + dense(a).abs() + dense(b).abs()
    change = likelihood.log_prob(a) - likelihood.log_prob(b)
    close(change / size, (dense(a) - dense(b)) / size, tol, "log_prob against dense algebra")


def check_score(likelihood: Likelihood, tol: float = 1e-8, seed: int = 0) -> None:
    """`score` is the gradient of `log_prob`."""
    x = points(likelihood, seed).requires_grad_()
    gradient = torch.autograd.grad(likelihood.log_prob(x).sum(), x)[0]
    close(likelihood.score(x.detach()), gradient, tol, "score against the gradient of log_prob")


def check_prox(likelihood: Likelihood, tol: float = 1e-8, seed: int = 0) -> None:
    """The prox solves the dense system of a linear-Gaussian likelihood; otherwise its gradient vanishes."""
    z = points(likelihood, seed)
    for rho in (*_RHOS, _levels(likelihood)):
        x = likelihood.prox(z, rho)
        if isinstance(likelihood, GaussianLikelihood):
            close(x, dense_prox(likelihood, z, rho), tol, f"prox at rho = {rho} against a dense solve")
            continue
        width = like(torch.as_tensor(rho, dtype=z.dtype), z)
        slope = x - z - width**2 * likelihood.score(x)
        size = (1 + (x - z).abs().max() + (width**2 * likelihood.score(z)).abs().max()) * (1 + z.abs().max())
        assert float(slope.abs().max() / size) <= tol, (
            f"prox at rho = {rho} is not stationary: {float(slope.abs().max()):.1e}"
        )


def check_projection(likelihood: Likelihood, tol: float = 1e-4, seed: int = 0) -> None:
    """The prox of a hard constraint is a projection: log p = 0 on it, idempotent, independent of rho, firmly nonexpansive."""
    a, b = points(likelihood, seed), points(likelihood, seed + 1)
    p, q = likelihood.prox(a, 1.0), likelihood.prox(b, 1.0)
    close(likelihood.prox(p, 1.0), p, tol, "a projection applied twice")
    close(likelihood.prox(a, 0.1), p, tol, "a projection at another rho")
    gap = item_dot(p - q, a - b) - item_dot(p - q, p - q)
    assert bool((gap >= -tol * item_dot(a - b, a - b)).all()), f"not firmly nonexpansive: {gap.tolist()}"


def check_joint(likelihood: GaussianLikelihood, tol: float = 1e-8, seed: int = 0) -> None:
    """The prox and the score of p(y, x_t | x) against dense algebra."""
    x_t, z = points(likelihood, seed), points(likelihood, seed + 1)
    alpha, sigma = torch.tensor(0.8, dtype=z.dtype), torch.tensor(0.6, dtype=z.dtype)
    joint = JointLikelihood(likelihood, x_t, alpha, sigma)
    check_score(joint, tol, seed)
    matrix = _real_matrix(likelihood)
    for rho in _RHOS:
        precision = _precision(likelihood, matrix) + (alpha**2 / sigma**2 + rho**-2) * torch.eye(matrix.shape[2]).to(z)
        right = _pulled(likelihood, matrix) + (alpha / sigma**2 * x_t + z / rho**2).flatten(1)
        truth = torch.linalg.solve(precision, right).reshape(z.shape)
        close(joint.prox(z, rho), truth, tol, f"joint prox at rho = {rho} against a dense solve")


def check_draw_form(likelihood: Likelihood, tol: float = 1e-6, seed: int = 0) -> None:
    """Shape and dtype of a draw; the same noise gives the same draw, and item 0 is the same whatever the others are."""
    z, seeds = points(likelihood, seed), [mix(seed, b) for b in range(likelihood.batch)]

    def draw(z: Tensor, seeds: list[int]) -> Tensor:
        return likelihood.draw(z, 0.5, Noise(seeds, likelihood.dtype, likelihood.device))

    x = draw(z, seeds)
    assert x.shape == z.shape and x.dtype == z.dtype, f"a draw is {tuple(x.shape)}, {x.dtype}"
    assert bool(torch.isfinite(x).all()), "a draw is not finite"
    assert torch.equal(x, draw(z, seeds)), "a draw is not decided by its noise"
    other = torch.cat([z[:1], 3 * points(likelihood, seed + 1)[1:]])
    others = draw(other, [seeds[0], *(seed + 1 for seed in seeds[1:])])
    close(x[:1], others[:1], tol, "a draw depends on its neighbours")


def check_draw(likelihood: GaussianLikelihood, rho: float = 0.7, num_samples: int = 4000, seed: int = 0) -> None:
    """Mean and covariance of draws against the exact ones, in standard errors."""
    z = points(likelihood, seed)
    matrix = _real_matrix(likelihood)
    precision = _precision(likelihood, matrix) + rho**-2 * torch.eye(matrix.shape[2]).to(z)
    mean = dense_prox(likelihood, z, rho)
    seeds = [mix(seed, b) for b in range(likelihood.batch)]
    noise = Noise.spawn(seeds, range(num_samples), likelihood.dtype, likelihood.device)
    x = likelihood.expand(num_samples).draw(tile(z, num_samples), rho, noise)
    centred = (x.reshape(num_samples, *z.shape) - mean).flatten(2)
    root = torch.linalg.cholesky(precision)  # root' (x - mean) is standard normal
    white = torch.einsum("bij,kbi->kbj", root, centred)
    off = white.mean(0).abs().max() * num_samples**0.5
    assert float(off) <= STANDARD_ERRORS, f"the mean of draws is off by {float(off):.1f} standard errors"
    directions = torch.cat([torch.eye(white.shape[2]), torch.linalg.qr(torch.ones(white.shape[2], 1))[0].T]).to(z)
    spread = (white @ directions.T).square().mean(0)
    off = (spread - 1).abs().max() * (num_samples / 2) ** 0.5
    assert float(off) <= STANDARD_ERRORS + 1, f"the variance of draws is off by {float(off):.1f} standard errors"


def check_neighbours(likelihood: Likelihood, tol: float = 1e-6, seed: int = 0) -> None:
    """Item 0 of the prox is the same whatever the other items are."""
    if likelihood.batch == 1:
        return
    z = points(likelihood, seed)
    other = z.clone()
    other[1:] = 3 * points(likelihood, seed + 1)[1:]
    close(likelihood.prox(z, 0.5)[:1], likelihood.prox(other, 0.5)[:1], tol, "an item depends on its neighbours")


def check_alone(likelihood: Likelihood, alone: Callable[[int], Likelihood], tol: float = 1e-6, seed: int = 0) -> None:
    """Each measurement alone gives what it gives in the batch."""
    z = points(likelihood, seed)
    batch = {name: call(likelihood, z) for name, call in _CALLS.items() if name in likelihood.provides}
    for b in range(likelihood.batch):
        single = alone(b)
        for name, out in batch.items():
            close(_CALLS[name](single, z[b : b + 1]), out[b : b + 1], tol, f"{name} of item {b} alone and in the batch")


_CALLS: dict[str, Callable[[Likelihood, Tensor], Tensor]] = {
    "gradient": lambda likelihood, z: likelihood.score(z),
    "prox": lambda likelihood, z: likelihood.prox(z, 0.5),
}


def points(likelihood: Likelihood, seed: int) -> Tensor:
    """Return standard normal items, (B, *event)."""
    return noise_of(likelihood, seed).randn(*likelihood.event_shape)


def noise_of(likelihood: Likelihood, seed: int) -> Noise:
    """Return streams for the items of a likelihood."""
    return Noise([mix(seed, b) for b in range(likelihood.batch)], likelihood.dtype, likelihood.device)


def dense_prox(likelihood: GaussianLikelihood, z: Tensor, rho: Tensor | float) -> Tensor:
    """Return the prox by dense linear algebra, (B, *event)."""
    matrix = _real_matrix(likelihood)
    width = torch.as_tensor(rho, dtype=z.dtype).expand(z.shape[0])
    eye = torch.eye(matrix.shape[2], dtype=z.dtype)
    precision = _precision(likelihood, matrix) + width[:, None, None] ** -2 * eye
    right = _pulled(likelihood, matrix) + z.flatten(1) / width[:, None] ** 2
    return torch.linalg.solve(precision, right).reshape(z.shape)


def close(a: Tensor, b: Tensor, tol: float, what: str) -> None:
    """Assert |a - b| <= tol (1 + |b|) everywhere."""
    error = float(((a - b).abs() / (1 + b.abs())).max())
    assert error <= tol, f"{what}: off by {error:.1e} (allowed {tol:.1e})"


def _levels(likelihood: Likelihood) -> Tensor:
    return torch.linspace(0.3, 2.0, likelihood.batch, dtype=likelihood.dtype, device=likelihood.device)


def _real_matrix(likelihood: GaussianLikelihood) -> Tensor:
    return dense_matrix(likelihood).to(likelihood.dtype)


def _precision(likelihood: GaussianLikelihood, matrix: Tensor) -> Tensor:
    return matrix.mT @ matrix / likelihood.sigma[:, None, None] ** 2


def _pulled(likelihood: GaussianLikelihood, matrix: Tensor) -> Tensor:
    return torch.einsum("bmd,bm->bd", matrix, real_rows(likelihood.y)) / likelihood.sigma[:, None] ** 2


def _values(likelihood: Any) -> list[Tensor]:
    physics = getattr(likelihood, "physics", None)
    state = list(physics.state_dict().values()) if isinstance(physics, torch.nn.Module) else []
    own = [v for v in vars(likelihood).values() if isinstance(v, Tensor)]
    return copy.deepcopy(own + state)
