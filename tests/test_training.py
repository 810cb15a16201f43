import json
import math
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from fewstep import recipes
from fewstep.checkpoints import last_checkpoint, read_checkpoint
from fewstep.core.batch import like
from fewstep.core.denoiser import Denoiser
from fewstep.core.noise import Noise
from fewstep.core.objective import Objective
from fewstep.core.schedule import VarianceExploding, VariancePreserving
from fewstep.data import CropShape, RandomCrops, centre_batch, list_images, load_pixels
from fewstep.densities.batches import Unlimited, in_blocks
from fewstep.objectives.denoising import DenoisingScoreMatching
from fewstep.recipes.validation import DenoisingPSNR, denoising_psnr
from fewstep.training import Trainer, TrainingOptions

pytest.importorskip("accelerate")


# ---- the loss -------------------------------------------------------------------------------------------------------


class Gaussian(Denoiser):
    """The exact denoiser of N(0, var I)."""

    def __init__(self, var, schedule):
        super().__init__()
        self.var, self.schedule, self.event_shape = var, schedule, (None,)

    def forward(self, x_t, t, **cond):
        alpha, sigma = (like(c, x_t) for c in self.schedule(t))
        return alpha * self.var / (alpha**2 * self.var + sigma**2) * x_t


@pytest.mark.parametrize("schedule", [VariancePreserving(), VarianceExploding()])
@pytest.mark.parametrize("ratio", [0.02, 0.3, 8.0])
def test_loss_of_the_exact_denoiser_is_its_closed_form(schedule, ratio):
    """With r fixed the loss is lambda(r) v r^2 / (v + r^2): the weighted posterior variance."""
    var, items, size = 0.4, 200, 500
    objective = DenoisingScoreMatching(median=ratio, spread=0.0, uniform=0.0, sigma_data=0.5)
    x = var**0.5 * torch.randn(items, size, generator=torch.Generator().manual_seed(0))
    loss, _ = objective.loss("model", Gaussian(var, schedule), x, Noise(range(items)))
    weight = (ratio**2 + 0.25) / (ratio * 0.5) ** 2
    expected = weight * var * ratio**2 / (var + ratio**2)
    assert float(loss) == pytest.approx(expected, abs=4 * expected * math.sqrt(2 / (items * size)))


def test_loss_of_the_exact_denoiser_is_one_at_every_level_when_sigma_data_is_right():
    objective = DenoisingScoreMatching(sigma_data=0.5)
    x = 0.5 * torch.randn(400, 500, generator=torch.Generator().manual_seed(1))
    loss, _ = objective.loss("model", Gaussian(0.25, VariancePreserving()), x, Noise(range(400)))
    assert float(loss) == pytest.approx(1, abs=4 * math.sqrt(2 / 200_000))


def test_ratios_follow_the_mixture():
    n, low, high = 4_000, math.log(0.005), math.log(160.0)
    logs = DenoisingScoreMatching(uniform=0.0).ratios(Noise(range(n))).log()
    assert float(logs.mean()) == pytest.approx(math.log(0.2), abs=5 * 1.1 / math.sqrt(n))
    assert float(logs.std()) == pytest.approx(1.1, abs=5 * 1.1 / math.sqrt(2 * n))
    flat = DenoisingScoreMatching(uniform=1.0).ratios(Noise(range(n))).log()
    assert float(flat.mean()) == pytest.approx((low + high) / 2, abs=5 * (high - low) / math.sqrt(12 * n))
    assert float(flat.min()) >= low - 1e-5
    assert float(flat.max()) <= high + 1e-5
    far = math.log(50.0)  # five standard deviations off: only the uniform part comes here
    share = float((DenoisingScoreMatching().ratios(Noise(range(n))).log() > far).float().mean())
    expected = 0.2 * (high - far) / (high - low)
    assert share == pytest.approx(expected, abs=5 * math.sqrt(expected / n))


def test_loss_refuses_what_it_cannot_train():
    with pytest.raises(TypeError, match="Denoiser"):
        DenoisingScoreMatching().loss("model", nn.Linear(2, 2), torch.zeros(1, 2), Noise([0]))
    with pytest.raises(ValueError, match="ratio_min"):
        DenoisingScoreMatching(ratio_min=2.0, ratio_max=1.0)
    with pytest.raises(ValueError, match="share"):
        DenoisingScoreMatching(uniform=1.5)


