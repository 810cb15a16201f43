"""Every closed form and every iterative solve against dense algebra, and planted errors that must be found."""

from __future__ import annotations

import copy
import importlib

import pytest
import torch

from fewstep.core.likelihood import FlatLikelihood, GaussianLikelihood, JointLikelihood
from fewstep.core.spectral import (
    DecimatedSpectrum,
    DiagonalSpectrum,
    FourierSpectrum,
    OrthogonalSpectrum,
    spectrum_of,
)
from fewstep.core.together import Together
from fewstep.operators.image import deepinv_physics, image_likelihood
from fewstep.operators.matrix import MatrixOperator
from fewstep.testing.likelihood import check_adjoint, check_draw, check_likelihood, check_prox

P = deepinv_physics()
F64 = torch.float64


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


def rand(*shape, seed=0):
    return torch.rand(*shape, generator=gen(seed), dtype=F64)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=gen(seed), dtype=F64)


def kernel(items, *size, seed=0):
    k = rand(items, 1, *size, seed=seed)
    return k / k.sum((-2, -1), keepdim=True)


def down(factor, name, size, padding="circular"):
    named = P.Downsampling(img_size=(1, *size), filter=name, factor=factor, padding=padding)
    taps = None if named.filter is None else named.filter.double()
    return P.Downsampling(img_size=(1, *size), filter=taps, factor=factor, padding=padding)


def mri():
    mask = (rand(1, 1, 8, 6) > 0.4).double().expand(1, 2, 8, 6).contiguous()
    return P.MRI(mask=mask, img_size=(2, 8, 6))


CLOSED = {
    "blurfft odd": (lambda: P.BlurFFT(img_size=(1, 8, 10), filter=kernel(1, 3, 5)), (1, 8, 10), FourierSpectrum),
    "blurfft even": (lambda: P.BlurFFT(img_size=(2, 7, 9), filter=kernel(1, 4, 2)), (2, 7, 9), FourierSpectrum),
    "blur circular": (lambda: P.Blur(filter=kernel(1, 4, 3), padding="circular"), (1, 9, 8), FourierSpectrum),
    "down 2 bicubic": (lambda: down(2, "bicubic", (8, 12)), (1, 8, 12), DecimatedSpectrum),
    "down 2 gaussian": (lambda: down(2, "gaussian", (16, 14)), (1, 16, 14), DecimatedSpectrum),
    "down 3 bicubic": (lambda: down(3, "bicubic", (12, 15)), (1, 12, 15), DecimatedSpectrum),
    "down 4 bilinear": (lambda: down(4, "bilinear", (8, 12)), (1, 8, 12), DecimatedSpectrum),
    "down 2 bare": (lambda: down(2, None, (6, 8), "reflect"), (1, 6, 8), DecimatedSpectrum),
    "mask": (
        lambda: P.Inpainting(img_size=(2, 6, 7), mask=(rand(1, 1, 6, 7) > 0.5).double()),
        (2, 6, 7),
        DiagonalSpectrum,
    ),
    "denoising": (P.Denoising, (1, 6, 7), DiagonalSpectrum),
    "mri": (mri, (2, 8, 6), OrthogonalSpectrum),
    "single pixel": (
        lambda: P.SinglePixelCamera(m=20, img_size=(1, 8, 8), fast=True).double(),
        (1, 8, 8),
        OrthogonalSpectrum,
    ),
    "decomposable": (
        lambda: P.DecomposablePhysics(
            U=lambda c: c @ BASES[0].T,
            U_adjoint=lambda c: c @ BASES[0],
            V=lambda c: c @ BASES[1].T,
            V_adjoint=lambda c: c @ BASES[1],
            mask=torch.tensor([[3.0, 1.0, 0.2, 0.0]], dtype=F64),
        ),
        (4,),
        OrthogonalSpectrum,
    ),
    "matrix": (lambda: MatrixOperator(randn(5, 8)), (8,), OrthogonalSpectrum),
}
BASES = [torch.linalg.qr(randn(4, 4, seed=s))[0] for s in (1, 2)]

