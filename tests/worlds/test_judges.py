"""Judges of the world "menu": as good and as biased as asked, and free of the bias where both orders are averaged."""

from __future__ import annotations

import math

import pytest
import torch

from lightning_rlhf.randomness import Key
from lightning_rlhf.types import Comparison, Prompt, Response
from lightning_rlhf.worlds import MenuJudgeLabeler, MenuReward, MenuScoreReward
from lightning_rlhf.worlds.judges import MenuJudge, alignment_of, bias_for, corpus_pairs, noise_for


PAPER = [(0.780, 0.18, "first"), (0.738, 0.21, "second"), (0.627, 0.56, "second")]


def gaussians(seed: int, count: int = 400_000) -> torch.Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def comparisons(count: int = 4032) -> list[Comparison]:
    return [Comparison(p, a, b) for p, a, b in list(zip(*corpus_pairs(), strict=True))[:count]]


@pytest.mark.parametrize(("alignment", "ratio"), [(0.78, 0.827), (0.74, 1.065), (0.63, 2.311)])
def test_noise_of_gaussian_pairs_has_a_closed_form(alignment: float, ratio: float) -> None:
    """P(sign(D + n E) = sign(D)) = 1/2 + atan(s / (n t)) / pi for Gaussian D and E of deviations s and t."""
    gaps, errors = 1.7 * gaussians(0), 0.5 * gaussians(1)
    expected = 1.7 / (0.5 * math.tan(math.pi * (alignment - 0.5)))
    assert expected == pytest.approx(ratio * 1.7 / 0.5, rel=1e-3)
    found = noise_for(alignment, gaps, errors)
    assert found == pytest.approx(expected, rel=0.02)
    assert alignment_of(gaps, errors, found) == pytest.approx(alignment, abs=1e-5)


def test_bias_of_gaussian_pairs_has_a_closed_form() -> None:
    """Both orders name one position where |logit| < bias: 2 Phi(bias / s) - 1 of Gaussian pairs."""
    bias = bias_for(0.18, 3.0 * gaussians(2))
    assert math.erf(bias / 3.0 / math.sqrt(2)) == pytest.approx(0.18, abs=2e-3)
    assert bias_for(0.0, gaussians(2)) == 0.0


def test_what_cannot_be_is_refused() -> None:
    gaps = gaussians(0, 1000)
    with pytest.raises(ValueError, match=r"\(0.5, 1\]"):
        noise_for(0.4, gaps, gaussians(1, 1000))
    with pytest.raises(ValueError, match="more than 60%"):
        # errors that point where the gaps do
        noise_for(0.6, gaps, gaps)
    with pytest.raises(ValueError, match="same_position"):
        bias_for(1.0, gaps)
    with pytest.raises(ValueError, match="'taste' or 'response'"):
        MenuJudge(0.8, errors="mood")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="'both' or 'one'"):
        MenuJudgeLabeler(0.8, orders="none")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="points"):
        MenuScoreReward(0.8, points=0)


@pytest.mark.parametrize(
    ("alignment", "same", "favours", "errors"), [*((*figures, "taste") for figures in PAPER), (*PAPER[1], "response")]
)
def test_judges_are_as_good_and_as_biased_as_asked(alignment: float, same: float, favours: str, errors: str) -> None:
    labeler = MenuJudgeLabeler(alignment, errors, same, favours, seed=5)  # type: ignore[arg-type]
    shown = comparisons()
    labels = labeler.label(shown, Key((0,)))
    oracle = MenuReward()
    prompts = [c.prompt for c in shown]
    gaps = oracle.score(prompts, [c.a for c in shown]).mean - oracle.score(prompts, [c.b for c in shown]).mean
    averaged = torch.tensor([label.probability for label in labels], dtype=torch.float64)
    decided = gaps != 0
    agrees = torch.sign(averaged - 0.5) == torch.sign(gaps)
    assert float(agrees[decided].double().mean()) == pytest.approx(alignment, abs=2e-3)
    # the figure of the paper: the same position in both orders
    first = torch.tensor([[x.meta["first_forward"], x.meta["first_reverse"]] for x in labels]) > 0.5
    both = first[:, 0] == first[:, 1]
    assert float(both.double().mean()) == pytest.approx(same, abs=5e-3)
    assert bool((first[both, 0] == (favours == "first")).all())
    assert {label.cost for label in labels} == {2}
    # judges of all qualities are equally decided
    logits = labeler.judge.logits(prompts, [c.a for c in shown], [c.b for c in shown])
    assert float(logits.std()) == pytest.approx(2.0, rel=1e-6)


