"""Policies by name: ``world:menu``, ``world:stories``."""

from __future__ import annotations

from pathlib import Path

from lightning_rlhf.models.builtin.menu import menu_policy
from lightning_rlhf.models.builtin.stories import stories_policy


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
