"""Every kind of image file becomes the right tensor, or a one-line error that names file and cause."""

from __future__ import annotations

import io
import os
import struct
import warnings
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms
from safetensors.torch import save_file

from fewstep.images import list_photos, load_image, read_photo, save_image
from pictures import pixels, write_png


def stored(image, path, **options):
    image.save(path, **options)
    return path


def test_colour(tmp_path):
    x = load_image(write_png(tmp_path))
    assert x.shape == (1, 3, 24, 32) and x.dtype == torch.float32
    assert torch.equal((x[0] * 255).round().byte().permute(1, 2, 0), torch.from_numpy(pixels()))


def test_tiny(tmp_path):
    assert load_image(write_png(tmp_path, height=7, width=5)).shape == (1, 3, 7, 5)


@pytest.mark.parametrize("mode", ["L", "1"])
def test_grey_is_three_equal_channels(tmp_path, mode):
    photo = read_photo(stored(Image.fromarray(pixels(channels=1)).convert(mode), tmp_path / "g.png"))
    assert photo.grey and photo.x.shape == (1, 3, 24, 32)
    assert torch.equal(photo.x[:, 0], photo.x[:, 1]) and torch.equal(photo.x[:, 0], photo.x[:, 2])


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_is_composited_on_white(tmp_path, mode):
    array = np.zeros((4, 6, 4), np.uint8)
    array[:, :3, 3] = 255  # left half opaque black, right half clear
    image = Image.fromarray(array)
    if mode == "P":
        image = Image.fromarray(np.repeat(np.array([[0, 0, 0, 1, 1, 1]], np.uint8), 4, 0), mode="P")
        image.putpalette([0, 0, 0, 10, 10, 10])
        photo = read_photo(stored(image, tmp_path / "a.png", transparency=1))
    else:
        photo = read_photo(stored(image.convert(mode), tmp_path / "a.png"))
    assert photo.x[..., :3].max() == 0 and photo.x[..., 3:].min() == 1
    assert photo.grey == (mode == "LA") and any("white" in note for note in photo.notes)


def test_sixteen_bits_keep_their_depth(tmp_path):
    values = np.array([[0, 1, 257], [40000, 65534, 65535]], np.uint16)
    photo = read_photo(stored(Image.fromarray(values), tmp_path / "d.png"))
    assert photo.grey
    assert torch.equal(photo.x[0, 0], torch.from_numpy(values.astype(np.float32) / 65535))


def test_the_transparent_value_of_sixteen_bits_is_white(tmp_path):
    values = np.array([[0, 1, 257], [40000, 65534, 65535]], np.uint16)
    photo = read_photo(stored(Image.fromarray(values), tmp_path / "d.png", transparency=257))
    values[0, 2] = 65535
    assert torch.equal(photo.x[0, 0], torch.from_numpy(values.astype(np.float32) / 65535))
    assert any("white" in note for note in photo.notes) and any("grey" in note for note in photo.notes)


