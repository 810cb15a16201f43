"""The published tables of one-step samplers of densities, and which of their figures can be compared with anything.

Jutras-Dube, Pynadath and Zhang 2025 (arXiv:2502.07579, as revised in May 2025), tables 1 and 2; ELBOs of arXiv:2512.05251.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from fewstep.bench.density_figures import PUBLISHED

COLUMNS = ("PIS 128", "DDS 128", "DIS 128", "DIS 1", "CDDS 1", "SCDS 1")
_W, _ESS, _LOG_Z = PUBLISHED, "ESS", "log Z error"
_BOUNDARY = "128 steps yes; 1 step no: boundary likelihood, without the determinant of the map"
_ROWS = "how many rows is not stated, and the figure falls with them"
_IONOSPHERE = (
    "no: without a prior and with a constant feature that density has no normaliser; ours has the prior N(0, 1)"
)


class Published(NamedTuple):
    """One row: the figure, its values in the order of `COLUMNS`, and whether they can be compared, and why not."""

    figure: str
    values: tuple[float | str | None, ...]
    comparable: str


TABLES: dict[str, tuple[Published, ...]] = {
    "nine_modes": (
        Published(_W, (1.7946, 0.0898, 0.0203, 0.0559, 0.0313, 0.0478), f"in part: {_ROWS}"),
        Published(_ESS, (1e-5, 0.0065, 0.8054, 0.00057, 0.3395, 0.0504), _BOUNDARY),
        Published(
            _LOG_Z, (2.1806, 1.6819, 0.0899, 14.7669, 1.5717, 1.0743), f"{_BOUNDARY}; 2.18 is log 9, one mode of nine"
        ),
    ),
    "mw54": (
        Published(_W, (0.1377, 0.1366, 0.1230, 6.2804, 0.2815, 0.3913), f"in part: {_ROWS}"),
        Published(_ESS, (0.0664, 0.0051, 0.2677, 1.7e-5, 0.0442, 2.1e-5), _BOUNDARY),
        Published(_LOG_Z, (1.9974, 2.4154, 1.2056, 6766.2891, 1.0966, 11.2524), _BOUNDARY),
    ),
    "funnel": (
        Published(
            _W,
            (6.0731, 5.8600, 5.1755, 10.5224, 8.8849, 5.4922),
            f"no: {_ROWS}; nearly all lie below the value between exact sets of 2000",
        ),
        Published(_ESS, (1e-5, 0.0582, 0.1305, 4.9e-5, 5.1e-5, 0.00014), _BOUNDARY),
        Published(_LOG_Z, (0.4381, 0.5641, 0.6407, "inf", 1.3316, 10.3557), _BOUNDARY),
    ),
    "mw52": (
        Published(
            _W,
            (6.8035, 6.7830, 6.8808, 31.2532, 6.1764, 7.1110),
            "no: CDDS lies below the value between exact sets; in 50 dimensions samples that are too narrow score better",
        ),
        Published(_ESS, (1e-5, 0.4412, 0.0028, 1e-5, 5.7e-5, 1e-5), _BOUNDARY),
        Published(
            _LOG_Z,
            (42.4502, 42.4245, 39.7814, 9116.0713, 63.7244, 87.7095),
            "no: 42.4 beside an ESS of 0.44 is log Z itself, 42.8, less 0.4: its constant was not subtracted",
        ),
    ),
    "ionosphere": (
        Published("ELBO, 256 for 128 steps", (-39.3, -1510.3, -77.4, -3252.7, -27.5, -567.3), _IONOSPHERE),
        Published("ELBO, OSDS", (None,) * 4 + (None, -86.68), "no: 25 nats above log Z; a trace for the determinant"),
    ),
    "sonar": (
        Published("ELBO, OSDS", (None,) * 4 + (None, -50.58), "no: 58 nats above log Z; a trace for the determinant"),
        Published(
            "ELBO, CMCD 128", (-108.83,) + (None,) * 5, "yes: path weights of 128 steps (here in the first column)"
        ),
    ),
    "seeds": (
        Published("ELBO, OSDS", (None,) * 4 + (None, -44.35), "no: 29 nats above log Z; a trace for the determinant"),
    ),
    "cox": (
        Published(
            "ELBO, 256 for 128 steps",
            (397.5, 314.8, 365.6, -3.09e6, 1118.0, -4579.7),
            "256 steps yes; 1 step no: 1118 lies above log Z (502) and bounds nothing",
        ),
    ),
}


def beside(name: str, rows: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the published table of a target with columns for our `rows`, {title: row}; empty where none was published."""
    return [
        {"figure": found.figure, **dict(zip(COLUMNS, found.values, strict=True))}
        | {
            f"here: {title}": row.get(found.figure.partition(",")[0] if "ELBO" in found.figure else found.figure)
            for title, row in rows.items()
        }
        | {"comparable": found.comparable}
        for found in TABLES.get(name, ())
    ]
