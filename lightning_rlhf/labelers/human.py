"""Labels by people, who judge the pairs of a run in a browser; see `lightning_rlhf.annotation`."""

from __future__ import annotations

import atexit
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import ClassVar, Literal, TypeVar

from lightning_rlhf.annotation.client import Client, NoServerError, RefusedError
from lightning_rlhf.annotation.extra import check_installed
from lightning_rlhf.annotation.queues import Item, QueueOptions, Result, guidelines_hash
from lightning_rlhf.annotation.serve import Address, listening, read_secrets
from lightning_rlhf.annotation.votes import item_key
from lightning_rlhf.labelers.base import AbstractLabeler, Answer, Memory, Question
from lightning_rlhf.labelers.votes import VoteModel, VoteOptions, fit_votes, label_of_votes
from lightning_rlhf.randomness import Key
from lightning_rlhf.runtime import preemption
from lightning_rlhf.types import Comparison, Label


T = TypeVar("T")
NOTICE = 60.0
"""Seconds between two notices that the server does not answer."""


DEFAULT_QUEUE, DEFAULT_VOTES = QueueOptions(), VoteOptions()


class HumanLabeler(AbstractLabeler):
    """People say which response is better, on the page of ``lightning-rlhf annotate``.

    All pairs of a round are pushed to the server at once, and each label is written to the ledger when its votes are
    final, with the votes. Killing the trainer, the server or both loses nothing: pairs are known by their place in the
    ledger, so that nobody is asked twice.

    Without ``base_url`` the server that runs in ``server_dir`` is used. If none runs, one is started there, prints a
    link to sign in, and ends with the run.

    ``meta`` of a label: see `label_of_votes`; with ``pairs.show_ai=after`` also ``changed_after_ai``, the votes that
    people changed after they had seen the verdict of an AI (`MixedLabeler`). Statuses: those of `VoteOptions`, and
    ``skipped`` where nobody could judge a pair; none of them is asked for again.

    Args:
        base_url: address of a server; its trainer's token is in the environment variable ``token_env``.
        server_dir: folder of a server on this machine: the ``--run_dir`` of ``lightning-rlhf annotate``.
        token_env: name of the environment variable that holds the trainer's token.
        queue: name of the queue; default: made from the id of the run.
        wait: ``block`` waits in this process; ``exit`` takes the votes there are and ends the run with status 75 while
            pairs are open: the same command goes on. ``exit`` needs a server of its own.
        enough: share of the pairs of a round, in (0, 1], that must have an answer; the run then goes on, and later
            labels are trained on in a later round.
        max_lag: closed rounds whose open pairs are still taken, where ``enough`` is below 1.
        pairs: how many votes a pair gets, and the page.
        guidelines: file of guidelines in Markdown, which people confirm before the first pair.
        votes: how votes become labels.

    Raises:
        ValueError: if an option is out of range.
        FileNotFoundError: if there is no such file of guidelines.
    """

    whole_rounds: ClassVar[bool] = True

    def __init__(
        self,
        base_url: str | None = None,
        server_dir: str = "runs/people",
        token_env: str = "ANNOTATION_TOKEN",
        queue: str | None = None,
        wait: Literal["block", "exit"] = "block",
        enough: float = 1.0,
        max_lag: int = 1,
        pairs: QueueOptions = DEFAULT_QUEUE,
        guidelines: str | None = None,
        votes: VoteOptions = DEFAULT_VOTES,
    ) -> None:
        if not 0.0 < enough <= 1.0:
            raise ValueError(f"enough is a share in (0, 1]; got {enough}")
        if wait not in ("block", "exit"):
            raise ValueError(f"wait must be block or exit; got {wait!r}")
        if max_lag < 0:
            raise ValueError(f"max_lag must be >= 0; got {max_lag}")
        if guidelines is not None:
            pairs = replace(pairs, guidelines=Path(guidelines).read_text())
        if base_url is not None:
            # a wrong address is an error before anything is sampled
            Client(base_url, "")
        self.base_url, self.server_dir, self.token_env = base_url, server_dir, token_env
        self.queue, self.wait, self.enough = queue, wait, enough
        # with all answers in, no pair of a closed round is open
        self.max_lag = max_lag if enough < 1.0 else 0
        self.pairs, self.votes = pairs, votes
        self._client: Client | None = None
        self._server: subprocess.Popen[bytes] | None = None
        self._model = VoteModel()

    def label(self, comparisons: Sequence[Comparison], key: Key) -> list[Label]:
        """Ask about comparisons outside of a ledger, and wait for all of them.

        Raises:
            Waiting: with ``wait=exit``, if some have no answer yet.
        """
        # without a ledger a pair is known by its texts
        names = [item_key(c.prompt.text, c.a.text + "\0" + c.b.text) for c in comparisons]
        distinct = {name: place for place, name in enumerate(names)}
        questions = [Question(f"texts/{name}/0", comparisons[place]) for name, place in distinct.items()]
        labels: dict[str, Label] = {}
        # `stream` takes a part of the pairs as enough, but every comparison here needs a label
        labels_wanted = list(distinct)
        for answers in self._answers(questions, len(questions), key):
            labels |= {labels_wanted[place]: answer.label for place, answer in answers}
        return [labels[name] for name in names]

    def stream(self, questions: Sequence[Question], answered: int, key: Key) -> Iterator[list[tuple[int, Answer]]]:
        """Push the questions, and yield answers as they become final.

        Raises:
            Stopped: if the run was asked to end.
            Waiting: with ``wait=exit``, if pairs are open when all answers there are have been yielded.
            RuntimeError: if the server refuses; the message names the remedy.
        """
        own = sum(not question.is_late for question in questions)
        # ceil, less a rounding error: 0.9 of 10 pairs are 9
        needed = math.ceil(self.enough * (answered + own) - 1e-9) - answered
        yield from self._answers(questions, needed, key)

    def _answers(self, questions: Sequence[Question], needed: int, key: Key) -> Iterator[list[tuple[int, Answer]]]:
        del key
        if not questions:
            return
        queue = self.queue or f"run-{questions[0].id.partition('/')[0][:8]}"
        # the ids of questions name the run, and the page must not
        places = {item_key(queue, question.id): place for place, question in enumerate(questions)}
        items = [self._item(key, questions[place]) for key, place in places.items()]
        self._ask(lambda client: client.push(queue, items, self.pairs))
        cursor = 0
        while True:
            # one second at a time, so that a signal ends the wait soon
            after, seconds = cursor, 0 if self.wait == "exit" or needed <= 0 else 1
            cursor, results = self._ask(lambda client: client.results(queue, after, seconds))  # noqa: B023
            answers = []
            for result in results:
                # in the order in which they became final, and not one more than enough: a restart sees the same
                is_new = result.key in places
                if is_new and (needed > 0 or questions[places[result.key]].is_late):
                    place = places.pop(result.key)
                    needed -= not questions[place].is_late
                    answers.append((place, self._answer(result)))
            if answers:
                yield answers
            if needed <= 0:
                return
            if self.wait == "exit" and not results:
                self._end_unless_settled(queue, needed)
            preemption.check()

    def _end_unless_settled(self, queue: str, needed: int) -> None:
        """End the run, unless all votes are in and only wait for the time of undo to pass."""
        progress = self._ask(lambda client: client.progress(queue))
        if progress["open"] == 0 and progress["settled"]:
            time.sleep(1.0)
            return
        client = self._connected()
        raise preemption.Waiting(
            f"waiting for people, {needed} verdicts are missing: open {client.url}, and run the same command again then"
        )

    def recall(self, memory: Memory) -> None:
        """Estimate the accuracies of people and the meaning of strengths from closed rounds, where they are used."""
        if self.votes.aggregate == "weighted" or self.votes.strength == "calibrated":
            self._model = fit_votes(memory.votes)

    def _item(self, key: str, question: Question) -> Item:
        item = _item(key, question.comparison, question.priority)
        # the server never has what it is not to show
        return replace(item, suggestion=question.suggestion) if self.pairs.show_ai == "after" else item

    def _answer(self, result: Result) -> Answer:
        texts = {guidelines_hash(self.pairs.guidelines): self.pairs.guidelines} if self.pairs.guidelines else {}
        label = label_of_votes(result.votes, self.votes, self._model)
        # of such votes it is not known which the person would have given alone
        changed = sum(bool(vote.supersedes) for vote in result.votes)
        if self.pairs.show_ai == "after" and changed:
            label = replace(label, meta={**label.meta, "changed_after_ai": changed})
        return Answer(label, result.votes, texts)

    # -- the server ---------------------------------------------------------------------------------------------------

    def _ask(self, request: Callable[[Client], T]) -> T:
        """Send a request until there is an answer: the server may be restarted while we wait."""
        told = time.monotonic()
        while True:
            try:
                return request(self._connected())
            except NoServerError as error:
                preemption.check()
                if time.monotonic() - told > NOTICE:
                    told = time.monotonic()
                    print(f"{error}; trying again", file=sys.stderr, flush=True)
                time.sleep(0.5)
            except RefusedError as error:
                remedies = {
                    401: f"set {self.token_env} to the token that `lightning-rlhf annotate --add=NAME --role=trainer` "
                    f"prints",
                    403: "give the token of a trainer, not of an annotator or admin",
                    409: "give the run a queue of its own: data.labeler.queue=NAME",
                }
                remedy = remedies.get(error.status, "see the message")
                raise RuntimeError(f"the annotation server refused ({error.status}: {error}): {remedy}") from error

    def _connected(self) -> Client:
        if self._server is not None and self._server.poll() is not None:
            # our own server was killed: the pairs are in its file
            self._server = self._client = None
        if self._client is None:
            self._client = self._find()
        return self._client

    def _find(self) -> Client:
        found = read_secrets(self.server_dir)
        if self.base_url is not None:
            token = os.environ.get(self.token_env)
            # a server on this machine needs no variable
            if token is None and found is not None and found.url.rstrip("/") == self.base_url.rstrip("/"):
                token = found.trainer
            if token is None:
                raise RuntimeError(
                    f"set the environment variable {self.token_env} to the token that `lightning-rlhf annotate "
                    f"--add=NAME --role=trainer` prints, or give the folder of the server as server_dir"
                )
            return Client(self.base_url, token)
        if found is not None:
            client = Client(found.url, found.trainer)
            try:
                client.get("/healthz")
                return client
            except (NoServerError, RefusedError):
                pass
        if self.wait == "exit":
            raise RuntimeError(
                f"wait=exit needs a server that goes on when this process ends: start `lightning-rlhf annotate "
                f"--run_dir={self.server_dir}`"
            )
        return self._start(None if found is None else found.url)

    def _start(self, before: str | None) -> Client:
        """Start a server, at the port of the one before if it is free, so that open pages go on."""
        check_installed()
        port = _free_port(before)
        command = [sys.executable, "-m", "lightning_rlhf", "annotate", f"--run_dir={self.server_dir}"]
        # in a group of its own: Ctrl-C is for the run, which ends the server when it ends
        self._server = subprocess.Popen([*command, f"--port={port}", "--end_with_parent=true"], process_group=0)
        atexit.register(self._server.terminate)
        for _ in range(600):
            if self._server.poll() is not None:
                raise RuntimeError(f"the annotation server ended with status {self._server.returncode}; see above")
            found = read_secrets(self.server_dir)
            if found is not None and found.url.endswith(f":{port}"):
                client = Client(found.url, found.trainer)
                try:
                    client.get("/healthz")
                    return client
                except NoServerError:
                    pass
            preemption.check()
            time.sleep(0.1)
        raise RuntimeError("the annotation server did not start within a minute; see above")


def _free_port(before: str | None) -> int:
    """The port of an earlier server, else the usual one, else a free one."""
    wanted = [8765, 0]
    if before is not None:
        wanted.insert(0, int(before.rpartition(":")[2]))
    for port in wanted:
        try:
            with listening(Address(port=port)) as sock:
                return int(sock.getsockname()[1])
        except OSError:
            continue
    raise RuntimeError("no port of 127.0.0.1 is free")


def _item(key: str, comparison: Comparison, priority: float = 0.0) -> Item:
    """A comparison as people see it: the turns of the conversation, never the rendered chat template."""
    prompt = comparison.prompt
    turns = prompt.messages or ({"role": "user", "content": prompt.text},)
    shown = tuple({"role": str(turn["role"]), "content": str(turn.get("content") or "")} for turn in turns)
    a, b = comparison.a, comparison.b
    return Item(key, shown, a.text, b.text, a.finish_reason == "length", b.finish_reason == "length", priority)
