"""A sampler inside deepinv's own tools."""

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

import fewstep
from fewstep.compat import prepare_torchvision
from fewstep.deepinv_model import as_deepinv
from fewstep.priors.unet import UNetConfig, UNetDenoiser
from fewstep.unfolded.decoders import AdaptedDecoder
from fewstep.unfolded.network import UnfoldedConfig, UnfoldedNetwork
from fewstep.unfolded.sampler import Unfolded

prepare_torchvision()
deepinv = pytest.importorskip("deepinv")

SHAPE = (3, 16, 16)
SIGMA = 0.02


def unet(seed=0):
    prior = UNetDenoiser(UNetConfig(widths=(8, 8), layers=1, groups=4)).eval().requires_grad_(False)
    nn.init.normal_(prior.net.conv_out.weight, std=0.05, generator=torch.Generator().manual_seed(seed))
    return prior


def network(prior):
    return UnfoldedNetwork(UnfoldedConfig(), AdaptedDecoder(prior.with_context(0)))


def physics(name):
    noise = deepinv.physics.GaussianNoise(SIGMA)
    mask = (torch.rand(1, 16, 16, generator=torch.Generator().manual_seed(1)) > 0.5).float()
    kernel = deepinv.physics.blur.gaussian_blur(sigma=(1.0, 1.0))
    return {
        "blur": lambda: deepinv.physics.BlurFFT(SHAPE, kernel, noise_model=noise),
        "inpainting": lambda: deepinv.physics.Inpainting(SHAPE, mask=mask, noise_model=noise),
        "sr": lambda: deepinv.physics.Downsampling(SHAPE, factor=2, filter="gaussian", noise_model=noise),
    }[name]()


def images(count=2):
    x = torch.rand(count, *SHAPE, generator=torch.Generator().manual_seed(2))
    return nn.functional.avg_pool2d(x, 5, 1, 2)


def measured(name):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        operator = physics(name)
        return operator, operator(images())


@pytest.mark.parametrize("name", ["blur", "inpainting", "sr"])
def test_deepinv_test_takes_it(name):
    operator, y = measured(name)
    prior = unet()
    model = as_deepinv(Unfolded(network(prior).eval(), steps=2), prior, num_samples=2)
    data = DataLoader(list(zip(images(), y, strict=True)), batch_size=2)
    found = deepinv.test(model, data, operator, device="cpu", verbose=False, show_progress_bar=False)
    error = (model(y, operator) - images()).square().flatten(1).mean(1)
    assert found["PSNR"] == pytest.approx(float((-10 * error.log10()).mean()), abs=1e-3)


def test_it_is_the_mean_of_the_samples_of_the_library():
    operator, y = measured("blur")
    prior = unet()
    sampler = Unfolded(network(prior).eval(), steps=2)
    problem = fewstep.Posterior(prior, fewstep.image_likelihood(y, operator, SIGMA))
    expected = ((sampler(problem, 3, seed=5).x.mean(0) + 1) / 2).clamp(0, 1)
    model = fewstep.as_deepinv(sampler, prior, 3, seed=5, chunk=2)
    torch.testing.assert_close(model(y, operator), expected)
    trained = model.train()(y, operator)  # the other way of drawing gives the same samples
    torch.testing.assert_close(trained.clamp(0, 1), expected)
    pair = fewstep.as_deepinv(sampler, prior, 2, seed=5, antithetic=True)
    expected = ((sampler(problem, 2, seed=5, antithetic=True).x.mean(0) + 1) / 2).clamp(0, 1)
    torch.testing.assert_close(pair(y, operator), expected)
    torch.testing.assert_close(pair.train()(y, operator).clamp(0, 1), expected)
    with pytest.raises(ValueError, match="their number must be even, got 3"):
        fewstep.as_deepinv(sampler, prior, 3, antithetic=True)
    prior_only = fewstep.as_deepinv(fewstep.get("diffpir")(steps=2), prior)
    assert prior_only(y, operator).shape == (2, *SHAPE)


def test_its_training_mode_is_not_the_priors():
    prior, operator = unet(), physics("blur")
    prior.dropout = nn.Dropout(0.5)
    prior.train()
    model = as_deepinv(Unfolded(network(prior), steps=1), prior).train()
    assert model.training and model.networks.training and model.networks[0].decoder.training
    assert not any(part.training for part in prior.modules())
    assert model(operator(images()), operator).requires_grad
    assert not any(part.training for part in model.eval().modules())


def test_deepinv_trains_it(tmp_path):
    operator, y = measured("inpainting")
    prior = unet()
    model = as_deepinv(Unfolded(network(prior), steps=1), prior)
    before = {name: p.detach().clone() for name, p in model.networks.named_parameters()}
    data = DataLoader(list(zip(images(), y, strict=True)), batch_size=2)
    trainer = deepinv.Trainer(
        model=model,
        physics=operator,
        train_dataloader=data,
        optimizer=torch.optim.SGD(model.networks.parameters(), lr=0.1),
        losses=deepinv.loss.SupLoss(),
        epochs=1,
        device="cpu",
        save_path=str(tmp_path),
        verbose=False,
        show_progress_bar=False,
        plot_images=False,
    )
    trainer.train()
    changed = {name for name, p in model.networks.named_parameters() if not torch.equal(p, before[name])}
    assert "0.decoder.denoiser.net.conv_out.weight" in changed
    assert all(not p.requires_grad for p in model.prior.parameters())


def test_what_it_refuses():
    operator, y = measured("blur")
    prior = unet()
    sampler = Unfolded(network(prior), steps=1)
    with pytest.raises(ValueError, match="no Gaussian noise model"):
        as_deepinv(sampler, prior)(y, deepinv.physics.BlurFFT(SHAPE, operator.filter))
    with pytest.raises(ValueError, match="at least 1"):
        as_deepinv(sampler, prior, 0)


@pytest.mark.parametrize(
    "noise", [("PoissonGaussianNoise", {"gain": 0.5, "sigma": 0.01}), ("RicianNoise", {"sigma": 0.1})]
)
def test_noise_that_only_has_a_sigma_is_refused(noise):
    name, fields = noise
    operator = deepinv.physics.Denoising(getattr(deepinv.physics, name)(**fields))
    with pytest.raises(ValueError, match=f"must be a GaussianNoise with a sigma, got {name}"):
        as_deepinv(Unfolded(network(prior := unet()), steps=1), prior)(images(), operator)


def test_a_kind_of_gaussian_noise_is_taken():
    class Camera(deepinv.physics.GaussianNoise):
        pass

    prior, found = unet(), []
    for noise in (Camera(SIGMA), deepinv.physics.GaussianNoise(SIGMA)):
        model = as_deepinv(fewstep.get("diffpir")(steps=2), prior)
        found.append(model(images(), deepinv.physics.Denoising(noise)))
    assert torch.equal(*found)


def test_names_are_no_samplers_and_no_priors():
    for wrong in ("diffpir", fewstep.get("diffpir")):
        with pytest.raises(TypeError, match=r"the sampler must be a Sampler, got .*diffpir"):
            as_deepinv(wrong, unet())
    with pytest.raises(TypeError, match="the prior must be a Denoiser, got str"):
        as_deepinv(fewstep.get("diffpir")(), "natural")
