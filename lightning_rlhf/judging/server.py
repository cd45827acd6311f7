"""A judge behind an OpenAI-compatible endpoint: vLLM, SGLang, llama.cpp, hosted models; extra ``server``.

Requests cost money or time, so a reply is on the disk before it is used, and is never asked for again. One request
finds out whether a server gives log-probabilities.
"""

from __future__ import annotations

import asyncio
import email.utils
import hashlib
import importlib
import json
import os
import random
import re
import sqlite3
import time
import warnings
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import Protocol, TypeVar
from urllib.parse import urlsplit

from lightning_rlhf.judging.options import DEFAULT_PRICES, DEFAULT_REQUESTS, Prices, RequestOptions
from lightning_rlhf.judging.prompts import JudgePrompt
from lightning_rlhf.judging.replies import (
    Completion,
    Reading,
    UnreadableError,
    completed,
    parse_completion,
    read_labels,
)
from lightning_rlhf.models.cache import cache_folder
from lightning_rlhf.models.reference_cache import LogpsFile
from lightning_rlhf.renamed import accepts_old_names
from lightning_rlhf.types import LabelStatus


T = TypeVar("T")


class HTTPBody(Protocol):
    """The body of a response of httpx."""

    @property
    def content(self) -> bytes:
        """The bytes as they came."""


class RawResponse(Protocol):
    """A raw response of the client library."""

    @property
    def http_response(self) -> HTTPBody:
        """The response of httpx."""

    @property
    def headers(self) -> Mapping[str, str]:
        """The headers."""


Create = Callable[..., Awaitable[RawResponse]]
"""Sends the fields of a chat completion."""


class ServerError(RuntimeError):
    """The endpoint cannot be used as it is set up; the message names the setting to change."""


@dataclass(frozen=True)
class Usage:
    """Tokens of requests; a reply that is there twice counts once, for it was paid once.

    Args:
        replies: tokens of the prompt and tokens that were generated, by a short name of the reply.
    """

    replies: Mapping[str, tuple[int, int]] = field(default_factory=dict)

    def __add__(self, other: Usage) -> Usage:
        return Usage({**self.replies, **other.replies})

    @property
    def tokens_in(self) -> int:
        """Tokens of prompts."""
        return sum(tokens for tokens, _ in self.replies.values())

    @property
    def tokens_out(self) -> int:
        """Tokens that were generated."""
        return sum(tokens for _, tokens in self.replies.values())

    @property
    def requests(self) -> int:
        """Requests that were answered."""
        return len(self.replies)


class UnansweredError(Exception):
    """A request that ended without an answer.

    Args:
        status: status of the label.
        fault: the reason, in words.
        usage: tokens of the request.
    """

    def __init__(self, status: LabelStatus, fault: str, usage: Usage | None = None) -> None:
        super().__init__(fault)
        self.status, self.fault, self.usage = status, fault, usage or Usage()


@dataclass(frozen=True)
class Fault:
    """How one attempt at a request failed.

    Args:
        status: status of the label if there is no other attempt.
        message: the reason, in words.
        again: whether another attempt may help.
        fatal: whether every other request would fail alike.
        retry_after: seconds that the server asks to wait.
    """

    status: LabelStatus
    message: str
    again: bool = False
    fatal: bool = False
    retry_after: float | None = None


@dataclass(frozen=True)
class _Answer:
    """A reply as it came, and parsed."""

    body: str
    completion: Completion


