"""Judges of the world "menu" whose quality is set: an oracle, degraded until it agrees with itself as often as asked.

A judge perceives ``u(x, y) = r*(x, y) + noise * e(x, y)``. By default ``e`` is another taste: the judge is wrong about
the same dishes each time, as a language model with a wrong idea of the guests would be, and whatever learns from it
learns that too. Nothing is sampled per call: the same question gets the same answer. How wrong it is and how much it
favours a position are given as RLAIF vs. RLHF (arXiv 2309.00267) reports them for real judges:

| labeler | alignment | same position in both orders | favours |
| --- | --- | --- | --- |
| PaLM 2 L | 78.0 % | 18 % | first |
| PaLM 2 S | 73.8 % | 21 % | second |
| PaLM 2 XS | 62.7 % | 56 % | second |
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from itertools import product
from typing import Literal, get_args

import torch
from torch import Tensor

from lightning_rlhf.judging.verdicts import expected_value, preference, spread, to_unit_range
from lightning_rlhf.labelers.base import AbstractLabeler
from lightning_rlhf.models.builtin.menu import DAYS, DISHES, GUESTS, VERSION, WEATHERS, corpus_menus
from lightning_rlhf.randomness import Key
from lightning_rlhf.rewards.base import AbstractReward, RewardOutput, checked_score
from lightning_rlhf.types import Comparison, Label, Prompt, Response
from lightning_rlhf.worlds.menu import MenuReward


Errors = Literal["taste", "response"]
Orders = Literal["both", "one"]
JudgeRule = Literal["soft", "argmax"]

SCORES = tuple(range(1, 11))


def alignment_of(gaps: Tensor, errors: Tensor, noise: float) -> float:
    """Share of pairs that a judge orders as the oracle does; pairs that the oracle ties do not count.

    Args:
        gaps: r*(a) - r*(b) of each pair, [pairs].
        errors: e(a) - e(b) of each pair, [pairs].
        noise: how much of the error the judge perceives, >= 0.
    """
    # share of sign(gap + noise * error) = sign(gap) over pairs with gap != 0
    decided = gaps != 0
    return float((torch.sign(gaps + noise * errors) == torch.sign(gaps))[decided].double().mean())


def noise_for(alignment: float, gaps: Tensor, errors: Tensor) -> float:
    """The noise at which a judge orders a given share of pairs as the oracle does, found by bisection.

    For independent Gaussian gaps and errors of standard deviation s and t the share is 1/2 + atan(s / (noise t)) / pi,
    so that 78, 74 and 63 % ask for errors of 0.83, 1.06 and 2.31 times the gaps.

    Args:
        alignment: share of pairs, in (1/2, 1]; 1 is no noise.
        gaps: r*(a) - r*(b) of each pair, [pairs].
        errors: e(a) - e(b) of each pair, [pairs].

    Raises:
        ValueError: if the alignment is out of range, or such errors do not bring it so low.
    """
    if not 0.5 < alignment <= 1:
        raise ValueError(f"the alignment of a judge must be in (0.5, 1]; got {alignment}")
    if alignment == 1:
        return 0.0
    # bisection with alignment_of(low) > alignment >= alignment_of(high): the share falls with the noise,
    # since the order of a pair changes once at most
    low, high = 0.0, 1e4
    if alignment_of(gaps, errors, high) > alignment:
        raise ValueError(f"these errors agree with the oracle in more than {alignment:.0%} of all pairs")
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if alignment_of(gaps, errors, middle) > alignment else (low, middle)
    # the end of the interval at which the share is at most the one asked for
    return high


def bias_for(same_position: float, logits: Tensor) -> float:
    """The logit for the favored position at which a judge names the same position in both orders of a share of pairs.

    It does where the bias exceeds the perceived difference of the pair.

    Args:
        same_position: share of pairs, in [0, 1).
        logits: logit of P(a preferred) of each pair, without bias, [pairs].

    Raises:
        ValueError: if the share is out of range.
    """
    if not 0 <= same_position < 1:
        raise ValueError(f"same_position must be in [0, 1); got {same_position}")
    # logits of the first position are bias + l and bias - l in the two orders: of equal sign if |l| < |bias|
    return float(logits.abs().quantile(same_position)) if same_position else 0.0


class MenuJudge:
    """The perception of a judge of given quality, in units that are the same for judges of all qualities.

    Noise and bias are calibrated on 4032 pairs of menus of the corpus, nearly the distribution of the reference.

    Args:
        alignment: share of pairs that it orders as the oracle does, in (1/2, 1]; 1 has no errors.
        errors: ``taste`` has wrong tastes, the same for all menus, which a learner takes over; ``response`` errs on
            each answer to each prompt by a number of its own, which a learner averages out in time.
        same_position: share of pairs in whose two orders it names the same position, in [0, 1).
        favours: the position that it then names.
        certainty: standard deviation of the logits of its verdicts over pairs, > 0: at 2 the preferred menu of a pair
            gets 0.77 to 0.79 on average.
        seed: which wrong tastes it has, >= 0.

    Raises:
        ValueError: if an argument is out of range.
    """

    def __init__(
        self,
        alignment: float,
        errors: Errors = "taste",
        same_position: float = 0.0,
        favours: Literal["first", "second"] = "first",
        certainty: float = 2.0,
        seed: int = 0,
    ) -> None:
        if errors not in get_args(Errors) or favours not in ("first", "second"):
            raise ValueError(
                f"errors are 'taste' or 'response', favours 'first' or 'second'; got {errors!r}, {favours!r}"
            )
        if not 0 < certainty < math.inf or seed < 0:
            raise ValueError(f"certainty must be finite and > 0, seed >= 0; got {certainty} and {seed}")
        self.errors: Errors = errors
        self.certainty, self.seed = certainty, seed
        self._oracle, self._wrong = MenuReward(), MenuReward(tastes=seed + 1)
        self._noise, self._mean, self._scale = 0.0, 0.0, 1.0
        prompts, a, b = corpus_pairs()
        # one call for both responses of each pair: [2 * pairs] -> [2, pairs]
        rewards = checked_score(self._oracle, prompts + prompts, a + b).view(2, -1)
        wrong = self._error(prompts + prompts, a + b).view(2, -1)
        self._noise = noise_for(alignment, rewards[0] - rewards[1], wrong[0] - wrong[1])
        # u = r* + noise * e
        perceived = rewards + self._noise * wrong
        # std within prompts: that of the difference of two independent responses, divided by sqrt(2)
        self._mean, self._scale = float(perceived.mean()), float((perceived[0] - perceived[1]).std()) / math.sqrt(2)
        # last, since the logits depend on noise and scale
        bias = bias_for(same_position, self.logits(prompts, a, b))
        self.position_bias = bias if favours == "first" else -bias
        """Logit that the first position gets."""

    def utility(self, prompts: Sequence[Prompt], responses: Sequence[Response]) -> Tensor:
        """Perceived value of each response, of mean 0 over the corpus, deviation 1 within prompts; float64, [B]."""
        perceived = checked_score(self._oracle, prompts, responses)
        if self._noise:
            perceived = perceived + self._noise * self._error(prompts, responses)
        return (perceived - self._mean) / self._scale

    def logits(self, prompts: Sequence[Prompt], a: Sequence[Response], b: Sequence[Response]) -> Tensor:
        """Logit of P(a preferred), without position bias; float64, [B]."""
        # u(a) - u(b) has std sqrt(2) within prompts, so that the logit has std `certainty`
        return self.certainty * (self.utility(prompts, a) - self.utility(prompts, b)) / math.sqrt(2)

    def _error(self, prompts: Sequence[Prompt], responses: Sequence[Response]) -> Tensor:
        if self.errors == "taste":
            return checked_score(self._wrong, prompts, responses)
        # the key is the text of prompt and response: the same answer has the same error in every batch;
        # the 0 separates the two texts
        keys = [
            Key((self.seed, *p.text.encode(), 0, *r.text.encode())) for p, r in zip(prompts, responses, strict=True)
        ]
        return torch.cat([torch.randn(1, generator=key.generator(), dtype=torch.float64) for key in keys])


@cache
def corpus_pairs(repeats: int = 24) -> tuple[list[Prompt], list[Response], list[Response]]:
    """Pairs of menus as the corpus has them, to calibrate judges on; the same at each call.

    Args:
        repeats: pairs for each of the 168 prompts, >= 1.
    """
    words = list(product(range(len(GUESTS)), range(len(DAYS)), range(len(WEATHERS))))
    # token ids of <start>, guest, day and weather; [prompts, 4]
    rows = torch.tensor([[1, 2 + g, 10 + d, 17 + w] for g, d, w in words * repeats])
    prompts = [Prompt(0, (), f"{GUESTS[g]} {DAYS[d]} {WEATHERS[w]}") for g, d, w in words * repeats]
    generator = Key((VERSION, _PAIRS)).generator()
    a, b = (
        [
            Response((0,), " ".join(DISHES[dish] for dish in menu if dish >= 0), "eos")
            for menu in corpus_menus(rows, generator)[0].tolist()
        ]
        for _ in range(2)
    )
    return prompts, a, b


class MenuJudgeLabeler(AbstractLabeler):
    """An AI labeler of known quality for the world "menu"; its answers are functions of seed, pair and order alone.

    With a shown first it gives P(a preferred) = sigmoid(certainty * (u(a) - u(b)) / sd + bias). ``meta`` of a label
    holds ``first_forward`` and ``first_reverse``, P(the first response) in the two orders, as `LLMLabeler` has them.

    Args:
        alignment: share of pairs that it orders as the oracle does, in (1/2, 1], both orders averaged.
        errors: ``taste`` is wrong about the same dishes each time; ``response`` errs on each answer by itself.
        same_position: share of pairs in whose two orders it names the same position, in [0, 1).
        favours: the position that it then names, ``first`` or ``second``.
        certainty: standard deviation of the logits of its verdicts, > 0.
        orders: ``both`` averages over both orders, for the price of two calls; ``one`` shows each pair as it was
            sampled, whose order says nothing.
        rule: ``soft`` keeps the probability, ``argmax`` rounds it to 0 or 1, a tie staying 1/2.
        seed: which wrong tastes it has, >= 0.
    """

    def __init__(
        self,
        alignment: float,
        errors: Errors = "taste",
        same_position: float = 0.0,
        favours: Literal["first", "second"] = "first",
        certainty: float = 2.0,
        orders: Orders = "both",
        rule: JudgeRule = "soft",
        seed: int = 0,
    ) -> None:
        if orders not in get_args(Orders) or rule not in get_args(JudgeRule):
            raise ValueError(f"orders are 'both' or 'one', rule is 'soft' or 'argmax'; got {orders!r} and {rule!r}")
        self.judge = MenuJudge(alignment, errors, same_position, favours, certainty, seed)
        self.orders: Orders = orders
        self.rule: JudgeRule = rule
        self.calls = 2 if orders == "both" else 1

    def label(self, comparisons: Sequence[Comparison], key: Key) -> list[Label]:
        """Judge each comparison; nothing is sampled."""
        del key
        if not comparisons:
            return []
        prompts = [c.prompt for c in comparisons]
        logits = self.judge.logits(prompts, [c.a for c in comparisons], [c.b for c in comparisons])
        zeros = torch.zeros_like(logits)
        # logits of the labels "first" and "second", [pairs, 2]; in both orders the bias is that of the first
        forward = torch.stack([logits + self.judge.position_bias, zeros], -1)
        reverse = torch.stack([-logits + self.judge.position_bias, zeros], -1)
        firsts = [torch.sigmoid(order[:, 0]) for order in (forward, reverse)]
        probabilities = preference(forward, reverse) if self.orders == "both" else firsts[0]
        if self.rule == "argmax":
            # a tie but for rounding is a tie
            probabilities = (torch.sign((probabilities - 0.5).round(decimals=12)) + 1) / 2
        return [
            Label(p, cost=self.calls, meta={"first_forward": f} | ({"first_reverse": r} if self.calls == 2 else {}))
            for p, f, r in zip(probabilities.tolist(), firsts[0].tolist(), firsts[1].tolist(), strict=True)
        ]


class MenuScoreReward(AbstractReward):
    """The expected score from 1 to 10 that a judge of known quality gives, mapped to [-1, 1]: direct-RLAIF.

    The same judge as `MenuJudgeLabeler`. It gives score i with probability proportional to exp(-(i - m)^2 / 2), around
    m = 5.5 + ``points`` * u, with u of mean 0 over the menus of the corpus, and standard deviation 1 within
    prompts. The ends of the scale are hard: anything better than a 10 gets a 10. ``std`` of the output is that of the
    scores, on the scale of the reward.

    Args:
        alignment: share of pairs that it orders as the oracle does, in (1/2, 1].
        errors: ``taste`` is wrong about the same dishes each time; ``response`` errs on each answer by itself.
        points: points of the score per standard deviation of the perceived value, > 0.
        seed: which wrong tastes it has, >= 0.
    """

    def __init__(self, alignment: float, errors: Errors = "taste", points: float = 1.0, seed: int = 0) -> None:
        if not 0 < points < math.inf:
            raise ValueError(f"points must be finite and > 0; got {points}")
        self.judge = MenuJudge(alignment, errors, seed=seed)
        self.points = points

    def score(self, prompts: Sequence[Prompt], responses: Sequence[Response]) -> RewardOutput:
        """Score each menu; float64, [B]."""
        middle = 5.5 + self.points * self.judge.utility(prompts, responses)
        # log P(i) = -(i - m)^2 / 2 + constant; [B, 10]
        logps = -0.5 * (torch.tensor(SCORES, dtype=torch.float64) - middle[:, None]).square()
        # the map to [-1, 1] has the slope 2 / (10 - 1), so that std scales by it
        deviation = spread(logps, SCORES) * 2 / (SCORES[-1] - SCORES[0])
        return RewardOutput(to_unit_range(expected_value(logps, SCORES), SCORES), deviation)


# second part of key paths below the version; `menu` has those before
_PAIRS = 4
