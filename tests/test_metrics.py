"""Metrics against what they should be, and None with a reason where they cannot be had."""

from __future__ import annotations

import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from fewstep import metrics
from fewstep.compat import prepare_torchvision
from fewstep.metrics import quality
from fewstep.metrics.distances import u_statistic

prepare_torchvision()  # before lpips and torch_fidelity are imported below

X = torch.rand(1, 3, 80, 70, generator=torch.Generator().manual_seed(0)) * 0.8 + 0.1
Y = X + 0.05 * torch.randn(1, 3, 80, 70, generator=torch.Generator().manual_seed(1)).clamp(-2, 2)
CHANNELS = [(64, 3, 11), (192, 64, 5), (384, 192, 3), (256, 384, 3), (256, 256, 3)]


@pytest.fixture
def alexnet(tmp_path):
    """Random weights under the names of the converted file."""
    generator = torch.Generator().manual_seed(0)
    weights = {}
    for number, (out, inner, side) in zip((0, 3, 6, 8, 10), CHANNELS, strict=True):
        weights[f"features.{number}.weight"] = torch.randn(out, inner, side, side, generator=generator) * 0.05
        weights[f"features.{number}.bias"] = torch.randn(out, generator=generator) * 0.05
    for i, (out, _, _) in enumerate(CHANNELS):
        weights[f"lin{i}.weight"] = torch.rand(1, out, 1, 1, generator=generator)
    save_file(weights, tmp_path / "alexnet.safetensors")
    return tmp_path / "alexnet.safetensors"


def test_psnr():
    assert metrics.psnr(X, X) == math.inf
    assert metrics.psnr(X, X + 0.1) == pytest.approx(20, abs=1e-4)


def test_ssim_in_strips_agrees_with_scikit_image(monkeypatch):
    from skimage.metrics import structural_similarity

    pair = [np.moveaxis(v[0].double().numpy(), 0, -1) for v in (X, Y)]
    options = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "data_range": 1.0}
    expected = structural_similarity(*pair, channel_axis=-1, **options)
    whole, reason = metrics.ssim(X, Y)
    assert reason is None and whole == pytest.approx(expected, abs=1e-5)
    monkeypatch.setattr(quality, "_STRIP", 500)
    assert metrics.ssim(X, Y)[0] == pytest.approx(whole, abs=1e-6)


@pytest.mark.parametrize("grey", [213 / 255, 0.3])
def test_a_flat_image_is_like_itself(grey):
    flat = torch.full((1, 3, 40, 40), grey)
    assert metrics.ssim(flat, flat)[0] == pytest.approx(1, abs=1e-9)


def test_unknown_lpips_networks_are_refused():
    with pytest.raises(ValueError, match=r"the LPIPS network must be one of .*, got 'squeeze'"):
        metrics.lpips(torch.zeros(1, 3, 64, 64), torch.zeros(1, 3, 64, 64), net="squeeze")


def test_small_images_have_no_ssim_or_lpips():
    x = X[..., :7, :5]
    for value, reason in (metrics.ssim(x, x), metrics.lpips(x, x)):
        assert value is None and "pixels" in reason


def test_range_and_shape_are_checked():
    for measure in (metrics.psnr, metrics.ssim, metrics.lpips):
        with pytest.raises(ValueError, match=r"\[0, 1\]"):
            measure(2 * X - 1, X)
        with pytest.raises(ValueError, match="alike"):
            measure(X, X[..., 1:])


def test_lpips_with_given_weights(alexnet, monkeypatch):
    before = torch.get_rng_state()
    value, reason = metrics.lpips(X, Y, weights=alexnet)
    assert torch.equal(before, torch.get_rng_state())
    assert reason is None and value > 0
    assert metrics.lpips(X, X, weights=alexnet.parent)[0] == 0
    monkeypatch.setenv(metrics.LPIPS_VARIABLE, str(alexnet.parent))
    assert metrics.lpips(X, Y)[0] == value
    state, network = load_file(alexnet), metrics.lpips_net("alex", alexnet)
    assert value == pytest.approx(float(network(2 * X - 1, 2 * Y - 1)), rel=1e-5)
    assert torch.equal(dict(network.net.slice3.named_children())["6"].weight, state["features.6.weight"])
    assert torch.equal(network.lin4.model[-1].weight, state["lin4.weight"])


