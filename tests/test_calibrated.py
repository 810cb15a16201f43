"""Calibrations of a trained sampler: they cover on new images, belong to their weights, and say where they do not hold."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

import fewstep.restore as restoring
from fewstep import calibrated
from fewstep.bench import calibration as bench
from fewstep.bench.common import Variant
from fewstep.bench.log import Log
from fewstep.bench.tasks import Task
from fewstep.calibrated import FILE, Asked, Calibrations, Entry, Plan, calibrate, judge, kinds_of, simulated
from fewstep.commands import calibrating
from fewstep.commands.calibrating import families_of
from fewstep.commands.restoring import _notes
from fewstep.core.counts import Counts
from fewstep.core.sampler import State
from fewstep.core.samples import Samples
from fewstep.measurements import Family
from fewstep.methods.ud2m import UD2M
from fewstep.operators.words import Jpeg, get_operator
from fewstep.priors.unet import UNetConfig, UNetDenoiser
from fewstep.restore import Settings, restore
from fewstep.uncertainty import Calibration
from fewstep.unfolded.decoders import AdaptedDecoder
from fewstep.unfolded.levels import LevelConfig
from fewstep.unfolded.network import UnfoldedConfig, UnfoldedNetwork
from fewstep.unfolded.sampler import Unfolded, UnfoldedSampler
from fewstep.unfolded.store import open_network, save_network
from pictures import PixelPrior

FAMILIES = (
    Family("denoise", sigma={"low": 0.05, "high": 0.2}),
    Family(
        "inpaint-random", fields={"rate": {"low": 0.2, "high": 0.8}, "mask_seed": {"low": 0, "high": 9}}, sigma=0.05
    ),
)
TINY = UNetConfig(widths=(8, 8), layers=1, groups=4)
SIDE, SAMPLES, NARROW = 16, 8, 0.3
PLAN = Plan(samples=(2, SAMPLES), crop=SIDE)


def photos(count, seed):
    """Return images of pixels N(0, 0.5^2) in [-1, 1], as `PixelPrior` says; few reach the ends of the range."""
    x = 0.5 * torch.randn(count, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(seed))
    return list(((x.clamp(-1, 1) + 1) * 127.5).round().byte())


@dataclass(frozen=True)
class Narrow(UnfoldedSampler):
    """The exact posterior of `PixelPrior` with its spread multiplied by `NARROW`, for weights that lie in `place`."""

    place: str
    steps: int = 1
    eta: float = 1.0
    kernel: str = "bridge"
    grid: str = "quadratic"

    exact: ClassVar = "biased"
    limit: ClassVar = "nothing"

    def unfolded(self):
        return open_network(self.place)

    @property
    def nfe(self):
        return 1

    @property
    def folder(self):
        return Path(self.place)

    def estimate(self, problem, state: State, t, noise):
        likelihood, zero = problem.likelihood, torch.zeros_like(state.x)
        mean = likelihood.prox(zero, 0.5)
        return mean + NARROW * (likelihood.draw(zero, 0.5, noise) - mean)


@pytest.fixture
def sampler(tmp_path):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        prior = UNetDenoiser(TINY)
    network = UnfoldedNetwork(UnfoldedConfig(LevelConfig(1)), AdaptedDecoder(prior))
    save_network(network, tmp_path / "sampler", {"prior": "natural"})
    return Narrow(str(tmp_path / "sampler"))


@pytest.fixture
def found(sampler):
    return calibrate(sampler, PixelPrior(), photos(24, seed=1), FAMILIES, PLAN)


def covered(sampler, calibration, family):
    """Return the coverage of the calibrated and of the plain intervals on new photographs."""
    pairs = list(
        simulated(sampler, PixelPrior(), photos(60, seed=2), (family,), Plan(samples=(SAMPLES,), crop=SIDE, seed=5))
    )
    inside = []
    for samples, truth in pairs:
        ends = calibration.apply(samples), samples.interval(calibration.level)
        inside.append([float(((low <= truth) & (truth <= high)).double().mean()) for low, high in ends])
    return np.mean(inside, axis=0), np.std(inside, axis=0) / len(inside) ** 0.5


@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.word)
def test_a_narrow_sampler_covers_again_on_new_photographs(sampler, found, family):
    calibration = found.find(Asked(get_operator(family.word)(), 0.05, SAMPLES, 0.9)).calibration
    (calibrated, plain), (error, _) = covered(sampler, calibration, family)
    assert 0.9 - 4 * error < calibrated < 0.9 + 2 * PLAN.bound(0.9) / 25 + 4 * error + 0.01
    assert plain < 0.6 and calibration.factor > 2


def test_the_benchmark_covers_on_the_task_it_fitted_and_shows_what_did_not(sampler, found):
    found.save(sampler.folder)
    task, other = Task(get_operator("denoise")(), 0.1), Task(get_operator("denoise")(), 0.4)
    setup = bench.Setup(PixelPrior(), photos(24, seed=1), photos(60, seed=2), Plan(samples=(SAMPLES,), crop=SIDE))
    row = setup.row(Variant("narrow", "", sampler), task)
    assert 0.9 - 4 * row["± fitted"] < row["fitted"] < 0.9 + 2 * PLAN.bound(0.9) / 25 + 4 * row["± fitted"] + 0.01
    assert row["plain"] < 0.6 < row["right"] < row["family"] and row["photographs"] == 60
    stored = replace(setup, fitted=()).row(Variant("narrow", "", sampler), task)
    absent = {name: None for name in ("fitted", "± fitted", "fitted factor")}
    assert stored == row | absent
    wrong = bench.Setup(
        PixelPrior(), photos(24, seed=1), [(p > 127).byte() * 255 for p in photos(60, seed=2)], setup.plan
    )
    assert wrong.row(Variant("narrow", "", sampler), other)["fitted"] < 0.8  # photographs of another law: no promise


def test_a_task_is_the_family_that_draws_nothing_else():
    task = Task(get_operator("inpaint-random")(rate=0.7), 0.025)
    operator, sigma = bench.exactly(task).draw(np.random.default_rng(0))
    assert (operator, sigma) == task


def test_a_file_holds_everything(found, sampler):
    path = found.save(sampler.folder)
    assert Calibrations.load(sampler.folder) == found and path.name == FILE
    assert [(e.word, e.calibration.num_samples) for e in found.entries] == [
        (f.word, k) for f in FAMILIES for k in (2, SAMPLES)
    ]
    assert found.outer == {"steps": 1, "eta": 1.0, "kernel": "bridge", "grid": "quadratic"}


def test_choices_told_apart_have_factors_of_their_own(sampler):
    rates = Family("inpaint-random", fields={"rate": [0.2, 0.9], "mask_seed": {"low": 0, "high": 9}}, sigma=0.05)
    families, few = (FAMILIES[0], rates), replace(PLAN, samples=(SAMPLES,), apart={"rate": ()})
    assert [kind for _, kind, _ in kinds_of((*FAMILIES, rates), {"rate": ()})] == [{}, {}, {"rate": 0.2}, {"rate": 0.9}]
    found = calibrate(sampler, PixelPrior(), photos(24, seed=1), families, few)
    assert [e.name for e in found.entries] == ["denoise", "inpaint-random (rate 0.2)", "inpaint-random (rate 0.9)"]
    (_, _), (_, often) = rates.kinds({"rate": ()})
    alone = calibrate(sampler, PixelPrior(), photos(24, 1), [often], replace(few, apart={}))
    assert found.entries[2].calibration == alone.entries[0].calibration  # as if there were no other
    found.save(sampler.folder)
    assert Calibrations.load(sampler.folder) == found
    rare, often = (e.calibration.factor for e in found.entries[1:])
    for rate, factor in ((0.2, rare), (0.9, often), (0.5, max(rare, often))):
        verdict = judge(sampler, Asked(get_operator("inpaint-random")(rate=rate), 0.05, SAMPLES, 0.9))
        assert verdict.calibration.factor == factor and bool(verdict.outside) == (rate == 0.5)
    assert (
        rare != often
        and "family inpaint-random (rate 0.9)"
        in judge(sampler, Asked(get_operator("inpaint-random")(rate=0.9), 0.05, SAMPLES, 0.9)).text
    )


def test_blurs_of_photographs_are_calibrated_beside_simulated_ones(sampler):
    blur = Family("deblur-uniform", fields={"size": [3]}, sigma=0.05)
    found = calibrate(sampler, PixelPrior(), photos(24, 1), (FAMILIES[0], blur), replace(PLAN, samples=(SAMPLES,)))
    names = ["denoise", "deblur-uniform (boundary auto)", "deblur-uniform (boundary valid)"]
    assert [e.name for e in found.entries] == names and len(found.families) == 3
    found.save(sampler.folder)
    word = get_operator("deblur-uniform")(size=3)
    for operator, entry in ((word, found.entries[1]), (word.measured(), found.entries[2])):
        verdict = judge(sampler, Asked(operator, 0.05, SAMPLES, 0.9))
        assert verdict.calibration == entry.calibration and verdict.outside == ()
    assert found.entries[1].calibration != found.entries[2].calibration
    few = replace(PLAN, samples=(SAMPLES,), words=("denoise",))
    again = calibrate(sampler, PixelPrior(), photos(20, 1), (FAMILIES[0], blur), few)
    assert [e.name for e in again.joined(found).entries] == [*names[1:], names[0]]
    with pytest.raises(ValueError, match="no sr among"):
        calibrate(sampler, PixelPrior(), photos(24, 1), (FAMILIES[0], blur), replace(few, words=("sr",)))
    (valid,) = (f for f in found.families if f.fields.get("boundary") == "valid")
    samples, truth = next(simulated(sampler, PixelPrior(), photos(1, 1), (valid,), few))
    assert samples.x.shape[2:] == truth.shape[1:] == (3, SIDE - 2, SIDE - 2)  # what is delivered, without the margin


def test_parts_of_a_range_have_factors_of_their_own(sampler):
    families, few = FAMILIES[1:], replace(PLAN, samples=(SAMPLES,), apart={"rate": (0.5, 9)})
    found = calibrate(sampler, PixelPrior(), photos(24, seed=1), families, few)
    assert [e.name for e in found.entries] == ["inpaint-random (rate 0.2 to 0.5)", "inpaint-random (rate 0.5 to 0.8)"]
    found.save(sampler.folder)
    assert Calibrations.load(sampler.folder) == found
    rare, often = (e.calibration.factor for e in found.entries)
    assert rare != often
    for rate, factor in ((0.2, rare), (0.4, rare), (0.5, max(rare, often)), (0.7, often), (0.9, max(rare, often))):
        verdict = judge(sampler, Asked(get_operator("inpaint-random")(rate=rate), 0.05, SAMPLES, 0.9))
        assert verdict.calibration.factor == factor and bool(verdict.outside) == (rate == 0.9)
    ((_, low), (_, high)) = families[0].kinds(few.apart)
    rng = np.random.default_rng(0)
    assert max(low.draw(rng)[0].rate for _ in range(50)) < 0.5 < min(high.draw(rng)[0].rate for _ in range(50))


@pytest.mark.parametrize(
    ("apart", "said"),
    [
        ({"rate": ()}, "choices of a field 'rate'"),
        ({"rat": ()}, "choices of a field 'rat'"),
        ({"rate": (0.1, 0.9)}, r"a range of a field 'rate' to cut at 0.1, 0.9"),
    ],
)
def test_only_choices_and_ranges_that_are_cut_can_be_told_apart(sampler, apart, said):
    with pytest.raises(ValueError, match=said):
        calibrate(sampler, PixelPrior(), photos(24, seed=1), FAMILIES, replace(PLAN, apart=apart))


def test_shipped_samplers_are_not_calibrated_in_place():
    with pytest.raises(ValueError, match="is shipped: give --out"):
        calibrating.run(calibrating.Job("natural-general", Path("nowhere"), device="cpu"), PLAN, Console())


def test_calibrations_join_those_of_the_same_sampler_only(found):
    again = replace(found, entries=tuple(replace_level(e, 0.5) for e in found.entries))
    assert again.joined(found).entries == (*found.entries, *again.entries)
    told_apart = replace(found, entries=tuple(e._replace(kind={"rate": 0.5}) for e in found.entries))
    assert told_apart.joined(found) == told_apart  # instead of those of whole families
    for change in ({"crop": 99}, {"outer": {}}, {"sha256": "0"}, {"families": FAMILIES[:1]}):
        with pytest.raises(ValueError, match=f"another {next(iter(change))}"):
            found.joined(replace(found, **change))


def test_times_of_a_sampler_are_those_of_a_file(found, sampler):
    timed = replace(sampler, grid=(1.0, 0.5, 0.2, 0.0))
    outer = calibrated.outer(timed)
    assert outer == json.loads(json.dumps(outer)) and outer["grid"] == [1.0, 0.5, 0.2, 0.0]
    first = replace(found, outer=outer)
    first.save(sampler.folder)
    assert len(first.joined(Calibrations.load(sampler.folder)).entries) == len(found.entries)


def replace_level(entry, level):
    return entry._replace(calibration=replace(entry.calibration, level=level))


def test_a_file_without_kinds_is_of_whole_families(found, sampler):
    path = found.save(sampler.folder)
    values = json.loads(path.read_text())
    for entry in values["entries"]:
        del entry["kind"]
    path.write_text(json.dumps(values))
    assert Calibrations.load(sampler.folder) == found


def test_what_cannot_be_calibrated_is_refused_before_sampling(sampler):
    def never(word, done, total):
        pytest.fail("sampled")

    with pytest.raises(ValueError, match=r"99% intervals need 49 images at least to calibrate on, got 6"):
        calibrate(sampler, PixelPrior(), photos(6, 1), FAMILIES, replace(PLAN, levels=(0.99,), worst=0.5), never)
    for levels in ((1.5,), (0.5,)):
        with pytest.raises(ValueError, match="worst"):
            Plan(levels=levels, worst=0.5)
    assert [Plan().bound(level) for level in (0.5, 0.9)] == [1.0, pytest.approx(0.3)]
    with pytest.raises(ValueError, match=r"90% intervals need 2 images"):
        bench.main(*folders_of(sampler.folder, 1, 2), methods=["ddrm"], tasks=["sr2"], prior="random", crop=SIDE)
    with pytest.raises(ValueError, match="fitted = -1"):
        bench.main(*folders_of(sampler.folder, 3, 1), fitted=-1)


def test_a_method_that_does_not_fit_a_task_leaves_the_other_rows(sampler, monkeypatch):
    given = {"samples": 4, "crop": SIDE, "tasks": ["jpeg10"], "steps": [2], "prior": PixelPrior()}
    report = bench.main(*folders_of(sampler.folder, 5, 1), methods=["ddrm", "latino:photo"], **given)
    lost, done = report.tables["Coverage"]
    assert "gaussian" in lost["remark"] and "plain" not in lost and 0 < done["plain"] <= 1


def test_rows_belong_to_what_was_calibrated_on_and_what_was_measured(tmp_path):
    fitted, fresh = folders_of(tmp_path, 4, 5)
    (fresh / "4.png").unlink()
    given = {"methods": ["ddrm"], "steps": [2], "tasks": ["sr2"], "samples": 4, "crop": SIDE, "prior": PixelPrior()}
    given |= {"worst": 0.5}
    first = bench.main(fitted, fresh, tmp_path / "c.json", **given).tables
    assert bench.main(fitted, fresh, tmp_path / "c.json", **given).tables == first
    swapped = bench.main(fresh, fitted, tmp_path / "c.json", **given).tables
    assert swapped == bench.main(fresh, fitted, **given).tables != first


def test_a_row_that_failed_is_made_anew(tmp_path, monkeypatch):
    whole = bench.simulated

    def short_of_memory(*_):
        raise RuntimeError("out of memory")

    def run():
        given = {"fitted": 0, "limit": 1, "methods": ["ddrm"], "steps": [2], "tasks": ["sr2"], "samples": 4}
        report = bench.main(folder, folder, tmp_path / "c.json", crop=SIDE, prior=PixelPrior(), **given)
        return report.tables["Coverage"][0]

    (folder,) = folders_of(tmp_path, 1)
    monkeypatch.setattr(bench, "simulated", short_of_memory)
    assert run()["remark"] == "failed: RuntimeError: out of memory"
    monkeypatch.setattr(bench, "simulated", whole)
    assert run()["photographs"] == 1


def folders_of(home, *counts):
    """Return folders with so many photographs each."""
    for n in counts:
        (home / str(n)).mkdir(exist_ok=True)
        for i, photo in enumerate(photos(n, n)):
            Image.fromarray(photo.permute(1, 2, 0).numpy()).save(home / str(n) / f"{i}.png")
    return [home / str(n) for n in counts]


def test_calibrations_of_other_weights_are_refused(found, sampler):
    found.save(sampler.folder)
    asked = Asked(get_operator("denoise")(), 0.1, SAMPLES, 0.9)
    assert judge(sampler, asked).calibration is not None
    network = UnfoldedNetwork(UnfoldedConfig(LevelConfig(2)), AdaptedDecoder(UNetDenoiser(TINY)))
    save_network(network, sampler.folder, {"prior": "natural"})
    with pytest.raises(ValueError, match="other weights"):
        Calibrations.load(sampler.folder)
    verdict = judge(sampler, asked)
    assert verdict.calibration is None and "other weights" in verdict.text


@pytest.mark.parametrize("damage", ["", "{}", '{"format": "fewstep.calibrations"}', "[]"])
def test_a_damaged_file_is_refused(sampler, damage):
    (sampler.folder / FILE).write_text(damage)
    with pytest.raises(ValueError, match="cannot be read"):
        Calibrations.load(sampler.folder)


@pytest.mark.parametrize(
    ("change", "said"),
    [({"num_samples": 3}, "calibrated for 2 samples at level 0.9 or 8"), ({"level": 0.8}, "8 samples at level 0.9")],
)
def test_another_level_or_number_of_samples_is_refused(found, sampler, change, said):
    found.save(sampler.folder)
    verdict = judge(sampler, Asked(get_operator("denoise")(), 0.1, SAMPLES, 0.9)._replace(**change))
    assert verdict.calibration is None and verdict.outside == () and said in verdict.text


def test_other_outer_steps_are_refused(found, sampler):
    found.save(sampler.folder)
    asked = Asked(get_operator("denoise")(), 0.1, SAMPLES, 0.9)
    for change in ({"steps": 2}, {"eta": 0.5}, {"kernel": "one_step"}, {"grid": "uniform"}):
        verdict = judge(replace(sampler, **change), asked)
        assert verdict.calibration is None and f"calibrated with {next(iter(change))}" in verdict.text


def test_operators_outside_of_the_card_are_flagged(found, sampler):
    found.save(sampler.folder)
    far = judge(sampler, Asked(get_operator("inpaint-random")(rate=0.9), 0.05, SAMPLES, 0.9))
    assert (
        far.calibration is not None and far.outside == ("rate 0.9 (0.2 to 0.8)",) and "nothing is promised" in far.text
    )
    noisy = judge(sampler, Asked(get_operator("denoise")(), 0.4, SAMPLES, 0.9))
    assert noisy.outside == ("sigma 0.4 (0.05 to 0.2)",)
    unknown = judge(sampler, Asked(get_operator("sr")(), 0.05, SAMPLES, 0.9))
    assert unknown.calibration is None and unknown.outside == ("no sr among the operators of training",)


def test_nothing_is_said_of_what_is_no_trained_network_on_disk(sampler):
    asked = Asked(get_operator("denoise")(), 0.1, SAMPLES, 0.9)
    network = open_network(str(sampler.folder))
    assert judge(UD2M(), asked) is None and judge(Unfolded(network), asked) is None
    assert "no calibration.json" in judge(sampler, asked).text
    with pytest.raises(ValueError, match="save the network"):
        calibrate(Unfolded(network), PixelPrior(), photos(24, 1), FAMILIES, PLAN)


def test_a_grid_of_times_is_the_same_from_disk(found, sampler):
    given = replace(sampler, grid=(1.0, 0.4, 0.0))
    replace(found, outer={**found.outer, "grid": [1.0, 0.4, 0.0]}).save(sampler.folder)  # JSON knows lists alone
    asked = Asked(get_operator("denoise")(), 0.1, SAMPLES, 0.9)
    assert judge(given, asked).calibration is not None and judge(sampler, asked).calibration is None


def test_samplers_are_calibrated_under_their_own_prior(tmp_path, sampler, monkeypatch):
    def none(folder):
        raise ValueError("there are no images")

    network, seen = open_network(str(sampler.folder)), []
    monkeypatch.setattr(calibrating, "load_prior", lambda name: seen.append(name) or PixelPrior())
    monkeypatch.setattr(calibrating, "list_images", none)
    for prior in ("digits", None):
        save_network(network, tmp_path / "own", {} if prior is None else {"prior": prior})
        message = "does not say which prior" if prior is None else "images"
        with pytest.raises(ValueError, match=message):
            job = calibrating.Job(str(tmp_path / "own"), tmp_path, recipe="natural-general", device="cpu")
            calibrating.run(job, PLAN, Console())
    assert seen == ["digits"]


def test_a_family_holds_what_it_draws():
    rng = np.random.default_rng(0)
    for family in families_of("natural-general"):
        for _ in range(20):
            assert family.outside(*family.draw(rng)) == ()
    with pytest.raises(ValueError, match="natural has no families"):
        families_of("natural")
    assert families_of({"families": [{"word": "denoise", "sigma": 0.1}]}) == (Family("denoise", sigma=0.1),)
    with pytest.raises(ValueError, match="header has no families"):
        families_of(None)


@pytest.mark.parametrize("quality", [7, 30, 95])
def test_a_jpeg_file_shows_its_quality(quality):
    y = Jpeg(quality, "4:2:2").simulate(torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0)))
    assert Jpeg().seen(y) == Jpeg(quality, "4:2:2")


def run(path, folder, sampler, monkeypatch, **changes):
    monkeypatch.setattr(restoring, "build_sampler", lambda chosen: sampler)
    quick = {"operator": "denoise", "sigma": 0.1, "samples": SAMPLES, "simulate": True, "antithetic": False}
    chosen = Settings(**{**quick, **changes})
    return restore(path, folder, chosen, prior=PixelPrior())


def test_restore_uses_what_lies_beside_the_weights(found, sampler, tmp_path, monkeypatch):
    path = tmp_path / "p.png"
    Image.fromarray(photos(1, 3)[0].permute(1, 2, 0).numpy()).save(path)
    before = run(path, tmp_path / "a", sampler, monkeypatch).record
    assert not before["calibrated"] and "no calibration.json" in before["intervals"] and before["coverage90"] < 0.6
    found.save(sampler.folder)
    after = run(path, tmp_path / "b", sampler, monkeypatch)
    assert after.record["calibrated"] and after.record["outside_card"] == [] and after.record["coverage90"] > 0.85
    assert after.record["intervals"] == "calibrated on 24 photographs of 16 pixels, family denoise"
    page = (tmp_path / "b" / "report.html").read_text()
    assert "calibrated on 24 photographs" in page and "read the intervals as its own" not in page
    loud = run(path, tmp_path / "c", sampler, monkeypatch, sigma=0.5).record
    assert loud["calibrated"] and loud["outside_card"] == ["sigma 0.5 (0.05 to 0.2)"]
    assert "outside the card" in (tmp_path / "c" / "report.html").read_text()
    assert _notes(loud)[-1].startswith("intervals: calibrated on 24") and len(_notes(after.record)) == 1
    few = run(path, tmp_path / "d", sampler, monkeypatch, samples=4).record
    assert (
        not few["calibrated"] and "8 samples" in few["intervals"] and _notes(few)[-1].startswith("intervals: not cal")
    )
    assert len(_notes(few | {"num_samples": 1})) == 1  # one sample has no intervals


def test_grey_photographs_are_not_calibrated(found, sampler, tmp_path, monkeypatch):
    found.save(sampler.folder)
    Image.fromarray(photos(1, 3)[0][0].numpy()).save(tmp_path / "g.png")
    record = run(tmp_path / "g.png", tmp_path / "out", sampler, monkeypatch).record
    assert not record["calibrated"] and "grey" in record["outside_card"]


def test_the_table_reports_calibrated_coverage_and_knows_the_weights(found, sampler, tmp_path):
    from fewstep.bench import images
    from fewstep.bench.common import Variant
    from fewstep.bench.tasks import Task

    folder = tmp_path / "photos"
    folder.mkdir()
    for i, photo in enumerate(photos(3, 4)):
        Image.fromarray(photo.permute(1, 2, 0).numpy()).save(folder / f"{i}.png")
    shown = images.Photo.all(sorted(folder.iterdir()))
    task = Task(get_operator("denoise")(), 0.1)
    setup = images.Setup(PixelPrior(), SAMPLES, crop=SIDE)
    entry, log = Variant("narrow", "", sampler), Log(None, "mark")
    plain = images.row_key(shown[0], task, entry, setup)
    found.save(sampler.folder)
    assert images.row_key(shown[0], task, entry, setup) != plain
    for photo in shown:
        images.run_image(photo, {"denoise": task}, [entry], setup, log)
    row = images.Table(task, setup, shown, log).rows([entry])[1]
    assert row["coverage"] < 0.6 and row[images.CALIBRATED] > 0.85 and "family denoise" in row["remark"]


def test_the_command_writes_the_file_beside_the_weights(tmp_path, sampler, monkeypatch):
    from typer.testing import CliRunner

    from fewstep.cli import app

    folder = tmp_path / "photos"
    folder.mkdir()
    for i, photo in enumerate(photos(6, 4)):
        Image.fromarray(photo.permute(1, 2, 0).numpy()).save(folder / f"{i}.png")
    recipe = {"families": [{"word": "denoise", "sigma": {"low": 0.05, "high": 0.2}}]}
    save_network(open_network(str(sampler.folder)), sampler.folder, {"prior": "natural", "recipe": recipe})
    words = ["calibrate", str(sampler.folder), str(folder), "--level", "0.8", "--samples", "2", "--samples", "3"]
    result = CliRunner().invoke(app, [*words, "--limit", "5", "--crop", "16", "--set", "steps=1", "--device", "cpu"])
    assert result.exit_code == 0, result.output
    found = Calibrations.load(sampler.folder)
    fitted = [e.calibration for e in found.entries]
    assert [(c.num_samples, c.images, c.level) for c in fitted] == [(2, 5, 0.8), (3, 5, 0.8)]
    assert found.outer["steps"] == 1 and json.loads((sampler.folder / FILE).read_text())["crop"] == 16
    assert {e.word for e in found.entries} == {"denoise"}  # of the sampler's own recipe
    assert not any(c.antithetic for c in fitted)  # 3 are no pairs
    rest = ["--limit", "4", "--crop", "16", "--set", "steps=1", "--device", "cpu"]
    words = ["calibrate", str(sampler.folder), str(folder), "--samples", "2", "--out", str(tmp_path / "copy")]
    for level in ("0.9", "0.85"):  # the second joins the first, in a folder that is a whole sampler
        assert CliRunner().invoke(app, [*words, "--level", level, *rest]).exit_code == 0
    joined = Calibrations.load(tmp_path / "copy")
    assert [(e.calibration.level, e.calibration.antithetic) for e in joined.entries] == [(0.9, True), (0.85, True)]
    assert open_network(str(tmp_path / "copy"))
    result = CliRunner().invoke(app, [*words, *rest[:2], "--crop", "32", *rest[4:]])
    assert "another crop" in str(result.exception) and "delete calibration.json" in str(result.exception)


class Scripted:
    """A sampler whose samples are -0.1, 0.1, 0.3, ...; it keeps the seeds and measurements that it is given."""

    def __init__(self):
        self.seeds, self.seen = [], []

    def __call__(self, problem, num_samples, *, seed, chunk=None, antithetic=False):
        self.seeds.append(seed)
        self.seen.append(problem.likelihood.y)
        x = 0.2 * torch.arange(num_samples) - 0.1
        return Samples(x.reshape(-1, 1, 1, 1, 1).expand(-1, 1, 3, SIDE, SIDE), Counts(), 0.0, "", (0,))


def test_every_photograph_of_a_calibration_has_noise_of_its_own():
    sampler, family, twice = Scripted(), Family("denoise", sigma=0.1), photos(1, 0) * 2
    for seed in (0, 1):
        list(simulated(sampler, PixelPrior(), twice, [family], replace(PLAN, seed=seed)))
    assert len(set(sampler.seeds)) == len({tuple(y.flatten().tolist()) for y in sampler.seen}) == 4


def test_the_figures_of_the_benchmark_by_hand():
    sampler, plan, grey = Scripted(), replace(PLAN, samples=(3,)), [torch.full((3, SIDE, SIDE), 127).byte()] * 2
    setup, task = bench.Setup(PixelPrior(), [], grey, plan), Task(get_operator("denoise")(), 0.05)
    row = setup.measured(Variant("scripted", "", sampler), task)
    assert (row["width"], row["error"], row["right"]) == pytest.approx((0.1, (0.1 + 1 / 255) / 2, 0.5), abs=1e-6)
    list(simulated(sampler, PixelPrior(), grey, [bench.exactly(task)], plan))
    assert set(sampler.seeds[:2]).isdisjoint(sampler.seeds[2:])  # of measurement and of calibration


def test_antithetic_samples_are_calibrated_apart():
    sampler, plan = Scripted(), replace(PLAN, antithetic=True)
    asked = Asked(get_operator("denoise")(), 0.1, SAMPLES, 0.9, antithetic=True)
    entries = tuple(Entry("denoise", {}, Calibration(0.9, f, SAMPLES, 32, antithetic=f > 1)) for f in (1.0, 2.0))
    found = Calibrations("", {}, 8, (Family("denoise", sigma=0.1),), entries)
    assert found.find(asked).calibration.factor == 2.0
    assert found.find(asked._replace(antithetic=False)).calibration.factor == 1.0
    both = replace(found, entries=entries[:1]).joined(replace(found, entries=entries[1:]))
    assert len(both.entries) == 2
    verdict = replace(found, entries=entries[1:]).verdict(sampler, asked._replace(antithetic=False))
    assert f"denoise is calibrated for {SAMPLES} antithetic samples at level 0.9" in verdict.text
    with pytest.raises(ValueError, match="their number must be even, got 3"):
        replace(plan, samples=(3,))


def test_the_first_of_each_pair_are_calibrated_as_the_independent_samples_they_are(sampler):
    pairs = replace(PLAN, samples=(SAMPLES, 2), antithetic=True)
    assert pairs.parts() == [(slice(SAMPLES), True), (slice(2), True), (slice(0, SAMPLES, 2), False)]
    found, alone = (
        calibrate(sampler, PixelPrior(), photos(24, 1), FAMILIES[:1], plan)
        for plan in (pairs, replace(PLAN, samples=(SAMPLES // 2,)))
    )
    asked = [(e.calibration.num_samples, e.calibration.antithetic) for e in found.entries]
    assert asked == [(SAMPLES, True), (2, True), (SAMPLES // 2, False)]
    assert found.entries[2] == alone.entries[0]
