"""What comes from outside is plain data: any bytes are read or refused with a message, and none of them runs."""

from __future__ import annotations

import ast
import json
import pickle
import sqlite3
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lightning_rlhf.cli import main
from lightning_rlhf.evaluation.answers import identified
from lightning_rlhf.judging.replies import UnreadableError, parse_completion, read_labels
from lightning_rlhf.judging.task import parse_task
from lightning_rlhf.ledger.store import PreferenceStore
from lightning_rlhf.prompts import DatasetPrompts, LedgerPrompts
from lightning_rlhf.runtime.checkpoints import meta
from lightning_rlhf.runtime.run_record import named_files, without_secrets, write_record
from lightning_rlhf.types import Comparison, Label, Prompt, PromptRow, Response


ROOT = Path(__file__).parents[2]
FUZZ = settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)

# ---- replies of judges ---------------------------------------------------------------------------------------------

TOKEN = st.fixed_dictionaries(
    {"token": st.sampled_from(["1", "2", "10", " ", "yes"]) | PLAIN, "logprob": st.floats() | PLAIN}
)
PLACE = TOKEN.flatmap(
    lambda token: st.fixed_dictionaries({}, optional={"top_logprobs": st.lists(TOKEN, max_size=3) | PLAIN}).map(
        lambda more: {**token, **more}
    )
)
CHOICE = st.fixed_dictionaries(
    {"message": st.fixed_dictionaries({}, optional={"content": PLAIN, "refusal": PLAIN}) | PLAIN},
    optional={
        "logprobs": st.fixed_dictionaries({"content": st.lists(PLACE, max_size=3) | PLAIN}) | PLAIN,
        "finish_reason": st.sampled_from(["stop", "length", "content_filter"]) | PLAIN,
    },
)
REPLY = st.fixed_dictionaries({"choices": st.lists(CHOICE, max_size=2) | PLAIN}, optional={"usage": PLAIN})


@FUZZ
@given(body=st.text(max_size=40) | PLAIN.map(json.dumps) | REPLY.map(json.dumps))
def test_any_reply_is_read_or_unreadable(body: str) -> None:
    try:
        completion = parse_completion(body)
    except UnreadableError:
        return
    if completion.places is not None:
        reading = read_labels(completion, ["1", "2", "10"])
        assert reading.logps.isfinite().all()
        assert all(p >= 0 for p in reading.found)


# ---- task files and configs ----------------------------------------------------------------------------------------

TASK = yaml.safe_load((ROOT / "lightning_rlhf/judging/tasks/helpful.yaml").read_text())


@st.composite
def mutated(draw: st.DrawFn, tree: Any) -> Any:
    """The tree with some branches gone, exchanged or added."""
    if draw(st.integers(0, 7)) == 0:
        return draw(PLAIN)
    if isinstance(tree, dict):
        kept = {key: draw(mutated(value)) for key, value in tree.items() if draw(st.integers(0, 11))}
        return kept | draw(st.dictionaries(st.text(max_size=5), PLAIN, max_size=1))
    if isinstance(tree, list):
        return [draw(mutated(value)) for value in tree if draw(st.integers(0, 11))]
    return tree


@FUZZ
@given(text=st.text(max_size=60) | mutated(TASK).map(lambda tree: yaml.safe_dump(tree, allow_unicode=True)))
def test_any_task_file_is_a_task_or_an_error_that_names_the_file(text: str) -> None:
    task, message = None, "mine.yaml"
    try:
        task = parse_task("mine", text, "mine.yaml")
    except ValueError as error:
        message = str(error)
    assert "mine.yaml" in message
    assert task is None or task.pair is not None or task.score is not None or task.check is not None


CONFIG = {
    "trainer": {"max_epochs": 1, "precision": "auto"},
    "model": {"init_args": {"beta": 0.1, "policy": "x"}},
    "data": {"init_args": {"pairs_per_batch": 2, "sampler": {"class_path": "PILAFSampler"}}},
}


