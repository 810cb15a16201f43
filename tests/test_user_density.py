"""Targets of the user's own: two lines of any form, what is wrong with them, boxes, whitening and automatic scale."""

import math
import warnings

import numpy as np
import pytest
import torch

from fewstep.core.density import TargetDensity, gradient
from fewstep.core.noise import Streams
from fewstep.core.registry import get
from fewstep.densities.corrections import smc_through
from fewstep.densities.fit import fit
from fewstep.densities.laplace import laplace
from fewstep.densities.networks import NetConfig
from fewstep.densities.properness import Improper
from fewstep.densities.support import box_slopes, from_box, rounded, to_box
from fewstep.densities.targets import target
from fewstep.densities.teachers.dds import DDS
from fewstep.densities.user import NonFinite, as_target
from fewstep.densities.whitened import Whitened, whiten
from fewstep.testing.density import check_form, check_score

DATA = torch.eye(3, dtype=torch.float64)


def normals(n, d, seed=0):
    return Streams(seed, range(n), torch.float64).randn(d)


def test_a_log_density_in_float64_is_not_rounded():
    """At -1e8 float32 keeps multiples of 8, and exact draws would have weights of e^-4 to e^4; training and chains take it too."""
    density = as_target(lambda x: -1e8 - 0.5 * (x.double() - 1).square().sum(1), 2)
    for sampler in (laplace(density), fit(density, sampler="dis", train_steps=2, batch=32)):
        draws = sampler.sample(1024)
        assert draws.ess > 0.9 and abs(draws.log_z + 1e8 - math.log(2 * math.pi)) < 0.01
    assert math.isfinite(smc_through(laplace(density), 1024).log_z)
    alone = as_target(lambda x: -1e8 - 0.5 * float(x[0]) ** 2, 1, score=lambda x: -x)
    assert alone.log_prob(torch.tensor([[1.0], [2.0]])).diff().item() == -1.5, "Python's numbers are float64"


@pytest.mark.parametrize("constant", [1e6, 1e7, 1e8])
def test_a_constant_leaves_the_weights_as_they_are(constant):
    """float32 keeps integers of 1e7: the function is asked in float64, and what is added stays there."""
    density = as_target(lambda x: -0.5 * (x / 1.5).square().sum(-1) - constant, 2)
    assert density.dtype == torch.float64 and as_target(lambda x: -0.5 * x.square().sum(-1) - 1e3, 2).dtype is None
    draws = laplace(density).sample(512)
    truth = math.log(2 * math.pi * 1.5**2)
    assert float((draws.log_weights + constant - truth).abs().max()) < 1e-5
    assert density.score(torch.ones(3, 2)).dtype == torch.float32


def test_weights_in_bent_coordinates_are_float64():
    y, shift, scale = normals(64, 2).float(), torch.tensor([0.3, 0.7]), torch.tensor([1.1, 2.3])
    density = as_target(lambda x: -0.5 * x.double().square().sum(-1) - 1e8, 2, check=False)
    value = Whitened(density, shift, scale, torch.tensor([0.2, 0.5])).log_prob(y)
    again = Whitened(density, shift, scale, torch.tensor([0.2, 0.5])).log_prob(y.double())
    assert value.dtype == torch.float64 and float((value - again).abs().max()) < 1e-4
    single = Whitened(target("funnel", dim=2), shift, scale).log_prob(y)
    assert single.dtype == torch.float64


def test_own_score_trains_by_relative_entropy_too():
    """A `log_prob` that hides its gradient, with the right score beside it: the gradient of the control is the same."""
    free = as_target(lambda x: -0.5 * (x - 1.5).square().sum(1), 2)
    hidden = as_target(lambda x: -0.5 * (x.detach() - 1.5).square().sum(1), 2, score=lambda x: 1.5 - x)
    grads = []
    for density in (free, hidden):
        control = DDS(net=NetConfig(8, 1), steps=4).control(whitened := Whitened(density))
        torch.nn.init.constant_(control.last.bias, 0.1)
        loss = get("kl", "losses")(whitened, DDS(steps=4).kernels(4))
        value, _ = loss.loss("model", control, None, Streams(5, range(64)))
        grads.append(torch.autograd.grad(value, control.last.bias)[0])
    assert float(grads[0].abs().max()) > 0.1 and torch.allclose(*grads, atol=1e-4)


