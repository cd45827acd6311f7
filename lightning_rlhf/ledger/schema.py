"""The tables of a ledger, and the conversion of prompts, responses, labels and rollouts to rows; used by the store.

Reading gives exactly the values that were written: token ids are int32 blobs and log-probabilities float64 blobs,
little-endian. Texts are columns, so that ``sqlite3 ledger.sqlite "SELECT a_text, b_text FROM comparisons"`` shows them.
"""

from __future__ import annotations

import hashlib
import json
import math
import sqlite3
import struct
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TypeAlias, cast

from lightning_rlhf.ledger.people import PEOPLE_SCHEMA
from lightning_rlhf.types import Comparison, Label, Prompt, RecordedPair, Response, Rollout, free_tie


Cell: TypeAlias = int | float | str | bytes | None
"""A value in a table of SQLite."""


def _response_columns(side: str) -> list[str]:
    return [f"{side}_{name}" for name in ("ids", "text", "finish_reason", "policy_logps", "reference_logps", "source")]


PROMPT_COLUMNS = ["prompt_index", "ids", "text", "messages", "recorded"]
PROMPT_COLUMNS += _response_columns("chosen") + _response_columns("rejected")
ROLLOUT_COLUMNS = ["temperature", "state_values", *_response_columns("response")]
COMPARISON_COLUMNS = ["branch", "weight", "passes", "meta", *_response_columns("a"), *_response_columns("b")]
_TYPES = dict.fromkeys(("ids", "logps", "values"), "BLOB") | dict.fromkeys(("weight", "passes", "temperature"), "REAL")
_TYPES["index"] = "INTEGER"


def _declare(columns: list[str]) -> str:
    # the last word of a name decides the type: a_policy_logps is a BLOB, response_text is TEXT
    return ", ".join(f"{name} {_TYPES.get(name.split('_')[-1], 'TEXT')}" for name in columns)


def _marks(count: int) -> str:
    return ", ".join("?" * count)


