"""Samplers of a tabular world (arms): those with a closed form, and those that choose from a pool of samples."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_rlhf.estimators.design import best_pair, pair_values, policy_weight
from lightning_rlhf.estimators.tabular import tilted_distributions
from lightning_rlhf.samplers.sir_pilaf import pair_probabilities
from lightning_rlhf.worlds.distributions import PairDistribution, Sampler, secant
from lightning_rlhf.worlds.likelihood import maximum_likelihood
from lightning_rlhf.worlds.tabular import TabularWorld


class Pairs(NamedTuple):
    """Sampled pairs: first and second response, int64 [worlds, pairs], and the loss weight, [worlds, pairs]."""

    first: Tensor
    second: Tensor
    weight: Tensor


class AbstractArm(ABC):
    """Samples pairs in many worlds at once.

    Args:
        passes: model forward passes per token position and pair (Table 1 of PILAF).
        annotations: responses shown to the annotator per pair.
    """

    def __init__(self, passes: float = 2.0, annotations: float = 2.0) -> None:
        self.passes, self.annotations = passes, annotations

    def reset(self, world: TabularWorld) -> None:
        """Clear the state at the start of a run."""
        del world

    @abstractmethod
    def draw(
        self, world: TabularWorld, parameters: Tensor, prompts: Tensor, generators: Sequence[torch.Generator]
    ) -> Pairs:
        """Sample one pair per prompt of a round.

        Args:
            world: the worlds.
            parameters: w; shape [worlds, dimensions].
            prompts: prompt of each pair; shape [worlds, pairs].
            generators: one per world, not shared with other arms.
        """

    def learn(self, gaps: Tensor, labels: Tensor) -> None:
        """Update the state of the sampler with labels. Default: no state.

        Args:
            gaps: feature gaps dphi of the pairs; shape [worlds, pairs, dimensions].
            labels: 1 where the first response won, else 0; shape [worlds, pairs].
        """
        del gaps, labels

    def pair_distribution(self, world: TabularWorld, parameters: Tensor) -> PairDistribution | None:
        """Distribution and weight of the pairs; None without a closed form."""
        del world, parameters
        return None


class AbstractDistributionArm(AbstractArm):
    """A sampler whose distribution of pairs has a closed form."""

    @abstractmethod
    def pair_distribution(self, world: TabularWorld, parameters: Tensor) -> PairDistribution:
        """Distribution and weight of the pairs."""

    def draw(
        self, world: TabularWorld, parameters: Tensor, prompts: Tensor, generators: Sequence[torch.Generator]
    ) -> Pairs:
        """Sample one pair per prompt of a round."""
        pairs = self.pair_distribution(world, parameters)
        size = pairs.probability.shape[-1]
        # one categorical outcome per pair: the flat index a * size + b
        index = categorical(pairs.probability.flatten(-2), prompts, 1, generators).squeeze(-1)
        weight = pairs.weight.expand_as(pairs.probability).flatten(-2)
        rows = torch.arange(len(prompts))[:, None]
        return Pairs(index // size, index % size, weight[rows, prompts, index])


class DistributionArm(AbstractDistributionArm):
    """A sampler whose distribution of pairs depends on policy, reference and beta only.

    Args:
        sampler: one of `lightning_rlhf.worlds.distributions`.
        passes: see `AbstractArm`.
    """

    def __init__(self, sampler: Sampler, passes: float = 2.0) -> None:
        super().__init__(passes)
        self.sampler = sampler

    def pair_distribution(self, world: TabularWorld, parameters: Tensor) -> PairDistribution:
        """Distribution and weight of the pairs."""
        return self.sampler(world.log_policy(parameters), world.log_reference, world.beta)


class SecantArm(AbstractDistributionArm):
    """Policy pairs tilted by the secant to a reward: that of the oracle, or a reward model of the labels so far.

    Args:
        true_reward: use the reward of the oracle, unknown in practice, instead of a maximum-likelihood fit to its
            labels.
        ridge: precision of the prior of the fit, in labels, > 0.
        passes: see `AbstractArm`; the cost of the pool that a language model would resample from.
    """

    def __init__(self, true_reward: bool = False, ridge: float = 1.0, passes: float = 8.0) -> None:
        super().__init__(passes)
        self.true_reward, self.ridge = true_reward, ridge
        self._gaps: list[Tensor] = []
        self._labels: list[Tensor] = []
        self._fitted = torch.zeros(0)

    def reset(self, world: TabularWorld) -> None:
        """Clear the labels at the start of a run."""
        self._gaps, self._labels, self._fitted = [], [], world.origin()

    def learn(self, gaps: Tensor, labels: Tensor) -> None:
        """Fit the reward model to all labels so far."""
        if self.true_reward:
            return
        self._gaps.append(gaps)
        self._labels.append(labels)
        # all pairs with weight 1: the reward model estimates r*, not the policy
        record = torch.cat(self._gaps, 1), torch.cat(self._labels, 1)
        self._fitted = maximum_likelihood(*record, torch.ones_like(record[1]), self._fitted, self.ridge)

    def pair_distribution(self, world: TabularWorld, parameters: Tensor) -> PairDistribution:
        """Distribution and weight of the pairs."""
        # r_hat = w_hat . phi
        reward = world.reward if self.true_reward else torch.einsum("wxyd,wd->wxy", world.features, self._fitted)
        return secant(world.log_policy(parameters), world.log_reference, world.beta, reward)


class ResampledArm(AbstractArm):
    """Resamples a pair from a pool of policy samples, like `lightning_rlhf.samplers.SIRPILAFSampler`.

    Args:
        n: samples per prompt, >= 2.
        temperature: > 0.
    """

    def __init__(self, n: int = 8, temperature: float = 1.0) -> None:
        super().__init__(passes=float(n))
        self.n, self.temperature = n, temperature

    def draw(
        self, world: TabularWorld, parameters: Tensor, prompts: Tensor, generators: Sequence[torch.Generator]
    ) -> Pairs:
        """Sample a pool per prompt and resample one pair."""
        pool = categorical(world.log_policy(parameters).exp(), prompts, self.n, generators)
        rows = torch.arange(len(prompts))[:, None, None]
        # r_theta = w . phi, up to a constant per prompt
        rewards = (world.features[rows, prompts[..., None], pool] * parameters[:, None, None]).sum(-1)
        # P(a, b) ∝ 1 / sigma'(delta / temperature)
        probabilities = pair_probabilities(rewards, rewards, self.temperature).flatten(-2)
        # each pair has a distribution of its own over its pool: pair j reads row j
        columns = torch.arange(prompts.shape[1])[None].expand(len(prompts), -1)
        index = categorical(probabilities, columns, 1, generators).squeeze(-1)
        first, second = (pool.gather(-1, part[..., None]).squeeze(-1) for part in (index // self.n, index % self.n))
        return Pairs(first, second, torch.ones_like(probabilities[..., 0]))


class PoolArm(AbstractArm):
    """Samples a pool per prompt, and labels the pair that lowers the expected loss in J most.

    The pair maximizes the design criterion ``sigma'(delta) dphi^T I^-1 Sigma I^-1 dphi``, the decrease of
    ``tr(Sigma I^-1)`` to first order. I is the information of the pairs labeled so far, constant during a round as in
    `lightning_rlhf.samplers.PolicyWeightedSampler`; Sigma is exact.

    Args:
        n: samples per prompt, >= 2.
        tilted: sample half of the pool from pi+ and half from pi-, instead of the policy.
        ridge: prior information, in policy pairs, > 0.
        ahead: fraction of the expected information of the round that is added to I in advance, in [0, 1]; without it
            all prompts of a long round select the same direction.
        chooses: False labels the first two samples, as a control.
    """

    def __init__(
        self, n: int = 8, tilted: bool = False, ridge: float = 1.0, ahead: float = 0.5, chooses: bool = True
    ) -> None:
        super().__init__(passes=2.0 * n if tilted else float(n))
        self.n, self.tilted, self.ridge, self.ahead, self.chooses = n, tilted, ridge, ahead, chooses
        self.information = torch.zeros(0)

    def reset(self, world: TabularWorld) -> None:
        """Clear the information of labeled pairs at the start of a run."""
        self.information = world.features.new_zeros(world.num_worlds, world.dim, world.dim)

    def draw(
        self, world: TabularWorld, parameters: Tensor, prompts: Tensor, generators: Sequence[torch.Generator]
    ) -> Pairs:
        """Sample a pool per prompt and choose one pair of it."""
        pool = self._pool(world, parameters, prompts, generators)
        rows = torch.arange(len(prompts))[:, None]
        features = world.features[rows[..., None], prompts[..., None], pool]
        rewards = (features * parameters[:, None, None]).sum(-1)
        sigma = world.covariance(parameters)
        # information of a policy pair: E[sigma'(delta) dphi dphi^T] <= 2 Sigma / 4, with equality at delta = 0
        isotropic = sigma.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None] * torch.eye(world.dim, dtype=sigma.dtype)
        prior = (self.ridge * isotropic + self.ahead * prompts.shape[1] * sigma) / 2
        # W = I^-1 Sigma I^-1
        weight = policy_weight(self.information + prior, sigma)
        if self.chooses:
            # maximize sigma'(delta) dphi^T W dphi
            first, second = best_pair(pair_values(features, rewards, weight[:, None]))
        else:
            first, second = torch.zeros_like(prompts), torch.ones_like(prompts)
        columns = torch.arange(prompts.shape[1])[None]
        gap = features[rows, columns, first] - features[rows, columns, second]
        delta = rewards[rows, columns, first] - rewards[rows, columns, second]
        slope = delta.sigmoid() * (-delta).sigmoid()
        # I += sum over pairs of sigma'(delta) dphi dphi^T
        self.information = self.information + torch.einsum("wp,wpd,wpe->wde", slope, gap, gap)
        return Pairs(pool[rows, columns, first], pool[rows, columns, second], torch.ones_like(delta))

    def _pool(
        self, world: TabularWorld, parameters: Tensor, prompts: Tensor, generators: Sequence[torch.Generator]
    ) -> Tensor:
        """Responses of the pool; int64 [worlds, pairs, n]."""
        log_policy = world.log_policy(parameters)
        if not self.tilted:
            return categorical(log_policy.exp(), prompts, self.n, generators)
        # pi+ ∝ pi_theta exp(+r_theta), pi- ∝ pi_theta exp(-r_theta)
        tilted = tilted_distributions(log_policy, world.log_reference, world.beta)
        half = self.n // 2
        plus = categorical(tilted.log_plus.exp(), prompts, half, generators)
        return torch.cat([plus, categorical(tilted.log_minus.exp(), prompts, self.n - half, generators)], -1)


def categorical(probabilities: Tensor, prompts: Tensor, count: int, generators: Sequence[torch.Generator]) -> Tensor:
    """Sample outcomes for prompts by inverse transform; int64 [worlds, pairs, count].

    Args:
        probabilities: probability of each outcome; shape [worlds, prompts, outcomes].
        prompts: prompt of each pair; shape [worlds, pairs].
        count: samples per pair.
        generators: one per world.
    """
    # outcome = min {k: F(k) > u F(K)} with the cumulative sum F
    cumulative = probabilities.cumsum(-1)[torch.arange(len(prompts))[:, None], prompts]
    shape = (prompts.shape[1], count)
    uniforms = torch.stack([torch.rand(shape, generator=g, dtype=probabilities.dtype) for g in generators])
    found = torch.searchsorted(cumulative.contiguous(), uniforms * cumulative[..., -1:], right=True)
    # rounding can put the threshold at the total
    return found.clamp_max(probabilities.shape[-1] - 1)
