"""Raw rows, as dictionaries, of local JSONL, JSON and Parquet files, of folders, and of data sets on the Hub.

Every row comes with its origin, ``"file.jsonl row 12"``, for error messages.
"""

from __future__ import annotations

import gzip
import json
import re
import reprlib
import zlib
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, TypeAlias, cast


Row: TypeAlias = dict[str, Any]
"""Columns of a data row, of any type."""

JSONL_SUFFIXES = (".jsonl", ".jsonl.gz", ".ndjson", ".ndjson.gz")
JSON_SUFFIXES = (".json", ".json.gz")
PARQUET_SUFFIXES = (".parquet",)
SUFFIXES = JSONL_SUFFIXES + JSON_SUFFIXES + PARQUET_SUFFIXES

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 60


def read_rows(path: str, split: str = "train", limit: int | None = None) -> list[tuple[str, Row]]:
    """Read the rows of a file, of a folder or of a data set on the Hub, each with its origin.

    Args:
        path: local file (.jsonl, .json, each also .gz, or .parquet), local folder, or Hub id such as
            ``"trl-lib/ultrafeedback_binarized"``; a local file or folder takes precedence.
        split: split of a folder or Hub data set; a single file has none.
        limit: maximum number of rows, >= 1. Default: all.

    Raises:
        ValueError: if there is no such data, if it cannot be read, or if it has no rows.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1, or null for all rows; got {limit}")
    local = Path(path).expanduser()
    if local.is_file():
        rows = _file_rows(local, path)
    elif path and (local.is_dir() or _is_hub_id(path)):
        rows = _dataset_rows(local, path, split)
    else:
        raise ValueError(
            f"{path}: no such file or folder (relative paths count from {Path.cwd()}): check the path, or give a Hub "
            f"data set by its id, 'owner/name'"
        )
    # rows is a generator: JSON lines and Parquet batches behind the limit are not parsed
    result = list(islice(rows, limit))
    if not result:
        raise ValueError(f"{path}: has no rows: check the file, or choose another split than {split!r}")
    return result


def _is_hub_id(path: str) -> bool:
    # `file.jsonl` looks like an id as well, but a missing file is the more likely mistake
    return re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", path) is not None and not path.lower().endswith(SUFFIXES)


def _file_rows(local: Path, path: str) -> Iterator[tuple[str, Row]]:
    name = local.name.lower()
    if name.endswith(PARQUET_SUFFIXES):
        values = _parquet_values(local, path)
    elif name.endswith(JSONL_SUFFIXES):
        values = _json_line_values(_lines(local, path), path)
    elif name.endswith(JSON_SUFFIXES):
        values = _json_values(local, path)
    else:
        raise ValueError(f"{path}: cannot tell the format from the name: use one of {', '.join(SUFFIXES)}")
    for number, value in values:
        source = f"{path} row {number}"
        if not isinstance(value, dict):
            raise ValueError(
                f"{source}: expected an object with named fields, got {describe(value)}: write rows such as "
                f'{{"prompt": "..."}}'
            )
        yield source, value


def _lines(local: Path, path: str) -> Iterator[tuple[int, bytes]]:
    """Number the lines of a file, unzipping where its name ends in .gz."""
    try:
        with gzip.open(local, "rb") if local.name.lower().endswith(".gz") else local.open("rb") as file:
            # errors of gzip come while lines are read, so that the loop is inside of the try
            yield from enumerate(file, start=1)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(
            f"{path}: not a whole gzip file ({error}): copy it again, or drop .gz from its name"
        ) from error


def _json_line_values(lines: Iterator[tuple[int, bytes]], path: str) -> Iterator[tuple[int, object]]:
    """Parse one value per line; blank lines are no rows, but they count, so that row 12 is line 12."""
    for number, line in lines:
        if line.strip():
            yield number, _parse_json(line, f"{path} row {number}", "write one JSON object per line, in UTF-8")


def _json_values(local: Path, path: str) -> Iterator[tuple[int, object]]:
    """Parse a JSON list of rows, or JSON lines under the name .json, as many data sets on the Hub have them."""
    lines = list(_lines(local, path))
    first = next((line for _, line in lines if line.strip()), b"")
    # the byte order mark of UTF-8, with which some files begin
    if first.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"["):
        whole = b"".join(line for _, line in lines)
        values = cast(list[object], _parse_json(whole, path, "write a list of objects, in UTF-8"))
        yield from enumerate(values, start=1)
    else:
        yield from _json_line_values(iter(lines), path)


def _parse_json(data: bytes, where: str, remedy: str) -> object:
    try:
        # utf-8-sig drops the byte order mark, which is no JSON
        return cast(object, json.loads(data.decode("utf-8-sig")))
    except RecursionError as error:
        raise ValueError(f"{where}: nested too deeply to be read: {remedy}") from error
    except ValueError as error:  # bad JSON, bad UTF-8, or an integer of thousands of digits
        raise ValueError(f"{where}: not valid JSON ({error}): {remedy}") from error


def _parquet_values(local: Path, path: str) -> Iterator[tuple[int, object]]:
    # takes a second to import, and JSONL does without it
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(local) as file:
            number = 0
            # in portions: with a limit the rest of the file is not turned into Python objects
            for batch in file.iter_batches(batch_size=1024):
                for value in batch.to_pylist():
                    number += 1
                    yield number, {name: _without_nulls(cell) for name, cell in value.items()}
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path}: not a readable Parquet file ({error}): write it again") from error


def _dataset_rows(local: Path, path: str, split: str) -> Iterator[tuple[str, Row]]:
    # takes a second to import, and single files do without it
    import datasets

    try:
        if (local / "dataset_dict.json").is_file() or (local / "state.json").is_file():  # written by save_to_disk
            # load_dataset refuses folders of save_to_disk
            loaded = datasets.load_from_disk(str(local))
            if isinstance(loaded, datasets.DatasetDict):
                if split not in loaded:
                    # caught below, where path and remedy are added
                    raise ValueError(f"no split {split!r} among {sorted(loaded)}")
                loaded = loaded[split]
        else:
            loaded = datasets.load_dataset(str(local) if local.is_dir() else path, split=split)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        cause = " / ".join(str(part) for part in (error, error.__cause__) if part is not None)
        kind = "folder" if local.is_dir() else "Hub data set"
        remedy = (
            f"check that it has data files and a split {split!r}, or name one file of it"
            if local.is_dir()
            else "check the id, the split and the connection, or give the path of a local file or folder"
        )
        raise ValueError(f"{path}: cannot read split {split!r} of this {kind} ({cause}): {remedy}") from error
    for number, row in enumerate(loaded, start=1):
        yield f"{path}[{split}] row {number}", {name: _without_nulls(cell) for name, cell in row.items()}


def _without_nulls(value: object) -> object:
    """A cell without the nulls that Arrow adds for fields of other rows."""
    if isinstance(value, list):
        return [_without_nulls(item) for item in value]
    if isinstance(value, dict):
        return {name: _without_nulls(item) for name, item in value.items() if item is not None}
    return value


def describe(value: object) -> str:
    """Describe a wrong value briefly: ``"7 (int)"``, or ``"null"``."""
    if value is None:
        return "null"
    return f"{_SHORT.repr(value)} ({type(value).__name__})"