def test_averaging_over_both_orders_takes_the_bias_out() -> None:
    shown = comparisons(200)
    plain = MenuJudgeLabeler(0.78, seed=1).label(shown, Key((0,)))
    biased = MenuJudgeLabeler(0.78, same_position=0.56, seed=1)
    labels = biased.label(shown, Key((0,)))
    bias = biased.judge.position_bias
    for fair, label in zip(plain, labels, strict=True):
        assert fair.probability is not None
        assert label.probability is not None
        logit = math.log(fair.probability / (1 - fair.probability))
        sigmoids = [1 / (1 + math.exp(-(logit + b))) for b in (bias, -bias)]
        assert label.probability == pytest.approx(sum(sigmoids) / 2)
        # less sure, never of another opinion
        assert abs(label.probability - 0.5) <= abs(fair.probability - 0.5) + 1e-12
        assert (label.probability - 0.5) * (fair.probability - 0.5) >= 0
    # whichever comes first: P(a, b) + P(b, a) = 1
    turned = biased.label([c.swap() for c in shown], Key((0,)))
    assert [x.probability for x in turned] == pytest.approx([1 - (x.probability or 0) for x in labels])
    # in one order the bias stays, and the price is one call
    single = MenuJudgeLabeler(0.78, same_position=0.56, orders="one", seed=1).label(shown, Key((0,)))
    assert [x.probability for x in single] == [x.meta["first_forward"] for x in labels]
    assert {x.cost for x in single} == {1}
    assert "first_reverse" not in single[0].meta


def test_hard_labels_are_rounded_soft_ones_and_a_tie_stays_one() -> None:
    shown = comparisons(100)
    soft = MenuJudgeLabeler(0.7, same_position=0.2, seed=2).label(shown, Key((0,)))
    hard = MenuJudgeLabeler(0.7, same_position=0.2, rule="argmax", seed=2).label(shown, Key((0,)))
    for one, other in zip(soft, hard, strict=True):
        if one.probability == pytest.approx(0.5, abs=1e-9):
            assert other.probability == 0.5
        else:
            assert other.probability == float((one.probability or 0) > 0.5)
    same = Comparison(shown[0].prompt, shown[0].a, shown[0].a)
    assert MenuJudgeLabeler(0.7, same_position=0.2, rule="argmax").label([same], Key((0,)))[0].probability == 0.5
    assert MenuJudgeLabeler(0.7).label([], Key((0,))) == []


def test_errors_are_the_same_each_time_and_differ_by_seed() -> None:
    shown = comparisons(50)
    for errors in ("taste", "response"):
        first, again, other = (
            [x.probability for x in MenuJudgeLabeler(0.7, errors, seed=s).label(shown, Key((k,)))]  # type: ignore[arg-type]
            for s, k in ((1, 0), (1, 9), (2, 0))
        )
        assert first == again
        assert first != other
    # by half of a batch as by the whole: nothing depends on what else is asked
    labeler = MenuJudgeLabeler(0.7, "response")
    halves = labeler.label(shown[:20], Key((0,))) + labeler.label(shown[20:], Key((0,)))
    whole = labeler.label(shown, Key((0,)))
    assert [x.probability for x in halves] == pytest.approx([x.probability for x in whole], rel=1e-12)


def test_wrong_tastes_add_up_over_dishes_and_errors_without_a_system_do_not() -> None:
    prompt = Prompt(0, (), "ann monday sun")
    menus = [Response((0,), text, "eos") for text in ("soup", "rice", "soup rice", "")]
    for errors, adds_up in (("taste", True), ("response", False)):
        judge = MenuJudge(0.63, errors, seed=3)  # type: ignore[arg-type]
        soup, rice, both, none = judge.utility([prompt] * 4, menus).tolist()
        assert (soup + rice == pytest.approx(both + none)) is adds_up


def test_score_is_the_expected_score_of_what_the_judge_perceives() -> None:
    prompts, a, _ = corpus_pairs(2)
    reward = MenuScoreReward(0.78, seed=1)
    output = reward.score(prompts, a)
    assert output.std is not None
    utility = reward.judge.utility(prompts, a)
    order = utility.argsort()
    assert bool((output.mean[order].diff() > -1e-12).all())
    # in the middle of the scale the expected score is 5.5 + u
    middle = utility.abs() < 1
    assert bool(((output.mean * 9 + 11) / 2 - (5.5 + utility))[middle].abs().max() < 0.02)
    assert float(output.mean.abs().max()) < 1
    # beyond a ten there is nothing
    high = MenuScoreReward(0.78, points=100.0, seed=1).score(prompts, a).mean
    assert float(high.max()) == pytest.approx(1.0)
    # the judge of scores is the judge of pairs
    labels = MenuJudgeLabeler(0.78, seed=1).label([Comparison(prompts[0], a[0], a[1])], Key((0,)))
    assert ((labels[0].probability or 0) > 0.5) == bool(reward.score([prompts[0]] * 2, a[:2]).mean.diff() < 0)


def test_perfect_judge_perceives_the_oracle() -> None:
    prompts, a, b = corpus_pairs(2)
    oracle, judge = MenuReward(), MenuJudge(1.0, seed=4)
    gaps = oracle.score(prompts, a).mean - oracle.score(prompts, b).mean
    logits = judge.logits(prompts, a, b)
    torch.testing.assert_close(logits / logits.std(), gaps / gaps.std())