@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
@given(text=mutated(CONFIG).map(yaml.safe_dump) | st.text(max_size=30))
def test_any_config_is_parsed_or_one_clear_error(
    tmp_path_factory: pytest.TempPathFactory, capsys: pytest.CaptureFixture[str], text: str
) -> None:
    path = tmp_path_factory.mktemp("config") / "mine.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(SystemExit) as ended:
        main(["fit", "--config", "dpo_online", "--config", str(path), "--print_config"])
    said = capsys.readouterr().err
    assert ended.value.code in (0, None, 2), said
    assert "Traceback" not in said


def test_a_config_cannot_run_code(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, trace = tmp_path / "mine.yaml", tmp_path / "trace"
    path.write_text(f"model: !!python/object/apply:os.system ['touch {trace}']\n")
    with pytest.raises(SystemExit) as ended:
        main(["fit", "--config", "dpo_online", "--config", str(path), "--print_config"])
    assert ended.value.code == 2
    assert not trace.exists()
    assert "mine.yaml" in capsys.readouterr().err


# ---- ledgers -------------------------------------------------------------------------------------------------------


def good_ledger(path: Path) -> Path:
    a, b = (Response((1, 2), text, "eos", (-1.0, -2.0), (-1.5, -2.5)) for text in ("yes", "no"))
    with PreferenceStore(path) as store:
        ids = store.add_comparisons(0, [Comparison(Prompt(0, (5, 6), "hm?"), a, b)], [0])
        store.add_labels(ids, [Label(0.7)])
    return path


def load_ledger(path: Path) -> tuple[list[PromptRow], str]:
    """The rows, or why there are none."""
    try:
        return LedgerPrompts(str(path)).load(), ""
    except (ValueError, OSError) as error:
        return [], str(error)


CELLS = st.none() | st.integers(-(2**40), 2**40) | st.floats() | st.text(max_size=12) | st.binary(max_size=12)
COLUMNS = {
    "prompts": ["prompt_index", "ids", "text", "messages", "recorded"],
    "comparisons": ["branch", "weight", "passes", "meta", "a_ids", "a_text", "b_policy_logps", "b_finish_reason"],
}


@FUZZ
@given(where=st.sampled_from([(t, c) for t, cs in COLUMNS.items() for c in cs]), cell=CELLS)
def test_any_cell_of_a_ledger_is_read_or_refused_with_its_place(
    tmp_path_factory: pytest.TempPathFactory, where: tuple[str, str], cell: Any
) -> None:
    path = good_ledger(tmp_path_factory.mktemp("ledger") / "l.sqlite")
    with sqlite3.connect(path) as db:
        try:
            db.execute(f"UPDATE {where[0]} SET {where[1]} = ?", (cell,))
        except sqlite3.IntegrityError:
            return
    db.close()
    rows, message = load_ledger(path)
    assert rows or str(path) in message
    assert all(isinstance(row.text, str) or row.messages for row in rows)


@FUZZ
@given(data=st.binary(max_size=200), at=st.integers(0, 60_000))
def test_any_bytes_in_a_ledger_are_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, data: bytes, at: int
) -> None:
    path = good_ledger(tmp_path_factory.mktemp("ledger") / "l.sqlite")
    content = bytearray(path.read_bytes())
    content[at : at + len(data)] = data
    path.write_bytes(content)
    rows, message = load_ledger(path)
    assert rows or str(path) in message


# ---- pickles -------------------------------------------------------------------------------------------------------


class Bomb:
    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> Any:
        return Path.touch, (self.trace,)


