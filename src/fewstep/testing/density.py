r"""`check_target`: what every target density must satisfy, exported so that those of others can be held to it too.

The score is held to autograd and to finite differences. An exact sampler is held to the log density in two ways: Metropolis-adjusted
Langevin steps for rho leave its law as it is (Kolmogorov-Smirnov tests of coordinates, radius and log rho, moved against unmoved
draws), which sees every local disagreement and needs no log Z; in one and two dimensions a chi-squared test of a histogram against
quadrature also sees the weights of far modes and the log Z itself; there log Z is held to quadrature without a sampler too, as far
as the support or the points say where the mass is. Known expectations are held to the draws.
"""

from __future__ import annotations

import math

import torch
from scipy.stats import chi2, ks_2samp
from torch import Tensor

from fewstep.core.density import TargetDensity
from fewstep.core.noise import Noise, Streams

P_VALUE = 1e-5  # of a whole check, before it is divided among the tests in it


def check_target(target: TargetDensity, *, points: Tensor | None = None, draws: int = 4000, seed: int = 0) -> None:
    """Hold a target to the whole contract, as far as it says what it knows.

    Args:
        target: the density.
        points: where to try it, (N, d) float64; exact draws where it has them, N(0, I) otherwise.
        draws: exact draws for the statistical tests.
        seed: of points and draws.

    Raises:
        AssertionError: a check failed.
    """
    exact = has_sampler(target)
    if points is None:
        streams = Streams(seed, range(64), torch.float64)
        points = target.sample(streams) if exact else streams.randn(target.dim)
    check_form(target, points)
    check_score(target, points)
    check_support(target, points)
    assert target.log_z is None or target.log_z_bounds is None, "bounds are for a log Z that is not known"
    if exact:
        check_sampler(target, draws, seed)
        check_expectations(target, draws, seed)
    if target.dim <= 2 and target.log_z is not None:
        if exact:
            check_histogram(target, draws, seed)
        else:
            check_normaliser(target, points)


def has_sampler(target: TargetDensity) -> bool:
    """Return whether the target can be drawn from exactly."""
    try:
        target.sample(Noise([0]))
    except NotImplementedError:
        return False
    return True