ROLLOUT_SCHEMA = [
    "CREATE TABLE rollouts (id INTEGER PRIMARY KEY, round INTEGER NOT NULL, position INTEGER NOT NULL, "
    "sample INTEGER NOT NULL, prompt INTEGER NOT NULL REFERENCES prompts, "
    f"{_declare(ROLLOUT_COLUMNS)}, UNIQUE (round, position, sample))",
    "CREATE TABLE scores (rollout INTEGER PRIMARY KEY REFERENCES rollouts, reward REAL NOT NULL, std REAL, "
    "time REAL NOT NULL)",
    "CREATE TRIGGER scores_are_never_changed BEFORE UPDATE ON scores BEGIN SELECT RAISE(ABORT, 'append-only'); END",
    "CREATE TRIGGER scores_are_never_deleted BEFORE DELETE ON scores BEGIN SELECT RAISE(ABORT, 'append-only'); END",
]
"""Tables that version 2 of the schema added."""
TIE_SCHEMA = [
    "CREATE TABLE IF NOT EXISTS ties (comparison INTEGER PRIMARY KEY REFERENCES comparisons, time REAL NOT NULL)"
]
"""Table that version 3 of the schema added: pairs of equal responses, which no labeler saw."""
SILVER_COLUMNS = ["probability", "mean", "variance", "fitted", "cost"]
SILVER_SCHEMA = [
    # in a table of their own, so that no query for labels, rounds or passes counts them
    "CREATE TABLE IF NOT EXISTS silver (id INTEGER PRIMARY KEY, epoch INTEGER NOT NULL, position INTEGER NOT NULL, "
    f"prompt INTEGER NOT NULL REFERENCES prompts, {_declare(COMPARISON_COLUMNS)}, probability REAL, mean REAL, "
    "variance REAL, fitted INTEGER, cost REAL NOT NULL, time REAL NOT NULL, UNIQUE (epoch, position))",
]
"""Table that version 4 of the schema added: pairs with labels by a preference model."""
COUNTER_VERSION = 6
COUNTER_SCHEMA = [
    "CREATE TABLE IF NOT EXISTS counters (name TEXT PRIMARY KEY, count INTEGER NOT NULL, total REAL NOT NULL, "
    "correction REAL NOT NULL)",
    "INSERT OR IGNORE INTO counters VALUES ('passes', 0, 0.0, 0.0), ('ties', 0, 0.0, 0.0), ('scores', 0, 0.0, 0.0)",
    # labels and cost of all attempts up to one, a row for each transaction that added labels
    "CREATE TABLE IF NOT EXISTS running (attempt INTEGER PRIMARY KEY, labels INTEGER NOT NULL, cost REAL NOT NULL, "
    "correction REAL NOT NULL)",
    # pairs that two labelers judged are found without a scan of all attempts
    "CREATE INDEX IF NOT EXISTS routed_attempts ON attempts (comparison) WHERE status = 'routed'",
]
"""Tables that version 6 of the schema added: totals, so that no round scans the rows of earlier ones."""
RECORDED_SCHEMA = [
    "CREATE TABLE IF NOT EXISTS recorded (round INTEGER PRIMARY KEY, digest TEXT NOT NULL, rows BLOB NOT NULL, "
    "pairs INTEGER NOT NULL, ties INTEGER NOT NULL, time REAL NOT NULL)",
    "CREATE TABLE IF NOT EXISTS reference_logps (id INTEGER PRIMARY KEY, round INTEGER NOT NULL, "
    "positions BLOB NOT NULL, logps BLOB NOT NULL, time REAL NOT NULL)",
    "CREATE INDEX IF NOT EXISTS reference_logps_of_round ON reference_logps (round)",
]
"""Tables that version 6 of the schema added: recorded pairs by their rows, and their reference log-probabilities."""
SCHEMA = [
    "CREATE TABLE run (key TEXT PRIMARY KEY, value TEXT NOT NULL)",
    f"CREATE TABLE prompts (id INTEGER PRIMARY KEY, hash BLOB NOT NULL, {_declare(PROMPT_COLUMNS)}, "
    "UNIQUE (prompt_index, hash))",
    "CREATE TABLE comparisons (id INTEGER PRIMARY KEY, round INTEGER NOT NULL, position INTEGER NOT NULL, "
    f"prompt INTEGER NOT NULL REFERENCES prompts, {_declare(COMPARISON_COLUMNS)}, UNIQUE (round, position))",
    "CREATE TABLE attempts (id INTEGER PRIMARY KEY, comparison INTEGER NOT NULL REFERENCES comparisons, "
    "status TEXT NOT NULL, probability REAL, cost REAL NOT NULL, meta TEXT NOT NULL, time REAL NOT NULL, "
    "CHECK ((status = 'ok') = (probability IS NOT NULL)))",
    "CREATE INDEX attempts_of_comparison ON attempts (comparison)",
    # the database itself refuses a second paid label of a comparison
    "CREATE UNIQUE INDEX one_label_per_comparison ON attempts (comparison) WHERE status = 'ok'",
    "CREATE TRIGGER attempts_are_never_changed BEFORE UPDATE ON attempts BEGIN SELECT RAISE(ABORT, 'append-only'); END",
    "CREATE TRIGGER attempts_are_never_deleted BEFORE DELETE ON attempts BEGIN SELECT RAISE(ABORT, 'append-only'); END",
    "CREATE TABLE rounds (round INTEGER PRIMARY KEY, info TEXT NOT NULL, time REAL NOT NULL)",
    # updated by add_labels in the same transaction, so that counting a million labels costs nothing
    "CREATE TABLE totals (attempts INTEGER NOT NULL, labels INTEGER NOT NULL, cost REAL NOT NULL)",
    "INSERT INTO totals VALUES (0, 0, 0.0)",
    *ROLLOUT_SCHEMA,
    *TIE_SCHEMA,
    *SILVER_SCHEMA,
    *PEOPLE_SCHEMA,
    *COUNTER_SCHEMA,
    *RECORDED_SCHEMA,
]
INSERT_PROMPT = f"INSERT INTO prompts (hash, {', '.join(PROMPT_COLUMNS)}) VALUES ({_marks(1 + len(PROMPT_COLUMNS))})"
INSERT_COMPARISON = f"INSERT INTO comparisons VALUES ({_marks(4 + len(COMPARISON_COLUMNS))})"
INSERT_ROLLOUT = (
    f"INSERT INTO rollouts (round, position, sample, prompt, {', '.join(ROLLOUT_COLUMNS)}) "
    f"VALUES ({_marks(4 + len(ROLLOUT_COLUMNS))})"
)
INSERT_SCORE = f"INSERT INTO scores VALUES ({_marks(4)})"
SELECT_ROLLOUTS = (
    f"SELECT r.id, r.position, r.{', r.'.join(ROLLOUT_COLUMNS)}, r.prompt, p.{', p.'.join(PROMPT_COLUMNS)}, "
    "s.reward, s.std FROM rollouts r JOIN prompts p ON p.id = r.prompt LEFT JOIN scores s ON s.rollout = r.id "
    "WHERE r.round = ? ORDER BY r.position, r.sample"
)
INSERT_ATTEMPT = f"INSERT INTO attempts (comparison, status, probability, cost, meta, time) VALUES ({_marks(6)})"
_SELECT_PAIRS = (
    f"c.id, c.{', c.'.join(COMPARISON_COLUMNS)}, c.prompt, p.{', p.'.join(PROMPT_COLUMNS)}, "
    "l.probability, l.cost, l.meta, {tie} FROM comparisons c JOIN prompts p ON p.id = c.prompt "
    "LEFT JOIN attempts l ON l.comparison = c.id AND l.status = 'ok' "
)
SELECT_COMPARISONS = (
    f"SELECT c.position, {_SELECT_PAIRS}WHERE c.round = ? AND c.position > ? ORDER BY c.position LIMIT ?"
)
SELECT_PAIRS = f"SELECT c.round, {_SELECT_PAIRS}WHERE c.id IN (SELECT value FROM json_each(?))"
"""Pairs by a JSON list of their numbers, in any order; rows as of `SELECT_COMPARISONS`, with the round in front."""
SELECT_SIZES = (
    # SQLite finds the length of a blob in the head of its row, without reading it; 4 bytes a token
    "SELECT c.id, c.round, c.position, "
    "(COALESCE(length(p.ids), 0) + COALESCE(length(c.a_ids), 0) + COALESCE(length(c.b_ids), 0)) / 4, "
    "COALESCE(json_extract(c.meta, '$.reference_version'), -1), l.id, {tie} "
    "FROM comparisons c JOIN prompts p ON p.id = c.prompt "
    "LEFT JOIN attempts l ON l.comparison = c.id AND l.status = 'ok' "
    "WHERE {where} ORDER BY c.round, c.position"
)
INSERT_SILVER = (
    f"INSERT INTO silver (epoch, position, prompt, {', '.join(COMPARISON_COLUMNS + SILVER_COLUMNS)}, time) "
    f"VALUES ({_marks(3 + len(COMPARISON_COLUMNS) + len(SILVER_COLUMNS) + 1)})"
)
SELECT_SILVER = (
    f"SELECT c.position, c.id, c.{', c.'.join(COMPARISON_COLUMNS)}, c.prompt, p.{', p.'.join(PROMPT_COLUMNS)}, "
    f"c.{', c.'.join(SILVER_COLUMNS)} FROM silver c JOIN prompts p ON p.id = c.prompt "
    "WHERE c.epoch = ? ORDER BY c.position"
)
IS_TIE = "EXISTS (SELECT 1 FROM ties WHERE ties.comparison = c.id)"
"""Whether a comparison is a free tie; put 0 in its place for a ledger of an older version, which has none."""


