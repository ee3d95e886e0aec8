"""Indexes of faiss and usearch: read back as the documentation says, they find what exact search does."""

import os
import sys

import numpy as np
import pyarrow.parquet as pq
import pytest
from support.units import random_vectors, rows_of, write_units

from btok_hf.corpus.stream import Changes
from btok_hf.corpus.vector_libraries import write_faiss, write_usearch

VECTORS = random_vectors(400, dimensions=32)
# How many of the ten nearest are found.
LEAST = {"float32": 0.99, "float16": 0.99, "int8": 0.9, "binary": 0.35}


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    given = [*VECTORS[:200], None, *VECTORS[200:]]  # after the failed row, ids and numbers differ
    return write_units(tmp_path_factory.mktemp("out"), rows_of(given), dimensions=32)


def nearest(query):
    order = np.argsort(-(VECTORS @ query), kind="stable")[:10]
    return {f"a{number + (number >= 200)}" for number in order}


def recall(file, search):
    ids = pq.read_table(f"{file}.ids.parquet").column("id").to_pylist()
    assert len(ids) == 400 and ids[200] == "a201"
    return np.mean([len({ids[row] for row in search(query)} & nearest(query)) / 10 for query in VECTORS[::20]])


@pytest.mark.parametrize("precision", LEAST)
def test_faiss(out, tmp_path, precision):
    import faiss

    file = tmp_path / "new" / "index.faiss"
    assert write_faiss(out, file, precision) == Changes(added=400, failed=1)
    if precision == "binary":
        index = faiss.read_index_binary(str(file))
        found = recall(file, lambda query: index.search(np.packbits(query > 0)[None], 10)[1][0])
    else:
        index = faiss.read_index(str(file))
        found = recall(file, lambda query: index.search(query[None], 10)[1][0])
        scores, rows = index.search(VECTORS[:1], 1)
        assert rows[0, 0] == 0 and scores[0, 0] == pytest.approx(1, abs=0.02)
    assert found >= LEAST[precision]


@pytest.mark.parametrize("precision", LEAST)
def test_usearch(out, tmp_path, precision):
    from usearch.index import Index

    file = tmp_path / "index.usearch"
    assert write_usearch(out, file, precision) == Changes(added=400, failed=1)
    index = Index.restore(str(file), view=True)
    asked = (lambda query: np.packbits(query > 0)) if precision == "binary" else np.asarray
    assert recall(file, lambda query: index.search(asked(query), 10).keys) >= LEAST[precision] - 0.02


def test_a_run_that_fails_leaves_what_was_there(out, tmp_path):
    file = tmp_path / "index.faiss"
    write_faiss(out, file)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    empty = write_units(tmp_path / "empty", rows_of([None]), dimensions=32)
    for write in (write_faiss, write_usearch):
        with pytest.raises(ValueError, match="No row has an embedding"):
            write(empty, file)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()} == before


def test_a_folder_is_refused_before_vectors_are_read(tmp_path):
    for write in (write_faiss, write_usearch):
        with pytest.raises(ValueError, match=r"is a folder\. Give a file, e\.g\. .*/vectors\.index\."):
            write("no such corpus", tmp_path)


def test_an_old_index_never_has_new_ids(out, tmp_path, monkeypatch):
    import faiss

    file = tmp_path / "index.faiss"
    write_faiss(out, file)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full(index, name):
        with open(name, "wb") as opened:
            opened.write(b"half")
        raise RuntimeError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(faiss, "write_index", full)
        with pytest.raises(RuntimeError, match="No space left"):
            write_faiss(out, file)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    replace = os.replace

    def killed(draft, target):
        if target == file:
            raise KeyboardInterrupt
        replace(draft, target)

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        write_faiss(out, file)
    assert [path.name for path in tmp_path.iterdir()] == ["index.faiss.ids.parquet"]


def test_a_library_that_is_missing_is_named(out, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(ImportError, match="pip install faiss-cpu"):
        write_faiss(out, tmp_path / "index")
