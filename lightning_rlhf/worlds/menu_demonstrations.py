"""Demonstrations in the world "menu": menus of the corpus, of which the guest likes the best of a few."""

from __future__ import annotations

from itertools import product

import torch

from lightning_rlhf.models.builtin.menu import DAYS, DISHES, GUESTS, WEATHERS, corpus_menus
from lightning_rlhf.prompts.base import AbstractPromptSource
from lightning_rlhf.randomness import Key
from lightning_rlhf.types import Prompt, PromptRow, Response
from lightning_rlhf.worlds.menu import MenuPrompts, MenuReward


class MenuDemonstrations(AbstractPromptSource):
    """Menus to imitate: for each training prompt of `MenuPrompts`, the best of ``best_of`` menus by `MenuReward`.

    The candidates are sampled from the corpus, so that demonstrations are likely under the policy after supervised
    training, and better than its own menus.

    Args:
        count: demonstrations per prompt, >= 1.
        best_of: candidates of each, >= 1; 1 gives menus of the corpus as they are.
        seed: which menus are sampled.
    """

    def __init__(self, count: int = 8, best_of: int = 8, seed: int = 0) -> None:
        if count < 1 or best_of < 1:
            raise ValueError(f"MenuDemonstrations needs count and best_of >= 1; got {count} and {best_of}")
        self.count, self.best_of, self.seed = count, best_of, seed

    def load(self) -> list[PromptRow]:
        """Sample the candidates and keep the best."""
        reward = MenuReward()
        rows: list[PromptRow] = []
        numbers = {" ".join(words): i for i, words in enumerate(product(GUESTS, DAYS, WEATHERS))}
        for number, row in enumerate(MenuPrompts("train").load()):
            text = row.text or ""
            guest, rest = divmod(numbers[text], len(DAYS) * len(WEATHERS))
            day, weather = divmod(rest, len(WEATHERS))
            # <start>, guest, day, weather: ids as in the vocabulary of the policy
            ids = torch.tensor([[1, 2 + guest, 10 + day, 17 + weather]]).expand(self.count * self.best_of, 4)
            menus, _ = corpus_menus(ids, Key((self.seed, _DEMONSTRATIONS, number)).generator())
            texts = [" ".join(DISHES[dish] for dish in menu if dish >= 0) for menu in menus.tolist()]
            responses = [Response((0,), menu, "eos", source="dataset") for menu in texts]
            scores = reward.score([Prompt(number, (0,), text)] * len(texts), responses).mean
            best = scores.view(self.count, self.best_of).argmax(1)
            for sample, place in enumerate(best.tolist()):
                menu = texts[sample * self.best_of + place]
                rows.append(PromptRow(f"menu demonstration {len(rows)}", text=text, completion=menu))
        return rows


_DEMONSTRATIONS = 5
"""Second part of the key path of `MenuDemonstrations`, behind that of `MenuHarmonyReward`."""
