"""The web application of the annotation server: pages for people, an interface for trainers, and who may do what."""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from collections import defaultdict, deque
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import cast
from urllib.parse import parse_qsl

from jinja2 import Environment, FileSystemLoader, select_autoescape
from markupsafe import Markup
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import MutableHeaders
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, RedirectResponse, Response, StreamingResponse
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lightning_rlhf.annotation.assignments import Receipt, Shown
from lightning_rlhf.annotation.people import SESSION_SECONDS, Person, PersonState, Role
from lightning_rlhf.annotation.queues import Item, queue_options
from lightning_rlhf.annotation.render import to_html, visible
from lightning_rlhf.annotation.report import admin_rows, agreement_rows, report, votes_jsonl
from lightning_rlhf.annotation.store import AnnotationStore
from lightning_rlhf.annotation.votes import JSON, SKIP_REASONS, read_ballot


HERE = Path(__file__).parent
MOST_VOTE, MOST_PUSH = 20_000, 64 << 20
"""Bytes of a vote and of a push."""
SIGN_INS = 10
"""Attempts to sign in, per minute and address."""
STREAMS = 3
"""Event streams per session."""
POLL = 0.2
"""Seconds between two looks for news, which cost a comparison of integers."""
HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-store",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
}
REASONS = dict(
    zip(
        SKIP_REASONS,
        (
            "I cannot judge it",
            "A language that I do not read",
            "It is upsetting",
            "The page does not show it well",
            "Another reason",
        ),
        strict=True,
    )
)
FLAGS = {
    "unsafe_left": "Response 1 is unsafe",
    "unsafe_right": "Response 2 is unsafe",
    "broken_left": "Response 1 is broken text",
    "broken_right": "Response 2 is broken text",
    "nonsense_prompt": "The question makes no sense",
    "personal_data": "There are personal data",
}
Handler = Callable[[Request], Awaitable[Response]]


class Refused(Exception):
    """A request that is answered with an error.

    Args:
        status: of HTTP.
        text: what is wrong.
    """

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status, self.text = status, text


