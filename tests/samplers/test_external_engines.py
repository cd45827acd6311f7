"""Samplers on an engine that decodes the policy elsewhere: laws of those that work, and which ones are refused."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from itertools import permutations, product
from typing import Any

import pytest
import torch

from lightning_rlhf.generation import AbstractExternalEngine, DecodeEngine, Decoding, Request
from lightning_rlhf.generation.server_protocols import ServerCompletion
from lightning_rlhf.models.reference import FrozenCopyReference
from lightning_rlhf.randomness import Key
from lightning_rlhf.rewards.base import AbstractReward, RewardOutput
from lightning_rlhf.samplers import (
    AbstractPairSampler,
    BestOfNSampler,
    BestWorstSampler,
    HybridSampler,
    LowCurvatureSampler,
    NashMDSampler,
    PILAFSampler,
    PolicyWeightedSampler,
    RSOSampler,
    SIRPILAFSampler,
    TPILAFSampler,
    VanillaSampler,
    WeightedVanillaSampler,
)
from lightning_rlhf.types import Prompt, Response


class Elsewhere(AbstractExternalEngine):
    """The contract of vLLM and servers: ids of the policy come back, and nothing else."""

    NAME = "the program"

    def complete(self, requests: Sequence[Request]) -> list[ServerCompletion]:
        own = DecodeEngine(
            self.policy, None, self.tokenizer, beta=1.0, decoding=self.decoding, eos_ids=list(self.eos_ids)
        )
        reason = {"eos": "stop", "length": "length"}
        return [ServerCompletion(r.ids, reason[r.finish_reason]) for r in own.generate(requests)]


class FirstToken(AbstractReward):
    """Rewards by the first token."""

    def score(self, prompts: Sequence[Prompt], responses: Sequence[Response]) -> RewardOutput:
        return RewardOutput(torch.tensor([float(response.ids[0]) for response in responses]))


@pytest.fixture
def elsewhere(world: Any, tools: Any) -> Elsewhere:
    """The policy of the world behind the contract, and its reference here."""
    return Elsewhere(
        world.policy,
        FrozenCopyReference(world.reference),
        tools.tokenizer(),
        beta=0.5,
        decoding=Decoding(max_new_tokens=2, rows=4096),
        eos_ids=[4],
    )


def law_of_pools(law: dict[Any, float], weight: Callable[[Any, int, int], float]) -> dict[Any, float]:
    """P(first, second) of pools of three, of which ordered pairs are taken in proportion to a weight."""
    pairs: dict[Any, float] = defaultdict(float)
    for pool in product(law, repeat=3):
        p = law[pool[0]] * law[pool[1]] * law[pool[2]]
        weights = {(i, j): weight(pool, i, j) for i, j in permutations(range(3), 2)}
        for (i, j), w in weights.items():
            pairs[pool[i], pool[j]] += p * w / sum(weights.values())
    return dict(pairs)


def test_sir_pilaf_has_its_law_and_the_log_probabilities_of_both_models(
    world: Any, tools: Any, elsewhere: Elsewhere
) -> None:
    reward = {ids: world.implicit_reward(ids) for ids in world.law()}

    def weight(pool: Any, i: int, j: int) -> float:
        # 1 / sigma'(x) = 2 + 2 cosh x
        return 2 + 2 * math.cosh(reward[pool[i]] - reward[pool[j]])

    pairs = SIRPILAFSampler(n=3).sample(world.prompts(1500), elsewhere, Key((1,)))
    tools.assert_follows(tools.ids_of(pairs), law_of_pools(world.law(), weight))
    for response in (pairs[0].a, pairs[1].b):
        assert response.policy_logps == pytest.approx(world.logps("policy", response.ids), abs=1e-5)
        assert response.reference_logps == pytest.approx(world.logps("reference", response.ids), abs=1e-5)


def test_best_of_n_has_its_law(world: Any, tools: Any, elsewhere: Elsewhere) -> None:
    reward = {ids: round(world.implicit_reward(ids), 5) for ids in world.law()}

    def weight(pool: Any, i: int, j: int) -> float:
        scores = [reward[ids] for ids in pool]
        return float(scores[i] == max(scores) and scores[j] == min(scores))

    pairs = BestOfNSampler(n=3).sample(world.prompts(1500), elsewhere, Key((2,)))
    tools.assert_follows(tools.ids_of(pairs), law_of_pools(world.law(), weight))


@pytest.mark.parametrize(
    "sampler",
    [
        VanillaSampler(),
        WeightedVanillaSampler(),
        LowCurvatureSampler(),
        BestWorstSampler(FirstToken(), n=3),
        SIRPILAFSampler(n=3, reward=FirstToken(), tilt="reward"),
        RSOSampler(FirstToken(), n=4, temperature=1.0, proposal="policy"),
    ],
    ids=lambda sampler: type(sampler).__name__,
)
def test_samplers_of_whole_responses_give_the_pairs_of_the_built_in_engine(
    world: Any, elsewhere: Elsewhere, tools: Any, sampler: AbstractPairSampler
) -> None:
    prompts, key = world.prompts(20), Key((3,))
    assert tools.ids_of(sampler.sample(prompts, elsewhere, key)) == tools.ids_of(
        sampler.sample(prompts, world.engine(), key)
    )


@pytest.mark.parametrize(
    ("sampler", "message"),
    [
        (PILAFSampler(), "mixes policy and reference.*use SIRPILAFSampler"),
        (TPILAFSampler(), "mixes policy and reference.*use SIRPILAFSampler"),
        (NashMDSampler(), "mixes policy and reference.*use SIRPILAFSampler"),
        (HybridSampler(), r"\(mix -1\): use a LoRA policy"),
        (RSOSampler(FirstToken(), n=4, temperature=1.0), r"\(mix -1\): use a LoRA policy"),
        (PolicyWeightedSampler(n=4, dim=8), "differentiates the policy"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, AbstractPairSampler) else "",
)
def test_samplers_that_need_logits_or_gradients_are_refused(
    world: Any, elsewhere: Elsewhere, sampler: AbstractPairSampler, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        sampler.sample(world.prompts(8), elsewhere, Key((4,)))
