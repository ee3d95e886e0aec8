"""`btok app` in a process of its own: searches, hits in large, and hostile clients."""

import re
import shutil
import signal
import socket
import stat
from concurrent.futures import ThreadPoolExecutor
from html import unescape

import httpx
import pytest
from gradio_client import handle_file
from gradio_client.exceptions import AppError
from PIL import Image
from support import ROOT, forks
from support.app import page

from btok_hf.arguments import check_free
from btok_hf.corpus.app import make_page, plain
from btok_hf.corpus.index import Index
from btok_hf.corpus.job import Options
from btok_hf.corpus.search import Searcher
from btok_hf.corpus.workers import run

MODEL = ROOT / "benchmarks" / "unified" / "models" / "btok-small"
FILES = ROOT / "examples" / "files"
CLIP = 'clip #1 100%41 "é".mp4'
HOSTILE = "<script>alert(1)</script> ${alert(1)} {{#if x}}"


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Files of every kind, embedded and indexed; then one is removed, and one leads out of the folder."""
    folder = tmp_path_factory.mktemp("corpus")
    shutil.copytree(FILES, folder / "files")
    pages = [Image.open(FILES / name).convert("RGB").resize((224, 196)) for name in ("crab.png", "tulip.png")]
    pages[0].save(folder / "files" / "pages.pdf", save_all=True, append_images=pages[1:])
    (folder / "files" / "hostile.txt").write_text(HOSTILE)
    shutil.copy(FILES / "butterfly.mp4", folder / "files" / CLIP)
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
    files = [unescape(name) for name in re.findall(r'src="(gradio_api/file=[^"]+)"', html)]
    return html, httpx.get(f"{client.src.rstrip('/')}/{files[0]}") if files else None


# ---------------------------------------------------------------- searches


def test_text_finds_drawings_clips_and_texts(client):
    ids, html = search(client, "tiger face")
    assert ids[0] == "tiger-face.png" and len(ids) == 20 and "image: tiger-face.png" in html
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
    with pytest.raises(AppError, match="brackets do not match"):
        search(client, "a", kinds=["text"], where="kind = 'text') OR (kind = 'video'")


def test_picture_and_clip_find_themselves(client):
    assert search(client, picture=FILES / "penguin.png")[0][0] == "penguin.png"
    assert search(client, clip=FILES / "octopus.mp4")[0][0] == "octopus.mp4"
    both = search(client, "hamburger", picture=FILES / "penguin.png")[0]
    assert {"hamburger.png", "penguin.png"} < set(both[:6])


def test_neighbours_of_a_hit(client):
    html, summary = client.predict("octopus.mp4", ["video"], "", 24, api_name="/more")[:2]
    assert re.findall(r'data-id="([^"]*)"', html)[:1] == ["octopus.mp4"] and "3 of 20" in summary
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
    assert large(client, CLIP)[1].content == (FILES / "butterfly.mp4").read_bytes()
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


# ---------------------------------------------------------------- hostile clients


def test_hostile_texts_are_texts(client):
    html = search(client, "a", kinds=["text"])[1] + large(client, "hostile.txt")[0]
    assert "<script" not in html and HOSTILE in unescape(html)
    for typed in (HOSTILE, "/etc/passwd", str(FILES / "crab.png"), "<|btok_0|><|image_pad|>", "x" * 10_000, "\x00"):
        assert len(search(client, typed)[0]) == 20


@pytest.mark.parametrize(
    "query, says",
    [
        ({}, "nothing to search for"),
        ({"text": " \n"}, "nothing to search for"),
        ({"text": "x" * 100_000}, "100,000 characters"),
        ({"text": "a", "where": "1=1; DROP TABLE items"}, "cannot be used"),
        ({"text": "a", "where": "name = '<img src=x onerror=alert(1)>'"}, "&lt;img"),
        ({"text": "a", "where": "((("}, "The filter '(((' cannot be used: its brackets do not match"),
        ({"text": "a", "where": " AND ".join(["1=1"] * 100_000)}, "at most 1,000"),
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


def test_other_sites_cannot_use_the_page(client):
    url = client.src.rstrip("/")
    body = {"data": ["secret", None, None, [], "", False, 3]}
    for headers in ({"origin": "http://evil.example"}, {"origin": "http://evil.example", "host": "192.168.1.5:7860"}):
        for path in ("call/search", "queue/join", "upload"):
            assert httpx.post(f"{url}/gradio_api/{path}", headers=headers, json=body).status_code == 403
    assert httpx.post(f"{url}/gradio_api/call/search", headers={"origin": url}, json=body).status_code == 200


def test_many_clients_at_once(client):
    texts = ["tiger face", "octopus", "energy", "pizza"] * 4
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda text: search(client, text)[0], texts))
    assert found == found[:4] * 4


# ---------------------------------------------------------------- start and end


@pytest.fixture
def taken():
    """A port at which something listens."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


