"""The main job: what is written, what it is worth on a problem with a known answer, and every way it can go wrong."""

from __future__ import annotations

import base64
import errno
import io
import json
import os
import re
import shlex
import signal
from functools import partialmethod
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms
from safetensors.torch import load_file, save_file

import fewstep.restore as module
from fewstep.core.samples import Samples
from fewstep.images import load_image, save_image
from fewstep.operators import words
from fewstep.operators.grey import luma
from fewstep.restore import Settings, restore, restore_folder
from fewstep.store import SampleStore
from fewstep.task import build_sampler, command_line, settled
from pictures import PixelPrior, pixels, write_png

FEW = {"steps": "4"}
FILES = {"measurement.png", "mean.png", "std.png", "interval-low.png", "interval-high.png", "interval-width.png"}
FILES |= {"samples.safetensors", "report.html", "result.json"}


def settings(**changes):
    quick = {"operator": "denoise", "sigma": 0.1, "samples": 3, "method": "latino", "method_fields": FEW}
    return Settings(**{**quick, **changes})


def run(path, folder, progress=None, **changes):
    return restore(path, folder / "out", settings(**changes), prior=PixelPrior(), progress=progress)


def names(folder):
    return {p.name for p in (folder / "out").iterdir()}


def samples_of(k):
    return {f"sample-{i:02d}.png" for i in range(k)}


def test_outputs(tmp_path):
    result = run(write_png(tmp_path), tmp_path)
    assert names(tmp_path) == FILES | samples_of(3)
    record = json.loads((tmp_path / "out" / "result.json").read_text())
    assert record == json.loads(json.dumps(result.record))
    assert record["method"]["name"] == "latino" and record["method"]["steps"] == 4
    assert record["nfe"] == 4 and record["num_samples"] == 3 and not record["interrupted"]
    assert record["sigma"] == 0.1 and record["seed"] == 0 and record["operator"]["name"] == "denoise"
    assert {"fewstep", "torch", "python"} <= set(record["versions"])
    samples = Samples.load(tmp_path / "out")
    assert samples.x.shape == (3, 1, 3, 24, 32)
    unit = ((samples.x + 1) / 2).clamp(0, 1)
    assert torch.allclose(result.summary.mean, unit.mean(0)) and torch.allclose(result.summary.std, unit.std(0))
    assert "psnr_mean" not in record and not (tmp_path / "out" / "truth.png").exists()


def test_antithetic_samples(tmp_path):
    result = run(write_png(tmp_path), tmp_path, samples=4, antithetic=True, simulate=True)
    assert result.record["antithetic"] and Samples.load(tmp_path / "out").antithetic
    unit = ((Samples.load(tmp_path / "out").x + 1) / 2).clamp(0, 1)
    first, second = unit[0::2], unit[1::2]
    variance = (first - second).square().mean(0) / 4 + ((first + second) / 2).var(0)
    assert torch.allclose(result.summary.std, variance.sqrt(), atol=1e-6)
    report = (tmp_path / "out" / "report.html").read_text()
    assert "4 antithetic samples by latino" in report and "--samples 4 --antithetic --simulate" in report
    alone = run(write_png(tmp_path), tmp_path, samples=4, antithetic=False, simulate=True)
    assert not alone.record["antithetic"] and not Samples.load(tmp_path / "out").antithetic
    with pytest.raises(ValueError, match="their number must be even, got 3"):
        run(write_png(tmp_path), tmp_path, antithetic=True)


def test_the_default_is_the_trained_sampler_of_the_prior(tmp_path):
    blur, jpeg = words.DeblurGaussian(), words.Jpeg()
    assert (
        settled(Settings(), blur).method == "ud2m" and settled(Settings(prior=str(tmp_path)), blur).method == "latino"
    )
    assert settled(Settings(method="dps"), jpeg) == Settings(method="dps")
    chosen = settled(Settings(), jpeg)
    assert (chosen.method, chosen.preset) == ("diffpir", "jpeg")
    build_sampler(chosen)
    result = run(write_png(tmp_path), tmp_path, method="", method_fields={"steps": 1})
    assert result.record["method"]["name"] == "ud2m" and result.record["nfe"] == 3
    assert result.record["method"]["network"] == "natural-general"
    assert not {"base", "pairing", "start", "iterations"} & set(result.record["method"])  # they are the network's own


