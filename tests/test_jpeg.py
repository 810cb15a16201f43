"""JPEG: the file reader against Pillow, the transform, the projection against a generic solver, the gradient."""

from __future__ import annotations

import io
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from scipy.fft import idctn
from scipy.ndimage import gaussian_filter
from scipy.optimize import LinearConstraint, minimize

from fewstep.core.together import noise_level
from fewstep.operators import words
from fewstep.operators.dct import JpegTransform, dct_matrix
from fewstep.operators.image import from_unit, to_unit
from fewstep.operators.jpeg import (
    JpegLikelihood,
    JpegMeasurement,
    encode,
    encoded,
    gaussian_jpeg,
    intervals,
    jpeg,
    project,
    soft_round,
    straight_through,
)
from fewstep.operators.jpeg_file import read_jpeg
from fewstep.operators.jpeg_units import box_duals, regions
from fewstep.testing.likelihood import check_alone, check_form, check_likelihood, check_projection, check_score

F64 = torch.float64
SAMPLINGS = ["4:4:4", "4:2:2", "4:2:0"]


def photo(height, width, channels=3, seed=0, batch=1):
    """Return smooth images with edges on the grid of 8 bit, (B, C, H, W) float64 in [0, 1]."""
    rng = np.random.default_rng(seed)
    x = gaussian_filter(rng.normal(size=(batch, channels, height, width)), (0, 0, 1.5, 1.5)) * 0.8 + 0.5
    x[..., height // 3 :, width // 2 :] *= 0.6
    return torch.tensor((np.clip(x, 0, 1) * 255).round() / 255)


def save(x, **options):
    out = io.BytesIO()
    Image.fromarray((x[0].permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)).save(out, "JPEG", **options)
    return out.getvalue()


SCAN = b"\xff\xda\x00\x0c\x03\x01\x00"  # the head of a scan of three planes, up to the number of the first
KINDS = [{}, {"progressive": True}, {"restart_marker_blocks": 3}, {"progressive": True, "restart_marker_rows": 1},
         {"optimize": True}]  # fmt: skip


@pytest.mark.parametrize("options", KINDS)
@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("quality", [10, 50, 95])
def test_the_reader_agrees_with_the_decoder(options, sampling, quality):
    x = photo(37, 45)
    data = save(x, quality=quality, subsampling=sampling, **options)
    file = read_jpeg(data)
    image = Image.open(io.BytesIO(data))
    assert {n: t.reshape(-1).tolist() for n, t in file.tables.items()} == {
        n: list(t) for n, t in image.quantization.items()
    }
    luma = file.components[0]
    planes = idctn((luma.blocks() * file.tables[luma.table]).astype(float), axes=(2, 3), norm="ortho")
    mine = planes.transpose(0, 2, 1, 3).reshape(luma.rows * 8, luma.columns * 8)[:37, :45] + 128
    image.draft("YCbCr", image.size)
    assert np.abs(mine.clip(0, 255) - np.asarray(image)[..., 0]).max() < 1.01


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("quality", [10, 50, 90])
@pytest.mark.parametrize("size", [(32, 48), (37, 45), (17, 33)])
def test_the_original_lies_in_the_box_of_its_file(quality, sampling, size):
    x = photo(*size)
    y = encode(x, quality, sampling)
    transform = JpegTransform(y.tables, F64)
    coefficients = transform.forward(from_unit(x))
    low, high = intervals(transform, y.indices, 0.0)
    outside = (coefficients - coefficients.clamp(low, high)).abs() * 127.5 / transform.amplification()
    assert float(outside.max()) < 2  # grey levels: rounding of colours and of averaged chroma, integer DCT
    assert float((outside > 0.5).double().mean()) < 2e-3  # the slack that is allowed for
    middle = (low + high) / 2
    assert (
        float(((coefficients - middle).abs() > transform.steps / 2).double().mean()) < 0.04
    )  # other indices, by rounding


def test_indices_are_those_of_the_encoder_where_rounding_cannot_matter():
    x = photo(32, 48)[:, :1]
    for quality in (10, 50, 90):
        y = encode(x, quality)
        transform = JpegTransform(y.tables, F64)
        scaled = (transform.forward(from_unit(x)) * 127.5 - 4 * (torch.arange(transform.steps.numel()) % 64 == 0)) / (
            transform.steps * 127.5
        )
        clear = (scaled - scaled.floor() - 0.5).abs() * transform.steps * 127.5 > 0.5
        assert torch.equal(scaled.round()[clear], y.indices[clear].to(F64)) and float(clear.double().mean()) > 0.5


def turned(x, orientation, sampling="4:2:0", quality=50):
    """Return what the file of an image says that is stored as EXIF `orientation` undoes it."""
    undone = {5: 5, 6: 8, 7: 7, 8: 6}.get(orientation, orientation)  # Pillow turns by a tag, too
    exif = Image.Exif()
    exif[0x0112] = undone
    image = Image.fromarray((x[0].permute(1, 2, 0).numpy() * 255).round().astype(np.uint8))
    image.info["exif"] = exif.tobytes()
    lying = ImageOps.exif_transpose(image)
    exif[0x0112], out = orientation, io.BytesIO()
    lying.save(out, "JPEG", exif=exif, quality=quality, subsampling=sampling)
    return out.getvalue()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_file_that_lies_on_its_side_is_held_upright(orientation):
    """At a size where blocks are cut on one side: which one that is depends on how the file lies."""
    x = photo(37, 51)
    data = turned(x, orientation)
    y = JpegMeasurement.from_file(data)
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    assert y.image_shape == (3, 37, 51) and y.tables.orientation == orientation
    assert np.array_equal((y.decoded[0] * 255).round().permute(1, 2, 0).byte().numpy(), np.asarray(upright))
    other = {1: 3, 2: 4, 3: 1, 4: 2, 5: 7, 6: 8, 7: 5, 8: 6}[orientation]
    inside = []
    for tables in (y.tables, replace(y.tables, orientation=other)):
        likelihood = JpegLikelihood(replace(y, tables=tables), dtype=F64)
        v = likelihood.transform.forward(from_unit(x))
        inside.append(float(((v >= likelihood.low) & (v <= likelihood.high)).double().mean()))
    assert inside[0] > 0.99 and inside[1] < 0.95, "the other orientation of this size is found out"
    check_projection(JpegLikelihood(y, dtype=F64), 5e-3)
    transform, g = JpegTransform(y.tables, F64), torch.Generator().manual_seed(0)
    v, u = (torch.randn(n, generator=g, dtype=F64) for n in ((1, transform.steps.numel()), (1, 3, 37, 51)))
    assert torch.allclose((transform.forward(u) * v).sum(), (u * transform.adjoint(v)).sum())
    check_form(gaussian_jpeg(y, dtype=F64))


def test_grey_files_have_one_channel():
    y = encode(photo(16, 24, 1), 50)
    assert y.image_shape == (1, 16, 24) and y.decoded.shape == (1, 1, 16, 24)
    likelihood = JpegLikelihood(y, dtype=F64)
    check_projection(likelihood, 5e-3)


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("size", [(16, 32), (19, 21)])
def test_adjoint_and_right_inverse(sampling, size):
    transform = JpegTransform(encode(photo(*size), 50, sampling).tables, F64)
    g = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, *size, generator=g, dtype=F64)
    v = torch.randn(2, transform.steps.numel(), generator=g, dtype=F64)
    left, right = (transform.forward(x) * v).sum(), (x * transform.adjoint(v)).sum()
    assert float((left - right).abs()) < 1e-10 * float(left.abs() + 100)
    if size == (16, 32):
        assert torch.allclose(transform.forward(transform.decode(v)), v, atol=1e-10)
    assert torch.allclose(dct_matrix(8) @ dct_matrix(8).T, torch.eye(8, dtype=F64), atol=1e-12)


