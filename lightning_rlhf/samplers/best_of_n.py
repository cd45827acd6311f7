"""Best-of-N sampling: the best and the worst of n policy samples."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_rlhf.generation.base import AbstractEngine
from lightning_rlhf.randomness import Key
from lightning_rlhf.rewards.base import AbstractReward, checked_score
from lightning_rlhf.runtime.plugins import check_plugin
from lightning_rlhf.samplers.base import AbstractPairSampler
from lightning_rlhf.samplers.draws import COIN, implicit_rewards, pool_requests, repeated
from lightning_rlhf.types import Comparison, Label, Prompt, Response


TIE = 1e-4
"""Scores that differ by less than this count as equal: at theta = ref all implicit rewards are, up to rounding."""


class BestOfNSampler(AbstractPairSampler):
    """Samples n responses from the policy and pairs the best (first) with the worst (second).

    Best-of-N of Table 1 of PILAF (arXiv 2502.04270), after Xiong et al. 2024 (arXiv 2312.11456). Candidates are ranked
    by the implicit DPO reward ``beta * sum(log pi_theta - log pi_ref)``, the variant that the paper compares, or by
    an oracle reward. The implicit reward is a sum over tokens, so that extremes favor long responses. Candidates that
    all tie, as they do while the policy equals the reference, are paired at random. Costs are counted as in the paper,
    without the scoring of the candidates by the reference.

    With an oracle reward its scores are the label, as in the paper: the best is preferred, two of equal score are a
    tie, and ``data.labeler`` is not asked about the pair. Such a label costs n/2, since n responses were shown to the
    annotator where an ordinary label shows two.

    Args:
        n: candidates per prompt, >= 2; the paper uses 8.
        reward: the oracle that ranks the candidates instead of the implicit reward, and labels the pair; every
            candidate costs one annotation.

    Raises:
        ValueError: if n is smaller than 2.
    """

    first_distribution, second_distribution = "best of π_θ", "worst of π_θ"

    def __init__(self, n: int = 8, reward: AbstractReward | None = None) -> None:
        if n < 2:
            raise ValueError(f"n must be at least 2, since a pair needs two candidates; got {n}")
        if reward is not None:
            check_plugin("BestOfNSampler.reward", reward, AbstractReward)
        self.n = n
        self.reward = reward
        self.passes_per_pair = float(n)
        self.annotations_per_pair = 2.0 if reward is None else float(n)
        self.method = (
            f"Best-of-N with DPO reward, N={n}" if reward is None else f"Best-of-N (Xiong 2024), N={n}, oracle reward"
        )

    def sample(self, prompts: Sequence[Prompt], engine: AbstractEngine, key: Key) -> list[Comparison]:
        """Sample n candidates per prompt in one batch and keep two of them; branch ``"best_of_n"``.

        ``meta`` holds the two scores, and their difference as ``"delta"`` if they are implicit rewards.
        """
        # log pi_ref is needed for the implicit reward only; an oracle reward saves that forward pass
        candidates = engine.generate(pool_requests(prompts, self.n, key), reference_logps=self.reward is None)
        scores = self._scores(prompts, candidates, engine.beta)
        comparisons = []
        for i, prompt in enumerate(prompts):
            # y^a = argmax score, y^b = argmin score over the n candidates
            best, worst = extremes(scores[i], key.fold(prompt.index, COIN))
            score_a, score_b = float(scores[i, best]), float(scores[i, worst])
            meta = {"score_a": score_a, "score_b": score_b}
            if self.reward is None:
                meta["delta"] = score_a - score_b
            a, b = candidates[i * self.n + best], candidates[i * self.n + worst]
            comparisons.append(Comparison(prompt, a, b, branch="best_of_n", passes=self.passes_per_pair, meta=meta))
        return comparisons

    def verdicts(self, comparisons: Sequence[Comparison]) -> list[Label | None]:
        """Labels by the oracle reward, where there is one; its scores came with the samples."""
        if self.reward is None:
            return super().verdicts(comparisons)
        labels: list[Label | None] = []
        for comparison in comparisons:
            score_a, score_b = comparison.meta["score_a"], comparison.meta["score_b"]
            # a may score slightly lower than b: `extremes` orders scores within TIE at random
            probability = 0.5 if score_a == score_b else float(score_a > score_b)
            scores = {"reward_a": score_a, "reward_b": score_b}
            labels.append(Label(probability, cost=self.n / 2, meta=scores))
        return labels

    def _scores(self, prompts: Sequence[Prompt], candidates: Sequence[Response], beta: float) -> Tensor:
        """Score of each candidate; shape [prompts, n]."""
        if self.reward is None:
            scores = implicit_rewards(candidates, beta)
        else:
            scores = checked_score(self.reward, repeated(prompts, self.n), candidates)
        # [prompts * n] -> [prompts, n]: `pool_requests` lists the candidates prompt by prompt
        return scores.reshape(len(prompts), self.n)


def extremes(scores: Tensor, key: Key) -> tuple[int, int]:
    """Positions of the highest and the lowest score, ties broken at random; always two different positions.

    Args:
        scores: score of each candidate; shape [n], n >= 2.
        key: source of the random numbers that break ties.
    """
    # shuffle first: every tie that is broken by position below is then broken at random
    order = torch.randperm(len(scores), generator=key.generator())
    shuffled = scores[order]
    best, worst = shuffled.max(), shuffled.min()
    if best - worst <= TIE:
        return int(order[0]), int(order[1])
    # first match in the shuffled order: rounding must not decide between scores that count as equal
    first = (shuffled >= best - TIE).nonzero()[0]
    second = (shuffled <= worst + TIE).nonzero()[0]
    if first == second:  # max - min is between TIE and 2 TIE, and one score is within TIE of both
        return int(order[shuffled.argmax()]), int(order[shuffled.argmin()])
    return int(order[first]), int(order[second])
