"""Replies of every shape: a named status or a label, never an exception, from the server or from the journal."""

from __future__ import annotations

import copy
import json
import math
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_rlhf.judging import JudgeServer, ServerError
from lightning_rlhf.judging.options import ChainOfThought, RequestOptions
from lightning_rlhf.judging.replies import UnreadableError, parse_completion, read_labels
from lightning_rlhf.judging.server import _digest
from lightning_rlhf.labelers import ServerLabeler
from lightning_rlhf.randomness import Key
from lightning_rlhf.rewards import ServerScoreReward
from lightning_rlhf.types import Comparison, LabelStatus, Prompt, Response


KEY = Key((0,))
TOP = [{"token": "1", "logprob": math.log(0.7)}, {"token": "2", "logprob": math.log(0.2)}]
GOOD: dict[str, Any] = {
    "id": "x",
    "model": "m",
    "choices": [
        {
            "message": {"role": "assistant", "content": "1", "refusal": None, "reasoning_content": None},
            "finish_reason": "stop",
            "logprobs": {"content": [{**TOP[0], "top_logprobs": TOP}]},
        }
    ],
    "usage": {"prompt_tokens": 10, "completion_tokens": 1},
}
CHOICE = ("choices", 0)
MESSAGE = (*CHOICE, "message")
PLACE = (*CHOICE, "logprobs", "content", 0)


def changed(*path_and_value: Any) -> dict[str, Any]:
    """A good reply with another value at a path."""
    *path, last, value = path_and_value
    reply = copy.deepcopy(GOOD)
    place: Any = reply
    for step in path:
        place = place[step]
    place[last] = value
    return reply


def pair(number: int) -> Comparison:
    # the number stands in the responses, so that the server knows which pair it is asked about
    return Comparison(
        Prompt(number, (1,), "Name a river."),
        Response((1, number), f"The Elbe #{number}#.", "eos"),
        Response((2, number), f"No #{number}#.", "eos"),
    )


def of_number(request: dict[str, Any]) -> int:
    return int(request["messages"][0]["content"].split("#")[1])


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., JudgeServer]:
    def build(endpoint: Any, **options: Any) -> JudgeServer:
        defaults = {"requests": RequestOptions(retries=2, max_wait=0.0), "journal": str(tmp_path / "journal.sqlite")}
        return JudgeServer(endpoint.base_url, "m", **(defaults | options))

    return build


Make = Callable[..., JudgeServer]

INVALID: list[Any] = [
    *(changed("choices", value) for value in (None, [], {}, "x", 1, [None], ["x"], [[]])),
    *(changed(*MESSAGE[:-1], "message", value) for value in (None, [], "x", 1)),
    *(changed(*MESSAGE, "content", value) for value in (1, True, {"text": "1"}, ["1"], [{"type": "text", "text": 1}])),
    *(changed(*CHOICE, "logprobs", value) for value in ([], "x", 1, {"content": "x"}, {"content": 1})),
    *(changed(*CHOICE, "logprobs", "content", value) for value in ([None], ["x"], [[]], [{}], {"0": 1})),
    *(changed(*PLACE, "token", value) for value in (None, 1, ["1"])),
    # a probability in place of its logarithm, numbers that are none, and numbers spelt as text
    *(changed(*PLACE, "logprob", value) for value in (None, "x", "-0.3", True, math.nan, math.inf, 0.7, 10**400, {})),
    *(changed(*PLACE, "top_logprobs", value) for value in ("x", {"1": -0.3}, [None], ["1"], [[]], 3)),
    *(changed(*PLACE, "top_logprobs", 1, "logprob", value) for value in (None, "-1", math.nan, 5.0, False)),
    changed(*PLACE, "top_logprobs", [{"token": str(n), "logprob": 0.0} for n in range(1, 9)]),
    changed(*CHOICE, "finish_reason", "error"),
    {"error": {"message": "upstream fell over"}},
    {"error": "upstream fell over"},
    [GOOD],
    "just text",
    None,
    0,
]
OTHERS: dict[str, list[Any]] = {
    "ok": [
        *(changed("usage", value) for value in (None, [], "x", 3, {}, {"prompt_tokens": None})),
        *(changed("usage", "prompt_tokens", value) for value in ("10", -1, True, 1e300, 10**400, math.nan, 2.5, [])),
        *(changed(*CHOICE, "finish_reason", value) for value in (None, 7, [], "eos", "length")),
        *(changed(*MESSAGE, "refusal", value) for value in (False, "", 0, {"why": "x"})),
        *(changed(*MESSAGE, "reasoning_content", value) for value in ("thought", 3, [])),
        *(changed(field, None) for field in ("id", "model", "unknown")),
        changed(*MESSAGE, "content", [{"type": "thinking", "thinking": []}, {"type": "text", "text": "1"}]),
        changed(*MESSAGE, "content", "\ud800"),
        changed(*PLACE, "logprob", -1e308),
        changed(*PLACE, "top_logprobs", 1, "logprob", -math.inf),
        changed(*PLACE, "top_logprobs", 1, "token", "\udfff"),
        changed(*PLACE, "top_logprobs", None),
    ],
    "invalid": INVALID,
    "truncated": [
        changed(*MESSAGE, {"role": "assistant", "content": None, "reasoning_content": "Let me think"}),
        {"error": {"message": "maximum context length is 10", "code": 400}},
    ],
    "refused": [
        changed(*CHOICE, "finish_reason", "content_filter"),
        changed(*MESSAGE, "refusal", "I will not"),
        {"error": {"message": "blocked", "code": "content_filter"}},
    ],
    "rate_limited": [{"error": {"message": "slow down", "code": 429}}, changed(*CHOICE, {"error": {"code": "429"}})],
    "timeout": [{"error": {"message": "no provider", "code": 502}}],
}


