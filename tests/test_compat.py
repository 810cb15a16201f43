import importlib.util
import subprocess
import sys

import pytest
import torch

from fewstep import compat


def run(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


# asked without importing it, which is what may fail before the cure
with_torchvision = pytest.mark.skipif(importlib.util.find_spec("torchvision") is None, reason="torchvision is absent")


@with_torchvision
def test_torchvision_and_its_users_import():
    code = "from fewstep.compat import prepare_torchvision as p; a, b = p(), p(); import torchvision; assert a == b"
    done = run(code)
    assert done.returncode == 0, done.stderr


def test_nothing_is_declared_where_torchvision_is_absent(monkeypatch):
    monkeypatch.setattr(compat, "_DECLARED", [])
    monkeypatch.delitem(sys.modules, "torchvision", raising=False)
    monkeypatch.setattr(compat.importlib.util, "find_spec", lambda name: None)
    assert compat.prepare_torchvision() is False
    assert compat._DECLARED == []


def test_nothing_is_declared_where_the_operators_load(monkeypatch):
    monkeypatch.setattr(compat, "_DECLARED", [])
    monkeypatch.delitem(sys.modules, "torchvision", raising=False)
    monkeypatch.setattr(compat, "_operators_load", lambda: True)
    assert compat.prepare_torchvision() is False
    assert compat._DECLARED == []


@with_torchvision
def test_schemas_are_those_torchvision_expects():
    compat.prepare_torchvision()
    for name in ("nms", "qnms"):
        schema = str(getattr(torch.ops.torchvision, name).default._schema)
        assert "Tensor dets, Tensor scores, float iou_threshold" in schema


def test_doctor_says_what_users_of_deepinv_call_first(monkeypatch):
    from fewstep.commands import health

    monkeypatch.setattr(health, "prepare_torchvision", lambda: True)
    assert "prepare_torchvision() of fewstep.compat before" in (health._torchvision() or "")
