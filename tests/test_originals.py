"""The files of hits: found below the corpus alone, compared with what was indexed, drawn as they were embedded."""

import os
import shutil
import time
from types import SimpleNamespace

import numpy as np
import pytest
from support import ROOT
from support.corpus import form, pdf, picture

from btok_hf.corpus import originals
from btok_hf.corpus.index import Hit
from btok_hf.corpus.rows import hash_contents

FILES = ROOT / "examples" / "files"


def index_of(folder, written=0.0):
    """What these functions read of an index."""
    return SimpleNamespace(settings={"root": str(folder)}, written=written)


def row(kind, name, content=None, page=None):
    hashed = content and hash_contents({kind: [content]})
    return Hit(name, 1.0, kind, name, page, None, None, {}, hashed)


def test_only_files_below_the_corpus_are_found(tmp_path):
    folder = tmp_path / "files"
    folder.mkdir()
    (tmp_path / "secret.png").write_bytes(b"x")
    (folder / "a.png").write_bytes(b"x")
    (folder / "link.png").symlink_to(tmp_path / "secret.png")
    os.mkfifo(folder / "pipe.png")
    index = index_of(folder)
    assert originals.find(index, row("image", "a.png")) == (folder / "a.png").resolve()
    names = (
        "link.png",
        "pipe.png",
        "gone.png",
        "../secret.png",
        str(tmp_path / "secret.png"),
        "https://a.b/c.png",
        None,
    )
    assert [originals.find(index, row("image", name)) for name in names] == [None] * len(names)


@pytest.mark.parametrize(
    "kind, name, other", [("image", "crab.png", "pizza.png"), ("video", "octopus.mp4", "butterfly.mp4")]
)
def test_a_picture_or_clip_with_another_content_is_noticed(tmp_path, kind, name, other):
    path = shutil.copy(FILES / name, tmp_path / "a")
    hit = row(kind, "a", (FILES / name).read_bytes())
    os.utime(path, (time.time() + 60,) * 2)  # a new time alone says nothing
    assert originals.change(index_of(tmp_path), hit, path) is None
    shutil.copy(FILES / other, path)
    os.utime(path, (0, 0))  # nor does an old one
    assert "changed since it was indexed" in originals.change(index_of(tmp_path), hit, path)


def test_a_page_is_compared_by_the_time_of_its_file(tmp_path):
    path = tmp_path / "a.pdf"
    path.write_bytes(pdf("a"))
    for kind in ("page", "mixed"):
        assert originals.change(index_of(tmp_path, time.time() + 60), row(kind, "a.pdf"), path) is None
        assert "modified after the database last changed" in originals.change(
            index_of(tmp_path, time.time() - 60), row(kind, "a.pdf"), path
        )
    assert originals.change(index_of(tmp_path), row("text", "a.txt"), path) is None  # its text is in the database


def test_a_page_in_large_is_the_page_that_was_embedded(tmp_path):
    for value in ("JOHN SMITH", ""):
        (tmp_path / f"form {value}.pdf").write_bytes(form(value))
    filled, empty = (
        (np.asarray(originals.as_picture(tmp_path / f"form {v}.pdf", 1)) < 128).sum() for v in ("JOHN SMITH", "")
    )
    assert filled > empty + 500
    first, second = picture(0), picture(1)
    first.save(tmp_path / "scan.TIF", save_all=True, append_images=[second])
    np.testing.assert_array_equal(np.asarray(originals.as_picture(tmp_path / "scan.TIF", 2)), np.asarray(second))


@pytest.mark.parametrize(
    "name, content, says",
    [
        ("a.pdf", b"no pdf", "'a.pdf' cannot be read"),
        ("a.pdf", pdf("a"), "'a.pdf' has no page 2 any more, but 1"),
        ("a.tif", b"no picture", "not an image"),
    ],
)
def test_what_cannot_be_drawn_is_said(tmp_path, name, content, says):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=says):
        originals.as_picture(tmp_path / name, 2)
