"""Agreement with diffusers' schedulers on equal grids in single precision, and what the benchmark says of the cost."""

from dataclasses import replace

import pytest
import torch

from fewstep.bench import schedulers
from fewstep.bench.schedulers import PAIRS, difference, ipndm_difference
from fewstep.priors.exact import GaussianPrior

pytest.importorskip("diffusers")
STEPS = 10


@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: pair.title)
def test_both_make_the_same_samples(pair):
    assert difference(pair, STEPS) < 3e-5  # rounding in single precision, which differs between processors


@pytest.mark.parametrize("pair", [pair for pair in PAIRS if {"terms": 1} != pair.settings], ids=lambda pair: pair.title)
def test_another_setting_is_told_apart(pair):
    """The exact terms for the released ones, a polynomial in another variable, fresh noise, another number of terms."""
    other = {"ddim": {"eta": 0.1}, "dpmpp": {"released": False}, "dpmpp_sde": {"terms": 1}, "deis": {"variable": "rho"}}
    wrong = replace(pair, settings={**pair.settings, **other[pair.solver]})
    assert (difference(wrong, STEPS) > 1e-4) == (pair.settings.get("order") != 1)  # one prediction has no polynomial


def test_ipndm():
    assert ipndm_difference(STEPS) < 1e-5


def test_schedulers_benchmark(tmp_path):
    prior = GaussianPrior(torch.zeros(1, 8, 8), torch.tensor(0.25))
    report = schedulers.main(tmp_path / "s.json", prior=prior, steps=4, items=2, repeats=1)
    *rows, last = report.tables["Beside diffusers"]
    assert len(rows) == len(PAIRS) and all(row["difference"] < 1e-4 for row in (*rows, last))
    assert all(row["over diffusers"] > 0 and row["bare seconds"] > 0 for row in rows)
