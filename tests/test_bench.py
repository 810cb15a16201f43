"""Every benchmark runs at a tiny size, writes what it says, and what it says is right where that is known."""

import json
import os
import re
import time

import numpy as np
import pytest
import torch
from PIL import Image

from fewstep.bench import common, denoise, gaussian, mixture, speed, startup, table
from fewstep.bench.memory import PeakMemory
from fewstep.bench.priors import random_prior
from fewstep.core.registry import get
from fewstep.priors.unet import UNetConfig
from fewstep.testing.law import GaussianLaw, distance
from fewstep.testing.problems import bimodal_problem, gaussian_problem


@pytest.fixture
def prior():
    return random_prior(UNetConfig(widths=(8, 16), layers=1, groups=4))


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "photos"
    path.mkdir()
    rng = np.random.default_rng(0)
    for name in ("a", "b"):
        smooth = np.kron(rng.integers(40, 215, (12, 14, 3)), np.ones((8, 8, 1))).astype(np.uint8)
        Image.fromarray(smooth).save(path / f"{name}.png")
    return path


def test_report_is_json_with_a_header_and_makes_markdown(tmp_path):
    rows = [{"method": "a|b", "error": 0.12345, "nfe": 5}, {"method": "c", "error": float("inf"), "extra": "x"}]
    rows[1]["remark"] = "went wrong"
    path = common.Report("demo", {"steps": (1, 2)}, {"Title [x]": rows}, ("a note",)).write(
        tmp_path / "deep" / "r.json"
    )
    report = json.loads(path.read_text())
    assert report["settings"] == {"steps": [1, 2]} and report["tables"]["Title [x]"][1]["error"] == "inf"
    assert set(report["header"]) == {"command", "version", "commit", "date", "machine"}
    assert {"cpu", "cores", "threads", "torch"} <= set(report["header"]["machine"])
    text = table.main(path, tmp_path / "t.md")
    assert (tmp_path / "t.md").read_text() == text
    assert "| method | error | nfe | extra |" in text and "| --- | --: | --: | --- |" in text
    assert "- c: went wrong" in text and "remark" not in text
    assert "a\\|b" in text and "| 0.123 |" in text and "- a note" in text
    common.show(report)


@pytest.mark.parametrize(
    "content",
    [
        *("{}", "[1]", "nonsense", None, '{"format": "fewstep.bench"}'),
        *('{"format": "fewstep.bench", "tables": [1]}', '{"format": "fewstep.bench", "tables": {"t": []}}'),
    ],
)
def test_what_is_no_report_is_refused(tmp_path, content):
    path = tmp_path / "r.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ValueError, match="report"):
        table.main(path)


def test_failed_write_leaves_the_old_report(tmp_path, monkeypatch):
    path = tmp_path / "r.json"
    common.Report("demo", {}).write(path)
    before = path.read_text()
    other = common.Report("demo", object(), {"t": [{"x": 1}]})  # settings that are no mapping become text

    def full(*_):
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        with pytest.raises(OSError, match="no space left"):
            other.write(path)
    assert path.read_text() == before and list(tmp_path.iterdir()) == [path]
    other.write(path)
    assert json.loads(path.read_text())["tables"] == other.tables and list(tmp_path.iterdir()) == [path]


def test_tables_are_written_into_new_folders_and_remarks_say_whose_they_are(tmp_path):
    rows = [{"ablation": "loss", "choice": "all", "remark": "diverged"}]
    common.Report("demo", {}, {"t": rows}).write(tmp_path / "r.json")
    table.main(tmp_path / "r.json", tmp_path / "new" / "t.md")
    assert "- loss all: diverged" in (tmp_path / "new" / "t.md").read_text()


@pytest.mark.parametrize("budget", [0, -5])
def test_budgets_of_no_call_are_refused(budget):
    with pytest.raises(ValueError, match="1 or more"):
        list(common.variants(["dps"], [10, budget]))


@pytest.mark.parametrize("budget", [1, 7, 20, 100])
def test_budgets_are_kept_and_used(budget):
    for variant in common.variants(None, [budget]):
        sampler = variant.sampler
        if sampler.nfe == 0:
            continue
        more = type(sampler).preset(variant.preset, steps=sampler.steps + 1)
        assert sampler.nfe <= budget < more.nfe


