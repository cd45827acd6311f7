"""Which transcripts of a judge are trained on: STaR of Generative Reward Models (arXiv 2410.12832)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Choice:
    """The transcripts of a problem that are trained on.

    Args:
        right: position of a transcript with the right verdict; 0 where there is none.
        wrong: position of a transcript with the wrong verdict; that of ``right`` where there is none.
        kept: whether the problem is trained on.
    """

    right: int
    wrong: int
    kept: bool


def choose_transcripts(right: Sequence[bool], *, needs_wrong: bool) -> Choice:
    """Take the first right and the first wrong transcript of a problem.

    Transcripts of a problem are independent samples, so that the first right one is a sample of pi(c, I | I = I*).

    Args:
        right: whether each transcript has the right verdict; at least one transcript.
        needs_wrong: whether a problem without a wrong transcript is dropped, as preference losses demand.
    """
    first_right = next((i for i, is_right in enumerate(right) if is_right), None)
    first_wrong = next((i for i, is_right in enumerate(right) if not is_right), None)
    # all transcripts are wrong: nothing to imitate
    if first_right is None:
        return Choice(0, 0, kept=False)
    if first_wrong is None:
        return Choice(first_right, first_right, kept=not needs_wrong)
    return Choice(first_right, first_wrong, kept=True)
