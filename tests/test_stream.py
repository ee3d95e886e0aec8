"""Rows on their way into a database: checks, counts, hashes."""

import numpy as np
import pyarrow as pa
import pytest
from support.units import random_vectors, rows_of, write_units

from btok_hf.corpus.stream import SAMPLE, Changes, RowStream, database_settings
from btok_hf.corpus.units import read_units


def stream_of(tmp_path, rows, **options):
    corpus, batches = read_units(write_units(tmp_path / "out", rows, **options))
    return RowStream(batches, database_settings(corpus, "float32", None))


def test_failed_rows_are_counted_and_left_out(tmp_path):
    vectors = random_vectors(5)
    stream = stream_of(tmp_path, rows_of([vectors[0], None, *vectors[2:]], text=list("abcde")))
    table = stream.reader().read_all()
    assert table.column("id").to_pylist() == ["a0", "a2", "a3", "a4"] and (stream.rows, stream.failed) == (4, 1)
    assert np.allclose(table.column("vector").to_pylist(), vectors[[0, 2, 3, 4]])
    assert not {"embedding", "error"} & set(table.column_names)


def test_a_hash_changes_with_every_column(tmp_path):
    vectors = random_vectors(2)
    base = dict(rows_of(vectors[:1], text=["t"], year=[1])[0], thumbnail=b"x", source="s")
    changes = [{"text": "u"}, {"year": 2}, {"thumbnail": b"y"}, {"source": None}, {"embedding": vectors[1].tolist()}]
    hashes = []
    for number, change in enumerate([{}, {}, *changes]):
        stream = stream_of(tmp_path / str(number), [base | change], metadata={"year": pa.int64()})
        hashes += stream.reader().read_all().column("row_hash").to_pylist()
    assert hashes[0] == hashes[1] and len(set(hashes)) == 1 + len(changes)


def test_a_sample_is_of_all_rows(tmp_path):
    vectors = random_vectors(1000)
    stream = stream_of(tmp_path, rows_of(vectors))
    stream.reader().read_all()
    places = [int(np.flatnonzero(np.isclose(vectors, row).all(1))[0]) for row in stream.sample]
    assert len(set(places)) == SAMPLE and min(places) < 100 and max(places) > 900


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (rows_of([None, None]), "None of the 2 rows has an embedding"),
        (rows_of(random_vectors(3)) + rows_of(random_vectors(2)), "2 ids name several rows"),
        (rows_of(np.zeros((1, 16), np.float32)), "points nowhere"),
    ],
)
def test_rows_that_no_database_can_hold(tmp_path, rows, message):
    stream = stream_of(tmp_path, rows)
    with pytest.raises(ValueError, match=message), stream.own_errors():
        stream.reader().read_all()


@pytest.mark.parametrize("name", ["vector", "row_hash", "_score"])
def test_names_of_the_database_are_refused(tmp_path, name):
    with pytest.raises(ValueError, match=f"'{name}' has a name that the database uses"):
        stream_of(tmp_path, rows_of(random_vectors(1), **{name: ["x"]}), metadata={name: pa.string()})


def test_a_corpus_without_units_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no units to index"):
        stream_of(tmp_path, [])


def test_changes_in_words():
    text = str(Changes(added=1200, replaced=3, deleted=0, failed=2, missing=4))
    assert text.startswith("1,200 added, 3 replaced, 0 deleted, 2 left out because embedding them failed; 4 units")
    assert str(Changes(added=1)) == "1 added, 0 replaced, 0 deleted"
