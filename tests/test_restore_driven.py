"""`fewstep restore` under a solver and under a tuned schedule."""

import json
import shlex
import sys

import pytest
import torch

import fewstep.restore as restoring
from fewstep import cli
from fewstep.core.driven import Driven, undriven
from fewstep.core.registry import available, get
from fewstep.core.samples import Samples
from fewstep.restore import Settings, restore
from fewstep.solvers.deis import DEIS
from fewstep.solvers.dpmpp import DPMSolverPP
from fewstep.task import build_sampler, command_line
from fewstep.tuning.schedule_file import TunedSchedule
from pictures import PixelPrior, write_png

TIMES = (1.0, 0.6, 0.3, 0.1, 0.0)


@pytest.fixture
def schedule(tmp_path):
    path = tmp_path / "s.json"
    TunedSchedule("ggdm", "natural", "deis", TIMES, {"order": 2}).save(path)
    return path


def settings(**changes):
    return Settings(**{"operator": "denoise", "sigma": 0.1, "samples": 2, "method": "mmps", **changes})


def run(tmp_path, **changes):
    result = restore(write_png(tmp_path), tmp_path / "out", settings(**changes), prior=PixelPrior())
    return result.record, Samples.load(tmp_path / "out").x


def test_the_solver_steps_with_the_prediction_of_the_method(tmp_path):
    """The method's own fields stay the method's, steps are the solver's; DDIM is what the method does without fresh noise."""
    record, x = run(tmp_path, solver="ddim", method_fields={"steps": "5", "iterations": "2"})
    assert record["nfe"] == 5 and record["method"]["name"] == "mmps"
    assert record["method"]["guided"]["iterations"] == 2
    assert record["method"]["solver"]["name"] == "DDIM" and record["method"]["solver"]["steps"] == 5
    _, plain = run(tmp_path, method_fields={"steps": "5", "iterations": "2", "eta": "0"})
    torch.testing.assert_close(x, plain, rtol=1e-4, atol=1e-4)
    _, other = run(tmp_path, solver="dpmpp", method_fields={"steps": "5", "iterations": "2"})
    assert float((other - plain).abs().max()) > 1e-2


def test_a_schedule_brings_its_solver_and_its_times(tmp_path, schedule):
    sampler = build_sampler(settings(schedule=schedule))
    assert sampler.solver == DEIS(4, order=2, grid=TIMES) and sampler.guided == get("mmps")()
    assert build_sampler(settings(schedule=schedule, solver="dpmpp")).solver == DPMSolverPP(4, grid=TIMES)
    assert build_sampler(settings(schedule=schedule, method_fields={"steps": "8"})).solver.steps == 8
    record, _ = run(tmp_path, schedule=schedule)
    assert record["nfe"] == 4 and json.dumps(record["method"]["solver"]["grid"]) == json.dumps(TIMES)


def test_from_the_command_line(tmp_path, schedule, monkeypatch, capsys):
    monkeypatch.setattr(restoring, "load_prior", lambda name: PixelPrior())
    monkeypatch.setattr(cli.signal, "signal", lambda *_: None)
    words = [
        "restore",
        write_png(tmp_path),
        "--operator",
        "denoise",
        "--sigma",
        "0.1",
        "--samples",
        "2",
        "--method",
        "pigdm",
    ]
    words += ["--solver", "dpmpp", "--schedule", schedule, "--steps", "3", "--out", tmp_path / "out"]
    monkeypatch.setattr(sys, "argv", ["fewstep", *map(str, words)])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert not caught.value.code and "2 samples, 3 network calls each" in capsys.readouterr().out
    assert json.loads((tmp_path / "out" / "result.json").read_text())["method"]["solver"]["name"] == "DPMSolverPP"
    assert "--solver dpmpp" in (tmp_path / "out" / "report.html").read_text()


def test_the_command_repeats_it(tmp_path, schedule):
    words = shlex.split(command_line(tmp_path / "a.png", tmp_path, settings(schedule=schedule, solver="dpmpp")))
    for pair in (["--solver", "dpmpp"], ["--schedule", str(schedule)]):
        assert any(words[i : i + 2] == pair for i in range(len(words)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "latino", "solver": "deis"}, "LATINO steps in a way of its own.*can drive: mmps, pigdm"),
        ({"method": "ddrm", "solver": "deis"}, "DDRM steps in a way of its own"),
        ({"method": "ud2m", "solver": "deis"}, "UD2M draws x_0 afresh.*can drive: mmps, pigdm"),
        ({"solver": "diffrs"}, "DiffRS .*; take another solver"),
        ({"solver": "dpmp"}, "did you mean dpmpp"),
        ({"solver": "deis", "method_fields": {"steps": "many"}}, "solver deis: steps must be int"),
        ({"solver": "deis", "method_fields": {"order": "2"}}, "method mmps has no option 'order'"),
        ({"schedule": "none.json"}, "none.json cannot be read as a schedule"),
    ],
)
def test_what_makes_no_sense_is_refused_and_said_why(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message) as caught:
        run(tmp_path, **changes)
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()


def test_every_method_can_be_driven_or_says_why():
    for name in available():
        cls, solver = get(name), DPMSolverPP(3)
        if undriven(cls):
            with pytest.raises(ValueError, match="run it as it is"):
                Driven(cls.preset(next(iter(cls.presets))), solver)
        else:
            assert Driven(cls(), solver).nfe == 3
