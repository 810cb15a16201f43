"""Tuned schedules: closed forms on Gaussians, gradients against differences, held-out gains on a mixture, files, resumption."""

import dataclasses
import functools
import itertools
import json

import pytest
import torch

import test_solvers_order as order
from fewstep.core.grid import GRIDS, times_of
from fewstep.core.likelihood import FlatLikelihood
from fewstep.core.problem import Posterior
from fewstep.core.registry import get
from fewstep.core.schedule import EDM, VarianceExploding
from fewstep.priors.exact import GaussianPrior, MixturePrior
from fewstep.solvers._decisions import Decision
from fewstep.solvers.usf import USF
from fewstep.tuning import align, ggdm, search
from fewstep.tuning.align import AlignYourSteps, shortest_path, step_costs
from fewstep.tuning.base import Task, Tuning, reference
from fewstep.tuning.ggdm import GGDM
from fewstep.tuning.losses import energy, named_grids, paired, samples_of
from fewstep.tuning.predictor import fit
from fewstep.tuning.schedule_file import TunedSchedule
from fewstep.tuning.search import SolverSearch

F64 = torch.float64
STD = 0.5


def task(prior, steps, solver="dpmpp", seed=3):
    return Task(Posterior(prior, FlatLikelihood(prior.event_shape, 1, F64)), steps, solver, seed)


GAUSSIAN = GaussianPrior(torch.zeros(2, dtype=F64), STD**2 * torch.eye(2, dtype=F64))
MIXTURE = MixturePrior(
    torch.tensor([0.3, 0.7], dtype=F64),
    torch.tensor([[-1.0, 0.5], [1.0, -0.2]], dtype=F64),
    torch.tensor([0.02, 0.05], dtype=F64),
)


# --- Align Your Steps --------------------------------------------------------------------------------------------------------


def gaussian_cost(high, low, std, size):
    """Return the exact cost of a step from ratio `high` to `low` on N(0, std^2 I) in `size` dimensions, shape of both."""
    q = (1 + (std / low) ** 2) / (1 + (std / high) ** 2)
    return size / 2 * (q - 1 - q.log())


def gaussian_ratios(high, low, std, steps):
    """Return the `steps` + 1 falling ratios that are best on N(0, std^2 I), by the progression that `align` states."""
    ends = torch.log1p((std / torch.stack([high, low])) ** 2)
    logs = ends[0] + torch.linspace(0, 1, steps + 1, dtype=ends.dtype) * (ends[1] - ends[0])
    return std / torch.expm1(logs).sqrt()


def gaussian_gram(ratios):
    """Return E <D(z_r), D(z_r')> on N(0, STD^2 I) in two dimensions, (M, M)."""
    return 2 * STD**4 / (STD**2 + torch.maximum(ratios[:, None], ratios) ** 2)


def test_gram_matrix_of_forward_paths_is_the_closed_form():
    """In standard errors over batches; paths with unrelated noise at every level, the obvious mistake, are told apart."""
    todo, ratios = task(GAUSSIAN, 5), torch.tensor([5.0, 0.7, 0.2], dtype=F64)
    batches = torch.stack([align.gram_matrix(todo, GAUSSIAN.sample(64, seed=k), ratios, k) for k in range(40)])
    mean, error = batches.mean(0), batches.std(0) / 40**0.5
    unrelated = 2 * STD**6 / ((STD**2 + ratios[:, None] ** 2) * (STD**2 + ratios**2))
    wrong = torch.where(torch.eye(3, dtype=torch.bool), gaussian_gram(ratios), unrelated)
    assert float(((mean - gaussian_gram(ratios)) / error).abs().max()) < 4
    assert float(((mean - wrong) / error).abs().max()) > 10


