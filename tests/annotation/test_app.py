"""The server of the page: who may do what, requests from elsewhere, the interface of trainers, and safe texts."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest


pytest.importorskip("starlette")
pytest.importorskip("nh3")

from starlette.testclient import TestClient

from lightning_rlhf.annotation.app import HEADERS, Site
from lightning_rlhf.annotation.assignments import Gold
from lightning_rlhf.annotation.queues import Item, QueueOptions
from lightning_rlhf.annotation.render import to_html, visible
from lightning_rlhf.annotation.store import AnnotationStore


ORIGIN = {"origin": "http://127.0.0.1"}
PAIRS = [Item(f"secret-key-{n}", ({"role": "user", "content": f"q{n}"},), f"a{n}", f"b{n}") for n in range(4)]


class Clock:
    def __init__(self) -> None:
        self.now = 1e6

    def __call__(self) -> float:
        return self.now


class Setup:
    """A store, its application, and somebody of each role."""

    def __init__(self, path: Path) -> None:
        self.clock = Clock()
        self.store = AnnotationStore(path, self.clock)
        self.tokens = {role: self.store.add_person(role, role)[1] for role in ("annotator", "trainer", "admin")}  # type: ignore[arg-type]
        self.site = Site(self.store)
        self.app = self.site.app()

    def client(self, role: str | None = None) -> TestClient:
        """A browser, signed in; a trainer has its token in the header."""
        headers = {"authorization": f"Bearer {self.tokens[role]}"} if role == "trainer" else ORIGIN
        client = TestClient(self.app, base_url="http://127.0.0.1", headers=headers, follow_redirects=False)
        if role in ("annotator", "admin"):
            assert client.post("/join", data={"token": self.tokens[role]}).status_code == 303
        return client


@pytest.fixture
def setup(tmp_path: Path) -> Iterator[Setup]:
    setup = Setup(tmp_path / "annotation.sqlite")
    yield setup
    setup.store.close()


def requests_of(setup: Setup) -> list[tuple[str, str]]:
    """Every route of the application with each of its methods."""
    found = []
    for route in setup.app.routes:
        for method in sorted((getattr(route, "methods", None) or {"GET"}) - {"HEAD"}):
            found.append((method, route.path.replace("{queue}", "run")))  # type: ignore[attr-defined]
    return found


def test_nothing_but_the_door_is_open_without_a_session(setup: Setup) -> None:
    client = setup.client()
    allowed = {"/join", "/healthz", "/static"}
    for method, path in requests_of(setup):
        status = client.request(method, path).status_code
        assert (status == 401) == (path not in allowed or (method, path) == ("POST", "/join")), (method, path, status)


def test_roles(setup: Setup) -> None:
    kinds = {
        "annotator": {"/api/v1/next", "/api/v1/votes", "/", "/vote", "/guidelines"},
        "trainer": {"/api/v1/queues/run/items", "/api/v1/queues/run/verdicts"},
        "admin": {"/admin", "/admin/votes.jsonl", "/admin/report.json", "/admin/annotators"},
    }
    for role in kinds:
        client = setup.client(role)
        for method, path in requests_of(setup):
            mine = path in kinds[role] or (role == "admin" and path in kinds["annotator"])
            others = path in set().union(*kinds.values()) and not mine
            if others:
                assert client.request(method, path).status_code == 403, (role, method, path)


@pytest.mark.parametrize(
    ("headers", "allowed"),
    [
        ({"sec-fetch-site": "same-origin"}, True),
        ({"origin": "http://127.0.0.1"}, True),
        ({}, False),
        ({"origin": "http://evil.example"}, False),
        ({"origin": "null"}, False),
        ({"origin": "http://127.0.0.1", "sec-fetch-site": "cross-site"}, False),
        ({"origin": "http://127.0.0.1", "sec-fetch-site": "same-site"}, False),
        ({"sec-fetch-site": "none"}, False),
    ],
)
def test_requests_of_other_pages_change_nothing(setup: Setup, headers: dict[str, str], allowed: bool) -> None:
    setup.store.queues.push("run", PAIRS, QueueOptions(overlap=0))
    client = setup.client("annotator")
    pair = client.get("/api/v1/next").json()["pair"]["id"]
    del client.headers["origin"]
    reply = client.post("/api/v1/votes", json={"id": pair, "uid": "12345678", "side": "left"}, headers=headers)
    assert reply.status_code == (200 if allowed else 403)
    assert len(setup.store.votes()) == allowed


def test_foreign_hosts_are_refused_and_headers_are_everywhere(setup: Setup) -> None:
    client = setup.client("annotator")
    assert client.get("/", headers={"host": "evil.example"}).status_code == 400
    for path in ("/", "/static/page.css", "/nothing", "/healthz"):
        reply = client.get(path)
        assert {name: reply.headers[name] for name in HEADERS} == HEADERS
    page = client.get("/").text
    assert not re.search(r"<script(?! src=)|<style|style=|onclick|https?://", page), "nothing inline, nothing elsewhere"
    cookie = setup.client().post("/join", data={"token": setup.tokens["annotator"]}).headers["set-cookie"].lower()
    assert "httponly" in cookie and "samesite=strict" in cookie


def test_sign_ins_are_limited_and_end(setup: Setup) -> None:
    client = setup.client("annotator")
    assert client.get("/api/v1/next").status_code == 200
    assert client.post("/leave").status_code == 303
    assert client.get("/api/v1/next").status_code == 401
    for _ in range(9):
        assert client.post("/join", data={"token": "wrong"}).status_code == 401
    assert client.post("/join", data={"token": setup.tokens["annotator"]}).status_code == 429


def test_a_trainer_pushes_waits_and_withdraws(setup: Setup) -> None:
    trainer, annotator = setup.client("trainer"), setup.client("annotator")
    rows = [{"key": "k1", "prompt": [{"role": "user", "content": "q"}], "a": "x", "b": "y"}]
    send = {"items": rows, "settings": {"votes": 1, "overlap": 0.0}}
    assert trainer.post("/api/v1/queues/run/items", json=send).json() == {"added": 1}
    assert trainer.post("/api/v1/queues/run/items", json=send).json() == {"added": 0}
    changed = {"items": [{**rows[0], "a": "other"}]}
    assert trainer.post("/api/v1/queues/run/items", json=changed).status_code == 409
    for bad in (
        {"items": [{}]},
        {"items": 3},
        {"settings": {"votes": 0}},
        {"settings": {"strange": 1}},
        {"items": [3]},
    ):
        assert trainer.post("/api/v1/queues/run/items", json=bad).status_code == 422, bad
    assert trainer.get("/api/v1/queues/run/verdicts").json() == {"cursor": 0, "verdicts": []}
    pair = annotator.get("/api/v1/next").json()["pair"]["id"]
    vote = {"id": pair, "uid": "12345678", "side": "left", "strength": 2, "flags": ["unsafe_left"], "rationale": "why"}
    assert annotator.post("/api/v1/votes", json=vote).json() == {"kept": "kept"}
    assert annotator.post("/api/v1/votes", json=vote).json() == {"kept": "again"}
    setup.clock.now += 30
    reply = trainer.get("/api/v1/queues/run/verdicts?wait=5").json()
    assert reply["cursor"] == 1
    (verdict,) = reply["verdicts"]
    assert (verdict["key"], verdict["state"]) == ("k1", "final")
    (kept,) = verdict["votes"]
    assert kept["verdict"] == kept["first"] and kept["flags"] == [f"unsafe_{kept['first']}"]
    assert trainer.get("/api/v1/queues/run/verdicts?after=0").json() == reply
    assert trainer.get("/api/v1/queues/run/verdicts?after=-1").status_code == 422
    assert trainer.post("/api/v1/queues/run/withdraw", json={"keys": ["k1"]}).json() == {"withdrawn": 0}
    assert trainer.get("/api/v1/queues/run/progress").json()["done"] == 1


def test_bad_votes(setup: Setup) -> None:
    setup.store.queues.push("run", PAIRS)
    client = setup.client("annotator")
    pair = client.get("/api/v1/next").json()["pair"]["id"]
    good = {"id": pair, "uid": "12345678", "side": "left"}
    assert client.post("/api/v1/votes", json={**good, "side": "up"}).status_code == 422
    assert client.post("/api/v1/votes", json={**good, "id": "unknown"}).status_code == 404
    assert client.post("/api/v1/votes", json={**good, "rationale": "x" * 30_000}).status_code == 413
    assert client.post("/api/v1/votes", content=b"{", headers={"content-type": "application/json"}).status_code == 422
    assert setup.store.votes() == []


def test_the_page_works_as_a_plain_form(setup: Setup) -> None:
    setup.store.queues.push("run", PAIRS, QueueOptions(overlap=0, guidelines="# Be *fair*"))
    client = setup.client("annotator")
    assert client.get("/").headers["location"] == "/guidelines"
    page = client.get("/guidelines").text
    assert "<em>fair</em>" in page
    hash_ = re.search(r'name="hash" value="(\w+)"', page)
    assert hash_ is not None
    assert client.post("/guidelines", data={"hash": "stale"}).status_code == 303
    assert client.get("/").status_code == 303, "an old text does not count"
    client.post("/guidelines", data={"hash": hash_.group(1)})

    def fields() -> dict[str, str]:
        page = client.get("/").text
        return dict(re.findall(r'name="(id|uid)"[^>]* value="([^"]+)"', page))

    first = fields()
    assert client.post("/vote", data={**first, "verdict": "right3", "rationale": "r"}).headers["location"] == "/"
    second = fields()
    assert second["id"] != first["id"]
    assert client.post("/vote", data={**second, "verdict": "skip", "reason": "other"}).status_code == 303
    assert 'aria-pressed="true"' in client.get("/?back=2").text
    client.post("/vote", data={**first, "uid": "another-uid", "verdict": "both_bad", "flags": "personal_data"})
    votes = [kept.vote for kept in setup.store.votes()]
    assert sorted(vote.verdict for vote in votes) == ["both_bad", "skip"]
    assert client.post("/vote", data={**fields(), "verdict": "skip"}).status_code == 422


def test_practice_answers_are_explained_on_the_next_page(setup: Setup) -> None:
    setup.store.add_gold([Gold(({"role": "user", "content": "g"},), "right", "wrong", "because <b>of it</b>")])
    setup.store.queues.push("run", PAIRS)
    client = setup.client("annotator")
    shown = client.get("/api/v1/next").json()
    vote = {"id": shown["pair"]["id"], "uid": "12345678", "side": "left"}
    assert client.post("/api/v1/votes", json=vote).json()["feedback"]["explanation"] == "because <b>of it</b>"
    html = client.get("/api/v1/next?feedback=12345678").json()["html"]
    assert "because &lt;b&gt;of it" in html
    assert "practice" not in client.get("/api/v1/next?feedback=12345678").json()["html"]


def test_the_verdict_of_an_ai_is_shown_after_the_vote_or_never(setup: Setup) -> None:
    pairs = [replace(pair, suggestion=0.87) for pair in PAIRS]
    setup.store.queues.push("after", pairs[:2], QueueOptions(overlap=0.0, show_ai="after"))
    client = setup.client("annotator")
    first = client.get("/api/v1/next").json()
    for text in (str(first), client.get("/").text):
        assert "87 %" not in text and " AI " not in text, "blind before the vote"
    # P(a preferred) is 0.87: the AI prefers a, wherever it is shown
    left = ">a" in first["html"].split("title-1", 2)[2].split("title-2")[0]
    vote = {"id": first["pair"]["id"], "uid": "12345678", "side": "left"}
    answer = client.post("/api/v1/votes", json=vote).json()
    assert answer["feedback"] == {"ai": "left" if left else "right"}
    html = client.get("/api/v1/next?feedback=12345678").json()["html"]
    told = f"an AI prefers Response {1 if left else 2} (87 %){', as you do' if left else ''}."
    assert told in html
    assert " AI " not in client.get("/api/v1/next").json()["html"], "told once"
    # changed after that: the new vote supersedes the first
    again = {**vote, "uid": "87654321", "side": "right"}
    assert client.post("/api/v1/votes", json=again).json()["kept"] == "kept"
    (kept,) = setup.store.votes()
    assert kept.vote.supersedes == "12345678"

    # without JavaScript
    second = client.get("/api/v1/next").json()["pair"]["id"]
    sent = client.post("/vote", data={"id": second, "uid": "abcdefgh", "verdict": "tie"})
    assert sent.headers["location"] == "/?feedback=abcdefgh"
    assert "On your last pair, an AI prefers" in client.get("/?feedback=abcdefgh").text

    setup.store.queues.push("never", pairs[2:], QueueOptions(overlap=0.0))
    third = client.get("/api/v1/next").json()["pair"]["id"]
    assert "feedback" not in client.post("/api/v1/votes", json={"id": third, "uid": "99999999", "side": "tie"}).json()


def test_people_are_blind_to_the_run(setup: Setup) -> None:
    setup.store.queues.push("secret-run-name", PAIRS)
    client = setup.client("annotator")
    texts = [client.get(path).text for path in ("/", "/api/v1/next")]
    pair = client.get("/api/v1/next").json()["pair"]["id"]
    texts.append(client.post("/api/v1/votes", json={"id": pair, "uid": "12345678", "side": "tie"}).text)
    texts.append(client.get("/api/v1/last").text)
    for text in texts:
        for word in ("secret", "branch", "policy", "reference", "probability", "round", "priority"):
            assert word not in text.replace("referrer", ""), word


def test_the_admin_adds_pauses_and_exports(setup: Setup) -> None:
    setup.store.queues.push("run", PAIRS, QueueOptions(overlap=0))
    annotator, admin = setup.client("annotator"), setup.client("admin")
    pair = annotator.get("/api/v1/next").json()["pair"]["id"]
    vote = {"id": pair, "uid": "12345678", "side": "left", "rationale": "<script>alert(1)</script>"}
    annotator.post("/api/v1/votes", json=vote)
    page = admin.post("/admin/annotators", data={"name": "ann"}).text
    code = re.search(r"#c=([\w-]+)", page)
    assert code is not None
    assert setup.client().post("/join", data={"token": code.group(1)}).status_code == 303
    assert code.group(1) not in admin.get("/admin").text, "shown once"
    assert admin.post("/admin/annotators", data={"name": "<b>"}).status_code == 422
    assert "&lt;b&gt;" in admin.post("/admin/annotators", data={"name": "<b>"}).text
    admin.post("/admin/annotators/state", data={"name": "annotator", "state": "paused"})
    assert annotator.get("/api/v1/next").json()["paused"]
    admin.post("/admin/annotators/state", data={"name": "annotator", "state": "removed"})
    assert annotator.get("/api/v1/next").status_code == 401
    assert admin.post("/admin/annotators/state", json={"name": "nobody", "state": "paused"}).status_code == 404
    lines = admin.get("/admin/votes.jsonl").text.splitlines()
    assert len(lines) == 1 and '"annotator": "annotator"' in lines[0]
    anonymous = admin.get("/admin/votes.jsonl?anonymous=1").text
    assert "person-1" in anonymous and "alert" not in anonymous
    assert admin.get("/admin/report.json").json()["votes"] == 1


PAYLOADS: list[str] = json.loads(Path(__file__).with_name("payloads.json").read_text())


@pytest.mark.parametrize("payload", PAYLOADS)
def test_texts_of_models_can_do_nothing(payload: str) -> None:
    html = to_html(payload)
    tags = re.findall(r"<(/?)(\w+)([^>]*)>", html)
    known = {"p", "code", "pre", "table", "thead", "tbody", "tr", "th", "td", "h3", "br", "em", "strong"}
    assert {name for _, name, _ in tags} <= known
    assert all(not attributes.strip(" /") for _, _, attributes in tags), "no attributes"


def test_markdown_and_invisible_characters() -> None:
    assert to_html("**a** and `b`\n\n1. c") == "<p><strong>a</strong> and <code>b</code></p>\n<ol>\n<li>c</li>\n</ol>\n"
    assert to_html("# t").startswith("<h3>"), "the page has the levels above"
    assert visible("a\u202eb\x00c\n\td") == "a\ufffdb\ufffdc\n\td"
    long = "<b>" * 70_000
    assert to_html(long).startswith("<pre>&lt;b&gt;")
