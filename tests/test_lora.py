"""LoRA on the denoiser: the start, what is trained, merging, adapters and samplers on disk."""

import json
from dataclasses import replace

import pytest
import torch
from torch import nn

import fewstep
from fewstep.compat import prepare_torchvision
from fewstep.core.noise import Noise
from fewstep.core.problem import Posterior
from fewstep.core.together import Together
from fewstep.operators.image import from_unit
from fewstep.operators.words import get_operator
from fewstep.priors.unet import UNetConfig, UNetDenoiser
from fewstep.unfolded.decoders import AdaptedDecoder, ContextDecoder
from fewstep.unfolded.levels import LevelConfig
from fewstep.unfolded.lora import LoRAConfig, add_lora, merge
from fewstep.unfolded.network import UnfoldedConfig, UnfoldedNetwork
from fewstep.unfolded.sampler import Unfolded
from fewstep.unfolded.store import load_network, prior_hash, save_adapter, save_network

prepare_torchvision()
pytest.importorskip("peft")

TINY = UNetConfig(widths=(8, 8), layers=1, groups=4)
CONFIG = UnfoldedConfig(LevelConfig(2), end=0.5)
LORA = LoRAConfig(4, 6.0)
KINDS = [AdaptedDecoder, ContextDecoder]


def fill(module, std, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for p in module.parameters() if isinstance(module, nn.Module) else module:
        p.data = p.data + std * torch.randn(p.shape, generator=generator)


@pytest.fixture(scope="module")
def prior():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        prior = UNetDenoiser(TINY).eval()
    fill(prior.net.conv_out, 0.1)
    for p in prior.parameters():
        p.data = p.data.half().float()
    return prior.requires_grad_(False)


@pytest.fixture(scope="module")
def problem(prior):
    x = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    operators = [get_operator("denoise")(), get_operator("inpaint-random")()]
    parts = [op.likelihood(op.simulate(x[b : b + 1], 0.05), 0.05) for b, op in enumerate(operators)]
    return Posterior(prior, Together(parts)), from_unit(x)


def network(prior, kind=AdaptedDecoder, lora=LORA, trained=0.0):
    with torch.random.fork_rng():
        torch.manual_seed(1)
        out = UnfoldedNetwork(CONFIG, kind(prior.with_context(kind.IMAGES), lora))
    fill([p for p in out.parameters() if p.requires_grad], trained)
    return out


def draw(network, problem):
    return Unfolded(network.eval(), steps=2)(problem[0], 2, seed=0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rank", [0, 4])
def test_the_start_is_the_prior(prior, problem, kind, rank):
    plain = UnfoldedNetwork(CONFIG, AdaptedDecoder(prior))
    torch.testing.assert_close(draw(network(prior, kind, LoRAConfig(rank)), problem).x, draw(plain, problem).x)


@pytest.mark.parametrize("kind", KINDS)
def test_only_the_additions_are_trained_and_all_of_them_change(prior, problem, kind):
    """Behind the zeros of B nothing reaches A in the first step, so each must have changed after two."""
    net = network(prior, kind)
    start = {name: p.detach().clone() for name, p in net.named_parameters()}
    trainable = {name for name, p in net.named_parameters() if p.requires_grad}
    whole = {f"decoder.denoiser.net.conv_in.{part}" for part in ("weight", "bias")} if kind.whole else set()
    expected = {n for n in start if ".lora_" in n or not n.startswith("decoder.")} | whole
    assert trainable == expected
    convolutions = [m for m in prior.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    assert sum(".lora_A" in n for n in trainable) == len(convolutions) - bool(kind.whole)
    optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=1e-2, weight_decay=0)
    x_t = problem[1]
    for step in range(2):
        optimizer.zero_grad()
        net(problem[0], x_t, torch.tensor(0.5), Noise([step, step + 1])).square().sum().backward()
        reached = {n for n, p in net.named_parameters() if p.grad is not None and float(p.grad.abs().max()) > 0}
        assert step == 0 or reached == trainable
        assert step == 1 or not {n for n in reached if ".lora_A" in n}
        optimizer.step()
    changed = {name for name, p in net.named_parameters() if not torch.equal(p, start[name])}
    assert changed == trainable


@pytest.mark.parametrize("kind", KINDS)
def test_merging_changes_neither_the_output_nor_the_calls(prior, problem, kind):
    net = network(prior, kind, trained=0.1)
    plain = UnfoldedNetwork(CONFIG, kind(prior.with_context(kind.IMAGES)))
    weights = {f"decoder.denoiser.{k}": v for k, v in net.decoder.plain().items()}
    own = {k: v for k, v in net.state_dict().items() if not k.startswith("decoder.")}
    plain.load_state_dict({**own, **weights}, strict=True)
    one, two = draw(net, problem), draw(plain, problem)
    assert not torch.allclose(one.x, draw(network(prior, kind), problem).x, atol=1e-2)
    torch.testing.assert_close(one.x, two.x, rtol=0, atol=1e-5)
    assert one.nfe == two.nfe == 4
    wrong = merge(net.decoder.denoiser.state_dict(), LoRAConfig(4, 4.0))  # a planted wrong scale
    plain.decoder.denoiser.load_state_dict(wrong)
    assert not torch.allclose(draw(plain, problem).x, one.x, atol=1e-3)


def test_merging_agrees_with_peft(prior):
    from peft.tuners.tuners_utils import BaseTunerLayer

    net = network(prior, trained=0.1).decoder
    expected = net.plain()
    for name, layer in net.denoiser.named_modules():
        if isinstance(layer, BaseTunerLayer):
            layer.merge()
            torch.testing.assert_close(expected[f"{name}.weight"], layer.get_base_layer().weight, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_and_the_merged_network_are_the_same_sampler(prior, problem, kind, tmp_path):
    net = network(prior, kind, trained=0.1)
    for p in net.parameters():
        p.data = p.data.half().float()
    said = {"licence": "Apache-2.0", "command": "fewstep train x", "data": "three cats"}
    facts = {"prior": str(tmp_path / "prior"), **said}
    prior.save(tmp_path / "prior")
    save_adapter(net, prior, tmp_path / "adapter", facts)
    save_network(net, tmp_path / "net")
    expected = draw(net, problem)
    by_name = fewstep.load_sampler(tmp_path / "adapter", 2)
    given = fewstep.load_sampler(tmp_path / "adapter", 2, prior=prior)
    for sampler in (by_name, given):
        found = sampler(problem[0], 2, seed=0)
        torch.testing.assert_close(found.x, expected.x, rtol=0, atol=1e-5)
        assert found.nfe == expected.nfe
        assert not any(".lora_" in name for name in sampler.network.state_dict())
    whole = fewstep.load_sampler(tmp_path / "net", 2)(problem[0], 2, seed=0).x
    assert float((whole - expected.x).abs().max()) < 0.02  # merged weights are rounded to half precision
    header = json.loads((tmp_path / "adapter/config.json").read_text())
    assert header["prior_sha256"] == json.loads((tmp_path / "prior/config.json").read_text())["sha256"]
    assert header["lora"] == {"rank": 4, "alpha": 6.0}
    trainable = sum(p.numel() for p in net.parameters() if p.requires_grad)
    assert header["parameters"] == trainable
    card = (tmp_path / "adapter/README.md").read_text()
    for fact in (*said.values(), header["sha256"], header["prior_sha256"]):
        assert fact in card


def test_an_adapter_refuses_another_prior(prior, tmp_path):
    prior.save(tmp_path / "prior")
    save_adapter(network(prior), prior, tmp_path / "adapter", {"prior": str(tmp_path / "prior")})
    other = UNetDenoiser(TINY)
    assert prior_hash(other) != prior_hash(prior)
    with pytest.raises(ValueError, match="with other weights"):
        fewstep.load_sampler(tmp_path / "adapter", prior=other)
    other.save(tmp_path / "prior")
    with pytest.raises(ValueError, match="with other weights"):
        fewstep.load_sampler(tmp_path / "adapter")


def test_the_shipped_prior_knows_its_hash():
    natural = fewstep.load_prior("natural")
    header = json.loads((fewstep.priors.loaders.WEIGHTS / "natural/config.json").read_text())
    assert prior_hash(natural) == header["sha256"]


def test_what_is_refused(prior, tmp_path):
    for wrong in ({"rank": -1}, {"alpha": 0.0}):
        with pytest.raises(ValueError, match=r"(rank|alpha) must be"):
            LoRAConfig(**wrong)
    with pytest.raises(ValueError, match=r"no module net\.conv_un"):
        add_lora(UNetDenoiser(TINY), LORA, ("net.conv_un",))
    with pytest.raises(ValueError, match="no adapter"):
        save_adapter(network(prior, lora=None), prior, tmp_path)
    with pytest.raises(ValueError, match="no trained sampler"):
        fewstep.load_sampler("nothing-of-the-kind")
    save_network(network(prior), tmp_path / "net")
    with pytest.raises(ValueError, match="unexpected keyword"):
        fewstep.load_sampler(tmp_path / "net", guidance=3)
    save_adapter(network(prior), prior, tmp_path / "adapter")
    header = json.loads((tmp_path / "adapter/config.json").read_text())
    (tmp_path / "adapter/config.json").write_text(json.dumps({**header, "decoder": "ContextDecoder"}))
    with pytest.raises(ValueError, match="do not fit"):
        load_network(tmp_path / "adapter", prior)


def test_a_header_says_how_its_sampler_steps(prior, tmp_path):
    trained = network(prior, lora=None, trained=0.05)
    save_network(trained, tmp_path / "net", {"outer": {"eta": 0.0, "grid": [1.0, 0.2, 0.0]}})
    sampler = fewstep.load_sampler(tmp_path / "net", 2)
    assert (sampler.eta, sampler.kernel, sampler.grid) == (0.0, "bridge", (1.0, 0.2, 0.0))
    other = fewstep.load_sampler(tmp_path / "net", 2, eta=0.5, grid="quadratic")
    assert (other.eta, other.grid) == (0.5, "quadratic")
    assert "**Outer steps**: eta 0.0, grid [1.0, 0.2, 0.0]" in (tmp_path / "net/README.md").read_text()
    fewstep.save_sampler(sampler, tmp_path / "again")
    assert fewstep.load_sampler(tmp_path / "again", 2).grid == sampler.grid
    with torch.no_grad():
        next(other.network.parameters()).add_(1.0)
    fewstep.save_sampler(replace(other, eta=0.25), tmp_path / "trained")  # other weights step as they were told
    trained_on = fewstep.load_sampler(tmp_path / "trained", 2)
    assert (trained_on.eta, trained_on.grid) == (0.25, "quadratic")
    save_network(trained, tmp_path / "net", {"outer": {"steps": 2}})
    with pytest.raises(ValueError, match="outer steps have eta, kernel and grid, not steps"):
        fewstep.load_sampler(tmp_path / "net")


def test_the_shipped_sampler_steps_as_its_preset():
    sampler, preset = fewstep.load_sampler("natural-general"), fewstep.get("ud2m").preset("photo")
    assert all(getattr(sampler, name) == getattr(preset, name) for name in ("steps", "eta", "kernel", "grid"))


def test_what_is_loaded_and_saved_again_keeps_its_card_and_calibrations(prior, tmp_path):
    facts = {"prior": "natural", "data": "40 photographs", "licence": "MIT", "command": "fewstep train"}
    save_network(network(prior, lora=None, trained=0.05), tmp_path / "net", facts)
    (tmp_path / "net/calibration.json").write_text("{}")
    sampler = fewstep.load_sampler(tmp_path / "net", 2)
    fewstep.save_sampler(sampler, tmp_path / "again", licence="CC0")
    before, after = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("net", "again"))
    assert after == {**before, "licence": "CC0"} and (tmp_path / "again/calibration.json").read_text() == "{}"
    with torch.no_grad():
        next(sampler.network.parameters()).add_(1.0)
    fewstep.save_sampler(sampler, tmp_path / "other")  # other weights: nothing that was known holds of them
    header = json.loads((tmp_path / "other/config.json").read_text())
    assert "data" not in header and not (tmp_path / "other/calibration.json").exists()
    assert str(tmp_path / "net") in repr(sampler) and "Conv2d" not in repr(sampler)
    with pytest.raises(TypeError, match="DiffPIR has no network"):
        fewstep.save_sampler(fewstep.get("diffpir")(), tmp_path / "none")


def test_a_sampler_that_is_saved_where_it_was_loaded_keeps_its_card(prior, tmp_path):
    save_network(network(prior, lora=None, trained=0.05), tmp_path, {"prior": "natural", "licence": "MIT"})
    (tmp_path / "calibration.json").write_text("{}")
    before = json.loads((tmp_path / "config.json").read_text())
    fewstep.save_sampler(fewstep.load_sampler(tmp_path, 2), tmp_path, data="40 photographs")
    assert json.loads((tmp_path / "config.json").read_text()) == {**before, "data": "40 photographs"}
    assert "license: MIT" in (tmp_path / "README.md").read_text() and (tmp_path / "calibration.json").is_file()


def test_an_adapter_that_is_saved_as_a_whole_keeps_its_facts(prior, tmp_path):
    prior.save(tmp_path / "prior")
    facts = {"prior": str(tmp_path / "prior"), "licence": "MIT", "steps": 7}
    save_adapter(network(prior, trained=0.05), prior, tmp_path / "adapter", facts)
    (tmp_path / "adapter/calibration.json").write_text("{}")
    sampler = fewstep.load_sampler(tmp_path / "adapter", 2)
    fewstep.save_sampler(sampler, tmp_path / "whole")
    header = json.loads((tmp_path / "whole/config.json").read_text())
    assert {name: header.get(name) for name in facts} == facts
    assert "7 were done" in (tmp_path / "whole/README.md").read_text()
    assert not (tmp_path / "whole/calibration.json").exists()  # it goes by the hash of the adapter
    with torch.no_grad():
        next(sampler.network.parameters()).add_(1.0)
    fewstep.save_sampler(sampler, tmp_path / "other")
    assert "licence" not in json.loads((tmp_path / "other/config.json").read_text())


def test_the_card_counts_the_calls_of_the_start(prior, tmp_path):
    for start, calls in (("gaussian", 2), ("ram", 3)):
        net = UnfoldedNetwork(UnfoldedConfig(LevelConfig(2), start), AdaptedDecoder(prior.with_context(0)))
        save_network(net, tmp_path / start)
        assert f" {calls} network calls per outer step" in (tmp_path / start / "README.md").read_text()
        assert net.calls == calls


def test_images_of_other_channels_are_refused(prior, problem):
    net = network(prior, lora=None, trained=0.05)
    grey = get_operator("denoise")().likelihood(torch.rand(1, 1, 16, 16), 0.05)
    with pytest.raises(ValueError, match="trained on images of 3 channels, not of 1"):
        Unfolded(net, steps=1).check(fewstep.Posterior(prior, grey))


def test_samplers_come_from_the_hub_by_id_only(prior, problem, tmp_path, monkeypatch):
    hub = pytest.importorskip("huggingface_hub")
    net = network(prior, lora=None, trained=0.05)
    fewstep.save_sampler(Unfolded(net), tmp_path / "net", licence="MIT")
    assert "license: MIT" in (tmp_path / "net/README.md").read_text()
    asked = []

    def snapshot(name, allow_patterns):
        asked.append((name, tuple(allow_patterns)))
        return str(tmp_path / "net")

    monkeypatch.setattr(hub, "snapshot_download", snapshot)
    sampler = fewstep.load_sampler("owner/name", 2, kernel="bridge")
    assert asked == [("owner/name", ("model.safetensors", "config.json", "README.md", "calibration.json"))]
    assert sampler(problem[0], 1).nfe == 4
    with pytest.raises(ValueError, match="no trained sampler"):
        fewstep.load_sampler("./owner/name")
    assert len(asked) == 1


def test_an_adapter_of_the_shipped_prior_is_small(tmp_path):
    natural = fewstep.load_prior("natural")
    net = UnfoldedNetwork(UnfoldedConfig(), ContextDecoder(natural.with_context(3), LoRAConfig(16)))
    save_adapter(net, natural, tmp_path, {"prior": "natural"})
    size = (tmp_path / "model.safetensors").stat().st_size
    assert size < 3e6 < 4 * size