def test_variants_name_presets():
    assert {v.preset for v in common.variants(["latino"])} == set(get("latino").presets)
    assert [v.preset for v in common.variants(["latino"], every_preset=False)] == [next(iter(get("latino").presets))]
    assert [v.preset for v in common.variants(["latino:consistent"])] == ["consistent"]
    with pytest.raises(ValueError, match="no preset"):
        list(common.variants(["latino:nonsense"]))
    (own,) = common.variants(["ud2m:consistent:iterations=2:eta=0.5"], [7])
    assert own.preset == "consistent:iterations=2:eta=0.5" and own.sampler.nfe == 6
    assert own.sampler == get("ud2m").preset("consistent", iterations=2, eta=0.5, steps=3)
    (bare,) = common.variants(["diffpir:steps=3"], every_preset=False)
    assert bare.sampler == get("diffpir").preset(next(iter(get("diffpir").presets)), steps=3)
    with pytest.raises(ValueError, match="no preset 'photo:consistent'"):
        list(common.variants(["latino:photo:consistent"]))
    with pytest.raises(ValueError, match="the budget sets the steps"):
        list(common.variants(["latino:photo:steps=3"], [20]))
    for wrong in ("latino:photo:nonsense=1", "latino:photo:steps=many"):
        with pytest.raises(ValueError, match="method latino"):
            list(common.variants([wrong]))
    with pytest.raises(ValueError, match="unknown method"):
        list(common.variants(["nonsense"]))


def test_gaussian_benchmark(tmp_path):
    report = gaussian.main(tmp_path / "g.json", methods=["ddrm", "dps"], steps=[4], num_samples=200, timed=2)
    rows, modes = report.tables.values()
    found = {(r["method"], r["preset"]): r for r in rows}
    assert found["ddrm", "paper"]["law"] == "exact" and found["dps", "paper"]["law"] == "200 samples"
    assert found["dps", "paper"]["mean ±"] == pytest.approx(200**-0.5)
    assert found["ddrm", "paper"]["nfe"] == 4 and found["dps", "paper"]["vjps"] == 4
    draw = found["oracle draw", ""]
    assert draw["measured"] == pytest.approx(1, abs=1e-3) and draw["null space"] == pytest.approx(1, abs=1e-3)
    cells = next(r for r in modes if r["method"] == "oracle draw")
    scalar = [cell for name, cell in cells.items() if name.startswith("s2=")]
    assert len(scalar) == 5 and all(re.fullmatch(r"[+-]0\.00/1\.00", cell) for cell in scalar)
    assert (tmp_path / "g.json").exists()


def test_the_mean_error_is_over_principal_directions():
    posterior = gaussian_problem().posterior
    values, vectors = torch.linalg.eigh(posterior.cov[0])
    # three deviations along every principal direction: farther along the sum of them
    shifted = GaussianLaw(posterior.mean.flatten() + vectors @ (3 * values.sqrt()), posterior.cov[0])
    assert distance(shifted, posterior).mean_error == pytest.approx(3)
    assert "largest over the principal directions of the posterior" in gaussian.NOTES[0]


def test_gaussian_benchmark_records_what_fails():
    sampler = get("diffpir")(steps=3, grid="nonsense")
    row = gaussian.measure(common.Variant("diffpir", "", sampler), gaussian_problem(), 10, 1, 0)
    assert "grid must be one of" in row["remark"] and "mean error" not in row


def test_subspaces_split_measured_from_unmeasured():
    problem = gaussian_problem().problem
    measured, null = gaussian.subspaces(problem)
    assert measured.shape == (5, 3) and null.shape == (5, 2)
    assert float((problem.likelihood.physics.matrix @ null).abs().max()) < 1e-12


def test_mixture_benchmark(tmp_path):
    report = mixture.main(tmp_path / "m.json", methods=["diffpir"], steps=[8], num_samples=1000)
    small, large = report.tables.values()
    assert small[0]["P(x>0)"] == pytest.approx(0.418, abs=1e-3) and small[0]["sd"] == pytest.approx(0.769, abs=1e-3)
    exact = next(r for r in small if r["method"] == "oracle draw")
    assert abs(exact["P(x>0)"] - small[0]["P(x>0)"]) < 4 * exact["P(x>0) ±"]
    draw = next(r for r in large if r["method"] == "oracle draw")
    assert draw["mode weights"] < 5 * draw["mode weights ±"] and 0.5 < draw["SW/floor"] < 2
    few_steps = next(r for r in large if r["method"] == "oracle mean")
    assert few_steps["sd ratio max"] < draw["sd ratio min"] and few_steps["SW/floor"] > draw["SW/floor"]


