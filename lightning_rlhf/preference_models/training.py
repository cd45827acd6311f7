"""Preference models that are trained in the loop: a head on a trunk, a few optimizer steps at every fit."""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar, cast, get_args

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lightning_rlhf.logprobs.packing import Group
from lightning_rlhf.logprobs.scores import Pooling, pooled_states
from lightning_rlhf.models.dropout import without_dropout
from lightning_rlhf.models.load import load_policy
from lightning_rlhf.models.options import LoadArguments
from lightning_rlhf.preference_models.base import AbstractPreferenceModel, ModelStart, Posterior
from lightning_rlhf.randomness import Key
from lightning_rlhf.types import Preference, Prompt, Response, State


CHUNK = 16
"""Pairs per forward pass of a frozen trunk. Results of full chunks are kept, those of a chunk that may grow are not."""


@dataclass(frozen=True)
class FitSteps:
    """The optimizer steps of a fit, with AdamW.

    Args:
        steps: optimizer steps of each fit, >= 1.
        batch_size: pairs of a step, >= 1; all pairs where there are fewer.
        learning_rate: of the head, > 0.
        trunk_learning_rate: of the trunk, where that is trained, > 0.
        weight_decay: of head and trunk, >= 0.
    """

    steps: int = 12
    batch_size: int = 64
    learning_rate: float = 1e-3
    trunk_learning_rate: float = 1e-5
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        if self.steps < 1 or self.batch_size < 1:
            raise ValueError(f"fitting.steps and .batch_size must be >= 1; got {self.steps} and {self.batch_size}")
        if not (self.learning_rate > 0 and self.trunk_learning_rate > 0 and self.weight_decay >= 0):
            raise ValueError(
                f"fitting.learning_rate and .trunk_learning_rate must be > 0, and .weight_decay >= 0; got "
                f"{self.learning_rate}, {self.trunk_learning_rate} and {self.weight_decay}"
            )


DEFAULT_STEPS = FitSteps()


class AbstractRewardHead(nn.Module, ABC):
    """Rewards with samples of their uncertainty, from features of responses."""

    @abstractmethod
    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Rewards in nats, [responses], and samples of them, [samples, responses]; features are [responses, width]."""

    @abstractmethod
    def losses(self, features: Tensor, label: Tensor) -> Tensor:
        """Loss of each pair, [pairs].

        Args:
            features: features of responses a and b of each pair, [pairs, 2, width].
            label: P(a preferred) in [0, 1], [pairs].
        """


class MLPs(nn.Module):
    """Several MLPs with ReLU on the same input, computed at once; initialized as ``nn.Linear`` is.

    Args:
        members: number of MLPs.
        sizes: width of the input and of each layer after it.
    """

    def __init__(self, members: int, sizes: Sequence[int]) -> None:
        super().__init__()
        self.weights, self.biases = nn.ParameterList(), nn.ParameterList()
        for inputs, outputs in pairwise(sizes):
            bound = 1 / math.sqrt(inputs)
            self.weights.append(nn.Parameter(torch.empty(members, inputs, outputs).uniform_(-bound, bound)))
            self.biases.append(nn.Parameter(torch.empty(members, 1, outputs).uniform_(-bound, bound)))

    def forward(self, features: Tensor) -> Tensor:
        """Outputs of all members, [members, rows, outputs]; features are [rows, inputs]."""
        hidden = features.expand(len(self.weights[0]), *features.shape)
        for i, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            hidden = torch.baddbmm(bias, hidden.relu() if i else hidden, weight)
        return hidden


class Standardized(nn.Module):
    """Features less their mean, over their standard deviation on unlabeled samples.

    Hidden states of language models have a large common part (cosines of .4 to .9), and widths of very different scale.

    Args:
        samples: features of unlabeled samples, [samples, width]; with fewer than two, nothing changes.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, samples: Tensor) -> None:
        super().__init__()
        known = len(samples) > 1
        std = samples.std(0) if known else torch.ones_like(samples.sum(0))
        self.register_buffer("mean", samples.mean(0) if known else torch.zeros_like(std))
        # a feature that never changes carries nothing
        self.register_buffer("std", torch.where(std > 1e-6, std, torch.full_like(std, math.inf)))

    def forward(self, features: Tensor) -> Tensor:
        """Standardized features, same shape."""
        return (features - self.mean) / self.std