def test_a_wide_law_is_no_flat_one():
    for d, width in ((1, 1e6), (10, 3e5)):
        as_target(lambda x, w=width: -0.5 * (x / w).square().sum(1), d)
    with pytest.raises(Improper):
        as_target(lambda x: -0.5 * (x[:, 0] / 1e6).square(), 2)


def test_shapes_of_supports_and_scores_are_told():
    law = FORMS["batch"]
    with pytest.raises(ValueError, match="must be numbers or 3 of them"):
        as_target(law, 3, support=(torch.zeros(2), torch.ones(2)))
    with pytest.raises(TypeError, match="score must map"):
        as_target(law, 3, score=lambda x: (-x * torch.tensor(SCALES))[..., None])
    double = torch.diag(torch.tensor(SCALES, dtype=torch.float64))
    density = as_target(law, 3, score=lambda x: -x @ double)  # works in float64 alone
    assert density.score(torch.ones(2, 3)).dtype == torch.float32


def test_whitening_leaves_chains_out_that_meet_nan():
    class Half(TargetDensity):
        dim = 1

        def log_prob(self, x):
            return (x.log() - x).sum(1)

    assert bool(whiten(Half()).shift > 0.5)


def test_a_draw_on_the_border_of_a_box_is_one_beside_it():
    for support in ((0.0, 1.0), (-1000.0, 1000.0), (0.0, math.inf), (-math.inf, 1.0)):
        ends = torch.tensor([[e] for e in support if math.isfinite(e)])
        assert bool(from_box(ends, support).isfinite().all())
        assert bool(from_box(ends.double(), support).isfinite().all())
    assert not bool(from_box(torch.tensor([[1.5]]), (0.0, 1.0)).isfinite()), "what lies outside stays outside"


# ---- what works: every form of the same law N(0, diag(1, 1/2, 1/4))

SCALES = (1.0, 2.0, 4.0)
FORMS = {
    "batch": lambda x: -0.5 * (x**2 * torch.tensor(SCALES)).sum(-1),
    "column": lambda x: -0.5 * (x**2 * torch.tensor(SCALES)).sum(-1, keepdim=True),
    "single": lambda x: -0.5 * (x**2 * torch.tensor(SCALES)).sum(),
    "entries": lambda x: -0.5 * x[0] ** 2 - x[1] ** 2 - 2 * x[2] ** 2,
    "control flow": lambda x: -0.5 * x[0] ** 2 - x[1] ** 2 - (2 if float(x[2]) > -9 else 3) * x[2] ** 2,
    "float64 data": lambda x: -0.5 * ((x @ DATA) ** 2 * torch.tensor(SCALES)).sum(-1),
    "distribution": torch.distributions.Independent(
        torch.distributions.Normal(torch.zeros(3), torch.tensor(SCALES) ** -0.5), 1
    ).log_prob,
}


@pytest.mark.parametrize("form", FORMS)
def test_two_lines_of_any_form(form):
    density = as_target(FORMS[form], 3)
    x = normals(9, 3)
    truth = -0.5 * (x.square() * torch.tensor(SCALES)).sum(1)
    value = density.log_prob(x)
    assert torch.allclose(value - value[0], truth - truth[0], atol=1e-5)
    for dtype in (torch.float32, torch.float64):
        given = density.log_prob(x.to(dtype)).dtype
        assert given == (torch.float64 if form == "float64 data" else dtype), "never less than the function gives"
        assert torch.allclose(density.score(x.to(dtype)), (-x * torch.tensor(SCALES)).to(dtype), atol=1e-4)
    if form != "control flow":  # Python branches cannot be vectorised twice
        check_form(density, x)
        check_score(density, x, tol=1e-5)
    assert density.event_shape == (3,) and density.log_z is None


