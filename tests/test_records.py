"""Records of tables: lines of JSON and CSV from a byte on, parquet from a row on."""

import io
from types import SimpleNamespace

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from btok_hf.corpus.records import ParquetCursor, line_records
from btok_hf.corpus.rows import File

LOCAL = fsspec.filesystem("file")


def records(path, offset=0):
    return [(start, parse()) for start, parse in line_records(path.name, File(LOCAL, str(path)), offset)]


def write(path, content):
    path.write_bytes(content)
    return path


def test_json_lines(tmp_path):
    path = write(tmp_path / "a.jsonl", '\ufeff{"a": "ä"}\n\n  \n{"a": 2}\nbroken\n[1]\n"x"\n{"a": 3}'.encode())
    found = records(path)
    assert [record for _, record in found if isinstance(record, dict)] == [{"a": "ä"}, {"a": 2}, {"a": 3}]
    wrong = [record for _, record in found if not isinstance(record, dict)]
    assert wrong[0].startswith("the line is not JSON") and wrong[1].endswith("but list") and wrong[2].endswith("str")
    for index, (start, _) in enumerate(found):  # reading may start at any record
        assert records(path, start) == found[index:]


def test_lines_are_read_in_blocks(tmp_path):
    """A file of fsspec copies a whole block for each line."""

    class Remote(io.BytesIO):
        def readline(self, size=-1):
            raise AssertionError("line by line")

        __next__ = readline

    for suffix, content in ((".jsonl", b'{"a": 1}\n{"a": 2}\n'), (".csv", b"a\n1\n2\n")):
        fs = SimpleNamespace(open=lambda path, mode, content=content: Remote(content))
        assert len(list(line_records(f"x{suffix}", File(fs, f"x{suffix}")))) == 2


def test_a_json_list_is_refused_with_a_way_out(tmp_path):
    with pytest.raises(ValueError, match=r"a\.json is one JSON list.*jq -c"):
        records(write(tmp_path / "a.json", b' [{"a": 1}]'))


def test_csv(tmp_path):
    content = '\ufeffa,b\n1,"two\nlines, ""quoted"""\n\n2,\nonly one\nx,\xff\n3,c'.encode("latin-1", "replace")
    content = content.replace(b"?", b"\xef\xbb\xbf", 1)
    found = records(write(tmp_path / "a.csv", content))
    values = [record for _, record in found]
    assert values[:2] == [{"a": "1", "b": 'two\nlines, "quoted"'}, {"a": "2", "b": None}]
    assert values[2] == "the row has 1 cells, and the table 2 columns"
    assert values[3] == "the row is not UTF-8; convert the table" and values[4] == {"a": "3", "b": "c"}
    for index, (start, _) in enumerate(found):
        assert [record for _, record in records(tmp_path / "a.csv", start)] == values[index:]


def test_two_columns_of_one_name_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"a\.csv has several columns a\. Rename all but one"):
        records(write(tmp_path / "a.csv", b"a,b,a\n1,2,3\n"))
    assert records(write(tmp_path / "b.csv", b",b,\n1,2,3\n"))[0][1]["b"] == "2"  # columns without a name


def test_tab_separated_and_long_cells(tmp_path):
    long = "x" * 300_000
    assert records(write(tmp_path / "a.tsv", f"a\tb\n{long}\t2\n".encode()))[0][1] == {"a": long, "b": "2"}
    assert records(write(tmp_path / "a.csv", b"")) == []


# ---------------------------------------------------------------- parquet


@pytest.fixture
def parquet(tmp_path):
    """Row groups of 100, 100 and 50 rows."""
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"a": np.arange(250), "b": ["x"] * 250}), path, row_group_size=100)
    return File(LOCAL, str(path))


def taken(cursor, first, count):
    return [value for batch in cursor.take(first, count) for value in batch["a"].to_pylist()]


@pytest.mark.parametrize("first", [0, 1, 31, 32, 99, 100, 170, 249])
def test_any_rows(parquet, first):
    cursor = ParquetCursor("a", parquet, ["a"], first)
    assert cursor.reaches("a", first)
    count = min(77, 250 - first)
    assert taken(cursor, first, count) == list(range(first, first + count))


def test_rows_in_order_are_read_once(parquet):
    cursor, rows = ParquetCursor("a", parquet, ["a"], 0), []
    read, cursor._batches = [], cursor._batches
    batches = cursor._batches
    cursor._batches = (read.append(len(batch)) or batch for batch in batches)
    for first in range(0, 250, 20):
        assert cursor.reaches("a", first)
        rows += taken(cursor, first, min(20, 250 - first))
    assert rows == list(range(250)) and sum(read) == 250


def test_a_cursor_goes_on_within_a_row_group_only(parquet):
    cursor = ParquetCursor("a", parquet, ["a"], 0)
    assert taken(cursor, 0, 10) == list(range(10))
    assert cursor.reaches("a", 50) and not cursor.reaches("a", 150) and not cursor.reaches("a", 5)
    assert not cursor.reaches("other", 50)
    assert taken(cursor, 50, 60) == list(range(50, 110))
    cursor.close()
