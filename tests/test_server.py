"""`btok serve` over real HTTP: the vectors of `encode`, and refusals that leave it up."""

import base64
import json
import re
import shutil
import signal
import socket
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import numpy as np
import pytest
from fastapi.testclient import TestClient
from PIL import Image
from support.forks import Fork
from support.inputs import TOLERANCE
from support.media import image
from support.pictures import MEDIA
from support.repositories import edit
from support.serving import embed, message, png, refusal, served, web_server

from btok_hf import BTokSentenceTransformer, add_bottleneck_tokens, export_model
from btok_hf.cli import main
from btok_hf.serving.limits import Limits
from btok_hf.serving.origins import Origins
from btok_hf.serving.server import ServedModel, make_app
from btok_hf.serving.verify_url import verify_url

PART = {"type": "image_url"}
FRAMES = [image(56, 56, seed) for seed in range(4)]


@pytest.fixture(scope="module")
def server(exported):
    with served(exported) as client:
        yield client


@pytest.fixture(scope="module")
def as_given(bases, tmp_path_factory):
    """A model that keeps the order of its parts, and says to be trained for 16 dimensions."""
    folder = tmp_path_factory.mktemp("as_given")
    start = add_bottleneck_tokens(bases["qwen3_vl"], folder / "start", order="as_given", noise_std=1.0)
    model = BTokSentenceTransformer(start, device="cpu")
    model.config.matryoshka_dimensions = [16, 64]
    return export_model(model, folder / "model")