# ---- the data -------------------------------------------------------------------------------------------------------


def coded(height=20, width=30):
    """An image whose pixels say where they are."""
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack([rows, columns, torch.zeros_like(rows)]).to(torch.uint8)


def test_crops_depend_on_seed_step_and_item_only():
    crops = RandomCrops([coded(), coded() + 100], (CropShape(6, 8), CropShape(2, 16)), seed=3)
    assert [crops.count(k) for k in range(4)] == [6, 2, 6, 2]
    whole = crops.batch(4, range(6))
    assert whole.shape == (6, 3, 8, 8)
    assert crops.batch(5, range(2)).shape == (2, 3, 16, 16)
    assert torch.equal(crops.batch(4, [4, 1]), whole[[4, 1]])
    assert not torch.equal(crops.batch(6, range(6)), whole)
    assert not torch.equal(replace(crops, seed=4).batch(4, range(6)), whole)


def test_crops_come_in_all_places_and_orientations():
    crops = RandomCrops([coded()], (CropShape(400, 8),))
    pixels = ((crops.batch(0, range(400)) + 1) * 127.5).round()
    rows, columns = pixels[:, 0], pixels[:, 1]
    across, down = rows[:, 0, 1] - rows[:, 0, 0], rows[:, 1, 0] - rows[:, 0, 0]
    also = columns[:, 0, 1] - columns[:, 0, 0] + columns[:, 1, 0] - columns[:, 0, 0]
    seen = {tuple(v) for v in torch.stack([across, down, also], 1).tolist()}
    assert seen == {(1, 0, 1), (1, 0, -1), (-1, 0, 1), (-1, 0, -1), (0, 1, 1), (0, 1, -1), (0, -1, 1), (0, -1, -1)}
    assert {int(r.min()) for r in rows} == set(range(13))
    assert {int(c.min()) for c in columns} == set(range(23))


def test_units_and_center():
    image = torch.zeros(3, 6, 6, dtype=torch.uint8)
    image[:, 2:4, 2:4] = 255
    assert torch.equal(centre_batch([image], 2), torch.ones(1, 3, 2, 2))
    assert float(centre_batch([image], 6).min()) == -1


def test_bad_images_are_named(tmp_path):
    with pytest.raises(ValueError, match="no images"):
        list_images(tmp_path)
    with pytest.raises(ValueError, match="nowhere is not a folder"):
        list_images(tmp_path / "nowhere")
    (tmp_path / "b.png").write_bytes(b"no image")
    Image.fromarray(np.zeros((4, 5), np.uint8)).save(tmp_path / "a.jpg")
    (tmp_path / "._a.jpg").touch()
    assert [p.name for p in list_images(tmp_path)] == ["a.jpg", "b.png"]
    assert load_pixels(tmp_path / "a.jpg").shape == (3, 4, 5)
    Image.fromarray(np.full((4, 5), 40_000, np.uint16)).save(tmp_path / "deep.png")
    assert int(load_pixels(tmp_path / "deep.png").median()) == round(40_000 / 65_535 * 255)
    with pytest.raises(ValueError, match=r"b\.png is not an image that can be read"):
        load_pixels(tmp_path / "b.png")
    with pytest.raises(ValueError, match="too small"):
        RandomCrops([coded(4, 5)], (CropShape(1, 5),))
    assert load_pixels(tmp_path / "a.jpg", 4).shape == (3, 4, 5)
    with pytest.raises(ValueError, match=r"a\.jpg has 5 x 4 pixels: too small for crops of 5"):
        load_pixels(tmp_path / "a.jpg", 5)


# ---- the loop -------------------------------------------------------------------------------------------------------


class Small(Denoiser):
    """Two convolutions and a buffer."""

    def __init__(self):
        super().__init__()
        self.schedule, self.event_shape = VariancePreserving(), (3, None, None)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.SiLU(), nn.Conv2d(8, 3, 3, padding=1))
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x_t, t, **cond):
        if self.training:
            self.seen += 1
        return self.net(x_t)


