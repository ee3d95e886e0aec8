"""`btok serve` over real HTTP: the vectors of `encode`, and refusals that leave it up."""

import json
import random
import re
import signal
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import numpy as np
import pytest
from PIL import Image
from support.inputs import TOLERANCE
from support.media import image
from support.serving import embed, message, refusal, served

from btok_hf.golden import read_golden
from btok_hf.serving.server import Limits

FRAMES = [image(56, 56, seed) for seed in range(4)]


@pytest.fixture(scope="module")
def server(exported):
    with served(exported) as client:
        yield client


@pytest.fixture(scope="module")
def narrow(exported):
    """A server with small bounds and a key."""
    bounds = {"max-rows": 4, "queue-rows": 8, "batch-rows": 2, "max-body": 100_000, "max-image-pixels": 10_000}
    flags = [word for name, bound in bounds.items() for word in (f"--{name}", bound)]
    with served(exported, *flags, "--timeout", 2, key="secret") as client:
        client.headers["Authorization"] = "Bearer secret"
        yield client


# ---------------------------------------------------------------- vectors


def test_vectors_are_those_of_encode(server, model):
    texts = ["a text", "photo.png", "data:image/png;base64,x", "<|btok_0|>", "longer " * 40]
    expected = model.encode([{"text": text} for text in texts])
    for encoding in ("float", "base64"):
        assert np.abs(embed(server, input=texts, encoding_format=encoding) - expected).max() < TOLERANCE
    assert (
        np.abs(embed(server, input="a text", model="tiny", user="u", dimensions=64) - expected[:1]).max() < TOLERANCE
    )
    for item, given in (
        ({"image": image(56, 84)}, message(image(56, 84))),
        ({"image": [image(56, 84), image(84, 56)], "text": "two"}, message("two", image(56, 84), image(84, 56))),
        ({"image": FRAMES[0], "video": FRAMES, "text": "both"}, message(FRAMES[0], FRAMES, "both")),
        ({"text": ["a", "b"]}, message("a", "b")),
    ):
        for prompt in ("", "Find it."):
            messages = [{"role": "system", "content": prompt}, given] if prompt else [given]
            found = embed(server, messages=messages)
            assert np.abs(found - model.encode([item], prompt=prompt)).max() < TOLERANCE
    for name in ("prompt_name", "input_type"):
        assert np.abs(embed(server, input="q", **{name: "query"}) - model.encode_query([{"text": "q"}])).max() < 1e-5


def test_golden_vectors_over_http(server, exported):
    golden = read_golden(exported / "golden.json")
    reached = 0
    for row in golden["inputs"]:
        if row.keys() <= {"name", "text", "image", "video", "prompt", "prompt_name", "embedding"}:
            parts = [part for key in ("image", "text") if key in row for part in _listed(row[key])]
            parts += [[Image.fromarray(frame) for frame in row["video"]["array"]]] if "video" in row else []
            messages = [{"role": "system", "content": row.get("prompt")}] * ("prompt" in row) + [message(*parts)]
            assert np.abs(embed(server, messages=messages)[0] - row["embedding"]).max() < golden["tolerance"]
            reached += 1
    assert reached > 3


def _listed(value):
    return value if isinstance(value, list) else [value]


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
        ({"input": ["a", "  "]}, "Input 1 .*empty"),
        ({"input": ["\ud800"]}, "lone surrogate"),
        ({"input": "a", "unknown": 1}, "Extra inputs"),
        ({"input": "a", "\ud800": 1}, "unicode"),
        ({"input": "a", "dimensions": 3}, "must be one of"),
        ({"input": "a", "encoding_format": "int8"}, "'float' or 'base64'"),
        ({"input": "a", "prompt_name": "nothing"}, "no prompt 'nothing'"),
        ({"input": "a", "prompt_name": "query", "input_type": "query"}, "not both"),
        ({"messages": [{"role": "system", "content": "s"}, message("a")], "input_type": "query"}, "not both"),
        ({"messages": []}, "one user message"),
        ({"messages": [message("a"), message("b")]}, "one user message"),
        ({"messages": [message(FRAMES, FRAMES[0])]}, "images must come before videos"),
        ({"messages": [{"role": "system", "content": message(FRAMES[0])["content"]}, message("a")]}, "must be text"),
        ({"messages": [message()]}, "empty"),
        ("{", "JSON"),
        (b"\xff", "body"),
        ("[" * 100_000, "body"),
        ("[]", "valid dictionary"),
    ],
)
def test_bad_requests_are_refused_by_name(server, body, says):
    body = json.dumps(body) if isinstance(body, dict) else body  # with escapes, where httpx would fail at halves
    assert re.search(says, refusal(server, 400, body))


