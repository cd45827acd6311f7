"""Splitting one file into rows to train on and held-out rows, by their content rather than by their position."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Literal, get_args

from lightning_rlhf.prompts.messages import turn_text
from lightning_rlhf.types import PromptRow


Part = Literal["all", "train", "heldout"]


def rows_of_part(rows: Sequence[PromptRow], part: Part, heldout_share: float) -> list[PromptRow]:
    """Choose the rows of a part, in their order; see `is_heldout` for the rule.

    Raises:
        ValueError: if there is no such part, or no row in it.
    """
    if part not in get_args(Part):
        raise ValueError(f"part must be one of {', '.join(get_args(Part))}; got {part!r}")
    if not 0.0 < heldout_share < 1.0:
        raise ValueError(f"heldout_share must lie in (0, 1); got {heldout_share}")
    if part == "all":
        return list(rows)
    chosen = [row for row in rows if is_heldout(row, heldout_share) == (part == "heldout")]
    if not chosen:
        raise ValueError(
            f"part={part} with heldout_share={heldout_share} is none of {len(rows)} rows: change the share, or give "
            f"train and held-out rows files of their own"
        )
    return chosen


def is_heldout(row: PromptRow, share: float) -> bool:
    """Whether the first 64 bits of the SHA-256 of a row's first message, read as a fraction, are below a share.

    Rows that begin alike, such as pairs of one conversation, fall on the same side, and adding rows moves none.

    Args:
        row: the row; of a plain prompt, the whole text counts as its first message.
        share: share of the first messages that are held out, in (0, 1).
    """
    first = turn_text(row.messages[0]) if row.messages is not None else row.text
    # the same on every machine, unlike hash()
    digest = hashlib.sha256((first or "").encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64 < share
