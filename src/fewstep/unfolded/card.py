"""The model card of a trained sampler, written from its header alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fewstep.unfolded.starts import STARTS

FRONT = """---
license: {licence}
library_name: fewstep
tags: [diffusion, image-restoration, posterior-sampling]
---
# {name}

{summary} {calls} network calls per outer step, {millions:.2f} M parameters in this file, half precision.

```python
sampler = fewstep.load_sampler("{name}")  # the path of this folder
```
"""
SUMMARIES = {
    "fewstep-unfolded": "A trained sampler of p(x | y) for photographs, complete in itself.",
    "fewstep-adapter": "A trained sampler of p(x | y) for photographs: what LoRA adds to the prior named below.",
}


def model_card(name: str, header: Mapping[str, Any]) -> str:
    """Return the text of README.md for the network called `name`; what the header does not say is called unknown."""
    front = FRONT.format(
        licence=header.get("licence", "unknown"),
        name=name,
        summary=SUMMARIES[header["format"]],
        calls=header["fields"]["levels"]["iterations"] + STARTS[header["fields"]["start"]].calls,
        millions=header["parameters"] / 1e6,
    )
    rows = {
        "Prior": _prior(header),
        "Data": header.get("data", "unknown"),
        "Command": f"`{header['command']}`" if "command" in header else "unknown",
        **({"Steps": f"{header['steps']} were done"} if "steps" in header else {}),
        **({"What was really run": header["what_was_run"]} if "what_was_run" in header else {}),
        **({"Outer steps": ", ".join(f"{k} {v}" for k, v in header["outer"].items())} if "outer" in header else {}),
        "Hash": f"SHA-256 of `model.safetensors`: {header['sha256']}",
        "Licence": header.get("licence", "unknown"),
        "Written by": f"fewstep {header['library_version']}",
    }
    lines = "\n".join(f"* **{title}**: {text}" for title, text in rows.items())
    return "\n".join([front, lines, _recipe(header)])


def _prior(header: Mapping[str, Any]) -> str:
    name = header.get("prior", "unknown")
    return f"{name}, weights {header['prior_sha256']}" if "prior_sha256" in header else str(name)


def _recipe(header: Mapping[str, Any]) -> str:
    """Return the recipe as YAML, which says what operators and noise levels the sampler has seen."""
    if "recipe" not in header:
        return ""
    import yaml

    text = yaml.safe_dump(header["recipe"], sort_keys=False, default_flow_style=None, width=120)
    return f"\n## recipe.yaml\n\n```yaml\n{text}```\n"
