"""Collate preferences, rollouts and completions to batches.

Token ids stay ragged here; `lightning_rlhf.logprobs.compute` packs them for the model. There are no pad ids and no
masks: a response is as long as its ids.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_rlhf.batching.batches import PreferenceBatch, ResponseBatch, RolloutGroup
from lightning_rlhf.types import Preference, Prompt, Response


def collate_rollouts(groups: Sequence[RolloutGroup], mean_length: float, max_length: int) -> ResponseBatch:
    """Make a batch of prompts with their responses.

    Args:
        groups: at least one, all sampled at one temperature.
        mean_length: mean tokens of a response of the optimizer step, over all ranks.
        max_length: token limit of the responses.
    """
    # [5, tokens]: log pi, log pi_ref, advantage, V, target of V; response after response
    rows: list[list[float]] = [[] for _ in range(5)]
    for group in groups:
        for rollout in group.rollouts:
            response = rollout.response
            assert response.policy_logps is not None and response.reference_logps is not None
            rows[0] += response.policy_logps
            rows[1] += response.reference_logps
            rows[3] += rollout.values or [math.nan] * len(response.ids)
        rows[2] += group.advantages
        rows[4] += group.targets or [math.nan] * len(group.advantages)
    return ResponseBatch(
        prompts=[group.rollouts[0].prompt.ids for group in groups],
        names=[_where(group.rollouts[0].prompt) for group in groups],
        responses=[tuple(rollout.response.ids for rollout in group.rollouts) for group in groups],
        numbers=_float64(rows),
        weight=torch.ones(len(groups), dtype=torch.float64),
        mean_length=mean_length,
        max_length=max_length,
        temperature=groups[0].rollouts[0].temperature,
    )


def collate_completions(prompts: Sequence[Prompt], mean_length: float, max_length: int) -> ResponseBatch:
    """Make a batch of prompts with their recorded completions.

    Args:
        prompts: at least one, each with a completion.
        mean_length: mean tokens of a completion of the optimizer step, over all ranks.
        max_length: token limit of the completions.
    """
    completions = [prompt.completion.ids for prompt in prompts if prompt.completion is not None]
    assert len(completions) == len(prompts)
    return ResponseBatch(
        prompts=[prompt.ids for prompt in prompts],
        names=[_where(prompt) for prompt in prompts],
        responses=[(ids,) for ids in completions],
        # [0, tokens]: recorded completions have no numbers, but `split` cuts the columns of tokens
        numbers=torch.zeros(0, sum(map(len, completions)), dtype=torch.float64),
        weight=torch.ones(len(prompts), dtype=torch.float64),
        mean_length=mean_length,
        max_length=max_length,
    )


def collate_preferences(preferences: Sequence[Preference]) -> PreferenceBatch:
    """Make a batch of labeled pairs; the order of a and b matters on a tie only.

    Raises:
        ValueError: if there are no preferences, one has no verdict, or a response has no tokens or more or fewer
            log-probabilities than tokens.
    """
    if not preferences:
        raise ValueError("expected at least one preference to make a batch of; got none")
    prompts, chosen, rejected, labels = [], [], [], []
    for number, preference in enumerate(preferences):
        comparison, label = preference.comparison, preference.label
        if label.probability is None:
            raise ValueError(
                f"preference {number} ({_where(comparison.prompt)}) has a label with status {label.status!r}; "
                "only labels with status 'ok' can be trained on: drop or retry the others"
            )
        # the chosen response is the more probable winner, so that labels lie in [0.5, 1]; a single one has no rival
        first = label.probability >= 0.5 or comparison.is_single
        prompts.append(comparison.prompt.ids)
        chosen.append(_checked(comparison.a if first else comparison.b, number, comparison.prompt))
        other = comparison.b if first else comparison.a
        rejected.append(other if comparison.is_single else _checked(other, number, comparison.prompt))
        # P(chosen preferred) = max(p, 1 - p) with p = P(a preferred)
        labels.append(label.probability if first else 1.0 - label.probability)
    return PreferenceBatch(
        prompts=prompts,
        chosen=[r.ids for r in chosen],
        rejected=[r.ids for r in rejected],
        label=_float64(labels),
        weight=_float64([p.weight for p in preferences]),
        reference_chosen_logps=_float64([_total(r.reference_logps) for r in chosen]),
        reference_rejected_logps=_float64([_total(r.reference_logps) for r in rejected]),
        sampling_chosen_logps=_float64([_total(r.policy_logps) for r in chosen]),
        sampling_rejected_logps=_float64([_total(r.policy_logps) for r in rejected]),
        chosen_from_reference=torch.tensor([r.source == "reference" for r in chosen]),
        rejected_from_reference=torch.tensor([r.source == "reference" for r in rejected]),
        names=[f"round {p.round}, {_where(p.comparison.prompt)}" for p in preferences],
    )


def _checked(response: Response, number: int, prompt: Prompt) -> Response:
    where = f"preference {number} ({_where(prompt)})"
    if not response.ids:
        raise ValueError(f"{where} has a response without tokens; a response holds at least its EOS: drop the pair")
    for name in ("policy_logps", "reference_logps"):
        logps = getattr(response, name)
        if logps is not None and len(logps) != len(response.ids):
            raise ValueError(
                f"{where} has a response of {len(response.ids)} tokens with {len(logps)} {name}; "
                "expected one per token, or None where they are not known"
            )
    return response


def _where(prompt: Prompt) -> str:
    return f"prompt {prompt.index}"


def _total(logps: Sequence[float] | None) -> float:
    # log pi(y|x) = sum_t log pi(y_t | x, y_<t), NaN where it was not computed
    # fsum rounds once, so that the total does not depend on the order of summation
    return math.nan if logps is None else math.fsum(logps)


def _float64(values: Sequence[float] | Sequence[Sequence[float]]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)
