"""Raw rows, as dictionaries, of local files and folders, of data sets on the Hub, and of objects in memory.

Every row comes with its origin, ``"file.jsonl row 12"``, for error messages.
"""

from __future__ import annotations

import gzip
import json
import re
import reprlib
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from glob import glob
from itertools import chain, islice
from pathlib import Path
from typing import Any, TypeAlias, cast

from lightning_rlhf.runtime.hub_access import hub_fault, hub_or_cache


Row: TypeAlias = dict[str, Any]
"""Columns of a data row, of any type."""

JSONL_SUFFIXES = (".jsonl", ".jsonl.gz", ".ndjson", ".ndjson.gz")
JSON_SUFFIXES = (".json", ".json.gz")
PARQUET_SUFFIXES = (".parquet",)
CSV_SUFFIXES = (".csv", ".csv.gz", ".tsv", ".tsv.gz")
SUFFIXES = JSONL_SUFFIXES + JSON_SUFFIXES + PARQUET_SUFFIXES + CSV_SUFFIXES
OTHER_SUFFIXES = (".txt", ".arrow", ".zip", ".zst", ".xlsx", ".yaml", ".yml", ".pkl", ".sqlite")

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 60


@dataclass(frozen=True)
class DatasetFiles:
    """Arguments of `datasets.load_dataset`, for data that a path alone does not name.

    Args:
        path: id of a data set on the Hub, local folder, or name of a format such as ``csv``.
        name: subset of the data set.
        data_dir: folder within it.
        data_files: files within it, or of the format; may have ``*``.
        revision: branch, tag or commit of a data set on the Hub.
        streaming: read rows as they are needed, rather than the whole data set first; goes well with ``limit``.
        shuffle_buffer: of streamed rows, the next one is sampled from this many, >= 1; default: in order. With
            ``limit`` the first rows of the shuffled stream are taken. Files are shuffled as well.
        shuffle_seed: decides the order, which is the same on every rank and after every restart.

    Raises:
        ValueError: if a buffer is given for rows that are not streamed, or holds none.
    """

    path: str
    name: str | None = None
    data_dir: str | None = None
    data_files: str | list[str] | None = None
    revision: str | None = None
    streaming: bool = False
    shuffle_buffer: int | None = None
    shuffle_seed: int = 0

    def __post_init__(self) -> None:
        if self.shuffle_buffer is not None and self.shuffle_buffer < 1:
            raise ValueError(f"shuffle_buffer must be at least 1 row, or null; got {self.shuffle_buffer}")
        if self.shuffle_buffer is not None and not self.streaming:
            raise ValueError("shuffle_buffer is for streamed rows: set streaming: true, or leave it out")

    def __str__(self) -> str:
        parts = [self.path, self.name, self.data_dir, self.data_files, self.revision and f"@{self.revision}"]
        return " ".join(str(part) for part in parts if part)


RowData: TypeAlias = Sequence[Mapping[str, object]]
"""Rows in memory: a list of dictionaries. A `datasets.Dataset` is taken as well."""

Data: TypeAlias = str | list[str] | DatasetFiles | RowData

IN_MEMORY = "rows in memory"


def holds_rows(data: object) -> bool:
    """Whether an object is rows: a list of dictionaries, or a `datasets.Dataset`, also an iterable one."""
    if isinstance(data, Sequence) and not isinstance(data, str | bytes):
        return all(isinstance(row, Mapping) for row in data)
    return hasattr(data, "column_names") and hasattr(data, "__iter__")


def name_of(data: Data) -> str:
    """Data in words, for messages and fingerprints."""
    if holds_rows(data):
        return IN_MEMORY
    return ", ".join(map(str, data)) if isinstance(data, list) else str(data)


def read_rows(data: Data, split: str = "train", limit: int | None = None) -> list[tuple[str, Row]]:
    """Read the rows of some data, each with its origin.

    Args:
        data: local file (.jsonl, .json, .csv, .tsv, each also .gz, or .parquet), which may have ``*``; local folder, or
            Hub id such as ``"trl-lib/ultrafeedback_binarized"``; a list of these; arguments of `load_dataset`; or rows
            in memory. A local file or folder takes precedence over a Hub id.
        split: split of a folder or Hub data set; a single file has none.
        limit: maximum number of rows, >= 1. Default: all.

    Raises:
        ValueError: if there is no such data, if it cannot be read, or if it has no rows.
    """
    # a generator: JSON lines and Parquet batches behind the limit are not parsed
    result = list(stream_rows(data, split, limit))
    if not result:
        raise ValueError(f"{name_of(data)}: has no rows: check the file, or choose another split than {split!r}")
    return result


def local_files(data: Data) -> list[Path]:
    """Local files that some data names, in the order in which they are read; none if anything else is read."""
    if isinstance(data, DatasetFiles) or holds_rows(data):
        return []
    found: list[Path] = []
    for path in [data] if isinstance(data, str) else cast(list[str], data):
        local = Path(path).expanduser()
        # as in `_rows_at`: a pattern stands for sorted files
        matching = [local] if local.is_file() else [Path(file) for file in sorted(glob(str(local), recursive=True))]
        if not matching or not all(file.is_file() for file in matching):
            return []
        found += matching
    return found


def stream_rows(data: Data, split: str = "train", limit: int | None = None) -> Iterator[tuple[str, Row]]:
    """The rows of `read_rows`, one after another.

    Raises:
        ValueError: if the limit is below 1, if there is no such data, or if it cannot be read.
    """
    check_limit(limit)
    return islice(_all_rows(data, split), limit)


