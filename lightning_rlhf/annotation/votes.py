"""Votes of people, as plain data: what a browser sends, what is kept, and which response a person sees first."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Literal, TypeAlias, cast, get_args


Side = Literal["a", "b"]
Verdict = Literal["a", "b", "tie", "both_bad", "skip"]
Screen = Literal["left", "right", "tie", "both_bad", "skip"]
Kept = Literal["kept", "again", "late"]
JSON: TypeAlias = dict[str, object]
"""An object of JSON."""

STRENGTHS = {1: "slightly better", 2: "better", 3: "much better"}
"""How much better a response is, as HelpSteer2 and HelpSteer3 ask for it."""
SIDE_FLAGS = ("unsafe", "broken")
"""Flags of a response; in a ballot ``unsafe_left``, in a vote ``unsafe_a``."""
PROMPT_FLAGS = ("nonsense_prompt", "personal_data")
SKIP_REASONS = ("cannot_judge", "wrong_language", "offensive", "technical", "other")
MOST_RATIONALE = 2000
"""Characters of a rationale."""

_UID = re.compile(r"[\w-]{8,64}")


@dataclass(frozen=True)
class Ballot:
    """A verdict as a browser sends it: in sides of the screen.

    Args:
        pair: public id of the pair.
        uid: made in the browser, so that a ballot which is sent twice counts once.
        side: the better response, or why there is none.
        strength: 1 to 3, see `STRENGTHS`; None if not asked for.
        reason: why the pair was skipped, one of `SKIP_REASONS`; empty otherwise.
        flags: of `SIDE_FLAGS` with ``_left`` or ``_right``, and of `PROMPT_FLAGS`.
        rationale: free text, at most `MOST_RATIONALE` characters.
        seconds: time during which the page was visible and focused.
        rendered: ``markdown`` or ``raw``.
    """

    pair: str
    uid: str
    side: Screen
    strength: int | None = None
    reason: str = ""
    flags: tuple[str, ...] = ()
    rationale: str = ""
    seconds: float = 0.0
    rendered: str = "markdown"


@dataclass(frozen=True)
class Vote:
    """A verdict as it is kept: in sides of the comparison.

    Args:
        uid: unique; importing a vote twice is harmless.
        annotator: pseudonym.
        first: the response that was shown first.
        verdict: the better response, or why there is none.
        strength: 1 to 3; None where there is no better response, or strength was not asked for.
        reason: why the pair was skipped.
        flags: ``unsafe_a``, ``unsafe_b``, ``broken_a``, ``broken_b``, ``nonsense_prompt``, ``personal_data``.
        rationale: free text.
        seconds: active time on the pair.
        shown: when the pair was shown, seconds since the epoch.
        time: when the vote arrived, seconds since the epoch.
        rendered: ``markdown`` or ``raw``.
        guidelines: hash of the guidelines in force; empty if there were none.
        supersedes: uid of an earlier vote of the same person that this one corrects; empty if none.
        late: whether it came after the label was final; it then counts in statistics only.
    """

    uid: str
    annotator: str
    first: Side
    verdict: Verdict
    strength: int | None = None
    reason: str = ""
    flags: tuple[str, ...] = ()
    rationale: str = ""
    seconds: float = 0.0
    shown: float = 0.0
    time: float = 0.0
    rendered: str = "markdown"
    guidelines: str = ""
    supersedes: str = ""
    late: bool = False

    @property
    def value(self) -> float | None:
        """1 for a, 0 for b, 1/2 for a tie or two bad responses; None for a skip, which is no verdict."""
        return {"a": 1.0, "b": 0.0, "tie": 0.5, "both_bad": 0.5, "skip": None}[self.verdict]

    @property
    def signed(self) -> int | None:
        """-3 (b much better) to 3 (a much better), 0 for ties; a missing strength counts 1. None for a skip."""
        if self.verdict == "skip":
            return None
        return {"a": 1, "b": -1}.get(self.verdict, 0) * (self.strength or 1)

    def to_json(self) -> JSON:
        """The vote as an object of JSON."""
        return {**asdict(self), "flags": list(self.flags)}


def vote_of(row: Mapping[str, object]) -> Vote:
    """Read `Vote.to_json`; other entries of the row are left out.

    Raises:
        ValueError: if an entry is missing or of the wrong kind.
    """
    known = {field.name: row[field.name] for field in fields(Vote) if field.name in row}
    flags = known.get("flags", ())
    flags = json.loads(flags) if isinstance(flags, str) else flags
    try:
        vote = Vote(**{**known, "flags": tuple(cast(list[str], flags)), "late": bool(known.get("late", False))})  # type: ignore[arg-type]
    except TypeError as error:
        raise ValueError(f"a vote needs uid, annotator, first and verdict; got {sorted(known)}") from error
    if vote.verdict not in get_args(Verdict) or vote.first not in get_args(Side):
        raise ValueError(f"vote {vote.uid!r} has verdict {vote.verdict!r} and first {vote.first!r}")
    return vote


def read_ballot(row: Mapping[str, object]) -> Ballot:
    """Check what a browser sent.

    Raises:
        ValueError: naming the field.
    """
    flags = row.get("flags", [])
    if not isinstance(flags, list) or not set(flags) <= _known_flags():
        raise ValueError(f"flags must be a list of {', '.join(sorted(_known_flags()))}; got {flags!r:.80}")
    strength, seconds = row.get("strength"), row.get("seconds", 0.0)
    ballot = Ballot(
        pair=_text(row, "id", 64),
        uid=_text(row, "uid", 64),
        side=cast(Screen, _text(row, "side", 16)),
        strength=cast(int | None, strength),
        reason=_text(row, "reason", 40),
        flags=tuple(sorted(flags)),
        rationale=_text(row, "rationale", MOST_RATIONALE),
        # a clock that was set back must not make the time negative
        seconds=min(max(float(seconds), 0.0), 86400.0) if isinstance(seconds, int | float) else 0.0,
        rendered="raw" if row.get("rendered") == "raw" else "markdown",
    )
    if not _UID.fullmatch(ballot.uid):
        raise ValueError(f"uid must be 8 to 64 letters, digits, - or _; got {ballot.uid!r}")
    if ballot.side not in get_args(Screen):
        raise ValueError(f"side must be one of {', '.join(get_args(Screen))}; got {ballot.side!r}")
    # booleans are integers in Python
    if strength is not None and (strength not in STRENGTHS or isinstance(strength, bool)):
        raise ValueError(f"strength must be 1, 2 or 3; got {strength!r}")
    if strength is not None and ballot.side not in ("left", "right"):
        raise ValueError(f"strength needs a better response; side is {ballot.side!r}")
    if ballot.side == "skip" and ballot.reason not in SKIP_REASONS:
        raise ValueError(f"a skipped pair needs a reason, one of {', '.join(SKIP_REASONS)}; got {ballot.reason!r}")
    return ballot


def verdict_of(side: Screen, first: Side) -> Verdict:
    """A side of the screen as a side of the comparison; the first response is on the left."""
    if side in ("tie", "both_bad", "skip"):
        return side
    return first if side == "left" else other(first)


def screen_of(verdict: Verdict, first: Side) -> Screen:
    """The inverse of `verdict_of`."""
    if verdict in ("tie", "both_bad", "skip"):
        return verdict
    return "left" if verdict == first else "right"


def flags_of(flags: tuple[str, ...], first: Side) -> tuple[str, ...]:
    """Flags of a ballot as flags of a vote."""
    sides: dict[str, str] = {"left": first, "right": other(first)}
    return tuple(sorted(_renamed(flag, sides) for flag in flags))


def screen_flags(flags: tuple[str, ...], first: Side) -> tuple[str, ...]:
    """The inverse of `flags_of`."""
    sides: dict[str, str] = {first: "left", other(first): "right"}
    return tuple(sorted(_renamed(flag, sides) for flag in flags))


def other(side: Side) -> Side:
    """The other response."""
    return "b" if side == "a" else "a"


def first_shown(annotator: str, item: str) -> Side:
    """The response that a person sees first: a fair coin per person and pair, the same after a restart.

    Not Python's ``hash``, which differs from process to process, and not one coin per person, which would turn a habit
    of the person into a bias of the labels.
    """
    return "a" if coin(annotator, item) < 0.5 else "b"


def coin(*parts: object) -> float:
    """A uniform number in [0, 1) that depends on its arguments alone."""
    # JSON separates the parts, so that ("ab", "c") and ("a", "bc") differ
    digest = hashlib.blake2b(json.dumps([str(part) for part in parts]).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


def item_key(run: str, comparison: int | str, attempt: int = 0) -> str:
    """Name of a pair at the server: pushing it twice is harmless, and it says nothing of the run."""
    text = json.dumps([run, str(comparison), attempt])
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _known_flags() -> set[str]:
    left, right = {f"{flag}_left" for flag in SIDE_FLAGS}, {f"{flag}_right" for flag in SIDE_FLAGS}
    return left | right | set(PROMPT_FLAGS)


def _renamed(flag: str, sides: Mapping[str, str]) -> str:
    name, _, side = flag.rpartition("_")
    return f"{name}_{sides[side]}" if side in sides else flag


def _text(row: Mapping[str, object], name: str, most: int) -> str:
    value = row.get(name, "")
    if not isinstance(value, str) or len(value) > most:
        raise ValueError(f"{name} must be text of at most {most} characters; got {value!r:.80}")
    # a lone surrogate could not be stored
    return value.encode("utf-8", "replace").decode()