def test_every_shape_of_a_reply_ends_in_its_status_and_leaves_a_journal_that_starts_again(
    faults: ModuleType, make: Make
) -> None:
    shapes = [(status, reply) for status, replies in OTHERS.items() for reply in replies]
    pairs = [pair(0), *(pair(number + 1) for number in range(len(shapes)))]

    def answer(_: int, request: dict[str, Any]) -> Any:
        number = of_number(request)
        return GOOD if number == 0 else faults.Raw(json.dumps(shapes[number - 1][1]))

    with faults.FaultServer(answer) as endpoint:
        for _ in range(2):
            before = len(endpoint.requests)
            labels = ServerLabeler(make(endpoint)).label(pairs, KEY)
            found = {number: label.status for number, label in enumerate(labels[1:])}
            assert found == {number: status for number, (status, _) in enumerate(shapes)}
            assert all(label.meta["fault"] for label in labels if label.status != "ok")
            assert all(label.meta["tokens_in"] >= 0 for label in labels)
            json.dumps([label.meta for label in labels]).encode()
        # what was answered, if only by a refusal, is not asked for again
        again = {of_number(request) for request in endpoint.requests[before:]}
        paid = {number + 1 for number, (status, _) in enumerate(shapes) if status in ("ok", "refused")}
        assert not again & paid - {len(shapes) - 3}
        reward = ServerScoreReward(make(endpoint), unscored=-1.0)
        scored = reward.score([p.prompt for p in pairs], [p.a for p in pairs]).mean
    assert scored.isfinite().all()


@pytest.mark.parametrize("body", ["", "NaN", "[" * 5000, '{"a":' * 5000, "\ufeff" + json.dumps(GOOD), "1" * 5000])
def test_bodies_that_are_no_json_or_oddly_coded(faults: ModuleType, make: Make, body: str) -> None:
    with faults.FaultServer(lambda _, request: faults.Raw(body) if of_number(request) else GOOD) as endpoint:
        labels = ServerLabeler(make(endpoint)).label([pair(0), pair(1)], KEY)
    assert labels[0].status == "ok"
    expected = "ok" if body.startswith("\ufeff") else "truncated" if body.startswith("{") else "invalid"
    assert labels[1].status == expected


def test_a_reply_that_is_too_large_is_invalid_and_not_kept(faults: ModuleType, make: Make, tmp_path: Path) -> None:
    huge = changed(*MESSAGE, "content", "1" * (17 * 2**20))
    with faults.FaultServer(lambda _, request: huge if of_number(request) else GOOD) as endpoint:
        labels = ServerLabeler(make(endpoint)).label([pair(0), pair(1)], KEY)
    assert [label.status for label in labels] == ["ok", "invalid"]
    assert (tmp_path / "journal.sqlite").stat().st_size < 2**20


def empty(finish: str, **message: Any) -> dict[str, Any]:
    reply = changed(*MESSAGE, {"role": "assistant", "content": None, **message})
    reply["choices"][0] |= {"finish_reason": finish, "logprobs": None}
    return reply


@pytest.mark.parametrize(
    ("reply", "status"),
    [
        (empty("length", reasoning_content="Let me think"), "truncated"),
        (empty("length"), "truncated"),
        (empty("stop", reasoning="It is"), "truncated"),
        (empty("stop"), "invalid"),
        (empty("tool_calls", tool_calls=[]), "invalid"),
    ],
)
def test_an_empty_rationale_is_no_rationale(faults: ModuleType, make: Make, reply: Any, status: str) -> None:
    with faults.FaultServer(lambda _, request: GOOD if "logprobs" in request else reply) as endpoint:
        for _ in range(2):
            (label,) = ServerLabeler(make(endpoint), chain_of_thought=ChainOfThought()).label([pair(0)], KEY)
            assert label.status == status
            assert label.probability is None
            # the tokens were paid
            assert label.meta["tokens_in"] == 20
        assert len(endpoint.requests) == 2
    assert ("enable_thinking" in str(label.meta["fault"])) == (status == "truncated")