class AbstractTrainedModel(AbstractPreferenceModel, ABC):
    """A reward head on a language model, trained on from fit to fit, on all preferences.

    A fit takes a fixed number of steps. Its random numbers depend on the key of the run and on the number of the fit,
    so that equal histories give equal weights, bit by bit, on every rank and after a restart. Every rank holds the
    whole model.

    Args:
        pooling: see `lightning_rlhf.logprobs.scores.pooled_states`.
        train_trunk: train the language model too, in float32; else its features are computed once per label.
        fitting: the steps of a fit.
    """

    REFITS: ClassVar[bool] = False

    def __init__(self, *, pooling: Pooling, train_trunk: bool, fitting: FitSteps) -> None:
        if pooling not in get_args(Pooling):
            raise ValueError(f"pooling must be one of {', '.join(get_args(Pooling))}; got {pooling!r}")
        self.pooling: Pooling = pooling
        self.train_trunk, self.fitting = train_trunk, fitting
        self._fits = 0
        self._start: ModelStart | None = None
        self._features: dict[tuple[Group, ...], Tensor] = {}

    @abstractmethod
    def build_head(self, width: int) -> AbstractRewardHead:
        """Make the head; torch's global generator is seeded for it."""

    def auxiliary_loss(self, preferences: Sequence[Preference]) -> Tensor | float:
        """A loss of the trunk beside that of the head, scalar; only asked for a trained trunk. Default: none."""
        del preferences
        return 0.0

    # -- the interface -------------------------------------------------------------------------------------------------

    def setup(self, start: ModelStart) -> None:
        """Load the trunk and make head and optimizer."""
        arguments: LoadArguments = start.options.load_arguments()
        if self.train_trunk:
            # small steps of the optimizer are lost in bfloat16
            arguments = {**arguments, "dtype": "float32"}
        with _computing(start.device):
            model = without_dropout(load_policy(start.checkpoint, **arguments)).requires_grad_(self.train_trunk)
            # in eval mode, also in training: nothing drops
            self._policy = cast(PreTrainedModel, model.eval())
            nn.Module.to(self._policy, start.device)
            with torch.no_grad():
                samples = self._encoded(
                    [(p.ids, (r.ids,)) for p, r in start.samples], start.options.scoring_batch_tokens
                )
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(start.key.seed())
                head = self.build_head(samples.shape[1])
            self._scale, self._head = Standardized(samples).to(start.device), head.to(start.device)
            groups = [{"params": [p for p in self._head.parameters() if p.requires_grad]}]
            if self.train_trunk:
                groups.append({"params": list(self._policy.parameters()), "lr": self.fitting.trunk_learning_rate})
            self._optimizer = torch.optim.AdamW(
                groups, lr=self.fitting.learning_rate, weight_decay=self.fitting.weight_decay
            )
        self._start, self._fits, self._features = start, 0, {}

    def fit(self, preferences: Sequence[Preference]) -> None:
        """Take the steps of a fit on minibatches of all preferences."""
        start = self._checked_start()
        labeled = [preference for preference in preferences if not preference.label.is_free_tie]
        if not labeled:
            return
        with _computing(start.device):
            labels = torch.tensor([p.probability for p in labeled], device=start.device)
            features = None if self.train_trunk else self._scale(self._frozen_features(labeled))
            for batch in minibatches(len(labeled), self.fitting, start.key.fold(self._fits)):
                loss: Tensor | float = 0.0
                if features is None:
                    chosen = [labeled[i] for i in batch.tolist()]
                    encoded = self._scale(self._encoded([pair_group(p) for p in chosen]))
                    pairs = encoded.view(len(chosen), 2, -1)
                    loss = self.auxiliary_loss(chosen)
                else:
                    pairs = features[batch]
                loss = self._head.losses(pairs, labels[batch]).mean() + loss
                self._optimizer.zero_grad()
                loss.backward()
                self._optimizer.step()
        self._fits += 1

    def posterior(self, prompts: Sequence[Prompt], responses: Sequence[Response]) -> Posterior:
        """Rewards of the head, and the covariance of its samples."""
        start = self._checked_start()
        if not self._fits:
            raise RuntimeError(f"{type(self).__name__}.posterior needs a fit; call fit with preferences first")
        groups = [(prompt.ids, (response.ids,)) for prompt, response in zip(prompts, responses, strict=True)]
        with _computing(start.device), torch.no_grad():
            features = self._encoded(merged(groups), start.options.scoring_batch_tokens)
            mean, samples = self._head(self._scale(features))
        return Posterior(mean.double().cpu(), sample_covariance(samples.double().cpu()))

    def state_dict(self) -> State:
        """Weights that are trained, optimizer, and number of fits; empty before `setup`."""
        if self._start is None:
            return {}
        state: State = {
            "fits": self._fits,
            "head": _kept(self._head),
            # copies: a later fit must not change a state that waits for being written
            "optimizer": copy.deepcopy(self._optimizer.state_dict()),
        }
        return {**state, "trunk": _kept(self._policy)} if self.train_trunk else state

    def load_state_dict(self, state: State) -> None:
        """Restore the state of `state_dict`, after `setup`."""
        if not state:
            return
        self._fits = int(state["fits"])
        with _computing(self._checked_start().device):
            self._head.load_state_dict(state["head"])
            self._optimizer.load_state_dict(copy.deepcopy(state["optimizer"]))
            if self.train_trunk:
                self._policy.load_state_dict(state["trunk"])

    # -- features ------------------------------------------------------------------------------------------------------

    def _checked_start(self) -> ModelStart:
        if self._start is None:
            raise RuntimeError(f"{type(self).__name__} has no model yet; call setup first")
        return self._start

    def _encoded(self, groups: Sequence[Group], tokens_per_batch: int | None = None) -> Tensor:
        """Pooled hidden states, [responses, width]; float32."""
        trunk = self._policy.base_model
        return pooled_states(trunk, groups, self.pooling, tokens_per_batch=tokens_per_batch).float()

    def _frozen_features(self, preferences: Sequence[Preference]) -> Tensor:
        """Features of both responses of each pair, [pairs, 2, width].

        Rounding depends on the pairs that share a forward pass. Chunks therefore follow the order of the ledger, and
        are the same ones after a restart.
        """
        parts: list[Tensor] = []
        for first in range(0, len(preferences), CHUNK):
            groups = tuple(pair_group(preference) for preference in preferences[first : first + CHUNK])
            known = self._features.get(groups)
            if known is None:
                with torch.no_grad():
                    known = self._encoded(groups).view(len(groups), 2, -1)
                if len(groups) == CHUNK:
                    self._features[groups] = known
            parts.append(known)
        return torch.cat(parts)