def test_a_trained_sampler_does_not_stand_in_for_another_prior():
    with pytest.raises(ValueError, match=r"belongs to the prior 'natural'.*--method latino"):
        build_sampler(Settings(method="ud2m", prior="elsewhere"))
    untrained = build_sampler(Settings(method="ud2m", preset="consistent", prior="elsewhere"))
    assert untrained.folder is None


def test_simulation_is_scored(tmp_path, monkeypatch):
    monkeypatch.delenv("FEWSTEP_LPIPS", raising=False)
    record = run(write_png(tmp_path), tmp_path, simulate=True).record
    for name in ("psnr_measurement", "psnr_mean", "psnr_sample", "ssim_mean", "coverage90"):
        assert isinstance(record[name], float)
    assert record["psnr_measurement"] == pytest.approx(20, abs=0.6)
    assert record["psnr_mean"] > record["psnr_sample"]
    assert record["lpips"] is None and "LPIPS" in record["missing"]["lpips"]
    assert "truth.png" in names(tmp_path)


def test_the_posterior_of_a_gaussian_is_found_in_the_right_units(tmp_path):
    """Pixels N(0, 0.5^2) in [-1, 1], noise 0.1 in [0, 1]: the posterior mean and deviation are known."""
    y = 0.5 + 0.05 * torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    save_file({"y": y}, tmp_path / "y.safetensors")
    chosen = settings(samples=64, method="pigdm", method_fields={"steps": "100"})
    result = restore(tmp_path / "y.safetensors", tmp_path / "out", chosen, prior=PixelPrior())
    gain = 0.25**2 / (0.25**2 + 0.1**2)
    assert torch.allclose(result.summary.mean, 0.5 + gain * (y - 0.5), atol=0.06)
    assert float(result.summary.std.mean()) == pytest.approx(0.1 * gain**0.5, rel=0.1)


def test_chunks_and_runs_do_not_change_samples(tmp_path, monkeypatch):
    path = write_png(tmp_path)
    first = run(path, tmp_path / "a")
    monkeypatch.setattr(module._Run, "_chunk", lambda self: 1)
    run(path, tmp_path / "b")
    a, b = (load_file(tmp_path / n / "out" / "samples.safetensors")["x"] for n in "ab")
    assert torch.allclose(a, b, atol=1e-6) and first.record["num_samples"] == 3


def test_interruption_of_the_summary_keeps_the_samples(tmp_path, monkeypatch):
    summary = SampleStore.summary

    def late(self, *words):
        os.kill(os.getpid(), signal.SIGINT)
        return summary(self, *words)

    monkeypatch.setattr(SampleStore, "summary", late)
    result = run(write_png(tmp_path), tmp_path)
    assert result.interrupted and result.record["num_samples"] == 3 and names(tmp_path) >= FILES


def test_files_that_share_a_stem_have_folders_of_their_own():
    photos = [Path(name) for name in ("a-png.bmp", "a.jpg", "a.png", "b.png")]
    assert list(module._names(photos).values()) == ["a-png", "a-jpg", "a-png-2", "b"]


def test_a_jpeg_is_recognised_by_itself(tmp_path):
    Image.fromarray(pixels()).save(tmp_path / "p.jpg", quality=30)
    record = run(tmp_path / "p.jpg", tmp_path, operator=None, sigma=None).record
    assert record["operator"]["name"] == "jpeg" and record["sigma"] is None


