"""Tables whose rows are embedded: the same rows from every format, ids, metadata, scans that are kept."""

import csv
import io
import json
import shutil

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.corpus import embed, picture, read, same

from btok_hf.corpus import tables
from btok_hf.corpus.listing import Input
from btok_hf.corpus.tables import Columns, TableSource
from btok_hf.corpus.units import Store, read_units

ROWS = [{"key": f"k{index}", "words": f"text {index}", "year": 2000 + index} for index in range(7)]
COLUMNS = Columns("words", id="key", metadata=("year",))


def png(seed):
    content = io.BytesIO()
    picture(seed).save(content, "PNG")
    return content.getvalue()


def write(path, rows=ROWS):
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=3)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    else:
        with open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, rows[0], delimiter="\t" if path.suffix == ".tsv" else ",")
            writer.writeheader()
            writer.writerows(rows)
    return path


def source(path, columns=COLUMNS, unit_rows=3):
    return TableSource(Input(str(path)), columns, unit_rows, Store(str(path.parent / "out")))


def rows_of(table):
    return [row for unit in table.plan("s") for row in table.rows(unit)]


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl", ".csv", ".tsv"])
def test_every_format_gives_the_same_rows(tmp_path, repo, suffix):
    embed(write(tmp_path / f"a{suffix}"), tmp_path / "out", repo, columns=COLUMNS, unit_rows=3)
    settings, _ = read_units(str(tmp_path / "out"))
    assert settings["kind"] == "table" and settings["units_written"] == 3 and settings["root"] == str(tmp_path)
    rows = read(tmp_path / "out")
    assert list(rows) == [row["key"] for row in ROWS]
    assert [row["text"] for row in rows.values()] == [row["words"] for row in ROWS]
    years = [row["year"] for row in rows.values()]
    kind = "string" if suffix in (".csv", ".tsv") else "int64"
    assert settings["metadata"] == {"year": kind}
    assert years == [str(row["year"]) if kind == "string" else row["year"] for row in ROWS]
    write(tmp_path / "b.jsonl")
    embed(tmp_path / "b.jsonl", tmp_path / "other", repo, columns=Columns("words", id="key"))
    plain = read(tmp_path / "other")
    for row in rows.values():
        del row["year"]
    assert same(rows, plain)


def test_ids_without_a_column_and_units_of_several_files(tmp_path):
    for name in ("b/x.csv", "a.jsonl"):
        write(tmp_path / "in" / name)
    table = source(tmp_path / "in", Columns("words"))
    units = table.plan("s")
    assert [(unit.files, unit.first, unit.rows) for unit in units] == [
        ((name,), first, rows) for name in ("a.jsonl", "b/x.csv") for first, rows in ((0, 3), (3, 3), (6, 1))
    ]
    ids = [row.id for unit in units for row in table.rows(unit)]
    assert ids == [f"{name}#row={row}" for name in ("a.jsonl", "b/x.csv") for row in range(7)]


def test_image_cells_in_every_form(tmp_path, repo):
    picture(0).save(tmp_path / "0.png")
    cells = [
        {"bytes": png(0), "path": None},
        {"bytes": None, "path": "0.png"},
        {"bytes": png(0), "path": "elsewhere.png"},
    ]
    pq.write_table(pa.table({"pic": cells}), tmp_path / "cells.parquet")
    pq.write_table(pa.table({"pic": [png(0), None]}), tmp_path / "bytes.parquet")
    paths = ["0.png", "./0.png", str(tmp_path / "0.png"), f"file://{tmp_path}/0.png", "gone.png", "x9://a/0.png"]
    write(tmp_path / "paths.jsonl", [{"pic": path} for path in paths])
    errors = embed(tmp_path, tmp_path / "out", repo, columns=Columns(image="pic"))
    rows = read(tmp_path / "out")
    assert errors.keys() == {"bytes.parquet#row=1", "paths.jsonl#row=4", "paths.jsonl#row=5"}
    assert "its cells are empty" in errors["bytes.parquet#row=1"] and "No such file" in errors["paths.jsonl#row=4"]
    vectors = {tuple(row["embedding"]) for row in rows.values() if row["embedding"]}
    assert len(vectors) == 1 and len(rows) == 11
    sources = [rows[f"paths.jsonl#row={index}"]["source"] for index in range(4)]
    assert sources == ["0.png", "0.png", str(tmp_path / "0.png"), f"file://{tmp_path}/0.png"]
    assert rows["bytes.parquet#row=0"]["source"] is None and rows["cells.parquet#row=1"]["source"] == "0.png"


