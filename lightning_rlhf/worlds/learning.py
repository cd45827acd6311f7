"""Learners of tabular worlds: online DPO by gradient steps, iterative DPO by maximum likelihood, both with exact J."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_rlhf.randomness import Key
from lightning_rlhf.worlds.arms import AbstractArm, LawArm, Pairs
from lightning_rlhf.worlds.laws import vanilla
from lightning_rlhf.worlds.likelihood import maximum_likelihood
from lightning_rlhf.worlds.tabular import Objective, TabularWorld, deviation


Setting = Literal["online", "iterative", "overfitted"]


@dataclass
class Trace:
    """What a run left, one entry per evaluation; tensors are [worlds].

    Args:
        steps: gradient steps or rounds taken.
        labels: labels bought, the shared start left out.
        objectives: reward, KL and J.
        cosines: cosine of minus the batch gradient with the exact gradient of J, mean over the batches since the last
            evaluation; NaN at the start.
        population_cosines: the same for the expected gradient; NaN where the pair law has no closed form.
        spreads: standard deviation of the implicit reward over the policy's own responses.
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
        """Add an entry, and forget the cosines seen since the last one."""
        self.steps.append(step)
        self.labels.append(labels)
        self.objectives.append(world.objective(parameters))
        unknown = parameters.new_full((world.num_worlds,), float("nan"))
        self.cosines.append(torch.stack(seen).mean(0) if seen else unknown)
        seen.clear()
        law = arm.pair_law(world, parameters)
        expected = None if law is None else -world.expected_gradient(parameters, law)
        ascent = world.gradient_j(parameters)
        self.population_cosines.append(unknown if expected is None else F.cosine_similarity(expected, ascent))
        log_policy = world.log_policy(parameters)
        implicit = world.beta * (log_policy - world.log_reference)
        mean = (log_policy.exp() * implicit).sum(-1, keepdim=True)
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
    """Online DPO: each step draws and labels a batch with the current policy, and takes one Adam step on its loss.

    The learning rate falls linearly to zero, so that runs end near a fixed point instead of circling it. Prompts and
    the random numbers of labels are the same for every arm.

    Args:
        world: the worlds, one per seed.
        arm: who draws.
        seeds: name the random numbers of each world.
        steps: gradient steps, >= 1.
        pairs: pairs per step and world.
        learning_rate: that of Adam at the start, for rewards whose standard deviation under the reference is 1; larger
            rewards need larger parameters, and get them at the same pace.
        evaluate_every: steps between evaluations.
        start: parameters to start from; the reference when not given.
    """
    parameters = (world.origin() if start is None else start).clone()
    rate = learning_rate * float(deviation(world.reward, world.log_reference))
    adam = torch.optim.Adam([parameters], lr=rate)
    streams = _Streams(seeds, world.features.shape[1])
    arm.reset(world)
    trace, seen = Trace(), list[Tensor]()
    trace.evaluate(world, arm, parameters, 0, 0, seen)
    for step in range(steps):
        prompts, uniforms = streams.batch(pairs)
        drawn = arm.draw(world, parameters, prompts, streams.draws)
        gaps, labels = labelled(world, prompts, drawn, uniforms)
        arm.learn(gaps, labels)
        error = labels - torch.einsum("wpd,wd->wp", gaps, parameters).sigmoid()
        gradient = -torch.einsum("wp,wp,wpd->wd", drawn.weight, error, gaps) / pairs
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
    """Iterative DPO: each round is drawn with the policy before it, and all labels so far are fitted to convergence.

    All arms share a first round of Vanilla pairs, whose labels are not counted.

    Args:
        world: the worlds, one per seed.
        arm: who draws.
        seeds: name the random numbers of each world.
        rounds: rounds of the arm's own, >= 1.
        pairs: pairs per round and world.
        first: pairs of the shared first round.
        ridge: precision of the Gaussian prior on the parameters, in labels, > 0: few labels can be separable.
    """
    streams = _Streams(seeds, world.features.shape[1])
    arm.reset(world)
    prompts, uniforms = streams.batch(first)
    shared = LawArm(vanilla).draw(world, world.origin(), prompts, streams.shared)
    gaps, labels = labelled(world, prompts, shared, uniforms)
    weights = shared.weight
    parameters = maximum_likelihood(gaps, labels, weights, world.origin(), ridge)
    trace, seen = Trace(), list[Tensor]()
    trace.evaluate(world, arm, parameters, 0, 0, seen)
    for index in range(rounds):
        prompts, uniforms = streams.batch(pairs)
        drawn = arm.draw(world, parameters, prompts, streams.draws)
        fresh, fresh_labels = labelled(world, prompts, drawn, uniforms)
        arm.learn(fresh, fresh_labels)
        error = fresh_labels - torch.einsum("wpd,wd->wp", fresh, parameters).sigmoid()
        ascent = torch.einsum("wp,wp,wpd->wd", drawn.weight, error, fresh)
        seen.append(F.cosine_similarity(ascent, world.gradient_j(parameters)))
        gaps, labels = torch.cat([gaps, fresh], 1), torch.cat([labels, fresh_labels], 1)
        weights = torch.cat([weights, drawn.weight], 1)
        parameters = maximum_likelihood(gaps, labels, weights, parameters, ridge)
        trace.evaluate(world, arm, parameters, index + 1, (index + 1) * pairs, seen)
    return trace


