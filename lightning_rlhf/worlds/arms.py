"""Who draws the pairs in a tabular world: samplers with a closed pair law, and choosers from a pool of draws."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_rlhf.estimators.design import best_pair, pair_values, policy_weight
from lightning_rlhf.estimators.tabular import tilted_distributions
from lightning_rlhf.samplers.sir_pilaf import pair_probabilities
from lightning_rlhf.worlds.laws import PairLaw, Sampler, secant
from lightning_rlhf.worlds.likelihood import maximum_likelihood
from lightning_rlhf.worlds.tabular import TabularWorld


class Pairs(NamedTuple):
    """Drawn pairs: first and second response, int64 [worlds, pairs], and the weight in the loss, [worlds, pairs]."""

    first: Tensor
    second: Tensor
    weight: Tensor


class AbstractArm(ABC):
    """Draws pairs in many worlds at once.

    Args:
        passes: model forward passes per token position and pair (Table 1 of PILAF).
        annotations: responses shown to the annotator per pair.
    """

    def __init__(self, passes: float = 2.0, annotations: float = 2.0) -> None:
        self.passes, self.annotations = passes, annotations

    def reset(self, world: TabularWorld) -> None:
        """Forget everything: a run begins."""
        del world

    @abstractmethod
    def draw(
        self, world: TabularWorld, parameters: Tensor, prompts: Tensor, generators: Sequence[torch.Generator]
    ) -> Pairs:
        """Draw one pair per prompt of a round.

        Args:
            world: the worlds.
            parameters: w; shape [worlds, dimensions].
            prompts: prompt of each pair; shape [worlds, pairs].
            generators: one per world, of this arm's own.
        """

    def learn(self, gaps: Tensor, labels: Tensor) -> None:
        """Learn from labels: feature gaps [worlds, pairs, dimensions], and 1 where the first response won."""
        del gaps, labels

    def pair_law(self, world: TabularWorld, parameters: Tensor) -> PairLaw | None:
        """The law of a pair, where it has a closed form."""
        del world, parameters
        return None


class AbstractLawArm(AbstractArm):
    """A sampler with a closed pair law."""

    @abstractmethod
    def pair_law(self, world: TabularWorld, parameters: Tensor) -> PairLaw:
        """The law of a pair."""

    def draw(
        self, world: TabularWorld, parameters: Tensor, prompts: Tensor, generators: Sequence[torch.Generator]
    ) -> Pairs:
        """Draw one pair per prompt of a round."""
        pairs = self.pair_law(world, parameters)
        size = pairs.law.shape[-1]
        index = categorical(pairs.law.flatten(-2), prompts, 1, generators).squeeze(-1)
        weight = pairs.weight.expand_as(pairs.law).flatten(-2)
        rows = torch.arange(len(prompts))[:, None]
        return Pairs(index // size, index % size, weight[rows, prompts, index])


class LawArm(AbstractLawArm):
    """A sampler whose pair law depends on policy, reference and beta alone.

    Args:
        sampler: one of `lightning_rlhf.worlds.laws`.
        passes: see `AbstractArm`.
    """

    def __init__(self, sampler: Sampler, passes: float = 2.0) -> None:
        super().__init__(passes)
        self.sampler = sampler

    def pair_law(self, world: TabularWorld, parameters: Tensor) -> PairLaw:
        """The law of a pair."""
        return self.sampler(world.log_policy(parameters), world.log_reference, world.beta)


class SecantArm(AbstractLawArm):
    """Policy pairs tilted by the secant towards a reward: the oracle's, or that of a model of the labels so far.

    Args:
        true_reward: take the oracle's reward, which nobody has, instead of a maximum-likelihood fit of its labels.
        ridge: precision of the prior of the fit, in labels, > 0.
        passes: see `AbstractArm`; of the pool that a language model would resample from.
    """

    def __init__(self, true_reward: bool = False, ridge: float = 1.0, passes: float = 8.0) -> None:
        super().__init__(passes)
        self.true_reward, self.ridge = true_reward, ridge
        self._gaps: list[Tensor] = []
        self._labels: list[Tensor] = []
        self._fitted = torch.zeros(0)

    def reset(self, world: TabularWorld) -> None:
        """Forget the labels."""
        self._gaps, self._labels, self._fitted = [], [], world.origin()

    def learn(self, gaps: Tensor, labels: Tensor) -> None:
        """Fit the reward model to all labels."""
        if self.true_reward:
            return
        self._gaps.append(gaps)
        self._labels.append(labels)
        record = torch.cat(self._gaps, 1), torch.cat(self._labels, 1)
        self._fitted = maximum_likelihood(*record, torch.ones_like(record[1]), self._fitted, self.ridge)

    def pair_law(self, world: TabularWorld, parameters: Tensor) -> PairLaw:
        """The law of a pair."""
        reward = world.reward if self.true_reward else torch.einsum("wxyd,wd->wxy", world.features, self._fitted)
        return secant(world.log_policy(parameters), world.log_reference, world.beta, reward)


class ResampledArm(AbstractArm):
    """Resamples a pair of a pool of policy draws, as `lightning_rlhf.samplers.SIRPILAFSampler`.

    Args:
        n: draws per prompt, >= 2.
        temperature: > 0.
    """

    def __init__(self, n: int = 8, temperature: float = 1.0) -> None:
        super().__init__(passes=float(n))
        self.n, self.temperature = n, temperature

    def draw(
        self, world: TabularWorld, parameters: Tensor, prompts: Tensor, generators: Sequence[torch.Generator]
    ) -> Pairs:
        """Draw a pool per prompt and resample."""
        pool = categorical(world.log_policy(parameters).exp(), prompts, self.n, generators)
        rows = torch.arange(len(prompts))[:, None, None]
        rewards = (world.features[rows, prompts[..., None], pool] * parameters[:, None, None]).sum(-1)
        law = pair_probabilities(rewards, rewards, self.temperature).flatten(-2)
        columns = torch.arange(prompts.shape[1])[None].expand(len(prompts), -1)
        index = categorical(law, columns, 1, generators).squeeze(-1)
        first, second = (pool.gather(-1, part[..., None]).squeeze(-1) for part in (index // self.n, index % self.n))
        return Pairs(first, second, torch.ones_like(law[..., 0]))


class PoolArm(AbstractArm):
    """Draws a pool per prompt, and labels the one pair that promises most for J.

    The pair maximises ``sigma'(delta) dphi' I^-1 Sigma I^-1 dphi``: the fall of ``tr(Sigma I^-1)`` per unit of
    information. I is the information of all pairs labelled so far, and stands still during a round, as in
    `lightning_rlhf.samplers.PolicyWeightedSampler`; Sigma is exact.

    Args:
        n: draws per prompt, >= 2.
        tilted: draw half of the pool from pi+ and half from pi-, instead of all from the policy.
        ridge: prior information, in labels' worth of policy pairs, > 0.
        ahead: share of the round's own information that is counted in advance, in [0, 1]; without it all prompts of a
            long round chase the same direction.
        chooses: False labels the first two draws: the control.
    """

    def __init__(
        self, n: int = 8, tilted: bool = False, ridge: float = 1.0, ahead: float = 0.5, chooses: bool = True
    ) -> None:
        super().__init__(passes=2.0 * n if tilted else float(n))
        self.n, self.tilted, self.ridge, self.ahead, self.chooses = n, tilted, ridge, ahead, chooses
        self.information = torch.zeros(0)

    def reset(self, world: TabularWorld) -> None:
        """Forget the labelled pairs."""
        self.information = world.features.new_zeros(world.num_worlds, world.dim, world.dim)

    def draw(
        self, world: TabularWorld, parameters: Tensor, prompts: Tensor, generators: Sequence[torch.Generator]
    ) -> Pairs:
        """Draw a pool per prompt and choose."""
        pool = self._pool(world, parameters, prompts, generators)
        rows = torch.arange(len(prompts))[:, None]
        features = world.features[rows[..., None], prompts[..., None], pool]
        rewards = (features * parameters[:, None, None]).sum(-1)
        sigma = world.covariance(parameters)
        # a policy pair is worth 2 Sigma / 4 at most, where delta is 0
        even = sigma.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None] * torch.eye(world.dim, dtype=sigma.dtype)
        prior = (self.ridge * even + self.ahead * prompts.shape[1] * sigma) / 2
        weight = policy_weight(self.information + prior, sigma)
        if self.chooses:
            first, second = best_pair(pair_values(features, rewards, weight[:, None]))
        else:
            first, second = torch.zeros_like(prompts), torch.ones_like(prompts)
        columns = torch.arange(prompts.shape[1])[None]
        gap = features[rows, columns, first] - features[rows, columns, second]
        delta = rewards[rows, columns, first] - rewards[rows, columns, second]
        slope = delta.sigmoid() * (-delta).sigmoid()
        self.information = self.information + torch.einsum("wp,wpd,wpe->wde", slope, gap, gap)
        return Pairs(pool[rows, columns, first], pool[rows, columns, second], torch.ones_like(delta))

    def _pool(
        self, world: TabularWorld, parameters: Tensor, prompts: Tensor, generators: Sequence[torch.Generator]
    ) -> Tensor:
        log_policy = world.log_policy(parameters)
        if not self.tilted:
            return categorical(log_policy.exp(), prompts, self.n, generators)
        laws = tilted_distributions(log_policy, world.log_reference, world.beta)
        half = self.n // 2
        plus = categorical(laws.log_plus.exp(), prompts, half, generators)
        return torch.cat([plus, categorical(laws.log_minus.exp(), prompts, self.n - half, generators)], -1)


def categorical(law: Tensor, prompts: Tensor, count: int, generators: Sequence[torch.Generator]) -> Tensor:
    """Draw outcomes for prompts by inverse transform; int64 [worlds, pairs, count].

    Args:
        law: probability of each outcome; shape [worlds, prompts, outcomes].
        prompts: prompt of each draw; shape [worlds, pairs].
        count: draws per pair.
        generators: one per world.
    """
    cumulative = law.cumsum(-1)[torch.arange(len(prompts))[:, None], prompts]
    shape = (prompts.shape[1], count)
    uniforms = torch.stack([torch.rand(shape, generator=g, dtype=law.dtype) for g in generators])
    found = torch.searchsorted(cumulative.contiguous(), uniforms * cumulative[..., -1:], right=True)
    return found.clamp_max(law.shape[-1] - 1)