def test_an_address_is_tried_before_anything_is_loaded(corpus, taken):
    for host, port, says in (
        ("127.0.0.1", taken, f"port {taken} (Address already in use)"),
        ("127.0.0.1", 70_000, "port 70000 (bind(): port must be 0-65535"),
        ("no host", 7860, "Nothing can listen on no host, port 7860"),
    ):
        with pytest.raises(ValueError, match=re.escape(says)) as error:
            check_free(host, port)
        assert "Give another --port or --host" in str(error.value)
    run = forks.run("-m", "btok_hf", "app", "--db", "nowhere", "--host", "::1")
    assert run.returncode == 1 and "IPv6 addresses, got --host ::1" in run.stderr
    for command in (["app", "--db", "nowhere"], ["serve", "nowhere"]):
        run = forks.run("-m", "btok_hf", *command, "--port", taken)
        assert run.returncode == 1 and f"port {taken} (Address already in use)" in run.stderr


def test_copies_are_private_and_removed_at_the_end(corpus, tmp_path):
    """Also by SIGTERM. And the page says where it is, without Gradio's advice to share it."""
    command = ("-m", "btok_hf", "app", "--db", corpus / "db", "--device", "cpu", "--port", "PORT")
    with page(command, tmp_path) as client:
        assert large(client, "octopus.mp4")[1].status_code == 200
        (own,) = tmp_path.glob("btok-app-*")
        assert stat.S_IMODE(own.stat().st_mode) == 0o700 and list(own.rglob("*.mp4"))
        assert [path for path in tmp_path.rglob("*") if path.is_file() and own not in path.parents] == [
            tmp_path / "log"
        ]
        client.process.send_signal(signal.SIGTERM)
        client.process.wait(20)
        assert not own.exists()
    log = (tmp_path / "log").read_text()
    assert f"The page is at {client.src}" in log and "share" not in log


# ---------------------------------------------------------------- the page


@pytest.fixture(scope="module")
def config(corpus):
    """What a browser is told of the page."""
    return make_page(Searcher(corpus / "db", device="cpu")).get_config_file()


def listeners(config, name):
    return [each for each in config["dependencies"] if each["api_name"] == name]


def test_the_last_of_several_searches_or_cards_counts(config):
    for name in ("search", "show"):
        (listener,) = listeners(config, name)
        assert listener["trigger_mode"] == "always_last"


def test_enter_searches_also_in_the_condition(config):
    (listener,) = listeners(config, "search")
    names = {each["id"]: each["props"].get("elem_id") for each in config["components"]}
    found = {(names[target], event) for target, event in listener["targets"]}
    assert found == {("go", "click"), ("text", "submit"), ("where", "submit")}


def test_fields_cut_nothing_without_a_word(config):
    fields = {each["props"].get("elem_id"): each["props"] for each in config["components"]}
    assert all(fields[name].get("max_length") is None for name in ("text", "where"))


def test_names_of_columns_are_no_markdown(config):
    assert plain("a*b*c, _d_ <e> f\\g") == r"a\*b\*c\, \_d\_ \<e\> f\\g"
    (field,) = (each["props"] for each in config["components"] if each["props"].get("elem_id") == "where")
    assert field["info"].startswith("on id, kind, source, page, text")
