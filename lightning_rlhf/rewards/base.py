"""The interface of rewards."""

from __future__ import annotations

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lightning_rlhf.randomness import Key
from lightning_rlhf.runtime.fingerprint import KeepsArguments
from lightning_rlhf.types import Message, Prompt, Response, Rollout


@dataclass(frozen=True)
class RewardOutput:
    """Rewards of a batch.

    Args:
        mean: reward of each response, higher is better; shape [B].
        std: uncertainty of each reward, where the reward knows it; shape [B].
        members: rewards by the members of an ensemble; shape [B, k].
        parts: terms that the mean is made of, by name, for curves of their own; shape [B] each, NaN where a term does
            not apply.
    """

    mean: Tensor
    std: Tensor | None = None
    members: Tensor | None = None
    parts: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class RoundSamples:
    """Responses of a new round that have no reward yet, for rewards that learn from them.

    Args:
        index: number of the round, from 0.
        rollouts: the responses, prompt by prompt.
        earlier: gives the responses of an earlier round, from the ledger; every rank must ask.
        key: random numbers of the round.
    """

    index: int
    rollouts: Sequence[Rollout]
    earlier: Callable[[int], Sequence[Rollout]]
    key: Key

    @property
    def prompts(self) -> list[Prompt]:
        """Prompt of each response."""
        return [rollout.prompt for rollout in self.rollouts]

    @property
    def responses(self) -> list[Response]:
        """The responses."""
        return [rollout.response for rollout in self.rollouts]


class AbstractReward(KeepsArguments, ABC):
    """Scores a response to a prompt.

    Subclass it, implement `score`, and name your class by its path:
    ``--data.labeler=RewardLabeler --data.labeler.reward=my_file.MyReward``.
    """

    @abstractmethod
    def score(self, prompts: Sequence[Prompt], responses: Sequence[Response]) -> RewardOutput:
        """Score ``responses[i]`` as an answer to ``prompts[i]``; the same whatever other answers there are.

        The mean alone, as a tensor, an array or a list of numbers, is taken as well.
        """

    def check_prompts(self, prompts: Sequence[Prompt]) -> None:
        """Check the rows to be scored, before any model is loaded; raise if they lack a column that the reward reads.

        Called with all training prompts, and with all held-out prompts. The default checks nothing.
        """
        del prompts

    def columns_read(self, names: Sequence[str]) -> set[str]:
        """Columns that the reward reads, of those that the rows have; for a note on columns that nothing reads.

        The default is all: a reward of your own may read any.
        """
        return set(names) if not type(self).__module__.startswith("lightning_rlhf.") else set()

    @property
    def learns_from_samples(self) -> bool:
        """Whether `learn` does anything; a round is read from the ledger for it."""
        return type(self).learn is not AbstractReward.learn

    def learn(self, samples: RoundSamples) -> None:
        """Learn from the responses of a new round, before they are scored.

        Called once per round, in order, on every rank alike. A run that continues from a checkpoint calls it for the
        rounds that the checkpoint has not seen, with the responses in the ledger. Equal calls must give equal rewards,
        bit by bit: take random numbers from ``samples.key``. The default learns nothing.
        """
        del samples

    def metrics(self) -> Mapping[str, float]:
        """Metrics of the last `learn` for the log, by name; finite. `RolloutMonitor` logs them."""
        return {}

    def observe(self, output: RewardOutput) -> None:
        """Learn from a finished round of rollouts.

        Called once per round, in order, with all scores of the round, on every rank alike (also when the round is read
        back from the ledger after a restart). Held-out answers are not shown. The default learns nothing.
        """
        del output

    def earned(self, output: RewardOutput) -> Tensor:
        """Rewards of a round in training, [B], from all scores of the round; called after `observe`.

        The ledger keeps the scores, and held-out answers are judged by them. The default takes them as they are.
        """
        return output.mean

    def state_dict(self) -> dict[str, object]:
        """State of `learn` and `observe`, as plain data for the checkpoint."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state of `state_dict`."""
        del state


def as_output(reward: AbstractReward, made: object, count: int) -> RewardOutput:
    """Make an output of the return value of a reward: one, or its ``mean`` alone as a tensor, an array or a list.

    Args:
        reward: the reward.
        made: its return value.
        count: number of responses, B.

    Raises:
        TypeError: if it holds no numbers; the message names the class and the expected type.
        ValueError: if it has another shape.
    """
    name = type(reward).__name__
    if not isinstance(made, RewardOutput):
        return RewardOutput(_numbers(name, "mean", made, count))
    mean = _numbers(name, "mean", made.mean, count)
    std = None if made.std is None else _numbers(name, "std", made.std, count)
    members = None if made.members is None else _numbers(name, "members", made.members, count, ndim=2)
    parts = {part: _numbers(name, f"parts[{part!r}]", values, count) for part, values in made.parts.items()}
    return RewardOutput(mean, std, members, parts)