def schema_version(db: sqlite3.Connection) -> int:
    """Version of the tables in the file."""
    return int(db.execute("PRAGMA user_version").fetchone()[0])


def comparison_row(comparison: Comparison, where: str) -> tuple[Cell, ...]:
    """The `COMPARISON_COLUMNS` of a comparison; ``where`` names it in errors."""
    weight, passes = _finite(comparison.weight, f"weight of {where}"), _finite(comparison.passes, f"passes of {where}")
    sides = (*_response_row(comparison.a, where), *_response_row(comparison.b, where))
    return comparison.branch, weight, passes, _meta(comparison.meta, where), *sides


def attempt_row(comparison: int, label: Label, time: float) -> tuple[Cell, ...]:
    """The columns of a label attempt; ``time`` in seconds since the epoch."""
    where = f"the label of comparison {comparison}"
    probability = None if label.probability is None else float(label.probability)
    return (
        comparison,
        label.status,
        probability,
        _finite(label.cost, f"cost of {where}"),
        _meta(label.meta, where),
        time,
    )


def silver_row(comparison: Comparison, label: Label | None, where: str) -> tuple[Cell, ...]:
    """The `COMPARISON_COLUMNS` and `SILVER_COLUMNS` of a pair; ``where`` names it in errors."""
    row = comparison_row(comparison, where)
    if label is None or label.probability is None:
        return *row, None, None, None, None, 0.0
    mean, variance = (_finite(label.meta[name], f"{name} of {where}") for name in ("mean", "variance"))
    return *row, float(label.probability), mean, variance, int(label.meta["fitted"]), _finite(label.cost, where)


