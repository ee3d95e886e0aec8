"""The rows of a corpus on their way into a database: checked, counted, with stored vectors, a batch at a time."""

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import pyarrow as pa

from btok_hf.corpus.units import FREE, UNIT_COLUMNS
from btok_hf.corpus.vectors import Precision, cut, store, stored_type, unit

# Settings that may differ between runs: how the model is called, how far `btok embed` is, how vectors are stored.
UNLIKE = (*FREE, "units_planned", "units_written", "embedding_dimensions", "precision")
# Queries with which recall is measured.
SAMPLE = 100
# Of a unit; in the database `vector` stands for `embedding`, and there are no failed rows.
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
        text = f"{self.added:,} added, {self.replaced:,} replaced, {self.deleted:,} deleted"
        if self.failed:
            text += f", {self.failed:,} left out because embedding them failed"
        if self.missing:
            text += f"; {self.missing:,} units are not embedded yet, so nothing was deleted: run it again after"
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


class RowStream:
    """Rows of units as rows of the database.

    Args:
        batches (`Iterator[pyarrow.RecordBatch]`): As `read_units` gives them.
        settings (`Mapping`): Those of the database.

    Attributes:
        schema (`pyarrow.Schema`): Of the database.
        rows, failed (`int`): How many rows passed and how many had no embedding.
        sample (`np.ndarray`): Embeddings of rows chosen at random, shape `(≤ SAMPLE, d)`: queries to measure with.
    """

    def __init__(self, batches: Iterator[pa.RecordBatch], settings: Mapping[str, Any]) -> None:
        first = next(batches, None)
        if first is None:
            raise ValueError("There are no units to index. Run btok embed first, or wait for its first unit.")
        self._batches, self._settings = chain([first], batches), settings
        metadata = [column for column in first.schema if column.name not in UNIT_COLUMNS]
        for column in metadata:
            if column.name.startswith("_") or column.name in ("vector", "row_hash"):
                raise ValueError(f"The column {column.name!r} has a name that the database uses itself. Rename it.")
        kept = [first.schema.field(name) for name in UNIT_COLUMNS if name not in LEFT_OUT]
        vector = stored_type(settings["dimensions"], settings["precision"])
        own = [pa.field("row_hash", pa.binary(16)), pa.field("vector", vector)]
        self.schema = pa.schema([*kept, *own, *metadata])
        self.rows = self.failed = 0
        self.sample = np.empty((0, settings["embedding_dimensions"]), np.float32)
        self._error: Exception | None = None

    def reader(self) -> pa.RecordBatchReader:
        """All rows, once."""
        return pa.RecordBatchReader.from_batches(self.schema, self._convert())

    @contextmanager
    def own_errors(self) -> Iterator[None]:
        """LanceDB gives an error of `reader` back as text with a traceback in it. Raise the error itself."""
        try:
            yield
        except Exception:
            if self._error is not None:
                raise self._error from None
            raise

    def _convert(self) -> Iterator[pa.RecordBatch]:
        generator, priorities, hashes = np.random.default_rng(0), np.empty(0), []
        try:
            for batch in self._batches:
                kept = batch.filter(batch.column("embedding").is_valid())
                self.failed += len(batch) - len(kept)
                if not len(kept):
                    continue
                self.rows += len(kept)
                vectors = kept.column("embedding").flatten().to_numpy().reshape(len(kept), -1)
                vectors = unit(vectors)
                # Random priorities: those of the SAMPLE largest are a uniform sample of all rows.
                priorities = np.concatenate([priorities, generator.random(len(kept))])
                best = np.sort(np.argsort(-priorities)[:SAMPLE])
                self.sample, priorities = np.concatenate([self.sample, vectors])[best], priorities[best]
                hashes.append(np.array([hash(key) for key in kept.column("id").to_pylist()]))
                yield self._stored(kept, vectors)
            if not self.rows:
                raise ValueError(f"None of the {self.failed:,} rows has an embedding: see the errors of btok embed.")
            unique, counts = np.unique(np.concatenate(hashes), return_counts=True)
            if len(unique) < self.rows:
                raise ValueError(
                    f"{(counts > 1).sum():,} ids name several rows. Ids must be unique: give btok embed another --id."
                )
        except Exception as error:
            self._error = error
            raise

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