def test_one_coordinate():
    density = as_target(lambda x: -((x**2 - 4) ** 2), 1)
    assert torch.equal(density.log_prob(torch.tensor([[2.0], [0.0]])), torch.tensor([0.0, -16.0]))


def test_a_score_of_ones_own():
    calls = []

    def score(x):
        calls.append(len(x))
        return -x

    density = as_target(lambda x: -0.5 * x.square().sum(-1), 4, score=score, log_z=2 * math.log(2 * math.pi))
    x = normals(5, 4)
    assert torch.equal(density.score(x), -x) and calls[-1] == 5 and density.log_z == pytest.approx(3.6757541)
    single = as_target(lambda x: -0.5 * x @ x, 4, score=lambda x: -x)
    assert torch.equal(single.score(x), -x)
    array = as_target(lambda x: torch.as_tensor(-0.5 * (np.asarray(x.detach()) ** 2).sum(-1)), 4, score=lambda x: -x)
    assert torch.allclose(array.log_prob(x), -0.5 * x.square().sum(1))


def on_arrays(x):
    return -0.5 * (np.asarray(x) ** 2).sum(-1)


def row_of_arrays(x):
    return -0.5 * float((np.asarray(x) ** 2).sum())


def detached(x):
    return -0.5 * (x.detach() ** 2).sum(-1)


@pytest.mark.parametrize("function", [on_arrays, row_of_arrays, detached])
@pytest.mark.parametrize("score", [lambda x: -x, lambda x: -np.asarray(x)])
def test_a_function_that_autograd_cannot_see_into_has_the_gradient_of_its_score(function, score):
    density = as_target(function, 4, score=score)
    leaf = normals(5, 4).requires_grad_()
    value = density.log_prob(leaf)
    assert torch.allclose(value, -0.5 * leaf.square().sum(1))
    assert torch.equal(torch.autograd.grad(value.sum(), leaf)[0], -leaf)
    with torch.no_grad():  # a leaf still requires its gradient there, and numpy would refuse it
        assert not density.log_prob(leaf).requires_grad and torch.equal(density.score(leaf), -leaf)


def test_a_score_on_arrays_is_not_differentiated():
    density = as_target(on_arrays, 2, score=lambda x: -np.asarray(x))
    with pytest.raises(ValueError, match="score cannot be differentiated"):
        density.score(normals(5, 2).requires_grad_())
    with pytest.raises(ValueError, match="score cannot be differentiated"):
        laplace(density)  # forward mode
    with pytest.raises(ValueError, match=r"write it in torch.* \(not kl\)"):
        fit(density, loss="kl", sampler="dis", train_steps=1, batch=32, whiten=False)


def test_a_target_is_returned_as_it_is():
    funnel = target("funnel", dim=3)
    assert as_target(funnel) is funnel and as_target(funnel, 3) is funnel
    with pytest.raises(ValueError, match="dim = 3, not 4"):
        as_target(funnel, 4)
    for more in ({"score": funnel.score}, {"support": np.zeros((2, 3))}, {"log_z": 0.0}):
        with pytest.raises(ValueError, match="has its own score, support and log_z"):
            as_target(funnel, **more)


def test_scores_compose():
    """Scores differentiate where somebody asks, cost a plain call where nobody does, and work inside torch.func."""
    density = as_target(lambda x: -0.25 * (x**4).sum(-1), 3)
    x = normals(5, 3)
    jacobian = torch.func.vmap(torch.func.jacfwd(lambda row: density.score(row[None])[0]))(x)
    assert torch.allclose(jacobian, torch.diag_embed(-3 * x.square()))
    leaf = x.clone().requires_grad_()
    (slope,) = torch.autograd.grad(density.score(leaf).sum(), leaf)
    assert torch.allclose(slope, -3 * x.square())
    with torch.no_grad():
        assert not density.score(x).requires_grad
    assert torch.allclose(gradient(density.log_prob, x), -(x**3))


