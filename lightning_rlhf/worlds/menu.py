"""The world "menu": a tiny transformer that orders dishes for a guest, and an oracle whose taste is a formula.

A prompt names a guest, a day and the weather; the response is a short list of dishes. A generated corpus teaches the
model which dishes follow each other; the oracle shares the tastes of the guest, and dislikes repetition. Policy,
prompts and reward are functions of fixed seeds, so that everybody has the same world:

    lightning-rlhf fit --config worlds/menu
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product

import torch

from lightning_rlhf.models.builtin.menu import _PLACE, _TASTE, _TASTES, DAYS, DISHES, GUESTS, VERSION, WEATHERS
from lightning_rlhf.randomness import Key
from lightning_rlhf.rewards.base import AbstractReward, RewardOutput
from lightning_rlhf.types import Prompt, Response
from lightning_rlhf.worlds.prompts import AbstractWorldPrompts


class MenuReward(AbstractReward):
    """Reward of a menu by the tastes of the guest: liking of each dish, added up, minus a price for repetition.

    ``r*(x, y) = scale * (sum over dishes of taste(guest, dish) + weather(weather, dish) - repeats)``, where tastes are
    fixed numbers of mean 0 and standard deviation 1/2, those of the weather 1/4, and ``repeats`` counts dishes that
    were on the menu before. Words that are no dishes count as a repeat.

    Args:
        scale: reward per unit of liking, > 0: with Bradley-Terry labels it sets how decided the oracle is. At 1
            the menus of the reference have rewards of std 1.3 or so.
        tastes: 0 for the world's own tastes; any other number gives independent tastes of the same distribution, for
            judges that are wrong.
    """

    def __init__(self, scale: float = 1.0, tastes: int = 0) -> None:
        # also refuses NaN
        if not 0 < scale < float("inf"):
            raise ValueError(f"MenuReward needs a finite scale > 0; got {scale}")
        self.scale = scale
        generator = Key((VERSION, _TASTE, tastes) if tastes else (VERSION, _TASTE)).generator()
        self._taste, self._weather = taste_tables(generator)

    def score(self, prompts: Sequence[Prompt], responses: Sequence[Response]) -> RewardOutput:
        """Score each menu; the prompt must be one of `MenuPrompts`."""
        values = [self._liking(p.text, r.text) for p, r in zip(prompts, responses, strict=True)]
        return RewardOutput(self.scale * torch.tensor(values, dtype=torch.float64))

    def _liking(self, prompt: str, menu: str) -> float:
        guest, day_weather = guest_and_weather(prompt, type(self).__name__)
        taste, weather = self._taste[guest], self._weather[day_weather]
        seen: set[str] = set()
        total = 0.0
        for dish in menu.split():
            if dish in seen or dish not in _PLACE:
                total -= 1.0
                continue
            seen.add(dish)
            total += taste[_PLACE[dish]] + weather[_PLACE[dish]]
        return total


class MenuHarmonyReward(AbstractReward):
    """A second oracle of the menu, of other tastes: liking and harmony of the dishes, averaged over the menu.

    ``r*(x, y) = scale * 3.7 * mean over dishes of (taste(guest, dish) + weather(weather, dish)
    + harmony(dish before, dish))``, where tastes are fixed numbers of mean 0 and standard deviation 1/2, weather and
    harmony 1/4 and 1/2, independent of those of `MenuReward`; the first dish has none before it. Words that are no
    dishes count as dishes that nobody likes or dislikes.

    There is no term for repeats, and the mean favours no length: on 32 menus of the reference for each training prompt,
    a regression within prompts on length, repeats and log pi_ref, with squares and products, explains 0.4 % of the
    variance, and 22 % of that of `MenuReward`.

    Args:
        scale: factor of the rewards, > 0. At 1 the menus of the reference have rewards of std 1.2 within prompts, as
            with `MenuReward`.
    """

    def __init__(self, scale: float = 1.0) -> None:
        # also refuses NaN
        if not 0 < scale < float("inf"):
            raise ValueError(f"MenuHarmonyReward needs a finite scale > 0; got {scale}")
        self.scale = scale
        generator = Key((VERSION, _HARMONY)).generator()
        self._taste, self._weather = taste_tables(generator)
        harmony = torch.randn(len(DISHES), len(DISHES), generator=generator, dtype=torch.float64)
        self._harmony = (0.5 * harmony).tolist()

    def score(self, prompts: Sequence[Prompt], responses: Sequence[Response]) -> RewardOutput:
        """Score each menu; the prompt must be one of `MenuPrompts`."""
        values = [self._liking(p.text, r.text) for p, r in zip(prompts, responses, strict=True)]
        return RewardOutput(self.scale * _HARMONY_UNIT * torch.tensor(values, dtype=torch.float64))

    def _liking(self, prompt: str, menu: str) -> float:
        guest, weather = guest_and_weather(prompt, type(self).__name__)
        words = menu.split()
        total, before = 0.0, None
        for dish in words:
            place = _PLACE.get(dish)
            if place is not None:
                total += self._taste[guest][place] + self._weather[weather][place]
                if before is not None:
                    total += self._harmony[before][place]
            before = place
        # an empty menu has a reward of 0
        return total / max(len(words), 1)


def taste_tables(generator: torch.Generator) -> tuple[list[list[float]], list[list[float]]]:
    """Sample tastes of guests and weathers: of mean 0 and std 1/2, [guest][dish], and std 1/4, [weather][dish].

    Args:
        generator: random stream of the tastes.
    """
    # low rank: guests resemble each other, so that labels about one teach about others
    guests = torch.randn(len(GUESTS), _TASTES, generator=generator, dtype=torch.float64)
    dishes = torch.randn(_TASTES, len(DISHES), generator=generator, dtype=torch.float64)
    weather = torch.randn(len(WEATHERS), len(DISHES), generator=generator, dtype=torch.float64)
    taste = guests @ dishes
    # mean 0 and std 1/2 over guests and dishes; weather has std 1/4
    return (0.5 * (taste - taste.mean()) / taste.std()).tolist(), (0.25 * weather).tolist()


def guest_and_weather(prompt: str, reader: str) -> tuple[int, int]:
    """Numbers of the guest and of the weather in a prompt of `MenuPrompts`.

    Args:
        prompt: text of the prompt.
        reader: class that reads it, for the message.

    Raises:
        ValueError: if it is no prompt of the world.
    """
    # guest, day, weather are the last words; the day moves no reward
    words = prompt.split()
    try:
        return GUESTS.index(words[-3]), WEATHERS.index(words[-1])
    except (ValueError, IndexError) as error:
        raise ValueError(f"{reader} knows prompts like 'ann monday sun'; got {prompt!r}") from error


class MenuPrompts(AbstractWorldPrompts):
    """Guests, days and weathers: 168 prompts, of which every fourth is held out.

    Args:
        split: ``train`` or ``heldout``.
        repeats: times that each prompt is listed, >= 1: held-out answers are then averaged over as many samples.
    """

    NAME = "menu prompt"

    def texts(self) -> Iterator[tuple[str, bool]]:
        """Give each prompt, and whether it is held out."""
        for i, words in enumerate(product(GUESTS, DAYS, WEATHERS)):
            # 4 and 21 prompts per guest have no common divisor: every guest and weather is held out equally often
            yield " ".join(words), i % 4 == 3


_HARMONY = 4
"""Second part of the key path of `MenuHarmonyReward`; `lightning_rlhf.models.builtin.menu` has those before it."""

_HARMONY_UNIT = 3.7
"""Brings `MenuHarmonyReward` to the std of `MenuReward` on menus of the reference, within prompts."""
