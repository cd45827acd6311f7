"""People in the loop: `HumanLabeler` against a real server with robots, with kills, exits and late labels."""

from __future__ import annotations

import hashlib
import json
import signal
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_rlhf.annotation.client import Client
from lightning_rlhf.annotation.queues import QueueOptions, Result
from lightning_rlhf.annotation.serve import read_secrets
from lightning_rlhf.annotation.votes import Vote
from lightning_rlhf.cli import main
from lightning_rlhf.collectors.preferences import RoundCollector
from lightning_rlhf.commands.label import LabelRun
from lightning_rlhf.labelers.base import AbstractLabeler, Answer, Question
from lightning_rlhf.labelers.human import HumanLabeler, VoteOptions, _item
from lightning_rlhf.ledger.store import PreferenceStore
from lightning_rlhf.prompts import DatasetPrompts
from lightning_rlhf.randomness import Key
from lightning_rlhf.runtime.preemption import WAITING, Waiting
from lightning_rlhf.samplers import OfflineSampler
from lightning_rlhf.types import Comparison, Label, Preference, Prompt, Response


ONE_VOTE = QueueOptions(overlap=0.0)


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """Eleven pairs whose chosen response is the longer one."""
    path = tmp_path / "pairs.jsonl"
    pairs = [{"prompt": f"question {n}", "chosen": "long " * (n + 2), "rejected": f"short {n}"} for n in range(11)]
    path.write_text("\n".join(map(json.dumps, pairs)))
    return path


def test_people_label_pairs_and_nobody_is_asked_twice(
    rows: Path, tmp_path: Path, start_server: Callable[..., Any], start_robot: Callable[..., Any]
) -> None:
    server = start_server(tmp_path / "people")
    robots = [start_robot(server, name) for name in ("ann", "bob")]
    guidelines = tmp_path / "guidelines.md"
    guidelines.write_text("Prefer *longer* responses.")
    labeler = HumanLabeler(
        server_dir=str(tmp_path / "people"),
        pairs=QueueOptions(votes=2, overlap=0.0),
        guidelines=str(guidelines),
        votes=VoteOptions(cost=0.25),
    )
    report = LabelRun(DatasetPrompts(str(rows)), labeler, str(tmp_path / "run")).run()
    assert (report["labelled"], report["bought_now"]) == (11, 11)
    assert report["cost"] == 11 * 2 * 0.25
    assert report["figures"]["alignment"] == 1.0
    with PreferenceStore(tmp_path / "run" / "ledger.sqlite", read_only=True) as store:
        votes = store.votes()
        labels = [label for _, _, label in store.comparisons(0) if label is not None and not label.is_free_tie]
    assert len(votes) == 22
    assert {vote.annotator for _, _, vote in votes} == {"ann", "bob"}
    assert {vote.first for _, _, vote in votes} == {"a", "b"}
    assert len({vote.guidelines for _, _, vote in votes} - {""}) == 1
    assert all(label.meta["source"] == "human" and label.meta["agreement"] == 1.0 for label in labels)
    assert all(label.meta["seconds"] == 3.0 for label in labels)
    again = LabelRun(DatasetPrompts(str(rows)), labeler, str(tmp_path / "run")).run()
    assert again["bought_now"] == 0
    assert sum(robot.votes for robot in robots) == 22


SMALL = [
    *("--config=dpo_online", "--config=labeler/human", "--trainer.accelerator=cpu", "--trainer.devices=1"),
    *("--trainer.max_epochs=2", "--trainer.precision=32-true", "--trainer.enable_progress_bar=false"),
    *("--trainer.strategy=auto", "--trainer.check_val_every_n_epoch=1", "--data.pairs_per_batch=2"),
    *("--data.decoding.max_new_tokens=4", "--data.rounds.prompts_per_round=4", "--data.prompts.limit=8"),
    *("--data.heldout=null", "--trainer.max_steps=-1", "--data.labeler.pairs.overlap=0"),
]


