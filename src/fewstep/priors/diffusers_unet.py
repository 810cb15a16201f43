"""Any unconditional or class-conditional diffusers `UNet2DModel` with a DDPM-style scheduler as a prior."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from fewstep.compat import prepare_torchvision
from fewstep.core.files import read_json
from fewstep.core.schedule import Tabulated
from fewstep.priors.discrete import DiscreteDenoiser

PREDICTIONS = {"epsilon": "epsilon", "v_prediction": "v", "sample": "x0"}


class DiffusersDenoiser(DiscreteDenoiser):
    """A diffusers UNet; class-conditional ones take `label`, () or (N,).

    Args:
        unet: a `UNet2DModel` trained on images in [-1, 1].
        scheduler: the configuration of its scheduler: the betas and `prediction_type`.
    """

    def __init__(self, unet: nn.Module, scheduler: Mapping[str, Any]) -> None:
        config: Any = unet.config
        if config["out_channels"] not in (config["in_channels"], 2 * config["in_channels"]):
            raise ValueError(f"a UNet from {config['in_channels']} to {config['out_channels']} channels is no denoiser")
        kind = scheduler.get("prediction_type", "epsilon")
        if kind not in PREDICTIONS:
            raise ValueError(f"prediction_type {kind!r} is not supported, one of {sorted(PREDICTIONS)}")
        halvings = len(config["block_out_channels"]) - 1
        classes = config.get("num_class_embeds") or 0
        super().__init__(table(scheduler), PREDICTIONS[kind], config["in_channels"], 2**halvings, classes)
        self.unet = unet

    def network(self, x: Tensor, step: Tensor, **cond: Any) -> Tensor:
        """See `DiscreteDenoiser`."""
        return self.unet(x, step, **cond).sample


def table(scheduler: Mapping[str, Any]) -> Tabulated:
    """Return the table of a scheduler configuration; ValueError where it has no betas, or a last step without signal."""
    prepare_torchvision()
    from diffusers import DDPMScheduler

    if scheduler.get("trained_betas") is None and "beta_start" not in scheduler:
        raise ValueError(f"scheduler {scheduler.get('_class_name', 'without a name')!r} has no table of betas")
    if scheduler.get("rescale_betas_zero_snr"):
        raise ValueError(
            "rescale_betas_zero_snr is not supported: alpha is 0 at the last step, and sigma / alpha infinite"
        )
    known = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas")
    ddpm: Any = DDPMScheduler(**{k: scheduler[k] for k in known if k in scheduler})
    return Tabulated(tuple(ddpm.alphas_cumprod.double().tolist()))


def load_diffusers(folder: str | Path, scheduler: Mapping[str, Any] | None = None) -> DiffusersDenoiser:
    """Return the prior in a local diffusers pipeline or model folder; nothing is downloaded.

    Args:
        folder: holds `config.json` or `unet/config.json`, weights, and the configuration of a scheduler.
        scheduler: replaces that configuration; needed for a model folder that comes without one.

    Raises:
        ValueError: something is missing, the model is no `UNet2DModel`, or its weights do not fit.
    """
    prepare_torchvision()
    from diffusers import UNet2DModel

    root = Path(folder)
    home = root / "unet" if (root / "unet" / "config.json").is_file() else root
    name = read_json(home / "config.json").get("_class_name")
    if name != "UNet2DModel":
        raise ValueError(f"{home} holds a {name}, and only diffusers' UNet2DModel can serve as a prior")
    found = dict(scheduler) if scheduler is not None else _scheduler(root)
    try:
        unet, report = UNet2DModel.from_pretrained(home, local_files_only=True, output_loading_info=True)
    except (OSError, ValueError, RuntimeError, TypeError) as error:
        raise ValueError(f"{home} cannot be loaded: {' '.join(str(error).split())[:300]}") from None
    wrong = {k: report[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys") if report.get(k)}
    if wrong:
        kind, names = next(iter(wrong.items()))
        raise ValueError(f"the weights in {home} do not fit its config: {len(names)} {kind}, first {next(iter(names))}")
    return DiffusersDenoiser(unet.float(), found)


def _scheduler(root: Path) -> dict[str, Any]:
    """Return the scheduler configuration that lies beside a model."""
    for place in (root / "scheduler", root, root.parent / "scheduler"):
        if (place / "scheduler_config.json").is_file():
            return read_json(place / "scheduler_config.json")
    raise ValueError(f"{root} has no scheduler_config.json; pass scheduler={{'beta_start': ..., 'beta_end': ..., ...}}")
