"""The table of photographs: both LPIPS, distances between sets, images that are kept, tasks beyond those of training, budgets."""

import json
import math
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from fewstep import metrics
from fewstep.bench import densities, images
from fewstep.bench import log as logs
from fewstep.bench.common import Variant, within
from fewstep.bench.log import Log
from fewstep.bench.priors import random_prior
from fewstep.bench.sets import ERROR, FRECHET, HALVES, MMD, SetDistances
from fewstep.bench.tasks import OTHERS, TASKS, RandomSensing, named_tasks
from fewstep.compat import prepare_torchvision
from fewstep.methods.ud2m import UD2M
from fewstep.priors.unet import UNetConfig

COLOURS = metrics.FeatureNet("mean colours", lambda x: x.mean((2, 3)))


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "photos"
    path.mkdir()
    rng = np.random.default_rng(0)
    for name in range(6):
        smooth = np.kron(rng.integers(40, 215, (9, 9, 3)), np.ones((8, 8, 1))).astype(np.uint8)
        Image.fromarray(smooth).save(path / f"{name}.png")
    return path


@pytest.fixture
def given(monkeypatch):
    monkeypatch.setattr(images, "mobilenet", lambda path: COLOURS)
    prior = random_prior(UNetConfig(widths=(8, 16), layers=1, groups=4))
    return {"methods": ["ddrm"], "tasks": ["sr2"], "crop": 64, "samples": 2, "steps": [1], "prior": prior}


def patches_of(images, seed, shift=0.0, spread=0.2, per=4):
    """Return groups of `per` rows that share most of what they are."""
    g = torch.Generator().manual_seed(seed)
    shared = torch.randn(images, 1, 3, generator=g, dtype=torch.float64)
    return (shared + spread * torch.randn(images, per, 3, generator=g, dtype=torch.float64) + shift).flatten(0, 1)


def test_mmd_of_copies_is_that_of_the_originals():
    a, b = (patches_of(40, seed, spread=0.0, per=1) for seed in (0, 1))
    single, copied = metrics.mmd(a, b, bandwidth=1.5), [x.repeat_interleave(4, 0) for x in (a, b)]
    assert metrics.mmd(*copied, bandwidth=1.5, group=4) == pytest.approx(single, rel=1e-9)
    wrong = metrics.mmd(*copied, bandwidth=1.5)
    assert wrong[1] < 0.7 * single[1]


def test_mmd_of_groups_has_their_standard_error_and_no_bias():
    runs = [(patches_of(30, 2 * i), patches_of(30, 2 * i + 1, shift=0.6)) for i in range(300)]
    values, errors = torch.tensor([metrics.mmd(a, b, bandwidth=2.0, group=4) for a, b in runs]).T
    assert float(errors.square().mean().sqrt() / values.std()) == pytest.approx(1, abs=0.15)
    plain = torch.tensor([metrics.mmd(a, b, bandwidth=2.0)[1] for a, b in runs])
    assert float(plain.square().mean().sqrt() / values.std()) < 0.7
    equal = torch.tensor([metrics.mmd(patches_of(30, i), patches_of(30, 9000 + i), group=4) for i in range(300)])[:, 0]
    assert abs(float(equal.mean())) < 4 * float(equal.std()) / 300**0.5


@pytest.mark.parametrize("group", [3, 10])
def test_groups_must_be_filled_and_five(group):
    with pytest.raises(ValueError, match="five groups"):
        metrics.mmd(patches_of(10, 0), patches_of(10, 1), group=group)


def test_sets_of_images():
    sets, g = SetDistances(COLOURS), torch.Generator().manual_seed(0)
    truths = sets.features(
        [0.3 + 0.2 * torch.rand(1, 3, 128, 128, generator=g) * torch.rand(1, generator=g) for _ in range(8)]
    )
    assert all(part.shape == (4, 3) for part in truths)
    same, moved = sets.between(truths, truths), sets.between([t + 0.1 for t in truths], truths)
    assert same[FRECHET] == pytest.approx(0, abs=1e-9) and moved[FRECHET] == pytest.approx(0.03, rel=1e-6)
    assert moved[MMD] > 3 * moved[ERROR] > 0 and same[MMD] < moved[MMD]
    assert set(sets.halves(truths)) == {FRECHET} and sets.halves(truths[:1]) == {}
    assert set(sets.between(truths[:4], truths[:4])) == {FRECHET}
    single = [part[:1] for part in truths[:3]]
    assert sets.between(single[:1], single[:1]) == {} == sets.halves(single), "one row has no covariance"
    assert set(sets.between(single[:2], single[:2])) == {FRECHET}