@accepts_old_names("JudgeServer")
class JudgeServer:
    """An OpenAI-compatible endpoint that judges, through the chat completions with log-probabilities.

    **Journal.** Every usable reply is committed to a SQLite file before it counts. A run that is killed and started
    again asks only for requests in flight; a second run with the same questions asks for nothing. A reply is found by
    endpoint, model name and the whole request: give other weights another model name, or another journal.

    **Retries.** Transient failures are retried, ``requests.retries`` times: no answer within ``timeout``, no
    connection, HTTP 408, 409, 425, 429 and 5xx, and replies that are no chat completion. The wait before the n-th retry
    is uniform between 0 and 0.5 * 2^(n-1) seconds, ``max_wait`` at most; if the server says Retry-After, it comes on
    top of that, and a server that asks for more than ``max_wait`` is not asked again. The client library does not retry
    by itself. A request keeps its place among the ``concurrency`` while it waits, so that an overloaded server gets
    fewer.

    **Statuses.** ``rate_limited``: HTTP 429 to the end. ``timeout``: no answer, no connection, or HTTP 5xx to the end.
    ``refused``: the model or a content filter refused. ``truncated``: the prompt is too long for the model, or the JSON
    of the reply broke off. ``invalid``: anything else that is no answer. A failure that would hit all requests is an
    error instead: a wrong key, model or address, an account without money, a server that gives no log-probabilities. To
    find out, the first request is sent alone.

    Args:
        base_url: address of the API, e.g. ``http://127.0.0.1:8080/v1``.
        model: name of the model on the server.
        api_key_env: environment variable that holds the API key; a server without keys needs none. The key itself
            belongs in no config: it is read when a request is sent, and written nowhere.
        assistant_prefill: let the ending begin the answer, for servers that go on with a trailing turn of the assistant
            (llama.cpp, vLLM, SGLang); default: it stands at the end of the user's turn.
        top_logprobs: most probable tokens that are listed per place, >= 2; OpenAI gives 20 at most, some hosts 5.
        requests: how many requests are sent at once, and how they are retried.
        prices: prices of prompt tokens and generated tokens.
        extra: further fields of every request, e.g. ``{chat_template_kwargs: {enable_thinking: false}}``.
        journal: SQLite file of the replies; default: ``judge_calls.sqlite`` in the cache folder.

    Raises:
        ImportError: if the package ``openai`` is missing.
        ValueError: if an option is out of range, the address holds a secret, or the variable of the key is not set.
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        api_key_env: str | None = None,
        assistant_prefill: bool = False,
        top_logprobs: int = 20,
        requests: RequestOptions = DEFAULT_REQUESTS,
        prices: Prices = DEFAULT_PRICES,
        extra: dict[str, object] | None = None,
        journal: str | None = None,
    ) -> None:
        # with one token listed, the second label could never be read
        if top_logprobs < 2:
            raise ValueError(f"top_logprobs must be >= 2; got {top_logprobs}")
        _check_address(base_url)
        _import_openai()
        self.base_url, self.model, self.api_key_env = base_url.rstrip("/"), model, api_key_env
        self.assistant_prefill, self.top_logprobs = assistant_prefill, top_logprobs
        self.requests, self.prices = requests, prices
        self.extra = dict(extra or {})
        self.journal = Path(journal).expanduser() if journal else cache_folder() / "judge_calls.sqlite"
        self._key()  # fails now, not after a policy is trained, where the variable is not set
        self.met = False
        """Whether a request has been sent."""
        self.gives_logprobs = False
        """Whether a reply had log-probabilities."""
        self.worked_before = False
        """Whether one had them in this process or in an earlier one with the same journal."""
        self._requests = self._tokens_in = self._tokens_out = 0
        self._tries = self._from_journal = self._most_in_flight = 0
        self._busy = self._wall = 0.0

    def ask(self, chains: Sequence[Callable[[Session], Awaitable[T]]]) -> list[T]:
        """Run chains of requests side by side and return their results, in order.

        Args:
            chains: each takes the session and awaits one answer after the other.

        Raises:
            ServerError: if the endpoint cannot be used as it is set up.
            OSError: if the journal cannot be written.
        """
        # no connection, and no journal, for nothing
        if not chains:
            return []
        with _explained(self.journal):
            LogpsFile(self.journal).put({b"": b"judge calls"})  # before any reply is paid for
            return _run(self._ask(chains))

    def costs(self, usage: Usage) -> dict[str, float]:
        """Cost of each reply by its name, in the unit of ``prices``."""
        return {name: self._cost(*tokens) for name, tokens in usage.replies.items()}

    def report(self) -> dict[str, float]:
        """Requests of this process so far.

        ``requests`` answered, ``tries`` sent, ``from_journal`` answered without asking, ``tokens_in``, ``tokens_out``,
        ``cost``; ``in_flight``, the mean number of requests at the server while it was asked, and ``most_in_flight``.
        """
        return {
            "requests": float(self._requests),
            "tries": float(self._tries),
            "from_journal": float(self._from_journal),
            "tokens_in": float(self._tokens_in),
            "tokens_out": float(self._tokens_out),
            "cost": self._cost(self._tokens_in, self._tokens_out),
            "in_flight": self._busy / self._wall if self._wall else 0.0,
            "most_in_flight": float(self._most_in_flight),
        }

    def _cost(self, tokens_in: int, tokens_out: int) -> float:
        return (tokens_in * self.prices.input + tokens_out * self.prices.output) / 1e6

    async def _ask(self, chains: Sequence[Callable[[Session], Awaitable[T]]]) -> list[T]:
        start, busy = time.perf_counter(), self._busy
        async with self._connection() as create:
            session = Session(self, create)
            results: list[T] = []
            # the first request goes alone: a wrong key or model fails once, not once per place
            while len(results) < len(chains) and not self.met:
                results.append(await chains[len(results)](session))

            async def awaited(chain: Callable[[Session], Awaitable[T]]) -> T:
                try:
                    return await chain(session)
                except Exception as error:
                    session.stopped = session.stopped or error
                    raise

            # an error stops requests that are not sent yet; those at the server are paid for, and kept
            found = await asyncio.gather(*map(awaited, chains[len(results) :]), return_exceptions=True)
            if session.stopped is not None:
                raise session.stopped
        if self._busy > busy:
            self._wall += time.perf_counter() - start
        return results + [result for result in found if not isinstance(result, BaseException)]

    @asynccontextmanager
    async def _connection(self) -> AsyncIterator[Create]:
        """A connection pool that is closed at the end."""
        client = _import_openai().AsyncOpenAI(
            base_url=self.base_url,
            api_key=self._key() or "none",
            max_retries=0,  # retries are counted here, and noted in the labels
            timeout=self.requests.timeout,
        )
        async with client:
            yield client.chat.completions.with_raw_response.create

    def _key(self) -> str:
        # local servers need no key
        if self.api_key_env is None:
            return ""
        # the value is never shown: it may be the key
        if not re.fullmatch(r"[A-Z_][A-Z0-9_]*", self.api_key_env):
            raise ValueError(
                "api_key_env must be the name of an environment variable, such as OPENAI_API_KEY, in capital letters; "
                "the value is not shown here, because it may be the key itself: if so, take it out of the config"
            )
        key = os.environ.get(self.api_key_env, "").strip()  # files with secrets end in a line feed
        if not key:
            raise ValueError("the environment variable that api_key_env names is not set: export it, and start again")
        if not (key.isascii() and key.isprintable() and " " not in key):
            raise ValueError(
                "the environment variable that api_key_env names holds no key: it has spaces, line feeds or letters "
                "that no header can carry; export the key alone, and start again"
            )
        return key

    def _without_key(self, text: str) -> str:
        key = self._key()
        # a placeholder for local servers, such as EMPTY, is no secret, and may be a word of the reply
        return text.replace(key, "[API key]") if len(key) >= 8 else text


class Session:
    """One call of `JudgeServer.ask`: a connection pool, and the requests through it.

    Args:
        server: the endpoint.
        create: sends a request and returns the raw response, as ``openai.AsyncOpenAI`` does.
    """

    def __init__(self, server: JudgeServer, create: Create) -> None:
        self.server, self._create = server, create
        self._places = asyncio.Semaphore(server.requests.concurrency)
        self._journal = LogpsFile(server.journal)
        self._asked: dict[bytes, asyncio.Task[tuple[Completion, Usage]]] = {}
        self._in_flight = 0
        self.stopped: Exception | None = None
        """The error after which nothing more is sent."""
        self._works = _digest("works", server.base_url, server.model)
        server.worked_before = server.worked_before or bool(self._journal.get([self._works]))

    async def read(self, prompt: JudgePrompt, labels: Sequence[str]) -> tuple[Reading, Usage]:
        """Ask for probabilities of labels behind a prompt.

        Where a "1" may become "10" and the judge's own answer does not tell, servers with ``assistant_prefill`` are
        asked once more behind the "1", if it has more than a thousandth of the labels' mass. Without, it stays open.

        Raises:
            UnansweredError: if there is no answer.
            ServerError: if the endpoint cannot be used as it is set up.
        """
        completion, usage = await self._send(self._reading_request(prompt, prompt.answer, labels))
        # without places there is nothing to read labels from
        if not completion.places or (completion.reasoning.strip() and not completion.text.strip()):
            raise _nothing_said(completion, usage)
        reading = read_labels(completion, labels)
        for stem, probability in sorted(reading.open.items()):
            if self.server.assistant_prefill and probability > NEGLIGIBLE * (reading.mass + probability):
                try:
                    later, used = await self._send(self._reading_request(prompt, prompt.answer + stem, labels))
                except UnansweredError as error:
                    # the first request is paid for, also where the second failed
                    raise UnansweredError(error.status, error.fault, usage + error.usage) from None
                usage += used
                if not later.places:
                    raise _nothing_said(later, usage)
                reading = completed(reading, stem, read_labels(later, labels, stem, probability))
        return reading, usage

    async def write(
        self, prompt: JudgePrompt, *, max_tokens: int, temperature: float, top_p: float, seed: int
    ) -> tuple[str, Usage]:
        """Let the judge go on writing behind a prompt, such as a rationale.

        Args:
            prompt: the prompt that is continued.
            max_tokens: longest text in tokens; a longer one is cut.
            temperature: 0 asks for the most probable token at each step.
            top_p: top-p sampling, in (0, 1].
            seed: names the text where it is random, to the server and in the journal.

        Raises:
            UnansweredError: if there is no answer, or an empty one: ``truncated`` where the tokens were used up before
                it, as by a model that thinks first, ``invalid`` otherwise.
            ServerError: if the endpoint cannot be used as it is set up.
        """
        # a greedy text does not depend on the seed: with one, equal requests would differ in the journal
        random_fields = {"top_p": top_p, "seed": seed & 0x7FFFFFFF} if temperature > 0 else {}
        completion, usage = await self._send(
            self._request(prompt, prompt.answer, max_tokens=max_tokens, temperature=temperature, **random_fields)
        )
        text = completion.text
        # servers that continue a turn repeat its beginning
        if self.server.assistant_prefill and text.startswith(prompt.answer):
            text = text[len(prompt.answer) :]
        if not text.strip():
            raise _nothing_said(completion, usage)
        return text.strip(), usage

    # ---- requests --------------------------------------------------------------------------------------------------

    def _reading_request(self, prompt: JudgePrompt, answer: str, labels: Sequence[str]) -> dict[str, object]:
        # a token has a character at least, and a space may come first
        length = 1 + max(map(len, labels))
        return self._request(
            prompt, answer, max_tokens=length, temperature=0.0, logprobs=True, top_logprobs=self.server.top_logprobs
        )

    def _request(self, prompt: JudgePrompt, answer: str, **fields: object) -> dict[str, object]:
        body = without_control_tokens(prompt.body)
        answer = without_control_tokens(answer)
        if self.server.assistant_prefill:
            messages = [{"role": "user", "content": body}, {"role": "assistant", "content": answer}]
            # vLLM and SGLang continue a turn when told so, llama.cpp always does
            fields |= {"add_generation_prompt": False, "continue_final_message": True}
        else:
            messages = [{"role": "user", "content": f"{body}\n\n{answer}".rstrip()}]
        return {"model": self.server.model, "messages": messages, **fields, **self.server.extra}

    async def _send(self, request: dict[str, object]) -> tuple[Completion, Usage]:
        """Answer a request, from the journal or the server; one that is asked for twice is sent once."""
        # address and whole request, so that another model or temperature is another question
        name = _digest(self.server.base_url, request)
        if name not in self._asked:
            # a task and not its result: an equal request that comes meanwhile joins the one in flight
            self._asked[name] = asyncio.create_task(self._answer(name, request))
        return await self._asked[name]

    async def _answer(self, name: bytes, request: dict[str, object]) -> tuple[Completion, Usage]:
        stored = self._journal.get([name])
        known = _readable(stored[name], request) if stored else None
        if known is not None:
            self.server._from_journal += 1
            return _answered(name, known.body, known.completion)
        # the place is kept while a request waits for its next attempt
        async with self._places:
            answer = await self._insist(request)
        works = {self._works: b"1"} if self.server.gives_logprobs and not self.server.worked_before else {}
        self.server.worked_before = self.server.worked_before or self.server.gives_logprobs
        # a stored reply that cannot be used is damaged, or of an earlier version
        self._journal.put({name: answer.body.encode("utf-8", "replace"), **works}, replace=bool(stored))
        self._count(answer.completion)
        return _answered(name, answer.body, answer.completion)

    async def _insist(self, request: dict[str, object]) -> _Answer:
        """Send a request until it is answered or there is no use."""
        attempt = 0
        while True:
            if self.stopped is not None:
                raise self.stopped
            result = await self._try(request)
            if isinstance(result, _Answer):
                return result
            # every other request would fail alike
            if result.fatal:
                raise ServerError(f"judge {self.server.model!r} at {self.server.base_url}: {result.message}")
            wait = backoff(attempt, random.random(), self.server.requests.max_wait, result.retry_after)
            if not result.again or wait is None or attempt == self.server.requests.retries:
                raise UnansweredError(result.status, result.message)
            await asyncio.sleep(wait)
            attempt += 1

    async def _try(self, request: dict[str, object]) -> _Answer | Fault:
        """Send a request once."""
        server, openai = self.server, _import_openai()
        self._in_flight += 1
        server._tries += 1
        server._most_in_flight = max(server._most_in_flight, self._in_flight)
        start = time.perf_counter()
        # other fields go through unchecked: servers know more of them than the client library
        known = {"model": request["model"], "messages": request["messages"]}
        others = {field: value for field, value in request.items() if field not in known}
        try:
            # limits the whole attempt; the timeout of the client starts again with every piece of the reply
            async with asyncio.timeout(server.requests.timeout):
                raw = await self._create(**known, extra_body=others)
            content: bytes = raw.http_response.content
            # JSON is UTF-8, whatever the header says
            body = server._without_key(content.decode(json.detect_encoding(content), "replace"))
        except (TimeoutError, openai.APITimeoutError):
            return Fault("timeout", f"no answer within {server.requests.timeout:g} s", again=True)
        except openai.APIStatusError as error:
            message = server._without_key(str(error.message))[:300]
            known_to_work = server.gives_logprobs if request.get("logprobs") else server.met
            first = not (known_to_work or server.worked_before)
            return status_fault(error.status_code, message, str(error.code), error.response.headers, first)
        except openai.APIConnectionError as error:
            return Fault("timeout", f"no connection ({server._without_key(str(error.__cause__ or error))})", again=True)
        finally:
            self._in_flight -= 1
            server._busy += time.perf_counter() - start
            server.met = True
        try:
            completion = parse_completion(body)
        except UnreadableError as error:
            if error.code is not None or error.error_code:
                # a reported error without an HTTP status may be transient: another attempt is made
                found = status_fault(error.code or 400, str(error), error.error_code, raw.headers, first=False)
                return replace(found, again=found.again or (error.code is None and found.status == "invalid"))
            return Fault("truncated" if error.cut else "invalid", str(error), again=True)
        if request.get("logprobs") and not completion.refusal:
            if completion.places is None:
                # one odd reply must not end a run that this endpoint has served before
                return Fault("invalid", NO_LOGPROBS, fatal=not (server.gives_logprobs or server.worked_before))
            server.gives_logprobs = True
        return _Answer(body, completion)

    def _count(self, completion: Completion) -> None:
        if completion.tokens_in is None and (self.server.prices.input or self.server.prices.output):
            warnings.warn(
                f"{self.server.base_url} does not say how many tokens a request took: costs are not counted",
                stacklevel=2,
            )
        self.server._requests += 1
        self.server._tokens_in += completion.tokens_in or 0
        self.server._tokens_out += completion.tokens_out or 0


NEGLIGIBLE = 1e-3
"""Share of the labels' mass below which it does not matter how a "1" goes on."""