def outcome(run_dir: Path) -> tuple[str, list[tuple[int, int, str, str]], int]:
    """Hash of the trained weights, the votes, and the number of votes."""
    with PreferenceStore(run_dir / "ledger.sqlite", read_only=True) as store:
        votes = [(round, place, vote.annotator, vote.verdict) for round, place, vote in store.votes()]
        assert store.num_labels == len(votes)
    (checkpoint,) = run_dir.rglob("last.ckpt")
    weights = torch.load(checkpoint, weights_only=False)["state_dict"]
    digest = hashlib.sha256()
    for name in sorted(weights):
        digest.update(weights[name].numpy().tobytes())
    return digest.hexdigest(), sorted(votes), len(votes)


@pytest.mark.slow
def test_exit_and_a_killed_server_give_the_weights_of_the_undisturbed_run(
    tiny_policy: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    start_server: Callable[..., Any],
    start_robot: Callable[..., Any],
    robot_class: type[Any],
) -> None:
    monkeypatch.chdir(tmp_path)
    plain = start_server(tmp_path / "plain")
    start_robot(plain, "ann")
    command = ["fit", *SMALL, f"--model.policy={tiny_policy}"]
    main([*command, "--run_dir=run", f"--data.labeler.server_dir={tmp_path / 'plain'}"])
    expected = outcome(tmp_path / "run")

    server = start_server(tmp_path / "killed")
    statuses: list[object] = []
    for call in range(20):
        arguments = [f"--data.labeler.server_dir={tmp_path / 'killed'}", "--data.labeler.wait=exit"]
        try:
            main([*command, "--run_dir=stubborn", *arguments])
            break
        except SystemExit as stop:
            statuses.append(stop.code)
        # two votes, and then the server is killed
        robot = robot_class(server, "ann")
        robot.judge()
        robot.judge()
        server.stop(signal.SIGKILL)
        server = start_server(tmp_path / "killed", port=server.port)
        assert call < 19
    assert len(statuses) >= 2 and set(statuses) == {WAITING}
    assert outcome(tmp_path / "stubborn") == expected


class Slow(AbstractLabeler):
    """Leaves every pair with an even position open at first; answers late ones one round later."""

    whole_rounds = True

    def __init__(self) -> None:
        self.max_lag = 1
        self.asked: list[list[tuple[int, bool]]] = []

    def label(self, comparisons: Sequence[Comparison], key: Key) -> list[Label]:
        del key
        return [Label(1.0) for _ in comparisons]

    def stream(self, questions: Sequence[Question], answered: int, key: Key) -> Iterator[list[tuple[int, Answer]]]:
        del answered, key
        self.asked.append([(question.comparison.prompt.index, question.is_late) for question in questions])
        for place, question in enumerate(questions):
            if question.is_late or question.comparison.prompt.index % 2:
                vote = Vote(f"uid-{question.id}", "ann", "b", "a")
                yield [(place, Answer(Label(1.0), (vote,), {"hash": "text"}))]


def prompts(start: int, count: int) -> list[Prompt]:
    def response(text: str) -> Response:
        return Response((1, 2), text, "eos", reference_logps=(-1.0, -1.0))

    return [
        Prompt(n, (1,), f"q{n}", pair=(response(f"a{n}"), Response((3,), f"b{n}", "eos", reference_logps=(-1.0,))))
        for n in range(start, start + count)
    ]


def indices(preferences: Sequence[Preference]) -> list[int]:
    return [preference.comparison.prompt.index for preference in preferences]