def overfitted_start(world: TabularWorld, seeds: Sequence[int], *, pairs: int, ridge: float = 0.003) -> Tensor:
    """Parameters fitted far too well to a small Vanilla set with drawn labels; [worlds, dimensions].

    Args:
        world: the worlds, one per seed.
        seeds: name the random numbers of each world.
        pairs: pairs of the small set; about as many as dimensions overfit.
        ridge: precision of the prior, in labels; the smaller, the farther the policy ends.
    """
    streams = _Streams(seeds, world.features.shape[1], purpose=_OVERFIT)
    prompts, uniforms = streams.batch(pairs)
    drawn = LawArm(vanilla).draw(world, world.origin(), prompts, streams.shared)
    gaps, labels = labelled(world, prompts, drawn, uniforms)
    return maximum_likelihood(gaps, labels, drawn.weight, world.origin(), ridge)


def labelled(world: TabularWorld, prompts: Tensor, pairs: Pairs, uniforms: Tensor) -> tuple[Tensor, Tensor]:
    """Feature gaps, [worlds, pairs, dimensions], and the oracle's Bernoulli labels, 1 where the first one won.

    Args:
        world: the worlds.
        prompts: prompt of each pair; shape [worlds, pairs].
        pairs: the pairs.
        uniforms: the oracle's random numbers; shape [worlds, pairs].
    """
    rows = torch.arange(len(prompts))[:, None]
    gaps = world.features[rows, prompts, pairs.first] - world.features[rows, prompts, pairs.second]
    reward = world.reward[rows, prompts, pairs.first] - world.reward[rows, prompts, pairs.second]
    return gaps, (uniforms < reward.sigmoid()).to(gaps)


class _Streams:
    """Random numbers of many worlds: prompts and labels are common to all arms, draws belong to one arm's run."""

    def __init__(self, seeds: Sequence[int], num_prompts: int, purpose: int = 0) -> None:
        self.shared = [Key((seed, _SHARED, purpose)).generator() for seed in seeds]
        self.draws = [Key((seed, _DRAWS, purpose)).generator() for seed in seeds]
        self._num_prompts = num_prompts

    def batch(self, pairs: int) -> tuple[Tensor, Tensor]:
        """Prompts, int64 [worlds, pairs], and the uniform numbers of their labels, likewise."""
        numbers = torch.stack([torch.rand(2, pairs, generator=g, dtype=torch.float64) for g in self.shared])
        return (numbers[:, 0] * self._num_prompts).long(), numbers[:, 1]


# second part of key paths below the seed of a world
_SHARED, _DRAWS = 1, 2
_OVERFIT = 1
