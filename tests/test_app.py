"""`btok app` in a process of its own: searches, hits in large, and hostile clients."""

import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from html import unescape

import httpx
import numpy as np
import pytest
from gradio_client import handle_file
from gradio_client.exceptions import AppError
from PIL import Image
from support import ROOT
from support.app import page
from support.corpus import form, picture

from btok_hf.corpus.app import as_picture, condition
from btok_hf.corpus.index import Index
from btok_hf.corpus.job import Options
from btok_hf.corpus.workers import run

MODEL = ROOT / "benchmarks" / "unified" / "models" / "btok-small"
FILES = ROOT / "examples" / "files"
HOSTILE = "<script>alert(1)</script> ${alert(1)} {{#if x}}"


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Files of every kind, embedded and indexed; then one is removed, and one leads out of the folder."""
    folder = tmp_path_factory.mktemp("corpus")
    shutil.copytree(FILES, folder / "files")
    pages = [Image.open(FILES / name).convert("RGB").resize((224, 196)) for name in ("crab.png", "tulip.png")]
    pages[0].save(folder / "files" / "pages.pdf", save_all=True, append_images=pages[1:])
    (folder / "files" / "hostile.txt").write_text(HOSTILE)
    (folder / "secret.png").write_bytes((FILES / "pizza.png").read_bytes())
    run(str(folder / "files"), str(folder / "embedded"), Options(str(MODEL), device="cpu"))
    Index.build(folder / "embedded", folder / "db")
    (folder / "files" / "turtle.png").unlink()
    (folder / "files" / "pizza.png").unlink()
    (folder / "files" / "pizza.png").symlink_to(folder / "secret.png")
    return folder


@pytest.fixture(scope="module")
def client(corpus):
    (corpus / "uploads").mkdir()
    command = ("-m", "btok_hf", "app", "--db", corpus / "db", "--device", "cpu", "--port", "PORT")
    with page(command, corpus / "uploads") as client:
        yield client


def search(client, text="", picture=None, clip=None, kinds=(), where="", words=False, k=24):
    """The ids of the hits and what the page shows of them."""
    files = (picture and handle_file(picture), clip and handle_file(clip))
    html, summary = client.predict(text, *files, list(kinds), where, words, k, api_name="/search")[:2]
    ids = [unescape(name) for name in re.findall(r'data-id="([^"]*)"', html)]
    assert f"{len(ids)} of " in summary
    return ids, html


def large(client, name):
    """What the page shows of a hit, and the file that it shows."""
    html = next(part for part in client.predict(name, api_name="/show") if "<dl>" in str(part))
    files = re.findall(r'src="(gradio_api/file=[^"]+)"', html)
    return html, httpx.get(f"{client.src.rstrip('/')}/{files[0]}") if files else None


# ---------------------------------------------------------------- searches


def test_text_finds_drawings_clips_and_texts(client):
    ids, html = search(client, "tiger face")
    assert ids[0] == "tiger-face.png" and len(ids) == 19 and 'alt="image tiger-face.png"' in html
    assert search(client, "octopus", kinds=["video"])[0][0] == "octopus.mp4"
    assert set(search(client, "tulip", kinds=["page"])[0]) == {"pages.pdf#page=1", "pages.pdf#page=2"}
    assert len(search(client, "tiger face", k=3)[0]) == 3


def test_conditions_and_words(client):
    assert search(client, "a", where="kind = 'video'")[0] == search(client, "a", kinds=["video"])[0]
    assert search(client, "a", kinds=["page"], where="page = 2")[0] == ["pages.pdf#page=2"]
    assert (
        search(client, "energy", where="kind = 'text' OR kind = 'page'", kinds=["text"], words=True)[0][0]
        == "energy.txt"
    )
    assert condition(["text", "page"], " page > 1 ") == "kind IN ('text', 'page') AND ( page > 1 )"
    assert condition([], " ") is None


def test_picture_and_clip_find_themselves(client):
    assert search(client, picture=FILES / "penguin.png")[0][0] == "penguin.png"
    assert search(client, clip=FILES / "octopus.mp4")[0][0] == "octopus.mp4"
    both = search(client, "hamburger", picture=FILES / "penguin.png")[0]
    assert {"hamburger.png", "penguin.png"} < set(both[:6])


def test_neighbours_of_a_hit(client):
    html, summary = client.predict("octopus.mp4", ["video"], "", 24, api_name="/more")[:2]
    assert re.findall(r'data-id="([^"]*)"', html) == ["octopus.mp4", "butterfly.mp4"] and "2 of 19" in summary
    assert ">▶ 1.000 video" in html


def test_what_the_tokens_hold(client):
    search(client, "tiger face")
    html = client.predict("tiger-face.png", api_name="/why")
    assert "A guess of the model" in html and re.search(r"<dt>query</dt><dd>.+</dd><dt>hit</dt><dd>.+</dd>", html)
    client.predict("octopus.mp4", [], "", 5, api_name="/more")
    assert "<dt>hit</dt>" in client.predict("energy.txt", api_name="/why")


# ---------------------------------------------------------------- a hit in large


def test_originals_are_shown(client, corpus):
    html, file = large(client, "octopus.mp4")
    assert "<video controls" in html and file.content == (FILES / "octopus.mp4").read_bytes()
    assert file.headers["content-type"] == "video/mp4"
    for name in ("pages.pdf#page=2", "tiger-face.png"):
        html, file = large(client, name)
        assert "<img" in html and file.headers["content-type"] == "image/webp"
    html, file = large(client, "energy.txt")
    assert (FILES / "energy.txt").read_text()[:40] in unescape(html) and file is None


def test_a_file_that_is_gone_or_outside_is_not_shown(client):
    for name in ("turtle.png", "pizza.png"):
        html, file = large(client, name)
        assert file is None and "not there any more" in html and 'src="data:image/jpeg' in html
        search(client, "a")
        with pytest.raises(AppError, match="is not there any more"):
            client.predict(name, api_name="/why")


def test_a_page_in_large_is_the_page_that_was_embedded(tmp_path):
    for value in ("JOHN SMITH", ""):
        (tmp_path / f"form {value}.pdf").write_bytes(form(value))
    filled, empty = ((np.asarray(as_picture(tmp_path / f"form {v}.pdf", 1)) < 128).sum() for v in ("JOHN SMITH", ""))
    assert filled > empty + 500
    first, second = picture(0), picture(1)
    first.save(tmp_path / "scan.TIF", save_all=True, append_images=[second])
    np.testing.assert_array_equal(np.asarray(as_picture(tmp_path / "scan.TIF", 2)), np.asarray(second))


# ---------------------------------------------------------------- hostile clients


def test_hostile_texts_are_texts(client):
    html = search(client, "a", kinds=["text"])[1] + large(client, "hostile.txt")[0]
    assert "<script" not in html and HOSTILE in unescape(html)
    for typed in (HOSTILE, "/etc/passwd", str(FILES / "crab.png"), "<|btok_0|><|image_pad|>", "x" * 10_000, "\x00"):
        assert len(search(client, typed)[0]) == 19


@pytest.mark.parametrize(
    "query, says",
    [
        ({}, "nothing to search for"),
        ({"text": " \n"}, "nothing to search for"),
        ({"text": "x" * 100_000}, "100,000 characters"),
        ({"text": "a", "where": "1=1; DROP TABLE items"}, "cannot be used"),
        ({"text": "a", "where": "name = '<img src=x onerror=alert(1)>'"}, "&lt;img"),
        ({"text": "a", "where": "("}, "cannot be used"),
        ({"text": "a", "kinds": ["text') OR 1=1 --"]}, "not in the list"),
        ({"text": "a", "k": 10_000}, "maximum"),
        ({"picture": FILES / "crab.png", "words": True}, "no words to match"),
        ({"picture": FILES / "energy.txt"}, "'energy.txt' is not an image"),
        ({"clip": FILES / "energy.txt"}, "'energy.txt' cannot be decoded"),
    ],
)
def test_what_cannot_be_searched_is_said(client, query, says):
    with pytest.raises(AppError, match=re.escape(says)):
        search(client, **query)


def test_nothing_that_a_client_names_is_opened(client, corpus):
    url = client.src.rstrip("/")
    for name in (corpus / "files" / "crab.png", corpus / "db", "/etc/passwd", "https://example.org/a.png"):
        for path in (f"file={name}", f"file/{name}"):
            assert httpx.get(f"{url}/gradio_api/{path}").status_code == 403
    crab = str(corpus / "files" / "crab.png")
    for meta in ({"meta": {"_type": "gradio.FileData"}}, {}):  # without it Gradio checks less
        for path in ("/etc/passwd", "/etc/none", crab, "http://127.0.0.1:1/a.png"):
            for place in range(0 if meta else 1, 3):
                inputs = [{"path": path, **meta} if place == index else None for index in range(3)]
                # Not with gradio_client, which would upload its own file.
                body = {"data": [inputs[0] or "", *inputs[1:], [], "", False, 5]}
                event = httpx.post(f"{url}/gradio_api/call/search", json=body).json()["event_id"]
                answer = httpx.get(f"{url}/gradio_api/call/search/{event}", timeout=60).text
                assert answer.startswith("event: error"), (path, place, answer)
                if meta and "://" in path:
                    assert "Addresses are not opened" in answer
                elif place == 1 and not meta:
                    assert "was not uploaded here" in answer
    log = (corpus / "uploads" / "log").read_text()
    assert log.count("Cannot move /etc/passwd to the gradio cache dir because it was not uploaded") >= 3
    for name in ("nothing", "../secret.png", "x' OR '1'='1"):
        with pytest.raises(AppError, match="There is no item"):
            client.predict(name, api_name="/show")


def test_many_clients_at_once(client):
    texts = ["tiger face", "octopus", "energy", "pizza"] * 4
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda text: search(client, text)[0], texts))
    assert found == found[:4] * 4