class SecurityHeaders:
    """Adds `HEADERS` to every response, static files and errors included."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers[name] = value
            await send(message)

        await self.app(scope, receive, with_headers)


@dataclass
class Site:
    """The pages and the interface over a store.

    Args:
        store: the store.
        hosts: names under which the server may be called; another one is an attack by DNS rebinding.
        secure: whether browsers reach it by TLS.
        instance: random name of this start of the server.
    """

    store: AnnotationStore
    hosts: tuple[str, ...] = ("127.0.0.1", "localhost")
    secure: bool = False
    instance: str = field(default_factory=lambda: secrets.token_hex(8))

    def __post_init__(self) -> None:
        self.stopping = False
        self.templates = Environment(loader=FileSystemLoader(HERE / "pages"), autoescape=select_autoescape())
        self.attempts: defaultdict[str, deque[float]] = defaultdict(deque)
        self.streams: defaultdict[str, int] = defaultdict(int)
        # feedback of practice questions, by uid of the ballot, until the next page has shown it
        self.feedback: dict[str, Receipt] = {}

    @property
    def cookie(self) -> str:
        """Name of the cookie; with the prefix a browser sends it to this host only, and over TLS only."""
        return "__Host-annotation" if self.secure else "annotation"

    # -- who asks -----------------------------------------------------------------------------------------------------

    def guarded(self, handler: Handler, *roles: Role) -> Handler:
        """A handler for some roles; for everybody if there are none. State is changed only by pages of this server."""

        async def answer(request: Request) -> Response:
            try:
                request.state.session = request.cookies.get(self.cookie, "")
                bearer = request.headers.get("authorization", "")
                if bearer.startswith("Bearer "):
                    person = await run_in_threadpool(self.store.people.of_token, bearer.removeprefix("Bearer ").strip())
                else:
                    person = await run_in_threadpool(self.store.people.of_session, request.state.session)
                    # a cookie is sent along by the browser, whoever asks; a token is not
                    if request.method == "POST" and not same_origin(request):
                        raise Refused(403, "this request did not come from a page of this server")
                request.state.person = person
                if roles and person is None:
                    if request.method == "GET" and "text/html" in request.headers.get("accept", ""):
                        return self.page("join.html", {}, 401)
                    raise Refused(401, "sign in first")
                if roles and person is not None and person.role not in roles:
                    raise Refused(403, f"a {person.role} may not do this")
                return await handler(request)
            except Refused as refused:
                return JSONResponse({"error": refused.text}, refused.status)

        return answer

    def app(self) -> Starlette:
        """The application for an ASGI server."""
        people: tuple[Role, ...] = ("annotator", "admin")
        routes = [
            Route("/", self.guarded(self.home, *people)),
            Route("/join", self.guarded(self.join), methods=["GET", "POST"]),
            Route("/leave", self.guarded(self.leave, *people), methods=["POST"]),
            Route("/vote", self.guarded(self.vote_by_form, *people), methods=["POST"]),
            Route("/guidelines", self.guarded(self.guidelines, *people), methods=["GET", "POST"]),
            Route("/api/v1/next", self.guarded(self.next_pair, *people)),
            Route("/api/v1/last", self.guarded(self.last, *people)),
            Route("/api/v1/votes", self.guarded(self.vote, *people), methods=["POST"]),
            Route("/api/v1/beat", self.guarded(self.beat, *people), methods=["POST"]),
            Route("/api/v1/events", self.guarded(self.events, *people)),
            Route("/api/v1/queues/{queue}/items", self.guarded(self.push, "trainer"), methods=["POST"]),
            Route("/api/v1/queues/{queue}/verdicts", self.guarded(self.verdicts, "trainer")),
            Route("/api/v1/queues/{queue}/withdraw", self.guarded(self.withdraw, "trainer"), methods=["POST"]),
            Route("/api/v1/queues/{queue}/progress", self.guarded(self.progress, "trainer")),
            Route("/admin", self.guarded(self.admin, "admin")),
            Route("/admin/annotators", self.guarded(self.add_person, "admin"), methods=["POST"]),
            Route("/admin/annotators/state", self.guarded(self.set_state, "admin"), methods=["POST"]),
            Route("/admin/votes.jsonl", self.guarded(self.export, "admin")),
            Route("/admin/report.json", self.guarded(self.report, "admin")),
            Route("/healthz", self.guarded(self.health)),
            Mount("/static", StaticFiles(directory=HERE / "static")),
        ]
        middleware = [
            Middleware(SecurityHeaders),
            Middleware(TrustedHostMiddleware, allowed_hosts=list(self.hosts), www_redirect=False),
        ]
        return Starlette(routes=routes, middleware=middleware)

    # -- pages --------------------------------------------------------------------------------------------------------

    def page(self, name: str, values: JSON, status: int = 200) -> HTMLResponse:
        """A rendered template."""
        return HTMLResponse(self.templates.get_template(name).render(values), status)

    def pair_values(self, person: Person, pair: Shown | None, back: int = 0, feedback: str = "") -> JSON:
        """Values of the template ``pair.html``."""
        values: JSON = {
            "pair": pair,
            "back": back,
            "uid": secrets.token_urlsafe(16),
            "reasons": REASONS,
            "flags": FLAGS,
            "paused": person.state == "paused",
            "feedback": self.feedback.pop(feedback, None),
        }
        if pair is not None:
            turns = [(turn.get("role", "user"), turn.get("content") or "") for turn in pair.prompt]
            values["turns"] = [{"role": role, **texts(content)} for role, content in turns]
            values["sides"] = [
                {"cut": cut, **texts(text)} for text, cut in ((pair.left, pair.left_cut), (pair.right, pair.right_cut))
            ]
        return values

    def counts(self, person: Person) -> JSON:
        """Progress for the top of the page."""
        progress = self.store.queues.progress()
        done = progress.done + progress.settled + progress.skipped
        with self.store.file.reading() as db:
            mine = db.execute(
                "SELECT COUNT(*) FROM votes WHERE annotator = ? AND supersedes IS NULL", (person.id,)
            ).fetchone()[0]
        return {"mine": mine, "done": done, "total": progress.total, "left": progress.open}

    def top(self, person: Person) -> JSON:
        """Values of the template ``top.html``."""
        return {
            "person": person,
            "progress": self.counts(person),
            "has_guidelines": bool(self.store.guidelines()[0]),
        }

    def must_read(self, person: Person) -> bool:
        """Whether there are guidelines that a person has not confirmed."""
        return self.store.guidelines()[1] not in ("", person.confirmed)

    async def home(self, request: Request) -> Response:
        """The page with the next pair, or with an earlier one."""
        person: Person = request.state.person
        if await run_in_threadpool(self.must_read, person):
            return RedirectResponse("/guidelines", 303)
        back = number(request, "back", 0, 20)

        def make() -> Response:
            pair = self.store.assignments.last(person, back) if back else self.store.assignments.next_pair(person)
            values = self.pair_values(person, pair, back, request.query_params.get("feedback", ""))
            question = pair.options.question if pair else "Nothing to judge now"
            return self.page("home.html", {"question": question, **values, **self.top(person)})

        return await run_in_threadpool(make)

    async def join(self, request: Request) -> Response:
        """Signs in."""
        if request.method == "GET":
            return self.page("join.html", {})
        address = request.client.host if request.client else ""
        recent, now = self.attempts[address], time.monotonic()
        while recent and recent[0] < now - 60:
            recent.popleft()
        if len(recent) >= SIGN_INS:
            raise Refused(429, "too many attempts to sign in; wait a minute")
        recent.append(now)
        row = await body(request, MOST_VOTE)
        secret = str(row.get("token") or row.get("code") or "").strip()
        signed = await run_in_threadpool(self.store.people.sign_in, secret)
        if signed is None:
            error = "This link or token is not valid any more. Ask for a new one."
            return self.page("join.html", {"error": error}, 401)
        response = RedirectResponse("/", 303)
        response.set_cookie(
            self.cookie, signed[1], SESSION_SECONDS, httponly=True, samesite="strict", secure=self.secure, path="/"
        )
        return response

    async def leave(self, request: Request) -> Response:
        """Signs out."""
        await run_in_threadpool(self.store.people.sign_out, request.state.session)
        response = RedirectResponse("/join", 303)
        response.delete_cookie(self.cookie, path="/", secure=self.secure, httponly=True, samesite="strict")
        return response

    async def guidelines(self, request: Request) -> Response:
        """Shows the guidelines; a POST confirms them."""
        person: Person = request.state.person
        text, known = await run_in_threadpool(self.store.guidelines)
        if request.method == "POST":
            row = await body(request, MOST_VOTE)
            # not a newer text that came while the old one was read
            if row.get("hash") == known:
                await run_in_threadpool(self.store.people.confirm, person.id, known)
            return RedirectResponse("/", 303)
        top = await run_in_threadpool(self.top, person)
        html = Markup(to_html(text or "There are none."))
        is_confirmed = known in ("", person.confirmed)
        return self.page("guidelines.html", {"text": html, "hash": known, "confirmed": is_confirmed, **top})

    async def vote_by_form(self, request: Request) -> Response:
        """Takes a vote from a browser without JavaScript."""
        row = await body(request, MOST_VOTE)
        verdict = str(row.get("verdict", ""))
        strength = int(verdict[-1]) if verdict[-1:] in ("1", "2", "3") else None
        side = verdict.rstrip("123")
        ballot = {**row, "side": side, "strength": strength, "reason": row.get("reason", "") if side == "skip" else ""}
        receipt = await self.kept(request, ballot)
        if receipt.kept == "late":
            text = "Your verdict came too late to change the label; it is kept for the statistics."
            return self.page("message.html", {"title": "Too late", "text": text})
        shown = f"?feedback={row.get('uid')}" if receipt.has_feedback else ""
        return RedirectResponse(f"/{shown}", 303)

    # -- the interface of the page ------------------------------------------------------------------------------------

    async def next_pair(self, request: Request) -> Response:
        """The next pair, as a part of the page."""
        person: Person = request.state.person
        feedback = request.query_params.get("feedback", "")

        def make() -> JSON:
            if self.must_read(person):
                return {"pair": None, "guidelines": True}
            return self.fragment(person, self.store.assignments.next_pair(person), 0, feedback)

        return JSONResponse(await run_in_threadpool(make))

    def fragment(self, person: Person, pair: Shown | None, back: int, feedback: str = "") -> JSON:
        """A pair as JSON for the page."""
        html = self.templates.get_template("pair.html").render(**self.pair_values(person, pair, back, feedback))
        shown = None if pair is None else {"id": pair.id, "left_cut": pair.left_cut, "right_cut": pair.right_cut}
        return {"pair": shown, "html": html, "progress": self.counts(person), "paused": person.state == "paused"}

    async def last(self, request: Request) -> Response:
        """An own earlier pair with its verdict."""
        person, back = cast(Person, request.state.person), number(request, "back", 1, 20)
        pair = await run_in_threadpool(self.store.assignments.last, person, back)
        if pair is None:
            raise Refused(404, "there is nothing further back")
        return JSONResponse(await run_in_threadpool(self.fragment, person, pair, back))

    async def vote(self, request: Request) -> Response:
        """Takes a vote."""
        receipt = await self.kept(request, await body(request, MOST_VOTE))
        answer: JSON = {"kept": receipt.kept}
        if receipt.right is not None:
            answer["feedback"] = {"right": receipt.right, "explanation": receipt.explanation}
        elif receipt.suggestion is not None:
            answer["feedback"] = {"ai": receipt.ai_side}
        return JSONResponse(answer)

    async def kept(self, request: Request, row: Mapping[str, object]) -> Receipt:
        """Keep a vote.

        Raises:
            Refused: if it is malformed, or the pair was never shown to the person.
        """
        try:
            ballot = read_ballot(row)
            receipt = await run_in_threadpool(self.store.assignments.vote, request.state.person, ballot)
        except ValueError as error:
            raise Refused(422, str(error)) from error
        except KeyError as error:
            raise Refused(404, "this pair was not shown to you") from error
        if receipt.has_feedback:
            self.feedback[ballot.uid] = receipt
        return receipt

    async def beat(self, request: Request) -> Response:
        """Renews the lease of a pair."""
        row = await body(request, MOST_VOTE)
        held = await run_in_threadpool(self.store.assignments.beat, request.state.person, str(row.get("id", "")))
        return JSONResponse({"held": held})

    async def events(self, request: Request) -> Response:
        """Streams progress as server-sent events."""
        person, session = cast(Person, request.state.person), request.state.session or str(request.state.person.id)
        if self.streams[session] >= STREAMS:
            raise Refused(429, "too many open pages; close one")
        self.streams[session] += 1

        async def stream() -> AsyncIterator[str]:
            try:
                yield "retry: 2000\n\n"
                seen, quiet = -1, 0.0
                while not self.stopping and not await request.is_disconnected():
                    if self.store.file.version != seen:
                        seen, quiet = self.store.file.version, 0.0
                        counts = await run_in_threadpool(self.counts, person)
                        yield f"event: progress\ndata: {json.dumps({**counts, 'has_work': bool(counts['left'])})}\n\n"
                    elif quiet >= 15:
                        quiet = 0.0
                        yield ": still here\n\n"
                    await asyncio.sleep(POLL)
                    quiet += POLL
            finally:
                self.streams[session] -= 1

        return StreamingResponse(stream(), media_type="text/event-stream")

    # -- the interface of trainers ------------------------------------------------------------------------------------

    async def push(self, request: Request) -> Response:
        """Adds pairs to a queue."""
        row = await body(request, MOST_PUSH)
        try:
            settings = row.get("settings")
            options = None if settings is None else queue_options(cast(dict[str, object], settings))
            items = [read_item(item) for item in cast(list[dict[str, object]], row.get("items", []))]
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise Refused(422, f"{type(error).__name__}: {error}") from error
        try:
            added = await run_in_threadpool(self.store.queues.push, request.path_params["queue"], items, options)
        except ValueError as error:
            raise Refused(409, str(error)) from error
        return JSONResponse({"added": added})

    async def verdicts(self, request: Request) -> Response:
        """Final verdicts behind a cursor; waits for some, if asked to."""
        after, wait = number(request, "after", 0), number(request, "wait", 0, 60)
        queue, end = request.path_params["queue"], time.monotonic() + wait
        while True:
            # finality comes with time, without any write: look again each time
            cursor, found = await run_in_threadpool(self.store.queues.results, queue, after)
            if found or time.monotonic() >= end or self.stopping or await request.is_disconnected():
                break
            await asyncio.sleep(POLL)
        rows = [{"key": r.key, "state": r.state, "votes": [vote.to_json() for vote in r.votes]} for r in found]
        return JSONResponse({"cursor": cursor, "verdicts": rows})

    async def withdraw(self, request: Request) -> Response:
        """Takes back pairs that nobody needs any more."""
        row = await body(request, MOST_PUSH)
        keys = [str(key) for key in cast(list[object], row.get("keys", []))]
        count = await run_in_threadpool(self.store.queues.withdraw, request.path_params["queue"], keys)
        return JSONResponse({"withdrawn": count})

    async def progress(self, request: Request) -> Response:
        """How far a queue is."""
        return JSONResponse(asdict(await run_in_threadpool(self.store.queues.progress, request.path_params["queue"])))

    # -- admin --------------------------------------------------------------------------------------------------------

    async def admin(self, request: Request) -> Response:
        """The page of whoever runs a study."""
        return await run_in_threadpool(self.admin_page, request.state.person)

    def admin_page(self, person: Person, extra: JSON | None = None, status: int = 200) -> Response:
        """The admin page; ``extra`` may hold ``added`` and ``error``."""
        whole = report(self.store)
        queues = {name: self.store.queues.progress(name) for name in self.store.queues.names() if name != "gold"}
        shown: JSON = {
            "queues": queues,
            "people": admin_rows(self.store, whole),
            "agreement": agreement_rows(whole),
            **self.top(person),
        }
        return self.page("admin.html", {**shown, **(extra or {})}, status)

    async def add_person(self, request: Request) -> Response:
        """Adds a person, and shows the token once."""
        row = await body(request, MOST_VOTE)
        try:
            person, token = await run_in_threadpool(
                self.store.add_person, str(row.get("name", "")), cast(Role, row.get("role", "annotator"))
            )
        except ValueError as error:
            if is_json(request):
                raise Refused(422, str(error)) from error
            return await run_in_threadpool(self.admin_page, request.state.person, {"error": str(error)}, 422)
        code = await run_in_threadpool(self.store.people.new_code, person.id)
        link = f"{request.url.scheme}://{request.headers['host']}/join#c={code}"
        added = {"name": person.name, "token": token, "link": link}
        if is_json(request):
            return JSONResponse(added)
        return await run_in_threadpool(self.admin_page, request.state.person, {"added": added})

    async def set_state(self, request: Request) -> Response:
        """Pauses, removes or reactivates a person."""
        row = await body(request, MOST_VOTE)
        state = str(row.get("state", ""))
        if state not in ("active", "paused", "removed"):
            raise Refused(422, f"state must be active, paused or removed; got {state!r:.40}")
        person = await run_in_threadpool(self.store.people.get, str(row.get("name", "")))
        if person is None:
            raise Refused(404, f"there is nobody named {row.get('name')!r:.50}")
        await run_in_threadpool(self.store.set_person, person.id, cast(PersonState, state))
        return JSONResponse({"state": state}) if is_json(request) else RedirectResponse("/admin", 303)

    async def export(self, request: Request) -> Response:
        """All votes as JSON lines."""
        is_anonymous = request.query_params.get("anonymous") == "1"
        text = await run_in_threadpool(votes_jsonl, self.store, is_anonymous)
        return Response(text, media_type="application/jsonl")

    async def report(self, request: Request) -> Response:
        """The report as JSON."""
        return JSONResponse(await run_in_threadpool(report, self.store))

    async def health(self, request: Request) -> Response:
        """Whether the server is up, and which start of it this is."""
        del request
        return JSONResponse({"ok": True, "instance": self.instance})


def texts(text: str) -> JSON:
    """A text as HTML and as it stands."""
    return {"text": visible(text), "html": Markup(to_html(text))}


def same_origin(request: Request) -> bool:
    """Whether a page of this server sent a request, by Fetch Metadata, else by its origin."""
    site = request.headers.get("sec-fetch-site")
    if site is not None:
        return site == "same-origin"
    origin = request.headers.get("origin", "")
    return origin.partition("://")[2] == request.headers.get("host", "") != ""


def is_json(request: Request) -> bool:
    """Whether the body is JSON, not a form."""
    return request.headers.get("content-type", "").startswith("application/json")


async def body(request: Request, most: int) -> JSON:
    """The body of a request, JSON or a form, as an object.

    Raises:
        Refused: if it is longer than ``most`` bytes, or malformed.
    """
    content = bytearray()
    async for piece in request.stream():
        content += piece
        # read no further: the rest may have no end
        if len(content) > most:
            raise Refused(413, f"more than {most} bytes")
    if is_json(request):
        try:
            row = json.loads(content or b"{}")
        except ValueError as error:
            raise Refused(422, "the body is no JSON") from error
        if not isinstance(row, dict):
            raise Refused(422, "the body must be an object of JSON")
        return row
    return read_form(bytes(content))


def read_form(content: bytes) -> JSON:
    """Fields of a form; ``flags`` may come several times."""
    pairs = parse_qsl(content.decode("utf-8", "replace"), keep_blank_values=True, max_num_fields=100)
    row: JSON = {name: value for name, value in pairs if name != "flags"}
    row["flags"] = [value for name, value in pairs if name == "flags"]
    return row


def read_item(row: Mapping[str, object]) -> Item:
    """A pair as a trainer pushes it.

    Raises:
        KeyError: if ``key``, ``a`` or ``b`` is missing.
        TypeError: if an entry is of the wrong kind.
    """
    key, a, b = row["key"], row["a"], row["b"]
    if not (isinstance(key, str) and isinstance(a, str) and isinstance(b, str)):
        raise TypeError("key, a and b must be texts")
    turns = cast(list[dict[str, object]], row.get("prompt", []))
    prompt = tuple({"role": str(turn.get("role", "user")), "content": str(turn.get("content") or "")} for turn in turns)
    cut_a, cut_b = bool(row.get("cut_a", False)), bool(row.get("cut_b", False))
    priority, suggestion = float(cast(float, row.get("priority", 0.0))), cast("float | None", row.get("suggestion"))
    return Item(key, prompt, a, b, cut_a, cut_b, priority, None if suggestion is None else float(suggestion))


def number(request: Request, name: str, default: int, most: int = 2**53) -> int:
    """A whole number in the query.

    Raises:
        Refused: if it is none, or out of range.
    """
    text = request.query_params.get(name, str(default))
    if not text.isascii() or not text.isdigit() or int(text) > most:
        raise Refused(422, f"{name} must be a whole number from 0 to {most}")
    return int(text)
