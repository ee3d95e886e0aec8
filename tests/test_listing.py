"""What there is to embed: files in order, what is left out, units that stay the same when others change."""

import os

import fsspec
import pytest
from support.corpus import pdf, read, write_files
from support.hub_server import Repository, blob_oid

from btok_hf.corpus import listing
from btok_hf.corpus.listing import FolderSource, Input, Unit, skipped_in_words
from btok_hf.corpus.units import read_units


def paths(given):
    return [file.path for file in given.files()]


def test_files_in_order_and_what_is_left_out(tmp_path):
    folder = write_files(tmp_path / "in", texts=2, pictures=1)
    (folder / ".hidden.txt").write_text("x")
    (folder / ".git").mkdir()
    (folder / ".git" / "a.txt").write_text("x")
    (folder / "link.txt").symlink_to(folder / "texts" / "0.txt")
    (folder / "loop").symlink_to(folder)
    (folder / "broken.txt").symlink_to(folder / "nothing")
    (folder / "data.xyz").write_text("x")
    given = Input(str(folder))
    expected = ["data.xyz", "link.txt", "pictures/deep/0.png", "texts/0.txt", "texts/1.txt"]
    assert paths(given) == expected == paths(given)
    assert given.skipped == {"hidden": 2, "links to folders": 1, "broken links or special files": 1}
    assert given.address == given.root == str(folder)
    (unit,) = FolderSource(given, 100).plan("settings")
    assert list(unit.files) == expected[1:] and unit.rows == 4
    assert given.skipped["of a type that is not embedded (.xyz)"] == 1
    assert "2 hidden" in skipped_in_words(given.skipped)
    with given.file("link.txt").open() as file:
        assert file.read() == b"text 0"


def test_what_was_written_into_the_input_is_no_input(tmp_path):
    folder, written = tmp_path / "in", ("corpus.json", "plan.json", "units/a.parquet", "errors/a.json", "scans/a.json")
    for out in (folder, folder / "out"):
        for name in (*written, "own.json", "corpus.jsonl", "units.md"):
            (out / name).parent.mkdir(parents=True, exist_ok=True)
            (out / name).write_text("{}")
    every = set(paths(Input(str(folder), str(tmp_path / "elsewhere"))))
    assert len(every) == 16
    for out in ("", "out/"):
        given = Input(str(folder), str(folder / out))
        assert every - set(paths(given)) == {out + name for name in written}
        assert given.skipped == {"that btok embed wrote": 5}
    assert paths(Input(str(folder / "**" / "*.parquet"), str(folder / "out"))) == ["units/a.parquet"]
    # OUT by a link, and another corpus, which is known by its settings.
    (tmp_path / "link").symlink_to(folder)
    assert paths(Input(str(tmp_path / "link" / "**" / "*.parquet"), str(folder / "out"))) == ["units/a.parquet"]
    (folder / "out" / "corpus.json").write_text('{"format": 1, "revision": "a", "unit_rows": 5}')
    for pattern in ("", "**"):
        given = Input(str(folder / pattern), str(tmp_path / "elsewhere"))
        assert every - set(paths(given)) == {"out/" + name for name in written}
    for named in ("units", "units/a.parquet"):  # on purpose
        assert paths(Input(str(folder / "out" / named), str(tmp_path / "elsewhere"))) == ["a.parquet"]


def test_patterns_leave_hidden_files_out(tmp_path):
    for name in ("a.txt", "._a.txt", ".git/b.txt", "deep/.c/d.txt", "deep/e.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    given = Input(str(tmp_path / "**" / "*.txt"))
    assert paths(given) == ["a.txt", "deep/e.txt"] and given.skipped == {"hidden": 3}
    assert paths(Input(str(tmp_path / "._*.txt"))) == ["._a.txt"]  # asked for


def test_a_changed_target_of_a_link_is_noticed(tmp_path):
    (tmp_path / "target").write_text("a")
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "link.txt").symlink_to(tmp_path / "target")
    (before,) = Input(str(tmp_path / "in")).files()
    (tmp_path / "target").write_text("ab")
    (after,) = Input(str(tmp_path / "in")).files()
    assert before != after
    os.utime(tmp_path / "target", (1, 1))  # of the same size
    assert list(Input(str(tmp_path / "in")).files()) != [after]


