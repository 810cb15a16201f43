import math
import sys
import types

import pytest
import torch
from safetensors.torch import save_file

from fewstep.compat import prepare_torchvision
from fewstep.core.denoiser import Denoiser
from fewstep.core.schedule import VarianceExploding
from fewstep.priors import loaders
from fewstep.priors.adm import AdmFlags, AdmUNet, GuidedDiffusionDenoiser, _table, load_guided_diffusion
from fewstep.priors.deepinv_denoiser import DeepinvDenoiser
from fewstep.priors.diffusers_unet import DiffusersDenoiser
from fewstep.priors.loaders import load_prior
from fewstep.priors.unet import UNetConfig, UNetDenoiser
from fewstep.unfolded.decoders import AdaptedDecoder
from fewstep.unfolded.loaders import load_sampler
from fewstep.unfolded.network import UnfoldedConfig, UnfoldedNetwork
from fewstep.unfolded.store import save_network

prepare_torchvision()
diffusers = pytest.importorskip("diffusers")
VAR = 0.3  # variance of the Gaussian that the exact networks below denoise


def noisy(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def exact(x_t, alpha, sigma):
    """E[x_0 | x_t] for x_0 ~ N(0, VAR I)."""
    return alpha * VAR / (alpha**2 * VAR + sigma**2) * x_t


class ExactUNet(torch.nn.Module):
    """The prediction a perfect network makes at the steps of a scheduler, N(0, VAR) images."""

    def __init__(self, kind, table, learned=False):
        super().__init__()
        self.kind, self.table, self.learned = kind, table, learned
        self.config = {"in_channels": 3, "out_channels": 6 if learned else 3, "block_out_channels": (8, 8)}
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.steps = []

    def forward(self, x, step):
        self.steps.append(step)
        abar = self.table[step.round().long()].to(x).reshape(-1, 1, 1, 1)
        a, s = abar.sqrt(), (1 - abar).sqrt()
        x0 = exact(x, a, s)
        out = {"sample": x0, "epsilon": (x - a * x0) / s, "v_prediction": a * (x - a * x0) / s - s * x0}[self.kind]
        out = torch.cat([out, 99 * out], 1) if self.learned else out
        return types.SimpleNamespace(sample=out)


@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("kind", ["sample", "epsilon", "v_prediction"])
@pytest.mark.parametrize("betas", ["linear", "scaled_linear", "squaredcos_cap_v2"])
def test_every_prediction_type_gives_the_exact_denoiser(kind, betas, learned):
    scheduler = diffusers.DDPMScheduler(50, beta_schedule=betas, prediction_type=kind)
    prior = DiffusersDenoiser(ExactUNet(kind, scheduler.alphas_cumprod, learned), scheduler.config)
    steps = torch.tensor([0, 3, 17, 40])
    t = (steps + 1) / 50
    x = noisy(4, 3, 4, 4)
    alpha, sigma = (c.reshape(-1, 1, 1, 1) for c in prior.schedule(t))
    torch.testing.assert_close(prior(x, t), exact(x, alpha, sigma), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(alpha.flatten() ** 2, scheduler.alphas_cumprod[steps], rtol=1e-4, atol=1e-6)


def test_steps_are_continuous_and_never_negative():
    scheduler = diffusers.DDPMScheduler(50)
    unet = ExactUNet("epsilon", scheduler.alphas_cumprod)
    prior = DiffusersDenoiser(unet, scheduler.config)
    prior(noisy(3, 3, 4, 4), torch.tensor([0.0, 0.505, 1.0]))
    torch.testing.assert_close(unet.steps[0], torch.tensor([0.0, 24.25, 49.0]))


def tiny_unet():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return diffusers.UNet2DModel(
            block_out_channels=(8, 8), norm_num_groups=4, layers_per_block=1, add_attention=False,
            down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2, in_channels=3, out_channels=3,
        ).eval()  # fmt: skip


def test_pipeline_folder_model_folder_and_objects_agree(tmp_path):
    unet, scheduler = tiny_unet(), diffusers.DDIMScheduler(100, prediction_type="v_prediction")
    pipeline = diffusers.DDPMPipeline(unet, scheduler)
    pipeline.save_pretrained(tmp_path / "pipeline")
    unet.save_pretrained(tmp_path / "model")
    config = dict(scheduler.config)
    priors = [
        load_prior(pipeline),
        load_prior(tmp_path / "pipeline"),
        load_prior(str(tmp_path / "pipeline" / "unet")),
        load_prior(tmp_path / "model", scheduler=config),
        load_prior(unet, scheduler=config),
    ]
    x, t = noisy(2, 3, 7, 9), torch.tensor([0.2, 0.9])
    for prior in priors:
        assert isinstance(prior, DiffusersDenoiser)
        assert prior.prediction == "v"
        assert not prior.training
        assert not any(p.requires_grad for p in prior.parameters())
        torch.testing.assert_close(prior(x, t), priors[0](x, t))
    alone = torch.cat([priors[0](x[n : n + 1], t[n]) for n in range(2)])
    torch.testing.assert_close(alone, priors[0](x, t), rtol=0, atol=1e-5)


def labelled(kind):
    """Return a prior of three classes whose classes differ."""
    if kind == "diffusers":
        with torch.random.fork_rng():
            torch.manual_seed(0)
            unet = diffusers.UNet2DModel(**{**tiny_unet().config, "num_class_embeds": 3}).eval()
        return load_prior(unet, scheduler={"beta_start": 1e-4})
    return GuidedDiffusionDenoiser(random_adm(AdmFlags(**{**vars(FLAGS), "classes": 3})), _table("linear", 1000)).eval()


@pytest.mark.parametrize("kind", ["diffusers", "guided diffusion"])
def test_a_label_becomes_the_class_of_every_item(kind):
    prior, x, t = labelled(kind), noisy(2, 3, 8, 8), torch.tensor(0.5)
    with torch.no_grad():
        both = prior(x, t, class_labels=torch.tensor([2, 0]))
        torch.testing.assert_close(prior(x, t, label=torch.tensor([2, 0])), both)
        assert not torch.allclose(both[0], both[1])
        alone = prior(x, t, label=torch.tensor(2))
        torch.testing.assert_close(alone[0], both[0], rtol=0, atol=1e-5)
        torch.testing.assert_close(alone[1], prior(x, t, class_labels=torch.tensor([2, 2]))[1])
    for words, message in (({}, "needs a label, a class from 0 to 2"), ({"label": 3}, "classes from 0 to 2")):
        with pytest.raises(ValueError, match=message):
            prior(x, t, **words)


def test_diffusers_folders_that_do_not_fit_are_refused(tmp_path):
    unet = tiny_unet()
    unet.save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match="scheduler_config"):
        load_prior(tmp_path / "model")
    with pytest.raises(ValueError, match="no table of betas"):
        load_prior(tmp_path / "model", scheduler={"_class_name": "ScoreSdeVeScheduler"})
    with pytest.raises(ValueError, match="rescale_betas_zero_snr is not supported"):
        load_prior(tmp_path / "model", scheduler={"beta_start": 1e-4, "rescale_betas_zero_snr": True})
    with pytest.raises(ValueError, match="prediction_type"):
        load_prior(tmp_path / "model", scheduler={"beta_start": 1e-4, "prediction_type": "flow"})
    with pytest.raises(ValueError, match="pass scheduler="):
        load_prior(unet)
    weights = dict(unet.state_dict())
    weights.pop("conv_in.bias")
    save_file(weights, tmp_path / "model" / "diffusion_pytorch_model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"do not fit|cannot be loaded"):
        load_prior(tmp_path / "model", scheduler={"beta_start": 1e-4})
    (tmp_path / "model" / "config.json").write_text('{"_class_name": "UNet2DConditionModel"}')
    with pytest.raises(ValueError, match="UNet2DConditionModel"):
        load_prior(tmp_path / "model", scheduler={"beta_start": 1e-4})


def test_shipped_and_own_folders(tmp_path, monkeypatch):
    model = UNetDenoiser(UNetConfig(widths=(8,), layers=1, groups=4))
    model.save(tmp_path / "mine")
    assert isinstance(load_prior(tmp_path / "mine"), UNetDenoiser)
    monkeypatch.setattr(loaders, "WEIGHTS", tmp_path)
    assert loaders.available_priors() == ["mine"]
    prior = load_prior("mine")
    assert not prior.training
    assert not any(p.requires_grad for p in prior.parameters())
    with pytest.raises(ValueError, match="unexpected keyword"):
        load_prior("mine", sigma=1)
    with pytest.raises(ValueError, match="mine"):
        load_prior("nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no prior"):
        load_prior(tmp_path / "empty")


def test_only_a_hub_id_reaches_for_the_hub(monkeypatch, tmp_path):
    hub = pytest.importorskip("huggingface_hub")
    asked = []

    def refuse(name, **_):
        asked.append(name)
        raise OSError("no network")

    monkeypatch.setattr(hub, "snapshot_download", refuse)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    for name in ("natural-typo", "runs/mistyped", "./owner/name", "/owner/name", "a/b/c", "weights.pt"):
        with pytest.raises(ValueError, match="no prior"):
            load_prior(name)
    assert asked == []
    with pytest.raises(ValueError, match="give the path of its folder"):
        load_prior("owner/name")
    assert asked == ["owner/name"]


def test_a_hub_repository_loads_like_a_folder(monkeypatch, tmp_path):
    hub = pytest.importorskip("huggingface_hub")
    diffusers.DDPMPipeline(tiny_unet(), diffusers.DDPMScheduler(10)).save_pretrained(tmp_path / "p")
    monkeypatch.setattr(hub, "snapshot_download", lambda name, allow_patterns: str(tmp_path / "p"))
    assert isinstance(load_prior("owner/name"), DiffusersDenoiser)


class Blind(torch.nn.Module):
    """A denoiser that is told no noise level."""

    def forward(self, x):
        return x


class Flattening(torch.nn.Module):
    """A network that loses the channels."""

    def forward(self, x, sigma):
        return x.mean(1)


def test_a_network_that_is_no_denoiser_of_the_kind_is_told_in_one_line():
    with pytest.raises(ValueError, match=r"Blind must take images and their noise level, model\(x, sigma\)"):
        load_prior(Blind())
    with pytest.raises(ValueError, match=r"Flattening made \(3, 4, 4\) of images \(3, 3, 4, 4\)"):
        load_prior(Flattening())(torch.zeros(3, 3, 4, 4), torch.tensor(0.5))  # three items: it would be broadcast
    scripted = load_prior(torch.jit.trace(ExactDeepinv(), (torch.zeros(1, 3, 4, 4), torch.ones(1))))
    assert scripted(torch.zeros(2, 3, 4, 4), torch.tensor(0.5)).shape == (2, 3, 4, 4)


class ExactDeepinv(torch.nn.Module):
    """E[x | x + sigma z] in [0, 1] units for x ~ N(1/2, VAR / 4): the same images as N(0, VAR) in [-1, 1]."""

    def forward(self, x, sigma):
        v = VAR / 4
        sigma = sigma.reshape(-1, 1, 1, 1)
        return 0.5 + v / (v + sigma**2) * (x - 0.5)


@pytest.mark.parametrize("schedule", [None, VarianceExploding()])
def test_deepinv_units_are_converted_once(schedule):
    prior = load_prior(ExactDeepinv(), schedule=schedule)
    assert isinstance(prior, DeepinvDenoiser)
    x, t = noisy(3, 3, 4, 4), torch.tensor([0.1, 0.4, 0.8])
    alpha, sigma = (c.reshape(-1, 1, 1, 1) for c in prior.schedule(t))
    torch.testing.assert_close(prior(x, t), exact(x, alpha, sigma), rtol=1e-4, atol=1e-5)
    assert torch.equal(load_prior(ExactDeepinv())(x, torch.tensor(0.0)), x)


def test_a_deepinv_network_never_hears_a_level_outside_its_range():
    heard = []

    class Spy(torch.nn.Module):
        def forward(self, x, sigma):
            heard.append(sigma)
            return x

    load_prior(Spy(), sigma_min=0.01, sigma_max=0.2)(noisy(2, 3, 4, 4), torch.tensor([1e-4, 0.9]))
    torch.testing.assert_close(heard[0], torch.tensor([0.01, 0.2]))
    with pytest.raises(ValueError, match="sigma_min"):
        DeepinvDenoiser(Spy(), sigma_min=0.2, sigma_max=0.1)


@pytest.mark.parametrize("weights", [torch.float32, torch.float64])
def test_a_deepinv_network_runs_in_the_precision_of_its_weights(weights):
    heard = []

    class Layer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Conv2d(3, 3, 1)

        def forward(self, x, sigma):
            heard.append(sigma.dtype)
            return self.layer(x)

    prior, x = load_prior(Layer().to(weights)), noisy(2, 3, 4, 4)
    single, double = prior(x, torch.tensor(0.3)), prior(x.double(), torch.tensor(0.3))
    assert single.dtype == torch.float32 and double.dtype == torch.float64
    assert heard == [weights, weights]
    torch.testing.assert_close(single.double(), double, rtol=1e-5, atol=1e-5)


def test_a_real_deepinv_denoiser_denoises():
    dinv = pytest.importorskip("deepinv")
    prior = load_prior(dinv.models.MedianFilter())
    x = torch.zeros(1, 3, 16, 16) + 0.2
    t = prior.schedule.time(torch.tensor(0.2))
    alpha, sigma = prior.schedule(t)
    out = prior(alpha * x + sigma * noisy(1, 3, 16, 16), t)
    assert (out - x).square().mean() < 0.2**2 / 2


FLAGS = AdmFlags(channels=32, blocks=1, multipliers=(1, 2), attention=(1,), head_channels=32)


def random_adm(flags):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = AdmUNet(flags)
        for p in net.parameters():
            torch.nn.init.normal_(p, std=0.05)
    return net


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"blocks": 2, "multipliers": (1, 1, 2), "attention": (0, 2)},
        {"resblock_updown": False, "scale_shift": False, "out_channels": 3},
        {"classes": 5},
        {"multipliers": (2,), "attention": ()},
        {"new_attention_order": True},
    ],
)
def test_flags_are_read_off_the_shapes(changes, tmp_path):
    flags = AdmFlags(**{**FLAGS.__dict__, **changes})
    net = random_adm(flags)
    torch.save(net.state_dict(), tmp_path / "w.pt")
    free = {"head_channels": flags.head_channels, "new_attention_order": flags.new_attention_order}
    prior = load_prior(tmp_path / "w.pt", **free)
    assert prior.unet.flags == flags
    cond = {"class_labels": torch.tensor([1, 4])} if flags.classes else {}
    x, t = noisy(2, 3, 10, 12), torch.tensor([0.3, 0.8])
    out = prior(x, t, **cond)
    assert out.shape == x.shape
    assert out.isfinite().all()