def check_limit(limit: int | None) -> None:
    """Check a maximum number of rows; None is no limit.

    Raises:
        ValueError: if it is below 1.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1, or null for all rows; got {limit}")


def _all_rows(data: Data, split: str) -> Iterator[tuple[str, Row]]:
    if holds_rows(data):
        # a data set of the Hub's library has no type
        return _objects(enumerate(cast(Iterable[object], data), start=1), IN_MEMORY)
    if isinstance(data, DatasetFiles):
        return _dataset_rows(Path(data.path).expanduser(), data, split)
    if not isinstance(data, str):
        return chain.from_iterable(_rows_at(str(path), split) for path in data)
    return _rows_at(data, split)


def _rows_at(path: str, split: str) -> Iterator[tuple[str, Row]]:
    """Rows of a path: a file, files by a pattern, a folder, or an id on the Hub."""
    local = Path(path).expanduser()
    if local.is_file():
        return _file_rows(local, path)
    if re.search(r"[*?\[]", path):
        # sorted, since every rank must read the same order
        files = sorted(glob(str(local), recursive=True))
        if files:
            return chain.from_iterable(_file_rows(Path(file), file) for file in files)
    elif path and (local.is_dir() or _is_hub_id(path)):
        return _dataset_rows(local, path, split)
    raise ValueError(
        f"{path}: no such file or folder (relative paths count from {Path.cwd()}): check the path, or give a Hub "
        f"data set by its id, 'owner/name'"
    )


def _is_hub_id(path: str) -> bool:
    # `file.jsonl` looks like an id as well, but a missing file is the more likely mistake
    is_file = path.lower().endswith((*SUFFIXES, *OTHER_SUFFIXES))
    return re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", path) is not None and not is_file


def _file_rows(local: Path, path: str) -> Iterator[tuple[str, Row]]:
    name = local.name.lower()
    if name.endswith(PARQUET_SUFFIXES):
        values = _parquet_values(local, path)
    elif name.endswith(JSONL_SUFFIXES):
        values = _json_line_values(_lines(local, path), path)
    elif name.endswith(JSON_SUFFIXES):
        values = _json_values(local, path)
    elif name.endswith(CSV_SUFFIXES):
        values = _csv_values(local, path)
    else:
        raise ValueError(f"{path}: cannot tell the format from the name: use one of {', '.join(SUFFIXES)}")
    return _objects(values, path)


def _objects(values: Iterable[tuple[int, object]], path: str) -> Iterator[tuple[str, Row]]:
    """Check that numbered values are objects, and name their origin."""
    for number, value in values:
        source = f"{path} row {number}"
        if not isinstance(value, Mapping):
            raise ValueError(
                f"{source}: expected an object with named fields, got {describe(value)}: write rows such as "
                f'{{"prompt": "..."}}'
            )
        yield source, dict(value)


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


def _csv_values(local: Path, path: str) -> Iterator[tuple[int, object]]:
    # takes a second to import, and JSONL does without it
    import pyarrow
    import pyarrow.csv

    # a quoted text may span lines
    separator = "\t" if ".tsv" in local.suffixes else ","
    options = pyarrow.csv.ParseOptions(delimiter=separator, newlines_in_values=True)
    try:
        rows = pyarrow.csv.read_csv(local, parse_options=options).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path}: not a readable CSV file ({error}): write it again") from error
    for number, value in enumerate(rows, start=1):
        yield number, {name: cell for name, cell in value.items() if cell is not None}


def _dataset_rows(local: Path, path: str | DatasetFiles, split: str) -> Iterator[tuple[str, Row]]:
    # takes a second to import, and single files do without it
    import datasets

    given = path if isinstance(path, DatasetFiles) else DatasetFiles(path)
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
            loaded = _from_library(local, given, split)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        cause = " / ".join(str(part) for part in (error, error.__cause__) if part is not None)
        kind = "folder" if local.is_dir() else "Hub data set"
        fault = hub_fault() if isinstance(error, OSError) and _needs_hub(local, given) else None
        if fault is not None:
            cause = f"not in the cache of the Hub, and {fault}"
        remedy = (
            f"check that it has data files and a split {split!r}, or name one file of it"
            if local.is_dir()
            else "check the id, the split and the connection, or give the path of a local file or folder"
        )
        raise ValueError(f"{path}: cannot read split {split!r} of this {kind} ({cause}): {remedy}") from error
    # the number is a place in the stream, and in the data only where nothing was shuffled
    shuffled = isinstance(path, DatasetFiles) and path.shuffle_buffer is not None
    place = " of the shuffled stream" if shuffled else ""
    for number, row in enumerate(loaded, start=1):
        yield f"{path}[{split}] row {number}{place}", {name: _without_nulls(cell) for name, cell in row.items()}


def _from_library(local: Path, given: DatasetFiles, split: str) -> Iterable[Mapping[str, object]]:
    import datasets

    source = given.path if _needs_hub(local, given) else local
    with hub_or_cache(source):
        loaded = datasets.load_dataset(
            str(local) if local.is_dir() else given.path,
            given.name,
            data_dir=given.data_dir,
            data_files=given.data_files,
            revision=given.revision,
            split=split,
            streaming=given.streaming,
        )
    if given.shuffle_buffer is not None:
        loaded = loaded.shuffle(seed=given.shuffle_seed, buffer_size=given.shuffle_buffer)
    return cast(Iterable[Mapping[str, object]], loaded)


def _needs_hub(local: Path, given: DatasetFiles) -> bool:
    # "csv" with local files is a format, and no id
    return not local.is_dir() and ("/" in given.path or given.data_files is None)


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
