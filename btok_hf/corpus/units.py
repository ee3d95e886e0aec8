"""What `btok embed` writes: a folder of parquet units with its settings. Here they are named, written and read.

    OUT/corpus.json          what every row was embedded with
    OUT/plan.json            the names of the units that the input has now, in order
    OUT/units/NAME.parquet   rows; a unit is there whole or not at all
    OUT/errors/NAME.json     the failed rows of a unit, and why; none if all are fine
    OUT/scans/               where rows of tables start, and hashes of their ids

The name of a unit is a hash of the settings and of the input's files and rows that it holds. So a changed file makes
other units; those of its old content are not in the plan, are never read, and are removed by the next run.
"""

import contextlib
import io
import json
import os
import shlex
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import fsspec
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from fsspec.implementations.local import LocalFileSystem

from btok_hf.files import replacing

FORMAT = 1
KINDS = ("text", "image", "video", "page", "mixed")
SETTINGS, PLAN, UNITS, ERRORS, SCANS = "corpus.json", "plan.json", "units", "errors", "scans"
WRITTEN_FILES, WRITTEN_FOLDERS = (SETTINGS, PLAN), (UNITS, ERRORS, SCANS)
# Rows that are read at once, at most.
BATCH_ROWS, BATCH_BYTES = 1024, 2**24
# Age at which a draft must be that of a killed process: writing a unit takes seconds.
OLD_DRAFT_SECONDS = 3600
# Settings whose values may differ between runs into one folder: the revision identifies the model.
FREE = ("model",)


def unit_schema(dimensions: int, metadata: Mapping[str, pa.DataType] | None = None) -> pa.Schema:
    """The columns of a unit.

    Args:
        dimensions (`int`): Dimensions of an embedding.
        metadata (`Mapping[str, pyarrow.DataType]`, *optional*): Types of the columns that are taken from a table, by
            name.

    Returns:
        `pyarrow.Schema`
    """
    columns = [
        pa.field("id", pa.string(), nullable=False),
        pa.field("kind", pa.string(), nullable=False),  # one of KINDS
        pa.field("source", pa.string()),  # what to open again, relative to `root` of the settings
        pa.field("page", pa.int32()),  # of a PDF or TIFF, from 1
        pa.field("content_hash", pa.string()),
        pa.field("text", pa.string()),
        pa.field("thumbnail", pa.binary()),  # JPEG
        pa.field("embedding", pa.list_(pa.float32(), dimensions)),  # unit length; null if the row failed
        pa.field("error", pa.string()),
    ]
    return pa.schema([*columns, *(pa.field(name, kind) for name, kind in (metadata or {}).items())])


UNIT_COLUMNS = tuple(unit_schema(1).names)


def check_column_names(names: Iterable[str]) -> None:
    """Raise `ValueError` if a column of a table has a name that units or databases use themselves, or do not take."""
    for name in names:
        if name in UNIT_COLUMNS or name in ("vector", "row_hash") or name.startswith("_") or "." in name:
            raise ValueError(
                f"The column {name!r} cannot be copied: units and databases use {', '.join(UNIT_COLUMNS)}, vector, "
                "row_hash and names that begin with _, and take no point in a name. Rename it in the table, or leave "
                "it out: --id and --text are kept as id and text."
            )


