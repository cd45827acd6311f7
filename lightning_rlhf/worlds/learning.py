"""Learners for tabular worlds: online DPO by gradient steps, iterative DPO by maximum likelihood, both with exact J."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_rlhf.randomness import Key
from lightning_rlhf.worlds.arms import AbstractArm, DistributionArm, Pairs
from lightning_rlhf.worlds.distributions import vanilla
from lightning_rlhf.worlds.likelihood import maximum_likelihood
from lightning_rlhf.worlds.tabular import Objective, TabularWorld, deviation


Setting = Literal["online", "iterative", "overfitted", "thumbs", "rlhf"]


@dataclass
class Trace:
    """Metrics of a run, one entry per evaluation; tensors are [worlds].

    Args:
        steps: gradient steps or rounds so far.
        labels: labels so far, without those of the shared start.
        objectives: reward, KL and J.
        cosines: cosine between the negative batch gradient and the exact gradient of J, mean over the batches since the
            last evaluation; NaN at the start.
        population_cosines: the same for the expected gradient; NaN if the distribution of pairs has no closed form.
        spreads: std of the implicit reward over policy samples, nats.
    """

    steps: list[int] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    objectives: list[Objective] = field(default_factory=list)
    cosines: list[Tensor] = field(default_factory=list)
    population_cosines: list[Tensor] = field(default_factory=list)
    spreads: list[Tensor] = field(default_factory=list)

    def evaluate(
        self, world: TabularWorld, arm: AbstractArm, parameters: Tensor, step: int, labels: int, seen: list[Tensor]
    ) -> None:
        """Add an entry, and clear the cosines since the last one.

        Args:
            world: the worlds.
            arm: the sampler.
            parameters: w; shape [worlds, dimensions].
            step: gradient steps or rounds so far.
            labels: labels so far.
            seen: cosines of the batches since the last evaluation; cleared.
        """
        pairs = arm.pair_distribution(world, parameters)
        expected = None if pairs is None else -world.expected_gradient(parameters, pairs)
        self.record(world, parameters, step, labels, seen, expected)

    def record(
        self,
        world: TabularWorld,
        parameters: Tensor,
        step: int,
        labels: int,
        seen: list[Tensor],
        expected: Tensor | None,
    ) -> None:
        """Add an entry, and clear the cosines since the last one.

        Args:
            world: the worlds.
            parameters: w; shape [worlds, dimensions].
            step: gradient steps or rounds so far.
            labels: labels so far.
            seen: cosines of the batches since the last evaluation; cleared.
            expected: expected ascent direction of a batch, [worlds, dimensions]; None if it has no closed form.
        """
        self.steps.append(step)
        self.labels.append(labels)
        self.objectives.append(world.objective(parameters))
        # NaN and not 0, which would read as a gradient orthogonal to that of J
        unknown = parameters.new_full((world.num_worlds,), float("nan"))
        self.cosines.append(torch.stack(seen).mean(0) if seen else unknown)
        seen.clear()
        ascent = world.gradient_j(parameters)
        self.population_cosines.append(unknown if expected is None else F.cosine_similarity(expected, ascent))
        log_policy = world.log_policy(parameters)
        implicit = world.beta * (log_policy - world.log_reference)
        mean = (log_policy.exp() * implicit).sum(-1, keepdim=True)
        # sqrt(E_x Var_{y ~ pi_theta}[r_theta])
        self.spreads.append((log_policy.exp() * (implicit - mean) ** 2).sum(-1).mean(-1).sqrt())


def online(
    world: TabularWorld,
    arm: AbstractArm,
    seeds: Sequence[int],
    *,
    steps: int = 300,
    pairs: int = 16,
    learning_rate: float = 0.025,
    evaluate_every: int = 15,
    start: Tensor | None = None,
) -> Trace:
    """Online DPO: each step samples and labels a batch with the current policy, and takes one Adam step on its loss.

    The learning rate decays linearly to zero, so that runs converge. Prompts and the random numbers of labels are the
    same for every arm.

    Args:
        world: the worlds, one per seed.
        arm: the sampler.
        seeds: seed of each world.
        steps: gradient steps, >= 1.
        pairs: pairs per step and world.
        learning_rate: initial learning rate of Adam, for rewards with std 1 under the reference; scaled by the std,
            since the parameters scale with the rewards.
        evaluate_every: steps between evaluations.
        start: initial parameters. Default: the reference.
    """
    parameters = (world.origin() if start is None else start).clone()
    # Adam steps have the size of the learning rate, whatever the scale of the gradient: w scales with r*
    rate = learning_rate * float(deviation(world.reward, world.log_reference))
    adam = torch.optim.Adam([parameters], lr=rate)
    streams = Streams(seeds, world.features.shape[1])
    arm.reset(world)
    trace, seen = Trace(), list[Tensor]()
    trace.evaluate(world, arm, parameters, 0, 0, seen)
    for step in range(steps):
        prompts, uniforms = streams.batch(pairs)
        sampled = arm.draw(world, parameters, prompts, streams.samples)
        gaps, labels = labeled(world, prompts, sampled, uniforms)
        arm.learn(gaps, labels)
        # gradient of -log sigma(delta) averaged over pairs: -mean[weight (label - sigma(delta)) dphi], delta = w . dphi
        error = labels - torch.einsum("wpd,wd->wp", gaps, parameters).sigmoid()
        gradient = -torch.einsum("wp,wp,wpd->wd", sampled.weight, error, gaps) / pairs
        seen.append(F.cosine_similarity(-gradient, world.gradient_j(parameters)))
        adam.param_groups[0]["lr"] = rate * (1 - step / steps)
        parameters.grad = gradient
        adam.step()
        if (step + 1) % evaluate_every == 0 or step + 1 == steps:
            trace.evaluate(world, arm, parameters, step + 1, (step + 1) * pairs, seen)
    return trace


def iterative(
    world: TabularWorld,
    arm: AbstractArm,
    seeds: Sequence[int],
    *,
    rounds: int = 8,
    pairs: int = 128,
    first: int = 128,
    ridge: float = 0.1,
) -> Trace:
    """Iterative DPO: each round is sampled with the current policy, then all labels so far are fitted to convergence.

    All arms share a first round of Vanilla pairs, whose labels are not counted.

    Args:
        world: the worlds, one per seed.
        arm: the sampler.
        seeds: seed of each world.
        rounds: rounds after the shared one, >= 1.
        pairs: pairs per round and world.
        first: pairs of the shared first round.
        ridge: precision of the Gaussian prior on the parameters, in labels, > 0; without it, few labels can be
            separable and have no maximum-likelihood fit.
    """
    streams = Streams(seeds, world.features.shape[1])
    arm.reset(world)
    prompts, uniforms = streams.batch(first)
    shared = DistributionArm(vanilla).draw(world, world.origin(), prompts, streams.shared)
    gaps, labels = labeled(world, prompts, shared, uniforms)
    weights = shared.weight
    parameters = maximum_likelihood(gaps, labels, weights, world.origin(), ridge)
    trace, seen = Trace(), list[Tensor]()
    trace.evaluate(world, arm, parameters, 0, 0, seen)
    for index in range(rounds):
        prompts, uniforms = streams.batch(pairs)
        sampled = arm.draw(world, parameters, prompts, streams.samples)
        fresh, fresh_labels = labeled(world, prompts, sampled, uniforms)
        arm.learn(fresh, fresh_labels)
        # ascent direction of the likelihood of the new labels: sum[weight (label - sigma(delta)) dphi]
        error = fresh_labels - torch.einsum("wpd,wd->wp", fresh, parameters).sigmoid()
        ascent = torch.einsum("wp,wp,wpd->wd", sampled.weight, error, fresh)
        seen.append(F.cosine_similarity(ascent, world.gradient_j(parameters)))
        # refit on all labels so far, starting from the current parameters
        gaps, labels = torch.cat([gaps, fresh], 1), torch.cat([labels, fresh_labels], 1)
        weights = torch.cat([weights, sampled.weight], 1)
        parameters = maximum_likelihood(gaps, labels, weights, parameters, ridge)
        trace.evaluate(world, arm, parameters, index + 1, (index + 1) * pairs, seen)
    return trace


def overfitted_start(world: TabularWorld, seeds: Sequence[int], *, pairs: int, ridge: float = 0.003) -> Tensor:
    """Parameters overfitted to a small set of Vanilla pairs with Bernoulli labels; [worlds, dimensions].

    Args:
        world: the worlds, one per seed.
        seeds: seed of each world.
        pairs: pairs of the small set; about as many as dimensions overfit.
        ridge: precision of the prior, in labels; the smaller, the farther the policy is from the reference.
    """
    # another purpose: the random numbers differ from those of the run that starts here
    streams = Streams(seeds, world.features.shape[1], purpose=_OVERFIT)
    prompts, uniforms = streams.batch(pairs)
    sampled = DistributionArm(vanilla).draw(world, world.origin(), prompts, streams.shared)
    gaps, labels = labeled(world, prompts, sampled, uniforms)
    return maximum_likelihood(gaps, labels, sampled.weight, world.origin(), ridge)


def labeled(world: TabularWorld, prompts: Tensor, pairs: Pairs, uniforms: Tensor) -> tuple[Tensor, Tensor]:
    """Feature gaps, [worlds, pairs, dimensions], and Bernoulli labels of the oracle, 1 where the first response wins.

    Args:
        world: the worlds.
        prompts: prompt of each pair; shape [worlds, pairs].
        pairs: the pairs.
        uniforms: random numbers of the labels in [0, 1); shape [worlds, pairs].
    """
    rows = torch.arange(len(prompts))[:, None]
    gaps = world.features[rows, prompts, pairs.first] - world.features[rows, prompts, pairs.second]
    reward = world.reward[rows, prompts, pairs.first] - world.reward[rows, prompts, pairs.second]
    # Bradley-Terry: P(a preferred) = sigma(r*(a) - r*(b))
    return gaps, (uniforms < reward.sigmoid()).to(gaps)


class Streams:
    """Random numbers of many worlds: ``shared`` by all arms for prompts and labels, ``samples`` for one arm's pairs."""

    def __init__(self, seeds: Sequence[int], num_prompts: int, purpose: int = 0) -> None:
        # two generators: arms use different amounts of random numbers for pairs, and must see the same prompts
        self.shared = [Key((seed, _SHARED, purpose)).generator() for seed in seeds]
        self.samples = [Key((seed, _SAMPLES, purpose)).generator() for seed in seeds]
        self._num_prompts = num_prompts

    def batch(self, pairs: int) -> tuple[Tensor, Tensor]:
        """Prompts, int64 [worlds, pairs], and the uniform random numbers of their labels, [worlds, pairs]."""
        # [worlds, 2, pairs]: the first row chooses prompts, floor(u * prompts), the second decides labels
        numbers = torch.stack([torch.rand(2, pairs, generator=g, dtype=torch.float64) for g in self.shared])
        return (numbers[:, 0] * self._num_prompts).long(), numbers[:, 1]


# second element of the key after the seed of a world; the third is the purpose
_SHARED, _SAMPLES = 1, 2
_OVERFIT = 1