NO_LOGPROBS = (
    "it answers, but without log-probabilities (logprobs, top_logprobs), which labels are read from. `transformers "
    "serve` and some hosts drop them silently: use a server or a model that gives them (vLLM, SGLang, llama.cpp), or "
    "LLMLabeler for a model on this machine"
)


def backoff(attempt: int, uniform: float, max_wait: float, retry_after: float | None = None) -> float | None:
    """Seconds to wait before the next attempt; None if the server asks for more than ``max_wait``.

    Exponential with full jitter: uniform between 0 and 0.5 * 2^attempt s, and not more than ``max_wait``. The wait that
    the server asks for comes on top, so that requests which were turned away together do not come back together.

    Args:
        attempt: attempts before this one, from 0.
        uniform: a uniform random number from [0, 1).
        max_wait: longest wait in seconds.
        retry_after: seconds that the server asks to wait, if it does.
    """
    # U(0, min(0.5 * 2^attempt, max_wait)); the exponent is bounded, for floats overflow
    jitter = uniform * min(0.5 * 2.0 ** min(attempt, 60), max_wait)
    if retry_after is None:
        return jitter
    return None if retry_after > max_wait else retry_after + jitter


def retry_after(headers: Mapping[str, str], now: float) -> float | None:
    """Seconds that a server asks to wait: Retry-After in seconds or as a date, or OpenAI's retry-after-ms.

    A date is compared with the server's own clock where the reply has it: ours may be wrong.
    """
    milliseconds, value = _number(headers.get("retry-after-ms", "")), headers.get("retry-after", "")
    seconds = _number(value) if milliseconds is None else milliseconds / 1000
    if seconds is None:
        until, shown = _seconds_of(value), _seconds_of(headers.get("date", ""))
        if until is None:
            return None
        seconds = until - (now if shown is None else shown)
    # a date in the past is no wait; NaN, which float() reads, differs from itself
    return max(seconds, 0.0) if seconds == seconds else None


