"""Preference models trained in the loop: pooling, learning, the parts of the epistemic head, and bitwise resume."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_rlhf.logprobs.compute import summed_logps
from lightning_rlhf.logprobs.scores import Pooling, pooled_states
from lightning_rlhf.losses import bradley_terry_loss
from lightning_rlhf.models.load import load_policy
from lightning_rlhf.models.options import ModelOptions
from lightning_rlhf.preference_models import (
    AbstractTrainedModel,
    EpistemicHead,
    EpistemicPreferenceModel,
    EpistemicSize,
    FitSteps,
    ModelStart,
    RewardModelPosterior,
)
from lightning_rlhf.preference_models.training import merged, minibatches, sample_covariance
from lightning_rlhf.randomness import Key
from lightning_rlhf.types import Comparison, Label, Preference, Prompt, Response, free_tie


SMALL = EpistemicSize(members=8, hidden=16, prior_hidden=16, prior_scale=5.0)


def response(generator: torch.Generator) -> Response:
    length = int(torch.randint(1, 6, (1,), generator=generator))
    ids = tuple(torch.randint(4, 40, (length,), generator=generator).tolist())
    return Response(ids, str(ids), "length")


def reward(made: Response) -> float:
    """High token ids are liked: linear in a count over tokens."""
    return 3.0 * sum(token >= 22 for token in made.ids) - 1.5 * len(made.ids)


def preferences(count: int, seed: int = 0) -> list[Preference]:
    generator = torch.Generator().manual_seed(seed)
    found = []
    for index in range(count):
        a, b = response(generator), response(generator)
        label = Label(float(torch.tensor(reward(a) - reward(b)).sigmoid()))
        found.append(Preference(Comparison(Prompt(index, (1, 7, index % 5 + 4), "prompt"), a, b), label))
    return found


def start(policy: Path, **options: Any) -> ModelStart:
    generator = torch.Generator().manual_seed(99)
    samples = [(Prompt(i, (1, 7, 5), "prompt"), response(generator)) for i in range(40)]
    return ModelStart(str(policy), ModelOptions(**options), torch.device("cpu"), samples, Key((3, 1)))


def ready(model: AbstractTrainedModel, policy: Path, **options: Any) -> AbstractTrainedModel:
    model.setup(start(policy, **options))
    return model


def gaps(model: AbstractTrainedModel, pairs: Sequence[Preference]) -> tuple[Tensor, Tensor]:
    prompts, responses = [], []
    for pair in pairs:
        prompts += [pair.comparison.prompt] * 2
        responses += [pair.comparison.a, pair.comparison.b]
    first = torch.arange(0, len(responses), 2)
    return model.posterior(prompts, responses).gap(first, first + 1)


def models() -> list[AbstractTrainedModel]:
    few = FitSteps(steps=4, batch_size=8, trunk_learning_rate=1e-3)
    return [
        EpistemicPreferenceModel("sum", size=SMALL, fitting=few),
        EpistemicPreferenceModel("middle", train_trunk=True, size=SMALL, fitting=few),
        RewardModelPosterior("mean", members=3, train_trunk=False, fitting=few),
        RewardModelPosterior("last", sft_weight=0.3, fitting=few),
    ]


every_model = pytest.mark.parametrize("number", range(4))


@pytest.mark.parametrize("pooling", ["last", "mean", "sum", "middle"])
def test_pooling_is_over_the_tokens_of_the_response(tiny_policy: Path, pooling: Pooling) -> None:
    trunk = load_policy(str(tiny_policy)).base_model.eval()
    groups = [((5, 9, 7), ((4, 8), (3, 3, 6, 0))), ((11, 2), ((7,),))]
    expected = []
    for prompt, responses in groups:
        for ids in responses:
            out = trunk(input_ids=torch.tensor([[*prompt, *ids]]), output_hidden_states=True)
            states = out.hidden_states[1 if pooling == "middle" else 2][0, len(prompt) :]
            expected.append({"last": states[-1], "mean": states.mean(0)}.get(pooling, states.sum(0)))
    found = pooled_states(trunk, groups, pooling)
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-4, atol=1e-5)
    assert found.requires_grad
    torch.testing.assert_close(pooled_states(trunk, groups, pooling, layout="padded", tokens_per_batch=8), found)
    assert pooled_states(trunk, [], pooling).shape == (0, 16)


@pytest.mark.parametrize(
    "model",
    [
        EpistemicPreferenceModel("sum", size=SMALL, fitting=FitSteps(steps=150, learning_rate=3e-3)),
        RewardModelPosterior("sum", members=2, train_trunk=False, fitting=FitSteps(steps=150, learning_rate=3e-2)),
    ],
    ids=lambda model: type(model).__name__,
)
def test_models_learn_a_reward_that_is_linear_in_their_features(tiny_policy: Path, model: AbstractTrainedModel) -> None:
    trunk = load_policy(str(tiny_policy)).base_model.eval()
    weights = torch.randn(16, generator=torch.Generator().manual_seed(5))

    def true_gaps(pairs: Sequence[Preference]) -> Tensor:
        groups = [(p.comparison.prompt.ids, (p.comparison.a.ids, p.comparison.b.ids)) for p in pairs]
        with torch.no_grad():
            rewards = (pooled_states(trunk, groups, "sum") @ weights).view(-1, 2).double()
        return (rewards[:, 0] - rewards[:, 1]) / 4

    seen, fresh = preferences(240), preferences(200, seed=1)
    labeled = [
        Preference(p.comparison, Label(float(gap.sigmoid()))) for p, gap in zip(seen, true_gaps(seen), strict=True)
    ]
    ready(model, tiny_policy)
    # free ties say nothing: a fit leaves them out
    model.fit([*labeled, Preference(seen[0].comparison, free_tie())])
    mean, variance = gaps(model, fresh)
    truth = true_gaps(fresh)
    assert truth.std() > 1
    assert float(torch.corrcoef(torch.stack([mean, truth]))[0, 1]) > 0.9
    assert ((mean > 0) == (truth > 0)).double().mean() > 0.85
    assert mean.dtype == variance.dtype == torch.float64
    assert (variance > 0).any()


def test_priors_stay_and_samples_train_neither_point_head_nor_trunk() -> None:
    torch.manual_seed(0)
    head = EpistemicHead(5, SMALL)
    features, label = torch.randn(12, 2, 5, requires_grad=True), torch.rand(12)
    head.losses(features, label).sum().backward()
    assert all(parameter.grad is None for parameter in head.prior.parameters())
    assert all(weight.grad.abs().sum() > 0 for weight in head.differential.weights)
    # the gradient of the features, and of the point head, is that of the point head's own loss
    other, alone = copy.deepcopy(head), features.detach().clone().requires_grad_()
    other.zero_grad()
    rewards = other.point(alone.flatten(0, 1))[0, :, 0].view(-1, 2)
    bradley_terry_loss(rewards[:, 0], rewards[:, 1], label).sum().backward()
    torch.testing.assert_close(features.grad, alone.grad)
    for ours, theirs in zip(head.point.parameters(), other.point.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)
    # a member is an MLP of its own: the same as by hand
    point, samples = head(alone.flatten(0, 1))
    for z in (0, 7):
        added = torch.zeros(24)
        for part, scale in ((head.prior, 5.0), (head.differential, 1.0)):
            hidden = alone.flatten(0, 1)
            for i, (weight, bias) in enumerate(zip(part.weights, part.biases, strict=True)):
                hidden = (hidden.relu() if i else hidden) @ weight[z] + bias[z]
            added = added + scale * hidden[:, 0]
        torch.testing.assert_close(samples[z], point + added)


def test_samples_agree_where_the_labels_are_and_differ_elsewhere() -> None:
    torch.manual_seed(1)
    head = EpistemicHead(4, SMALL)
    # labels say something about the first two features only
    seen = torch.randn(300, 2, 4) * torch.tensor([1.0, 1.0, 0.0, 0.0])
    unseen = torch.randn(300, 2, 4) * torch.tensor([0.0, 0.0, 1.0, 1.0])
    gap = 2 * (seen[:, 0, 0] - seen[:, 1, 0])

    def variance(features: Tensor) -> float:
        with torch.no_grad():
            samples = head(features.flatten(0, 1))[1].view(8, -1, 2)
        return float((samples[..., 0] - samples[..., 1]).var(0).mean())

    before = variance(seen), variance(unseen)
    prior = [parameter.clone() for parameter in head.prior.parameters()]
    optimizer = torch.optim.AdamW([p for p in head.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(150):
        optimizer.zero_grad()
        head.losses(seen, gap.sigmoid()).mean().backward()
        optimizer.step()
    assert variance(seen) < 0.2 * before[0]
    assert variance(unseen) > 2 * variance(seen)
    assert all(torch.equal(old, new) for old, new in zip(prior, head.prior.parameters(), strict=True))


@every_model
def test_a_restored_model_continues_bitwise(tiny_policy: Path, number: int, tmp_path: Path) -> None:
    pairs = preferences(40)
    model = ready(models()[number], tiny_policy)
    model.fit(pairs[:20])
    torch.save(model.state_dict(), tmp_path / "state.pt")
    # a state does not change with later fits
    kept = model.state_dict()
    model.fit(pairs)
    assert all(torch.equal(kept["head"][n], t) for n, t in torch.load(tmp_path / "state.pt")["head"].items())
    # rounds are sampled in inference mode
    state = torch.load(tmp_path / "state.pt")
    with torch.inference_mode():
        restored = ready(models()[number], tiny_policy)
        restored.load_state_dict(state)
        restored.fit(pairs)
        continued = gaps(restored, pairs)
    straight = gaps(model, pairs)
    assert torch.equal(straight[0], continued[0])
    assert torch.equal(straight[1], continued[1])
    # the number of fits matters: it names the random numbers
    assert model.state_dict()["fits"] == 2
    assert model.state_dict().get("trunk") is None or model.train_trunk


@every_model
def test_a_fit_lowers_the_loss_and_rewards_have_a_covariance(tiny_policy: Path, number: int) -> None:
    pairs = preferences(16)
    model = ready(models()[number], tiny_policy)
    with pytest.raises(RuntimeError, match="needs a fit"):
        gaps(model, pairs)
    labels = torch.tensor([pair.probability for pair in pairs], dtype=torch.float64)
    losses = []
    for _ in range(8):
        model.fit(pairs)
        mean, variance = gaps(model, pairs)
        losses.append(float(bradley_terry_loss(mean, torch.zeros_like(mean), labels).mean()))
    assert losses[-1] < losses[0]
    single = isinstance(model, RewardModelPosterior) and model.members == 1
    assert (variance == 0).all() if single else (variance > 0).all()


def test_sft_keeps_the_trunk_a_language_model(tiny_policy: Path) -> None:
    pairs = preferences(16)
    groups = [
        (p.comparison.prompt.ids, ((p.comparison.a if p.probability >= 0.5 else p.comparison.b).ids,)) for p in pairs
    ]
    logps = []
    for weight in (0.0, 1.0):
        model = RewardModelPosterior(sft_weight=weight, fitting=FitSteps(steps=20, trunk_learning_rate=1e-3))
        ready(model, tiny_policy)
        model.fit(pairs)
        with torch.no_grad():
            logps.append(float(summed_logps(model._policy, groups).mean()))
    assert logps[1] > logps[0] + 0.5


def test_minibatches_pass_over_all_pairs_before_they_repeat() -> None:
    batches = minibatches(10, FitSteps(steps=5, batch_size=4), Key((1,)))
    assert [len(batch) for batch in batches] == [4] * 5
    order = torch.cat(batches).tolist()
    assert sorted(order[:10]) == sorted(order[10:20]) == list(range(10))
    assert order[:10] != order[10:20]
    assert [len(batch) for batch in minibatches(3, FitSteps(steps=2, batch_size=4), Key((1,)))] == [3, 3]


def test_covariance_and_groups() -> None:
    samples = torch.randn(5, 3, dtype=torch.float64)
    torch.testing.assert_close(sample_covariance(samples), samples.T.cov())
    assert (sample_covariance(samples[:1]) == 0).all()
    assert merged([((1,), ((2,),)), ((1,), ((3,),)), ((4,), ((2,),))]) == [((1,), ((2,), (3,))), ((4,), ((2,),))]


def test_wrong_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="pooling must be one of last, mean, sum, middle; got 'max'"):
        EpistemicPreferenceModel("max")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="set train_trunk=true, or sft_weight=0"):
        RewardModelPosterior(train_trunk=False, sft_weight=0.1)
    with pytest.raises(ValueError, match="members must be >= 1"):
        RewardModelPosterior(members=0)
    with pytest.raises(ValueError, match=r"size\.members must be >= 2"):
        EpistemicSize(members=1)
    with pytest.raises(ValueError, match=r"fitting\.steps"):
        FitSteps(steps=0)
    with pytest.raises(RuntimeError, match="call setup first"):
        RewardModelPosterior().fit(preferences(1))
