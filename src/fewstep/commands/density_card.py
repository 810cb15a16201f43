"""The card of a sampler of a density, written from what the run noted."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fewstep.commands.density_target import Named
from fewstep.densities.report import summary_rows

TEXT = """---
library_name: fewstep
tags: [unnormalised-density, diffusion-sampler, importance-sampling]
---
# {name}, by {method}

Draws x from an unnormalised density in {dim} dimensions, with importance weights. The density itself is not in this folder.

```python
import fewstep
{code}
sampler = fewstep.load_density_sampler("PATH OF THIS FOLDER", target)
draws = sampler.sample(10_000, seed=0)  # .x .log_weights .ess .log_z .log_z_interval() .khat
```

{facts}
"""


def density_card(named: Named, record: Mapping[str, Any], header: Mapping[str, Any]) -> str:
    """Return the text of README.md: what it samples, how it was trained, how good it was found to be, and by which draws."""
    options, quality = record["options"], record.get("quality") or {}
    steps = (
        f"{record['steps_done']} of {options['train_steps']} steps, batch {options['batch']}, seed {options['seed']}"
    )
    rows = {
        "Method": f"{record['reference']}",
        "Settings": f"`{record['sampler']}`" + (f", loss {record['loss']}" if "loss" in record else ""),
        **({"Teacher": f"{record['teacher']}, weights {record['teacher_sha256']}"} if "teacher" in record else {}),
        "Training": steps + ("; it was interrupted" if record["interrupted"] else ""),
        **_quality(quality, named),
        "Command": f"`{record['command']}`",
        "Hash": f"SHA-256 of `model.safetensors`: {header['sha256']}",
        "Versions": ", ".join(f"{name} {version}" for name, version in record["versions"].items()),
    }
    facts = "\n".join(f"* **{title}**: {text}" for title, text in rows.items())
    method = record["sampler"]["name"]
    return TEXT.format(name=named.name, method=method, dim=named.density.dim, code=named.code, facts=facts)


def _quality(quality: Mapping[str, Any], named: Named) -> dict[str, str]:
    """Return what draws have shown; nothing is claimed of a training that was interrupted."""
    if not quality:
        return {"Quality": "not measured"}
    return {f"Of {quality['draws']} draws, {k}": v for k, v in summary_rows(quality, named.density).items()}