def columns_read(reward: AbstractReward, names: Sequence[str]) -> set[str]:
    """Columns that a reward reads; all, for an object without `AbstractReward.columns_read`."""
    return reward.columns_read(names) if hasattr(reward, "columns_read") else set(names)


def check_rows(reward: AbstractReward, prompts: Sequence[Prompt], rows: str = "") -> None:
    """Let a reward check the rows that it will score; an object without `AbstractReward.check_prompts` checks none.

    Args:
        reward: the reward.
        prompts: the rows.
        rows: their name in errors.

    Raises:
        ValueError: if they lack a column that it reads.
    """
    if not prompts or not hasattr(reward, "check_prompts"):
        return
    try:
        reward.check_prompts(prompts)
    except ValueError as error:
        if not rows:
            raise
        raise ValueError(f"{rows}: {error}") from error


def prompt_name(text: str | None, messages: tuple[Message, ...] | None) -> str:
    """A prompt as text, the same for a row and for the tokenized prompt made of it."""
    return f"text {text}" if messages is None else f"messages {json.dumps(messages, sort_keys=True)}"


def learns_from_samples(reward: AbstractReward) -> bool:
    """Whether a reward has a `AbstractReward.learn`; an object without that method has none."""
    return bool(getattr(reward, "learns_from_samples", False))


def metrics_of(reward: AbstractReward) -> dict[str, float]:
    """Metrics of a reward; none for an object without `AbstractReward.metrics`."""
    return dict(reward.metrics()) if hasattr(reward, "metrics") else {}


def _numbers(name: str, field: str, value: object, count: int, ndim: int = 1) -> Tensor:
    expected = f"return RewardOutput({field}=...) with a tensor of floats, one number per response, in order"
    try:
        # a dictionary or a generator has no order of responses
        if not isinstance(value, Tensor | Sequence) and not hasattr(value, "__array__"):
            raise TypeError
        tensor = value if isinstance(value, Tensor) else torch.as_tensor(_plain(value))
        # complex numbers have no order
        if tensor.is_complex():
            raise TypeError
    except (TypeError, ValueError, RuntimeError):
        shown = "None" if value is None else f"a {type(value).__name__}"
        raise TypeError(f"{name}.score returned {shown} as its {field}; {expected}") from None
    # a single number would be broadcast to all responses
    if tensor.ndim != ndim or len(tensor) != count:
        raise ValueError(
            f"{name}.score returned a {field} of shape {tuple(tensor.shape)} for {count} responses; "
            f"return one number per response, in order"
        )
    return tensor


def _plain(value: object) -> object:
    """A list without the tensors and arrays of one number that it may hold; arrays as they are."""
    # a string is a sequence, too
    if isinstance(value, str | bytes):
        raise TypeError
    if not isinstance(value, Sequence):
        return value
    return [item.item() if hasattr(item, "item") and getattr(item, "ndim", 1) == 0 else item for item in value]


def checked_output(reward: AbstractReward, prompts: Sequence[Prompt], responses: Sequence[Response]) -> RewardOutput:
    """Call a reward and check its output; mean and std [B], float64 on the CPU.

    Raises:
        TypeError: if the reward returned no numbers.
        ValueError: if the reward returned another number of values than there are responses, or one that is not finite;
            the message names the first offending prompt.
    """
    output = as_output(reward, reward.score(prompts, responses), len(responses))
    name = type(reward).__name__
    mean = output.mean.detach().double().cpu()
    std = None if output.std is None else output.std.detach().double().cpu()
    for values in (mean, std):
        for prompt, response, value in zip(prompts, responses, [] if values is None else values.tolist(), strict=False):
            # one NaN would spread to every advantage of its group
            if not math.isfinite(value):
                raise ValueError(
                    f"{name}.score returned {value} for prompt {prompt.index}, response {response.text[:80]!r}; "
                    f"rewards must be finite: return a low number for an answer that cannot be scored"
                )
    parts = {part: value.detach().double().cpu() for part, value in output.parts.items()}
    return RewardOutput(mean, std, output.members, parts)


def checked_score(reward: AbstractReward, prompts: Sequence[Prompt], responses: Sequence[Response]) -> Tensor:
    """Call a reward and check its output; shape [B], float64. Raises as `checked_output`."""
    return checked_output(reward, prompts, responses).mean