def test_a_photograph_of_a_telephone_is_restored_upright(tmp_path):
    """Stored on its side, with the tag that says so: measurement, baseline and samples all stand as it was seen."""
    exif, scene = Image.Exif(), pixels()
    exif[0x0112] = 6
    Image.fromarray(scene).rotate(90, expand=True).save(tmp_path / "p.jpg", quality=95, exif=exif)
    result = run(tmp_path / "p.jpg", tmp_path, operator=None, sigma=None)
    assert result.record["operator"]["name"] == "jpeg"
    truth = torch.from_numpy(scene.copy()).permute(2, 0, 1) / 255
    for x in (load_image(tmp_path / "out" / "measurement.png"), result.summary.mean):
        assert x.shape[-3:] == truth.shape and float((x - truth).abs().mean()) < 0.03


def test_without_a_method_a_jpeg_gets_the_one_that_suits_it(tmp_path):
    Image.fromarray(pixels()).save(tmp_path / "p.jpg", quality=30)
    record = run(tmp_path / "p.jpg", tmp_path, operator=None, sigma=None, method="", method_fields={}).record
    assert record["method"]["name"] == "diffpir" and record["method"]["zeta"] == 1.0


def test_the_scene_of_a_photograph_goes_on_beyond_its_frame(tmp_path):
    """A blurred photograph whose left and right differ: taken for circular, the border is wrong by far."""
    scene = torch.linspace(0.1, 0.9, 60).expand(1, 3, 40, 60)
    blur = words.DeblurUniform(size=9, boundary="valid")
    photo, truth = tmp_path / "photo.png", blur.framed(scene)
    save_image(blur.simulate(scene, 0.0), photo)
    errors = {}
    for boundary in ("auto", "circular"):
        fields = {"size": 9, "boundary": boundary}
        result = run(photo, tmp_path / boundary, operator="deblur-uniform", operator_fields=fields, sigma=0.01)
        mean = load_image(tmp_path / boundary / "out" / "mean.png")
        assert mean.shape == truth.shape and result.record["size"] == [3, 32, 52]
        errors[boundary] = float((mean - truth)[..., :4].square().mean().sqrt())
    assert errors["auto"] < 0.12 and errors["circular"] > 0.25
    record = json.loads((tmp_path / "auto" / "out" / "result.json").read_text())
    assert record["operator"]["description"] == "deblur-uniform (boundary valid, size 9)"
    assert Samples.load(tmp_path / "auto" / "out").x.shape == (3, 1, 3, 40, 60)  # the scene that was inferred


def test_a_solver_that_stops_too_early_is_told_once_and_in_plain_words(tmp_path, monkeypatch, recwarn):
    photo, likelihood = write_png(tmp_path), words.DeblurUniform.likelihood
    blur = {"operator": "deblur-uniform", "operator_fields": {"size": 3}}
    assert run(photo, tmp_path, **blur).record["notes"] == []
    monkeypatch.setattr(words.DeblurUniform, "likelihood", partialmethod(likelihood, max_iter=2))
    notes = run(photo, tmp_path, **blur).record["notes"]
    assert len(notes) == 1 and "a solver stopped before it converged" in notes[0]
    assert "a larger --sigma or --boundary circular helps" in notes[0]
    assert not [w for w in recwarn if "conjugate gradients" in str(w.message)]


def test_a_file_in_the_place_of_the_folder_is_told_before_any_work(tmp_path):
    photo = write_png(tmp_path)
    for out in (photo, photo / "deeper"):
        with pytest.raises(ValueError, match=f"cannot be written: {re.escape(str(photo))} is a file"):
            restore(photo, out, settings())
        with pytest.raises(ValueError, match=f"cannot be written: {re.escape(str(photo))} is a file"):
            restore_folder(tmp_path, out, settings())