def test_a_rationale_that_the_limit_cuts_is_used(faults: ModuleType, make: Make) -> None:
    reply = changed(*CHOICE, "finish_reason", "length")
    with faults.FaultServer(lambda _, __: reply) as endpoint:
        (label,) = ServerLabeler(make(endpoint), chain_of_thought=ChainOfThought()).label([pair(0)], KEY)
    assert label.status == "ok"


UNUSABLE = [
    b"",
    b"\xff\xfe\x00",
    b"{}",
    json.dumps(changed("choices", [])).encode(),
    json.dumps(changed(*PLACE, "logprob", None)).encode(),
    json.dumps(changed(*CHOICE, "logprobs", None)).encode(),
    b'{"choices": [{"mess',
]


def test_what_an_earlier_version_left_in_the_journal_is_asked_for_again_once(
    faults: ModuleType, make: Make, tmp_path: Path
) -> None:
    pairs = [pair(number) for number in range(len(UNUSABLE) + 1)]
    with faults.FaultServer(lambda *_: GOOD) as endpoint:
        (expected, *_) = ServerLabeler(make(endpoint)).label(pairs, KEY)
        bought = list(endpoint.requests)
        with sqlite3.connect(tmp_path / "journal.sqlite") as journal:
            for request in bought:
                body = [*UNUSABLE, json.dumps(changed("usage", "prompt_tokens", "10")).encode()][of_number(request)]
                name = _digest(endpoint.base_url, request)
                assert journal.execute("UPDATE logps SET value = ? WHERE key = ?", (body, name)).rowcount == 1
        for asked in (2 * len(UNUSABLE), 0):
            before = len(endpoint.requests)
            labels = ServerLabeler(make(endpoint)).label(pairs, KEY)
            assert [label.status for label in labels] == ["ok"] * len(pairs)
            assert {label.probability for label in labels} == {expected.probability}
            assert len(endpoint.requests) - before == asked


def test_a_wrong_key_that_is_reported_with_status_200_stops_the_run(faults: ModuleType, make: Make) -> None:
    reply = {"error": {"message": "no such key", "code": 401}}
    with (
        faults.FaultServer(lambda *_: reply) as endpoint,
        pytest.raises(ServerError, match=r"no such key.*api_key_env"),
    ):
        ServerLabeler(make(endpoint)).label([pair(0), pair(1)], KEY)
    assert len(endpoint.requests) == 1


# ---- any value at any place --------------------------------------------------------------------------------------

NUMBERS = st.integers() | st.floats() | st.sampled_from([10**400, -(10**400), -0.0])
SCALARS = st.none() | st.booleans() | NUMBERS | st.text(max_size=4) | st.sampled_from(["1", "2", " 1", "10", "length"])
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)


def paths(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, inner in items:
        yield from paths(inner, (*path, name))


PATHS = [path for path in paths(GOOD) if path]


@st.composite
def replies(draw: st.DrawFn) -> Any:
    reply = copy.deepcopy(GOOD)
    for _ in range(draw(st.integers(1, 3))):
        *path, last = draw(st.sampled_from(PATHS))
        place: Any = reply
        try:
            for step in path:
                place = place[step]
            place[last] = draw(VALUES)
        except (IndexError, KeyError, TypeError, AttributeError):
            continue  # an earlier change has taken the place away
    return reply


@settings(max_examples=400, deadline=None, derandomize=True)
@given(replies() | VALUES)
def test_any_reply_is_read_or_refused_as_unreadable(reply: Any) -> None:
    try:
        completion = parse_completion(json.dumps(reply))
    except UnreadableError:
        return
    completion.text.encode()
    completion.refusal.encode()
    assert all(count is None or 0 <= count <= 10**9 for count in (completion.tokens_in, completion.tokens_out))
    if completion.places is not None:
        for labels in (["1", "2"], [str(n) for n in range(1, 11)], ["yes", "no"]):
            reading = read_labels(completion, labels)
            assert 0 <= reading.mass <= 1
            assert reading.logps.isfinite().all()
            assert (reading.logps <= 1e-9).all()


@settings(max_examples=3, deadline=None, derandomize=True)
@given(st.lists(replies() | VALUES, min_size=40, max_size=40))
def test_no_reply_makes_a_labeler_raise(faults: ModuleType, tmp_path_factory: Any, many: list[Any]) -> None:
    journal = str(tmp_path_factory.mktemp("journal") / "journal.sqlite")

    def answer(_: int, request: dict[str, Any]) -> Any:
        number = of_number(request)
        return GOOD if number == 0 else faults.Raw(json.dumps(many[number - 1]))

    pairs = [pair(number) for number in range(len(many) + 1)]
    with faults.FaultServer(answer) as endpoint:
        for thinking in (False, True, False):
            server = JudgeServer(
                endpoint.base_url, "m", requests=RequestOptions(retries=2, max_wait=0.0), journal=journal
            )
            labels = ServerLabeler(server, chain_of_thought=ChainOfThought() if thinking else None).label(pairs, KEY)
            assert {label.status for label in labels} <= set(get_args(LabelStatus))
            assert labels[0].status == "ok"
            json.dumps([label.meta for label in labels]).encode()
