"""Adversarial rewards: a discriminator that is trained in rounds against the policy (RLGAF, arXiv 2305.06176)."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import get_args

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from lightning_rlhf.estimators.adversarial import (
    RewardForm,
    adversarial_reward,
    discriminator_accuracy,
    discriminator_loss,
)
from lightning_rlhf.prompts.base import AbstractPromptSource
from lightning_rlhf.rewards.base import AbstractReward, RewardOutput, RoundSamples, prompt_name
from lightning_rlhf.rewards.discriminators import AbstractDiscriminator
from lightning_rlhf.runtime.plugins import check_plugin
from lightning_rlhf.types import Prompt, PromptRow, Response, Rollout, State


@dataclass(frozen=True)
class DiscriminatorSteps:
    """The optimizer steps of a discriminator in a round, with AdamW.

    Args:
        first: steps in the first round, before the policy is trained, >= 0.
        later: steps in each later round, >= 0.
        batch_size: samples of the policy in a step, and as many demonstrations, >= 1.
        learning_rate: > 0; about 1e-5 for a language model that is trained along.
        weight_decay: >= 0.
        label_smoothing: the target of a demonstration is one minus this, in [0, 0.5); bounds the logits.
        replay: share of the samples of a step that comes from earlier rounds, in [0, 1).
    """

    first: int = 100
    later: int = 10
    batch_size: int = 32
    learning_rate: float = 1e-3
    weight_decay: float = 0.0
    label_smoothing: float = 0.1
    replay: float = 0.2

    def __post_init__(self) -> None:
        if self.first < 0 or self.later < 0 or self.batch_size < 1:
            raise ValueError(
                f"steps.first and .later must be >= 0 and steps.batch_size >= 1; got {self.first}, {self.later} and "
                f"{self.batch_size}"
            )
        if not (self.learning_rate > 0 and self.weight_decay >= 0):
            raise ValueError(
                f"steps.learning_rate must be > 0 and steps.weight_decay >= 0; got {self.learning_rate} and "
                f"{self.weight_decay}"
            )
        if not (0 <= self.label_smoothing < 0.5 and 0 <= self.replay < 1):
            raise ValueError(
                f"steps.label_smoothing must lie in [0, 0.5) and steps.replay in [0, 1); got {self.label_smoothing} "
                f"and {self.replay}"
            )


DEFAULT_STEPS = DiscriminatorSteps()

REPLAYED_ROUNDS = 4
"""Earlier rounds that the replayed samples of a round are taken from, at most: each is read from the ledger."""


class AdversarialReward(AbstractReward):
    """Reward by a discriminator D between demonstrations and samples of the policy: RLGAF, arXiv 2305.06176.

    Before a round is scored, D takes some steps on L_D = -E[log D(demonstration)] - E[log(1 - D(sample))]. Samples are
    those of the new round and a share of earlier ones; each comes with a demonstration of the same prompt. The reward
    is a function of D, see `lightning_rlhf.estimators.adversarial.adversarial_reward`. The policy sees demonstrations
    through this number alone: it gets no likelihood gradient on them.

    Metrics: ``discriminator/accuracy``, on the new samples before D has seen them (0.5 is chance), ``/accuracy_fitted``
    afterwards, ``/loss`` of the last step (nats), and ``/reward_mean`` and ``/reward_std``, the scale of the reward.

    Args:
        demonstrations: rows with a completion, such as `DatasetCompletions`; of pairs, the preferred response is one.
            Several rows may have the same prompt. Prompts are compared as texts.
        discriminator: the discriminator.
        form: ``logit``, ``log_d``, ``minus_log_1_minus_d`` or ``d``.
        steps: how D is trained.

    Raises:
        ValueError: if there is no such form.
    """

    def __init__(
        self,
        demonstrations: AbstractPromptSource,
        discriminator: AbstractDiscriminator,
        form: RewardForm = "logit",
        steps: DiscriminatorSteps = DEFAULT_STEPS,
    ) -> None:
        check_plugin("AdversarialReward.demonstrations", demonstrations, AbstractPromptSource)
        check_plugin("AdversarialReward.discriminator", discriminator, AbstractDiscriminator)
        if form not in get_args(RewardForm):
            raise ValueError(f"AdversarialReward.form must be one of {', '.join(get_args(RewardForm))}; got {form!r}")
        self.source, self.discriminator, self.steps = demonstrations, discriminator, steps
        self.form: RewardForm = form
        self._demonstrations: dict[str, list[Response]] = {}
        self._optimizer: torch.optim.AdamW | None = None
        self._metrics: dict[str, float] = {}
        self._training_checked = False

    # -- the interface -------------------------------------------------------------------------------------------------

    def check_prompts(self, prompts: Sequence[Prompt]) -> None:
        """Read the demonstrations, and check that training prompts have some; held-out prompts need none.

        Raises:
            ValueError: if no training prompt has a demonstration.
        """
        lacking = sum(not self._of(prompt) for prompt in prompts)
        # training prompts are checked before held-out ones
        if self._training_checked:
            return
        if lacking == len(prompts):
            raise ValueError(
                f"none of the {len(prompts)} training prompts has a demonstration among the "
                f"{len(self._demonstrations)} prompts of {type(self.source).__name__} ({prompts[0].text[-80:]!r} has "
                f"none): give demonstrations of the training prompts, with the same text or messages"
            )
        if lacking:
            rank_zero_info(
                f"{lacking} of {len(prompts)} training prompts have no demonstration: their responses are scored, and "
                f"the discriminator is not trained on them"
            )
        self._training_checked = True

    @torch.no_grad()
    def score(self, prompts: Sequence[Prompt], responses: Sequence[Response]) -> RewardOutput:
        """Score ``responses[i]`` as an answer to ``prompts[i]``; float32, [B]. Before the first round D is 1/2."""
        rows = self.discriminator.encode(prompts, responses)
        return RewardOutput(adversarial_reward(self.discriminator.logits(rows), self.form))

    def learn(self, samples: RoundSamples) -> None:
        """Take the steps of a round."""
        new = [rollout for rollout in samples.rollouts if self._of(rollout.prompt)]
        if not new:
            raise ValueError(
                f"no prompt of round {samples.index} has a demonstration ({samples.rollouts[0].prompt.text[-80:]!r}, "
                f"...): give demonstrations of the training prompts, or more prompts per round"
            )
        generator = samples.key.generator()
        old = self._replayed(samples, generator)
        pool = [*new, *old]
        # one demonstration of the same prompt for each new sample, to measure the accuracy on
        test = [(place, self._demonstration(rollout, generator)) for place, rollout in enumerate(new)]
        steps = self.steps.first if self._optimizer is None else self.steps.later
        pairs = [*test, *self._plan(pool, len(new), steps, generator)]
        rows = _Rows()
        places = torch.tensor(
            [(rows.place(pool[i].prompt, pool[i].response), rows.place(pool[i].prompt, shown)) for i, shown in pairs]
        )
        encoded = self.discriminator.encode(rows.prompts, rows.responses)
        tested = places[: len(test)]
        if self._optimizer is None:
            self.discriminator.start(encoded[tested.flatten()])
            self._optimizer = self._new_optimizer()
        accuracy = self._accuracy(encoded, tested)
        loss = 0.0
        for step in torch.split(places[len(test) :], self.steps.batch_size) if steps else ():
            loss = self._step(encoded, step)
        with torch.no_grad():
            rewards = adversarial_reward(self.discriminator.logits(encoded[tested[:, 0]]), self.form)
        self._metrics = {
            "discriminator/accuracy": accuracy,
            "discriminator/accuracy_fitted": self._accuracy(encoded, tested),
            "discriminator/loss": loss,
            "discriminator/reward_mean": rewards.mean().item(),
            "discriminator/reward_std": rewards.std(correction=0).item(),
        }

    def metrics(self) -> Mapping[str, float]:
        """Accuracy, loss and scale of the reward in the last round."""
        return self._metrics

    def columns_read(self, names: Sequence[str]) -> set[str]:
        """None: prompt and response are read."""
        del names
        return set()

    def state_dict(self) -> dict[str, object]:
        """State of the discriminator and of its optimizer; empty before the first round."""
        if self._optimizer is None:
            return {}
        return {
            "discriminator": self.discriminator.state_dict(),
            # a copy: a later round must not change a state that waits for being written
            "optimizer": copy.deepcopy(self._optimizer.state_dict()),
            "metrics": dict(self._metrics),
        }

    def load_state_dict(self, state: State) -> None:
        """Restore the state of `state_dict`."""
        self.discriminator.load_state_dict(state.get("discriminator", {}))
        self._optimizer, self._metrics = None, dict(state.get("metrics", {}))
        if state:
            self._optimizer = self._new_optimizer()
            self._optimizer.load_state_dict(copy.deepcopy(state["optimizer"]))

    # -- training ------------------------------------------------------------------------------------------------------

    def _new_optimizer(self) -> torch.optim.AdamW:
        return torch.optim.AdamW(
            self.discriminator.parameters(), lr=self.steps.learning_rate, weight_decay=self.steps.weight_decay
        )

    def _step(self, encoded: Tensor, places: Tensor) -> float:
        """One optimizer step; returns the loss.

        Args:
            encoded: rows of the discriminator.
            places: place of a sample and of a demonstration in it, [batch, 2].
        """
        assert self._optimizer is not None
        # samples in the first column, demonstrations in the second
        real = torch.tensor([False, True]).expand(len(places), 2).flatten()
        logits = self.discriminator.logits(encoded[places.flatten()])
        # sum of the two means, as L_D is written
        loss = 2 * discriminator_loss(logits, real.to(logits.device), self.steps.label_smoothing).mean()
        self._optimizer.zero_grad()
        torch.autograd.backward(loss)
        self._optimizer.step()
        return loss.item()

    @torch.no_grad()
    def _accuracy(self, encoded: Tensor, places: Tensor) -> float:
        logits = self.discriminator.logits(encoded[places.flatten()]).view(-1, 2)
        return discriminator_accuracy(logits[:, 1], logits[:, 0])

    def _plan(
        self, pool: Sequence[Rollout], num_new: int, steps: int, generator: torch.Generator
    ) -> list[tuple[int, Response]]:
        """Samples of the steps, step after step, as places in the pool, new ones first; each with a demonstration."""
        size = self.steps.batch_size
        num_old = round(self.steps.replay * size) if len(pool) > num_new else 0
        wanted = steps * (size - num_old)
        # passes over the new samples, each in a new order
        passes = [torch.randperm(num_new, generator=generator) for _ in range(-(-wanted // num_new))]
        fresh = iter(torch.cat(passes).tolist() if passes else [])
        plan: list[tuple[int, Response]] = []
        for _ in range(steps):
            chosen = [next(fresh) for _ in range(size - num_old)]
            if num_old:
                chosen += torch.randint(num_new, len(pool), (num_old,), generator=generator).tolist()
            plan += [(place, self._demonstration(pool[place], generator)) for place in chosen]
        return plan

    def _replayed(self, samples: RoundSamples, generator: torch.Generator) -> list[Rollout]:
        """Samples of some earlier rounds, whose prompts have demonstrations."""
        if not self.steps.replay or not samples.index:
            return []
        rounds = torch.randperm(samples.index, generator=generator)[:REPLAYED_ROUNDS].sort().values
        found: list[Rollout] = []
        for index in rounds.tolist():
            found += [rollout for rollout in samples.earlier(index) if self._of(rollout.prompt)]
        return found

    # -- demonstrations ------------------------------------------------------------------------------------------------

    def _demonstration(self, rollout: Rollout, generator: torch.Generator) -> Response:
        """A random demonstration of the prompt of a rollout."""
        shown = self._of(rollout.prompt)
        return shown[int(torch.randint(len(shown), (1,), generator=generator))]

    def _of(self, prompt: Prompt) -> list[Response]:
        if not self._demonstrations:
            for row in self.source.load():
                self._demonstrations.setdefault(prompt_name(row.text, row.messages), []).append(demonstration(row))
        return self._demonstrations.get(prompt_name(prompt.text, prompt.messages), [])


class _Rows:
    """Prompts with responses, each held once, so that each is encoded once in a round."""

    def __init__(self) -> None:
        self.prompts: list[Prompt] = []
        self.responses: list[Response] = []
        self._places: dict[tuple[str, str, str], int] = {}

    def place(self, prompt: Prompt, response: Response) -> int:
        """Place of a response; it is added if it is new."""
        name = prompt_name(prompt.text, prompt.messages), response.text, response.finish_reason
        place = self._places.setdefault(name, len(self.prompts))
        if place == len(self.prompts):
            self.prompts.append(prompt)
            self.responses.append(response)
        return place


def demonstration(row: PromptRow) -> Response:
    """The response of a row that is to be imitated: its completion, or the preferred one of a pair.

    Raises:
        ValueError: if the row has none.
    """
    text = row.completion if row.pair is None else row.pair.chosen
    if text is None:
        raise ValueError(
            f"{row.source} has no response that demonstrates anything: read demonstrations with DatasetCompletions, or "
            f"pairs with DatasetPrompts"
        )
    # token ids belong to a tokenizer; discriminators read texts
    return Response((0,), text, row.finish_reasons[0] if row.finish_reasons else "eos", source="dataset")
