"""What the page answers, without the page: originals that changed or cannot be shown, growing databases, errors."""

import logging
import os
import re
import shutil
import time
from html import unescape
from pathlib import Path
from urllib.parse import unquote

import gradio as gr
import pytest
from PIL import Image
from support import ROOT
from support.corpus import embed, pdf

from btok_hf.corpus.answers import MAX_CONDITION, Answers, said
from btok_hf.corpus.database import FRESH
from btok_hf.corpus.index import Index
from btok_hf.corpus.search import Searcher

MODEL = ROOT / "benchmarks" / "unified" / "models" / "btok-small"
FILES = ROOT / "examples" / "files"
NAMES = ("tiger-face.png", "crab.png", "octopus.mp4", "butterfly.mp4", "energy.txt")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Files of every kind, embedded and indexed. Tests add others, and do not change these."""
    folder = tmp_path_factory.mktemp("answers")
    (folder / "files").mkdir()
    for name in NAMES:
        shutil.copy(FILES / name, folder / "files" / name)
    shutil.copy(FILES / "octopus.mp4", folder / "files" / "clip #1 100%41.mp4")
    (folder / "files" / "two.pdf").write_bytes(pdf("first page", "second page"))
    index(folder)
    return folder


def index(folder):
    embed(folder / "files", folder / "embedded", MODEL)
    Index.build(folder / "embedded", folder / "db")


def answers_of(folder):
    os.environ["GRADIO_TEMP_DIR"] = str(folder / "cache")
    try:
        with gr.Blocks():
            return Answers(Searcher(folder / "db", device="cpu"), gr.HTML())
    finally:
        del os.environ["GRADIO_TEMP_DIR"]


@pytest.fixture(scope="module")
def answers(folder):
    return answers_of(folder)


def shown(answers, name):
    """What the page shows of a hit in large, and its source."""
    chosen, panel, large, _ = answers.show(name)
    assert chosen == name and panel["visible"]
    source = re.search(r'src="gradio_api/file=([^"]*)"', large)
    return unescape(large), source and source[1]


def search(answers, text="", kinds=(), where="", words=False, k=24):
    return answers.search(text, None, None, list(kinds), where, words, k)


# ---------------------------------------------------------------- searches


def test_rows_that_come_later_are_counted_and_their_kinds_offered(tmp_path):
    (tmp_path / "files").mkdir()
    shutil.copy(FILES / "energy.txt", tmp_path / "files")
    index(tmp_path)
    answers = answers_of(tmp_path)
    assert answers.extent() == ("# Search 1 items", gr.update(choices=["text"]))
    assert "1 of 1 items" in search(answers, "a")[1]
    shutil.copy(FILES / "crab.png", tmp_path / "files")
    index(tmp_path)
    time.sleep(FRESH.total_seconds())
    assert answers.extent() == ("# Search 2 items", gr.update(choices=["text", "image"]))
    assert "2 of 2 items" in search(answers, "a")[1]


def test_the_order_by_words_is_explained(answers):
    assert "ordered by words and meaning" in search(answers, "energy", words=True)[1]
    assert "ordered by" not in search(answers, "energy")[1] + answers.more("crab.png", [], "", 3)[1]


def test_neighbours_close_the_hit_in_large(answers):
    hits, _, query, panel = answers.more("octopus.mp4", ["video"], "", 9)
    assert query == {"id": "octopus.mp4"} and hits.count("data-id") == 3 and not panel["visible"]


@pytest.mark.parametrize("where", ["kind IN ('image'", "kind = 'text') OR (kind = 'video'", "labl = 1", "page = 'x'"])
def test_errors_of_a_condition_quote_what_was_typed(answers, where):
    for ask in (search, lambda answers, text, *given: answers.more("crab.png", *given, 3)):
        with pytest.raises(ValueError) as error:
            ask(answers, "a", ["text"], where)
        assert f"The filter {where!r} cannot" in str(error.value)
        assert not any(internal in str(error.value) for internal in (".rs:", "SELECT", "kind IN ('text')"))


def test_a_condition_may_end_with_a_comment_or_a_semicolon(answers):
    assert search(answers, "a", ["video"], "id LIKE '%' -- all")[0].count("data-id") == 3
    assert search(answers, "a", [], "kind = 'video';")[0].count("data-id") == 3


def test_a_condition_is_bounded(answers):
    """One of 100,000 parts ended the process, from within LanceDB."""
    with pytest.raises(ValueError, match=f"at most {MAX_CONDITION:,} are allowed"):
        search(answers, "a", where=" AND ".join(["1=1"] * 100_000))


def test_a_condition_that_takes_all_memory_is_refused(answers):
    """The process was ended by it."""
    for ask in (search, lambda answers, text, *given: answers.more("crab.png", *given, 3)):
        with pytest.raises(ValueError, match="uses array_repeat before a bracket"):
            ask(answers, "a", [], "array_length(array_repeat(id, 100000000000)) > 0")


def test_a_picture_that_takes_long_to_decode_is_refused(answers, folder):
    path = folder / "cache" / "large.png"
    path.parent.mkdir(exist_ok=True)
    Image.new("1", (10_000, 5_001)).save(path)
    assert path.stat().st_size < 10_000
    with pytest.raises(ValueError, match=r"has 10,000 x 5,001 pixels; at most 50,000,000 are allowed\. Reduce it"):
        answers.search("", str(path), None, [], "", False, 3)


def test_a_clip_that_takes_long_to_decode_is_refused(answers, folder, monkeypatch):
    path = folder / "cache" / "large clip.png"  # FFmpeg reads a picture as a clip of one frame
    path.parent.mkdir(exist_ok=True)
    Image.new("1", (10_001, 10_000)).save(path)
    with pytest.raises(ValueError, match=r"large clip.*1 frames of 10001 x 10000 have more than 100000000 pixels"):
        answers.search("", None, str(path), [], "", False, 3)
    shutil.copy(FILES / "octopus.mp4", path)
    assert answers.search("", None, str(path), [], "", False, 3)[0].count("data-id") == 3
    monkeypatch.setattr("btok_hf.corpus.answers.MAX_CLIP_SECONDS", 0.0)
    with pytest.raises(ValueError, match="decoding it takes more than 0 seconds"):
        answers.search("", None, str(path), [], "", False, 3)


# ---------------------------------------------------------------- hits in large


def test_names_of_files_are_quoted_in_addresses(answers):
    html, source = shown(answers, "clip #1 100%41.mp4")
    assert "<video" in html and source.endswith("/clip%20%231%20100%2541.mp4") and unquote(source)[0] == "/"
    assert Path(unquote(source)).read_bytes() == (FILES / "octopus.mp4").read_bytes()


@pytest.mark.parametrize(
    "name, file, content, says",
    [
        ("two.pdf#page=2", "two.pdf", b"no pdf", "'two.pdf' cannot be read"),
        ("two.pdf#page=2", "two.pdf", pdf("first page"), "has no page 2 any more"),
        ("crab.png", "crab.png", b"x", "'crab.png' is not an image"),
    ],
)
def test_an_original_that_cannot_be_read_is_said_beside_the_columns(
    folder, answers, name, file, content, says, caplog
):
    path = folder / "files" / file
    held = path.read_bytes()
    path.write_bytes(content)
    try:
        html, source = shown(answers, name)
    finally:
        path.write_bytes(held)
    assert source is None and "The original cannot be shown: " in html and says in html and f"<dd>{name}</dd>" in html
    assert 'src="data:image/jpeg' in html and str(folder) not in html and str(folder) in caplog.text


def test_a_file_that_changed_is_called_so(folder, answers):
    path, other = folder / "files" / "crab.png", FILES / "pizza.png"
    html, source = shown(answers, "crab.png")
    assert source and "changed" not in html
    held = path.read_bytes()
    shutil.copy(other, path)
    try:
        html, source = shown(answers, "crab.png")
    finally:
        path.write_bytes(held)
    assert source and "changed since it was indexed, so this is not what was found" in html


def test_tokens_are_decoded_with_the_instructions_that_they_were_made_with(answers, monkeypatch):
    used, decode = [], answers.searcher.reconstruct
    monkeypatch.setattr(
        answers.searcher, "reconstruct", lambda item, prompt: used.append(prompt) or decode(item, prompt)
    )
    for name, text in (("query", "Q"), ("document", "D")):
        monkeypatch.setitem(answers.searcher.model.prompts, name, text)
    answers.why("crab.png", {"text": "a crab"})
    answers.why("crab.png", {"id": "energy.txt"})
    monkeypatch.setitem(answers.index.settings, "prompt", "of btok embed")
    answers.why("crab.png", {"text": "a crab"})
    answers.why("crab.png", {"id": "energy.txt"})
    assert used == ["Q", "D", "D", "D", "Q", "of btok embed", "of btok embed", "of btok embed"]


# ---------------------------------------------------------------- errors


def test_unexpected_errors_are_said_and_logged(caplog):
    @said
    def fails():
        raise RuntimeError("<secret>")

    with caplog.at_level(logging.ERROR), pytest.raises(gr.Error, match="failed here; the log") as error:
        fails()
    assert "<secret>" in caplog.text and "secret" not in str(error.value)


def test_errors_of_users_are_said_without_folders():
    @said
    def fails():
        raise ValueError("Image file '/home/me/<b>.png' is none")

    with pytest.raises(gr.Error, match=r"Image file '&lt;b&gt;\.png' is none"):
        fails()