def test_bound_of_a_step_is_its_closed_form():
    """By quadrature of the definition; the lemma as it is printed, with the difference squared, is refused."""
    low, high = torch.tensor(0.3, dtype=F64), torch.tensor(2.0, dtype=F64)
    r = torch.linspace(float(low), float(high), 20001, dtype=F64)
    gap = 2 * STD**4 * (1 / (r**2 + STD**2) - 1 / (high**2 + STD**2))
    exact = float(gaussian_cost(high, low, STD, 2))
    assert float(torch.trapezoid(gap / r**3, r)) == pytest.approx(exact, rel=1e-6)
    assert float(torch.trapezoid(gap**2 / 2 / r**3, r)) != pytest.approx(exact, rel=0.1)


def test_costs_on_the_table_are_those_of_the_closed_form():
    ratios = AlignYourSteps(nodes=400, lowest=(0.01,)).ratios(task(GAUSSIAN, 5))
    cost = step_costs(ratios, gaussian_gram(ratios))
    for a, b in ((0, 150), (200, 260), (300, 399)):
        exact = gaussian_cost(ratios[a], ratios[b], STD, 2)
        torch.testing.assert_close(cost[a, b], exact, rtol=2e-3, atol=0)
    assert bool(cost.tril().isinf().diagonal().all())


def test_shortest_path_is_that_of_all_paths():
    cost = torch.rand(8, 8, generator=torch.Generator().manual_seed(0), dtype=F64)
    cost = cost.masked_fill(torch.ones(8, 8).tril().bool(), torch.inf)
    for steps in (1, 2, 4, 7):
        paths = [(0, *inner, 7) for inner in itertools.combinations(range(1, 7), steps - 1)]
        totals = [float(sum(cost[a, b] for a, b in itertools.pairwise(path))) for path in paths]
        assert tuple(shortest_path(cost, steps)) == paths[totals.index(min(totals))]
    assert shortest_path(cost, 0) == [0]


def test_minimum_on_a_gaussian_is_a_geometric_progression():
    """Its bound is the optimum's to 1 in 1000; that of the log-SNR grid with the same ends is more than twice as large."""

    def bound(ratios):
        return float(gaussian_cost(ratios[:-1], ratios[1:], STD, 2).sum())

    todo, tuner = task(GAUSSIAN, 8), AlignYourSteps(nodes=400, lowest=(0.01,))
    found = GAUSSIAN.schedule.ratio(tuner.minimum(todo, gaussian_gram(tuner.ratios(todo)), 0.01)[:-1])
    best = gaussian_ratios(found[0], found[-1], STD, 7)
    even = torch.exp(torch.linspace(float(found[0].log()), float(found[-1].log()), 8, dtype=F64))
    assert bound(best) <= bound(found) < 1.001 * bound(best)
    assert bound(even) > 2 * bound(best)
    torch.testing.assert_close(torch.log1p((STD / best) ** 2).diff(n=2), torch.zeros(6, dtype=F64))


# --- tuned beats untuned, on samples that no tuner saw -------------------------------------------------------------------------


@functools.cache
def held_out(steps):
    return reference(task(MIXTURE, steps, seed=99), 512, 200)


def errors(solver, steps):
    start, truth = held_out(steps)
    return (samples_of(task(MIXTURE, steps), solver, start) - truth).square().mean(1).sqrt()


def best_untuned(steps, names):
    found = [errors(task(MIXTURE, steps, name).make(grid), steps) for name in names for grid in GRIDS]
    return min(found, key=lambda error: float(error.mean()))


QUICK = [
    AlignYourSteps(rounds=4, items=64, nodes=100, fine=60),
    GGDM(rounds=50, fine=60),
    SolverSearch(rounds=6, bank=96, fine=60),
]


@pytest.mark.parametrize("tuner", QUICK, ids=lambda tuner: type(tuner).__name__)
def test_tuned_beats_the_best_untuned_grid(tuner):
    """At five calls, by more than four standard errors of the difference on the same noise."""
    found = Tuning(tuner, task(MIXTURE, 5), "mixture").run()
    names = ("dpmpp", "deis", "ddim") if found.solver == "usf" else ("dpmpp",)
    gain = best_untuned(5, names) - errors(found.sampler(), 5)
    assert float(gain.mean()) > 4 * float(gain.std()) / 512**0.5
    assert found.figures["loss_after"] < found.figures["loss_before"]
    assert found.sampler().nfe == 5