@dataclass(frozen=True)
class Quits(Objective):
    """Sends the process a signal in the middle of one step."""

    at: int
    number: int = signal.SIGTERM
    inner: Objective = DenoisingScoreMatching()  # noqa: RUF009 - frozen

    def players(self, model):
        return self.inner.players(model)

    def loss(self, player, model, batch, noise):
        if int(model.seen) == self.at:
            os.kill(os.getpid(), self.number)
        return self.inner.loss(player, model, batch, noise)


def trainer(out, objective=None, validate=None, export=None, **options):
    images = [torch.randint(0, 256, (3, 24, 24), generator=torch.Generator().manual_seed(k)).byte() for k in range(3)]
    defaults = {"steps": 12, "warmup": 3, "log_every": 1, "checkpoint_every": 4, "validate_every": 6, "ema": 0.9}
    return Trainer(
        model=Small(),
        objective=objective or DenoisingScoreMatching(),
        data=RandomCrops(images, (CropShape(4, 8), CropShape(2, 16))),
        out=out,
        options=TrainingOptions(**{**defaults, **options}),
        validate=validate,
        export=export,
        describe={"network": "small", "numbers": (1, 2)},
        cpu=True,
    )


def log(out, key="model/loss"):
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [(line["step"], line[key]) for line in lines if key in line]


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_stop_and_resume_gives_the_same_run(tmp_path, precision, number):
    whole = trainer(tmp_path / "whole", precision=precision)
    whole.run()
    first = trainer(tmp_path / "parts", Quits(5, number), precision=precision)
    handlers = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    first.run()
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert first.step == 6
    assert not first.finished
    second = trainer(tmp_path / "parts", precision=precision)
    second.run()
    assert second.finished
    assert log(tmp_path / "parts") == log(tmp_path / "whole")
    assert len(log(tmp_path / "whole")) == 12
    assert same(second.model, whole.model)
    assert same(second.ema, whole.ema)
    states = [run.optimizers["model"].state_dict()["state"] for run in (whole, second)]
    assert states[0].keys() == states[1].keys()
    for index, entry in states[0].items():
        assert all(torch.equal(value, states[1][index][name]) for name, value in entry.items())


def test_a_run_killed_between_checkpoints_goes_back_to_the_last_one(tmp_path):
    trainer(tmp_path / "whole").run()
    part = trainer(tmp_path / "part")
    while part.step < 11:  # the loop of `run`, which dies after 11 steps of 12
        part._log(part._train_step())
        if part.step % 4 == 0:
            part.save()
    with (tmp_path / "part" / "log.jsonl").open("a") as file:
        file.write('{"step": 12, "lo')  # it died while it wrote
    again = trainer(tmp_path / "part")
    again._start(resume=True)
    assert again.step == 8
    assert [step for step, _ in log(tmp_path / "part")] == list(range(1, 9))
    again.run()
    assert log(tmp_path / "part") == log(tmp_path / "whole")


def test_a_log_that_was_edited_and_a_copy_of_a_checkpoint_do_no_harm(tmp_path):
    trainer(tmp_path, steps=4).run()
    shutil.copytree(tmp_path / "checkpoints/step_00000004", tmp_path / "checkpoints/step_00000004_best")
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write("\n[4]\n{}\nnote\n")
    trainer(tmp_path, steps=12).run()
    assert [step for step, _ in log(tmp_path)] == list(range(1, 13))
    assert (tmp_path / "checkpoints/step_00000004_best").is_dir() and last_checkpoint(tmp_path).name == "step_00000012"


def test_a_checkpoint_is_written_before_the_validation_of_its_step(tmp_path):
    def validate(model):
        raise RuntimeError("no figures")

    with pytest.raises(RuntimeError, match="no figures"):
        trainer(tmp_path, validate=validate, validate_every=4).run()
    assert last_checkpoint(tmp_path).name == "step_00000004"


def test_facts_that_older_checkpoints_do_not_have_are_compared_where_they_are(tmp_path):
    older = trainer(tmp_path, steps=4)
    older.run()
    again = trainer(tmp_path, steps=8)
    again.describe["data"] = "some"
    again.run()
    other = trainer(tmp_path, steps=12)
    other.describe["data"] = "others"
    with pytest.raises(ValueError, match="another data"):
        other.run()