def test_forms_of_an_input(tmp_path, monkeypatch):
    folder = write_files(tmp_path / "in", texts=12, pictures=1)
    single = Input(str(folder / "texts" / "1.txt"))
    assert (paths(single), single.root) == (["1.txt"], str(folder / "texts"))
    pattern = Input(str(folder / "texts" / "1*.txt"))
    assert paths(pattern) == ["1.txt", "10.txt", "11.txt"] and pattern.root == str(folder / "texts")
    nested = Input(str(folder / "**" / "*.png"))
    assert paths(nested) == ["pictures/deep/0.png"] and nested.root == str(folder)
    monkeypatch.chdir(tmp_path)
    assert Input("in").address == str(folder) and Input("in/").root == str(folder)
    odd = folder / "a[1].txt"
    odd.write_text("x")
    assert paths(Input(str(odd))) == ["a[1].txt"]
    with pytest.raises(FileNotFoundError, match="There is no input 'nothing'"):
        Input("nothing")
    with pytest.raises(FileNotFoundError, match="There is no input 'no/thing'"):  # as it was given
        Input("no/thing")


def test_object_storage(tmp_path):
    fs = fsspec.filesystem("memory")
    fs.pipe_file("/bucket/b.txt", b"b")
    fs.pipe_file("/bucket/deep/a.txt", b"a")
    try:
        given = Input("memory://bucket")
        assert paths(given) == ["b.txt", "deep/a.txt"] and given.root == "memory:///bucket"
        with given.file("deep/a.txt").open() as file:
            assert file.read() == b"a"
        before = list(given.files())
        fs.pipe_file("/bucket/b.txt", b"c")  # of the same size
        assert [old == new for old, new in zip(before, given.files())] == [False, True]
    finally:
        fs.rm("/bucket", recursive=True)


def test_a_dataset_on_the_hub(hub, repo, tmp_path):
    """By its id. What says whether a file has changed is its hash, not the commit."""
    rows = "".join(f'{{"words": "text {index}"}}\n' for index in range(5)).encode()
    contents = {"README.md": b"# A dataset", "data/a.jsonl": rows, "data/b.csv": b"words\nlast"}
    hub.repositories["org/texts"] = dataset = Repository("org/texts", private=True)
    dataset.commit("main", {path: (content, False) for path, content in contents.items()}, "first")
    code = (
        "import sys; from btok_hf.cli import main; from btok_hf.corpus.listing import Input\n"
        "main(sys.argv[1:]); print([tuple(file) for file in Input('org/texts').files()])\n"
    )
    flags = ("--model", repo, "--text", "words", "--device", "cpu")
    printed = hub.run("-c", code, "embed", "org/texts", tmp_path / "out", *flags, home=tmp_path / "home").stdout
    assert "2 units, 0 of them written; 6 rows" in printed and "left out: 1 that are no tables" in printed
    assert list(read(tmp_path / "out")) == [*(f"data/a.jsonl#row={index}" for index in range(5)), "data/b.csv#row=0"]
    assert read_units(str(tmp_path / "out"))[0]["input"] == "hf://datasets/org/texts"
    states = [(path, len(content), f"{len(content)} {blob_oid(content)}") for path, content in contents.items()]
    assert printed.splitlines()[-1] == str(states)


