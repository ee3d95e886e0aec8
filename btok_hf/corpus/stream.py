"""Turn the rows of a corpus into rows of a database, a batch at a time, and find those that are new or changed."""

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import pyarrow as pa

from btok_hf.corpus.units import FREE, UNIT_COLUMNS, check_column_names, read_units
from btok_hf.corpus.vectors import Precision, cut, store, stored_type, unit

# Settings that may differ between runs into one database: the path of the model, the progress of `btok embed`, and how
# vectors are stored.
UNLIKE = (*FREE, "units_planned", "units_written", "embedding_dimensions", "precision")
# Queries with which recall is measured.
SAMPLE = 100
# Rows that are held in memory before they are written.
CHUNK_BYTES = 128 * 2**20
# Columns of units that a database does not have: it has `vector` instead of `embedding`, and no failed rows.
LEFT_OUT = ("embedding", "error")


@dataclass
class Changes:
    """What a run of `btok index` did, in rows.

    Args:
        added, replaced, deleted (`int`): Rows of the database.
        failed (`int`): Rows of the units without an embedding, which are left out.
        missing (`int`): Units that `btok embed` has not written yet. While there are any, nothing is deleted.
    """

    added: int = 0
    replaced: int = 0
    deleted: int = 0
    failed: int = 0
    missing: int = 0

    def __str__(self) -> str:
        deleted = "nothing" if self.missing else f"{self.deleted:,}"
        return f"{self.added:,} added, {self.replaced:,} replaced, {deleted} deleted{self.left_out}"

    @property
    def left_out(self) -> str:
        """How many rows and units are not in the database, as the end of a sentence."""
        text = f", {self.failed:,} left out because embedding them failed" if self.failed else ""
        if self.missing:
            text += f"; {self.missing:,} units are not embedded yet: run it again after"
        return text


def database_settings(corpus: Mapping[str, Any], precision: Precision, dimensions: int | None) -> dict[str, Any]:
    """The settings of a new database: those of its units, and how vectors are stored."""
    own = {"embedding_dimensions": corpus["dimensions"], "precision": precision}
    return {**corpus, **own, "dimensions": dimensions or corpus["dimensions"]}


def check_same_corpus(corpus: Mapping[str, Any], held: Mapping[str, Any], path: str) -> None:
    """Raise a `ValueError` if a database was made of another model, other settings or another input.

    Args:
        corpus (`Mapping`): Settings of the units.
        held (`Mapping`): Settings of the database.
        path (`str`): The database, for the message.
    """
    there = {**held, "dimensions": held["embedding_dimensions"]}
    keys = [key for key in {**there, **corpus} if key not in UNLIKE and there.get(key) != corpus.get(key)]
    if keys:
        differences = "; ".join(f"{key} {there.get(key)!r} there, {corpus.get(key)!r} now" for key in keys)
        raise ValueError(
            f"{path} was made from other units: {differences} (model {there['model']!r} there, {corpus['model']!r} "
            "now). Vectors of different models cannot be compared. Write another database, or remove this one."
        )


class Held:
    """The rows of a database, as hashes of 16 bytes a row, to compare with those that it should hold.

    Args:
        batches (`Iterable[pyarrow.RecordBatch]`): `id` and `row_hash` of the database's rows.
        wanted (`np.ndarray`): Hashes of the ids that it should hold, sorted.

    Attributes:
        gone (`list[str]`): Ids of rows that it should no longer hold.
    """

    def __init__(self, batches: Iterable[pa.RecordBatch], wanted: np.ndarray) -> None:
        keys, rows = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
        self.gone: list[str] = []
        for batch in batches:
            ids = batch.column("id")
            keys.append(hashes(ids))
            rows.append(_numbers(batch.column("row_hash")))
            self.gone += ids.filter(pa.array(~_among(keys[-1], wanted))).to_pylist()
        found = np.concatenate(keys)
        del keys  # of 10⁹ rows each array is 8 GB
        order = np.argsort(found)
        self._keys = found[order]
        del found
        self._rows = np.concatenate(rows)
        del rows
        self._rows = self._rows[order]

    def compare(self, batch: pa.RecordBatch) -> tuple[np.ndarray, np.ndarray]:
        """Which rows of a batch are new, and which are there with another content; boolean, shape `(n,)` each."""
        keys = hashes(batch.column("id"))
        there = _among(keys, self._keys)
        same = there.copy()
        places = np.searchsorted(self._keys, keys[there])
        same[there] = self._rows[places] == _numbers(batch.column("row_hash"))[there]
        return ~there, there & ~same


def hashes(ids: pa.Array) -> np.ndarray:
    """64 bits for each id, the same within a process."""
    return np.fromiter(map(hash, ids.to_pylist()), np.int64, len(ids))


def _numbers(row_hashes: pa.Array) -> np.ndarray:
    """The first half of each hash as a number."""
    return np.frombuffer(b"".join(row_hashes.to_pylist()), np.int64)[::2]


def _among(keys: np.ndarray, ordered: np.ndarray) -> np.ndarray:
    """Which keys are among ordered ones."""
    places = np.searchsorted(ordered, keys)
    found = np.zeros(len(keys), bool)
    inside = places < len(ordered)
    found[inside] = ordered[places[inside]] == keys[inside]
    return found


