"""Middleware of `btok serve`: it checks the API key, bounds the bytes and seconds of a request, and counts answers."""

import asyncio
import secrets
import time
from collections.abc import Callable, Mapping

from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from btok_hf.serving.batching import Budget, QueueFull
from btok_hf.serving.limits import Limits

LONGEST_MESSAGE = 1000  # characters of an error message, which may quote the request


def error_response(
    status: int, message: str, param: str | None = None, headers: Mapping[str, str] | None = None
) -> JSONResponse:
    """An error in the format of OpenAI's API. The message is cut to a length, and made encodable as UTF-8."""
    kinds = {401: "authentication_error", 429: "rate_limit_error", 504: "timeout_error"}
    kind = kinds.get(status, "server_error" if status >= 500 else "invalid_request_error")
    own = {429: {"Retry-After": "1"}, 401: {"WWW-Authenticate": "Bearer"}}.get(status, {})
    error = {"message": _short(message), "type": kind, "param": param and _short(param), "code": status}
    return JSONResponse({"error": error}, status, {**own, **(headers or {})})


def _short(text: str) -> str:
    text = text if len(text) <= LONGEST_MESSAGE else text[:LONGEST_MESSAGE] + " …"
    return text.encode("utf-8", "backslashreplace").decode()


class Gate:
    """ASGI middleware around the application.

    Requests to paths below `/v1` need the key and are counted in the metrics. Every request is bounded in bytes, and
    in seconds from its first byte to the last of its answer, so that large or slow clients cannot block the server. If
    the client disconnects, its request is cancelled.

    Args:
        app: The application.
        limits (`Limits`): Bounds.
        key (`bytes`, *optional*): The key that clients must send as `Authorization: Bearer …`. Default: none.
        answered (`Callable`): Called after each request below `/v1` with its status and its duration in seconds.
    """

    def __init__(
        self, app: ASGIApp, limits: Limits, key: bytes | None, answered: Callable[[int, float], None]
    ) -> None:
        self._app, self._limits, self._key, self._answered = app, limits, key, answered
        self._bytes = Budget(limits.queue_body, "bytes (--queue-body)")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or answer it here."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        start, status = time.perf_counter(), 500
        # Not from `request.url`, which begins with the host that the client names.
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
                reserve(len(body))
            except QueueFull as error:
                raise HTTPException(429, str(error)) from error
            if not message.get("more_body"):
                whole.set()
            return message

        async def closing_send(message: Message) -> None:
            nonlocal started
            started = True
            if message["type"] == "http.response.start" and has_body and not whole.is_set():
                # The rest of the body will not be read, so the connection cannot be used again.
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
            with self._bytes.reserve() as reserve:
                async with asyncio.timeout(self._limits.timeout) as bound:
                    watch = asyncio.create_task(end_if_gone(bound))
                    try:
                        await self._app(scope, bounded_receive, closing_send)
                    finally:
                        watch.cancel()
        except TimeoutError:
            text = f"no answer in {self._limits.timeout:g} s (--timeout): the server is busy, or the request slow"
            if not started:  # for a client that disconnected, the metrics count status 499, as nginx does
                response = Response(status_code=499) if gone else error_response(504, text)
                await response(scope, receive, closing_send)
