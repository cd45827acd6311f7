"""A judge's score as reward, on a random tiny model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lightning_rlhf.judging.prompts import Sample
from lightning_rlhf.rewards import LLMScoreReward
from lightning_rlhf.types import Prompt, Response


PROMPTS = [Prompt(i, (1,), f"Question {i}?") for i in range(3)]
RESPONSES = [Response((1,), text, "eos") for text in ("Yes.", "No, never.", "Perhaps, who knows.")]


def test_the_reward_is_the_expected_score_of_single_forward_passes(tiny_judge: Path) -> None:
    reward = LLMScoreReward(str(tiny_judge), min_mass=0)
    found = reward.score(PROMPTS, RESPONSES)
    judge, ids = reward.judge, reward.judge.tokenizer.convert_tokens_to_ids
    for prompt, response, mean, std in zip(PROMPTS, RESPONSES, found.mean, found.std, strict=True):  # type: ignore[arg-type]
        prefix = judge.prompt_ids(reward.prompt(Sample(prompt.text, (response.text,))))
        with torch.no_grad():
            first = judge.model(torch.tensor([prefix])).logits[0, -1].double().softmax(-1)
            second = judge.model(torch.tensor([[*prefix, ids("1")]])).logits[0, -1].double().softmax(-1)
        chance = torch.stack([first[ids(str(score))] for score in range(1, 10)] + [first[ids("1")] * second[ids("0")]])
        chance[0] *= 1 - second[ids(list("0123456789"))].sum()  # a "1" that goes on is no 1
        scores = torch.arange(1, 11).double()
        weights = chance / chance.sum()
        score = (weights * scores).sum()
        assert mean.item() == pytest.approx(((2 * score - 11) / 9).item(), abs=1e-5)
        assert std.item() == pytest.approx(((weights * (scores - score) ** 2).sum().sqrt() * 2 / 9).item(), abs=1e-5)
    assert reward.report()["scored"] == 3
    assert 0 < reward.report()["mass"] < 1


def test_scores_do_not_depend_on_the_batch(tiny_judge: Path) -> None:
    reward = LLMScoreReward(str(tiny_judge), min_mass=0)
    alone = torch.cat([reward.score([p], [r]).mean for p, r in zip(PROMPTS, RESPONSES, strict=True)])
    torch.testing.assert_close(reward.score(PROMPTS, RESPONSES).mean, alone, atol=1e-5, rtol=0)


def test_a_yes_no_question(tiny_judge: Path) -> None:
    reward = LLMScoreReward(str(tiny_judge), "harmless", question="check", min_mass=0)
    mean = reward.score(PROMPTS, RESPONSES).mean
    logps = reward.judge.label_logps(
        [reward.prompt(Sample(p.text, (r.text,))) for p, r in zip(PROMPTS, RESPONSES, strict=True)], ("no", "yes")
    )
    torch.testing.assert_close(mean, 2 * torch.sigmoid(logps[:, 0] - logps[:, 1]) - 1, atol=1e-5, rtol=0)


def test_a_judge_that_does_not_answer_with_scores_stops_the_run_at_once(tiny_judge: Path) -> None:
    reward = LLMScoreReward(str(tiny_judge), min_mass=0.9)
    with pytest.raises(ValueError, match=r"answers with one of the task's labels with a probability of only 0\.0"):
        reward.score(PROMPTS, RESPONSES)
    reward.min_mass = 0
    reward.score(PROMPTS, RESPONSES)
    reward.min_mass = 0.9  # what has been bought is not thrown away for a later batch
    with pytest.warns(UserWarning, match=r"min_mass=0\.9"):
        reward.score(PROMPTS, RESPONSES)


def test_long_contexts_are_cut_and_long_responses_refused(tiny_judge: Path) -> None:
    reward = LLMScoreReward(str(tiny_judge), min_mass=0)
    mean = reward.score([Prompt(0, (1,), "word " * 2000)], RESPONSES[:1]).mean
    assert mean.shape == (1,) and -1 <= mean.item() <= 1
    long = Response((1,), "word " * 1000, "eos")
    with pytest.raises(ValueError, match=r"prompt 0: the response alone \(5000 characters\)"):
        reward.score(PROMPTS[:1], [long])
    reward.max_candidate_chars = 1000
    reward.score(PROMPTS[:1], [long])


def test_options_are_checked_before_a_model_is_loaded(tiny_judge: Path) -> None:
    with pytest.raises(ValueError, match="no 'check' section"):
        LLMScoreReward(str(tiny_judge), "helpful", question="check")
    with pytest.raises(ValueError, match="style='detailed'"):
        LLMScoreReward(str(tiny_judge), "sentiment", style="detailed")
    with pytest.raises(ValueError, match="min_mass"):
        LLMScoreReward(str(tiny_judge), min_mass=-1)
