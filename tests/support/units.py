"""Units as `btok embed` writes them, of given vectors."""

import io

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from btok_hf.corpus.units import FORMAT, Corpus, unit_schema

SETTINGS = {
    "format": FORMAT,
    "model": "org/btok-2b",
    "revision": "abc",
    "prompt": None,
    "dtype": "auto",
    "max_pixels": None,
    "max_seq_length": None,
    "input": "/in",
    "root": "/in",
}


def random_vectors(count, dimensions=16, seed=0):
    """Unit vectors around a few centres, as those of a model."""
    generator = np.random.default_rng(seed)
    vectors = generator.standard_normal((8, dimensions))[generator.integers(0, 8, count)]
    vectors = vectors + 0.7 * generator.standard_normal((count, dimensions))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype("float32")


def rows_of(vectors, **columns):
    """Rows `a0`, `a1`, … with these vectors (`None`: a failed row) and columns."""
    return [
        {
            "id": f"a{number}",
            "kind": "text",
            "content_hash": f"hash {number}",
            "embedding": None if vector is None else vector.tolist(),
            "error": "cannot be read" if vector is None else None,
            **{name: values[number] for name, values in columns.items()},
        }
        for number, vector in enumerate(vectors)
    ]


def write_units(out, rows, *, dimensions=16, metadata=None, unit_rows=100, planned=None, **settings):
    """Write rows as units of a folder, which replace those that it planned before.

    `planned` is how many units the plan has beyond those that are written.
    """
    corpus = Corpus(str(out))
    corpus.claim({**SETTINGS, "dimensions": dimensions, **settings})
    schema, names = unit_schema(dimensions, metadata), []
    for start in range(0, len(rows), unit_rows):
        part = rows[start : start + unit_rows]
        buffer = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(part, schema=schema), buffer)
        names.append(f"unit-{start}-{abs(hash(repr(part)))}")
        corpus.write(names[-1], buffer.getvalue(), {})
    corpus.set_plan([*names, *(f"later-{number}" for number in range(planned or 0))])
    return str(out)
