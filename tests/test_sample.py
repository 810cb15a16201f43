"""`fewstep sample` and `fewstep tune`, the prior of digits and its classifier."""

import json
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from fewstep import cli, recipes
from fewstep.commands import sampling
from fewstep.commands.sampling import Drawing, Source, contact_sheet
from fewstep.core.samples import Samples
from fewstep.metrics.classes import Classifier, ClassifierConfig
from fewstep.priors.adm import AdmFlags, AdmUNet
from fewstep.priors.loaders import load_prior
from fewstep.priors.unet import UNetConfig, UNetDenoiser
from fewstep.recipes.labelled import Labelled, LabelledBatches

CLASSES = 3


@pytest.fixture(scope="module")
def prior(tmp_path_factory):
    """Return a folder with a small prior of three classes whose weights are noise."""
    folder = tmp_path_factory.mktemp("prior")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = UNetDenoiser(UNetConfig(channels=1, widths=(8, 8), layers=1, groups=4, classes=CLASSES, size=8))
        for p in model.parameters():
            p.data.add_(0.1 * torch.randn_like(p))
    model.save(folder)
    return folder


@pytest.fixture
def fewstep(monkeypatch, capsys):
    def run(*words):
        monkeypatch.setenv("COLUMNS", "250")
        monkeypatch.setattr(sys, "argv", ["fewstep", *map(str, words)])
        monkeypatch.setattr(cli.signal, "signal", lambda *_: None)
        with pytest.raises(SystemExit) as caught:
            cli.main()
        out, err = capsys.readouterr()
        return caught.value.code or 0, out, err

    return run


# --- a prior that knows classes ------------------------------------------------------------------------------------------------


def test_labels_are_seen_item_by_item(prior):
    model = load_prior(prior)
    x, t = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor(0.6)
    each = [model(x, t, label=label) for label in (-1, 0, 1, 2)]
    mixed = model(x, t, label=torch.tensor([2, 0, -1, 1]))
    torch.testing.assert_close(model(x, t), each[0])
    for item, label in enumerate((2, 0, -1, 1)):
        torch.testing.assert_close(mixed[item], each[label + 1][item], rtol=1e-4, atol=1e-5)
    assert min(float((a - b).abs().max()) for i, a in enumerate(each) for b in each[:i]) > 1e-3
    for wrong in (3, -2):
        with pytest.raises(ValueError, match="classes from 0 to 2"):
            model(x, t, label=wrong)


def test_headers_of_the_first_version_still_load(tmp_path):
    UNetDenoiser(UNetConfig(widths=(8,), layers=1, groups=4)).save(tmp_path)
    path = tmp_path / "config.json"
    header = json.loads(path.read_text())
    for name in ("classes", "size"):
        del header["fields"][name]
    path.write_text(json.dumps(header))
    assert UNetDenoiser.load(tmp_path).config == UNetConfig(widths=(8,), layers=1, groups=4)


def digits(path, count=40):
    """Write images whose brightness is their class, so that a classifier can learn them."""
    rng = np.random.default_rng(0)
    labels = rng.integers(CLASSES, size=count).astype(np.uint8)
    images = (80 * labels[:, None, None] + rng.integers(40, size=(count, 8, 8))).astype(np.uint8)
    np.savez(path, images=images, labels=labels)
    return path


