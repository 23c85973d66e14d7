"""Reading rows from files: one function a format, each yielding (line or row number, fields)."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from common.config.data import DataConfig
from common.data.examples import Example, example_from_row
from common.errors import DataError
from common.sources import hub_id, is_hub, local_path

Row = tuple[int, dict[str, Any]]


def read_jsonl(lines: Iterable[str], name: str) -> Iterator[Row]:
    """Yield the objects of JSON Lines with their line numbers; blank lines are skipped."""
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line, parse_constant=_refuse_constant)
        except (ValueError, RecursionError) as error:
            detail = error.msg if isinstance(error, json.JSONDecodeError) else "not a JSON value"
            raise DataError(
                f"{name} line {number}: broken JSON ({detail}); expected one object a line. Repair or drop it."
            ) from None
        if not isinstance(row, dict):
            raise DataError(f"{name} line {number}: a {type(row).__name__}; expected an object. Correct it.")
        yield number, row


def read_csv(lines: Iterable[str], name: str) -> Iterator[Row]:
    """Yield the records of CSV with a header line, with their line numbers."""
    reader = csv.DictReader(lines, strict=True)
    try:
        if not reader.fieldnames or len(set(reader.fieldnames)) != len(reader.fieldnames):
            raise DataError(f"{name} line 1: header is empty or names a column twice; expected column names.")
        for row in reader:
            if None in row or None in row.values():
                raise DataError(
                    f"{name} line {reader.line_num}: {'more' if None in row else 'fewer'} values than the "
                    f"{len(reader.fieldnames)} columns; expected as many. Quote values that hold commas."
                )
            yield reader.line_num, row
    except csv.Error as error:
        raise DataError(f"{name} line {reader.line_num}: broken CSV ({error}); expected quoted CSV.") from None


READERS: dict[str, Callable[[Iterable[str], str], Iterator[Row]]] = {
    ".jsonl": read_jsonl,
    ".ndjson": read_jsonl,
    ".csv": read_csv,
}


def read_examples(source: str, data: DataConfig, key: str) -> list[Example]:
    """Read all rows of a file or hub data set as examples.

    Args:
        source: path, ``package:NAME/file`` or ``hub:owner/name#split``.
        data: the config section.
        key: the config key of the source, for errors.

    Raises:
        DataError: naming the file and the line.
    """
    return list(iterate_examples(source, data, key))


def iterate_examples(source: str, data: DataConfig, key: str) -> Iterator[Example]:
    """Yield the examples of a source one after the other; see :func:`read_examples`."""
    name, number = Path(source).name, 0
    for number, row in read_rows(source, data, key):
        yield example_from_row(row, data, f"{name} line {number}")
    if number == 0:
        raise DataError(f"{key}: {source} has no rows; expected at least one. Check the file.")


def read_rows(source: str, data: DataConfig, key: str) -> Iterator[Row]:
    """Yield the rows of a source as they are, with their line or row numbers; see :func:`read_examples`."""
    return _read_hub(source, data) if is_hub(source) else _read_file(local_path(source, key), key)


def _read_file(path: Path, key: str) -> Iterator[Row]:
    reader = READERS.get(path.suffix.lower())
    try:
        if path.is_dir():
            raise DataError(f"{key}: {path} is a folder; expected a file ({', '.join(READERS)}). Name the file.")
        if not path.exists():
            raise DataError(f"{key}: {path} does not exist; expected a data file. Check the path.")
        if not path.is_file():
            raise DataError(f"{key}: {path} is no regular file; expected a data file. Name a file.")
        if reader is None:
            raise DataError(f"{key}: {path.name} has an unknown format; expected {', '.join(READERS)}.")
        with path.open(encoding="utf-8-sig") as file:
            yield from reader(file, path.name)
    except UnicodeDecodeError:
        raise DataError(
            f"{key}: {path.name} byte {_first_foreign_byte(path)} is not UTF-8; expected UTF-8 text. Save it as UTF-8."
        ) from None
    except (OSError, ValueError) as error:
        what = getattr(error, "strerror", None) or "no usable path"
        raise DataError(f"{key}: {str(path)[:200]!r} cannot be read ({what}); expected a readable file.") from None


def _first_foreign_byte(path: Path) -> int:
    """Position of the first byte that is not UTF-8; the decoder of an open file counts from its last chunk."""
    try:
        path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        return error.start
    return 0


def _read_hub(source: str, data: DataConfig) -> Iterator[Row]:
    try:
        import datasets
    except ImportError:
        raise DataError(
            f"{source} needs the package 'datasets'; expected it installed. Run: pip install -e '.[hub]'."
        ) from None
    name, _, split = hub_id(source).partition("#")
    datasets.disable_progress_bars()
    try:
        table = datasets.load_dataset(name, split=split or "train", revision=data.revision)
    except (OSError, ValueError) as error:
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(f"{source} cannot be loaded ({first[:120]}); expected a data set name#split.") from None
    yield from ((number, dict(row)) for number, row in enumerate(table, start=1))


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")
