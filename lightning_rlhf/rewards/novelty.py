"""Novelty as a reward: responses that are unlike those of earlier rounds earn more."""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lightning_rlhf.randomness import Key
from lightning_rlhf.rewards.base import AbstractReward, RewardOutput, RoundSamples
from lightning_rlhf.rewards.embedders import AbstractEmbedder
from lightning_rlhf.runtime.plugins import check_plugin
from lightning_rlhf.types import Prompt, Response, State


class AbstractNoveltyReward(AbstractReward):
    """Learns every round once, before the next one is scored; responses of one round do not lower each other's reward.

    Implement `score` and `remember`.
    """

    @abstractmethod
    def remember(self, responses: Sequence[Response], key: Key) -> None:
        """Learn the responses of the round before; ``key`` has random numbers for it."""

    def learn(self, samples: RoundSamples) -> None:
        """Learn the round before, from the ledger."""
        if samples.index:
            earlier = samples.earlier(samples.index - 1)
            self.remember([rollout.response for rollout in earlier], samples.key)

    def columns_read(self, names: Sequence[str]) -> set[str]:
        """None."""
        del names
        return set()


class CountNoveltyReward(AbstractNoveltyReward):
    """Mean over the n-grams g of a response of 1 / sqrt(1 + N(g)), in (0, 1].

    N(g) is how often g has occurred in responses of earlier rounds, as in count-based exploration (Bellemare et al.
    2016, arXiv 1606.01868). Words are separated by white space; a response with fewer words than ``n`` counts as one
    n-gram.

    Args:
        n: words of an n-gram, >= 1; 0 counts whole responses.
    """

    def __init__(self, n: int = 2) -> None:
        if n < 0:
            raise ValueError(f"CountNoveltyReward.n must be at least 0; got {n}")
        self.n = n
        self._counts: Counter[str] = Counter()

    def score(self, prompts: Sequence[Prompt], responses: Sequence[Response]) -> RewardOutput:
        """Score each response by the counts of its n-grams; float64, [B]."""
        del prompts
        means = []
        for response in responses:
            counts = torch.tensor([self._counts[gram] for gram in self._grams(response)], dtype=torch.float64)
            means.append((1 + counts).rsqrt().mean())
        return RewardOutput(torch.stack(means))

    def remember(self, responses: Sequence[Response], key: Key) -> None:
        """Count the n-grams of the responses."""
        del key
        for response in responses:
            self._counts.update(self._grams(response))

    def state_dict(self) -> dict[str, object]:
        """The counts."""
        return {"counts": dict(self._counts)}

    def load_state_dict(self, state: State) -> None:
        """Restore the counts."""
        self._counts = Counter(state["counts"])

    def _grams(self, response: Response) -> list[str]:
        words = response.text.split()
        if not self.n or len(words) <= self.n:
            return [" ".join(words)]
        return [" ".join(words[i : i + self.n]) for i in range(len(words) - self.n + 1)]


class RNDNoveltyReward(AbstractNoveltyReward):
    """Error of a network that learns to predict a fixed random network on the embeddings of responses.

    Random network distillation, Burda et al. 2018 (arXiv 1810.12894): mean over outputs of (f_hat(y) - f(y))^2, small
    where responses of earlier rounds lie.

    Args:
        embedder: embeds the responses.
        outputs: outputs of the networks, >= 1.
        hidden: width of their hidden layer, >= 1.
        steps: optimizer steps of the predictor in each round, >= 1.
        learning_rate: of Adam, > 0.
        seed: decides the random networks.
    """

    def __init__(
        self,
        embedder: AbstractEmbedder,
        outputs: int = 32,
        hidden: int = 64,
        steps: int = 10,
        learning_rate: float = 1e-3,
        seed: int = 0,
    ) -> None:
        check_plugin("RNDNoveltyReward.embedder", embedder, AbstractEmbedder)
        if min(outputs, hidden, steps) < 1 or not learning_rate > 0:
            raise ValueError(
                f"RNDNoveltyReward needs outputs, hidden and steps >= 1 and learning_rate > 0; got {outputs}, "
                f"{hidden}, {steps} and {learning_rate}"
            )
        self.embedder, self.outputs, self.hidden = embedder, outputs, hidden
        self.steps, self.learning_rate, self.seed = steps, learning_rate, seed
        self._networks: tuple[nn.Module, nn.Module, torch.optim.Adam] | None = None

    def score(self, prompts: Sequence[Prompt], responses: Sequence[Response]) -> RewardOutput:
        """Prediction error on each response; float32, [B]."""
        del prompts
        with torch.no_grad():
            return RewardOutput(self._errors(self.embedder.embed([response.text for response in responses])))

    def remember(self, responses: Sequence[Response], key: Key) -> None:
        """Train the predictor on the responses, all in one batch."""
        del key
        embedded = self.embedder.embed([response.text for response in responses])
        _, _, optimizer = self._parts(embedded.shape[1])
        for _ in range(self.steps):
            loss = self._errors(embedded).mean()
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()

    def state_dict(self) -> dict[str, object]:
        """Predictor and its optimizer; empty before the first round. The target follows from the seed."""
        if self._networks is None:
            return {}
        _, predictor, optimizer = self._networks
        return copy.deepcopy({"predictor": predictor.state_dict(), "optimizer": optimizer.state_dict()})

    def load_state_dict(self, state: State) -> None:
        """Restore `state_dict`; an empty state is that before the first round."""
        self._networks = None
        if state:
            _, predictor, optimizer = self._parts(state["predictor"]["0.weight"].shape[1])
            predictor.load_state_dict(state["predictor"])
            optimizer.load_state_dict(copy.deepcopy(state["optimizer"]))

    def _errors(self, embedded: Tensor) -> Tensor:
        target, predictor, _ = self._parts(embedded.shape[1])
        errors: Tensor = (predictor(embedded) - target(embedded)).square().mean(-1)
        return errors

    def _parts(self, width: int) -> tuple[nn.Module, nn.Module, torch.optim.Adam]:
        if self._networks is None:
            target, predictor = (self._network(width, part) for part in (0, 1))
            target.requires_grad_(False)
            self._networks = target, predictor, torch.optim.Adam(predictor.parameters(), lr=self.learning_rate)
        return self._networks

    def _network(self, width: int, part: int) -> nn.Module:
        # torch's global generator initializes layers; the numbers of the run must not move
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(Key((self.seed, part)).seed())
            return nn.Sequential(nn.Linear(width, self.hidden), nn.ReLU(), nn.Linear(self.hidden, self.outputs))
