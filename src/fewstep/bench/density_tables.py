"""Rows of the densities benchmark: what draws cost and are worth, several seeds in one row, and who is best in a column."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from scipy.stats import t

from fewstep.bench.common import cell
from fewstep.bench.density_figures import Truth
from fewstep.densities.draws import Draws

ORDER = (
    "method",
    "steps",
    "nfe",
    "target calls",
    "gradient calls",
    "weights",
    "folds",
    "refused",
    "ESS",
    "k-hat",
    "ELBO",
    "EUBO",
    "log Z",
)
NATS = ("ELBO", "EUBO", "log Z", "low", "high")
EQUAL = (
    "method",
    "evaluations",
    "log Z error",
    "covers",
    "W1",
    "W2",
    "Sinkhorn",
    "SW",
    "energy x 1000",
    "mode error",
    "modes",
    "KSD",
)
_LESS_IS_BETTER = ("log Z error", "W1", "W2", "Sinkhorn", "SW", "energy x 1000", "mode error", "KSD")


def costed(truth: Truth, draws: Draws, even: Draws | None = None) -> dict[str, Any]:
    """Return what draws cost per sample and the figures of their weights, and distances of `even`, or of the draws themselves."""
    cost = {"nfe": draws.nfe, "target calls": draws.target_calls, "gradient calls": draws.gradient_calls}
    return cost | truth.weighted(draws) | truth.distances((even or draws).x)


def summary(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return one row of several: numbers as mean ± their 95 % interval (infinite where one is), "yes" as a share, texts one by one.

    A text beside numbers stands for all of them, and what only some rows have says how many.
    """
    if len(rows) == 1:
        return dict(rows[0])
    keys = dict.fromkeys(key for row in rows for key in row)
    return {key: _over([row.get(key) for row in rows]) for key in keys}


def total(rows: Sequence[Mapping[str, Any]], means: Sequence[str]) -> dict[str, Any]:
    """Return one row of several: sums over the rows that have a column, and of the columns `means` what `summary` gives."""
    keys = dict.fromkeys(key for row in rows for key in row)
    over = summary([{key: row.get(key) for key in keys if key in means} for row in rows])
    return {key: over[key] if key in means else sum(row.get(key, 0) for row in rows) for key in keys}


def _over(values: Sequence[Any]) -> Any:
    known = [value for value in values if value is not None]
    if len(known) in (0, len(values)):
        return _joint(known) if known else None
    return f"{cell(_joint(known))} ({len(known)} of {len(values)} seeds)"


def _joint(values: Sequence[Any]) -> Any:
    if all(value in ("yes", "no", "open") for value in values):
        return f"{sum(value == 'yes' for value in values)}/{len(values)}"
    if len(set(values)) == 1:
        return values[0]
    if not all(isinstance(value, int | float) for value in values):
        return ", ".join(dict.fromkeys(value for value in values if isinstance(value, str)))
    if not all(map(math.isfinite, values)):
        return next(value for value in values if not math.isfinite(value))
    reach = float(t.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / len(values) ** 0.5
    return f"{_mean(statistics.mean(values), reach)} ± {cell(reach)}"


def _mean(value: float, reach: float) -> str:
    """Return a mean, to thousandths where its interval is below ten: tenths, as `cell` has them, would hide it."""
    return f"{value:.3f}" if reach < 10 <= abs(value) < 1e5 else cell(value)


def ordered(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows with the columns of `ORDER` first, the interval of log Z behind it, and nats to a thousandth."""
    first = [key for key in (*ORDER, "low", "high") if key == "log Z" or any(row.get(key) is not None for row in rows)]
    nats = [key for key in NATS if key in first]
    found = [{key: row.get(key) for key in first} | dict(row) for row in rows]
    return [row | {key: _thousandths(row[key]) for key in nats} for row in found]


def _thousandths(value: Any) -> Any:
    """Return a number that `cell` would round to tenths as text with three decimals: tenths hide what is asked of log Z."""
    return f"{value:.3f}" if isinstance(value, float) and 10 <= abs(value) < math.inf else value


def starred(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows with a star at the least value of every column in which less is better."""
    for name in _LESS_IS_BETTER:
        values = [_number(row[name]) for row in rows]
        known_values = [value for value in values if value is not None]
        for row, value in zip(rows, values, strict=True):
            if len(known_values) > 1 and value == min(known_values):
                row[name] = f"{cell(row[name])} *"
    return rows


def _number(value: Any) -> float | None:
    """Return a number or the mean before its interval; None for what only some seeds have, and for texts."""
    try:
        return float(str(value).partition(" ± ")[0]) if not str(value).endswith("seeds)") else None
    except ValueError:
        return None
