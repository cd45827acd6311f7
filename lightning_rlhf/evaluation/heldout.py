"""Reward, KL and objective of held-out responses."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lightning_rlhf.estimators.kl import k1, k3
from lightning_rlhf.evaluation.metrics import mean_with_error
from lightning_rlhf.types import Prompt, Response


@dataclass(frozen=True)
class HeldOutRow:
    """A held-out prompt with the response of the policy and its reward.

    Args:
        key: names the row: number of the validation loader, `Prompt.index`, and how often the prompt came before.
        prompt: text of the prompt; of a conversation, its last turn.
        response: text of the answer.
        num_tokens: length of the answer, EOS included.
        eos: whether the policy ended the answer itself.
        reward: its reward; None when the run has no reward.
        k1: log pi_theta - log pi_ref of the answer, nats; None without log-probabilities.
        k3: the never negative estimate of the same KL, summed over tokens, nats; None without log-probabilities.
        parts: parts of its reward by name; those that do not apply are left out.
    """

    key: tuple[int, int, int]
    prompt: str
    response: str
    num_tokens: int
    eos: bool
    reward: float | None
    k1: float | None
    k3: float | None
    parts: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class HeldOutMeans:
    """Means over the rows of a validation epoch; None where no row has the value.

    Args:
        reward: mean reward.
        reward_stderr: standard error of ``reward``; None with fewer than two rewards.
        kl: mean k1 per answer, nats: an unbiased estimate of KL(policy || reference) over whole answers.
        kl_stderr: standard error of ``kl``.
        k3: mean over answers of k3 summed over tokens, nats: also unbiased.
        k1_per_token: k1 summed over all tokens of all answers, divided by their number, nats.
        k3_per_token: k3 likewise, nats.
        response_length: mean length, tokens.
        eos_rate: share of answers that the policy ended itself.
        size: number of answers.
    """

    reward: float | None
    reward_stderr: float | None
    kl: float | None
    kl_stderr: float | None
    k3: float | None
    k1_per_token: float | None
    k3_per_token: float | None
    response_length: float
    eos_rate: float
    size: int

    def j(self, beta: float) -> float | None:
        """The objective J = mean reward - beta * KL, which RLHF maximizes (PILAF, arXiv 2502.04270)."""
        # J = E[r] - beta KL(pi || pi_ref)
        return None if self.reward is None or self.kl is None else self.reward - beta * self.kl


def held_out_rows(output: dict[str, Any], seen: Counter[tuple[int, int]], loader: int = 0) -> list[HeldOutRow]:
    """Read the rows off one output of ``validation_step``: ``{"prompts", "responses", "rewards"}``.

    Args:
        output: the output; ``"reward_parts"`` may be there, too: the parts of the rewards by name, NaN where one does
            not apply.
        seen: how often each (loader, prompt) came before on this rank; counted up here.
        loader: number of the validation loader.
    """
    prompts: Sequence[Prompt] = output["prompts"]
    responses: Sequence[Response] = output["responses"]
    rewards: Tensor | None = output["rewards"]
    values = [None] * len(responses) if rewards is None else rewards.tolist()
    # [answers] by name of a part
    columns: dict[str, list[float]] = {name: part.tolist() for name, part in output.get("reward_parts", {}).items()}
    rows = []
    for place, (prompt, response, reward) in enumerate(zip(prompts, responses, values, strict=True)):
        # rows of all ranks are merged by key: a prompt that comes again must not replace its first row
        occurrence = seen[loader, prompt.index]
        seen[loader, prompt.index] += 1
        kl1, kl3 = None, None
        if response.policy_logps is not None and response.reference_logps is not None:
            # in float64: a log-ratio is a small difference, and is summed over many tokens
            policy = torch.tensor(response.policy_logps, dtype=torch.float64)
            reference = torch.tensor(response.reference_logps, dtype=torch.float64)
            # with r = log pi - log pi_ref per token: k1 = sum r, k3 = sum (exp(-r) - 1 + r)
            kl1, kl3 = k1(policy, reference).sum().item(), k3(policy, reference).sum().item()
        rows.append(
            HeldOutRow(
                key=(loader, prompt.index, occurrence),
                prompt=prompt.messages[-1]["content"] if prompt.messages else prompt.text,
                response=response.text,
                num_tokens=len(response.ids),
                eos=response.finish_reason == "eos",
                reward=reward,
                k1=kl1,
                k3=kl3,
                parts={name: column[place] for name, column in columns.items() if not math.isnan(column[place])},
            )
        )
    return rows


def summarize(rows: Sequence[HeldOutRow]) -> HeldOutMeans:
    """Average the rows of one validation epoch; there must be at least one."""
    rewards = [row.reward for row in rows if row.reward is not None]
    k1s = [row.k1 for row in rows if row.k1 is not None]
    k3s = [row.k3 for row in rows if row.k3 is not None]
    # k1_per_token = sum k1 / sum tokens, over the rows with log-probabilities alone
    tokens = sum(row.num_tokens for row in rows if row.k1 is not None)
    reward, reward_stderr = optional_mean(rewards)
    kl, kl_stderr = optional_mean(k1s)
    return HeldOutMeans(
        reward=reward,
        reward_stderr=reward_stderr,
        kl=kl,
        kl_stderr=kl_stderr,
        k3=optional_mean(k3s)[0],
        k1_per_token=sum(k1s) / tokens if tokens else None,
        k3_per_token=sum(k3s) / tokens if tokens else None,
        response_length=sum(row.num_tokens for row in rows) / len(rows),
        eos_rate=sum(row.eos for row in rows) / len(rows),
        size=len(rows),
    )


def part_means(rows: Sequence[HeldOutRow]) -> dict[str, float]:
    """Mean of each part of the reward over the rows to which it applies."""
    names = sorted({name for row in rows for name in row.parts})
    values = {name: [row.parts[name] for row in rows if name in row.parts] for name in names}
    return {name: sum(found) / len(found) for name, found in values.items()}


def optional_mean(values: Sequence[float]) -> tuple[float | None, float | None]:
    """Mean and standard error, each None if there are too few values."""
    mean, error = mean_with_error(torch.tensor(values, dtype=torch.float64))
    return (mean if values else None), (error if len(values) > 1 else None)
