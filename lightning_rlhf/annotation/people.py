"""Who may use the annotation server: names, roles, tokens, one-time codes and sessions."""

from __future__ import annotations

import hashlib
import re
import secrets
import sqlite3
from dataclasses import dataclass
from typing import Literal, cast, get_args

from lightning_rlhf.annotation.database import AnnotationFile


Role = Literal["annotator", "trainer", "admin"]
PersonState = Literal["active", "paused", "removed"]
CODE_SECONDS = 15 * 60
SESSION_SECONDS = 30 * 86400
_NAME = re.compile(r"[\w.-]{1,40}")


@dataclass(frozen=True)
class Person:
    """Somebody with a token: an annotator, an admin, or a trainer, which is a program.

    Args:
        id: number.
        name: pseudonym.
        role: an annotator votes, a trainer pushes pairs and reads votes, an admin sees everything and may also vote.
        state: a paused person may sign in and gets no pairs; a removed one may not sign in.
        confirmed: hash of the guidelines that the person has confirmed; empty if none.
    """

    id: int
    name: str
    role: Role
    state: PersonState
    confirmed: str = ""

    @property
    def votes(self) -> bool:
        """Whether the person may vote."""
        return self.role != "trainer"


class People:
    """The people of an annotation server.

    Args:
        file: the file of the server.
    """

    def __init__(self, file: AnnotationFile) -> None:
        self.file = file

    def add(self, name: str, role: Role = "annotator", token: str | None = None) -> tuple[Person, str]:
        """Add a person, or give a known one a new token, which ends the old one.

        Args:
            name: pseudonym: letters, digits, ``_``, ``.`` and ``-``.
            role: what the person may do; that of a known person stays as it is.
            token: the token; default: 192 random bits.

        Returns:
            The person, and the token, which is not stored and cannot be shown again.

        Raises:
            ValueError: if the name has other characters, or the role is unknown.
        """
        if not _NAME.fullmatch(name):
            raise ValueError(f"a name is 1 to 40 letters, digits, '_', '.' or '-'; got {name!r}")
        if role not in get_args(Role):
            raise ValueError(f"a role is one of {', '.join(get_args(Role))}; got {role!r}")
        token = token or secrets.token_urlsafe(24)
        with self.file.writing() as db:
            known = db.execute("SELECT id FROM annotators WHERE name = ?", (name,)).fetchone()
            if known is None:
                db.execute(
                    "INSERT INTO annotators (name, token, role, state, created) VALUES (?, ?, ?, 'active', ?)",
                    (name, digest(token), role, self.file.clock()),
                )
            else:
                db.execute(
                    "UPDATE annotators SET token = ?, state = 'active' WHERE id = ?", (digest(token), known["id"])
                )
                db.execute("DELETE FROM sessions WHERE annotator = ?", (known["id"],))
            self.file.note("added", name, role)
            row = db.execute("SELECT * FROM annotators WHERE name = ?", (name,)).fetchone()
        return _person(row), token

    def set_state(self, person: int, state: PersonState) -> None:
        """Pause, remove or reactivate a person; the votes stay.

        Raises:
            KeyError: if there is no such person.
        """
        with self.file.writing() as db:
            row = db.execute("SELECT * FROM annotators WHERE id = ?", (person,)).fetchone()
            if row is None:
                raise KeyError(f"no person {person}")
            db.execute("UPDATE annotators SET state = ? WHERE id = ?", (state, person))
            # a lease of somebody who has left would keep its pair from the others
            if state != "active":
                db.execute("UPDATE leases SET until = 0 WHERE annotator = ?", (person,))
            if state == "removed":
                db.execute("DELETE FROM sessions WHERE annotator = ?", (person,))
                db.execute("DELETE FROM codes WHERE annotator = ?", (person,))
            self.file.note(state, row["name"])

    def confirm(self, person: int, guidelines: str) -> None:
        """Note that a person has read guidelines, given by their hash."""
        with self.file.writing() as db:
            db.execute("UPDATE annotators SET confirmed = ? WHERE id = ?", (guidelines, person))

    def all(self) -> list[Person]:
        """Everybody, by id."""
        with self.file.reading() as db:
            return [_person(row) for row in db.execute("SELECT * FROM annotators ORDER BY id").fetchall()]

    def get(self, name: str) -> Person | None:
        """The person of a name; None if there is none."""
        return next((person for person in self.all() if person.name == name), None)

    def of_token(self, token: str) -> Person | None:
        """The person of a token; None for an unknown token, or where the person was removed."""
        with self.file.reading() as db:
            row = db.execute(
                "SELECT * FROM annotators WHERE token = ? AND state <> 'removed'", (digest(token),)
            ).fetchone()
        return None if row is None else _person(row)

    def new_code(self, person: int) -> str:
        """A code that signs a person in once, within `CODE_SECONDS`; for a link."""
        code = secrets.token_urlsafe(24)
        with self.file.writing() as db:
            db.execute("INSERT INTO codes VALUES (?, ?, ?)", (digest(code), person, self.file.clock() + CODE_SECONDS))
        return code

    def sign_in(self, secret: str) -> tuple[Person, str] | None:
        """Begin a session with a token or a code.

        Returns:
            The person and the id of the session, which is stored as a hash; None if the secret is unknown, used or too
            old.
        """
        now = self.file.clock()
        with self.file.writing() as db:
            db.execute("DELETE FROM codes WHERE until < ?", (now,))
            db.execute("DELETE FROM sessions WHERE until < ?", (now,))
            row = db.execute("SELECT annotator FROM codes WHERE hash = ?", (digest(secret),)).fetchone()
            db.execute("DELETE FROM codes WHERE hash = ?", (digest(secret),))
            if row is None:
                person = self.of_token(secret)
            else:
                found = db.execute(
                    "SELECT * FROM annotators WHERE id = ? AND state <> 'removed'", (row["annotator"],)
                ).fetchone()
                person = None if found is None else _person(found)
            # a trainer has no page
            if person is None or not person.votes:
                return None
            session = secrets.token_urlsafe(24)
            db.execute("INSERT INTO sessions VALUES (?, ?, ?)", (digest(session), person.id, now + SESSION_SECONDS))
            self.file.note("signed in", person.name)
        return person, session

    def of_session(self, session: str) -> Person | None:
        """The person of a session; None if it is unknown or over."""
        with self.file.reading() as db:
            row = db.execute(
                "SELECT a.* FROM sessions s JOIN annotators a ON a.id = s.annotator "
                "WHERE s.hash = ? AND s.until > ? AND a.state <> 'removed'",
                (digest(session), self.file.clock()),
            ).fetchone()
        return None if row is None else _person(row)

    def sign_out(self, session: str) -> None:
        """End a session."""
        with self.file.writing() as db:
            db.execute("DELETE FROM sessions WHERE hash = ?", (digest(session),))


def digest(secret: str) -> str:
    """Hash under which a random secret is stored; it has too many bits to be guessed from it."""
    return hashlib.sha256(secret.encode("utf-8", "replace")).hexdigest()


def _person(row: sqlite3.Row) -> Person:
    role, state = cast(Role, row["role"]), cast(PersonState, row["state"])
    return Person(row["id"], row["name"], role, state, row["confirmed"])