def test_rows_of_several_parts(tmp_path, repo, model):
    picture(0).save(tmp_path / "0.png")
    rows = [{"pic": "0.png", "words": "a"}, {"pic": None, "words": "b"}, {"pic": "0.png", "words": None}]
    write(tmp_path / "a.jsonl", [*rows, {"pic": ["0.png", "0.png"], "words": ["c", "d"]}, {"words": ["e", 7]}])
    errors = embed(tmp_path / "a.jsonl", tmp_path / "out", repo, columns=Columns("words", "pic"))
    found = list(read(tmp_path / "out").values())
    assert [row["kind"] for row in found] == ["mixed", "text", "image", "mixed", "mixed"]
    assert [row["text"] for row in found] == ["a", "b", None, "c\nd", None]
    assert list(errors.values()) == ["the text must be a string or a list of strings, got int"]
    path = tmp_path / "0.png"
    inputs = [{"image": path, "text": "a"}, {"text": "b"}, {"image": path}]
    inputs.append({"image": [path, path], "text": ["c", "d"]})
    for row, vector in zip(found, model.encode_document(inputs)):
        assert max(abs(row["embedding"] - vector)) < 1e-5


def test_a_video_column(tmp_path, repo, mp4):
    with open(mp4, "rb") as file:
        pq.write_table(pa.table({"clip": [file.read()]}), tmp_path / "a.parquet")
    embed(tmp_path / "a.parquet", tmp_path / "out", repo, columns=Columns(video="clip"))
    (row,) = read(tmp_path / "out").values()
    assert row["kind"] == "video" and row["embedding"] and row["thumbnail"]


def test_broken_rows_do_not_move_the_others(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"words": "a"}\nbroken\n\n{"words": "b"}\n{"key": 1}\n')
    rows = rows_of(source(path, Columns("words"), unit_rows=2))
    assert [(row.id, row.text) for row in rows] == [
        ("a.jsonl#row=0", "a"),
        ("a.jsonl#row=1", None),
        ("a.jsonl#row=2", "b"),
        ("a.jsonl#row=3", None),
    ]
    assert "not JSON" in rows[1].error and "cells are empty" in rows[3].error
    rows = rows_of(source(path, Columns("words", id="key")))
    assert rows[0].error == "the row has no key that can be read" and rows[0].id == "a.jsonl#row=0"
    assert rows[3].id == "1" and "cells are empty" in rows[3].error


def test_values_that_python_cannot_hold_cost_their_row_alone(tmp_path):
    words = pa.array([b"a", b"b\xe9", b"c", b"d", b"e"]).view(pa.string())
    notes = pa.array([b"a", b"b", b"c\xe9", b"d", b"e"]).view(pa.string())
    days = pa.array([0, 0, 0, 2**31 - 1, 0], pa.int32()).view(pa.date32())
    pq.write_table(pa.table({"words": words, "note": notes, "day": days}), tmp_path / "a.parquet")
    found = rows_of(source(tmp_path / "a.parquet", Columns("words", metadata=("note", "day")), unit_rows=5))
    assert [row.text for row in found] == ["a", None, None, None, "e"]
    assert [row.error and row.error.split(" (")[0] for row in found] == [
        None,
        *(f"its column {name} cannot be read" for name in ("words", "note", "day")),
        None,
    ]


def test_a_row_that_no_reader_takes_fails_alone(tmp_path):
    lines = ['{"words": "a"}', '{"words": ' + "[" * 10**5 + "]" * 10**5 + "}", '{"words": "c"}']
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    found = rows_of(source(tmp_path / "a.jsonl", Columns("words")))
    assert [row.text for row in found] == ["a", None, "c"] and "not JSON" in found[1].error
    addresses = ["github://x/y.png", "dir://x", "nosuch://x"]
    (tmp_path / "b.jsonl").write_text("\n".join(json.dumps({"pic": address}) for address in addresses))
    for row, address in zip(rows_of(source(tmp_path / "b.jsonl", Columns(image="pic"))), addresses):
        assert row.error and (address in row.error or "nosuch" in row.error)


def test_a_quotation_mark_that_is_not_closed_is_named_before_work(tmp_path):
    """The csv module takes all that follows for one cell."""
    path = tmp_path / "a.csv"
    path.write_text('n,words\n1,one\n2,"two inch\n3,three\n4,four\n')
    with pytest.raises(ValueError, match=r"a\.csv has a quotation mark that is not closed.*starts with '2,\"two inch"):
        source(path, Columns("words")).plan("s")
    path.write_text('n,words\n1,"one" and more\n2,two" inch\n3,"three\nfour"')
    assert [row.text for row in rows_of(source(path, Columns("words")))] == [
        "one and more",
        'two" inch',
        "three\nfour",
    ]


