"""The words of --operator, kernels, the door for images, the noise level of a photograph."""

from __future__ import annotations

import dataclasses
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.io import savemat
from scipy.ndimage import gaussian_filter

from fewstep.core.noise import Noise
from fewstep.operators import kernels, words
from fewstep.operators.estimate import estimate_sigma
from fewstep.operators.grey import in_colour
from fewstep.operators.image import deepinv_physics, from_unit, image_likelihood, to_unit
from fewstep.operators.words import get_operator, operators
from fewstep.testing.likelihood import check_adjoint, check_prox

F64 = torch.float64


def image(batch=2, channels=3, height=24, width=36, dtype=F64):
    rng = np.random.default_rng(0)
    x = gaussian_filter(rng.normal(size=(batch, channels, height, width)), (0, 0, 2, 2))
    return torch.tensor((x - x.min()) / (x.max() - x.min()), dtype=dtype)


@pytest.fixture
def files(tmp_path):
    rng = np.random.default_rng(1)
    kernel = rng.random((5, 7))
    np.save(tmp_path / "kernel.npy", kernel)
    mask = (rng.random((24, 36)) > 0.4).astype(np.uint8) * 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    return {"kernel": str(tmp_path / "kernel.npy"), "mask": str(tmp_path / "mask.png")}


OPTIONS = {
    "deblur-motion": {"size": 9},
    "deblur-gaussian": {"width": 1.0},
    "inpaint-box": {"size": 8},
    "jpeg": {"quality": 50},
}
WORDS = [w for w in operators() if w != "jpeg"]


def make(word, files, **options):
    kind = get_operator(word)
    given = OPTIONS.get(word, {}) | {k: v for k, v in files.items() if k in {f.name for f in dataclasses.fields(kind)}}
    return kind(**(given | options))


def test_the_words():
    assert set(operators()) == {
        "deblur", "deblur-gaussian", "deblur-motion", "deblur-uniform", "denoise", "inpaint", "inpaint-box",
        "inpaint-random", "jpeg", "sr",
    }  # fmt: skip
    with pytest.raises(ValueError, match="did you mean deblur-gaussian"):
        get_operator("deblur-gausian")
    with pytest.raises(ValueError, match="choose one of"):
        get_operator("zzz")


@pytest.mark.parametrize("word", operators())
def test_fields_are_options(word, files):
    operator = make(word, files)
    for field in dataclasses.fields(operator):
        assert field.metadata["help"] and field.default is not dataclasses.MISSING
    assert word in operator.describe() and "\n" not in operator.describe()
    with pytest.raises(dataclasses.FrozenInstanceError):
        operator.word = "other"


@pytest.mark.parametrize("word", WORDS)
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_simulate_likelihood_baseline(word, dtype, files):
    operator, x = make(word, files), image(dtype=dtype)
    state = torch.get_rng_state()
    y = operator.simulate(x, 0.05, seed=3)
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(y[:1], operator.simulate(x[:1], 0.05, seed=3))
    mine, its = (
        (y - operator.simulate(x, 0.0))[0].flatten(),
        Noise.spawn((3,), range(1), dtype).randn(3, 24, 36).flatten(),
    )
    assert len(mine) != len(its) or abs(float(torch.corrcoef(torch.stack([mine, its]))[0, 1])) < 0.1
    assert y.dtype == dtype and operator.image_shape(y) == (3, 24, 36)
    likelihood = operator.likelihood(y, sigma=0.05)
    assert likelihood.event_shape == (3, 24, 36) and "svd" in likelihood.provides
    residual = likelihood.residual(from_unit(x))
    assert 0.03 < float(residual.std()) < 0.11  # twice sigma, less where pixels are missing
    assert float(likelihood.residual(from_unit(x)).mean().abs()) < 0.01
    base = operator.baseline(y)
    assert base.shape == x.shape and 0 <= float(base.min()) and float(base.max()) <= 1
    close = likelihood.prox(from_unit(x), 1e-3)
    assert float((to_unit(close) - x).abs().max()) < 1e-2