def test_an_unfinished_checkpoint_is_never_read(tmp_path):
    trainer(tmp_path).run()
    folder = tmp_path / "checkpoints"
    assert sorted(p.name for p in folder.iterdir()) == ["step_00000008", "step_00000012"]
    (folder / ".step_00000016.partial").mkdir()
    (folder / "step_00000016").mkdir()  # no state.json
    assert last_checkpoint(tmp_path).name == "step_00000012"


def test_checkpoints_hold_no_pickle(tmp_path):
    trainer(tmp_path).run()
    files = sorted(p.name for p in last_checkpoint(tmp_path).iterdir())
    assert files == ["ema.safetensors", "model.safetensors", "optimizer.model.safetensors", "state.json"]


def test_damaged_and_foreign_checkpoints_are_refused(tmp_path):
    run = trainer(tmp_path / "run")
    run.run()
    folder = last_checkpoint(tmp_path / "run")
    with pytest.raises(ValueError, match="another numbers"):
        read_checkpoint(folder, run.model, run.ema, {"network": "small", "numbers": (1, 3)})
    with pytest.raises(ValueError, match="does not fit the network"):
        read_checkpoint(folder, nn.Linear(1, 1), nn.Linear(1, 1), run.describe)
    with pytest.raises(ValueError, match="choose another output folder"):
        trainer(tmp_path / "run").run(resume=False)
    for name in ("model.safetensors", "optimizer.model.safetensors", "state.json"):
        broken = tmp_path / "broken" / name
        shutil.copytree(folder, broken)
        data = (broken / name).read_bytes()
        (broken / name).write_bytes(data[:-20])
        with pytest.raises(ValueError, match="damaged"):
            read_checkpoint(broken, run.model, run.ema, run.describe)


def test_ema_warms_up_and_follows_the_weights(tmp_path):
    run = trainer(tmp_path, precision="no")
    expected = [p.detach().clone() for p in run.model.parameters()]
    for n in range(1, 13):
        run._train_step()
        decay = min(0.9, (1 + n) / (10 + n))
        expected = [decay * e + (1 - decay) * p.detach() for e, p in zip(expected, run.model.parameters(), strict=True)]
    for e, p in zip(expected, run.ema.parameters(), strict=True):
        torch.testing.assert_close(e, p)
        assert not p.requires_grad
    assert not run.ema.training
    assert run.ema.seen == run.model.seen


def test_rate_warms_up_and_falls_to_its_end():
    options = TrainingOptions(steps=100, lr=2.0, warmup=10, lr_final=0.1)
    assert [options.rate(k) for k in (0, 4, 9, 10)] == pytest.approx([0.2, 1.0, 2.0, 2.0])
    assert options.rate(55) == pytest.approx(2.0 * (0.1 + 0.9 / 2))
    assert options.rate(100) == pytest.approx(0.2)


def test_accumulation_gives_the_same_gradient(tmp_path):
    runs = [trainer(tmp_path / str(k), precision="no", accumulate=k) for k in (1, 2)]
    losses = [[run._train_step()["model/loss"] for _ in range(4)] for run in runs]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    for a, b in zip(runs[0].model.parameters(), runs[1].model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="split evenly"):
        trainer(tmp_path / "3", accumulate=3).run()


def test_gradients_are_clipped_and_must_be_finite(tmp_path):
    @dataclass(frozen=True)
    class Steep(Objective):
        slope: float

        def players(self, model):
            return {"model": model.parameters()}

        def loss(self, player, model, batch, noise):
            return self.slope * sum(p.sum() for p in model.parameters()), {"extra": 2.0}

    run = trainer(tmp_path, Steep(1e3), clip=0.5)
    count = sum(p.numel() for p in run.model.parameters())
    norms = []
    run.optimizers["model"].register_step_pre_hook(
        lambda optimizer, *_: norms.append(nn.utils.get_total_norm([p.grad for p in run.players["model"]]))
    )
    figures = run._train_step()
    assert figures["model/grad_norm"] == pytest.approx(1e3 * math.sqrt(count), rel=1e-4)
    assert figures["model/extra"] == 2.0
    assert float(norms[0]) == pytest.approx(0.5, rel=1e-3)
    with pytest.raises(FloatingPointError, match="not finite"):
        trainer(tmp_path, Steep(math.inf))._train_step()