PER_ITEM = {
    "blurfft": (lambda n: P.BlurFFT(img_size=(1, 7, 6), filter=kernel(n, 3, 4)), (1, 7, 6), FourierSpectrum),
    "blur": (lambda n: P.Blur(filter=kernel(n, 3, 3), padding="circular"), (1, 6, 6), FourierSpectrum),
    "down": (
        lambda n: P.Downsampling(img_size=(1, 8, 6), filter=kernel(n, 4, 4), factor=2, padding="circular"),
        (1, 8, 6),
        DecimatedSpectrum,
    ),
    "mask": (
        lambda n: P.Inpainting(img_size=(1, 6, 5), mask=(rand(3, 1, 6, 5)[:n] > 0.4).double()),
        (1, 6, 5),
        DiagonalSpectrum,
    ),
}


def multicoil():
    maps = torch.complex(randn(3, 6, 8), randn(3, 6, 8, seed=1))
    return P.MultiCoilMRI(mask=(rand(6, 8) > 0.5).double(), coil_maps=maps, img_size=(2, 6, 8))


ITERATIVE = {
    "reflect": (lambda: P.Blur(filter=kernel(1, 3, 3), padding="reflect"), (1, 6, 7)),
    "valid": (lambda: P.Blur(filter=kernel(1, 3, 4), padding="valid"), (1, 6, 7)),
    "replicate, per item": (lambda: P.Blur(filter=kernel(3, 3, 3), padding="replicate"), (1, 6, 7)),
    "down reflect": (lambda: down(2, "bilinear", (6, 8), "reflect"), (1, 6, 8)),
    "multi-coil": (multicoil, (2, 6, 8)),
    "compressed sensing": (
        lambda: P.CompressedSensing(m=20, img_size=(1, 6, 6), dtype=F64, rng=gen(3)),
        (1, 6, 6),
    ),
}
SIGMA = torch.tensor([0.1, 0.5, 0.02], dtype=F64)


def make(physics, shape, batch=3, **options):
    y = physics.A(randn(batch, *shape, seed=5))
    y = y + 0.1 * randn(*y.shape, seed=6)
    return GaussianLikelihood(y, physics, SIGMA[:batch], **options)


@pytest.mark.parametrize("name", CLOSED)
def test_closed_forms_equal_dense_algebra(name):
    build, shape, kind = CLOSED[name]
    physics = build()
    likelihood = make(physics, shape)
    assert isinstance(likelihood.spectrum, kind) and "svd" in likelihood.provides

    def alone(b):
        return GaussianLikelihood(likelihood.y[b : b + 1], physics, likelihood.sigma[b : b + 1])

    check_likelihood(likelihood, alone=alone, alone_tol=1e-11, num_samples=1500)


@pytest.mark.parametrize("name", PER_ITEM)
def test_closed_forms_with_parameters_per_item(name):
    build, shape, kind = PER_ITEM[name]
    likelihood = make(build(3), shape)
    assert isinstance(likelihood.spectrum, kind)
    check_likelihood(likelihood, num_samples=1500)
    first = GaussianLikelihood(likelihood.y[:1], build(1), likelihood.sigma[:1])
    z = randn(1, *shape, seed=9)
    if name == "mask":  # kernels of another batch size are other kernels
        assert torch.equal(first.prox(z, 0.3), likelihood.prox(z.repeat(3, 1, 1, 1), 0.3)[:1])


@pytest.mark.parametrize("name", ITERATIVE)
def test_conjugate_gradients_equal_dense_algebra(name):
    build, shape = ITERATIVE[name]
    physics = build()
    likelihood = make(physics, shape, tol=1e-12, max_iter=2000)
    assert likelihood.spectrum is None and "svd" not in likelihood.provides
    check_likelihood(likelihood, num_samples=300)


def test_tomography():
    """deepinv's adjoint works in single precision only, so this is held to that."""
    physics = P.Tomography(angles=5, img_width=8, circle=False, normalize=False)
    y = physics.A(randn(2, 1, 8, 8).float())
    likelihood = GaussianLikelihood(y + 0.1 * randn(*y.shape, seed=1).float(), physics, 3.0)
    assert likelihood.spectrum is None
    check_likelihood(likelihood, tol=2e-4, alone_tol=1e-4, num_samples=300)


