"""Named networks that turn patches of images in [0, 1] into features, for distances between sets of images.

inputs = patches(images, 64)
frechet_distance(net(inputs), net(patches(truths, 64)))

A distance is known by its network: what MobileNetV2 gives is no FID, and no figure of one compares with another's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from pickle import UnpicklingError

import torch
from torch import Tensor, nn

from fewstep.metrics.quality import Missing, read_safetensors

_INCEPTION = "weights-inception-2015-12-05-6726825d.pth"  # as torch-fidelity's download is called
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, in [0, 1]


@dataclass(frozen=True)
class FeatureNet:
    """A frozen network with a name.

    Attributes:
        name: to be stated beside every figure made with it.
        features: images (N, 3, h, w) in [0, 1] -> (N, F).
        batch: images at once.
    """

    name: str
    features: Callable[[Tensor], Tensor] = field(repr=False)
    batch: int = 64

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> Tensor:
        """Return features, (N, 3, h, w) in [0, 1] -> (N, F); ValueError for other shapes or ranges."""
        if images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"expected images (N, 3, h, w), got {tuple(images.shape)}")
        low, high = float(images.min()), float(images.max())
        if not (low >= -1e-6 and high <= 1 + 1e-6):
            raise ValueError(f"images must lie in [0, 1], they span [{low:.3g}, {high:.3g}]")
        return torch.cat([self.features(part.float()) for part in images.split(self.batch)])


def patches(images: Tensor, size: int = 64, stride: int | None = None) -> Tensor:
    """Return the square patches of images on a regular grid, (B, C, H, W) -> (N, C, size, size); side by side by default.

    Rows and columns that do not fill a patch are left out.

    Raises:
        ValueError: images that are smaller than a patch.
    """
    if images.ndim != 4 or min(images.shape[-2:]) < size:
        raise ValueError(f"patches of {size} pixels do not fit into images {tuple(images.shape)}")
    step = stride or size
    grid = images.unfold(2, size, step).unfold(3, size, step)  # (B, C, rows, columns, size, size)
    return grid.permute(0, 2, 3, 1, 4, 5).flatten(0, 2)


def mobilenet(weights: str | Path) -> FeatureNet:
    """Return MobileNetV2's 1280 features before its classifier, averaged over the image, which keeps its own size.

    Args:
        weights: a .safetensors file with `features.*` of torchvision's MobileNetV2 (IMAGENET1K_V1).

    Raises:
        Missing: torchvision is not installed.
        ValueError: the file is missing, damaged or of another network.
    """
    state = read_safetensors(Path(weights))
    try:
        from fewstep.compat import prepare_torchvision

        prepare_torchvision()
        from torchvision.models import mobilenet_v2
    except ImportError as error:
        raise Missing(f"torchvision is not installed ({error})") from None
    with torch.random.fork_rng(devices=[]):  # the caller's random generator is not ours
        whole = mobilenet_v2(weights=None)
    trunk = nn.ModuleDict({"features": whole.features})  # the names in the file begin with it
    try:
        trunk.load_state_dict(state, strict=True)
    except RuntimeError as error:
        raise ValueError(f"{weights} does not fit MobileNetV2: {' '.join(str(error).split())[:200]}") from None
    body = trunk["features"].eval().requires_grad_(False)
    mean, std = (torch.tensor(v).reshape(1, 3, 1, 1) for v in (_MEAN, _STD))
    return FeatureNet(
        "MobileNetV2 (torchvision, 1280 pooled features, native size)", lambda x: _pooled(body, x, mean, std)
    )


def inception(weights: str | Path | None = None) -> FeatureNet:
    """Return the 2048 pooled features of the Inception-v3 that FID is defined with, by torch-fidelity, resized to 299.

    Args:
        weights: torch-fidelity's file, a pickle: give none that you do not trust. Where absent, its download is used if
            it already lies in torch's hub cache; nothing is downloaded.

    Raises:
        Missing: torch-fidelity or its weights are not there.
        ValueError: the file named does not exist or does not fit.
    """
    path = Path(weights) if weights else Path(torch.hub.get_dir()) / "checkpoints" / _INCEPTION
    if not path.is_file():
        problem = f"Inception weights {path} do not exist"
        raise ValueError(problem) if weights else Missing(f"{problem}; give their path or use `mobilenet`")
    try:
        from fewstep.compat import prepare_torchvision

        prepare_torchvision()
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except ImportError as error:
        raise Missing(f"torch-fidelity is not installed ({error}); pip install torch-fidelity") from None
    with torch.random.fork_rng(devices=[]):
        try:
            net = FeatureExtractorInceptionV3("inception-v3", ["2048"], str(path))
        except (RuntimeError, TypeError, AttributeError, EOFError, UnpicklingError) as error:
            raise ValueError(f"{path} does not fit Inception-v3: {' '.join(str(error).split())[:200]}") from None
    return FeatureNet(
        "Inception-v3 (torch-fidelity, 2048 pooled features, resized to 299)", lambda x: net(_bytes(x))[0]
    )


def _pooled(body: nn.Module, x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    return body((x.cpu() - mean) / std).mean((2, 3))


def _bytes(x: Tensor) -> Tensor:
    return (x.cpu().clamp(0, 1) * 255).round().to(torch.uint8)