def test_a_column_that_only_later_lines_have(tmp_path):
    rows = [{"pic": "0.png"}] * 2000 + [{"words": "x"}]
    assert rows_of(source(write(tmp_path / "a.jsonl", rows), Columns("words")))[-1].text == "x"


def test_columns_that_are_used_in_another_way_are_scanned_again(tmp_path, repo):
    path = write(tmp_path / "a.parquet", [{"words": "a", "b": 1}, {"words": "c", "b": 1}])
    with pytest.raises(ValueError, match="Ids must be unique"):
        embed(path, tmp_path / "out", repo, columns=Columns("words", id="b"))
    embed(path, tmp_path / "out", repo, columns=Columns("words", metadata=("b",)))
    assert [row["b"] for row in read(tmp_path / "out").values()] == [1, 1]


def test_the_rest_of_a_damaged_parquet_file_fails_row_by_row(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"words": [f"text {index}" for index in range(120)]}), path, row_group_size=40)
    content = bytearray(path.read_bytes())
    start = pq.ParquetFile(path).metadata.row_group(1).column(0).dictionary_page_offset
    content[start : start + 40] = bytes(40)  # the second of three row groups
    path.write_bytes(content)
    rows = rows_of(source(path, Columns("words"), unit_rows=20))
    assert [row.id for row in rows] == [f"a.parquet#row={index}" for index in range(120)]
    read = [index for index, row in enumerate(rows) if row.error is None]
    assert read[:20] == list(range(20)) and read[-40:] == list(range(80, 120)) and not set(read) & set(range(40, 80))
    assert all(rows[index].text == f"text {index}" for index in read) and "cannot be read here" in rows[50].error


def test_types_are_merged_over_tables(tmp_path):
    write(tmp_path / "a.jsonl", [{"words": "a", "n": 1, "none": None}])
    write(tmp_path / "b.jsonl", [{"words": "b", "n": 2.5, "none": None}])
    dictionary = pa.table(
        {"words": ["c"], "n": pa.array([3], pa.int32()), "none": pa.array(["x"]).dictionary_encode()}
    )
    pq.write_table(dictionary, tmp_path / "c.parquet")
    table = source(tmp_path, Columns("words", metadata=("n", "none")))
    rows = rows_of(table)
    assert table.metadata == {"n": pa.float64(), "none": pa.string()}
    assert [row.metadata["n"].to_pylist() for row in rows] == [[1.0], [2.5], [3.0]]
    assert [row.metadata["none"].to_pylist() for row in rows] == [[None], [None], ["x"]]
    large = pa.table({"words": ["c"], "n": [2**53 + 1], "none": pa.array(["x"], pa.string_view())})
    pq.write_table(large, tmp_path / "c.parquet")
    table = source(tmp_path, Columns("words", metadata=("n", "none")))
    rows = rows_of(table)
    assert table.metadata == {"n": pa.float64(), "none": pa.string()} and rows[2].error is None
    assert rows[2].metadata["n"].to_pylist() == [2.0**53]
    for name, kind, day in (("x", "us", 9999), ("y", "ns", 2026)):  # what does not fit is an error, and no other day
        days = pa.array([np.datetime64(f"{day}-12-31", kind)], pa.timestamp(kind))
        (tmp_path / "x" / "days").mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table({"words": ["c"], "day": days}), tmp_path / "x" / "days" / f"{name}.parquet")
    rows = rows_of(source(tmp_path / "x" / "days", Columns("words", metadata=("day",))))
    assert "its column day cannot be stored as timestamp[ns]" in rows[0].error and rows[1].error is None
    shutil.rmtree(tmp_path / "x")
    write(tmp_path / "d.jsonl", [{"words": "a", "n": "many", "none": None}])
    (tmp_path / "c.parquet").rename(tmp_path / "c.bin")
    table = source(tmp_path, Columns("words", metadata=("n", "none")))
    assert [row.metadata["n"].to_pylist() for row in rows_of(table)] == [["1"], ["2.5"], ["many"]]  # JSON text
    (tmp_path / "c.bin").rename(tmp_path / "c.parquet")
    with pytest.raises(ValueError, match="has other types in other tables"):
        source(tmp_path, Columns("words", metadata=("n", "none"))).plan("s")


