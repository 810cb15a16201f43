"""The targets: scores, samplers, expectations and log Z against autograd, quadrature and each other; wrong ones must fail."""

import math
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.integrate import quad

from fewstep.core.density import TargetDensity
from fewstep.core.noise import Streams
from fewstep.densities.properness import Improper, check_proper
from fewstep.densities.targets import available_targets, target, target_class
from fewstep.densities.targets._mixture import GaussianMixture
from fewstep.densities.targets._threefry import uniform
from fewstep.densities.targets.concentric_rings import ConcentricRings
from fewstep.densities.targets.funnel import Funnel
from fewstep.densities.targets.nine_modes import NineModes
from fewstep.densities.targets.phi4 import Phi4
from fewstep.testing.density import check_histogram, check_sampler, check_score, check_target, has_sampler

# small ones of each family; the others are tried as they are
FIELDS = {
    "gmm40_jax": {"dim": 3},
    "many_modes": {"dim": 8},
    "many_well_32": {"dim": 6},
    "mw52": {"dim": 8},
    "phi4": {"dim": 6},
    "rosenbrock": {"dim": 3},
    "student_mixture": {"dim": 4},
    "two_modes": {"dim": 8, "condition": 100.0},
}


@pytest.mark.parametrize(("name", "values"), [("mw54", {"dim": 3}), ("rosenbrock", {"dim": 1})])
def test_sizes_that_cannot_be_are_refused(name, values):
    with pytest.raises(ValueError, match=r"cannot have two wells|two coordinates at least"):
        target(name, **values)


def test_log_z_holds_far_from_the_default_sizes():
    """The radius of wide rings has mean d; a warm phi^4 chain leaves the grid of a cold one, and one that leaves its own says so."""
    rings = ConcentricRings(100)
    far = math.log(2) + 50 * math.log(math.pi) - math.lgamma(50) + math.lgamma(100) + 4.5 * math.pi
    assert rings.log_z == pytest.approx(far, abs=1e-3), "beyond the rings the radius has a Gamma law"
    chain = Phi4(dim=2, beta=0.2)
    grid = torch.linspace(-15, 15, 601, dtype=torch.float64)
    value = chain.log_prob(torch.cartesian_prod(grid, grid)).logsumexp(0) + 2 * math.log(0.05)
    assert chain.log_z == pytest.approx(float(value), abs=1e-6)

    class Narrow(Phi4):
        high = 1.0

    with pytest.raises(ValueError, match="beyond the grid"):
        _ = Narrow(dim=2).log_z


