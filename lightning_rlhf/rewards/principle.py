"""The reward of a model that reads principles: behavior is forbidden by text, with the model frozen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from lightning_rlhf.estimators.principles import weighted_subset
from lightning_rlhf.judging.principle import conditioned, load_principles, named, statement
from lightning_rlhf.randomness import Key, Stream
from lightning_rlhf.rewards.base import AbstractReward, RewardOutput, RoundSamples, as_output
from lightning_rlhf.rewards.wrapped import AbstractWrappedReward
from lightning_rlhf.types import Prompt, Response, Rollout


class PrincipleReward(AbstractWrappedReward):
    """r(x, y | P) of a principle-conditioned reward model (SALMON, arXiv 2310.05910).

    P holds the ``fixed`` principles, the interventions of the paper, for every prompt, and ``sampled`` others,
    without replacement and by weight. They are added to the text of the prompt, as in the training of the model. The
    sample belongs to the prompt, so that a response gets the same reward whenever it is scored; the paper samples
    principles each time. Left out: principles that are favored on prompts of a kind, and the bonus for length.

    Args:
        reward: the reward that reads the principles in the prompt, such as a `RewardModelReward`.
        principles: name of a set of principles, or a ``.yaml`` file.
        tags: principles with one of these tags are sampled; empty: all.
        sampled: sampled principles per prompt, >= 0.
        fixed: ids of principles that are always there; ``not:ID`` is the negated one.
        seed: which principles are sampled.

    Raises:
        FileNotFoundError: if there is no such set.
        ValueError: if there is no principle of that id or tag, or no principle would be used.
    """

    def __init__(
        self,
        reward: AbstractReward,
        principles: str = "assistant",
        tags: Sequence[str] = ("reward",),
        sampled: int = 3,
        fixed: Sequence[str] = (),
        seed: int = 0,
    ) -> None:
        super().__init__(reward)
        if sampled < 0 or (sampled == 0 and not fixed):
            raise ValueError(
                f"PrincipleReward samples at least one principle per prompt, or has fixed ones; got sampled={sampled}"
            )
        self.principles = load_principles(principles)
        self.sampled, self.seed = sampled, seed
        self._fixed = named(self.principles, fixed)
        chosen = {p.id for p in load_principles(principles, tags)} if sampled else set[str]()
        # a fixed principle is not sampled again, least of all with the other sign
        free = [p.id in chosen and not sign for p, sign in zip(self.principles, self._fixed, strict=True)]
        weights = [p.weight if may else 0.0 for p, may in zip(self.principles, free, strict=True)]
        self._weights = torch.tensor(weights, dtype=torch.float64)

    def statement(self, prompt: Prompt) -> str:
        """The principles of a prompt, as text."""
        key = Key((self.seed, Stream.PRINCIPLES, *prompt.text.encode()))
        signs = list(self._fixed)
        for place in weighted_subset(key.uniforms(len(signs)), self._weights, self.sampled):
            signs[place] = 1.0
        # fixed ones first, as in the repository of the paper
        order = sorted(range(len(signs)), key=lambda place: not self._fixed[place])
        return statement([self.principles[place] for place in order], [signs[place] for place in order])

    def score(self, prompts: Sequence[Prompt], responses: Sequence[Response]) -> RewardOutput:
        """Score ``responses[i]`` as an answer to ``prompts[i]`` with its principles."""
        asked = [self._asked(prompt) for prompt in prompts]
        return as_output(self.reward, self.reward.score(asked, responses), len(responses))

    def learn(self, samples: RoundSamples) -> None:
        """Let the reward learn from the responses of a round, with the principles of their prompts."""

        def earlier(index: int) -> list[Rollout]:
            return self._conditioned(samples.earlier(index))

        super().learn(replace(samples, rollouts=self._conditioned(samples.rollouts), earlier=earlier))

    def _conditioned(self, rollouts: Sequence[Rollout]) -> list[Rollout]:
        return [replace(rollout, prompt=self._asked(rollout.prompt)) for rollout in rollouts]

    def _asked(self, prompt: Prompt) -> Prompt:
        """The prompt with its principles."""
        return conditioned(prompt, self.statement(prompt))