def decode_silver(row: Sequence[object], prompts: dict[int, Prompt]) -> tuple[Comparison, Label | None]:
    """Read a row of `SELECT_SILVER`; ``prompts`` as in `decode`."""
    probability, mean, variance, fitted, cost = cast(tuple[float | None, float, float, int, float], row[-5:])
    comparison = decode_comparison(row[2:-5], prompts)
    if probability is None:
        return comparison, None
    return comparison, Label(probability, cost=cost, meta=silver_meta(mean, variance, fitted))


def silver_meta(mean: float, variance: float, fitted: int) -> dict[str, float | int | str]:
    """Entries of a silver label.

    Args:
        mean: posterior mean of the reward gap, nats.
        variance: its posterior variance, nats^2.
        fitted: real labels that the preference model was fitted to.
    """
    return {"kind": "silver", "mean": mean, "variance": variance, "fitted": fitted}


def rollout_row(rollout: Rollout, where: str) -> tuple[Cell, ...]:
    """The `ROLLOUT_COLUMNS` of a rollout; ``where`` names it in errors."""
    temperature = _finite(rollout.temperature, f"temperature of {where}")
    return temperature, _pack(rollout.values, "d"), *_response_row(rollout.response, where)


def score_row(rollout: int, reward: float, std: float | None, time: float) -> tuple[Cell, ...]:
    """The columns of a score; ``time`` in seconds since the epoch."""
    where = f"rollout {rollout}"
    known_std = None if std is None else _finite(std, f"std of the reward of {where}")
    return rollout, _finite(reward, f"reward of {where}"), known_std, time


def decode_rollout(row: Sequence[object], prompts: dict[int, Prompt]) -> tuple[int, int, Rollout]:
    """Read a row of `SELECT_ROLLOUTS`: id, position, rollout; ``prompts`` as in `decode`."""
    # in the order of SELECT_ROLLOUTS
    # id, position, temperature, values, response [4:10], prompt id, prompt [11:-2], reward, std
    identity, position, prompt = cast(tuple[int, int, int], (row[0], row[1], row[10]))
    temperature, reward, std = cast(tuple[float, float | None, float | None], (row[2], row[-2], row[-1]))
    if prompt not in prompts:
        prompts[prompt] = to_prompt(row[11:-2])
    response = _to_response(row[4:10])
    return identity, position, Rollout(prompts[prompt], response, temperature, _floats(row[3]), reward, std)


def find_or_add_prompt(db: sqlite3.Connection, prompt: Prompt) -> int:
    """The row number of a prompt, which is stored once per index and content."""
    where = f"prompt {prompt.index}"
    chosen, rejected = prompt.pair or (None, None)
    turns: object = prompt.messages
    # `to_prompt` knows turns with options by the dictionary, and plain turns by the list
    if prompt.template_options:
        turns = {"turns": prompt.messages, "template_options": prompt.template_options}
    messages = None if prompt.messages is None else json.dumps(turns)
    recorded = None if prompt.recorded is None else json.dumps(asdict(prompt.recorded))
    row: tuple[Cell, ...] = (prompt.index, _pack(prompt.ids, "i"), _text(prompt.text, where), messages, recorded)
    row += (*_response_row(chosen, where), *_response_row(rejected, where))
    # UNIQUE (prompt_index, hash): an index on all columns would store every prompt twice
    digest = hashlib.blake2b(repr(row).encode(), digest_size=16).digest()
    found = db.execute("SELECT id FROM prompts WHERE prompt_index = ? AND hash = ?", (prompt.index, digest)).fetchone()
    if found is not None:
        return int(found[0])
    identity = db.execute(INSERT_PROMPT, (digest, *row)).lastrowid
    assert identity is not None
    return identity


def decode(row: Sequence[object], prompts: dict[int, Prompt]) -> tuple[int, int, Comparison, Label | None]:
    """Read a row of `SELECT_COMPARISONS` or `SELECT_PAIRS`: position or round, id, comparison, label.

    Args:
        row: the row.
        prompts: prompts decoded so far, by row number; extended, so that a prompt that occurs often is decoded once.
    """
    # in the order of SELECT_COMPARISONS: position, id, comparison [2:-4], label, tie
    position, identity = cast(tuple[int, int], (row[0], row[1]))
    comparison = decode_comparison(row[2:-4], prompts)
    probability, cost, label_meta = cast(tuple[float | None, float, str], row[-4:-1])
    is_tie = bool(row[-1])
    label = None if probability is None else Label(probability, "ok", cost, json.loads(label_meta))
    if label is None and is_tie:
        label = free_tie()
    return position, identity, comparison, label


