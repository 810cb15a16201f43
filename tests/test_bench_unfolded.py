"""The benchmark on exact problems at a tiny size: its rows, that it goes on where it stopped, and that a design is what it says."""

import json
import os
import signal
from dataclasses import replace

import pytest
import torch

from fewstep.bench import ablations, trials, unfolded
from fewstep.bench.designs import Adapted, Design, VectorDenoiser, learn_prior
from fewstep.bench.log import Log
from fewstep.bench.trials import Setup, Trial
from fewstep.compat import prepare_torchvision
from fewstep.core.noise import Noise, Streams
from fewstep.methods.ud2m import UD2M
from fewstep.objectives.ud2m import Weights

prepare_torchvision()
pytest.importorskip("accelerate")
TINY = Setup(dim=4, width=16, steps=2, batch=4, draws=2)
FIGURES = {"mean error", "observed", "null space", "SW/floor"}


@pytest.fixture(autouse=True)
def few(monkeypatch):
    monkeypatch.setattr(trials, "CHECKS", 60)
    monkeypatch.setattr(trials, "PER_CHECK", 9)


def run(out, **changes):
    given = {"dims": (4,), "steps": 1, "budgets": (9, 20), "measurements": 2, "num_samples": 6, "checked": 9}
    return unfolded.main(out, **{**given, **changes})


def no_training(self, *_):
    raise AssertionError("a row that is logged needs no training")


def test_rows_and_that_a_stopped_run_goes_on(tmp_path, monkeypatch, capsys):
    out = tmp_path / "u.json"
    (rows,) = run(out).tables.values()
    names = [(row["method"], row["preset"], row["steps"]) for row in rows]
    states = [(f"{p}, {s}", n) for p in ("paper", "consistent") for s in ("untrained", "trained") for n in (3, 1)]
    assert names[:9] == [("exact posterior", "", None), *(("ud2m", *state) for state in states)]
    assert len(names) == 9 + 2 * len(unfolded.PEERS)
    for row in rows:
        assert set(row) >= FIGURES
        assert ("SBC" in row and "TARP" in row) == ((row.get("nfe") or 0) <= 9)
    monkeypatch.setattr(Design, "train", no_training)
    assert run(out).tables == run(out).tables == json.loads(json.dumps(dict([(*run(out).tables, rows)])))
    with pytest.raises(AssertionError, match="needs no training"):
        run(out, seed=1)


@pytest.mark.parametrize("preset", ["paper", "consistent"])
def test_a_design_before_training_is_the_preset(preset):
    """Levels, start and outer kernel: with an exact prior and a correction of zero the samples are the same."""
    trial, design = Trial.of(TINY, 2, 3, 0), Design(UD2M.preset(preset))
    expected = UD2M.preset(preset)(trial.problem, 3, seed=0).x
    torch.testing.assert_close(design.sampler(design.network(TINY), 3)(trial.problem, 3, seed=0).x, expected)
    other = Design(UD2M.preset({"paper": "consistent", "consistent": "paper"}[preset]))
    assert not torch.allclose(other.sampler(other.network(TINY), 3)(trial.problem, 3, seed=0).x, expected)
    with pytest.raises(ValueError, match="is trained already"):
        Design(UD2M.preset("photo"))


def test_a_row_that_failed_is_made_anew(tmp_path):
    trial, log = Trial.of(TINY, 2, 3, 0), Log(tmp_path / "u.jsonl", "mark")
    assert trials.kept(log, "a", lambda: trial.row(UD2M(steps=1, start="nonsense")))["remark"].startswith("failed: ")
    log = Log(tmp_path / "u.jsonl", "mark")
    assert trials.kept(log, "a", lambda: {"error": 1.0}) == {"error": 1.0} == trials.kept(log, "a", dict)


def test_the_batch_grows_and_every_step_has_its_own():
    data = trials.Measurements(Setup(dim=4, steps=9, batch=12))
    assert [data.count(step) for step in range(9)] == [3, 3, 3, 6, 6, 6, 12, 12, 12]
    one, again, other = (data.batch(step, range(12)) for step in (0, 0, 1))
    assert torch.equal(one["x0"], again["x0"]) and torch.equal(one["likelihood"].y, again["likelihood"].y)
    assert not torch.isclose(one["x0"], other["x0"]).any()