def _number(text: str) -> float | None:
    """A number of a header; None if it is none."""
    try:
        return float(text)
    except ValueError:
        return None


def _seconds_of(date: str) -> float | None:
    """A date of a header in seconds since 1970; None if it is none."""
    try:
        return email.utils.parsedate_to_datetime(date).timestamp()
    except ValueError:
        return None


def status_fault(code: int, message: str, error_code: str, headers: Mapping[str, str], first: bool) -> Fault:
    """Read an HTTP status other than 200.

    Args:
        code: the status.
        message: the message of the server.
        error_code: its short name for that.
        headers: of the reply.
        first: whether no such request has been answered before: one that is not understood is a matter of the set-up.
    """
    text = f"HTTP {code}: {message}"
    said = f"{message} {error_code}".lower()
    asked_to_wait = retry_after(headers, time.time())
    # some hosts speak of billing when they mean a minute: whoever says when to come back means that
    soon = asked_to_wait is not None or re.search(r"(retry|try again) in|per minute", said)
    # a quota that is used up does not come back within minutes
    if code == 429 and ("insufficient_quota" in said or (not soon and re.search(r"billing|credit", said))):
        return Fault("rate_limited", f"{text} (pay the account; earlier replies are kept)", fatal=True)
    # transient by the meaning of the status
    if code in (408, 409, 425, 429) or code >= 500:
        status: LabelStatus = "rate_limited" if code == 429 else "timeout"
        return Fault(status, text, again=True, retry_after=asked_to_wait)
    # asking again would be refused again
    if re.search(r"content.?filter|content.?policy|content management|moderation|flagged|safety", said):
        return Fault("refused", text)
    if code == 413 or re.search(
        r"context.?(length|size|window)|maximum (context|model)|too (long|large|many tokens)", said
    ):
        return Fault("truncated", text)
    if code == 401 or (code == 403 and first):  # later, a firewall has taken offence at one text
        return Fault(
            "invalid", f"{text} (set api_key_env to the variable with a key that may use this model)", fatal=True
        )
    # nothing is answered until the account is paid
    if code == 402:
        return Fault("invalid", f"{text} (pay the account; earlier replies are kept)", fatal=True)
    # the address is wrong for every request
    if code in (404, 405):
        return Fault("invalid", f"{text} (check model, and base_url, which ends in /v1 as a rule)", fatal=True)
    remedy = " (the server does not take such requests: check top_logprobs, assistant_prefill and extra)"
    return Fault("invalid", f"{text}{remedy if first else ''}", fatal=first)