def test_players_take_turns_and_leave_each_other_alone(tmp_path):
    class Two(Denoiser):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.frozen = (nn.Parameter(torch.ones(2)) for _ in range(3))
            self.frozen.requires_grad_(False)

        def forward(self, x_t, t, **cond):
            return x_t

    seen = []

    @dataclass(frozen=True)
    class Game(Objective):
        def players(self, model):
            return {"model": [model.a], "critic": [model.b]}

        def loss(self, player, model, batch, noise):
            seen.append((player, model.a.requires_grad, model.b.requires_grad, noise.randn(2)))
            sign = 1 if player == "model" else -1
            return sign * (model.a * model.b).sum(), {}

    options = TrainingOptions(steps=1, lr=0.1, warmup=0, weight_decay=0, precision="no")
    run = Trainer(Two(), Game(), RandomCrops([coded()], (CropShape(2, 4),)), tmp_path, options, cpu=True)
    run.run()
    assert [s[:3] for s in seen] == [("model", True, False), ("critic", False, True)]
    assert not torch.equal(seen[0][3], seen[1][3])
    torch.testing.assert_close(run.model.a.detach(), torch.full((2,), 0.9))
    torch.testing.assert_close(run.model.b.detach(), torch.full((2,), 1.1))
    assert run.model.a.requires_grad
    assert run.model.b.requires_grad
    assert torch.equal(run.model.frozen, torch.ones(2))
    assert (last_checkpoint(tmp_path) / "optimizer.critic.safetensors").is_file()


def test_training_touches_no_global_generator(tmp_path):
    torch.manual_seed(5)
    np.random.seed(5)
    before, numpy_before = torch.get_rng_state(), np.random.get_state()[1].copy()
    trainer(tmp_path).run()
    assert torch.equal(torch.get_rng_state(), before)
    assert (np.random.get_state()[1] == numpy_before).all()


def test_validation_and_export_see_the_average(tmp_path):
    seen, exported = [], []

    def validate(model):
        seen.append(model)
        return {"figure": 1.0}

    run = trainer(tmp_path, validate=validate, export=exported.append, tensorboard=True)
    run.run()
    assert seen == [run.ema] * 2
    assert exported == [run.ema] * 4
    assert log(tmp_path, "validation/figure") == [(6, 1.0), (12, 1.0)]
    assert len(list((tmp_path / "tensorboard").iterdir())) == 1


def test_wrong_options_are_refused():
    own = ({"seed": None}, {"seed": -1}, {"betas": [0.9]}, {"betas": [0.9, 1.0]}, {"lr_final": "x"}, {"steps": 1.5})
    for wrong in ({"precision": "fp16"}, {"steps": 0}, {"ema": 1.0}, {"lr": 0.0}, {"log_every": None}, *own):
        with pytest.raises(ValueError, match=r"must be|needed"):
            TrainingOptions(**wrong)


def test_a_resumed_run_has_its_own_options(tmp_path):
    trainer(tmp_path, steps=4).run()
    again = trainer(tmp_path, steps=8, weight_decay=0.5, betas=(0.5, 0.6))
    again._start(resume=True)
    group = again.optimizers["model"].param_groups[0]
    assert (again.step, group["weight_decay"], group["betas"]) == (4, 0.5, (0.5, 0.6))


def test_a_run_without_a_checkpoint_begins_its_log_anew(tmp_path):
    killed = trainer(tmp_path)
    for _ in range(3):
        killed._log(killed._train_step())
    trainer(tmp_path, steps=4).run()
    assert [step for step, _ in log(tmp_path)] == [1, 2, 3, 4]


APART = """
    import os, sys; from pathlib import Path
    sys.path.insert(0, {tests!r})
    from test_training import trainer
    rank = int(os.environ["RANK"])
    run = trainer(Path({out!r}) / str(rank), precision="no", steps=8, checkpoint_every=8)
    try:
        run.run()
    except ValueError as error:
        print(rank, error, flush=True)
"""