def test_adm_network_equals_deepinvs(tmp_path):
    """deepinv builds two fixed sizes of the same network: same weights, same answer."""
    diffunet = pytest.importorskip("deepinv.models.diffunet")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        theirs = diffunet.DiffUNet(pretrained=None).eval()
        for p in theirs.parameters():
            if p.ndim > 1:
                torch.nn.init.normal_(p, std=1 / math.sqrt(p[0].numel()))
    state = {k: v for k, v in theirs.state_dict().items() if "alphas" not in k}
    save_file(state, tmp_path / "w.safetensors")
    prior = load_prior(tmp_path / "w.safetensors")
    x, step = noisy(2, 3, 32, 32), torch.tensor([10.0, 700.5])
    with torch.no_grad():
        ours, expected = prior.network(x, step), theirs.forward_diffusion(x, step)
        denoised = prior(x[:1], torch.tensor(0.3))
        alpha, sigma = prior.schedule(torch.tensor(0.3))
        epsilon = theirs.forward_diffusion(x[:1], torch.tensor([299.0]))[:, :3]
    assert expected.std() > 0.1
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(denoised, (x[:1] - sigma * epsilon) / alpha, rtol=1e-3, atol=1e-3)


def test_guided_diffusion_tables():
    """The end points of OpenAI's two named schedules."""
    net = random_adm(FLAGS)
    linear, cosine = (loaders_table(net, kind) for kind in ("linear", "cosine"))
    assert linear[0] == pytest.approx(1 - 1e-4)
    assert linear[-1] == pytest.approx(4.036e-5, rel=1e-3)
    assert cosine[499] == pytest.approx(math.cos((0.5 + 0.008) / 1.008 * math.pi / 2) ** 2, rel=1e-3)