# ---- what cannot be right, in one line


def separable(w):
    x = normals(40, 4, seed=1)
    return torch.nn.functional.logsigmoid(w @ (x * x[:, :1].sign()).to(w).T).sum(-1)


@pytest.mark.parametrize(
    "function, error, said",
    [
        (lambda x: -0.5 * x[..., 0] ** 2, Improper, "coordinate 1|coordinate 2|coordinate 3"),
        (lambda x: 0 * x[..., 0], Improper, "integral diverges"),
        (lambda x: x.sum(-1), Improper, "integral diverges"),
        (lambda x: -2 * torch.log1p(x.square().sum(-1)), Improper, "falls no faster than -4 log"),
        (separable, Improper, "add a prior"),
        (lambda x: x[..., 0] * math.nan, ValueError, "NaN at 17 of 17"),
        (lambda x: x[..., 0] * 0 + math.inf, ValueError, r"\+inf at 17 of 17"),
        (lambda x: x[..., 0] * 0 - math.inf, ValueError, "-inf at 17 of 17"),
        (lambda x: -(x.round() ** 2).sum(-1), ValueError, "not differentiable"),
        (lambda x: -0.5 * (x.detach() ** 2).sum(-1), ValueError, "not differentiable"),
        (lambda x: torch.as_tensor(-0.5 * (x.numpy() ** 2).sum(-1)), ValueError, "cannot be differentiated"),
        (lambda x: -(x.detach() ** 2).sum(-1) - 0.01 * x.sum(-1), ValueError, "not the gradient of log_prob"),
        (lambda x: -((x - x.mean(0)) ** 2).sum(-1), ValueError, "others in its batch"),
        (lambda x: x, TypeError, "must map"),
        (lambda x: undefined, TypeError, "NameError"),  # noqa: F821
        (lambda x, y: x, TypeError, "missing 1 required"),
    ],
)
def test_clear_messages(function, error, said):
    with pytest.raises(error, match=said) as caught:
        as_target(function, 4)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


@pytest.mark.parametrize(
    "given, said",
    [
        ("nine_modes", r"fewstep\.target\('nine_modes'\)"),
        (type(target("funnel")), "the class Funnel: give an object of it"),
        (3.0, "a callable, got float"),
    ],
)
def test_what_is_no_function_is_told(given, said):
    for dim in (None, 2):
        with pytest.raises(TypeError, match=said):
            as_target(given, dim)


def test_what_may_be_given_is_named_as_python_and_the_command_line_have_it():
    with pytest.raises(ValueError, match=r"give score= .*--score"):
        as_target(on_arrays, 2)
    with pytest.raises(ValueError, match=r"give support= .*--low and --high"):
        as_target(lambda x: (x - 1000).log().sum(-1), 2)


def test_dim_is_asked_for_and_a_wrong_score_is_found():
    with pytest.raises(TypeError, match="dim"):
        as_target(lambda x: -x.square().sum(-1))
    with pytest.raises(ValueError, match="dim must be a whole number and at least 1"):
        as_target(lambda x: -x.square().sum(-1), 0)
    for wrong in ("3", 3.0, True):
        with pytest.raises(ValueError, match="dim must be a whole number"):
            as_target(lambda x: -x.square().sum(-1), wrong)
    with pytest.raises(ValueError, match="must lie below the upper"):
        as_target(lambda x: -x.square().sum(-1), 2, support=(1.0, 0.0))
    with pytest.raises(ValueError, match="score is not the gradient"):
        as_target(lambda x: -0.5 * x.square().sum(-1), 3, score=lambda x: -2 * x)


class Bell:
    def __init__(self, dim):
        self.dim = dim

    def __call__(self, x):
        return -0.5 * x.square().sum(-1)


