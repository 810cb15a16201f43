"""The pages say what the code says."""

import importlib.util
import re
from dataclasses import fields
from pathlib import Path

import pytest
import torch

import fewstep
from fewstep.core.likelihood import FlatLikelihood
from fewstep.operators.words import get_operator, operators
from fewstep.recipes import read_recipe
from fewstep.testing.law import distance
from fewstep.testing.oracle import ExactMean
from fewstep.testing.problems import gaussian_problem
from fewstep.testing.propagate import finite_step_law
from pictures import write_png

DOCS = Path(__file__).parents[1] / "docs"


@pytest.fixture(scope="module")
def maker():
    spec = importlib.util.spec_from_file_location("make_methods", DOCS / "make_methods.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_methods_page_is_up_to_date(maker):
    page = maker.PAGE.read_text(encoding="utf-8")
    assert maker.renewed(page) == page, "run python docs/make_methods.py"


def test_every_method_is_on_its_page(maker):
    page = maker.PAGE.read_text(encoding="utf-8")
    assert set(maker.methods()) <= set(fewstep.available())
    for name, cls in maker.methods().items():
        assert f"| [`{name}`](#{name}) |" in page and f"\n### {name}\n" in page
        assert str(cls.reference) in page and cls.limit.replace("|", "\\|") in page
        section = page.partition(f"\n### {name}\n")[2].partition("\n### ")[0]
        assert all(f"| `{f.name}` | `{f.default!r}` |" in section for f in fields(cls))
        assert all(f"Preset `{preset}`" in section for preset, values in cls.presets.items() if values)


def test_all_are_found(maker):
    files = Path(fewstep.__file__).parent.joinpath("methods").glob("[!_]*.py")
    assert maker.methods().keys() == {path.stem for path in files} and len(maker.methods()) >= 13


def test_a_stale_table_is_noticed(maker):
    page = maker.PAGE.read_text(encoding="utf-8")
    stale = page.replace("| `steps` | `100` |", "| `steps` | `99` |")
    assert stale != page and maker.renewed(stale) == page


def test_every_operator_and_option_is_on_its_page():
    page = (DOCS / "operators.md").read_text(encoding="utf-8")
    for word in operators():
        row = re.search(rf"^\| `{word}` \|.*$", page, re.MULTILINE)
        assert row, f"{word} is missing in operators.md"
        for field in fields(get_operator(word)):
            assert f"--{field.name.replace('_', '-')}" in row[0]
            assert not field.default or str(field.default) in row[0]


def test_no_page_has_gaps():
    for page in DOCS.glob("*.md"):
        assert not re.search(r"\b(TODO|TBD|FIXME|XXX)\b", page.read_text(encoding="utf-8")), page


def test_shares_of_variance_are_those_of_the_oracle():
    page = (DOCS / "numerics.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\d+) \| ([\d.]+) to ([\d.]+) \| ([\d.]+) to ([\d.]+) \|$", page, re.MULTILINE)
    exact = gaussian_problem()
    assert [int(row[0]) for row in rows] == [1, 2, 4, 8, 16, 64]
    for steps, *shares in rows:
        for eta, said in ((0.0, shares[:2]), (1.0, shares[2:])):
            law = finite_step_law(ExactMean(steps=int(steps), eta=eta), exact.problem)
            found = distance(law, exact.posterior)
            assert [float(s) for s in said] == pytest.approx([found.low, found.high], abs=6e-4)


def python_of(page, *headings):
    """Return the code blocks of some sections of a page, in order."""
    text = (DOCS / page).read_text(encoding="utf-8")
    sections = [re.search(rf"^## {heading}\n(.*?)(?=^## )", text, re.MULTILINE | re.DOTALL)[1] for heading in headings]
    return [code for section in sections for code in re.findall(r"```python\n(.*?)```", section, re.DOTALL)]


class Trained(torch.nn.Module):
    """A network of weights, which takes no other precision than theirs."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Conv2d(3, 3, 1)

    def forward(self, x, sigma):
        return self.layer(x) / (1 + sigma.reshape(-1, 1, 1, 1))


def test_the_recipe_of_the_ud2m_page_can_be_trained(tmp_path):
    page = (DOCS / "ud2m.md").read_text(encoding="utf-8")
    (tmp_path / "mine.yaml").write_text(re.search(r"```yaml\n(.*?)```", page, re.DOTALL)[1])
    (tmp_path / "photos").mkdir()
    for k in range(10):
        write_png(tmp_path / "photos", f"{k}.png", height=64, width=64, seed=k)
    recipe = read_recipe(tmp_path / "mine.yaml")
    trainer = recipe.trainer(tmp_path / "photos", tmp_path / "out", 2)
    assert recipe.init == "natural-general" and trainer.options.steps == 2
    assert trainer.data.batch(0, range(2))["x0"].shape == (2, 3, 64, 64)


def test_the_python_of_the_sampling_page_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    drawing, reading, network, wrapped = python_of("sampling.md", "In Python", "A denoiser of your own")
    scope = {}
    exec(drawing, scope)
    drawn = scope["samples"]
    drawn.save("out")
    exec(reading, scope)
    assert torch.equal(scope["samples"].x, drawn.x)
    assert 0 <= float(scope["images"].min()) < float(scope["images"].max()) <= 1
    exec(network + wrapped, scope)
    x, t = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0)), torch.tensor([0.3, 0.6])
    torch.testing.assert_close(scope["own"](x, t), scope["prior"](x, t))
    problem = fewstep.Posterior(scope["Wrapped"](Trained()).eval(), FlatLikelihood((3, 4, 4)))
    assert fewstep.get("diffpir")(steps=2)(problem).x.dtype == torch.float32