def test_a_jpeg_of_four_colours_is_refused_with_a_way_out(tmp_path):
    Image.fromarray(pixels()).convert("CMYK").save(tmp_path / "c.jpg")
    with pytest.raises(ValueError, match=r"only grey and YCbCr files are read; another --operator, denoise say"):
        run(tmp_path / "c.jpg", tmp_path, operator=None, sigma=None)
    assert run(tmp_path / "c.jpg", tmp_path).record["num_samples"] == 3


def test_without_operator_the_choices_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"--operator, one of .*denoise"):
        run(write_png(tmp_path), tmp_path, operator=None)
    Image.fromarray(pixels()).save(tmp_path / "p.jpg")
    with pytest.raises(ValueError, match="is to be degraded"):
        run(tmp_path / "p.jpg", tmp_path, operator=None, simulate=True)


def test_sigma_is_estimated_where_that_is_possible(tmp_path):
    x = torch.full((1, 3, 64, 64), 0.5) + 0.1 * torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    save_file({"y": x}, tmp_path / "y.safetensors")
    assert run(tmp_path / "y.safetensors", tmp_path, sigma=None).record["sigma"] == pytest.approx(0.1, rel=0.1)
    with pytest.raises(ValueError, match="sigma"):
        run(tmp_path / "y.safetensors", tmp_path, sigma=None, operator="deblur-gaussian")
    with pytest.raises(ValueError, match="give --sigma"):
        run(write_png(tmp_path), tmp_path, sigma=None, simulate=True)


@pytest.mark.parametrize("operator", ["denoise", "deblur-gaussian", "jpeg"])
@pytest.mark.parametrize("simulate", [True, False])
def test_grey_in_grey_out(tmp_path, operator, simulate):
    jpeg = operator == "jpeg"
    path = tmp_path / ("g.jpg" if jpeg else "g.png")
    Image.fromarray(pixels(channels=1)).save(path)
    run(path, tmp_path, operator=operator, sigma=None if jpeg else 0.1, simulate=simulate)
    for name in ("mean.png", "sample-00.png", "measurement.png", "interval-low.png"):
        assert Image.open(tmp_path / "out" / name).mode == "L"
    written = torch.from_numpy(np.array(Image.open(tmp_path / "out" / "sample-01.png"))) / 255
    seen = words.get_operator(operator)() if simulate else words.get_operator(operator)().measured()
    sample = seen.framed(luma(((Samples.load(tmp_path / "out").x[1, 0] + 1) / 2).clamp(0, 1)))[0]
    assert torch.allclose(sample, written, atol=0.5 / 255 + 1e-6)


def test_a_grey_photograph_under_a_prior_of_one_channel_is_scored(tmp_path):
    Image.fromarray(pixels(channels=1)).save(tmp_path / "g.png")
    prior = PixelPrior()
    prior.event_shape = (1, None, None)
    record = restore(tmp_path / "g.png", tmp_path / "out", settings(simulate=True), prior=prior).record
    assert record["psnr_measurement"] == pytest.approx(20, abs=0.6) and record["psnr_mean"] > record["psnr_sample"]
    assert record["size"] == [1, 24, 32] and 0 < record["coverage90"] <= 1
    for name in ("truth.png", "mean.png", "sample-00.png"):
        assert Image.open(tmp_path / "out" / name).mode == "L"


@pytest.mark.parametrize("grey", [True, False])
def test_the_colour_profile_of_the_photograph_is_that_of_the_results(tmp_path, grey):
    kind = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    kind = kind[:16] + b"GRAY" + kind[20:] if grey else kind
    Image.fromarray(pixels(channels=1 if grey else 3)).save(tmp_path / "p.png", icc_profile=kind)
    run(tmp_path / "p.png", tmp_path, simulate=True)
    for name in ("measurement", "truth", "sample-00", "mean", "interval-low", "interval-high"):
        assert Image.open(tmp_path / "out" / f"{name}.png").info["icc_profile"] == kind
    assert "icc_profile" not in Image.open(tmp_path / "out" / "std.png").info
    shown = re.search("image/png;base64,([^']*)", (tmp_path / "out" / "report.html").read_text())[1]
    assert Image.open(io.BytesIO(base64.b64decode(shown))).info.get("icc_profile") == (None if grey else kind)