def test_hashes_are_preferred_to_times_and_neither_is_refused(monkeypatch):
    fs = fsspec.filesystem("memory")
    fs.pipe_file("/bucket/b.txt", b"b")
    given = Input("memory://bucket")
    entry = {"name": "/bucket/b.txt", "type": "file", "size": 1}
    try:
        monkeypatch.setattr(given.fs, "ls", lambda *_, **__: [entry | {"created": 1.0, "ETag": '"e"'}])
        assert [file.state for file in given.files()] == ['1 "e"']
        monkeypatch.setattr(given.fs, "ls", lambda *_, **__: [entry])
        with pytest.raises(ValueError, match="neither a hash nor a time"):
            list(given.files())
    finally:
        monkeypatch.undo()
        fs.rm("/bucket", recursive=True)


def test_units_are_bounded_and_most_stay_when_files_come_and_go(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    for index in range(300):
        (folder / f"{index:03d}.txt").write_text(str(index))

    def plan(settings="s"):
        return FolderSource(Input(str(folder)), 10).plan(settings)

    before = plan()
    assert sum(unit.rows for unit in before) == 300 and max(unit.rows for unit in before) == 10
    assert [path for unit in before for path in unit.files] == sorted(os.listdir(folder))
    assert before == plan() and not {unit.name for unit in before} & {unit.name for unit in plan("other")}
    (folder / "0000.txt").write_text("new")  # in front of all but one
    after = plan()
    assert len({unit.name for unit in before} - {unit.name for unit in after}) <= 3
    (folder / "150.txt").write_text("changed")
    assert len({unit.name for unit in after} - {unit.name for unit in plan()}) == 1
    os.utime(folder / "150.txt", (1, 1))  # the same content at another time
    assert len({unit.name for unit in after} - {unit.name for unit in plan()}) == 1


def test_a_large_pdf_counts_as_many_rows(tmp_path, monkeypatch):
    folder = write_files(tmp_path / "in", texts=6, pictures=0)
    (folder / "a.pdf").write_bytes(pdf("text"))
    assert len(FolderSource(Input(str(folder)), 100).plan("s")) == 1
    monkeypatch.setattr(listing, "PAGE_BYTES", 2)
    assert FolderSource(Input(str(folder)), 100).plan("s")[0].files == ("a.pdf",)


def test_rows_name_their_files_and_read_nothing(tmp_path):
    folder = write_files(tmp_path / "in", texts=1, pictures=1)
    (folder / "a.PDF").write_bytes(b"")
    source = FolderSource(Input(str(folder)), 100)
    (unit,) = source.plan("s")
    rows = list(source.rows(unit))
    assert [(row.id, row.kind, list(row.parts)) for row in rows] == [
        ("a.PDF", "page", ["pdf"]),
        ("pictures/deep/0.png", "image", ["image"]),
        ("texts/0.txt", "text", ["text"]),
    ]
    (gone,) = source.rows(Unit("n", 1, ("gone.png",)))
    assert gone.parts["image"].path == str(folder / "gone.png")


def test_nothing_to_embed_is_an_error_that_says_why(tmp_path):
    (tmp_path / "rows.parquet").write_bytes(b"")
    with pytest.raises(ValueError, match=r"1 of a type that is not embedded \(.parquet\).*--text"):
        FolderSource(Input(str(tmp_path)), 100).plan("s")
    (tmp_path / "rows.parquet").unlink()
    with pytest.raises(ValueError, match="it is empty"):
        FolderSource(Input(str(tmp_path)), 100).plan("s")


@pytest.mark.parametrize("name, package, extra", [("a.mp4", "av", "video"), ("a.pdf", "pypdfium2", "corpus")])
def test_a_missing_package_is_named_before_work(tmp_path, monkeypatch, name, package, extra):
    (tmp_path / name).write_bytes(b"x")
    monkeypatch.setattr("importlib.util.find_spec", lambda wanted: None if wanted == package else wanted)
    with pytest.raises(ImportError, match=rf"need the package {package}: pip install 'btok-hf\[{extra}\]'"):
        FolderSource(Input(str(tmp_path)), 100).plan("s")
