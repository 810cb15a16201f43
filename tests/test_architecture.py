"""The shape of the source: which way imports point, what core must not know, and what is not written anywhere."""

import ast
from pathlib import Path

import pytest

import fewstep

ROOT = Path(fewstep.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))
TREES = {path: ast.parse(path.read_text(encoding="utf-8")) for path in FILES}

# a package or module may import from its own layer and from those above it in this list; imports inside functions count
LAYERS = (
    {"__version__", "compat", "devices"},  # constants, workarounds, devices without imports of their own
    {"core"},
    {"images", "data", "metrics", "records", "store", "uncertainty"},  # files and numbers, on core alone
    {"priors", "operators", "methods", "solvers", "unfolded"},
    {"objectives", "testing", "options", "measurements", "calibrated", "deepinv_model", "tuning"},
    {"densities", "checkpoints", "processes", "training", "recipes", "report", "outputs", "scores", "task", "restore"},
    {"bench", "commands"},
    {"cli"},
    {"__main__"},
)
# packages that stand side by side: they know core and what is below, not each other
APART = {"priors", "operators", "methods", "solvers"}
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}


def relative(path):
    return str(path.relative_to(ROOT))


def home(path):
    """Return the first name below `fewstep`, empty for its own __init__."""
    first = path.relative_to(ROOT).with_suffix("").parts[0]
    return "" if first == "__init__" else first


def imported(tree):
    """Return the first names below `fewstep` that a file imports anywhere, with the line."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level:
            yield node.lineno, "."  # relative imports are not used: they would hide from this test
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "fewstep":
            parts = node.module.split(".")
            yield from ((node.lineno, name) for name in (parts[1:2] or [alias.name for alias in node.names]))
        elif isinstance(node, ast.Import):
            parts = [alias.name.split(".") for alias in node.names]
            yield from ((node.lineno, p[1] if len(p) > 1 else ".") for p in parts if p[0] == "fewstep")


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_imports_point_downwards(path):
    source = home(path)
    if not source:
        assert not list(imported(TREES[path])), "`import fewstep` must stay light"
        return
    assert source in RANK, f"say in LAYERS where {source} belongs"
    for line, target in imported(TREES[path]):
        assert target in RANK, f"{relative(path)}:{line} imports {target}, which has no layer"
        assert RANK[target] <= RANK[source], f"{relative(path)}:{line}: {source} must not import {target}"
        apart = source in APART and target in APART and source != target
        assert not apart, f"{relative(path)}:{line}: {source} and {target} stand side by side"


@pytest.mark.parametrize("path", [p for p in FILES if home(p) == "core"], ids=relative)
def test_core_names_no_method(path):
    names = {*fewstep.available(), *(fewstep.get(name).__name__ for name in fewstep.available())}
    found = {n.value for n in ast.walk(TREES[path]) if isinstance(n, ast.Constant) and isinstance(n.value, str)}
    assert not names & found


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_files_are_short(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 400


def dotted(node):
    """Return "a.b.c" of an attribute chain, what can be said of it."""
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def forked(tree):
    """Return the lines inside `with torch.random.fork_rng()`, where seeding the global generator leaves no trace."""
    return {
        line
        for node in ast.walk(tree)
        if isinstance(node, ast.With) and any("fork_rng" in ast.unparse(item.context_expr) for item in node.items)
        for line in range(node.lineno, (node.end_lineno or node.lineno) + 1)
    }


def faults(tree):
    inside = forked(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.ExceptHandler) and node.type is None:
            yield node.lineno, "bare except"
        if isinstance(node, ast.Call):
            name = dotted(node.func)
            if name.endswith(".cuda"):
                yield node.lineno, ".cuda(): use the device of what is there"
            if name in {"torch.manual_seed", "torch.random.manual_seed"} and node.lineno not in inside:
                yield node.lineno, "seeds the global generator"
            lax = [k for k in node.keywords if k.arg == "strict" and getattr(k.value, "value", None) is False]
            if lax and name.endswith("load_state_dict"):
                yield node.lineno, "loads weights with strict=False"


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_nothing_forbidden(path):
    assert not list(faults(TREES[path]))


@pytest.mark.parametrize(
    "code",
    [
        "try:\n    pass\nexcept:\n    pass",
        "x.cuda()",
        "torch.manual_seed(0)",
        "net.load_state_dict(w, strict=False)",
    ],
)
def test_what_is_forbidden_is_found(code):
    assert len(list(faults(ast.parse(code)))) == 1


def test_forked_seeds_are_allowed_and_imports_in_functions_are_seen():
    assert not list(faults(ast.parse("with torch.random.fork_rng():\n    torch.manual_seed(0)")))
    assert list(imported(ast.parse("def f():\n    from fewstep.cli import app"))) == [(2, "cli")]