def without_control_tokens(text: str) -> str:
    """Break the control tokens of chat templates: servers read them as special tokens, wherever they stand.

    ``<|im_end|>`` becomes ``< |im_end| >``, ``[/INST]`` becomes ``[ /INST]``, ``</s>`` becomes ``< /s>``.
    """
    text = text.encode("utf-8", "replace").decode()  # half a surrogate pair, as some data has it, cannot be sent
    text = re.sub("<(?=[|\uff5c])", "< ", text)  # DeepSeek's bar is wide
    text = re.sub("(?<=[|\uff5c])>", " >", text)
    text = re.sub(r"<(?=/?(?:s|bos|eos|pad|unk|think|start_of_turn|end_of_turn)>)", "< ", text)
    return re.sub(r"\[(?=/?(?:INST|SYSTEM_PROMPT|AVAILABLE_TOOLS|TOOL_CALLS|TOOL_RESULTS)\])", "[ ", text)


def _digest(*parts: object) -> bytes:
    # sorted keys, so that the order of the fields does not change the name of a request
    return hashlib.blake2b(json.dumps(parts, sort_keys=True).encode(), digest_size=16).digest()


def _answered(name: bytes, body: str, completion: Completion) -> tuple[Completion, Usage]:
    """A reply with its tokens, none where the server does not count.

    It is named by request and reply: from the journal it is the same one, bought again another.
    """
    reply = _digest(name.hex(), body)[:8].hex()
    usage = Usage({reply: (completion.tokens_in or 0, completion.tokens_out or 0)})
    # a refusal is paid for, and stays one
    if completion.refusal:
        raise UnansweredError("refused", f"the judge refused: {completion.refusal[:200]}", usage)
    return completion, usage