@pytest.mark.parametrize(
    ("sampling", "size"), [("4:4:4", (8, 8)), ("4:2:0", (16, 8)), ("4:2:0", (8, 10)), ("4:4:4", (3, 5))]
)
def test_the_projection_against_a_generic_solver(sampling, size):
    y = encode(photo(*size), 30, sampling)
    transform = JpegTransform(y.tables, F64)
    z = torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(1), dtype=F64) * 0.4
    bounds = intervals(transform, y.indices, 0.5)
    mine = project(transform, z, bounds, 1e-7, 50000)
    assert float(mine.residual.max()) <= 1e-7
    count = z.numel()
    matrix = transform.forward(torch.eye(count, dtype=F64).reshape(count, 3, *size)).T.numpy()
    start = transform.decode(y.indices * transform.steps).flatten().numpy()
    target = z.flatten().numpy()
    solver = minimize(
        lambda u: (0.5 * np.sum((u - target) ** 2), u - target), start, jac=True, hess=lambda u: np.eye(count),
        method="trust-constr", constraints=LinearConstraint(matrix, bounds[0][0].numpy(), bounds[1][0].numpy()),
        options={"gtol": 1e-9, "xtol": 1e-12, "barrier_tol": 1e-10, "maxiter": 300},
    )  # fmt: skip
    distance = float(((mine.x - z) ** 2).sum()) / 2
    assert distance <= solver.fun + 1e-6
    assert float(np.abs(mine.x.flatten().numpy() - solver.x).max()) < 2e-3


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("size", [(16, 32), (19, 37), (5, 3), (8, 33)])
def test_the_units_make_up_the_transform(sampling, size):
    transform = JpegTransform(encode(photo(*size), 50, sampling).tables, F64)
    v = torch.randn(2, transform.steps.numel(), generator=torch.Generator().manual_seed(0), dtype=F64)
    out = torch.full_like(v, torch.nan)
    for region in regions(transform.tables):
        region.scatter(transform, region.gather(transform, v) @ region.gram(), out)
    assert float((out - transform.forward(transform.adjoint(v))).abs().max()) < 1e-12


