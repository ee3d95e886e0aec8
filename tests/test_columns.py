"""Columns that are copied: every type of parquet becomes one that a database takes, and bad cells cost their row."""

from datetime import datetime
from decimal import Decimal

import lancedb
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.corpus import embed

from btok_hf.corpus.columns import json_cells, kept_type, parquet_cells, stored_type, wider
from btok_hf.corpus.index import Index
from btok_hf.corpus.tables import Columns


@pytest.mark.parametrize(
    "values, kind",
    [
        ([None, None], pa.null()),
        ([1, None, 2], pa.int64()),
        ([1, 2.5], pa.float64()),
        ([2.5, 1], pa.float64()),
        ([True, False], pa.bool_()),
        ([True, 1], pa.string()),
        ([1, "a"], pa.string()),
        (["a", 1], pa.string()),
        ([[1], None], pa.string()),
        ([1, 2**70], pa.string()),
        ([2**60, 0.5], pa.float64()),
    ],
)
def test_types_of_json(values, kind):
    found = pa.null()
    for value in values:
        found = wider(found, value)
    assert found == kind
    kind = pa.string() if kind == pa.null() else kind
    cells = [json_cells({"a": value}, {"a": kind})["a"] for value in values]
    assert all(len(cell) == 1 and cell.type == kind for cell in cells)


def test_values_of_json():
    def stored(value, kind):
        return json_cells({"a": value}, {"a": kind})["a"].to_pylist()

    for text in (pa.string(), pa.large_string()):
        assert stored({"a": ["ä"]}, text) == ['{"a": ["ä"]}'] and stored("\ud800", text) == ["?"]
    assert stored(7, pa.float64()) == [7.0] and stored(None, pa.int64()) == [None]
    assert json_cells({}, {"a": pa.int64()})["a"].to_pylist() == [None]


def test_a_value_of_json_that_does_not_fit_is_named():
    """Tables of parquet beside it may have given the column its type."""
    for value, kind in (
        ("many", pa.int64()),
        (2**70, pa.int64()),
        ("x", pa.timestamp("us")),
        (1, pa.list_(pa.int8())),
    ):
        wrong = json_cells({"n": value, "m": "fine"}, {"m": pa.string(), "n": kind})
        assert wrong.startswith(f"its column n cannot be stored as {kind} (")


# ---------------------------------------------------------------- parquet

PRICE, TEXTS = Decimal("1.25"), ["a", "b"]
# Columns of two rows, and what they are stored as, if not as they are.
STORED = {
    "decimal32": (pa.array([PRICE, None], pa.decimal32(5, 2)), pa.decimal128(5, 2)),
    "decimal64": (pa.array([PRICE] * 2, pa.decimal64(12, 2)), pa.decimal128(12, 2)),
    "decimal128": (pa.array([PRICE] * 2, pa.decimal128(20, 2)), None),
    "categories": (pa.array(TEXTS).dictionary_encode(), pa.string()),
    "string_view": (pa.array(TEXTS, pa.string_view()), pa.string()),
    "binary_view": (pa.array([b"a", b"b"], pa.binary_view()), pa.binary()),
    "large_string": (pa.array(TEXTS, pa.large_string()), None),
    "json": (pa.ExtensionArray.from_storage(pa.json_(), pa.array(["{}"] * 2)), pa.string()),
    "times": (pa.array([datetime(2026, 1, 2)] * 2, pa.timestamp("us", "Europe/Berlin")), None),
    "views": (pa.array([TEXTS, None], pa.list_(pa.string_view())), pa.list_(pa.string())),
    "large_list": (pa.array([TEXTS, []], pa.large_list(pa.string_view())), pa.large_list(pa.string())),
    "pairs": (pa.array([TEXTS, None], pa.list_(pa.string(), 2)), pa.list_(pa.string())),
    "numbers": (pa.array([[1, 2]] * 2, pa.list_(pa.int32(), 2)), None),
    "struct": (
        pa.array(
            [{"p": PRICE, "t": TEXTS}] * 2, pa.struct([("p", pa.decimal32(5, 2)), ("t", pa.list_(pa.string(), 2))])
        ),
        pa.struct([("p", pa.decimal128(5, 2)), ("t", pa.list_(pa.string()))]),
    ),
    "map": (
        pa.array([[("a", "x")], None], pa.map_(pa.string(), pa.string_view())),
        pa.map_(pa.string(), pa.string()),
    ),
    "nested": (
        pa.array([[{"v": PRICE}], []], pa.list_(pa.struct([("v", pa.decimal32(5, 2))]))),
        pa.list_(pa.struct([("v", pa.decimal128(5, 2))])),
    ),
}