def test_a_training_that_was_stopped_leaves_no_row(tmp_path, monkeypatch):
    once = Setup.simulate

    def stopped(self, noise):
        if not isinstance(noise, Streams):
            return once(self, noise)
        os.kill(os.getpid(), signal.SIGTERM)
        return once(self, noise)

    monkeypatch.setattr(Setup, "simulate", stopped)
    with pytest.raises(KeyboardInterrupt, match="after step 1 of 3"):
        run(tmp_path / "u.json", steps=3)
    assert "True" not in (tmp_path / "u.jsonl").read_text()


def test_designs_that_train_alike_share_a_network():
    base, kernel = ablations.consistent(), ablations.consistent(kernel="one_step", eta=0.8)
    assert base != kernel and base.training == kernel.training
    for other in (ablations.consistent(start="pinv"), ablations.consistent(iterations=2)):
        assert other.training != base.training
    assert Design(base.settings, Weights(noise=1.0), times=base.times).training != base.training


def test_the_ablations_are_those_asked_for():
    grid = {label: (design, n) for label, design, n in ablations.size()}
    assert [design.settings.iterations for design, _ in grid.values()] == list(ablations.SIZES)
    assert len(list(ablations.size())) == 25
    labels = [label for label, _, n in ablations.rank() if n == 3]
    assert labels == ["rank 0", "rank 4", "rank 5", "rank 16", "full"]
    off = {label: design.weights for label, design, _ in ablations.loss()}
    for name in ablations.TERMS:
        assert [term for term in ablations.TERMS if not getattr(off[f"without {name}"], term)] == [name]
    assert ablations.choose(["all"]) == ("size", "start", "rank", "loss", "preset")
    with pytest.raises(ValueError, match="unknown ablation 'ranks'; choose of size"):
        ablations.choose(["ranks"])


def test_an_ablation_is_one_table_and_trains_each_network_once(tmp_path, monkeypatch):
    trained, whole = [], Design.train
    monkeypatch.setattr(Design, "train", lambda self, *a: trained.append(self) or whole(self, *a))
    report = run(tmp_path / "a.json", ablation=("preset", "start"))
    ((title, rows),) = report.tables.items()
    assert title.startswith("Ablations") and len(rows) == 1 + 12 + 8
    assert len(trained) == len(set(trained)) == 4 + 3
    assert all(set(row) >= {"ablation", "choice", "steps", *FIGURES} for row in rows)


@pytest.mark.slow
def test_losses_and_ranks_run(tmp_path):
    pytest.importorskip("peft")
    (rows,) = run(tmp_path / "a.json", ablation=("rank", "loss")).tables.values()
    assert len(rows) == 1 + 10 + 20 and all(set(row) >= FIGURES for row in rows)


def test_the_rank_says_what_is_trained():
    pytest.importorskip("peft")
    learned = VectorDenoiser(4, 16, TINY.prior.schedule)
    counts = {}
    for rank in (0, 2, None):
        network = Design(UD2M.preset("consistent"), decoder=Adapted(rank)).network(TINY, learned)
        counts[rank] = sum(p.numel() for p in network.decoder.parameters() if p.requires_grad)
    assert counts[0] == 0 and counts[2] == 2 * (5 + 16 + 16 + 16 + 16 + 16 + 16 + 4)
    assert counts[None] == sum(p.numel() for p in learned.parameters())


@pytest.mark.slow
def test_the_learned_prior_approaches_the_exact_denoiser():
    setup = Setup(dim=4, width=64, steps=600)
    x0, noise = setup.prior.sample(500, seed=3), Noise(range(500))
    t = setup.prior.schedule.time(torch.full((500,), 0.7))
    alpha, sigma = (c[:, None] for c in setup.prior.schedule(t))
    x_t = alpha * x0 + sigma * noise.randn(4)
    exact = setup.prior(x_t, t)
    fresh, learned = (float((learn_prior(s)(x_t, t) - exact).square().mean()) for s in (replace(setup, steps=1), setup))
    assert learned < 0.4 * fresh and learned < 0.3 * float((exact - x0).square().mean())