@pytest.mark.parametrize("name", ["nine_modes", "student_mixture", "dw4"])
def test_integers_are_points_too(name):
    density = target(name)
    x = torch.ones(1, density.dim, dtype=torch.int64)
    assert torch.equal(density.log_prob(x), density.log_prob(x.float())) and density.score(x).is_floating_point()


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Return fields for the targets that read a file: tables and a picture of their form."""
    folder, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(0)

    def table(name, rows, features, positive):
        label = np.where(np.arange(rows) < positive, 1, -1)
        np.savetxt(folder / name, np.c_[rng.normal(size=(rows, features)) + 0.5 * label[:, None], label], delimiter=",")
        return {"data": folder / name}

    (folder / "points.csv").write_text(
        '"id","data_x","data_y"\n'
        + "".join(f'"{k}",{a},{b}\n' for k, (a, b) in enumerate(rng.random((30, 2))))
        + '"30",1,1\n'
    )
    picture = np.kron(rng.integers(0, 256, (5, 7)), np.ones((8, 8))).astype("uint8")
    Image.fromarray(picture).save(folder / "picture.png")
    return {
        "logistic_regression": table("own.csv", 60, 4, 25),
        "ionosphere": table("ionosphere.csv", 351, 34, 225),
        "sonar": table("sonar.csv", 208, 60, 97),
        "cox": {"data": folder / "points.csv", "grid": 5},
        "image": {"data": folder / "picture.png", "size": 32},
    }


def build(name, files):
    return target(name, **FIELDS.get(name, {}), **files.get(name, {}))


def points(density):
    """Return points of ordinary density for those without an exact sampler."""
    if has_sampler(density):
        return None
    x = 0.5 * Streams(5, range(64), torch.float64).randn(density.dim)
    if not hasattr(density, "coordinates"):
        return x
    lattice = 1.2 * torch.cartesian_prod(*[torch.arange(3.0, dtype=torch.float64)] * density.space)
    return density.coordinates(lattice[: density.particles].expand(64, -1, -1)) + 0.1 * x


@pytest.mark.parametrize("name", available_targets())
def test_target(name, files):
    density = build(name, files)
    check_target(density, points=points(density), draws=1000)
    check_proper(density)
    assert type(density).__doc__ and density.event_shape == (density.dim,)


def test_every_target_says_what_is_known_of_its_normaliser(files):
    without = {"logistic_regression", "cox", "lj13"}  # depends on the data; nobody knows
    for name in set(available_targets()) - without:
        density = build(name, files)
        assert density.log_z is not None or density.log_z_bounds.source, name
        if density.log_z_bounds:
            assert density.log_z_bounds.low <= density.log_z_bounds.high


# ---- planted wrong ones


@dataclass(frozen=True)
class FlatRings(ConcentricRings):
    """The published sampler: the radius without its factor r^(d - 1)."""

    def sample(self, noise):
        wrong = ConcentricRings(1)  # the radial law of one dimension
        r = wrong.line.quantile(noise.rand(1))
        return r * torch.nn.functional.normalize(noise.randn(self.dim), dim=1)


@dataclass(frozen=True)
class ClippedFunnel(Funnel):
    """The published sampler: clipped to [-30, 30], while the density is not."""

    def sample(self, noise):
        return Funnel(self.dim).sample(noise).clamp(-30, 30)


@dataclass(frozen=True)
class NarrowModes(NineModes):
    """Draws 10 per cent too narrow around every mode."""

    def sample(self, noise):
        x = NineModes().sample(noise)
        return (5 * (x / 5).round() - x) * -0.9 + 5 * (x / 5).round()


@dataclass(frozen=True)
class LostMode(NineModes):
    """One mode of nine is never drawn: no local test can see it."""

    def sample(self, noise):
        x = NineModes().sample(noise)
        return torch.where((x > 2.5).all(1, keepdim=True), -x, x)


@pytest.mark.parametrize("wrong", [FlatRings(2), NarrowModes()])
def test_wrong_samplers_fail(wrong):
    with pytest.raises(AssertionError, match="does not follow log_prob"):
        check_sampler(wrong, draws=2000)


@pytest.mark.parametrize("wrong", [FlatRings(2), LostMode()])
def test_wrong_mode_weights_fail_the_histogram(wrong):
    with pytest.raises(AssertionError, match="histogram"):
        check_histogram(wrong, draws=2000)


def test_a_clipped_funnel_fails():
    with pytest.raises(AssertionError):
        check_target(ClippedFunnel(10), draws=4000)


@dataclass(frozen=True)
class WrongScore(Funnel):
    def score(self, x):
        return Funnel(self.dim).score(x) * (1 + 1e-3)


@dataclass(frozen=True)
class WrongConstant(NineModes):
    log_z = 0.1


def test_a_wrong_score_and_a_wrong_constant_fail():
    with pytest.raises(AssertionError, match="score against autograd"):
        check_score(WrongScore(3), Funnel(3).sample(Streams(0, range(16), torch.float64)))
    with pytest.raises(AssertionError, match="integrates to"):
        check_histogram(WrongConstant())


@dataclass(frozen=True)
class Line(TargetDensity):
    """N(0, 9) with a log Z that is `off`, without a sampler."""

    off: float = 0.0
    dim: int = 1
    known: tuple[str, ...] = ()

    @property
    def log_z(self):
        return self.dim * math.log(3 * math.sqrt(2 * math.pi)) + self.off

    def log_prob(self, x):
        return -0.5 * (x / 3).square().sum(1)

    def expectations(self):
        return {name: torch.full((self.dim,), 9.0).double() for name in self.known}


@pytest.mark.parametrize("dim", [1, 2])
def test_log_z_is_held_to_quadrature_without_a_sampler_too(dim):
    check_target(Line(dim=dim))
    for off in (-0.01, 1.0):
        with pytest.raises(AssertionError, match="integrates to"):
            check_target(Line(off, dim))


@dataclass(frozen=True)
class Box(Line):
    """Uniform on the square, or on the quarter plane, and 0 `outside`."""

    support: tuple[float, float] = (0.0, 1.0)
    outside: float = -math.inf
    log_z: float = 0.0

    def log_prob(self, x):
        return torch.where(((x > 0) & (x < self.support[1])).all(1), 0 * x.sum(1), self.outside)


def test_a_support_ends_the_density_with_and_without_a_sampler():
    points = Streams(0, range(32), torch.float64).rand(2)
    check_target(Box(dim=2), points=points)
    for wrong in (Box(dim=2, outside=0.0), Box(dim=2, outside=0.0, support=(0.0, math.inf))):
        with pytest.raises(AssertionError, match="not -inf"):
            check_target(wrong, points=points)


class Drawn(Line):
    def sample(self, noise):
        return 3 * noise.randn(self.dim)


def test_a_variance_may_be_known_without_the_mean():
    check_target(Drawn(known=("variance",)))
    with pytest.raises(AssertionError, match="the mean of the draws"):
        check_target(Drawn(known=("mean", "variance")))


# ---- log Z by quadrature that shares no code with the targets


def integral(log, low, high, at=()):
    return quad(lambda x: math.exp(log(x)), low, high, epsabs=1e-13, epsrel=1e-12, limit=400, points=at or None)[0]


def test_double_wells():
    four = integral(lambda x: -((x * x - 4) ** 2), -5, 5)
    two = integral(lambda x: -((x * x - 2) ** 2), -5, 5)
    assert target("mw54").log_z == pytest.approx(5 * math.log(four), abs=1e-9) == pytest.approx(-0.541056, abs=1e-6)
    gaussians = 22.5 * math.log(2 * math.pi)
    assert target("mw52").log_z == pytest.approx(5 * math.log(two) + gaussians, abs=1e-9)
    assert target("mw52").log_z == pytest.approx(42.817243, abs=1e-6)
    assert target("double_well_shifted").log_z == pytest.approx(math.log(two), abs=1e-9)
    assert target("double_well_shifted").log_z == pytest.approx(0.293002, abs=1e-6)


def test_many_well():
    def log(x):
        return -(x**4) + 6 * x * x + x / 2

    left, right = integral(log, -5, 0), integral(log, 0, 5)
    constant = left + right
    assert constant == pytest.approx(11784.50927, abs=1e-4)
    density = target("many_well_32")
    assert density.log_z == pytest.approx(16 * math.log(constant * math.sqrt(2 * math.pi)), abs=1e-8)
    assert density.log_z == pytest.approx(164.695675, abs=1e-6)
    share = float(density.expectations()["right_well"])
    assert share == pytest.approx(right / constant, abs=1e-4) == pytest.approx(0.84431, abs=1e-4)


def test_rings():
    mass = sum(integral(lambda r, c=c: math.log(r) - 100 * (r - c) ** 2, c - 1 + 1e-12, c + 1) for c in (1, 3, 5))
    assert (
        target("rings").log_z
        == pytest.approx(math.log(2 * math.pi * mass), abs=1e-8)
        == pytest.approx(2.304882, abs=1e-6)
    )
    edge = 4.5 * math.pi
    inside = quad(lambda r: r * (math.cos(r) + 1.001), 0, edge, epsrel=1e-12)[0]
    mass = 2 * math.pi * (inside + edge + 1)  # the tail, by hand
    assert mass == pytest.approx(806.16, abs=0.005)
    assert target("concentric_rings").log_z == pytest.approx(math.log(mass), abs=1e-6)


def test_chains_of_two():
    density = target("phi4", dim=2)
    x = torch.linspace(-4, 4, 801, dtype=torch.float64)
    mass = float(torch.exp(density.log_prob(torch.cartesian_prod(x, x))).sum()) * 0.01**2
    assert density.log_z == pytest.approx(math.log(mass), abs=1e-9)
    # of two Rosenbrock coordinates, x_2 is normal given x_1, which is normal
    mass = 1e5 * math.sqrt(10 * math.pi) * math.sqrt(math.pi / 10)
    assert target("rosenbrock", dim=2).log_z == pytest.approx(math.log(mass), abs=1e-6)


def test_chain_of_three_by_sums():
    density = target("rosenbrock", dim=3)
    first, second = (torch.linspace(*ends, 1001, dtype=torch.float64) for ends in ((-5, 5), (-3, 22)))
    inner = torch.cartesian_prod(first, second)
    # the last coordinate is free: integrate it by hand, at x_3 = x_2^2
    at = torch.cat([inner, inner[:, 1:].square()], 1)
    log = density.log_prob(at) + math.log(density.width * math.sqrt(2 * math.pi))
    mass = float(torch.exp(log).sum()) * 0.01 * 0.025
    assert density.log_z == pytest.approx(math.log(mass), abs=1e-5)


def test_phi4_modes_in_a_field():
    even, tilted = target("phi4", dim=16), target("phi4", dim=16, b=0.05)
    assert torch.allclose(even.expectations()["mean"], torch.zeros(16, dtype=torch.float64), atol=1e-9)
    assert float(tilted.expectations()["mean"].mean()) < -0.1
    step = 1e-4  # d log Z / d b = -beta / (a d) E sum x
    slope = (target("phi4", dim=16, b=0.05 + step).log_z - target("phi4", dim=16, b=0.05 - step).log_z) / (2 * step)
    assert slope == pytest.approx(-20 / 1.6 * float(tilted.expectations()["mean"].sum()), rel=1e-4)


# ---- facts of single targets


def test_jax_uniforms():
    """Values of jax.random.uniform(PRNGKey(0), (40, 2)) with the original Threefry counters."""
    x = 40 * uniform(0, 40, 2, -1.0, 1.0)
    assert torch.allclose(x[:2], torch.tensor([[-15.758228, 18.116531], [-34.80889, 21.225481]]), atol=1e-5)


def test_the_three_gmm40_differ():
    means = [
        target(f"gmm40_{name}", **({"dim": 2} if name == "jax" else {})).components.means
        for name in ("fab", "jax", "sde_sampler")
    ]
    assert all(m.shape == (40, 2) and m.abs().max() <= 40 for m in means)
    assert min(float((a - b).abs().max()) for a in means for b in means if a is not b) > 10


def test_mode_weights():
    density = target("two_modes", dim=8)
    x = density.sample(Streams(0, range(6000), torch.float64))
    share = float((density.modes(x) == 0).double().mean())
    assert abs(share - 2 / 3) < 4 * (2 / 9 / 6000) ** 0.5


def test_particles_do_not_feel_translations_and_rotations():
    for name in ("dw4", "lj13"):
        density = target(name)
        x = points(density)[:5]
        positions = density.positions(x)
        assert positions.shape == (5, density.particles, density.space)
        assert torch.allclose(positions.mean(1), torch.zeros(5, density.space, dtype=torch.float64), atol=1e-12)
        assert torch.allclose(positions.square().sum((1, 2)), x.square().sum(1))  # volumes are kept
        assert torch.allclose(density.coordinates(positions + 3), x)
        turn = torch.linalg.qr(
            torch.randn(density.space, density.space, generator=torch.Generator().manual_seed(0)).double()
        )[0]
        assert torch.allclose(density.log_prob(density.coordinates(positions @ turn)), density.log_prob(x))


def test_pair_energies_as_published():
    dw4, lj13 = target("dw4"), target("lj13")
    square = torch.tensor([[0.0, 0.0], [1, 0], [0, 1], [1, 1]], dtype=torch.float64)[None]
    r = torch.pdist(square[0]) - 4
    assert float(dw4.log_prob(dw4.coordinates(square))) == pytest.approx(-float((0.9 * r**4 - 4 * r**2).sum()))
    x = torch.randn(1, 13, 3, generator=torch.Generator().manual_seed(0)).double() * 2
    r = torch.cdist(x[0], x[0])[~torch.eye(13, dtype=torch.bool)]  # ordered pairs
    energy = (r**-12 - 2 * r**-6).sum() + 0.5 * (x - x.mean(1, keepdim=True)).square().sum()
    assert float(lj13.log_prob(lj13.coordinates(x))) == pytest.approx(-float(energy))


def test_seeds_log_prob_is_that_of_the_model():
    density = target("seeds")
    x = 0.3 * torch.randn(1, 26, generator=torch.Generator().manual_seed(0)).double()
    a, b, log_tau = x[0, :4], x[0, 4:25], x[0, 25]
    from fewstep.densities.targets.seeds import _PLATES

    D = torch.distributions
    log = D.Normal(0.0, 10.0).log_prob(a).sum() + D.Normal(0.0, torch.exp(-log_tau / 2)).log_prob(b).sum()
    log = log + D.Gamma(0.01, 0.01).log_prob(log_tau.exp()) + log_tau
    for (r, n, s, e), effect in zip(_PLATES, b, strict=True):
        log = log + D.Binomial(n, logits=a @ torch.tensor([1.0, s, e, s * e]).double() + effect).log_prob(
            torch.tensor(float(r)).double()
        )
    assert float(density.log_prob(x)) == pytest.approx(float(log), abs=1e-6)


def test_seeds_log_z():
    """Random effects by adaptive Gauss-Hermite, the other five coordinates by importance sampling from a t law."""
    density, dtype = target("seeds"), torch.float64
    nodes, weights = (torch.from_numpy(v) for v in np.polynomial.hermite_e.hermegauss(24))
    centre = torch.tensor([-0.549, 0.072, 1.355, -0.829, 2.471], dtype=dtype)
    width = torch.tensor([0.19, 0.31, 0.27, 0.43, 0.95], dtype=dtype) * 1.3
    streams = Streams(0, range(8192), dtype)
    t = streams.randn(5) / (streams.randn(5).square().sum(1, keepdim=True) / 5).sqrt()
    constant = math.lgamma(5) - math.lgamma(2.5) - 2.5 * math.log(5 * math.pi) - float(width.log().sum())
    proposal = constant - 5 * torch.log1p(t.square().sum(1) / 5)
    outer = centre + t * width

    def joint(b):
        return density.log_prob(torch.cat([outer[:, :4], b, outer[:, 4:]], 1))

    # at b = 0 everything but the plates' own terms; each plate adds its own integral over b_j
    from fewstep.densities.targets.seeds import _plates

    r, n, design = _plates(outer)
    odds, tau, b = outer[:, :4] @ design, outer[:, 4:].exp(), torch.zeros(8192, 21, dtype=dtype)
    for _ in range(25):
        p = torch.sigmoid(odds + b)
        b = b + ((r - n * p - tau * b) / (n * p * (1 - p) + tau)).clamp(-1, 1)
    p = torch.sigmoid(odds + b)
    spread = (n * p * (1 - p) + tau).rsqrt()
    at = b[..., None] + spread[..., None] * nodes

    def own(b):
        total = odds[..., None] + b
        return r[:, None] * total - n[:, None] * torch.nn.functional.softplus(total) - tau[..., None] * b.square() / 2

    zero = torch.zeros_like(b)
    inner = (
        torch.logsumexp(own(at) + nodes.square() / 2 + weights.log(), 2) + spread.log() - own(zero[..., None])[..., 0]
    )
    log = joint(zero) + inner.sum(1) - proposal
    value = torch.exp(log - log.max())
    found = float(log.max() + value.mean().log())
    error = float(value.std() / value.mean()) / 8192**0.5
    assert error < 0.04 and abs(found - density.log_z) < 4 * error


def test_cox_prior_is_normalised(files):
    density = target("cox", **files["cox"])
    assert float(density.counts.sum()) == 31 and float(density.counts[-1]) >= 1  # (1, 1) lies in the last cell
    cov = density.prior[0] @ density.prior[0].T
    law = torch.distributions.MultivariateNormal(torch.full((25,), density.mean, dtype=torch.float64), cov)
    x = torch.randn(3, 25, generator=torch.Generator().manual_seed(0)).double()
    fit = (x * density.counts - x.exp() / 25).sum(1)
    assert torch.allclose(density.log_prob(x), law.log_prob(x) + fit)


def test_image_integral_and_support(files):
    density = target("image", **files["image"])
    low, high = density.support
    grid = [a + (b - a) * (torch.arange(600, dtype=torch.float64) + 0.5) / 600 for a, b in zip(low, high, strict=True)]
    mass = torch.exp(density.log_prob(torch.cartesian_prod(*grid))).mean() * (high - low).prod()
    assert float(mass.log()) == pytest.approx(density.log_z, abs=1e-4)
    assert bool(density.log_prob(high[None] * 1.01).isneginf())


# ---- files, names and errors


@pytest.mark.parametrize(
    "name, given, said",
    [
        ("funel", {}, "did you mean funnel"),
        ("funnel", {"dims": 3}, "did you mean dim"),
        ("funnel", {"dim": 1}, "dim >= 2"),
        ("many_well_32", {"dim": 3}, "even"),
        ("cox", {}, "cox needs data"),
        ("cox", {"data": "nowhere.csv"}, "cannot be read"),
        ("image", {"data": "nowhere.png"}, "cannot be read"),
    ],
)
def test_clear_errors(name, given, said):
    with pytest.raises(ValueError, match=said):
        built = target(name, **given)
        built.log_prob(torch.zeros(1, built.dim))


def test_wrong_tables(tmp_path, files):
    with pytest.raises(ValueError, match="is not Sonar"):
        target("sonar", **files["logistic_regression"])
    (tmp_path / "a.csv").write_text("1,2,3\n4,5,6\n")
    with pytest.raises(ValueError, match="two labels"):
        _ = target("logistic_regression", data=tmp_path / "a.csv").dim


def test_the_folder_is_the_list():
    names = available_targets()
    page = (Path(__file__).parents[1] / "docs" / "densities.md").read_text(encoding="utf-8")
    assert all(f"`{name}`" in page for name in names)
    assert "funnel" in names and not any(name.startswith("_") for name in names)
    for name in names:
        kind = target_class(name)
        assert issubclass(kind, TargetDensity) and (not fields(kind) or kind.__doc__)
    assert target("many-well-32").dim == 32


# ---- densities without a normaliser


def table_density(features, label, prior=0.0):
    @dataclass(frozen=True)
    class Regression(TargetDensity):
        dim = features.shape[1]

        def log_prob(self, x):
            fit = torch.nn.functional.logsigmoid((x @ features.to(x).T) * label.to(x)).sum(1)
            return fit - prior * x.square().sum(1)

    return Regression()


def test_likelihoods_without_a_prior():
    x = torch.randn(80, 6, generator=torch.Generator().manual_seed(0)).double()
    label = torch.sign(x @ torch.tensor([1.0, -1, 2, 0.5, 0.0, 3]).double())
    with pytest.raises(Improper):  # separable: one half space of weights has likelihood near one
        check_proper(table_density(x, label))
    flipped = torch.where(torch.arange(80) % 5 == 0, -label, label)
    check_proper(table_density(x, flipped))
    x[:, 2] = 0  # a feature that is constant: its weight is free
    with pytest.raises(Improper, match="coordinate 2"):
        check_proper(table_density(x, flipped))
    check_proper(table_density(x, flipped, prior=0.5))
    check_proper(table_density(x, label, prior=0.5))


def test_a_thin_margin_is_found():
    """As in Sonar: 61 weights separate 208 rows, but no short ascent comes near the direction that does."""
    x = torch.randn(208, 61, generator=torch.Generator().manual_seed(1)).double()
    x = x @ torch.randn(61, 61, generator=torch.Generator().manual_seed(2)).double() / 8  # ill-conditioned features
    label = torch.sign(x @ torch.randn(61, generator=torch.Generator().manual_seed(3)).double())
    with pytest.raises(Improper):
        check_proper(table_density(x, label))
    label[::5] *= -1  # every tenth would still be separable
    check_proper(table_density(x, label))


def test_mixture_is_abstract():
    with pytest.raises(TypeError):
        GaussianMixture()
