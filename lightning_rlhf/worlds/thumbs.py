"""Online KTO and BCO in tabular worlds: single responses with a thumb up or down, and exact J.

The oracle gives a thumb up with probability ``p* = sigma(r* - t)``, where the threshold t is the mean of r* over the
reference, so that half of the thumbs are up at first. The reference point c of the losses is exact: ``beta KL``, the
mean implicit reward over the policy. It and the tilt carry no gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_rlhf.estimators.singles import low_curvature
from lightning_rlhf.worlds.arms import categorical
from lightning_rlhf.worlds.learning import Streams, Trace
from lightning_rlhf.worlds.tabular import TabularWorld, deviation


UnpairedLoss: TypeAlias = Literal["kto", "bco"]


@dataclass(frozen=True)
class ThumbsArm:
    """A loss of single responses, and the distribution that they are sampled from.

    Args:
        loss: ``kto`` or ``bco``.
        tilted: sample from the policy tilted towards low curvature, with the weight ``Z(x)`` of its normalizer, instead
            of the policy.
        passes: model forward passes per token position and response; the cost of the pool that a language model would
            resample from.
    """

    loss: UnpairedLoss = "kto"
    tilted: bool = False
    passes: float = 1.0
    annotations: float = 1.0

    def distribution(self, world: TabularWorld, parameters: Tensor) -> tuple[Tensor, Tensor]:
        """Probability of every response, [worlds, prompts, responses], and weight of prompts, [worlds, prompts]."""
        log_policy = world.log_policy(parameters)
        if not self.tilted:
            return log_policy.exp(), torch.ones_like(log_policy[..., 0])
        point = reference_point(world, parameters)[:, None]
        tilted = low_curvature(log_policy, world.log_reference, world.beta, point)
        # w(x) = Z(x) / mean Z
        z = (tilted.log_z - tilted.log_z.amax(-1, keepdim=True)).exp()
        return tilted.log_probability.exp(), z / z.mean(-1, keepdim=True)

    def slopes(self, logit: Tensor, desirable: Tensor) -> Tensor:
        """Derivative of the loss in the logit u.

        Args:
            logit: u of each response; any shape.
            desirable: P(desirable), or the thumb as 0 or 1; same shape.
        """
        if self.loss == "kto":
            # d/du [p (1 - sigma(u)) + (1 - p) sigma(u)] = sigma'(u) (1 - 2 p)
            return logit.sigmoid() * (-logit).sigmoid() * (1 - 2 * desirable)
        # d/du [-p log sigma(u) - (1 - p) log sigma(-u)] = sigma(u) - p
        return logit.sigmoid() - desirable

    def expected_gradient(self, world: TabularWorld, parameters: Tensor, desirable: Tensor) -> Tensor:
        """Gradient in w of the population loss, with expected thumbs; [worlds, dimensions].

        Args:
            world: the worlds.
            parameters: w; shape [worlds, dimensions].
            desirable: P(desirable) of every response; shape [worlds, prompts, responses].
        """
        probability, weight = self.distribution(world, parameters)
        slope = self.slopes(logits(world, parameters), desirable)
        # E_x E_q[w l'(u) grad u], grad u = grad r_theta = phi - E_pi[phi]
        mass = probability * weight[..., None] * slope
        return torch.einsum("wxy,wxyd->wd", mass, centered_features(world, parameters)) / mass.shape[1]


def implicit_rewards(world: TabularWorld, parameters: Tensor) -> Tensor:
    """``r_theta = beta log(pi_theta / pi_ref)`` of every response, nats; [worlds, prompts, responses]."""
    return world.beta * (world.log_policy(parameters) - world.log_reference)


def reference_point(world: TabularWorld, parameters: Tensor) -> Tensor:
    """``c = E_x E_pi[r_theta] = beta KL(pi_theta || pi_ref)``, nats; [worlds]."""
    return world.beta * world.objective(parameters).kl


def logits(world: TabularWorld, parameters: Tensor) -> Tensor:
    """``u = r_theta - c`` of every response, nats; [worlds, prompts, responses]."""
    return implicit_rewards(world, parameters) - reference_point(world, parameters)[:, None, None]


def centered_features(world: TabularWorld, parameters: Tensor) -> Tensor:
    """``phi - E_pi[phi]``, the gradient of r_theta in w; [worlds, prompts, responses, dimensions]."""
    policy = world.log_policy(parameters).exp()
    return world.features - torch.einsum("wxy,wxyd->wxd", policy, world.features)[:, :, None]


def thumb_probabilities(world: TabularWorld) -> Tensor:
    """P(desirable) of every response by the oracle; [worlds, prompts, responses]."""
    reference = world.log_reference.exp()
    threshold = (reference * world.reward).sum(-1).mean(-1)
    return (world.reward - threshold[:, None, None]).sigmoid()


def online_thumbs(
    world: TabularWorld,
    arm: ThumbsArm,
    seeds: Sequence[int],
    *,
    steps: int = 300,
    responses: int = 16,
    learning_rate: float = 0.025,
    evaluate_every: int = 15,
) -> Trace:
    """Online KTO or BCO: each step samples single responses, gets a thumb for each, and takes one Adam step.

    The learning rate decays linearly to zero. Prompts and the random numbers of thumbs are the same for every arm.

    Args:
        world: the worlds, one per seed.
        arm: loss and distribution of responses.
        seeds: seed of each world.
        steps: gradient steps, >= 1.
        responses: responses per step and world.
        learning_rate: initial learning rate of Adam, for rewards with std 1 under the reference.
        evaluate_every: steps between evaluations.
    """
    parameters = world.origin().clone()
    rate = learning_rate * float(deviation(world.reward, world.log_reference))
    adam = torch.optim.Adam([parameters], lr=rate)
    streams, desirable = Streams(seeds, world.features.shape[1]), thumb_probabilities(world)
    rows = torch.arange(world.num_worlds)[:, None]
    trace, seen = Trace(), list[Tensor]()
    trace.record(world, parameters, 0, 0, seen, -arm.expected_gradient(world, parameters, desirable))
    for step in range(steps):
        prompts, uniforms = streams.batch(responses)
        probability, weight = arm.distribution(world, parameters)
        sampled = categorical(probability, prompts, 1, streams.samples).squeeze(-1)
        thumbs = (uniforms < desirable[rows, prompts, sampled]).to(uniforms)
        slope = weight[rows, prompts] * arm.slopes(logits(world, parameters)[rows, prompts, sampled], thumbs)
        # mean over responses of w l'(u) grad u
        features = centered_features(world, parameters)[rows, prompts, sampled]
        gradient = torch.einsum("wp,wpd->wd", slope, features) / responses
        seen.append(F.cosine_similarity(-gradient, world.gradient_j(parameters)))
        adam.param_groups[0]["lr"] = rate * (1 - step / steps)
        parameters.grad = gradient
        adam.step()
        if (step + 1) % evaluate_every == 0 or step + 1 == steps:
            ascent = -arm.expected_gradient(world, parameters, desirable)
            trace.record(world, parameters, step + 1, (step + 1) * responses, seen, ascent)
    return trace
