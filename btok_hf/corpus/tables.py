"""Tables whose rows are embedded: parquet, JSON lines and CSV files, cut into units of rows.

A table is scanned once. Its number of rows, the starts of its units and the types of its columns are kept beside the
units, so that a later run does not read a finished table again.
"""

import base64
import csv
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from hashlib import blake2b
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from btok_hf.corpus.columns import json_cells, kept_type, parquet_cells, stored_type, wider, widest
from btok_hf.corpus.listing import Input, Unit, check_packages, name_of, skipped_in_words
from btok_hf.corpus.records import BUFFER, DELIMITERS, ParquetCursor, cells_of, line_records
from btok_hf.corpus.rows import File, Row, file_errors
from btok_hf.corpus.units import SCANS, Store, check_column_names
from btok_hf.download import REMOTE
from btok_hf.input_kinds import is_cell

BYTES = (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_binary_view, pa.types.is_fixed_size_binary)
PARTS = ("image", "video", "text")  # in the order of a row
SUFFIXES = (".parquet", ".jsonl", ".json", *DELIMITERS)


class Columns(NamedTuple):
    """The columns of a table that are used.

    Args:
        text, image, video (`str`, *optional*): Columns of what is embedded.
        id (`str`, *optional*): Column of the rows' ids. Default: the file and the number of the row.
        metadata (`tuple[str, ...]`): Columns that are copied.
    """

    text: str | None = None
    image: str | None = None
    video: str | None = None
    id: str | None = None
    metadata: tuple[str, ...] = ()

    def parts(self) -> dict[str, str]:
        """The columns of what is embedded, by part."""
        return {part: getattr(self, part) for part in PARTS if getattr(self, part)}

    def names(self) -> list[str]:
        """All of them, once each."""
        return list(dict.fromkeys([*self.parts().values(), *([self.id] if self.id else []), *self.metadata]))


