"""The densities benchmark at a tiny size: its figures, its counts, that it goes on where it stopped, and what it refuses."""

import json
import math
import os
import signal
from dataclasses import replace
from functools import partial

import pytest
import torch

import fewstep
from fewstep.bench import densities, density_runs
from fewstep.bench.density_figures import PUBLISHED, Sizes, Truth, energy, unconverged_sinkhorn
from fewstep.bench.density_published import COLUMNS, TABLES, beside
from fewstep.bench.density_runs import METHODS, Budget, Recipe, Setup, Workshop, exchange_at, sequential_at
from fewstep.bench.density_tables import starred, summary, total
from fewstep.core.noise import Streams
from fewstep.densities.base import DensitySampler
from fewstep.densities.draws import Draws
from fewstep.densities.laplace import laplace
from fewstep.densities.networks import ControlNet
from fewstep.densities.students._maps import Perceptron
from fewstep.densities.students.cdds import CDDS
from fewstep.training import Trainer

pytest.importorskip("accelerate")
pytest.importorskip("ot")
NINE = fewstep.target("nine_modes")
TINY = Setup(train_steps=3, batch=16, path_steps=4, distill_steps=4, rows=64, draws=64, components=3)
SMALL = Sizes(transport=64, published=64, most=256)


@pytest.fixture(autouse=True)
def little_polish(monkeypatch):
    monkeypatch.setattr(density_runs, "CDDS", partial(CDDS, polish=2, balance=256))


@pytest.fixture(scope="module")
def truth():
    return Truth(NINE, SMALL)


def exact(seed, n=256):
    return NINE.sample(Streams(1000 + seed, range(n)))


def test_exact_draws_are_at_the_floor_and_a_third_of_the_modes_is_not(truth):
    floor, right = truth.floors(), truth.distances(exact(0))
    some = exact(0, 1024)
    wrong = truth.distances(some[some[:, 0] < -2.5][:256])
    for name in SMALL.distances():
        assert right[name] < 2 * floor[name], name
    for name in ("W1", "W2", "SW", "energy x 1000", "mode error"):
        assert wrong[name] > 2 * floor[name], name
    assert right["modes"] == "9/9" and wrong["modes"] == "3/9"


def test_energy_with_its_diagonal_is_that_of_two_points():
    a, b = torch.tensor([[0.0], [1.0]]), torch.tensor([[3.0], [3.0]])
    assert energy(a, b) == pytest.approx(2 * 2.5 - 0.5 - 0.0)


def test_energy_keeps_its_digits_far_from_the_origin_and_refuses_no_rows():
    a, b = exact(1).double(), exact(2).double()
    assert energy(a + 1e7, b + 1e7) == pytest.approx(energy(a, b), rel=1e-5)
    with pytest.raises(ValueError, match="at least 1 rows, got 0"):
        energy(a[:0], b)


def test_published_figure_is_not_converged_but_a_mean_cost():
    a, b = torch.zeros(1, 2), torch.tensor([[3.0, 4.0]])
    assert unconverged_sinkhorn(a, b) == pytest.approx(5.0, rel=1e-4)
    x, y = exact(1), exact(2)
    given = Truth(NINE, SMALL).sizes.distances()
    assert unconverged_sinkhorn(x, y) < 0.9 * given["W1"][0](x, y), "marginals that are left off cost less"