def loaders_table(net, kind):
    return _table(kind, 1000).alphas_cumprod


def test_wrong_checkpoints_are_refused_in_one_line(tmp_path):
    path = tmp_path / "w.pt"
    state = random_adm(FLAGS).state_dict()

    def fails(match, **options):
        with pytest.raises(ValueError, match=match) as caught:
            load_prior(path, **options)
        assert "\n" not in str(caught.value)

    torch.save(state, path)
    fails("shapes of the weights", channels=64)
    fails("unknown flag", depth=3)
    fails("noise_schedule", noise_schedule="sigmoid", head_channels=32)
    fails("not divisible", head_channels=48)
    torch.save({k: v for k, v in state.items() if k != "out.2.bias"}, path)
    fails("out.2.bias", head_channels=32)
    torch.save({**state, "extra": torch.zeros(1)}, path)
    fails("extra", head_channels=32)
    torch.save({"model": state, "step": 3}, path)
    fails("no plain state dict")
    torch.save({"a": torch.zeros(2)}, path)
    fails("no guided-diffusion UNet")
    for data in (path.read_bytes()[:100], b"text, not weights", b".", b"every text fails in a way of its own"):
        path.write_bytes(data)
        fails("cannot be read as weights")


def test_a_checkpoint_cannot_run_code(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (sys.exit, (3,))

    torch.save({"w": Bomb()}, tmp_path / "w.pt")
    with pytest.raises(ValueError, match="cannot be read as weights"):
        load_guided_diffusion(tmp_path / "w.pt")


def test_objects_of_no_known_kind_are_refused():
    with pytest.raises(ValueError, match="cannot be made of a int"):
        load_prior(3)

    class Mine(Denoiser):
        def forward(self, x_t, t, **cond):
            return x_t

    mine = Mine()
    assert load_prior(mine) is mine
    with pytest.raises(ValueError, match="no options"):
        load_prior(mine, schedule=None)


def test_the_folders_of_a_training_are_told_apart(tmp_path):
    prior = UNetDenoiser(UNetConfig(widths=(8,), layers=1, groups=4))
    prior.save(tmp_path / "run" / "prior")
    network = UnfoldedNetwork(UnfoldedConfig(), AdaptedDecoder(prior.with_context(0)))
    save_network(network, tmp_path / "run" / "sampler")
    with pytest.raises(ValueError, match=r"sampler holds a fewstep-unfolded, no prior; load_sampler"):
        load_prior(tmp_path / "run" / "sampler")
    with pytest.raises(ValueError, match=r"the prior is in .*run/prior"):
        load_prior(tmp_path / "run")
    with pytest.raises(ValueError, match=r"the trained sampler is in .*run/sampler"):
        load_sampler(tmp_path / "run")
    assert load_sampler(tmp_path / "run" / "sampler").steps == 3
