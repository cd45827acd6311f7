"""``lightning-rlhf annotate``: serve pairs to people in a browser, and look after the people. Imports no torch."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Literal, cast

from jsonargparse import auto_cli

from lightning_rlhf.annotation.client import Client, NoServerError
from lightning_rlhf.annotation.extra import check_installed
from lightning_rlhf.annotation.people import PersonState, Role
from lightning_rlhf.annotation.report import agreement_rows, report, votes_jsonl
from lightning_rlhf.annotation.serve import UNDO_SECONDS, Address, folder, read_gold, read_secrets, serve
from lightning_rlhf.annotation.store import opened
from lightning_rlhf.annotation.votes import JSON
from lightning_rlhf.runtime import preemption


def annotate(
    run_dir: str = "runs/people",
    host: str = "127.0.0.1",
    port: int = 8765,
    certfile: str | None = None,
    keyfile: str | None = None,
    behind_proxy: str | None = None,
    add: str | None = None,
    role: Literal["annotator", "trainer", "admin"] = "annotator",
    pause: str | None = None,
    resume: str | None = None,
    remove: str | None = None,
    gold: str | None = None,
    undo_seconds: float = UNDO_SECONDS,
    show_report: bool = False,
    export: str | None = None,
    anonymous: bool = False,
    end_with_parent: bool = False,
) -> None:
    """Serve pairs to people in a browser; with an option such as ``--add``, look after them instead.

    These options go through the server that runs in ``run_dir``, or use its file if none runs.

    Args:
        run_dir: folder of the run; the server keeps its files in the folder ``annotation`` there.
        host: address to listen at; another one than 127.0.0.1 needs TLS.
        port: port to listen at; 0 takes a free one.
        certfile: certificate for TLS.
        keyfile: its key.
        behind_proxy: ``https://name`` of a proxy that does TLS.
        add: add a person, or give a known one a new token; prints a link and the token, once.
        role: what an added person may do.
        pause: stop giving pairs to a person.
        resume: give pairs to a paused person again.
        remove: sign a person out for good; votes stay.
        gold: file of gold questions to serve besides, rows with prompt or messages, chosen, rejected, explanation.
        undo_seconds: time for which a person may undo a vote; a label waits for it, or for three later votes.
        show_report: print how far people agree.
        export: write all votes to this file, as JSON lines.
        anonymous: export without names and rationales.
        end_with_parent: end when the process that started the server ends.
    """
    if add is not None:
        print(*_added(run_dir, add, role), sep="\n")
        return
    states: dict[str, str | None] = {"paused": pause, "active": resume, "removed": remove}
    changed = {state: name for state, name in states.items() if name is not None}
    for state, name in changed.items():
        _set_state(run_dir, name, cast(PersonState, state))
        print(f"{name} is {state}")
    if show_report:
        whole = cast(JSON, json.loads(_fetched(run_dir, "/admin/report.json")))
        print(*(f"{words}: {value}" for words, value in agreement_rows(whole)), sep="\n")
        for name, own in cast(dict[str, JSON], whole["people"]).items():
            print(f"{name}: {own['votes']} votes; notes: {', '.join(cast(list[str], own['notes'])) or 'none'}")
    if export is not None:
        text = _fetched(run_dir, f"/admin/votes.jsonl{'?anonymous=1' if anonymous else ''}")
        Path(export).write_text(text)
        print(f"wrote {len(text.splitlines())} votes to {export}")
    if changed or show_report or export is not None:
        return
    check_installed()
    if end_with_parent:
        preemption.end_with_parent()
    address = Address(host, port, certfile, keyfile, behind_proxy)
    serve(run_dir, address, None if gold is None else read_gold(gold), undo_seconds)


def main(args: list[str]) -> None:
    """Run the command."""
    # Ctrl-C has ended the server in an orderly way; a traceback would only frighten
    try:
        auto_cli(annotate, args=args, as_positional=False, prog="lightning-rlhf annotate")
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        print(f"lightning-rlhf annotate: {error}", file=sys.stderr)
        raise SystemExit(1) from None


def _admin(run_dir: str) -> Client | None:
    """A client of the server that runs in a folder; None if none runs."""
    found = read_secrets(run_dir)
    if found is None:
        return None
    client = Client(found.url, found.admin)
    try:
        client.get("/healthz")
    except NoServerError:
        return None
    return client


def _added(run_dir: str, name: str, role: Role) -> list[str]:
    client = _admin(run_dir)
    if client is not None:
        row = client.post("/admin/annotators", {"name": name, "role": role})
        link = [f"link, works once, within 15 minutes: {row['link']}"] if role != "trainer" else []
        return [*link, f"token of {name}, not shown again: {row['token']}"]
    with opened(folder(run_dir) / "annotation.sqlite") as store:
        _, token = store.add_person(name, role)
    return [f"token of {name}, not shown again: {token}"]


def _set_state(run_dir: str, name: str, state: PersonState) -> None:
    client = _admin(run_dir)
    if client is not None:
        client.post("/admin/annotators/state", {"name": name, "state": state})
        return
    with opened(folder(run_dir) / "annotation.sqlite") as store:
        person = store.people.get(name)
        if person is None:
            raise ValueError(f"there is no {name}; known are {', '.join(p.name for p in store.people.all()) or 'none'}")
        store.set_person(person.id, state)


def _fetched(run_dir: str, path: str) -> str:
    client = _admin(run_dir)
    if client is not None:
        return client.text(path)
    if not (folder(run_dir) / "annotation.sqlite").exists():
        raise ValueError(f"no annotation server has run in {run_dir}; give its --run_dir")
    with opened(folder(run_dir) / "annotation.sqlite") as store:
        if path.startswith("/admin/report.json"):
            return json.dumps(report(store))
        return votes_jsonl(store, path.endswith("anonymous=1"))