def test_new_tables_keep_the_types_of_a_corpus(tmp_path, repo):
    columns, folder = Columns("words", metadata=("n", "m")), tmp_path / "in"
    write(folder / "a.jsonl", [{"words": "a", "n": 1.5, "m": None}])
    embed(folder, tmp_path / "out", repo, columns=columns)
    write(folder / "a.jsonl", [{"words": "a", "n": 1, "m": 2}])  # alone they would be integers
    embed(folder, tmp_path / "out", repo, columns=columns)
    (row,) = read(tmp_path / "out").values()
    assert (row["n"], row["m"]) == (1.0, "2") and isinstance(row["n"], float)
    write(folder / "b.jsonl", [{"words": "b", "n": "many", "m": None}])
    with pytest.raises(ValueError, match=r"column n of --columns is stored as double, but is string.*another folder"):
        embed(folder, tmp_path / "out", repo, columns=columns)


def test_scans_are_kept_and_those_of_gone_tables_forgotten(tmp_path, monkeypatch):
    first, second = write(tmp_path / "in" / "a.jsonl"), write(tmp_path / "in" / "b.parquet")
    before = source(tmp_path / "in").plan("s")
    scans = tmp_path / "out" / "scans"
    assert len(list(scans.iterdir())) == 2
    with monkeypatch.context() as patch:  # nothing is opened again
        patch.setattr(tables, "line_records", None)
        patch.setattr(tables.pq, "ParquetFile", None)
        assert source(tmp_path / "in").plan("s") == before
    second.unlink()
    write(first, ROWS[:2])
    table = source(tmp_path / "in")
    assert not {unit.name for unit in table.plan("s")} & {unit.name for unit in before}
    table.forget()
    assert len(list(scans.iterdir())) == 1


def test_tables_in_object_storage(tmp_path, repo):
    fs = fsspec.filesystem("memory")
    try:
        for name in ("a.parquet", "b.jsonl", "c.csv"):
            fs.pipe_file(f"/tables/{name}", write(tmp_path / name).read_bytes())
        fs.pipe_file("/tables/pictures/0.png", png(0))
        fs.pipe_file("/tables/d.jsonl", json.dumps({"pic": "pictures/0.png"}).encode())
        with pytest.raises(ValueError, match=r"d\.jsonl has no column words"):
            embed("memory://tables/*.*", "memory://tables-out", repo, columns=Columns("words"), unit_rows=3)
        fs.rm("/tables/d.jsonl")
        given = ("memory://tables", "memory://tables-out", repo)
        embed(*given, columns=COLUMNS._replace(id=None, metadata=()), unit_rows=3)
        rows = read("memory://tables-out")
        assert len(rows) == 21 and rows["b.jsonl#row=4"]["text"] == "text 4"
        fs.pipe_file("/pics/a.jsonl", json.dumps({"pic": "deep/0.png"}).encode())
        fs.pipe_file("/pics/deep/0.png", png(0))
        embed("memory://pics/a.jsonl", "memory://pics-out", repo, columns=Columns(image="pic"))
        assert read("memory://pics-out")["a.jsonl#row=0"]["source"] == "deep/0.png"
    finally:
        for folder in ("/tables", "/tables-out", "/pics", "/pics-out"):
            if fs.exists(folder):
                fs.rm(folder, recursive=True)


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl", ".csv"])
def test_ids_that_are_not_unique_are_refused_before_work(tmp_path, repo, suffix):
    def embedding():
        return embed(tmp_path / "in", tmp_path / "out", repo, columns=COLUMNS._replace(metadata=()))

    write(tmp_path / "in" / f"a{suffix}", [*ROWS, ROWS[3]])
    with pytest.raises(ValueError, match=r"1 rows have the key of another row, e\.g\. 'k3'.*another column for --id"):
        embedding()
    assert not (tmp_path / "out" / "corpus.json").exists()
    write(tmp_path / "in" / f"a{suffix}", ROWS)
    write(tmp_path / "in" / "b.jsonl", [{"key": None, "words": "x"}] * 2)  # rows that fail
    assert len(embedding()) == 2
    write(tmp_path / "in" / "b.jsonl", ROWS[:2])  # ids of another table
    with pytest.raises(ValueError, match=r"2 rows have the key of another row, e\.g\. 'k0'"):
        embedding()