def pair_group(preference: Preference) -> Group:
    """Token ids of a pair: the prompt, and responses a and b."""
    comparison = preference.comparison
    return comparison.prompt.ids, (comparison.a.ids, comparison.b.ids)


def merged(groups: Sequence[Group]) -> list[Group]:
    """Groups of one response each, where neighbors with equal prompts share a group."""
    found: list[Group] = []
    for prompt, responses in groups:
        if found and found[-1][0] == prompt:
            found[-1] = (prompt, (*found[-1][1], *responses))
        else:
            found.append((prompt, responses))
    return found


def minibatches(count: int, fitting: FitSteps, key: Key) -> list[Tensor]:
    """Positions of the pairs of each step: passes over all pairs, each in a new order.

    Args:
        count: number of pairs, >= 1.
        fitting: number of steps, and pairs of a step.
        key: source of the random numbers.
    """
    size = min(fitting.batch_size, count)
    passes = math.ceil(fitting.steps * size / count)
    generator = key.generator()
    order = torch.cat([torch.randperm(count, generator=generator) for _ in range(passes)])
    return list(order[: fitting.steps * size].split(size))


def sample_covariance(samples: Tensor) -> Tensor:
    """Unbiased covariance of samples, [n, n]; zero for a single sample.

    Args:
        samples: [samples, n].
    """
    deviations = samples - samples.mean(0)
    return deviations.T @ deviations / max(1, len(samples) - 1)


def _kept(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in module.state_dict().items()}


@contextmanager
def _computing(device: torch.device) -> Iterator[None]:
    """Compute outside of the inference mode in which rounds are sampled, and without autocast."""
    with torch.inference_mode(False), torch.enable_grad(), torch.autocast(device.type, enabled=False):
        yield