def test_stored_types_hold_the_values_and_a_database_takes_them(tmp_path):
    batch = pa.RecordBatch.from_pydict({name: array for name, (array, _) in STORED.items()})
    kinds = {name: stored_type(array.type) for name, (array, _) in STORED.items()}
    assert kinds == {name: kind or array.type for name, (array, kind) in STORED.items()}
    rows = parquet_cells(batch, kinds)
    cells = [{name: cell.to_pylist()[0] for name, cell in row.items()} for row in rows]
    assert cells == batch.to_pylist()
    table = lancedb.connect(tmp_path).create_table("items", schema=pa.schema(list(kinds.items())))
    for row in rows:
        table.add(pa.table(row))
    assert table.to_arrow().to_pylist() == cells and table.schema.types == list(kinds.values())


def test_a_corpus_with_such_columns_is_indexed(tmp_path, repo):
    (tmp_path / "in").mkdir()
    columns = {name: array for name, (array, _) in STORED.items()}
    pq.write_table(pa.table({"words": ["one cat", "two dogs"], **columns}), tmp_path / "in" / "a.parquet")
    embed(tmp_path / "in", tmp_path / "out", repo, columns=Columns("words", metadata=tuple(columns)))
    for _ in range(2):  # nothing changes the second time
        index, changes, sample = Index.build(tmp_path / "out", tmp_path / "db")
    assert (changes.added, changes.replaced, index.count()) == (0, 0, 2)
    metadata = {hit.text: hit.metadata for hit in index.search(sample[0])}
    assert metadata["one cat"]["decimal32"] == PRICE and metadata["two dogs"]["struct"]["t"] == TEXTS


def test_a_zone_that_is_not_known_is_refused():
    with pytest.raises(ValueError, match="its zone 'GMT\\+1' is not known"):
        stored_type(pa.timestamp("us", "GMT+1"))
    with pytest.raises(ValueError, match="its zone 'Mars/Base'"):
        stored_type(pa.list_(pa.struct([("at", pa.timestamp("us", "Mars/Base"))])))
    assert stored_type(pa.timestamp("us", "+01:00")) == pa.timestamp("us", "+01:00")


def test_views_of_lists_are_refused():
    """pyarrow cannot read parts of them, so neither their rows one by one."""
    for kind in (pa.list_view(pa.int8()), pa.large_list_view(pa.string()), pa.list_(pa.list_view(pa.int8()))):
        with pytest.raises(ValueError, match="of which pyarrow cannot read parts"):
            stored_type(kind)


def test_a_value_of_parquet_that_does_not_fit_costs_its_row_alone():
    days = [0] * 40
    days[7] = 2**62
    batch = pa.RecordBatch.from_pydict({"day": pa.array(days, pa.timestamp("us")), "n": list(range(40))})
    cells = parquet_cells(batch, {"n": pa.float64(), "day": pa.timestamp("ns")})
    assert [index for index, row in enumerate(cells) if isinstance(row, str)] == [7]
    assert cells[7].startswith("its column day cannot be stored as timestamp[ns] (")
    assert cells[39]["n"].to_pylist() == [39.0] and cells[39]["day"].type == pa.timestamp("ns")
    assert parquet_cells(batch, {}) == [{}] * 40


@pytest.mark.parametrize(
    "kind, before, kept",
    [
        (pa.int64(), "int64", pa.int64()),
        (pa.int64(), "string", pa.string()),
        (pa.int64(), "double", pa.float64()),
        (pa.large_string(), "string", pa.string()),  # pandas 3 and polars write it, pandas 2 does not
        (pa.string(), "large_string", pa.large_string()),
        (pa.binary(), "large_binary", pa.large_binary()),
        (pa.string(), "double", None),
        (pa.list_(pa.int8()), "string", None),
        (pa.float64(), "int64", None),
    ],
)
def test_types_that_a_corpus_keeps(kind, before, kept):
    assert kept_type(kind, before) == kept
