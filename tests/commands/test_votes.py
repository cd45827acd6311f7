"""Votes as files: both ways, once each; HelpSteer3 and Label Studio in, HelpSteer3 and TRL's rows out."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from lightning_rlhf.annotation.votes import Vote
from lightning_rlhf.cli import main
from lightning_rlhf.commands.export import export_ledger
from lightning_rlhf.commands.votes import import_votes
from lightning_rlhf.labelers.votes import VoteOptions
from lightning_rlhf.ledger.store import PreferenceStore
from lightning_rlhf.prompts import ArgillaPrompts, DatasetPrompts, HelpSteerPrompts, LabelStudioPrompts
from lightning_rlhf.types import Comparison, Label, Prompt, Response


VOTES = [
    Vote("uid-0001", "ann", "b", "a", 3, rationale="kinder", seconds=2.5, time=4.0),
    Vote("uid-0002", "bob", "a", "b", 1, flags=("unsafe_a",)),
    Vote("uid-0003", "ann", "a", "a", 1),
]


def fill(path: Path) -> PreferenceStore:
    """Three pairs: two votes on the first one, one on the second one, none on the third one."""
    store = PreferenceStore(path)
    turns = ({"role": "user", "content": "hello"},)
    pairs = [
        Comparison(Prompt(n, (1,), f"q{n}", turns), Response((2,), f"a{n}", "eos"), Response((3,), f"b{n}", "eos"))
        for n in range(3)
    ]
    ids = store.add_comparisons(0, pairs, [0, 1, 2])
    meta = {"source": "human", "votes": 2, "agreement": 0.5, "strength": 1.0}
    store.add_labels(ids[:2], [Label(0.25, meta=meta), Label(1.0)], [VOTES[:2], VOTES[2:]])
    return store


def rows(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_votes_come_back_as_they_were_and_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fill(tmp_path / "ledger.sqlite").close()
    ledger, file = tmp_path / "ledger.sqlite", tmp_path / "votes.jsonl"
    main(["export", f"--ledger={ledger}", f"--out={file}", "--content=votes"])
    assert [row["uid"] for row in rows(file)] == ["uid-0001", "uid-0002", "uid-0003"]
    assert rows(file)[0]["rationale"] == "kinder" and rows(file)[0]["prompt_index"] == 0
    assert import_votes(str(ledger), str(file)) == {"read": 3, "new": 0, "late": 0, "labels": 0}
    # somebody judged the third pair elsewhere, and the first one again
    fresh = [
        rows(file)[0] | {"position": 2, "prompt_index": 2, "uid": "uid-0004", "strength": 2},
        rows(file)[0] | {"uid": "uid-0005", "annotator": "eve"},
    ]
    file.write_text("\n".join(map(json.dumps, [*rows(file), *fresh, fresh[0]])))
    main(["import", f"--ledger={ledger}", f"--votes={file}", "--options.strength=table", "--options.cost=0.5"])
    assert "6 votes read, 2 new, 1 of them late, 1 new labels" in capsys.readouterr().out
    assert import_votes(str(ledger), str(file))["new"] == 0
    with PreferenceStore(ledger, read_only=True) as store:
        label = store.comparisons(0)[2][2]
        assert label is not None
        assert (label.probability, label.cost, label.meta["strength"]) == (0.8, 0.5, 2.0)
        by_uid = {vote.uid: vote for _, _, vote in store.votes()}
        assert len(by_uid) == 5 and by_uid["uid-0005"].late and not by_uid["uid-0004"].late
        assert store.comparisons(0)[0][2] == Label(
            0.25, meta={"source": "human", "votes": 2, "agreement": 0.5, "strength": 1.0}
        ), "a label that was trained on stays"
        assert replace(by_uid["uid-0004"], uid="uid-0001", strength=3) == VOTES[0]


def test_votes_of_other_runs_and_pairs_are_refused_whole(tmp_path: Path) -> None:
    fill(tmp_path / "ledger.sqlite").close()
    ledger, file = str(tmp_path / "ledger.sqlite"), tmp_path / "votes.jsonl"
    export_ledger(ledger, str(file), content="votes")
    good = rows(file)[0] | {"uid": "uid-0009", "position": 2, "prompt_index": 2}
    for change, message in (
        ({"run": "other"}, "row 2: is a vote on a pair of run other"),
        ({"prompt_index": 7}, "row 2: round 0, position 2 holds prompt 2 here, not 7"),
        ({"position": None}, "row 2: TypeError"),
        ({"verdict": "maybe"}, "row 2: ValueError.*maybe"),
    ):
        file.write_text(json.dumps(good) + "\n" + json.dumps(good | {"uid": "uid-0010"} | change))
        with pytest.raises(ValueError, match=message):
            import_votes(ledger, str(file))
    with PreferenceStore(ledger, read_only=True) as store:
        assert len(store.votes()) == 3
    with pytest.raises(ValueError, match="no such ledger"):
        import_votes(str(tmp_path / "none.sqlite"), str(file))
    with pytest.raises(ValueError, match=r"name .*\.parquet \.jsonl"):
        export_ledger(ledger, str(tmp_path / "votes.parquet"), content="votes")
    with pytest.raises(ValueError, match=r"three probabilities in \[0.5, 1\]"):
        VoteOptions(table=(0.2, 0.8, 0.9))


def test_helpsteer_out_and_in_again(tmp_path: Path) -> None:
    fill(tmp_path / "ledger.sqlite").close()
    file = tmp_path / "steer.jsonl"
    assert export_ledger(str(tmp_path / "ledger.sqlite"), str(file), content="helpsteer") == 2
    first, second = rows(file)
    # votes of 3 for a and 1 for b: -1 on the scale on which response 1 is negative
    assert (first["overall_preference"], second["overall_preference"]) == (-1, -1)
    assert first["context"] == [{"role": "user", "content": "hello"}]
    assert [entry["score"] for entry in first["individual_preference"]] == [-3, 1]  # type: ignore[attr-defined]
    assert first["individual_preference"][0]["reasoning"] == "kinder"  # type: ignore[index]
    for verdict, expected in (("overall", [1.0, 1.0]), ("people", [0.5, 1.0])):
        read = HelpSteerPrompts(str(file), verdict=verdict).load()  # type: ignore[arg-type]
        assert [row.pair.probability for row in read if row.pair] == expected
        assert read[0].pair is not None and read[0].pair.chosen == "a0"
        assert read[0].messages == ({"role": "user", "content": "hello"},)
    file.write_text(json.dumps(first | {"overall_preference": 4}))
    with pytest.raises(ValueError, match=r"row 1: a preference must be a number from -3 to 3, got 4"):
        HelpSteerPrompts(str(file)).load()
    file.write_text(json.dumps(first | {"overall_preference": None}))
    with pytest.raises(ValueError, match=r"no row can be used.*without a verdict"):
        HelpSteerPrompts(str(file)).load()


def test_rows_for_trl_say_who_judged(tmp_path: Path) -> None:
    fill(tmp_path / "ledger.sqlite").close()
    out = tmp_path / "rows.parquet"
    export_ledger(str(tmp_path / "ledger.sqlite"), str(out))
    first, second = pq.read_table(out).to_pylist()
    assert first["chosen"][0]["content"] == "b0" and first["probability"] == 0.75
    assert (first["source"], first["votes"], first["agreement"], first["strength"]) == ("human", 2, 0.5, -1.0)
    assert second["source"] is None
    assert DatasetPrompts(str(out)).load()[0].pair is not None


def test_label_studio_tasks(tmp_path: Path) -> None:
    def annotation(side: str, cancelled: bool = False) -> dict[str, object]:
        result = {"type": "pairwise", "from_name": "comparison", "value": {"selected": side}}
        return {"result": [{"type": "textarea", "value": {"text": ["x"]}}, result], "was_cancelled": cancelled}

    data = {"prompt": "q", "answer1": "x", "answer2": "y"}
    tasks = [
        {"data": data, "annotations": [annotation("left"), annotation("right"), annotation("left")]},
        {"data": data, "annotations": [annotation("right"), annotation("left", cancelled=True)]},
        {"data": data, "annotations": []},
    ]
    file = tmp_path / "export.json"
    file.write_text(json.dumps(tasks))
    source = LabelStudioPrompts(str(file))
    found = [row.pair for row in source.load()]
    assert [pair.probability for pair in found if pair] == [pytest.approx(2 / 3), 0.0]
    assert source.report == {"without a verdict": 1}
    file.write_text(json.dumps([{"data": data, "annotations": [annotation("both")]}]))
    with pytest.raises(ValueError, match="'selected' must be left or right, got 'both'"):
        source.load()
    with pytest.raises(ValueError, match="field 'question' must be text"):
        LabelStudioPrompts(str(file), prompt="question").load()


def answered(record: dict[str, object], user: str, better: str, status: str = "submitted") -> dict[str, object]:
    """A record of Argilla with one more answer, for the response of that text."""
    fields, responses = record["fields"], record["responses"]
    assert isinstance(fields, dict) and isinstance(responses, dict)
    value = next((name for name in ("response_1", "response_2") if fields[name] == better), better)
    given = [*responses.get("preference", []), {"value": value, "user_id": user, "status": status}]
    return record | {"responses": {"preference": given}}


def test_pairs_are_judged_in_argilla(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fill(tmp_path / "ledger.sqlite").close()
    ledger, file = str(tmp_path / "ledger.sqlite"), tmp_path / "records.json"
    main(["export", f"--ledger={ledger}", f"--out={file}", "--content=argilla"])
    records = json.loads(file.read_text())
    assert len(records) == 3 and records[0]["fields"]["prompt"] == "hello"
    assert len({record["fields"]["response_1"][0] for record in records}) <= 2, "either response may stand first"
    assert "run" not in json.dumps(records), "people see nothing of the run"
    records[2] = answered(answered(answered(records[2], "u1", "b2"), "u2", "tie"), "u3", "a2", "discarded")
    records[0] = answered(records[0], "u1", "a0")
    file.write_text(json.dumps(records))
    main(["import", f"--ledger={ledger}", f"--votes={file}", "--format=argilla"])
    assert "3 votes read, 3 new, 1 of them late, 1 new labels" in capsys.readouterr().out
    assert import_votes(ledger, str(file), format="argilla") == {"read": 3, "new": 0, "late": 0, "labels": 0}
    with PreferenceStore(ledger, read_only=True) as store:
        label = store.comparisons(0)[2][2]
        assert label is not None and label.probability == 0.25
        assert [vote.verdict for _, position, vote in store.votes() if position == 2] == ["b", "tie"]
    # the same file as recorded pairs
    read = ArgillaPrompts(str(file)).load()
    sides = [(row.pair.chosen, row.pair.probability) for row in read if row.pair]
    assert [probability if chosen[0] == "a" else 1 - (probability or 0) for chosen, probability in sides] == [1.0, 0.25]

    file.write_text(json.dumps([answered(records[1], "u1", "maybe")]))
    with pytest.raises(ValueError, match=r"row 1: question 'preference' has the answer 'maybe'.*response_1"):
        import_votes(ledger, str(file), format="argilla")
    with pytest.raises(ValueError, match=r"nobody answered the question 'best'.*\['preference'\]"):
        import_votes(ledger, str(file), format="argilla", question="best")
    file.write_text(json.dumps([answered(records[1] | {"id": "other"}, "u1", "a1")]))
    with pytest.raises(ValueError, match="row 1: pair other is none of run"):
        import_votes(ledger, str(file), format="argilla")


def test_pairs_are_judged_in_potato(tmp_path: Path) -> None:
    fill(tmp_path / "ledger.sqlite").close()
    ledger, file = str(tmp_path / "ledger.sqlite"), tmp_path / "items.jsonl"
    assert export_ledger(ledger, str(file), content="potato", unlabeled=True) == 1
    (item,) = rows(file)
    assert set(item) == {"id", "text", "responses"} and set(item["responses"]) == {"a2", "b2"}  # type: ignore[call-overload]
    place = "AB"[item["responses"].index("a2")]  # type: ignore[attr-defined]
    output = tmp_path / "annotation_output"
    for user in ("ann", "bob", "eve"):
        (output / user).mkdir(parents=True)
    state = {"user_id": "ann@x", "instance_id_to_label_to_value": {item["id"]: []}}
    state["instance_id_to_label_to_value"][item["id"]] = [[{"schema": "preference", "name": "selection"}, place]]  # type: ignore[index]
    (output / "ann" / "user_state.json").write_text(json.dumps(state))
    (output / "bob" / "user_state.json").write_text(
        json.dumps({"instance_id_to_label_to_value": {item["id"]: {"preference": {"selection": "tie"}}}})
    )
    # another version of potato, on a scale: -2 is for the response on the left
    scale = {"preference": {"scale_value": "-2" if place == "A" else "2"}}
    row = {"id": item["id"], "displayed_text": "x", "label_annotations": scale}
    (output / "eve" / "annotated_instances.jsonl").write_text(json.dumps(row) + "\n")
    assert import_votes(ledger, str(output), format="potato") == {"read": 3, "new": 3, "late": 0, "labels": 1}
    assert import_votes(ledger, str(output), format="potato")["new"] == 0
    with PreferenceStore(ledger, read_only=True) as store:
        given = {vote.annotator: (vote.verdict, vote.strength) for _, place, vote in store.votes() if place == 2}
    assert given == {"ann@x": ("a", None), "bob": ("tie", None), "eve": ("a", 2)}
    with pytest.raises(ValueError, match="Argilla reads a list"):
        export_ledger(ledger, str(file), content="argilla")
    with pytest.raises(ValueError, match="holds no pair without a label"):
        export_ledger(ledger, str(file), content="potato", unlabeled=True)
    scale["preference"]["scale_value"] = "7"
    (output / "eve" / "annotated_instances.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(ValueError, match=r"eve/annotated_instances.jsonl row 1: scheme 'preference'.*-3 to 3"):
        import_votes(ledger, str(output), format="potato")
