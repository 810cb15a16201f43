"""The training of a sampler from its recipe: end to end, resumed, on two processes, its memory, its data and its gradients."""

import json
import os
import subprocess
import sys
import textwrap
import weakref
from dataclasses import replace
from functools import lru_cache

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import fewstep
from fewstep import recipes
from fewstep.compat import prepare_torchvision
from fewstep.core.likelihood import JointLikelihood
from fewstep.core.noise import Noise
from fewstep.core.problem import Posterior
from fewstep.data import CropShape, RandomCrops
from fewstep.measurements import Family, SimulatedMeasurements, pick
from fewstep.objectives.embeddings import MeasuredPatches, Patches
from fewstep.objectives.ud2m import UD2M, Turn, Weights
from fewstep.operators.jpeg import JpegLikelihood, project
from fewstep.operators.words import get_operator
from fewstep.priors.loaders import load_prior
from fewstep.priors.unet import UNetConfig, UNetDenoiser
from fewstep.recipes import ud2m
from fewstep.unfolded.decoders import AdaptedDecoder, ContextDecoder
from fewstep.unfolded.levels import LevelConfig
from fewstep.unfolded.network import UnfoldedConfig, UnfoldedNetwork
from fewstep.unfolded.store import open_network, save_network
from pictures import PixelPrior

prepare_torchvision()
pytest.importorskip("accelerate")
TINY = UNetConfig(widths=(8, 8), layers=1, groups=4)

RECIPE = """
kind: ud2m
prior: {prior}
holdout: 1
decoder: {decoder}
network: {{start: gaussian, end: 1.0, levels: {{iterations: 2}}}}
weights: {{energy: 1.0, perceptual: 0.5, noise: 0.1, adversarial: 0.1}}
objective: {{draws: 2}}
patches: {{size: 8, stride: 8, scales: [1, 2]}}
critic: {{width: 4, stages: 2}}
lpips: squeeze
crops: [[2, 32]]
families:
  - {{word: deblur-gaussian, fields: {{width: {{low: 0.5, high: 1.5}}}}}}
  - {{word: sr, fields: {{factor: [2]}}}}
  - {{word: inpaint-random, fields: {{mask_seed: {{low: 0, high: 1000}}}}}}
training: {{steps: 2, warmup: 1, lr: 1.0e-3, precision: "no", checkpoint_every: 1, validate_every: 2, log_every: 1}}
validation: {{images: 1, size: 32, steps: 1, samples: 2}}
"""


@lru_cache
def squeeze(*_):
    """LPIPS with random weights, which need no file."""
    prepare_torchvision()
    from lpips import LPIPS

    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LPIPS(net="squeeze", pretrained=False, pnet_rand=True, verbose=False).requires_grad_(False)


def prepare(folder, decoder="full", **changes):
    """Write photographs, a prior and a recipe; return what `recipes.train` takes."""
    if not (folder / "photos").is_dir():
        (folder / "photos").mkdir()
        for k in range(3):
            pixels = np.random.default_rng(k).integers(0, 256, (40, 48, 3), np.uint8)
            Image.fromarray(pixels).save(folder / "photos" / f"{k}.png")
        with torch.random.fork_rng():
            torch.manual_seed(0)
            prior = UNetDenoiser(TINY)
        nn.init.normal_(prior.net.conv_out.weight, std=0.05, generator=torch.Generator().manual_seed(0))
        prior.save(folder / "prior")
    recipe = folder / "recipe.yaml"
    text = yaml.safe_load(RECIPE.format(prior=folder / "prior", decoder=decoder))
    recipe.write_text(yaml.safe_dump({**text, **changes}))
    return recipe, folder / "photos"