def decode_comparison(row: Sequence[object], prompts: dict[int, Prompt]) -> Comparison:
    """Read the `COMPARISON_COLUMNS` of a row with its prompt behind them; ``prompts`` as in `decode`."""
    # branch to meta [:4], a [4:10], b [10:16], prompt id, prompt [17:]
    branch, weight, passes, meta = row[:4]
    prompt = cast(int, row[16])
    if prompt not in prompts:
        prompts[prompt] = to_prompt(row[17:])
    pair = (_to_response(row[4:10]), _to_response(row[10:16]))
    # SQLite stores any type in any column: a damaged file is an error here, not later
    if not isinstance(weight, float) or not isinstance(passes, float) or not isinstance(branch, str):
        raise TypeError(f"a comparison has weight {weight!r}, passes {passes!r} and branch {branch!r}")
    known = json.loads(cast(str, meta))
    if not isinstance(known, dict):
        raise TypeError(f"a comparison has the meta {meta!r}")
    return Comparison(prompts[prompt], *pair, branch, weight, passes, known)


def to_prompt(row: Sequence[object]) -> Prompt:
    """Read the `PROMPT_COLUMNS` of a prompt."""
    index, ids, text, messages, recorded, *responses = row
    if not isinstance(index, int) or not isinstance(text, str):
        raise TypeError(f"a prompt has number {index!r} and text {text!r}")
    turns: object = None if messages is None else json.loads(cast(str, messages))
    options: dict[str, object] = {}
    if isinstance(turns, dict):
        options = turns.get("template_options", {})
        turns = turns.get("turns")
    if turns is not None and not (isinstance(turns, list) and all(map(_is_turn, turns))):
        raise TypeError(f"a prompt has the messages {messages!r}")
    return Prompt(
        index=index,
        ids=_ids(ids),
        text=text,
        messages=None if turns is None else tuple(turns),
        pair=None if responses[0] is None else (_to_response(responses[:6]), _to_response(responses[6:])),
        recorded=None if recorded is None else RecordedPair(**json.loads(cast(str, recorded))),
        template_options=options,
    )


def _response_row(response: Response | None, where: str) -> tuple[Cell, ...]:
    if response is None:
        return (None,) * 6
    policy, reference = _pack(response.policy_logps, "d"), _pack(response.reference_logps, "d")
    text = _text(response.text, where)
    return _pack(response.ids, "i"), text, response.finish_reason, policy, reference, response.source


def _to_response(row: Sequence[object]) -> Response:
    ids, text, finish_reason, policy, reference, source = row
    if not isinstance(text, str) or finish_reason not in ("eos", "length"):
        raise TypeError(f"a response has text {text!r} and finish reason {finish_reason!r}")
    if not isinstance(source, str):
        raise TypeError(f"a response has source {source!r}")
    return Response(_ids(ids), text, finish_reason, _floats(policy), _floats(reference), source)


def _pack(values: Sequence[float] | None, kind: str) -> bytes | None:
    return None if values is None else struct.pack(f"<{len(values)}{kind}", *values)


def _is_turn(turn: object) -> bool:
    return (
        isinstance(turn, dict) and isinstance(turn.get("role"), str) and isinstance(turn.get("content", 0), str | None)
    )


def _ids(blob: object) -> tuple[int, ...]:
    return () if blob is None else _unpack(cast(bytes, blob), "i")


def _floats(blob: object) -> tuple[float, ...] | None:
    return None if blob is None else _unpack(cast(bytes, blob), "d")


def _unpack(blob: bytes, kind: str) -> tuple[int, ...]:
    # a blob that is cut in the middle of a number fails here with struct.error
    return struct.unpack(f"<{len(blob) // struct.calcsize('<' + kind)}{kind}", blob)


def _finite(value: float, name: str) -> float:
    # SQLite stores NaN as NULL, which would read back as a missing number
    if not math.isfinite(value):
        raise ValueError(f"{name} is {value}; it must be a finite number")
    return float(value)


def _meta(meta: Mapping[str, object], where: str) -> str:
    for key, value in meta.items():
        if not isinstance(key, str) or not isinstance(value, str | int | float | bool | None):
            raise ValueError(
                f"meta of {where} holds {key!r}: {type(value).__name__}; only JSON scalars under str keys are read "
                f"back as they were written: convert it to a number or a string"
            )
    return json.dumps(meta)


def _text(text: str, where: str) -> str:
    # sqlite3 encodes text as UTF-8 and would refuse a lone surrogate without naming the row
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"text of {where} is not valid Unicode ({error.reason}): {text[:80]!r}; clean the data"
        ) from error
    return text