def test_a_late_label_never_changes_its_closed_round_and_is_trained_on_once(tmp_path: Path) -> None:
    labeler = Slow()
    path = tmp_path / "ledger.sqlite"
    with PreferenceStore(path) as store:
        collector = RoundCollector(store, OfflineSampler(), labeler, Key((0,)))
        first = collector.collect(0, prompts(0, 4), None, 4)
        assert indices(first.preferences) == [1, 3]
        assert store.round_info(0) == {"prompts": 4, "failed": {}, "upto": 2, "open": 2}
        assert store.count_labels(before=1) == 2
        second = collector.collect(1, prompts(4, 4), None, 4)
        assert indices(second.preferences) == [5, 7, 0, 2]
        assert [preference.round for preference in second.preferences] == [1, 1, 0, 0]
        third = collector.collect(2, prompts(8, 2), None, 4)
        # of round 1 the even ones; round 0 is out of reach, and was answered anyway
        assert indices(third.preferences) == [9, 4, 6]
        assert labeler.asked[2] == [(8, False), (9, False), (4, True), (6, True)]
        assert (store.count_labels(1), store.count_labels(2), store.count_labels(3)) == (2, 6, 9)
    with PreferenceStore(path) as store:
        collector = RoundCollector(store, OfflineSampler(), labeler, Key((0,)))
        for index, expected in enumerate((first, second, third)):
            again = collector.collect(index, prompts(4 * index, 4 if index < 2 else 2), None, 4)
            assert again.preferences == expected.preferences, "a resumed run reads the same rounds"
        assert len(store.votes()) == 9 and len(store.votes([0])) == 4
    assert len(labeler.asked) == 3


def test_enough_goes_on_with_the_first_answers(
    tmp_path: Path, start_server: Callable[..., Any], start_robot: Callable[..., Any]
) -> None:
    server = start_server(tmp_path)
    start_robot(server, "ann", most=4)
    labeler = HumanLabeler(server_dir=str(tmp_path), enough=0.5, pairs=ONE_VOTE, votes=VoteOptions("majority"))
    with PreferenceStore(tmp_path / "ledger.sqlite") as store:
        collector = RoundCollector(store, OfflineSampler(), labeler, Key((0,)))
        first = collector.collect(0, prompts(0, 8), None, 8)
        assert len(first.preferences) == 4 and store.round_info(0)["open"] == 4  # type: ignore[index]
        start_robot(server, "ann")
        second = collector.collect(1, prompts(8, 4), None, 8)
        assert sum(preference.round == 1 for preference in second.preferences) == 2
        late = [preference for preference in second.preferences if preference.round == 0]
        assert not set(indices(late)) & set(indices(first.preferences))


def test_skipped_and_dropped_pairs_get_no_label_and_are_not_asked_again(
    tmp_path: Path, start_server: Callable[..., Any]
) -> None:
    server = start_server(tmp_path)
    people = [_annotator(server, name) for name in ("ann", "bob")]
    labeler = HumanLabeler(server_dir=str(tmp_path), wait="exit", pairs=ONE_VOTE, votes=VoteOptions(ties="drop"))
    with PreferenceStore(tmp_path / "ledger.sqlite") as store:
        collector = RoundCollector(store, OfflineSampler(), labeler, Key((0,)), label_attempts=3)
        with pytest.raises(Waiting, match="5 verdicts are missing"):
            collector.collect(0, prompts(0, 5), None, 8)
        sides: list[dict[str, object]] = [{"side": "skip", "reason": "other"}, {"side": "tie"}, {"side": "both_bad"}]
        for number, answer in enumerate([*sides, {"side": "left"}, {"side": "right"}]):
            for person in people if number == 0 else people[:1]:
                _vote(person, f"uid-{number}-{id(person)}", answer, number)
        done = collector.collect(0, prompts(0, 5), None, 8)
        assert done.failed == {"skipped": 1, "tie": 1}
        assert len(done.preferences) == 3, "two bad responses count 1/2, unless they are dropped"
        assert store.num_attempts == 5


def _annotator(server: Any, name: str) -> Any:
    secrets = read_secrets(server.run_dir)
    assert secrets is not None
    row = Client(server.url, secrets.admin).post("/admin/annotators", {"name": name, "role": "annotator"})
    return Client(server.url, str(row["token"]))