@pytest.mark.parametrize("sampling", ["4:4:4", "4:2:0"])
@pytest.mark.parametrize("quality", [10, 50, 90])
@pytest.mark.parametrize("size", [(250, 333), (241, 161)])
def test_the_projection_needs_few_iterations_at_awkward_sizes(quality, sampling, size):
    y = encode(photo(*size), quality, sampling)
    transform = JpegTransform(y.tables, torch.float32)
    bounds = intervals(transform, y.indices, 0.5)
    for spread, most in ((0.15, 15), (1.0, 30)):
        noise = torch.randn(y.decoded.shape, generator=torch.Generator().manual_seed(0))
        found = project(transform, from_unit(y.decoded) + spread * noise, bounds)
        assert float(found.residual.max()) <= 0.1
        assert 0 < float(found.iterations.max()) <= most


def test_the_multipliers_are_normal_to_the_box():
    y = encode(photo(21, 27), 40)
    transform = JpegTransform(y.tables, F64)
    low, high = intervals(transform, y.indices, 0.5)
    v = transform.forward(torch.randn(1, 3, 21, 27, generator=torch.Generator().manual_seed(0), dtype=F64))
    for region in regions(y.tables):
        gram = region.gram()
        lower, upper, start = (region.gather(transform, a).flatten(0, 1) for a in (low, high, v))
        found = box_duals(gram, start, (lower, upper), torch.full_like(gram[0], 1e-9), 50000)
        c, dual = start - found.multipliers @ gram, found.multipliers
        assert bool(((c - c.clamp(lower, upper)).abs() <= 1e-8).all())
        assert bool((dual[c < upper - 1e-8] <= 1e-9).all()) and bool((dual[c > lower + 1e-8] >= -1e-9).all())
        assert bool((dual != 0).any())


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("size", [(16, 16), (11, 19)])
def test_the_gaussian_likelihood(sampling, size):
    files = [encode(photo(*size, seed=s), 20, sampling) for s in range(2)]
    likelihood = gaussian_jpeg(JpegMeasurement.stack(files), 0.2, dtype=F64)
    assert "svd" in likelihood.provides
    check_form(likelihood)
    check_likelihood(
        likelihood, alone=lambda b: gaussian_jpeg(files[b], 0.2, dtype=F64), alone_tol=1e-9, tol=1e-7, num_samples=300
    )
    x = from_unit(photo(*size))
    misfit = (likelihood.y[:1] - likelihood.physics.A(x)) / likelihood.sigma[0]
    assert 0.05 < float(misfit.square().mean()) < (12**-0.5 / 0.2) ** 2  # below a uniform error: many round to 0


