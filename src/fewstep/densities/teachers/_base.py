"""Teachers: what is trained, on which loss, and the sampler that comes out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, ClassVar, Self, final

from torch import Tensor, nn

from fewstep.core.checks import one_of
from fewstep.core.noise import Noise, seeded
from fewstep.core.objective import Objective
from fewstep.core.presets import Presets
from fewstep.core.reference import Reference
from fewstep.core.registry import get
from fewstep.core.schedule import Schedule, VariancePreserving
from fewstep.densities.base import Cost, DensitySampler, Drawn
from fewstep.densities.grids import GRIDS, times_of
from fewstep.densities.networks import Control, ControlNet, NetConfig
from fewstep.densities.paths import DISCRETISATIONS, Kernels, noised, simulate
from fewstep.densities.whitened import Whitened
from fewstep.priors.unet import build_schedule


@dataclass(frozen=True)
class Teacher(Presets, ABC):
    """How a sampler of a density is set up and trained; final subclasses are frozen dataclasses, one file each.

    Attributes:
        reference: the publication.
        default_loss: the loss that is used unless another is named.
    """

    reference: ClassVar[Reference]
    default_loss: ClassVar[str] = "log_variance"

    @property
    def training(self) -> Mapping[str, Any]:
        """Fields of `FitOptions` by which it is trained unless others are given."""
        return {}

    def prepared(self, whitened: Whitened, seed: int) -> tuple[Teacher, Whitened]:
        """Return the teacher with what it needs to know of a density before it is trained, and the coordinates to train in."""
        return self, whitened

    @property
    def further(self) -> tuple[str, ...]:
        """The folders of the trainings that follow the first."""
        return ()

    def renewed(self, sampler: DensitySampler, seed: int) -> tuple[Teacher, Whitened] | None:
        """Return the teacher of a further training and its coordinates, by what the trained `sampler` knows of the density.

        None where it knows too little, and training ends.
        """
        return None

    @abstractmethod
    def model(self, whitened: Whitened, seed: int) -> nn.Module:
        """Return what is trained, with its initial weights drawn from `seed`; may evaluate the target."""

    @abstractmethod
    def objective(self, whitened: Whitened, loss: str) -> Objective:
        """Return the loss called `loss`; ValueError where the method has none of that name."""

    @final
    def check_loss(self, loss: str) -> None:
        """Raise ValueError unless `loss` is the default; for a method that has no other."""
        if loss != self.default_loss:
            raise ValueError(f"{type(self).__name__} has one loss, {self.default_loss!r}, not {loss!r}")

    @abstractmethod
    def sampler(self, whitened: Whitened, model: nn.Module) -> DensitySampler:
        """Return the sampler with the weights of a trained `model`."""

    @final
    def describe(self) -> dict[str, Any]:
        """Return the settings as JSON takes them; fields that do not compare are data and left out."""
        data = [f.name for f in fields(self) if not f.compare]
        described = {"name": type(self).__module__.rpartition(".")[2], **asdict(replace(self, **dict.fromkeys(data)))}
        if "schedule" in described:
            described["schedule"]["name"] = type(vars(self)["schedule"]).__name__
        return {name: value for name, value in described.items() if name not in data}


def build_teacher(described: Mapping[str, Any]) -> Teacher:
    """Return the teacher that `Teacher.describe` described."""
    settings = {key: _frozen(value) for key, value in described.items()}
    kind = get(settings.pop("name"), "teachers")
    if "schedule" in settings:
        settings["schedule"] = build_schedule(settings["schedule"])
    if "net" in settings:
        settings["net"] = NetConfig(**settings["net"])
    return kind(**settings)


def _frozen(value: Any) -> Any:
    """Return lists as tuples, as frozen fields have them."""
    return tuple(_frozen(v) for v in value) if isinstance(value, list | tuple) else value


@dataclass(frozen=True)
class PathTeacher(Teacher):
    """A teacher whose samples are paths from noise to the target, with `ControlNet` as the control.

    Attributes:
        schedule: the noising process, which must preserve variance.
        steps: of a path, in training and unless said otherwise in sampling.
        grid: their times: a name of `densities.grids.GRIDS`, or the times themselves.
        discretisation: "exponential" or "euler", see `densities.paths`.
        net: the network.
    """

    schedule: Schedule = field(default_factory=VariancePreserving)
    steps: int = 32
    grid: str | tuple[float, ...] = "variance"
    discretisation: str = "exponential"
    net: NetConfig = field(default_factory=NetConfig)

    def __post_init__(self) -> None:
        one_of("discretisation", self.discretisation, DISCRETISATIONS)
        if isinstance(self.grid, str):
            one_of("grid", self.grid, GRIDS)
        self.kernels(self.steps)

    @final
    def kernels(self, steps: int) -> Kernels:
        """Return the kernels of a path of so many steps."""
        return DISCRETISATIONS[self.discretisation](self.schedule, times_of(self.grid, self.schedule, steps))

    def control(self, whitened: Whitened) -> ControlNet:
        """Return an untrained network."""
        return ControlNet(self.schedule, whitened, self.net)

    def model(self, whitened: Whitened, seed: int) -> nn.Module:
        """See `Teacher`."""
        return seeded(lambda: self.control(whitened), seed)

    def objective(self, whitened: Whitened, loss: str) -> Objective:
        """See `Teacher`; any loss on path weights."""
        return get(loss, "losses")(whitened, self.kernels(self.steps))

    def sampler(self, whitened: Whitened, model: nn.Module) -> DensitySampler:
        """See `Teacher`."""
        control = self.control(whitened)
        control.load_state_dict(model.state_dict(), strict=True)
        return PathSampler(whitened, control.eval().requires_grad_(False), self, self.steps)


@dataclass(frozen=True, eq=False)
class PathSampler(DensitySampler):
    """Samples by simulating the paths of a control; the weights are unbiased at any number of steps.

    Attributes:
        whitened: the density in the coordinates of the control.
        denoiser: the control, which is E[y_0 | y_t] as far as it is trained.
        teacher: whose kernels are used.
        steps: where none are asked for.
    """

    whitened: Whitened
    denoiser: Control
    teacher: PathTeacher
    steps: int
    kind = "unbiased"

    def __post_init__(self) -> None:
        object.__setattr__(self, "target", self.whitened.target)

    def draw(self, noise: Noise, steps: int, weights: bool) -> Drawn:
        """See `DensitySampler`."""
        paths = simulate(self.denoiser, self.teacher.kernels(steps), noise)
        guided = self.denoiser.guide(paths.y[:1]) is not None
        log_w = paths.log_weights(self.whitened) if weights else None
        return Drawn(paths.y, log_w, Cost(steps, int(weights), steps if guided else 0))

    def backward_weights(self, y: Tensor, steps: int, noise: Noise) -> Tensor:
        """See `DensitySampler`: along a path of the noising process."""
        return noised(self.denoiser, self.teacher.kernels(steps), y, noise).log_weights(self.whitened)

    def config(self) -> dict[str, Any]:
        """See `DensitySampler`."""
        return {"teacher": self.teacher.describe(), "steps": self.steps}

    def tensors(self) -> dict[str, Tensor]:
        """See `DensitySampler`."""
        return dict(self.denoiser.state_dict())

    @classmethod
    def restore(cls, whitened: Whitened, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Self:
        """See `DensitySampler`."""
        teacher = build_teacher(config["teacher"])
        if not isinstance(teacher, PathTeacher):
            raise ValueError(f"{config['teacher']['name']!r} has no paths")
        control = teacher.control(whitened)
        try:
            control.load_state_dict(dict(tensors), strict=True)
        except RuntimeError as error:
            raise ValueError(f"the weights do not fit the network: {' '.join(str(error).split())[:300]}") from None
        return cls(whitened, control.eval().requires_grad_(False), teacher, config["steps"])
