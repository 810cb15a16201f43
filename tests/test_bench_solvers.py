"""The benchmarks of solvers at a tiny size, and what they say where that is known."""

from functools import partial
from types import SimpleNamespace

import pytest
import torch

from fewstep.bench import common, few_calls, grounds, rejection, solvers, srds
from fewstep.bench.log import Log
from fewstep.core.noise import Noise
from fewstep.priors.exact import GaussianPrior
from fewstep.solvers.ddim import DDIM
from fewstep.solvers.srds import SRDS
from fewstep.tuning.ggdm import GGDM


def test_solver_variants_keep_their_budget():
    for variant in common.variants(None, [10], kind="solvers"):
        assert 0 < variant.sampler.nfe <= 10
    with pytest.raises(ValueError, match="unknown method"):
        list(common.variants(["ddim"]))


def test_solvers_benchmark(tmp_path):
    report = solvers.main(
        tmp_path / "s.json",
        solvers=["ddim", "deis", "srds"],
        budgets=(4, 10),
        dims=(2,),
        num_samples=200,
        tuners=(),
        known=32,
        rejected=(6,),
    )
    tables = {title.removeprefix("Mixture, 2 dimensions: "): rows for title, rows in report.tables.items()}
    assert len(tables) == 7 and (tmp_path / "s.json").exists()
    errors = {(r["method"], r["preset"]): r for r in tables["error"]}
    assert (
        errors["deis", "paper"]["10 calls"] < errors["ddim", "paper"]["10 calls"] < errors["ddim", "paper"]["4 calls"]
    )
    assert errors["ddim", "ancestral"]["10 calls"] is None and "4 calls" not in errors["srds", "paper"]
    assert 0 < errors["dpm_v3", "with statistics, order 3"]["10 calls"] < errors["ddim", "paper"]["10 calls"]
    assert tables["floors"][0]["error"] == 0 and 0.3 < tables["floors"][0]["SW/floor"] < 3
    guided = {(r["method"], r["steps"]): r for r in tables["Guidance on a Gaussian posterior, 5 dimensions"]}
    deis, plain = guided["mmps under deis", 10], guided["mmps", 50]
    assert min(plain["variance ratio min"], 1) < deis["variance ratio min"] and deis["nfe"] == 10
    rules = {(r["rule"], r["step"]): r for r in list(tables.values())[-1]}
    fresh = rules["fresh", "exact step"]
    assert abs(fresh["left"] - rejection.DATA) < 4 * fresh["left ±"]
    assert rules["backstep, quantile 0.5", "exact step"]["left"] > 0.4


def test_tuned_rows_are_held_against_the_best_untuned_one_and_resumed(tmp_path, monkeypatch):
    monkeypatch.setitem(few_calls.TUNERS, "ggdm", GGDM(rounds=15, items=24, bank=48, fine=40))
    given = {
        "solvers": ["ddim", "dpmpp"],
        "budgets": (5,),
        "tuners": ("ggdm",),
        "known": 0,
        "guided": 0,
        "rejected": (),
    }
    given |= {"dims": (2,), "num_samples": 100}
    first = solvers.main(tmp_path / "s.json", **given)
    (row,) = first.tables["Mixture, 2 dimensions: tuned"]
    assert row["solver"] == "dpmpp" and row["best untuned"].startswith("dpmpp ") and row["gain"] > 4 * row["gain ±"]
    assert row["gain"] == pytest.approx(row["its mean error"] - row["mean error"], abs=1e-6)
    with pytest.raises(ValueError, match="times that can be tuned"):
        solvers.main(**{**given, "solvers": ["srds"], "budgets": (5, 10), "tuned": (10,)})
    with pytest.raises(ValueError, match=r"\[3\] are not among the budgets"):
        solvers.main(**{**given, "tuned": (3,)})
    monkeypatch.setattr(grounds.Ground, "figures", lambda *_: pytest.fail("run twice"))
    assert solvers.main(tmp_path / "s.json", **given).tables == first.tables


def test_runs_that_failed_are_made_anew(tmp_path, monkeypatch):
    given = {"solvers": ["ddim"], "budgets": (5,), "tuners": (), "known": 0, "guided": 0, "rejected": ()}
    run = partial(solvers.main, tmp_path / "s.json", dims=(2,), num_samples=20, **given)
    whole, samples = grounds.Ground.samples, []

    def short_of_memory(*_):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(grounds.Ground, "samples", short_of_memory)
    assert not any("SW/floor" in title for title in run().tables)
    monkeypatch.setattr(grounds.Ground, "samples", lambda *a: samples.append(1) or whole(*a))
    assert run().tables["Mixture, 2 dimensions: SW/floor"][0]["5 calls"] > 0
    before = len(samples)
    assert run() and len(samples) == before, "what is finished is kept"


def test_the_state_of_a_tuning_has_a_file_whatever_the_prior_is_called(tmp_path):
    ground = SimpleNamespace(title="Prior runs/1/prior")
    log = Log(tmp_path / "s.jsonl", "mark")
    tables = few_calls.Tables(ground, few_calls.Plan(["ddim"], [5], tuned=[5]), log)
    found = [tables._state(tables._key(5, name, "ddim")) for name in ("ays", "ggdm")]
    assert found[0] != found[1] and {path.parent for path in found} == {tmp_path}
    other = few_calls.Tables(ground, tables.plan, Log(tmp_path / "s.jsonl", "other seed"))
    assert other._state(other._key(5, "ays", "ddim")) != found[0]


def test_the_truth_of_a_network_is_its_flow():
    """On independent pixels the flow scales the noise; other noise, and half of the steps, are told apart."""
    prior = GaussianPrior(torch.zeros(1, 4, 4), torch.tensor(0.25))
    ground = grounds.network_ground(prior, 64, 3)
    start = DDIM(5).init(ground.problem.expand(64), Noise.spawn([3], range(64))).x
    exact = prior.flow(start, torch.ones(()), torch.zeros(()))
    assert float((ground.truth - exact).square().mean().sqrt()) < 1e-3 < float((ground.exact - exact).abs().mean())
    fine, half, other = ground.floors
    assert fine["error"] == 0 < half["error"] < 1e-2 and other["error"] > 1 and other["SW/floor"] == 0
    assert ground.scale == pytest.approx(0.5, rel=0.1)


def test_srds_benchmark(tmp_path):
    report = srds.main(tmp_path / "d.json", steps=(16,), tolerances=(0.0, 1.0), devices=(1, 4), repeats=1)
    exact, loose = report.tables["SRDS"]
    assert exact["iterations"] == exact["blocks"] == 4 and exact["distance"] < 1e-12
    assert exact["depth"] == SRDS(4, 4).depth(4) and exact["calls"] == SRDS(4, 4).nfe
    assert loose["iterations"] == 1 and loose["depth"] == SRDS(4, 4).depth(1) and loose["distance"] > 1e-6
    assert all(row["speed-up"] > 0 and row["model, 4"] > 0 for row in (exact, loose))
    with_network = srds.problem_of(GaussianPrior(torch.zeros(3, 4, 4), torch.tensor(0.5)), 64)
    assert with_network.likelihood.event_shape == (3, 4, 4)