def test_energy_is_unbiased_and_sees_a_shift():
    draws = [(MIXTURE.sample(64, seed=2 * k), MIXTURE.sample(64, seed=2 * k + 1)) for k in range(60)]
    same = torch.stack([energy(a, b) for a, b in draws])
    moved = torch.stack([energy(a + 0.3, b) for a, b in draws])
    error = same.std() / 60**0.5
    assert abs(float(same.mean() / error)) < 4 < float(moved.mean() / error)


# --- through the sampler -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", ["dpmpp", "deis", "ddim"])
@pytest.mark.parametrize("loss", ["paired", "energy"])
def test_gradient_is_that_of_differences(solver, loss):
    todo, tuner = task(MIXTURE, 5, solver), GGDM(loss=loss, items=16, bank=16, fine=20)
    state = tuner.init(todo)

    def value(gaps):
        return tuner.slope(todo, gaps.requires_grad_(), state["start"], state["truth"])

    _, slope = value(state["gaps"].clone())
    for i, step in enumerate(1e-5 * torch.eye(4, dtype=F64)):
        up, down = (value(state["gaps"] + sign * step)[0] for sign in (1, -1))
        assert float((up - down) / 2e-5) == pytest.approx(float(slope[i]), rel=1e-4, abs=1e-7)


def test_a_network_that_does_not_see_the_times_gives_another_gradient(monkeypatch):
    todo, tuner = task(MIXTURE, 5), GGDM(items=16, bank=16, fine=20)
    state = tuner.init(todo)
    right = tuner.slope(todo, state["gaps"].clone().requires_grad_(), state["start"], state["truth"])[1]
    monkeypatch.setattr(ggdm, "checkpoint", lambda f, x, t, **_: f(x, t.detach()))
    wrong = tuner.slope(todo, state["gaps"].clone().requires_grad_(), state["start"], state["truth"])[1]
    assert float((wrong - right).abs().max()) > 0.05 * float(right.abs().max())


def test_ddim_on_a_gaussian_ends_at_even_angles():
    """A step of DDIM keeps cos(d) of the exact gain, d its share of arctan(ratio / std): the best times share it evenly."""
    prior = GaussianPrior(torch.zeros(1, dtype=F64), STD**2 * torch.eye(1, dtype=F64))
    tuner = GGDM(rounds=100, items=8, bank=8, lr=0.1, fine=200)
    found = Tuning(tuner, task(prior, 4, "ddim"), "gaussian").run()
    angles = torch.atan(prior.schedule.ratio(torch.tensor(found.times, dtype=F64)) / STD)
    even = torch.linspace(float(angles[0]), 0, 5, dtype=F64)
    assert float((angles - even).abs().max()) < 0.01
    uneven = torch.atan(prior.schedule.ratio(times_of("log_snr", prior.schedule, 4)) / STD)
    assert float((uneven - even).abs().max()) > 0.1


# --- the space of solvers --------------------------------------------------------------------------------------------------------


@functools.cache
def same_law(left, right):
    problem = task(MIXTURE, 1).problem
    return float((left(problem, 16).x - right(problem, 16).x).abs().max())


@pytest.mark.parametrize(
    ("decision", "name", "settings"),
    [
        (Decision("x0", 1), "ddim", {}),
        (Decision("epsilon", 1), "ddim", {}),
        (Decision("x0", 2, "exact"), "dpmpp", {"released": False}),
        (Decision("x0", 2, "half"), "dpmpp", {}),
        *((Decision("epsilon", n, "exact"), "deis", {"order": n, "variable": "log_rho"}) for n in (2, 3, 4)),
    ],
    ids=str,
)
def test_decisions_give_the_known_solvers(decision, name, settings):
    known = get(name, "solvers")(steps=12, grid="log_snr", **settings)
    assert same_law(USF(12, (decision,), "log_snr"), known) < 1e-12
    other = decision._replace(relaxation="linear", terms=max(2, decision.terms))
    assert same_law(USF(12, (other,), "log_snr"), known) > 1e-4