def log(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def losses(out):
    return [(e["step"], e["model/loss"], e["critic/loss"]) for e in log(out) if "model/loss" in e]


@pytest.fixture
def no_files(monkeypatch):
    pytest.importorskip("lpips")
    monkeypatch.delenv("FEWSTEP_LPIPS", raising=False)
    monkeypatch.setattr(ud2m, "lpips_net", squeeze)


# ---- from a recipe to a sampler ---------------------------------------------------------------------------------------


EVERYTHING = {
    "lora": {"rank": 4},
    "weights": {"energy": 1.0, "perceptual": 0.5, "noise": 0.1, "adversarial": 0.1, "matching": 0.1},
    "objective": {"draws": 2, "fake_turns": 2},
    "features": "squeeze",
    "measured": {"patches": {"scales": [1, 2]}, "limit": 5.0},
    "matching": {"median": 0.5},
    "fake": {"rank": 2},
}


@pytest.mark.parametrize("decoder", ["lora-context", "full"])
def test_two_steps_with_every_term_and_what_they_leave(tmp_path, no_files, decoder):
    if "lora" in decoder:
        pytest.importorskip("peft")
    recipe, data = prepare(tmp_path, decoder, **(EVERYTHING if "lora" in decoder else {}))
    start = recipes.read_recipe(recipe).trainer(data, tmp_path / "unused").model
    contest = recipes.train(recipe, data, tmp_path / "out")
    first, last = (entry for entry in log(tmp_path / "out") if "model/loss" in entry)
    terms = ("energy", "perceptual", "noise", "adversarial", *(("matching",) if "lora" in decoder else ()))
    assert all(np.isfinite(last[f"model/{name}"]) for name in terms)
    assert ("fake/grad_norm" in last) == ("fake1/grad_norm" in last) == ("lora" in decoder)
    assert last["critic/grad_norm"] > 0 and first["model/loss"] != last["model/loss"]
    assert {"validation/psnr", "validation/std"} <= set(log(tmp_path / "out")[-1])
    trainable = {name for name, p in start.named_parameters() if p.requires_grad}
    before = dict(start.named_parameters())
    changed = {name for name, p in contest.named_parameters() if not torch.equal(p, before[name])}
    assert changed == trainable
    sampler = fewstep.load_sampler(tmp_path / "out/sampler", steps=2)
    operator = get_operator("denoise")()
    x = torch.rand(1, 3, 24, 24, generator=torch.Generator().manual_seed(0))
    prior, y = fewstep.load_prior(tmp_path / "prior"), operator.simulate(x, 0.1)
    problem = Posterior(prior, operator.likelihood(y, 0.1))
    found = sampler(problem, 2).x
    card = (tmp_path / "out/sampler/README.md").read_text()
    assert "inpaint-random" in card and "of which the last 1 in sorted order" in card
    assert yaml.safe_load(card.split("```yaml")[1].split("```")[0])["decoder"] == decoder
    assert (tmp_path / "out/adapter").is_dir() == ("lora" in decoder)
    if "lora" in decoder:
        adapter = fewstep.load_sampler(tmp_path / "out/adapter", steps=2)
        torch.testing.assert_close(adapter(problem, 2).x, found, rtol=0, atol=0.02)


def test_a_resumed_run_gives_the_same_losses(tmp_path, no_files):
    recipe, data = prepare(tmp_path, "context")
    whole = recipes.train(recipe, data, tmp_path / "whole", steps=3)
    part = recipes.read_recipe(recipe).trainer(data, tmp_path / "part", 3)
    part._log(part._train_step())  # the loop of `run`, which dies after two steps, one after its last checkpoint
    part.save()
    part._log(part._train_step())
    again = recipes.train(recipe, data, tmp_path / "part", steps=3)
    assert losses(tmp_path / "part") == losses(tmp_path / "whole") and len(losses(tmp_path / "whole")) == 3
    for a, b in zip(again.parameters(), whole.parameters(), strict=True):
        assert torch.equal(a, b)
    prepare(tmp_path, "context", holdout=2)
    with pytest.raises(ValueError, match="another holdout"):
        recipes.train(recipe, data, tmp_path / "part", steps=3)


def test_a_run_is_resumed_with_its_prior_and_its_photographs(tmp_path, no_files):
    recipe, data = prepare(tmp_path)
    recipes.train(recipe, data, tmp_path / "out", steps=1)
    prior = UNetDenoiser.load(tmp_path / "prior")
    with torch.no_grad():
        prior.net.conv_out.bias.add_(1.0)
    (tmp_path / "prior").rename(tmp_path / "before")
    prior.save(tmp_path / "prior")
    with pytest.raises(ValueError, match="another prior_sha256"):
        recipes.train(recipe, data, tmp_path / "out", steps=2)
    (data / "0.png").write_bytes((data / "1.png").read_bytes())
    with pytest.raises(ValueError, match="another data, prior_sha256"):
        recipes.train(recipe, data, tmp_path / "out", steps=2)


def test_the_header_says_how_many_steps_were_done(tmp_path, no_files):
    recipe, data = prepare(tmp_path)
    run = recipes.read_recipe(recipe).trainer(data, tmp_path / "out", 50)
    run._start(resume=True)
    run._train_step()
    run.save()
    header = json.loads((tmp_path / "out/sampler/config.json").read_text())
    assert header["steps"] == 1 and header["command"].endswith("--steps 50")
    assert "* **Steps**: 1 were done" in (tmp_path / "out/sampler/README.md").read_text()


def test_corners_hold_every_choice_and_both_ends():
    family = Family("inpaint-box", fields={"size": [3, 4, 5]}, sigma={"low": 0.1, "high": 0.2})
    assert [(op.size, sigma) for op, sigma in family.corners()] == [(3, 0.1), (4, 0.2), (5, 0.1)]


def test_checkpointing_changes_no_number(tmp_path, no_files):
    runs = []
    for on in (False, True):
        recipe, data = prepare(tmp_path, "context", checkpointing=on)
        run = recipes.read_recipe(recipe).trainer(data, tmp_path / str(on))
        assert run.model.network.checkpointing is on
        runs.append([run._train_step() for _ in range(2)])
    for one, two in zip(*runs, strict=True):
        assert one == pytest.approx(two, rel=1e-4)


def test_a_turn_leaves_no_gradient_in_the_other_player(tmp_path, no_files):
    recipe, data = prepare(tmp_path, "context")
    run = recipes.read_recipe(recipe).trainer(data, tmp_path / "out")
    players = {"model": run.model.network, "critic": run.model.critic}
    from fewstep.training import _held

    for turn, name in enumerate(players):
        run.model.zero_grad(set_to_none=True)
        with _held(run._others[name]):
            run._gradients(name, turn)
        for other, module in players.items():
            assert any(p.grad is not None for p in module.parameters()) == (other == name)


WORKER = """
    import sys; from pathlib import Path; import torch
    from fewstep.processes import until_the_end
    torch.set_num_threads(1)
    sys.path.insert(0, {tests!r})
    import test_ud2m_training as t
    t.ud2m.lpips_net = t.squeeze
    run = t.recipes.read_recipe({recipe!r}).trainer({data!r}, {out!r}, 3)
    assert run.accelerator.num_processes == {count}
    with until_the_end():
        run.run()
    assert not torch.distributed.is_initialized()
"""


@pytest.mark.slow
def test_two_processes_reproduce_one(tmp_path):
    pytest.importorskip("lpips")
    recipe, data = prepare(tmp_path, "context")
    for count in (1, 2):
        script, out = tmp_path / f"worker{count}.py", tmp_path / str(count)
        given = {"tests": os.path.dirname(__file__), "recipe": str(recipe), "data": str(data), "out": str(out)}
        script.write_text(textwrap.dedent(WORKER.format(**given, count=count)))
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(count)]
        command += ["--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0", str(script)]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
        assert done.returncode == 0, done.stderr[-2000:]
    one, two = (losses(tmp_path / str(count)) for count in (1, 2))
    assert len(one) == 3
    for a, b in zip(one, two, strict=True):
        assert a == pytest.approx(b, rel=1e-4)