@pytest.mark.parametrize("word", WORDS)
def test_words_against_dense_algebra(word, files):
    operator = make(word, files)
    if word == "inpaint":
        x, operator = image(1, 1), operator
    else:
        small = {"deblur-motion": {"size": 5}, "sr": {"factor": 2}, "deblur-gaussian": {"width": 0.7}}
        x, operator = image(1, 1, 12, 14), make(word, files, **small.get(word, {}))
    likelihood = operator.likelihood(operator.simulate(x, 0.1), sigma=0.1)
    check_adjoint(likelihood)
    check_prox(likelihood)


@pytest.mark.parametrize("edges", [(5, 4), (1, 6), (3, 3)])
def test_a_photograph_is_the_inner_part_of_what_was_blurred(edges, tmp_path):
    """The frame of the scene, by shifts: row i of y sees rows i, ..., i + h - 1 of x."""
    h, w = edges
    kernel = torch.rand(h, w, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    np.save(tmp_path / "k.npy", kernel.numpy())
    operator = words.Deblur(kernel=str(tmp_path / "k.npy")).measured()
    x, flipped = image(1, 1, 12, 14), operator.filter()[0, 0].flip(0, 1)
    y = operator.simulate(x, 0.1)
    likelihood = operator.likelihood(y, sigma=0.1, tol=1e-12)
    assert y.shape == (1, 1, 13 - h, 15 - w) and likelihood.event_shape == (1, 12, 14)
    exact = sum(flipped[i, j] * x[..., i : i + 13 - h, j : j + 15 - w].double() for i in range(h) for j in range(w))
    torch.testing.assert_close(operator.simulate(x, 0.0).double(), exact, atol=1e-6, rtol=0)
    check_adjoint(likelihood)
    check_prox(likelihood)
    dot = torch.zeros(h, w)
    dot[h // 2, w // 2] = 1  # a kernel that blurs nothing: what is seen is the frame
    np.save(tmp_path / "dot.npy", dot.numpy())
    still = words.Deblur(kernel=str(tmp_path / "dot.npy"), boundary="valid")
    torch.testing.assert_close(still.simulate(x, 0.0), still.framed(x))


def test_boundaries():
    blur = words.DeblurGaussian(1.0)
    assert blur.measured().boundary == "valid" and blur.measured().measured() == blur.measured()
    assert words.DeblurGaussian(1.0, boundary="circular").measured().boundary == "circular"
    assert blur.describe() == "deblur-gaussian (width 1.0)"
    assert blur.framed(image(1, 1)).shape == image(1, 1).shape and words.Denoise().measured() == words.Denoise()
    with pytest.raises(ValueError, match=r"boundary must be one of .*, got 'reflect'"):
        words.DeblurUniform(boundary="reflect")


@pytest.mark.parametrize("operator", [words.DeblurGaussian(1.0), words.SuperResolution(2), words.InpaintRandom(0.5)])
def test_the_tensors_of_an_operator_are_where_the_measurement_is(operator):
    y = torch.empty(1, 3, 16, 16, device="meta")
    physics = operator._physics(y)
    assert physics.A_adjoint(y).device.type == "meta" and all(b.is_meta for b in physics.buffers())


def test_items_are_simulated_with_noise_and_levels_of_their_own():
    x, levels = image(), torch.tensor([0.1, 0.3], dtype=F64)
    noise = words.Denoise().simulate(x, 1.0, seed=3) - x
    torch.testing.assert_close(words.Denoise().simulate(x, levels, seed=3), x + levels.reshape(2, 1, 1, 1) * noise)
    assert abs(float(torch.corrcoef(noise.flatten(1))[0, 1])) < 0.1


def test_sr_fits_sides_to_multiples_of_the_factor():
    assert words.SuperResolution(4).fit((3, 30, 33)) == (3, 28, 32)
    assert words.Denoise().fit((3, 30, 33)) == (3, 30, 33)


@pytest.mark.parametrize("factor", [2, 3, 4])
def test_bicubic_baseline_lies_where_the_operator_samples(factor):
    operator = words.SuperResolution(factor)
    ramp = torch.linspace(0.2, 0.8, 48, dtype=F64).expand(1, 1, 48, 48)
    up = operator.baseline(operator.simulate(ramp.contiguous(), 0.0))
    middle = slice(4 * factor, -4 * factor)
    assert float((up - ramp)[..., middle].abs().max()) < 3e-3  # half a pixel off is 6e-3


def test_the_door_doubles_sigma_and_centres_y():
    x, sigma = image(1), 0.05
    physics = deepinv_physics().Inpainting(img_size=(3, 24, 36), mask=torch.ones(1, 3, 24, 36, dtype=F64))
    likelihood = image_likelihood(physics.A(x), physics, sigma)
    assert torch.allclose(likelihood.y, from_unit(x)) and float(likelihood.sigma) == pytest.approx(0.1)
    assert torch.allclose(to_unit(from_unit(x)), x)


def test_mri_and_tomography_through_the_door():
    P = deepinv_physics()
    x = image(1, 2, 8, 8)
    mri = P.MultiCoilMRI(
        mask=torch.ones(8, 8, dtype=F64), coil_maps=torch.ones(2, 8, 8, dtype=torch.complex128), img_size=(2, 8, 8)
    )
    assert torch.allclose(image_likelihood(mri.A(x), mri, 0.01).start(), from_unit(x), atol=1e-3)
    ct = P.Tomography(angles=6, img_width=8, circle=False, normalize=False)
    likelihood = image_likelihood(ct.A(x[:, :1].float()), ct, 0.01)
    assert float(likelihood.residual(from_unit(x[:, :1].float())).abs().max()) < 1e-4


def test_masks():
    random = words.InpaintRandom(rate=0.3).build((3, 40, 50))
    assert torch.equal(random.mask[:, :1].expand_as(random.mask), random.mask)
    assert 0.25 < 1 - float(random.mask.mean()) < 0.35
    assert torch.equal(words.InpaintRandom(rate=0.3).build((3, 40, 50)).mask, random.mask)
    box = words.InpaintBox(size=10).build((1, 20, 30)).mask
    assert float((1 - box).sum()) == 100 and float(box[0, 0, 5:15, 10:20].sum()) == 0


def test_missing_pixels_are_not_read():
    operator = words.InpaintBox(size=8)
    y = operator.simulate(image(), 0.05)
    painted = y.clone()
    painted[..., 8:16, 14:22] = 0.7
    z = torch.zeros_like(y)
    outs = [operator.likelihood(a, sigma=0.05).prox(z, 0.5) for a in (y, painted)]
    assert torch.equal(*outs) and torch.equal(operator.baseline(y), operator.baseline(painted))
    assert float(y[..., 8:16, 14:22].abs().max()) == 0


def test_kernels_sum_to_one_and_leave_the_global_generator_alone():
    state = torch.get_rng_state()
    for kernel in (kernels.gaussian_kernel(1.5), kernels.uniform_kernel(4), kernels.motion_kernel(15, 2)):
        assert kernel.dtype == F64 and float(kernel.sum()) == pytest.approx(1) and float(kernel.min()) >= 0
    assert torch.equal(kernels.motion_kernel(15, 2), kernels.motion_kernel(15, 2))
    assert not torch.equal(kernels.motion_kernel(15, 2), kernels.motion_kernel(15, 3))
    assert torch.equal(state, torch.get_rng_state())
    width = kernels.gaussian_kernel(1.5)[0, 0]
    offsets = torch.arange(width.shape[0]) - width.shape[0] // 2
    assert float((width.sum(0) * offsets**2).sum()) == pytest.approx(2.25, rel=1e-2)


def test_motion_kernels_are_those_of_deepinv():
    rng = torch.Generator().manual_seed(2)
    generator = deepinv_physics().generator.MotionBlurGenerator((15, 15), rng=rng, l=0.5, sigma=0.4)
    drawn = generator.step()["filter"].double()
    torch.testing.assert_close(kernels.motion_kernel(15, 2, length=0.5, spread=0.4), drawn / drawn.sum())


def test_kernel_files(tmp_path):
    truth = np.random.default_rng(0).integers(0, 256, (5, 7)).astype(np.uint8)
    Image.fromarray(truth).save(tmp_path / "k.png")
    np.save(tmp_path / "k.npy", truth)
    np.save(tmp_path / "stack.npy", np.stack([truth, truth[::-1]]))
    cell = np.empty((1, 2), dtype=object)
    cell[0, 0], cell[0, 1] = truth.astype(float), truth[::-1].astype(float)
    savemat(tmp_path / "k.mat", {"kernels": cell})
    savemat(tmp_path / "cube.mat", {"kernels": np.stack([truth, truth[::-1]], -1)})
    want = torch.tensor(truth / truth.sum(dtype=float))
    for name, index, kernel in (
        ("k.png", 0, want), ("k.npy", 0, want), ("stack.npy", 1, want.flip(0)), ("k.mat", 0, want),
        ("k.mat", 1, want.flip(0)), ("cube.mat", 0, want), ("cube.mat", 1, want.flip(0)),
    ):  # fmt: skip
        assert torch.allclose(kernels.load_kernel(tmp_path / name, index)[0, 0], kernel)


def test_kernel_files_of_matlab_seven_three(tmp_path):
    h5py = pytest.importorskip("h5py")
    truth = np.random.default_rng(0).random((3, 5))
    with h5py.File(tmp_path / "k.mat", "w", userblock_size=512) as file:
        file.create_dataset("#refs#/a", data=truth.T)
        cells = file.create_dataset("kernels", (1, 1), dtype=h5py.ref_dtype)
        cells[0, 0] = file["#refs#/a"].ref
    with open(tmp_path / "k.mat", "r+b") as file:
        file.write(b"MATLAB 7.3 MAT-file".ljust(116) + bytes(8) + b"\x00\x02IM")
    got = kernels.load_kernel(tmp_path / "k.mat")[0, 0]
    assert torch.allclose(got, torch.tensor(truth / truth.sum()))


def test_kernels_that_would_fill_the_memory_are_refused(tmp_path):
    for make in (
        lambda: kernels.gaussian_kernel(float("inf")),
        lambda: kernels.gaussian_kernel(1e6),
        lambda: kernels.uniform_kernel(100_000),
        lambda: kernels.motion_kernel(100_000),
    ):
        with pytest.raises(ValueError, match=r"4096|512"):
            make()
    (tmp_path / "k.mat").write_bytes(b"MATLAB 5.0" * 3)
    with pytest.raises(ValueError, match="cannot be read as a mat file"):
        kernels.load_kernel(tmp_path / "k.mat")


@pytest.mark.parametrize("sigma", [0.01, 0.05, 0.2])
def test_noise_level_of_a_photograph(sigma):
    x = image(2, 3, 96, 96)
    y = words.Denoise().simulate(x, sigma)
    assert torch.allclose(estimate_sigma(y), torch.full((2,), sigma, dtype=F64), rtol=0.1)
    assert torch.equal(estimate_sigma(y[:1]), estimate_sigma(y)[:1])
    assert torch.allclose(words.Denoise().likelihood(y).sigma, 2 * estimate_sigma(y))


def test_texture_in_a_corner_does_not_raise_the_noise_level():
    y = words.Denoise().simulate(image(1, 3, 96, 96), 0.05)
    y[..., :16, :16] += 0.5 * (-1.0) ** (torch.arange(16)[:, None] + torch.arange(16))
    assert float(estimate_sigma(y)) == pytest.approx(0.05, rel=0.1)


def test_a_flat_image_has_the_noise_of_rounding():
    assert 0 < float(estimate_sigma(torch.ones(1, 3, 16, 16))) < 0.002


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda t: words.Inpaint(mask=str(t / "mask.png")).build((3, 9, 8)), "is 8 x 8, the image is 9 x 8"),
        (lambda t: words.Inpaint().build((3, 8, 8)), "needs a mask file"),
        (lambda t: words.Inpaint(mask=str(t / "black.png")).build((3, 8, 8)), "every pixel as missing"),
        (lambda t: words.Inpaint(mask=str(t / "mask.png")).build((3, 8, 8)), "no pixel as missing"),
        (lambda t: words.Inpaint(mask=str(t / "clear.png")).build((3, 8, 8)), "transparent or coloured: paint it"),
        (lambda t: words.Inpaint(mask=str(t / "grey-clear.png")).build((3, 8, 8)), "transparent or coloured"),
        (lambda t: words.Inpaint(mask=str(t / "colour.png")).build((3, 8, 8)), "transparent or coloured"),
        (lambda t: words.Deblur().build((3, 8, 8)), "needs a kernel file"),
        (lambda t: words.Deblur(kernel=str(t / "no.png")).build((3, 8, 8)), "no such file"),
        (lambda t: words.Deblur(kernel=str(t / "k.txt")).build((3, 8, 8)), "is read from"),
        (lambda t: words.Deblur(kernel=str(t / "nan.npy")).build((3, 8, 8)), "NaN"),
        (lambda t: words.Deblur(kernel=str(t / "zero.npy")).build((3, 8, 8)), "zero"),
        (lambda t: words.Deblur(kernel=str(t / "minus.npy")).build((3, 8, 8)), "negative"),
        (lambda t: words.Deblur(kernel=str(t / "k.npy"), index=2).build((3, 8, 8)), "no index 2"),
        (lambda t: words.DeblurUniform(size=9).build((3, 8, 12)), "larger than the image"),
        (lambda t: words.DeblurGaussian(width=-1.0).build((3, 8, 8)), "positive"),
        (lambda t: words.SuperResolution(factor=1), "at least 2"),
        (lambda t: words.SuperResolution(factor=4).build((3, 30, 32)), "divides"),
        (lambda t: words.InpaintRandom(rate=1.2), "rate"),
        (lambda t: words.InpaintRandom(mask_seed=1 << 64), "mask_seed must fit"),
        (lambda t: words.DeblurMotion(kernel_seed=1 << 64).build((3, 64, 64)), "kernel_seed must fit"),
        (lambda t: words.InpaintBox(size=9).build((3, 8, 8)), "does not fit"),
        (lambda t: words.Denoise().likelihood(torch.ones(1, 3, 8, 8), sigma=-0.1), "sigma must be positive"),
        (lambda t: words.Denoise().likelihood(torch.full((1, 3, 8, 8), float("nan")), sigma=0.1), "NaN"),
        (lambda t: words.Denoise().simulate(torch.full((1, 3, 8, 8), float("nan")), 0.1), "NaN"),
        (lambda t: words.Denoise().simulate(torch.ones(1, 3, 8, 8), -0.1), "negative"),
        (lambda t: words.DeblurUniform(size=3).likelihood(torch.ones(1, 3, 8, 8)), "needs the noise level"),
    ],
)
def test_bad_input_is_named_in_one_line(call, message, tmp_path):
    Image.fromarray(np.full((8, 8), 255, np.uint8)).save(tmp_path / "mask.png")
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / "black.png")
    half = Image.fromarray(np.repeat(np.array([[0, 255]], np.uint8), 8, 0).repeat(4, 1))
    white = Image.new("L", (8, 8), 255)
    Image.merge("RGBA", [white, white, white, half]).save(tmp_path / "clear.png")
    Image.merge("LA", [white, half]).save(tmp_path / "grey-clear.png")
    Image.merge("RGB", [half, white, half]).save(tmp_path / "colour.png")
    (tmp_path / "k.txt").write_text("1")
    for name, value in {"k": 1.0, "nan": np.nan, "zero": 0.0, "minus": -1.0}.items():
        np.save(tmp_path / f"{name}.npy", np.full((3, 3), value))
    with pytest.raises(ValueError, match=message) as error:
        call(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16"])
def test_masks_are_read_from_black_and_white_images_of_every_kind(tmp_path, mode):
    known = torch.arange(64).reshape(8, 8) % 3 != 1
    image, path = Image.fromarray(known.numpy().astype(np.uint8) * 255), tmp_path / "mask.tiff"
    deep = Image.fromarray(known.numpy().astype(np.uint16) * 65535)
    (deep if mode == "I;16" else image.convert("RGB").convert(mode)).save(path)
    assert torch.equal(words.Inpaint(mask=str(path)).build((3, 8, 8)).mask[0, 0] > 0, known)


def test_masks_and_kernels_that_are_too_large_or_damaged_are_refused(tmp_path, monkeypatch):
    Image.fromarray(np.full((8, 8), 255, np.uint8)).save(tmp_path / "p.png")
    whole = (tmp_path / "p.png").read_bytes()
    at = whole.index(b"IDAT")
    piece = whole[at : at + 6]  # the first two bytes of the pixels, and then a chunk without a name
    chunk = struct.pack(">I", 2) + piece + struct.pack(">I", zlib.crc32(piece))
    (tmp_path / "cut.png").write_bytes(whole[: at - 4] + chunk + bytes([0, 0, 0, 4, 255, 255, 255, 255]) + whole[at:])
    for name, limit in (("cut.png", 64), ("p.png", 30)):
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        for build in (words.Inpaint(mask=str(tmp_path / name)).build, words.Deblur(kernel=str(tmp_path / name)).build):
            with pytest.raises(ValueError, match="cannot be read") as error:
                build((3, 8, 8))
            assert "\n" not in str(error.value)


def test_a_kernel_larger_than_the_image_is_refused_at_the_door():
    physics = deepinv_physics().BlurFFT(img_size=(1, 12, 12), filter=torch.ones(1, 1, 9, 9) / 81)
    object.__setattr__(physics, "img_size", (1, 8, 8))
    with pytest.raises(ValueError):
        image_likelihood(torch.ones(1, 1, 8, 8), physics, 0.1)
    direct = deepinv_physics().Blur(filter=torch.ones(1, 1, 9, 9) / 81, padding="circular", use_fft=True)
    with pytest.raises(ValueError, match="larger than the image"):
        image_likelihood(torch.ones(1, 1, 8, 8), direct, 0.1)


def test_an_operator_with_a_constant_part_is_refused():
    class Offset:
        def A(self, x):
            return x + 1

        def A_adjoint(self, y):
            return y

    with pytest.raises(ValueError, match=r"Offset is not linear: A\(0\) reaches 1"):
        image_likelihood(torch.rand(1, 1, 8, 8), Offset(), 0.1)


# ---- rounding ---------------------------------------------------------------------------------------------------------

SHARP = {
    "sr2": (words.SuperResolution(factor=2), 0.005),
    "sr4": (words.SuperResolution(factor=4), 0.02),
    "blur": (words.DeblurGaussian(), 0.02),
    "motion": (words.DeblurMotion(), 0.01),
    "random": (words.InpaintRandom(), 0.025),
    "jpeg": (words.Jpeg(quality=60, step_std=0.2), 0.0),
}


def in_both_precisions(operator, y, sigma):
    for dtype in (torch.float32, F64):
        if isinstance(y, torch.Tensor):
            yield operator.likelihood(y.to(dtype), sigma)
        else:
            yield operator.likelihood(y, dtype=dtype)


@pytest.mark.parametrize("rho", [1.0, 152.0])  # the largest noise ratio that a shipped schedule starts from
@pytest.mark.parametrize("grey", [False, True], ids=["colour", "grey"])
@pytest.mark.parametrize("name", SHARP)
def test_proximal_steps_from_pure_noise_are_those_of_double_precision(name, grey, rho):
    operator, sigma = SHARP[name]
    g = torch.Generator().manual_seed(0)
    x = torch.nn.functional.interpolate(torch.rand(1, 3, 6, 8, generator=g), (48, 64), mode="bicubic").clamp(0, 1)
    x = x[:, :1] if grey else x
    single, double = in_both_precisions(operator, operator.simulate(x, sigma, seed=1), sigma)
    if grey:
        single, double = in_colour(single), in_colour(double)
    z = 0.1 * torch.randn(1, *single.event_shape, generator=g)
    truth = double.prox(z.double(), rho)
    found, moved = single.prox(z, rho), float((truth - z).abs().mean())
    assert found.dtype == torch.float32
    assert float((found - truth).abs().mean()) < 1e-3 * moved
