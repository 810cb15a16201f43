import json

import pytest
import torch

from fewstep.core.schedule import Cosine
from fewstep.priors.unet import UNetConfig, UNetDenoiser, pad_to_multiple

TINY = UNetConfig(widths=(8, 16), layers=1, groups=4)


@pytest.fixture(scope="module")
def model():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = UNetDenoiser(TINY).eval().requires_grad_(False)
        for p in model.parameters():  # the last layer starts at zero, which would hide everything
            p.add_(0.05 * torch.randn_like(p))
    return model


def noisy(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_default_network_has_the_documented_size():
    assert sum(p.numel() for p in UNetDenoiser().parameters()) == 6_561_740


def test_fresh_network_is_the_linear_part_alone():
    fresh = UNetDenoiser(TINY).eval()
    x, t = noisy(2, 3, 16, 16), torch.tensor([0.2, 0.7])
    alpha, _ = fresh.schedule(t)
    skip = 0.25 / (fresh.schedule.ratio(t) ** 2 + 0.25)
    expected = (skip / alpha).reshape(-1, 1, 1, 1) * x
    torch.testing.assert_close(fresh(x, t), expected)


def test_preconditioning_is_that_of_edm(model):
    x, t = noisy(1, 3, 16, 16), torch.tensor(0.4)
    alpha, r = model.schedule(t)[0], model.schedule.ratio(t)
    hidden = torch.nn.functional.pixel_unshuffle(x / alpha / (r**2 + 0.25).sqrt(), 2)
    out = torch.nn.functional.pixel_shuffle(model.net(hidden, 100 * r.log()).sample, 2)
    expected = 0.25 / (r**2 + 0.25) * x / alpha + 0.5 * r / (r**2 + 0.25).sqrt() * out
    torch.testing.assert_close(model(x, t), expected)


@pytest.mark.parametrize("size", [(16, 16), (17, 23), (5, 40), (1, 1), (3, 2)])
def test_any_size_goes_in_and_comes_out(model, size):
    x = noisy(2, 3, *size)
    out = model(x, torch.tensor(0.3))
    assert out.shape == x.shape
    assert out.isfinite().all()


def test_padding_mirrors_and_repeats_only_where_too_small():
    x = torch.arange(6.0).reshape(1, 1, 1, 6)
    assert pad_to_multiple(x, 1) is x
    assert pad_to_multiple(x.expand(1, 1, 6, 6), 4)[0, 0, 0].tolist() == [0, 1, 2, 3, 4, 5, 4, 3]
    assert pad_to_multiple(x, 8)[0, 0, 0].tolist() == [0, 1, 2, 3, 4, 5, 5, 5]


def test_without_noise_the_result_is_the_image(model):
    x = noisy(2, 3, 16, 16)
    assert torch.equal(model(x, torch.tensor(0.0)), x)
    assert torch.equal(model(x, torch.tensor([0.0, 0.5]))[0], x[0])


@pytest.mark.parametrize("t", [1e-6, 1e-3, 1.0])
def test_ends_of_time_are_finite(model, t):
    x = noisy(1, 3, 16, 16).requires_grad_()
    out = model(x, torch.tensor(t))
    assert out.isfinite().all()
    assert torch.autograd.grad(out.sum(), x)[0].isfinite().all()


def test_alone_equals_in_batch_with_a_time_per_item(model):
    x, t = noisy(3, 3, 20, 28), torch.tensor([0.1, 0.5, 0.9])
    together = model(x, t)
    for n in range(3):
        torch.testing.assert_close(model(x[n : n + 1], t[n]), together[n : n + 1], rtol=0, atol=1e-5)


def test_double_precision_goes_in_and_comes_out(model):
    assert model(noisy(1, 3, 8, 8).double(), torch.tensor(0.5)).dtype == torch.float64


def test_conditions_and_wrong_shapes_are_refused(model):
    with pytest.raises(TypeError, match="no condition"):
        model(noisy(1, 3, 8, 8), torch.tensor(0.5), label=1)
    with pytest.raises(ValueError, match="expected"):
        model(noisy(1, 1, 8, 8), torch.tensor(0.5))


def test_save_and_load_round_trip(model, tmp_path):
    model.save(tmp_path / "prior")
    again = UNetDenoiser.load(tmp_path / "prior")
    assert again.config == model.config
    assert again.schedule == model.schedule
    assert not again.training
    for a, b in zip(again.parameters(), model.parameters(), strict=True):
        assert a.dtype == torch.float32
        assert torch.equal(a, b.half().float())
    x, t = noisy(1, 3, 16, 16), torch.tensor(0.5)
    torch.testing.assert_close(again(x, t), model(x, t), rtol=0, atol=2e-2)
    assert sorted(p.name for p in (tmp_path / "prior").iterdir()) == ["config.json", "model.safetensors"]


def test_schedule_is_saved_too(tmp_path):
    UNetDenoiser(TINY, Cosine(ratio_max=99.0)).save(tmp_path)
    assert UNetDenoiser.load(tmp_path).schedule == Cosine(ratio_max=99.0)


def edit(folder, **changes):
    path = folder / "config.json"
    header = json.loads(path.read_text())
    header.update(changes)
    path.write_text(json.dumps(header))


def test_damage_is_reported_in_one_line(model, tmp_path):
    model.save(tmp_path)
    weights = tmp_path / "model.safetensors"
    data = weights.read_bytes()
    header = (tmp_path / "config.json").read_text()

    def fails(match):
        with pytest.raises(ValueError, match=match) as caught:
            UNetDenoiser.load(tmp_path)
        assert "\n" not in str(caught.value)
        weights.write_bytes(data)
        (tmp_path / "config.json").write_text(header)

    weights.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    fails("hash")
    weights.write_bytes(data[: len(data) // 2])
    fails("hash")
    weights.unlink()
    fails("cannot be read")
    (tmp_path / "config.json").write_text("{")
    fails("JSON")
    (tmp_path / "config.json").unlink()
    fails("missing")
    edit(tmp_path, method="Other")
    fails("Other")
    edit(tmp_path, tensors=1)
    fails("tensors")
    edit(tmp_path, fields={**json.loads(header)["fields"], "widths": [8, 24]})
    fails("do not fit")
    edit(tmp_path, fields={**json.loads(header)["fields"], "depth": 3})
    fails("does not describe")
    edit(tmp_path, fields={"layers": 1})
    fails("missing fields")
    edit(tmp_path, schedule={"name": "Tensor"})
    fails("unknown schedule")


@pytest.mark.parametrize(
    "wrong", [{"widths": (10,)}, {"widths": ()}, {"widths": (8.0,)}, {"layers": 0}, {"groups": 0}, {"sigma_data": 0.0}]
)
def test_impossible_configurations_are_refused(wrong):
    with pytest.raises(ValueError, match=r"must be (positive|a whole number)"):
        UNetConfig(**{"groups": 4, **wrong})
