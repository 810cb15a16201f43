"""The command: options from fields, one-line errors, exit codes."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import fewstep.restore as restoring
from fewstep import cli
from fewstep.core.registry import available, get
from fewstep.operators.words import get_operator, operators
from pictures import PixelPrior, write_png

FEW = ["--method", "latino", "--operator", "denoise", "--sigma", "0.1", "--samples", "2", "--steps", "3"]


@pytest.fixture(autouse=True)
def small_prior(monkeypatch):
    monkeypatch.setattr(restoring, "load_prior", lambda name: PixelPrior())
    monkeypatch.setenv("COLUMNS", "250")
    monkeypatch.delenv("FEWSTEP_DEBUG", raising=False)


@pytest.fixture
def fewstep(monkeypatch, capsys):
    """Run the command in this process; return (exit code, stdout, stderr)."""
    before = signal.getsignal(signal.SIGTERM)

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["fewstep", *map(str, words)])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        out, err = capsys.readouterr()
        return caught.value.code or 0, out, err

    yield run
    signal.signal(signal.SIGTERM, before)


def test_restore(fewstep, tmp_path):
    code, out, _ = fewstep("restore", write_png(tmp_path), *FEW, "--simulate", "--out", tmp_path / "out")
    record = json.loads((tmp_path / "out" / "result.json").read_text())
    assert code == 0 and "2 samples, 3 network calls each" in out and "psnr_mean" in out
    assert "latino on " in out
    assert record["num_samples"] == 2 and record["nfe"] == 3 and record["method"]["name"] == "latino"


def test_options_of_operators_and_fields_of_methods(fewstep, tmp_path):
    words = [
        "--operator",
        "sr",
        "--factor",
        "2",
        "--sigma",
        "0.05",
        "--simulate",
        "--method",
        "dds",
        "--set",
        "steps=2",
    ]
    code, _, err = fewstep("restore", write_png(tmp_path), *words, "--samples", "1", "--out", tmp_path / "out")
    assert code == 0, err
    record = json.loads((tmp_path / "out" / "result.json").read_text())
    assert record["method"]["steps"] == 2 and "factor 2" in record["operator"]["description"]


def test_every_field_of_every_operator_is_an_option(fewstep):
    _, out, _ = fewstep("restore", "--help")
    from fewstep.commands.extras import operator_fields

    for option in operator_fields():
        assert f"--{option.replace('_', '-')}" in out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--operator", "denoise", "--factor", "4"], "denoise has no option 'factor'"),
        (["--operator", "deblr"], "did you mean deblur"),
        (["--operator", "denoise", "--method", "dsp"], "did you mean dps"),
        (["--operator", "denoise", "--set", "stepz=3"], "did you mean steps"),
        (["--operator", "denoise", "--set", "steps"], "expected field=value"),
        (["--operator", "denoise", "--sigma", "-1"], "not negative"),
        (["--operator", "denoise", "--sigma", "nan"], "finite"),
        (["--operator", "deblur", "--kernel", "none.npy", "--sigma", "0.1"], "none.npy: no such file"),
        ([], "--operator"),
    ],
)
def test_errors_are_one_red_line(fewstep, tmp_path, words, message):
    code, _, err = fewstep("restore", write_png(tmp_path), *words, "--out", tmp_path / "out")
    assert code == 2 and err.startswith("error:") and message in err
    assert len(err.strip().splitlines()) == 1 and "Traceback" not in err
    assert not (tmp_path / "out").exists()


def test_wrong_path(fewstep, tmp_path):
    code, _, err = fewstep("restore", tmp_path / "none.png", "--operator", "denoise")
    assert code == 2 and "does not exist" in err


@pytest.mark.parametrize("given", [("--out", ""), ("--out=",)])
def test_an_empty_word_is_not_the_current_folder(fewstep, tmp_path, monkeypatch, given):
    monkeypatch.chdir(tmp_path)
    code, _, err = fewstep("restore", write_png(tmp_path), *FEW, *given)
    assert code == 2 and "nothing is given after --out" in err and len(list(tmp_path.iterdir())) == 1


def test_unknown_option_is_a_usage_error(fewstep, tmp_path):
    code, _, err = fewstep("restore", write_png(tmp_path), "--sampels", "3")
    assert code == 2 and "--samples" in err


def test_debug_shows_the_traceback(monkeypatch, tmp_path):
    monkeypatch.setenv("FEWSTEP_DEBUG", "1")
    monkeypatch.setattr(sys, "argv", ["fewstep", "restore", str(tmp_path / "none.png")])
    with pytest.raises(ValueError, match="does not exist"):
        cli.main()


def test_a_folder_goes_on_after_a_bad_image(fewstep, tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    write_png(folder, "a.png"), write_png(folder, "c.png")
    (folder / "b.png").write_text("no image")
    code, out, err = fewstep("restore", folder, *FEW, "--quiet", "--out", tmp_path / "out")
    assert code == 1 and "b.png" in err and out.count("2 samples") == 2


def test_interruption_has_its_own_exit_code(fewstep, tmp_path, monkeypatch):
    class Impatient(PixelPrior):
        calls = 0

        def forward(self, x_t, t, **cond):
            self.calls += 1
            if self.calls == 5:
                os.kill(os.getpid(), signal.SIGTERM)
            return super().forward(x_t, t, **cond)

    monkeypatch.setattr(restoring, "load_prior", lambda name: Impatient())
    monkeypatch.setattr(restoring._Run, "_chunk", lambda self: 1)
    code, out, _ = fewstep("restore", write_png(tmp_path), *FEW, "--out", tmp_path / "out")
    assert code == 130 and "interrupted after 1 samples" in out
    assert json.loads((tmp_path / "out" / "result.json").read_text())["interrupted"]


def test_simulate_then_restore(fewstep, tmp_path):
    path = write_png(tmp_path)
    words = ["--operator", "deblur-gaussian", "--width", "1", "--sigma", "0.02"]
    code, _, err = fewstep("simulate", path, *words, "--out", tmp_path / "sim")
    assert code == 0, err
    assert {p.name for p in (tmp_path / "sim").iterdir()} == {
        "measurement.png",
        "measurement.safetensors",
        "truth.png",
        "simulation.json",
    }
    y = load_file(tmp_path / "sim" / "measurement.safetensors")["y"]
    assert y.shape == (1, 3, 24, 32) and not torch.equal(y, (y * 255).round() / 255)
    few = ["--samples", "1", "--steps", "2", "--out", tmp_path / "out"]
    assert fewstep("restore", tmp_path / "sim" / "measurement.safetensors", *words, *few)[0] == 0


def test_simulate_keeps_its_input_and_the_files_of_others(fewstep, tmp_path):
    words = ["--operator", "denoise", "--sigma", "0.1", "--out", tmp_path]
    for name, other in (("measurement.png", "truth.png"), ("photo.png", "truth.png")):
        paths = [write_png(tmp_path, name), write_png(tmp_path, other, seed=1)]
        before = [path.read_bytes() for path in paths]
        code, _, err = fewstep("simulate", paths[0], *words)
        assert code == 2 and ("would be replaced" in err or "which no simulation wrote" in err), err
        assert [path.read_bytes() for path in paths] == before and len(list(tmp_path.iterdir())) == 2
        paths[0].unlink()
    path = write_png(tmp_path)
    again = [*words[:-1], tmp_path / "sim"]
    assert fewstep("simulate", path, *again)[0] == fewstep("simulate", path, *again)[0] == 0
    code, _, err = fewstep("simulate", tmp_path / "sim" / "truth.png", *again)
    assert code == 2 and "would be replaced" in err


def test_names_that_are_no_valid_text(fewstep, tmp_path):
    path = write_png(tmp_path, os.fsdecode(b"l\xe9t.png"))
    folder = tmp_path / os.fsdecode(b"\xe9")
    code, out, err = fewstep("restore", path, *FEW, "--out", folder)
    assert (code, err) == (0, "") and "\\udce9: 2 samples" in out
    assert not json.loads((folder / "result.json").read_text())["interrupted"]
    assert "l?t.png, restored" in (folder / "report.html").read_text(encoding="utf-8")
    code, out, _ = fewstep("simulate", path, *FEW[2:6], "--out", tmp_path / os.fsdecode(b"s\xe9"))
    assert code == 0 and "written to" in out


def test_a_simulated_jpeg_is_a_file_that_is_restored(fewstep, tmp_path):
    words = ["--operator", "jpeg", "--quality", "20", "--out", tmp_path / "sim"]
    assert fewstep("simulate", write_png(tmp_path), *words)[0] == 0
    shown = Image.open(tmp_path / "sim" / "measurement.png")
    with Image.open(tmp_path / "sim" / "measurement.jpg") as image:
        assert image.convert("RGB").tobytes() == shown.tobytes()
    few = ["--samples", "1", "--steps", "2", "--out", tmp_path / "out"]
    assert fewstep("restore", tmp_path / "sim" / "measurement.jpg", *few)[0] == 0


def test_methods_table_equals_the_folder(fewstep):
    code, out, _ = fewstep("methods")
    assert code == 0
    for name in available():
        cls = get(name)
        row = next(line for line in out.splitlines() if line.startswith(f"{name} "))
        assert str(cls.reference)[:20] in row and cls.exact in row and str(cls().nfe) in row


@pytest.mark.parametrize("name", available())
def test_cite_and_details(fewstep, name):
    assert fewstep("cite", name)[1].strip() == get(name).reference.bibtex()
    code, out, _ = fewstep("methods", name)
    assert code == 0 and "steps" in out and get(name).exact in out


def test_operators_table_equals_the_words(fewstep):
    out = fewstep("operators")[1]
    for word in operators():
        assert any(line.startswith(f"{word} ") for line in out.splitlines())
    assert "factor" in fewstep("operators", "sr")[1] and get_operator("sr").word == "sr"


@pytest.mark.parametrize("words", [(), ("dds",)])
def test_only_methods_and_solvers_are_listed_as_such(fewstep, words):
    code, _, err = fewstep("methods", *words, "--kind", "teachers")
    assert code == 2 and "neither a method nor a solver" in err


def test_the_version(fewstep):
    code, out, _ = fewstep("--version")
    assert code == 0 and out.split() == ["fewstep", version("fewstep")]
    module = subprocess.run([sys.executable, "-m", "fewstep", "--version"], capture_output=True, text=True, check=True)
    assert module.stdout == out


def test_doctor(fewstep, monkeypatch):
    monkeypatch.setattr("fewstep.commands.health.SERIOUS", [lambda: None])
    code, out, _ = fewstep("doctor")
    assert code == 0 and "torch" in out and "ready" in out
    monkeypatch.setattr("fewstep.commands.health.SERIOUS", [lambda: "no prior"])
    code, out, _ = fewstep("doctor")
    assert code == 1 and "no prior" in out


def test_bench_passes_typed_options_on(fewstep, monkeypatch):
    seen = {}

    def main(folder: str, limit: int | None = None, methods: tuple[str, ...] = ()) -> None:
        seen.update(folder=folder, limit=limit, methods=methods)

    monkeypatch.setattr("fewstep.bench.gaussian.main", main)
    assert fewstep("bench", "gaussian", "--folder", "x", "--limit=3", "--methods", "dps,ddrm")[0] == 0
    assert seen == {"folder": "x", "limit": 3, "methods": ("dps", "ddrm")}
    assert fewstep("bench", "gaussian", "--folder", "x", "--methods=")[0] == 0 and seen["methods"] == ()
    assert "needs --folder" in fewstep("bench", "gaussian")[2]
    assert "did you mean limit" in fewstep("bench", "gaussian", "--limits", "3")[2]


def test_flags_of_a_benchmark_need_no_value(fewstep, monkeypatch):
    seen = []

    def main(folder: str, pairs: bool = False, own_noise: bool = True) -> None:
        seen.append((folder, pairs, own_noise))

    monkeypatch.setattr("fewstep.bench.gaussian.main", main)
    for words in (("--pairs", "--folder", "x"), ("--folder", "x", "--own-noise", "no", "--pairs")):
        assert fewstep("bench", "gaussian", *words)[0] == 0
    assert seen == [("x", True, True), ("x", True, False)]
    assert "pairs must be bool, got 'x'" in fewstep("bench", "gaussian", "--pairs", "x")[2]


def test_train_prior_refuses_an_empty_folder(fewstep, tmp_path):
    code, _, err = fewstep("train-prior", tmp_path, "--out", tmp_path / "out")
    assert code == 2 and "no images" in err


def test_train_prior_that_was_stopped_is_an_interruption(fewstep, tmp_path, monkeypatch):
    seen = []

    def train(*given):
        seen.append(given)
        raise KeyboardInterrupt("stopped after step 1 of 2")

    monkeypatch.setattr("fewstep.recipes.train_prior", train)
    code, _, err = fewstep("train-prior", tmp_path, "--out", tmp_path / "o", "--steps", "2")
    assert code == 130 and err == "stopped after step 1 of 2\n"
    assert fewstep("train-prior", tmp_path, "--out", tmp_path / "o", "--no-resume")[0] == 130
    assert seen == [("natural", tmp_path, tmp_path / "o", 2, True), ("natural", tmp_path, tmp_path / "o", None, False)]


def test_bench_table(fewstep, tmp_path):
    from fewstep.bench.common import Report

    Report("gaussian", {}, {"Rows": [{"method": "ddrm", "nfe": 20}]}, ("a note",)).finish(tmp_path / "r.json")
    code, out, _ = fewstep("bench", "table", tmp_path / "r.json")
    assert code == 0 and "| ddrm | 20 |" in out
    assert fewstep("bench", "table", tmp_path / "r.json", "--out", tmp_path / "r.md")[0] == 0
    assert "| ddrm | 20 |" in (tmp_path / "r.md").read_text()
    assert fewstep("bench", "table", tmp_path / "none.json")[0] == 2


def test_help_of_every_command(fewstep):
    for command in ("restore", "simulate", "methods", "operators", "cite", "train", "train-prior", "bench", "doctor"):
        code, out, _ = fewstep(command, "--help")
        assert code == 0 and "Usage" in out


@pytest.mark.slow
def test_a_launcher_shares_the_folder_out(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    for name in ("a.png", "b.png", "c.png"):
        write_png(folder, name)
    (folder / "a-broken.png").write_bytes(
        b"none"
    )  # its process has nothing to do after it, and must wait for the other
    script = tmp_path / "run.py"
    script.write_text(
        f"import sys; sys.path.insert(0, {os.path.dirname(__file__)!r})\n"
        "import fewstep.restore; from pictures import PixelPrior\n"
        "fewstep.restore.load_prior = lambda name: PixelPrior()\n"
        "from fewstep.cli import main; main()\n"
    )
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    words = ["restore", str(folder), *FEW, "--quiet", "--out", str(tmp_path / "out")]
    done = subprocess.run(
        [*launch, "--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0", str(script), *words],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 1 and done.stderr.count("is not an image that can be read") == 1, done.stderr
    assert done.stdout.count("2 samples") == 3, "each once"
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"a", "b", "c"}


def test_every_benchmark_is_a_command():
    folder = Path(cli.__file__).parent / "bench"
    modules = {path.stem for path in folder.glob("*.py") if "\ndef main(" in path.read_text(encoding="utf-8")}
    commands = {command.name or command.callback.__name__ for command in cli.bench.registered_commands}
    assert {"calibration", "images"} <= modules <= commands


def test_help_of_a_benchmark_lists_its_options(fewstep, monkeypatch):
    def main(folder: Path, limit: int | None = None, methods: tuple[str, ...] = ("dps", "ddrm")) -> None:
        """Measure.

        Args:
            folder: of photographs.
            limit: the most images.
            methods: names of them.
        """

    monkeypatch.setattr("fewstep.bench.gaussian.main", main)
    code, out, _ = fewstep("bench", "gaussian", "--help")
    assert code == 0
    for option in (
        r"--folder +PATH +of photographs\. \[required\]",
        r"--limit +INT +the most images\.",
        r"--methods +TEXT,\.\.\. +names of them\. \[default: dps,ddrm\]",
    ):
        assert re.search(option, out), out


def test_training_says_what_it_wrote(fewstep, tmp_path, monkeypatch):
    pytest.importorskip("accelerate")
    monkeypatch.setattr("fewstep.recipes.train", lambda recipe, data, out, *rest: (out / "sampler").mkdir(parents=True))
    monkeypatch.setattr(
        "fewstep.recipes.train_prior", lambda recipe, data, out, *rest: (out / "prior").mkdir(parents=True)
    )
    folder = tmp_path / "s" / "sampler"
    code, out, _ = fewstep("train", "r.yaml", tmp_path, "--out", tmp_path / "s")
    assert code == 0 and out == f"written to {folder}; use it with --method ud2m --set network={folder}\n"
    out = fewstep("train-prior", tmp_path, "--out", tmp_path / "p")[1]
    assert out == f"written to {tmp_path / 'p' / 'prior'}; use it with --prior {tmp_path / 'p' / 'prior'}\n"
