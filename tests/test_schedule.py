"""Every schedule: exact inverse, its gradient, monotone ratio, right ends."""

import pytest
import torch

import fewstep
from fewstep.testing.schedule import check_schedule

SCHEDULES = [
    fewstep.VariancePreserving(),
    fewstep.Cosine(),
    fewstep.VarianceExploding(),
    fewstep.EDM(),
    fewstep.Flow(),
    fewstep.Tabulated.linear(),
]


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: type(s).__name__)
def test_contract(schedule):
    check_schedule(schedule)


def test_a_wrong_inverse_fails():
    class Wrong(fewstep.VariancePreserving):
        def time(self, ratio):
            return super().time(ratio) * 1.001

    with pytest.raises(AssertionError, match="inverse"):
        check_schedule(Wrong())


def test_ddpm_table_agrees_with_its_continuous_limit():
    # linear betas from 1e-4 to 2e-2 in 1000 steps are beta(t) from 0.1 to 20, up to one step of discretisation
    t = torch.tensor([0.1, 0.5, 1.0]).double()
    table, limit = fewstep.Tabulated.linear().ratio(t), fewstep.VariancePreserving().ratio(t)
    assert torch.allclose(table, limit, rtol=0.06)


def test_table_entries_are_met_at_their_times():
    schedule = fewstep.Tabulated.linear()
    a = torch.tensor(schedule.alphas_cumprod, dtype=torch.float64)
    t = (torch.arange(1000).double() + 1) / 1000
    alpha, sigma = schedule(t)
    assert torch.allclose(alpha**2, a, rtol=1e-9) and torch.allclose(sigma**2, 1 - a, rtol=1e-9)


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        *(("Flow", {"u_max": value}) for value in (0.0, 1.0, 1.5, float("nan"))),
        *(
            (name, {"sigma_min": low})
            for name in ("EDM", "VarianceExploding")
            for low in (0.0, -1.0, 100.0, float("nan"))
        ),
        *((name, {"sigma_max": float("inf")}) for name in ("EDM", "VarianceExploding")),
        *(("EDM", {"rho": value}) for value in (0.0, float("nan"))),
        *(("Cosine", {"ratio_max": value}) for value in (0.0, float("inf"), float("nan"))),
        *(("VariancePreserving", {name: -1.0}) for name in ("beta_min", "beta_max")),
        *(("VariancePreserving", {name: float("nan")}) for name in ("beta_min", "beta_max")),
    ],
)
def test_schedules_out_of_range_are_refused(name, fields):
    with pytest.raises(ValueError, match="must"):
        getattr(fewstep, name)(**fields)


@pytest.mark.parametrize("table", [(0.9, 0.95), (0.9,), (1.0, 0.5), (0.5, float("nan"))])
def test_bad_tables_are_refused(table):
    with pytest.raises(ValueError, match="alphas_cumprod"):
        fewstep.Tabulated(table)
