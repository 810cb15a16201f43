"""Exact laws as targets, and controls and maps that are known, for the tests of densities."""

from dataclasses import dataclass

import torch

import fewstep
from fewstep.core.schedule import VariancePreserving
from fewstep.densities.networks import Control, Moments, check_preserving, drift_of
from fewstep.densities.students._maps import FlowMap
from fewstep.priors.exact import GaussianPrior

SCHEDULE = VariancePreserving()
GAUSSIAN = GaussianPrior(torch.tensor([0.5, -0.3]), torch.tensor([[0.3, 0.1], [0.1, 0.6]]), SCHEDULE)


@dataclass(frozen=True, eq=False)
class Law(fewstep.TargetDensity):
    """The law of an exact prior times e^log_z, as a target."""

    prior: object
    log_z: float = 0.7

    @property
    def dim(self):
        return self.prior.event_shape[0]

    def log_prob(self, x):
        return self.prior.log_prob(x) + self.log_z

    def sample(self, noise):
        return self.prior.sample(len(noise), noise)


class Known(Control):
    """A denoiser that is known, an exact or a trained one, as a control; kernels take the target's variances for `variances`."""

    def __init__(self, denoiser, variances=1.0):
        super().__init__()
        check_preserving(denoiser.schedule)
        self.denoiser, self.schedule = denoiser, denoiser.schedule
        self.event_shape = tuple(denoiser.event_shape)
        self.register_buffer("variances", torch.as_tensor(variances).expand(self.event_shape).clone())

    def guide(self, y):
        return None

    def moments(self, y, t, guide):
        return Moments(drift_of(self.denoiser, y, t), self.variances.to(y).expand_as(y))


class ExactMap(FlowMap):
    """The exact flow of a Gaussian; `wrong` reads time the other way round, as the papers' clock does."""

    jumps = True

    def __init__(self, prior, wrong=False):
        super().__init__(prior.schedule, prior.event_shape[0])
        self.prior, self.wrong = prior, wrong
        self.unused = torch.nn.Parameter(torch.zeros(()))

    def forward(self, y, t, s):
        if self.wrong:
            t = (1 - torch.as_tensor(t)).clamp_min(1e-3)
        return self.prior.flow(y, torch.as_tensor(t), torch.as_tensor(s))


class Affine(FlowMap):
    """y -> A y + b whatever the times are."""

    jumps = True

    def __init__(self, matrix, shift):
        super().__init__(SCHEDULE, len(shift))
        self.matrix, self.shift = matrix, shift

    def forward(self, y, t, s):
        return y @ self.matrix.T + self.shift


def wide():
    """An affine map a little wider than the Gaussian target, so that weights vary but have a bounded second moment."""
    root = torch.linalg.cholesky(GAUSSIAN.cov)
    return Affine(1.3 * root, GAUSSIAN.mean + 0.1)