def test_a_callable_that_has_its_dim_needs_not_be_told_it():
    assert as_target(Bell(3)).dim == 3
    assert as_target(Bell(3), 2).dim == 2  # what is given counts
    with pytest.raises(TypeError, match="needs dim"):
        as_target(Bell("three"))
    with pytest.raises(ValueError, match="at least 1"):
        as_target(Bell(0))


def test_proper_ones_pass():
    for function in (
        lambda x: -torch.log1p(x.square()).sum(-1),  # Cauchy
        lambda x: -2.5 * torch.log1p(x.square().sum(-1)),  # |x|^-5 in four dimensions
        lambda x: -x.abs().sum(-1),
        lambda x: -1e8 * x.square().sum(-1),
        lambda x: -1e-4 * (x - 30).square().sum(-1),
        lambda x: torch.logsumexp(torch.stack([-(x - 8).square().sum(-1), -(x + 8).square().sum(-1)]), 0),
    ):
        as_target(function, 4)


def test_what_vanishes_at_an_end_is_proper():
    """exp(-1 / x) at the last number above zero is so low that its slope is lost beside it."""

    def mean_and_deviation(v):
        squares = (v[..., :1] - torch.linspace(-1, 2, 10)).square().sum(-1)
        return -10 * v[..., 1].log() - squares / (2 * v[..., 1].square()) - v[..., 0].square() / 200 - v[..., 1]

    as_target(lambda x: (-4 * x.log() - 2 / x).sum(-1), 1, support=(0, None))  # inverse gamma
    as_target(lambda x: (-1 / x).sum(-1), 1, support=(0, 1))
    as_target(mean_and_deviation, 2, support=((None, 0), (None, None)))
    for improper in (lambda x: -1 / x.sum(-1), lambda x: (-x.log() - 1 / x).sum(-1), lambda x: x.square().sum(-1)):
        with pytest.raises(Improper):
            as_target(improper, 1, support=(0, None))


def test_what_oscillates_fast_has_a_gradient_all_the_same():
    def waves(x):
        return (5 * torch.cos(2 * math.pi * 200 * x) - x.square() / 2).sum(-1)

    as_target(waves, 1)
    with pytest.raises(ValueError, match=r"not the gradient.*check=False"):
        as_target(lambda x: waves(x.detach()) + 100 * x.sum(-1), 1)
    with pytest.raises(ValueError, match="not the gradient"):  # within float32 the finer differences are noise
        as_target(lambda x: waves(x.detach().float()) + 100 * x.sum(-1), 1)
    as_target(lambda x: waves(x.detach()) + 100 * x.sum(-1), 1, check=False)


def test_heavy_tails_are_judged_by_their_power():
    as_target(lambda x: -10.6 * torch.log1p(x.square().sum(-1)), 20)
    with pytest.raises(Improper):
        as_target(lambda x: -9.9 * torch.log1p(x.square().sum(-1)), 20)


# ---- NaN now and then


def test_nan_is_counted_and_told_once():
    def log_prob(x):
        return -0.5 * x.square().sum(-1) + torch.where(x[..., 0] > 1, math.nan, 0.0)

    with pytest.warns(NonFinite, match="NaN at . of 17 points"):
        density = as_target(log_prob, 2)
    assert density.tally.values == 0
    x = torch.tensor([[0.0, 0.0], [2.0, 0.0], [3.0, 1.0]])
    with pytest.warns(NonFinite, match="2 values"):
        value = density.log_prob(x)
    assert value.tolist() == [0.0, -math.inf, -math.inf]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        density.log_prob(x)
    assert (density.tally.values, density.tally.nonfinite_values) == (6, 4)
    score = density.score(torch.tensor([[0.5, 0.0]]))
    assert torch.equal(score, torch.tensor([[-0.5, 0.0]])) and density.tally.gradients == 1


