"""Preference models: the posterior distribution of a reward, given all labels so far.

A preference model learns from every label that was bought. Its posterior labels many more pairs of the policy
("silver" labels, see `lightning_rlhf.datamodules.silver`), and tells samplers which pairs it is uncertain about.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor

from lightning_rlhf.models.options import ModelOptions
from lightning_rlhf.randomness import Key
from lightning_rlhf.runtime.fingerprint import KeepsArguments
from lightning_rlhf.types import Comparison, Preference, Prompt, Response, State, pair_rows


@dataclass(frozen=True)
class Posterior:
    """Rewards of responses: jointly Gaussian, up to a constant per prompt.

    Args:
        mean: expected rewards, nats of the Bradley-Terry model; float64, [responses].
        covariance: their covariance, nats^2; float64, [responses, responses].
    """

    mean: Tensor
    covariance: Tensor

    def gap(self, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance of r(first) - r(second); [pairs] each.

        Args:
            first: positions of the first responses; int64, [pairs].
            second: positions of the second responses; int64, [pairs].
        """
        mean = self.mean[first] - self.mean[second]
        own = self.covariance.diagonal()
        # Var[a - b] = Var[a] + Var[b] - 2 Cov[a, b]; rounding can make it negative for near-equal responses
        variance = own[first] + own[second] - 2 * self.covariance[first, second]
        return mean, variance.clamp_min(0.0)


@dataclass(frozen=True)
class ModelStart:
    """Inputs of a preference model that no label changes.

    Args:
        checkpoint: checkpoint of the policy before training, as ``model.policy`` names it.
        options: how that checkpoint is loaded.
        device: device of the model.
        samples: prompts with responses that the reference sampled, without labels; for statistics of features.
        key: random numbers of the model.
    """

    checkpoint: str
    options: ModelOptions
    device: torch.device
    samples: Sequence[tuple[Prompt, Response]]
    key: Key


class AbstractPreferenceModel(KeepsArguments, ABC):
    """A reward that is learnt from preferences, with its uncertainty.

    The DataModule calls `setup` once, then `fit` with all preferences so far whenever enough new labels were bought.

    Attributes:
        REFITS: whether `fit` forgets earlier fits, so that the preferences alone decide the posterior. A resumed run
            then fits again and needs no state. A model that trains on instead keeps its weights in `state_dict`.
        needs_reference_logps: whether responses must have log-probabilities under the reference.
    """

    REFITS: ClassVar[bool] = True
    needs_reference_logps: bool = False

    @abstractmethod
    def setup(self, start: ModelStart) -> None:
        """Load parts that need the policy's checkpoint; called once per run, before `fit`, on every rank."""

    @abstractmethod
    def fit(self, preferences: Sequence[Preference]) -> None:
        """Fit the posterior to all preferences so far, in the order of the ledger.

        Equal preferences give an equal posterior, bit by bit, on every rank and after a restart. Free ties, see
        `lightning_rlhf.types.Label.is_free_tie`, have no information.
        """

    @abstractmethod
    def posterior(self, prompts: Sequence[Prompt], responses: Sequence[Response]) -> Posterior:
        """Posterior of the rewards of responses, on the CPU.

        Args:
            prompts: the prompt of each response.
            responses: the responses.

        Raises:
            RuntimeError: if the model was not fitted.
        """

    def pair_gaps(self, pairs: Sequence[Comparison]) -> tuple[Tensor, Tensor]:
        """Posterior mean (nats) and variance (nats^2) of the reward gap r(a) - r(b) of each pair; [pairs] each."""
        posterior = self.posterior(*pair_rows(pairs))
        first = torch.arange(0, 2 * len(pairs), 2)
        return posterior.gap(first, first + 1)

    def held_out_gaps(self, preferences: Sequence[Preference], chosen: Sequence[int]) -> Tensor:
        """Fit to all preferences, and predict some pairs without their own labels: mean gaps, nats, [chosen].

        The predictions here are those of a fit without all of the chosen preferences. A model that knows the posterior
        without one label, as `KernelPreferenceModel` does, overrides this and leaves out one at a time.

        Args:
            preferences: all preferences, in the order of the ledger, without free ties.
            chosen: positions of those that are predicted, ascending, fewer than all.
        """
        left_out = set(chosen)
        self.fit([preference for i, preference in enumerate(preferences) if i not in left_out])
        mean, _ = self.pair_gaps([preferences[i].comparison for i in chosen])
        self.fit(preferences)
        return mean

    def state_dict(self) -> State:
        """State for the checkpoint; empty where the preferences alone decide the posterior."""
        return {}

    def load_state_dict(self, state: State) -> None:
        """Restore the state that `state_dict` returned, after `setup`."""
        del state


@runtime_checkable
class UsesPreferenceModel(Protocol):
    """A sampler that asks a preference model which pair to label; the DataModule gives it the model.

    Attributes:
        preference_model: the model, fitted to the labels of all earlier rounds; None before its first fit.
    """

    preference_model: AbstractPreferenceModel | None


def win_probability(mean: Tensor, variance: Tensor, kappa: float = 1.0) -> Tensor:
    """P(first preferred) of reward gaps with a Gaussian posterior, E[sigma(kappa gap)].

    By MacKay's approximation of the logistic-normal integral, ``sigma(kappa m / sqrt(1 + pi kappa^2 v / 8))``.

    Args:
        mean: means m of the gaps, nats; any shape.
        variance: their variances v, nats^2; the same shape.
        kappa: scale of the gaps, > 0. Above 1 it undoes the shrinkage of a posterior mean.
    """
    return torch.sigmoid(kappa * mean / torch.sqrt(1 + math.pi * kappa**2 * variance / 8))
