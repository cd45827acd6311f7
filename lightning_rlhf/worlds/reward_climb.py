"""RLHF in tabular worlds: pairs train a reward model, and RLOO trains the policy on it, round after round.

The reward model is ``r_phi = w_phi . phi(x, y)``, fitted by maximum likelihood to all pairs so far. Arms differ by the
pairs that are labeled. A reward that the features cannot express (``misfit``) leaves an error that pairs decide.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_rlhf.worlds.arms import AbstractDistributionArm, DistributionArm, categorical
from lightning_rlhf.worlds.distributions import PairDistribution, secant, t_pilaf, vanilla
from lightning_rlhf.worlds.learning import Streams, Trace, labeled
from lightning_rlhf.worlds.likelihood import maximum_likelihood
from lightning_rlhf.worlds.tabular import TabularWorld, deviation


@dataclass(frozen=True)
class RLHFArm:
    """The pairs that the reward model learns from.

    Args:
        pairs: ``policy`` samples both responses from the policy; ``reward`` tilts such pairs by the inverse curvature
            ``1 / sigma'(gap of r_phi)``, as pi exp(+r_phi) and pi exp(-r_phi) of T-PILAF with r_phi in place of the
            implicit reward; ``implicit`` is T-PILAF.
        passes: model forward passes per token position and pair; of ``reward``, the pool that a language model would
            resample from.
    """

    pairs: Literal["policy", "reward", "implicit"] = "policy"
    passes: float = 2.0
    annotations: float = 2.0

    def distribution(self, world: TabularWorld, parameters: Tensor, fitted: Tensor) -> PairDistribution:
        """Distribution and weight of the pairs.

        Args:
            world: the worlds.
            parameters: w of the policy; shape [worlds, dimensions].
            fitted: w_phi of the reward model; shape [worlds, dimensions].
        """
        log_policy = world.log_policy(parameters)
        if self.pairs == "reward":
            reward = model_rewards(world, fitted)
            return inverse_curvature(log_policy, reward)
        sampler = vanilla if self.pairs == "policy" else t_pilaf
        return sampler(log_policy, world.log_reference, world.beta)


def model_rewards(world: TabularWorld, fitted: Tensor) -> Tensor:
    """``r_phi`` of every response; [worlds, prompts, responses]."""
    return torch.einsum("wxyd,wd->wxy", world.features, fitted)


def inverse_curvature(log_policy: Tensor, reward: Tensor) -> PairDistribution:
    """Policy pairs tilted by ``1 / sigma'(reward gap)``, with the weight of the normalizer: T-PILAF for any reward.

    Args:
        log_policy: log pi_theta of every response; shape [..., responses].
        reward: reward of every response, nats; same shape.
    """
    # the secant from a gap to itself is the slope; a policy whose implicit reward is `reward` has beta 1
    return secant(log_policy, log_policy - reward, 1.0, reward)


def reward_gradient(world: TabularWorld, fitted: Tensor, pairs: PairDistribution) -> Tensor:
    """Gradient in w_phi of the expected loss of the reward model; [worlds, dimensions]."""
    # the same as the DPO loss, whose gap is w . dphi
    return world.expected_gradient(fitted, pairs)


class _Sampled(AbstractDistributionArm):
    """Samples from a distribution that is known already."""

    def __init__(self, pairs: PairDistribution) -> None:
        super().__init__()
        self.pairs = pairs

    def pair_distribution(self, world: TabularWorld, parameters: Tensor) -> PairDistribution:
        """The distribution."""
        del world, parameters
        return self.pairs


def climb_rewards(
    world: TabularWorld,
    arm: RLHFArm,
    seeds: Sequence[int],
    *,
    rounds: int = 16,
    pairs: int = 64,
    steps: int = 40,
    prompts: int = 16,
    samples: int = 4,
    learning_rate: float = 0.025,
    ridge: float = 0.1,
) -> Trace:
    """Rounds of three parts: label pairs, fit the reward model to all labels so far, RLOO steps on its reward.

    All arms share a first round of Vanilla pairs, whose labels are not counted. The cosines are those of the policy
    gradient on r_phi with the gradient of J.

    Args:
        world: the worlds, one per seed.
        arm: which pairs are labeled.
        seeds: seed of each world.
        rounds: rounds after the shared one, >= 1.
        pairs: pairs per round and world.
        steps: RLOO steps per round (Adam).
        prompts: prompts per RLOO step.
        samples: responses per prompt of an RLOO step, >= 2.
        learning_rate: initial learning rate of Adam, for rewards with std 1 under the reference; it decays linearly.
        ridge: precision of the Gaussian prior on the reward model, in labels, > 0.
    """
    parameters = world.origin().clone()
    rate = learning_rate * float(deviation(world.reward, world.log_reference))
    adam = torch.optim.Adam([parameters], lr=rate)
    streams = Streams(seeds, world.features.shape[1])
    places, uniforms = streams.batch(pairs)
    shared = DistributionArm(vanilla).draw(world, parameters, places, streams.shared)
    gaps, labels = labeled(world, places, shared, uniforms)
    weights = shared.weight
    fitted = maximum_likelihood(gaps, labels, weights, world.origin(), ridge)
    trace, seen = Trace(), list[Tensor]()
    trace.record(world, parameters, 0, 0, seen, policy_gradient(world, parameters, fitted))
    total = (rounds + 1) * steps
    for index in range(rounds + 1):
        for step in range(steps):
            places, _ = streams.batch(prompts)
            ascent = rloo_gradient(world, parameters, fitted, places, samples, streams.samples)
            seen.append(F.cosine_similarity(ascent, world.gradient_j(parameters)))
            adam.param_groups[0]["lr"] = rate * (1 - (index * steps + step) / total)
            parameters.grad = -ascent
            adam.step()
        ascent = policy_gradient(world, parameters, fitted)
        trace.record(world, parameters, (index + 1) * steps, index * pairs, seen, ascent)
        if index == rounds:
            break
        places, uniforms = streams.batch(pairs)
        known = _Sampled(arm.distribution(world, parameters, fitted))
        sampled = known.draw(world, parameters, places, streams.samples)
        fresh, fresh_labels = labeled(world, places, sampled, uniforms)
        gaps, labels = torch.cat([gaps, fresh], 1), torch.cat([labels, fresh_labels], 1)
        weights = torch.cat([weights, sampled.weight], 1)
        fitted = maximum_likelihood(gaps, labels, weights, fitted, ridge)
    return trace


def policy_gradient(world: TabularWorld, parameters: Tensor, fitted: Tensor) -> Tensor:
    """Exact gradient of ``E[r_phi] - beta KL`` in w; [worlds, dimensions]."""
    return replace(world, reward=model_rewards(world, fitted)).gradient_j(parameters)


def rloo_gradient(
    world: TabularWorld,
    parameters: Tensor,
    fitted: Tensor,
    prompts: Tensor,
    samples: int,
    generators: Sequence[torch.Generator],
) -> Tensor:
    """RLOO estimate of `policy_gradient` (Ahmadian et al. 2024, arXiv 2402.14740); [worlds, dimensions].

    Args:
        world: the worlds.
        parameters: w of the policy.
        fitted: w_phi of the reward model.
        prompts: prompts of the step; shape [worlds, prompts].
        samples: responses per prompt, >= 2.
        generators: one per world.
    """
    log_policy = world.log_policy(parameters)
    chosen = categorical(log_policy.exp(), prompts, samples, generators)
    rows = torch.arange(world.num_worlds)[:, None, None]
    # R = r_phi - beta log(pi / pi_ref), a constant in the gradient
    rewards = model_rewards(world, fitted) - world.beta * (log_policy - world.log_reference)
    reward = rewards[rows, prompts[..., None], chosen]
    # A_i = R_i - mean_{j != i} R_j
    advantage = (reward - reward.mean(-1, keepdim=True)) * samples / (samples - 1)
    # grad log pi = (phi - E_pi[phi]) / beta
    mean = torch.einsum("wxy,wxyd->wxd", log_policy.exp(), world.features)
    score = (world.features[rows, prompts[..., None], chosen] - mean[rows[..., 0], prompts][:, :, None]) / world.beta
    return torch.einsum("wpk,wpkd->wd", advantage, score) / advantage[0].numel()
