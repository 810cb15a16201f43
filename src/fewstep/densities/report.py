"""The page of a diagnosis: one HTML file that needs no network and no other file."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import torch
from torch import Tensor

from fewstep.core.density import TargetDensity
from fewstep.densities.diagnosis import Diagnosis, Distance, Known, spread
from fewstep.densities.estimators.psis import limit, smooth
from fewstep.report import figure_png, html_figure, html_gallery, html_table, page

SHOWN = 6  # coordinates whose marginals are drawn
POINTS = 4000  # most points of a scatter plot
_DRAWN, _WEIGHTED, _EXACT = "#4c78a8", "#e45756", "#222222"
_KINDS = {
    "unbiased": "unbiased: their mean is Z in expectation, exactly",
    "consistent": "consistent: right in a limit of many steps or probes",
    "bound": "a bound: the mean of their logarithms is below log Z in expectation, and no more",
    "invalid": "invalid: they say nothing about the density",
    None: "none: the draws stand for the density as they are",
}


def render(found: Diagnosis, title: str, command: str) -> str:
    """Return the diagnosis as a self-contained HTML page under `title`, with the line that reproduces it."""
    draws = found.draws
    weighed = "weights" if draws.log_weights is not None else "no weights"
    lead = f"{len(draws)} draws in {draws.x.shape[1]} dimensions, {weighed}, {draws.nfe:g} network calls each"
    parts = [
        f"<h2>Weights and costs</h2>{html_table(rows_of(found))}",
        f"<h2>Distances</h2>{html_table(_distances(found))}{_missing(found)}",
        f"<h2>Expectations</h2>{html_table({name: expectation_line(v) for name, v in found.known.items()})}"
        if found.known
        else "",
        f"<h2>Figures</h2>{html_gallery(_figures(found))}",
        f"<h2>Density</h2><p>{escape(_about(found))}</p><h2>Reproduce</h2><pre>{escape(command)}</pre>",
    ]
    return page(title, lead, found.warnings(), parts)


def rows_of(found: Diagnosis) -> dict[str, str]:
    """Return the summary in words, one line per number; the terminal shows the same."""
    return summary_rows(found.summary, found.target)


def summary_rows(summary: Mapping[str, Any], target: TargetDensity) -> dict[str, str]:
    """Return a `summary` of draws of `target` in words."""
    s, rows = summary, {"weights": _KINDS[summary["kind"]]}
    if "ess" in s:
        rows["ESS"] = f"{100 * s['ess']:.2f} % of {s['draws']}" if s["draws"] > 1 else "too few draws to tell"
    if "log_z" in s:
        ends = s.get("log_z_interval")
        held = f" [{ends[0]:.4f}, {_end(ends[1])}] at {100 * s['level']:g} %" if ends else ""
        rows["log Z"] = f"{s['log_z']:.4f}{held}, {s['kind']}{_truth(target)}"
    if "elbo" in s:
        rows["ELBO"] = f"{s['elbo']:.4f}"
    if "khat" in s:
        told = f"{s['khat']:.3f}, should be below {limit(s['draws']):.2f}"
        rows["k-hat"] = "too few draws to tell" if math.isnan(s["khat"]) else told
    if s["nonfinite"]:
        rows["not finite"] = f"{s['nonfinite']} draws, which count as weight zero"
    if s["folds"]:
        rows["folds"] = f"{s['folds']} draws of negative weight"
    rows["calls per draw"] = (
        f"{s['nfe']:g} network, {s['target_calls']:g} log-density, {s['gradient_calls']:g} gradient"
    )
    rows["time"] = f"{s['seconds']:.2f} s in all"
    return rows


def distance_line(d: Distance) -> str:
    """Return a distance in words."""
    weighted = "" if d.weighted is None else f", {d.weighted:.3g} by weights"
    return f"{d.drawn:.3g} as drawn{weighted}; exact draws {d.floor:.3g} +- {d.spread:.2g}"


def expectation_line(known: Known) -> str:
    """Return in words how far an estimate is from what is known."""
    told = [f"{name} {_off(known.exact, *value)}" for name, value in _estimates(known).items()]
    return "; ".join(told)


def marginals(found: Diagnosis) -> bytes:
    """Return a PNG with histograms of the first coordinates: as drawn, by weights and exact."""
    x, share = _usable(found)
    shown = min(SHOWN, x.shape[1])
    columns = min(3, shown)
    figure = _figure(3.2 * columns, 2.6 * -(-shown // columns))
    for i in range(shown):
        axes = figure.add_subplot(-(-shown // columns), columns, i + 1)
        seen = x[:, i] if found.exact is None else torch.cat([x[:, i], found.exact[:, i].to(x)])
        edges = torch.linspace(*_range(seen), 61).numpy()
        axes.hist(x[:, i].numpy(), edges, density=True, color=_DRAWN, alpha=0.45, label="as drawn")
        if share is not None:
            line = {"histtype": "step", "color": _WEIGHTED, "label": "by weights"}
            axes.hist(x[:, i].numpy(), edges, density=True, weights=share.numpy(), **line)
        if found.exact is not None:
            line = {"histtype": "step", "color": _EXACT, "label": "exact"}
            axes.hist(found.exact[:, i].numpy(), edges, density=True, **line)
        axes.set_title(f"x_{i + 1}", fontsize=9)
        axes.set_yticks([])
        if not i:
            axes.legend(fontsize=7)
    return figure_png(figure)


def plane(found: Diagnosis) -> bytes:
    """Return a PNG with the first two coordinates: as drawn, by weights, exact."""
    x, share = _usable(found)
    panels = {"as drawn": (x, _DRAWN)}
    if share is not None:
        rows = torch.multinomial(share, min(len(x), POINTS), True, generator=torch.Generator().manual_seed(0))
        panels["by weights"] = (x[rows], _WEIGHTED)
    if found.exact is not None:
        panels["exact"] = (found.exact, _EXACT)
    figure = _figure(3.2 * len(panels), 3.2)
    wide = found.exact if found.exact is not None else x
    for number, (title, (points, colour)) in enumerate(panels.items()):
        axes = figure.add_subplot(1, len(panels), number + 1)
        axes.scatter(
            *spread(points, POINTS)[:, :2].T.numpy(), s=2, alpha=0.35, color=colour, linewidths=0, rasterized=True
        )
        axes.set_xlim(*_range(wide[:, 0], 0.05))
        axes.set_ylim(*_range(wide[:, 1], 0.05))
        axes.set_title(title, fontsize=9)
    return figure_png(figure)


def mode_bars(known: Known) -> bytes:
    """Return a PNG with the weight of every mode and its standard error, beside the true one."""
    count = len(known.exact)
    figure = _figure(min(12.0, 3 + 0.35 * count), 3)
    axes, places = figure.add_subplot(), torch.arange(count)
    estimates = _estimates(known)
    width = 0.8 / len(estimates)
    for number, (name, (value, error)) in enumerate(estimates.items()):
        colour = _WEIGHTED if number else _DRAWN
        at = (places + width * (number - (len(estimates) - 1) / 2)).numpy()
        axes.bar(at, value.numpy(), width, yerr=error.nan_to_num().numpy(), color=colour, alpha=0.7, label=name)
    axes.scatter(places.numpy(), known.exact.numpy(), marker="_", s=120, color=_EXACT, label="exact", zorder=3)
    axes.set_xlabel("mode")
    axes.legend(fontsize=7)
    return figure_png(figure)


def weight_tail(log_weights: Tensor) -> bytes:
    """Return a PNG of the largest weights over their mean against the share of draws above them, with the Pareto fit."""
    smoothed, khat = smooth(log_weights)
    order = log_weights.argsort(descending=True)
    top = order[: max(10, math.ceil(min(len(order) / 5, 3 * math.sqrt(len(order)))))]
    share = (torch.arange(len(top)) + 0.5) / len(order)
    centre = log_weights.logsumexp(0) - math.log(len(order))
    figure = _figure(4.8, 3.2)
    axes = figure.add_subplot()
    axes.loglog((log_weights[top] - centre).exp().numpy(), share.numpy(), ".", color=_DRAWN, label="weights")
    axes.loglog((smoothed[top] - centre).exp().numpy(), share.numpy(), "-", color=_EXACT, label="Pareto fit")
    axes.set_xlabel("weight / mean weight")
    axes.set_ylabel("share of draws above")
    axes.set_title(f"k-hat = {khat:.2f}, limit {limit(len(order)):.2f}", fontsize=9)
    axes.legend(fontsize=7)
    return figure_png(figure)


def _figures(found: Diagnosis) -> Sequence[str]:
    dim, drawn = found.draws.x.shape[1], []
    hidden = f", the first {SHOWN} of {dim}" if dim > SHOWN else ""
    drawn.append(html_figure(marginals(found), f"Marginals{hidden}", "plot"))
    if dim > 1:
        drawn.append(html_figure(plane(found), "The first two coordinates", "plot"))
    if "mode_weights" in found.known:
        drawn.append(html_figure(mode_bars(found.known["mode_weights"]), "Weights of the modes", "plot"))
    if "khat" in found.summary and math.isfinite(found.summary["ess"]) and found.summary["ess"] > 0:
        drawn.append(html_figure(weight_tail(found.draws.weights_for("ess")), "The largest weights", "plot"))
    return drawn


def _distances(found: Diagnosis) -> dict[str, str]:
    if found.stein is None:
        return {name: distance_line(d) for name, d in found.distances.items()}
    return {"squared kernel Stein discrepancy": stein_line(found.stein)}


def stein_line(stein: tuple[float, float]) -> str:
    """Return the discrepancy in words."""
    return f"{stein[0]:.3g} +- {stein[1]:.2g} (zero in mean for exact draws)"


def _missing(found: Diagnosis) -> str:
    return "".join(f"<p>{escape(name)}: {escape(reason)}</p>" for name, reason in found.missing.items())


def _truth(target: TargetDensity) -> str:
    if target.log_z is not None:
        return f"; true value {target.log_z:.4f}"
    return (
        f"; known to lie in [{target.log_z_bounds.low:g}, {target.log_z_bounds.high:g}]" if target.log_z_bounds else ""
    )


def _about(found: Diagnosis) -> str:
    target = found.target
    told = f"log Z = {target.log_z:.6g}" if target.log_z is not None else "log Z is not known"
    if target.log_z is None and target.log_z_bounds is not None:
        low, high, source = target.log_z_bounds
        told = f"log Z lies between {low:g} and {high:g} ({source})"
    return f"{type(target).__name__}, d = {target.dim}, {told}."


def _usable(found: Diagnosis) -> tuple[Tensor, Tensor | None]:
    """Return the finite draws, (N, d) on the CPU, and their share of the weight, (N,), where weights may be used."""
    finite = found.draws.x.isfinite().all(1)
    x = found.draws.x[finite].detach().cpu().float()
    if found.summary.get("log_z", -math.inf) == -math.inf:
        return x, None
    return x, found.draws.chances()[finite].softmax(0).cpu()


def _estimates(known: Known) -> dict[str, tuple[Tensor, Tensor]]:
    return {"as drawn": known.drawn} | ({} if known.weighted is None else {"by weights": known.weighted})


def _off(exact: Tensor, value: Tensor, error: Tensor) -> str:
    """Return the largest difference in units of its standard error and in its own."""
    gap = (value - exact).abs()
    worst = (gap / error.clamp_min(1e-300)).nan_to_num().argmax()
    return f"off by at most {float(gap.max()):.3g}, and by {float(gap[worst] / error[worst]):.1f} standard errors"


def _range(values: Tensor, margin: float = 0.0) -> tuple[float, float]:
    """Return the ends of all but a thousandth of `values` on either side, and a little more."""
    ranks = values.sort()[0]
    low, high = float(ranks[len(ranks) // 1000]), float(ranks[-1 - len(ranks) // 1000])
    more = margin * (high - low) + 1e-6 * (1 + abs(low))
    return low - more, high + more


def _end(value: float) -> str:
    return f"{value:.4f}" if math.isfinite(value) else "no upper end"


def _figure(width: float, height: float) -> Any:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")