def test_fewer_decisions_serve_equal_shares_of_the_steps():
    first, second = Decision("x0", 1), Decision("x0", 2, "half")
    shared = USF(9, (first, second), "log_snr")
    assert same_law(shared, USF(9, 5 * (first,) + 4 * (second,), "log_snr")) == 0


def test_inner_points_give_the_singlestep_solver():
    schedule, outer = MIXTURE.schedule, times_of("log_snr", MIXTURE.schedule, 7)
    logs = schedule.ratio(outer[:-1]).log()
    inner = torch.stack([logs[:-1], (logs[1:] + logs[:-1]) / 2], 1).flatten()
    times = (*schedule.time(torch.cat([inner, logs[-1:]]).exp()).clamp(0, 1).tolist(), 0.0)
    turns = tuple(Decision("x0", 1, "exact", k % 2) for k in range(13))
    assert same_law(USF(13, turns, times), get("dpmpp_singlestep", "solvers")(7, grid=tuple(outer.tolist()))) < 1e-12


@pytest.mark.parametrize(
    "decision",
    [
        Decision("x0", 2, "linear"),
        Decision("epsilon", 2, "half"),
        Decision("x0", 3, "exact"),
        Decision("x0", 1, "exact", 0, True),
        Decision("epsilon", 2, "half", 0, True),
        Decision("x0", 3, "exact", 0, True),
        Decision("x0", 2, "half", 1),
    ],
    ids=str,
)
def test_order_of_the_decisions(decision):
    make = functools.partial(USF, decisions=(decision,))
    assert abs(order.order_after_start(make, "log_rho", steps=(40, 80, 160)) - make().order) < 0.15


@pytest.mark.parametrize(("form", "want"), [("x0", 3), ("epsilon", 2)])
def test_order_of_steps_over_an_inner_point(form, want):
    """In epsilon they do not damp the error of the first step."""
    make = functools.partial(USF, decisions=(Decision(form, 3, "exact", 1),))
    found = order.order_from_noise(make, steps=(80, 160, 320))
    assert make().order == want and (found > 2.8 if want == 3 else found < 2.2)


@pytest.mark.parametrize(
    "wrong", [(), (("v", 2, "half", 0, False),), (("x0", 5, "half", 0, False),), (("x0", 2, "none", 0, False),)]
)
def test_unknown_decisions_are_refused(wrong):
    with pytest.raises(ValueError, match="must be"):
        USF(decisions=wrong)


def kendall(predicted, scores):
    """Return Kendall's tau, the share of pairs in the same order minus that in the other, (E,) twice."""
    same = (predicted[:, None] - predicted).sign() * (scores[:, None] - scores).sign()
    return float(same.sum() / (len(scores) * (len(scores) - 1)))