@pytest.mark.parametrize("change", ["missing", "extra", "shape", "text"])
def test_lpips_weights_are_read_strictly(alexnet, change):
    state = load_file(alexnet)
    if change == "missing":
        del state["features.3.bias"]
    elif change == "extra":
        state["features.99.bias"] = torch.zeros(1)
    elif change == "shape":
        state["lin0.weight"] = torch.zeros(1, 3, 1, 1)
    path = alexnet.with_name(f"{change}.safetensors")
    path.write_text("no") if change == "text" else save_file(state, path)
    with pytest.raises(ValueError, match=change):
        metrics.lpips(X, Y, weights=path)


def test_lpips_without_weights_is_null_with_a_reason(monkeypatch, tmp_path):
    monkeypatch.delenv(metrics.LPIPS_VARIABLE, raising=False)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    quality._build.cache_clear()
    value, reason = metrics.lpips(X, Y)
    assert value is None and "--lpips-weights" in reason
    with pytest.raises(metrics.Missing, match=r"^no LPIPS weights: set FEWSTEP_LPIPS to their file") as caught:
        metrics.lpips_net()
    assert "--lpips-weights" not in str(caught.value), "which only some commands have"
    with pytest.raises(ValueError, match="do not exist"):
        metrics.lpips(X, Y, weights=tmp_path / "none.safetensors")


real_weights = pytest.mark.skipif(not os.environ.get("FEWSTEP_LPIPS"), reason="FEWSTEP_LPIPS is not set")


@real_weights
@pytest.mark.parametrize(("net", "expected"), [("alex", 0.53122), ("vgg", 0.81517)])
def test_lpips_with_the_real_weights(net, expected):
    import lpips

    own = torch.load(Path(lpips.__file__).parent / "weights" / "v0.1" / f"{net}.pth", map_location="cpu")
    network = metrics.lpips_net(net)
    for i in range(5):  # the linear layers are shipped in the lpips package itself
        assert torch.allclose(getattr(network, f"lin{i}").model[-1].weight, own[f"lin{i}.model.1.weight"], atol=1e-3)
    rows, columns = torch.meshgrid(torch.arange(64.0), torch.arange(64.0), indexing="ij")
    a = torch.stack([rows / 63, columns / 63, (rows + columns) / 126])[None]
    b = torch.stack([(torch.sin(rows / 4) + 1) / 2, (torch.cos(columns / 5) + 1) / 2, rows * 0 + 0.5])[None]
    assert metrics.lpips(a, b, net=net)[0] == pytest.approx(expected, abs=5e-4)


def test_coverage():
    truth = torch.tensor([0.0, 1.0, 2.0, 3.0])
    assert metrics.coverage((torch.zeros(4), torch.full((4,), 2.0)), truth) == 0.75
    with pytest.raises(ValueError, match="differ"):
        metrics.coverage((torch.zeros(3), torch.zeros(3)), truth)


