"""`check_schedule`: what every noise schedule must satisfy."""

from __future__ import annotations

import torch

from fewstep.core.schedule import Schedule


def check_schedule(schedule: Schedule, tol: float = 1e-6) -> None:
    """Check that ratio = sigma / alpha grows, that `time` inverts it, in value and in gradient, in float32 and float64.

    Raises:
        AssertionError: a check failed.
    """
    for dtype, tolerance in ((torch.float64, 1e-9), (torch.float32, tol)):
        t = torch.linspace(0.01, 1, 500, dtype=dtype)
        alpha, sigma = schedule(t)
        ratio = schedule.ratio(t)
        assert alpha.dtype == sigma.dtype == ratio.dtype == dtype and alpha.shape == t.shape
        assert bool((alpha > 0).all()) and bool((sigma > 0).all())
        assert torch.allclose(sigma / alpha, ratio, rtol=50 * tolerance), "ratio is not sigma / alpha"
        assert bool((ratio.diff() > 0).all()), "the ratio does not grow with t"
        # float32 ratios carry a rounding that a flat schedule turns into more of t: compare ratios, then times
        assert torch.allclose(schedule.ratio(schedule.time(ratio)), ratio, rtol=50 * tolerance), (
            "time is not the inverse"
        )
        assert float((schedule.time(ratio) - t).abs().max()) <= tolerance, "time is not the inverse of ratio"
    _check_gradient(schedule)


def _check_gradient(schedule: Schedule) -> None:
    t = torch.linspace(0.0505, 0.9505, 50, dtype=torch.float64, requires_grad=True)
    ratio = schedule.ratio(t)
    slope = torch.autograd.grad(ratio.sum(), t)[0]
    leaf = ratio.detach().requires_grad_()
    inverse = torch.autograd.grad(schedule.time(leaf).sum(), leaf)[0]
    assert torch.allclose(slope * inverse, torch.ones_like(t), rtol=1e-6), "the gradients of ratio and time disagree"
    h = 1e-6
    finite = (schedule.ratio(t.detach() + h) - schedule.ratio(t.detach() - h)) / (2 * h)
    assert torch.allclose(slope, finite, rtol=1e-4), "the gradient of ratio disagrees with finite differences"