def test_distances_are_columns_and_are_resumed_from_kept_images(folder, given, tmp_path, monkeypatch):
    out = tmp_path / "i.json"
    first = images.main(folder, out, features="any", **given)
    table = next(iter(first.tables.values()))
    rows = {row["method"]: row for row in table}
    assert list(rows) == ["measurement", "ddrm", HALVES] and len({tuple(row) for row in table}) == 1
    assert all(rows[m][c] is not None for m in ("measurement", "ddrm") for c in (FRECHET, MMD, ERROR))
    assert rows[HALVES][FRECHET] > 0 and any("mean colours" in note for note in first.notes)
    kept = sorted(out.with_suffix(".images").iterdir())
    assert len(kept) == 2 * 6
    monkeypatch.setattr(images, "method_row", lambda *a: pytest.fail("a row was drawn again"))
    again = images.main(folder, out, features="any", **given)
    assert again.tables == first.tables
    kept[0].unlink()  # as of a row that an earlier version wrote
    poorer = {
        row["method"]: row for row in next(iter(images.main(folder, out, features="any", **given).tables.values()))
    }
    missing = [m for m in ("measurement", "ddrm") if poorer[m][FRECHET] is None]
    assert len(missing) == 1 and poorer[missing[0]]["PSNR mean"] == rows[missing[0]]["PSNR mean"]
    plain = next(iter(images.main(folder, out, **given).tables.values()))
    assert FRECHET not in plain[0] and len(plain) == 2
    with pytest.raises(ValueError, match="do not fit the crops of sr2"):
        images.main(folder, features="any", **(given | {"crop": 62}))


@pytest.mark.parametrize("limit", [1, 3])
def test_sets_that_are_too_small_for_a_distance_leave_the_table(folder, given, limit):
    ((*rows,),) = images.main(folder, features="any", limit=limit, **given).tables.values()
    assert [row["method"] for row in rows] == ["measurement", "ddrm"]
    assert all(row["PSNR mean"] > 5 and (FRECHET in row) == (limit > 1) for row in rows)


def test_a_log_keeps_images_in_eight_bits(tmp_path):
    image = torch.rand(1, 3, 5, 7, generator=torch.Generator().manual_seed(0))
    for log in (Log(None, "m"), Log(tmp_path / "l.jsonl", "m")):
        log.add("a", {}, image)
        log.add("b", {})
        torch.testing.assert_close(log.image("a"), (255 * image).round() / 255)
        assert log.image("b") is None and log.has("b")
    assert Log(tmp_path / "l.jsonl", "other").image("a") is None


def test_rows_without_a_measure_leave_its_column_empty():
    rows = [{"PSNR mean": 30.0, "VGG mean": 0.2}, {"PSNR mean": 32.0}, {"remark": "failed"}]
    found = images._average(rows)
    assert found["images"] == 2 and found["PSNR mean"] == 31.0 and found["VGG mean"] is None
    assert "VGG mean is known for 1 of 2 images only" in found["remark"] and "failed" in found["remark"]


def lpips_weights(path, net):
    """Write weights of LPIPS drawn at random."""
    from lpips import LPIPS

    from fewstep.metrics.quality import _foreign

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        state = LPIPS(net=net, pretrained=False, pnet_rand=True, verbose=False).state_dict()
    save_file({_foreign(k): v.abs().contiguous() for k, v in state.items() if _foreign(k)}, path)


@pytest.mark.parametrize("nets", [("alex", "vgg"), ("alex",)])
def test_both_lpips_where_both_have_weights(tmp_path, nets):
    prepare_torchvision()  # which lpips imports
    pytest.importorskip("lpips")
    names = {"alex": "alexnet.safetensors", "vgg": "vgg16.safetensors"}
    for net in nets:
        lpips_weights(tmp_path / names[net], net)
    truth = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    setup = images.Setup(None, lpips_weights=tmp_path, crop=64)
    row = images._perceptual(truth.flip(3), truth, "mean", setup)
    assert row["LPIPS mean"] == metrics.lpips(truth.flip(3), truth, weights=tmp_path)[0]
    if "vgg" in nets:
        assert row["VGG mean"] == metrics.lpips(truth.flip(3), truth, net="vgg", weights=tmp_path)[0]
        assert row["VGG mean"] != row["LPIPS mean"] and "missing" not in row
    else:
        assert row["VGG mean"] is None and "vgg16.safetensors do not exist" in row["missing"]


def test_tasks_beyond_training(tmp_path, given, folder):
    np.save(tmp_path / "kernels.npy", np.ones((8, 3, 3)))
    assert list(named_tasks(None)) == list(TASKS) and not set(OTHERS) & set(TASKS)
    with pytest.raises(ValueError, match="--kernels FILE"):
        named_tasks(["deblur-levin1"])
    with pytest.raises(ValueError, match="unknown task"):
        named_tasks(["deblur-levin9"], "k.npy")
    names = [*OTHERS, "deblur-levin8"]
    report = images.main(
        folder, **(given | {"tasks": names, "methods": ["dps"], "limit": 1}), kernels=tmp_path / "kernels.npy"
    )
    assert [title.partition(":")[0] for title in report.tables] == names
    for rows in report.tables.values():
        assert rows[1]["nfe"] == 1 and rows[1]["images"] == 1 and "failed" not in (rows[1]["remark"] or "")