@pytest.mark.parametrize("shape", [(7, 5), (1, 1), (9, 33)])
def test_any_size(tmp_path, shape):
    record = run(write_png(tmp_path, height=shape[0], width=shape[1]), tmp_path, simulate=True).record
    assert record["size"] == [3, *shape]
    if min(shape) < 11:
        assert record["ssim_mean"] is None and "pixels" in record["missing"]["ssim_mean"]


def test_a_simulation_is_cropped_to_a_size_that_the_operator_takes(tmp_path):
    path = write_png(tmp_path, height=23, width=33)
    record = run(path, tmp_path, operator="sr", operator_fields={"factor": "2"}, simulate=True).record
    assert record["size"] == [3, 22, 32] and any("33 x 23 to 32 x 22" in note for note in record["notes"])
    with Image.open(tmp_path / "out" / "truth.png") as truth, Image.open(path) as clean:
        assert np.array_equal(np.asarray(truth), np.asarray(clean)[:22, :32])


def test_one_sample_has_no_uncertainty(tmp_path):
    record = run(write_png(tmp_path), tmp_path, samples=1, simulate=True).record
    assert record["coverage90"] is None and "2 samples" in record["missing"]["coverage90"]
    assert "std.png" not in names(tmp_path) and "at least two" in (tmp_path / "out" / "report.html").read_text()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sigma": -0.1}, "sigma must be finite and not negative"),
        ({"sigma": float("nan")}, "sigma must be finite"),
        ({"sigma": 25.0}, "divide by 255"),
        ({"samples": 0}, "samples must be a whole number and at least 1"),
        ({"method": "difpir"}, "did you mean diffpir"),
        ({"method_fields": {"stepz": "3"}}, "did you mean steps"),
        ({"method_fields": {"steps": "many"}}, "steps must be int"),
        ({"method_fields": {"steps": "0"}}, "at least one step"),
        ({"preset": "fast-as-light"}, "no preset"),
        ({"operator": "denoize"}, "did you mean denoise"),
        ({"operator_fields": {"factor": "4"}}, "no option 'factor'"),
        ({"operator": "sr", "operator_fields": {"factor": "two"}}, "factor must be int"),
        ({"operator": "deblur-uniform", "operator_fields": {"size": "99"}}, "larger than the image"),
        ({"operator": "inpaint", "operator_fields": {"mask": "MASK"}}, "the mask .* is 4 x 4, the image is 24 x 32"),
        (
            {"operator": "jpeg", "operator_fields": {"step_std": 0}, "sigma": None, "simulate": True, "method": "ddrm"},
            "methods that fit: .*diffpir",
        ),
        ({"device": "abacus"}, "cannot be used"),
    ],
)
def test_bad_settings_say_cause_and_way_out(tmp_path, changes, message):
    Image.new("L", (4, 4), 255).save(tmp_path / "mask.png")
    fields = changes.get("operator_fields", {})
    if fields.get("mask") == "MASK":
        changes = {**changes, "operator_fields": {"mask": str(tmp_path / "mask.png")}}
    with pytest.raises(ValueError, match=message) as caught:
        run(write_png(tmp_path), tmp_path, **changes)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def interrupt_after(steps):
    def progress(_name, done, _total, _calls):
        if done == steps:
            raise KeyboardInterrupt

    return progress


def test_an_interrupted_run_keeps_what_was_finished(tmp_path, monkeypatch):
    monkeypatch.setattr(module._Run, "_chunk", lambda self: 1)
    result = run(write_png(tmp_path), tmp_path, interrupt_after(10), simulate=True)  # in the third sample of four steps
    assert result.interrupted and result.record["num_samples"] == 2
    assert names(tmp_path) == FILES | samples_of(2) | {"truth.png"}
    assert Samples.load(tmp_path / "out").num_samples == 2
    assert "interrupted" in (tmp_path / "out" / "report.html").read_text()


