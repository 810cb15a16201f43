"""OpenAI guided-diffusion checkpoints (Dhariwal and Nichol 2021, arXiv:2105.05233) as priors.

The blocks are deepinv's; this file assembles them from flags, reads the flags off the shapes of a checkpoint, and loads
strictly. Two flags leave no trace in the shapes and must be right: `head_channels` and `new_attention_order`.
"""

from __future__ import annotations

import math
import pickle
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from fewstep.compat import prepare_torchvision
from fewstep.core.schedule import Tabulated
from fewstep.priors.discrete import DiscreteDenoiser

State = Mapping[str, Tensor]


@dataclass(frozen=True)
class AdmFlags:
    """The architecture of a checkpoint.

    Attributes:
        channels: width of the first level (`num_channels`).
        blocks: residual blocks per level (`num_res_blocks`).
        multipliers: widths of the levels, in units of `channels` (`channel_mult`).
        attention: levels with attention, counted from 0, the finest.
        in_channels: image channels.
        out_channels: predicted channels; twice `in_channels` where the variance is learned.
        classes: number of classes, 0 where the network is unconditional.
        scale_shift: `use_scale_shift_norm`.
        resblock_updown: residual blocks change the resolution, not convolutions.
        head_channels: channels per attention head (`num_head_channels`).
        new_attention_order: `use_new_attention_order`.
    """

    channels: int
    blocks: int
    multipliers: tuple[int, ...]
    attention: tuple[int, ...]
    in_channels: int = 3
    out_channels: int = 6
    classes: int = 0
    scale_shift: bool = True
    resblock_updown: bool = True
    head_channels: int = 64
    new_attention_order: bool = False

    @classmethod
    def infer(cls, state: State) -> AdmFlags:
        """Return the flags that the names and shapes of a state dict imply; the other two keep their defaults.

        Raises:
            ValueError: this is no guided-diffusion UNet.
        """
        try:
            return cls(**_inferred(state))
        except (KeyError, IndexError, ZeroDivisionError) as error:
            raise ValueError(f"this is no guided-diffusion UNet: {error} is missing") from None