def rows(seed, n=400, dim=4, mean=0.0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    return mean + scale * torch.randn(n, dim, generator=generator, dtype=torch.float64)


def gaussian_rows(seed, n, mean, cov):
    """Return rows whose sample mean and covariance are exactly these."""
    x = rows(seed, n, len(mean))
    x = torch.linalg.solve_triangular(torch.linalg.cholesky((x - x.mean(0)).T.cov()), (x - x.mean(0)).T, upper=False).T
    return mean + x @ torch.linalg.cholesky(cov).T


def test_frechet_distance_of_gaussians():
    from scipy.linalg import sqrtm

    factors = torch.randn(2, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    covs = factors @ factors.mT + 0.1 * torch.eye(6)
    means = rows(1, 2, 6)
    a, b = (gaussian_rows(i, n, means[i], covs[i]) for i, n in ((0, 50), (1, 90)))
    root = np.real(sqrtm((covs[0] @ covs[1]).numpy()))
    expected = float((means[0] - means[1]).square().sum() + (covs[0] + covs[1]).trace()) - 2 * np.trace(root)
    assert metrics.frechet_distance(a, b) == pytest.approx(expected, rel=1e-9)
    assert metrics.frechet_distance(a, a) == pytest.approx(0, abs=1e-9)
    # commuting covariances: |shift|^2 + sum (sd - sd')^2; fewer rows than features: only the shift is left
    assert metrics.frechet_distance(a, 2 * a - a.mean(0)) == pytest.approx(float(covs[0].trace()), rel=1e-9)
    assert metrics.frechet_distance(a[:3], a[:3] + 2) == pytest.approx(4 * 6, rel=1e-9)


def assert_standard_error(errors, values, equal):
    """Right where the laws differ, and where they are equal (the statistic is degenerate there) not too small."""
    ratio = float(errors.square().mean().sqrt() / values.std())
    assert 1 <= ratio < 1.35 if equal else abs(ratio - 1) < 0.1, ratio


def test_mmd_in_closed_form_is_unbiased_with_its_standard_error():
    """For N(0, s^2 I) and N(m, s^2 I), MMD^2 = 2 (h^2 / (h^2 + 2 s^2))^(D/2) (1 - exp(-|m|^2 / (2 (h^2 + 2 s^2))))."""
    dim, h, scale = 3, 1.5, 0.8
    total = h**2 + 2 * scale**2
    for mean in (0.0, 0.7):
        exact = 2 * (h**2 / total) ** (dim / 2) * -math.expm1(-dim * mean**2 / (2 * total))
        runs = [
            metrics.mmd(rows(2 * i, 60, dim, 0.0, scale), rows(2 * i + 1, 60, dim, mean, scale), bandwidth=h)
            for i in range(600)
        ]
        values, errors = torch.tensor(runs).T
        assert abs(values.mean() - exact) < 5 * values.std() / 600**0.5
        assert_standard_error(errors, values, equal=mean == 0)
        biased = exact + 2 / 60 * (1 - (h**2 / total) ** (dim / 2))  # what the V-statistic would give
        assert abs(values.mean() - biased) > 5 * values.std() / 600**0.5


def test_without_a_linear_part_the_error_is_that_of_independent_pairs():
    """h_ij = z_i z_j with z = +-1 in equal parts: every row has the same mean, so Var = v2 / (N (N - 1) / 2)."""
    z = torch.tensor([1.0, -1.0] * 3).double()
    value, error = u_statistic(z[:, None] * z)
    assert value == pytest.approx(-1 / 5) and error == pytest.approx(math.sqrt((1 - 1 / 25) / 15))


def test_energy_distance_in_one_dimension():
    """Twice the integral of (F - G)^2, which scipy computes from samples with its bias of the V-statistic."""
    for mean in (0.0, 0.7):
        runs = [metrics.energy_distance(rows(2 * i, 80, 1), rows(2 * i + 1, 80, 1, mean)) for i in range(400)]
        grid = torch.linspace(-12, 12, 100_001, dtype=torch.float64)
        gap = torch.special.ndtr(grid) - torch.special.ndtr(grid - mean)
        exact = 2 * float(torch.trapezoid(gap.square(), grid))
        values, errors = torch.tensor(runs).T
        assert abs(values.mean() - exact) < 5 * values.std() / 400**0.5
        assert_standard_error(errors, values, equal=mean == 0)


@pytest.mark.parametrize("distance", [metrics.mmd, metrics.energy_distance])
@pytest.mark.parametrize("conditional", [False, True])
def test_two_sample_distances_keep_their_digits_far_from_the_origin(distance, conditional):
    a, b = rows(1, 50, 3).double(), rows(2, 50, 3, 0.5).double()
    near, far = (
        distance(a + at, b + at, given=rows(3, 50, 2).double() + at if conditional else None) for at in (0.0, 1e8)
    )
    assert far == pytest.approx(near, rel=1e-6)


@pytest.mark.parametrize("distance", [metrics.mmd, metrics.energy_distance])
def test_two_sample_distances_find_a_shift_and_are_calm_without_one(distance):
    value, error = distance(rows(0), rows(1))
    assert abs(value) < 4 * error
    value, error = distance(rows(0), rows(1, mean=0.5))
    assert value > 6 * error
    with pytest.raises(ValueError, match="one size"):
        distance(rows(0), rows(1, 399))


@pytest.mark.parametrize("distance", [metrics.mmd, metrics.energy_distance])
def test_conditional_distances_see_a_sampler_that_ignores_the_measurement(distance):
    y = rows(0, dim=2)
    truth, right = (y + 0.5 * rows(i, dim=2) for i in (1, 2))
    shuffled = right.roll(1, 0)  # the right marginal, for the wrong measurement
    for samples in (right, shuffled):
        value, error = distance(samples, truth)
        assert abs(value) < 4 * error
    value, error = distance(right, truth, given=y)
    assert abs(value) < 4 * error
    value, error = distance(shuffled, truth, given=y)
    assert value > 6 * error


def test_sliced_wasserstein_of_gaussians():
    """Equal covariances: the root of E (u . m)^2 = |m| / sqrt(D); scaled: |s - 1| times the length of the projection."""
    a = rows(0, 300, 5)
    m = torch.tensor([3.0, 0, 0, 0, 0], dtype=torch.float64)
    assert metrics.sliced_wasserstein(a, a + m, 4000) == pytest.approx(3 / 5**0.5, rel=0.03)
    assert metrics.sliced_wasserstein(a, a) == 0
    exact = gaussian_rows(0, 500, torch.zeros(5).double(), torch.eye(5).double())
    assert metrics.sliced_wasserstein(exact, 1.5 * exact, 100) == pytest.approx(0.5 * (499 / 500) ** 0.5, rel=1e-9)
    other = metrics.sliced_wasserstein(a, rows(1, 200, 5, mean=0.5))  # sets of different sizes
    assert other == pytest.approx(0.5, abs=0.15)
    assert metrics.sliced_wasserstein(a, a + m, 4, seed=1) != metrics.sliced_wasserstein(a, a + m, 4)


def test_distances_say_no():
    for bad in (rows(0)[:, 0], rows(0, dim=3), rows(0) * math.nan):
        for distance in (metrics.frechet_distance, metrics.mmd, metrics.sliced_wasserstein):
            with pytest.raises(ValueError, match=r"sets|NaN"):
                distance(bad, rows(1))
    with pytest.raises(ValueError, match="bandwidth"):
        metrics.mmd(rows(0), torch.zeros(400, 4).double())
    with pytest.raises(ValueError, match="given"):
        metrics.mmd(rows(0), rows(1), given=rows(2, 3))


def test_patches():
    images = torch.arange(2 * 1 * 5 * 7.0).reshape(2, 1, 5, 7)
    found = metrics.patches(images, 2)
    assert found.shape == (12, 1, 2, 2)
    assert torch.equal(found[1], images[0, :, :2, 2:4]) and torch.equal(found[-1], images[1, :, 2:4, 4:6])
    assert metrics.patches(images, 2, 1).shape == (2 * 4 * 6, 1, 2, 2)
    with pytest.raises(ValueError, match="do not fit"):
        metrics.patches(images, 6)


@pytest.fixture
def mobilenet_file(tmp_path):
    """Random weights of torchvision's own network under the names of the file."""
    from torchvision.models import mobilenet_v2

    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = mobilenet_v2(weights=None).eval()
    state = {f"features.{name}": value for name, value in network.features.state_dict().items()}
    save_file(state, tmp_path / "net.safetensors")
    return tmp_path / "net.safetensors", network


def test_mobilenet_features(mobilenet_file):
    path, network = mobilenet_file
    before = torch.get_rng_state()
    net = metrics.mobilenet(path)
    assert torch.equal(before, torch.get_rng_state()) and "MobileNetV2" in net.name
    images = torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    mean, std = (torch.tensor(v).reshape(3, 1, 1) for v in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    network.classifier = torch.nn.Identity()
    with torch.no_grad():
        want = network((images - mean) / std)
    assert float((net(images) - want).norm() / want.norm()) < 1e-4  # random weights make them as small as 1e-9
    assert torch.equal(net(images).isnan().any(), torch.tensor(False)) and net(images).shape == (3, 1280)
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        net(2 * images - 1)
    state = load_file(path)
    state.pop("features.0.0.weight")
    save_file(state, path.with_name("short.safetensors"))
    with pytest.raises(ValueError, match="does not fit"):
        metrics.mobilenet(path.with_name("short.safetensors"))
    with pytest.raises(ValueError, match="safetensors"):
        metrics.mobilenet(path.with_name("none.safetensors"))


def test_inception_needs_its_weights(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(metrics.Missing, match="mobilenet"):
        metrics.inception()
    with pytest.raises(ValueError, match="do not exist"):
        metrics.inception(tmp_path / "none.pth")


def test_inception_features(tmp_path):
    module = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
    kind = module.FeatureExtractorInceptionV3
    saved = tmp_path / "weights.pth"
    saved.write_text("no")
    with pytest.raises(ValueError, match="does not fit"):
        metrics.inception(saved)
    with pytest.MonkeyPatch.context() as patch, torch.random.fork_rng():
        torch.manual_seed(0)
        patch.setattr(kind, "load_state_dict", lambda self, state: None)
        patch.setattr(module, "load_state_dict_from_url", lambda *args, **kwargs: {})
        random = kind("random", ["2048"])
    torch.save(random.state_dict(), saved)
    net = metrics.inception(saved)
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert net(images).shape == (2, 2048)
    assert torch.equal(net(images), random((images * 255).round().to(torch.uint8))[0])
