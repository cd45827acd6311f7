"""Best and worst of n at several temperatures: the pairs of online iterative RLHF (RLHF Workflow)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor

from lightning_rlhf.estimators.ranking import mean_win_probability
from lightning_rlhf.generation.base import AbstractEngine
from lightning_rlhf.labelers.base import AbstractLabeler
from lightning_rlhf.randomness import Key, Stream
from lightning_rlhf.rewards.base import AbstractReward, checked_score
from lightning_rlhf.runtime.plugins import check_plugin, returned
from lightning_rlhf.samplers.base import AbstractPairSampler
from lightning_rlhf.samplers.best_of_n import TIE, extremes
from lightning_rlhf.samplers.draws import COIN, pool_requests, repeated
from lightning_rlhf.types import Comparison, Label, LabelStatus, Prompt, Response


COST, FAULT, STATUS = "label_cost", "label_fault", "label_status"
"""Entries of a comparison's ``meta``: the price of the verdicts behind a ranking, and why it gives no label."""


@dataclass(frozen=True)
class Ranking:
    """How good the candidates of a prompt are.

    Args:
        values: reward or mean probability to win of each candidate; [n].
        cost: price of the verdicts.
        faults: reasons why verdicts are missing, without repeats.
    """

    values: Tensor
    cost: float
    faults: tuple[str, ...] = ()


