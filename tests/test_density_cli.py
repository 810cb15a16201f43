"""`fewstep density`: from a density, named or one's own, to a sampler, draws, a diagnosis and a program."""

from __future__ import annotations

import dataclasses
import inspect
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

import fewstep as library
from fewstep import cli
from fewstep.commands import density as density_commands
from fewstep.commands import density as options
from fewstep.commands.density_target import find
from fewstep.commands.density_training import built, split
from fewstep.core.density import Bounds
from fewstep.core.noise import Streams
from fewstep.densities.base import load_density_sampler
from fewstep.densities.diagnosis import diagnose
from fewstep.densities.distill import OPTIONS
from fewstep.densities.draws import Draws
from fewstep.densities.fit import FitOptions
from fewstep.densities.report import render
from fewstep.densities.targets import available_targets, target
from fewstep.densities.teachers.dis import DIS
from fewstep.densities.user import as_target
from fewstep.training import Trainer

TINY = ("--train-steps", "20", "--batch", "32", "--set", "steps=8", "--set", "net.width=16")
SMALL = ("rows=512", "solver_steps=16", "size.width=16", "polish=0", "balance=1024")
FEW = ("--train-steps", "20", "--batch", "64", *(word for field in SMALL for word in ("--set", field)))
OWN = "def log_prob(x):\n    return -0.5 * (x**2).sum(-1)\n"


def command(*words):
    """Run the command in this process; return its exit code."""
    before = signal.getsignal(signal.SIGTERM)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", "250")
        patch.setattr(sys, "argv", ["fewstep", "density", *map(str, words)])
        with pytest.raises(SystemExit) as caught:
            cli.main()
    signal.signal(signal.SIGTERM, before)
    return caught.value.code or 0