class AdmUNet(nn.Module):
    """The UNet of guided-diffusion, with the parameter names of its checkpoints."""

    def __init__(self, flags: AdmFlags) -> None:
        super().__init__()
        prepare_torchvision()
        from deepinv.models import diffunet

        self.flags, self._parts = flags, diffunet
        self._embedding = 4 * flags.channels
        self.time_embed = nn.Sequential(
            nn.Linear(flags.channels, self._embedding), nn.SiLU(), nn.Linear(self._embedding, self._embedding)
        )
        if flags.classes:
            self.label_emb = nn.Embedding(flags.classes, self._embedding)
        widths = [m * flags.channels for m in flags.multipliers]
        skips = self._encoder(widths)
        last = widths[-1]
        self.middle_block = self._chain([self._block(last, last), self._attention(last), self._block(last, last)])
        self._decoder(widths, skips)
        self.out = nn.Sequential(
            diffunet.normalization(widths[0]), nn.SiLU(), nn.Conv2d(widths[0], flags.out_channels, 3, padding=1)
        )

    def forward(self, x: Tensor, step: Tensor, class_labels: Tensor | None = None) -> Tensor:
        """Return the prediction at the fractional step numbers `step`, (N,): (N, C, H, W) -> (N, out_channels, H, W)."""
        if (class_labels is None) == bool(self.flags.classes):
            raise ValueError(f"a network of {self.flags.classes} classes needs class_labels exactly if that is not 0")
        embedding = self.time_embed(self._parts.timestep_embedding(step, self.flags.channels).to(x.dtype))
        if class_labels is not None:
            embedding = embedding + self.label_emb(class_labels)
        skips = []
        for block in self.input_blocks:
            x = block(x, embedding)
            skips.append(x)
        x = self.middle_block(x, embedding)
        for block in self.output_blocks:
            x = block(torch.cat([x, skips.pop()], 1), embedding)
        return self.out(x)

    def _encoder(self, widths: list[int]) -> list[int]:
        """Add the input blocks; return the widths of what they hand to the output blocks."""
        now = widths[0]
        blocks, skips = [self._chain([nn.Conv2d(self.flags.in_channels, now, 3, padding=1)])], [now]
        for level, width in enumerate(widths):
            for _ in range(self.flags.blocks):
                blocks.append(self._level(level, now, width))
                now = width
                skips.append(now)
            if level < len(widths) - 1:
                by_convolution = self._parts.Downsample(now, True)
                down = self._block(now, now, down=True) if self.flags.resblock_updown else by_convolution
                blocks.append(self._chain([down]))
                skips.append(now)
        self.input_blocks = nn.ModuleList(blocks)
        return skips

    def _decoder(self, widths: list[int], skips: list[int]) -> None:
        """Add the output blocks."""
        now, blocks = widths[-1], []
        for level, width in reversed(list(enumerate(widths))):
            for index in range(self.flags.blocks + 1):
                layers = self._level(level, now + skips.pop(), width)
                now = width
                if level and index == self.flags.blocks:
                    by_convolution = self._parts.Upsample(now, True)
                    layers.append(self._block(now, now, up=True) if self.flags.resblock_updown else by_convolution)
                blocks.append(layers)
        self.output_blocks = nn.ModuleList(blocks)

    def _level(self, level: int, inside: int, outside: int) -> nn.Sequential:
        attention = [self._attention(outside)] if level in self.flags.attention else []
        return self._chain([self._block(inside, outside), *attention])

    def _chain(self, layers: list[nn.Module]) -> nn.Sequential:
        return self._parts.TimestepEmbedSequential(*layers)

    def _block(self, inside: int, outside: int, **how: bool) -> nn.Module:
        norm = self.flags.scale_shift
        return self._parts.ResBlock(inside, self._embedding, 0.0, outside, use_scale_shift_norm=norm, **how)

    def _attention(self, channels: int) -> nn.Module:
        order = self.flags.new_attention_order
        heads = self.flags.head_channels
        return self._parts.AttentionBlock(channels, num_head_channels=heads, use_new_attention_order=order)


class GuidedDiffusionDenoiser(DiscreteDenoiser):
    """A guided-diffusion UNet that predicts epsilon; class-conditional ones take `label`, () or (N,).

    Args:
        unet: the network.
        schedule: the table it was trained on.
    """

    def __init__(self, unet: AdmUNet, schedule: Tabulated) -> None:
        flags = unet.flags
        super().__init__(schedule, "epsilon", flags.in_channels, 2 ** (len(flags.multipliers) - 1), flags.classes)
        self.unet = unet

    def network(self, x: Tensor, step: Tensor, **cond: Any) -> Tensor:
        """See `DiscreteDenoiser`."""
        return self.unet(x, step, **cond)


def load_guided_diffusion(
    path: str | Path, *, noise_schedule: str = "linear", diffusion_steps: int = 1000, **flags: Any
) -> GuidedDiffusionDenoiser:
    """Return the prior in a guided-diffusion checkpoint, .pt or .safetensors.

    Args:
        path: a plain state dict; only tensors are unpickled.
        noise_schedule: "linear" or "cosine", as in training.
        diffusion_steps: steps in training.
        **flags: fields of `AdmFlags`; where the shapes say something else, that is an error.

    Raises:
        ValueError: the file cannot be read, a flag is unknown or contradicts the shapes, or the weights do not fit.
    """
    state = _read_state(Path(path))
    try:
        unet = AdmUNet(_checked(AdmFlags.infer(state), flags))
        unet.load_state_dict({k: v.float() for k, v in state.items()}, strict=True)
    except (ValueError, RuntimeError, AssertionError) as error:
        raise ValueError(f"{path}: {' '.join(str(error).split())[:300]}") from None
    return GuidedDiffusionDenoiser(unet, _table(noise_schedule, diffusion_steps))