@pytest.mark.slow
def test_processes_that_do_not_share_their_folder_are_told_so(tmp_path):
    """Two machines with a folder each: only the main process ever wrote a checkpoint."""
    trainer(tmp_path / "0", steps=4, precision="no").run()
    script = tmp_path / "apart.py"
    script.write_text(textwrap.dedent(APART.format(tests=os.path.dirname(__file__), out=str(tmp_path))))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    command += ["--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0", str(script)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.stdout.count("is not one folder for all processes") == 2, done.stderr[-2000:]


WORKER = """
    import sys; from pathlib import Path; import torch
    torch.set_num_threads(1)
    sys.path.insert(0, {tests!r})
    from fewstep.processes import until_the_end
    from test_training import trainer
    run = trainer(Path({out!r}), precision="no", steps=6)
    assert run.accelerator.num_processes == {count}
    with until_the_end():
        run.run()
"""


@pytest.mark.slow
def test_two_processes_reproduce_one(tmp_path):
    for count in (1, 2):
        script = tmp_path / f"worker{count}.py"
        tests, out = os.path.dirname(__file__), str(tmp_path / str(count))
        script.write_text(textwrap.dedent(WORKER.format(tests=tests, out=out, count=count)))
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(count)]
        command += ["--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0", str(script)]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
        assert done.returncode == 0, done.stderr[-2000:]
    losses = [[loss for _, loss in log(tmp_path / str(count))] for count in (1, 2)]
    assert len(losses[0]) == 6
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    states = []
    for count in (1, 2):
        run = trainer(tmp_path / str(count), precision="no")
        states.append(run)
        read_checkpoint(last_checkpoint(tmp_path / str(count)), run.model, run.ema, run.describe)
    for a, b in zip(states[0].model.parameters(), states[1].model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


# ---- the recipe -----------------------------------------------------------------------------------------------------


def photos(folder, count=3, size=40):
    folder.mkdir()
    for k in range(count):
        pixels = np.random.default_rng(k).integers(0, 256, (size, size, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{k}.png")
    return folder


TINY = """
holdout: 1
network: {widths: [8, 8], layers: 1, groups: 4}
objective: {median: 0.3}
crops: [[2, 16], [1, 32]]
training: {steps: 4, warmup: 1, precision: bf16, checkpoint_every: 2, validate_every: 2, log_every: 1}
validation: {images: 1, size: 32, sigmas: [25]}
"""


def test_shipped_recipe_reads_and_describes_the_shipped_network():
    recipe = recipes.read_recipe("natural")
    from fewstep.priors.unet import UNetConfig

    assert recipes.build(UNetConfig, recipe.network, "network") == UNetConfig()
    assert recipes.build(DenoisingScoreMatching, recipe.objective, "objective") == DenoisingScoreMatching()
    assert recipes.build(TrainingOptions, recipe.training, "training").steps > 1000


def test_train_prior_ends_with_a_prior_that_loads(tmp_path):
    from fewstep.priors.unet import UNetDenoiser

    (tmp_path / "r.yaml").write_text(TINY)
    data = photos(tmp_path / "photos")
    prior = recipes.train_prior(tmp_path / "r.yaml", data, tmp_path / "out")
    loaded = UNetDenoiser.load(tmp_path / "out" / "prior")
    assert loaded.config == prior.config
    assert [step for step, _ in log(tmp_path / "out", "validation/psnr_25")] == [2, 4]
    longer = recipes.train_prior(tmp_path / "r.yaml", data, tmp_path / "out", steps=6)
    assert len(log(tmp_path / "out")) == 6
    assert not same(longer, prior)
    with pytest.raises(ValueError, match="choose another output folder"):
        recipes.train_prior(tmp_path / "r.yaml", data, tmp_path / "out", resume=False)


@pytest.mark.parametrize(
    ("old", "new", "match"),
    [
        ("holdout", "holduot", "did you mean holdout"),
        ("widths", "width", "did you mean widths"),
        ("warmup", "warm_up", "did you mean warmup"),
        ("median", "zzz", "choose one of"),
        ("holdout: 1", "families: []", r"kind prior\): unknown key 'families'; choose one of crops, holdout, kind"),
        ("holdout: 1", "", "lacks holdout"),
        ("holdout: 1", "holdout: 3", "there are 3 images"),
        ("holdout: 1", "holdout: one", "holdout is 'one'"),
        ("precision: bf16", "precision: fp16", "precision"),
        ("{median: 0.3}", "[1]", "mapping"),
        ("{median: 0.3}", "{", "cannot be read as a recipe"),
        ("[1, 32]", "[1, 300]", r"0\.png has \d+ x \d+ pixels: too small for crops of 300"),
        ("groups: 4", "groups: 0", "groups must be a whole number and at least 1"),
        ("groups: 4", "groups: 4, size: 32", "learns from crops of that size alone"),
        ("images: 1", "images: 0", "images must be a whole number and at least 1"),
        ("sigmas: [25]", "sigmas: 25", "sigmas must be a list"),
        ("sigmas: [25]", "sigmas: ['25']", "sigmas must be a list"),
        ("size: 32", "size: 300", r"2\.png has \d+ x \d+ pixels: too small for crops of 300"),
    ],
)
def test_wrong_recipes_are_refused(tmp_path, old, new, match):
    (tmp_path / "r.yaml").write_text(TINY.replace(old, new))
    with pytest.raises(ValueError, match=match):
        recipes.train_prior(tmp_path / "r.yaml", photos(tmp_path / "photos"), tmp_path / "out")


def test_other_photographs_are_another_run(tmp_path):
    (tmp_path / "r.yaml").write_text(TINY)
    data = photos(tmp_path / "photos")
    recipes.train_prior(tmp_path / "r.yaml", data, tmp_path / "out", steps=1)
    photos(tmp_path / "more", count=5)
    with pytest.raises(ValueError, match="another data"):
        recipes.train_prior(tmp_path / "r.yaml", tmp_path / "more", tmp_path / "out", steps=2)
    data.rename(tmp_path / "moved")
    recipes.train_prior(tmp_path / "r.yaml", tmp_path / "moved", tmp_path / "out", steps=2)


def digits(folder, size=28, labels=10):
    """Write images with labels; return the file."""
    rng = np.random.default_rng(0)
    data = folder / f"{size}_{labels}.npz"
    np.savez(data, images=rng.integers(0, 256, (20, size, size), np.uint8), labels=np.arange(20) % labels)
    return data


DIGITS = """
kind: labelled
holdout: 4
batch: 2
hidden: 0.15
network: {channels: 1, size: 28, classes: 10, widths: [8, 8], layers: 1, groups: 4}
objective: {}
training: {steps: 1, warmup: 1, precision: "no"}
validation: {images: 2, size: 28, sigmas: [64]}
"""
CLASSES = """
kind: classifier
holdout: 4
batch: 2
network: {classes: 10, size: 28, width: 4, features: 8}
objective: {}
training: {steps: 1, warmup: 1, precision: "no"}
"""


@pytest.mark.parametrize("text", [DIGITS, CLASSES])
def test_labelled_images_must_fit_the_network(tmp_path, text):
    (tmp_path / "r.yaml").write_text(text)
    recipe = recipes.read_recipe(tmp_path / "r.yaml")
    assert recipe.trainer(digits(tmp_path), tmp_path / "out").data.size == 2
    with pytest.raises(ValueError, match=r"images of \(1, 32, 32\), the network takes \(1, 28, 28\)"):
        recipe.trainer(digits(tmp_path, size=32), tmp_path / "out")
    with pytest.raises(ValueError, match="other labels than 0 to 9"):
        recipe.trainer(digits(tmp_path, labels=12), tmp_path / "out")
    for old, new in (("hidden: 0.15", "hidden: 2"), ("batch: 2", "batch: 1.5"), ("hidden: 0.15", "hidden: a")):
        (tmp_path / "r.yaml").write_text(text.replace(old, new))
        if old in text:
            with pytest.raises(ValueError, match=r"hidden must lie in|batch must be"):
                recipes.read_recipe(tmp_path / "r.yaml")


def test_numbers_of_a_recipe_may_be_written_as_elsewhere(tmp_path):
    text = (recipes.FOLDER / "natural.yaml").read_text(encoding="utf-8")
    (tmp_path / "r.yaml").write_text(text + "\n", encoding="utf-8")
    plain = recipes.read_recipe(tmp_path / "r.yaml")
    assert plain == recipes.read_recipe("natural") and "lr: " in text
    line = next(part for part in text.splitlines() if "lr: " in part)
    (tmp_path / "r.yaml").write_text(text.replace(line, line.split("lr:")[0] + "lr: 1e-3"), encoding="utf-8")
    assert recipes.read_recipe(tmp_path / "r.yaml").training["lr"] == 1e-3


def test_a_missing_recipe_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"cannot be read as a recipe.* digits, digits-classifier, natural,"):
        recipes.read_recipe(tmp_path / "none.yaml")


def test_psnr_of_doing_nothing_is_that_of_the_noise():
    class Nothing(Denoiser):
        def __init__(self):
            super().__init__()
            self.schedule, self.event_shape = VariancePreserving(), (3, None, None)
            self.unused = nn.Parameter(torch.zeros(()))

        def forward(self, x_t, t, **cond):
            return x_t / like(self.schedule(t)[0], x_t)

    clean = torch.zeros(4, 3, 64, 64)
    z = Noise(range(4)).randn_like(clean)
    assert denoising_psnr(Nothing(), clean, 2 * 25 / 255, z) == pytest.approx(-20 * math.log10(25 / 255), abs=0.05)
    images = [torch.full((3, 40, 50), 128, dtype=torch.uint8)] * 9
    figures = DenoisingPSNR(images=4, size=32, sigmas=(10.0, 25.0)).on(images)(Nothing())
    assert figures["psnr_10"] == pytest.approx(-20 * math.log10(10 / 255), abs=0.15)
    assert figures["psnr_25"] == pytest.approx(-20 * math.log10(25 / 255), abs=0.15)


class Pair(Denoiser):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))

    def forward(self, x_t, t, **cond):
        return x_t


