r"""A convolutional denoiser of images: a diffusers UNet behind EDM's preconditioning.

In variance-exploding coordinates x = x_t / alpha_t = x_0 + r z, with r = sigma_t / alpha_t and s = sigma_data,

    D(x; r) = c_skip x + c_out F(c_in x; c_noise)
    c_skip = s^2 / (r^2 + s^2)    c_out = r s / sqrt(r^2 + s^2)    c_in = 1 / sqrt(r^2 + s^2)

(Karras et al. 2022, arXiv:2206.00364, table 1). F works on 2 x 2 pixels as channels, which makes it four times cheaper.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fewstep.compat import prepare_torchvision
from fewstep.core import schedule as schedules
from fewstep.core.batch import like
from fewstep.core.checks import check_counts, check_positive, check_rising
from fewstep.core.denoiser import Denoiser
from fewstep.core.files import read_weights, write_weights
from fewstep.core.schedule import Schedule, VariancePreserving

SHUFFLE = 2  # pixels per side that become channels
LATER = {"classes", "size"}  # fields that headers of the first version do not have


@dataclass(frozen=True)
class UNetConfig:
    """The shape of the network and its preconditioning.

    Attributes:
        channels: image channels, 3 for colour.
        widths: channels at each resolution, finest first; each resolution halves the one before.
        layers: residual blocks per resolution.
        groups: groups of the group normalisation; divides every width.
        sigma_data: standard deviation of the images, in [-1, 1] units.
        ratio_min: smallest sigma / alpha seen in training.
        ratio_max: largest sigma / alpha seen in training.
        context: images of the same size and channels that F sees beside x; a plain denoiser has none.
        classes: class labels that F may be told; 0 for a network that takes none.
        size: side of the square images that it knows, pixels; None for any height and width.
    """

    channels: int = 3
    widths: tuple[int, ...] = (64, 128, 128)
    layers: int = 2
    groups: int = 8
    sigma_data: float = 0.5
    ratio_min: float = 0.005
    ratio_max: float = 160.0
    context: int = 0
    classes: int = 0
    size: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "widths", tuple(self.widths))
        check_counts(self, "channels", "layers", "groups")
        if not self.widths or any(not isinstance(w, int) or w <= 0 or w % self.groups for w in self.widths):
            raise ValueError(f"widths {self.widths} must be positive multiples of groups = {self.groups}")
        check_counts(self, "context", "classes", least=0)
        check_positive(self, "sigma_data")
        check_rising(self, "ratio_min", "ratio_max")

    def build(self) -> nn.Module:
        """Return the network F with fresh weights; its last layer is zero, so that D starts as c_skip x."""
        prepare_torchvision()
        from diffusers import UNet2DModel

        levels = len(self.widths)
        net: Any = UNet2DModel(
            in_channels=self.channels * (1 + self.context) * SHUFFLE**2,
            out_channels=self.channels * SHUFFLE**2,
            down_block_types=("DownBlock2D",) * levels,
            up_block_types=("UpBlock2D",) * levels,
            block_out_channels=self.widths,
            layers_per_block=self.layers,
            norm_num_groups=self.groups,
            resnet_time_scale_shift="scale_shift",
            add_attention=False,
            num_class_embeds=self.classes + 1 if self.classes else None,  # the last one says that no class is given
        )
        nn.init.zeros_(net.conv_out.weight)
        nn.init.zeros_(net.conv_out.bias)
        return net


class UNetDenoiser(Denoiser):
    """E[x_0 | x_t] of images in [-1, 1], of any size or of one; E[x_0 | x_t, class] where it knows classes.

    The noise level enters the network as 100 ln(sigma / alpha), clamped to the trained range; the preconditioning uses
    the true level, so that the result is x_t / alpha itself at sigma = 0 and bounded as sigma grows.
    """

    def __init__(self, config: UNetConfig | None = None, schedule: Schedule | None = None) -> None:
        super().__init__()
        self.config = config or UNetConfig()
        self.schedule = schedule or VariancePreserving()
        self.event_shape = (self.config.channels, self.config.size, self.config.size)
        self.net = self.config.build()

    def forward(
        self,
        x_t: Tensor,
        t: Tensor,
        *,
        context: Tensor | None = None,
        label: Tensor | int | None = None,
        **cond: Any,
    ) -> Tensor:
        """See `Denoiser`; x_t is (N, C, H, W), t is () or (N,), both sides in [-1, 1] units.

        `context` is (N, context C, H, W), of order one; it must be there if and only if the configuration asks for it.
        `label` is () or (N,), a class from 0 or -1 for no class, which is also what None means.
        """
        if cond or (label is not None and not self.config.classes):
            raise TypeError(f"this prior takes no condition, got {sorted(cond) or 'label'}")
        wanted = self.config.context * self.config.channels
        if (given := 0 if context is None else context.shape[1]) != wanted:
            raise ValueError(f"this network sees {wanted} channels beside x_t, not {given}")
        if x_t.ndim != 4 or x_t.shape[1] != self.config.channels:
            raise ValueError(f"expected (N, {self.config.channels}, H, W), got {tuple(x_t.shape)}")
        t = torch.as_tensor(t, dtype=x_t.dtype, device=x_t.device)
        alpha, _ = self.schedule(t)
        ratio, s = self.schedule.ratio(t), self.config.sigma_data
        x, r = x_t / like(alpha, x_t), like(ratio, x_t)
        scale = torch.rsqrt(r.square() + s**2)
        return (s * scale).square() * x + r * s * scale * self._network(
            scale * x, ratio, context, self._labels(label, x)
        )

    def _labels(self, label: Tensor | int | None, x: Tensor) -> Tensor | None:
        """Return the index of each item's class among the embeddings, (N,); None for a network that knows no classes."""
        if not self.config.classes:
            return None
        given = torch.as_tensor(-1 if label is None else label, device=x.device).expand(len(x))
        if bool(((given < -1) | (given >= self.config.classes)).any()):
            raise ValueError(f"labels are classes from 0 to {self.config.classes - 1}, or -1 for none")
        return torch.where(given < 0, self.config.classes, given)

    def _network(self, x: Tensor, ratio: Tensor, context: Tensor | None, labels: Tensor | None) -> Tensor:
        """Return F(x, context, labels; 100 ln ratio) at the size of x, computed in the precision of the weights."""
        height, width = x.shape[-2:]
        noise = 100 * ratio.clamp(self.config.ratio_min, self.config.ratio_max).log().expand(len(x))
        dtype = next(self.net.parameters()).dtype
        seen = x if context is None else torch.cat([x, context], 1)
        padded = pad_to_multiple(seen.to(dtype), SHUFFLE * 2 ** (len(self.config.widths) - 1))
        out = self.net(F.pixel_unshuffle(padded, SHUFFLE), noise.to(dtype), class_labels=labels).sample
        return F.pixel_shuffle(out, SHUFFLE)[..., :height, :width].to(x.dtype)

    def with_context(self, images: int) -> UNetDenoiser:
        """Return a copy that also takes `images` images of context, with zero weights behind them: the same function."""
        wide = UNetDenoiser(replace(self.config, context=images), self.schedule)
        state, first = self.net.state_dict(), "conv_in.weight"
        new = wide.net.state_dict()[first].zero_()
        new[:, : state[first].shape[1]] = state[first]
        wide.net.load_state_dict({**state, first: new})
        return wide.train(self.training)

    def save(self, folder: str | Path) -> None:
        """Write half-precision weights and their header to `folder`, each file atomically."""
        header = {
            "format": "fewstep-prior",
            "method": type(self).__name__,
            "fields": asdict(self.config),
            "schedule": {"name": type(self.schedule).__name__, **asdict(self.schedule)},  # type: ignore[call-overload]
        }
        write_weights(folder, self.net.state_dict(), header, torch.float16)

    @classmethod
    def load(cls, folder: str | Path) -> UNetDenoiser:
        """Return the denoiser saved in `folder`, in single precision and evaluation mode.

        Raises:
            ValueError: a file is missing or damaged, or weights and header do not describe the same network.
        """
        tensors, header = read_weights(folder, cls.__name__)
        try:
            model = cls(_config(header["fields"]), build_schedule(header["schedule"]))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"the header of {folder} does not describe a {cls.__name__}: {error}") from None
        try:
            model.net.load_state_dict({k: v.float() for k, v in tensors.items()}, strict=True)
        except RuntimeError as error:
            reason = " ".join(str(error).split())[:300]
            raise ValueError(f"the weights in {folder} do not fit the network its header describes: {reason}") from None
        return model.eval()


def pad_to_multiple(x: Tensor, multiple: int) -> Tensor:
    """Pad (N, C, H, W) at the bottom and the right to multiples of `multiple`: mirrored, or repeated where too small."""
    bottom, right = -x.shape[-2] % multiple, -x.shape[-1] % multiple
    if not bottom and not right:
        return x
    mode = "reflect" if bottom < x.shape[-2] and right < x.shape[-1] else "replicate"
    return F.pad(x, (0, right, 0, bottom), mode=mode)


def _config(values: dict[str, Any]) -> UNetConfig:
    """Return the configuration of a header; every field must be there, except for those that came later."""
    missing = {f.name for f in fields(UNetConfig)} - LATER - set(values)
    if missing:
        raise ValueError(f"missing fields {sorted(missing)}")
    return UNetConfig(**values)


def build_schedule(values: dict[str, Any]) -> Schedule:
    """Return the schedule that a header names."""
    kind = getattr(schedules, values["name"], None)
    if not (isinstance(kind, type) and issubclass(kind, Schedule) and kind is not Schedule):
        raise ValueError(f"unknown schedule {values['name']!r}")
    return kind(**{k: v for k, v in values.items() if k != "name"})