def test_the_mixture_keeps_all_modes_alive():
    weights = mixture.problems()["Mixture, 8 dimensions"].posterior.weights
    assert float(weights.min()) > 0.05


def test_sliced_wasserstein_of_a_shift():
    x = torch.randn(5000, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert mixture.sliced_wasserstein(x, x + 2) == pytest.approx(2)
    assert mixture.sliced_wasserstein(x, x.flip(0)) == 0
    assert mixture.transport_floor(bimodal_problem().posterior, 500) > 0


def test_denoise_benchmark(folder, prior, tmp_path):
    report = denoise.main(folder, tmp_path / "d.json", prior=prior, levels=(5, 50), repeats=1)
    rows = report.tables["Denoising"]
    assert [r["sigma x 255"] for r in rows] == [5, 50] and all(r["images"] == 2 for r in rows)
    assert rows[0]["PSNR"] > rows[1]["PSNR"] > 5
    assert report.tables["Speed"][0]["seconds per call"] > 0


def test_denoise_puts_the_noise_level_where_the_prior_expects_it():
    from fewstep.priors.exact import GaussianPrior

    prior = GaussianPrior(torch.zeros(3, 4, 4), torch.tensor(0.25))
    u = torch.rand(1, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    # in [-1, 1] the noise has variance (2 sigma)^2
    expected = (0.25 / (0.25 + 0.04) * (2 * u - 1) + 1) / 2
    torch.testing.assert_close(denoise.denoise(prior, u, 0.1), expected)


def test_deepinv_sees_the_same_denoiser():
    from fewstep.bench.deepinv_samplers import DeepinvDenoiser
    from fewstep.priors.exact import GaussianPrior

    prior = GaussianPrior(torch.zeros(3, 4, 4), torch.tensor(0.25))
    u, wrapped = torch.rand(2, 3, 4, 4), DeepinvDenoiser(prior)
    for sigma in (0.1, torch.tensor(0.1), torch.tensor([0.1, 0.1])):
        torch.testing.assert_close(wrapped(u, sigma), denoise.denoise(prior, u, 0.1))
    assert wrapped.calls == 3 and bool(torch.isfinite(wrapped(u, 0.0)).all())


def test_levels_are_met_by_the_uniform_grid():
    from fewstep.bench.deepinv_samplers import Levels
    from fewstep.core.grid import uniform

    levels = Levels((2.0, 0.5, 0.1), (3.0, 0.2, 7.0))
    times = uniform(levels, 3)
    alpha, sigma = levels(times)
    torch.testing.assert_close(alpha, torch.tensor([3.0, 0.2, 7.0, 1.0], dtype=torch.float64))
    torch.testing.assert_close(sigma / alpha, torch.tensor([2.0, 0.5, 0.1, 0.0], dtype=torch.float64))
    torch.testing.assert_close(levels.time(levels.ratio(times)), times)


def test_our_dps_at_deepinvs_settings_has_its_weights():
    from fewstep.bench.deepinv_samplers import RIVALS
    from fewstep.core.grid import uniform
    from fewstep.core.schedule import VariancePreserving

    levels, steps = RIVALS["dps"].schedule(6), 6
    times = uniform(levels, steps)
    vp, _ = VariancePreserving()(times)
    scale = levels(times)[0] / vp
    b = -2 * vp.log()
    torch.testing.assert_close(1 / (scale[:-1] * scale[1:]), torch.sinh((b[:-1] - b[1:]) / 2))


def test_diffpir_at_deepinvs_settings_has_its_calls_and_last_level():
    from fewstep.bench.deepinv_samplers import at_rival_settings
    from fewstep.priors.exact import GaussianPrior

    prior = GaussianPrior(torch.zeros(3, 16, 16), torch.tensor(0.25))
    (_, truth), *_ = speed.truth_images(None, 16)
    scene = speed.make_scenes(truth)[0]
    row = speed.rival_row("diffpir", scene, prior, 20, 1)
    sampler, rescheduled = at_rival_settings("diffpir", prior, 20)
    assert float(rescheduled.schedule.ratio(torch.tensor(1 / 20))) == pytest.approx(0.01, rel=1e-3)
    assert row["calls"] == row["deepinv calls"] == sampler.nfe == 20


def test_speed_benchmark(folder, prior, tmp_path):
    report = speed.main(
        tmp_path / "s.json", folder=folder, prior=prior, methods=["ddrm", "dps"], steps=3, repeats=2, size=64
    )
    loops, versus = report.tables.values()
    assert all(r["ratio min"] <= r["ratio"] <= r["ratio max"] for r in loops) and [r["nfe"] for r in loops] == [3, 3]
    assert {r["method"] for r in versus} == {"dps", "ddrm", "diffpir"} and not any("remark" in r for r in versus)
    assert all(r["calls"] == r["deepinv calls"] == 3 for r in versus)
    assert all(r["ratio"] > 0 and r["PSNR"] > 0 and r[speed.EQUAL] > 0 and r[speed.ERROR] > 0 for r in versus)


def test_importing_costs_little(tmp_path):
    rows = startup.main(tmp_path / "s.json", repeats=1).tables["Start"]
    assert [r["command"] for r in rows] == ["import fewstep", "fewstep --help"]
    assert all(0 < r["seconds"] and r["over"] <= r["seconds"] for r in rows)  # bare Python can cost 0.00 s


def test_processor_seconds_leave_other_work_out():
    ours, theirs = common.alternate([lambda: time.sleep(0.2), lambda: sum(range(10**6))], 1)
    assert ours[0] < 0.1 and 0 < theirs[0]


def test_alternate_swaps_the_order():
    order = []
    times = common.alternate([lambda: order.append("a"), lambda: order.append("b")], 3)
    assert order == ["a", "b", "b", "a", "a", "b"] and [len(t) for t in times] == [3, 3]


def test_peak_memory_sees_what_was_held():
    with PeakMemory() as memory:
        held = torch.ones(16 * 2**20)
        del held
    if memory.mebibytes is None:
        pytest.skip("this system does not say")
    assert 50 < memory.mebibytes < 200


def images():
    return pytest.importorskip("fewstep.bench.images")


def test_images_benchmark_runs_and_resumes(folder, prior, tmp_path, monkeypatch):
    bench, out = images(), tmp_path / "i.json"
    given = {"methods": ["diffpir", "ddrm"], "tasks": ["deblur-gaussian", "sr4", "inpaint-box", "jpeg10"], "crop": 80}
    given |= {"samples": 2, "steps": [2], "prior": prior}
    report = bench.main(folder, out, **given)
    titles = list(report.tables)
    assert titles[0].startswith("deblur-gaussian") and "sigma 0.01" in titles[0]
    blur = {r["method"]: r for r in report.tables[titles[0]]}
    assert blur["measurement"]["images"] == blur["diffpir"]["images"] == 2
    assert blur["diffpir"]["nfe"] == 2 and 0 <= blur["diffpir"]["coverage"] <= 1 and blur["diffpir"]["PSNR mean"] > 5
    jpeg = {r["method"]: r for r in report.tables[titles[3]]}
    assert jpeg["ddrm"]["remark"].startswith("not applicable: needs gaussian") and jpeg["ddrm"]["images"] == 0
    lines = out.with_suffix(".jsonl").read_text().splitlines()
    assert len(lines) == 2 * 4 * 3

    out.with_suffix(".jsonl").write_text("\n".join(lines[:-1]) + '\n{"key": "cut o')
    calls = []
    whole = bench.method_row
    monkeypatch.setattr(bench, "method_row", lambda *a: calls.append(1) or whole(*a))
    again = bench.main(folder, out, **given)
    assert len(calls) == 1 and [list(t) for t in again.tables.values()]
    assert bench.main(folder, out, **given) and len(calls) == 1
    bench.main(folder, out, **(given | {"seed": 1, "tasks": ["sr4"], "limit": 1}))
    assert len(calls) == 3  # another seed: nothing is taken over


def test_images_benchmark_refuses_unknown_tasks(folder, prior):
    with pytest.raises(ValueError, match="unknown task"):
        images().main(folder, tasks=["nonsense"], prior=prior)


def test_nominal_coverage_is_what_so_few_samples_can_give(prior):
    setup = images().Setup
    assert setup(prior, 4).nominal == pytest.approx(0.6) and setup(prior, 19).nominal == pytest.approx(0.9)
