"""Reading the records of a table: parquet from a row on, lines of JSON and CSV from a byte on."""

import csv
import io
import json
import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, cast

import pyarrow as pa
import pyarrow.parquet as pq

from btok_hf.corpus.rows import File

DELIMITERS = {".csv": ",", ".tsv": "\t"}
# Rows that are in memory at once, encoded; and the buffer of a parquet file.
READ_ROWS, BUFFER = 32, 2**23
NOT_PYTHON = (ValueError, OverflowError, KeyError)  # what Arrow raises for values that Python cannot hold
LINES = 2**20  # bytes of lines that are read at once


def line_records(path: str, file: File, offset: int = 0) -> Iterator[tuple[int, Callable[[], dict[str, Any] | str]]]:
    """The rows of a file of JSON lines or CSV.

    Args:
        path (`str`): Its path, for errors and the format.
        file (`File`): The file.
        offset (`int`): Byte at which the first row starts; 0 is the start of the file.

    Returns:
        Iterator of pairs: the byte at which a row starts, and a function that parses it, to a dict of its cells or a
        text that says what is wrong with it.

    Raises:
        ValueError: JSON that is one list; two columns of one name; a quotation mark in CSV that is not closed.
    """
    delimiter = DELIMITERS.get(Path(path).suffix.lower())
    # fsspec's files copy a whole block for each line that they give.
    with file.open() as raw, io.BufferedReader(cast(io.RawIOBase, raw), LINES) as opened:
        if delimiter is None:
            opened.seek(offset)
            yield from _json_records(path, opened, offset)
        else:
            yield from _csv_records(path, opened, offset, delimiter)


class ParquetCursor:
    """Reads a parquet file from a given row on. If units are read in order, every row is read only once."""

    def __init__(self, path: str, file: File, columns: list[str], first: int) -> None:
        self.path = path
        self._opened = file.open()
        # Without a buffer size, a whole column of a row group would be in memory.
        self._parquet = pq.ParquetFile(self._opened, buffer_size=BUFFER, pre_buffer=False)
        self._ends, end = [], 0
        for group in range(self._parquet.num_row_groups):
            end += self._parquet.metadata.row_group(group).num_rows
            self._ends.append(end)
        group = self._group(first)
        self._position = self._ends[group - 1] if group else 0
        groups = range(group, self._parquet.num_row_groups)
        self._batches = self._parquet.iter_batches(READ_ROWS, row_groups=list(groups), columns=columns)
        self._left: pa.RecordBatch | None = None

    def _group(self, row: int) -> int:
        return next(group for group, end in enumerate(self._ends) if row < end)

    def reaches(self, path: str, first: int) -> bool:
        """Whether a row comes next, or later in the row group that is being read."""
        if path != self.path or first < self._position:
            return False
        return first == self._position or self._group(first) == self._group(self._position)

    def take(self, first: int, count: int) -> Iterator[pa.RecordBatch]:
        """`count` rows from row `first` on."""
        while count:
            batch = self._left or next(self._batches, None)
            if batch is None:
                raise OSError("the file holds fewer rows than it did when it was scanned")
            self._left = None
            skip = min(first - self._position, len(batch))
            used = min(len(batch) - skip, count)
            rest = batch.slice(skip + used)
            self._position += skip + used
            self._left = rest if len(rest) else None
            if used:
                first, count = first + used, count - used
                yield batch.slice(skip, used)

    def close(self) -> None:
        self._parquet.close()
        self._opened.close()


def cells_of(batch: pa.RecordBatch) -> list[dict[str, Any] | str]:
    """The rows of a batch as dicts of their cells; of a row that Python cannot hold, what is wrong with it.

    These are texts that are not UTF-8, and times that are out of the range of `datetime` or in an unknown zone.
    """
    try:
        return batch.to_pylist()
    except NOT_PYTHON as error:
        if len(batch) > 1:
            return [row for index in range(len(batch)) for row in cells_of(batch.slice(index, 1))]
        column = next((name for name in batch.schema.names if not _is_readable(batch.column(name))), "")
        return [f"its column {column} cannot be read ({error})"]


def _is_readable(array: pa.Array) -> bool:
    try:
        array.to_pylist()
    except NOT_PYTHON:
        return False
    return True


def _json_records(path: str, opened: Any, offset: int) -> Iterator[tuple[int, Callable[[], Any]]]:
    for line in opened:
        start, offset = offset, offset + len(line)
        if start == 0 and line.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"["):
            raise ValueError(
                f"{path} is one JSON list, which must be read as a whole. Write one object a line: "
                f"jq -c '.[]' {os.path.basename(path)} > rows.jsonl"
            )
        if line.strip():
            yield start, partial(_parsed, line)


def _parsed(line: bytes) -> dict[str, Any] | str:
    try:
        record = json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        return f"the line is not JSON ({error})"
    return record if isinstance(record, dict) else f"the line is not a JSON object, but {type(record).__name__}"


def _cells(header: list[str], cells: list[str]) -> dict[str, Any] | str:
    try:
        "".join(cells).encode()
    except UnicodeEncodeError:
        return "the row is not UTF-8; convert the table"
    return {name: cell or None for name, cell in zip(header, cells)}


def _csv_records(path: str, opened: Any, offset: int, delimiter: str) -> Iterator[tuple[int, Callable[[], Any]]]:
    csv.field_size_limit(2**31 - 1)
    read = 0
    of_row: list[str] = []  # its lines

    def lines() -> Iterator[str]:
        nonlocal read
        for line in opened:
            read += len(line)
            # Bytes that are not UTF-8 become lone surrogates, which `_cells` refuses row by row.
            of_row.append(line.decode("utf-8-sig" if read == len(line) else "utf-8", "surrogateescape"))
            yield of_row[-1]
        if of_row and _is_open(of_row, delimiter):
            raise ValueError(
                f"The table {path} has a quotation mark that is not closed, so that one row takes all to the end of "
                f"the file. It starts with {''.join(of_row)[:60]!r}. Close it, or double a quotation mark of a text."
            )

    reader = csv.reader(lines(), delimiter=delimiter)
    header = next(reader, [])
    if twice := {name for name in header if name and header.count(name) > 1}:
        raise ValueError(f"The table {path} has several columns {', '.join(sorted(twice))}. Rename all but one.")
    if offset > read:
        opened.seek(offset)
        read = offset
    while True:
        start = read
        of_row.clear()
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield start, partial(str, f"the row is not CSV ({error})")
            continue
        if len(cells) == len(header):
            yield start, partial(_cells, header, cells)
        elif cells:
            yield start, partial(str, f"the row has {len(cells)} cells, and the table {len(header)} columns")


def _is_open(lines: list[str], delimiter: str) -> bool:
    """Whether lines of CSV end inside of quotation marks."""
    try:
        return not list(csv.reader(lines, delimiter=delimiter, strict=True))
    except csv.Error as error:
        return "unexpected end" in str(error)