def test_scores_that_are_nan_become_zero():
    density = as_target(lambda x: -0.5 * x.square().sum(-1) + x[..., 0].abs().sqrt(), 1)
    with pytest.warns(NonFinite, match="gradients"):
        score = density.score(torch.tensor([[0.0], [1.0]]))
    assert float(score[0]) == 0 and float(score[1]) == pytest.approx(-0.5)
    assert density.tally.nonfinite_gradients == 1


# ---- boxes


def test_supports_are_read():
    def law(x):
        return -x.sum(-1) + 0 * x.log().sum(-1)

    for given in (
        (0, None),
        (0.0, math.inf),
        ([0, 0, 0], [None, None, math.inf]),
        np.array([[0.0] * 3, [math.inf] * 3]),
    ):
        density = as_target(law, 3, support=given, check=False)
        low, high = (torch.as_tensor(end).expand(3).tolist() for end in density.support)
        assert low == [0.0] * 3 and high == [math.inf] * 3
    assert as_target(lambda x: x.sum(-1), 1, support=(None, 2.0)).support == (-math.inf, 2.0)
    for wrong in ([(0, 1), (0, 1), (0, 1)], [(0, 1)], (0, 1, 2), ((0, 0), (1, 1)), 3, torch.tensor(3.0), "01"):
        with pytest.raises(ValueError, match=r"\(low, high\), must be numbers or 3 of them, all lower ends first"):
            as_target(law, 3, support=wrong)


SUPPORT = (torch.tensor([0.0, -math.inf, 2.0, -math.inf]), torch.tensor([1.0, 3.0, math.inf, math.inf]))