class Store:
    """A folder of files that are written whole: a local folder, or one of any file system that fsspec knows.

    Args:
        path (`str`): A path, or an address such as `s3://bucket/folder`.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self.fs, root = fsspec.core.url_to_fs(path)
        self.root = root.rstrip("/")
        self.is_local = isinstance(self.fs, LocalFileSystem)
        self.address = self.root if self.is_local else path  # the same in every process

    def read(self, name: str) -> bytes | None:
        """The content of a file, or `None` if there is none."""
        try:
            return self.fs.cat_file(f"{self.root}/{name}")
        except FileNotFoundError:
            return None

    def write(self, name: str, content: bytes) -> None:
        """Write a file: after a kill it is there whole, as it was before, or not at all."""
        path = f"{self.root}/{name}"
        if not self.is_local:
            self.fs.pipe_file(path, content)  # object storage shows an object when its upload is complete
            return
        try:
            with replacing(Path(path)) as file:
                file.write(content)
        except OSError as error:
            raise OSError(
                error.errno,
                f"{path} cannot be written ({error.strerror}). What is written already stays: make room, or OUT "
                "writable, and run the same command again",
            ) from error

    def names(self, folder: str, suffix: str) -> set[str]:
        """The files of a folder with a suffix, without it."""
        try:
            paths = self.fs.ls(f"{self.root}/{folder}", detail=False, refresh=True)
        except FileNotFoundError:
            return set()
        return {os.path.basename(path)[: -len(suffix)] for path in paths if path.endswith(suffix)}

    def exists(self, name: str) -> bool:
        """Whether a file is there."""
        self.fs.invalidate_cache()  # other processes write too
        return self.fs.exists(f"{self.root}/{name}")

    def remove(self, name: str) -> None:
        """Remove a file, if it is there."""
        with contextlib.suppress(FileNotFoundError):
            self.fs.rm_file(f"{self.root}/{name}")

    def remove_drafts(self, folder: str) -> None:
        """Remove what killed processes left in a folder."""
        path = f"{self.root}/{folder}"
        if not self.is_local or not os.path.isdir(path):
            return
        for entry in os.scandir(path):
            if entry.name.endswith(".tmp") and time.time() - entry.stat().st_mtime > OLD_DRAFT_SECONDS:
                self.remove(f"{folder}/{entry.name}")


class Corpus:
    """The folder of a corpus, to write to and read from.

    Args:
        path (`str`): OUT of `btok embed`: a folder, or an address that fsspec knows.
    """

    def __init__(self, path: str) -> None:
        self.store = Store(path)

    def settings(self) -> dict[str, Any] | None:
        """What the rows were embedded with, or `None` if the folder holds no corpus."""
        content = self.store.read(SETTINGS)
        return None if content is None else json.loads(content)

    def claim(self, settings: Mapping[str, Any]) -> bool:
        """Write the settings of a new corpus, or compare them with those of an old one.

        Returns:
            `bool`: Whether it is new.

        Raises:
            ValueError: The folder holds a corpus of another model, input, or other settings.
        """
        held = self.settings()
        if held is not None:
            self.compare(held, settings)
        else:
            self.store.write(SETTINGS, json.dumps(settings, indent=2, ensure_ascii=False).encode() + b"\n")
        return held is None

    def release(self) -> None:
        """Give up a claim before the first unit, so that another try may have other settings."""
        if not self.written():
            for name in WRITTEN_FILES:
                self.store.remove(name)

    def compare(self, held: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
        """Raise `ValueError` if settings are not those that the folder holds."""
        settings = json.loads(json.dumps(settings))
        keys = [key for key in {**held, **settings} if key not in FREE and held.get(key) != settings.get(key)]
        if keys:
            differences = "; ".join(f"{key} {held.get(key)!r} there, {settings.get(key)!r} now" for key in keys)
            raise ValueError(
                f"{self.store.path} holds a corpus with other settings: {differences} (model {held.get('model')!r} "
                f"there, {settings.get('model')!r} now). One corpus has one model, input and form: name another "
                "folder for OUT, or remove this one."
            )

    def plan(self) -> list[str]:
        """The names of the units that the input had at the last run, in order."""
        content = self.store.read(PLAN)
        return [] if content is None else json.loads(content)["units"]

    def set_plan(self, names: Sequence[str]) -> None:
        """Write the plan. Units that are not in it are no longer read."""
        content = json.dumps({"units": list(names)}).encode()
        if self.store.read(PLAN) != content:
            self.store.write(PLAN, content)

    def written(self) -> set[str]:
        """The names of the units that are there."""
        return self.store.names(UNITS, ".parquet")

    def has(self, name: str) -> bool:
        """Whether a unit is there."""
        return self.store.exists(f"{UNITS}/{name}.parquet")

    def embedded(self, name: str) -> set[str]:
        """The ids of the rows of a unit that have an embedding; none if there is no such unit."""
        content = self.store.read(f"{UNITS}/{name}.parquet")
        return set() if content is None else embedded(io.BytesIO(content))

    def write(self, name: str, table: bytes, errors: Mapping[str, str]) -> None:
        """Write a unit.

        Args:
            name (`str`): Its name.
            table (`bytes`): A parquet file with the columns of `unit_schema`.
            errors (`Mapping[str, str]`): Why rows failed, by id.
        """
        if errors:  # first, so that a unit with failed rows always has it
            self.store.write(f"{ERRORS}/{name}.json", json.dumps(errors, indent=1, ensure_ascii=False).encode())
        self.store.write(f"{UNITS}/{name}.parquet", table)
        if not errors:  # of the unit that it replaces, or of a process that was killed before it wrote the unit
            self.store.remove(f"{ERRORS}/{name}.json")

    def failed(self, names: Iterable[str]) -> set[str]:
        """Those of these units that have failed rows."""
        return self.store.names(ERRORS, ".json").intersection(names)

    def errors(self, names: Iterable[str]) -> dict[str, str]:
        """Why rows of these units failed, by id."""
        found: dict[str, str] = {}
        for name in sorted(self.failed(names)):
            found |= json.loads(self.store.read(f"{ERRORS}/{name}.json") or b"{}")
        return found

    def remove(self, names: Iterable[str]) -> None:
        """Remove units. What a kill leaves of errors is removed when the unit is written again."""
        for name in names:
            self.store.remove(f"{UNITS}/{name}.parquet")
            self.store.remove(f"{ERRORS}/{name}.json")
        self.store.remove_drafts(UNITS)

    def batches(self, columns: Sequence[str] | None = None) -> Iterator[pa.RecordBatch]:
        """The rows of the plan's units that are there, in order, a few megabytes at a time."""
        written = self.written()
        for name in self.plan():
            if name in written:
                with self.store.fs.open(f"{self.store.root}/{UNITS}/{name}.parquet", "rb") as file:
                    parquet = pq.ParquetFile(file)
                    groups = map(parquet.metadata.row_group, range(parquet.num_row_groups))
                    of_row = sum(group.total_byte_size for group in groups) // (parquet.metadata.num_rows or 1)
                    rows = max(1, min(BATCH_ROWS, BATCH_BYTES // (of_row or 1)))
                    yield from parquet.iter_batches(rows, columns=columns)


def embedded(file: BinaryIO) -> set[str]:
    """The ids of the rows of a unit's file that have an embedding."""
    table = pq.read_table(file, columns=["id", "error"])
    return set(table.filter(pc.is_null(table["error"]))["id"].to_pylist())


def holds_corpus(fs: Any, folder: str) -> bool:
    """Whether `btok embed` wrote into a folder of a file system of fsspec."""
    try:
        settings = json.loads(fs.cat_file(f"{folder}/{SETTINGS}"))
    except (OSError, ValueError):
        return False
    return isinstance(settings, dict) and {"format", "revision", "unit_rows"} <= settings.keys()


def read_units(out: str, columns: Sequence[str] | None = None) -> tuple[dict[str, Any], Iterator[pa.RecordBatch]]:
    """Read a corpus that `btok embed` wrote.

    Rows of files that were changed or removed before the last run of `btok embed` are not among them.

    Args:
        out (`str`): OUT of `btok embed`.
        columns (`Sequence[str]`, *optional*): Only these columns. Default: all, as in `unit_schema`.

    Returns:
        The settings (`corpus.json`, with `units_planned` and `units_written`: a corpus is complete if both are equal),
        and an iterator of `pyarrow.RecordBatch` of at most 1,024 rows. Failed rows have a null `embedding`.

    Raises:
        FileNotFoundError: The folder holds no corpus.
        ValueError: It was written by another release.
    """
    corpus = Corpus(out)
    settings = corpus.settings()
    if settings is None:
        raise FileNotFoundError(
            f"{out} holds no corpus: there is no {SETTINGS}. Make one with: btok embed INPUT {shlex.quote(str(out))} "
            "--model MODEL"
        )
    if settings.get("format") != FORMAT:
        raise ValueError(
            f"{out} has format {settings.get('format')!r}, and this release reads {FORMAT}. Embed the input again "
            "with this release, into another folder."
        )
    planned = corpus.plan()
    counts = {"units_planned": len(planned), "units_written": len(corpus.written().intersection(planned))}
    return settings | counts, corpus.batches(columns)


def locate(settings: Mapping[str, Any], source: str) -> str:
    """The path or address of a row's `source`, as a program can open it.

    Args:
        settings (`Mapping`): The settings of the corpus.
        source (`str`): `source` of a row.

    Returns:
        `str`
    """
    if "://" in source or os.path.isabs(source):
        return source
    return f"{settings['root'].rstrip('/')}/{source}"