@pytest.mark.parametrize(
    "url, says",
    [
        ("http://127.0.0.1/a.png", "opens no files"),
        ("file:///etc/passwd", "opens no files"),
        ("/etc/passwd", "opens no files"),
        ("data:image/png,abc", "opens no files"),
        ("data:text/plain;base64,YQ==", "opens no files"),
        ("data:image/png;base64,YQ==", "not one of"),
        ("data:image/png;base64,a", "not one of"),
        ("data:image/png;base64,é", "not one of"),
    ],
)
def test_addresses_and_broken_images_are_refused(server, url, says):
    content = [{"type": "image_url", "image_url": {"url": url}}]
    assert says in refusal(server, 400, {"messages": [{"role": "user", "content": content}]})


def test_unknown_models_and_paths(server):
    for name in ("gpt", "\ud800"):
        assert "only 'tiny'" in refusal(server, 404, json.dumps({"input": "a", "model": name}))
    assert server.get("/v1/models").json()["data"][0]["id"] == "tiny"
    assert server.get("/v1/nothing").json()["error"]["code"] == 404
    assert server.get("/v1/embeddings").json()["error"]["code"] == 405


def test_fuzzed_bodies_leave_it_up(server):
    """Bytes of a good request are changed, cut and repeated. Status 500 would be a fault of the server."""
    chance = random.Random(0)
    good = json.dumps({"input": ["a", "b"], "messages": [message("a", image(28, 28))], "dimensions": 64}).encode()
    parts = [b"null", b"1e999", b"-1", b"[]", b"{}", b'"', b"\\ud800", b"NaN", b"true", b"input", b"\x00"]
    statuses = set()
    for _ in range(500):
        body = bytearray(good)
        for _ in range(chance.randint(1, 4)):
            place = chance.randrange(len(body))
            body[place : place + chance.choice([0, 1, 9, 200])] = chance.choice(parts)
        answer = server.post("/v1/embeddings", content=bytes(body), headers={"Content-Type": "application/json"})
        statuses.add(answer.status_code)
    assert statuses <= {200, 400, 404} and 400 in statuses
    assert embed(server, input="a").shape == (1, 64)


# ---------------------------------------------------------------- bounds


def test_the_key_is_asked_for(narrow):
    for key in ("", "Bearer", "Bearer secre", "Bearer secrets", "secret", "Bearer \xe9"):
        assert "API key" in refusal(narrow, 401, {"input": "a"}, headers={"Authorization": key.encode("latin-1")})
    assert embed(narrow, input="a").shape == (1, 64)
    assert narrow.get("/health", headers={"Authorization": ""}).status_code == 200


def test_bounds_are_named(narrow):
    assert "--max-rows" in refusal(narrow, 400, {"input": ["a"] * 5})
    assert "--max-body" in refusal(narrow, 413, {"input": "a" * 100_001})
    assert "--max-body" in refusal(narrow, 413, (b"a" * 1000 for _ in range(200)))  # of unknown length
    assert "--max-image-pixels" in refusal(narrow, 400, {"messages": [message(Image.new("RGB", (101, 100)))]})
    assert "--max-image-pixels" in refusal(narrow, 400, {"messages": [message([Image.new("RGB", (56, 56))] * 4)]})


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


def test_a_full_queue_answers_429_and_recovers(narrow):
    """More rows than fit, at once; the clients of some go away."""
    body = {"input": ["long " * 800] * 4}
    statuses, key = [], {"Authorization": "Bearer secret"}

    def ask():
        answer = httpx.post(narrow.base_url.join("/v1/embeddings"), json=body, headers=key, timeout=30)
        statuses.append((answer.status_code, answer.headers.get("Retry-After")))

    threads = [threading.Thread(target=ask) for _ in range(24)]
    for thread in threads:
        thread.start()
    for _ in range(4):
        gone = socket.create_connection(("127.0.0.1", narrow.port))
        gone.sendall(b"POST /v1/embeddings HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n{")
        gone.close()
    for thread in threads:
        thread.join()
    assert (429, "1") in statuses and {status for status, _ in statuses} <= {200, 429, 504}
    time.sleep(2)
    assert embed(narrow, input="a").shape == (1, 64)
    assert re.search(r"^btok_rows 0\.0", narrow.get("/metrics").text, re.M)


def test_sigterm_answers_what_is_queued(exported):
    with served(exported, "--batch-rows", 4) as client, ThreadPoolExecutor(8) as pool:
        asked = [pool.submit(embed, client, input=["long " * 400] * 16) for _ in range(8)]
        while not re.search(r"^btok_rows [1-9]\d\d", client.get("/metrics").text, re.M):
            assert not any(future.done() for future in asked)
        client.process.send_signal(signal.SIGTERM)
        assert all(future.result().shape == (16, 64) for future in asked)
        client.process.wait(30)
        with pytest.raises(httpx.TransportError):
            client.get("/health")


@pytest.mark.parametrize("bounds", [{"max_rows": 0}, {"timeout": -1.0}, {"max_rows": 9, "queue_rows": 8}])
def test_bounds_that_make_no_sense_are_refused(bounds):
    with pytest.raises(ValueError, match=next(iter(bounds))):
        Limits(**bounds)