class BestWorstSampler(AbstractPairSampler):
    """Pairs the best of n policy samples (first) with the worst (second), which are its label: RLHF Workflow.

    Dong et al. 2024 (arXiv 2405.07863, section 3.2): n responses, half of them at one temperature and half at another,
    ranked by a reward model. A response a has the score ``r(x, a) - length_penalty * |a|``, with its length in
    characters; the best is preferred for certain. The labeler of the run is not asked. A pair whose scores are equal,
    within 1e-4, gets no label (status ``tie``), and is not trained on.

    With ``labeler`` in place of ``reward`` a pairwise preference model ranks: r(x, a) is the mean probability of
    winning against the other candidates (`mean_win_probability`). It is asked about all n (n - 1) / 2 pairs, once each:
    `LLMLabeler` averages both orders itself. Candidates with equal text share 1/2 without being asked about.

    ``meta`` of a comparison holds ``score_a`` and ``score_b``, the scores, and ``reward_a`` and ``reward_b``, these
    without the penalty.

    Args:
        reward: ranks the candidates; a label costs n / 2, since n responses were scored where a labeler sees two.
        labeler: ranks the candidates in place of a reward; a label costs as much as its verdicts together. It is asked
            on every rank while responses are sampled, so that people and servers cannot be it.
        n: candidates per prompt, >= 2; the paper uses 8.
        temperatures: candidate i is sampled at ``temperatures[i % len(temperatures)]``; each > 0.
        length_penalty: score per character of a response, >= 0; the paper uses 0.001 for its concise model.

    Raises:
        ValueError: if there is not exactly one of reward and labeler, or a setting is out of range.
    """

    first_distribution, second_distribution = "best of π_θ by reward", "worst of π_θ by reward"

    def __init__(
        self,
        reward: AbstractReward | None = None,
        labeler: AbstractLabeler | None = None,
        n: int = 8,
        temperatures: Sequence[float] = (1.0, 0.7),
        length_penalty: float = 0.0,
    ) -> None:
        if (reward is None) == (labeler is None):
            raise ValueError("BestWorstSampler ranks by a reward or by a labeler; set one of reward and labeler")
        if reward is not None:
            check_plugin("BestWorstSampler.reward", reward, AbstractReward)
        if labeler is not None:
            check_plugin("BestWorstSampler.labeler", labeler, AbstractLabeler)
            if labeler.whole_rounds:
                raise ValueError(
                    f"BestWorstSampler.labeler ranks candidates while they are sampled, and {type(labeler).__name__} "
                    f"labels whole rounds: use LLMLabeler, or BestOfNSampler with {type(labeler).__name__} as "
                    f"data.labeler"
                )
        if n < 2:
            raise ValueError(f"n must be at least 2, since a pair needs two candidates; got {n}")
        # `not >`: refuses NaN too
        if not temperatures or not all(0 < temperature < math.inf for temperature in temperatures):
            raise ValueError(f"BestWorstSampler.temperatures must be one or more numbers > 0; got {list(temperatures)}")
        if not 0 <= length_penalty < math.inf:
            raise ValueError(f"BestWorstSampler.length_penalty must be >= 0; got {length_penalty}")
        self.reward, self.labeler = reward, labeler
        self.n, self.temperatures, self.length_penalty = n, tuple(temperatures), length_penalty
        self.passes_per_pair = float(n)
        # a labeler sees every pair of candidates
        self.annotations_per_pair = float(n if reward is not None else n * (n - 1))
        self.method = f"Best and worst of {n} (Dong 2024)"

    def sample(self, prompts: Sequence[Prompt], engine: AbstractEngine, key: Key) -> list[Comparison]:
        """Sample n candidates per prompt in one batch, rank them, and keep two; branch ``"best_worst"``."""
        pool = engine.generate(pool_requests(prompts, self.n, key, temperatures=self.temperatures))
        comparisons = []
        for i, (prompt, ranking) in enumerate(zip(prompts, self._rankings(prompts, pool, key), strict=True)):
            candidates = pool[i * self.n : (i + 1) * self.n]
            # r(x, a) - lambda |a|
            lengths = torch.tensor([len(candidate.text) for candidate in candidates], dtype=torch.float64)
            scores = ranking.values - self.length_penalty * lengths
            # a candidate without any verdict is neither the best nor the worst
            judged = scores.isfinite().nonzero()[:, 0]
            meta: dict[str, float | str] = {COST: ranking.cost}
            if len(judged) < 2:
                meta |= {STATUS: "invalid", FAULT: f"the candidates have no verdicts ({'; '.join(ranking.faults)})"}
                best, worst = 0, 1
            else:
                best, worst = judged[list(extremes(scores[judged], key.fold(prompt.index, COIN)))].tolist()
                for side, place in (("a", best), ("b", worst)):
                    meta |= {f"score_{side}": scores[place].item(), f"reward_{side}": ranking.values[place].item()}
                if abs(scores[best] - scores[worst]) <= TIE:
                    meta |= {STATUS: "tie", FAULT: "the best and the worst candidate have equal scores"}
            a, b = candidates[best], candidates[worst]
            comparisons.append(Comparison(prompt, a, b, branch="best_worst", passes=self.passes_per_pair, meta=meta))
        return comparisons

    def verdicts(self, comparisons: Sequence[Comparison]) -> list[Label | None]:
        """The best is preferred; no label for equal scores."""
        labels: list[Label | None] = []
        for comparison in comparisons:
            meta, cost = comparison.meta, comparison.meta[COST]
            status: LabelStatus | None = meta.get(STATUS)
            if status is None:
                rewards = {name: meta[name] for name in ("reward_a", "reward_b")}
                labels.append(Label(1.0, cost=cost, meta=rewards))
            else:
                labels.append(Label(None, status, cost=cost, meta={"fault": meta[FAULT]}))
        return labels

    def _rankings(self, prompts: Sequence[Prompt], pool: Sequence[Response], key: Key) -> list[Ranking]:
        """One ranking per prompt; candidates are listed prompt by prompt."""
        if self.reward is not None:
            values = checked_score(self.reward, repeated(prompts, self.n), pool)
            # [prompts * n] -> [prompts, n]
            return [Ranking(row, cost=self.n / 2) for row in values.reshape(len(prompts), self.n)]
        assert self.labeler is not None
        # places of the pairs of each prompt whose texts differ, since the labeler is not asked about equal ones
        asked: list[tuple[int, int, int]] = []
        comparisons = []
        for i, prompt in enumerate(prompts):
            for a, b in combinations(range(self.n), 2):
                pair = Comparison(prompt, pool[i * self.n + a], pool[i * self.n + b])
                if not pair.has_equal_responses:
                    asked.append((i, a, b))
                    comparisons.append(pair)
        made = self.labeler.label(comparisons, key.fold(Stream.LABELING)) if comparisons else []
        labels = returned(self.labeler, "label", made, len(comparisons), Label, "comparisons")
        # equal texts keep 1/2
        wins = torch.full((len(prompts), self.n, self.n), 0.5, dtype=torch.float64)
        costs = [0.0] * len(prompts)
        faults: list[set[str]] = [set() for _ in prompts]
        for (i, a, b), label in zip(asked, labels, strict=True):
            probability = math.nan if label.probability is None else label.probability
            wins[i, a, b], wins[i, b, a] = probability, 1.0 - probability
            costs[i] += label.cost
            if label.probability is None:
                faults[i].add(str(label.meta.get("fault", label.status)))
        means = mean_win_probability(wins)
        return [Ranking(*row) for row in zip(means, costs, map(tuple, map(sorted, faults)), strict=True)]
