"""The epistemic reward model of "Efficient Exploration at Scale": a point estimate, and an ensemble with priors."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from lightning_rlhf.logprobs.scores import Pooling
from lightning_rlhf.losses.reward import bradley_terry_loss
from lightning_rlhf.preference_models.training import (
    DEFAULT_STEPS,
    AbstractRewardHead,
    AbstractTrainedModel,
    FitSteps,
    MLPs,
)


@dataclass(frozen=True)
class EpistemicSize:
    """Size of an epistemic head.

    Args:
        members: samples of the posterior, >= 2; the paper has 100, the default is SEA's (arXiv 2411.01493).
        hidden: width of both hidden layers of the point head and of the differentials, >= 1; the paper has 1024.
        prior_hidden: the same of the priors, >= 1; the paper has 256.
        prior_scale: factor of the priors, >= 0. At 10, rewards of different responses have a standard deviation of
            about 0.7 nats before the first label, for standardized features; the paper's is not known.
    """

    members: int = 20
    hidden: int = 128
    prior_hidden: int = 64
    prior_scale: float = 10.0

    def __post_init__(self) -> None:
        if self.members < 2 or self.hidden < 1 or self.prior_hidden < 1 or not 0 <= self.prior_scale < float("inf"):
            raise ValueError(
                f"size.members must be >= 2, size.hidden and size.prior_hidden >= 1, and size.prior_scale finite and "
                f">= 0; got {self.members}, {self.hidden}, {self.prior_hidden} and {self.prior_scale}"
            )


DEFAULT_SIZE = EpistemicSize()


class EpistemicHead(AbstractRewardHead):
    """A point head, and an ensemble of random priors with trained differentials (arXiv 2603.17378).

    With features h, sample z = 1..Z of the reward is ``point(h) + prior_scale prior_z(h) + differential_z(h)``. Priors
    stay as they were initialized. Each differential learns to cancel its prior where there are labels, so that samples
    agree there and differ elsewhere. No gradient of the samples reaches the point head or the trunk below ``h``. Left
    out: another sample of the labels for each member.

    Args:
        width: numbers per feature vector.
        size: number of samples and widths of layers.
    """

    def __init__(self, width: int, size: EpistemicSize = DEFAULT_SIZE) -> None:
        super().__init__()
        self.prior_scale = size.prior_scale
        self.point = MLPs(1, (width, size.hidden, size.hidden, 1))
        self.prior = MLPs(size.members, (width, size.prior_hidden, size.prior_hidden, 1)).requires_grad_(False)
        self.differential = MLPs(size.members, (width, size.hidden, size.hidden, 1))

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Point estimates, [responses], and samples, [members, responses], nats; features are [responses, width]."""
        point = self.point(features)[0, :, 0]
        # stop-gradient: the epistemic part trains neither the trunk nor the point head
        stopped = features.detach()
        epistemic = self.prior_scale * self.prior(stopped) + self.differential(stopped)
        return point, point.detach() + epistemic[..., 0]

    def losses(self, features: Tensor, label: Tensor) -> Tensor:
        """Bradley-Terry loss of the point head plus that of every sample, which has parameters of its own; [pairs]."""
        # [pairs, 2, width] -> [2 * pairs, width]
        point, samples = self(features.flatten(0, 1))
        chosen, rejected = samples.view(len(samples), -1, 2).unbind(2)
        # [members, pairs] against the labels of the pairs: summed, so that each member learns as if alone
        epistemic = bradley_terry_loss(chosen, rejected, label).sum(0)
        return bradley_terry_loss(*point.view(-1, 2).unbind(1), label) + epistemic


class EpistemicPreferenceModel(AbstractTrainedModel):
    """The epistemic reward model of "Efficient Exploration at Scale" (arXiv 2603.17378), trained on all labels.

    The posterior mean is the point head, its covariance that of the samples. The paper trains the trunk together with
    the point head and reads the last state; here the trunk is frozen by default, so that a fit trains
    the heads alone. The paper's optimizer and rates are not published: the defaults are ours.

    Args:
        pooling: vector of a response: ``last`` token, ``mean`` or ``sum`` over its tokens, or sum at the ``middle``
            layer.
        train_trunk: train the language model with the point head.
        size: number of samples and widths of layers.
        fitting: steps of each fit.

    Raises:
        ValueError: if the pooling is unknown.
    """

    def __init__(
        self,
        pooling: Pooling = "last",
        train_trunk: bool = False,
        size: EpistemicSize = DEFAULT_SIZE,
        fitting: FitSteps = DEFAULT_STEPS,
    ) -> None:
        super().__init__(pooling=pooling, train_trunk=train_trunk, fitting=fitting)
        self.size = size

    def build_head(self, width: int) -> EpistemicHead:
        """The epistemic head."""
        return EpistemicHead(width, self.size)
