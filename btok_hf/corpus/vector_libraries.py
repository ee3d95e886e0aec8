"""Write the vectors of a corpus as an index of faiss or usearch, with a file of their ids beside it.

Row `i` of `FILE.ids.parquet` is the id of the vector with the number `i`. An index is built in memory.
"""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from btok_hf.corpus.stream import Changes
from btok_hf.corpus.units import read_units
from btok_hf.corpus.vectors import bits, check_dimensions, cut
from btok_hf.files import check_writable, replacing

# Suffix of the file of ids.
IDS = ".ids.parquet"


def write_faiss(out: str, file: str | Path, precision: str = "float32", dimensions: int | None = None) -> Changes:
    """Write a flat index of faiss, which compares a query with every vector.

    Scores are inner products, which are cosines with `float32` and `float16` and close to them with `int8`. With
    `binary` it is a binary index, and scores are Hamming distances.

    Args:
        out (`str`): Folder or address that `btok embed` wrote.
        file (`str` or `Path`): File to write. The ids are written to `FILE.ids.parquet`.
        precision (`str`): `float32`, `float16`, `int8` or `binary`.
        dimensions (`int`, *optional*): Leading dimensions of each vector to keep. Default: all.

    Returns:
        `Changes`: How many vectors were `added`, and what is left out: rows that `failed`, units that are `missing`.
    """
    _check_file(file)
    faiss = _library("faiss", "faiss-cpu")
    size, changes, batches = _vectors(out, dimensions)
    if precision == "binary":
        if size % 8:
            raise ValueError(
                f"A binary index of faiss has a multiple of 8 dimensions, got {size}. Use float32 or int8."
            )
        index = faiss.IndexBinaryFlat(size)
    elif precision == "float32":
        index = faiss.IndexFlatIP(size)
    else:
        kind = faiss.ScalarQuantizer.QT_fp16 if precision == "float16" else faiss.ScalarQuantizer.QT_8bit
        index = faiss.IndexScalarQuantizer(size, kind, faiss.METRIC_INNER_PRODUCT)
        # Training records the range of each dimension, which these two vectors have.
        index.train(_ranges(out, dimensions))
    add = (lambda vectors: index.add(bits(vectors))) if precision == "binary" else index.add
    save = faiss.write_index_binary if precision == "binary" else faiss.write_index
    return _write(file, changes, batches, add, lambda draft: save(index, draft))


def write_usearch(out: str, file: str | Path, precision: str = "float32", dimensions: int | None = None) -> Changes:
    """Write an index of usearch: a graph (HNSW), which can be searched from the disk. Arguments as in `write_faiss`.

    Scores are cosine distances, `1 - cosine`; with `binary`, Hamming distances.
    """
    _check_file(file)
    usearch = _library("usearch.index", "usearch")
    size, changes, batches = _vectors(out, dimensions)
    kinds = {"float32": "f32", "float16": "f16", "int8": "i8", "binary": "b1"}
    metric = "hamming" if precision == "binary" else "cos"
    index = usearch.Index(ndim=size, metric=metric, dtype=kinds[precision])

    def add(vectors: np.ndarray) -> None:
        keys = np.arange(len(index), len(index) + len(vectors), dtype=np.uint64)
        index.add(keys, bits(vectors) if precision == "binary" else vectors)

    return _write(file, changes, batches, add, index.save)


def _check_file(file: str | Path) -> None:
    """Refuse what no index can be written to, before vectors are read."""
    if "://" in str(file):
        raise ValueError(f"An index is written to a local file, got {str(file)!r}. Copy it from there.")
    if Path(file).is_dir():
        raise ValueError(f"{file} is a folder. Give a file, e.g. {Path(file, 'vectors.index')}.")
    check_writable(Path(file).parent)


def _library(module: str, package: str) -> Any:
    from importlib import import_module

    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        raise ImportError(f"This needs the package {package}: pip install {package}") from error


def _vectors(out: str, dimensions: int | None) -> tuple[int, Changes, Iterator[tuple[pa.Array, np.ndarray]]]:
    """The number of dimensions, what is left out, and ids and vectors of the rows that have one, in batches."""
    settings, batches = read_units(out, columns=["id", "embedding"])
    if dimensions is not None:
        check_dimensions(settings, dimensions)
    size = dimensions or settings["dimensions"]
    changes = Changes(missing=settings["units_planned"] - settings["units_written"])

    def rows() -> Iterator[tuple[pa.Array, np.ndarray]]:
        for batch in batches:
            changes.failed += batch.column("embedding").null_count
            batch = batch.filter(batch.column("embedding").is_valid())
            if len(batch):
                vectors = batch.column("embedding").flatten().to_numpy().reshape(len(batch), -1)
                yield batch.column("id"), cut(vectors, size)

    return size, changes, rows()


def _ranges(out: str, dimensions: int | None) -> np.ndarray:
    """The smallest and the largest value of each dimension, shape `(2, d)`."""
    size, _, batches = _vectors(out, dimensions)
    ranges = np.array([[np.inf], [-np.inf]], np.float32).repeat(size, axis=1)
    for _, vectors in batches:
        ranges = np.array([np.minimum(ranges[0], vectors.min(0)), np.maximum(ranges[1], vectors.max(0))])
    return ranges


def _write(
    file: str | Path,
    changes: Changes,
    batches: Iterator[tuple[pa.Array, np.ndarray]],
    add: Callable[[np.ndarray], Any],
    save: Callable[[str], Any],
) -> Changes:
    """Add the vectors to an index, then write it and the ids. The index is there only with its ids."""
    file = Path(file)
    file.parent.mkdir(parents=True, exist_ok=True)
    schema = pa.schema([pa.field("id", pa.string())])
    draft = file.with_name(f"{file.name}.{os.getpid()}.tmp")
    try:
        with replacing(file.with_name(file.name + IDS)) as ids:
            with pq.ParquetWriter(ids, schema) as writer:
                for keys, vectors in batches:
                    add(np.ascontiguousarray(vectors))
                    writer.write_batch(pa.record_batch([keys], schema=schema))
                    changes.added += len(keys)
            if not changes.added:
                raise ValueError("No row has an embedding: see the errors of btok embed.")
            save(str(draft))
            file.unlink(missing_ok=True)  # an old index with new ids would find wrong rows
        os.replace(draft, file)
    finally:
        draft.unlink(missing_ok=True)
    return changes
