"""What every request passes before the application reads it: the key, bounds in bytes and seconds, and the count."""

import asyncio
import secrets
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from btok_hf.serving.batching import QueueFull, Room

LONGEST_MESSAGE = 1000  # characters; what is wrong may be as long as the request


@dataclass(frozen=True)
class Limits:
    """Bounds of the server; flags of `btok serve`.

    Args:
        max_rows (`int`): Most rows of a request.
        queue_rows (`int`): Most rows of all requests together. More are answered with 429.
        batch_rows (`int`): Most rows of a batch.
        max_text (`int`): Most characters of the texts of a request.
        max_body (`int`): Most bytes of a request, and of a file or download that it names.
        queue_body (`int`): Most bytes of all requests together. More are answered with 429.
        max_image_pixels (`int`): Most pixels of all images and frames of a request, before any reduction.
        queue_pixels (`int`): Most pixels of all requests together. More are answered with 429. A pixel takes three
            bytes while it waits, and more while it is decoded (docs/experiments.md, 2026-11-28).
        timeout (`float`): Seconds from the first byte of a request to its answer, and of a download in it.

    Raises:
        ValueError: A bound below 1, or a request that would never fit.
    """

    max_rows: int = 256
    queue_rows: int = 1024
    batch_rows: int = 64
    max_text: int = 2_000_000
    max_body: int = 32 * 2**20
    queue_body: int = 512 * 2**20
    max_image_pixels: int = 100_000_000
    queue_pixels: int = 500_000_000
    timeout: float = 60.0

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not value > 0:
                raise ValueError(f"{name} must be above 0, got {value}.")
        for name in ("rows", "body", "image_pixels"):
            one, all_ = f"max_{name}", f"queue_{name.removeprefix('image_')}"
            if (asked := getattr(self, one)) > (most := getattr(self, all_)):
                raise ValueError(
                    f"{one}={asked} is above {all_}={most}: such a request would never fit. Raise {all_}, or lower "
                    f"{one}."
                )


def error_response(
    status: int, message: str, param: str | None = None, headers: Mapping[str, str] | None = None
) -> JSONResponse:
    """An error as OpenAI's clients expect it. What clients wrote may hold halves of characters, and be long."""
    kinds = {401: "authentication_error", 429: "rate_limit_error", 504: "timeout_error"}
    kind = kinds.get(status, "server_error" if status >= 500 else "invalid_request_error")
    own = {429: {"Retry-After": "1"}, 401: {"WWW-Authenticate": "Bearer"}}.get(status, {})
    error = {"message": _short(message), "type": kind, "param": param and _short(param), "code": status}
    return JSONResponse({"error": error}, status, {**own, **(headers or {})})


def _short(text: str) -> str:
    text = text if len(text) <= LONGEST_MESSAGE else text[:LONGEST_MESSAGE] + " …"
    return text.encode("utf-8", "backslashreplace").decode()


class Gate:
    """Middleware around the application.

    Paths below `/v1` need the key and are counted. No request is larger or takes longer than the limits allow, its
    answer included, so that neither a large nor a slow client holds the server. A request whose client is gone is
    cancelled.

    Args:
        app: The application.
        limits (`Limits`): Bounds.
        key (`bytes`, *optional*): What clients must send as `Authorization: Bearer …`.
        answered (`Callable`): Called for each request below `/v1` with its status and seconds.
    """

    def __init__(
        self, app: ASGIApp, limits: Limits, key: bytes | None, answered: Callable[[int, float], None]
    ) -> None:
        self._app, self._limits, self._key, self._answered = app, limits, key, answered
        self._bytes_held = Room(limits.queue_body, "bytes (--queue-body)")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or answer it here."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        start, status = time.perf_counter(), 500
        # Not of `request.url`, which begins with what the client gives as its host.
        counted = scope["path"].startswith("/v1/")

        async def noting_send(message: Message) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        try:
            if counted and not self._may_enter(scope):
                text = "the API key is missing or wrong. Send it as 'Authorization: Bearer …'"
                await error_response(401, text, headers={"Connection": "close"})(scope, receive, noting_send)
            else:
                await self._bounded(scope, receive, noting_send)
        finally:
            if counted:
                self._answered(status, time.perf_counter() - start)

    def _may_enter(self, scope: Scope) -> bool:
        given = dict(scope["headers"]).get(b"authorization", b"")
        return self._key is None or secrets.compare_digest(given, b"Bearer " + self._key)

    async def _bounded(self, scope: Scope, receive: Receive, send: Send) -> None:
        started, gone, size, whole = False, False, 0, asyncio.Event()
        has_body = any(name in (b"content-length", b"transfer-encoding") for name, _ in scope["headers"])

        async def bounded_receive() -> Message:
            nonlocal size
            message = await receive()
            body = message.get("body", b"")
            size += len(body)
            if size > self._limits.max_body:
                raise HTTPException(413, f"the request is larger than {self._limits.max_body} bytes (--max-body)")
            try:
                more(len(body))
            except QueueFull as error:
                raise HTTPException(429, str(error)) from error
            if not message.get("more_body"):
                whole.set()
            return message

        async def closing_send(message: Message) -> None:
            nonlocal started
            started = True
            if message["type"] == "http.response.start" and has_body and not whole.is_set():
                # The rest of the body is not read, nor waited for.
                message = {**message, "headers": [*message.get("headers", ()), (b"connection", b"close")]}
            await send(message)

        async def end_if_gone(bound: asyncio.Timeout) -> None:
            nonlocal gone
            await whole.wait()
            while (await receive())["type"] != "http.disconnect":
                pass
            if not started:
                gone = True
                bound.reschedule(0)

        try:
            with self._bytes_held.hold() as more:
                async with asyncio.timeout(self._limits.timeout) as bound:
                    watch = asyncio.create_task(end_if_gone(bound))
                    try:
                        await self._app(scope, bounded_receive, closing_send)
                    finally:
                        watch.cancel()
        except TimeoutError:
            text = f"no answer in {self._limits.timeout:g} s (--timeout): the server is busy, or the request slow"
            if not started:  # for a client that is gone, the metrics need a status: 499, as of nginx
                response = Response(status_code=499) if gone else error_response(504, text)
                await response(scope, receive, closing_send)