@pytest.fixture
def density(capsys, monkeypatch):
    """Run the command; return (exit code, stdout, stderr)."""
    monkeypatch.delenv("FEWSTEP_DEBUG", raising=False)

    def run(*words):
        code = command(*words)
        return code, *capsys.readouterr()

    return run


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Return a folder with a teacher and a student of nine_modes, trained for twenty steps each."""
    root = tmp_path_factory.mktemp("density")
    assert command("fit", "nine_modes", "--out", root / "teacher", *TINY) == 0
    assert command("distill", root / "teacher", "--out", root / "student", *FEW) == 0
    return root


def own(folder, text=OWN, name="own.py"):
    path = folder / name
    path.write_text(text)
    return path


# ---- what is said on the command line ---------------------------------------------------------------------------------


def test_help_answers_without_what_the_commands_need():
    code = (
        "import sys, fewstep.cli\nfor words in (['--help'], ['density', '--help'], ['density', 'fit', '--help']):\n"
        "    sys.argv = ['fewstep', *words]\n    try:\n        fewstep.cli.main()\n    except SystemExit: pass\n"
        "sys.stderr.write(' '.join({'torch', 'numpy', 'matplotlib', 'deepinv'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr == "" and "--train-steps" in done.stdout


def test_options_are_the_fields_with_their_defaults():
    of_the_sampler = ("train_steps", "batch", "lr", "ema")
    for function, defaults, own in ((options.fit, FitOptions(), of_the_sampler), (options.distill, OPTIONS, ())):
        given = {n: p.default for n, p in inspect.signature(function).parameters.items()}
        shared = [f.name for f in dataclasses.fields(FitOptions) if f.name in given and f.name != "out"]
        assert {"train_steps", "batch", "lr", "ema", "seed", "checkpoint_every"} <= set(shared)
        assert {n: given[n] for n in shared} == {n: None if n in own else getattr(defaults, n) for n in shared}
    fields = {f.name for f in dataclasses.fields(FitOptions)} - {"out", "cpu"}  # the folder, and --gpu
    assert fields <= set(inspect.signature(options.fit).parameters)


def test_options_that_are_not_given_are_those_of_the_sampler(density, monkeypatch, tmp_path):
    seen = []
    monkeypatch.setattr("fewstep.commands.density_training.fit", lambda job, *_: seen.append(job.options) or 0)
    for words in ((), ("--sampler", "matched"), ("--sampler", "matched", "--batch", "7", "--lr", "0.1", "--seed", "3")):
        assert density("fit", "nine_modes", "--out", tmp_path / "o", *words)[0] == 0
    plain, matched, given = seen
    assert plain == replace(FitOptions(), checkpoint_every=plain.checkpoint_every)
    assert (matched.train_steps, matched.batch, matched.lr, matched.ema) == (8000, 512, 4e-3, 0.999)
    assert given == replace(matched, batch=7, lr=0.1, seed=3)
    assert f"mostly {plain.train_steps}" in density("fit", "--help")[1]


def test_assignments_go_to_the_sampler_or_to_the_density():
    words = {"steps": "3", "net.width": "8", "seed": "4", "target.grid": "5"}
    assert split(words, DIS) == ({"seed": "4", "grid": "5"}, {"steps": "3", "net.width": "8"})
    teacher = built(DIS(), {"steps": "3", "net.width": "8", "grid": "cosine"}, "sampler dis")
    assert (teacher.steps, teacher.net.width, teacher.net.depth, teacher.grid) == (3, 8, DIS().net.depth, "cosine")
    with pytest.raises(ValueError, match="net has no option 'widht'; did you mean width"):
        built(DIS(), {"net.widht": "8"}, "sampler dis")
    with pytest.raises(ValueError, match="steps has no fields"):
        built(DIS(), {"steps.x": "8"}, "sampler dis")


def test_targets_are_listed(density):
    code, out, _ = density("targets")
    rows = {line.split()[0]: line for line in out.splitlines() if line.split()}
    assert code == 0 and set(available_targets()) <= set(rows)
    assert (
        "-108.392 to -108.374" in rows["sonar"]
        and " yes " in rows["nine_modes"]
        and "--set seed=" in rows["many_modes"]
    )
    code, out, _ = density("targets", "funnel")
    assert code == 0 and re.search(r"^dim\s+int\s+10\s+d, at least 2", out, re.MULTILINE)


def test_samplers_are_listed(density):
    code, out, _ = density("samplers")
    rows = {line.split()[0]: line for line in out.splitlines() if line.split()}
    assert code == 0 and {*library.available("teachers"), "cdds"} <= set(rows)
    assert DIS.default_loss in rows["dis"] and "arXiv:2211.01364" in out
    code, out, _ = density("samplers", "dis")
    assert re.search(rf"^steps\s+int\s+{DIS().steps}\s+of a path, in training", out, re.MULTILINE)
    assert repr(DIS().net) in out
    assert density("samplers", "cdds")[0] == 0
    code, _, err = density("samplers", "diss")
    assert code == 2 and "did you mean dis" in err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("fit", "nine_mods", "--out", "o"), "unknown target 'nine_mods'; did you mean nine_modes"),
        (("fit", "nine_modes", "--out", "o", "--sampler", "diss"), "did you mean dis"),
        (("fit", "nine_modes", "--out", "o", "--loss", "klx"), "did you mean kl"),
        (
            ("fit", "nine_modes", "--out", "o", "--sampler", "matched", "--preset", "wide"),
            "no preset 'wide'; it has narrow, modes",
        ),
        (("fit", "nine_modes", "--out", "o", "--bacth", "3"), "nine_modes has no option 'bacth'; did you mean batch"),
        (("fit", "nine_modes", "--out", "o", "--set", "stpes=3"), "has no option 'stpes'; did you mean steps"),
        (("distill", "nine_modes", "--out", "o", "--set", "polsh=3"), "has no option 'polsh'; did you mean polish"),
        (("fit", "funnel", "--dim", "x", "--out", "o"), "funnel: dim must be int, got 'x'"),
        (("fit", "funnel", "--dim", "1", "--out", "o"), "the funnel needs dim >= 2"),
        (("fit", "--dim", "3", "funnel", "--out", "o"), "TARGET comes first"),
        (("fit", "sonar", "--out", "o"), "sonar needs data"),
        (("fit", "own.py", "--out", "o"), "give --dim"),
        (("fit", "own.py:log_pro", "--dim", "2", "--out", "o"), "has no 'log_pro'; did you mean log_prob"),
        (("fit", "none.py", "--dim", "2", "--out", "o"), "there is no file none.py"),
        (("fit", "broken.py", "--dim", "2", "--out", "o"), "broken.py cannot be imported: SyntaxError"),
        (("fit", "no.such.module:f", "--dim", "2", "--out", "o"), "cannot be imported: ModuleNotFoundError"),
        (("fit", "own.py:number", "--dim", "2", "--out", "o"), "is no function, but of type int"),
        (
            ("fit", "own.py:Data", "--dim", "2", "--out", "o"),
            "own.py:Data is a class, but no TargetDensity: name an object",
        ),
        (("fit", "own.py:shapes", "--dim", "2", "--out", "o"), "log_prob must map"),
        (("fit", "own.py:flat", "--dim", "2", "--out", "o"), "its integral diverges"),
        (("fit", "own.py:nothing", "--dim", "2", "--out", "o"), "log_prob is NaN at 17 of 17 points"),
        (("fit", "own.py:rounded", "--dim", "2", "--out", "o"), "not differentiable"),
        (("distill", "nine_modes", "--out", "o"), "give --teacher FOLDER"),
        (("distill", "nine_modes", "--out", "o", "--method", "cds"), "did you mean cdds"),
        (("sample", "nine_modes"), "give --from FOLDER"),
        (("sample", "nine_modes", "--from", "empty"), "is missing: this is no folder of weights"),
        (("sample", "empty"), "was not written by"),
        (("sample", "nine_modes", "--from", "empty", "--out", "x.txt"), "files that end in .safetensors, .npz, .csv"),
        (("diagnose", "nine_modes", "--draws", "x.csv"), "read from files that end in .safetensors or .npz"),
    ],
    ids=lambda v: " ".join(v[:2]) if isinstance(v, tuple) else "",
)
def test_errors_are_one_line_and_leave_no_folder(density, tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    own(tmp_path, "def log_prob(x)\n", "broken.py")
    own(
        tmp_path,
        OWN + "number = 3\nclass Data:\n    def __init__(self, rows):\n        self.rows = rows\n"
        "def shapes(x):\n    return x\ndef flat(x):\n    return -0.5 * x[..., 0] ** 2\n"
        "def nothing(x):\n    return (x / 0 * 0).sum(-1)\ndef rounded(x):\n    return -(x**2).sum(-1).round()\n",
    )
    code, _, err = density(*words)
    assert code == 2 and message in err and err.count("\n") == 1
    assert not (tmp_path / "o").exists()


# ---- from a density to draws ---------------------------------------------------------------------------------------------


def test_fit_writes_a_sampler_and_its_card(folders):
    sampler = load_density_sampler(folders / "teacher", target("nine_modes"))
    assert sampler.steps == 8
    record = json.loads((folders / "teacher" / "run.json").read_text())
    assert record["target"] == {"name": "nine_modes", "fields": {}} and record["steps_done"] == 20
    assert not record["interrupted"] and record["quality"]["draws"] == 1024
    assert record["quality"]["ess"] == pytest.approx(sampler.sample(1024).ess)
    card = (folders / "teacher" / "README.md").read_text()
    for text in ("20 of 20 steps", 'fewstep.target("nine_modes")', record["command"], "unbiased", "arXiv:2211.01364"):
        assert text in card
    assert len((folders / "teacher" / "log.jsonl").read_text().splitlines()) == 1


def test_what_too_few_draws_do_not_tell_is_said(density, folders):
    told = {n: density("sample", folders / "student", "--num", n)[1] for n in ("1", "24", "30")}
    assert told["1"].count("too few draws to tell") == 2 and told["24"].count("too few draws to tell") == 1
    assert "too few" not in told["30"] and not any("nan" in out or "-inf" in out for out in told.values())


def test_the_card_says_what_works(folders):
    card = (folders / "student" / "README.md").read_text()
    code = re.search(r"```python\n(.*?)```", card, re.DOTALL)[1].replace(
        "PATH OF THIS FOLDER", str(folders / "student")
    )
    names = {}
    exec(code, names)
    assert names["draws"].x.shape == (10_000, 2) and names["draws"].nfe == 1


@pytest.mark.parametrize("suffix", ["safetensors", "npz", "csv"])
def test_sample_writes_draws_and_says_what_they_are_worth(density, folders, tmp_path, suffix):
    file = tmp_path / f"d.{suffix}"
    code, out, err = density("sample", folders / "student", "--num", "500", "--seed", "3", "--out", file)
    draws = load_density_sampler(folders / "student", target("nine_modes")).sample(500, seed=3)
    assert (code, err) == (0, "")
    low, high = draws.log_z_interval()
    end = f"{high:.4f}" if np.isfinite(high) else "no upper end"
    for text in (
        f"{100 * draws.ess:.2f} % of 500",
        f"{draws.log_z:.4f} [{low:.4f}, {end}] at 95 %, unbiased; true value 0.0000",
        f"{draws.khat:.3f}, should be below",
        "1 network, 1 log-density, 0 gradient",
    ):
        assert text in out
    if suffix == "csv":
        assert file.read_text().splitlines()[0] == "x_1,x_2,log_weight"
        kept = np.loadtxt(file, delimiter=",", skiprows=1)
        np.testing.assert_allclose(kept, np.column_stack([draws.x, draws.log_weights]), rtol=1e-6)
    else:
        kept = Draws.load(file)
        assert torch.equal(kept.x, draws.x) and torch.equal(kept.log_weights, draws.log_weights)
        assert (kept.kind, kept.nfe, kept.target_calls, kept.seed) == ("unbiased", 1, 1, 3)


@pytest.mark.parametrize("suffix", ["safetensors", "npz"])
def test_a_diagnosis_tells_draws_of_another_density(density, folders, tmp_path, suffix):
    file = tmp_path / f"d.{suffix}"
    assert density("sample", folders / "student", "--num", "256", "--out", file)[0] == 0
    words = ("--draws", file, "--rows", "64")
    code, _, err = density("diagnose", "nine_modes", *words, "--out", tmp_path / "own")
    assert code == 0 and "holds draws of" not in err
    code, _, err = density("diagnose", "rings", *words, "--out", tmp_path / "other")
    assert code == 0 and "holds draws of nine_modes" in err and "not of this density" in err


def test_steps_and_weights_of_a_draw_are_options(density, folders):
    words = ("sample", "nine_modes", "--from", folders / "teacher", "--steps", "3", "--no-weights", "--num", "64")
    code, out, err = density(*words)
    assert (code, err) == (0, "") and "3 network, 0 log-density, 3 gradient" in out
    assert "none: the draws stand" in out and "ESS" not in out


def test_a_sampler_of_another_density_is_told(density, folders):
    code, out, err = density("sample", "rings", "--from", folders / "teacher", "--num", "64")
    assert code == 0 and "teacher was trained for nine_modes" in err and "true value 2.3049" in out
    code, _, err = density("sample", "mw54", "--from", folders / "teacher")
    assert code == 2 and "2 dimensions, not of 5" in err
    code, _, err = density("fit", "rings", "--out", folders / "teacher", *TINY)
    assert code == 2 and "is of another density, nine_modes" in err
    code, _, err = density("fit", "nine_modes", "--out", folders / "teacher", "--no-resume", *TINY)
    assert code == 2 and "holds checkpoints" in err
    code, _, err = density("distill", folders / "student", "--out", folders / "more")
    assert code == 2 and "nothing can be distilled" in err and not (folders / "more").exists()
    code, _, err = density("distill", folders / "teacher", "--out", folders / "teacher")
    assert code == 2 and "folders of their own" in err
    before = (folders / "teacher" / "run.json").read_bytes()
    code, _, err = density("fit", "nine_modes", "--out", folders / "teacher", *TINY, "--batch", "64")
    assert code == 2 and "a run with another batch" in err and (folders / "teacher" / "run.json").read_bytes() == before
    code, _, err = density("fit", "nine_modes", "--out", folders / "student", *TINY)
    assert code == 2 and "was not distilled from this teacher" in err


@pytest.mark.parametrize("words, name", [(("--seed", "7"), "seed"), (("--lr", "0.001"), "lr")])
def test_a_student_of_another_seed_or_rate_is_told(density, folders, words, name):
    """And what the folder holds of the first run stays."""
    out = folders / "student"
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    code, _, err = density("distill", folders / "teacher", "--out", out, *FEW, *words)
    assert code == 2 and f"a run with another {name}; choose another" in err and err.count("\n") == 1
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


def test_export_writes_the_map(density, folders, tmp_path):
    code, out, _ = density("export", folders / "student", "--out", tmp_path / "m.pt2")
    assert code == 0 and "z -> x in 1 step" in out
    z = Streams(0, range(40)).randn(2)
    program = torch.export.load(tmp_path / "m.pt2").module()
    drawn = load_density_sampler(folders / "student", target("nine_modes")).sample(40, weights=False).x
    torch.testing.assert_close(program(z), drawn, rtol=1e-4, atol=1e-4)
    code, _, err = density("export", folders / "teacher", "--out", tmp_path / "t.pt2")
    assert code == 2 and "distil it first" in err


def test_the_command_distils_as_the_function_does():
    given = {name: p.default for name, p in inspect.signature(density_commands.distill).parameters.items()}
    assert {name: given[name] for name in ("train_steps", "batch", "lr", "ema")} == {
        name: getattr(OPTIONS, name) for name in ("train_steps", "batch", "lr", "ema")
    }


# ---- interruption --------------------------------------------------------------------------------------------------------


def test_an_interrupted_run_keeps_what_it_has_and_goes_on(density, folders, tmp_path, monkeypatch):
    step = Trainer._train_step

    def stopped(self):
        if self.step == 6:
            os.kill(os.getpid(), signal.SIGINT)
        return step(self)

    out = tmp_path / "o"
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_train_step", stopped)
        code, _, err = density("fit", "nine_modes", "--out", out, *TINY)
    assert code == 130 and "interrupted after step 7 of 20; run again to go on" in err
    record = json.loads((out / "run.json").read_text())
    assert record["interrupted"] and record["steps_done"] == 7 and record["quality"] == {}
    assert "7 of 20 steps" in (out / "README.md").read_text() and "not measured" in (out / "README.md").read_text()
    assert bool(load_density_sampler(out, target("nine_modes")).sample(10).x.isfinite().all())
    code, _, err = density("sample", out, "--num", "64")
    assert code == 0 and "was interrupted after step 7" in err
    code, _, _ = density("fit", "nine_modes", "--out", out, *TINY)
    assert code == 0 and not json.loads((out / "run.json").read_text())["interrupted"]
    whole, resumed = (
        load_density_sampler(place, target("nine_modes")).tensors() for place in (folders / "teacher", out)
    )
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_an_interrupted_polish_is_noticed(density, folders, tmp_path, monkeypatch):
    step = Trainer._train_step

    def stopped(self):
        if self.out.name == "polish" and self.step == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return step(self)

    words = ("distill", folders / "teacher", "--out", tmp_path / "o", "--train-steps", "5", "--batch", "64")
    words += tuple(
        w for f in ("rows=512", "solver_steps=16", "size.width=16", "polish=6", "balance=1024") for w in ("--set", f)
    )
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_train_step", stopped)
        code, _, err = density(*words)
    assert code == 130 and "interrupted in polish; run again to go on" in err
    assert json.loads((tmp_path / "o" / "run.json").read_text())["interrupted"]
    assert density(*words)[0] == 0 and not json.loads((tmp_path / "o" / "run.json").read_text())["interrupted"]


# ---- one's own density ---------------------------------------------------------------------------------------------------


def test_two_lines_of_ones_own(density, tmp_path):
    path, out = own(tmp_path), tmp_path / "o"
    code, told, err = density("fit", path, "--dim", "2", "--out", out, *TINY)
    assert (code, err) == (0, "") and "ESS" in told and "true value" not in told
    code, told, _ = density("sample", f"{path}:log_prob", "--dim", "2", "--from", out, "--num", "4000")
    low, high = map(float, re.search(r"\[(\S+), (\S+)\] at 95", told).groups())
    assert code == 0 and low - 0.05 < np.log(2 * np.pi) < high + 0.05
    code, _, err = density("sample", out)  # a folder must not decide which code is run
    assert code == 2 and f"is of {path}:log_prob: name that" in err
    code, _, err = density("sample", path, "--dim", "3", "--from", out)
    assert code == 2 and "was trained for" in err and "2 dimensions, not of 3" in err
    path.write_text(OWN.replace("0.5", "0.6"))
    code, _, err = density("fit", path, "--dim", "2", "--out", out, *TINY)
    assert code == 2 and "is of another density" in err and "as it was then" in err


def test_a_training_that_left_nothing_binds_its_folder_to_nothing(density, tmp_path, monkeypatch):
    def failed(self):
        raise FloatingPointError("the gradient is not finite")

    path, out = own(tmp_path), tmp_path / "o"
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_train_step", failed)
        code, _, err = density("fit", path, "--dim", "2", "--out", out, *TINY)
    assert code != 0 and "is not finite" in err and (out / "run.json").is_file()
    path.write_text(OWN.replace("0.5", "0.6"))
    assert density("fit", path, "--dim", "2", "--out", out, *TINY)[0] == 0


def test_a_box_and_a_score_are_options(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    own(tmp_path, "def flat(x):\n    return 0 * x.sum(-1)\ndef slope(x):\n    return 0 * x\n", "boxed.py")
    found = find("boxed:flat", {"dim": "3", "low": "-1", "high": "2", "score": "slope", "log-z": "3.2958"})
    assert found.density.support == (-1.0, 2.0) and found.density.log_z == 3.2958
    assert found.density.own_score is not None and found.record["path"] == "boxed:flat"
    assert len(found.record["sha256"]) == 64


def test_a_box_may_bound_single_coordinates(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    own(tmp_path, "def fall(x):\n    return -x.abs().sum(-1)\n", "halved.py")
    found = find("halved:fall", {"dim": "3", "low": "0,none,-1", "high": "None,2,inf"})
    names = {"fewstep": library, **vars(sys.modules["halved"])}
    exec(found.code, names)
    for made in (found.density, names["target"]):
        assert [end.tolist() for end in made.support] == [[0.0, -math.inf, -1.0], [math.inf, 2.0, math.inf]]
    with pytest.raises(ValueError, match="must be numbers or 3 of them"):
        find("halved:fall", {"dim": "3", "low": "0,none"})


def test_the_line_of_a_card_makes_the_same_density(tmp_path, monkeypatch):
    """Of a function with its box, score and log Z, of a class with fields, of an object, and of a density of the zoo."""
    monkeypatch.chdir(tmp_path)
    body = "import math\nfrom fewstep.densities.targets.funnel import Funnel\nfrom dataclasses import dataclass\n"
    body += "def fall(x):\n    return -x.sum(-1)\ndef slope(x):\n    return 0 * x - 1\n"
    body += "@dataclass(frozen=True)\nclass Mine(Funnel):\n    pass\nready = Mine(dim=4)\n"
    body += (
        "class Bell:\n    dim = 3\n    def __call__(self, x):\n        return -0.5 * (x**2).sum(-1)\nbell = Bell()\n"
    )
    own(tmp_path, body, "cards.py")
    for word, given in (
        ("cards:fall", {"dim": "2", "low": "0", "score": "slope", "log-z": "1.5"}),
        ("cards:fall", {"dim": "2", "low": "0", "high": "1"}),
        ("cards:Mine", {"dim": "3"}),
        ("cards:ready", {}),
        ("cards:bell", {}),
        ("funnel", {"dim": "5"}),
    ):
        found = find(word, given)
        names = {"fewstep": library, **vars(sys.modules["cards"])} if ":" in word else {"fewstep": library}
        exec(found.code, names)
        made = names["target"]
        assert (made.dim, made.support, made.log_z) == (found.density.dim, found.density.support, found.density.log_z)
        assert type(made) is type(found.density)
        assert getattr(made, "own_score", None) == getattr(found.density, "own_score", None)


def test_a_name_goes_before_a_folder_of_that_name(tmp_path, folders, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "funnel").symlink_to(folders / "teacher", target_is_directory=True)
    assert find("funnel", {"dim": "4"}).density.dim == 4
    assert find("./funnel", {}).name == "nine_modes" and find("./funnel", {}).folder is not None
    with pytest.raises(ValueError, match="leave out --dim"):
        find("./funnel", {"dim": "4"})


def test_a_class_and_an_object_of_ones_own(tmp_path):
    text = (
        "from __future__ import annotations\nfrom dataclasses import dataclass\nimport fewstep\n@dataclass(frozen=True)\n"
        "class Wide(fewstep.TargetDensity):\n    dim: int = 2\n    width: float = 2.0\n"
        "    def log_prob(self, x):\n        return -(x**2).sum(1) / (2 * self.width**2)\nwide = Wide(3)\n"
    )
    path = own(tmp_path, text)
    assert find(f"{path}:Wide", {"width": "3"}).density.width == 3.0
    assert find(f"{path}:wide", {}).density.dim == 3
    with pytest.raises(ValueError, match="takes no options"):
        find(f"{path}:wide", {"low": "3"})


def test_nan_among_good_values_is_told(density, tmp_path):
    text = "def log_prob(x):\n    return (-0.5 * (x**2) + 0 * (0.5 - x).sqrt()).sum(-1)\n"
    path = own(tmp_path, text)
    code, _, err = density("fit", path, "--dim", "1", "--out", tmp_path / "o", *TINY)
    assert code == 0 and "log_prob is NaN at" in err and "note:" in err and "Traceback" not in err
    code, out, err = density("sample", path, "--dim", "1", "--from", tmp_path / "o", "--num", "1000")
    assert code == 0 and re.search(r"note: \d+ of \d+ values of log_prob are NaN or \+inf; they count as no mass", err)
    assert "log Z" in out


# ---- diagnosis -----------------------------------------------------------------------------------------------------------


def exact(name, count, seed, **fields):
    density = target(name, **fields)
    return density, Draws(density.sample(Streams(seed, range(count))), seed=seed)


def test_diagnose_writes_a_report_and_numbers(density, folders, tmp_path):
    out = tmp_path / "<o>"
    words = ("diagnose", folders / "student", "--num", "600", "--rows", "200", "--out", out)
    code, told, err = density(*words)
    assert (code, err) == (0, "") and "energy distance" in told and "mode weights" in told
    page = (out / "report.html").read_text()
    sources = re.findall(r"(?:src|href)='([^']*)'", page)
    assert len(sources) == 4 and all(s.startswith("data:image/png;base64,") for s in sources)
    assert "<script" not in page and "&lt;o&gt;" in page and "<o>" not in page
    result = json.loads((out / "result.json").read_text())
    assert set(result["distances"]) == {"energy distance", "squared MMD", "sliced Wasserstein-2", "Wasserstein-1"}
    assert set(result["expectations"]) == {"mean", "variance", "mode_weights"} and result["log_z_true"] == 0
    assert result["draws"] == 600 and result["missing"] == {}
    code, told, _ = density("sample", folders / "student", "--num", "600", "--out", tmp_path / "d.npz")
    code, told, _ = density("diagnose", "nine_modes", "--draws", tmp_path / "d.npz", "--rows", "200", "--out", out)
    again = json.loads((out / "result.json").read_text())
    assert code == 0 and again["distances"] == result["distances"] and again["ess"] == result["ess"]


def test_exact_draws_pass_and_wrong_ones_do_not():
    density, right = exact("nine_modes", 2000, 5)
    found = diagnose(right, density, rows=400)
    assert found.warnings() == [] and found.summary["kind"] is None and "ess" not in found.summary
    for value in found.distances.values():
        # from below too: draws that share their randomness with the exact ones would be at distance zero
        assert abs(value.drawn - value.floor) < 5 * value.spread and value.weighted is None
    for known in found.known.values():
        assert bool(((known.drawn[0] - known.exact).abs() < 4.5 * known.drawn[1]).all())
    chains = Draws(right.x[density.modes(right.x).argsort()], seed=5)  # one mode after the other
    for value in diagnose(chains, density, rows=400).distances.values():
        assert abs(value.drawn - value.floor) < 5 * value.spread
    for wrong in ({"rows": 1}, {"level": 1.5}):
        with pytest.raises(ValueError, match=r"at least 2|level must lie"):
            diagnose(right, density, **wrong)
    lost = Draws(right.x[density.modes(right.x) != 4], seed=5)
    found = diagnose(lost, density, rows=400)
    assert found.warnings() == ["modes that are (almost) missed: 4"]
    exact_share, (share, error), _ = found.known["mode_weights"]
    assert float(share[4]) == 0 and bool(((share - exact_share).abs() > 2 * error).any())
    narrow = diagnose(Draws(0.7 * right.x, seed=5), density, rows=400)
    for name in ("energy distance", "Wasserstein-1"):
        value = narrow.distances[name]
        assert value.drawn > value.floor + 5 * value.spread


def missing_bounds(low, high):
    """Return what is said of right draws of N(0, 1) / sqrt(2 pi) where log Z = 0 is said to lie in [low, high]."""

    @dataclasses.dataclass(frozen=True)
    class Bounded(library.TargetDensity):
        dim: int = 1
        log_z_bounds = Bounds(low, high, "a test")

        def log_prob(self, x):
            return -0.5 * x[:, 0] ** 2 - 0.5 * np.log(2 * np.pi)

    x = Streams(0, range(100)).randn(1)
    return diagnose(Draws(x, torch.zeros(100, dtype=torch.float64), "unbiased"), Bounded(), rows=50).warnings()[:-1]


def test_weights_mend_draws_and_their_faults_are_named():
    density, wide = exact("two_modes", 4000, 1, dim=2)
    z = 1.5 * Streams(2, range(4000)).randn(2)
    log_w = density.log_prob(z).double() + z.double().square().sum(1) / 4.5 + np.log(2 * np.pi * 2.25)
    found = diagnose(Draws(z, log_w, "unbiased"), density, rows=50)
    for known in found.known.values():
        value, error = known.weighted
        assert bool(((value - known.exact).abs() < 4.5 * error).all())
    off = found.known["mode_weights"]
    assert bool(((off.drawn[0] - off.exact).abs() > 4.5 * off.drawn[1]).any())
    assert found.distances["Wasserstein-1"].weighted < found.distances["Wasserstein-1"].drawn
    assert found.warnings() == []
    shifted = diagnose(Draws(z, log_w + 1, "unbiased"), density, rows=50)
    assert "misses what is known, 0 to 0" in shifted.warnings()[0]
    invalid = diagnose(Draws(z, log_w, "invalid"), density, rows=50)
    assert "say nothing about the density" in invalid.warnings()[0] and invalid.known["mean"].weighted is None
    broken = wide.x.clone()
    broken[3, 0] = torch.nan
    heavy = diagnose(Draws(broken, 5 * z[:, 0].double() ** 2, "unbiased"), density, rows=50)
    assert "k-hat" in heavy.warnings()[0] and "1 of 4000 draws are not finite" in heavy.warnings()[1]
    assert missing_bounds(-1.0, 1.0) == [] and "misses" in missing_bounds(3.0, 4.0)[0]
    signs = 1 - 2 * (z[:, 0] > 3).double()
    turned = diagnose(Draws(wide.x, 0 * signs, "unbiased", signs=signs), density)
    assert f"folds at {turned.draws.folds} of 4000 draws" in turned.warnings()[0] and turned.summary["folds"] > 0
    assert "elbo" not in turned.summary and "draws of negative weight" in render(turned, "t", "c")
    for case in (found, invalid, heavy):
        assert render(case, "<title>", "a command").count("<img") >= 3


@pytest.mark.parametrize("boxed", [False, True])
def test_without_exact_draws_the_stein_discrepancy_speaks(boxed):
    def gaussian(x):
        return -0.5 * (x**2).sum(-1)

    def uniform(x):
        return 0 * x.sum(-1)

    law = as_target(uniform, 2, support=(0.0, 1.0)) if boxed else as_target(gaussian, 2)
    noise = Streams(0, range(1000))
    right = noise.rand(2) if boxed else noise.randn(2)
    found = diagnose(Draws(right), law, rows=600)
    value, error = found.stein
    assert abs(value) < 4 * error and found.distances == {} and "nearly blind" in found.warnings()[0]
    value, error = diagnose(Draws(right**2 if boxed else 0.7 * right), law, rows=600).stein
    assert value > 5 * error
    assert "Stein" in render(found, "t", "c") and found.record()["squared_stein_discrepancy"]["error"] > 0


@pytest.mark.parametrize("suffix", [".safetensors", ".npz", ".csv"])
def test_signs_of_weights_survive_the_disk(tmp_path, suffix):
    log_w, signs = torch.zeros(6).double(), torch.tensor([1.0, -1, 1, 1, 1, 1]).double()
    draws, path = Draws(torch.zeros(6, 2), log_w, "unbiased", signs=signs), tmp_path / f"d{suffix}"
    draws.save(path)
    if suffix == ".csv":
        head, _, second = path.read_text().splitlines()[:3]
        assert head == "x_1,x_2,log_weight,sign" and second == "0,0,0,-1"
        return
    again = Draws.load(path)
    assert torch.equal(again.signs, signs) and again.log_z == draws.log_z == pytest.approx(-0.405465)


def test_draws_that_do_not_fit_are_refused(tmp_path):
    density, draws = exact("nine_modes", 20, 0)
    with pytest.raises(ValueError, match="2 dimensions, the density has 10"):
        diagnose(draws, target("funnel"))
    with pytest.raises(ValueError, match="at least 10 finite draws"):
        diagnose(Draws(draws.x[:9]), density)
    np.savez(tmp_path / "a.npz", y=np.zeros(3))
    np.savez(tmp_path / "b.npz", x=np.zeros((30, 2)))
    np.savez(tmp_path / "c.npz", x=np.zeros((30, 2)), log_weights=np.zeros(30))
    (tmp_path / "d.safetensors").write_bytes(b"no")
    assert Draws.load(tmp_path / "b.npz").kind is None
    with pytest.raises(ValueError, match=r"files that end in \.safetensors, \.npz, \.csv"):
        draws.save(tmp_path / "x.txt")
    for name, message in (
        ("a.npz", "no array x"),
        ("c.npz", "weights need a kind"),
        ("d.safetensors", "cannot be read"),
    ):
        with pytest.raises(ValueError, match=message):
            Draws.load(tmp_path / name)
    draws.save(tmp_path / "new" / "e.safetensors")
    assert torch.equal(Draws.load(tmp_path / "new" / "e.safetensors").x, draws.x)


@pytest.mark.parametrize("suffix", [".safetensors", ".npz"])
def test_draws_are_kept_whole(tmp_path, suffix):
    """All fields, by a path in text, whose names are those of the class."""
    log_w = torch.zeros(6).double()
    draws = Draws(torch.rand(6, 2), log_w, "consistent", 3.0, 2.0, 1.0, 0.5, 7, 2, torch.tensor([1.0, -1] * 3).double())
    draws.save(f"{tmp_path}/d{suffix}")
    again = Draws.load(f"{tmp_path}/d{suffix}")
    for field in dataclasses.fields(Draws):
        mine, kept = getattr(draws, field.name), getattr(again, field.name)
        assert torch.equal(mine, kept) if isinstance(mine, torch.Tensor) else mine == kept


def test_public_names_are_those_of_the_card():
    assert {"target", "load_density_sampler", "fit", "distill"} <= set(library.__all__)


def test_weights_of_another_layout_are_refused(folders, tmp_path):
    shutil.copytree(folders / "teacher", tmp_path / "old")
    header = json.loads((tmp_path / "old" / "config.json").read_text())
    (tmp_path / "old" / "config.json").write_text(json.dumps(header | {"layout": 0}))
    with pytest.raises(ValueError, match="another version of fewstep"):
        load_density_sampler(tmp_path / "old", target("nine_modes"))
