"""Samples written one after the other: the same file and the same statistics as those in memory."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import fewstep.store as module
from fewstep.core.counts import Counts
from fewstep.core.samples import Samples
from fewstep.outputs import std_map
from fewstep.store import SampleStore
from fewstep.uncertainty import Calibration

X = torch.randn(5, 1, 3, 7, 6, generator=torch.Generator().manual_seed(0))


def parts(x=X):
    for k in range(len(x)):
        yield Samples(x[k : k + 1], Counts(3, 2, 1), 0.5, "Method(steps=3)", (7,), k)


def write(folder, dtype=torch.float32):
    with SampleStore(folder, X.shape[1:], dtype) as store:
        for part in parts():
            store.append(part)
        return store.summary(lambda x: x, 0.6)


def test_file_is_that_of_samples(tmp_path):
    write(tmp_path)
    samples = Samples.load(tmp_path)
    assert torch.equal(samples.x, X) and samples.counts == Counts(3, 2, 1)
    assert samples.method == "Method(steps=3)" and samples.seeds == (7,) and samples.seconds == 2.5
    assert [p.name for p in tmp_path.iterdir()] == ["samples.safetensors"]


@pytest.mark.parametrize("strip", [1, 30, 1 << 20])
def test_statistics_in_strips(tmp_path, monkeypatch, strip):
    monkeypatch.setattr(module, "_STRIP", strip)
    summary, whole = write(tmp_path), Samples(X, Counts(), 0.0, "", (0,))
    assert torch.allclose(summary.mean, whole.mean) and torch.allclose(summary.std, whole.std)
    lower, upper = whole.interval(0.6)
    assert torch.allclose(summary.lower, lower) and torch.allclose(summary.upper, upper)


def test_half_precision(tmp_path):
    assert torch.allclose(write(tmp_path, torch.float16).mean, X.mean(0), atol=2e-3)
    found = Samples.load(tmp_path)
    assert torch.equal(found.x, X.half())
    single = replace(found, x=found.x.float())
    for name in ("mean", "std"):
        assert torch.equal(getattr(found, name), getattr(single, name))
    assert all(map(torch.equal, found.interval(0.5), single.interval(0.5)))
    assert torch.equal(replace(found, antithetic=True).std, replace(single, antithetic=True).std)


@pytest.mark.parametrize(("error", "kept"), [(KeyboardInterrupt, True), (OSError, False)])
def test_interruption_keeps_and_failure_leaves_nothing(tmp_path, error, kept):
    with pytest.raises(error), SampleStore(tmp_path, X.shape[1:]) as store:
        store.append(next(parts()))
        raise error
    assert [p.name for p in tmp_path.iterdir()] == (["samples.safetensors"] if kept else [])
    if kept:
        assert torch.equal(Samples.load(tmp_path).x, X[:1])


def test_settings_of_any_length_are_kept_and_costs_are_averaged(tmp_path):
    method = "DDIM(grid=(" + ", ".join(str(k / 7) for k in range(900)) + "))"
    with SampleStore(tmp_path, X.shape[1:]) as store:
        for k, part in enumerate(parts()):
            store.append(Samples(part.x, Counts(3 + k, 0, 0), 0.5, method, (7,), k))
    samples = Samples.load(tmp_path)
    assert torch.equal(samples.x, X) and samples.method == method and samples.counts == Counts(5, 0, 0)


def test_nothing_written_is_no_file(tmp_path):
    with SampleStore(tmp_path, X.shape[1:]):
        pass
    assert not list(tmp_path.iterdir())


def test_calibrated_ends_are_stretched_before_they_are_clipped(tmp_path):
    calibration = Calibration(0.9, 2.0, 3, 20, floor=0.1)
    with SampleStore(tmp_path, (1, 3, 2, 2)) as store:
        store.append(Samples(torch.full((3, 1, 3, 2, 2), 0.9), Counts(), 0.0, "", (0,)))
        found = store.summary(lambda x: ((x + 1) / 2).clamp(0, 1), 0.9, calibration)
    torch.testing.assert_close(found.lower, torch.full_like(found.lower, 0.85))  # of 0.7 and 1.1 in [-1, 1]
    torch.testing.assert_close(found.upper, torch.ones_like(found.upper))


def test_the_map_of_spread_is_the_root_of_the_mean_square_over_channels():
    std = torch.tensor([0.0, 0.0, 3.0]).reshape(1, 3, 1, 1)
    assert float(std_map(module.Summary(torch.zeros(1, 3, 1, 1), std))) == pytest.approx(3**0.5)
