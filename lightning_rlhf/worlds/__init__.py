"""Worlds small enough for many seeds, whose oracles are functions, so that samplers can be compared by the truth."""

from __future__ import annotations

from lightning_rlhf.models.builtin.menu import menu_policy
from lightning_rlhf.models.builtin.policies import world_policy
from lightning_rlhf.models.builtin.stories import stories_policy
from lightning_rlhf.worlds.judges import MenuJudgeLabeler, MenuScoreReward
from lightning_rlhf.worlds.menu import MenuHarmonyReward, MenuPrompts, MenuReward
from lightning_rlhf.worlds.menu_demonstrations import MenuDemonstrations
from lightning_rlhf.worlds.people import PeopleLabeler
from lightning_rlhf.worlds.stories import StoryPrompts, StorySizeReward
from lightning_rlhf.worlds.tabular import Objective, TabularWorld


__all__ = [
    "MenuDemonstrations",
    "MenuHarmonyReward",
    "MenuJudgeLabeler",
    "MenuPrompts",
    "MenuReward",
    "MenuScoreReward",
    "Objective",
    "PeopleLabeler",
    "StoryPrompts",
    "StorySizeReward",
    "TabularWorld",
    "menu_policy",
    "stories_policy",
    "world_policy",
]
