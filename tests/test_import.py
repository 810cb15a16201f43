"""Importing the package and asking for help must not load what only some commands need."""

from __future__ import annotations

import subprocess
import sys

HEAVY = (
    "torch",
    "deepinv",
    "diffusers",
    "matplotlib",
    "lpips",
    "torchmetrics",
    "torchvision",
    "scipy",
    "skimage",
    "accelerate",
)


def loaded(code: str) -> set[str]:
    script = (
        f"import sys\n{code}\nsys.stderr.write(' '.join(m for m in {HEAVY!r} + ('typer', 'rich') if m in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return set(done.stderr.split())


def test_import_loads_nothing_heavy():
    assert loaded("import fewstep") == set()


def test_help_loads_nothing_heavy():
    code = "import fewstep.cli\nsys.argv = ['fewstep', '--help']\ntry:\n    fewstep.cli.main()\nexcept SystemExit:\n    pass"
    assert not loaded(code) & set(HEAVY)


def test_the_main_job_is_imported_without_what_only_operators_and_networks_need():
    assert not loaded("import fewstep.restore") & {
        "deepinv",
        "diffusers",
        "matplotlib",
        "lpips",
        "torchmetrics",
        "scipy",
    }