def wanted_ids(out: str) -> tuple[np.ndarray, int]:
    """Hashes of the ids of all rows with an embedding, sorted: 8 bytes a row. And how many units are missing.

    Args:
        out (`str`): Folder or address that `btok embed` wrote.

    Raises:
        ValueError: There are none, or ids that name several rows.
    """
    keys, failed = [np.empty(0, np.int64)], 0
    corpus, batches = read_units(out, columns=["id", "error"])
    for batch in batches:
        embedded = batch.filter(batch.column("error").is_null())
        failed += len(batch) - len(embedded)
        keys.append(hashes(embedded.column("id")))
    found = np.sort(np.concatenate(keys))
    if not len(found):
        raise ValueError(
            f"{out} has nothing to index: {failed:,} rows, and none has an embedding. See the errors of btok embed, "
            "or wait for its first unit."
        )
    if again := np.count_nonzero(found[1:] == found[:-1]):
        several = set(found[1:][found[1:] == found[:-1]].tolist())
        names = (key for batch in read_units(out, columns=["id"])[1] for key in batch.column("id").to_pylist())
        twice = next(key for key in names if hash(key) in several)
        raise ValueError(
            f"{again:,} rows have the id of another row, e.g. {twice!r}. Ids must be unique: give btok embed another "
            "--id."
        )
    return found, corpus["units_planned"] - corpus["units_written"]


class RowStream:
    """Rows of units as rows of the database.

    Args:
        batches (`Iterator[pyarrow.RecordBatch]`): As `read_units` gives them, at least one.
        settings (`Mapping`): Those of the database.

    Attributes:
        schema (`pyarrow.Schema`): Of the database.
        failed (`int`): How many rows had no embedding.
        sample (`np.ndarray`): Embeddings of rows chosen at random, shape `(≤ SAMPLE, d)`: queries to measure with.
    """

    def __init__(self, batches: Iterator[pa.RecordBatch], settings: Mapping[str, Any]) -> None:
        first = next(batches)
        self._batches, self._settings = chain([first], batches), settings
        metadata = [column for column in first.schema if column.name not in UNIT_COLUMNS]
        check_column_names(column.name for column in metadata)  # an older release took them
        kept = [first.schema.field(name) for name in UNIT_COLUMNS if name not in LEFT_OUT]
        vector = stored_type(settings["dimensions"], settings["precision"])
        own = [pa.field("row_hash", pa.binary(16)), pa.field("vector", vector)]
        self.schema = pa.schema([*kept, *own, *metadata])
        self.failed = 0
        self.sample = np.empty((0, settings["embedding_dimensions"]), np.float32)

    def __iter__(self) -> Iterator[pa.RecordBatch]:
        """All rows with an embedding, once."""
        generator, priorities = np.random.default_rng(0), np.empty(0)
        for batch in self._batches:
            kept = batch.filter(batch.column("embedding").is_valid())
            self.failed += len(batch) - len(kept)
            if not len(kept):
                continue
            vectors = unit(kept.column("embedding").flatten().to_numpy().reshape(len(kept), -1))
            # Random priorities: those of the SAMPLE largest are a uniform sample of all rows.
            priorities = np.concatenate([priorities, generator.random(len(kept))])
            best = np.sort(np.argsort(-priorities)[:SAMPLE])
            self.sample, priorities = np.concatenate([self.sample, vectors])[best], priorities[best]
            yield self._stored(kept, vectors)

    def changes(self, held: Held) -> Iterator[tuple[pa.Table, pa.Table]]:
        """New rows and changed rows, in chunks of about `CHUNK_BYTES`."""
        chunk: tuple[list[pa.RecordBatch], list[pa.RecordBatch]] = ([], [])
        size = 0
        for batch in self:
            parts = [batch.filter(pa.array(rows)) for rows in held.compare(batch)]
            for of_chunk, part in zip(chunk, parts):
                of_chunk.append(part)
                size += part.nbytes
            if size >= CHUNK_BYTES:
                yield pa.Table.from_batches(chunk[0], self.schema), pa.Table.from_batches(chunk[1], self.schema)
                chunk, size = ([], []), 0
        yield pa.Table.from_batches(chunk[0], self.schema), pa.Table.from_batches(chunk[1], self.schema)

    def _stored(self, batch: pa.RecordBatch, vectors: np.ndarray) -> pa.RecordBatch:
        """A batch with the columns of the database."""
        names = [name for name in self.schema.names if name not in ("row_hash", "vector")]
        stored = store(cut(vectors, self._settings["dimensions"]), self._settings["precision"])
        columns = {name: batch.column(name) for name in names} | {"vector": stored}
        values = zip(*(batch.column(name).to_pylist() for name in names))
        columns["row_hash"] = pa.array([_hash(row, vector) for row, vector in zip(values, vectors)], pa.binary(16))
        return pa.RecordBatch.from_arrays([columns[name] for name in self.schema.names], schema=self.schema)


def _hash(values: tuple[Any, ...], vector: np.ndarray) -> bytes:
    """A row in 16 bytes, so that a run replaces only rows that changed."""
    digest = hashlib.blake2b(vector.tobytes(), digest_size=16)
    for value in values:
        content = value if isinstance(value, bytes) else repr(value).encode("utf-8", "surrogatepass")
        digest.update(b"%d:" % len(content) + content)
    return digest.digest()
