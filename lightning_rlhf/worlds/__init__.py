"""Worlds small enough for many seeds, whose oracles are functions, so that samplers can be compared by the truth."""

from __future__ import annotations

from pathlib import Path

from lightning_rlhf.worlds.judges import MenuJudgeLabeler, MenuScoreReward
from lightning_rlhf.worlds.menu import MenuPrompts, MenuReward, menu_policy
from lightning_rlhf.worlds.stories import StoryPrompts, stories_policy
from lightning_rlhf.worlds.tabular import Objective, TabularWorld


__all__ = [
    "MenuJudgeLabeler",
    "MenuPrompts",
    "MenuReward",
    "MenuScoreReward",
    "Objective",
    "StoryPrompts",
    "TabularWorld",
    "menu_policy",
    "stories_policy",
    "world_policy",
]

POLICIES = {"menu": menu_policy, "stories": stories_policy}
"""Folders of policies by the name of their world."""


def world_policy(name: str) -> Path:
    """The folder of the policy of a world, made on the first call.

    Raises:
        FileNotFoundError: if there is no such world.
    """
    if name not in POLICIES:
        raise FileNotFoundError(f"policy 'world:{name}': there is no such world; the worlds are {', '.join(POLICIES)}")
    return POLICIES[name]()