class TableSource:
    """Rows of the tables of an input.

    Args:
        given (`Input`): The input.
        columns (`Columns`): Which columns.
        unit_rows (`int`): Rows of a unit.
        store (`Store`): Where scans are kept.
        metadata (`Mapping[str, pyarrow.DataType]`, *optional*): Types of the metadata. Default: set by `plan`.

    Raises:
        ValueError: A metadata column that has a name of a unit's or database's own.
    """

    def __init__(
        self,
        given: Input,
        columns: Columns,
        unit_rows: int,
        store: Store,
        metadata: Mapping[str, pa.DataType] | None = None,
    ) -> None:
        self.input, self.columns, self.unit_rows, self.store = given, columns, unit_rows, store
        self.metadata = dict(metadata or {})
        self._scans: dict[str, str] = {}  # paths of tables, by the name of what is kept of them
        self._cursor: ParquetCursor | None = None
        check_column_names(columns.metadata)

    def plan(self, settings: str) -> list[Unit]:
        """Scan new tables, and cut all of them into units.

        Args:
            settings (`str`): A hash of the settings, which is part of every name.

        Returns:
            `list[Unit]`

        Raises:
            ImportError: Videos, and no PyAV.
            ValueError: No tables, one that cannot be read, or one without a column.
        """
        check_packages(self.columns.parts())
        units: list[Unit] = []
        schemas: list[pa.Schema] = []
        of_lines: list[pa.Schema] = []
        for file in self.input.files():
            if Path(file.path).suffix.lower() not in SUFFIXES:
                self.input.skipped["that are no tables"] += 1
                continue
            name = name_of(*file, self.unit_rows, self.columns)
            self._scans[name] = file.path
            held = self.store.read(f"{SCANS}/{name}.json")
            if held is None:
                scan = self._scan(file.path)
                self.store.write(f"{SCANS}/{name}.json", json.dumps(scan).encode())
            else:
                scan = json.loads(held)
            same = schemas if Path(file.path).suffix.lower() == ".parquet" else of_lines
            same.append(pa.ipc.read_schema(pa.py_buffer(base64.b64decode(scan["schema"]))))
            for number, offset in enumerate(scan["starts"]):
                first = number * self.unit_rows
                rows = min(self.unit_rows, scan["rows"] - first)
                units.append(Unit(name_of(settings, *file, first), rows, (file.path,), first, offset))
        if not units:
            raise ValueError(
                f"{self.input.address} holds no rows of a table ({skipped_in_words(self.input.skipped)}). Give "
                f"{', '.join(SUFFIXES)}, or leave --text, --image and --video out to embed files."
            )
        if of_lines:
            schemas.append(
                pa.schema([(n, widest(schema.field(n).type for schema in of_lines)) for n in self.columns.metadata])
            )
        try:
            merged = pa.unify_schemas(schemas, promote_options="permissive")
        except pa.ArrowException as error:
            raise ValueError(
                f"A column of --columns has other types in other tables ({error}). Give it one type, or leave it out."
            ) from error
        types = {name: merged.field(name).type for name in self.columns.metadata}
        self.metadata = {name: pa.string() if kind == pa.null() else kind for name, kind in types.items()}
        return units

    def keep_types(self, held: Mapping[str, str]) -> None:
        """Keep the types of metadata that existing units have.

        Args:
            held (`Mapping[str, str]`): Types in the settings of the corpus, by column.

        Raises:
            ValueError: A type does not hold the values of the tables that there are now.
        """
        for name, kind in self.metadata.items():
            before = held.get(name, str(kind))
            kept = kept_type(kind, before)
            if kept is None:
                raise ValueError(
                    f"The column {name} of --columns is stored as {before}, but is {kind} with the tables that there "
                    f"are now. Embed all of them into another folder, or write it as {before} in the new tables."
                )
            self.metadata[name] = kept

    def forget(self) -> None:
        """Remove the scans of tables that are gone."""
        for name in self.store.names(SCANS, ".json") - self._scans.keys():
            for suffix in (".json", ".ids"):
                self.store.remove(f"{SCANS}/{name}{suffix}")

    def check_ids(self) -> None:
        """Raise a `ValueError` if rows of the planned tables share an id.

        Ids are compared by 64 bits, which are kept beside the scans: the tables are read once for it.
        """
        if self.columns.id is None:
            return
        found = [np.empty(0, np.int64)]
        for name, path in self._scans.items():
            held = self.store.read(f"{SCANS}/{name}.ids")
            if held is None:
                keys = (id.encode("utf-8", "surrogatepass") for id in self._ids(path))
                held = b"".join(blake2b(key, digest_size=8).digest() for key in keys)
                self.store.write(f"{SCANS}/{name}.ids", held)
            found.append(np.frombuffer(held, np.int64))
        hashes = np.sort(np.concatenate(found))
        again = np.count_nonzero(hashes[1:] == hashes[:-1])
        if again and (twice := self._first_again()) is not None:
            raise ValueError(
                f"{again:,} rows have the {self.columns.id} of another row, e.g. {twice!r}. Ids must be unique: "
                "choose another column for --id, or leave it out."
            )

    def _first_again(self) -> str | None:
        """The first id that another row has too."""
        seen: set[str] = set()
        for path in self._scans.values():
            for id in self._ids(path):
                if id in seen:
                    return id
                seen.add(id)
        return None

    def _ids(self, path: str) -> Iterator[str]:
        """The ids of a table, as far as it can be read. Rows without one fail later."""
        file, column = self.input.file(path), str(self.columns.id)
        try:
            if path.lower().endswith(".parquet"):
                with file.open() as opened, pq.ParquetFile(opened, buffer_size=BUFFER, pre_buffer=False) as parquet:
                    for batch in parquet.iter_batches(columns=[column]):
                        yield from _ids_of(cells_of(batch), column)
            else:
                yield from _ids_of((parse() for _, parse in line_records(path, file)), column)
        except (pa.ArrowException, OSError):
            return

    def _scan(self, path: str) -> dict[str, Any]:
        """Rows of a table, where its units start, and the types of the metadata."""
        file, starts, rows = self.input.file(path), [], 0
        try:
            if path.lower().endswith(".parquet"):
                with file.open() as opened, pq.ParquetFile(opened) as parquet:
                    rows, schema = parquet.metadata.num_rows, parquet.schema_arrow
                starts = [0] * -(-rows // self.unit_rows)
                self._check(path, schema.names)
                self._check_id(path, schema)
                types = {name: self._stored_type(path, schema.field(name)) for name in self.columns.metadata}
            else:
                seen, wrong = set[str](), ""
                types = dict.fromkeys(self.columns.metadata, pa.null())
                for start, parse in line_records(path, file):
                    if rows % self.unit_rows == 0:
                        starts.append(start)
                    rows += 1
                    if self.columns.metadata or not seen.issuperset(self.columns.names()):
                        record = parse()
                        if isinstance(record, str):
                            wrong = wrong or record
                        else:
                            seen |= record.keys()
                            for name, kind in types.items():
                                types[name] = wider(kind, record.get(name))
                if rows and not seen:
                    raise ValueError(
                        f"The table {path} has no row that can be read: {wrong}. Write JSON as one object a line, "
                        "and CSV with the names of its columns in the first row."
                    )
                if rows:
                    self._check(path, seen)
        except (pa.ArrowException, csv.Error, OSError) as error:
            raise ValueError(f"The table {path} cannot be read ({error}). Repair or remove it.") from error
        schema = pa.schema(list(types.items()))
        return {"rows": rows, "starts": starts, "schema": base64.b64encode(schema.serialize().to_pybytes()).decode()}

    def _check(self, path: str, names: Any) -> None:
        missing = [name for name in self.columns.names() if name not in names]
        if missing:
            raise ValueError(
                f"The table {path} has no column {', '.join(missing)}. Its columns are {', '.join(sorted(names))}."
            )
        if twice := [name for name in self.columns.names() if list(names).count(name) > 1]:
            raise ValueError(f"The table {path} has several columns {', '.join(twice)}. Rename all but one.")

    def _check_id(self, path: str, schema: pa.Schema) -> None:
        kind = schema.field(self.columns.id).type if self.columns.id else pa.null()
        kind = kind.value_type if pa.types.is_dictionary(kind) else kind
        if any(is_kind(kind) for is_kind in BYTES):
            raise ValueError(
                f"The column {self.columns.id} of {path} holds bytes ({kind}), and ids are texts. Cast it to string, "
                "choose another column for --id, or leave it out."
            )

    @staticmethod
    def _stored_type(path: str, column: pa.Field) -> pa.DataType:
        try:
            return stored_type(column.type)
        except ValueError as error:
            raise ValueError(
                f"The column {column.name} of {path} cannot be copied: {error}. Cast it, or leave it out of --columns."
            ) from error

    def rows(self, unit: Unit) -> Iterator[Row]:
        """The rows of a unit. Files that they name are not read yet."""
        (path,) = unit.files
        records = self._parquet_records if path.lower().endswith(".parquet") else self._line_records
        number = unit.first
        last = unit.first + unit.rows
        try:
            for record, metadata in records(path, unit):
                yield self._row(path, number, record, metadata)
                number += 1
        except (pa.ArrowException, OSError) as error:
            # The rest of a damaged table: its rows are counted and cannot be read.
            self._cursor = None
            for missing in range(number, last):
                yield self._failed(path, missing, f"the table cannot be read here ({error})")

    def _failed(
        self, path: str, number: int, reason: str, metadata: dict[str, Any] | None = None, name: str | None = None
    ) -> Row:
        kinds = list(self.columns.parts())
        kind = kinds[0] if len(kinds) == 1 else "mixed"
        return Row(name or f"{path}#row={number}", kind, error=reason, metadata=metadata or {})

    def _row(self, path: str, number: int, record: dict[str, Any] | str, metadata: dict[str, Any]) -> Row:
        if isinstance(record, str):
            return self._failed(path, number, record)
        values = {part: record.get(column) for part, column in self.columns.parts().items()}
        values = {part: value for part, value in values.items() if value is not None and value not in ("", [])}
        text = values.get("text")
        name = f"{path}#row={number}"
        if self.columns.id:
            id = _id_of(record.get(self.columns.id))
            if id is None:
                return self._failed(path, number, f"the row has no {self.columns.id} that can be read", metadata)
            name = id
        if not values:
            return self._failed(path, number, "the row has no content: its cells are empty", metadata, name)
        for each in text if isinstance(text, list) else [text or ""]:
            if not isinstance(each, str):
                reason = f"the text must be a string or a list of strings, got {type(each).__name__}"
                return self._failed(path, number, reason, metadata, name)
        row = Row(name, next(iter(values)) if len(values) == 1 else "mixed", metadata=metadata)
        row.text = "\n".join(text) if isinstance(text, list) else text
        try:
            row.parts = {part: values[part] if part == "text" else self._media(path, values[part]) for part in values}
        except (ValueError, OSError, ImportError) as error:  # an address of a file system that is not installed
            row.error = str(error)
            return row
        row.source = next((source for part in values if (source := self._source(path, values[part], part))), None)
        return row

    def _media(self, path: str, value: Any) -> Any:
        """A cell of media: bytes, as `datasets` stores it, a path or address, or a list of them."""
        if isinstance(value, list):
            return [self._media(path, part) for part in value]
        value = _stored(value)
        if not isinstance(value, str) or value.startswith(REMOTE):
            return value
        if "://" in value:
            with file_errors(value):
                return File(*fsspec.core.url_to_fs(value))
        if os.path.isabs(value):
            return File(self.input.fs, value)
        return self.input.file(str(PurePosixPath(path).parent / value))

    def _source(self, path: str, value: Any, part: str) -> str | None:
        """What to open again for a cell, if it names a file."""
        value = _stored(value)
        if part == "text" or not isinstance(value, str) or value.startswith("data:"):
            return None
        absolute = "://" in value or os.path.isabs(value)
        return value if absolute else str(PurePosixPath(path).parent / value)

    def _line_records(self, path: str, unit: Unit) -> Iterator[tuple[dict[str, Any] | str, dict[str, Any]]]:
        records = line_records(path, self.input.file(path), unit.offset)
        for _, (_, parse) in zip(range(unit.rows), records):
            record = parse()
            cells = json_cells(record if isinstance(record, dict) else {}, self.metadata)
            yield (record, cells) if isinstance(cells, dict) else (cells, {})

    def _parquet_records(self, path: str, unit: Unit) -> Iterator[tuple[dict[str, Any] | str, dict[str, Any]]]:
        if self._cursor is None or not self._cursor.reaches(path, unit.first):
            if self._cursor is not None:
                self._cursor.close()
            self._cursor = ParquetCursor(path, self.input.file(path), self.columns.names(), unit.first)
        embedded = [*self.columns.parts().values(), *([self.columns.id] if self.columns.id else [])]
        for batch in self._cursor.take(unit.first, unit.rows):
            records = cells_of(batch.select(list(dict.fromkeys(embedded))))
            for record, copied in zip(records, parquet_cells(batch, self.metadata)):
                yield (record, copied) if isinstance(copied, dict) else (copied, {})


def _ids_of(records: Iterable[dict[str, Any] | str], column: str) -> Iterator[str]:
    """The ids of rows, without those that fail later."""
    ids = (_id_of(record.get(column)) for record in records if isinstance(record, dict))
    yield from (id for id in ids if id is not None)


def _id_of(value: Any) -> str | None:
    return None if value is None else str(value)


def _stored(value: Any) -> Any:
    """The bytes or the path of media as `datasets` stores them. Other cells are returned as they are."""
    if isinstance(value, dict) and is_cell(value):
        return value["path"] if value["bytes"] is None else value["bytes"]
    return value