def test_box_maps():
    u = 2 * normals(200, 4)
    x = to_box(u, SUPPORT)
    low, high = SUPPORT
    assert bool((x > low).all() and (x < high).all())
    assert torch.allclose(from_box(x, SUPPORT), u, atol=1e-7)
    log, curvature = box_slopes(u, SUPPORT)
    jacobian = torch.func.vmap(torch.func.jacfwd(lambda row: to_box(row[None], SUPPORT)[0]))(u)
    assert torch.allclose(torch.diag_embed(log.exp()), jacobian, atol=1e-12)
    assert torch.allclose(curvature, torch.func.grad(lambda u: box_slopes(u, SUPPORT)[0].sum())(u))
    far = to_box(torch.tensor([[40.0] * 4, [-40.0] * 4]), SUPPORT)
    assert bool((far > low).all() and (far < high).all())  # strictly inside, in float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_box_ends_with_the_numbers_next_to_its_ends(dtype):
    powers = 2.0 ** torch.arange(-40, 40, dtype=dtype)
    ends = torch.cat([powers, torch.nextafter(powers, 0 * powers), 1.7 * powers])
    ends = torch.cat([ends, -ends])
    far = torch.full_like(ends, torch.finfo(dtype).max / 4)[None]
    for support, u, beyond in (((ends, math.inf), -far, math.inf), ((-math.inf, ends), far, -math.inf)):
        assert torch.equal(to_box(u, support)[0], torch.nextafter(ends, torch.full_like(ends, beyond)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_box_is_mapped_to_its_last_numbers(dtype):
    """Near the lower end, which is zero, every number has its u; near the upper one those that are told apart from it."""
    u = torch.tensor(
        [[-12.0], [-11.0], [-8.0], [-6.0], [-5.5], [-4.0], [0.0], [3.0], [12.0]], dtype=dtype, requires_grad=True
    )
    x = to_box(u, (0.0, 1.0))
    exact = 0.5 * torch.erfc(-u.detach().double() / math.sqrt(2))
    assert torch.allclose(x[1:-1].detach().double(), exact[1:-1], rtol=2e-5, atol=0)
    assert torch.allclose(from_box(x, (0.0, 1.0))[1:-1], u[1:-1], rtol=1e-5, atol=1e-5)
    slope = torch.autograd.grad(x.sum(), u)[0]
    assert bool(slope.isfinite().all() and (x > 0).all() and (x < 1).all())
    assert torch.allclose(slope[1:-1].log(), box_slopes(u, (0.0, 1.0))[0][1:-1], atol=1e-4)


def test_a_density_that_towers_at_the_end_of_a_box_keeps_its_normaliser():
    """Beta(1/2, 10): in float32 every weight is that of float64."""
    y = torch.linspace(-7, 2, 200, dtype=torch.float64)[:, None]
    density = Whitened(
        as_target(lambda x: (-0.5 * x.log() + 9 * torch.log1p(-x)).sum(-1), 1, support=(0, 1), check=False)
    )
    assert torch.allclose(density.log_prob(y.float()), density.log_prob(y), atol=1e-3)


def test_draws_that_numbers_do_not_resolve_are_told():
    u, box = normals(4000, 2).float(), (0.0, 1.0)
    assert rounded(to_box(u, box), box) is None and rounded(100 + u, None) is None and rounded(u[:1], None) is None
    assert "coordinate 1 varies by 1e-05 around 1.0e+02" in rounded(torch.tensor([0.0, 100.0]) + 1e-5 * u, None)
    assert rounded(torch.tensor([0.0, 100.0]) + 1e-5 * u.double(), None) is None
    assert "50.0% of the draws lie on the last number" in rounded(to_box(torch.tensor([[12.0], [0.0]]), box), box)
    narrow = laplace(
        as_target(lambda x: -0.5 * ((x - 100) / 1e-5).square().sum(-1), 2, check=False), torch.full((2,), 100.0)
    )
    with pytest.warns(UserWarning, match="shift the density to zero"):
        narrow.sample(64)


def test_a_uniform_law_is_exactly_normal():
    """A law on a box needs no network at all: the uniform becomes N(0, I), its log Z is kept."""
    density = Whitened(
        as_target(lambda x: torch.zeros(len(x)), 2, support=(-1.0, torch.tensor([1.0, 4.0])), log_z=math.log(10))
    )
    y = normals(8, 2)
    normal = -0.5 * y.square().sum(1) - math.log(2 * math.pi)
    assert torch.allclose(density.log_prob(y), normal + density.log_z, atol=1e-6)
    assert torch.allclose(density.score(y), -y, atol=1e-6)


def test_bounded_support_gives_the_right_normaliser():
    """A Beta(3, 2) times an exponential on [1, inf): log Z by a sum over whitened coordinates."""

    def log_prob(x):
        return 2 * x[..., 0].log() + (1 - x[..., 0]).log() - 3 * x[..., 1]

    density = as_target(log_prob, 2, support=(torch.tensor([0.0, 1.0]), torch.tensor([1.0, math.inf])))
    fitted = whiten(density, steps=120)
    axis = torch.linspace(-12, 12, 481, dtype=torch.float64)
    mass = torch.exp(fitted.log_prob(torch.cartesian_prod(axis, axis))).sum() * 0.05**2
    assert float(mass) == pytest.approx(math.gamma(3) * math.gamma(2) / math.gamma(5) * math.exp(-3) / 3, rel=1e-5)
    assert density.tally.nonfinite_values == 0
    check_score(fitted, normals(20, 2))


def test_hard_walls_without_a_support_are_told():
    with pytest.warns(NonFinite, match="-inf at .* give support="):
        density = as_target(lambda x: torch.where((x.abs() < 1).all(-1), 0.0, -math.inf), 2)
    assert density.log_prob(torch.tensor([[0.0, 0.0], [2.0, 0.0]])).tolist() == [0.0, -math.inf]
    assert not density.score(torch.tensor([[0.1, 0.2]])).any()


# ---- whitening


@pytest.mark.parametrize("dense", [False, True])
def test_whitened_is_the_same_law(dense):
    shift = normals(1, 4, seed=3)[0]
    scale = torch.tril(normals(4, 4, seed=4), -1) + torch.diag(torch.tensor([0.5, 1, 2, 3]).double())
    density = Whitened(target("funnel", dim=4), shift, scale if dense else scale.diagonal())
    y = normals(16, 4)
    assert torch.allclose(density.to_y(density.to_x(y)), y)
    jacobian = torch.func.vmap(torch.func.jacfwd(lambda row: density.to_x(row[None])[0]))(y)
    change = torch.linalg.slogdet(jacobian)[1]
    assert torch.allclose(density.log_prob(y), density.target.log_prob(density.to_x(y)) + change)
    assert density.log_z == 0.0 and density.dim == 4
    check_form(density, y)
    check_score(density, y)
    x = density.to_x(density.sample(Streams(0, range(5), torch.float64)))
    assert torch.allclose(x, density.target.sample(Streams(0, range(5), torch.float64)))


@pytest.mark.parametrize("shift, scale", [(torch.zeros(3), 1.0), (0.0, -1.0), (0.0, torch.zeros(4)), (math.nan, 1.0)])
def test_whitened_refuses(shift, scale):
    with pytest.raises(ValueError):
        Whitened(target("funnel", dim=4), shift, scale)


class Gauss(TargetDensity):
    """N(mean, root root')."""

    def __init__(self, mean, root):
        self.dim, self.mean, self.inverse = len(mean), mean, torch.linalg.inv(root)

    def log_prob(self, x):
        return -0.5 * ((x - self.mean.to(x)) @ self.inverse.to(x).T).square().sum(1)


def test_scale_is_found():
    """Means and standard deviations over four decades, from a start that knows neither; the same seed gives the same answer."""
    width, mean = torch.logspace(-2, 2, 8, dtype=torch.float64), torch.linspace(-200, 300, 8, dtype=torch.float64)
    density = Gauss(mean, torch.diag(width))
    found = whiten(density)
    assert bool(((found.scale / width).log().abs() < 0.3).all())
    assert bool(((found.shift - mean).abs() < 0.5 * width).all())
    assert torch.equal(whiten(density, steps=60, seed=3).scale, whiten(density, steps=60, seed=3).scale)
    assert not torch.equal(whiten(density, steps=60, seed=4).scale, whiten(density, steps=60, seed=3).scale)


def test_covariance_is_found():
    root = torch.tensor([[3.0, 0.0], [2.9, 0.3]]).double()
    found = whiten(Gauss(torch.zeros(2).double(), root), dense=True)
    ratio = torch.linalg.svdvals(torch.linalg.solve(found.scale, root))
    assert bool((ratio.log().abs() < 0.25).all())


def test_modes_are_covered():
    modes = whiten(target("nine_modes"))
    assert bool((modes.scale > 2).all() and (modes.scale < 6).all())  # 4.1 between modes of width 0.55
    wells = whiten(target("mw54"))
    assert bool((wells.scale > 1.5).all() and (wells.scale < 2.5).all())


def test_whiten_survives_walls_and_says_when_there_is_nothing():
    with pytest.warns(NonFinite):
        box = as_target(lambda x: torch.where((x.abs() < 0.5).all(-1), 0.0, -math.inf), 2)
    found = whiten(box, steps=120)
    assert bool((found.scale > 0.1).all() and (found.scale < 1).all())  # 0.29
    nothing = as_target(lambda x: x.sum(-1) * 0 - math.inf, 2, check=False)
    with pytest.raises(ValueError, match="not finite anywhere"):
        whiten(nothing, steps=60)


def test_inference_mode_is_told_where_gradients_are_needed():
    with torch.inference_mode(), pytest.raises(RuntimeError, match=r"torch.inference_mode\(\) rules out"):
        as_target(lambda x: -x.square().sum(-1), 2)
    target = as_target(lambda x: -x.square().sum(-1), 2)
    with torch.inference_mode(), pytest.raises(RuntimeError, match=r"use torch.no_grad\(\)"):
        target.score(torch.ones(1, 2))
