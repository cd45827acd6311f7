"""The kernel model: its kernel by explicit features, and what its posterior learns from labels."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from jsonargparse import ArgumentParser
from torch import Tensor

from lightning_rlhf.models.options import ModelOptions
from lightning_rlhf.preference_models import AbstractPreferenceModel, KernelPreferenceModel, KernelScales, ModelStart
from lightning_rlhf.preference_models.kernel import Contrasts, Features, kernel_grams, prior_covariance
from lightning_rlhf.randomness import Key
from lightning_rlhf.types import Comparison, Label, Preference, Prompt, Response, free_tie


LIKED, DISLIKED = 70, 80
KERNELS = 7


def random_features(count: int, width: int, seed: int) -> Features:
    generator = torch.Generator().manual_seed(seed)

    def normal(size: int) -> Tensor:
        return torch.randn(count, size, generator=generator, dtype=torch.float64)

    return Features(normal(width), normal(width), normal(width), normal(width), normal(1), normal(2))


def explicit(features: Features) -> list[Tensor]:
    """The feature map of each kernel, written out."""
    x, e = features.prompt, features.tokens
    return [
        e,
        torch.einsum("ni,nj->nij", x, e).flatten(1),
        torch.einsum("ni,nj->nij", e, e).flatten(1) / 2,
        features.hidden,
        features.middle,
        features.length,
        features.surface,
    ]


def test_grams_are_products_of_explicit_features_and_their_differences() -> None:
    first = random_features(4, 3, 0)
    # both responses of a pair have the same prompt
    second = replace(random_features(4, 3, 1), prompt=first.prompt)
    pool = random_features(5, 3, 2)
    pairs, rewards = Contrasts(first, second), Contrasts(pool)
    gaps = [a - b for a, b in zip(explicit(first), explicit(second), strict=True)]
    own, cross, prior = (
        dict(kernel_grams(*sides, [True] * KERNELS)) for sides in ((pairs, pairs), (rewards, pairs), (rewards, rewards))
    )
    for kernel, (gap, single) in enumerate(zip(gaps, explicit(pool), strict=True)):
        torch.testing.assert_close(own[kernel], gap @ gap.T)
        torch.testing.assert_close(cross[kernel], single @ gap.T)
        torch.testing.assert_close(prior[kernel], single @ single.T)


def test_prior_covariance_is_the_sum_of_kernels_with_their_variances() -> None:
    pool = random_features(3, 2, 0)
    variances = torch.tensor([0.5, 0.0, 2.0, 0.0, 0.0, 3.0, 0.0], dtype=torch.float64)
    features = explicit(pool)
    expected = sum(variance * one @ one.T for variance, one in zip(variances, features, strict=True))
    torch.testing.assert_close(prior_covariance(Contrasts(pool), Contrasts(pool), variances), expected)
    assert dict(kernel_grams(Contrasts(pool), Contrasts(pool), (variances > 0).tolist())).keys() == {0, 2, 5}


# ---- a model on a tiny policy ------------------------------------------------------------------------------------


def responses(count: int, seed: int) -> list[tuple[Prompt, Response]]:
    """Responses of three to six tokens out of twelve, with log-probabilities."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for number in range(count):
        size = int(torch.randint(3, 7, (1,), generator=generator))
        ids = tuple((LIKED + torch.randint(0, 12, (size,), generator=generator)).tolist())
        prompt = Prompt(number % 4, (10 + number % 4, 20), "")
        made.append((prompt, Response((*ids, 0), str(ids), "eos", reference_logps=(-1.0,) * (size + 1))))
    return made


def oracle(response: Response) -> float:
    return 3.0 * (response.ids.count(LIKED) - response.ids.count(DISLIKED))


def preferences(count: int, seed: int = 1) -> list[Preference]:
    """Soft labels of an oracle that likes one token and dislikes another."""
    made = []
    for (prompt, a), (_, b) in zip(responses(count, seed), responses(count, seed + 100), strict=True):
        probability = torch.tensor(oracle(a) - oracle(b), dtype=torch.float64).sigmoid().item()
        made.append(Preference(Comparison(prompt, a, b), Label(probability)))
    return made


