"""The folder of a corpus: files written whole, settings, plan, reading."""

import json
import os
import signal
import time

import fsspec
import pyarrow as pa
import pytest
from support import forks
from support.corpus import embed, read, write_files

from btok_hf.corpus.units import UNIT_COLUMNS, Corpus, Store, locate, read_units, unit_schema


@pytest.fixture(params=["local", "memory"])
def place(request, tmp_path):
    if request.param == "local":
        yield str(tmp_path / "store")
    else:
        yield "memory://units"
        fsspec.filesystem("memory").rm("/units", recursive=True)


def test_schema():
    schema = unit_schema(128, {"year": pa.int64()})
    assert schema.names == [*UNIT_COLUMNS, "year"]
    assert schema.field("embedding").type == pa.list_(pa.float32(), 128)
    assert schema.field("page").type == pa.int32() and schema.field("thumbnail").type == pa.binary()


def test_store(place):
    store = Store(place)
    assert store.read("a/b.json") is None and not store.exists("a/b.json") and store.names("a", ".json") == set()
    store.write("a/b.json", b"1")
    store.write("a/b.json", b"2")
    store.write("a/c.txt", b"3")
    assert store.read("a/b.json") == b"2" and store.exists("a/b.json") and store.names("a", ".json") == {"b"}
    store.remove("a/b.json")
    store.remove("a/b.json")
    assert store.names("a", ".json") == set() and store.names("a", ".txt") == {"c"}


def test_a_kill_while_writing_leaves_the_old_file(tmp_path):
    code = (
        "import os, sys; from btok_hf.corpus.units import Store; store = Store(sys.argv[1])\n"
        "store.write('unit', b'old')\n"
        "os.fsync = lambda file: os.kill(os.getpid(), 9)\n"
        "store.write('unit', b'new')\n"
    )
    process = forks.run("-c", code, tmp_path / "out")
    assert process.returncode == -signal.SIGKILL
    store = Store(str(tmp_path / "out"))
    assert store.read("unit") == b"old" and len(os.listdir(tmp_path / "out")) == 2
    store.remove_drafts(".")
    assert len(os.listdir(tmp_path / "out")) == 2  # it may belong to a process that is writing
    (draft,) = (tmp_path / "out").glob(".*.tmp")
    os.utime(draft, (time.time() - 7200,) * 2)
    store.remove_drafts(".")
    assert os.listdir(tmp_path / "out") == ["unit"]


def test_what_cannot_be_written_is_named_and_leaves_no_draft(tmp_path, monkeypatch):
    def full(number):
        raise OSError(28, "No space left on device")

    store = Store(str(tmp_path / "out"))
    with monkeypatch.context() as patch:
        patch.setattr("btok_hf.corpus.units.os.fsync", full)
        with pytest.raises(OSError, match=r"out/a cannot be written \(No space left on device\)") as error:
            store.write("a", b"x")
    assert error.value.errno == 28 and os.listdir(tmp_path / "out") == []
    with pytest.raises(OSError, match=r"cannot be written \(Not a directory\)"):
        Store("/dev/null/out").write("a", b"x")


def test_claim_refuses_another_corpus(place):
    corpus = Corpus(place)
    assert corpus.settings() is None
    assert corpus.claim({"model": "typo", "revision": "1"})
    corpus.release()  # nothing was written
    assert corpus.claim({"model": "a", "revision": "1", "columns": ("x",)})
    corpus.write("a", b"table", {})
    corpus.release()
    assert not corpus.claim({"model": "a", "revision": "1", "columns": ["x"]})
    corpus.claim({"model": "moved", "revision": "1", "columns": ["x"]})
    assert corpus.settings() == {"model": "a", "revision": "1", "columns": ["x"]}
    for other, words in (
        ({"model": "a", "revision": "2", "columns": ["x"]}, "revision '1' there, '2' now"),
        ({"model": "a", "revision": "1"}, r"columns \['x'\] there, None now"),
        ({"model": "a", "revision": "1", "columns": ["x"], "prompt": "p"}, "prompt None there, 'p' now"),
    ):
        with pytest.raises(ValueError, match=f"other settings: {words}.*name another folder"):
            corpus.claim(other)


def test_plan_and_errors(place):
    corpus = Corpus(place)
    assert corpus.plan() == [] and corpus.written() == set()
    corpus.write("a", b"table", {"row": "reason"})
    corpus.write("b", b"table", {})
    corpus.set_plan(["b", "a", "c"])
    assert corpus.plan() == ["b", "a", "c"] and corpus.written() == {"a", "b"}
    assert corpus.failed(["a", "b"]) == {"a"} and corpus.errors(["a", "b"]) == {"row": "reason"}
    assert corpus.errors(["b"]) == {}
    corpus.write("d", b"table", {"row": "lost its connection"})
    corpus.store.remove("units/d.parquet")  # a process was killed before it wrote the unit
    corpus.write("d", b"table", {})
    assert corpus.failed(["d"]) == set() and corpus.errors(["d"]) == {}
    corpus.remove(["a", "d"])
    assert corpus.written() == {"b"} and corpus.errors(["a"]) == {} and not corpus.has("a") and corpus.has("b")


def test_read_units(tmp_path, repo):
    folder = write_files(tmp_path / "in", texts=6, pictures=0)
    embed(folder, tmp_path / "out", repo, unit_rows=2)
    settings, batches = read_units(str(tmp_path / "out"), columns=["id", "text"])
    assert settings["dimensions"] == 64 and settings["units_planned"] == settings["units_written"] > 1
    table = pa.Table.from_batches(batches)
    assert table.column_names == ["id", "text"]
    assert table["id"].to_pylist() == [f"texts/{index}.txt" for index in range(6)]
    # A unit that the plan does not name is not read, and one that is not there is missed.
    corpus = Corpus(str(tmp_path / "out"))
    corpus.set_plan([*corpus.plan()[1:], "missing"])
    settings, batches = read_units(str(tmp_path / "out"))
    assert settings["units_planned"] == settings["units_written"] + 1
    assert "texts/0.txt" not in pa.Table.from_batches(batches)["id"].to_pylist()


def test_read_units_refuses(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"holds no corpus.*btok embed INPUT .* --model MODEL"):
        read_units(str(tmp_path))
    (tmp_path / "corpus.json").write_text(json.dumps({"format": 2}))
    with pytest.raises(ValueError, match="format 2, and this release reads 1"):
        read_units(str(tmp_path))


def test_locate(tmp_path, repo):
    folder = write_files(tmp_path / "in", texts=1, pictures=1)
    embed(folder, tmp_path / "out", repo)
    settings, _ = read_units(str(tmp_path / "out"))
    source = read(tmp_path / "out")["pictures/deep/0.png"]["source"]
    assert locate(settings, source) == str(folder / source)
    assert locate(settings, "s3://bucket/a.png") == "s3://bucket/a.png" and locate(settings, "/a.png") == "/a.png"
