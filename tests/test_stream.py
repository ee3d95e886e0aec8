"""Rows on their way into a database: checks, counts, hashes."""

import numpy as np
import pyarrow as pa
import pytest
from support.units import random_vectors, rows_of, write_units

from btok_hf.corpus import stream as module
from btok_hf.corpus.stream import SAMPLE, Changes, Held, RowStream, database_settings, wanted_ids
from btok_hf.corpus.units import read_units


def stream_of(tmp_path, rows, **options):
    corpus, batches = read_units(write_units(tmp_path / "out", rows, **options))
    return RowStream(batches, database_settings(corpus, "float32", None))


def test_failed_rows_are_counted_and_left_out(tmp_path):
    vectors = random_vectors(5)
    stream = stream_of(tmp_path, rows_of([vectors[0], None, *vectors[2:]], text=list("abcde")))
    table = pa.Table.from_batches(stream)
    assert table.column("id").to_pylist() == ["a0", "a2", "a3", "a4"] and stream.failed == 1
    assert np.allclose(table.column("vector").to_pylist(), vectors[[0, 2, 3, 4]])
    assert not {"embedding", "error"} & set(table.column_names)


def test_a_hash_changes_with_every_column(tmp_path):
    vectors = random_vectors(2)
    base = dict(rows_of(vectors[:1], text=["t"], year=[1])[0], thumbnail=b"x", source="s")
    changes = [{"text": "u"}, {"year": 2}, {"thumbnail": b"y"}, {"source": None}, {"embedding": vectors[1].tolist()}]
    changes += [{"thumbnail": b"x1", "year": 2}, {"thumbnail": b"x", "year": 12}]  # equal if put together
    hashes = []
    for number, change in enumerate([{}, {}, *changes]):
        stream = stream_of(tmp_path / str(number), [base | change], metadata={"year": pa.int64()})
        hashes += pa.Table.from_batches(stream).column("row_hash").to_pylist()
    assert hashes[0] == hashes[1] and len(set(hashes)) == 1 + len(changes)


def test_a_sample_is_of_all_rows(tmp_path):
    vectors = random_vectors(1000)
    stream = stream_of(tmp_path, rows_of(vectors))
    pa.Table.from_batches(stream)
    places = [int(np.flatnonzero(np.isclose(vectors, row).all(1))[0]) for row in stream.sample]
    assert len(set(places)) == SAMPLE and min(places) < 100 and max(places) > 900


def test_a_vector_without_direction_is_refused(tmp_path):
    with pytest.raises(ValueError, match="points nowhere"):
        list(stream_of(tmp_path, rows_of(np.zeros((1, 16), np.float32))))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "nothing to index: 0 rows"),
        (rows_of([None, None]), "nothing to index: 2 rows, and none has an embedding"),
        (rows_of(random_vectors(3)) + rows_of(random_vectors(2)), "2 rows have the id of another row, e.g. 'a0'"),
    ],
)
def test_ids_that_no_database_can_hold(tmp_path, rows, message):
    with pytest.raises(ValueError, match=message):
        wanted_ids(write_units(tmp_path, rows))


def test_only_ids_of_embedded_rows_are_wanted(tmp_path):
    out = write_units(tmp_path, rows_of([*random_vectors(2), None]))
    ids, missing = wanted_ids(out)
    assert ids.tolist() == sorted([hash("a0"), hash("a1")]) and missing == 0
    assert wanted_ids(write_units(tmp_path, rows_of(random_vectors(2)), planned=3))[1] == 3


def test_new_changed_and_gone_rows(tmp_path):
    vectors = random_vectors(250)
    before = pa.Table.from_batches(stream_of(tmp_path / "before", rows_of(vectors[:200], text=["old"] * 200)))
    held = Held(before.select(["id", "row_hash"]).to_batches(60), np.sort([hash(f"a{n}") for n in range(10, 250)]))
    assert sorted(held.gone) == sorted(f"a{number}" for number in range(10))
    texts = ["old"] * 150 + ["new"] * 100
    stream = stream_of(tmp_path / "after", rows_of(vectors, text=texts)[10:], unit_rows=70)
    ((added, changed),) = stream.changes(held)
    assert added.column("id").to_pylist() == [f"a{number}" for number in range(200, 250)]
    assert changed.column("id").to_pylist() == [f"a{number}" for number in range(150, 200)]
    assert added.schema == changed.schema == stream.schema


def test_changes_come_in_chunks(tmp_path, monkeypatch):
    first = next(iter(stream_of(tmp_path, rows_of(random_vectors(250)))))
    for size, expected in ((1, [100, 100, 50, 0]), (int(0.8 * first.nbytes), [100, 100, 50])):
        monkeypatch.setattr(module, "CHUNK_BYTES", size)
        stream = stream_of(tmp_path, rows_of(random_vectors(250)))
        assert [len(added) for added, _ in stream.changes(Held([], np.empty(0, np.int64)))] == expected


@pytest.mark.parametrize("name", ["vector", "row_hash", "_score", "a.b"])
def test_names_of_the_database_are_refused(tmp_path, name):
    with pytest.raises(ValueError, match=f"The column '{name}' cannot be copied"):
        stream_of(tmp_path, rows_of(random_vectors(1), **{name: ["x"]}), metadata={name: pa.string()})


def test_changes_in_words():
    text = str(Changes(added=1200, replaced=3, deleted=0, failed=2, missing=4))
    assert text.startswith(
        "1,200 added, 3 replaced, nothing deleted, 2 left out because embedding them failed; 4 units"
    )
    assert str(Changes(added=1)) == "1 added, 0 replaced, 0 deleted"