def test_pickles_in_data_ledgers_and_weights_do_not_run(tmp_path: Path, tiny_policy: Path) -> None:
    trace = tmp_path / "trace"
    bomb = pickle.dumps(Bomb(trace))
    for name in ("rows.jsonl", "rows.json", "rows.parquet", "rows.csv", "rows.pkl", "rows.pt"):
        (tmp_path / name).write_bytes(bomb)
        with pytest.raises((ValueError, OSError)):
            DatasetPrompts(str(tmp_path / name)).load()
    ledger = good_ledger(tmp_path / "l.sqlite")
    with sqlite3.connect(ledger) as db:
        db.execute("UPDATE comparisons SET a_ids = ?", (bomb + b"\0" * (-len(bomb) % 4),))
    db.close()
    LedgerPrompts(str(ledger)).load()
    torch.save({"x": Bomb(trace)}, tmp_path / "evil.ckpt")
    with pytest.raises(pickle.UnpicklingError):
        meta(tmp_path / "evil.ckpt")
    assert not trace.exists()


def test_the_package_unpickles_nothing_but_plain_data() -> None:
    calls, modules = [], {"pickle", "joblib", "dill", "cloudpickle", "shelve", "marshal"}
    for file in [*(ROOT / "lightning_rlhf").rglob("*.py"), *(ROOT / "callbacks").rglob("*.py")]:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = [getattr(node, "module", None), *(alias.name for alias in node.names)]
                # the index of sharded checkpoints is a pickle, read with a list of the classes that it may name;
                # a labeler goes from this process to its workers, as an argument of a task does anyway
                allowed = {"pickle"} if file.name in ("sharded_checkpoints.py", "spread.py") else set()
                assert not (modules & set(names)) - allowed, file
            if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "pickle" and file.name != "spread.py":
                assert node.attr in ("Unpickler", "UnpicklingError"), file
            if isinstance(node, ast.ClassDef) and "pickle.Unpickler" in map(ast.unparse, node.bases):
                assert "find_class" in [part.name for part in node.body if isinstance(part, ast.FunctionDef)]
            if isinstance(node, ast.Call):
                assert ast.unparse(node.func) != "pickle.Unpickler", file
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("torch.load", "yaml.load", "yaml.unsafe_load"):
                calls.append((file.name, {k.arg: ast.unparse(k.value) for k in node.keywords}.get("weights_only")))
    assert calls
    assert {flag for _, flag in calls} == {"True"}


# ---- secrets -------------------------------------------------------------------------------------------------------


def test_run_json_describes_the_run_and_holds_no_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_API_KEY", 'sk-"0123456789')
    monkeypatch.setenv("HARMLESS", "plain-value-here")
    rows = tmp_path / "rows.jsonl"
    rows.write_text("abc")
    found = {"data": {"path": str(rows), "key": 'sk-"0123456789', "other": "plain-value-here", "n": 3}}
    path = write_record(tmp_path, found, 2, None)
    write_record(tmp_path, found, 2, "last.ckpt")
    text = path.read_text()
    assert "0123456789" not in text
    first, second = json.loads(text)["starts"]
    assert first["config"]["data"] == {"path": str(rows), "key": "[secret]", "other": "plain-value-here", "n": 3}
    assert first["data"] == [
        {
            "path": str(rows),
            "bytes": 3,
            "sha256": "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad",
        }
    ]
    assert second["continued_from"] == "last.ckpt"
    assert {"torch", "lightning", "lightning-rlhf"} <= set(first["versions"])
    assert first["processes"] == 2
    assert first["command"]
    assert without_secrets("a short one", {"K_TOKEN": "short"}) == "a short one"


@FUZZ
@given(settings_=PLAIN)
def test_any_settings_name_files_or_none(settings_: Any) -> None:
    for file in named_files(settings_):
        assert file.is_file()


@pytest.mark.parametrize("text", ["a" * 300, "rate " * 2000, "~nobody-has-this-name/x", "null \0 byte", "", "/"])
def test_texts_that_are_no_path_stay_texts(text: str) -> None:
    settings_ = {"preamble": text, "list": [text, 1.0]}
    assert identified(settings_) == settings_
    assert list(named_files(settings_)) == []