def _vote(person: Any, uid: str, answer: dict[str, object], number: int) -> None:
    pair = person.get("/api/v1/next")["pair"]
    assert pair is not None, number
    person.post("/api/v1/votes", {"id": pair["id"], "uid": uid, **answer})


def test_bad_settings_and_refusals_name_the_remedy(
    tmp_path: Path, start_server: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    for options, message in (
        ({"enough": 0.0}, "enough is a share"),
        ({"wait": "never"}, "wait must be"),
        ({"max_lag": -1}, "max_lag"),
        ({"base_url": "localhost:8765"}, "base_url must be"),
    ):
        with pytest.raises(ValueError, match=message):
            HumanLabeler(**options)  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match="wait=exit needs a server"):
        HumanLabeler(server_dir=str(tmp_path / "none"), wait="exit").label(comparisons(), Key((0,)))
    server = start_server(tmp_path)
    far = HumanLabeler(base_url=server.url, server_dir=str(tmp_path / "none"))
    with pytest.raises(RuntimeError, match="set the environment variable ANNOTATION_TOKEN"):
        far.label(comparisons(), Key((0,)))
    monkeypatch.setenv("ANNOTATION_TOKEN", "wrong")
    with pytest.raises(RuntimeError, match=r"refused \(401.*--role=trainer"):
        HumanLabeler(base_url=server.url, server_dir=str(tmp_path / "none")).label(comparisons(), Key((0,)))
    monkeypatch.setenv("ANNOTATION_TOKEN", server.client.token)
    with pytest.raises(Waiting, match="1 verdicts are missing") as waiting:
        HumanLabeler(base_url=server.url, wait="exit").label(comparisons(), Key((0,)))
    assert waiting.value.code == WAITING == 75


def comparisons() -> list[Comparison]:
    (prompt,) = prompts(0, 1)
    assert prompt.pair is not None
    return [Comparison(prompt, *prompt.pair)]


def test_a_labeler_starts_a_server_of_its_own_and_restarts_it(tmp_path: Path, start_robot: Callable[..., Any]) -> None:
    pytest.importorskip("starlette")
    labeler = HumanLabeler(server_dir=str(tmp_path), pairs=ONE_VOTE)
    client = labeler._connected()
    assert labeler._server is not None
    labeler._server.kill()
    labeler._server.wait(timeout=10)
    # the next request starts it again, at the same port
    assert labeler._ask(lambda client: client.push("run", [])) == 0
    assert labeler._connected().url == client.url
    labeler._server.terminate()
    labeler._server.wait(timeout=10)


def test_texts_of_prompts() -> None:

    (prompt,) = prompts(0, 1)
    item = _item("k", Comparison(prompt, Response((1,), "x", "length"), Response((2,), "y", "eos")))
    assert item.prompt == ({"role": "user", "content": "q0"},)
    assert (item.cut_a, item.cut_b) == (True, False)


def test_people_see_the_verdict_of_another_labeler_only_where_that_is_asked_for() -> None:
    question = Question("run/0/0", comparisons()[0], suggestion=0.8)
    told, blind = HumanLabeler(pairs=QueueOptions(show_ai="after")), HumanLabeler()
    assert (told._item("k", question).suggestion, blind._item("k", question).suggestion) == (0.8, None)
    votes = (Vote("12345678", "ann", "a", "a", supersedes="01234567"), Vote("23456789", "bob", "a", "a"))
    assert told._answer(Result("k", "final", votes)).label.meta["changed_after_ai"] == 1
    assert "changed_after_ai" not in told._answer(Result("k", "final", votes[1:])).label.meta
    assert "changed_after_ai" not in blind._answer(Result("k", "final", votes)).label.meta
    with pytest.raises(ValueError, match="show_ai must be never or after"):
        QueueOptions(show_ai="before")  # type: ignore[arg-type]
