"""PILAF beyond DPO in the tabular world: the identities of docs/pilaf.md by enumeration, and the learners."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from lightning_rlhf.estimators.singles import low_curvature
from lightning_rlhf.estimators.tabular import differences, tilted_distributions
from lightning_rlhf.experiments.tabular import RLHF_ARMS, THUMBS_ARMS, TabularExperiment, TabularSetting, run_setting
from lightning_rlhf.losses import kto_loss, unpaired_bco_loss
from lightning_rlhf.worlds.distributions import t_pilaf, vanilla
from lightning_rlhf.worlds.reward_climb import (
    RLHFArm,
    inverse_curvature,
    model_rewards,
    policy_gradient,
    reward_gradient,
    rloo_gradient,
)
from lightning_rlhf.worlds.tabular import TabularWorld
from lightning_rlhf.worlds.thumbs import (
    ThumbsArm,
    implicit_rewards,
    logits,
    reference_point,
    thumb_probabilities,
)


@pytest.fixture(scope="module")
def world() -> TabularWorld:
    return TabularWorld.draw([0, 1, 2], num_prompts=3, num_responses=6, dim=4, beta=0.5, spread=2.0, misfit=0.5)


@pytest.fixture(scope="module")
def parameters(world: TabularWorld) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(world.num_worlds, world.dim, generator=generator, dtype=torch.float64)


@pytest.fixture(scope="module")
def fitted(world: TabularWorld) -> Tensor:
    """Parameters of a reward model."""
    generator = torch.Generator().manual_seed(2)
    return torch.randn(world.num_worlds, world.dim, generator=generator, dtype=torch.float64)


# -- single responses --------------------------------------------------------------------------------------------------


def test_the_tilt_is_a_mixture_of_the_policy_and_pilafs_distributions(world: TabularWorld, parameters: Tensor) -> None:
    log_policy, c = world.log_policy(parameters), reference_point(world, parameters)[:, None]
    tilted = low_curvature(log_policy, world.log_reference, world.beta, c)
    pilaf = tilted_distributions(log_policy, world.log_reference, world.beta)
    up, down = (pilaf.log_z_plus - c).exp()[..., None], (pilaf.log_z_minus + c).exp()[..., None]
    mixture = 2 * log_policy.exp() + up * pilaf.log_plus.exp() + down * pilaf.log_minus.exp()
    torch.testing.assert_close(tilted.log_probability.exp(), mixture / (2 + up + down))
    torch.testing.assert_close(tilted.log_z.exp(), (2 + up + down)[..., 0])


@pytest.mark.parametrize("arm", THUMBS_ARMS.values())
def test_expected_gradients_agree_with_autograd(world: TabularWorld, parameters: Tensor, arm: ThumbsArm) -> None:
    desirable, beta = thumb_probabilities(world), world.beta
    probability, weight = arm.distribution(world, parameters)
    point = reference_point(world, parameters)[:, None, None]
    leaf = parameters.clone().requires_grad_()
    ratio = world.log_policy(leaf) - world.log_reference
    kto = arm.loss == "kto"
    loss = kto_loss(ratio, desirable, point / beta, beta) if kto else unpaired_bco_loss(ratio, desirable, point, beta)
    (weight[..., None] * probability * loss).sum(-1).mean(-1).sum().backward()
    torch.testing.assert_close(arm.expected_gradient(world, parameters, desirable), leaf.grad)


def mean_z(world: TabularWorld, parameters: Tensor) -> Tensor:
    log_policy, c = world.log_policy(parameters), reference_point(world, parameters)[:, None]
    return low_curvature(log_policy, world.log_reference, world.beta, c).log_z.exp().mean(-1)


def test_tilted_bco_has_the_gradient_of_j_with_linearized_labels(world: TabularWorld, parameters: Tensor) -> None:
    """Also if P(desirable) is shifted for whole prompts: constants have no gradient on the policy."""
    u = logits(world, parameters)
    shift = torch.tensor([0.3, -1.0, 2.0], dtype=torch.float64)[:, None]
    error = world.reward - implicit_rewards(world, parameters) + shift
    linear = u.sigmoid() + u.sigmoid() * (-u).sigmoid() * error
    gradient = ThumbsArm("bco", tilted=True).expected_gradient(world, parameters, linear)
    expected = -(world.beta / mean_z(world, parameters))[:, None] * world.gradient_j(parameters)
    torch.testing.assert_close(gradient, expected)
    # without the tilt the factor sigma'(u) turns it
    plain = -ThumbsArm("bco").expected_gradient(world, parameters, linear)
    assert float(torch.cosine_similarity(plain, world.gradient_j(parameters)).min()) < 0.99


def test_what_linearization_leaves_out_is_of_second_order(world: TabularWorld, parameters: Tensor) -> None:
    def rest(size: float) -> Tensor:
        # r* near r_theta, and the threshold at the reference point
        reward = implicit_rewards(world, parameters) + size * world.reward
        near = replace(world, reward=reward)
        u = logits(world, parameters)
        desirable = (u + size * world.reward).sigmoid()
        gradient = ThumbsArm("bco", tilted=True).expected_gradient(near, parameters, desirable)
        return gradient + (world.beta / mean_z(world, parameters))[:, None] * near.gradient_j(parameters)

    ratio = rest(0.01).norm(dim=-1) / rest(0.005).norm(dim=-1)
    torch.testing.assert_close(ratio, torch.full_like(ratio, 4.0), rtol=0.03, atol=0)


def test_tilted_kto_climbs_the_share_of_thumbs_and_forgets_the_kl(world: TabularWorld, parameters: Tensor) -> None:
    desirable = thumb_probabilities(world)
    leaf = parameters.clone().requires_grad_()
    share = (world.log_policy(leaf).exp() * (2 * desirable - 1)).sum(-1).mean(-1)
    share.sum().backward()
    assert leaf.grad is not None
    gradient = ThumbsArm("kto", tilted=True).expected_gradient(world, parameters, desirable)
    torch.testing.assert_close(gradient, -(world.beta / mean_z(world, parameters))[:, None] * leaf.grad)


@pytest.mark.parametrize("name", ["KTO", "KTO, low curvature", "BCO", "BCO, low curvature"])
def test_thumbs_raise_j_and_all_arms_start_alike(name: str) -> None:
    setting = TabularSetting("thumbs", beta=1.0, spread=2.0, budget=2048, pairs=16)
    world = TabularWorld.draw([0, 1], beta=1.0, spread=2.0)
    _, trace = run_setting(world, name, [0, 1], setting)
    assert (trace.labels[0], trace.labels[-1]) == (0, 2048)
    assert bool((trace.objectives[-1].j > trace.objectives[0].j).all())
    torch.testing.assert_close(trace.objectives[0].j, world.objective(world.origin()).j)
    # the batch gradient follows the expected one
    assert float(torch.stack(trace.cosines[1:]).mean()) > 0.05


# -- reward models -----------------------------------------------------------------------------------------------------


def test_the_tilt_by_the_implicit_reward_is_t_pilaf(world: TabularWorld, parameters: Tensor) -> None:
    log_policy = world.log_policy(parameters)
    found = inverse_curvature(log_policy, implicit_rewards(world, parameters))
    expected = t_pilaf(log_policy, world.log_reference, world.beta)
    torch.testing.assert_close(found.probability, expected.probability)
    torch.testing.assert_close(found.weight, expected.weight)


def test_the_reward_model_descends_along_the_error_of_the_policy_gradient(
    world: TabularWorld, parameters: Tensor, fitted: Tensor
) -> None:
    """With linearized labels: grad L(phi) = -(2 beta / Zbar) (grad J - grad J_phi), whatever policy, r_phi and r*."""
    reward = model_rewards(world, fitted)
    pairs = inverse_curvature(world.log_policy(parameters), reward)
    gap = differences(reward)
    slope = gap.sigmoid() * (-gap).sigmoid()
    linear = gap.sigmoid() + slope * (differences(world.reward) - gap)
    mass = pairs.probability * pairs.weight * (linear - gap.sigmoid())
    gradient = -2 * torch.einsum("wxab,wxad->wd", mass, world.features) / mass.shape[1]
    policy = world.log_policy(parameters).exp()
    z = (policy[..., :, None] * policy[..., None, :] / slope).sum((-1, -2)).mean(-1)
    error = world.gradient_j(parameters) - policy_gradient(world, parameters, fitted)
    torch.testing.assert_close(gradient, -(2 * world.beta / z)[:, None] * error)
    # with real labels it is so to first order, and pairs of the policy are worse aligned
    near = replace(world, reward=reward + 0.03 * world.reward)
    error = near.gradient_j(parameters) - policy_gradient(near, parameters, fitted)
    on_policy = vanilla(policy.log(), policy.log(), 1.0)
    tilted, plain = (
        float(torch.cosine_similarity(-reward_gradient(near, fitted, found), error).min())
        for found in (pairs, on_policy)
    )
    assert tilted > 0.999
    assert plain < 0.99


def test_rloo_is_unbiased(world: TabularWorld, parameters: Tensor, fitted: Tensor) -> None:
    generators = [torch.Generator().manual_seed(seed) for seed in range(3)]
    prompts = torch.arange(3).repeat(3, 4000)
    found = rloo_gradient(world, parameters, fitted, prompts, 4, generators)
    expected = policy_gradient(world, parameters, fitted)
    assert float((found - expected).norm(dim=-1).max() / expected.norm(dim=-1).min()) < 0.1


@pytest.mark.parametrize("name", RLHF_ARMS)
def test_rlhf_raises_j_with_labels(name: str) -> None:
    setting = TabularSetting("rlhf", beta=1.0, spread=2.0, budget=256, pairs=64)
    world = TabularWorld.draw([0, 1], beta=1.0, spread=2.0)
    arm, trace = run_setting(world, name, [0, 1], setting)
    assert isinstance(arm, RLHFArm)
    assert trace.labels == [0, 0, 64, 128, 192, 256]
    assert bool((trace.objectives[-1].j > trace.objectives[0].j).all())
    torch.testing.assert_close(trace.objectives[0].j, world.objective(world.origin()).j)


def test_arms_belong_to_kinds_of_settings() -> None:
    setting = TabularSetting("thumbs", beta=1.0, spread=2.0)
    with pytest.raises(ValueError, match="no arm 'Vanilla' in the tabular world, setting 'x' of kind thumbs"):
        TabularExperiment({"x": setting}, ["Vanilla"])