def test_the_predictor_ranks_solvers_it_has_not_seen():
    """Kendall's tau on a random third is well above chance, and that of one trained on shuffled scores is not."""
    todo, tuner = task(MIXTURE, 5), SolverSearch(rounds=2, bank=32, fine=40, tried=30, blind=30)
    state = tuner.init(todo)
    for k in range(2):
        state = tuner.step(todo, state, k)
    seen, scores = search.features(state["genes"], state["logs"]), state["scores"]
    rows = []
    for seed in range(8):
        mixed = torch.randperm(len(scores), generator=torch.Generator().manual_seed(seed))
        new, known = mixed[: len(mixed) // 3], mixed[len(mixed) // 3 :]
        shuffled = scores[known].roll(len(known) // 2)
        rows.append([kendall(fit(seen[known], s, seed)(seen[new]), scores[new]) for s in (scores[known], shuffled)])
    right, wrong = torch.tensor(rows).mean(0)
    assert float(right) > 0.25 and abs(float(wrong)) < 0.12


def test_times_of_genes_fall_whatever_they_are():
    todo = task(MIXTURE, 6)
    for logs in ([9.0, 9.0, 1.0, 1.0, -5.0], [-2.0] * 5, [3.0, 2.0, 1.0, 0.0, -1.0]):
        times = search.times_of_logs(todo, torch.tensor(logs, dtype=F64))
        assert bool((times.diff() < 0).all()) and float(times[0]) == 1 and float(times[-1]) == 0


@pytest.mark.parametrize("steps", [2, 6])
@pytest.mark.parametrize("schedule", [EDM(sigma_min=0.0095), VarianceExploding()], ids=str)
def test_tuned_times_stay_above_the_least_ratio(schedule, steps):
    """Whatever genes and gaps ask for: the times fall strictly, and those that are possible are as they were asked for."""
    todo = task(GaussianPrior(torch.zeros(2, dtype=F64), STD**2 * torch.eye(2, dtype=F64), schedule), steps)
    logs = torch.tensor([0.5, 0.1, -6.0, -7.0, -7.0], dtype=F64)[1 - steps :]
    gaps = torch.tensor([2.0, 2.0, 0.0, -9.0, 1.0], dtype=F64)[: steps - 1]
    for times in (search.times_of_logs(todo, logs), ggdm.times_of_gaps(todo, gaps)):
        assert len(times) == steps + 1 and float(times[0]) == 1 and float(times[-1]) == 0
        assert bool((times.diff() < 0).all())
    fine = torch.linspace(0.5, -0.5, steps - 1, dtype=F64)
    torch.testing.assert_close(schedule.ratio(search.times_of_logs(todo, fine)[1:-1]).log(), fine)


@pytest.mark.parametrize("tuner", range(3), ids=["ays", "ggdm", "s3"])
@pytest.mark.parametrize("schedule", [EDM(sigma_min=0.0095), EDM(sigma_min=0.05), VarianceExploding()], ids=str)
def test_tuners_run_where_no_ratio_is_small(schedule, tuner):
    todo = task(GaussianPrior(torch.zeros(2, dtype=F64), STD**2 * torch.eye(2, dtype=F64), schedule), 6)
    assert bool((schedule.time(AlignYourSteps().ratios(todo)) > 0).all()), "the network is asked at these times"
    found = Tuning(SMALL[tuner], todo, "gaussian").run()
    assert found.sampler()(todo.problem).x.shape == (1, 1, 2)


@pytest.mark.parametrize("tuner", range(3), ids=["ays", "ggdm", "s3"])
def test_every_item_has_its_row_of_the_condition(tuner):
    class Shifted(GaussianPrior):
        def forward(self, x_t, t, *, shift):
            assert len(shift) == len(x_t)
            return super().forward(x_t, t) + shift

    prior = Shifted(torch.zeros(2, dtype=F64), STD**2 * torch.eye(2, dtype=F64))
    problem = Posterior(prior, FlatLikelihood((2,), 1, F64), {"shift": torch.tensor([[0.1, -0.3]], dtype=F64)})
    brief = dataclasses.replace(SMALL[tuner], rounds=1)
    assert Tuning(brief, Task(problem, 3), "shifted").run().sampler().steps == 3


# --- files and interruptions -------------------------------------------------------------------------------------------------------

SMALL = [
    AlignYourSteps(rounds=3, items=4, nodes=12, bank=8, fine=8),
    GGDM(rounds=3, items=4, bank=8, fine=8),
    SolverSearch(rounds=3, bank=4, fine=8, children=20, tried=4, blind=1, parents=4),
]


@pytest.mark.parametrize("tuner", SMALL, ids=lambda tuner: type(tuner).__name__)
def test_a_stopped_tuning_ends_like_one_that_was_not(tuner, tmp_path):
    todo, file = task(MIXTURE, 3), tmp_path / "state"
    whole = Tuning(tuner, todo, "m").run()

    def stop(done, total):
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Tuning(tuner, todo, "m", file).run(stop)
    with pytest.raises(ValueError, match="other settings"):
        Tuning(tuner, task(MIXTURE, 4), "m", file).run()
    rounds = []
    assert Tuning(tuner, todo, "m", file).run(lambda done, total: rounds.append((done, total))) == whole
    assert rounds == [(3, 3)] and not file.exists()
    file.write_bytes(b"x")
    with pytest.raises(ValueError, match="cannot be read"):
        Tuning(tuner, todo, "m", file).run()


def test_schedule_files(tmp_path):
    decisions = (Decision("x0", 1), Decision("epsilon", 2, "exact", 0, True), Decision())
    tuned = TunedSchedule(
        "s3", "m", "usf", (1.0, 0.5, 0.2, 0.0), {"decisions": tuple(map(tuple, decisions))}, {"a": 1.0}
    )
    tuned.save(tmp_path / "s.json")
    again = TunedSchedule.load(tmp_path / "s.json")
    assert again == tuned and again.sampler() == USF(3, decisions, tuned.times)
    assert again.sampler("ddim") == get("ddim", "solvers")(steps=3, grid=tuned.times)
    assert again.sampler(steps=7).steps == 7
    with pytest.raises(ValueError, match="solver ddim"):
        again.sampler("ddim", order=3)
    values = json.loads((tmp_path / "s.json").read_text())
    for wrong in ({**values, "format": "x"}, {**values, "more": 1}, {k: values[k] for k in values if k != "times"}, []):
        (tmp_path / "w.json").write_text(json.dumps(wrong))
        with pytest.raises(ValueError, match="no schedule"):
            TunedSchedule.load(tmp_path / "w.json")
    with pytest.raises(ValueError, match="cannot be read"):
        TunedSchedule.load(tmp_path / "none.json")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        *(
            ({"times": times}, "times must be")
            for times in ([1, "a", 0], None, 5, [[1], [0.5], [0]], [1, True, 0], [1.0])
        ),
        *(({"settings": settings}, "settings must be an object") for settings in (None, [1])),
        *(({"solver": solver}, "solver must be a name") for solver in (5, None)),
        ({"solver": "nope"}, "unknown solver"),
        ({"figures": None}, "figures must be"),
        ({"settings": {"released": "maybe"}}, "released must be bool"),
        ({"settings": {"relesed": True}}, "did you mean released"),
        ({"settings": {"terms": None}}, "terms"),
    ],
    ids=str,
)
def test_schedule_files_of_other_kinds_are_refused_in_one_line(tmp_path, change, match):
    file = tmp_path / "s.json"
    TunedSchedule("ays", "m", "dpmpp", (1.0, 0.5, 0.0), {"released": False}).save(file)
    values = json.loads(file.read_text())
    assert TunedSchedule.load(file).sampler().released is False
    file.write_text(json.dumps(values | {"settings": {"released": "no"}}))
    assert TunedSchedule.load(file).sampler().released is False
    file.write_text(json.dumps(values | change))
    with pytest.raises(ValueError, match=match):
        TunedSchedule.load(file).sampler()


@pytest.mark.parametrize(
    ("cls", "wrong"),
    [
        (AlignYourSteps, {"nodes": 1}),
        (AlignYourSteps, {"lowest": ()}),
        (AlignYourSteps, {"stops": (0.0,)}),
        (AlignYourSteps, {"loss": "fid"}),
        (GGDM, {"items": 999}),
        (GGDM, {"lr": 0.0}),
        (SolverSearch, {"blind": 99}),
        (SolverSearch, {"mutation": 2.0}),
    ],
    ids=str,
)
def test_wrong_settings_are_refused(cls, wrong):
    with pytest.raises(ValueError, match=r"must|one of|<="):
        cls(**wrong)


def test_what_cannot_be_tuned_is_refused():
    with pytest.raises(ValueError, match="number of nodes"):
        AlignYourSteps(nodes=4).init(task(MIXTURE, 5))
    with pytest.raises(ValueError, match="one step has no times"):
        GGDM().init(task(MIXTURE, 1))
    assert len(named_grids(task(MIXTURE, 3))) == len(GRIDS)
    assert float(paired(torch.ones(2, 3), torch.zeros(2, 3))) == pytest.approx(1)
