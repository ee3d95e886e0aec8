"""A corpus as a database: building, bringing up to date, searching."""

import datetime
import threading
import time
from decimal import Decimal

import numpy as np
import pyarrow as pa
import pytest
from lancedb.index import IvfRq
from support import forks
from support.units import random_vectors, rows_of, write_units
from transformers import Qwen2VLConfig

from btok_hf.corpus import index as module
from btok_hf.corpus.database import FRESH
from btok_hf.corpus.index import Index

VECTORS = random_vectors(300)
LABELS = [f"l{number % 3}" for number in range(300)]
TEXTS = [f"word{number} and tiger" for number in range(300)]


def rows(numbers=range(300), text=TEXTS):
    every = rows_of(VECTORS, text=text, label=LABELS)
    return [every[number] for number in numbers]


def write(tmp_path, given, **options):
    return write_units(tmp_path / "out", given, metadata={"label": pa.string()}, **options)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Tests must not change it."""
    folder = tmp_path_factory.mktemp("built")
    return Index.build(write(folder, rows()), folder / "db")[0]


def nearest(query, k=10, keep=lambda number: True):
    order = np.argsort(-(VECTORS @ query), kind="stable")
    return [f"a{number}" for number in order if keep(number)][:k]


# ---------------------------------------------------------------- search


def test_hits_are_the_nearest_rows_with_their_columns(built):
    hits = built.search(VECTORS[7], k=5)
    assert [hit.id for hit in hits] == nearest(VECTORS[7], 5)
    assert np.allclose([hit.score for hit in hits], np.sort(VECTORS @ VECTORS[7])[::-1][:5], atol=1e-6)
    first = hits[0]
    assert (first.kind, first.text, first.source, first.page, first.thumbnail) == ("text", TEXTS[7], None, None, None)
    assert first.metadata == {"label": "l1"} and first.content_hash == "hash 7"
    assert built.settings["model"] == "org/btok-2b" and built.exact and built.lossless and built.count() == 300


def test_a_filter_holds_for_every_hit(built):
    hits = built.search(VECTORS[7], k=20, where="label = 'l2' AND id != 'a8'")
    assert [hit.id for hit in hits] == nearest(VECTORS[7], 20, lambda number: number % 3 == 2 and number != 8)
    assert len(built.search(VECTORS[7], where="label = 'l2' -- a comment")) == 10
    assert len(built.search(VECTORS[7], where="label = 'l2';")) == 10
    assert built.search(VECTORS[7], where="label = 'none'") == [] and built.count("label = 'l2'") == 100


@pytest.mark.parametrize(
    "where", ["labl = 'l2'", "label = ", "1", "", "label = (SELECT 1)", "label = 'l2'; id = 'a8'", "1=1) OR (1=1"]
)
def test_a_filter_that_is_none_is_named_with_the_columns(built, where):
    with pytest.raises(ValueError, match=r"^The filter .* columns id, kind, source, page, .* label") as error:
        built.search(VECTORS[7], where=where)
    assert repr(where) in str(error.value) and "\n" not in str(error.value)
    assert not any(internal in str(error.value) for internal in ("SELECT 1 FROM", ".rs:", "Valid fields"))


def test_words_alone_and_both_rankings_fused(built):
    (hit,) = built.search(None, "WORD12")
    assert hit.id == "a12" and hit.score > 0
    far = nearest(VECTORS[7], 300)[-1]
    assert far not in [hit.id for hit in built.search(VECTORS[7], k=3)]
    hits = {hit.id: hit.score for hit in built.search(VECTORS[7], f"word{far[1:]}", k=3)}
    assert len(hits) == 3 and {far, "a7"} <= set(hits)
    assert hits[far] == pytest.approx(VECTORS[int(far[1:])] @ VECTORS[7], abs=1e-6)  # cosines also here
    assert {hit.metadata["label"] for hit in built.search(VECTORS[7], "tiger", where="label = 'l1'")} == {"l1"}


def test_fused_hits_do_not_change_with_their_number(tmp_path):
    """A row in the middle of both rankings may be the best of both."""
    texts = [f"word{number % 40} " + "tiger " * (number % 7) for number in range(300)]
    index = Index.build(write(tmp_path, rows(text=texts)), tmp_path / "db")[0]
    for number in range(10):
        asked = VECTORS[number], f"word{number + 9} tiger"
        deep = [hit.id for hit in index.search(*asked, k=70)]
        for k in (1, 2, 3, 10, 24):
            assert [hit.id for hit in index.search(*asked, k=k)] == deep[:k]


def test_fused_hits_are_complete_while_another_process_moves_rows(tmp_path, monkeypatch):
    """Between ranking and reading, rows get other addresses."""
    index = Index.build(write(tmp_path, rows()), tmp_path / "db")[0]
    gone = index.search(VECTORS[7], "word12 tiger", k=5)[-1].id
    rank, other, runs = index._run, Index.open(index.path), []

    def rank_and_move(query, where, limit):
        found = rank(query, where, limit)
        runs.append(len(found))
        if len(runs) == 2:
            other.delete([gone])
            other._table.optimize()
            time.sleep(1.1)  # readers look for new rows once a second
        return found

    monkeypatch.setattr(index, "_run", rank_and_move)
    hits = index.search(VECTORS[7], "word12 tiger", k=5)
    assert len(runs) == 4  # ranked again
    assert len(hits) == 5 and gone not in [hit.id for hit in hits]
    assert hits == other.search(VECTORS[7], "word12 tiger", k=5)
    assert index.search(VECTORS[7], "tiger", where="label = 'none'") == []


@pytest.mark.parametrize(
    "text", ["\"' OR (", "* AND NOT", "'; DROP TABLE items; --", "猫" * 5000, "\x00", "<|btok_0|>"]
)
def test_any_words_may_be_searched_for(built, text):
    assert len(built.search(VECTORS[7], text, k=3)) == 3


def test_quoted_words_are_words(built):
    assert built.search(None, '"word12"')[0].id == "a12"
    assert len(built.search(VECTORS[7], '"tiger and"', k=3)) == 3


@pytest.fixture
def trained_for_8(tmp_path):
    """The configuration of a model that was trained for vectors of 8 numbers too."""
    folder = tmp_path / "trained"
    Qwen2VLConfig(matryoshka_dimensions=[8, 16]).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("options", [{}, {"dimensions": 8}, {"precision": "binary"}])
def test_a_row_by_its_id_has_a_vector_that_finds_it(tmp_path, trained_for_8, options):
    given = [*rows(range(20)), *rows_of(random_vectors(1, seed=5), text=["it's"], label=["l0"])]
    given[-1]["id"] = "it's"
    index = Index.build(write(tmp_path, given, model=trained_for_8), tmp_path / "db", **options)[0]
    for name in ("a7", "it's"):
        row, vector = index.get(name)
        assert (row.id, row.score) == (name, 1) and row.text and vector.shape == (16,)
        assert index.search(vector, k=1)[0].id == name
    assert index.columns == ["id", "kind", "source", "page", "text", "label"]
    for name in ("none", "x' OR '1'='1"):
        with pytest.raises(ValueError, match="There is no item"):
            index.get(name)


def test_what_cannot_be_searched_for(built):
    for text in (None, "", " \n"):
        with pytest.raises(ValueError, match="query is empty"):
            built.search(None, text)
    for k in (0, 10**12):
        with pytest.raises(ValueError, match=f"must be 1 to 1,000,000,000, got {k}"):
            built.search(VECTORS[7], k=k)
    assert len(built.search(VECTORS[7], k=10**9)) == len(built.search(VECTORS[7], k=1000))
    with pytest.raises(ValueError, match=r"16 dimensions, got shape \(8,\)\. Embed it with org/btok-2b"):
        built.search(VECTORS[7][:8])
    with pytest.raises(ValueError, match="points nowhere"):
        built.search(np.full(16, np.nan))


def test_texts_of_all_scripts_are_found_by_their_words(tmp_path):
    given = rows_of(VECTORS[:3], text=["猫の顔です", "Gesicht eines Tigers", "лицо кошки"], label=LABELS[:3])
    index = Index.build(write(tmp_path, given), tmp_path / "db")[0]
    assert [[hit.id for hit in index.search(None, word)] for word in ("猫", "gesicht", "КОШКИ")] == [
        ["a0"],
        ["a1"],
        ["a2"],
    ]


@pytest.mark.parametrize(("precision", "least"), [("float16", 0.99), ("binary", 0.5)])
def test_other_precisions_find_nearly_the_same(tmp_path, precision, least):
    index = Index.build(write(tmp_path, rows()), tmp_path / "db", precision=precision)[0]
    assert not index.lossless and index.settings["precision"] == precision
    found = [[hit.id for hit in index.search(vector)] for vector in VECTORS[:50]]
    assert np.mean([len({*ids} & {*nearest(vector)}) / 10 for ids, vector in zip(found, VECTORS)]) > least
    assert [hit.id for hit in index.search(VECTORS[7], "word7", k=1)] == ["a7"]
    reopened = Index.open(tmp_path / "db")
    assert [hit.id for hit in reopened.search(VECTORS[3])] == found[3]


def test_fewer_dimensions(tmp_path, trained_for_8):
    with pytest.raises(OSError, match="org/btok-2b"):  # it cannot be asked what it was trained for
        Index.build(write(tmp_path / "a", rows()), tmp_path / "db", dimensions=8)
    out = write(tmp_path / "b", rows(), model=trained_for_8)
    with pytest.raises(ValueError, match="was trained for, 8 or 16, got 4"):
        Index.build(out, tmp_path / "db", dimensions=4)
    assert not (tmp_path / "db").exists()
    index = Index.build(out, tmp_path / "db", dimensions=8)[0]
    short = VECTORS[:, :8] / np.linalg.norm(VECTORS[:, :8], axis=1, keepdims=True)
    hits = index.search(VECTORS[7])
    assert [hit.id for hit in hits] == [f"a{number}" for number in np.argsort(-(short @ short[7]))[:10]]
    assert index.settings["dimensions"] == 8 and index.settings["embedding_dimensions"] == 16 and not index.lossless


@pytest.mark.parametrize("precision", ["float32", "float16", "binary"])
def test_large_tables_have_an_index_that_finds_the_same(tmp_path, monkeypatch, precision):
    out, path = write(tmp_path, rows()), tmp_path / "db"
    index = Index.build(out, path, precision=precision)[0]
    assert index.exact
    before = [[hit.id for hit in index.search(vector)] for vector in VECTORS[:30]]
    monkeypatch.setattr(module, "EXACT_NUMBERS", 100)
    index = Index.build(out, path)[0]
    assert not index.exact and not index.lossless
    for exact in (True, False):
        after = [[hit.id for hit in index.search(vector, exact=exact)] for vector in VECTORS[:30]]
        same = np.mean([len({*one} & {*other}) / 10 for one, other in zip(before, after)])
        assert same == 1 if exact else same > 0.97
    assert len(index.search(VECTORS[7], "tiger", k=5, where="label = 'l1'")) == 5


def test_a_rare_condition_finds_as_many_as_there_are(tmp_path, monkeypatch):
    """Also rows far from the query, in parts of the index that would not be searched."""
    monkeypatch.setattr(module, "EXACT_NUMBERS", 100)
    monkeypatch.setattr(module, "PROBES", 1)
    monkeypatch.setattr(module, "REFINE", 1)
    index = Index.build(write(tmp_path, rows()), tmp_path / "db")[0]
    index._table.create_index("vector", config=IvfRq(distance_type="cosine", num_bits=1, num_partitions=30))
    rare = [10, 80, 150, 299]
    where = f"id IN ({', '.join(repr(f'a{number}') for number in rare)})"
    assert not index.exact
    for vector in VECTORS[:10]:
        assert {hit.id for hit in index.search(vector, where=where)} == {f"a{number}" for number in rare}
        assert len(index.search(vector, "tiger", k=4, where=where)) == 4
    found, exact = (
        [[hit.id for hit in index.search(vector, k=4, exact=exact)] for vector in VECTORS[:10]]
        for exact in (False, True)
    )
    assert found != exact == [nearest(vector, 4) for vector in VECTORS[:10]]  # without it of the nearest part alone


# ---------------------------------------------------------------- bringing up to date


def test_a_database_knows_when_it_was_written(tmp_path):
    before = time.time()
    index = Index.build(write(tmp_path, rows(range(20))), tmp_path / "db")[0]
    between = time.time()
    assert before - 1 < index.written < between + 1
    time.sleep(1)
    Index.build(write(tmp_path, rows(range(30))), tmp_path / "db")
    assert Index.open(tmp_path / "db").written > between


def state(index):
    return {row["id"]: row["text"] for row in index._table.to_arrow().select(["id", "text"]).to_pylist()}


def test_a_second_run_writes_what_changed(tmp_path):
    path = tmp_path / "db"
    index, changes, sample = Index.build(write(tmp_path, rows(range(200))), path)
    assert (changes.added, changes.replaced, changes.deleted) == (200, 0, 0) and sample.shape == (100, 16)
    _, changes, _ = Index.build(tmp_path / "out", path)
    assert (changes.added, changes.replaced, changes.deleted) == (0, 0, 0)
    texts = [*TEXTS[:100], *("new " + text for text in TEXTS[100:])]
    out = write(tmp_path, rows(range(90, 300), texts))
    again, changes, _ = Index.build(out, path)
    assert (changes.added, changes.replaced, changes.deleted) == (100, 100, 90)
    expected = {f"a{number}": texts[number] for number in range(90, 300)}
    assert state(again) == expected and state(index) == expected
    assert [hit.id for hit in again.search(None, "word250")] == ["a250"]  # the index of words has new rows
    assert again.search(None, "word20") == []


def test_nothing_is_deleted_while_units_are_missing(tmp_path):
    path = tmp_path / "db"
    Index.build(write(tmp_path, rows(range(200))), path)
    index, changes, _ = Index.build(write(tmp_path, rows(range(100, 201)), planned=2), path)
    assert (changes.added, changes.deleted, changes.missing, index.count()) == (1, 0, 2, 201)


def test_new_rows_of_a_large_table_enter_its_index(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "EXACT_NUMBERS", 100)
    path = tmp_path / "db"
    Index.build(write(tmp_path, rows(range(280))), path)
    index, changes, _ = Index.build(write(tmp_path, rows()), path)
    assert changes.added == 20
    for name in ("vector_idx", "text_idx"):
        assert index._table.index_stats(name).num_unindexed_rows == 0
    assert [hit.id for hit in index.search(VECTORS[299], k=1)] == ["a299"]


@pytest.mark.parametrize(
    "change", [{"revision": "def"}, {"prompt": "Find."}, {"dtype": "bfloat16"}, {"input": "/other"}]
)
def test_units_of_another_model_are_refused(tmp_path, change):
    index, _, _ = Index.build(write(tmp_path, rows(range(20))), tmp_path / "db")
    other = write(tmp_path / "other", rows(range(20, 40)), **change)
    (key,) = change
    with pytest.raises(ValueError, match=f"made from other units: {key} .*Write another database"):
        Index.build(other, tmp_path / "db")
    assert index.count() == 20
    # The name of the model says nothing: its folder may have moved.
    assert Index.build(write(tmp_path / "moved", rows(range(20)), model="elsewhere"), tmp_path / "db")[1].added == 0


def test_a_database_keeps_its_form(tmp_path):
    out = write(tmp_path, rows(range(20)))
    Index.build(out, tmp_path / "db")
    for given in ({"precision": "binary"}, {"dimensions": 8}):
        with pytest.raises(ValueError, match="write another database"):
            Index.build(out, tmp_path / "db", **given)
    other = write_units(tmp_path / "other", rows_of(VECTORS[:20]))
    with pytest.raises(ValueError, match="has other columns than the units: label"):
        Index.build(other, tmp_path / "db")


def test_a_run_that_fails_leaves_what_was_there(tmp_path):
    path, good, bad = tmp_path / "db", rows(range(20)), rows([*range(30), 3])
    for _ in range(2):
        with pytest.raises(ValueError, match="1 rows have the id of another row"):
            Index.build(write(tmp_path / "bad", bad), path)
        assert not path.exists()
    Index.build(write(tmp_path / "good", good), path)
    with pytest.raises(ValueError, match="1 rows have the id of another row"):
        Index.build(write(tmp_path / "bad", bad), path)
    assert sorted(state(Index.open(path))) == sorted(row["id"] for row in good)


def test_after_a_kill_the_next_run_goes_on(tmp_path):
    """The process writes chunks of a batch of 100 rows, and kills itself in the third."""
    path = tmp_path / "db"
    Index.build(write(tmp_path, rows(range(100))), path)
    code = (
        "import os, signal, sys\n"
        "from btok_hf.corpus import stream\n"
        "from btok_hf.corpus.index import Index\n"
        "keep, calls, stream.CHUNK_BYTES = stream.RowStream._stored, [], 1\n"
        "def stored(*given):\n"
        "    calls.append(1)\n"
        "    return os.kill(os.getpid(), signal.SIGKILL) if len(calls) > 2 else keep(*given)\n"
        "stream.RowStream._stored = stored\n"
        "Index.build(sys.argv[1], sys.argv[2])\n"
    )
    new = [f"new {text}" for text in TEXTS]
    out = write(tmp_path, rows(range(50, 300), new))
    assert forks.run("-c", code, out, path).returncode == -9
    between = state(Index.open(path))
    assert between == {f"a{number}": new[number] if number >= 50 else TEXTS[number] for number in range(250)}
    index, changes, _ = Index.build(out, path)
    assert (changes.added, changes.replaced, changes.deleted) == (50, 0, 50)
    assert state(index) == {f"a{number}": new[number] for number in range(50, 300)}


def test_an_index_is_trained_again_after_a_run_that_was_killed_before(tmp_path, monkeypatch):
    path, update = tmp_path / "db", module.Index._update_indexes
    monkeypatch.setattr(module, "EXACT_NUMBERS", 1)
    table = type(Index.build(write(tmp_path, rows(range(100))), path)[0]._table)
    create, trained = table.create_index, []
    monkeypatch.setattr(table, "create_index", lambda *args, **kw: trained.append(args[1]) or create(*args, **kw))
    for count, expected in ((250, ["vector"]), (300, [])):  # more than half of the table, and less
        monkeypatch.setattr(module.Index, "_update_indexes", lambda index, rebuild: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            Index.build(write(tmp_path, rows(range(count))), path)
        monkeypatch.setattr(module.Index, "_update_indexes", update)
        trained.clear()
        assert Index.build(tmp_path / "out", path)[0].count() == count and trained == expected


def test_rows_of_a_run_beside_it_are_not_deleted(tmp_path, monkeypatch):
    """The other run ends before this one may write."""
    path, lock = tmp_path / "db", module.lock
    Index.build(write(tmp_path, rows(range(100))), path)

    def after_another_run(given):
        monkeypatch.setattr(module, "lock", lock)
        assert Index.build(write(tmp_path, rows(range(150))), path)[1].added == 50
        return lock(given)

    monkeypatch.setattr(module, "lock", after_another_run)
    index, changes, _ = Index.build(tmp_path / "out", path)
    assert index.count() == 150 and changes.deleted == 0


def test_units_that_are_written_meanwhile_are_not_deleted(tmp_path, monkeypatch):
    """Ids and missing units are read at one time: rows of a unit that comes later must stay."""
    path = tmp_path / "db"
    Index.build(write(tmp_path, rows(range(200))), path)
    write(tmp_path, rows(range(100)), planned=1)
    read = module.wanted_ids

    def then_written(out):
        found = read(out)
        write(tmp_path, rows(range(200)))
        return found

    monkeypatch.setattr(module, "wanted_ids", then_written)
    index, changes, _ = Index.build(tmp_path / "out", path)
    assert index.count() == 200 and (changes.missing, changes.deleted) == (1, 0)


def test_columns_of_many_types(tmp_path):
    types = {
        "a map": pa.map_(pa.string(), pa.int64()),
        "it's": pa.struct([("a", pa.int32()), ("b", pa.list_(pa.string()))]),
        "when": pa.timestamp("us", "UTC"),
        "much": pa.decimal128(30, 2),
        "long": pa.large_string(),
        "few": pa.uint8(),
    }
    day = datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC)
    values = [[("k", 1)], {"a": 1, "b": ["x"]}, day, Decimal("1.50"), "x", 7]
    given = rows_of(VECTORS[:2], **{name: [value, None] for name, value in zip(types, values)})
    out = write_units(tmp_path / "out", given, metadata=types)
    for added in (2, 0):  # the second run finds its own columns again
        index, changes, _ = Index.build(out, tmp_path / "db")
        assert (changes.added, changes.replaced) == (added, 0)
    assert list(index.search(VECTORS[0], k=1)[0].metadata.values()) == values
    assert len(index.search(VECTORS[0], where="`it's` IS NOT NULL AND few > 6")) == 1


def test_rows_that_fail_later_are_deleted(tmp_path):
    given = rows(range(10))
    Index.build(write(tmp_path, given), tmp_path / "db")
    given[3] |= {"embedding": None, "error": "cannot be read"}
    index, changes, _ = Index.build(write(tmp_path, given), tmp_path / "db")
    assert (changes.failed, changes.deleted, index.count()) == (1, 1, 9) and "a3" not in state(index)


def test_a_reader_sees_new_rows_and_loses_none(tmp_path):
    path = tmp_path / "db"
    Index.build(write(tmp_path, rows(range(100))), path)
    reader, counts, ended = Index.open(path), [], threading.Event()

    def read():
        while not ended.is_set():
            counts.append(reader.count())
            assert [hit.id for hit in reader.search(VECTORS[7], k=1)] == ["a7"]

    thread = threading.Thread(target=read)
    thread.start()
    for end in (200, 300):
        Index.build(write(tmp_path, rows(range(end))), path)
        time.sleep(FRESH.total_seconds() + 0.2)
    ended.set()
    thread.join()
    assert {100, 200, 300} <= set(counts) and counts == sorted(counts)


def test_delete(tmp_path):
    vectors = random_vectors(4)
    given = [row | {"id": name} for row, name in zip(rows_of(vectors), ["a", "it's", "'; --", 'b"c'])]
    index = Index.build(write_units(tmp_path / "out", given), tmp_path / "db")[0]
    assert index.delete(["it's", "'; --", "nothing", "' OR '1'='1"]) == 2
    assert sorted(state(index)) == ["a", 'b"c'] and index.delete([]) == 0
    assert Index.build(tmp_path / "out", tmp_path / "db")[1].added == 2  # the units still have them


def test_many_ids_are_deleted_in_several_statements(tmp_path):
    index = Index.build(write(tmp_path, rows(range(20))), tmp_path / "db")[0]
    assert index.delete([*(f"x{number}" for number in range(999)), "a7", "a8"]) == 2 and index.count() == 18


def test_an_index_is_trained_again_if_asked(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "EXACT_NUMBERS", 100)
    out, path = write(tmp_path, rows()), tmp_path / "db"

    def files(**options):
        index = Index.build(out, path, **options)[0]
        assert not index.exact
        return {folder.name for folder in (path / "items.lance" / "_indices").iterdir()}

    first = files()
    assert files() == first
    assert files(rebuild=True) - first


def test_rows_are_looked_up_by_an_index_of_ids(tmp_path):
    """Without it, a look-up reads all ids. Databases that were written without it get one."""
    out, path = write(tmp_path, rows(range(20))), tmp_path / "db"

    def plan(index):
        return index._table.search().where("id = 'a7'").limit(1).explain_plan()

    index = Index.build(out, path)[0]
    assert "ScalarIndexQuery" in plan(index) and index.get("a7")[0].id == "a7"
    index._table.drop_index("id_idx")
    assert "ScalarIndexQuery" not in plan(Index.open(path))
    index = Index.build(write(tmp_path, rows(range(5, 30))), path)[0]
    assert "ScalarIndexQuery" in plan(index) and [index.get(key)[0].id for key in ("a7", "a29")] == ["a7", "a29"]
