"""People of the world "menu" whose accuracies are set: votes as people give them, for studies of how many to buy."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from lightning_rlhf.annotation.votes import Side, Vote, first_shown, other
from lightning_rlhf.labelers.base import AbstractLabeler, Answer, Memory, Question
from lightning_rlhf.labelers.reward import comparison_key
from lightning_rlhf.labelers.votes import VoteModel, VoteOptions, fit_votes, label_of_votes
from lightning_rlhf.randomness import Key
from lightning_rlhf.rewards.base import AbstractReward, checked_score
from lightning_rlhf.types import Comparison, Label
from lightning_rlhf.worlds.menu import MenuReward


ACCURACIES = (0.63, 0.66, 0.69, 0.71, 0.74, 0.77)
"""Shares of pairs on which people of published studies agree."""
DEFAULT_VOTES = VoteOptions()


class PeopleLabeler(AbstractLabeler):
    """Simulated people who vote for the better response as often as their accuracy says (one-coin model).

    Each pair gets the votes of some people, chosen at random and each once. Votes go to the ledger as those of real
    people do, and become labels by the same rules, so that ``votes.aggregate=weighted`` learns accuracies from closed
    rounds. The answers depend on seed, round, prompt and responses alone.

    Args:
        accuracies: probability of each person to vote for the response with the higher reward, in [0, 1].
        votes_per_pair: votes on each pair, from 1 to the number of people.
        reward: the reward that says which response is better; default: `MenuReward`. Of two equal ones neither is, and
            votes are fair coins.
        votes: how votes become labels.

    Raises:
        ValueError: if a number is out of range.
    """

    whole_rounds = True

    def __init__(
        self,
        accuracies: Sequence[float] = ACCURACIES,
        votes_per_pair: int = 1,
        reward: AbstractReward | None = None,
        votes: VoteOptions = DEFAULT_VOTES,
    ) -> None:
        if not all(0.0 <= accuracy <= 1.0 for accuracy in accuracies):
            raise ValueError(f"accuracies must lie in [0, 1]; got {list(accuracies)}")
        if not 1 <= votes_per_pair <= len(accuracies):
            raise ValueError(f"votes_per_pair must be 1 to the {len(accuracies)} people; got {votes_per_pair}")
        self.accuracies, self.votes_per_pair = list(accuracies), votes_per_pair
        self.reward = reward or MenuReward()
        self.votes = votes
        self._model = VoteModel()

    def recall(self, memory: Memory) -> None:
        """Estimate accuracies and the meaning of strengths from closed rounds."""
        self._model = fit_votes(memory.votes)

    def label(self, comparisons: Sequence[Comparison], key: Key) -> list[Label]:
        """Label comparisons; the votes are not kept."""
        names = [f"pair {place}" for place in range(len(comparisons))]
        return [label_of_votes(votes, self.votes, self._model) for votes in self._cast(comparisons, names, key)]

    def stream(self, questions: Sequence[Question], answered: int, key: Key) -> Iterator[list[tuple[int, Answer]]]:
        """Answer all questions at once, with the votes."""
        del answered
        cast = self._cast([question.comparison for question in questions], [q.id for q in questions], key)
        labels = [label_of_votes(votes, self.votes, self._model) for votes in cast]
        answers = [Answer(label, votes) for label, votes in zip(labels, cast, strict=True)]
        if answers:
            yield list(enumerate(answers))

    def _cast(self, comparisons: Sequence[Comparison], names: Sequence[str], key: Key) -> list[tuple[Vote, ...]]:
        """The votes on each comparison."""
        if not comparisons:
            return []
        prompts = [comparison.prompt for comparison in comparisons]
        responses = [comparison.a for comparison in comparisons] + [comparison.b for comparison in comparisons]
        rewards = checked_score(self.reward, prompts + prompts, responses).tolist()
        found = []
        for place, (comparison, name) in enumerate(zip(comparisons, names, strict=True)):
            gap = rewards[place] - rewards[place + len(comparisons)]
            # a number per person for who votes, and one for how
            uniforms = comparison_key(key, comparison).uniforms(2 * len(self.accuracies)).tolist()
            order = sorted(range(len(self.accuracies)), key=uniforms.__getitem__)
            people = sorted(order[: self.votes_per_pair])
            chances = uniforms[len(self.accuracies) :]
            found.append(tuple(self._vote(person, name, gap, chances[person]) for person in people))
        return found

    def _vote(self, person: int, name: str, gap: float, chance: float) -> Vote:
        accuracy = 0.5 if gap == 0 else self.accuracies[person]
        better: Side = "a" if gap >= 0 else "b"
        who = f"person-{person + 1}"
        verdict = better if chance < accuracy else other(better)
        return Vote(f"{name}/{who}", who, first_shown(who, name), verdict)