def test_a_uniform_error_has_the_spread_that_is_the_default():
    x = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0), dtype=F64) * 0.4 + 0.3
    likelihood = gaussian_jpeg(encode(x, 95, "4:4:4"), dtype=F64)  # steps well below the spread of white noise
    pixels = from_unit((x * 255).round() / 255)
    misfit = (likelihood.y - likelihood.physics.A(pixels)) / likelihood.sigma
    assert float(misfit.square().mean()) == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_the_likelihood(sampling):
    files = [encode(photo(24, 40, seed=s), 20, sampling) for s in range(3)]
    y = JpegMeasurement.stack(files)
    likelihood = JpegLikelihood(y, dtype=F64, tol=1e-6, max_iter=20000)
    assert likelihood.provides == {"gradient", "prox"}
    check_likelihood(
        likelihood, smooth=False, tol=1e-6,
        alone=lambda b: JpegLikelihood(files[b], dtype=F64, tol=1e-6, max_iter=20000), alone_tol=1e-10,
    )  # fmt: skip
    x = from_unit(photo(24, 40))
    assert float(likelihood.log_prob(x.expand(3, -1, -1, -1))[0]) > -0.1
    assert torch.equal(
        likelihood.prox(x.expand(3, -1, -1, -1), 1.0)[:1], likelihood.prox(x.expand(3, -1, -1, -1), 9.0)[:1]
    )
    with pytest.raises(NotImplementedError, match="no exact draw"):
        likelihood.draw(x, 1.0, None)


def test_single_precision_and_odd_sizes():
    x = photo(43, 61, batch=2)
    y = encode(x, 40)
    likelihood = JpegLikelihood(y)
    check_form(likelihood)
    rounding = 5e-6  # in single precision, which differs between processors
    check_alone(likelihood, lambda b: JpegLikelihood(encode(x[b : b + 1], 40)), rounding)
    z = likelihood.start() + 0.05 * torch.randn(2, 3, 43, 61, generator=torch.Generator().manual_seed(0))
    out = likelihood.prox(z, 1.0)
    assert float(likelihood.log_prob(out).min()) > -0.5
    assert float((out - from_unit(x)).square().mean()) < float((z - from_unit(x)).square().mean())


def test_the_surrogate_tends_to_the_set():
    x, y = from_unit(photo(16, 16)), encode(photo(16, 16), 30)
    off = x + 0.2
    sharp, soft = (JpegLikelihood(y, dtype=F64, softness=s) for s in (0.01, 0.1))
    assert float(sharp.log_prob(off)) == pytest.approx(100 * float(soft.log_prob(off)))
    check_score(soft)


def test_a_wrong_projection_is_found():
    class Planted(JpegLikelihood):
        def prox(self, z, rho=1.0):
            return 1.01 * super().prox(z, rho)

    with pytest.raises(AssertionError):
        check_projection(Planted(encode(photo(16, 16), 30), dtype=F64, tol=1e-5), 1e-4)


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_the_differentiable_operator(sampling):
    x = photo(40, 56)
    y = encode(x, 50, sampling)
    out = jpeg(x, y.tables)
    assert float((out.clamp(0, 1) - y.decoded).abs().mean()) < (0.005 if sampling == "4:4:4" else 0.05)
    assert torch.allclose(
        jpeg(x, y.tables, rounding=lambda v: v)[..., 2:-2, 2:-2].mean(), x[..., 2:-2, 2:-2].mean(), atol=0.01
    )
    leaf = x.clone().requires_grad_()
    jpeg(leaf, y.tables).sum().backward()
    assert bool(torch.isfinite(leaf.grad).all()) and float(leaf.grad.abs().max()) > 0
    v = torch.linspace(-2, 2, 9, dtype=F64)
    assert torch.equal(straight_through(v), v.round()) and torch.allclose(soft_round(v[::2]), v[::2])
    small = photo(8, 8).requires_grad_()
    tables = encode(small.detach(), 50, "4:4:4").tables
    assert torch.autograd.gradcheck(lambda u: jpeg(u, tables, soft_round), small, atol=1e-6)


