"""The process of the annotation server: its address, its secrets, and its end."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import socket
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import cast
from urllib.parse import urlsplit

from lightning_rlhf.annotation.assignments import Gold
from lightning_rlhf.annotation.extra import check_installed
from lightning_rlhf.annotation.people import Role
from lightning_rlhf.annotation.store import AnnotationStore


UNDO_SECONDS = 20.0
LOOPBACK = ("127.0.0.1", "localhost")


@dataclass(frozen=True)
class Address:
    """Where a server listens.

    Args:
        host: address; another one than this machine's own needs TLS, or a proxy with TLS.
        port: port; 0 takes a free one.
        certfile: certificate for TLS.
        keyfile: its key.
        behind_proxy: ``https://name`` of a proxy that does TLS.

    Raises:
        ValueError: if texts and tokens would cross a network in the clear.
    """

    host: str = "127.0.0.1"
    port: int = 8765
    certfile: str | None = None
    keyfile: str | None = None
    behind_proxy: str | None = None

    def __post_init__(self) -> None:
        if (self.certfile is None) != (self.keyfile is None):
            raise ValueError("certfile and keyfile belong together; give both")
        if self.behind_proxy and not self.behind_proxy.startswith("https://"):
            raise ValueError(f"behind_proxy must be https://name; got {self.behind_proxy!r}")
        if self.host not in LOOPBACK and not self.secure:
            raise ValueError(
                f"host={self.host} would send texts and tokens in the clear. Give certfile and keyfile, or "
                f"behind_proxy=https://name; or keep 127.0.0.1 and let people in by "
                f"ssh -L {self.port}:127.0.0.1:{self.port} {socket.gethostname()}"
            )

    @property
    def secure(self) -> bool:
        """Whether browsers reach it by TLS."""
        return self.certfile is not None or self.behind_proxy is not None

    def url(self, port: int) -> str:
        """The address for people."""
        if self.behind_proxy:
            return self.behind_proxy.rstrip("/")
        host = self.host if self.host not in ("0.0.0.0", "::") else socket.gethostname()
        return f"{'https' if self.certfile else 'http'}://{host}:{port}"

    def names(self) -> tuple[str, ...]:
        """Names under which the server may be called."""
        names = {*LOOPBACK, self.host, urlsplit(self.url(0)).hostname or self.host}
        return tuple(sorted(names - {"0.0.0.0", "::"}))


@dataclass(frozen=True)
class Secrets:
    """Where a server can be reached by programs on this machine; in a file that its owner alone can read.

    Args:
        url: address.
        admin: token of the admin.
        trainer: token of trainers.
    """

    url: str
    admin: str
    trainer: str


def folder(run_dir: str | Path) -> Path:
    """Folder of the files of a server."""
    return Path(run_dir) / "annotation"


def read_secrets(run_dir: str | Path) -> Secrets | None:
    """The secrets of a server that runs or has run in a folder; None if there are none."""
    try:
        row = json.loads((folder(run_dir) / "server.json").read_text())
        return Secrets(str(row["url"]), str(row["admin"]), str(row["trainer"]))
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None


def write_secrets(run_dir: str | Path, found: Secrets) -> None:
    """Replace the secrets of a folder."""
    path = folder(run_dir) / "server.json"
    fresh = path.with_name(f".{path.name}.{os.getpid()}")
    # created for the owner alone: there is no moment in which others can read it
    with open(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
        json.dump(vars(found), file)
    os.replace(fresh, path)


def read_gold(path: str | Path) -> list[Gold]:
    """Read gold questions: rows of JSON with ``prompt`` or ``messages``, ``chosen``, ``rejected``, ``explanation``.

    Raises:
        ValueError: naming the row and what is wrong.
    """
    questions = []
    for number, line in enumerate(Path(path).read_text().splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            turns = row.get("messages") or [{"role": "user", "content": row["prompt"]}]
            prompt = tuple({"role": str(turn["role"]), "content": str(turn["content"])} for turn in turns)
            chosen, rejected = row["chosen"], row["rejected"]
            if not (isinstance(chosen, str) and isinstance(rejected, str)) or chosen == rejected:
                raise ValueError("chosen and rejected must be two different texts")
            questions.append(Gold(prompt, chosen, rejected, str(row.get("explanation", ""))))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} row {number}: {type(error).__name__}: {error}") from error
    return questions


def serve(
    run_dir: str | Path, address: Address, gold: list[Gold] | None = None, undo_seconds: float = UNDO_SECONDS
) -> None:
    """Serve until a signal ends the process.

    Args:
        run_dir: folder of the run; files lie in its folder ``annotation``.
        address: where to listen.
        gold: gold questions to add.
        undo_seconds: time for which a person may undo a vote; labels wait for it to pass.

    Raises:
        ImportError: if the extra ``human`` is not installed.
        RuntimeError: if another server has the file open.
        OSError: if the port is taken.
    """
    check_installed()
    import uvicorn

    from lightning_rlhf.annotation.app import Site

    store = AnnotationStore(folder(run_dir) / "annotation.sqlite", undo_seconds=undo_seconds)
    with contextlib.closing(store), contextlib.closing(listening(address)) as sock:
        if gold:
            store.add_gold(gold)
        url = address.url(sock.getsockname()[1])
        # the tokens stay over a restart, so that a trainer goes on with its own
        before = read_secrets(run_dir)
        found = Secrets(
            url,
            before.admin if before else secrets.token_urlsafe(24),
            before.trainer if before else secrets.token_urlsafe(24),
        )
        for name, role, token in (("admin", "admin", found.admin), ("trainer", "trainer", found.trainer)):
            known = store.people.of_token(token)
            if known is None:
                store.add_person(name, cast(Role, role), token)
        write_secrets(run_dir, found)
        admin = store.people.of_token(found.admin)
        assert admin is not None
        print(f"annotation server: {url}  ({store.file.path})", flush=True)
        print(f"sign in, once, within 15 minutes: {url}/join#c={store.people.new_code(admin.id)}", flush=True)
        site = Site(store, address.names(), address.secure)
        server = uvicorn.Server(
            uvicorn.Config(
                site.app(),
                log_config=None,
                access_log=False,
                limit_concurrency=500,
                timeout_keep_alive=30,
                timeout_graceful_shutdown=3,
                server_header=False,
                ssl_certfile=address.certfile,
                ssl_keyfile=address.keyfile,
                forwarded_allow_ips="127.0.0.1",
            )
        )
        # streams end by themselves when the server is asked to stop
        original = server.handle_exit

        def handle_exit(number: int, frame: FrameType | None) -> None:
            site.stopping = True
            original(number, frame)

        server.handle_exit = handle_exit  # type: ignore[assignment, method-assign]
        server.run(sockets=[sock])


def listening(address: Address) -> socket.socket:
    """A socket that listens, so that the port is known before the server is up.

    Raises:
        OSError: if the port is taken.
    """
    family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
    sock = socket.socket(family)
    # a server that was killed leaves connections behind, and its port must be free at once
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind((address.host, address.port))
        # connections queue from now on, also while the server starts
        sock.listen(128)
    except OSError as error:
        sock.close()
        message = f"port {address.port} of {address.host} cannot be used ({error.strerror}); take another --port"
        raise OSError(error.errno, message) from error
    return sock