def _read_state(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a file."""
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, SafetensorError, pickle.UnpicklingError) as error:
        raise ValueError(f"{path} cannot be read as weights ({' '.join(str(error).split())[:200]})") from None
    except (
        LookupError,
        ValueError,
        TypeError,
        AttributeError,
        struct.error,
    ):  # other bytes, taken for a pickle's commands
        raise ValueError(f"{path} cannot be read as weights (it is no checkpoint)") from None
    if not isinstance(state, dict) or not state or not all(isinstance(v, Tensor) for v in state.values()):
        raise ValueError(f"{path} holds no plain state dict of tensors")
    return state


def _checked(inferred: AdmFlags, given: Mapping[str, Any]) -> AdmFlags:
    """Return `inferred` with the flags that shapes cannot show; the others must agree."""
    free = ("head_channels", "new_attention_order")
    known = [f.name for f in fields(AdmFlags)]
    for name, value in given.items():
        if name not in known:
            raise ValueError(f"unknown flag {name!r}, one of {known}")
        found = getattr(inferred, name)
        same = tuple(value) == found if isinstance(found, tuple) else value == found
        if name not in free and not same:
            raise ValueError(f"flag {name} = {value!r}, but the shapes of the weights say {found!r}")
    return replace(inferred, **{name: given[name] for name in free if name in given})


def _inferred(state: State) -> dict[str, Any]:
    """Return the flags that names and shapes imply; KeyError names what is missing."""
    channels = state["time_embed.0.weight"].shape[1]
    outputs = 1 + max((int(m[1]) for k in state if (m := re.match(r"output_blocks\.(\d+)\.", k))), default=-1)
    ups = [i for i in range(outputs) if _up(state, i)]
    per_level = ups[0] + 1 if ups else outputs
    levels = outputs // per_level
    firsts = [1 + level * per_level for level in range(levels)]  # per level: its blocks and one change of resolution
    widths = [state[f"input_blocks.{i}.0.in_layers.2.weight"].shape[0] for i in firsts]
    embedded = state["input_blocks.1.0.emb_layers.1.weight"].shape[0]
    return {
        "channels": channels,
        "blocks": per_level - 1,
        "multipliers": tuple(width // channels for width in widths),
        "attention": tuple(n for n, i in enumerate(firsts) if f"input_blocks.{i}.1.qkv.weight" in state),
        "in_channels": state["input_blocks.0.0.weight"].shape[1],
        "out_channels": state["out.2.weight"].shape[0],
        "classes": state["label_emb.weight"].shape[0] if "label_emb.weight" in state else 0,
        "scale_shift": embedded == 2 * widths[0],
        "resblock_updown": not any(k.endswith(".op.weight") for k in state),
    }


def _up(state: State, index: int) -> bool:
    """Return whether an output block ends by doubling the resolution."""
    names = (
        f"output_blocks.{index}.{place}.{kind}" for place in (1, 2) for kind in ("conv.weight", "in_layers.0.weight")
    )
    return any(name in state for name in names)


def _table(noise_schedule: str, steps: int) -> Tabulated:
    """Return guided-diffusion's table of betas (its `get_named_beta_schedule`)."""
    if noise_schedule == "linear":
        return Tabulated.linear(0.1 / steps, 20 / steps, steps)
    if noise_schedule == "cosine":
        u = torch.linspace(0, 1, steps + 1, dtype=torch.float64)
        bar = torch.cos((u + 0.008) / 1.008 * math.pi / 2).square()
        return Tabulated.from_betas((1 - bar[1:] / bar[:-1]).clamp_max(0.999))
    raise ValueError(f"noise_schedule is 'linear' or 'cosine', not {noise_schedule!r}")