@dataclass(frozen=True)
class Turns(Objective):
    """Players by the names of their parameters; each minimises the sum of its own."""

    owned: dict

    def players(self, model):
        return {name: [getattr(model, key) for key in keys] for name, keys in self.owned.items()}

    def loss(self, player, model, batch, noise):
        assert batch is None
        return sum(getattr(model, key).sum() for key in self.owned[player]) + 0 * noise.randn(1).sum(), {}


def turns(out, owned, streams=in_blocks):
    options = TrainingOptions(steps=3, lr=0.1, warmup=0, weight_decay=0, precision="no")
    return Trainer(Pair(), Turns(owned), Unlimited(6), out, options, cpu=True, streams=streams)


def test_players_of_the_same_parameters_share_one_optimiser(tmp_path):
    run = turns(tmp_path / "same", {"one": ["a", "b"], "two": ["b", "a"]})
    run.run()
    assert list(run.optimizers) == ["one"]
    assert {int(state["step"]) for state in run.optimizers["one"].state.values()} == {
        6
    }  # two turns in each of three steps
    torch.testing.assert_close(
        run.model.a.detach(), torch.full((2,), 1 - 2 * sum(run.options.rate(k) for k in range(3)))
    )
    assert not (last_checkpoint(tmp_path / "same") / "optimizer.two.safetensors").exists()
    again = turns(tmp_path / "same", {"one": ["a", "b"], "two": ["b", "a"]})
    again.run()
    assert again.step == 3
    assert {int(state["step"]) for state in again.optimizers["one"].state.values()} == {6}
    apart = turns(tmp_path / "apart", {"one": ["a"], "two": ["b"]})
    apart.run()
    assert {int(s["step"]) for o in apart.optimizers.values() for s in o.state.values()} == {3}
    with pytest.raises(ValueError, match="all or none"):
        turns(tmp_path / "some", {"one": ["a", "b"], "two": ["b"]})


def test_items_without_data_have_streams_of_their_own():
    device = torch.device("cpu")
    whole = in_blocks((1, 2, 0), range(4), device).randn(3)
    assert torch.equal(whole[:2], in_blocks((1, 2, 0), range(2), device).randn(3))
    for other in (in_blocks((1, 2, 1), range(4), device), in_blocks((1, 2, 0), range(4, 8), device)):
        assert not bool((whole == other.randn(3)).any())


def test_the_noise_of_a_training_is_new_in_every_step_and_of_its_seed(tmp_path):
    seen = []
    for seed, steps in ((0, 2), (1, 1)):
        one = trainer(tmp_path / str(seed), seed=seed)
        one.streams = lambda words, *rest, streams=one.streams: seen.append(words) or streams(words, *rest)
        for _ in range(steps):
            one._train_step()
    assert len(set(seen)) == 3


def test_accumulated_gradients_are_means(tmp_path):
    one, two = (
        trainer(tmp_path / str(parts), accumulate=parts, precision="no")._train_step()["model/grad_norm"]
        for parts in (1, 2)
    )
    assert one == pytest.approx(two, rel=1e-4)