@pytest.fixture(scope="module")
def start(tiny_policy: Path) -> ModelStart:
    return ModelStart(str(tiny_policy), ModelOptions(), torch.device("cpu"), responses(128, 7), Key((0,)))


def ready(start: ModelStart, model: KernelPreferenceModel | None = None) -> KernelPreferenceModel:
    model = model or KernelPreferenceModel()
    model.setup(start)
    return model


def test_posterior_orders_new_responses_and_is_surer_with_more_labels(start: ModelStart) -> None:
    model = ready(start)
    fresh = responses(60, 50)
    prompts, pool = [prompt for prompt, _ in fresh], [response for _, response in fresh]
    truth = torch.tensor([oracle(response) for response in pool], dtype=torch.float64)
    first, second = torch.arange(0, 56), torch.arange(4, 60)
    variances = []
    for count in (0, 20, 200):
        model.fit(preferences(count))
        mean, variance = model.posterior(prompts, pool).gap(first, second)
        variances.append(float(variance.mean()))
    assert variances[0] > 1.2 * variances[1] > 1.44 * variances[2]
    gap = truth[first] - truth[second]
    assert float((mean.sign() == gap.sign())[gap != 0].double().mean()) > 0.9
    # a mean that is shrunk, as the prior has it, and not noise
    assert float(torch.corrcoef(torch.stack([mean, gap]))[0, 1]) > 0.9


def test_posterior_is_a_function_of_the_preferences_alone(start: ModelStart) -> None:
    model, other = ready(start), ready(start)
    labeled = preferences(70)
    for count in (10, 40, 70):
        model.fit(labeled[:count])
        model.posterior(*map(list, zip(*responses(5, count), strict=True)))
    other.fit(labeled)
    prompts, pool = map(list, zip(*responses(6, 9), strict=True))
    one, two = model.posterior(prompts, pool), other.posterior(prompts, pool)
    assert torch.equal(one.mean, two.mean)
    assert torch.equal(one.covariance, two.covariance)
    assert model.state_dict() == {}


def test_order_of_a_pair_and_free_ties_do_not_matter(start: ModelStart) -> None:
    model = ready(start)
    labeled = preferences(30)
    prompts, pool = map(list, zip(*responses(6, 9), strict=True))
    model.fit(labeled)
    expected = model.posterior(prompts, pool)
    swapped = [Preference(p.comparison.swap(), Label(1 - p.probability)) for p in labeled]
    same = labeled[0].comparison
    model.fit([*swapped, Preference(replace(same, b=same.a), free_tie())])
    found = model.posterior(prompts, pool)
    torch.testing.assert_close(found.mean, expected.mean)
    torch.testing.assert_close(found.covariance, expected.covariance)


def test_only_the_latest_labels_are_used_where_there_are_too_many(start: ModelStart) -> None:
    short, long = ready(start, KernelPreferenceModel(most_labels=20)), ready(start)
    labeled = preferences(50)
    short.fit(labeled)
    long.fit(labeled[-20:])
    prompts, pool = map(list, zip(*responses(6, 9), strict=True))
    torch.testing.assert_close(short.posterior(prompts, pool).mean, long.posterior(prompts, pool).mean)


def test_gaps_without_the_own_label_are_found_by_position(start: ModelStart) -> None:
    short, long = ready(start, KernelPreferenceModel(most_labels=20)), ready(start)
    labeled = preferences(30)
    every = long.held_out_gaps(labeled, range(30))
    known, _ = long.pair_gaps([preference.comparison for preference in labeled])
    # the own label pulls the prediction towards itself
    label = torch.tensor([preference.probability for preference in labeled], dtype=torch.float64)
    assert bool(((label - every.sigmoid()) * (known - every) > 0).all())
    torch.testing.assert_close(long.held_out_gaps(labeled, [3, 17, 29]), every[[3, 17, 29]])
    # of labels that the fit does not use, the posterior itself
    found = short.held_out_gaps(labeled, [2, 12])
    torch.testing.assert_close(found[:1], short.pair_gaps([labeled[2].comparison])[0])
    torch.testing.assert_close(found[1:], short.held_out_gaps(labeled[10:], [2]))