def test_the_word(tmp_path):
    x = photo(24, 32)
    operator = words.Jpeg(quality=30, step_std=0.0)
    y = operator.simulate(x)
    (tmp_path / "photo.jpg").write_bytes(encoded(x, 30)[0])
    read = operator.read(tmp_path / "photo.jpg")
    assert (
        torch.equal(read.indices, y.indices) and read.tables == y.tables and operator.image_shape(read) == (3, 24, 32)
    )
    assert torch.equal(operator.baseline(y), y.decoded)
    likelihood = operator.likelihood(y)
    out = to_unit(likelihood.prox(likelihood.start(), 1.0))
    assert float((out - x).abs().mean()) <= float((y.decoded - x).abs().mean()) + 0.01
    gaussian = words.Jpeg().likelihood(y)
    assert "gaussian" in gaussian.provides
    assert torch.equal(gaussian.prox(x.float(), 1.0), gaussian_jpeg(y, 0.2).prox(x.float(), 1.0))


def test_the_noise_level_of_the_gaussian_error_is_on_the_scale_of_the_image():
    x = photo(64, 64)
    coarse, fine = (noise_level(gaussian_jpeg(encode(x, q, "4:4:4"), 0.2)) for q in (10, 90))
    error = float((from_unit(encode(x, 10, "4:4:4").decoded) - from_unit(x)).square().mean().sqrt())
    assert 0.3 * error < float(coarse) < 3 * error and float(fine) < 0.3 * float(coarse)


def without_tables(data):
    """Return a JPEG file without its Huffman tables, as a frame of Motion JPEG."""
    out, at = data[:2], 2
    while data[at + 1] != 0xDA:
        end = at + 2 + int.from_bytes(data[at + 2 : at + 4])
        out += data[at:end] if data[at + 1] != 0xC4 else b""
        at = end
    return out + data[at:]


def test_a_file_without_huffman_tables_means_the_standard_ones():
    data = encoded(photo(37, 45), 60)[0]
    whole, found = (JpegMeasurement.from_file(source) for source in (data, without_tables(data)))
    assert torch.equal(found.indices, whole.indices) and torch.equal(found.decoded, whole.decoded)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: read_jpeg(b"not a file"), "not a JPEG"),
        (lambda: read_jpeg("/no/such/file.jpg"), "cannot be read"),
        (lambda: read_jpeg(save(photo(32, 32))[:700]), "damaged or cut short|no image data"),
        (lambda: read_jpeg(without_tables(save(photo(32, 32), progressive=True))), "damaged or cut short"),
        (lambda: read_jpeg(save(photo(8, 8)).replace(SCAN, SCAN[:-2] + b"\x09\x00")), "damaged or cut short"),
        (lambda: encode(photo(8, 8), 0), "quality"),
        (lambda: encode(photo(8, 8), 50, "4:1:0"), "sub-sampling"),
        (lambda: encode(photo(8, 8) * float("nan"), 50), "NaN"),
        (lambda: encode(torch.ones(1, 2, 8, 8), 50), "grey or RGB"),
        (lambda: JpegLikelihood(encode(photo(8, 8), 50), softness=0.0), "softness"),
        (lambda: gaussian_jpeg(encode(photo(8, 8), 50), 0.0), "step_std"),
        (lambda: JpegMeasurement.stack([encode(photo(8, 8), 50), encode(photo(8, 8), 60)]), "same tables"),
        (lambda: jpeg(photo(8, 16), encode(photo(8, 8), 50).tables), "tables are for"),
        (lambda: words.Jpeg().likelihood(encode(photo(8, 8), 50), sigma=0.1), "takes no sigma"),
        (lambda: words.Jpeg(step_std=-1.0), "step_std"),
        (lambda: words.Jpeg().likelihood(photo(8, 8)), "needs the file"),
        (lambda: words.Jpeg().simulate(photo(8, 8), 0.1), "takes no sigma"),
    ],
)
def test_bad_input_is_named_in_one_line(call, message):
    with pytest.raises(ValueError, match=message) as error:
        call()
    assert "\n" not in str(error.value)


def test_cmyk_is_refused():
    out = io.BytesIO()
    Image.new("CMYK", (16, 16)).save(out, "JPEG")
    with pytest.raises(ValueError, match="grey and YCbCr"):
        read_jpeg(out.getvalue())