def test_random_sensing_has_orthonormal_rows():
    operator = RandomSensing(factor=2)
    physics = operator.build((3, 8, 6), torch.float32)
    g = torch.Generator().manual_seed(0)
    x, y = torch.rand(2, 3, 8, 6, generator=g), torch.randn(2, 3, 4, 3, generator=g)
    torch.testing.assert_close(physics.A(physics.A_adjoint(y)), y)
    assert float((physics.A(x) * y).sum()) == pytest.approx(float((x * physics.A_adjoint(y)).sum()), rel=1e-4)
    rows = physics.A_adjoint(torch.eye(12).reshape(12, 1, 4, 3).expand(-1, 3, -1, -1)).abs()
    assert float(rows.amax((2, 3)).max()) < 0.7  # every coefficient sees many pixels
    assert float((rows > 1e-3).float().mean()) > 0.8
    assert operator.image_shape(y) == (3, 8, 6) and operator.fit((3, 9, 7)) == (3, 8, 6)
    likelihood = operator.likelihood(operator.simulate(x[:1], 0.01), sigma=0.01)
    close = likelihood.prox(torch.zeros(1, 3, 8, 6), 100.0)
    assert float(likelihood.log_prob(close)) > float(likelihood.log_prob(torch.zeros_like(close)))


@pytest.mark.parametrize(("budget", "steps"), [(1, None), (2, None), (3, 1), (4, 1), (9, 3), (16, 5)])
def test_budgets_of_an_unfolded_network_are_multiples_of_its_iterations(budget, steps):
    found = within(partial(UD2M.preset, "consistent"), budget)
    assert (found and found.steps) == steps and (found is None or found.nfe == 3 * steps)


def test_rows_belong_to_the_photograph_and_its_number(folder, given, tmp_path):
    """Another file of the same name, or one that comes before it, makes another measurement."""
    first, second = images.Photo.all(sorted(folder.iterdir()))[:2]
    setup, entry = images.Setup(None), Variant("ud2m", "", UD2M())
    key = images.row_key(first, TASKS["sr4"], entry, setup)
    assert key == f"0.png|0|{first.digest}|{TASKS['sr4']}|{UD2M()!r}" and json.dumps(key)
    assert images.row_key(first, TASKS["sr4"], None, setup) == f"0.png|0|{first.digest}|{TASKS['sr4']}|measurement"
    assert first.digest != second.digest and math.isclose(setup.nominal, 0.6)
    before = images.main(folder, tmp_path / "t.json", limit=1, **given).tables
    first.path.write_bytes(second.path.read_bytes())
    after = images.main(folder, tmp_path / "t.json", limit=1, **given).tables
    rows = [next(iter(tables.values())) for tables in (before, after, images.main(folder, limit=1, **given).tables)]
    quality = [[row["PSNR mean"] for row in table] for table in rows]
    assert quality[1] == quality[2] != quality[0]


def test_what_failed_or_had_no_lpips_is_run_again(folder, given, tmp_path, monkeypatch):
    whole = images.Posterior

    def short_of_memory(prior, likelihood):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(images, "Posterior", short_of_memory)
    run = partial(images.main, folder, tmp_path / "t.json", limit=1, **given)
    ((_, lost),) = run().tables.values()
    monkeypatch.setattr(images, "Posterior", whole)
    ((_, done),) = run().tables.values()
    assert lost["remark"].startswith("failed: RuntimeError: out of memory") and done["PSNR mean"] > 5
    calls = []
    monkeypatch.setattr(images, "method_row", lambda *a, f=images.method_row: calls.append(1) or f(*a))
    assert run() and not calls
    monkeypatch.setattr(images, "_lpips_sources", lambda setup: ["elsewhere", "none"])
    assert run() and len(calls) == 1


def test_rows_of_another_version_are_not_taken_over(folder, given, tmp_path, monkeypatch):
    run, calls = partial(images.main, folder, tmp_path / "t.json", limit=1, **given), []
    run()
    monkeypatch.setattr(images, "method_row", lambda *a, f=images.method_row: calls.append(1) or f(*a))
    assert run() and not calls
    marks = [(logs.fingerprint(given["prior"], 1), densities.mark("rings", 1))]
    for module in (logs, densities):
        monkeypatch.setattr(module, "__version__", "99.0")
    marks.append((logs.fingerprint(given["prior"], 1), densities.mark("rings", 1)))
    assert run() and len(calls) == 1 and not set(marks[0]) & set(marks[1])


def test_antithetic_samples_have_rows_of_their_own(folder, given, tmp_path):
    given, out = {**given, "limit": 2, "out": tmp_path / "out.json"}, tmp_path / "out.json"
    (alone,), (pairs,) = (
        [t[1] for t in images.main(folder, **given, antithetic=antithetic).tables.values()]
        for antithetic in (False, True)
    )
    assert pairs["PSNR sample"] == alone["PSNR sample"] and pairs["PSNR mean"] != alone["PSNR mean"]
    found = json.loads(out.read_text())
    assert found["settings"]["antithetic"] and "0.33, antithetic ones up to 0.50." in " ".join(found["notes"])
    with pytest.raises(ValueError, match="their number must be even, got 3"):
        images.main(folder, **{**given, "samples": 3}, antithetic=True)