# ---- memory -----------------------------------------------------------------------------------------------------------


class Peak(TorchDispatchMode):
    """Counts the bytes of all tensors that operations make while they live: what a device would need, without noise."""

    def __init__(self):
        super().__init__()
        self.now, self.most, self.known = 0, 0, set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for value in torch.utils._pytree.tree_leaves(out):
            if isinstance(value, torch.Tensor):
                self.see(value.untyped_storage())
        return out

    def see(self, storage):
        key = storage._cdata
        if key in self.known:
            return
        size = storage.nbytes()
        self.known.add(key)
        self.now += size
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self.forget, key, size)

    def forget(self, key, size):
        self.known.discard(key)
        self.now -= size


def peak(iterations, checkpointing):
    """Return the most bytes that one forward and backward pass of K iterations makes, gradients of the weights included."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        prior = UNetDenoiser(UNetConfig(widths=(32, 32), layers=1, groups=8))
        decoder = ContextDecoder(prior.with_context(3))
    network = UnfoldedNetwork(UnfoldedConfig(LevelConfig(iterations)), decoder)
    network.checkpointing = checkpointing
    operator = get_operator("inpaint-random")()
    x = torch.rand(2, 3, 48, 48, generator=torch.Generator().manual_seed(0))
    problem = Posterior(prior, operator.likelihood(operator.simulate(x, 0.1), 0.1)).expand(1)
    with Peak() as memory:
        network(problem, x, torch.tensor(0.5), Noise(range(2))).square().mean().backward()
    return memory.most


def test_memory_does_not_grow_with_the_iterations():
    """An iteration holds two images, where it began and its noise; from the second on gradients live beside activations."""
    one = peak(1, True)
    assert one < peak(8, True) < 1.25 * one
    assert peak(8, False) > 3 * one  # what it would be


# ---- the data ---------------------------------------------------------------------------------------------------------


def families():
    return (
        Family("deblur-gaussian", fields={"width": {"low": 0.5, "high": 3.0}}),
        Family("inpaint-random", 2.0, {"mask_seed": {"low": 0, "high": 10**6}}),
        Family("jpeg", fields={"quality": {"low": 5, "high": 60}, "step_std": 0.0}, sigma=0),
    )


def simulated(seed=0):
    images = [torch.randint(0, 256, (3, 40, 40), generator=torch.Generator().manual_seed(k)).byte() for k in range(2)]
    return SimulatedMeasurements(RandomCrops(images, (CropShape(6, 32),), seed), families())


def same(a, b):
    if type(a) is not type(b):
        return False
    if isinstance(a, JpegLikelihood):
        return torch.equal(a.y.indices, b.y.indices) and a.y.tables == b.y.tables
    return a.y.shape == b.y.shape and torch.equal(a.y, b.y) and torch.equal(a.sigma, b.sigma)


def test_operators_depend_on_seed_step_and_item_alone():
    data = simulated()
    whole, part = data.batch(3, range(6)), simulated().batch(3, [4, 1])
    assert torch.equal(part["x0"], whole["x0"][[4, 1]])
    parts = whole["likelihood"].parts
    assert all(same(a, parts[k]) for a, k in zip(part["likelihood"].parts, (4, 1), strict=True))
    for other in (data.batch(4, range(6)), simulated(1).batch(3, range(6))):
        assert not any(same(a, b) for a, b in zip(other["likelihood"].parts, parts, strict=True))
    assert len({type(p.physics).__name__ if hasattr(p, "physics") else "Jpeg" for p in parts}) > 1


def test_fields_and_noise_are_drawn_as_the_recipe_says():
    rng = np.random.default_rng(0)
    family = Family("sr", fields={"factor": [2, 4]}, sigma={"low": 0.005, "high": 0.1, "log": True})
    drawn = [family.draw(rng) for _ in range(2000)]
    counts = [sum(operator.factor == f for operator, _ in drawn) for f in (2, 4)]
    assert sum(counts) == 2000 and abs(counts[0] - 1000) < 4 * 500**0.5
    logs = np.log([sigma for _, sigma in drawn])
    low, high = np.log(0.005), np.log(0.1)
    error = (high - low) / 12**0.5 / 2000**0.5
    assert abs(logs.mean() - (low + high) / 2) < 4 * error and low < logs.min() and logs.max() < high


def test_whole_numbers_stay_whole_on_a_logarithmic_range():
    rng = np.random.default_rng(0)
    drawn = [pick({"low": 2, "high": 8, "log": True}, rng) for _ in range(4000)]
    assert set(drawn) == set(range(2, 9)) and all(isinstance(value, int) for value in drawn)
    shares = np.bincount(drawn)[2:] / 4000
    expected = np.diff(np.log(np.arange(2, 10))) / np.log(9 / 2)
    assert np.abs(shares - expected).max() < 4 * 0.5 / 4000**0.5


def test_families_of_weight_zero_can_be_asked_for_alone():
    images = [torch.zeros(3, 16, 16, dtype=torch.uint8)]
    data = SimulatedMeasurements(RandomCrops(images, (CropShape(1, 16),)), (Family("denoise", weight=0.0),))
    assert data.batch(0, [0])["likelihood"].batch == 1


@pytest.mark.parametrize(("word", "fields"), [("sr", {"factor": 4}), ("jpeg", {"quality": 10, "step_std": 0.0})])
def test_half_precision_of_a_training_stays_out_of_linear_solves(word, fields):
    x = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    operator, sigma = get_operator(word)(**fields), 0.0 if word == "jpeg" else 0.02
    likelihood = operator.likelihood(operator.simulate(x, sigma, 0), sigma or None)
    found = []
    for half in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            turn = Turn(None, likelihood, x, 2 * x - 1, torch.ones(1), Noise([0]))
            found.append([turn.condition(1)[0], *MeasuredPatches()(2 * x - 1, likelihood)])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("times", [(), (0.0,), (999.0, 444.0)])
def test_times_of_the_objective_are_times(times):
    with pytest.raises(ValueError, match="times must lie in"):
        UD2M(PixelPrior(), Weights(energy=1.0), (Patches(),), times=times)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"families": [{"word": "deblur-gausian"}]}, "did you mean deblur-gaussian"),
        ({"families": [{"word": "sr", "fields": {"factr": [2]}}]}, "did you mean factor"),
        ({"families": [{"word": "sr", "feilds": {}}]}, "did you mean fields"),
        ({"families": [{"word": "sr", "weight": -1}]}, "must not be negative"),
        ({"families": [{"word": "sr", "fields": {"factor": {"lo": 2, "high": 4}}}]}, "keys low, high"),
        ({"families": [{"word": "sr", "sigma": {"low": 0, "high": 0.1, "log": True}}]}, "must rise"),
        ({"families": [{"word": "sr", "fields": {"factor": []}}]}, "empty list"),
        ({"decodr": "full"}, "did you mean decoder"),
        ({"decoder": "lora_context"}, "decoder must be one of"),
        ({"decoder": "full", "lora": {"rank": 4}}, "takes no lora"),
        ({"lora": {"rnk": 4}}, "did you mean rank"),
        ({"weights": {"enrgy": 1}}, "did you mean energy"),
        ({"measured": {"limt": 1}}, "did you mean limit"),
        ({"lora": {}, "init": "x"}, "init starts from a whole network"),
        ({"matching": {"medan": 1}}, "did you mean median"),
        ({"weights": {"matching": 1}, "fake": {"rnk": 4}}, "did you mean rank"),
        ({"network": {"levels": {"iteration": 2}}}, "did you mean iterations"),
        ({"holdout": 3}, "there are 3 images"),
        ({"families": []}, "families must name an operator"),
        ({"families": [{"word": "sr", "fields": ["factor"]}]}, "fields of sr must be a mapping"),
        ({"families": [{"word": "sr", "fields": {"factor": {"low": "2", "high": 4}}}]}, "lies between numbers"),
        ({"families": [{"word": "sr", "fields": {"factor": "x"}}]}, "sr on crops of 32 pixels"),
        ({"families": [{"word": "denoise", "sigma": None}]}, "sigma of denoise must be finite"),
        (
            {"families": [{"word": "denoise"}, {"word": "sr", "fields": {"factor": [2, 5]}}]},
            "sr on crops of 32 pixels: sr by 5",
        ),
        ({"families": [{"word": "inpaint-box", "fields": {"size": {"low": 2, "high": 40}}}]}, "square of 40 pixels"),
        ({"validation": {"images": 0}}, "images must be a whole number"),
        ({"validation": {"steps": 0}}, "steps must be a whole number"),
        ({"validation": {"samples": "2"}}, "samples must be a whole number"),
        ({"patches": {"scales": []}}, "scales must be a list"),
        ({"patches": {"scales": 2}}, "scales must be a list"),
        ({"patches": {"scales": [1.5]}}, "a scale must be a whole number"),
        ({"patches": {"stride": 0}}, "stride must be a whole number"),
        ({"critic": {"stages": 6}}, "crops of 32 pixels cannot be halved 6 times"),
        ({"objective": {"fake_turns": 1.5}}, "fake_turns must be a whole number"),
        ({"network": {"levels": {"iterations": 1.5}}}, "iterations must be a whole number"),
        ({"decoder": "full", "init": 3}, "no trained sampler '3'"),
        ({"kind": "ud3m"}, "unknown kind"),
        ({"kind": [1]}, "unknown kind"),
    ],
)
def test_wrong_recipes_are_refused(tmp_path, no_files, change, match):
    recipe, data = prepare(tmp_path, **{"decoder": "lora", **change})
    with pytest.raises(ValueError, match=match):
        recipes.train(recipe, data, tmp_path / "out")


def test_a_recipe_that_is_no_text_is_named(tmp_path):
    (tmp_path / "r.yaml").write_bytes(b"kind: \xe9t\xe9")
    with pytest.raises(ValueError, match=r"r\.yaml cannot be read as a recipe"):
        recipes.read_recipe(tmp_path / "r.yaml")


@pytest.mark.parametrize(
    ("changes", "name"),
    [({"crops": [[2, 300]]}, "0"), ({"validation": {"images": 1, "size": 300, "steps": 1, "samples": 2}}, "2")],
)
def test_photographs_that_are_too_small_are_named(tmp_path, no_files, changes, name):
    recipe, data = prepare(tmp_path, "full", **changes)
    with pytest.raises(ValueError, match=rf"{name}\.png has \d+ x \d+ pixels: too small for crops of 300"):
        recipes.train(recipe, data, tmp_path / "out")


def test_missing_lpips_weights_are_named_on_the_command_line(tmp_path, monkeypatch, capsys):
    from fewstep import cli
    from fewstep.metrics import Missing

    def missing(net):
        raise Missing("no LPIPS weights")

    monkeypatch.setattr(ud2m, "lpips_net", missing)
    recipe, data = prepare(tmp_path, "full")
    words = ["fewstep", "train", str(recipe), str(data), "--out", str(tmp_path / "out"), "--steps", "1"]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit) as caught:
        cli.main()
    error = capsys.readouterr().err
    assert caught.value.code == 2 and error.count("\n") == 1 and "set FEWSTEP_LPIPS to" in error


def test_the_command_trains(tmp_path, no_files, monkeypatch):
    from fewstep import cli

    recipe, data = prepare(tmp_path, "full")
    words = ["fewstep", "train", str(recipe), str(data), "--out", str(tmp_path / "out"), "--steps", "1"]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert not caught.value.code and len(losses(tmp_path / "out")) == 1
    assert (tmp_path / "out/sampler/README.md").is_file()


# ---- gradients through every likelihood -------------------------------------------------------------------------------


def joint_prox(likelihood, x_t, z, rho):
    return JointLikelihood(likelihood, x_t, torch.tensor(0.9).double(), torch.tensor(0.4).double()).prox(z, rho)


def likelihood_of(word, fields, size=24):
    x = torch.rand(1, 3, size, size, generator=torch.Generator().manual_seed(0)).double()
    x = nn.functional.avg_pool2d(x, 5, 1, 2)
    operator = get_operator(word)(**fields)
    sigma = 0.0 if word == "jpeg" else 0.05
    options = {"dtype": torch.float64} if word == "jpeg" else {}
    if word == "jpeg" and not fields["step_std"]:
        options["tol"] = 1e-6  # of the projection
    return operator.likelihood(operator.simulate(x, sigma, seed=1), sigma or None, **options), 2 * x - 1


def slopes(likelihood, x):
    """Return the derivative of a random functional of the joint prox along random (z, log rho): autograd, differences."""
    noise = [torch.randn(x.shape, generator=torch.Generator().manual_seed(k)).double() for k in range(4)]
    z, rho = x + 0.05 * noise[0], torch.tensor([0.3]).double()
    x_t = 0.9 * x + 0.4 * noise[3]

    def value(step):
        return (noise[1] * joint_prox(likelihood, x_t, z + step * noise[2], rho * torch.as_tensor(step).exp())).sum()

    step = torch.zeros((), dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(value(step), step)
    e = 1e-5
    return float(slope), float((value(torch.tensor(e).double()) - value(torch.tensor(-e).double())) / (2 * e))


@pytest.mark.parametrize(
    ("word", "fields"),
    [
        ("deblur-gaussian", {"width": 1.0}),
        ("deblur-uniform", {"size": 3}),
        ("deblur-motion", {"size": 7}),
        ("sr", {"factor": 2}),
        ("inpaint-random", {}),
        ("inpaint-box", {"size": 8}),
        ("denoise", {}),
        ("jpeg", {"quality": 20, "step_std": 0.0}),
        ("jpeg", {"quality": 60, "step_std": 0.0}),
        ("jpeg", {"quality": 20, "step_std": 0.2}),
    ],
)
def test_gradients_pass_through_every_prox(word, fields):
    found, expected = slopes(*likelihood_of(word, fields))
    assert found == pytest.approx(expected, rel=2e-3) and abs(expected) > 0.1


def test_a_straight_gradient_through_jpeg_is_found():
    likelihood, x = likelihood_of("jpeg", {"quality": 20, "step_std": 0.0})

    class Straight(JpegLikelihood):
        def prox(self, z, rho=1.0):
            return z + (project(self.transform, z, (self.low, self.high), 1e-6).x - z).detach()

    found, expected = slopes(Straight(likelihood.y, dtype=torch.float64), x)
    assert found != pytest.approx(expected, rel=2e-2)


def test_training_goes_on_from_the_shipped_sampler_by_its_name():
    recipe = replace(recipes.read_recipe("natural-general"), init="natural-general")
    started, shipped = (
        recipe.unfolded(load_prior("natural"), 0).state_dict(),
        open_network("natural-general").state_dict(),
    )
    assert started.keys() == shipped.keys() and all(torch.equal(started[name], shipped[name]) for name in started)
    with pytest.raises(ValueError, match="no trained sampler 'runs/0/sampler'"):
        replace(recipe, init="runs/0/sampler").unfolded(load_prior("natural"), 0)


def test_levels_of_another_base_are_not_taken_over():
    recipe = replace(recipes.read_recipe("natural-general"), init="natural-general")
    levels = {**recipe.network["levels"], "tau_max": 0.5}
    with pytest.raises(ValueError, match="the trained sampler has the levels"):
        replace(recipe, network={**recipe.network, "levels": levels}).unfolded(load_prior("natural"), 0)


def test_a_network_that_was_trained_again_is_opened_again(tmp_path):
    prior = UNetDenoiser(TINY)
    for value in (1.0, 2.0):
        network = UnfoldedNetwork(UnfoldedConfig(LevelConfig(1)), AdaptedDecoder(prior))
        nn.init.constant_(next(network.decoder.parameters()), value)
        save_network(network, tmp_path / "own", {"prior": "natural"})
        opened = open_network(str(tmp_path / "own"))
        assert (
            bool((next(opened.decoder.parameters()) == value).all()) and open_network(str(tmp_path / "own")) is opened
        )


def test_training_of_another_number_of_iterations_goes_on_from_the_decoder():
    recipe, prior = replace(recipes.read_recipe("natural-general"), init="natural-general"), load_prior("natural")
    shipped, network = open_network("natural-general"), {**recipe.network, "levels": {"iterations": 1, "tau_max": 0.35}}
    single = replace(recipe, network=network).unfolded(prior, 0)
    found, expected = single.decoder.state_dict(), shipped.decoder.state_dict()
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)
    tau = single.levels(torch.tensor([2.0]), torch.tensor([0.05]))[0].tau.detach()
    assert single.calls == 1 and tau.item() == pytest.approx(0.35)
    with pytest.raises(ValueError, match="has another decoder"):
        replace(recipe, decoder="full").unfolded(prior, 0)