def test_floats_are_read_without_a_warning(tmp_path):
    values = np.linspace(0, 1, 12, dtype=np.float32).reshape(3, 4)
    path = stored(Image.fromarray(values), tmp_path / "f.tiff")
    before = torch.is_warn_always_enabled()
    torch.set_warn_always(True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert torch.equal(load_image(path)[0, 0], torch.from_numpy(values))
    finally:
        torch.set_warn_always(before)


def colour_profile(space=b"RGB "):
    """Return an ICC profile that says it is of another colour space."""
    data = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    return data[:16] + space + data[20:]


def test_a_colour_profile_is_kept_where_it_is_one_of_the_pixels(tmp_path):
    colour, grey = Image.fromarray(pixels()), Image.fromarray(pixels(channels=1))
    rgb, one, cmyk = (colour_profile(space) for space in (b"RGB ", b"GRAY", b"CMYK"))
    cases = [(colour, rgb, "a.png", True), (colour, rgb, "a.jpg", True), (grey, one, "g.png", True)]
    cases += [
        (grey, rgb, "h.png", False),
        (colour.convert("CMYK"), cmyk, "c.tif", False),
        (colour, b"x", "x.png", False),
    ]
    for image, profile, name, kept in cases:
        photo = read_photo(stored(image, tmp_path / name, icc_profile=profile))
        assert photo.profile == (profile if kept else None)
        assert any("colour profile was not kept" in note for note in photo.notes) != kept
        save_image(photo.x, tmp_path / "out.png", grey=photo.grey, profile=photo.profile)
        assert Image.open(tmp_path / "out.png").info.get("icc_profile") == photo.profile


def test_what_is_left_of_a_file_is_told(tmp_path):
    frames = [Image.new("RGB", (8, 8), (k, 0, 0)) for k in (0, 255)]
    frames[0].save(tmp_path / "two.tiff", save_all=True, append_images=frames[1:])
    photo = read_photo(tmp_path / "two.tiff")
    assert float(photo.x.max()) == 0 and "the first of its 2 pictures was taken" in photo.notes
    (tmp_path / "deep.png").write_bytes(deep_png())
    photo = read_photo(tmp_path / "deep.png")
    assert "its 16 bits per channel were read as 8" in photo.notes and float(photo.x.max()) == 1
    (tmp_path / "deep.tiff").write_bytes(deep_tiff())
    assert read_photo(tmp_path / "deep.tiff").notes == ("its 16 bits per channel were read as 8",)
    for name in ("plain.png", "plain.tiff"):
        frames[1].save(tmp_path / name)
        assert read_photo(tmp_path / name).notes == ()


def deep_png():
    """Return a white PNG of 2 x 2 pixels with 16 bits in each of three channels, which Pillow does not write."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = b"".join(b"\0" + b"\xff" * 12 for _ in range(2))
    parts = [(b"IHDR", struct.pack(">IIBBBBB", 2, 2, 16, 2, 0, 0, 0)), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


def deep_tiff():
    """Return a white TIFF of 2 x 2 pixels with 16 bits in each of three channels, which Pillow does not write."""
    pixels, tags = b"\xff" * 24, [(256, 2), (257, 2), (259, 1), (262, 2), (273, 8), (277, 3), (278, 2), (279, 24)]
    depths = struct.pack("<HHII", 258, 3, 3, 8 + len(pixels))
    entries = sorted([depths, *(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)], key=lambda e: e[0])
    directory = struct.pack("<H", len(entries)) + b"".join(entries) + struct.pack("<I", 0)
    data = pixels + struct.pack("<HHH", 16, 16, 16)
    return b"II*\0" + struct.pack("<I", 8 + len(data)) + data + directory


def test_cmyk_becomes_colour(tmp_path):
    image = Image.new("CMYK", (6, 4), (0, 255, 255, 0))
    x = load_image(stored(image, tmp_path / "c.tif"))
    assert torch.allclose(x[0, :, 0, 0], torch.tensor([1.0, 0.0, 0.0]), atol=0.02)


def test_exif_orientation_is_applied(tmp_path):
    image, exif = Image.fromarray(pixels()), Image.Exif()
    exif[0x0112] = 6
    photo = read_photo(stored(image, tmp_path / "r.jpg", exif=exif))
    assert photo.x.shape == (1, 3, 32, 24) and photo.jpeg and photo.notes
    assert read_photo(stored(image, tmp_path / "p.jpg")).jpeg


def test_a_tiff_that_lies_on_its_side_is_turned_and_the_note_says_so(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    photo = read_photo(stored(Image.fromarray(pixels()), tmp_path / "r.tiff", exif=exif))
    assert torch.equal(photo.x[0].permute(1, 2, 0) * 255, torch.from_numpy(np.rot90(pixels(), -1).copy()).float())
    assert photo.notes == ("turned upright as its EXIF orientation says",)


def test_grey_arrays_have_the_note_of_grey_files(tmp_path):
    np.save(tmp_path / "g.npy", np.full((4, 4), 0.5, np.float32))
    Image.fromarray(np.full((4, 4), 128, np.uint8)).save(tmp_path / "g.png")
    assert read_photo(tmp_path / "g.npy").notes == read_photo(tmp_path / "g.png").notes != ()


def test_exact_measurements(tmp_path):
    y = torch.randn(3, 500, 600, generator=torch.Generator().manual_seed(0))  # noise of sigma one on black
    np.save(tmp_path / "y.npy", y.permute(1, 2, 0).numpy())
    save_file({"y": y[None]}, tmp_path / "y.safetensors")
    for name in ("y.npy", "y.safetensors"):
        assert torch.equal(load_image(tmp_path / name)[0], y)


def bad_inputs(tmp_path):
    good = write_png(tmp_path)
    (tmp_path / "empty.png").touch()
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "half.png").write_bytes(good.read_bytes()[:-200])
    (tmp_path / "bad.safetensors").write_bytes(b"nothing")
    np.save(tmp_path / "nan.npy", np.full((4, 4), np.nan, np.float32))
    np.save(tmp_path / "shape.npy", np.zeros((4, 4, 2), np.float32))
    np.save(tmp_path / "text.npy", np.array(["a"]))
    np.save(tmp_path / "units.npy", np.full((4, 4), 130.0, np.float32))
    np.save(tmp_path / "dark.npy", np.where(np.arange(64).reshape(8, 8) == 9, 255.0, 0.0).astype(np.float32))
    np.save(tmp_path / "first.npy", np.zeros((3, 4, 5), np.float32))
    np.save(tmp_path / "int64.npy", np.full((4, 4), 130))
    save_file({"y": torch.full((3, 4, 4), 130, dtype=torch.int32)}, tmp_path / "int32.safetensors")
    Image.fromarray(np.full((4, 4), np.nan, np.float32)).save(tmp_path / "nan.tiff")
    Image.fromarray(np.full((4, 4), 7.0, np.float32)).save(tmp_path / "range.tiff")
    Image.fromarray(np.full((4, 4), 255, np.int32)).save(tmp_path / "deep.tiff")
    return {
        "missing.png": "does not exist",
        "empty.png": "empty",
        "text.png": "not an image",
        "half.png": "truncated",
        "bad.safetensors": "safetensors",
        "nan.npy": "NaN",
        "shape.npy": "channels|expected",
        "text.npy": "expected floats",
        "units.npy": r"values around 130, expected \[0, 1\]",
        "dark.npy": r"values from 0 to 255, expected \[0, 1\]",
        "first.npy": r"shape \(3, 4, 5\), expected .* \(H, W, 3\)",
        "int64.npy": "int64",
        "int32.safetensors": "int32",
        "nan.tiff": "NaN",
        "range.tiff": r"outside \[0, 1\]",
        "deep.tiff": "32 bits",
        ".": "folder",
    }


def test_bad_inputs_name_file_and_cause(tmp_path):
    for name, cause in bad_inputs(tmp_path).items():
        with pytest.raises(ValueError, match=cause) as caught:
            load_image(tmp_path / name)
        assert "\n" not in str(caught.value) and str(tmp_path / name) in str(caught.value)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("kind", ["gif", "tiff"])
def test_a_file_that_is_cut_anywhere_is_read_or_refused(tmp_path, kind):
    frames = [Image.fromarray(pixels(8, 8, seed=k)) for k in (0, 1)]
    whole, path = io.BytesIO(), tmp_path / f"cut.{kind}"
    frames[0].save(whole, kind, save_all=True, append_images=frames[1:])
    refused = 0
    for length in range(1, len(whole.getvalue()), 9):
        path.write_bytes(whole.getvalue()[:length])
        try:
            assert load_image(path).shape == (1, 3, 8, 8)
        except ValueError as error:
            assert "damaged or truncated" in str(error) or "not an image" in str(error)
            refused += 1
    assert refused > 20


def test_decompression_bomb(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(ValueError, match="too large"):
        load_image(write_png(tmp_path))


def test_save_rounds_clips_and_leaves_no_half_file(tmp_path, monkeypatch):
    x = torch.tensor([[[-1.0, 0.5], [1.0, 2.0]]]).expand(3, 2, 2)
    save_image(x, tmp_path / "x.png")
    assert np.asarray(Image.open(tmp_path / "x.png"))[..., 0].tolist() == [[0, 128], [255, 255]]
    save_image(x, tmp_path / "g.png", grey=True)
    assert Image.open(tmp_path / "g.png").mode == "L"
    with pytest.raises(ValueError, match="NaN"):
        save_image(x * float("nan"), tmp_path / "n.png")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        save_image(x, tmp_path / "full.png")
    assert sorted(os.listdir(tmp_path)) == ["g.png", "x.png"]


def test_round_trip(tmp_path):
    path = write_png(tmp_path)
    save_image(load_image(path), tmp_path / "again.png")
    assert torch.equal(load_image(path), load_image(tmp_path / "again.png"))


def test_folder_listing(tmp_path):
    with pytest.raises(ValueError, match="no images"):
        list_photos(tmp_path)
    write_png(tmp_path, "b.png"), write_png(tmp_path, "a.png")
    (tmp_path / "notes.txt").touch(), (tmp_path / "._a.png").touch()
    assert [p.name for p in list_photos(tmp_path)] == ["a.png", "b.png"]
    with pytest.raises(ValueError, match="nofolder is not a folder"):
        list_photos(tmp_path / "nofolder")


def test_arrays_of_sixteen_bits_are_read_over_their_whole_range(tmp_path):
    np.save(tmp_path / "a.npy", np.array([[0, 65535, 32768]], np.uint16))
    assert load_image(tmp_path / "a.npy")[0, 0, 0].tolist() == pytest.approx([0, 1, 32768 / 65535])
