"""The columns of a request, from the words of a command line and from files.

Comes in: ``key=value`` words, a CSV, JSON or Parquet file, and the types that a service asks for. Goes out: a list of
typed values for each column. Whatever is not plainly a value of its type is refused, naming the column and the row.
"""

from __future__ import annotations

import base64
import binascii
import csv
import json
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from featserve.errors import InvalidRequest, hint, invalid
from featserve.types import Bool, Bytes, Int32, Int64, String, Timestamp, Type

Columns = dict[str, list[Any]]

FORMATS = (".csv", ".json", ".parquet")
BOOLS = {"true": True, "false": False}


def read_columns(words: Sequence[str], file: Path | None, expected: Mapping[str, Type]) -> Columns:
    """Return the columns that ``words`` and ``file`` bring, of those that are ``expected``.

    A word with one value goes with every row of the others. Raises InvalidRequest.
    """
    columns = {} if file is None else read_file(file, expected)
    for word in words:
        name, equals, text = word.partition("=")
        if not equals:
            raise InvalidRequest(f"{word!r} is not NAME=VALUE; the columns are {', '.join(expected)}")
        if name not in expected:
            raise InvalidRequest(f"unknown column {name!r}{hint(name, expected)}")
        if name in columns:
            raise InvalidRequest(f"column {name!r} is given twice; several values are written {name}=a,b,c")
        columns[name] = parse_values(text, expected[name], name)
    rows = max((len(values) for values in columns.values()), default=0)
    given = {word.partition("=")[0] for word in words}
    return {name: values * rows if name in given and len(values) == 1 else values for name, values in columns.items()}


def parse_values(text: str, type_: Type, name: str) -> list[Any]:
    """Return the values of ``a,b,c``, or of a JSON list, ``["a,b", "c"]``."""
    if not text.startswith("["):
        return [parse_text(part, type_, f"{name}[{row}]") for row, part in enumerate(text.split(","))]
    try:
        values = json.loads(text)
    except ValueError as error:
        raise invalid(name, f"{text!r} starts as a JSON list and is none: {error}") from None
    if type_.vector and not (values and isinstance(values[0], list)):
        values = [values]
    return [parse_json(value, type_, f"{name}[{row}]") for row, value in enumerate(values)]


def parse_json(value: Any, type_: Type, where: str) -> Any:
    """Return a value of a JSON document: text is parsed as on the command line, the rest is as it is."""
    return parse_text(value, type_, where) if isinstance(value, str) else value


def parse_text(text: str, type_: Type, where: str) -> Any:
    """Return the value that ``text`` means."""
    if type_ is String:
        return text
    try:
        if type_ is Bool:
            return BOOLS[text.lower()]
        if type_ is Timestamp:
            return datetime.fromisoformat(text)
        if type_ is Bytes:
            return parse_bytes(text)
        if type_ in (Int32, Int64):
            return int(text)
        if type_.floating and not type_.vector:
            return float(text)
    except (ValueError, KeyError, binascii.Error):
        pass
    raise invalid(where, f"expected {type_}{SPELLINGS.get(type_.name, '')}, got {text!r}")


SPELLINGS = {
    "bool": " (true or false)",
    "timestamp": " (as in 2026-01-31T12:00:00Z)",
    "bytes": " (0x and hex digits, or base64: and base64)",
}


def parse_bytes(text: str) -> bytes:
    """Return the bytes of ``0x48656c6c6f`` or ``base64:SGVsbG8=``; raises ValueError."""
    if text.startswith("0x"):
        return bytes.fromhex(text[2:])
    if text.startswith("base64:"):
        return base64.b64decode(text[7:], validate=True)
    raise ValueError(text)


def read_file(path: Path, expected: Mapping[str, Type]) -> Columns:
    """Return those columns of a file that are ``expected``; it may hold others."""
    try:
        if path.suffix == ".parquet":
            names = [name for name in pq.read_schema(path).names if name in expected]
            columns: Columns = pq.read_table(path, columns=names).to_pydict()
            return columns
        if path.suffix == ".csv":
            with path.open(encoding="utf-8-sig", newline="") as file:
                rows: list[dict[str, Any]] = list(csv.DictReader(file, strict=True))
            return _columns(rows, expected)
        if path.suffix == ".json":
            return _from_json(path.read_text(encoding="utf-8"), expected)
    except InvalidRequest as error:
        raise InvalidRequest(f"{path}: {error}", violations=error.violations) from None
    except (OSError, ValueError, csv.Error, pa.ArrowException) as error:
        raise invalid(str(path), f"cannot be read as {path.suffix[1:]}: {error}") from None
    raise invalid(str(path), f"ends in {path.suffix or 'nothing'}; a file of columns ends in {', '.join(FORMATS)}")


def _from_json(text: str, expected: Mapping[str, Type]) -> Columns:
    """Return the columns of a list of objects, an object of lists, or an object a line."""
    try:
        found = json.loads(text)
    except ValueError:
        found = [json.loads(line) for line in text.splitlines() if line.strip()]
    if isinstance(found, dict) and all(isinstance(values, list) for values in found.values()):
        return {
            name: [parse_json(v, expected[name], f"{name}[{row}]") for row, v in enumerate(values)]
            for name, values in found.items()
            if name in expected
        }
    rows = [found] if isinstance(found, dict) else found
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError("it is neither a list of objects, an object of lists, nor an object on each line")
    return _columns(rows, expected)


def _columns(rows: Iterable[Mapping[str, Any]], expected: Mapping[str, Type]) -> Columns:
    """Return rows as columns; a value that a row lacks is None."""
    columns: Columns = {}
    rows = list(rows)
    for name, type_ in expected.items():
        if any(name in row for row in rows):
            columns[name] = [parse_json(row.get(name), type_, f"{name}[{i}]") for i, row in enumerate(rows)]
    return columns