def test_weights_of_exact_draws_cover_and_shifted_ones_do_not(truth):
    x, noise = exact(3), 0.1 * torch.randn(256, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    right = truth.weighted(Draws(x, noise - 0.005, "unbiased"))
    wrong = truth.weighted(Draws(x, noise + 0.5, "unbiased"))
    assert right["covers"] == "yes" and right["log Z error"] < 0.03 and right["ESS"] > 0.9
    assert wrong["covers"] == "no" and wrong["log Z error"] == pytest.approx(0.5, abs=0.03)
    assert "log Z" not in truth.weighted(Draws(x, noise, "invalid")), "an invalid weight says nothing of log Z"


def test_intervals_are_counted_and_those_of_shifted_weights_miss(truth):
    def draw(seed, shift=0.0):
        noise = 0.5 * Streams(seed, range(256), torch.float64).randn(1)[:, 0]
        return Draws(exact(3), noise - 0.125 + shift, "unbiased")

    right, wrong = truth.coverage(draw, 100), truth.coverage(lambda seed: draw(seed, -0.2), 100)
    assert right["sets"] == sum(right[word] for word in ("yes", "open", "no")) == 100
    assert (
        right["yes"] > 100 * 0.95 - 4 * (100 * 0.95 * 0.05) ** 0.5 and abs(right["log Z off"]) < 4 * 0.53 / 25600**0.5
    )
    assert wrong["no"] > 95 and wrong["log Z off"] == pytest.approx(right["log Z off"] - 0.2)


class Rows:
    """Counts the calls of networks where the networks are called, not by hooks."""

    def __init__(self, monkeypatch):
        self.network = 0
        moments, forward = ControlNet.moments, Perceptron.forward

        def counted(control, y, *given):
            self.network += y.shape[:-1].numel()
            return moments(control, y, *given)

        def called(net, y, *given):
            self.network += len(y)
            return forward(net, y, *given)

        monkeypatch.setattr(ControlNet, "moments", counted)
        monkeypatch.setattr(Perceptron, "forward", called)


@pytest.mark.parametrize("name", ["dis", "cdds", "matched", "cdds-exchange"])
def test_calls_are_what_is_counted(name, monkeypatch, tmp_path):
    shop = Workshop(NINE, TINY, 0, tmp_path)
    before = shop.trained("dis").budget if name == "cdds" else Budget()
    rows = Rows(monkeypatch)
    budget = shop.trained(name).budget
    assert budget.network - before.network == rows.network > 0
    assert budget.seconds > before.seconds and budget.target > before.target and budget.gradient > before.gradient


def test_counted_calls_of_paths_are_those_of_the_losses(monkeypatch, tmp_path):
    monkeypatch.setattr(density_runs, "fit", lambda target, **given: fewstep.fit(target, whiten=False, **given))
    budget = Workshop(NINE, TINY, 0, tmp_path).trained("dis").budget
    paths = TINY.train_steps * TINY.batch
    assert budget.target == paths and budget.gradient == paths * TINY.path_steps
    assert budget.network == 2 * paths * TINY.path_steps, "a simulation without gradients, then all points at once"


@pytest.mark.parametrize("sample", [exchange_at, sequential_at])
def test_references_keep_to_their_budget(sample):
    draws = sample(NINE, 1_000_000, 256, 0)
    assert Budget().drawing(draws).evaluations == pytest.approx(1_000_000, rel=0.3)
    assert len(draws) == 256


def run(out, **changes):
    given = {"targets": ("nine_modes",), "methods": ("dis", "cdds"), "steps": (1,), "path_steps": (2,), "seeds": 2}
    given |= {
        "train_steps": 3,
        "batch": 16,
        "simulated": 4,
        "distill_steps": 4,
        "rows": 64,
        "num_samples": 256,
        "repeats": 3,
    }
    return densities.main(out, **{**given, "transported": 64, "published": 64, "speed": False, **changes})


def test_tables_and_that_a_stopped_run_goes_on(tmp_path, monkeypatch, capsys):
    out = tmp_path / "d.json"
    first = run(out).tables
    drawn, training = first["nine_modes: draws"], first["nine_modes: training"]
    titles = ["exact draws", "dis", "cdds", "cdds, resampled", "cdds, then SMC"]
    assert [row["method"] for row in drawn] == titles and [row["method"] for row in training] == ["dis", "cdds"]
    assert all(isinstance(row["W2"], str) and "±" in row["W2"] for row in drawn[1:]) and drawn[1]["covers"][1:] == "/2"
    counted = first["nine_modes: coverage"]
    assert [(row["method"], row["steps"], row["sets"]) for row in counted] == [("dis", 2, 6), ("cdds", 1, 6)]
    rivals = [row["method"] for row in first["nine_modes: equal budget"]]
    assert rivals == ["cdds, 1 step", "replica exchange", "SMC"]
    assert f"here: {titles[2]} 1" in first["nine_modes: published figures"][0]

    def no_training(*_):
        raise AssertionError("what is kept needs no training")

    monkeypatch.setattr(density_runs, "METHODS", dict.fromkeys(METHODS, Recipe(no_training)))
    assert run(out).tables == first
    assert json.loads(out.read_text())["benchmark"] == "densities"
    with pytest.raises(AssertionError, match="needs no training"):
        run(out, distill_steps=5)


@pytest.mark.parametrize("method", ["dis", "cdds"])
def test_a_training_that_was_stopped_leaves_no_row_and_no_sampler(tmp_path, monkeypatch, method):
    step = Trainer._train_step

    def stopped(self):
        if len(list((tmp_path / "d.fits").glob("*/*/*"))) == (method == "cdds"):
            os.kill(os.getpid(), signal.SIGINT)
        return step(self)

    monkeypatch.setattr(Trainer, "_train_step", stopped)
    with pytest.raises(KeyboardInterrupt, match="after step 1 of"):
        run(tmp_path / "d.json", methods=(method,), seeds=1)
    kept = [path.name for path in (tmp_path / "d.fits").glob("*/*/*")]
    assert method not in kept and method not in (tmp_path / "d.jsonl").read_text()


def test_a_sampler_that_breaks_at_one_seed_leaves_all_other_rows(monkeypatch, capsys):
    sample = DensitySampler.sample

    def broken(self, n, steps=None, *, seed=0, **given):
        draws = sample(self, n, steps, seed=seed, **given)
        return replace(draws, x=math.nan * draws.x, log_weights=draws.log_weights - math.inf) if seed == 2 else draws

    def broken_rival():
        raise RuntimeError("chains diverged")

    def drawn_at(target, evaluations, n, seed):
        return Draws(exact(seed, n))

    recipe = Recipe(lambda shop, target, _: laplace(target, exact(0)[0]), steps=(1,))
    monkeypatch.setitem(METHODS, "laplace", recipe)
    monkeypatch.setattr(DensitySampler, "sample", broken)
    monkeypatch.setattr(densities, "exchange_at", drawn_at)
    monkeypatch.setattr(densities, "sequential_at", lambda *given: broken_rival())
    tables = run(None, methods=("laplace",), repeats=0, sets=1).tables
    exact_draws, alone, resampled, corrected = tables["nine_modes: draws"]
    for row, reason in ((alone, "needs at least 1 rows, got 0"), (resampled, "no draw has a positive weight")):
        assert row["remark"].startswith("failed: ValueError") and reason in row["remark"]
        assert row["W2"].endswith("(1 of 2 seeds)")
    assert "remark" not in exact_draws and "remark" not in corrected and "±" in corrected["W2"]
    first, other, rival = tables["nine_modes: equal budget"]
    assert first["remark"] == alone["remark"] and first["evaluations"] > 0
    assert other["remark"] is None and "±" in other["W2"]
    assert rival["remark"] == "failed: RuntimeError: chains diverged" and rival["W2"] is None


def test_counts_are_those_of_the_seeds_that_have_them():
    rows = [{"sets": 3, "yes": 2, "log Z off": 0.1}, {"remark": "failed: x"}]
    assert total(rows, ["log Z off", "remark"]) == {
        **{"sets": 3, "yes": 2, "log Z off": "0.100 (1 of 2 seeds)", "remark": "failed: x (1 of 2 seeds)"}
    }


@pytest.mark.slow
def test_speed_is_told(tmp_path, capsys):
    (row,) = run(None, seeds=1, speed=True).tables["nine_modes: speed"]
    assert row["faster by"] > 0 and row["dis: iteration / calls"] > 0


def test_rows_of_several_seeds():
    row = summary([{"a": 1.0, "b": "yes", "c": "unbiased", "d": 2}, {"a": 3.0, "b": "no", "c": "unbiased", "d": 2}])
    assert row == {"a": "2.000 ± 12.71", "b": "1/2", "c": "unbiased", "d": 2}
    assert total([{"a": 1.0, "n": 2}, {"a": 3.0, "n": 3}], ["a"]) == {"a": "2.000 ± 12.71", "n": 5}
    assert summary([{"high": 1.0}, {"high": math.inf}]) == {"high": math.inf}
    assert summary([{"log Z": -108.391}, {"log Z": -108.393}]) == {"log Z": "-108.392 ± 0.013"}
    keys = densities.EQUAL
    rows = [dict.fromkeys(keys) | {"W1": "0.5 ± 0.1"}, dict.fromkeys(keys) | {"W1": 0.4}]
    assert [row["W1"] for row in starred(rows)] == ["0.5 ± 0.1", "0.400 *"]


def test_what_seeds_do_not_share_is_not_that_of_the_first():
    rows = [
        {"modes": "9/9", "ELBO": -1.0, "EUBO": 2.0, "W1": 0.1, "covers": None},
        {"modes": "3/9", "ELBO": None, "EUBO": "no bound", "W1": 0.1, "covers": "yes"},
        {"modes": "9/9", "ELBO": -3.0, "EUBO": 3.0, "W1": "not finite", "covers": "no", "KSD": 0.5},
    ]
    assert summary(rows) == {
        **{"modes": "9/9, 3/9", "ELBO": "-2.000 ± 12.71 (2 of 3 seeds)", "EUBO": "no bound", "W1": "not finite"},
        **{"covers": "1/2 (2 of 3 seeds)", "KSD": "0.500 (1 of 3 seeds)"},
    }
    assert summary([{"ELBO": None}, {"ELBO": None}]) == {"ELBO": None}
    values = ("0.100 (1 of 3 seeds)", "0.2 ± 0.1 (2 of 3 seeds)", "0.5 ± 0.1", 0.6, "9/9, 3/9", None)
    rows = [dict.fromkeys(densities.EQUAL) | {"W1": value} for value in values]
    assert [row["W1"] for row in starred(rows)] == [*values[:2], "0.5 ± 0.1 *", *values[3:]]


def test_published_tables_say_what_can_be_compared():
    rows = [row for rows in TABLES.values() for row in rows]
    assert all(len(row.values) == len(COLUMNS) and row.comparable for row in rows)
    (found, *_) = beside("mw54", {"cdds 1": {PUBLISHED: 0.2}})
    assert found["CDDS 1"] == 0.2815 and found["here: cdds 1"] == 0.2
    assert beside("rings", {}) == []


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"methods": ("disk",)}, "choose some of"),
        ({"seeds": 0}, "needs a seed"),
        ({"num_samples": 100}, "multiple of 256"),
        ({"sets": 0}, "a set of draws"),
        ({"repeats": -1}, "repeats"),
        ({"targets": ("sonar",)}, "--data"),
        ({"targets": ("funel",)}, "funnel"),
    ],
)
def test_what_cannot_be_run_is_refused(given, message):
    with pytest.raises(ValueError, match=message):
        run(None, **given)


def test_all_targets_are_known_before_the_first_is_run(monkeypatch):
    monkeypatch.setattr(densities.Bench, "tables", lambda *_: pytest.fail("run"))
    for name, message in (("funel", "funnel"), ("sonar", "--data")):
        with pytest.raises(ValueError, match=message):
            run(None, targets=("nine_modes", name))


def test_distances_are_means_over_sets_each_beside_its_own(truth):
    x = exact(0, 3 * 256 - 5)
    parts = x.tensor_split(3)
    found, distance = truth.distances(x), SMALL.distances()["SW"][0]
    wanted = sum(distance(part, other[: len(part)]) for part, other in zip(parts, truth.sets, strict=False)) / 3
    assert found["SW"] == pytest.approx(wanted) and truth.distances(x[:300])["SW"] == pytest.approx(
        distance(x[:256], truth.sets[0])
    )