def _readable(stored: object, request: dict[str, object]) -> _Answer | None:
    """A reply from the journal; None if it does not answer the request, as some of earlier versions."""
    body = stored.decode("utf-8", "replace") if isinstance(stored, bytes) else str(stored)
    try:
        completion = parse_completion(body)
    except UnreadableError:
        return None
    usable = not request.get("logprobs") or completion.refusal or completion.places is not None
    return _Answer(body, completion) if usable else None


def _nothing_said(completion: Completion, usage: Usage) -> UnansweredError:
    """The fault of an empty answer."""
    if completion.cut or completion.reasoning.strip():
        return UnansweredError(
            "truncated",
            "the judge had used up its tokens before it answered"
            + (", by thinking" if completion.reasoning.strip() else "")
            + ": raise chain_of_thought.max_tokens, or switch its thinking off, e.g. by server.extra="
            "{chat_template_kwargs: {enable_thinking: false}}",
            usage,
        )
    return UnansweredError("invalid", "the judge answers with nothing", usage)


def _run(coroutine: Coroutine[object, None, T]) -> T:
    """Run a coroutine to its end, in a notebook too, where a loop is running already."""
    try:
        # asyncio.run fails inside a running loop: another thread has none
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(coroutine)
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(asyncio.run, coroutine).result()


def _check_address(base_url: str) -> None:
    parts = urlsplit(base_url)
    # a secret in the address would reach logs and fingerprints
    if "@" in base_url or parts.query or parts.fragment:
        raise ValueError("base_url must hold no user, password or query: keys belong in the variable api_key_env names")
    if parts.scheme not in ("http", "https") or not parts.netloc:
        raise ValueError(f"base_url must be like http://127.0.0.1:8080/v1; got {base_url!r}")


def _import_openai() -> ModuleType:
    try:
        return importlib.import_module("openai")
    except ImportError as error:
        raise ImportError(
            "a judge on a server needs the package openai: `pip install 'lightning-rlhf[server]'`"
        ) from error


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    try:
        yield
    except sqlite3.Error as error:
        raise OSError(
            f"cannot keep the replies of the judge in {path} ({error}): free some space, make the file writable, "
            f"delete it if it is damaged, or set another journal; the replies in it are kept"
        ) from error
