"""What every request passes: the key, bounds, and the count. The server over HTTP is in `test_server.py`."""

import asyncio
import os

import pytest
from starlette.exceptions import HTTPException

from btok_hf.serving.gate import Gate, error_response
from btok_hf.serving.limits import Limits


async def _reads(scope, receive, send):
    """An application that reads the body and answers its length; with a path of its own, without reading."""
    size, more = 0, scope["path"] != "/v1/unread"
    while more:
        message = await receive()
        size, more = size + len(message["body"]), message["more_body"]
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": str(size).encode()})


def ask(gate, path="/v1/embeddings", headers=(), body=(b"",), waits=None):
    """The status, the headers and the body of an answer, as a coroutine. `waits` holds the last part of the body."""
    sent, parts = [], list(body)

    async def receive():
        if waits is not None and len(parts) == 1:
            await waits.wait()
        if not parts:
            await asyncio.sleep(60)  # the client stays
        part = parts.pop(0)
        return {"type": "http.request", "body": part, "more_body": bool(parts)}

    async def send(message):
        sent.append(message)

    async def run():
        await gate({"type": "http", "path": path, "headers": list(headers)}, receive, send)
        return sent[0]["status"], dict(sent[0]["headers"]), b"".join(part["body"] for part in sent[1:])

    return run()


@pytest.fixture
def answers():
    return []


def make(answers, key=None, app=_reads, **limits):
    return Gate(app, Limits(**limits), key, lambda status, seconds: answers.append((status, seconds)))


@pytest.mark.parametrize("key", ["secret", "sécret", "\udcff"])
def test_keys_are_compared_as_bytes(answers, key):
    gate = make(answers, os.fsencode(key))
    for given in (b"", b"Bearer", b"Bearer " + os.fsencode(key) + b"x", os.fsencode(key)):
        status, headers, _ = asyncio.run(ask(gate, headers=[(b"authorization", given)]))
        assert status == 401 and headers[b"www-authenticate"] == b"Bearer" and headers[b"connection"] == b"close"
    assert asyncio.run(ask(gate))[0] == 401
    assert asyncio.run(ask(gate, headers=[(b"authorization", b"Bearer " + os.fsencode(key))]))[0] == 200
    assert asyncio.run(ask(gate, "/health"))[0] == 200
    assert [status for status, _ in answers] == [401] * 5 + [200]


@pytest.mark.parametrize("host", [b"a/b?", b"a#", b"x/health?"])
def test_a_host_of_the_clients_choice_does_not_open_the_door(answers, host):
    assert asyncio.run(ask(make(answers, b"secret"), headers=[(b"host", host)]))[0] == 401


def test_bytes_of_all_requests_are_bounded_and_given_back(answers):
    async def main():
        gate, waits = make(answers, app=_refusing, max_body=60, queue_body=100), asyncio.Event()
        first = asyncio.create_task(ask(gate, body=(b"a" * 50, b"b" * 10), waits=waits))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert (await ask(gate, body=(b"a" * 51,)))[0] == 429
        assert (await ask(gate, body=(b"a" * 50,)))[2] == b"50"
        assert (await ask(gate, body=(b"a" * 30, b"a" * 31)))[0] == 413
        waits.set()
        assert (await first)[2] == b"60"
        assert (await ask(gate, body=(b"a" * 60,)))[2] == b"60"

    asyncio.run(main())


async def _refusing(scope, receive, send):
    """As FastAPI does with errors of reading."""
    try:
        await _reads(scope, receive, send)
    except HTTPException as error:
        await error_response(error.status_code, error.detail)(scope, receive, send)


def test_a_body_that_was_not_read_ends_the_connection(answers):
    gate = make(answers)
    sized = [(b"content-length", b"3")]
    assert b"connection" not in asyncio.run(ask(gate, headers=sized, body=(b"abc",)))[1]
    assert b"connection" not in asyncio.run(ask(gate, "/v1/unread"))[1]
    for header in (sized[0], (b"transfer-encoding", b"chunked")):
        assert asyncio.run(ask(gate, "/v1/unread", [header], (b"abc",)))[1][b"connection"] == b"close"


def test_an_answer_that_is_not_read_is_given_up(answers):
    """The time to send the answer counts."""

    async def deaf(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await asyncio.sleep(60)

    status, _, body = asyncio.run(ask(make(answers, app=deaf, timeout=0.1)))
    assert (status, body) == (200, b"") and 0.1 <= answers[0][1] < 10
    status, _, body = asyncio.run(ask(make(answers, timeout=0.1), body=(b"a", b"b"), waits=asyncio.Event()))
    assert status == 504 and b"--timeout" in body and answers[1][0] == 504


def test_a_failure_counts_as_one(answers):
    async def fails(scope, receive, send):
        raise KeyError("x")

    with pytest.raises(KeyError):
        asyncio.run(ask(make(answers, app=fails)))
    assert answers[0][0] == 500


def test_errors_are_short_and_whole():
    answer = error_response(400, "\ud800" + "a" * 10**6, "b" * 10**6)
    assert len(answer.body) < 2200 and b"\\ud800a" in answer.body
    assert b'"param":"\\\\ud800"' in error_response(400, "a", "\ud800").body
    assert error_response(405, "a", headers={"Allow": "GET"}).headers["allow"] == "GET"
    assert error_response(429, "a").headers["retry-after"] == "1"
