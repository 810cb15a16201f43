"""The worked example of CONTRIBUTING.md: saved as a file it is a method, and it keeps the contract."""

import re
import sys
from pathlib import Path

import pytest
import torch

import fewstep
import fewstep.methods
from fewstep.core.problem import Posterior
from fewstep.operators.matrix import MatrixOperator
from fewstep.priors.exact import GaussianPrior
from fewstep.testing.sampler import check_convergence, check_sampler

GUIDE = Path(__file__).parents[1] / "CONTRIBUTING.md"
NAME = "my_method"


@pytest.fixture
def method(tmp_path, monkeypatch):
    blocks = re.findall(r"^```python\n(.*?)^```", GUIDE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    assert len(blocks) == 1, "the guide holds exactly one block of python, the whole method"
    (tmp_path / f"{NAME}.py").write_text(blocks[0], encoding="utf-8")
    monkeypatch.setattr(fewstep.methods, "__path__", [*fewstep.methods.__path__, str(tmp_path)])
    yield fewstep.get(NAME)
    sys.modules.pop(f"fewstep.methods.{NAME}", None)
    vars(fewstep.methods).pop(NAME, None)


def test_a_file_is_a_method(method):
    assert NAME in fewstep.available()
    assert method.__module__ == f"fewstep.methods.{NAME}"


def test_it_keeps_the_contract(method):
    check_sampler(method(steps=6))


def test_it_converges_where_it_says(method):
    """Prior N(m, 0.64 I) and spread 0.8: the prediction is the exact posterior mean, so many steps give the posterior."""
    from fewstep.testing.problems import ExactProblem, gaussian_problem

    like = gaussian_problem().problem.likelihood
    prior = GaussianPrior(torch.linspace(-0.5, 0.5, 5).double(), 0.64 * torch.eye(5).double())
    likelihood = fewstep.GaussianLikelihood(like.y, MatrixOperator(like.physics.matrix), like.sigma)
    exact = ExactProblem(Posterior(prior, likelihood), prior.posterior(likelihood), torch.zeros(1, 5).double())
    check_convergence(method(steps=400, spread=0.8), exact)


def test_it_is_gone_afterwards():
    assert NAME not in fewstep.available()
