"""Files and hub datasets -> rows that know where they came from."""

from __future__ import annotations

import csv
import gzip
import json
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from .errors import UserError

FILE_KINDS = {".jsonl": "jsonl", ".json": "jsonl", ".csv": "csv", ".parquet": "parquet"}


class Row(NamedTuple):
    """A row of a dataset and where it came from, for messages."""

    columns: dict[str, Any]
    where: str


def load_rows(name: str, split: str = "train", config: str | None = None) -> list[Row]:
    """The rows of a file, a folder of files, or a hub dataset."""
    path = Path(name)
    if path.is_dir():
        files = sorted(p for p in path.iterdir() if _kind(p))
        if not files:
            raise UserError(f"{path}: wanted .jsonl, .csv or .parquet files; the folder has none")
        return [row for file in files for row in _file_rows(file)]
    if path.is_file():
        return _file_rows(path)
    if path.suffix in FILE_KINDS or path.suffix == ".gz" or name.startswith((".", os.sep)):
        raise UserError(f"{name}: no such file")
    import datasets

    try:
        dataset = datasets.load_dataset(name, config, split=split)
    except Exception as error:
        raise UserError(
            f"--dataset_name {name}: neither a file here nor a dataset the hub gave: {error}"
        ) from error
    return [Row(dict(row), f"{name}[{i}]") for i, row in enumerate(dataset)]


def _kind(path: Path) -> str | None:
    plain = path.with_suffix("") if path.suffix == ".gz" else path
    return FILE_KINDS.get(plain.suffix)


def _file_rows(path: Path) -> list[Row]:
    readers = {"jsonl": _json_rows, "csv": _csv_rows, "parquet": _parquet_rows}
    kind = _kind(path)
    if kind is None:
        raise UserError(f"{path}: wanted .jsonl, .json, .csv or .parquet; got {path.suffix!r}")
    try:
        return list(readers[kind](path))
    except (UnicodeDecodeError, EOFError, gzip.BadGzipFile, zlib.error, csv.Error) as error:
        raise UserError(f"{path}: wanted {kind} in UTF-8; got a broken file: {error}") from None


def _open(path: Path):
    opener = gzip.open if path.suffix == ".gz" else open
    return opener(path, "rt", encoding="utf-8-sig", newline="")


def _json_rows(path: Path) -> Iterator[Row]:
    """One JSON object a line, or one JSON array of objects."""
    with _open(path) as file:
        if ".json" in (path.suffix, path.with_suffix("").suffix) and file.read(1) == "[":
            file.seek(0)
            for i, row in enumerate(_json(file.read(), str(path))):
                yield Row(_checked(row, f"{path}[{i}]"), f"{path}[{i}]")
            return
        file.seek(0)
        for number, line in enumerate(file, 1):
            if line.strip():
                where = f"{path}:{number}"
                yield Row(_checked(_json(line, where), where), where)


def _json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, column" if error.lineno > 1 else "column"
        raise UserError(
            f"{where}: wanted one JSON object a line; {place} {error.colno}: {error.msg}. "
            "Mend or remove the line"
        ) from None


def _csv_rows(path: Path) -> Iterator[Row]:
    """Every cell is text: "nan" and "007" stay what they are. A row's line is its last."""
    csv.field_size_limit(1 << 30)
    with _open(path) as file:
        reader = csv.DictReader(file)
        for row in reader:
            where = f"{path}:{reader.line_num}"
            if None in row or None in row.values():
                raise UserError(
                    f"{where}: wanted {len(reader.fieldnames or ())} cells, as the header has; "
                    "quote cells that contain commas"
                )
            yield Row(row, where)


def _parquet_rows(path: Path) -> Iterator[Row]:
    from pyarrow import ArrowInvalid
    from pyarrow.parquet import read_table

    try:
        table = read_table(path)
    except ArrowInvalid as error:
        raise UserError(f"{path}: not a parquet file: {error}") from None
    for i, row in enumerate(table.to_pylist()):
        yield Row(row, f"{path}[{i}]")


def _checked(row: Any, where: str) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise UserError(f"{where}: wanted a JSON object; got {type(row).__name__}")
    return row