def test_interrupted_before_the_first_sample(tmp_path):
    result = run(write_png(tmp_path), tmp_path, interrupt_after(1))
    assert result.interrupted and result.record["num_samples"] == 0 and result.summary is None
    assert names(tmp_path) == {"measurement.png", "result.json"}


def test_a_full_disk_leaves_no_half_file(tmp_path, monkeypatch):
    path = write_png(tmp_path)
    real, calls = os.fsync, []

    def fsync(handle):
        calls.append(handle)
        if len(calls) == 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(OSError, match="No space"):
        run(path, tmp_path)
    assert names(tmp_path) == {"measurement.png", "result.json"}
    monkeypatch.undo()
    run(path, tmp_path)
    assert names(tmp_path) == FILES | samples_of(3)


def test_divergence_is_an_error(tmp_path):
    class Broken(PixelPrior):
        def forward(self, x_t, t, **cond):
            return x_t * float("nan")

    with pytest.raises(FloatingPointError, match="diverged"):
        restore(write_png(tmp_path), tmp_path / "out", settings(), prior=Broken())
    assert names(tmp_path) == set()
    run(write_png(tmp_path), tmp_path, samples=2)
    before = {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()}
    with pytest.raises(FloatingPointError, match="diverged"):
        restore(write_png(tmp_path), tmp_path / "out", settings(), prior=Broken())
    run(write_png(tmp_path), tmp_path, interrupt_after(1))
    assert {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()} == before


def test_files_that_no_restoration_wrote_are_not_replaced(tmp_path):
    run(write_png(tmp_path), tmp_path)
    (tmp_path / "out" / "samples.partial-1").touch()  # of a process that was killed
    with pytest.raises(ValueError, match="would be replaced"):
        run(tmp_path / "out" / "mean.png", tmp_path)
    run(write_png(tmp_path), tmp_path)
    assert names(tmp_path) == FILES | samples_of(3)
    (tmp_path / "out" / "result.json").unlink()
    with pytest.raises(ValueError, match="which no restoration wrote"):
        run(write_png(tmp_path), tmp_path)


def test_what_is_missing_is_said_before_anything_is_drawn(tmp_path):
    with pytest.raises(ValueError, match="nowhere do not exist"):
        run(write_png(tmp_path), tmp_path, lpips_weights=str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="device 'meta' cannot be used"):
        run(write_png(tmp_path), tmp_path, device="meta")
    with pytest.raises(ValueError, match=r"kernel must be one of bridge.* got 'foo'"):
        run(write_png(tmp_path), tmp_path, method="ud2m", method_fields={"kernel": "foo"})
    with pytest.raises(ValueError, match="window must be a whole number and at least 65, got 64"):
        settings(window=64)
    assert not (tmp_path / "out").exists() or names(tmp_path) == set()


def test_an_earlier_run_is_replaced_and_foreign_files_are_kept(tmp_path):
    path = write_png(tmp_path)
    run(path, tmp_path, simulate=True)
    (tmp_path / "out" / "notes.txt").touch()
    run(path, tmp_path, samples=2)
    assert names(tmp_path) == FILES | samples_of(2) | {"notes.txt"}


@pytest.mark.parametrize(
    ("samples", "antithetic", "paired"), [(2, None, True), (3, None, False), (2, False, False), (2, True, True)]
)
def test_an_even_number_of_samples_comes_in_pairs(tmp_path, samples, antithetic, paired):
    record = run(write_png(tmp_path), tmp_path, samples=samples, antithetic=antithetic).record
    assert record["antithetic"] is Samples.load(tmp_path / "out").antithetic is paired


