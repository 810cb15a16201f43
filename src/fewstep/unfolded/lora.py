r"""Low-rank additions to a frozen denoiser: W + (alpha / rank) B A in every convolution and linear layer.

B starts at zero, so that the adapted denoiser starts as the prior (Hu et al. 2022, arXiv:2106.09685). Attention is made of linear
layers. Training goes through peft; merging is arithmetic on the weights, and a merged denoiser costs what the prior does.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from fewstep.compat import prepare_torchvision
from fewstep.core.checks import check_counts, check_positive

_DOWN, _UP, _BASE = ".lora_A.default.weight", ".lora_B.default.weight", ".base_layer."


@dataclass(frozen=True)
class LoRAConfig:
    """How much may be added.

    Attributes:
        rank: of every addition; 0 adds nothing and leaves the denoiser frozen.
        alpha: the addition is scaled by alpha / rank.
    """

    rank: int = 16
    alpha: float = 16.0

    def __post_init__(self) -> None:
        check_counts(self, "rank", least=0)
        check_positive(self, "alpha")

    @property
    def scale(self) -> float:
        """alpha / rank."""
        return self.alpha / max(self.rank, 1)


def add_lora(network: nn.Module, config: LoRAConfig, whole: Collection[str] = ()) -> None:
    """Freeze `network` and add trainable low-rank matrices to its convolutions and linear layers, in place.

    Args:
        network: the denoiser.
        config: rank and scale; the first factor is drawn from torch's global generator.
        whole: names of modules that are trained as they are instead.

    Raises:
        ValueError: peft is not installed, or `network` has no module called one of `whole`.
    """
    modules = dict(network.named_modules())
    if missing := sorted(set(whole) - set(modules)):
        raise ValueError(f"a {type(network).__name__} has no module {', '.join(missing)}")
    network.requires_grad_(False)
    if config.rank:
        names = [n for n, m in modules.items() if isinstance(m, nn.Linear | nn.Conv1d | nn.Conv2d) and n not in whole]
        _inject(network, config, names)
    for name in whole:
        modules[name].requires_grad_(True)


def _inject(network: nn.Module, config: LoRAConfig, names: list[str]) -> None:
    prepare_torchvision()
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise ValueError(f"LoRA needs peft ({error}); pip install fewstep[train]") from None
    inject_adapter_in_model(LoraConfig(r=config.rank, lora_alpha=config.alpha, target_modules=names), network)  # type: ignore[arg-type]


def merge(state: Mapping[str, Tensor], config: LoRAConfig) -> dict[str, Tensor]:
    """Return the weights of the plain network with the additions in them.

    Args:
        state: weights under the names of the network with additions, or under those of the plain one beside `*.lora_*`.
        config: of the additions.
    """
    plain = {name.replace(_BASE, "."): value for name, value in state.items() if ".lora_" not in name}
    for name in [n.removesuffix(_DOWN) for n in state if n.endswith(_DOWN)]:
        weight = plain[f"{name}.weight"]
        up, down = state[name + _UP], state[name + _DOWN]
        product = up.flatten(1) @ down.flatten(1)  # of two convolutions too: the second is of one pixel
        plain[f"{name}.weight"] = weight + config.scale * product.reshape(weight.shape)
    return plain


def trained(state: Mapping[str, Tensor], whole: Collection[str] = ()) -> dict[str, Tensor]:
    """Return what of a network's weights differs from the frozen one's: the additions and the modules `whole`."""
    return {
        name: value
        for name, value in state.items()
        if ".lora_" in name or any(name.startswith(f"{module}.") for module in whole)
    }