def test_evidence_changes_scales_from_its_number_of_labels_on(start: ModelStart) -> None:
    scales = KernelScales(prompt=0, pair=0, hidden=0)
    model = ready(start, KernelPreferenceModel(scales=scales, evidence_labels=60))
    model.fit(preferences(59))
    assert torch.equal(model.variances[:-1], scales.variances()[:-1])
    model.fit(preferences(120))
    # the weights of this oracle are above those that the prior expects
    assert model.variances[0] > scales.variances()[0]
    assert model.variances[1] == 0
    model.fit(preferences(59))
    assert torch.equal(model.variances[:-1], scales.variances()[:-1])


def test_surface_features_learn_repetition(start: ModelStart) -> None:
    scales = KernelScales(linear=0, prompt=0, pair=0, hidden=0, length=0)
    model = ready(start, KernelPreferenceModel(scales=scales, surface=True))
    labeled = []
    for preference in preferences(80):
        repeats = [len(r.ids) - len(set(r.ids)) for r in (preference.comparison.a, preference.comparison.b)]
        label = Label(0.5 if repeats[0] == repeats[1] else float(repeats[0] < repeats[1]))
        labeled.append(Preference(preference.comparison, label))
    model.fit(labeled)
    same, other = (Response((70, 70, 70, 71, 0), "", "eos", reference_logps=(-1.0,) * 5) for _ in range(2))
    other = replace(other, ids=(70, 72, 73, 71, 0))
    mean = model.posterior([Prompt(0, (10,), "")] * 2, [same, other]).mean
    assert float(mean[1] - mean[0]) > 1.0
    with pytest.raises(ValueError, match="reference_logps=True"):
        model.posterior([Prompt(0, (10,), "")], [replace(same, reference_logps=None)])


def test_use_before_setup_or_fit_is_an_error(start: ModelStart) -> None:
    with pytest.raises(RuntimeError, match="setup"):
        KernelPreferenceModel().fit(preferences(1))
    with pytest.raises(RuntimeError, match="fit"):
        ready(start).posterior([], [])
    with pytest.raises(ValueError, match="2 samples"):
        ready(replace(start, samples=start.samples[:1]))


def test_bad_settings_are_refused() -> None:
    with pytest.raises(ValueError, match=r"scales\.pair"):
        KernelScales(pair=float("nan"))
    with pytest.raises(ValueError, match="all 0"):
        KernelScales(*[0.0] * KERNELS)
    with pytest.raises(ValueError, match="evidence_labels"):
        KernelPreferenceModel(evidence_labels=0)
    with pytest.raises(ValueError, match="most_labels"):
        KernelPreferenceModel(most_labels=0)


def test_it_has_a_short_name_in_configs() -> None:
    parser = ArgumentParser()
    parser.add_argument("--model", type=AbstractPreferenceModel)
    found = parser.parse_args(["--model=KernelPreferenceModel", "--model.scales.pair=2"])
    model = parser.instantiate(found).model
    assert isinstance(model, KernelPreferenceModel)
    assert model.scales == KernelScales(pair=2.0)


def test_features_of_another_checkpoint_than_the_policy(start: ModelStart, tiny_judge: Path) -> None:
    """The policy is never opened, and texts in place of ids tell responses apart."""
    named = [(prompt, replace(response, text=f"answer {oracle(response)}")) for prompt, response in start.samples]
    model = KernelPreferenceModel(trunk=str(tiny_judge))
    model.setup(replace(start, checkpoint="no such policy", samples=named))
    labels = []
    for number, preference in enumerate(preferences(40)):
        pair = replace(preference.comparison, a=named[number][1], b=named[number + 1][1])
        labels.append(replace(preference, comparison=pair))
    model.fit(labels)
    pool = [Response((LIKED, 0), "answer 3.0", "eos"), Response((DISLIKED, 0), "answer 3.0", "eos")]
    same = model.posterior([named[0][0]] * 2, pool).mean
    torch.testing.assert_close(same[0], same[1])
    other = model.posterior([named[0][0]] * 2, [pool[0], replace(pool[1], text="a longer answer")]).mean
    assert abs(float(other[0] - other[1])) > 1e-3


def test_a_trunk_that_does_not_exist_is_named(start: ModelStart) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere/trunk"):
        KernelPreferenceModel(trunk="nowhere/trunk").setup(start)