@pytest.fixture(scope="module")
def special(as_given):
    """A server of that model, which may open files of the tests, and addresses at one port."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    flags = ("--allow-files", MEDIA, "--allow-urls", f"example.org,127.0.0.1:{port}", "--timeout", 8)
    with served(as_given, *flags) as client:
        client.allowed_port = port
        yield client


@pytest.fixture(scope="module")
def narrow(exported):
    """A server with small bounds and a key."""
    bounds = {"max-rows": 4, "queue-rows": 8, "batch-rows": 2, "max-body": 100_000}
    bounds |= {"max-text": 20_000, "max-image-pixels": 10_000, "queue-pixels": 12_000}
    flags = [word for name, bound in bounds.items() for word in (f"--{name}", bound)]
    with served(exported, *flags, "--timeout", 5, key="secret") as client:
        client.headers["Authorization"] = "Bearer secret"
        yield client


# ---------------------------------------------------------------- vectors


def test_vectors_are_those_of_encode(server, model):
    texts = ["a text", "photo.png", "data:image/png;base64,x", "<|btok_0|>", "longer " * 40]
    expected = model.encode([{"text": text} for text in texts])
    for encoding in ("float", "base64"):
        assert np.abs(embed(server, input=texts, encoding_format=encoding) - expected).max() < TOLERANCE
    one = embed(server, input="a text", model="tiny", user="u", dimensions=64)
    assert np.abs(one - expected[:1]).max() < TOLERANCE
    for item, given in (
        ({"image": image(56, 84)}, message(image(56, 84))),
        ({"image": [image(56, 84), image(84, 56)], "text": "two"}, message("two", image(56, 84), image(84, 56))),
        ({"image": FRAMES[0], "video": FRAMES, "text": "both"}, message(FRAMES[0], FRAMES, "both")),
        ({"video": FRAMES, "image": FRAMES[0], "text": "both"}, message("both", FRAMES, FRAMES[0])),
        ({"text": ["a", "b"]}, message("a", "b")),
    ):
        for prompt in ("", "Find it."):
            messages = [{"role": "system", "content": prompt}, given] if prompt else [given]
            found = embed(server, messages=messages)
            assert np.abs(found - model.encode([item], prompt=prompt)).max() < TOLERANCE
    for name in ("prompt_name", "input_type"):
        assert np.abs(embed(server, input="q", **{name: "query"}) - model.encode_query([{"text": "q"}])).max() < 1e-5


def test_golden_vectors_over_http(server, exported, special, as_given, capsys):
    for repo, client in ((exported, server), (as_given, special)):
        verify_url(repo, str(client.base_url))
        assert "not reached" not in capsys.readouterr().out


def test_a_model_that_cuts_its_vectors(as_given, tmp_path):
    """`truncate_dim` of the repository is the default, and no bound."""
    shutil.copytree(as_given, tmp_path / "cut")
    edit(tmp_path / "cut", "config_sentence_transformers.json", lambda saved: saved.update(truncate_dim=8))
    (full,) = BTokSentenceTransformer(as_given, device="cpu").encode([{"text": "a"}])
    model = ServedModel(tmp_path / "cut", device="cpu")
    app = make_app(model, "m", Limits(), Origins(10**6, 10**6, 60))
    with TestClient(app) as client:
        for given, size in (({}, 8), ({"dimensions": 8}, 8), ({"dimensions": 64}, 64), ({"dimensions": None}, 8)):
            (vector,) = embed(client, input="a", **given)
            assert np.abs(vector - full[:size] / np.linalg.norm(full[:size])).max() < TOLERANCE


def test_dimensions_that_the_model_was_trained_for(special, as_given):
    (full,) = BTokSentenceTransformer(as_given, device="cpu").encode([{"text": "a"}])
    for size in (16, 64):
        (cut,) = embed(special, input="a", dimensions=size)
        assert np.abs(cut - full[:size] / np.linalg.norm(full[:size])).max() < TOLERANCE
    assert "must be one of [16, 64]" in refusal(special, 400, {"input": "a", "dimensions": 32})


def test_video_files(server, special, as_given):
    content = (MEDIA / "rotated.mp4").read_bytes()
    (expected,) = BTokSentenceTransformer(as_given, device="cpu").encode([MEDIA / "rotated.mp4"])
    data = "data:video/mp4;base64," + base64.b64encode(content).decode()
    for url in (data, f"file://{MEDIA}/rotated.mp4"):
        part = {"type": "video_url", "video_url": {"url": url}}
        assert np.abs(embed(special, messages=[{"role": "user", "content": [part]}]) - expected).max() < TOLERANCE
    assert "opens no files" in refusal(server, 400, {"messages": [{"role": "user", "content": [part]}]})
    playlist = base64.b64encode(b"ffconcat version 1.0\nfile 'README.md'\n").decode()
    part = {"type": "video_url", "video_url": {"url": "data:video/mp4;base64," + playlist}}
    assert "cannot be decoded" in refusal(special, 400, {"messages": [{"role": "user", "content": [part]}]})


def test_addresses_of_allowed_hosts(special, as_given):
    """Hosts that keep the server waiting do not keep other clients waiting."""
    picture = image(56, 84)
    with web_server(base64.b64decode(png(picture)), special.allowed_port) as asked:
        (expected,) = BTokSentenceTransformer(as_given, device="cpu").encode([picture])
        part = {"type": "image_url", "image_url": {"url": f"http://127.0.0.1:{special.allowed_port}/a.png"}}
        assert np.abs(embed(special, messages=[{"role": "user", "content": [part]}]) - expected).max() < TOLERANCE
        assert asked == ["/a.png"]
        part["image_url"]["url"] = part["image_url"]["url"].replace("127.0.0.1", "localhost")
        body = {"messages": [{"role": "user", "content": [part]}]}
        assert "not one of the allowed hosts" in refusal(special, 400, body)
    with socket.create_server(("127.0.0.1", special.allowed_port)), ThreadPoolExecutor(12) as pool:  # it never answers
        part["image_url"]["url"] = part["image_url"]["url"].replace("localhost", "127.0.0.1")
        body = {"messages": [{"role": "user", "content": [part]}]}
        waiting = [pool.submit(special.post, "/v1/embeddings", json=body) for _ in range(12)]
        assert embed(special, messages=[message(picture)]).shape == (1, 64)
        assert not any(future.done() for future in waiting)
        assert {future.result().status_code for future in waiting} <= {400, 504}


def test_usage_counts_tokens(server, model):
    items = [{"text": "a text"}, {"text": "longer " * 40}]
    tokens = int(model.preprocess(items)["attention_mask"].sum())
    answer = server.post("/v1/embeddings", json={"input": [item["text"] for item in items]}).json()
    assert answer["usage"] == {"prompt_tokens": tokens, "total_tokens": tokens} and answer["model"] == "tiny"


def test_many_clients_at_once_get_their_own_vectors(server, model):
    texts = [f"row {number} " * (1 + number % 9) for number in range(64)]
    expected = model.encode([{"text": text} for text in texts])
    with ThreadPoolExecutor(64) as pool:
        bad = pool.submit(refusal, server, 400, {"messages": [message(image(5, 5))]})
        found = np.concatenate(list(pool.map(lambda text: embed(server, input=text), texts)))
    assert np.abs(found - expected).max() < TOLERANCE and "smaller than one patch" in bad.result()
    measured = server.get("/metrics").text
    assert re.search(r'btok_requests_total\{status="200"\} \d', measured)
    assert float(re.search(r"btok_batch_rows_count (\S+)", measured)[1]) > 0
    assert float(re.search(r"^btok_rows (\S+)", measured, re.M)[1]) == 0


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    "body, says",
    [
        ({}, "either 'input' or 'messages'"),
        ({"input": "a", "messages": [message("a")]}, "either 'input' or 'messages'"),
        ({"input": []}, "1 to 256 rows"),
        ({"input": ["a"] * 257}, "--max-rows"),
        ({"input": [1, 2]}, "token ids"),
        ({"input": [[1, 2]]}, "token ids"),
        ({"input": [["a", "b"]]}, "^'input' takes a text or one list of texts, got a list of lists"),
        ({"input": [message("a")]}, "^'input' takes texts: put chats into 'messages'"),
        ({"input": [[message("a")]]}, "^'input' takes texts: put chats into 'messages'"),
        ({"input": ["a", None]}, r"^input\.1: "),
        ({"input": "a", "chat_template_kwargs": {"a": 1}}, "^chat_template_kwargs: no settings .* leave it out$"),
        ({"messages": [{"role": "assistant", "content": "a"}]}, r"^messages\.0\.role: .*'user', got 'assistant'$"),
        (
            {"messages": [{"role": "user", "content": [PART | {"image_url": "a"}]}]},
            r'^\S*0\.image_url: .*{"url": "…"}',
        ),
        ({"messages": [{"role": "user", "content": [PART]}]}, r"^messages\.0\.content\.0\.image_url: Field required$"),
        ({"messages": [{"role": "user", "content": [{"type": "audio"}]}]}, r"^messages\.0\.content\.0: .*'audio'"),
        ({"input": ["a", "  "]}, "Input 1 .*empty"),
        ({"input": ["\ud800"]}, "lone surrogate"),
        ({"input": "a", "unknown": 1}, "Extra inputs"),
        ({"input": "a", "\ud800": 1}, "unicode"),
        ({"input": "a", "dimensions": 3}, "must be one of"),
        ({"input": "a", "encoding_format": "int8"}, "'float' or 'base64'"),
        ({"input": "a", "prompt_name": "nothing"}, "no prompt 'nothing'"),
        ({"input": "a", "prompt_name": ""}, "no prompt ''"),
        ({"input": "a", "prompt_name": "query", "input_type": "query"}, "not both"),
        ({"messages": [{"role": "system", "content": "s"}, message("a")], "input_type": "query"}, "not both"),
        ({"messages": []}, "one user message"),
        ({"messages": [message("a"), message("b")]}, "one user message"),
        ({"messages": [{"role": "system", "content": message(FRAMES[0])["content"]}, message("a")]}, "must be text"),
        ({"messages": [message()]}, "empty"),
        ({"messages": [{"role": "system", "content": "\ud800"}, message("a")]}, "lone surrogate"),
        ({"messages": [{"role": "user", "content": "a", "\ud800": 1}]}, "unicode|no field"),
        ("{", r"not JSON \(at character 1\)"),
        (b"\xff", "body"),
        ("[" * 100_000, "body"),
        ("[]", "valid dictionary"),
    ],
)
def test_bad_requests_are_refused_by_name(server, body, says):
    body = json.dumps(body) if isinstance(body, dict) else body  # with escapes, where httpx would fail at halves
    assert re.search(says, refusal(server, 400, body))


def test_what_curl_sends_by_itself(server):
    answer = server.post("/v1/embeddings", content='{"input": "a"}', headers={"Content-Type": "text/plain"})
    assert answer.status_code == 400 and "Content-Type: application/json" in answer.json()["error"]["message"]
    assert len(embed(server, input="a", encoding_format=None)) == 1


@pytest.mark.parametrize(
    "url, says",
    [
        ("http://127.0.0.1/a.png", "opens no files"),
        ("file:///etc/passwd", "opens no files"),
        ("/etc/passwd", "opens no files"),
        ("data:image/png,abc", "opens no files"),
        ("data:text/plain;base64,YQ==", "opens no files"),
        ("data:image/png;base64,YQ==", "not one of"),
        ("data:image/png;base64,a", "not base64"),
        ("data:image/png;base64,é", "not base64"),
    ],
)
def test_addresses_and_broken_images_are_refused(server, url, says):
    content = [{"type": "image_url", "image_url": {"url": url}}]
    assert says in refusal(server, 400, {"messages": [{"role": "user", "content": content}]})


@pytest.mark.parametrize(
    "body, says",
    [
        (b'{"input": [' + b"0.5, " * 200_000 + b"1]}", "input"),
        (b'{"messages": [' + b"1, " * 300_000 + b"1]}", "messages"),
        (b'{"messages": [{"role": "user", "content": [' + b"1, " * 300_000 + b"1]}]}", "messages"),
        (json.dumps({"messages": [message(*["a"] * 5000)]}), "at most 4096"),
        (json.dumps({f"x{number}": 1 for number in range(100_000)}), "'x0' is no field"),
        (json.dumps({"messages": [{"role": "user"} | dict.fromkeys(map(str, range(9**6)))]}), "no field"),
    ],
)
def test_a_million_mistakes_are_refused_at_the_first(server, body, says):
    """A report of all of them took minutes and gigabytes, and nobody else was answered meanwhile."""
    start = time.monotonic()
    assert says in refusal(server, 400, body)
    assert time.monotonic() - start < 5


def test_unknown_models_and_paths(server):
    for name in ("gpt", "\ud800"):
        assert "only 'tiny'" in refusal(server, 404, json.dumps({"input": "a", "model": name}))
    assert server.get("/v1/models").json()["data"][0]["id"] == server.get("/v1/models/tiny").json()["id"] == "tiny"
    assert "only 'tiny'" in server.get("/v1/models/org/gpt").json()["error"]["message"]
    assert server.head("/health").status_code == server.get("/health").status_code == 200
    for path in ("/v1/nothing", "/v1/embeddings/"):
        assert server.get(path).json()["error"]["code"] == 404
    answer = server.get("/v1/embeddings")
    assert answer.json()["error"]["code"] == 405 and answer.headers["allow"] == "POST"


# ---------------------------------------------------------------- bounds


def test_the_key_is_asked_for(narrow):
    for key in ("", "Bearer", "Bearer secre", "Bearer secrets", "secret", "Bearer \xe9"):
        assert "API key" in refusal(narrow, 401, {"input": "a"}, headers={"Authorization": key.encode("latin-1")})
    assert embed(narrow, input="a").shape == (1, 64)
    assert narrow.get("/health", headers={"Authorization": ""}).status_code == 200


def test_bounds_are_named(narrow):
    assert "--max-rows" in refusal(narrow, 400, {"input": ["a"] * 5})
    assert "--max-body" in refusal(narrow, 413, {"input": "a" * 100_001})
    for body in ({"input": ["a" * 10_000, "b" * 10_001]}, {"messages": [message("a" * 20_001)]}):
        assert "20000 characters at most (--max-text), got 20001" in refusal(narrow, 400, body)
    assert "--max-body" in refusal(narrow, 413, (b"a" * 1000 for _ in range(200)))  # of unknown length
    assert "--max-image-pixels" in refusal(narrow, 400, {"messages": [message(Image.new("RGB", (101, 100)))]})
    assert "--max-image-pixels" in refusal(narrow, 400, {"messages": [message([Image.new("RGB", (56, 56))] * 4)]})
    assert "--max-image-pixels" in refusal(narrow, 400, {"messages": [message(*[Image.new("RGB", (56, 56))] * 4)]})


def test_media_that_fit_no_row_are_refused_before_they_are_processed(exported, monkeypatch):
    """Tiny images of one request pass all other bounds, and the processor may make large ones of each."""
    model = ServedModel(str(exported), device="cpu", max_seq_length=20)
    tiny = image(28, 28)
    model.check_media({"image": [tiny] * 40, "text": "word " * 1000})  # close calls are left to the processor
    monkeypatch.setattr(model, "preprocess", None)  # it is not reached
    with TestClient(make_app(model, "tiny", Limits(), Origins(10**6, 10**6, 10))) as client:
        error = refusal(client, 400, {"messages": [message(*[tiny] * 41)]})
    assert "about 41 tokens, and a row has 20 (max_seq_length): send fewer" in error


def test_broken_weights_are_no_mistake_of_the_client(exported):
    model = ServedModel(str(exported), device="cpu")
    model.transformer.model.get_input_embeddings().weight.data.fill_(float("nan"))
    with TestClient(
        make_app(model, "tiny", Limits(), Origins(10**6, 10**6, 10)), raise_server_exceptions=False
    ) as client:
        assert "its log says why" in refusal(client, 500, {"input": ["a", "b"]})


def test_a_slow_client_is_cut_off_and_others_are_not(narrow):
    head = "POST /v1/embeddings HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer secret\r\nContent-Length: 999\r\n"
    slow = [socket.create_connection(("127.0.0.1", narrow.port)) for _ in range(16)]
    for connection in slow:
        connection.sendall(f"{head}Content-Type: application/json\r\n\r\n{{".encode())
    assert embed(narrow, input="a").shape == (1, 64)
    for connection in slow:
        connection.settimeout(20)
        answer = connection.recv(4096)
        assert answer.startswith(b"HTTP/1.1 504") and b"connection: close" in answer.lower()
        connection.close()
    assert _metric(narrow, 'btok_requests_total{status="504"}') == 16


def test_a_full_queue_answers_429_and_recovers(narrow):
    """More rows than fit, at once; the clients of some go away."""
    body = {"input": ["long " * 800] * 4}
    with ThreadPoolExecutor(24) as pool:
        asked = [pool.submit(narrow.post, "/v1/embeddings", json=body) for _ in range(24)]
        for _ in range(4):
            gone = socket.create_connection(("127.0.0.1", narrow.port))
            gone.sendall(b"POST /v1/embeddings HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n{")
            gone.close()
        statuses = {(future.result().status_code, future.result().headers.get("Retry-After")) for future in asked}
    assert (429, "1") in statuses and statuses <= {(200, None), (429, "1"), (504, None)}
    _wait_until(lambda: not _metric(narrow, "btok_rows"))
    assert embed(narrow, input="a").shape == (1, 64)


def test_rows_of_a_killed_client_leave_the_queue(server):
    """The batch that runs is finished. The rows that wait are not embedded."""
    code = (
        "import httpx\n"
        f"httpx.post('{server.base_url}/v1/embeddings', json={{'input': ['long ' * 800] * 256}}, timeout=300)\n"
    )
    tokens = _metric(server, "btok_tokens_total")
    client = Fork(["-c", code])
    while not _metric(server, "btok_rows"):
        assert client.poll() is None
    client.kill()
    client.wait()
    _wait_until(lambda: _metric(server, 'btok_requests_total{status="499"}') == 1)
    assert not _metric(server, "btok_rows")
    assert embed(server, input="a").shape == (1, 64)
    assert _metric(server, "btok_tokens_total") - tokens < 100  # of the last request


def _metric(client, name):
    found = re.search(rf"^{re.escape(name)} (\S+)", client.get("/metrics").text, re.M)
    return float(found[1]) if found else 0.0


def _wait_until(holds):
    start = time.monotonic()
    while not holds():
        assert time.monotonic() - start < 30


def test_pixels_of_all_clients_are_bounded(narrow):
    """One picture is in the house at once, beside few rows."""
    body = {"messages": [message(image(84, 84), "long " * 800)]}
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: narrow.post("/v1/embeddings", json=body), range(8)))
    assert {answer.status_code for answer in answers} == {200, 429}
    messages = [answer.json()["error"]["message"] for answer in answers if answer.status_code == 429]
    assert any("--queue-pixels" in text for text in messages)
    assert narrow.post("/v1/embeddings", json=body).status_code == 200


def test_sigterm_answers_what_is_queued(exported, monkeypatch):
    monkeypatch.setenv("WEB_CONCURRENCY", "2")  # hosts set it, for servers of several processes
    with served(exported, "--batch-rows", 4) as client, ThreadPoolExecutor(8) as pool:
        asked = [pool.submit(embed, client, input=["long " * 400] * 16) for _ in range(8)]
        while not re.search(r"^btok_rows [1-9]\d\d", client.get("/metrics").text, re.M):
            assert not any(future.done() for future in asked)
        client.process.send_signal(signal.SIGTERM)
        assert all(future.result().shape == (16, 64) for future in asked)
        client.process.wait(30)
        with pytest.raises(httpx.TransportError):
            client.get("/health")


def test_clients_that_do_not_read_hold_neither_the_server_nor_its_end(exported):
    body = json.dumps({"input": ["a"] * 4096}).encode()  # an answer of 5 MB, more than buffers of the system take
    with (
        served(exported, "--max-rows", 4096, "--queue-rows", 4096, "--timeout", 20) as client,
        socket.socket() as deaf,
    ):
        deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
        deaf.connect(("127.0.0.1", client.port))
        head = "POST /v1/embeddings HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: "
        deaf.sendall(head.encode() + b"%d\r\n\r\n" % len(body) + body)
        while not _metric(client, "btok_tokens_total"):
            assert not _metric(client, 'btok_requests_total{status="504"}')
        _wait_until(lambda: not _metric(client, "btok_rows"))
        assert embed(client, input="a").shape == (1, 64)
        client.process.send_signal(signal.SIGTERM)
        start = time.monotonic()
        client.process.wait(60)
        assert time.monotonic() - start > 5  # it did wait, for its timeout


def test_a_second_interrupt_ends_it_at_once(exported):
    with served(exported, "--max-rows", 1024, "--max-text", 10**7) as client, ThreadPoolExecutor(1) as pool:
        asked = pool.submit(client.post, "/v1/embeddings", json={"input": ["long " * 800] * 1024})
        while not _metric(client, "btok_rows"):
            assert not asked.done()
        for _ in "12":
            client.process.send_signal(signal.SIGINT)
            time.sleep(0.5)
        client.process.wait(20)
        # The connection ends, or uvicorn answers for the cancelled request.
        assert isinstance(asked.exception(), httpx.TransportError) or asked.result().status_code == 500


@pytest.mark.parametrize("key", ["", " secret"])
def test_keys_that_nobody_can_send_are_refused(exported, key, monkeypatch, capsys):
    """An empty one is a secret that was not found. A server without a key would be open to all."""
    monkeypatch.setenv("BTOK_API_KEY", key)
    with pytest.raises(SystemExit, match="BTOK_API_KEY is set, but empty or with white space"):
        main(["serve", str(exported)])
