"""The sampler and the reward that the examples folder shows to users."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lightning_rlhf.randomness import Key
from lightning_rlhf.rewards.base import checked_score
from lightning_rlhf.types import Prompt, Response


EXAMPLES = Path(__file__).parents[2] / "examples"


def test_the_example_sampler_pairs_the_least_similar(world: Any, load_module: Callable[[Path], Any]) -> None:
    module = load_module(EXAMPLES / "custom_sampler.py")
    prompts, engine, key = world.prompts(40), world.engine(), Key((1,))
    few, many = (module.MySampler(n=n).sample(prompts, engine, key) for n in (2, 6))
    overlaps = [[module.overlap(c.a, c.b) for c in comparisons] for comparisons in (few, many)]
    # the first two of the six candidates are the two
    assert all(wide <= narrow for narrow, wide in zip(*overlaps, strict=True))
    assert sum(overlaps[1]) < 0.5 * sum(overlaps[0])
    assert [c.prompt for c in many] == prompts
    halves = module.MySampler(n=6).sample(prompts[:20], engine, key) + module.MySampler(n=6).sample(
        prompts[20:], engine, key
    )
    assert [(c.a.ids, c.b.ids) for c in halves] == [(c.a.ids, c.b.ids) for c in many]
    with pytest.raises(ValueError, match="n must be at least 2"):
        module.MySampler(n=1)


def test_the_example_reward_likes_short_and_polite_answers(load_module: Callable[[Path], Any]) -> None:
    reward = load_module(EXAMPLES / "custom_reward.py").MyReward(price=0.1)
    texts = ["Thanks, welcome!", "no", "no no no", ""]
    responses = [Response(ids=(4,), text=text, finish_reason="eos") for text in texts]
    scores = checked_score(reward, [Prompt(i, (0,), "") for i in range(4)], responses)
    assert scores.tolist() == pytest.approx([2 - 0.2, -0.1, -0.3, 0.0])
