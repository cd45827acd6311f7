"""Table 1 of PILAF."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lightning_rlhf.generation.base import AbstractEngine
from lightning_rlhf.randomness import Key
from lightning_rlhf.rewards.base import AbstractReward, RewardOutput
from lightning_rlhf.samplers import (
    AbstractPairSampler,
    BestOfNSampler,
    HybridSampler,
    OfflineSampler,
    PILAFSampler,
    VanillaSampler,
    cost_table,
)
from lightning_rlhf.types import Comparison, Prompt, Response


class Zero(AbstractReward):
    def score(self, prompts: Sequence[Prompt], responses: Sequence[Response]) -> RewardOutput:
        return RewardOutput(torch.zeros(len(responses)))


def test_the_table_is_the_papers() -> None:
    samplers = [VanillaSampler(), BestOfNSampler(reward=Zero()), BestOfNSampler(), HybridSampler(), PILAFSampler()]
    table, footnote = cost_table(samplers).split("\n\n")
    assert table == (
        "| method | y^a | y^b | sampling | annotation |\n"
        "|---|---|---|---|---|\n"
        "| Vanilla (Rafailov 2023) | π_θ | π_θ | 2 | 2 |\n"
        "| Best-of-N (Xiong 2024), N=8, oracle reward | best of π_θ | worst of π_θ | 8 | 8* |\n"
        "| Best-of-N with DPO reward, N=8 | best of π_θ | worst of π_θ | 8 | 2 |\n"
        "| Hybrid (Xie 2024) | π_θ | π_ref | 2 | 2 |\n"
        "| PILAF | π_θ^+ / π_θ | π_θ^− / π_θ | 3 | 2 |"
    )
    assert footnote.startswith("\\*: ")


def test_costs_follow_the_options() -> None:
    row = cost_table([BestOfNSampler(n=4)]).splitlines()[-1]
    assert row == "| Best-of-N with DPO reward, N=4 | best of π_θ | worst of π_θ | 4 | 2 |"
    assert cost_table([OfflineSampler()]).splitlines()[-1] == "| Offline (recorded pairs) | data | data | 0 | 2 |"


def test_a_sampler_of_a_users_own_has_a_row() -> None:
    class HerSampler(AbstractPairSampler):
        passes_per_pair = 2.5

        def sample(self, prompts: Sequence[Prompt], engine: AbstractEngine, key: Key) -> list[Comparison]:
            return []

    assert cost_table([HerSampler()]).splitlines()[-1] == "| HerSampler | — | — | 2.5 | 2 |"