def test_batches_depend_on_seed_step_and_item_and_hide_labels(tmp_path):
    data = Labelled.read(digits(tmp_path / "d.npz"))
    assert [len(part.labels) for part in data.split(10)] == [30, 10]
    batches = LabelledBatches(data, 400, 0.25, seed=1)
    whole = batches.batch(5, range(400))
    some = batches.batch(5, [7, 3])
    assert torch.equal(some["x0"], whole["x0"][[7, 3]])
    label = whole["cond"]["label"]
    assert abs(float((label < 0).float().mean()) - 0.25) < 4 * (0.25 * 0.75 / 400) ** 0.5
    told = label >= 0
    brightness = ((whole["x0"].mean((1, 2, 3)) + 1) * 127.5 // 80).long()
    assert torch.equal(brightness[told], label[told])
    with pytest.raises(ValueError, match="holdout"):
        data.split(40)


def test_files_that_are_none_are_refused(tmp_path):
    (tmp_path / "a.npz").write_bytes(b"no")
    np.savez(tmp_path / "b.npz", images=np.zeros((2, 4, 4), np.uint8))
    np.savez(tmp_path / "c.npz", images=np.zeros((2, 4, 4), np.float32), labels=np.zeros(2))
    whole = digits(tmp_path / "whole.npz").read_bytes()
    (tmp_path / "cut.npz").write_bytes(whole[: len(whole) // 2])
    middle = len(whole) // 3
    (tmp_path / "bit.npz").write_bytes(whole[:middle] + bytes([whole[middle] ^ 255]) + whole[middle + 1 :])
    none = ("a", "b", "d", "cut", "bit")
    for name, message in (("c", "uint8"), *((name, "is no .npz") for name in none)):
        with pytest.raises(ValueError, match=message):
            Labelled.read(tmp_path / f"{name}.npz")


TRAINING = "{steps: 2, warmup: 1, precision: 'no', checkpoint_every: 2, validate_every: 2, log_every: 1}"


def test_recipes_train_a_prior_and_a_classifier_that_load(tmp_path):
    data = digits(tmp_path / "d.npz")
    (tmp_path / "p.yaml").write_text(
        "kind: labelled\nholdout: 10\nbatch: 4\nhidden: 0.2\n"
        "network: {channels: 1, size: 8, classes: 3, widths: [8, 8], layers: 1, groups: 4}\n"
        f"objective: {{}}\ntraining: {TRAINING}\nvalidation: {{images: 2, size: 8, sigmas: [64]}}\n"
    )
    trained = recipes.train(tmp_path / "p.yaml", data, tmp_path / "p")
    assert load_prior(tmp_path / "p" / "prior").config == trained.config
    (tmp_path / "c.yaml").write_text(
        "kind: classifier\nholdout: 10\nbatch: 8\nnetwork: {classes: 3, size: 8, width: 4, features: 8}\n"
        f"objective: {{}}\ntraining: {TRAINING.replace('steps: 2', 'steps: 200').replace('}', ', lr: 0.01, ema: 0.9}')}\n"
    )
    recipes.train(tmp_path / "c.yaml", data, tmp_path / "c")
    classifier = Classifier.load(tmp_path / "c" / "classifier")
    held = Labelled.read(data).split(10)[1]
    share = classifier.histogram(held.images.float() / 127.5 - 1)
    torch.testing.assert_close(share, torch.bincount(held.labels, minlength=3) / 10)
    with pytest.raises(ValueError, match="expected images"):
        classifier(torch.zeros(1, 1, 12, 12))
    with pytest.raises(ValueError, match="multiple of 4"):
        ClassifierConfig(size=30)


def test_shipped_recipes_describe_what_is_shipped():
    recipe = recipes.read_recipe("digits-classifier")
    assert Classifier.load().config == recipes.build(ClassifierConfig, recipe.network, "network")
    recipe = recipes.read_recipe("digits")
    assert load_prior("digits").config == recipes.build(UNetConfig, recipe.network, "network")


def test_the_shipped_prior_obeys_its_classes():
    """Of ten samples of each of three classes at eight calls, the classifier puts more than nine in ten where they belong."""
    classifier = Classifier.load()
    for label in (0, 1, 7):
        drawn = Drawing(steps=8, num_samples=10).sampler()(Source("digits", label=label).problem(), 10)
        assert float(classifier.histogram(drawn.x[:, 0])[label]) >= 0.8


# --- the commands ------------------------------------------------------------------------------------------------------------------


def test_sample_writes_samples_and_a_picture(fewstep, prior, tmp_path):
    words = ("sample", prior, "--solver", "deis", "--steps", "4", "--samples", "5", "--cond", "1", "--chunk", "2")
    code, out, err = fewstep(*words, "--out", tmp_path / "o", "--grid-image", tmp_path / "g.png")
    assert (code, err) == (0, "") and "5 samples, 4 network calls each" in out
    drawn = Samples.load(tmp_path / "o")
    whole = Drawing("deis", 4, num_samples=5).sampler()(Source(str(prior), label=1).problem(), 5)
    torch.testing.assert_close(drawn.x, whole.x, rtol=1e-4, atol=1e-4)
    assert drawn.x.shape == (5, 1, 1, 8, 8)
    with Image.open(tmp_path / "g.png") as picture:
        assert picture.size == (32, 22)  # three columns and two rows of 8 pixels, 2 between
    record = json.loads((tmp_path / "o" / "sampling.json").read_text())
    assert record["label"] == 1 and record["nfe"] == 4
    other = Drawing("deis", 4, num_samples=5).sampler()(Source(str(prior), label=2).problem(), 5)
    assert float((other.x - whole.x).abs().max()) > 1e-3


def test_contact_sheet_keeps_the_pixels():
    x = torch.rand(5, 3, 4, 6)
    sheet = contact_sheet(x, gap=1)
    assert sheet.shape == (3, 11, 22)
    assert torch.equal(sheet[:, 1:5, 8:14], x[1]) and torch.equal(sheet[:, 6:10, 1:7], x[3])
    assert bool((sheet[:, 6:10, 15:] == 1).all() and (sheet[:, 0] == 1).all() and (sheet[:, 5] == 1).all())


@pytest.mark.parametrize("method", ["ays", "ggdm", "s3"])
def test_tune_then_sample(fewstep, prior, tmp_path, method):
    few = {"ays": "items=2 nodes=8", "ggdm": "items=2 rounds=2", "s3": "rounds=2 children=8 tried=4 parents=4"}[method]
    sets = [word for pair in (*few.split(), "bank=4", "fine=6") for word in ("--set", pair)]
    file = tmp_path / "s.json"
    code, out, err = fewstep("tune", prior, "--method", method, "--steps", "3", "--out", file, *sets)
    assert (code, err) == (0, "") and "3 steps of" in out
    code, out, err = fewstep("sample", prior, "--schedule", file, "--samples", "2", "--out", tmp_path / "o")
    assert (code, err) == (0, "") and "2 samples, 3 network calls each" in out
    code, out, err = fewstep("sample", prior, "--schedule", file, "--solver", "ddim", "--steps", "5", "--out", tmp_path)
    assert (code, err) == (0, "") and "5 network calls each" in out
    assert sorted(p.name for p in tmp_path.iterdir() if "partial" in p.name) == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--out", "o", "--size", "9"), "not of size 9"),
        (("--out", "o", "--cond", "7"), "classes from 0 to 2"),
        (("--out", "o", "--solver", "dimm"), "did you mean ddim"),
        (("--out", "o", "--set", "terms=7"), "terms must be one of"),
        (("--out", "o", "--set", "term=2"), "no option 'term'"),
        (("--out", "o", "--schedule", "none.json"), "cannot be read as a schedule"),
        ((), "nothing would be kept"),
    ],
    ids=str,
)
def test_errors_are_one_line(fewstep, prior, tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    code, _, err = fewstep("sample", prior, *words)
    assert code == 2 and message in err and err.count("\n") == 1


def test_unknown_tuners_are_refused(fewstep, prior, tmp_path):
    code, _, err = fewstep("tune", prior, "--method", "asy", "--out", tmp_path / "s.json")
    assert code == 2 and "did you mean ays" in err
    code, _, err = fewstep("tune", prior, "--solver", "foo", "--out", tmp_path / "s.json")
    assert code == 2 and "unknown solver 'foo'" in err
    code, _, err = fewstep("tune", prior, "--out", tmp_path)
    assert code == 2 and "is a folder" in err
    (tmp_path / "file").touch()
    code, _, err = fewstep("sample", prior, "--out", tmp_path / "file")
    assert code == 2 and "is a file" in err


def test_the_classes_of_other_libraries_are_sampled(tmp_path):
    flags = AdmFlags(channels=32, blocks=1, multipliers=(2,), attention=(), classes=2)
    torch.save(AdmUNet(flags).state_dict(), tmp_path / "w.pt")
    x = torch.zeros(1, 3, 8, 8)
    problem = Source(str(tmp_path / "w.pt"), size=8, label=1, device="cpu").problem()
    assert problem.denoise(x, torch.ones(())).shape == x.shape
    for label, message in ((None, "needs a label"), (2, "classes from 0 to 1")):
        with pytest.raises(ValueError, match=message):
            Source(str(tmp_path / "w.pt"), size=8, label=label).problem()


def test_a_prior_without_classes_says_so(tmp_path):
    UNetDenoiser(UNetConfig(widths=(8,), layers=1, groups=4)).save(tmp_path)
    with pytest.raises(ValueError, match="takes no condition"):
        Source(str(tmp_path), label=1).problem()
    assert Source(str(tmp_path), size=12).problem().likelihood.event_shape == (3, 12, 12)
    assert Source(str(tmp_path)).problem().likelihood.event_shape == (3, sampling.SIZE, sampling.SIZE)


def test_the_seed_changes_the_draws_of_the_command(fewstep, prior, tmp_path):
    for seed in (0, 1):
        code, *said = fewstep(
            "sample", prior, "--samples", 2, "--steps", 2, "--seed", seed, "--out", tmp_path / str(seed)
        )
        assert not code, said
    assert not torch.equal(*(Samples.load(tmp_path / str(seed)).x for seed in (0, 1)))