def test_down_sampling_by_four():
    likelihood = make(down(4, "bicubic", (16, 16)), (1, 16, 16), batch=1)
    assert isinstance(likelihood.spectrum, DecimatedSpectrum)
    check_adjoint(likelihood)
    check_prox(likelihood)


def test_pinv_of_an_item_ignores_its_neighbours():
    kernels = torch.cat([kernel(1, 3, 3), 1e3 * kernel(1, 3, 3, seed=1)])
    y = randn(2, 1, 6, 6)
    both = GaussianLikelihood(y, P.BlurFFT(img_size=(1, 6, 6), filter=kernels), 0.1)
    one = GaussianLikelihood(y[:1], P.BlurFFT(img_size=(1, 6, 6), filter=kernels[:1]), 0.1)
    assert torch.allclose(both.start()[:1], one.start(), atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_masks_alone_and_in_a_batch_are_the_same_bits(dtype):
    mask = (rand(4, 1, 8, 8) > 0.5).to(dtype)
    y = (mask * randn(4, 3, 8, 8)).to(dtype)
    z = randn(4, 3, 8, 8, seed=2).to(dtype)
    batch = GaussianLikelihood(y, P.Inpainting(img_size=(3, 8, 8), mask=mask), 0.1).prox(z, 0.4)
    for b in range(4):
        single = GaussianLikelihood(y[b : b + 1], P.Inpainting(img_size=(3, 8, 8), mask=mask[b : b + 1]), 0.1)
        assert torch.equal(single.prox(z[b : b + 1], 0.4), batch[b : b + 1])


def test_matrices_are_wrapped_with_all_they_provide():
    likelihood = make(MatrixOperator(randn(5, 8)), (8,))
    check_draw(likelihood, rho=0.2)
    a, eye = likelihood.physics.matrix, torch.eye(5, dtype=F64)
    system = 0.25 * a @ a.T + likelihood.sigma[:, None, None] ** 2 * eye
    want = torch.linalg.solve(system, likelihood.y[..., None])[..., 0] @ a
    assert torch.allclose(likelihood.back_project(likelihood.y, 0.5), want, atol=1e-8)


class Unknown(torch.nn.Module):
    """An operator of which nothing is known but what it does."""

    def __init__(self, physics):
        super().__init__()
        self.A, self.A_adjoint = physics.A, physics.A_adjoint


@pytest.mark.parametrize("filters", [1, 2])
def test_blurs_that_are_not_circular_are_preconditioned(filters):
    """Single precision, far from the noise level: the solution is the dense one to a few hundredths of it, in fewer steps."""
    physics = P.Blur(filter=kernel(filters, 5, 5).abs().float(), padding="valid", use_fft=True)
    physics.filter = physics.filter / physics.filter.sum((-2, -1), keepdim=True)
    x, z, sigma, rho = randn(2, 1, 20, 22), randn(2, 1, 20, 22, seed=1), 0.01, 1.0
    y = physics.A(x.float()) + sigma * randn(2, 1, 16, 18, seed=2).float()
    near, plain = (GaussianLikelihood(y, p, sigma, tol=1e-4) for p in (physics, Unknown(physics)))
    assert near.circulant is not None and plain.circulant is None
    columns = torch.eye(440).reshape(440, 1, 20, 22)
    for b in range(2):
        one = P.Blur(filter=physics.filter[b % filters :][:1], padding="valid", use_fft=True)
        a = one.A(columns).flatten(1).T.double()
        r = y[b].flatten().double() - a @ z[b].flatten()
        want = z[b].flatten() + a.T @ torch.linalg.solve(a @ a.T + (sigma / rho) ** 2 * torch.eye(len(a), dtype=F64), r)
        for likelihood in (near, plain):
            found = likelihood.prox(z.float(), rho)[b].flatten().double()
            assert torch.linalg.vector_norm(found - want) < 0.03 * sigma * len(want) ** 0.5
    calls = [p.counts.operator for p in (near, plain)]
    assert 1.3 * calls[0] < calls[1]
    assert torch.equal(near.expand(2).prox(z.float().repeat(2, 1, 1, 1), rho)[2:], near.prox(z.float(), rho))


@pytest.mark.parametrize("padding", ["valid", "reflect", "replicate", "constant"])
@pytest.mark.parametrize("fft", [False, True])
def test_other_paddings_have_no_closed_form(padding, fft):
    physics = P.Blur(filter=kernel(1, 3, 3), padding=padding, use_fft=fft)
    assert spectrum_of(physics, randn(1, 1, 8, 8)) is None


def test_subclasses_that_do_something_else_have_no_closed_form():
    class Shifted(P.BlurFFT):
        def A(self, x, **options):
            return super().A(x).clone().roll(1, -1) * torch.linspace(1, 2, x.shape[-1], dtype=x.dtype)

        def A_adjoint(self, y, **options):
            return super().A_adjoint((y * torch.linspace(1, 2, y.shape[-1], dtype=y.dtype)).roll(-1, -1))

    physics = Shifted(img_size=(1, 8, 8), filter=kernel(1, 3, 3))
    assert spectrum_of(physics, randn(1, 1, 8, 8)) is None
    check_likelihood(make(physics, (1, 8, 8), tol=1e-12, max_iter=2000), num_samples=300)
    up = P.Upsampling(img_size=(1, 8, 8), filter=kernel(1, 4, 4), factor=2)
    check_adjoint(make(up, (1, 4, 4)))
    assert make(up, (1, 4, 4)).spectrum is None


def test_conjugate_gradients_say_when_they_stop_early():
    likelihood = make(P.Blur(filter=kernel(1, 3, 3), padding="reflect"), (1, 8, 8), tol=1e-10, max_iter=2)
    with pytest.warns(UserWarning, match="raise max_iter"):
        likelihood.prox(randn(3, 1, 8, 8), 1.0)


@pytest.mark.parametrize("sigma", [1e-6, 3e-7, 1e-10, 1e-15])
def test_little_noise_means_that_the_data_hold(sigma):
    """In single precision and without a closed form, beside a noisy neighbour: the prox and pigdm's back-projection fit y."""
    physics = P.Blur(filter=torch.ones(1, 1, 3, 3) / 9, padding="reflect")
    x, z = 2 * rand(2, 2, 1, 8, 8).float() - 1
    likelihood = GaussianLikelihood(physics.A(x), physics, torch.tensor([sigma, 0.5]))
    assert likelihood.spectrum is None
    for found in (likelihood.prox(z, 1.0), z + likelihood.back_project(likelihood.residual(z), 1.0)):
        off = likelihood.residual(found).flatten(1).abs().amax(1)
        assert float(off[0]) < 1e-4
        assert float(off[1]) > 1e-2


def test_an_operator_that_gives_nan_is_named():
    likelihood = make(P.Blur(filter=kernel(1, 3, 3), padding="reflect"), (1, 8, 8))
    likelihood.physics = copy.deepcopy(likelihood.physics)
    likelihood.physics.A = lambda x, **_: x * torch.nan
    with pytest.raises(FloatingPointError, match="Blur"):
        likelihood.prox(randn(3, 1, 8, 8), 1.0)


class Wrong:
    """A matrix with a planted error."""

    def __init__(self, matrix, back):
        self.matrix, self.back = matrix, back

    def A(self, x):
        return x @ self.matrix.T

    def A_adjoint(self, y):
        return y @ self.back


def test_a_wrong_adjoint_is_refused_and_found():
    matrix = randn(5, 8)
    with pytest.raises(ValueError, match="not the adjoint"):
        GaussianLikelihood(randn(2, 5), Wrong(matrix, matrix + 0.1), 0.1)
    likelihood = make(MatrixOperator(matrix), (8,))
    likelihood.physics = Wrong(matrix, matrix * 1.001)
    with pytest.raises(AssertionError, match="adjoint"):
        check_adjoint(likelihood)


def test_a_wrong_prox_score_and_draw_are_found():
    likelihood = make(MatrixOperator(randn(5, 8)), (8,))

    def planted(**methods):
        twin = copy.copy(likelihood)
        twin.__class__ = type("Planted", (GaussianLikelihood,), methods)
        return twin

    cls = GaussianLikelihood
    off = planted(prox=lambda self, z, rho: cls.prox(self, z, rho) + 1e-6)
    with pytest.raises(AssertionError, match="dense solve"):
        check_prox(off)
    with pytest.raises(AssertionError, match="score"):
        check_likelihood(planted(score=lambda self, x: 1.0001 * cls.score(self, x)))
    with pytest.raises(AssertionError, match="draws"):
        check_likelihood(planted(draw=lambda self, z, rho, noise: self.prox(z + 0.5 * rho * noise.randn_like(z), rho)))
    coupled = planted(prox=lambda self, z, rho: cls.prox(self, z, rho) + 1e-3 * z.mean())
    with pytest.raises(AssertionError):
        check_likelihood(coupled)
    with pytest.raises(AssertionError, match="modified"):
        check_likelihood(planted(prox=lambda self, z, rho: z.mul_(2)))
    quarter = {name: lambda self, x, name=name: getattr(cls, name)(self, x) / 4 for name in ("log_prob", "score")}
    with pytest.raises(AssertionError, match="log_prob against dense algebra"):
        check_likelihood(planted(**quarter))


def test_likelihoods_that_draw_without_a_dense_truth_keep_the_contract():
    one, two = (GaussianLikelihood(randn(2, 5, seed=i), MatrixOperator(randn(5, 8)), 0.3 + i) for i in range(2))
    joint = JointLikelihood(one, randn(2, 8), torch.tensor(0.8, dtype=F64), torch.tensor(0.6, dtype=F64))
    for right in (FlatLikelihood((4,), 2, F64), joint, Together([one, two])):
        check_likelihood(right)


@pytest.mark.parametrize(
    ("draw", "match"),
    [
        (lambda self, z, rho, noise: z + torch.randn(z.shape), "decided by its noise"),
        (lambda self, z, rho, noise: (z + noise.randn_like(z)).float(), "float32"),
        (lambda self, z, rho, noise: z + noise.randn_like(z).mean(0), "depends on its neighbours"),
    ],
)
def test_wrong_draws_are_found_without_a_dense_truth(draw, match):
    with pytest.raises(AssertionError, match=match):
        check_likelihood(type("Planted", (FlatLikelihood,), {"draw": draw})((4,), 2, F64))


def test_a_matrix_with_as_many_rows_as_measurements_is_not_taken_apart():
    physics = P.CompressedSensing(m=3, img_size=(1, 3, 3), dtype=F64, rng=gen(3))
    check_likelihood(make(physics, (1, 3, 3), tol=1e-12), num_samples=300)
    vector = P.DecomposablePhysics(mask=rand(3, 6) + 0.1)
    check_likelihood(make(vector, (6,)), num_samples=300)


class Gains(torch.nn.Module):
    """Every item has a gain of its own, kept as a buffer or as a plain attribute, in one dimension or in two."""

    def __init__(self, gains, kept):
        super().__init__()
        if kept == "buffer":
            self.register_buffer("gains", gains)
        else:
            self.gains = gains

    def A(self, x):
        return x * self.gains.reshape(-1, 1)

    A_adjoint = A


class PlainGains:
    """The same, and no module."""

    def __init__(self, gains):
        self.gains = gains

    A, A_adjoint = Gains.A, Gains.A


@pytest.mark.parametrize("shape", [(2,), (2, 1)])
@pytest.mark.parametrize("build", [lambda g: Gains(g, "buffer"), lambda g: Gains(g, "attribute"), PlainGains])
@pytest.mark.parametrize("size", [2, 3])
def test_gains_of_items_are_repeated_however_they_are_kept(shape, build, size):
    physics = build(torch.tensor([0.5, 2.0], dtype=F64).reshape(shape))
    likelihood = make(physics, (size,), batch=2, tol=1e-12)
    x = randn(8, size, seed=7)
    assert torch.equal(likelihood.expand(4).A(x).reshape(4, 2, size), likelihood.A(x.reshape(4, 2, size)))
    check_likelihood(likelihood, num_samples=300)
    assert physics.gains.shape == shape


def test_a_vector_as_long_as_the_batch_by_chance_is_not_repeated():
    class Diagonal(PlainGains):
        def A(self, x):
            return x * self.gains

        A_adjoint = A

    check_likelihood(make(Diagonal(rand(3) + 0.1), (3,), tol=1e-12), num_samples=300)


def test_what_cannot_be_repeated_is_named():
    class Counted(PlainGains):
        def A(self, x):
            assert len(x) == 2
            return x * self.gains

        A_adjoint = A

    likelihood = GaussianLikelihood(randn(2, 3), Counted(torch.ones(2, 1, dtype=F64)), 0.1)
    with pytest.raises(ValueError, match="cannot tell which tensors of Counted"):
        likelihood.expand(4)


def test_no_measurement():
    flat = FlatLikelihood((4,), 2, F64)
    z = randn(2, 4)
    assert torch.equal(flat.prox(z, 1.0), z) and torch.equal(flat.score(z), torch.zeros_like(z))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sigma": -0.1}, "sigma must be positive"),
        ({"sigma": 0.0}, "sigma must be positive"),
        ({"sigma": float("nan")}, "sigma must be positive"),
        ({"sigma": torch.ones(5)}, "one per measurement"),
        ({"y": torch.full((2, 1, 6, 6), float("nan"))}, "NaN"),
        ({"y": torch.ones(2, 1, 6, 7)}, "does not fit"),
        ({"y": torch.ones(2, 3, 6)}, "does not fit"),
        ({"y": torch.ones(2, 1, 6, 6, dtype=torch.int64)}, "floating or complex type, got torch.int64"),
        ({"y": torch.ones(0, 1, 6, 6)}, r"B from 1, got shape \(0, 1, 6, 6\)"),
        ({"y": torch.tensor(1.0)}, r"B from 1, got shape \(\)"),
    ],
)
def test_bad_input_is_named_in_one_line(change, message):
    given = {"y": torch.ones(2, 1, 6, 6), "sigma": 0.1} | change
    physics = P.Inpainting(img_size=(1, 6, 6), mask=torch.ones(1, 1, 6, 6))
    with pytest.raises(ValueError, match=message) as error:
        GaussianLikelihood(given["y"], physics, given["sigma"])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("make", [GaussianLikelihood, image_likelihood])
