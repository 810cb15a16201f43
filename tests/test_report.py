"""The report: one file, nothing fetched, nothing unescaped."""

from __future__ import annotations

import re

import torch

from fewstep.core.reference import Reference
from fewstep.report import CROP, Map, Picture, Report, busiest, crop_figure, render, shrink

REFERENCE = Reference("A <Title>", "Doe, Jane and Roe, Rick", 2024, "Venue", "2401.00001")


def report(**changes):
    x = torch.rand(1, 3, 40, 60)
    values = {
        "title": "<script>alert(1)</script>.png, restored",
        "lead": "3 samples & more",
        "pictures": [Picture("Measurement", x[..., ::2, ::2]), Picture("Mean", x), Picture('Sa"mple', x)],
        "maps": [Map("Standard deviation", torch.rand(40, 60)), Map("Width", torch.rand(40, 60))],
        "table": {"psnr_mean": 31.23456, "method": {"name": "x", "steps": 3}},
        "command": "fewstep restore 'a b.png'",
        "limit": "the posterior as steps grow",
        "reference": REFERENCE,
    }
    return Report(**{**values, **changes})


def test_is_self_contained_and_escaped():
    page = render(report())
    assert "<script" not in page and "&lt;script&gt;" in page and "3 samples &amp; more" in page
    sources = re.findall(r"(?:src|href)='([^']*)'", page)
    assert len(sources) == 6 and all(s.startswith("data:image/png;base64,") for s in sources)
    assert "url(" not in page and "@import" not in page
    assert "prefers-color-scheme: dark" in page


def test_says_what_was_done():
    page = render(report(warnings=["The run was interrupted"]))
    for text in ("the posterior as steps grow", "fewstep restore", "@inproceedings{doe2024title", "arXiv:2401.00001"):
        assert text in page
    assert "31.23" in page and "name = x, steps = 3" in page and "class='warn'>The run was interrupted" in page


def test_without_maps_it_says_why():
    assert "at least two" in render(report(maps=[]))


def test_figures_leave_no_global_state():
    import sys

    render(report())
    assert "matplotlib.pyplot" not in sys.modules or not sys.modules["matplotlib.pyplot"].get_fignums()


def test_a_picture_of_one_channel_is_grey_in_the_detail():
    x, maps = torch.linspace(0, 1, 64).reshape(1, 1, 8, 8), [Map("Width", torch.ones(8, 8))]
    one, three = (crop_figure([Picture("Mean", image)], maps) for image in (x, x.expand(1, 3, 8, 8)))
    assert one == three


def test_shrink_and_crop():
    assert shrink(torch.rand(1, 3, 3000, 1000)).shape == (1, 3, 1024, 341)
    field = torch.zeros(300, 200)
    field[180:240, 100:160] = 1
    rows, columns = busiest(field)
    assert field[rows, columns].sum() == 3600 and field[rows, columns].shape == (96, 96)
    assert busiest(torch.rand(5, 7)) == (slice(0, 5), slice(0, 7))
    at_the_edge = torch.zeros(203, 203)
    at_the_edge[196:, 196:] = 1
    assert busiest(at_the_edge) == (slice(203 - CROP, 203), slice(203 - CROP, 203))