def test_the_command_repeats_the_run(tmp_path):
    chosen = settings(operator="sr", operator_fields={"factor": "2"}, seed=3, simulate=True)
    words = shlex.split(command_line(tmp_path / "a b.png", tmp_path, chosen))
    assert words[:3] == ["fewstep", "restore", str(tmp_path / "a b.png")]
    for pair in (["--factor", "2"], ["--set", "steps=4"], ["--seed", "3"], ["--samples", "3"], ["--sigma", "0.1"]):
        assert any(words[i : i + 2] == pair for i in range(len(words)))
    assert words[words.index("--simulate") + 1].startswith("--") and "True" not in words
    assert not {"--device", "--lpips-weights", "--antithetic"} & set(words)
    chosen = settings(device="cpu", lpips_weights="weights/lpips.pth", samples=4, antithetic=False)
    assert "--independent" in command_line(tmp_path / "a.png", tmp_path, chosen).split()
    words = shlex.split(command_line(tmp_path / "a.png", tmp_path, chosen))
    for pair in (["--device", "cpu"], ["--lpips-weights", "weights/lpips.pth"]):
        assert any(words[i : i + 2] == pair for i in range(len(words)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        *(({"samples": value}, "samples must be a whole number") for value in (2.5, float("nan"), "3")),
        *(({"seed": value}, "seed must be a whole number") for value in (True, 1.0)),
        ({"window": 100.5}, "window must be a whole number"),
        *(({"sigma": value}, "sigma must be a number") for value in (True, "0.1")),
        ({"level": "0.9"}, "level must be a number"),
    ],
)
def test_settings_of_another_kind_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        settings(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "mmps", "method_fields": {"steps": 0}}, "MMPS needs at least one step"),
        ({"method": "mmps", "method_fields": {"steps": 2.5}}, "MMPS needs at least one step, and whole ones"),
        ({"method": "mmps", "method_fields": {"grid": "nope"}}, r"grid must be one of .*, got 'nope'"),
        ({"method": "mmps", "method_fields": {"steps": 0}, "solver": "deis"}, "needs at least one step"),
    ],
)
def test_steps_that_lead_nowhere_are_refused_before_the_photograph(changes, message):
    with pytest.raises(ValueError, match=message):
        build_sampler(settings(**changes))


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "load_prior", lambda name: PixelPrior())
    folder = tmp_path / "in"
    folder.mkdir()
    for name in ("a.png", "b.png", "c.png"):
        write_png(folder, name)
    (folder / "bad.png").write_text("no image")
    Image.fromarray(pixels()).save(folder / "cut.tif", save_all=True, append_images=[Image.fromarray(pixels())])
    (folder / "cut.tif").write_bytes((folder / "cut.tif").read_bytes()[:2486])  # within the list of the second picture
    Image.fromarray(pixels()).save(folder / "a.jpg")
    results, failures = restore_folder(folder, tmp_path / "out", settings())
    assert set(failures) == {"bad.png", "cut.tif"} and "not an image" in failures["bad.png"]
    assert "damaged or truncated" in failures["cut.tif"]
    assert names(tmp_path) == {"a-png", "a-jpg", "b", "c"} and len(results) == 4
    with pytest.raises(ValueError, match="unknown operator"):  # once, not for every photograph
        restore_folder(folder, tmp_path / "none", settings(operator="blurr"))
    shares = [restore_folder(folder, tmp_path / "two", settings(), share=(rank, 2)) for rank in (0, 1)]
    done = [{r.folder.name for r in part} for part, _ in shares]
    assert done[0] | done[1] == {"a-png", "a-jpg", "b", "c"} and not done[0] & done[1]


@pytest.mark.parametrize("simulate", [False, True])
def test_the_seed_changes_samples_and_simulated_measurements(tmp_path, simulate):
    folders = [run(write_png(tmp_path), tmp_path / str(s), seed=s, simulate=simulate).folder for s in (0, 1)]
    assert not torch.equal(*(Samples.load(folder).x for folder in folders))
    if simulate:
        assert not torch.equal(*(load_image(folder / "measurement.png") for folder in folders))