def test_arguments_of_other_types_are_named_in_one_line(make):
    y, physics = torch.ones(2, 1, 6, 6), P.Denoising()
    wrong = [
        ((y.numpy(), physics, 0.1), r"measurement must be a tensor, \(B, \*measurement\), got ndarray"),
        ((physics, y, 0.1), "measurement must be a tensor, .*, got Denoising"),
        ((y, torch.nn.Identity(), 0.1), "must have A and A_adjoint, got Identity without A and A_adjoint"),
        ((y, P.Physics(), 0.1), "got Physics without A_adjoint"),
        ((y, physics, "0.02"), "sigma must be a number or one per measurement, got '0.02'"),
        ((y, physics, None), "sigma must be a number or one per measurement, got None"),
    ]
    for given, message in wrong:
        with pytest.raises(TypeError, match=message) as error:
            make(*given)
        assert "\n" not in str(error.value)


def test_a_constant_part_is_told_from_a_wrong_adjoint():
    class Offset(Wrong):
        def A(self, x):
            return super().A(x) + 0.5

    matrix = randn(5, 8)
    with pytest.raises(ValueError, match=r"Offset is not linear: A\(0\) reaches 0\.5"):
        GaussianLikelihood(randn(2, 5), Offset(matrix, matrix), 0.1)


def test_core_needs_no_deepinv():
    assert importlib.util.find_spec("fewstep.core.likelihood") is not None
    likelihood = make(MatrixOperator(randn(5, 8)), (8,), batch=2)
    assert likelihood.expand(3).batch == 6


def test_likelihoods_are_shown_in_one_line():
    y, physics = torch.zeros(2, 3), MatrixOperator(torch.eye(3))
    assert (
        repr(GaussianLikelihood(y, physics, 0.02)) == "GaussianLikelihood(y=(2, 3), physics=MatrixOperator, sigma=0.02)"
    )
    assert repr(GaussianLikelihood(y, physics, torch.tensor([0.5, 0.1]))).endswith("sigma=0.1 to 0.5)")
    assert repr(FlatLikelihood((3, 8, 8), 2)) == "FlatLikelihood(batch=2, event=(3, 8, 8))"