def check_form(target: TargetDensity, points: Tensor) -> None:
    """Shapes, dtypes, torch.func, untouched inputs and global generator, and independence of the batch, at points (N, d) float64."""
    kept, generator = points.clone(), torch.get_rng_state()
    for dtype in (torch.float32, torch.float64):
        x = points.to(dtype)
        value, score = target.log_prob(x), target.score(x)
        kept_or_wider = torch.promote_types(value.dtype, dtype) == value.dtype
        assert value.shape == (len(x),) and kept_or_wider, f"log_prob gave {value.shape}, {value.dtype}"
        assert score.shape == x.shape and score.dtype == dtype, f"score gave {score.shape}, {score.dtype}"
    assert bool(value.isfinite().all() and score.isfinite().all()), "not finite at the points"
    for k in (0, len(points) // 2):
        part = slice(k, k + 1)
        _close(target.log_prob(points[part]), value[part], 1e-9, "log_prob of an item alone")
        _close(target.score(points[part]), score[part], 1e-9, "score of an item alone")
    _close(torch.func.vmap(lambda x: target.log_prob(x[None])[0])(points), value, 1e-9, "log_prob inside vmap")
    _close(torch.func.vmap(lambda x: target.score(x[None])[0])(points), score, 1e-9, "score inside vmap")
    assert torch.equal(points, kept), "an input was modified"
    if has_sampler(target):
        one, two = (target.sample(Noise(seeds, torch.float64)) for seeds in ([7], [3, 7]))
        assert one.shape == (1, target.dim) and one.dtype == torch.float64
        _close(two[1:], one, 1e-9, "a draw alone")
        assert target.sample(Noise([7])).dtype == torch.float32
    assert torch.equal(torch.get_rng_state(), generator), "the global generator was used"


def check_score(target: TargetDensity, points: Tensor, tol: float = 1e-6) -> None:
    """The score is the gradient of log_prob, by autograd and, in a random direction, by differences; at points (N, d) float64."""
    score = target.score(points)
    automatic = torch.func.grad(lambda x: target.log_prob(x).sum())(points)
    _close(score, automatic, tol, "score against autograd")
    way = torch.nn.functional.normalize(Streams(1, range(len(points)), torch.float64).randn(target.dim), dim=1)
    slope, widths = (score * way).sum(1), (1e-4, 1e-6)
    # a kink, or a curvature beyond the wider step, spoils a difference here and there, a wrong score nearly all
    errors = torch.stack(
        [(target.log_prob(points + h * way) - target.log_prob(points - h * way)) / (2 * h) - slope for h in widths]
    )
    error = (errors.abs().amin(0) / (1 + slope.abs())).median()
    assert float(error) < 1e-4, f"score against finite differences: median relative error {float(error):.1e}"


def check_support(target: TargetDensity, points: Tensor) -> None:
    """The log density is -inf wherever one coordinate of the points, (N, d), is moved beyond an end of the support."""
    for i in range(target.dim if target.support is not None else 0):
        low, high = (float(side[i]) for side in _ends(target))
        for end, away in ((low, -1), (high, 1)):
            if math.isfinite(end):
                outside = points.clone()
                outside[:, i] = end + away * (high - low if math.isfinite(high - low) else 1.0)
                assert bool((target.log_prob(outside) == -math.inf).all()), (
                    f"log_prob is not -inf at x_{i} = {outside[0, i]:g}"
                )


def check_sampler(target: TargetDensity, draws: int = 4000, seed: int = 0) -> None:
    """Langevin steps for rho leave the law of the draws as it is."""
    first = target.sample(Streams(seed, range(draws), torch.float64))
    second = target.sample(Streams(seed + 1, range(draws), torch.float64))
    assert bool(first.isfinite().all() and second.isfinite().all()), "a draw is not finite"
    moved = langevin(target, second, seed + 2)
    assert float((moved != second).any(1).double().mean()) > 0.5, "the chains did not move: the test says nothing"
    centre = first.median(0)[0]
    pairs = {"log rho": (target.log_prob(first), target.log_prob(moved))}
    pairs["radius"] = ((first - centre).norm(dim=1), (moved - centre).norm(dim=1))
    pairs |= {f"coordinate {i}": (first[:, i], moved[:, i]) for i in range(target.dim)}
    for name, (a, b) in pairs.items():
        p = float(ks_2samp(a.numpy(), b.numpy()).pvalue)
        assert p > P_VALUE / len(pairs), (
            f"the sampler does not follow log_prob: {name} moves under Langevin steps, p = {p:.0e}"
        )


def langevin(target: TargetDensity, x: Tensor, seed: int, steps: int = 40) -> Tensor:
    """Return x, (N, d), after Metropolis-adjusted Langevin steps that leave rho / Z as it is.

    Step sizes are drawn log-uniformly over four decades up to the spread of `x`, independently of where the chains are, so that
    narrow and wide parts are both moved; one size for all would hardly move a funnel.
    """
    noise = Streams(seed, range(len(x)), torch.float64)
    spread = (x.quantile(0.84, 0) - x.quantile(0.16, 0)) / 2
    value, score = target.log_prob(x), target.score(x)
    for _ in range(steps):
        size = 10 ** (-4 * noise.rand(1)) * spread / x.shape[1] ** (1 / 6)
        z = noise.randn(x.shape[1])
        trial = x + size**2 / 2 * score + size * z
        new, slope = target.log_prob(trial), target.score(trial)
        back = z + size / 2 * (score + slope)  # minus the noise that leads back
        log = new - value + (z.square() - back.square()).sum(1) / 2
        accept = noise.rand(1)[:, 0].log() < log
        value = torch.where(accept, new, value)
        x, score = torch.where(accept[:, None], trial, x), torch.where(accept[:, None], slope, score)
    return x


def check_expectations(target: TargetDensity, draws: int = 4000, seed: int = 0) -> None:
    """Mean and variance agree with the draws, in standard errors; coordinates that one draw dominates are left out."""
    known = target.expectations()
    x = target.sample(Streams(seed + 3, range(draws), torch.float64))
    assert all(bool(value.isfinite().all()) for value in known.values()), "an expectation is not finite"
    if "mean" in known:
        _agree("mean", x, known["mean"])
    if "variance" in known:
        _agree("variance", (x - known.get("mean", x.mean(0))).square(), known["variance"])


def check_histogram(target: TargetDensity, draws: int = 4000, seed: int = 0, bins: int = 24) -> None:
    """A histogram of the draws agrees with exp(log_prob - log_z) integrated over its bins, and that integrates to one; d <= 2."""
    x = target.sample(Streams(seed + 4, range(draws), torch.float64))
    low, high = _box(target, x)
    mass = _masses(target, low, high, bins)
    assert abs(float(mass.sum()) - 1) < 2e-3, f"exp(log_prob - log_z) integrates to {float(mass.sum()):.5f}"
    place = ((x - low) / (high - low) * bins).long().clamp(0, bins - 1)
    index = place[:, 0] if target.dim == 1 else place[:, 0] * bins + place[:, 1]
    p = chi_squared(torch.bincount(index, minlength=len(mass)).double(), draws * mass)
    assert p > P_VALUE, f"the sampler does not follow log_prob: a histogram has p = {p:.0e}"


def check_normaliser(target: TargetDensity, points: Tensor, doublings: int = 6) -> None:
    """exp(log_prob - log_z) integrates to one over as wide a box around the points, (N, d), as holds its mass; d <= 2.

    Where the integral still changes after so many `doublings` of the box, nothing is said.
    """
    before = math.nan
    for k in range(doublings):
        mass = float(_masses(target, *_box(target, points, 2**k), bins=24).sum())
        if abs(mass - before) < 1e-3 * mass:
            assert abs(mass - 1) < 2e-3, f"exp(log_prob - log_z) integrates to {mass:.5f} around the points"
            return
        before = mass


def _ends(target: TargetDensity) -> list[Tensor]:
    """Return the two ends of the support, (d,) each; infinite where there is none."""
    sides = (-math.inf, math.inf) if target.support is None else target.support
    return [torch.as_tensor(side, dtype=torch.float64).expand(target.dim) for side in sides]


def _box(target: TargetDensity, x: Tensor, times: float = 1) -> tuple[Tensor, Tensor]:
    """Return the ends, (d,) each, of the support or, where it has none, of a box 1.2 `times` as wide as the points, (N, d)."""
    middle, reach = (x.amin(0) + x.amax(0)) / 2, 1.2 * times * (x.amax(0) - x.amin(0)) / 2
    low, high = _ends(target)
    return torch.where(low.isfinite(), low, middle - reach), torch.where(high.isfinite(), high, middle + reach)


def _masses(target: TargetDensity, low: Tensor, high: Tensor, bins: int) -> Tensor:
    """Return exp(log_prob - log_z) integrated over the `bins` per axis of a box, (bins^d,), by the midpoint rule; d <= 2."""
    fine = 16 if target.dim == 2 else 1000  # midpoints per bin and axis
    offsets = (torch.arange(bins * fine, dtype=torch.float64) + 0.5) / (bins * fine)
    axes = [a + (b - a) * offsets for a, b in zip(low, high, strict=True)]
    nodes = torch.cartesian_prod(*axes).reshape(-1, target.dim)
    log = torch.cat([target.log_prob(part) for part in nodes.split(65536)])
    mass = torch.exp(log - target.log_z) * ((high - low) / (bins * fine)).prod()  # type: ignore[operator]
    return mass.reshape([bins, fine] * target.dim).sum(list(range(1, 2 * target.dim, 2))).flatten()


def chi_squared(seen: Tensor, expected: Tensor) -> float:
    """Return the p-value of counts against their expectations, (M,) each; cells with fewer than 5 expected are put together."""
    few = expected < 5
    seen = torch.cat([seen[~few], seen[few].sum()[None]])
    expected = torch.cat([expected[~few], expected[few].sum()[None]])
    keep = expected > 1
    if int(keep.sum()) < 2:
        return 1.0
    statistic = float(((seen - expected)[keep].square() / expected[keep]).sum())
    return float(chi2.sf(statistic, int(keep.sum()) - 1))


def _agree(name: str, values: Tensor, truth: Tensor) -> None:
    """Hold the mean of values, (N, d), to the truth, (d,), where tails are not so heavy that their standard error means nothing."""
    error = values.std(0) / math.sqrt(len(values))
    dominated = (values - values.mean(0)).square().amax(0) > 0.05 * (values - values.mean(0)).square().sum(0)
    score = ((values.mean(0) - truth) / error.clamp_min(1e-300)).abs()[~dominated]
    worst = float(score.max()) if len(score) else 0.0
    limit = math.sqrt(2 * math.log(2 * len(truth) / P_VALUE))  # a union bound over coordinates
    assert worst < limit, f"the {name} of the draws is off by {worst:.1f} standard errors"


def _close(found: Tensor, truth: Tensor, tol: float, what: str) -> None:
    error = float(((found - truth).abs() / (1 + truth.abs())).max())
    assert error <= tol, f"{what}: error {error:.1e}"