def test_ids_that_cannot_be_read_cost_their_row_alone(tmp_path, repo):
    keys = pa.array([b"a", b"b\xe9", b"c"])
    pq.write_table(pa.table({"key": keys.view(pa.string()), "words": ["x", "y", "z"]}), tmp_path / "a.parquet")
    embed(tmp_path / "a.parquet", tmp_path / "out", repo, columns=COLUMNS._replace(metadata=()))
    rows = read(tmp_path / "out")
    assert list(rows) == ["a", "a.parquet#row=1", "c"] and not rows["c"]["error"]
    assert "key" in rows["a.parquet#row=1"]["error"]


def test_ids_that_are_bytes_are_refused_before_work(tmp_path):
    keys = pa.array([b"a", b"b"])
    for column in (keys, keys.cast(pa.large_binary()), keys.cast(pa.binary(1)), keys.dictionary_encode()):
        pq.write_table(pa.table({"key": column, "words": ["x", "y"]}), tmp_path / "a.parquet")
        with pytest.raises(ValueError, match=r"column key of a\.parquet holds bytes \(.*binary.*Cast it to string"):
            source(tmp_path / "a.parquet", Columns("words", id="key")).plan("s")
        assert len(rows_of(source(tmp_path / "a.parquet", Columns("words")))) == 2


def test_ids_are_read_once(tmp_path, monkeypatch):
    write(tmp_path / "in" / "a.jsonl"), write(tmp_path / "in" / "b.parquet", [{**ROWS[0], "key": "other"}])
    first = source(tmp_path / "in")
    first.plan("s")
    first.check_ids()
    monkeypatch.setattr(TableSource, "_ids", None)
    again = source(tmp_path / "in")
    again.plan("s")
    again.check_ids()
    (tmp_path / "in" / "a.jsonl").unlink()
    last = source(tmp_path / "in")
    last.plan("s")
    last.forget()
    assert sorted(path.suffix for path in (tmp_path / "out" / "scans").iterdir()) == [".ids", ".json"]


def test_a_table_without_readable_rows_says_why(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps({"words": "a"}, indent=2))
    with pytest.raises(
        ValueError, match=r"a\.json has no row that can be read: the line is not JSON.*one object a line"
    ):
        source(path, Columns("words")).plan("s")


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl", ".csv"])
def test_a_missing_column_is_named_before_work(tmp_path, suffix):
    with pytest.raises(ValueError, match=rf"a\{suffix} has no column wrods. Its columns are key, words, year"):
        source(write(tmp_path / f"a{suffix}"), Columns("wrods")).plan("s")


def test_columns_of_parquet_that_cannot_be_copied_are_named_before_work(tmp_path):
    table = pa.table({"words": ["a"], "at": pa.array([0], pa.timestamp("us", "GMT+1"))})
    pq.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"column at of a\.parquet cannot be copied: its zone 'GMT\+1'.*--columns"):
        source(tmp_path / "a.parquet", Columns("words", metadata=("at",))).plan("s")
    assert len(rows_of(source(tmp_path / "a.parquet", Columns("words")))) == 1
    pq.write_table(pa.table([["a"], ["b"], [1]], ["words", "words", "n"]), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"a\.parquet has several columns words\. Rename all but one"):
        source(tmp_path / "a.parquet", Columns("words")).plan("s")
    pq.write_table(pa.table([["a"], ["b"], ["c"]], ["words", "n", "n"]), tmp_path / "a.parquet")
    assert len(rows_of(source(tmp_path / "a.parquet", Columns("words")))) == 1  # none that is used


def test_what_is_refused(tmp_path):
    for name in ("text", "_id", "a.b", "vector"):  # the database takes none of them
        with pytest.raises(ValueError, match=f"The column '{name}' cannot be copied.*Rename it"):
            source(tmp_path, Columns("words", metadata=("year", name)))
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"no rows of a table \(1 that are no tables\)"):
        source(tmp_path / "in").plan("s")
    (tmp_path / "in" / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match=r"a\.parquet cannot be read"):
        source(tmp_path / "in").plan("s")
    (tmp_path / "in" / "a.parquet").unlink()
    (tmp_path / "in" / "empty.jsonl").write_bytes(b"")
    with pytest.raises(ValueError, match="no rows of a table"):
        source(tmp_path / "in").plan("s")


def test_an_empty_list_is_no_value(tmp_path):
    """It is what list columns hold for rows of text alone."""
    path = write(tmp_path / "a.jsonl", [{"pic": [], "words": "one"}, {"pic": [], "words": ""}])
    rows = rows_of(source(path, Columns("words", "pic")))
    assert [row.kind for row in rows] == ["text", "mixed"] and rows[0].parts == {"text": "one"}
    assert rows[1].error == "the row has no content: its cells are empty"
