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
    monkeypatch.setattr(metrics, "_STRIP", 500)
    assert metrics.ssim(X, Y)[0] == pytest.approx(whole, abs=1e-6)


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
    metrics._build.cache_clear()
    value, reason = metrics.lpips(X, Y)
    assert value is None and "--lpips-weights" in reason
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
